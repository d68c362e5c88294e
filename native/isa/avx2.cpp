// AVX2 with FMA and F16C: sixteen lanes are two registers. Its u8 x s8 product saturates, so weights give their sign
// to the activations first: |w| * (x signed by w), both within 127, so no pair passes 32,767.
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

// Both 16-column halves of 32 bytes (rows 8h..8h+7 of load j) of one group.
struct Pair {
  __m256i w0, w1;
};
inline Pair look_up(const uint8_t* codes, const uint8_t* level, const int8_t* tables, int j, int h) {
  const __m256i low = _mm256_set1_epi8(15);
  __m256i bytes = _mm256_loadu_si256((const __m256i*)(codes + j * 64 + h * 32));
  __m256i table = row_tables(tables, level + 8 * h, j);
  return {_mm256_shuffle_epi8(table, _mm256_and_si256(bytes, low)),
          _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low))};
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

template <class Coder>
inline Pair decoded(const uint8_t* codes, const uint8_t* level, const int8_t* tables, int j, int h) {
  if constexpr (Coder::group_bytes != 512) return look_up(codes, level, tables, j, h);
  return {_mm256_loadu_si256((const __m256i*)(codes + j * 64 + h * 32)),
          _mm256_loadu_si256((const __m256i*)(codes + 256 + j * 64 + h * 32))};
}

template <class Coder>
inline void to_tiles(const uint8_t* block, int groups, const int8_t* tables, int8_t* out) {
  const uint8_t* levels = block + groups * 256;
  for (int g = 0; g < groups; g++)
    for (int h = 0; h < 2; h++) {
      __m256i first[4], second[4];
      for (int j = 0; j < 4; j++) {
        const uint8_t* codes = block + g * (Coder::group_bytes == 512 ? 512 : 256);
        Pair w = decoded<Coder>(codes, levels + g * 16, tables, j, h);
        first[j] = w.w0, second[j] = w.w1;
      }
      store_tiles(first, out + g * 512 + h * 32);
      store_tiles(second, out + g * 512 + 256 + h * 32);
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

template <int N, class Coder>
inline void dot(const uint8_t* block, int groups, const int8_t* tables, const int8_t* x, int stride, const int32_t*,
                int, I* out) {
  const uint8_t* levels = block + groups * 256;
  for (int h = 0; h < 2; h++) {  // eight rows at a time: the accumulators of all sixteen would not fit
    __m256i acc[N][4];
    for (auto& of_row : acc)
      for (__m256i& a : of_row) a = _mm256_setzero_si256();
    for (int g = 0; g < groups; g++) {
      const uint8_t* codes = block + g * (Coder::group_bytes == 512 ? 512 : 256);
      for (int j = 0; j < 4; j++) {
        Pair w = decoded<Coder>(codes, levels + g * 16, tables, j, h);
        __m256i size0 = _mm256_abs_epi8(w.w0), size1 = _mm256_abs_epi8(w.w1);
        for (int s = 0; s < N; s++) {
          const int8_t* row = x + size_t(s) * stride + g * kGroup;
          acc[s][j] = add_product(acc[s][j], size0, w.w0, broadcast(row));
          acc[s][j] = add_product(acc[s][j], size1, w.w1, broadcast(row + 16));
        }
      }
    }
    for (int s = 0; s < N; s++) (h ? out[s].b : out[s].a) = row_sums(acc[s]);
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
