// What a program and a batch must keep, checked before anything runs: the loops trust it.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "program.h"

namespace chalot {
namespace {

constexpr int kMostHeads = 1 << 18;  // 3 * heads * head size stays an int

[[noreturn]] void invalid(size_t op, const char* what) {
  throw std::invalid_argument("operation " + std::to_string(op) + ": " + what);
}

}  // namespace

// Gate and up, what they make, and its codes, one after another; a thread then takes 128 columns of both as far as the
// codes before they leave its cache.
void Program::check_fused(size_t i) const {
  if (i + 2 >= ops_.size()) invalid(i, "a fused product needs gate and quantize behind it");
  const Op &linear = ops_[i], &gate = ops_[i + 1], &quantize = ops_[i + 2];
  if (linear.kind != OpKind::linear || gate.kind != OpKind::gate || quantize.kind != OpKind::quantize ||
      linear.out != gate.in || gate.out != quantize.in || linear.parts.size() != 2 || linear.add)
    invalid(i, "a fused product needs gate and quantize behind it");
  if (linear.in == quantize.out) invalid(i, "a fused product would write over what it reads");
  const int width = slots_[size_t(gate.out)].width;
  for (int half = 0; half < 2; half++) {
    const Part& part = linear.parts[size_t(half)];
    if (part.column != half * width || part.w.rows != width || !is_coded(part.w.scheme))
      invalid(i, "a fused product takes two coded matrices of one height");
  }
}

// Gate, up and down of each expert, all of one width; the weights come from a route that chose as many.
void Program::check_experts(size_t i) const {
  const Op& op = ops_[i];
  const Slot &in = slots_[size_t(op.in)], &out = slots_[size_t(op.out)], &routes = slots_[size_t(op.routes)];
  if (op.planes < 0 || op.planes > 2 || op.top < 1 || !op.add || out.planes || routes.planes || op.out == op.in)
    invalid(i, "experts add numbers to a slot of their own, of 1 or 2 planes, or none");
  if (op.parts.size() != size_t(routes.width) * 3) invalid(i, "experts need gate, up and down for each");
  const Op* from = nullptr;
  for (size_t before = 0; before < i; before++)
    if (ops_[before].out == op.routes || (ops_[before].kind == OpKind::rope_store && ops_[before].in == op.routes))
      from = &ops_[before];
  if (!from || from->kind != OpKind::route || from->top != op.top)
    invalid(i, "experts need a route that chose as many");
  const int width = op.parts[0].w.rows;
  for (size_t p = 0; p < op.parts.size(); p++) {
    const Part& part = op.parts[p];
    const bool down = p % 3 == 2;
    const int rows = down ? out.width : width, columns = down ? width : in.width;
    if (part.w.rows != rows || part.w.columns != columns) invalid(i, "an expert has another shape than the others");
    if (is_coded(part.w.scheme) != ((down ? op.planes : in.planes) > 0)) invalid(i, "expert and input differ in kind");
    if (part.bias || part.column) invalid(i, "experts have no biases");
  }
}

void Program::check() {
  const bool heads_fit = cache_.kv_heads > 0 && heads_ > 0 && heads_ % cache_.kv_heads == 0 && heads_ <= kMostHeads;
  const bool size_fits = cache_.head_dim > 0 && cache_.head_dim <= kMaxHead && cache_.head_dim % 2 == 0;
  if (!heads_fit || !size_fits || cache_.layers <= 0)
    throw std::invalid_argument("cache: heads must be a multiple of key/value heads, the head size even and <= 1024");
  const size_t pairs = inverse_frequency_.empty() ? 0 : inverse_frequency_[0].size();
  for (const std::vector<float>& set : inverse_frequency_)
    if (set.size() != pairs) throw std::invalid_argument("rope: expected as many inverse frequencies in each set");
  if (!pairs || pairs > size_t(cache_.head_dim) / 2 || !std::isfinite(rope_factor_))
    throw std::invalid_argument("rope: expected 1 to head_dim / 2 inverse frequencies and a finite factor");
  for (const Slot& s : slots_)
    if (s.width <= 0 || s.width > 1 << 24 || s.planes < 0 || s.planes > 2) throw std::invalid_argument("slot: size");
  bool gathered = false;
  std::vector<int> reaches;
  std::vector<bool> filled(slots_.size());
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
    const bool all_tokens = op.kind == OpKind::embed || op.kind == OpKind::rope_store || op.kind == OpKind::attend ||
                            op.kind == OpKind::gather || op.kind == OpKind::experts || op.kind == OpKind::prefetch;
    if (gathered && all_tokens) invalid(i, "after gather only the wanted tokens are there");
    if (op.kind != OpKind::embed) {
      slot(op.in);
      if (!filled[size_t(op.in)]) invalid(i, "nothing has written what it reads");
    }
    if (op.out >= 0) {
      slot(op.out);
      if (op.add && !filled[size_t(op.out)]) invalid(i, "nothing has written what it adds to");
    }
    if (!(op.cap >= 0)) invalid(i, "window and cap must not be negative");
    switch (op.kind) {
      case OpKind::embed:
        if (op.parts.size() != 1) invalid(i, "embed takes one matrix");
        if (!std::isfinite(op.number)) invalid(i, "embed's factor must be finite");
        numbers(op.out, op.parts[0].w.columns);
        if (input_vocabulary_ && input_vocabulary_ != op.parts[0].w.rows) invalid(i, "embeddings differ in vocabulary");
        input_vocabulary_ = op.parts[0].w.rows;
        break;
      case OpKind::norm:
        numbers(op.in, slot(op.out).width);
        numbers(op.out, slot(op.in).width);
        for (size_t size : {op.weight_size, op.bias ? op.bias_size : op.weight_size})
          if (size < size_t(round_up(slot(op.in).width, 16))) invalid(i, "norm needs a weight, padded to 16");
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
          if (vocabulary_ && vocabulary_ != op.parts[0].w.rows) invalid(i, "logits differ in vocabulary");
          vocabulary_ = op.parts[0].w.rows;
        } else if (op.cap != 0) {
          invalid(i, "only logits are capped");
        }
        break;
      case OpKind::rope_store:
      case OpKind::attend:
        if (op.layer < 0 || op.layer >= cache_.layers) invalid(i, "layer is not in the cache");
        if (op.rope < 0 || size_t(op.rope) >= inverse_frequency_.size()) invalid(i, "has no frequencies");
        if (op.window < 0) invalid(i, "window and cap must not be negative");
        if (op.kind == OpKind::rope_store && op.out >= 0 && op.out != op.in)
          invalid(i, "rope_store writes what it reads");
        if (op.sinks < 0 || op.sinks > kPage || (op.sinks && (op.sinks >= op.window || op.window > 1 << 30)))
          invalid(i, "sinks must be fewer than the window, and at most a page");
        if (op.sinks && sinks_ && (op.sinks != sinks_ || op.window != stream_)) invalid(i, "sinks differ");
        if (op.sinks) sinks_ = op.sinks, stream_ = op.window;
        if (op.kind == OpKind::attend) reaches.push_back(op.window);
        numbers(op.in, queries + 2 * keys + (op.sinks ? queries : 0));
        if (op.kind == OpKind::attend) numbers(op.out, queries);
        if (op.kind == OpKind::rope_store && of_all_heads(op) &&
            op.weight_size != size_t(round_up(queries, 16) + round_up(keys, 16)))
          invalid(i, "the weights of norms must be two heads, or all queries and keys, padded to 16");
        break;
      case OpKind::gate:
        numbers(op.in, 2 * slot(op.out).width);
        numbers(op.out, slot(op.out).width);
        break;
      case OpKind::route:
        numbers(op.in, slot(op.out).width);
        numbers(op.out, slot(op.in).width);
        if (slot(op.in).width > kMostExperts || op.top < 1 || op.top > slot(op.in).width)
          invalid(i, "a token takes 1 to all of 1 to 1024 experts");
        if (op.routing == Routing::sigmoid && op.top != slot(op.in).width)
          invalid(i, "where each score is for itself, a token takes all experts");
        break;
      case OpKind::experts:
        slot(op.routes);
        slot(op.out);
        if (!filled[size_t(op.routes)]) invalid(i, "nothing has written what it reads");
        check_experts(i);
        break;
      case OpKind::prefetch:
        numbers(op.in, int(op.parts.size() / 3));
        if (op.parts.size() % 3 || op.out >= 0) invalid(i, "prefetch takes gate, up and down of each expert");
        break;
      case OpKind::gather:
        numbers(op.in, slot(op.out).width);
        numbers(op.out, slot(op.in).width);
        gathered = true;
        break;
    }
    if (op.out >= 0) filled[size_t(op.out)] = true;
    if (i >= 2 && ops_[i - 2].fused)
      for (size_t inside : {i - 2, i - 1})
        if (ops_[inside].out >= 0) filled[size_t(ops_[inside].out)] = false;
  }
  for (size_t i = 0; i < ops_.size(); i++)
    if (ops_[i].fused) check_fused(i);
  const bool all = std::find(reaches.begin(), reaches.end(), 0) != reaches.end();
  if (!all) reach_ = reaches.empty() ? 1 : *std::max_element(reaches.begin(), reaches.end());
  if (!input_vocabulary_) throw std::invalid_argument("program: needs embed");
}

void Program::check(const Batch& b) const {
  for (int t = 0; t < b.tokens; t++) {
    if (b.ids[t] < 0 || b.ids[t] >= input_vocabulary_) throw std::out_of_range("token id is outside the vocabulary");
    if (b.sequence[t] < 0 || b.sequence[t] >= b.sequences) throw std::out_of_range("sequence has no page table");
    if (b.positions[t] < 0 || b.positions[t] / kPage >= b.pages_a_sequence)
      throw std::out_of_range("position is outside the page table");
    const int32_t* pages = b.pages + size_t(b.sequence[t]) * b.pages_a_sequence;
    auto check_page = [&](int page) {
      if (page < 0 || size_t(page) >= b.arena_pages) throw std::out_of_range("page is outside the cache");
    };
    if (sinks_) check_page(pages[0]);
    for (int p = first_page(b.positions[t]); p <= b.positions[t] / kPage; p++) check_page(pages[p]);
  }
  for (int i = 0; i < b.wanted; i++)
    if (b.rows[i] < 0 || b.rows[i] >= b.tokens) throw std::out_of_range("wanted row is outside the batch");
}

}  // namespace chalot
