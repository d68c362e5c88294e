// AVX-512 with VNNI: products want unsigned weights, so weights are looked up as w + 128 and 128 * (sum of
// codes) is taken away once a block.
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
inline F scale2(F a, F n) {
  I power = _mm512_slli_epi32(_mm512_add_epi32(to_int(n), _mm512_set1_epi32(127)), 23);
  return mul(a, _mm512_castsi512_ps(power));
}
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
inline void store_i32(int32_t* p, I a) { _mm512_storeu_si512(p, a); }
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
inline I join(I first, I second) { return _mm512_add_epi32(_mm512_slli_epi32(first, 7), second); }

constexpr int kTokens = 4, kDenseRows = 4, kDenseTokens = 4;
constexpr int kAhead = 2048;  // bytes to prefetch ahead of the panel's stream; 8 KB measured worse

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
  auto one = [&](int lane) { return _mm_loadu_si128((const __m128i*)(tables + level[4 * lane + load] * 16)); };
  I t = _mm512_castsi128_si512(one(0));
  t = _mm512_mask_broadcast_i64x2(t, 0x0c, one(1));
  t = _mm512_mask_broadcast_i64x2(t, 0x30, one(2));
  return _mm512_mask_broadcast_i64x2(t, 0xc0, one(3));
}
inline I broadcast(const int8_t* x) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)x)); }

inline void decode(const uint8_t* block, int groups, const int8_t* tables, uint8_t* out) {
  const I low = _mm512_set1_epi8(15);
  const uint8_t* levels = block + groups * 256;
  for (int g = 0; g < groups; g++)
    for (int j = 0; j < 4; j++) {
      I bytes = _mm512_loadu_si512(block + g * 256 + j * 64), table = row_tables(tables, levels + g * 16, j);
      I high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
      _mm512_storeu_si512(out + g * 512 + j * 64, _mm512_shuffle_epi8(table, _mm512_and_si512(bytes, low)));
      _mm512_storeu_si512(out + g * 512 + 256 + j * 64, _mm512_shuffle_epi8(table, high));
    }
}

template <int N, class Coder>
inline void dot(const uint8_t* block, int groups, const int8_t* tables, const int8_t* x, int stride,
                const int32_t* sums, int sums_stride, I* out) {
  const I low = _mm512_set1_epi8(15), bias = _mm512_set1_epi8(char(128));
  I acc[N][4];
  for (auto& of_row : acc)
    for (I& a : of_row) a = _mm512_setzero_si512();
  const uint8_t* levels = block + groups * 256;
  for (int g = 0; g < groups; g++) {
    const uint8_t* codes = block + g * (Coder::group_bytes == 512 ? 512 : 256);
    for (int line = 0; line < Coder::group_bytes; line += 64)
      _mm_prefetch((const char*)codes + kAhead + line, _MM_HINT_T0);
    I x0[N], x1[N];
    for (int s = 0; s < N; s++) {
      x0[s] = broadcast(x + size_t(s) * stride + g * kGroup);
      x1[s] = broadcast(x + size_t(s) * stride + g * kGroup + 16);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      I w0, w1;
      I bytes = _mm512_loadu_si512(codes + j * 64);
      if constexpr (Coder::group_bytes == 512) {
        w0 = _mm512_xor_si512(bytes, bias);
        w1 = _mm512_xor_si512(_mm512_loadu_si512(codes + 256 + j * 64), bias);
      } else {
        I table = _mm512_xor_si512(row_tables(tables, levels + g * 16, j), bias);
        w0 = _mm512_shuffle_epi8(table, _mm512_and_si512(bytes, low));
        w1 = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low));
      }
      for (int s = 0; s < N; s++) acc[s][j] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(acc[s][j], w0, x0[s]), w1, x1[s]);
    }
  }
  for (int s = 0; s < N; s++)
    out[s] = _mm512_sub_epi32(row_sums(acc[s]), _mm512_set1_epi32(128 * sums[size_t(s) * sums_stride]));
}

bool runs() { return has_avx512vnni(); }
}  // namespace

#include "loops.h"

namespace chalot {
extern const Kernels avx512vnni_kernels = {"avx512vnni", runs,    exp_all, rms_norm,     rotate, gate,  quantize,
                                           row,          product, dense,   store_cached, attend, encode};
}
