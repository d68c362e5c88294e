// The key/value cache and attention over one of its pages. Included by loops.h inside its anonymous namespace.

// Rotates blocks of `size` numbers (a power of two) by a Hadamard matrix without its factor 1 / sqrt(size), which
// spreads a channel's outliers over the block. `n` is a multiple of 16.
template <int Width>
inline F butterfly(F a) {
  alignas(64) float sign[16];
  for (int i = 0; i < 16; i++) sign[i] = i & Width ? -1.0f : 1.0f;
  return add(flip<Width>(a), mul(a, load(sign)));
}

void spread(float* x, int n, int size) {
  for (int i = 0; i < n; i += 16) {
    F a = load(x + i);
    if (size > 1) a = butterfly<1>(a);
    if (size > 2) a = butterfly<2>(a);
    if (size > 4) a = butterfly<4>(a);
    if (size > 8) a = butterfly<8>(a);
    store(x + i, a);
  }
  for (int width = 16; width < size; width *= 2)
    for (int i = 0; i < n; i += 16)
      if (!(i & width)) {
        F a = load(x + i), b = load(x + i + width);
        store(x + i, add(a, b));
        store(x + i + width, sub(a, b));
      }
}

// Byte `column` of line `row` of tiles whose contraction is over columns.
inline size_t tile_at(int row, int column) { return size_t(column / 4) * 64 + size_t(row * 4 + column % 4); }

void store_codes_of(const Page& page, int at, const float* key, const float* value) {
  alignas(64) int8_t codes[kMaxHead];
  int32_t sums;
  auto* keys = static_cast<int8_t*>(page.keys) + size_t(at / kPanel) * kPanel * page.stride;
  quantize_run(key, page.stride, 1, codes, 0, page.key_scale + at, &sums, 0);
  for (int d = 0; d < page.stride; d += 4) __builtin_memcpy(keys + tile_at(at % kPanel, d), codes + d, 4);
  auto* values = static_cast<int8_t*>(page.values);
  quantize_run(value, page.stride, 1, codes, 0, page.value_scale + at, &sums, 0);
  for (int d = 0; d < page.stride; d++) values[size_t(d / 16) * 16 * kPage + tile_at(d % 16, at)] = codes[d];
}

void store_numbers(CacheType type, const float* x, int n, void* out, size_t at) {
  for (int i = 0; i < n; i += 16) {
    F v = load(x + i);
    if (type == CacheType::f32)
      store(static_cast<float*>(out) + at + i, v);
    else  // float16 ends at 65,504; a larger key or value saturates
      store_f16(static_cast<uint16_t*>(out) + at + i, max(min(v, set(65504.0f)), set(-65504.0f)));
  }
}

void store_cached(const Page& page, int at, const float* key, const float* value) {
  if (page.type == CacheType::int8) return store_codes_of(page, at, key, value);
  store_numbers(page.type, key, page.stride, page.keys, size_t(at) * page.stride);
  store_numbers(page.type, value, page.stride, page.values, size_t(at) * page.stride);
}

// cap * tanh(score / cap), tanh(u) = 1 - 2 / (e^2u + 1)
inline F soft_cap(F score, float cap) {
  F e = exponential(mul(score, set(2.0f / cap)));
  return mul(set(cap), sub(set(1.0f), div(set(2.0f), add(e, set(1.0f)))));
}

void cap_all(float* x, size_t n, float cap) {
  for (size_t i = 0; i + 16 <= n; i += 16) store(x + i, soft_cap(load(x + i), cap));
  if (size_t rest = n % 16) {
    float part[16] = {};
    __builtin_memcpy(part, x + n - rest, rest * 4);
    store(part, soft_cap(load(part), cap));
    __builtin_memcpy(x + n - rest, part, rest * 4);
  }
}

// Scores of one row, read at [from, to), get their cap; what lies around them in their sixteens becomes -infinity.
inline float largest_score(float* scores, int from, int to, float cap) {
  const int first = from / 16 * 16, last = round_up(to, 16);
  if (cap != 0)
    for (int j = first; j < last; j += 16) store(scores + j, soft_cap(load(scores + j), cap));
  for (int j = first; j < from; j++) scores[j] = -__builtin_inff();
  for (int j = to; j < last; j++) scores[j] = -__builtin_inff();
  F top = load(scores + first);
  for (int j = first + 16; j < last; j += 16) top = max(top, load(scores + j));
  return largest(top);
}

// Scores become e^(score - high), and what lies around them 0; gives their sum. With `factor`, what is written are
// those times it, and `most` is the largest of them.
template <bool Factor>
inline float softmax(float* scores, int from, int to, float high, const float* factor, float& most) {
  const F top = set(high);
  F sums = zero(), largest_weight = zero();
  for (int j = from / 16 * 16; j < to; j += 16) {
    const F below = sub(load(scores + j), top);
    F e = exponential<false>(below);
    sums = add(sums, e);
    if (Factor) {
      e = mul(e, load(factor + j));
      // around the row it may be infinite, from what the page held before; and that times 0 is not 0
      if (j < from || j + 16 > to) e = zero_below(e, below, set(-87.0f));
      largest_weight = max(largest_weight, e);
    }
    store(scores + j, e);
  }
  if (Factor) most = largest(largest_weight);
  return sum(sums);
}

template <CacheType C>
F load_cached(const void* p, size_t at) {
  if constexpr (C == CacheType::f32) return load(static_cast<const float*>(p) + at);
  return load_f16(static_cast<const uint16_t*>(p) + at);
}

template <CacheType C>
void attend_numbers(const Page& page, const Queries& q, Gathered g) {
  alignas(64) float p[kPage];
  for (int r = 0; r < q.rows; r++) {
    const int from = q.from[r], to = q.to[r];
    if (from >= to) continue;
    const float* query = q.numbers + size_t(r) * page.stride;
    for (int j = from; j < to; j++) {
      F lanes = zero();
      for (int d = 0; d < page.stride; d += 16)
        lanes = fma(load(query + d), load_cached<C>(page.keys, size_t(j) * page.stride + d), lanes);
      p[j] = sum(lanes);
    }
    float none;
    g.largest[r] = largest_score(p, from, to, q.cap);
    g.denominator[r] = softmax<false>(p, from, to, g.largest[r], nullptr, none);
    for (int d = 0; d < page.stride; d += 16) {
      F o = zero();
      for (int j = from; j < to; j++) o = fma(set(p[j]), load_cached<C>(page.values, size_t(j) * page.stride + d), o);
      store(g.out + size_t(r) * page.stride + d, o);
    }
  }
}

// Both products are of codes: queries and weights in two planes each, keys and values as tiles. Of some rows, as many
// as tile_product takes, all is done before the next ones, so that it stays in the first level of the cache.
struct Some {
  float* scores;  // (rows, kPage)
  int8_t* codes;  // (rows, 2, kPage): weights, whole numbers below 2^14 in two planes of seven bits
  float scale[kRows / 2];
};

template <int N, int Panels>
inline void score_panels(const Page& page, const Queries& q, int r, int panel, const Some& some) {
  const int8_t* keys = static_cast<const int8_t*>(page.keys) + size_t(panel) * kPanel * page.stride;
  I part[2 * N][Panels];
  tile_product<2 * N, Panels>(keys, size_t(kPanel) * page.stride, page.stride / 4,
                              q.codes + size_t(r) * 2 * page.stride, size_t(page.stride), q.sums + r * 2, 1, part);
  for (int k = 0; k < N; k++)
    for (int i = 0; i < Panels; i++) {
      const int at = (panel + i) * kPanel;
      F factor = mul(load(page.key_scale + at), set(q.scale[r + k]));
      store(some.scores + k * kPage + at, mul(to_float(join(part[2 * k][i], part[2 * k + 1][i])), factor));
    }
}

template <int N, int Panels>
inline void gather_panels(const Page& page, int first, int last, const Some& some, int panel, float* out) {
  const int8_t* values = static_cast<const int8_t*>(page.values) + size_t(panel) * kPanel * kPage;
  I part[2 * N][Panels];
  tile_product<2 * N, Panels, true>(values + size_t(first) * kPanel, size_t(kPanel) * kPage, (last - first) / 4,
                                    some.codes + first, kPage, nullptr, 0, part);
  for (int k = 0; k < N; k++)
    for (int i = 0; i < Panels; i++)
      store(out + size_t(k) * page.stride + (panel + i) * kPanel,
            mul(to_float(join(part[2 * k][i], part[2 * k + 1][i])), set(some.scale[k])));
}

template <class One, class Several>
inline void by_panels(int first, int last, One one, Several several) {
  for (; first + kPanels <= last; first += kPanels) several(first);
  for (; first < last; first++) one(first);
}

// Weights of one row, [begin, end) of the page's positions, none above `most`, to codes; 0 elsewhere in [first, last).
inline void weights_to_codes(const float* weights, int begin, int end, int first, int last, float most, int8_t* codes,
                             float& scale) {
  const float top = 127.0f * kPlaneStep;
  const bool some = most > 0x1p-100f;
  const F inverse = set(some ? top / most : 0.0f);
  scale = some ? most / top : 0.0f;
  for (int plane = 0; plane < 2; plane++) {
    __builtin_memset(codes + plane * kPage + first, 0, size_t(begin - first));
    __builtin_memset(codes + plane * kPage + end, 0, size_t(last - end));
  }
  for (int j = begin; j < end; j += 16) {
    I high, low;
    halve(to_int(round(mul(load(weights + j), inverse))), high, low);
    store_codes(codes + j, high);
    store_codes(codes + kPage + j, low);
  }
}

// Step by step for all rows, because one row's step waits for the one before.
template <int N>
void attend_rows(const Page& page, const Queries& q, int r, Gathered g, Some some) {
  const int *from = q.from + r, *to = q.to + r;
  int first = kPage, last = 0;
  for (int k = 0; k < N; k++)
    if (from[k] < to[k]) {
      first = from[k] < first ? from[k] : first;
      last = to[k] > last ? to[k] : last;
    }
  if (first >= last) return;
  first = first / 16 * 16, last = round_up(last, 16);
  by_panels(
      first / 16, last / 16, [&](int p) { score_panels<N, 1>(page, q, r, p, some); },
      [&](int p) { score_panels<N, kPanels>(page, q, r, p, some); });
  float most[N] = {};
  for (int k = 0; k < N; k++)
    if (from[k] < to[k]) g.largest[r + k] = largest_score(some.scores + k * kPage, from[k], to[k], q.cap);
  for (int k = 0; k < N; k++)
    if (from[k] < to[k])
      g.denominator[r + k] =
          softmax<true>(some.scores + k * kPage, from[k], to[k], g.largest[r + k], page.value_scale, most[k]);
  for (int k = 0; k < N; k++) {
    const bool sees = from[k] < to[k];
    weights_to_codes(some.scores + k * kPage, sees ? from[k] / 16 * 16 : last, sees ? round_up(to[k], 16) : last, first,
                     last, most[k], some.codes + k * 2 * kPage, some.scale[k]);
  }
  float* out = g.out + size_t(r) * page.stride;
  by_panels(
      0, page.stride / 16, [&](int p) { gather_panels<N, 1>(page, first, last, some, p, out); },
      [&](int p) { gather_panels<N, kPanels>(page, first, last, some, p, out); });
}

void attend_codes(const Page& page, const Queries& q, Gathered g, void* scratch) {
  float* scores = static_cast<float*>(scratch);
  const Some some{scores, reinterpret_cast<int8_t*>(scores + kRows / 2 * kPage), {}};
  in_turns<kRows / 2>(q.rows, [&]<int N>(int r) { attend_rows<N>(page, q, r, g, some); });
}

// The page's own (output, largest score, denominator) of each row that sees some of it.
void attend(const Page& page, const Queries& q, Gathered g, void* scratch) {
  if (page.type == CacheType::f32) attend_numbers<CacheType::f32>(page, q, g);
  if (page.type == CacheType::f16) attend_numbers<CacheType::f16>(page, q, g);
  if (page.type == CacheType::int8) attend_codes(page, q, g, scratch);
}

// One row: what a page gave goes into what the pages before it gave.
void merge(float* out, float& top, float& denominator, const float* page_out, float page_top, float page_denominator,
           int n) {
  const float high = top > page_top ? top : page_top;
  const F before = exponential(set(top - high)), here = exponential(set(page_top - high));
  denominator = __builtin_fmaf(denominator, lowest(before), page_denominator * lowest(here));
  top = high;
  for (int d = 0; d < n; d += 16) store(out + d, fma(load(out + d), before, mul(load(page_out + d), here)));
}
