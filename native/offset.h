// Products and rows of matrices whose rows have an offset. Outside native/isa, so that there is one order:
//   y[t, r] = y[t, r] + row_offset[r] * s[t],   s[t] = sum over blocks, one after another, of x_scale * (sum of codes)
// behind everything else that the product adds; no fma.
#pragma once
#include "kernels.h"

namespace chalot {

inline float sum_of_codes(const Activations& x, int t) {
  const int blocks = x.stride / kBlock;
  const int32_t* sums = x.sums + size_t(t) * x.planes * blocks;
  float total = 0;
  for (int b = 0; b < blocks; b++) {
    const int32_t whole = x.planes == 1 ? sums[b] : sums[b] * kPlaneStep + sums[blocks + b];
    total = total + float(whole) * x.scale[size_t(t) * blocks + b];
  }
  return total;
}

inline void multiply(const Kernels& k, const Matrix& w, const Activations& x, int tokens, int first, int last,
                     Output out, void* scratch) {
  k.product(w, x, tokens, first, last, out, scratch);
  if (!w.row_offset) return;
  const int from = first * kPanel, to = last * kPanel < w.rows ? last * kPanel : w.rows;
  for (int t = 0; t < tokens; t++) {
    const float sum = sum_of_codes(x, t);
    float* y = out.y + size_t(t) * out.stride - out.origin;
    for (int r = from; r < to; r++) y[r] = y[r] + w.row_offset[r] * sum;
  }
}

inline void read_row(const Kernels& k, const Matrix& w, int row, float* out) {
  k.row(w, row, out);
  if (!w.row_offset) return;
  for (int c = 0; c < w.columns; c++) out[c] = out[c] + w.row_offset[row];
}

}  // namespace chalot
