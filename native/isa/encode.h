// Weights to codes, one panel at a time: the same results as chalot/quant/codes.py.
// Included by loops.h inside its anonymous namespace.

constexpr int kSearchAbove = 1, kMagnitudes = 64, kGrids = 2;

// A level's ascending values as eight pairs, the middles in each, and the middles between them. Behind the last value
// nothing is near.
struct alignas(64) Pairs {
  float low[8], high[8], inside[8], between[8];
};

// The tables with positive sign, and by magnitude the size that its level is made for and its largest value.
struct Grids {
  Pairs pairs[kGrids * kMagnitudes];
  float reach[kMagnitudes], end[kMagnitudes];
  int below;  // magnitudes tried below the one that meets the largest weight
};
static_assert(sizeof(Grids) <= kGridsBytes);

inline void fill(Grids& g, const int8_t* tables, int points, int below) {
  g.below = below;
  for (int level = 0; level < kGrids * kMagnitudes; level++) {
    const int8_t* t = tables + level * 16;
    Pairs& pairs = g.pairs[level];
    for (int i = 0; i < 8; i++) {
      const bool there = 2 * i < points;
      pairs.low[i] = there ? float(t[2 * i]) : 0.0f, pairs.high[i] = there ? float(t[2 * i + 1]) : 0.0f;
      pairs.inside[i] = (pairs.low[i] + pairs.high[i]) * 0.5f;
      pairs.between[i] = 2 * i + 2 < points ? (pairs.high[i] + float(t[2 * i + 2])) * 0.5f : __builtin_inff();
    }
  }
  double power = 0x1p-63;
  for (int m = 0; m < kMagnitudes; m++, power *= 2) {
    g.reach[m] = float(127 * __builtin_sqrt(__builtin_sqrt(__builtin_sqrt(power))));
    g.end[m] = 0;
    for (int grid = 0; grid < kGrids; grid++) {
      const Pairs& pairs = g.pairs[grid * kMagnitudes + m];
      const float top = pairs.high[points / 2 - 1], end = -pairs.low[0] > top ? -pairs.low[0] : top;
      g.end[m] = end > g.end[m] ? end : g.end[m];
    }
  }
}

inline F magnitude(F x) { return max(x, sub(zero(), x)); }

struct Group {
  F first, second;  // columns 0..15 and 16..31
};

// Squares of the distances to the nearest value. The nearest is in the pair; the other gives no smaller square.
inline F squares(F x, const Pairs& pairs) {
  const I pair = count_below(x, pairs.between);
  const F low = sub(x, look_up(pairs.low, pair)), high = sub(x, look_up(pairs.high, pair));
  return min(mul(low, low), mul(high, high));
}
inline float distance(Group x, const Pairs& pairs) { return sum(squares(x.first, pairs), squares(x.second, pairs)); }

// Orders candidates by error, then by their turn in the oracle. Errors are no less than 0, so their bits order them.
inline uint64_t rank(float error, int turn) {
  uint32_t bits;
  __builtin_memcpy(&bits, &error, 4);
  return uint64_t(bits) << 8 | uint32_t(turn);
}

// Level of one group in units of its segment. The search ends where the largest weight alone misses by more than the
// best: rounding is monotone, so no sum of squares is below one of its terms, and at lower levels it misses by more.
inline int nearest_level(Group x, const Grids& grids) {
  const Group negative = {sub(zero(), x.first), sub(zero(), x.second)};
  const float size = largest(max(magnitude(x.first), magnitude(x.second)));
  int centre = 0;
  for (int m = 0; m < kMagnitudes; m++) centre += grids.reach[m] < size;
  auto at_step = [&](int step) {
    int m = centre + step;
    return m < 0 ? 0 : m > kMagnitudes - 1 ? kMagnitudes - 1 : m;
  };
  uint64_t best = UINT64_MAX;
  for (int step = kSearchAbove; step >= -grids.below; step--) {
    const int m = at_step(step);
    const float miss = size - grids.end[m];
    if (miss > 0 && rank(miss * miss, 0) > best) break;
    for (int half = 0; half < 4; half++) {  // grid, and sign of the table
      const int side = half % 2 * kMagnitudes + m;
      const float error = distance(half < 2 ? x : negative, grids.pairs[side]);
      const uint64_t found = rank(error, (step + grids.below) * 4 + half);
      best = found < best ? found : best;
    }
  }
  const int turn = int(best & 255), half = turn % 4;
  return half * kMagnitudes + at_step(turn / 4 - grids.below);
}

inline F codes_of(F x, const Pairs& pairs) {
  const I pair = count_below(x, pairs.between);
  const F in_pair = sub(set(1.0f), zero_below(set(1.0f), look_up(pairs.inside, pair), x));
  return fma(to_float(pair), set(2.0f), in_pair);
}

// Largest size of each segment; returns that of the row.
inline float segment_sizes(const float* w, int columns, int segment, float* sizes) {
  float whole = 0;
  for (int s = 0; s * segment < columns; s++) {
    const int end = (s + 1) * segment < columns ? (s + 1) * segment : columns;
    F high = zero();
    for (int k = s * segment; k < end; k += 16) high = max(high, magnitude(load(w + k)));
    sizes[s] = largest(high);
    whole = sizes[s] > whole ? sizes[s] : whole;
  }
  return whole;
}

// 32 weights in units of their segment, held within +-127.
inline Group in_units(const float* w, float unit) {
  if (!(unit > 0)) return {zero(), zero()};
  auto one = [&](int k) { return max(min(div(load(w + k), set(unit)), set(127.0f)), set(-127.0f)); };
  return {one(0), one(16)};
}

inline void put_bytes(F whole, uint8_t* to) {
  const I all = to_int(whole);
  int32_t n[16];
  __builtin_memcpy(n, &all, sizeof n);
  for (int k = 0; k < 16; k++) to[k] = uint8_t(n[k]);
}

// Two sets of sixteen codes in one byte each, `shift` from its right end; what is left of them is cleared.
inline void put_pairs(F low, F high, float step, int shift, uint8_t* to) {
  uint8_t both[16];
  put_bytes(fma(high, set(step), low), both);
  for (int k = 0; k < 16; k++) to[k] = uint8_t((shift ? to[k] : 0) | both[k] << shift);
}

// Two sets of sixteen codes of three bits, of group g: their low two bits, and their high ones. The bytes begin as 0.
inline void put_threes(F low, F high, int g, uint8_t* to) {
  uint8_t first[16], second[16];
  put_bytes(low, first);
  put_bytes(high, second);
  for (int k = 0; k < 16; k++) {
    to[g / 2 * 256 + k] |= uint8_t(((first[k] & 3) | (second[k] & 3) << 2) << g % 2 * 4);
    to[Nl3::high + k] |= uint8_t((first[k] >> 2 | second[k] >> 2 << 1) << g * 2);
  }
}

template <class C>
inline void put_group(const Matrix& w, const Grids& grids, Group x, uint8_t* panel, int r, int g) {
  const int at = r % 4 * 64 + r / 4 * 16;  // line and lane
  if constexpr (!C::levels) {
    uint8_t* to = panel + size_t(g) * Int8::group_bytes + at;
    put_bytes(round(x.first), to);
    put_bytes(round(x.second), to + 256);
    return;
  }
  const int block = g / 4, in_block = g % 4;
  const int groups = C::groups(w.groups() - block * 4 < 4 ? w.groups() - block * 4 : 4);
  uint8_t* base = panel + size_t(block) * 4 * C::group_bytes;
  const int level = nearest_level(x, grids);
  const Pairs& pairs = grids.pairs[level % (kGrids * kMagnitudes)];
  const F sign = set(level < kGrids * kMagnitudes ? 1.0f : -1.0f);
  const F low = codes_of(mul(x.first, sign), pairs), high = codes_of(mul(x.second, sign), pairs);
  base[groups * C::group_codes + in_block * kPanel + r] = uint8_t(level);
  if constexpr (C::group_codes == Nl3::group_codes)
    put_threes(low, high, in_block, base + at);
  else if constexpr (C::whole)
    put_pairs(low, high, 4.0f, in_block % 2 * 4, base + in_block / 2 * 256 + at);
  else
    put_bytes(fma(high, set(16.0f), low), base + in_block * 256 + at);
}

template <class C>
void encode_rows(const Matrix& w, const float* weights, int first, int last, uint8_t* panels, uint16_t* segments,
                 float* row_scale, const Grids& grids, float* sizes) {
  const int columns = w.groups() * kGroup, segment = w.segment_blocks * kBlock, count = w.segment_count();
  if constexpr (C::whole) __builtin_memset(panels + first * w.panel_bytes(), 0, size_t(last - first) * w.panel_bytes());
  for (int row = first * kPanel; row < last * kPanel; row++) {
    const int p = row / kPanel, r = row % kPanel;
    const float* from = weights + size_t(row) * columns;
    const float whole = segment_sizes(from, columns, segment, sizes);
    row_scale[row] = whole / 127.0f;
    for (int s = 0; s < count; s++) {
      float ratio = whole > 0 ? sizes[s] / whole : 0.0f;
      uint16_t half = float_to_half(ratio);
      if (half_to_float(half) < ratio) half++;
      segments[(size_t(p) * count + s) * kPanel + r] = half;
      const float unit = row_scale[row] * half_to_float(half);
      for (int g = s * segment / kGroup; g < (s + 1) * segment / kGroup && g < w.groups(); g++)
        put_group<C>(w, grids, in_units(from + g * kGroup, unit), panels + size_t(p) * w.panel_bytes(), r, g);
    }
  }
}

void encode(const Matrix& w, const float* weights, int first, int last, uint8_t* panels, uint16_t* segments,
            float* row_scale, void* scratch) {
  Grids& grids = *static_cast<Grids*>(scratch);
  float* sizes = reinterpret_cast<float*>(&grids + 1);
  auto rows = [&](auto coder) {
    encode_rows<decltype(coder)>(w, weights, first, last, panels, segments, row_scale, grids, sizes);
  };
  if (w.scheme == Scheme::int8) return rows(Int8{});
  switch (w.scheme) {  // the fewer points, the more they may cut off
    case Scheme::nl3:
      fill(grids, w.tables, 8, 7);
      return rows(Nl3{});
    case Scheme::nl2:
      fill(grids, w.tables, 4, 10);
      return rows(Nl2{});
    default:
      fill(grids, w.tables, 16, 5);
      return rows(Nl4{});
  }
}
