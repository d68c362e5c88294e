// What each instruction set's file starts with: the kernel table's types, the coders, and float16 in plain integer
// arithmetic. All in anonymous namespaces: no symbol of one instruction set may serve another.
#pragma once
#include <cstdint>

#include "../kernels.h"

namespace {

using namespace chalot;

// The packed forms that `dot` reads; bytes of one group of 32 columns of a panel.
struct Int8 {
  static constexpr int group_bytes = 512;
};
struct Nl4 {
  static constexpr int group_bytes = 272;
};

// Calls step<N>(at) over 0..count-1 in turns of Most, then of fewer.
template <int N, class Step>
inline void in_turns(int count, Step step, int at = 0) {
  for (; at + N <= count; at += N) step.template operator()<N>(at);
  if constexpr (N > 1) in_turns<(N > 8 ? 8 : N > 4 ? 4 : N / 2)>(count, step, at);
}

// float16 <-> float32, round to nearest even.

inline float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000 | fraction << 13;
  } else if (exponent) {
    bits = sign | (exponent + 112) << 23 | fraction << 13;
  } else {  // zero or subnormal: fraction * 2^-24, exact in float32
    float f = float(fraction) * 0x1p-24f;
    __builtin_memcpy(&bits, &f, 4);
    bits |= sign;
  }
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t float_to_half(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65,520 and above round to infinity
  if (bits < 0x38800000) {                                 // subnormal: the addition rounds at 2^-24
    float size;
    __builtin_memcpy(&size, &bits, 4);
    size += 0.5f;
    __builtin_memcpy(&bits, &size, 4);
    return uint16_t(sign | (bits - 0x3f000000));
  }
  uint32_t odd = bits >> 13 & 1;
  return uint16_t(sign | (bits - 0x38000000 + 0xfff + odd) >> 13);
}

}  // namespace
