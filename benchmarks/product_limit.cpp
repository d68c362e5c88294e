// How many products of bytes this processor can make: the yardstick that prefill is held against.
//
//   c++ -O2 -march=native -std=c++20 -pthread product_limit.cpp -o product_limit
//   ./product_limit [threads = 2] [seconds = 0.5]
//
// Prints one JSON object: 10^9 products of int8 a second, added up in int32, by the widest dot product that the
// compiler's target has, registers only: no weight, input or sum is loaded or stored.

#include <immintrin.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

constexpr int kSums = 16;  // more than a dot product's latency takes
constexpr int kTurns = 1 << 16;

#if defined(__AVX512VNNI__)
using Sum = __m512i;
#define DOT "vpdpbusd %1, %1, %0"
constexpr const char* kName = "vpdpbusd zmm";
#elif defined(__AVXVNNI__)
using Sum = __m256i;
#define DOT "{vex} vpdpbusd %1, %1, %0"
constexpr const char* kName = "vpdpbusd ymm";
#else
#error "this processor has no dot products of bytes that are known here"
#endif

double products_a_second(double seconds) {
  Sum sums[kSums] = {}, x = {};
  const auto start = std::chrono::steady_clock::now();
  double passed = 0, done = 0;
  while (passed < seconds) {
    for (int turn = 0; turn < kTurns; turn++) {
#pragma GCC unroll 16
      for (int i = 0; i < kSums; i++) asm volatile(DOT : "+v"(sums[i]) : "v"(x));
    }
    done += double(kTurns) * kSums * sizeof(Sum);
    passed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  return done / passed;
}

}  // namespace

int main(int count, char** words) {
  const int threads = count > 1 ? std::atoi(words[1]) : 2;
  const double seconds = count > 2 ? std::atof(words[2]) : 0.5;
  std::vector<double> each(static_cast<size_t>(threads));
  std::vector<std::thread> workers;
  for (double& mine : each) workers.emplace_back([&mine, seconds] { mine = products_a_second(seconds); });
  double all = 0;
  for (int i = 0; i < threads; i++) workers[size_t(i)].join(), all += each[size_t(i)];
  std::printf("{\"instruction\": \"%s\", \"threads\": %d, \"giga_products\": %.1f}\n", kName, threads, all / 1e9);
}
