#include "program.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>

#include "offset.h"

namespace chalot {
namespace {

constexpr int kFusedPanels = kBlock / kPanel;  // of gate and of up: one block of what they make

size_t to_lines(size_t n) { return (n + 63) / 64 * 64; }

// Operations whose work is split over tokens: between two of them no thread needs another's result.
bool by_token(OpKind k) {
  return k == OpKind::embed || k == OpKind::norm || k == OpKind::quantize || k == OpKind::gate ||
         k == OpKind::restore || k == OpKind::route || k == OpKind::prefetch;
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

// x less its mean, by sixteen chains of additions and their tree; zeros up to a multiple of 16.
void centre(const float* x, int n, float* out) {
  float lanes[16] = {};
  for (int i = 0; i < n; i++) lanes[i % 16] += x[i];
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  const float mean = lanes[0] / float(n);
  for (int i = 0; i < n; i++) out[i] = x[i] - mean;
  for (int i = n; i < round_up(n, 16); i++) out[i] = 0;
}

}  // namespace

Buffer::~Buffer() { release(); }

void Buffer::release() {
  ::operator delete(data_, std::align_val_t{64});
  data_ = nullptr;
  size_ = 0;
}

void Buffer::reserve(size_t bytes) {
  if (bytes <= size_) return;
  release();
  const size_t size = (bytes + 63) / 64 * 64;
  data_ = ::operator new(size, std::align_val_t{64});
  size_ = size;
  std::memset(data_, 0, size_);
}

Program::Program(std::vector<Slot> slots, std::vector<Op> ops, CacheShape cache, int heads,
                 std::vector<std::vector<float>> inverse_frequency, float rope_factor)
    : slots_(std::move(slots)),
      ops_(std::move(ops)),
      cache_(cache),
      heads_(heads),
      inverse_frequency_(std::move(inverse_frequency)),
      rope_factor_(rope_factor),
      storage_(slots_.size()) {
  check();
  for (const Op& op : ops_)
    for (const Part& part : op.parts) scratch_bytes_ = std::max(scratch_bytes_, scratch_bytes(part.w));
  scratch_bytes_ = to_lines(std::max(scratch_bytes_, attention_scratch_bytes()));
  for (const Op& op : ops_)
    if (of_all_heads(op) || op.bias) scratch_bytes_ = std::max(scratch_bytes_, to_lines(op.weight_size * 4));
  for (Op& op : ops_)
    if (op.kind == OpKind::experts) {
      op.taken = taken_.size();
      taken_.emplace_back(op.parts.size() / 3);
    }
  written_.assign(slots_.size(), false);
  for (size_t i = 0; i < ops_.size(); i++) {
    const Op& op = ops_[i];
    auto write = [&](int slot) {
      if (slot >= 0) written_[size_t(slot)] = true;
    };
    write(op.kind == OpKind::rope_store ? op.in : op.fused ? ops_[i + 2].out : op.out);
    if (op.fused) i += 2;
  }
}

void Program::reserve(const Batch& batch, int threads) {
  const int tokens = std::max(batch.tokens, batch.wanted);
  size_t each = scratch_bytes_;
  for (const Op& op : ops_)
    if (op.fused || op.kind == OpKind::experts)
      each = scratch_bytes_ + size_t(tokens) * 2 * kBlock * 4;  // behind what `product` needs
  while (int(scratch_.size()) < threads) scratch_.emplace_back();
  for (Buffer& b : scratch_) b.reserve(each);
  if (!batch.logits) logits_.reserve(size_t(batch.wanted) * size_t(vocabulary_) * 4);
  best_.reserve(size_t(threads) * size_t(batch.wanted) * size_t(batch.count) * sizeof(Candidate));
  held_.assign(size_t(threads) * size_t(batch.wanted), 0);
  if (tokens <= room_) return;
  room_ = 0;  // until all of it is there
  for (const Op& op : ops_)
    if (op.kind == OpKind::experts) reserve_experts(op, tokens);
  for (size_t i = 0; i < slots_.size(); i++) {
    const size_t stride = size_t(slots_[i].stride()), n = size_t(tokens), planes = size_t(slots_[i].planes);
    Storage& s = storage_[i];
    if (!written_[i]) continue;
    if (!planes) {
      s.numbers.reserve(n * stride * 4);
    } else {
      s.codes.reserve(size_t(round_up(tokens * slots_[i].planes, kRowsRead)) * stride);
      s.scales.reserve(n * stride / kBlock * 4);
      s.sums.reserve(n * planes * stride / kBlock * 4);
    }
  }
  const size_t turns = inverse_frequency_.size() * inverse_frequency_[0].size();
  for (Buffer* b : {&cosine_, &sine_}) b->reserve(size_t(tokens) * turns * 4);
  for (Buffer* b : {&sink_cosine_, &sink_sine_}) b->reserve(turns * 4);
  room_ = tokens;
}

void Program::angles(const Run& run) {
  const size_t turns = inverse_frequency_.size() * inverse_frequency_[0].size();
  auto turn = [&](int position, float* sine, float* cosine) {
    for (const std::vector<float>& set : inverse_frequency_)
      for (float frequency : set) {
        sine_cosine(float(position) * frequency, *sine, *cosine);
        *sine++ *= rope_factor_, *cosine++ *= rope_factor_;
      }
  };
  for (size_t t = size_t(run.from()); t < size_t(run.to()); t++)
    turn(run.batch.positions[t], sine_.as<float>() + t * turns, cosine_.as<float>() + t * turns);
  // where a query would be if what lies between sinks and window were not there
  if (lead_ && !run.id) turn(sinks_ + stream_ - 1, sink_sine_.as<float>(), sink_cosine_.as<float>());
}

void Program::run(const Kernels& kernels, Pool& pool, const Batch& batch) {
  check(batch);
  if (batch.tokens <= 0) return;
  reserve(batch, pool.size());
  cut_blocks(batch, pool.size());
  Shares shares(pool.size());
  split(shares, ops_[0], pool.size(), batch.tokens);
  pool.run([&](int id) { execute({kernels, pool, batch, shares, batch.tokens, id, pool.size()}); });
  collect(batch, pool.size());
}

void Program::copy_slot(int slot, int tokens, float* out) const {
  if (slot < 0 || size_t(slot) >= slots_.size() || slots_[size_t(slot)].planes || !written_[size_t(slot)] ||
      tokens > room_)
    throw std::out_of_range("slot holds no such numbers");
  const size_t width = size_t(slots_[size_t(slot)].width);
  for (int t = 0; t < tokens; t++) std::memcpy(out + t * width, numbers(slot, t), width * 4);
}

void Program::execute(Run run) {
  angles(run);
  for (size_t i = 0; i < ops_.size(); i++) {
    const Op& op = ops_[i];
    if (op.kind == OpKind::gather) {
      run.count = run.batch.wanted;
      if (!run.count) break;
    }
    if (op.fused)
      gated(op, run), i += 2;
    else
      apply(op, run);
    if (i + 1 == ops_.size()) break;
    const Op& next = ops_[i + 1];
    if (!(by_token(op.kind) && by_token(next.kind)))
      run.pool.barrier([&] { split(run.shares, next, run.threads, run.count); });
  }
  if (run.count && run.batch.count) {
    run.pool.barrier();
    choose(run);
  }
}

void Program::split(Shares& shares, const Op& op, int threads, int tokens) {
  if (op.kind == OpKind::experts) return group(op, tokens);  // which splits its stages itself
  int total = 0, most = 1;
  if (op.kind == OpKind::attend) {
    total = int(blocks_.size()) * cache_.kv_heads * (by_page_ ? most_pages_ : 1);
  } else if (op.kind == OpKind::linear && op.fused) {
    total = (op.parts[0].w.panels() + kFusedPanels - 1) / kFusedPanels;
  } else if (op.kind == OpKind::linear) {
    for (const Part& part : op.parts) total += part.w.panels();
    most = 16;
  }
  // pieces small enough that who is held up can be helped, even so that panels stay in pairs
  const int piece = std::min(most, std::max(1, total / (threads * 8)));
  shares.split(total, piece > 1 ? piece / 2 * 2 : 1);
}

void Program::quantize(const Kernels& k, const float* x, int block, const Slot& slot, Storage& to, int token) {
  const size_t stride = size_t(slot.stride()), blocks = stride / kBlock, t = size_t(token);
  const size_t planes = size_t(slot.planes), b = size_t(block);
  k.quantize(x, kBlock, int(planes), to.codes.as<int8_t>() + t * planes * stride + b * kBlock, stride,
             to.scales.as<float>() + t * blocks + b, to.sums.as<int32_t>() + t * planes * blocks + b, blocks);
}

void Program::apply(const Op& op, const Run& run) {
  const Kernels& k = run.k;
  const int first = run.from(), last = run.to();
  switch (op.kind) {
    case OpKind::embed:
      for (int t = first; t < last; t++) {
        float* out = numbers(op.out, t);
        read_row(k, op.parts[0].w, run.batch.ids[t], out);
        for (int i = 0; i < slots_[size_t(op.out)].width; i++) out[i] *= op.number;
      }
      break;
    case OpKind::norm:
      norm(op, run);
      break;
    case OpKind::quantize:
      for (int t = first; t < last; t++)
        for (int b = 0; b < slots_[size_t(op.out)].stride() / kBlock; b++)
          quantize(k, numbers(op.in, t) + b * kBlock, b, slots_[size_t(op.out)], storage_[size_t(op.out)], t);
      break;
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
      linear(op, run);
      break;
    case OpKind::prefetch:
      prefetch(op, run);
      break;
    case OpKind::route:
      route(op, run);
      break;
    case OpKind::experts:
      experts(op, run);
      break;
    case OpKind::rope_store:
      rope_store(op, run);
      break;
    case OpKind::attend:
      attend(op, run);
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
        std::memcpy(numbers(op.out, t), numbers(op.in, run.batch.rows[t]), size_t(slots_[size_t(op.out)].stride()) * 4);
      break;
  }
}

void Program::norm(const Op& op, const Run& run) {
  const int width = slots_[size_t(op.in)].width;
  float* centred = scratch_[size_t(run.id)].as<float>();
  for (int t = run.from(); t < run.to(); t++) {
    const float* x = numbers(op.in, t);
    float* y = numbers(op.out, t);
    if (!op.bias) {
      run.k.rms_norm(x, op.weight, width, op.number, y, op.add);
      continue;
    }
    centre(x, width, centred);
    run.k.rms_norm(centred, op.weight, width, op.number, centred, false);
    for (int i = 0; i < width; i++) {
      const float made = centred[i] + op.bias[i];
      y[i] = op.add ? y[i] + made : made;
    }
  }
}

void Program::linear(const Op& op, const Run& run) {
  const Slot& in = slots_[size_t(op.in)];
  const Storage& s = storage_[size_t(op.in)];
  float* logits = run.batch.logits ? run.batch.logits : logits_.as<float>();
  for (int from, to; run.shares.take(run.id, from, to);) {
    int begin = 0;
    for (const Part& part : op.parts) {
      const int first = std::max(from - begin, 0), last = std::min(to - begin, part.w.panels());
      begin += part.w.panels();
      if (first >= last) continue;
      Output out{op.out < 0 ? logits : numbers(op.out, 0) + part.column,
                 op.out < 0 ? size_t(part.w.rows) : size_t(slots_[size_t(op.out)].stride()), 0, part.bias, op.add};
      if (in.planes) {
        Activations x{in.planes, in.stride(), s.codes.as<int8_t>(), s.scales.as<float>(), s.sums.as<int32_t>()};
        multiply(run.k, part.w, x, run.count, first, last, out, scratch_[size_t(run.id)].as<void>());
      } else {
        run.k.dense(part.w, s.numbers.as<float>(), size_t(in.stride()), run.count, first, last, out);
      }
      if (op.cap == 0) continue;
      const int row = first * kPanel, end = std::min(last * kPanel, part.w.rows);
      for (size_t t = 0; t < size_t(run.count); t++) run.k.cap(out.y + t * out.stride + row, size_t(end - row), op.cap);
    }
  }
}

// Gate and up, what they make, and its codes: 128 columns at a time.
void Program::gated(const Op& op, const Run& run) {
  const Op &gate = (&op)[1], &coded = (&op)[2];
  const Slot& in = slots_[size_t(op.in)];
  const Storage& s = storage_[size_t(op.in)];
  const Activations x{in.planes, in.stride(), s.codes.as<int8_t>(), s.scales.as<float>(), s.sums.as<int32_t>()};
  uint8_t* scratch = scratch_[size_t(run.id)].as<uint8_t>();
  float* both = reinterpret_cast<float*>(scratch + scratch_bytes_);
  const int width = op.parts[0].w.rows;
  for (int block, end; run.shares.take(run.id, block, end);) {
    const int first = block * kFusedPanels, last = std::min(first + kFusedPanels, op.parts[0].w.panels());
    if (width < (block + 1) * kBlock) std::memset(both, 0, size_t(run.count) * 2 * kBlock * 4);
    for (int half = 0; half < 2; half++) {
      const Part& part = op.parts[size_t(half)];
      Output out{both + half * kBlock, 2 * kBlock, first * kPanel, part.bias, false};
      multiply(run.k, part.w, x, run.count, first, last, out, scratch);
    }
    for (int t = 0; t < run.count; t++) {
      float* g = both + size_t(t) * 2 * kBlock;
      run.k.gate(gate.gate, g, g + kBlock, kBlock, g);
      quantize(run.k, g, block, slots_[size_t(coded.out)], storage_[size_t(coded.out)], t);
    }
  }
}

// Each thread looks through its part of the vocabulary.
void Program::choose(const Run& run) {
  const int64_t all = vocabulary_;
  const int from = int(all * run.id / run.threads), to = int(all * (run.id + 1) / run.threads);
  const float* logits = run.batch.logits ? run.batch.logits : logits_.as<float>();
  for (int i = 0; i < run.count; i++) {
    const size_t at = size_t(run.id) * size_t(run.count) + size_t(i);
    held_[at] = run.k.top(logits + size_t(i) * size_t(all) + from, to - from, from, run.batch.count,
                          best_.as<Candidate>() + at * size_t(run.batch.count), 0);
  }
}

void Program::collect(const Batch& batch, int threads) {
  for (int i = 0; i < batch.wanted && batch.count; i++) {
    Candidate* best = batch.best + size_t(i) * size_t(batch.count);
    int held = 0;
    for (int id = 0; id < threads; id++) {
      const size_t at = size_t(id) * size_t(batch.wanted) + size_t(i);
      const Candidate* theirs = best_.as<Candidate>() + at * size_t(batch.count);
      if (held_[at] < 0) {
        best[0] = {0, -1};
        break;
      }
      for (int c = 0; c < held_[at]; c++) {
        if (held == batch.count && !(theirs[c].logit > best[held - 1].logit)) break;
        int place = held < batch.count ? held++ : held - 1;
        for (; place > 0 && best[place - 1].logit < theirs[c].logit; place--) best[place] = best[place - 1];
        best[place] = theirs[c];
      }
    }
  }
}

}  // namespace chalot
