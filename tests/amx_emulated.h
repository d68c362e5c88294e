// AMX tiles in software, with the names and the meaning of the intrinsics (Intel SDM, volume 2: TDPBSSD, TILELOADD ...),
// so that native/isa/amx.cpp can be tested on processors with AVX-512 alone: compile with `-include` this file.
#pragma once
#ifdef __AMX_INT8__
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace amx_emulated {

struct Tile {
  uint8_t row[16][64];
};
struct State {
  bool configured = false;
  uint16_t bytes[8];
  uint8_t rows[8];
  Tile tile[8];
};
inline State& state() {
  static thread_local State s;
  return s;
}
inline Tile& tile(int t) {
  if (!state().configured || t < 0 || t > 7 || !state().rows[t]) std::abort();  // #UD on a processor
  return state().tile[t];
}
inline void load_config(const void* from) {
  uint8_t raw[64];
  std::memcpy(raw, from, 64);
  if (raw[0] != 1 || raw[1] != 0) std::abort();
  for (int i = 2; i < 16; i++)
    if (raw[i]) std::abort();
  State& s = state();
  s.configured = true;
  std::memcpy(s.bytes, raw + 16, 16);
  std::memcpy(s.rows, raw + 48, 8);
  for (int t = 0; t < 8; t++)
    if (s.bytes[t] > 64 || s.rows[t] > 16) std::abort();
  std::memset(s.tile, 0, sizeof s.tile);
}
inline void release() { state() = State(); }
inline void zero(int t) { std::memset(&tile(t), 0, sizeof(Tile)); }
inline void load(int t, const void* from, size_t stride) {
  zero(t);
  for (int r = 0; r < state().rows[t]; r++)
    std::memcpy(tile(t).row[r], static_cast<const uint8_t*>(from) + r * stride, state().bytes[t]);
}
inline void store(int t, void* to, size_t stride) {
  for (int r = 0; r < state().rows[t]; r++)
    std::memcpy(static_cast<uint8_t*>(to) + r * stride, tile(t).row[r], state().bytes[t]);
}
inline void add_products(int c, int a, int b) {
  for (int m = 0; m < state().rows[c]; m++)
    for (int n = 0; n < state().bytes[c] / 4; n++) {
      int32_t sum;
      std::memcpy(&sum, tile(c).row[m] + n * 4, 4);
      for (int k = 0; k < state().bytes[a] / 4; k++)
        for (int i = 0; i < 4; i++) sum += int8_t(tile(a).row[m][k * 4 + i]) * int8_t(tile(b).row[k][n * 4 + i]);
      std::memcpy(tile(c).row[m] + n * 4, &sum, 4);
    }
}

}  // namespace amx_emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#define _tile_loadconfig(from) amx_emulated::load_config(from)
#define _tile_release() amx_emulated::release()
#define _tile_zero(t) amx_emulated::zero(t)
#define _tile_loadd(t, from, stride) amx_emulated::load(t, from, size_t(stride))
#define _tile_stored(t, to, stride) amx_emulated::store(t, to, size_t(stride))
#define _tile_dpbssd(c, a, b) amx_emulated::add_products(c, a, b)

#define has_amx has_avx512vnni  // what it then needs
#endif
