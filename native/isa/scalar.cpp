// The portable table: sixteen lanes as arrays. It is also the statement, in C++, of what each primitive means.
#include "prelude.h"

namespace {
struct F {
  float v[16];
};
struct I {
  int32_t v[16];
};

template <class Operation>
inline F each(Operation f) {
  F out;
  for (int i = 0; i < 16; i++) out.v[i] = f(i);
  return out;
}
inline F set(float x) {
  return each([&](int) { return x; });
}
inline F zero() { return set(0.0f); }
inline F load(const float* p) {
  return each([&](int i) { return p[i]; });
}
inline void store(float* p, F x) {
  for (int i = 0; i < 16; i++) p[i] = x.v[i];
}
inline F add(F a, F b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline F sub(F a, F b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline F mul(F a, F b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline F div(F a, F b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
inline F fma(F a, F b, F c) {  // a * b + c, rounded once
  return each([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
}
inline F max(F a, F b) {  // the second where they do not compare, as x86 does
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F min(F a, F b) {
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F round(F a) {  // to nearest even
  return each([&](int i) { return __builtin_rintf(a.v[i]); });
}
inline I to_int(F a) {
  I out;
  for (int i = 0; i < 16; i++) {
    bool fits = a.v[i] > -2147483648.0f && a.v[i] < 2147483648.0f;
    out.v[i] = fits ? int32_t(a.v[i]) : INT32_MIN;
  }
  return out;
}
inline F to_float(I a) {
  return each([&](int i) { return float(a.v[i]); });
}
inline F scale2(F a, F n) {  // a * 2^n for whole n in -126..127
  return each([&](int i) {
    uint32_t bits = uint32_t(int32_t(n.v[i]) + 127) << 23;
    float power;
    __builtin_memcpy(&power, &bits, 4);
    return a.v[i] * power;
  });
}
inline F zero_below(F a, F x, F bound) {  // 0 where x < bound, else a
  return each([&](int i) { return x.v[i] < bound.v[i] ? 0.0f : a.v[i]; });
}
inline F load_f16(const uint16_t* p) {
  return each([&](int i) { return half_to_float(p[i]); });
}
inline F load_bf16(const uint16_t* p) {
  return each([&](int i) {
    uint32_t bits = uint32_t(p[i]) << 16;
    float f;
    __builtin_memcpy(&f, &bits, 4);
    return f;
  });
}
inline void store_f16(uint16_t* p, F a) {
  for (int i = 0; i < 16; i++) p[i] = float_to_half(a.v[i]);
}
inline float tree(F a, int width) {  // the one tree: lanes 8 apart (or 4), then 4, 2, 1
  for (; width; width /= 2)
    for (int i = 0; i < width; i++) a.v[i] = a.v[i] + a.v[i + width];
  return a.v[0];
}
inline float sum(F a) { return tree(a, 8); }
inline float sum(F a, F b) {  // of 32 numbers: eight lanes of four each, one after another, then their tree
  return tree(each([&](int i) { return ((a.v[i % 8] + a.v[i % 8 + 8]) + b.v[i % 8]) + b.v[i % 8 + 8]; }), 4);
}
inline float lowest(F a) { return a.v[0]; }  // the first lane
inline float largest(F a) {
  float high = a.v[0];
  for (int i = 1; i < 16; i++) high = a.v[i] > high ? a.v[i] : high;
  return high;
}
inline I count_below(F x, const float* bounds) {  // how many of seven ascending bounds lie below x
  I out = {};
  for (int i = 0; i < 7; i++)
    for (int l = 0; l < 16; l++) out.v[l] += x.v[l] > bounds[i];
  return out;
}
inline F look_up(const float* table, I index) {  // of eight numbers
  return each([&](int i) { return table[index.v[i]]; });
}
template <class Operation>
inline I each_whole(Operation f) {
  I out;
  for (int i = 0; i < 16; i++) out.v[i] = f(i);
  return out;
}
inline I add(I a, I b) {
  return each_whole([&](int i) { return a.v[i] + b.v[i]; });
}
inline int32_t sum(I a) {
  int32_t total = 0;
  for (int32_t v : a.v) total += v;
  return total;
}
inline I clamp(I a) {
  return each_whole([&](int i) { return a.v[i] > 127 ? 127 : a.v[i] < -127 ? -127 : a.v[i]; });
}
// A whole number as 128 * first + second, second within -64..63, and back.
inline void split(I whole, I& first, I& second) {
  first = each_whole([&](int i) { return int32_t((int64_t(whole.v[i]) + 64) >> 7); });
  second = each_whole([&](int i) { return int32_t(whole.v[i] - int64_t(first.v[i]) * 128); });
}
inline I join(I first, I second) {
  return each_whole([&](int i) { return first.v[i] * 128 + second.v[i]; });
}
// Of a number below 2^14 and not below 0: its upper and its lower seven bits.
inline void halve(I whole, I& first, I& second) {
  first = each_whole([&](int i) { return whole.v[i] >> 7; });
  second = each_whole([&](int i) { return whole.v[i] & 127; });
}
inline void store_codes(int8_t* p, I a) {
  for (int i = 0; i < 16; i++) p[i] = int8_t(a.v[i]);
}
template <int Width>
inline F flip(F a) {  // lanes i and i ^ Width change places
  return each([&](int i) { return a.v[i ^ Width]; });
}

// Code rows that a product takes at once: as they are packed, and as tiles; panels at once as tiles.
constexpr int kTokens = 4, kRows = 4, kPanels = 1, kDenseRows = 2, kDenseTokens = 2;

// Two halves of 16 columns of each group, as int8 lies in a file.
template <class C>
inline void decode(const uint8_t* block, int groups, const int8_t* tables, int8_t* out) {
  for (int set = 0; set < groups * 2; set++)
    for (int line = 0; line < 4; line++)
      for (int at = 0; at < 64; at++)
        out[set * 256 + line * 64 + at] = int8_t(value_of<C>(block, groups, tables, line, set, at));
}

// Packed groups as tiles: for each 4 columns, 16 rows of 4 bytes.
template <class Coder>
inline void to_tiles(const uint8_t* block, int groups, const int8_t* tables, int8_t* out) {
  alignas(64) int8_t plain[4 * Int8::group_codes];
  decode<Coder>(block, groups, tables, plain);
  for (int half = 0; half < groups * 2; half++)
    for (int i = 0; i < 256; i++) {
      int row = i / 16 % 4 * 4 + i / 64, column = i % 16;
      out[half * 256 + column / 4 * 64 + row * 4 + column % 4] = plain[half * 256 + i];
    }
}

// out[r][p] = sixteen sums over 4 * quads columns, a multiple of 16: the tiles of panel p, `panel_bytes` apart, times
// code row r. The sums of the codes, `sums_stride` apart, serve instruction sets whose product wants unsigned weights;
// with `Unsigned` the codes are within 0..127, and there are no sums.
template <int Rows, int Panels, bool Unsigned = false>
inline void tile_product(const int8_t* tiles, size_t panel_bytes, int quads, const int8_t* x, size_t stride,
                         const int32_t*, size_t, I (*out)[Panels]) {
  for (int r = 0; r < Rows; r++)
    for (int p = 0; p < Panels; p++) {
      out[r][p] = {};
      for (int k = 0; k < quads * 4; k++)
        for (int i = 0; i < 16; i++)
          out[r][p].v[i] += tiles[p * panel_bytes + size_t(k / 4) * 64 + i * 4 + k % 4] * x[r * stride + k];
    }
}

// out[s] = sixteen row sums of a block times code row s, rows `stride` apart. The sums of the codes, `sums`
// apart, serve instruction sets whose product wants unsigned weights.
template <int N, class Coder>
inline void dot(const uint8_t* block, int groups, const int8_t* tables, const int8_t* x, int stride, const int32_t*,
                int, I* out) {
  alignas(64) int8_t plain[4 * Int8::group_codes];
  decode<Coder>(block, groups, tables, plain);
  for (int s = 0; s < N; s++) {
    int32_t total[16] = {};
    for (int half = 0; half < groups * 2; half++)
      for (int i = 0; i < 16; i++) {
        const int8_t* w = plain + half * 256 + i * 16;  // i = 4 * load + lane, row = 4 * lane + load
        const int8_t* a = x + s * stride + half * 16;
        int32_t dot = 0;
        for (int k = 0; k < 16; k++) dot += w[k] * a[k];
        total[i % 4 * 4 + i / 4] += dot;
      }
    for (int r = 0; r < 16; r++) out[s].v[r] = total[r];
  }
}

bool runs() { return true; }
}  // namespace

#include "loops.h"

namespace chalot {
extern const Kernels scalar_kernels = table("scalar", runs);
}
