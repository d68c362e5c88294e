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

// The nearest of sixteen ascending values for each of 32 numbers. Written so that compilers turn it into
// compares and masked adds: the value is a sum of steps between neighbours, exact in float32.
inline float nearest(const float* x, const float* table, float* code) {
  float value[kGroup], miss[kGroup];
  for (int k = 0; k < kGroup; k++) value[k] = table[0], code[k] = 0;
  for (int i = 1; i < 16; i++) {
    float middle = (table[i] + table[i - 1]) * 0.5f, step = table[i] - table[i - 1];
    for (int k = 0; k < kGroup; k++) {
      bool above = x[k] > middle;
      value[k] += above ? step : 0.0f;
      code[k] += above ? 1.0f : 0.0f;
    }
  }
  for (int k = 0; k < kGroup; k++) {
    float d = x[k] - value[k];
    miss[k] = d * d;
  }
  return group_sum(miss);
}

// Level and codes of one group of 32 numbers in units of their segment.
inline uint8_t nearest_level(const float* v, const int8_t* tables, const float* reach, uint8_t* codes) {
  float size = 0, negative[kGroup];
  for (int k = 0; k < kGroup; k++) {
    negative[k] = v[k] * -1.0f;
    float a = __builtin_fabsf(v[k]);
    size = a > size ? a : size;
  }
  int centre = 0;
  while (centre < kMagnitudes && reach[centre] < size) centre++;
  float best = __builtin_inff(), code[kGroup], best_code[kGroup] = {};
  int best_level = 0;
  for (int step = -kSearchBelow; step <= kSearchAbove; step++) {
    int m = centre + step;
    m = m < 0 ? 0 : m > kMagnitudes - 1 ? kMagnitudes - 1 : m;
    for (int half = 0; half < 4; half++) {
      int side = half % 2 * kMagnitudes + m;
      float table[16];
      for (int i = 0; i < 16; i++) table[i] = float(tables[side * 16 + i]);
      float error = nearest(half >= 2 ? negative : v, table, code);
      if (error < best) {
        best = error;
        best_level = side + half / 2 * 2 * kMagnitudes;
        __builtin_memcpy(best_code, code, sizeof code);
      }
    }
  }
  for (int k = 0; k < kGroup; k++) codes[k] = uint8_t(best_code[k]);
  return uint8_t(best_level);
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
  float* sizes = static_cast<float*>(scratch);
  float reach[kMagnitudes];
  for (int m = 0; m < kMagnitudes; m++) {
    double power = 1.0 / double(uint64_t(1) << 63);
    for (int i = 0; i < m; i++) power *= 2;  // 2^(m - 63)
    reach[m] = float(127 * __builtin_sqrt(__builtin_sqrt(__builtin_sqrt(power))));
  }
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
          level = nearest_level(v, w.tables, reach, codes);
        else
          for (int k = 0; k < kGroup; k++) codes[k] = uint8_t(int8_t(__builtin_rintf(v[k])));
        put_codes(w, panel, r, g, codes, level);
      }
    }
  }
}
