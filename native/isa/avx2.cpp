// AVX2 with FMA and F16C: sixteen lanes are two registers. Its u8 x s8 product saturates, so weights give their sign
// to the activations first: |w| * (x signed by w), within 128 and 127, so no pair passes 32,767. Weights of few values
// are taken unsigned.
#include <immintrin.h>

#include "cpu.h"
#include "prelude.h"

namespace {
struct F {
  __m256 a, b;
};
struct I {
  __m256i a, b;
};

inline F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline __m256 nearest_even(__m256 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F round(F x) { return {nearest_even(x.a), nearest_even(x.b)}; }
inline I to_int(F x) { return {_mm256_cvttps_epi32(x.a), _mm256_cvttps_epi32(x.b)}; }
inline F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline __m256 power(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
inline F scale2(F x, F n) {
  I whole = to_int(n);
  return mul(x, {power(whole.a), power(whole.b)});
}
inline F zero_below(F v, F x, F bound) {
  return {_mm256_andnot_ps(_mm256_cmp_ps(x.a, bound.a, _CMP_LT_OQ), v.a),
          _mm256_andnot_ps(_mm256_cmp_ps(x.b, bound.b, _CMP_LT_OQ), v.b)};
}
inline F load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline __m256 widen(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline F load_bf16(const uint16_t* p) { return {widen(p), widen(p + 8)}; }
inline void store_f16(uint16_t* p, F x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline float tree(__m256 e) {
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
inline float sum(F x) { return tree(_mm256_add_ps(x.a, x.b)); }
inline float sum(F x, F y) { return tree(_mm256_add_ps(_mm256_add_ps(_mm256_add_ps(x.a, x.b), y.a), y.b)); }
inline float lowest(F x) { return _mm256_cvtss_f32(x.a); }
inline float largest(F x) {
  __m256 e = _mm256_max_ps(x.a, x.b);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
inline __m256 look_up(const float* table, __m256i index) {
  return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
}
inline F look_up(const float* table, I index) { return {look_up(table, index.a), look_up(table, index.b)}; }
inline __m256i count_below(__m256 x, const float* bounds) {  // binary search
  auto above = [&](__m256 bound) { return _mm256_cmp_ps(x, bound, _CMP_GT_OQ); };
  auto few = [](__m256 mask, int n) { return _mm256_and_si256(_mm256_castps_si256(mask), _mm256_set1_epi32(n)); };
  __m256 upper = above(_mm256_set1_ps(bounds[3]));
  __m256 half = above(_mm256_blendv_ps(_mm256_set1_ps(bounds[1]), _mm256_set1_ps(bounds[5]), upper));
  __m256i at = _mm256_or_si256(few(upper, 4), few(half, 2));
  return _mm256_or_si256(at, few(above(look_up(bounds, at)), 1));
}
inline I count_below(F x, const float* bounds) { return {count_below(x.a, bounds), count_below(x.b, bounds)}; }
inline I add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline int32_t sum(I x) {
  __m256i e = _mm256_add_epi32(x.a, x.b);
  __m128i q = _mm_add_epi32(_mm256_castsi256_si128(e), _mm256_extracti128_si256(e, 1));
  q = _mm_add_epi32(q, _mm_shuffle_epi32(q, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(q, _mm_shuffle_epi32(q, 0xb1)));
}
inline I clamp(I x) {
  const __m256i low = _mm256_set1_epi32(-127), high = _mm256_set1_epi32(127);
  return {_mm256_max_epi32(_mm256_min_epi32(x.a, high), low), _mm256_max_epi32(_mm256_min_epi32(x.b, high), low)};
}
inline I join(I first, I second) {
  return {_mm256_add_epi32(_mm256_slli_epi32(first.a, 7), second.a),
          _mm256_add_epi32(_mm256_slli_epi32(first.b, 7), second.b)};
}
inline void split(I whole, I& first, I& second) {
  const __m256i half = _mm256_set1_epi32(64);
  first = {_mm256_srai_epi32(_mm256_add_epi32(whole.a, half), 7),
           _mm256_srai_epi32(_mm256_add_epi32(whole.b, half), 7)};
  second = {_mm256_sub_epi32(whole.a, _mm256_slli_epi32(first.a, 7)),
            _mm256_sub_epi32(whole.b, _mm256_slli_epi32(first.b, 7))};
}
inline void halve(I whole, I& first, I& second) {
  const __m256i low = _mm256_set1_epi32(127);
  first = {_mm256_srli_epi32(whole.a, 7), _mm256_srli_epi32(whole.b, 7)};
  second = {_mm256_and_si256(whole.a, low), _mm256_and_si256(whole.b, low)};
}
inline void store_codes(int8_t* p, I x) {
  __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
template <int Width>
inline F flip(F x) {
  if constexpr (Width == 8) return {x.b, x.a};
  if constexpr (Width == 4) return {_mm256_permute2f128_ps(x.a, x.a, 1), _mm256_permute2f128_ps(x.b, x.b, 1)};
  if constexpr (Width == 2) return {_mm256_permute_ps(x.a, 0x4e), _mm256_permute_ps(x.b, 0x4e)};
  return {_mm256_permute_ps(x.a, 0xb1), _mm256_permute_ps(x.b, 0xb1)};
}

constexpr int kTokens = 2, kRows = 4, kPanels = 1, kDenseRows = 2, kDenseTokens = 2;

// Lane l of register j = row 4l + j (of eight rows)  ->  dword n = row n, summed over the dwords of each lane.
inline __m256i row_sums(const __m256i* z) {
  __m256i a = _mm256_unpacklo_epi32(z[0], z[1]), b = _mm256_unpackhi_epi32(z[0], z[1]);
  __m256i c = _mm256_unpacklo_epi32(z[2], z[3]), d = _mm256_unpackhi_epi32(z[2], z[3]);
  __m256i even = _mm256_add_epi32(_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c));
  __m256i odd = _mm256_add_epi32(_mm256_unpacklo_epi64(b, d), _mm256_unpackhi_epi64(b, d));
  return _mm256_add_epi32(even, odd);
}
inline __m256i row_tables(const int8_t* tables, const uint8_t* level, int load) {
  auto one = [&](int lane) {
    return _mm_loadu_si128((const __m128i*)(tables + (size_t(level[4 * lane + load]) << 4)));
  };
  return _mm256_inserti128_si256(_mm256_castsi128_si256(one(0)), one(1), 1);
}
inline __m256i broadcast(const int8_t* x) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)x)); }
inline __m256i add_unsigned(__m256i acc, __m256i size, __m256i x) {
#ifdef __AVXVNNI__
  return _mm256_dpbusd_avx_epi32(acc, size, x);
#endif
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(size, x), _mm256_set1_epi16(1)));
}
inline __m256i add_product(__m256i acc, __m256i size, __m256i w, __m256i x) {
  return add_unsigned(acc, size, _mm256_sign_epi8(x, w));
}

// The same of unsigned weights: no sum of two products leaves 16 bits, and of small weights none of a block's eight
// sets, so that those are summed as they are and widened once (`widened`).
template <class C>
inline __m256i add_unsigned(__m256i acc, __m256i w0, __m256i x0, __m256i w1, __m256i x1) {
#ifdef __AVXVNNI__
  return _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(acc, w0, x0), w1, x1);
#endif
  __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(w0, x0), _mm256_maddubs_epi16(w1, x1));
  if (C::plus <= 8) return _mm256_add_epi16(acc, pairs);
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
template <class C>
inline __m256i widened(__m256i acc) {
#ifdef __AVXVNNI__
  return acc;
#endif
  return C::plus <= 8 ? _mm256_madd_epi16(acc, _mm256_set1_epi16(1)) : acc;
}

// Two sets of sixteen columns of two rows, as bytes.
struct Pair {
  __m256i w0, w1;
};
inline __m256i load_half(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
template <int Right, int Mask>
inline __m256i part(__m256i x) {
  if constexpr (Right > 0) x = _mm256_srli_epi16(x, Right);
  if constexpr (Right < 0) x = _mm256_slli_epi16(x, -Right);
  return _mm256_and_si256(x, _mm256_set1_epi8(Mask));
}
// Group G (for whole blocks; others pass the group's codes) of half h of line j: rows 8h..8h+7. As value + Plus.
template <class C, int G, int Plus>
inline Pair decode(const uint8_t* codes, const uint8_t* levels, const int8_t* tables, int j, int h) {
  const uint8_t* from = codes + j * 64 + h * 32;
  auto looked_up = [&](__m256i i0, __m256i i1) {
    const __m256i table = row_tables(tables, levels + 8 * h, j);
    return Pair{_mm256_shuffle_epi8(table, i0), _mm256_shuffle_epi8(table, i1)};
  };
  auto less = [](__m256i w0, __m256i w1) {
    const __m256i middle = _mm256_set1_epi8(char(C::plus - Plus));
    if (Plus == C::plus) return Pair{w0, w1};
    return Pair{_mm256_sub_epi8(w0, middle), _mm256_sub_epi8(w1, middle)};
  };
  if constexpr (C::group_codes == Int8::group_codes) {
    return {load_half(from), load_half(from + 256)};
  } else if constexpr (C::group_codes == Nibbles::group_codes) {
    const __m256i bytes = load_half(from), w0 = part<0, 15>(bytes), w1 = part<4, 15>(bytes);
    if constexpr (C::levels) return looked_up(w0, w1);
    return less(w0, w1);
  } else if constexpr (C::group_codes == Crumbs::group_codes) {
    const __m256i bytes = load_half(from + G / 2 * 256);
    const __m256i w0 = part<G % 2 * 4, 3>(bytes), w1 = part<G % 2 * 4 + 2, 3>(bytes);
    if constexpr (C::levels) return looked_up(w0, w1);
    return less(w0, w1);
  } else if constexpr (C::group_codes == Sixes::group_codes) {
    const __m256i low = load_half(from + G * 256), high = load_half(from + Sixes::high + G / 2 * 256);
    const __m256i h0 = part<G % 2 * 4 - 4, 0x30>(high), h1 = part<G % 2 * 4 - 2, 0x30>(high);
    return less(_mm256_or_si256(part<0, 15>(low), h0), _mm256_or_si256(part<4, 15>(low), h1));
  } else if constexpr (C::group_codes == Nl3::group_codes) {
    const __m256i low = load_half(from + G / 2 * 256), high = load_half(from + Nl3::high);
    const __m256i h0 = part<G * 2 - 2, 4>(high), h1 = part<G * 2 - 1, 4>(high);
    return looked_up(_mm256_or_si256(part<G % 2 * 4, 3>(low), h0), _mm256_or_si256(part<G % 2 * 4 + 2, 3>(low), h1));
  } else {
    static_assert(C::group_codes == Bits::group_codes);  // 0 or 2
    const __m256i bytes = load_half(from);
    return less(part<G * 2 - 1, 2>(bytes), part<G * 2, 2>(bytes));
  }
}
// f(decoder of a line, group) for each group of half h of a block.
template <class C, int Plus, class F>
inline __attribute__((always_inline)) void each_group(const uint8_t* block, int groups, const int8_t* tables, int h,
                                                      F f) {
  const uint8_t* levels = block + groups * C::group_codes;
  auto group = [&]<int G>(const uint8_t* codes, int g) __attribute__((always_inline)) {
    f([&](int j)
          __attribute__((always_inline)) { return decode<C, G, Plus>(codes, levels + g * kPanel, tables, j, h); },
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

// ---- five digits a byte; bytes count as b - 128, which the multiplication by 3 keeps

inline __m256i tripled(__m256i b) { return _mm256_add_epi8(b, _mm256_add_epi8(b, b)); }
inline __m256i less_one(__m256i b) {  // what 3 * b carries, less 1
  return _mm256_sub_epi8(_mm256_cmpgt_epi8(_mm256_set1_epi8(char(86 - 128)), b),
                         _mm256_cmpgt_epi8(b, _mm256_set1_epi8(char(170 - 128))));
}
// The eight sets of half h of line j.
inline void decode_trits(const uint8_t* block, int j, int h, __m256i* sets) {
  const __m256i bias = _mm256_set1_epi8(char(128));
  auto biased = [&](int at) { return _mm256_xor_si256(load_half(block + at), bias); };
  __m256i b = biased(j * 64 + h * 32);
  for (int set = 0; set < 5; set++, b = tripled(b)) sets[set] = less_one(b);
  b = biased(Trits::rest + j % 2 * 64 + h * 32);
  if (j >= 2) b = tripled(tripled(tripled(b)));
  for (int set = 5; set < (j < 2 ? 8 : 7); set++, b = tripled(b)) sets[set] = less_one(b);
  if (j < 2) return;
  b = biased(Trits::last);
  for (int n = (j - 2) * 2 + h; n > 0; n--) b = tripled(b);
  sets[7] = less_one(b);
}

// 4 rows x 4 columns of every lane change places: lane l of register q then holds columns 4q..4q+3 of rows 4l..4l+3.
inline void store_tiles(const __m256i* z, int8_t* out) {
  __m256i a = _mm256_unpacklo_epi32(z[0], z[1]), b = _mm256_unpackhi_epi32(z[0], z[1]);
  __m256i c = _mm256_unpacklo_epi32(z[2], z[3]), d = _mm256_unpackhi_epi32(z[2], z[3]);
  _mm256_storeu_si256((__m256i*)out, _mm256_unpacklo_epi64(a, c));
  _mm256_storeu_si256((__m256i*)(out + 64), _mm256_unpackhi_epi64(a, c));
  _mm256_storeu_si256((__m256i*)(out + 128), _mm256_unpacklo_epi64(b, d));
  _mm256_storeu_si256((__m256i*)(out + 192), _mm256_unpackhi_epi64(b, d));
}

template <class C>
inline void to_tiles(const uint8_t* block, int groups, const int8_t* tables, int8_t* out) {
  for (int h = 0; h < 2; h++) {
    if constexpr (C::group_codes == Trits::group_codes) {
      __m256i sets[4][8];
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) decode_trits(block, j, h, sets[j]);
      for (int set = 0; set < 8; set++) {
        const __m256i z[4] = {sets[0][set], sets[1][set], sets[2][set], sets[3][set]};
        store_tiles(z, out + set * 256 + h * 32);
      }
    } else {
      each_group<C, 0>(block, groups, tables, h, [&](auto line, int g) __attribute__((always_inline)) {
        __m256i first[4], second[4];
        for (int j = 0; j < 4; j++) {
          const Pair w = line(j);
          first[j] = w.w0, second[j] = w.w1;
        }
        store_tiles(first, out + g * 512 + h * 32);
        store_tiles(second, out + g * 512 + 256 + h * 32);
      });
    }
  }
}

template <int Rows, int Panels, bool Unsigned = false>
inline void tile_product(const int8_t* tiles, size_t panel_bytes, int quads, const int8_t* x, size_t stride,
                         const int32_t*, size_t, I (*out)[Panels]) {
  static_assert(Panels == 1);
  (void)panel_bytes;
  I acc[Rows];
  for (I& a : acc) a = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  for (int q = 0; q < quads; q++) {
    __m256i wa = _mm256_loadu_si256((const __m256i*)(tiles + size_t(q) * 64));
    __m256i wb = _mm256_loadu_si256((const __m256i*)(tiles + size_t(q) * 64 + 32));
    __m256i size_a = wa, size_b = wb;
    if (!Unsigned) size_a = _mm256_abs_epi8(wa), size_b = _mm256_abs_epi8(wb);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; r++) {
      int32_t four;
      __builtin_memcpy(&four, x + r * stride + q * 4, 4);
      __m256i a = _mm256_set1_epi32(four);
      acc[r].a = Unsigned ? add_unsigned(acc[r].a, a, wa) : add_product(acc[r].a, size_a, wa, a);
      acc[r].b = Unsigned ? add_unsigned(acc[r].b, a, wb) : add_product(acc[r].b, size_b, wb, a);
    }
  }
  for (int r = 0; r < Rows; r++) out[r][0] = acc[r];
}

// Eight rows times the code rows, their digits counted less 1.
template <int N>
inline void dot_of_trits(const uint8_t* block, const int8_t* x, int stride, int h, __m256i (*acc)[4]) {
  const __m256i one = _mm256_set1_epi8(1);
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    __m256i sets[8];
    decode_trits(block, j, h, sets);
    for (__m256i& w : sets) w = _mm256_add_epi8(w, one);
    for (int s = 0; s < N; s++)
      for (int set = 0; set < 8; set += 2) {
        const int8_t* columns = x + size_t(s) * stride + set * 16;
        acc[s][j] =
            add_unsigned<Trits>(acc[s][j], sets[set], broadcast(columns), sets[set + 1], broadcast(columns + 16));
      }
  }
}

template <int N, class C>
inline __attribute__((always_inline)) void dot(const uint8_t* block, int groups, const int8_t* tables, const int8_t* x,
                                               int stride, const int32_t* sums, int sums_stride, I* out) {
  constexpr bool with_sign = C::plus == 128;
  for (int h = 0; h < 2; h++) {  // eight rows at a time: the accumulators of all sixteen would not fit
    __m256i acc[N][4];
    for (auto& of_row : acc)
      for (__m256i& a : of_row) a = _mm256_setzero_si256();
    if constexpr (C::group_codes == Trits::group_codes) {
      dot_of_trits<N>(block, x, stride, h, acc);
    } else {
      each_group<C, with_sign ? 0 : C::plus>(
          block, groups, tables, h, [&](auto line, int g) __attribute__((always_inline)) {
            for (int j = 0; j < 4; j++) {
              const Pair w = line(j);
              const __m256i size0 = _mm256_abs_epi8(w.w0), size1 = _mm256_abs_epi8(w.w1);
              for (int s = 0; s < N; s++) {
                const int8_t* row = x + size_t(s) * stride + g * kGroup;
                if constexpr (with_sign) {
                  acc[s][j] = add_product(acc[s][j], size0, w.w0, broadcast(row));
                  acc[s][j] = add_product(acc[s][j], size1, w.w1, broadcast(row + 16));
                } else {
                  acc[s][j] = add_unsigned<C>(acc[s][j], w.w0, broadcast(row), w.w1, broadcast(row + 16));
                }
              }
            }
          });
    }
    for (int s = 0; s < N; s++) {
      for (__m256i& a : acc[s]) a = widened<C>(a);
      __m256i total = row_sums(acc[s]);
      if (!with_sign) total = _mm256_sub_epi32(total, _mm256_set1_epi32(C::plus * sums[size_t(s) * sums_stride]));
      (h ? out[s].b : out[s].a) = total;
    }
  }
}

}  // namespace

#include "loops.h"

namespace chalot {
#ifdef __AVXVNNI__
extern const Kernels avxvnni_kernels = table("avxvnni", has_avxvnni);
#else
extern const Kernels avx2_kernels = table("avx2", has_avx2);
#endif
}  // namespace chalot
