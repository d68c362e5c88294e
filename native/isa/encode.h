// Weights to codes, one panel at a time: the same operations in the same order as chalot/quant/codes.py.
// Included by loops.h inside its anonymous namespace.

constexpr int kSearchBelow = 5, kSearchAbove = 1, kMagnitudes = 64;

inline float group_sum(const float* e) {
  float s[8];
  for (int l = 0; l < 8; l++) s[l] = ((e[l] + e[8 + l]) + e[16 + l]) + e[24 + l];
  for (int l = 0; l < 4; l++) s[l] = s[l] + s[l + 4];
  for (int l = 0; l < 2; l++) s[l] = s[l] + s[l + 2];
  return s[0] + s[1];
}

// The tables with positive sign as numbers, and the middles between neighbours (the last one unused).
struct Grids {
  float value[2 * kMagnitudes][16], middle[2 * kMagnitudes][16], reach[kMagnitudes];
};

inline void fill(Grids& g, const int8_t* tables) {
  for (int level = 0; level < 2 * kMagnitudes; level++)
    for (int i = 0; i < 16; i++) {
      g.value[level][i] = float(tables[level * 16 + i]);
      g.middle[level][i] = i < 15 ? (float(tables[level * 16 + i + 1]) + float(tables[level * 16 + i])) * 0.5f : 1e30f;
    }
  for (int m = 0; m < kMagnitudes; m++) {
    double power = 1.0 / double(uint64_t(1) << 63);
    for (int i = 0; i < m; i++) power *= 2;  // 2^(m - 63)
    g.reach[m] = float(127 * __builtin_sqrt(__builtin_sqrt(__builtin_sqrt(power))));
  }
}

// Squared distance of 32 numbers to the nearest of sixteen ascending values.
inline float distance(const F* x, const float* value, const float* middle) {
  float miss[kGroup];
  for (int i = 0; i < 2; i++) {
    F d = sub(x[i], nearest(x[i], value, middle));
    store(miss + 16 * i, mul(d, d));
  }
  return group_sum(miss);
}

// Level and codes of one group of 32 numbers in units of their segment.
inline uint8_t nearest_level(const float* v, const Grids& grids, uint8_t* codes) {
  F x[2] = {load(v), load(v + 16)};
  F negative[2] = {sub(zero(), x[0]), sub(zero(), x[1])};
  const float size = largest(max(max(x[0], negative[0]), max(x[1], negative[1])));
  int centre = 0;
  while (centre < kMagnitudes && grids.reach[centre] < size) centre++;
  float best = __builtin_inff();
  int best_half = 0, best_side = 0;
  for (int step = -kSearchBelow; step <= kSearchAbove; step++) {
    int m = centre + step;
    m = m < 0 ? 0 : m > kMagnitudes - 1 ? kMagnitudes - 1 : m;
    for (int half = 0; half < 4; half++) {
      int side = half % 2 * kMagnitudes + m;
      float error = distance(half >= 2 ? negative : x, grids.value[side], grids.middle[side]);
      if (error < best) best = error, best_half = half, best_side = side;
    }
  }
  const float* middle = grids.middle[best_side];
  const float sign = best_half >= 2 ? -1.0f : 1.0f;
  for (int k = 0; k < kGroup; k++) {
    int code = 0;
    for (int i = 0; i < 15; i++) code += v[k] * sign > middle[i];
    codes[k] = uint8_t(code);
  }
  return uint8_t(best_side + best_half / 2 * 2 * kMagnitudes);
}

// Largest size of each segment; returns that of the row.
inline float segment_sizes(const float* w, int columns, int segment, float* sizes) {
  float whole = 0;
  for (int s = 0; s * segment < columns; s++) {
    int end = (s + 1) * segment < columns ? (s + 1) * segment : columns;
    float high = 0;
    for (int k = s * segment; k < end; k++) {
      float a = __builtin_fabsf(w[k]);
      high = a > high ? a : high;
    }
    sizes[s] = high;
    whole = high > whole ? high : whole;
  }
  return whole;
}

inline void put_codes(const Matrix& w, uint8_t* panel, int r, int g, const uint8_t* codes, uint8_t level) {
  const int load = r % 4, lane = r / 4;
  if (w.scheme == Scheme::int8) {
    uint8_t* to = panel + size_t(g) * 512 + load * 64 + lane * 16;
    for (int k = 0; k < 16; k++) to[k] = codes[k], to[256 + k] = codes[16 + k];
    return;
  }
  const int block = g / 4, in_block = g % 4;
  const int groups = w.groups() - block * 4 < 4 ? w.groups() - block * 4 : 4;
  uint8_t* base = panel + size_t(block) * 4 * w.group_bytes();
  uint8_t* to = base + in_block * 256 + load * 64 + lane * 16;
  for (int k = 0; k < 16; k++) to[k] = uint8_t(codes[k] | codes[16 + k] << 4);
  base[groups * 256 + in_block * kPanel + r] = level;
}

void encode(const Matrix& w, const float* weights, uint8_t* panel, uint16_t* segments, float* row_scale,
            void* scratch) {
  const int columns = w.groups() * kGroup, segment = w.segment_blocks * kBlock, count = w.segment_count();
  Grids& grids = *static_cast<Grids*>(scratch);
  float* sizes = reinterpret_cast<float*>(&grids + 1);
  if (w.scheme == Scheme::nl4) fill(grids, w.tables);
  for (int r = 0; r < kPanel; r++) {
    const float* row = weights + size_t(r) * columns;
    float whole = segment_sizes(row, columns, segment, sizes);
    row_scale[r] = whole / 127.0f;
    for (int s = 0; s < count; s++) {
      float ratio = whole > 0 ? sizes[s] / whole : 0.0f;
      uint16_t half = float_to_half(ratio);
      if (half_to_float(half) < ratio) half++;
      segments[s * kPanel + r] = half;
      float unit = row_scale[r] * half_to_float(half);
      for (int g = s * segment / kGroup; g < (s + 1) * segment / kGroup && g < w.groups(); g++) {
        float v[kGroup];
        uint8_t codes[kGroup], level = 0;
        for (int k = 0; k < kGroup; k++) {
          float x = unit > 0 ? row[g * kGroup + k] / unit : 0.0f;
          v[k] = x > 127.0f ? 127.0f : x < -127.0f ? -127.0f : x;
        }
        if (w.scheme == Scheme::nl4)
          level = nearest_level(v, grids, codes);
        else
          for (int k = 0; k < kGroup; k++) codes[k] = uint8_t(int8_t(__builtin_rintf(v[k])));
        put_codes(w, panel, r, g, codes, level);
      }
    }
  }
}
