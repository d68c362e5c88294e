// The loop nests, written once over the sixteen-lane primitives that each instruction set defines before
// including this file:
//   F, I          sixteen float32 / int32        zero set load store add sub mul div fma max min round
//   to_int to_float scale2 zero_below            load_f16 load_bf16 store_f16 store_i32 sum largest join
//   count_below look_up dot<N, Coder> decode     see scalar.cpp for what each must return
#pragma once
#include "prelude.h"

namespace {

// e^x by 2^n * e^r, |r| <= ln2 / 2, Taylor to the seventh power (relative error below 1e-8 before rounding).
// 0 below -87, where the result would leave the normal numbers; the largest argument is 88.
inline F exponential(F x) {
  F t = min(x, set(88.0f));
  F n = round(mul(max(t, set(-88.0f)), set(1.44269504f)));
  F r = fma(n, set(-0.693359375f), max(t, set(-88.0f)));
  r = fma(n, set(2.12194440e-4f), r);
  F p = set(1.0f / 5040);
  p = fma(p, r, set(1.0f / 720));
  p = fma(p, r, set(1.0f / 120));
  p = fma(p, r, set(1.0f / 24));
  p = fma(p, r, set(1.0f / 6));
  p = fma(p, r, set(0.5f));
  p = fma(p, r, set(1.0f));
  p = fma(p, r, set(1.0f));
  return zero_below(scale2(p, max(n, set(-126.0f))), x, set(-87.0f));
}

void exp_all(const float* x, float* y, size_t n) {
  for (size_t i = 0; i + 16 <= n; i += 16) store(y + i, exponential(load(x + i)));
  if (size_t rest = n % 16) {
    float part[16] = {};
    __builtin_memcpy(part, x + n - rest, rest * 4);
    store(part, exponential(load(part)));
    __builtin_memcpy(y + n - rest, part, rest * 4);
  }
}

// Buffers are padded to 128 numbers with zeros, which change no sum; the weights' padding keeps them zero.
void rms_norm(const float* x, const float* weight, int n, float eps, float* y) {
  F squares = zero();
  int width = round_up(n, 16);
  for (int i = 0; i < width; i += 16) {
    F v = load(x + i);
    squares = fma(v, v, squares);
  }
  float scale = 1.0f / __builtin_sqrtf(sum(squares) / float(n) + eps);
  for (int i = 0; i < width; i += 16) store(y + i, mul(mul(load(x + i), set(scale)), load(weight + i)));
}

// Rotates pairs (i, i + half): "NeoX" order.
void rotate(float* x, const float* cosine, const float* sine, int half) {
  for (int i = 0; i < half; i++) {
    float a = x[i], b = x[i + half];
    x[i] = __builtin_fmaf(-b, sine[i], a * cosine[i]);
    x[i + half] = __builtin_fmaf(a, sine[i], b * cosine[i]);
  }
}

// silu(g) = g / (1 + e^-g); gelu_tanh(g) = g / (1 + e^-2u), u = sqrt(2 / pi) * (g + 0.044715 g^3).
void gate(Gate kind, const float* gate, const float* up, int n, float* y) {
  for (int i = 0; i < round_up(n, 16); i += 16) {
    F g = load(gate + i), minus;
    if (kind == Gate::silu) {
      minus = sub(zero(), g);
    } else {
      F cube = mul(mul(g, g), g);
      minus = mul(fma(cube, set(0.044715f), g), set(-1.5957691216f));
    }
    store(y + i, mul(div(g, add(set(1.0f), exponential(minus))), load(up + i)));
  }
}

// Blocks whose largest number is below 2^-100 count as zero, so that no reciprocal overflows.
void quantize(const float* x, int stride, int planes, int8_t* codes, float* scale, int32_t* sums) {
  const float top = planes == 1 ? 127.0f : 127.0f * kPlaneStep;
  const int blocks = stride / kBlock;
  for (int b = 0; b < blocks; b++) {
    F size = zero();
    for (int i = 0; i < kBlock; i += 16) {
      F v = load(x + b * kBlock + i);
      size = max(size, max(v, sub(zero(), v)));
    }
    float high = largest(size);
    bool some = high > 0x1p-100f;
    F inverse = set(some ? top / high : 0.0f);
    scale[b] = some ? high / top : 0.0f;
    int32_t sum[2] = {0, 0};
    for (int i = 0; i < kBlock; i += 16) {
      int32_t whole[16];
      store_i32(whole, to_int(round(mul(load(x + b * kBlock + i), inverse))));
      for (int k = 0; k < 16; k++) {
        int32_t v = whole[k], low = 0;
        if (planes == 2) {
          int32_t first = (v + kPlaneStep / 2) >> 7;
          low = v - first * kPlaneStep;
          v = first;
        }
        v = v > 127 ? 127 : v < -127 ? -127 : v;  // not a number becomes the least integer
        size_t at = size_t(b) * kBlock + i + k;
        codes[at] = int8_t(v);
        sum[0] += v;
        if (planes == 2) codes[stride + at] = int8_t(low), sum[1] += low;
      }
    }
    for (int p = 0; p < planes; p++) sums[p * blocks + b] = sum[p];
  }
}

// ---- products of codes

template <class Coder>
const uint8_t* panel_of(const Matrix& w, int p) {
  return w.data + size_t(p) * w.groups() * Coder::group_bytes;
}

// One panel times `Tokens` tokens of `Planes` planes.
template <class Coder, int Tokens, int Planes>
void panel_product(const Matrix& w, int p, const uint8_t* panel, const Activations& x, int t, Output out) {
  const int blocks = w.blocks(), groups = w.groups(), all_blocks = x.stride / kBlock;
  const uint16_t* segments = w.segments + size_t(p) * w.segment_count() * kPanel;
  F total[Tokens];
  for (F& f : total) f = zero();
  const int8_t* codes = x.codes + size_t(t) * Planes * x.stride;
  const int32_t* sums = x.sums + size_t(t) * Planes * all_blocks;
  const float* scale = x.scale + size_t(t) * all_blocks;
  for (int b = 0; b < blocks; b++) {
    int n = groups - b * 4 < 4 ? groups - b * 4 : 4;
    I part[Tokens * Planes];
    dot<Tokens * Planes, Coder>(panel, n, w.tables, codes + b * kBlock, x.stride, sums + b, all_blocks, part);
    panel += size_t(n) * Coder::group_bytes;
    F segment = load_f16(segments + size_t(b / w.segment_blocks) * kPanel);
    for (int k = 0; k < Tokens; k++) {
      I whole = Planes == 1 ? part[k] : join(part[k * Planes], part[k * Planes + Planes - 1]);
      total[k] = fma(to_float(whole), mul(segment, set(scale[size_t(k) * all_blocks + b])), total[k]);
    }
  }
  F row_scale = load(w.row_scale + p * kPanel);
  for (int k = 0; k < Tokens; k++) {
    float* y = out.y + (t + k) * out.stride + p * kPanel;
    F v = mul(total[k], row_scale);
    int rows = w.rows - p * kPanel;
    if (rows >= kPanel) {
      if (out.bias) v = add(v, load(out.bias + p * kPanel));
      store(y, out.add ? add(load(y), v) : v);
    } else {
      float some[16];
      store(some, v);
      for (int r = 0; r < rows; r++) {
        float one = out.bias ? some[r] + out.bias[p * kPanel + r] : some[r];
        y[r] = out.add ? y[r] + one : one;
      }
    }
  }
}

template <class Coder, int Planes>
void panel_times_tokens(const Matrix& w, int p, const uint8_t* panel, const Activations& x, int tokens, Output out) {
  int t = 0;
  for (; t + kTokens / Planes <= tokens; t += kTokens / Planes)
    panel_product<Coder, kTokens / Planes, Planes>(w, p, panel, x, t, out);
  if (kTokens / Planes > 2 && t + 2 <= tokens) panel_product<Coder, 2, Planes>(w, p, panel, x, t, out), t += 2;
  for (; t < tokens; t++) panel_product<Coder, 1, Planes>(w, p, panel, x, t, out);
}

template <int Planes>
void product_of(const Matrix& w, const Activations& x, int tokens, int first, int last, Output out, void* scratch) {
  for (int p = first; p < last; p++) {
    if (w.scheme == Scheme::int8) {
      panel_times_tokens<Int8, Planes>(w, p, panel_of<Int8>(w, p), x, tokens, out);
    } else if (tokens * Planes <= kTokens) {
      panel_times_tokens<Nl4, Planes>(w, p, panel_of<Nl4>(w, p), x, tokens, out);
    } else {  // decode the panel once for all tokens; decoded codes lie as int8's do
      uint8_t* plain = static_cast<uint8_t*>(scratch);
      const uint8_t* panel = panel_of<Nl4>(w, p);
      for (int g = 0; g < w.groups(); g += 4) {
        int n = w.groups() - g < 4 ? w.groups() - g : 4;
        decode(panel, n, w.tables, plain + size_t(g) * Int8::group_bytes);
        panel += size_t(n) * Nl4::group_bytes;
      }
      panel_times_tokens<Int8, Planes>(w, p, plain, x, tokens, out);
    }
  }
}

void product(const Matrix& w, const Activations& x, int tokens, int first, int last, Output out, void* scratch) {
  if (x.planes == 1)
    product_of<1>(w, x, tokens, first, last, out, scratch);
  else
    product_of<2>(w, x, tokens, first, last, out, scratch);
}

// ---- products of numbers: sixteen lanes of fma chains over the columns, then their tree

template <Scheme S>
F load_numbers(const uint8_t* row, int at) {
  if constexpr (S == Scheme::f32) return load(reinterpret_cast<const float*>(row) + at);
  if constexpr (S == Scheme::bf16) return load_bf16(reinterpret_cast<const uint16_t*>(row) + at);
  if constexpr (S == Scheme::f16) return load_f16(reinterpret_cast<const uint16_t*>(row) + at);
}

template <Scheme S, int Rows, int Tokens>
void dense_tile(const Matrix& w, const float* x, size_t stride, int r, int t, Output out) {
  const int width = round_up(w.columns, 16);
  const size_t row_bytes = size_t(width) * (S == Scheme::f32 ? 4 : 2);
  const uint8_t* row = w.data + r * row_bytes;
  F lanes[Rows][Tokens];
  for (auto& of_row : lanes)
    for (F& f : of_row) f = zero();
  for (int k = 0; k < width; k += 16) {
    F v[Rows];
    for (int i = 0; i < Rows; i++) v[i] = load_numbers<S>(row + i * row_bytes, k);
    for (int j = 0; j < Tokens; j++) {
      F a = load(x + (t + j) * stride + k);
      for (int i = 0; i < Rows; i++) lanes[i][j] = fma(v[i], a, lanes[i][j]);
    }
  }
  for (int j = 0; j < Tokens; j++)
    for (int i = 0; i < Rows; i++) {
      float v = sum(lanes[i][j]);
      if (out.bias) v += out.bias[r + i];
      float& y = out.y[(t + j) * out.stride + r + i];
      y = out.add ? y + v : v;
    }
}

template <Scheme S>
void dense_of(const Matrix& w, const float* x, size_t stride, int tokens, int first, int last, Output out) {
  for (int r = first; r < last;) {
    int rows = last - r >= kDenseRows ? kDenseRows : 1;
    int t = 0;
    if (rows == kDenseRows) {
      for (; t + kDenseTokens <= tokens; t += kDenseTokens)
        dense_tile<S, kDenseRows, kDenseTokens>(w, x, stride, r, t, out);
      for (; t < tokens; t++) dense_tile<S, kDenseRows, 1>(w, x, stride, r, t, out);
    } else {
      for (; t < tokens; t++) dense_tile<S, 1, 1>(w, x, stride, r, t, out);
    }
    r += rows;
  }
}

void dense(const Matrix& w, const float* x, size_t stride, int tokens, int first, int last, Output out) {
  int from = first * kPanel, to = last * kPanel < w.rows ? last * kPanel : w.rows;
  if (w.scheme == Scheme::f32) dense_of<Scheme::f32>(w, x, stride, tokens, from, to, out);
  if (w.scheme == Scheme::bf16) dense_of<Scheme::bf16>(w, x, stride, tokens, from, to, out);
  if (w.scheme == Scheme::f16) dense_of<Scheme::f16>(w, x, stride, tokens, from, to, out);
}

// ---- one row as numbers: row_scale * segment * value, each product rounded once

template <class Coder>
int value_at(const Matrix& w, const uint8_t* panel, int r, int k);

template <>
int value_at<Int8>(const Matrix&, const uint8_t* panel, int r, int k) {
  const uint8_t* half = panel + size_t(k / 16) * 256;
  return int8_t(half[r % 4 * 64 + r / 4 * 16 + k % 16]);
}

template <>
int value_at<Nl4>(const Matrix& w, const uint8_t* panel, int r, int k) {
  int block = k / kBlock, group = k % kBlock / kGroup;
  int groups = w.groups() - block * 4 < 4 ? w.groups() - block * 4 : 4;
  const uint8_t* base = panel + size_t(block) * 4 * Nl4::group_bytes;
  uint8_t byte = base[group * 256 + r % 4 * 64 + r / 4 * 16 + k % 16];
  uint8_t level = base[groups * 256 + group * kPanel + r];
  return w.tables[level * 16 + (k % kGroup < 16 ? byte & 15 : byte >> 4)];
}

void row(const Matrix& w, int row, float* out) {
  if (!is_coded(w.scheme)) {
    const int width = round_up(w.columns, 16);
    const uint8_t* from = w.data + size_t(row) * width * (w.scheme == Scheme::f32 ? 4 : 2);
    for (int k = 0; k < width; k += 16) {
      if (w.scheme == Scheme::f32) store(out + k, load_numbers<Scheme::f32>(from, k));
      if (w.scheme == Scheme::bf16) store(out + k, load_numbers<Scheme::bf16>(from, k));
      if (w.scheme == Scheme::f16) store(out + k, load_numbers<Scheme::f16>(from, k));
    }
    return;
  }
  const int p = row / kPanel, r = row % kPanel;
  const uint8_t* panel = w.data + size_t(p) * w.panel_bytes();
  for (int k = 0; k < w.columns; k++) {
    int v = w.scheme == Scheme::int8 ? value_at<Int8>(w, panel, r, k) : value_at<Nl4>(w, panel, r, k);
    int s = k / kBlock / w.segment_blocks;
    float factor = half_to_float(w.segments[(size_t(p) * w.segment_count() + s) * kPanel + r]);
    out[k] = float(v) * (w.row_scale[row] * factor);
  }
}

// ---- attention over one page

template <CacheType C>
F load_cached(const void* p, size_t at) {
  if constexpr (C == CacheType::f32) return load(static_cast<const float*>(p) + at);
  return load_f16(static_cast<const uint16_t*>(p) + at);
}

void store_cached(CacheType type, const float* x, int n, void* out) {
  for (int i = 0; i < n; i += 16) {
    // float16 ends at 65,504; a larger key or value saturates
    F v = load(x + i);
    if (type == CacheType::f32)
      store(static_cast<float*>(out) + i, v);
    else
      store_f16(static_cast<uint16_t*>(out) + i, max(min(v, set(65504.0f)), set(-65504.0f)));
  }
}

// The page's own (largest, denominator, output) from empty, then merged with what came before.
template <CacheType C>
void attend_to(const Page& page, const float* query, int count, Gathered& g) {
  alignas(64) float p[kPage];
  for (int j = 0; j < count; j++) {
    F lanes = zero();
    for (int d = 0; d < page.stride; d += 16)
      lanes = fma(load(query + d), load_cached<C>(page.keys, size_t(j) * page.stride + d), lanes);
    p[j] = sum(lanes);
  }
  int width = round_up(count, 16);
  for (int j = count; j < width; j++) p[j] = -__builtin_inff();
  F top = load(p);
  for (int j = 16; j < width; j += 16) top = max(top, load(p + j));
  float high = largest(top);
  F denominators = zero();
  for (int j = 0; j < width; j += 16) {
    F e = exponential(sub(load(p + j), set(high)));
    store(p + j, e);
    denominators = add(denominators, e);
  }
  float largest_of_both = g.largest > high ? g.largest : high;
  float change[16] = {g.largest - largest_of_both, high - largest_of_both};
  store(change, exponential(load(change)));
  F before = set(change[0]), here = set(change[1]);
  g.denominator = __builtin_fmaf(g.denominator, change[0], sum(denominators) * change[1]);
  g.largest = largest_of_both;
  for (int d = 0; d < page.stride; d += 16) {
    F o = zero();
    for (int j = 0; j < count; j++) o = fma(set(p[j]), load_cached<C>(page.values, size_t(j) * page.stride + d), o);
    store(g.out + d, fma(load(g.out + d), before, mul(o, here)));
  }
}

void attend(const Page& page, const float* query, int count, Gathered& g) {
  if (page.type == CacheType::f32)
    attend_to<CacheType::f32>(page, query, count, g);
  else
    attend_to<CacheType::f16>(page, query, count, g);
}

#include "encode.h"

}  // namespace
