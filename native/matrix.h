// A packed matrix out of bytes that others hold, or std::invalid_argument if they do not have its shape.
#pragma once
#include <stdexcept>

#include "kernels.h"

namespace chalot {

alignas(64) inline constexpr uint16_t kOnes[kPanel] = {// float16
                                                       0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00,
                                                       0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00};

// Where the parts of a matrix lie that begins at `data`. Returns its bytes.
inline size_t place(Matrix& w, const uint8_t* data) {
  w.data = data;
  if (!is_coded(w.scheme)) return size_t(w.rows) * round_up(w.columns, 16) * (w.scheme == Scheme::f32 ? 4 : 2);
  const size_t of_rows = size_t(w.panels()) * kPanel;
  size_t end = size_t(w.panels()) * w.panel_bytes();
  auto part = [&](size_t bytes) {
    const size_t at = (end + 63) / 64 * 64;
    end = at + bytes;
    return data + at;
  };
  const uint8_t* segments = part(of_rows * w.segment_count() * 2);
  w.segments = w.stored().by_row ? kOnes : reinterpret_cast<const uint16_t*>(segments);
  w.row_scale = reinterpret_cast<const float*>(part(of_rows * 4));
  if (w.stored().offset) w.row_offset = reinterpret_cast<const float*>(part(of_rows * 4));
  return end;
}

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
  if (is_coded(w.scheme)) {
    expect(segment > 0 && segment % kBlock == 0, "matrix: segment must be a multiple of 128");
    expect(!w.stored().by_row || segment >= columns, "matrix: a row is one segment");
    w.segment_blocks = segment / kBlock;
  }
  expect(size == place(w, data), "matrix: data has another length than its shape");
  if (w.stored().levels) {
    expect(tables && tables_size == 4096, "matrix: tables must be (256, 16)");
    w.tables = tables;
  }
  return w;
}

}  // namespace chalot
