// Work split over threads: each has a range of its own and takes pieces off its front; who has none left takes from the
// others. A thread that loses its core for a while is so waited for less. Who computes what changes no bit.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace chalot {

class Shares {
 public:
  explicit Shares(int threads) : ranges_(size_t(threads)) {}

  // By one thread, while no other takes: 0..total-1 in pieces of `piece`.
  void split(int total, int piece) {
    const int64_t pieces = (total + piece - 1) / piece, threads = int64_t(ranges_.size());
    piece_ = piece;
    for (int64_t i = 0; i < threads; i++) {
      ranges_[size_t(i)].next.store(int(pieces * i / threads) * piece, std::memory_order_relaxed);
      ranges_[size_t(i)].end = std::min(int(pieces * (i + 1) / threads) * piece, total);
    }
  }

  // The next piece [first, last) for thread `id`; false when none is left.
  bool take(int id, int& first, int& last) {
    for (size_t i = 0; i < ranges_.size(); i++) {
      Range& r = ranges_[(size_t(id) + i) % ranges_.size()];
      if (r.next.load(std::memory_order_relaxed) >= r.end) continue;
      first = r.next.fetch_add(piece_, std::memory_order_relaxed);
      if (first >= r.end) continue;
      last = std::min(first + piece_, r.end);
      return true;
    }
    return false;
  }

 private:
  struct alignas(64) Range {
    std::atomic<int> next{0};
    int end = 0;
  };
  std::vector<Range> ranges_;
  int piece_ = 1;
};

}  // namespace chalot
