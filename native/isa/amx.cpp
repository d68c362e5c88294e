// AMX: products of many tokens in tiles of 16 rows x 64 bytes. A panel's tiles are its B operand as they are; rows of
// codes are A. Everything else is AVX-512's. See docs/performance.md for what is measured of it.
#include "avx512.h"

namespace {

#include "panels.h"

constexpr int kLeast = 13;  // code rows; fewer go through VNNI, whose time grows with them
constexpr int kTile = 16;   // rows of a tile; two tiles of rows times two panels at once
constexpr int kDepth = 64;  // columns of a tile

struct alignas(64) Tiles {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const Tiles kTiles;

struct Sums {
  alignas(64) int32_t of[2][2][kTile][kPanel];  // row tile, panel, row, column
};

// One block of both panels times 32 rows of codes; `depth` is 64 or 128.
inline void multiply(const int8_t* first, const int8_t* second, const int8_t* codes, size_t stride, int depth,
                     Sums& out) {
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int k = 0; k < depth; k += kDepth) {
    _tile_loadd(2, first + k * kPanel, 64);
    _tile_loadd(3, second + k * kPanel, 64);
    _tile_loadd(0, codes + k, stride);
    _tile_loadd(1, codes + k + kTile * stride, stride);
    _tile_dpbssd(4, 0, 2);
    _tile_dpbssd(5, 0, 3);
    _tile_dpbssd(6, 1, 2);
    _tile_dpbssd(7, 1, 3);
  }
  _tile_stored(4, out.of[0][0], 64);
  _tile_stored(5, out.of[0][1], 64);
  _tile_stored(6, out.of[1][0], 64);
  _tile_stored(7, out.of[1][1], 64);
}

// The next link of every chain: a block's sums times its factors.
template <int Planes>
inline void add_block(const Matrix& w, int p, int panels, int b, const Sums& sums, const float* scale, int scales,
                      int tokens, float (*total)[2][kPanel]) {
  for (int i = 0; i < panels; i++) {
    const F segment =
        load_f16(w.segments + (size_t(p + i) * w.segment_count() + size_t(b / w.segment_blocks)) * kPanel);
    for (int t = 0; t < tokens; t++) {
      const int r = t * Planes;
      I whole = _mm512_load_si512(sums.of[r / kTile][i][r % kTile]);
      if (Planes == 2) whole = join(whole, _mm512_load_si512(sums.of[r / kTile][i][r % kTile + 1]));
      F factor = mul(segment, set(scale[size_t(t) * scales + b]));
      store(total[t][i], fma(to_float(whole), factor, load(total[t][i])));
    }
  }
}

// Tile products of one block run while the sums of the block before are scaled and added.
template <int Planes>
void tiles_times_rows(const Matrix& w, int p, int panels, const int8_t* tiles, const Activations& x, int tokens,
                      Output out, Sums* sums, float (*total)[2][kPanel]) {
  constexpr int kTokensAtOnce = 2 * kTile / Planes;
  const int blocks = w.blocks(), scales = x.stride / kBlock;
  const int last_depth = (w.columns - (blocks - 1) * kBlock + kDepth - 1) / kDepth * kDepth;
  const int8_t* second = panels == 2 ? tiles + tile_bytes(w) : tiles;
  for (int t = 0; t < tokens; t += kTokensAtOnce) {
    const int here = tokens - t < kTokensAtOnce ? tokens - t : kTokensAtOnce;
    const int8_t* codes = x.codes + size_t(t) * Planes * x.stride;
    auto block = [&](int b) {
      const size_t at = size_t(b) * kBlock;
      multiply(tiles + at * kPanel, second + at * kPanel, codes + at, size_t(x.stride),
               b + 1 < blocks ? kBlock : last_depth, sums[b % 2]);
    };
    __builtin_memset(total, 0, sizeof(float) * 2 * kTile * 2 * kPanel);
    block(0);
    for (int b = 0; b < blocks; b++) {
      if (b + 1 < blocks) block(b + 1);
      add_block<Planes>(w, p, panels, b, sums[b % 2], x.scale + size_t(t) * scales, scales, here, total);
    }
    for (int i = 0; i < panels; i++)
      for (int k = 0; k < here; k++) put(w, p + i, load(total[k][i]), out, t + k);
  }
}

template <class Coder>
void product_of(const Matrix& w, const Activations& x, int tokens, int first, int last, Output out, void* scratch) {
  int8_t* tiles = static_cast<int8_t*>(scratch);
  auto* sums = reinterpret_cast<Sums*>(tiles + 2 * tile_bytes(w));
  auto* total = reinterpret_cast<float (*)[2][kPanel]>(sums + 2);
  __builtin_memset(tiles, 0, 2 * tile_bytes(w));  // what lies behind the last group counts as zeros
  for (int p = first; p < last; p += 2) {
    const int panels = last - p < 2 ? 1 : 2;
    for (int i = 0; i < panels; i++) panel_to_tiles<Coder>(w, p + i, tiles + size_t(i) * tile_bytes(w));
    if (x.planes == 1)
      tiles_times_rows<1>(w, p, panels, tiles, x, tokens, out, sums, total);
    else
      tiles_times_rows<2>(w, p, panels, tiles, x, tokens, out, sums, total);
  }
}

void product(const Matrix& w, const Activations& x, int tokens, int first, int last, Output out, void* scratch) {
  if (tokens * x.planes < kLeast) return avx512vnni_kernels.product(w, x, tokens, first, last, out, scratch);
  _tile_loadconfig(&kTiles);
  with_coder(w.scheme, [&](auto coder) { product_of<decltype(coder)>(w, x, tokens, first, last, out, scratch); });
  _tile_release();
}

bool runs() { return has_amx(); }

constexpr Kernels amx_table() {
  Kernels own{};
  own.name = "amx";
  own.runs_here = runs;
  own.product = product;
  return own;
}
}  // namespace

namespace chalot {
extern const Kernels amx_kernels = amx_table();
}
