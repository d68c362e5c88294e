// A persistent pool: workers spin for a moment after a job, then park. Job 0 runs on the caller's thread.
#pragma once
#include <atomic>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace chalot {

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  int size() const { return size_; }
  // Runs job(0) ... job(size - 1), each on its own thread, and returns when all have ended.
  void run(const std::function<void(int)>& job);
  // Inside a job: waits until every thread of the job has come here.
  void barrier();

 private:
  void work(int id);
  int size_;
  std::vector<std::thread> workers_;
  const std::function<void(int)>* job_ = nullptr;
  bool stop_ = false;
  alignas(64) std::atomic<uint32_t> started_{0};
  alignas(64) std::atomic<int> running_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> passed_{0};
};

// Round to nearest, no flush to zero: results must not depend on what the caller's thread was set to.
class PlainArithmetic {
 public:
  PlainArithmetic();
  ~PlainArithmetic();

 private:
  unsigned long long saved_;
};

}  // namespace chalot
