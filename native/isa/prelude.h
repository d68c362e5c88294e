// What each instruction set's file starts with: the kernel table's types, the coders, and float16 in plain integer
// arithmetic. All in anonymous namespaces: no symbol of one instruction set may serve another.
#pragma once
#include <cstdint>

#include "../kernels.h"

namespace {

using namespace chalot;

// The packed forms: how a block of 16 rows x 128 columns is stored (docs/format.md, chalot/quant/packing.py), with the
// one plain way to find a code. Rows lie as four lines of four lanes (row = 4 * lane + line), columns as eight sets of
// sixteen; `at` is 16 * lane + column of the set. Kernels decode a line of a group at a time, sets 2 g and 2 g + 1, to
// value + plus where their products want unsigned numbers.
template <int GroupCodes, bool Levels, bool Whole, int Plus>
struct Coder {
  static constexpr int group_codes = GroupCodes;  // bytes of a group's codes, of a quarter of a block
  static constexpr bool levels = Levels;          // a byte a row and group behind a block's codes; codes are of tables
  static constexpr bool whole = Whole;            // the last block is stored whole
  static constexpr int plus = Plus;               // smallest number that makes every value unsigned
  static constexpr int group_bytes = GroupCodes + (Levels ? kPanel : 0);
  static constexpr int groups(int here) { return Whole ? 4 : here; }
};
struct Int8 : Coder<512, false, false, 128> {
  static int code(const uint8_t* block, int line, int set, int at) { return block[set * 256 + line * 64 + at]; }
};
struct Nibbles : Coder<256, false, false, 8> {
  static int code(const uint8_t* block, int line, int set, int at) {
    return block[set / 2 * 256 + line * 64 + at] >> set % 2 * 4 & 15;
  }
};
struct Nl4 : Coder<256, true, false, 128> {
  static int code(const uint8_t* block, int line, int set, int at) { return Nibbles::code(block, line, set, at); }
};
struct Crumbs : Coder<128, false, true, 2> {
  static int code(const uint8_t* block, int line, int set, int at) {
    return block[set / 4 * 256 + line * 64 + at] >> set % 4 * 2 & 3;
  }
};
struct Nl2 : Coder<128, true, true, 128> {
  static int code(const uint8_t* block, int line, int set, int at) { return Crumbs::code(block, line, set, at); }
};
struct Sixes : Coder<384, false, true, 32> {  // four bits as nibbles, then two as crumbs
  static constexpr int high = 1024;
  static int code(const uint8_t* block, int line, int set, int at) {
    return Nibbles::code(block, line, set, at) | Crumbs::code(block + high, line, set, at) << 4;
  }
};
struct Bits : Coder<64, false, true, 1> {
  static int code(const uint8_t* block, int line, int set, int at) { return block[line * 64 + at] >> set & 1; }
};
struct Nl3 : Coder<192, true, true, 128> {  // two bits as crumbs, then one as bits
  static constexpr int high = 512;
  static int code(const uint8_t* block, int line, int set, int at) {
    return Crumbs::code(block, line, set, at) | Bits::code(block + high, line, set, at) << 2;
  }
};
// Five digits a byte: digit n is what the n-th multiplication of the byte by 3, modulo 256, carries.
struct Trits : Coder<104, false, true, 1> {
  static constexpr int rest = 256, last = 384;
  static int digit(uint8_t byte, int n) {
    constexpr uint8_t power[5] = {1, 3, 9, 27, 81};
    return uint8_t(byte * power[n]) * 3 >> 8;
  }
  static int code(const uint8_t* block, int line, int set, int at) {
    if (set < 5) return digit(block[line * 64 + at], set);
    if (line < 2) return digit(block[rest + line * 64 + at], set - 5);
    if (set < 7) return digit(block[rest + (line - 2) * 64 + at], set - 2);
    return digit(block[last + at % 32], (line - 2) * 2 + at / 32);
  }
};

// Value = step * code - middle, an int8 number, or the table's.
template <class C>
inline int value_of(const uint8_t* block, int groups, const int8_t* tables, int line, int set, int at) {
  const int code = C::code(block, line, set, at);
  if constexpr (C::levels) {
    const uint8_t* levels = block + groups * C::group_codes;
    return tables[levels[set / 2 * kPanel + at / 16 * 4 + line] * 16 + code];
  }
  if constexpr (C::plus == 128) return int8_t(code);
  return code * (C::group_codes == Bits::group_codes ? 2 : 1) - C::plus;
}

// Calls f with the coder of a scheme.
template <class F>
inline void with_coder(Scheme scheme, F f) {
  switch (scheme) {
    case Scheme::int8:
    case Scheme::row8:
      return f(Int8{});
    case Scheme::nl4:
    case Scheme::int4:
      return f(Nl4{});
    case Scheme::int6:
      return f(Sixes{});
    case Scheme::nl3:
      return f(Nl3{});
    case Scheme::nl2:
      return f(Nl2{});
    case Scheme::ternary:
      return f(Trits{});
    case Scheme::sign:
    case Scheme::row1:
      return f(Bits{});
    case Scheme::row4:
      return f(Nibbles{});
    case Scheme::row2:
      return f(Crumbs{});
    default:
      return;
  }
}

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
