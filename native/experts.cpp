// Mixtures of experts: which experts each token takes, and what those make of it, expert by expert, so that a batch
// reads each matrix once. A token's sum goes over its experts in ascending order:
//   h[r] = h[r] + weight * y[r]     two roundings, no fma
#include <algorithm>
#include <cstring>

#ifndef _WIN32
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "offset.h"
#include "program.h"

namespace chalot {
namespace {

constexpr int kBlockPanels = kBlock / kPanel;
constexpr int kMostPanels = 2 * kBlockPanels;  // of down at once: what they make fits the room of gate and up

}  // namespace

// Weights of the `top` best scores, of equal ones the lower; -1 for the others:
//   e^(score - largest) / sum, the sum over all or over the chosen, in ascending order
void Program::route(const Op& op, const Run& run) {
  const int experts = slots_[size_t(op.in)].width;
  for (int t = run.from(); t < run.to(); t++) {
    const float* scores = numbers(op.in, t);
    float* out = numbers(op.out, t);
    if (op.routing == Routing::sigmoid) {
      for (int e = 0; e < experts; e++) out[e] = 0.0f - scores[e];
      run.k.exp(out, out, size_t(experts));
      for (int e = 0; e < experts; e++) out[e] = 1.0f / (1.0f + out[e]);
      continue;
    }
    float high = scores[0];
    for (int e = 1; e < experts; e++)
      if (scores[e] > high || scores[e] != scores[e]) high = scores[e];  // NaN stays
    bool chosen[kMostExperts] = {};
    for (int i = 0; i < op.top; i++) {
      int best = -1;
      for (int e = 0; e < experts; e++)
        if (!chosen[e] && (best < 0 || scores[e] > scores[best])) best = e;
      chosen[best] = true;
    }
    for (int e = 0; e < experts; e++) out[e] = scores[e] - high;
    run.k.exp(out, out, size_t(experts));
    float total = 0;
    for (int e = 0; e < experts; e++)
      if (chosen[e] || op.routing == Routing::softmax) total = total + out[e];
    for (int e = 0; e < experts; e++) out[e] = chosen[e] ? out[e] / total : -1.0f;
  }
}

// Asks the system for the pages of the experts that a thread's tokens are expected to take; reading goes on meanwhile.
void Program::prefetch(const Op& op, const Run& run) const {
#ifndef _WIN32
  static const size_t page = size_t(sysconf(_SC_PAGESIZE));
  for (size_t e = 0; e < op.parts.size() / 3; e++) {
    bool taken = false;
    for (int t = run.from(); t < run.to() && !taken; t++) taken = numbers(op.in, t)[e] != -1.0f;
    for (size_t i = 0; i < 3 && taken; i++) {
      const Matrix& w = op.parts[e * 3 + i].w;
      const size_t begin = reinterpret_cast<size_t>(w.data) / page * page;
      const size_t bytes = is_coded(w.scheme)
                               ? size_t(w.panels()) * w.panel_bytes()
                               : size_t(w.rows) * size_t(round_up(w.columns, 16)) * (w.scheme == Scheme::f32 ? 4 : 2);
      // a hint: what it does not bring, page faults will
      (void)madvise(reinterpret_cast<void*>(begin), reinterpret_cast<size_t>(w.data) + bytes - begin, MADV_WILLNEED);
    }
  }
#else
  (void)op, (void)run;
#endif
}

// By one thread: the tokens of each expert, one expert after another.
void Program::group(const Op& op, int tokens) {
  const int experts = slots_[size_t(op.routes)].width;
  groups_.clear();
  pairs_.clear();
  for (int e = 0; e < experts; e++) {
    const int first = int(pairs_.size());
    for (int t = 0; t < tokens; t++)
      if (numbers(op.routes, t)[e] != -1.0f) pairs_.push_back(t);
    const int count = int(pairs_.size()) - first;
    if (count) groups_.push_back({e, first, count});
    taken_[op.taken][size_t(e)] += count;
  }
}

void Program::reserve_experts(const Op& op, int tokens) {
  auto reserve = [&](Storage& s, const Slot& slot) {
    const size_t stride = size_t(slot.stride()), n = size_t(tokens) * size_t(op.top), planes = size_t(slot.planes);
    if (!planes) return s.numbers.reserve(n * stride * 4);
    s.codes.reserve((n * planes + kRowsRead) * stride);
    s.scales.reserve(n * stride / kBlock * 4);
    s.sums.reserve(n * planes * stride / kBlock * 4);
  };
  reserve(gathered_, slots_[size_t(op.in)]);
  reserve(inner_, {op.parts[0].w.rows, op.planes});
  pairs_.reserve(size_t(tokens) * size_t(op.top));
  groups_.reserve(op.parts.size() / 3);
}

// Copies what the experts multiply, so that each one's tokens lie together.
void Program::gather_tokens(const Op& op, const Run& run) {
  const Slot& in = slots_[size_t(op.in)];
  const Storage& from = storage_[size_t(op.in)];
  const size_t stride = size_t(in.stride()), planes = size_t(in.planes), blocks = stride / kBlock;
  const int64_t all = int64_t(pairs_.size());
  for (size_t p = size_t(all * run.id / run.threads); p < size_t(all * (run.id + 1) / run.threads); p++) {
    const size_t t = size_t(pairs_[p]);
    auto copy = [&](const Buffer& source, const Buffer& target, size_t bytes) {
      std::memcpy(target.as<uint8_t>() + p * bytes, source.as<uint8_t>() + t * bytes, bytes);
    };
    if (!planes) {
      copy(from.numbers, gathered_.numbers, stride * 4);
      continue;
    }
    copy(from.codes, gathered_.codes, planes * stride);
    copy(from.scales, gathered_.scales, blocks * 4);
    copy(from.sums, gathered_.sums, planes * blocks * 4);
  }
}

// Panels [first, last) of w times rows of a group: of numbers, or of their codes.
void Program::times(const Run& run, const Matrix& w, const Storage& from, const Slot& slot, const Group& g, int first,
                    int last, Output out) {
  const size_t stride = size_t(slot.stride()), planes = size_t(slot.planes), blocks = stride / kBlock,
               row = size_t(g.first);
  if (!planes) return run.k.dense(w, from.numbers.as<float>() + row * stride, stride, g.count, first, last, out);
  const Activations x{slot.planes, slot.stride(), from.codes.as<int8_t>() + row * planes * stride,
                      from.scales.as<float>() + row * blocks, from.sums.as<int32_t>() + row * planes * blocks};
  multiply(run.k, w, x, g.count, first, last, out, scratch_[size_t(run.id)].as<void>());
}

void Program::experts(const Op& op, const Run& run) {
  gather_tokens(op, run);
  const Slot inner{op.parts[0].w.rows, op.planes};
  const int blocks = inner.stride() / kBlock, panels = op.parts[2].w.panels();
  run.pool.barrier([&] { run.shares.split(int(groups_.size()) * blocks, 1); });
  float* room = reinterpret_cast<float*>(scratch_[size_t(run.id)].as<uint8_t>() + scratch_bytes_);
  for (int unit, end; run.shares.take(run.id, unit, end);)
    make_block(op, run, groups_[size_t(unit / blocks)], inner, unit % blocks, room);
  const int piece = std::min(kMostPanels, std::max(1, panels / (run.threads * 8)));
  run.pool.barrier([&] { run.shares.split(panels, piece > 1 ? piece / 2 * 2 : 1); });
  for (int first, last; run.shares.take(run.id, first, last);)
    for (const Group& g : groups_) add_panels(op, run, g, inner, first, last, room);
}

// 128 numbers of what an expert's gate and up make, for its tokens, as numbers or codes.
void Program::make_block(const Op& op, const Run& run, const Group& g, const Slot& inner, int block, float* both) {
  const Part* of_expert = &op.parts[size_t(g.expert) * 3];
  const int first = block * kBlockPanels, last = std::min(first + kBlockPanels, of_expert->w.panels());
  if (inner.width < (block + 1) * kBlock) std::memset(both, 0, size_t(g.count) * 2 * kBlock * 4);
  for (int half = 0; half < 2; half++)
    times(run, of_expert[half].w, gathered_, slots_[size_t(op.in)], g, first, last,
          {both + half * kBlock, 2 * kBlock, first * kPanel, nullptr, false});
  for (int i = 0; i < g.count; i++) {
    float* x = both + size_t(i) * 2 * kBlock;
    run.k.gate(op.gate, x, x + kBlock, kBlock, x);
    if (inner.planes)
      quantize(run.k, x, block, inner, inner_, g.first + i);
    else
      std::memcpy(inner_.numbers.as<float>() + size_t(g.first + i) * size_t(inner.stride()) + block * kBlock, x,
                  kBlock * 4);
  }
}

// Adds some rows of an expert's down, times its weight, to its tokens.
void Program::add_panels(const Op& op, const Run& run, const Group& g, const Slot& inner, int first, int last,
                         float* made) {
  const Matrix& w = op.parts[size_t(g.expert) * 3 + 2].w;
  const int from = first * kPanel, rows = std::min(last * kPanel, w.rows) - from;
  const size_t width = size_t(last - first) * kPanel;
  times(run, w, inner_, inner, g, first, last, {made, width, from, nullptr, false});
  for (int i = 0; i < g.count; i++) {
    const int t = pairs_[size_t(g.first + i)];
    const float weight = numbers(op.routes, t)[g.expert];
    const float* y = made + size_t(i) * width;
    float* h = numbers(op.out, t) + from;
    for (int r = 0; r < rows; r++) h[r] = h[r] + weight * y[r];
  }
}

}  // namespace chalot
