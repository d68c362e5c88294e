// Panels of a coded matrix: where they lie, how they become tiles, where their sums go. Included inside an anonymous
// namespace, after the primitives.
#pragma once

template <class Coder>
const uint8_t* panel_of(const Matrix& w, int p) {
  return w.data + size_t(p) * (Coder::whole ? w.blocks() * 4 : w.groups()) * Coder::group_bytes;
}

// Asks for bytes that are used soon.
inline void fetch(const uint8_t* from, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, 0, 2);
}

template <class Coder>
void panel_to_tiles(const Matrix& w, int p, int8_t* tiles) {
  const uint8_t* panel = panel_of<Coder>(w, p);
  for (int g = 0; g < w.groups(); g += 4) {
    int n = Coder::groups(w.groups() - g < 4 ? w.groups() - g : 4);
    to_tiles<Coder>(panel, n, w.tables, tiles + size_t(g) * kGroup * kPanel);
    panel += size_t(n) * Coder::group_bytes;
  }
}

// Sixteen sums of one token to their rows: times the row's scale, with bias, added or not.
inline void put(const Matrix& w, int p, F total, Output out, int t) {
  float* y = out.y + size_t(t) * out.stride + p * kPanel - out.origin;
  F v = mul(total, load(w.row_scale + p * kPanel));
  const int rows = w.rows - p * kPanel;
  if (rows >= kPanel) {
    if (out.bias) v = add(v, load(out.bias + p * kPanel));
    store(y, out.add ? add(load(y), v) : v);
    return;
  }
  float some[16];
  store(some, v);
  for (int r = 0; r < rows; r++) {
    float one = out.bias ? some[r] + out.bias[p * kPanel + r] : some[r];
    y[r] = out.add ? y[r] + one : one;
  }
}
