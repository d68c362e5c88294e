#include "program.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

namespace chalot {
namespace {

constexpr int kMaxHead = 1024;

[[noreturn]] void invalid(size_t op, const char* what) {
  throw std::invalid_argument("operation " + std::to_string(op) + ": " + what);
}

// Operations whose work is split over tokens: between two of them no thread needs another's result.
bool by_token(OpKind k) {
  return k == OpKind::embed || k == OpKind::norm || k == OpKind::quantize || k == OpKind::gate || k == OpKind::restore;
}

// sin and cos of a float32 angle, in double, rounded to float32: pi / 2 in three parts (33 + 33 + 53 bits), so that
// n * part is exact for |n| < 2^20, then Taylor polynomials on |r| <= pi / 4. Plain * and +, no fma.
void sine_cosine(float angle, float& s, float& c) {
  double a = angle, n = std::nearbyint(a * 0.63661977236758134308);
  double r = ((a - n * 1.5707963267341256e+00) - n * 6.0771005063039660e-11) - n * 2.0222662487959506e-21;
  double x = r * r;
  double sp = -1.0 / 1307674368000;
  sp = sp * x + 1.0 / 6227020800;
  sp = sp * x - 1.0 / 39916800;
  sp = sp * x + 1.0 / 362880;
  sp = sp * x - 1.0 / 5040;
  sp = sp * x + 1.0 / 120;
  sp = sp * x - 1.0 / 6;
  double cp = 1.0 / 20922789888000;
  cp = cp * x - 1.0 / 87178291200;
  cp = cp * x + 1.0 / 479001600;
  cp = cp * x - 1.0 / 3628800;
  cp = cp * x + 1.0 / 40320;
  cp = cp * x - 1.0 / 720;
  cp = cp * x + 1.0 / 24;
  double sine = r + r * x * sp, cosine = 1.0 - x * 0.5 + x * x * cp;
  int quarter = int(int64_t(n) & 3);
  double s4[4] = {sine, cosine, -sine, -cosine}, c4[4] = {cosine, -sine, -cosine, sine};
  s = float(s4[quarter]);
  c = float(c4[quarter]);
}

}  // namespace

Buffer::~Buffer() { std::free(data_); }

void Buffer::reserve(size_t bytes) {
  if (bytes <= size_) return;
  std::free(data_);
  size_ = (bytes + 63) / 64 * 64;
  data_ = std::aligned_alloc(64, size_);
  if (!data_) {
    size_ = 0;
    throw std::bad_alloc();
  }
  std::memset(data_, 0, size_);
}

Program::Program(std::vector<Slot> slots, std::vector<Op> ops, CacheShape cache, int heads,
                 std::vector<float> inverse_frequency)
    : slots_(std::move(slots)),
      ops_(std::move(ops)),
      cache_(cache),
      heads_(heads),
      inverse_frequency_(std::move(inverse_frequency)),
      storage_(slots_.size()) {
  check();
  for (const Op& op : ops_)
    for (const Part& part : op.parts) scratch_bytes_ = std::max(scratch_bytes_, scratch_bytes(part.w));
  scratch_bytes_ = std::max(scratch_bytes_, size_t(cache_.stride()) * 8 + 64);
}

void Program::check() const {
  const bool heads_fit = cache_.kv_heads > 0 && heads_ > 0 && heads_ % cache_.kv_heads == 0;
  const bool size_fits = cache_.head_dim > 0 && cache_.head_dim <= kMaxHead && cache_.head_dim % 2 == 0;
  if (!heads_fit || !size_fits || cache_.layers <= 0)
    throw std::invalid_argument("cache: heads must be a multiple of key/value heads, the head size even and <= 1024");
  if (inverse_frequency_.size() != size_t(cache_.head_dim) / 2)
    throw std::invalid_argument("rope: expected head_dim / 2 inverse frequencies");
  for (const Slot& s : slots_)
    if (s.width <= 0 || s.width > 1 << 24 || s.planes < 0 || s.planes > 2) throw std::invalid_argument("slot: size");
  bool gathered = false;
  auto& self = const_cast<Program&>(*this);
  for (size_t i = 0; i < ops_.size(); i++) {
    const Op& op = ops_[i];
    auto slot = [&](int s) -> const Slot& {
      if (s < 0 || size_t(s) >= slots_.size()) invalid(i, "slot does not exist");
      return slots_[size_t(s)];
    };
    auto numbers = [&](int s, int width) {
      if (slot(s).planes || slot(s).width != width) invalid(i, "slot has another width or holds codes");
    };
    const int queries = heads_ * cache_.head_dim, keys = cache_.kv_heads * cache_.head_dim;
    switch (op.kind) {
      case OpKind::embed:
        if (op.parts.size() != 1) invalid(i, "embed takes one matrix");
        numbers(op.out, op.parts[0].w.columns);
        self.input_vocabulary_ = op.parts[0].w.rows;
        break;
      case OpKind::norm:
        if (!op.weight) invalid(i, "norm needs a weight");
        numbers(op.in, slot(op.out).width);
        numbers(op.out, slot(op.in).width);
        break;
      case OpKind::quantize:
        if (slot(op.in).planes || !slot(op.out).planes || slot(op.in).width != slot(op.out).width)
          invalid(i, "quantize goes from numbers to codes of the same width");
        break;
      case OpKind::restore:
        if (!slot(op.in).planes || slot(op.out).planes || slot(op.in).width != slot(op.out).width)
          invalid(i, "restore goes from codes to numbers of the same width");
        break;
      case OpKind::linear:
        for (const Part& part : op.parts) {
          if (part.w.columns != slot(op.in).width) invalid(i, "matrix has other columns than its input slot");
          if (is_coded(part.w.scheme) != (slot(op.in).planes > 0)) invalid(i, "matrix and input differ in kind");
          int room = op.out < 0 ? part.w.rows : slot(op.out).width;
          if (part.column < 0 || part.column > room - part.w.rows) invalid(i, "matrix has more rows than its output");
          if (op.out >= 0 && slot(op.out).planes) invalid(i, "output slot holds codes");
        }
        if (op.out < 0) {
          if (op.parts.size() != 1 || !gathered || op.add) invalid(i, "logits come from one matrix after gather");
          self.vocabulary_ = op.parts[0].w.rows;
        }
        break;
      case OpKind::rope_store:
      case OpKind::attend:
        if (op.layer < 0 || op.layer >= cache_.layers) invalid(i, "layer is not in the cache");
        numbers(op.in, queries + 2 * keys);
        if (op.kind == OpKind::attend) numbers(op.out, queries);
        break;
      case OpKind::gate:
        numbers(op.in, 2 * slot(op.out).width);
        numbers(op.out, slot(op.out).width);
        break;
      case OpKind::gather:
        numbers(op.in, slot(op.out).width);
        numbers(op.out, slot(op.in).width);
        gathered = true;
        break;
    }
  }
  if (!input_vocabulary_) throw std::invalid_argument("program: needs embed");
}

void Program::check(const Batch& b) const {
  for (int t = 0; t < b.tokens; t++) {
    if (b.ids[t] < 0 || b.ids[t] >= input_vocabulary_) throw std::out_of_range("token id is outside the vocabulary");
    if (b.sequence[t] < 0 || b.sequence[t] >= b.sequences) throw std::out_of_range("sequence has no page table");
    if (b.positions[t] < 0 || b.positions[t] / kPage >= b.pages_a_sequence)
      throw std::out_of_range("position is outside the page table");
    const int32_t* pages = b.pages + size_t(b.sequence[t]) * b.pages_a_sequence;
    for (int p = 0; p <= b.positions[t] / kPage; p++)
      if (pages[p] < 0 || size_t(pages[p]) >= b.arena_pages) throw std::out_of_range("page is outside the cache");
  }
  for (int i = 0; i < b.wanted; i++)
    if (b.rows[i] < 0 || b.rows[i] >= b.tokens) throw std::out_of_range("wanted row is outside the batch");
}

void Program::reserve(int tokens, int threads) {
  while (int(scratch_.size()) < threads) scratch_.emplace_back().reserve(scratch_bytes_);
  if (tokens <= room_) return;
  for (size_t i = 0; i < slots_.size(); i++) {
    const size_t stride = size_t(slots_[i].stride()), n = size_t(tokens), planes = size_t(slots_[i].planes);
    Storage& s = storage_[i];
    if (!planes) {
      s.numbers.reserve(n * stride * 4);
    } else {
      s.codes.reserve(n * planes * stride);
      s.scales.reserve(n * stride / kBlock * 4);
      s.sums.reserve(n * planes * stride / kBlock * 4);
    }
  }
  cosine_.reserve(size_t(tokens) * inverse_frequency_.size() * 4);
  sine_.reserve(size_t(tokens) * inverse_frequency_.size() * 4);
  room_ = tokens;
}

void Program::angles(const Batch& batch) {
  const size_t half = inverse_frequency_.size();
  for (int t = 0; t < batch.tokens; t++)
    for (size_t i = 0; i < half; i++) {
      float angle = float(batch.positions[t]) * inverse_frequency_[i];
      sine_cosine(angle, sine_.as<float>()[t * half + i], cosine_.as<float>()[t * half + i]);
    }
}

void Program::run(const Kernels& kernels, Pool& pool, const Batch& batch) {
  if (batch.tokens <= 0) return;
  check(batch);
  reserve(std::max(batch.tokens, batch.wanted), pool.size());
  {
    PlainArithmetic plain;
    angles(batch);
  }
  pool.run([&](int id) { execute(kernels, pool, batch, id); });
}

void Program::copy_slot(int slot, int tokens, float* out) const {
  if (slot < 0 || size_t(slot) >= slots_.size() || slots_[size_t(slot)].planes || tokens > room_)
    throw std::out_of_range("slot holds no such numbers");
  const size_t width = size_t(slots_[size_t(slot)].width);
  for (int t = 0; t < tokens; t++) std::memcpy(out + t * width, numbers(slot, t), width * 4);
}

void Program::execute(const Kernels& k, Pool& pool, const Batch& batch, int id) {
  int count = batch.tokens;
  for (size_t i = 0; i < ops_.size(); i++) {
    if (ops_[i].kind == OpKind::gather) {
      count = batch.wanted;
      if (!count) break;
    }
    apply(k, ops_[i], batch, count, id, pool.size());
    bool last = i + 1 == ops_.size();
    if (!last && !(by_token(ops_[i].kind) && by_token(ops_[i + 1].kind))) pool.barrier();
  }
}

void Program::apply(const Kernels& k, const Op& op, const Batch& batch, int count, int id, int threads) {
  const int first = int(int64_t(count) * id / threads), last = int(int64_t(count) * (id + 1) / threads);
  switch (op.kind) {
    case OpKind::embed:
      for (int t = first; t < last; t++) k.row(op.parts[0].w, batch.ids[t], numbers(op.out, t));
      break;
    case OpKind::norm:
      for (int t = first; t < last; t++)
        k.rms_norm(numbers(op.in, t), op.weight, slots_[size_t(op.in)].width, op.number, numbers(op.out, t));
      break;
    case OpKind::quantize: {
      const Slot& s = slots_[size_t(op.out)];
      Storage& to = storage_[size_t(op.out)];
      const size_t stride = size_t(s.stride()), blocks = stride / kBlock, planes = size_t(s.planes);
      for (size_t t = size_t(first); t < size_t(last); t++)
        k.quantize(numbers(op.in, int(t)), int(stride), s.planes, to.codes.as<int8_t>() + t * planes * stride,
                   to.scales.as<float>() + t * blocks, to.sums.as<int32_t>() + t * planes * blocks);
      break;
    }
    case OpKind::restore: {
      const Slot& s = slots_[size_t(op.in)];
      const Storage& from = storage_[size_t(op.in)];
      const size_t stride = size_t(s.stride()), planes = size_t(s.planes);
      for (size_t t = size_t(first); t < size_t(last); t++) {
        const int8_t* codes = from.codes.as<int8_t>() + t * planes * stride;
        for (size_t i = 0; i < stride; i++) {
          int whole = planes == 2 ? codes[i] * kPlaneStep + codes[stride + i] : codes[i];
          numbers(op.out, int(t))[i] = float(whole) * from.scales.as<float>()[(t * stride + i) / kBlock];
        }
      }
      break;
    }
    case OpKind::linear:
      linear(k, op, batch, count, id, threads);
      break;
    case OpKind::rope_store:
      rope_store(k, op, batch, first, last);
      break;
    case OpKind::attend:
      attend(k, op, batch, id, threads);
      break;
    case OpKind::gate: {
      const int width = slots_[size_t(op.out)].width;
      for (int t = first; t < last; t++) {
        const float* both = numbers(op.in, t);
        float* out = numbers(op.out, t);
        k.gate(op.gate, both, both + width, width, out);
        std::memset(out + width, 0, size_t(round_up(width, 16) - width) * 4);
      }
      break;
    }
    case OpKind::gather:
      for (int t = first; t < last; t++)
        std::memcpy(numbers(op.out, t), numbers(op.in, batch.rows[t]), size_t(slots_[size_t(op.out)].stride()) * 4);
      break;
  }
}

void Program::linear(const Kernels& k, const Op& op, const Batch& batch, int count, int id, int threads) {
  int64_t total = 0, begin = 0;
  for (const Part& part : op.parts) total += part.w.panels();
  const int64_t from = total * id / threads, to = total * (id + 1) / threads;
  const Slot& in = slots_[size_t(op.in)];
  const Storage& s = storage_[size_t(op.in)];
  for (const Part& part : op.parts) {
    const int panels = part.w.panels();
    const int first = int(std::max<int64_t>(from - begin, 0)), last = int(std::min<int64_t>(to - begin, panels));
    begin += panels;
    if (first >= last) continue;
    Output out{op.out < 0 ? batch.logits : numbers(op.out, 0) + part.column,
               op.out < 0 ? size_t(part.w.rows) : size_t(slots_[size_t(op.out)].stride()), part.bias, op.add};
    if (in.planes) {
      Activations x{in.planes, in.stride(), s.codes.as<int8_t>(), s.scales.as<float>(), s.sums.as<int32_t>()};
      k.product(part.w, x, count, first, last, out, scratch_[size_t(id)].as<void>());
    } else {
      k.dense(part.w, s.numbers.as<float>(), size_t(in.stride()), count, first, last, out);
    }
  }
}

void Program::rope_store(const Kernels& k, const Op& op, const Batch& batch, int first, int last) {
  const int dim = cache_.head_dim, half = dim / 2, stride = cache_.stride();
  for (int t = first; t < last; t++) {
    float* q = numbers(op.in, t);
    const float *cosine = cosine_.as<float>() + size_t(t) * half, *sine = sine_.as<float>() + size_t(t) * half;
    for (int h = 0; h < heads_ + cache_.kv_heads; h++) k.rotate(q + h * dim, cosine, sine, half);
    const int page = batch.pages[size_t(batch.sequence[t]) * batch.pages_a_sequence + batch.positions[t] / kPage];
    uint8_t* base = batch.arena + size_t(page) * cache_.page_bytes();
    const size_t row = size_t(batch.positions[t] % kPage) * stride * (cache_.type == CacheType::f32 ? 4 : 2);
    alignas(64) float padded[kMaxHead] = {};
    for (int h = 0; h < 2 * cache_.kv_heads; h++) {
      std::memcpy(padded, q + (heads_ + h) * dim, size_t(dim) * 4);
      const bool values = h >= cache_.kv_heads;
      k.store(cache_.type, padded, stride, base + cache_.offset(op.layer, h % cache_.kv_heads, values) + row);
    }
  }
}

void Program::attend(const Kernels& k, const Op& op, const Batch& batch, int id, int threads) {
  const int dim = cache_.head_dim, stride = cache_.stride(), share = heads_ / cache_.kv_heads;
  alignas(64) float query[kMaxHead] = {}, gathered[kMaxHead];
  for (int unit = id; unit < batch.tokens * heads_; unit += threads) {
    const int t = unit / heads_, h = unit % heads_, kv = h / share;
    const float* q = numbers(op.in, t) + h * dim;
    for (int d = 0; d < dim; d++) query[d] = q[d] * op.number;
    std::memset(gathered, 0, size_t(stride) * 4);
    Gathered so_far{gathered, -INFINITY, 0};
    const int32_t* pages = batch.pages + size_t(batch.sequence[t]) * batch.pages_a_sequence;
    for (int p = 0; p <= batch.positions[t] / kPage; p++) {
      const uint8_t* base = batch.arena + size_t(pages[p]) * cache_.page_bytes();
      Page page{cache_.type, base + cache_.offset(op.layer, kv, false), base + cache_.offset(op.layer, kv, true),
                stride};
      int count = batch.positions[t] + 1 - p * kPage;
      k.attend(page, query, count < kPage ? count : kPage, so_far);
    }
    float* out = numbers(op.out, t) + h * dim;
    for (int d = 0; d < dim; d++) out[d] = gathered[d] / so_far.denominator;
  }
}

}  // namespace chalot
