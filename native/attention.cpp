// The program's operations on the cache: rope and storing, attention over pages, merging what pages gave.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "program.h"

namespace chalot {
namespace {

constexpr int kQueryRows = 48;  // queries that share one look at a page, unless one token has more

// Arrays out of a thread's scratch, each at a multiple of 64 bytes.
struct Room {
  uint8_t* at;
  template <class T>
  T* take(size_t n) {
    T* out = reinterpret_cast<T*>(at);
    at += (n * sizeof(T) + 63) / 64 * 64;
    return out;
  }
};

Gathered take_gathered(Room& room, size_t rows, size_t stride) {
  return {room.take<float>(rows * stride), room.take<float>(rows), room.take<float>(rows)};
}

}  // namespace

size_t Program::attention_scratch_bytes() const {
  const size_t rows = size_t(std::max(kQueryRows, heads_ / cache_.kv_heads)), stride = size_t(cache_.stride());
  return rows * (stride * 14 + 64) + attend_scratch_bytes(int(rows)) + 64 * 16;
}

void Program::cut_blocks(const Batch& batch, int threads) {
  const int share = heads_ / cache_.kv_heads, most = std::max(1, kQueryRows / share);
  blocks_.clear();
  most_pages_ = 1, most_rows_ = 0, lead_ = 0;
  for (int t = 0; t < batch.tokens; t++) {
    if (sinks_ && batch.positions[t] >= sinks_ + stream_) lead_ = 1;
    const bool goes_on = t && batch.sequence[t] == batch.sequence[t - 1] &&
                         batch.positions[t] == batch.positions[t - 1] + 1 && blocks_.back().tokens < most;
    if (goes_on)
      blocks_.back().tokens++;
    else
      blocks_.push_back({t, 1, batch.pages + size_t(batch.sequence[t]) * size_t(batch.pages_a_sequence),
                         first_page(batch.positions[t])});
    most_rows_ = std::max(most_rows_, blocks_.back().tokens * share);
    most_pages_ = std::max(most_pages_, batch.positions[t] / kPage + 1 - blocks_.back().page);
  }
  most_pages_ += lead_;
  by_page_ = most_pages_ > 1 && int(blocks_.size()) * cache_.kv_heads < 4 * threads;
  if (by_page_) partial_.reserve(blocks_.size() * size_t(cache_.kv_heads) * size_t(most_pages_) * partial_floats() * 4);
}

// A page's gifts to the rows of a block: outputs, largest scores, denominators.
size_t Program::partial_floats() const { return (size_t(most_rows_) * size_t(cache_.stride() + 2) + 15) / 16 * 16; }

Gathered Program::partial(int unit) const {
  const size_t rows = size_t(most_rows_);
  float* at = partial_.as<float>() + size_t(unit) * partial_floats();
  return {at, at + rows * size_t(cache_.stride()), at + rows * size_t(cache_.stride() + 1)};
}

// A page that a query at `position` sees something of is this one, page 0 for its sinks, or a later one.
int Program::first_page(int position) const {
  const bool all = !reach_ || (sinks_ && position < sinks_ + stream_);
  return all ? 0 : std::max(0, position + 1 - reach_) / kPage;
}

// With sinks: all, until the window has left them behind; then the window, and the sinks as a page of their own, -1.
Program::Visible Program::visible(const Op& op, int position, int page) const {
  const bool all = !op.window || (op.sinks && position < op.sinks + op.window);
  if (page < 0) return {0, all ? 0 : op.sinks};
  const int first = page * kPage, end = std::min(position + 1 - first, kPage);
  return {all ? 0 : std::max(0, position + 1 - op.window - first), end};
}

// Norms of queries and of keys that take all heads of a token together.
void Program::norm_all_heads(const Op& op, const Run& run) {
  const int queries = heads_ * cache_.head_dim, keys = cache_.kv_heads * cache_.head_dim;
  float* padded = scratch_[size_t(run.id)].as<float>();
  auto norm = [&](float* x, const float* weight, int n) {
    std::memset(padded, 0, size_t(round_up(n, 16)) * 4);
    std::memcpy(padded, x, size_t(n) * 4);
    run.k.rms_norm(padded, weight, n, op.number, padded, false);
    std::memcpy(x, padded, size_t(n) * 4);
  };
  for (int t = run.from(); t < run.to(); t++) {
    norm(numbers(op.in, t), op.weight, queries);
    norm(numbers(op.in, t) + queries, op.weight + round_up(queries, 16), keys);
  }
  run.pool.barrier();
}

void Program::rope_store(const Op& op, const Run& run) {
  if (of_all_heads(op)) norm_all_heads(op, run);
  const bool by_head = op.weight && !of_all_heads(op);
  const Batch& batch = run.batch;
  const int dim = cache_.head_dim, share = heads_ / cache_.kv_heads, units = run.count * cache_.kv_heads;
  const size_t sets = inverse_frequency_.size(), pairs = inverse_frequency_[0].size(), set = size_t(op.rope) * pairs;
  alignas(64) float turned[kMaxHead] = {}, value[kMaxHead] = {};
  for (int unit = int(int64_t(units) * run.id / run.threads); unit < int(int64_t(units) * (run.id + 1) / run.threads);
       unit++) {
    const int t = unit / cache_.kv_heads, head = unit % cache_.kv_heads;
    float* all = numbers(op.in, t);
    const size_t at = size_t(t) * sets * pairs + set;
    auto turn = [&](float* x, const float* norm, bool for_sinks = false) {
      std::memcpy(turned, x, size_t(dim) * 4);
      if (by_head) run.k.rms_norm(turned, norm, dim, op.number, turned, false);
      run.k.rotate(turned, for_sinks ? sink_cosine_.as<float>() + set : cosine_.as<float>() + at,
                   for_sinks ? sink_sine_.as<float>() + set : sine_.as<float>() + at, int(pairs));
      if (cache_.rotation() > 1) run.k.spread(turned, cache_.stride(), cache_.rotation());
    };
    const bool past_sinks = op.sinks && batch.positions[t] >= op.sinks + op.window;
    for (int h = head * share; h < (head + 1) * share; h++) {
      if (past_sinks) {
        turn(all + h * dim, op.weight, true);
        std::memcpy(all + (heads_ + 2 * cache_.kv_heads + h) * dim, turned, size_t(dim) * 4);
      }
      turn(all + h * dim, op.weight);
      std::memcpy(all + h * dim, turned, size_t(dim) * 4);
    }
    turn(all + (heads_ + head) * dim, by_head ? op.weight + cache_.stride() : nullptr);
    std::memcpy(value, all + (heads_ + cache_.kv_heads + head) * dim, size_t(dim) * 4);
    const int number =
        batch.pages[size_t(batch.sequence[t]) * size_t(batch.pages_a_sequence) + size_t(batch.positions[t] / kPage)];
    run.k.store(cache_.page(batch.arena, number, op.layer, head), batch.positions[t] % kPage, turned, value);
  }
}

// The queries of a block's tokens for the heads that share a key/value head; token by token, head by head.
struct Program::Rows {
  Queries q;
  int *from, *to;
};

Program::Rows Program::read_queries(const Op& op, const Run& run, const Block& block, int head, bool of_sinks,
                                    void* scratch) const {
  const int dim = cache_.head_dim, stride = cache_.stride(), share = heads_ / cache_.kv_heads;
  const size_t rows = size_t(block.tokens) * size_t(share);
  Room room{static_cast<uint8_t*>(scratch)};
  float* values = room.take<float>(rows * size_t(stride));
  int8_t* codes = room.take<int8_t>(rows * 2 * size_t(stride));
  int32_t* sums = room.take<int32_t>(rows * 2);
  float* scale = room.take<float>(rows);
  int *from = room.take<int>(rows), *to = room.take<int>(rows);
  const float factor = op.number * (1.0f / float(cache_.rotation()));
  for (size_t r = 0; r < rows; r++) {
    const int column = (of_sinks ? heads_ + 2 * cache_.kv_heads : 0) + head * share + int(r) % share;
    const float* q = numbers(op.in, block.first + int(r) / share) + column * dim;
    float* row = values + r * size_t(stride);
    std::memset(row + dim, 0, size_t(stride - dim) * 4);
    if (cache_.type == CacheType::int8) {
      std::memcpy(row, q, size_t(dim) * 4);
      run.k.quantize(row, stride, 2, codes + r * 2 * size_t(stride), size_t(stride), scale + r, sums + r * 2, 1);
      scale[r] *= factor;
    } else {
      for (int d = 0; d < dim; d++) row[d] = q[d] * factor;
    }
  }
  return {{int(rows), values, codes, sums, scale, from, to, op.cap}, from, to};
}

// What rows of a block see of one page; false if none sees anything.
bool Program::look(const Op& op, const Run& run, const Block& block, int page, Rows& rows) const {
  const int share = heads_ / cache_.kv_heads;
  bool some = false;
  for (int r = 0; r < rows.q.rows; r++) {
    Visible v = visible(op, run.batch.positions[block.first + r / share], page);
    rows.from[r] = v.from, rows.to[r] = v.to;
    some |= v.from < v.to;
  }
  return some;
}

void Program::put_rows(const Op& op, const Block& block, int head, int row, const float* gathered,
                       float denominator) const {
  const int dim = cache_.head_dim, share = heads_ / cache_.kv_heads;
  float* out = numbers(op.out, block.first + row / share) + (head * share + row % share) * dim;
  for (int d = 0; d < dim; d++) out[d] = gathered[d] / denominator;
}

void Program::attend(const Op& op, const Run& run) {
  const int share = heads_ / cache_.kv_heads;
  const size_t stride = size_t(cache_.stride()), most = size_t(std::max(kQueryRows, share));
  Room room{scratch_[size_t(run.id)].as<uint8_t>()};
  void* queries = room.take<uint8_t>(most * (stride * 6 + 20) + 64 * 6);
  Gathered page = take_gathered(room, most, stride), sum = take_gathered(room, most, stride);
  void* scratch = room.take<uint8_t>(0);
  const int pages = by_page_ ? most_pages_ : 1;
  for (int unit, end; run.shares.take(run.id, unit, end);) {
    const Block& block = blocks_[size_t(unit / pages / cache_.kv_heads)];
    const int head = unit / pages % cache_.kv_heads, last = run.batch.positions[block.first + block.tokens - 1] / kPage;
    const int looks = lead_ + last + 1 - block.page, only = unit % pages;
    auto page_of = [&](int at) { return at < lead_ ? -1 : block.page + at - lead_; };
    auto cached = [&](int p) { return cache_.page(run.batch.arena, block.pages[std::max(p, 0)], op.layer, head); };
    if (by_page_) {
      if (only >= looks) continue;
      Rows rows = read_queries(op, run, block, head, only < lead_ && op.sinks, queries);
      if (look(op, run, block, page_of(only), rows))
        run.k.attend(cached(page_of(only)), rows.q, partial(unit), scratch);
      continue;
    }
    Rows rows;
    const int count = block.tokens * share;
    std::memset(sum.out, 0, size_t(count) * stride * 4);
    std::fill_n(sum.largest, count, -INFINITY);
    std::fill_n(sum.denominator, count, 0.0f);
    for (int at = 0; at < looks; at++) {
      if (at == 0 || at == lead_) rows = read_queries(op, run, block, head, at < lead_ && op.sinks, queries);
      if (!look(op, run, block, page_of(at), rows)) continue;
      run.k.attend(cached(page_of(at)), rows.q, page, scratch);
      for (int r = 0; r < rows.q.rows; r++)
        if (rows.from[r] < rows.to[r])
          run.k.merge(sum.out + size_t(r) * stride, sum.largest[r], sum.denominator[r], page.out + size_t(r) * stride,
                      page.largest[r], page.denominator[r], int(stride));
    }
    for (int r = 0; r < count; r++) put_rows(op, block, head, r, sum.out + size_t(r) * stride, sum.denominator[r]);
  }
  if (by_page_) {
    run.pool.barrier();
    merge_pages(op, run);
  }
}

void Program::merge_pages(const Op& op, const Run& run) {
  const int stride = cache_.stride(), share = heads_ / cache_.kv_heads;
  alignas(64) float out[kMaxHead];
  int at = 0;  // rows, dealt out in turn
  for (size_t b = 0; b < blocks_.size(); b++)
    for (int head = 0; head < cache_.kv_heads; head++)
      for (int r = 0; r < blocks_[b].tokens * share; r++, at++) {
        if (at % run.threads != run.id) continue;
        const int position = run.batch.positions[blocks_[b].first + r / share];
        float largest = -INFINITY, denominator = 0;
        std::memset(out, 0, size_t(stride) * 4);
        for (int at = 0; at <= lead_ + position / kPage - blocks_[b].page; at++) {
          const Visible v = visible(op, position, at < lead_ ? -1 : blocks_[b].page + at - lead_);
          if (v.from >= v.to) continue;
          Gathered page = partial((int(b) * cache_.kv_heads + head) * most_pages_ + at);
          run.k.merge(out, largest, denominator, page.out + size_t(r) * size_t(stride), page.largest[r],
                      page.denominator[r], stride);
        }
        put_rows(op, blocks_[b], head, r, out, denominator);
      }
}

}  // namespace chalot
