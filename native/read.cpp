#include "read.h"

namespace chalot {
namespace {

// Sixteen independent sums, so that no addition waits for the one before it; the compiler makes vectors of them.
inline __attribute__((always_inline)) uint64_t sum_of(const uint64_t* data, size_t count) {
  constexpr size_t kSums = 16;
  uint64_t sums[kSums] = {}, all = 0;
  const size_t whole = count / kSums * kSums;
  for (size_t i = 0; i < whole; i += kSums)
    for (size_t k = 0; k < kSums; k++) sums[k] += data[i + k];
  for (size_t i = whole; i < count; i++) all += data[i];
  for (uint64_t sum : sums) all += sum;
  return all;
}

uint64_t sum_plain(const uint64_t* data, size_t count) { return sum_of(data, count); }

// Loads of 16 bytes leave a single core short of what fast memory gives.
#if defined(__x86_64__)
__attribute__((target("avx2"))) uint64_t sum_avx2(const uint64_t* data, size_t count) { return sum_of(data, count); }
#endif

auto best_sum() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return sum_avx2;
#endif
  return sum_plain;
}

}  // namespace

uint64_t read_all(Pool& pool, const uint64_t* data, size_t count) {
  const auto sum = best_sum();
  const size_t threads = size_t(pool.size()), share = count / threads;
  std::atomic<uint64_t> all{0};
  pool.run([&](int id) {
    const size_t first = share * size_t(id), last = size_t(id) + 1 == threads ? count : first + share;
    all += sum(data + first, last - first);
  });
  return all;
}

}  // namespace chalot
