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
  // Inside a job: waits until every thread of the job has come here; the last one calls `then` before any goes on.
  template <class Then>
  void barrier(Then then) {
    const uint32_t now = passed_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < size_) return wait_past(now);
    arrived_.store(0, std::memory_order_relaxed);
    then();
    passed_.store(now + 1, std::memory_order_release);
  }
  void barrier() {
    barrier([] {});
  }

 private:
  void work(int id);
  void stop();
  void wait_past(uint32_t now);
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
