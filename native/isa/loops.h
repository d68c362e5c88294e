// The loop nests, written once over the sixteen-lane primitives that each instruction set defines before
// including this file; scalar.cpp says what each must give:
//   F, I            sixteen float32 / int32      zero set load store add sub mul div fma max min round flip
//   of both         to_int to_float scale2 zero_below load_f16 load_bf16 store_f16 sum largest lowest
//                   look_up count_below
//   of whole ones   clamp split halve join store_codes
//   dot<N, Coder>   to_tiles<Coder>              tile_product<Rows, Panels, Unsigned>
#pragma once
#include "prelude.h"

namespace {

// e^x by 2^n * e^r, |r| <= ln2 / 2, Taylor to the seventh power (relative error below 1e-8 before rounding).
// 0 below -87, where the result would leave the normal numbers; the largest argument is 88.
template <bool AboveZero = true>
inline F exponential(F x) {
  const F t = max(AboveZero ? min(x, set(88.0f)) : x, set(-88.0f)), n = round(mul(t, set(1.44269504f)));
  F r = fma(n, set(-0.693359375f), t);
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
void rms_norm(const float* x, const float* weight, int n, float eps, float* y, bool add_to) {
  F squares = zero();
  int width = round_up(n, 16);
  for (int i = 0; i < width; i += 16) {
    F v = load(x + i);
    squares = fma(v, v, squares);
  }
  float scale = 1.0f / __builtin_sqrtf(sum(squares) / float(n) + eps);
  for (int i = 0; i < width; i += 16) {
    F v = mul(mul(load(x + i), set(scale)), load(weight + i));
    store(y + i, add_to ? add(load(y + i), v) : v);
  }
}

// Rotates pairs (i, i + half): "NeoX" order.
void rotate(float* x, const float* cosine, const float* sine, int half) {
  for (int i = 0; i < half; i++) {
    float a = x[i], b = x[i + half];
    x[i] = __builtin_fmaf(-b, sine[i], a * cosine[i]);
    x[i + half] = __builtin_fmaf(a, sine[i], b * cosine[i]);
  }
}

// silu(g) = g / (1 + e^-g); gelu_tanh(g) = g / (1 + e^-2u), u = sqrt(2 / pi) * (g + 0.044715 g^3);
// relu2(g) = max(g, 0)^2.
void gate(Gate kind, const float* gate, const float* up, int n, float* y) {
  for (int i = 0; i < round_up(n, 16); i += 16) {
    F g = load(gate + i), minus;
    if (kind == Gate::relu2) {
      g = max(g, zero());
      store(y + i, mul(mul(g, g), load(up + i)));
      continue;
    }
    if (kind == Gate::silu) {
      minus = sub(zero(), g);
    } else {
      F cube = mul(mul(g, g), g);
      minus = mul(fma(cube, set(0.044715f), g), set(-1.5957691216f));
    }
    store(y + i, mul(div(g, add(set(1.0f), exponential(minus))), load(up + i)));
  }
}

// `n` numbers (a multiple of 16) under one scale, as one plane of codes or two; none is larger than `high`. Where that
// is below 2^-100 all count as zero, so that no reciprocal overflows; not a number becomes the least code.
inline void quantize_below(const float* x, int n, int planes, float high, int8_t* codes, size_t plane_stride,
                           float* scale, int32_t* sums, size_t sums_stride) {
  const float top = planes == 1 ? 127.0f : 127.0f * kPlaneStep;
  const bool some = high > 0x1p-100f;
  const F inverse = set(some ? top / high : 0.0f);
  *scale = some ? high / top : 0.0f;
  I first = to_int(zero()), second = first;
  for (int i = 0; i < n; i += 16) {
    I whole = to_int(round(mul(load(x + i), inverse))), low;
    if (planes == 2) {
      split(whole, whole, low);
      store_codes(codes + plane_stride + i, low);
      second = add(second, low);
    }
    whole = clamp(whole);
    store_codes(codes + i, whole);
    first = add(first, whole);
  }
  sums[0] = sum(first);
  if (planes == 2) sums[sums_stride] = sum(second);
}

void quantize_run(const float* x, int n, int planes, int8_t* codes, size_t plane_stride, float* scale, int32_t* sums,
                  size_t sums_stride) {
  F size = zero();
  for (int i = 0; i < n; i += 16) {
    F v = load(x + i);
    size = max(size, max(v, sub(zero(), v)));
  }
  quantize_below(x, n, planes, largest(size), codes, plane_stride, scale, sums, sums_stride);
}

// The `count` best of a part of the vocabulary. Compared in sixty-fours, so that few are looked at one by one.
int top(const float* logits, int n, int first, int count, Candidate* best, int held) {
  F strange = zero();
  auto offer = [&](int i) {
    if (held == count && !(logits[i] > best[count - 1].logit)) return;
    int at = held < count ? held++ : count - 1;
    for (; at > 0 && best[at - 1].logit < logits[i]; at--) best[at] = best[at - 1];
    best[at] = {logits[i], first + i};
  };
  int i = 0;
  for (; i + 64 <= n; i += 64) {
    F a = load(logits + i), b = load(logits + i + 16), c = load(logits + i + 32), d = load(logits + i + 48);
    strange = fma(a, zero(), fma(b, zero(), fma(c, zero(), fma(d, zero(), strange))));
    if (held == count && !(largest(max(max(a, b), max(c, d))) > best[count - 1].logit)) continue;
    for (int k = 0; k < 64; k++) offer(i + k);
  }
  float rest = 0;
  for (; i < n; i++) rest += logits[i] * 0.0f, offer(i);
  return sum(strange) == 0 && rest == 0 ? held : -1;
}

#include "panels.h"
#include "product.h"

// ---- one row as numbers: row_scale * segment * value, each product rounded once

template <class C>
void coded_row(const Matrix& w, int row, float* out) {
  const int p = row / kPanel, line = row % 4, lane = row % kPanel / 4;
  const uint8_t* panel = panel_of<C>(w, p);
  for (int b = 0; b < w.blocks(); b++) {
    const int groups = C::groups(w.groups() - b * 4 < 4 ? w.groups() - b * 4 : 4);
    const uint8_t* block = panel + size_t(b) * 4 * C::group_bytes;
    const uint16_t* segments = w.segments + (size_t(p) * w.segment_count() + b / w.segment_blocks) * kPanel;
    const float unit = w.row_scale[row] * half_to_float(segments[row % kPanel]);
    for (int k = 0; k < kBlock && b * kBlock + k < w.columns; k++)
      out[b * kBlock + k] = float(value_of<C>(block, groups, w.tables, line, k / 16, lane * 16 + k % 16)) * unit;
  }
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
  with_coder(w.scheme, [&](auto coder) { coded_row<decltype(coder)>(w, row, out); });
}

#include "attend.h"
#include "encode.h"

constexpr Kernels table(const char* name, bool (*runs_here)()) {
  return {name, runs_here, exp_all, rms_norm, cap_all,      rotate, spread, gate,  quantize_run,
          row,  product,   dense,   top,      store_cached, attend, merge,  encode};
}

}  // namespace
