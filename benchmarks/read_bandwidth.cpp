// How fast this machine reads memory: the yardstick that decoding is held against.
//
//   c++ -O3 -march=native -std=c++20 -pthread read_bandwidth.cpp -o read_bandwidth
//   ./read_bandwidth [threads = 2] [megabytes = 512] [passes = 5]
//
// Prints one JSON object of GB/s (10^9 bytes), the median of the passes, for two loops over one buffer:
//   plain         each thread adds up one contiguous share, front to back
//   four_streams  each thread's share is cut in four, read side by side with prefetch 2 KB ahead
// The buffer asks for 2 MB pages, "huge_mb" says how many megabytes got them; threads are pinned to
// the first CPUs that the process may use.

#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
using Vector = uint64_t __attribute__((vector_size(64)));
constexpr size_t kAhead = 2048 / sizeof(Vector);  // 2 KB: 8 KB was slower

uint64_t total(Vector sum) {
  uint64_t all = 0;
  for (int i = 0; i < 8; i++) all += sum[i];
  return all;
}

uint64_t read_plain(const Vector* data, size_t count) {
  Vector sums[4] = {};
  for (size_t i = 0; i < count; i += 4)
    for (size_t k = 0; k < 4; k++) sums[k] += data[i + k];
  return total(sums[0] + sums[1] + sums[2] + sums[3]);
}

uint64_t read_four_streams(const Vector* data, size_t count) {
  Vector sums[4] = {};
  const size_t quarter = count / 4;
  for (size_t i = 0; i < quarter; i++)
    for (size_t k = 0; k < 4; k++) {
      __builtin_prefetch(data + k * quarter + i + kAhead);
      sums[k] += data[k * quarter + i];
    }
  return total(sums[0] + sums[1] + sums[2] + sums[3]);
}

void pin_to(int index) {
  cpu_set_t allowed, one;
  sched_getaffinity(0, sizeof allowed, &allowed);
  const int wanted = index % CPU_COUNT(&allowed);
  for (int cpu = 0, seen = 0; cpu < CPU_SETSIZE; cpu++) {
    if (!CPU_ISSET(cpu, &allowed) || seen++ != wanted) continue;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    sched_setaffinity(0, sizeof one, &one);
    return;
  }
}

// Megabytes of 2 MB pages that this process holds, or -1 where the kernel does not say.
long huge_megabytes() {
  FILE* file = std::fopen("/proc/self/smaps_rollup", "r");
  if (!file) return -1;
  char line[256];
  long kilobytes = -1024;
  while (std::fgets(line, sizeof line, file))
    if (std::sscanf(line, "AnonHugePages: %ld", &kilobytes) == 1) break;
  std::fclose(file);
  return kilobytes / 1024;
}

struct Loop {
  const char* name;
  uint64_t (*read)(const Vector*, size_t);
};
constexpr Loop kLoops[] = {{"plain", read_plain}, {"four_streams", read_four_streams}};

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::max(1, std::atoi(argv[1])) : 2;
  const size_t megabytes = argc > 2 ? std::strtoul(argv[2], nullptr, 10) : 512;
  const int passes = argc > 3 ? std::max(1, std::atoi(argv[3])) : 5;
  const size_t share = (megabytes << 20) / threads & ~size_t{4095};  // bytes a thread reads
  const size_t huge = size_t{2} << 20;
  // One page more than needed: prefetches of the last stream run past the end.
  const size_t bytes = (share * threads + 2 * huge) / huge * huge;
  void* buffer = std::aligned_alloc(huge, bytes);
  if (!buffer || share == 0) return std::fprintf(stderr, "cannot get %zu bytes\n", bytes), 1;
  madvise(buffer, bytes, MADV_HUGEPAGE);
  std::memset(buffer, 1, bytes);

  // The barrier's completion stamps the moment that the last thread arrives: start, end, start, end...
  std::vector<Clock::time_point> stamps;
  stamps.reserve(2 * (passes + 1) * std::size(kLoops));
  std::barrier sync(threads, [&]() noexcept { stamps.push_back(Clock::now()); });
  std::vector<uint64_t> sums(threads);
  auto work = [&](int id) {
    pin_to(id);
    const auto* mine = reinterpret_cast<const Vector*>(static_cast<char*>(buffer) + share * id);
    for (const Loop& loop : kLoops)
      for (int pass = 0; pass <= passes; pass++) {
        sync.arrive_and_wait();
        sums[id] += loop.read(mine, share / sizeof(Vector));
        sync.arrive_and_wait();
      }
  };
  std::vector<std::thread> pool;
  for (int id = 1; id < threads; id++) pool.emplace_back(work, id);
  const long huge_mb = huge_megabytes();
  work(0);
  for (auto& thread : pool) thread.join();

  std::printf("{\"threads\": %d, \"megabytes\": %zu, \"huge_mb\": %ld", threads, megabytes, huge_mb);
  auto stamp = stamps.begin();
  for (const Loop& loop : kLoops) {
    std::vector<double> rates;
    for (int pass = 0; pass <= passes; pass++, stamp += 2) {
      const double seconds = std::chrono::duration<double>(stamp[1] - stamp[0]).count();
      if (pass > 0) rates.push_back(static_cast<double>(share) * threads / seconds / 1e9);
    }
    std::sort(rates.begin(), rates.end());
    std::printf(", \"%s\": %.2f", loop.name, rates[rates.size() / 2]);
  }
  uint64_t all = 0;
  for (uint64_t sum : sums) all += sum;
  std::printf(", \"checksum\": %llu}\n", static_cast<unsigned long long>(all));
}
