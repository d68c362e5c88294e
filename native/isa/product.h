// Products of matrices with coded or plain activations. Included by loops.h inside its anonymous namespace.

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
    int n = Coder::groups(groups - b * 4 < 4 ? groups - b * 4 : 4);
    I part[Tokens * Planes];
    dot<Tokens * Planes, Coder>(panel, n, w.tables, codes + b * kBlock, x.stride, sums + b, all_blocks, part);
    panel += size_t(n) * Coder::group_bytes;
    F segment = load_f16(segments + size_t(b / w.segment_blocks) * kPanel);
    for (int k = 0; k < Tokens; k++) {
      I whole = Planes == 1 ? part[k] : join(part[k * Planes], part[k * Planes + Planes - 1]);
      total[k] = fma(to_float(whole), mul(segment, set(scale[size_t(k) * all_blocks + b])), total[k]);
    }
  }
  for (int k = 0; k < Tokens; k++) put(w, p, total[k], out, t + k);
}

template <class Coder, int Planes>
void panel_times_tokens(const Matrix& w, int p, const uint8_t* panel, const Activations& x, int tokens, Output out) {
  int t = 0;
  for (; t + kTokens / Planes <= tokens; t += kTokens / Planes)
    panel_product<Coder, kTokens / Planes, Planes>(w, p, panel, x, t, out);
  if (kTokens / Planes > 3 && t + 3 == tokens) panel_product<Coder, 3, Planes>(w, p, panel, x, t, out), t += 3;
  if (kTokens / Planes > 2 && t + 2 <= tokens) panel_product<Coder, 2, Planes>(w, p, panel, x, t, out), t += 2;
  for (; t < tokens; t++) panel_product<Coder, 1, Planes>(w, p, panel, x, t, out);
}

// Tiles of `Panels` panels times `Tokens` tokens of `Planes` planes. Meanwhile the first tokens fetch the panels behind
// them from memory, which would rest while there is nothing but products.
template <int Tokens, int Planes, int Panels>
void tiled_product(const Matrix& w, int p, const int8_t* tiles, const Activations& x, int t, Output out) {
  const int blocks = w.blocks(), all_blocks = x.stride / kBlock, quads = w.groups() * kGroup / 4;
  const size_t panel_bytes = tile_bytes(w);
  const int8_t* codes = x.codes + size_t(t) * Planes * x.stride;
  const int32_t* sums = x.sums + size_t(t) * Planes * all_blocks;
  const float* scale = x.scale + size_t(t) * all_blocks;
  const uint8_t* next = w.data + size_t(p + Panels) * w.panel_bytes();
  const size_t share = w.panel_bytes() * Panels / size_t(blocks);
  F total[Tokens][Panels];
  for (auto& of_token : total)
    for (F& f : of_token) f = zero();
  for (int b = 0; b < blocks; b++) {
    const int here = quads - b * kBlock / 4 < kBlock / 4 ? quads - b * kBlock / 4 : kBlock / 4;
    if (t == 0 && p + 2 * Panels <= w.panels()) fetch(next + size_t(b) * share, share);
    I part[Tokens * Planes][Panels];
    tile_product<Tokens * Planes, Panels>(tiles + size_t(b) * kBlock * kPanel, panel_bytes, here, codes + b * kBlock,
                                          size_t(x.stride), sums + b, size_t(all_blocks), part);
    F segment[Panels];
    for (int i = 0; i < Panels; i++)
      segment[i] = load_f16(w.segments + (size_t(p + i) * w.segment_count() + b / w.segment_blocks) * kPanel);
    for (int k = 0; k < Tokens; k++) {
      F factor = set(scale[size_t(k) * all_blocks + b]);
      for (int i = 0; i < Panels; i++) {
        I whole = Planes == 1 ? part[k][i] : join(part[k * Planes][i], part[k * Planes + Planes - 1][i]);
        total[k][i] = fma(to_float(whole), mul(segment[i], factor), total[k][i]);
      }
    }
  }
  for (int i = 0; i < Panels; i++)
    for (int k = 0; k < Tokens; k++) put(w, p + i, total[k][i], out, t + k);
}

template <int Planes, int Panels>
void tiles_times_tokens(const Matrix& w, int p, const int8_t* tiles, const Activations& x, int tokens, Output out) {
  in_turns<kRows / Planes>(tokens, [&]<int N>(int t) { tiled_product<N, Planes, Panels>(w, p, tiles, x, t, out); });
}

// Few tokens: codes are decoded on their way into the product. Many: panels become tiles once, for all tokens.
template <class Coder, int Planes>
void product_of(const Matrix& w, const Activations& x, int tokens, int first, int last, Output out, void* scratch) {
  if (tokens * Planes <= kTokens) {
    for (int p = first; p < last; p++) panel_times_tokens<Coder, Planes>(w, p, panel_of<Coder>(w, p), x, tokens, out);
    return;
  }
  int8_t* tiles = static_cast<int8_t*>(scratch);
  for (int p = first; p < last; p += kPanels) {
    const int n = last - p < kPanels ? last - p : kPanels;
    for (int i = 0; i < n; i++) panel_to_tiles<Coder>(w, p + i, tiles + i * tile_bytes(w));
    if (n == kPanels)
      tiles_times_tokens<Planes, kPanels>(w, p, tiles, x, tokens, out);
    else
      for (int i = 0; i < n; i++) tiles_times_tokens<Planes, 1>(w, p + i, tiles + i * tile_bytes(w), x, tokens, out);
  }
}

void product(const Matrix& w, const Activations& x, int tokens, int first, int last, Output out, void* scratch) {
  with_coder(w.scheme, [&](auto coder) {
    using C = decltype(coder);
    if (x.planes == 1)
      product_of<C, 1>(w, x, tokens, first, last, out, scratch);
    else
      product_of<C, 2>(w, x, tokens, first, last, out, scratch);
  });
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
      float& y = out.y[(t + j) * out.stride + r + i - out.origin];
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
