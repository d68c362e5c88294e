// NEON with the dot product of ARMv8.2: sixteen lanes are four registers. A register of codes is one row's sixteen
// columns, so each row has a register of sums, added pairwise at the end of a block.
#include <arm_neon.h>

#include "cpu.h"
#include "prelude.h"

namespace {
struct F {
  float32x4_t v[4];
};
struct I {
  int32x4_t v[4];
};

template <class Operation>
inline F each(Operation f) {
  return {{f(0), f(1), f(2), f(3)}};
}
template <class Operation>
inline I each_int(Operation f) {
  return {{f(0), f(1), f(2), f(3)}};
}
// FMAX and FMIN would give the number beside a NaN a NaN, and order zeros by sign; x86 takes the second operand.
inline float32x4_t larger(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline float32x4_t smaller(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }

inline F set(float x) {
  return each([&](int) { return vdupq_n_f32(x); });
}
inline F zero() { return set(0.0f); }
inline F load(const float* p) {
  return each([&](int i) { return vld1q_f32(p + 4 * i); });
}
inline void store(float* p, F x) {
  for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, x.v[i]);
}
inline F add(F a, F b) {
  return each([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
inline F sub(F a, F b) {
  return each([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
}
inline F mul(F a, F b) {
  return each([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
inline F div(F a, F b) {
  return each([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
}
inline F fma(F a, F b, F c) {
  return each([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}
inline F max(F a, F b) {
  return each([&](int i) { return larger(a.v[i], b.v[i]); });
}
inline F min(F a, F b) {
  return each([&](int i) { return smaller(a.v[i], b.v[i]); });
}
inline F round(F a) {
  return each([&](int i) { return vrndnq_f32(a.v[i]); });
}
inline I to_int(F a) {  // the conversion saturates and takes NaN for 0; x86 gives the least integer for both
  return each_int([&](int i) {
    uint32x4_t fits = vcaltq_f32(a.v[i], vdupq_n_f32(0x1p31f));
    return vbslq_s32(fits, vcvtq_s32_f32(a.v[i]), vdupq_n_s32(INT32_MIN));
  });
}
inline F to_float(I a) {
  return each([&](int i) { return vcvtq_f32_s32(a.v[i]); });
}
inline F scale2(F a, F n) {
  return each([&](int i) {
    int32x4_t power = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n.v[i]), vdupq_n_s32(127)), 23);
    return vmulq_f32(a.v[i], vreinterpretq_f32_s32(power));
  });
}
inline F zero_below(F a, F x, F bound) {
  return each([&](int i) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(a.v[i]), vcltq_f32(x.v[i], bound.v[i])));
  });
}
inline F load_f16(const uint16_t* p) {
  return each([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}
inline F load_bf16(const uint16_t* p) {
  return each([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
}
inline void store_f16(uint16_t* p, F a) {
  for (int i = 0; i < 4; i++) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
}
// The one tree: lanes 8 apart, then 4, 2, 1. The last two steps leave in lane 0 what counts.
template <class Operation>
inline float tree(F a, Operation f) {
  float32x4_t q = f(f(a.v[0], a.v[2]), f(a.v[1], a.v[3]));
  q = f(q, vextq_f32(q, q, 2));
  return vgetq_lane_f32(f(q, vextq_f32(q, q, 1)), 0);
}
inline float sum(F a) {
  return tree(a, [](float32x4_t x, float32x4_t y) { return vaddq_f32(x, y); });
}
inline float lowest(F a) { return vgetq_lane_f32(a.v[0], 0); }
inline float largest(F a) { return tree(a, larger); }
inline float sum(F a, F b) {
  const float32x4_t low = vaddq_f32(vaddq_f32(vaddq_f32(a.v[0], a.v[2]), b.v[0]), b.v[2]);
  const float32x4_t high = vaddq_f32(vaddq_f32(vaddq_f32(a.v[1], a.v[3]), b.v[1]), b.v[3]);
  float32x4_t q = vaddq_f32(low, high);
  q = vaddq_f32(q, vextq_f32(q, q, 2));
  return vgetq_lane_f32(vaddq_f32(q, vextq_f32(q, q, 1)), 0);
}
inline F look_up(const float* table, I index) {
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(table);
  const uint8x16x2_t all = {{vld1q_u8(bytes), vld1q_u8(bytes + 16)}};
  return each([&](int i) {  // of each index the four bytes 4 n ... 4 n + 3
    uint32x4_t first = vmulq_n_u32(vreinterpretq_u32_s32(index.v[i]), 0x04040404);
    uint8x16_t at = vreinterpretq_u8_u32(vaddq_u32(first, vdupq_n_u32(0x03020100)));
    return vreinterpretq_f32_u8(vqtbl2q_u8(all, at));
  });
}
inline I count_below(F x, const float* bounds) {
  return each_int([&](int i) {
    int32x4_t count = vdupq_n_s32(0);
    for (int b = 0; b < 7; b++)
      count = vsubq_s32(count, vreinterpretq_s32_u32(vcgtq_f32(x.v[i], vdupq_n_f32(bounds[b]))));
    return count;
  });
}
inline I add(I a, I b) {
  return each_int([&](int i) { return vaddq_s32(a.v[i], b.v[i]); });
}
inline int32_t sum(I a) { return vaddvq_s32(vaddq_s32(vaddq_s32(a.v[0], a.v[1]), vaddq_s32(a.v[2], a.v[3]))); }
inline I clamp(I a) {
  return each_int([&](int i) { return vmaxq_s32(vminq_s32(a.v[i], vdupq_n_s32(127)), vdupq_n_s32(-127)); });
}
inline I join(I first, I second) {
  return each_int([&](int i) { return vaddq_s32(vshlq_n_s32(first.v[i], 7), second.v[i]); });
}
inline void split(I whole, I& first, I& second) {
  I high = each_int([&](int i) { return vshrq_n_s32(vaddq_s32(whole.v[i], vdupq_n_s32(64)), 7); });
  second = each_int([&](int i) { return vsubq_s32(whole.v[i], vshlq_n_s32(high.v[i], 7)); });
  first = high;
}
inline void halve(I whole, I& first, I& second) {
  first = each_int([&](int i) { return vshrq_n_s32(whole.v[i], 7); });
  second = each_int([&](int i) { return vandq_s32(whole.v[i], vdupq_n_s32(127)); });
}
inline void store_codes(int8_t* p, I a) {
  int16x8_t low = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
  int16x8_t high = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
  vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}
template <int Width>
inline F flip(F a) {
  if constexpr (Width >= 4) return each([&](int i) { return a.v[i ^ (Width / 4)]; });
  if constexpr (Width == 2) return each([&](int i) { return vextq_f32(a.v[i], a.v[i], 2); });
  return each([&](int i) { return vrev64q_f32(a.v[i]); });
}

constexpr int kTokens = 4, kRows = 4, kPanels = 1, kDenseRows = 2, kDenseTokens = 2;

// One row's 32 columns of a group, as two registers.
struct Pair {
  int8x16_t w0, w1;
};
template <class Coder>
inline Pair weights(const uint8_t* codes, const int8_t* tables, uint8_t level) {
  if constexpr (Coder::group_bytes == Int8::group_bytes)
    return {vreinterpretq_s8_u8(vld1q_u8(codes)), vreinterpretq_s8_u8(vld1q_u8(codes + 256))};
  const int8x16_t table = vld1q_s8(tables + level * 16);
  const uint8x16_t bytes = vld1q_u8(codes);
  return {vqtbl1q_s8(table, vandq_u8(bytes, vdupq_n_u8(15))), vqtbl1q_s8(table, vshrq_n_u8(bytes, 4))};
}

// 4 rows x 4 columns change places: out + 64 q then holds columns 4q..4q+3 of the four rows.
inline void store_tiles(const int8x16_t* rows, int8_t* out) {
  const int32x4_t r0 = vreinterpretq_s32_s8(rows[0]), r1 = vreinterpretq_s32_s8(rows[1]);
  const int32x4_t r2 = vreinterpretq_s32_s8(rows[2]), r3 = vreinterpretq_s32_s8(rows[3]);
  const int64x2_t a = vreinterpretq_s64_s32(vzip1q_s32(r0, r1)), b = vreinterpretq_s64_s32(vzip2q_s32(r0, r1));
  const int64x2_t c = vreinterpretq_s64_s32(vzip1q_s32(r2, r3)), d = vreinterpretq_s64_s32(vzip2q_s32(r2, r3));
  vst1q_s8(out, vreinterpretq_s8_s64(vzip1q_s64(a, c)));
  vst1q_s8(out + 64, vreinterpretq_s8_s64(vzip2q_s64(a, c)));
  vst1q_s8(out + 128, vreinterpretq_s8_s64(vzip1q_s64(b, d)));
  vst1q_s8(out + 192, vreinterpretq_s8_s64(vzip2q_s64(b, d)));
}

template <class Coder>
inline void to_tiles(const uint8_t* block, int groups, const int8_t* tables, int8_t* out) {
  constexpr bool coded = Coder::group_bytes == Nl4::group_bytes;
  const uint8_t* levels = block + groups * 256;
  for (int g = 0; g < groups; g++)
    for (int lane = 0; lane < 4; lane++) {
      int8x16_t first[4], second[4];
      for (int j = 0; j < 4; j++) {
        const uint8_t* codes = block + g * (coded ? 256 : 512) + j * 64 + lane * 16;
        Pair w = weights<Coder>(codes, tables, coded ? levels[g * 16 + lane * 4 + j] : uint8_t(0));
        first[j] = w.w0, second[j] = w.w1;
      }
      store_tiles(first, out + g * 512 + lane * 16);
      store_tiles(second, out + g * 512 + 256 + lane * 16);
    }
}

template <int Lane, int Rows>
inline void add_quad(const int8_t* tiles, const int8x16_t* x, I* acc) {
  for (int i = 0; i < 4; i++) {
    const int8x16_t w = vld1q_s8(tiles + Lane * 64 + i * 16);
    for (int r = 0; r < Rows; r++) acc[r].v[i] = vdotq_laneq_s32(acc[r].v[i], w, x[r], Lane);
  }
}

template <int Rows, int Panels, bool Unsigned = false>
inline void tile_product(const int8_t* tiles, size_t, int quads, const int8_t* x, size_t stride, const int32_t*, size_t,
                         I (*out)[Panels]) {
  static_assert(Panels == 1);
  I acc[Rows];
  for (I& a : acc) a = each_int([](int) { return vdupq_n_s32(0); });
  for (int q = 0; q < quads; q += 4) {
    int8x16_t columns[Rows];
    for (int r = 0; r < Rows; r++) columns[r] = vld1q_s8(x + r * stride + q * 4);
    add_quad<0, Rows>(tiles + size_t(q) * 64, columns, acc);
    add_quad<1, Rows>(tiles + size_t(q) * 64, columns, acc);
    add_quad<2, Rows>(tiles + size_t(q) * 64, columns, acc);
    add_quad<3, Rows>(tiles + size_t(q) * 64, columns, acc);
  }
  for (int r = 0; r < Rows; r++) out[r][0] = acc[r];
}

template <int N, class Coder>
inline void dot(const uint8_t* block, int groups, const int8_t* tables, const int8_t* x, int stride, const int32_t*,
                int, I* out) {
  constexpr int kLanes = N < 4 ? 4 / N : 1;  // four rows each: sixteen of the 32 registers hold sums
  constexpr bool coded = Coder::group_bytes == Nl4::group_bytes;
  const uint8_t* levels = block + groups * 256;
  for (int first = 0; first < 4; first += kLanes) {
    int32x4_t acc[N][kLanes][4];
    for (auto& of_token : acc)
      for (auto& of_lane : of_token)
        for (int32x4_t& a : of_lane) a = vdupq_n_s32(0);
    for (int g = 0; g < groups; g++) {
      const uint8_t* codes = block + g * (coded ? 256 : 512) + first * 16;
      int8x16_t x0[N], x1[N];
      for (int s = 0; s < N; s++) {
        x0[s] = vld1q_s8(x + size_t(s) * stride + g * kGroup);
        x1[s] = vld1q_s8(x + size_t(s) * stride + g * kGroup + 16);
      }
      for (int lane = 0; lane < kLanes; lane++)
        for (int j = 0; j < 4; j++) {
          const uint8_t level = coded ? levels[g * 16 + (first + lane) * 4 + j] : 0;
          Pair w = weights<Coder>(codes + j * 64 + lane * 16, tables, level);
          for (int s = 0; s < N; s++) acc[s][lane][j] = vdotq_s32(vdotq_s32(acc[s][lane][j], w.w0, x0[s]), w.w1, x1[s]);
        }
    }
    for (int s = 0; s < N; s++)
      for (int lane = 0; lane < kLanes; lane++) {
        const int32x4_t* a = acc[s][lane];
        out[s].v[first + lane] = vpaddq_s32(vpaddq_s32(a[0], a[1]), vpaddq_s32(a[2], a[3]));
      }
  }
}

bool runs() { return has_neon_dot_product(); }
}  // namespace

#include "loops.h"

namespace chalot {
extern const Kernels neon_kernels = table("neon", runs);
}
