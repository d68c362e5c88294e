#include "cpu.h"
#if defined(__x86_64__) || defined(_M_X64)
#ifdef _MSC_VER
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace chalot {
namespace {

struct Leaf {
  uint32_t a, b, c, d;
};

Leaf cpuid(uint32_t leaf, uint32_t sub) {
  Leaf r{};
#ifdef _MSC_VER
  __cpuidex(reinterpret_cast<int*>(&r), int(leaf), int(sub));
#else
  __cpuid_count(leaf, sub, r.a, r.b, r.c, r.d);
#endif
  return r;
}

// The registers that the operating system saves; 0 if it saves none beyond SSE.
uint64_t saved_state() {
  if (!(cpuid(1, 0).c >> 27 & 1)) return 0;
#ifdef _MSC_VER
  return _xgetbv(0);
#else
  uint32_t a, d;
  __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  return uint64_t(d) << 32 | a;
#endif
}

bool bit(uint32_t word, int n) { return word >> n & 1; }

bool find_avx2() {
  if (cpuid(0, 0).a < 7 || (saved_state() & 6) != 6) return false;
  Leaf one = cpuid(1, 0), seven = cpuid(7, 0);
  return bit(one.c, 12) && bit(one.c, 28) && bit(one.c, 29) && bit(seven.b, 5);  // fma, avx, f16c, avx2
}

bool find_avx512vnni() {
  if (!find_avx2() || (saved_state() & 0xe6) != 0xe6) return false;
  Leaf seven = cpuid(7, 0);
  bool f_dq_bw_vl = bit(seven.b, 16) && bit(seven.b, 17) && bit(seven.b, 30) && bit(seven.b, 31);
  return f_dq_bw_vl && bit(seven.c, 11);
}

// Tiles are the one state that Linux hands out on request only; the request holds for the whole process.
bool find_amx() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  if (!find_avx512vnni() || (saved_state() >> 17 & 3) != 3) return false;
  Leaf seven = cpuid(7, 0);
  return bit(seven.d, 24) && bit(seven.d, 25) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

bool has_avx2() {
  static const bool found = find_avx2();
  return found;
}
bool has_avxvnni() {
  static const bool found = find_avx2() && cpuid(7, 0).a >= 1 && bit(cpuid(7, 1).a, 4);
  return found;
}
bool has_amx() {
  static const bool found = find_amx();
  return found;
}
bool has_avx512vnni() {
  static const bool found = find_avx512vnni();
  return found;
}

}  // namespace chalot
#endif
