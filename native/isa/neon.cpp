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
template <int Right, int Mask>
inline uint8x16_t part(uint8x16_t x) {
  if constexpr (Right > 0) x = vshrq_n_u8(x, Right);
  if constexpr (Right < 0) x = vshlq_n_u8(x, -Right);
  return vandq_u8(x, vdupq_n_u8(Mask));
}
inline Pair bytes_of(uint8x16_t w0, uint8x16_t w1) { return {vreinterpretq_s8_u8(w0), vreinterpretq_s8_u8(w1)}; }
// Group G (for whole blocks; others pass the group's codes) of lane `lane` of line j: as values where codes are of
// tables or int8, else value + plus.
template <class C, int G>
inline Pair decode(const uint8_t* codes, const uint8_t* levels, const int8_t* tables, int lane, int j) {
  const uint8_t* from = codes + j * 64 + lane * 16;
  auto looked_up = [&](uint8x16_t i0, uint8x16_t i1) {
    if constexpr (!C::levels) return bytes_of(i0, i1);
    const int8x16_t table = vld1q_s8(tables + levels[lane * 4 + j] * 16);
    return Pair{vqtbl1q_s8(table, i0), vqtbl1q_s8(table, i1)};
  };
  if constexpr (C::group_codes == Int8::group_codes) {
    return bytes_of(vld1q_u8(from), vld1q_u8(from + 256));
  } else if constexpr (C::group_codes == Nibbles::group_codes) {
    const uint8x16_t bytes = vld1q_u8(from);
    return looked_up(vandq_u8(bytes, vdupq_n_u8(15)), vshrq_n_u8(bytes, 4));
  } else if constexpr (C::group_codes == Crumbs::group_codes) {
    const uint8x16_t bytes = vld1q_u8(from + G / 2 * 256);
    return looked_up(part<G % 2 * 4, 3>(bytes), part<G % 2 * 4 + 2, 3>(bytes));
  } else if constexpr (C::group_codes == Sixes::group_codes) {
    const uint8x16_t low = vld1q_u8(from + G * 256), high = vld1q_u8(from + Sixes::high + G / 2 * 256);
    return bytes_of(vorrq_u8(part<0, 15>(low), part<G % 2 * 4 - 4, 0x30>(high)),
                    vorrq_u8(vshrq_n_u8(low, 4), part<G % 2 * 4 - 2, 0x30>(high)));
  } else if constexpr (C::group_codes == Nl3::group_codes) {
    const uint8x16_t low = vld1q_u8(from + G / 2 * 256), high = vld1q_u8(from + Nl3::high);
    return looked_up(vorrq_u8(part<G % 2 * 4, 3>(low), part<G * 2 - 2, 4>(high)),
                     vorrq_u8(part<G % 2 * 4 + 2, 3>(low), part<G * 2 - 1, 4>(high)));
  } else {
    static_assert(C::group_codes == Bits::group_codes);  // 0 or 2
    const uint8x16_t bytes = vld1q_u8(from);
    return bytes_of(part<G * 2 - 1, 2>(bytes), part<G * 2, 2>(bytes));
  }
}
// What three times a byte carries, and what stays.
inline int8x16_t digit(uint8x16_t& b) {
  const uint8x16_t carried = vshrq_n_u8(vhaddq_u8(b, vshrq_n_u8(b, 1)), 6);
  b = vaddq_u8(b, vaddq_u8(b, b));
  return vreinterpretq_s8_u8(carried);
}
// The digits of all eight sets of lane `lane` of line j.
inline void decode_trits(const uint8_t* block, int lane, int j, int8x16_t* sets) {
  uint8x16_t b = vld1q_u8(block + j * 64 + lane * 16);
  for (int set = 0; set < 5; set++) sets[set] = digit(b);
  b = vld1q_u8(block + Trits::rest + j % 2 * 64 + lane * 16);
  if (j >= 2) b = vmulq_u8(b, vdupq_n_u8(27));
  for (int set = 5; set < (j < 2 ? 8 : 7); set++) sets[set] = digit(b);
  if (j < 2) return;
  const uint8_t power[4] = {1, 3, 9, 27};
  b = vmulq_u8(vld1q_u8(block + Trits::last + lane % 2 * 16), vdupq_n_u8(power[(j - 2) * 2 + lane / 2]));
  sets[7] = digit(b);
}
// f(decoder of a lane and line, group) for each group of a block.
template <class C, class F>
inline __attribute__((always_inline)) void each_group(const uint8_t* block, int groups, const int8_t* tables, F f) {
  const uint8_t* levels = block + groups * C::group_codes;
  auto group = [&]<int G>(const uint8_t* codes, int g) __attribute__((always_inline)) {
    f([&](int lane, int j)
          __attribute__((always_inline)) { return decode<C, G>(codes, levels + g * kPanel, tables, lane, j); },
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

// What sums of codes have too much, of decoded registers.
template <class C>
constexpr int kPlus = C::plus == 128 ? 0 : C::plus;

template <class C>
inline void to_tiles(const uint8_t* block, int groups, const int8_t* tables, int8_t* out) {
  const int8x16_t middle = vdupq_n_s8(kPlus<C>);
  if constexpr (C::group_codes == Trits::group_codes) {
    for (int lane = 0; lane < 4; lane++) {
      int8x16_t sets[4][8];
      for (int j = 0; j < 4; j++) decode_trits(block, lane, j, sets[j]);
      for (int set = 0; set < 8; set++) {
        int8x16_t rows[4];
        for (int j = 0; j < 4; j++) rows[j] = vsubq_s8(sets[j][set], middle);
        store_tiles(rows, out + set * 256 + lane * 16);
      }
    }
  } else {
    each_group<C>(block, groups, tables, [&](auto weights, int g) __attribute__((always_inline)) {
      for (int lane = 0; lane < 4; lane++) {
        int8x16_t first[4], second[4];
        for (int j = 0; j < 4; j++) {
          const Pair w = weights(lane, j);
          first[j] = vsubq_s8(w.w0, middle), second[j] = vsubq_s8(w.w1, middle);
        }
        store_tiles(first, out + g * 512 + lane * 16);
        store_tiles(second, out + g * 512 + 256 + lane * 16);
      }
    });
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

// One row's digits times the code rows: a register of sums each.
template <int N>
inline void dot_of_trits(const uint8_t* block, const int8_t* x, int stride, int lane, int j, int32x4_t (*acc)[4]) {
  int8x16_t sets[8];
  decode_trits(block, lane, j, sets);
  for (int s = 0; s < N; s++)
    for (int set = 0; set < 8; set++)
      acc[s][j] = vdotq_s32(acc[s][j], sets[set], vld1q_s8(x + size_t(s) * stride + set * 16));
}

template <int N, class C>
inline __attribute__((always_inline)) void dot(const uint8_t* block, int groups, const int8_t* tables, const int8_t* x,
                                               int stride, const int32_t* sums, int sums_stride, I* out) {
  constexpr int kLanes = N < 4 ? 4 / N : 1;  // four rows each: sixteen of the 32 registers hold sums
  for (int first = 0; first < 4; first += kLanes) {
    int32x4_t acc[kLanes][N][4];
    for (auto& of_lane : acc)
      for (auto& of_token : of_lane)
        for (int32x4_t& a : of_token) a = vdupq_n_s32(0);
    if constexpr (C::group_codes == Trits::group_codes) {
      for (int lane = 0; lane < kLanes; lane++)
        for (int j = 0; j < 4; j++) dot_of_trits<N>(block, x, stride, first + lane, j, acc[lane]);
    } else {
      each_group<C>(block, groups, tables, [&](auto weights, int g) __attribute__((always_inline)) {
        int8x16_t x0[N], x1[N];
        for (int s = 0; s < N; s++) {
          x0[s] = vld1q_s8(x + size_t(s) * stride + g * kGroup);
          x1[s] = vld1q_s8(x + size_t(s) * stride + g * kGroup + 16);
        }
        for (int lane = 0; lane < kLanes; lane++)
          for (int j = 0; j < 4; j++) {
            const Pair w = weights(first + lane, j);
            for (int s = 0; s < N; s++)
              acc[lane][s][j] = vdotq_s32(vdotq_s32(acc[lane][s][j], w.w0, x0[s]), w.w1, x1[s]);
          }
      });
    }
    for (int s = 0; s < N; s++)
      for (int lane = 0; lane < kLanes; lane++) {
        const int32x4_t* a = acc[lane][s];
        const int32x4_t total = vpaddq_s32(vpaddq_s32(a[0], a[1]), vpaddq_s32(a[2], a[3]));
        out[s].v[first + lane] = vsubq_s32(total, vdupq_n_s32(kPlus<C> * sums[size_t(s) * sums_stride]));
      }
  }
}

bool runs() { return has_neon_dot_product(); }
}  // namespace

#include "loops.h"

namespace chalot {
extern const Kernels neon_kernels = table("neon", runs);
}
