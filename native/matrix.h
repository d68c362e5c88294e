// A packed matrix out of bytes that others hold, or std::invalid_argument if they do not have its shape.
#pragma once
#include <stdexcept>

#include "kernels.h"

namespace chalot {

alignas(64) inline constexpr uint16_t kOnes[kPanel] = {// float16
                                                       0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00,
                                                       0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00};

// `tables` may be null where the scheme has no levels.
inline Matrix matrix_view(int scheme, int rows, int columns, int segment, const uint8_t* data, size_t size,
                          const int8_t* tables, size_t tables_size) {
  auto expect = [](bool good, const char* what) {
    if (!good) throw std::invalid_argument(what);
  };
  expect(scheme >= 0 && scheme < kSchemes, "matrix: unknown scheme");
  expect(rows > 0 && columns > 0 && rows <= 1 << 28 && columns <= 1 << 24, "matrix: size");
  expect(reinterpret_cast<uintptr_t>(data) % 64 == 0, "matrix: data must start at a multiple of 64 bytes");
  Matrix w{};
  w.scheme = Scheme(scheme);
  w.rows = rows;
  w.columns = columns;
  w.data = data;
  size_t expected;
  if (is_coded(w.scheme)) {
    expect(segment > 0 && segment % kBlock == 0, "matrix: segment must be a multiple of 128");
    expect(!w.stored().by_row || segment >= columns, "matrix: a row is one segment");
    w.segment_blocks = segment / kBlock;
    size_t at = (size_t(w.panels()) * w.panel_bytes() + 63) / 64 * 64;
    w.segments = w.stored().by_row ? kOnes : reinterpret_cast<const uint16_t*>(data + at);
    at = (at + size_t(w.panels()) * w.segment_count() * kPanel * 2 + 63) / 64 * 64;
    w.row_scale = reinterpret_cast<const float*>(data + at);
    expected = at + size_t(w.panels()) * kPanel * 4;
    if (w.stored().offset) {
      at = (expected + 63) / 64 * 64;
      w.row_offset = reinterpret_cast<const float*>(data + at);
      expected = at + size_t(w.panels()) * kPanel * 4;
    }
  } else {
    expected = size_t(rows) * round_up(columns, 16) * (w.scheme == Scheme::f32 ? 4 : 2);
  }
  expect(size == expected, "matrix: data has another length than its shape");
  if (w.stored().levels) {
    expect(tables && tables_size == 4096, "matrix: tables must be (256, 16)");
    w.tables = tables;
  }
  return w;
}

}  // namespace chalot
