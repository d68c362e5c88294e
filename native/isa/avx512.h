// The sixteen-lane primitives in AVX-512 with VNNI, and the products that are built on them. Products want unsigned
// weights, so weights count as w + 128 and 128 * (sum of codes) is taken away once a block.
#pragma once
#include <immintrin.h>

#include "cpu.h"
#include "prelude.h"

namespace {
using F = __m512;
using I = __m512i;

inline F zero() { return _mm512_setzero_ps(); }
inline F set(float x) { return _mm512_set1_ps(x); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline I to_int(F a) { return _mm512_cvttps_epi32(a); }
inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }
inline F scale2(F a, F n) { return _mm512_scalef_ps(a, n); }
inline F zero_below(F a, F x, F bound) {
  return _mm512_maskz_mov_ps(_knot_mask16(_mm512_cmp_ps_mask(x, bound, _CMP_LT_OQ)), a);
}
inline F load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline F load_bf16(const uint16_t* p) {
  I wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline void store_f16(uint16_t* p, F a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline __m256 low(F a) { return _mm512_castps512_ps256(a); }
inline __m256 high(F a) { return _mm512_extractf32x8_ps(a, 1); }
inline float tree(__m256 e) {
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
inline float sum(F a) { return tree(_mm256_add_ps(low(a), high(a))); }
inline float sum(F a, F b) {
  return tree(_mm256_add_ps(_mm256_add_ps(_mm256_add_ps(low(a), high(a)), low(b)), high(b)));
}
inline float lowest(F a) { return _mm512_cvtss_f32(a); }
inline float largest(F a) { return _mm512_reduce_max_ps(a); }
inline F look_up(const float* table, I index) {
  return _mm512_permutexvar_ps(index, _mm512_castps256_ps512(_mm256_loadu_ps(table)));
}
inline I count_below(F x, const float* bounds) {  // binary search
  auto above = [&](F bound) { return _mm512_cmp_ps_mask(x, bound, _CMP_GT_OQ); };
  auto more = [](I at, __mmask16 where, int n) { return _mm512_mask_add_epi32(at, where, at, _mm512_set1_epi32(n)); };
  __mmask16 upper = above(set(bounds[3]));
  I at = _mm512_maskz_set1_epi32(upper, 4);
  at = more(at, above(_mm512_mask_mov_ps(set(bounds[1]), upper, set(bounds[5]))), 2);
  return more(at, above(look_up(bounds, at)), 1);
}
inline I add(I a, I b) { return _mm512_add_epi32(a, b); }
inline int32_t sum(I a) { return _mm512_reduce_add_epi32(a); }
inline I clamp(I a) { return _mm512_max_epi32(_mm512_min_epi32(a, _mm512_set1_epi32(127)), _mm512_set1_epi32(-127)); }
inline I join(I first, I second) { return _mm512_add_epi32(_mm512_slli_epi32(first, 7), second); }
inline void split(I whole, I& first, I& second) {
  first = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(64)), 7);
  second = _mm512_sub_epi32(whole, _mm512_slli_epi32(first, 7));
}
inline void halve(I whole, I& first, I& second) {
  first = _mm512_srli_epi32(whole, 7);
  second = _mm512_and_si512(whole, _mm512_set1_epi32(127));
}
inline void store_codes(int8_t* p, I a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a)); }
template <int Width>
inline F flip(F a) {
  const I lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_permutexvar_ps(_mm512_xor_si512(lane, _mm512_set1_epi32(Width)), a);
}

constexpr int kTokens = 4, kRows = 12, kPanels = 2, kDenseRows = 4, kDenseTokens = 4;
// Bytes to prefetch ahead of the panel: 1 to 8 KB differ little on Zen 5, 8 KB is worse on Xeon. Past the second
// level of the cache, where activations and all else that comes back should stay.
constexpr int kAhead = 4096;

// Lane l of register j = row 4l + j  ->  dword n = row n, summed over the four dwords of each lane.
inline I row_sums(const I* z) {
  I a = _mm512_unpacklo_epi32(z[0], z[1]), b = _mm512_unpackhi_epi32(z[0], z[1]);
  I c = _mm512_unpacklo_epi32(z[2], z[3]), d = _mm512_unpackhi_epi32(z[2], z[3]);
  I even = _mm512_add_epi32(_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c));
  I odd = _mm512_add_epi32(_mm512_unpacklo_epi64(b, d), _mm512_unpackhi_epi64(b, d));
  return _mm512_add_epi32(even, odd);
}
// The tables of rows {load, 4 + load, 8 + load, 12 + load}, one to a lane.
inline I row_tables(const int8_t* tables, const uint8_t* level, int load) {
  auto one = [&](int lane) {
    return _mm_loadu_si128((const __m128i*)(tables + (size_t(level[4 * lane + load]) << 4)));
  };
  I t = _mm512_castsi128_si512(one(0));
  t = _mm512_mask_broadcast_i64x2(t, 0x0c, one(1));
  t = _mm512_mask_broadcast_i64x2(t, 0x30, one(2));
  return _mm512_mask_broadcast_i64x2(t, 0xc0, one(3));
}
inline I broadcast(const int8_t* x) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)x)); }

// 4 rows x 4 columns of every lane change places: register q then holds columns 4q..4q+3 of row n in dword n.
inline void store_tiles(const I* z, int8_t* out) {
  I a = _mm512_unpacklo_epi32(z[0], z[1]), b = _mm512_unpackhi_epi32(z[0], z[1]);
  I c = _mm512_unpacklo_epi32(z[2], z[3]), d = _mm512_unpackhi_epi32(z[2], z[3]);
  _mm512_storeu_si512(out, _mm512_unpacklo_epi64(a, c));
  _mm512_storeu_si512(out + 64, _mm512_unpackhi_epi64(a, c));
  _mm512_storeu_si512(out + 128, _mm512_unpacklo_epi64(b, d));
  _mm512_storeu_si512(out + 192, _mm512_unpackhi_epi64(b, d));
}

// Two sets of sixteen columns of four rows, as bytes.
struct Pair {
  I w0, w1;
};
inline I load_line(const uint8_t* p) { return _mm512_loadu_si512(p); }
template <int Bits>
inline I shifted(I x) {  // what leaves a byte for the next is masked away
  if constexpr (Bits > 0) return _mm512_srli_epi16(x, Bits);
  if constexpr (Bits < 0) return _mm512_slli_epi16(x, -Bits);
  return x;
}
template <int Right, int Mask>
inline I part(I x) {
  return _mm512_and_si512(shifted<Right>(x), _mm512_set1_epi8(char(Mask)));
}
// Group G (for whole blocks; others pass the group's codes) of line j, as value + Plus.
template <class C, int G, int Plus>
inline Pair decode(const uint8_t* codes, const uint8_t* levels, const int8_t* tables, int j) {
  auto looked_up = [&](I i0, I i1) {
    I table = row_tables(tables, levels, j);
    if (Plus) table = _mm512_xor_si512(table, _mm512_set1_epi8(char(Plus)));
    return Pair{_mm512_shuffle_epi8(table, i0), _mm512_shuffle_epi8(table, i1)};
  };
  auto less = [](I w0, I w1) {
    const I middle = _mm512_set1_epi8(char(C::plus - Plus));
    if (Plus == C::plus) return Pair{w0, w1};
    return Pair{_mm512_sub_epi8(w0, middle), _mm512_sub_epi8(w1, middle)};
  };
  if constexpr (C::group_codes == Int8::group_codes) {
    const I plus = _mm512_set1_epi8(char(Plus));
    return {_mm512_xor_si512(load_line(codes + j * 64), plus), _mm512_xor_si512(load_line(codes + 256 + j * 64), plus)};
  } else if constexpr (C::group_codes == Nibbles::group_codes) {
    const I bytes = load_line(codes + j * 64), w0 = part<0, 15>(bytes), w1 = part<4, 15>(bytes);
    if constexpr (C::levels) return looked_up(w0, w1);
    return less(w0, w1);
  } else if constexpr (C::group_codes == Crumbs::group_codes) {
    const I bytes = load_line(codes + G / 2 * 256 + j * 64);
    const I w0 = part<G % 2 * 4, 3>(bytes), w1 = part<G % 2 * 4 + 2, 3>(bytes);
    if constexpr (C::levels) return looked_up(w0, w1);
    return less(w0, w1);
  } else if constexpr (C::group_codes == Sixes::group_codes) {
    const I low = load_line(codes + G * 256 + j * 64), high = load_line(codes + Sixes::high + G / 2 * 256 + j * 64);
    const I h0 = part<G % 2 * 4 - 4, 0x30>(high), h1 = part<G % 2 * 4 - 2, 0x30>(high);
    return less(_mm512_or_si512(part<0, 15>(low), h0), _mm512_or_si512(part<4, 15>(low), h1));
  } else if constexpr (C::group_codes == Nl3::group_codes) {
    const I low = load_line(codes + G / 2 * 256 + j * 64), high = load_line(codes + Nl3::high + j * 64);
    const I h0 = part<G * 2 - 2, 4>(high), h1 = part<G * 2 - 1, 4>(high);
    return looked_up(_mm512_or_si512(part<G % 2 * 4, 3>(low), h0), _mm512_or_si512(part<G % 2 * 4 + 2, 3>(low), h1));
  } else {
    static_assert(C::group_codes == Bits::group_codes);  // 0 or 2
    const I bytes = load_line(codes + j * 64);
    return less(part<G * 2 - 1, 2>(bytes), part<G * 2, 2>(bytes));
  }
}
// f(decoder of a line, group) for each group of a block.
template <class C, int Plus, class F>
inline __attribute__((always_inline)) void each_group(const uint8_t* block, int groups, const int8_t* tables, F f) {
  const uint8_t* levels = block + groups * C::group_codes;
  auto group = [&]<int G>(const uint8_t* codes, int g) __attribute__((always_inline)) {
    f([&](int j) __attribute__((always_inline)) { return decode<C, G, Plus>(codes, levels + g * kPanel, tables, j); },
      g);
  };
  if constexpr (C::whole) {
    group.template operator()<0>(block, 0);
    group.template operator()<1>(block, 1);
    group.template operator()<2>(block, 2);
    group.template operator()<3>(block, 3);
  } else {
    for (int g = 0; g < groups; g++) group.template operator()<0>(block + g * C::group_codes, g);
  }
}

// ---- five digits a byte

inline I tripled(I b) { return _mm512_add_epi8(b, _mm512_add_epi8(b, b)); }
inline I digit(I b) {  // what 3 * b carries
  const I one = _mm512_set1_epi8(1);
  const I some = _mm512_maskz_mov_epi8(_mm512_cmpgt_epu8_mask(b, _mm512_set1_epi8(85)), one);
  return _mm512_mask_add_epi8(some, _mm512_cmpgt_epu8_mask(b, _mm512_set1_epi8(char(170))), some, one);
}
// f(line, set, b, 3 b) for everything in a block, where the set's digits are what 3 b carries.
template <class F>
inline __attribute__((always_inline)) void each_set(const uint8_t* block, F f) {
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    I near = load_line(block + i * 64), far = load_line(block + i * 64 + 128);
    I rest = load_line(block + Trits::rest + i * 64);
#pragma GCC unroll 5
    for (int set = 0; set < 5; set++) {
      const I near3 = tripled(near), far3 = tripled(far), rest3 = tripled(rest);
      f(i, set, near, near3);
      f(i + 2, set, far, far3);
      f(set < 3 ? i : i + 2, set < 3 ? set + 5 : set + 2, rest, rest3);
      near = near3, far = far3, rest = rest3;
    }
  }
  const __m256i c = _mm256_loadu_si256((const __m256i*)(block + Trits::last));
  const I once = _mm512_inserti64x4(_mm512_castsi256_si512(c), _mm256_add_epi8(c, _mm256_add_epi8(c, c)), 1);
  const I twice = tripled(once), thrice = tripled(twice);
  f(2, 7, once, twice);
  f(3, 7, thrice, tripled(thrice));
}

template <class C>
inline void to_tiles(const uint8_t* block, int groups, const int8_t* tables, int8_t* out) {
  if constexpr (C::group_codes == Trits::group_codes) {
    I z[8][4];
    each_set(block, [&](int j, int set, I b, I)
                        __attribute__((always_inline)) { z[set][j] = _mm512_sub_epi8(digit(b), _mm512_set1_epi8(1)); });
    for (int set = 0; set < 8; set++) store_tiles(z[set], out + set * 256);
  } else {
    each_group<C, 0>(block, groups, tables, [&](auto line, int g) __attribute__((always_inline)) {
      I first[4], second[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const Pair w = line(j);
        first[j] = w.w0, second[j] = w.w1;
      }
      store_tiles(first, out + g * 512);
      store_tiles(second, out + g * 512 + 256);
    });
  }
}

template <int Rows, int Panels, bool Unsigned = false>
inline void tile_product(const int8_t* tiles, size_t panel_bytes, int quads, const int8_t* x, size_t stride,
                         const int32_t* sums, size_t sums_stride, I (*out)[Panels]) {
  const I bias = _mm512_set1_epi8(char(128));
  I acc[Rows][Panels];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; r++)
#pragma GCC unroll 2
    for (int p = 0; p < Panels; p++)
      acc[r][p] = Unsigned ? _mm512_setzero_si512() : _mm512_set1_epi32(-128 * sums[r * sums_stride]);
  // Four rows to a pointer, which the compiler must not know to be one and the same: it would keep one for each row,
  // and there are not registers for twelve.
  const int8_t* at[(Rows + 3) / 4];
  for (int i = 0; i < (Rows + 3) / 4; i++) at[i] = x + size_t(i) * 4 * stride;
  for (int q = 0; q < quads; q++) {
#pragma GCC unroll 3
    for (int i = 0; i < (Rows + 3) / 4; i++) asm("" : "+r"(at[i]));
    I w[Panels];
#pragma GCC unroll 2
    for (int p = 0; p < Panels; p++) {
      w[p] = _mm512_loadu_si512(tiles + p * panel_bytes + size_t(q) * 64);
      if (!Unsigned) w[p] = _mm512_xor_si512(w[p], bias);
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; r++) {
      int32_t four;
      __builtin_memcpy(&four, at[r / 4] + r % 4 * stride, 4);
      I a = _mm512_set1_epi32(four);
#pragma GCC unroll 2
      for (int p = 0; p < Panels; p++)
        acc[r][p] = Unsigned ? _mm512_dpbusd_epi32(acc[r][p], a, w[p]) : _mm512_dpbusd_epi32(acc[r][p], w[p], a);
    }
#pragma GCC unroll 3
    for (int i = 0; i < (Rows + 3) / 4; i++) at[i] += 4;
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; r++)
#pragma GCC unroll 2
    for (int p = 0; p < Panels; p++) out[r][p] = acc[r][p];
}

// Asks for what lies kAhead behind a group's codes.
template <class C>
inline void ask(const uint8_t* codes) {
  for (int line = 0; line < C::group_bytes; line += 64) _mm_prefetch((const char*)codes + kAhead + line, _MM_HINT_NTA);
}

// Digits are not needed: of bytes b(n+1) = 3 b(n) - 256 digit(n), so 256 * (sum of digit * x) is 3 times the sum of
// b(n) x less that of b(n+1) x.
template <int N>
inline void dot_of_bytes(const uint8_t* block, const int8_t* x, int stride, const int32_t* sums, int sums_stride,
                         I* out) {
  I now[N][4], next[N][4];
#pragma GCC unroll 2
  for (int s = 0; s < N; s++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) now[s][j] = next[s][j] = _mm512_setzero_si512();
  each_set(block, [&](int j, int set, I b, I b3) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int s = 0; s < N; s++) {
      const I columns = broadcast(x + size_t(s) * stride + set * 16);
      now[s][j] = _mm512_dpbusd_epi32(now[s][j], b, columns);
      next[s][j] = _mm512_dpbusd_epi32(next[s][j], b3, columns);
    }
  });
  for (int s = 0; s < N; s++) {
    const I first = row_sums(now[s]), thrice = _mm512_add_epi32(first, _mm512_add_epi32(first, first));
    out[s] = _mm512_sub_epi32(_mm512_srai_epi32(_mm512_sub_epi32(thrice, row_sums(next[s])), 8),
                              _mm512_set1_epi32(sums[size_t(s) * sums_stride]));
  }
}

template <int N, class C>
inline __attribute__((always_inline)) void dot(const uint8_t* block, int groups, const int8_t* tables, const int8_t* x,
                                               int stride, const int32_t* sums, int sums_stride, I* out) {
  if constexpr (C::group_codes == Trits::group_codes) {
    for (int g = 0; g < 4; g++) ask<C>(block + g * C::group_bytes);
    if constexpr (N <= 2) return dot_of_bytes<N>(block, x, stride, sums, sums_stride, out);
  }
  I acc[N][4];
  for (auto& of_row : acc)
    for (I& a : of_row) a = _mm512_setzero_si512();
  if constexpr (C::group_codes == Trits::group_codes) {
    each_set(block, [&](int j, int set, I b, I) __attribute__((always_inline)) {
      const I w = digit(b);
#pragma GCC unroll 4
      for (int s = 0; s < N; s++)
        acc[s][j] = _mm512_dpbusd_epi32(acc[s][j], w, broadcast(x + size_t(s) * stride + set * 16));
    });
  } else {
    each_group<C, C::plus>(block, groups, tables, [&](auto line, int g) __attribute__((always_inline)) {
      ask<C>(block + g * (C::whole ? C::group_bytes : C::group_codes));
      I x0[N], x1[N];
      for (int s = 0; s < N; s++) {
        x0[s] = broadcast(x + size_t(s) * stride + g * kGroup);
        x1[s] = broadcast(x + size_t(s) * stride + g * kGroup + 16);
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const Pair w = line(j);
        for (int s = 0; s < N; s++)
          acc[s][j] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(acc[s][j], w.w0, x0[s]), w.w1, x1[s]);
      }
    });
  }
  for (int s = 0; s < N; s++)
    out[s] = _mm512_sub_epi32(row_sums(acc[s]), _mm512_set1_epi32(C::plus * sums[size_t(s) * sums_stride]));
}
}  // namespace
