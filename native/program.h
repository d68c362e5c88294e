// A model as a flat list of operations over buffer slots, and the one call that runs it on a ragged batch.
// Checked once when built and once a batch; the loops trust what was checked.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"
#include "shares.h"
#include "threads.h"

namespace chalot {

enum class OpKind : int {
  embed,
  norm,
  quantize,
  linear,
  rope_store,
  attend,
  gate,
  gather,
  restore,
  route,
  experts,
  prefetch
};
// weights: of all scores, of the chosen, 1 for each of the chosen, of each by itself
enum class Routing : int { softmax, chosen, ones, sigmoid };
constexpr int kMostExperts = 1024;

struct Part {  // one matrix of a fused product
  Matrix w;
  const float* bias;
  int column;  // of the output slot
};

struct Op {
  OpKind kind;
  int in = -1, out = -1;  // slots; a linear op with out = -1 writes the batch's logits
  std::vector<Part> parts;
  // norm: (width padded to 16); rope_store: none, q's and k's norm of each head, (2, head stride), or of all heads
  // together, (queries padded to 16), (keys padded to 16)
  const float* weight = nullptr;
  size_t weight_size = 0;
  // norm: (width padded to 16), or none; with it the mean is taken out first
  const float* bias = nullptr;
  size_t bias_size = 0;
  float number = 0;  // embed: factor; norm, rope_store: epsilon; attend: the scores' scale
  int layer = 0;
  bool add = false;  // linear, norm: to what the target holds
  Gate gate = Gate::silu;
  int window = 0;  // attend: positions that a query sees, its own included; 0: all
  int sinks = 0;   // rope_store, attend: first positions that a query sees beside its window
  float cap = 0;   // attend: scores become cap * tanh(score / cap); linear: so do logits; 0: they stay
  // linear: gate and up, which run as one with the gate and the quantize behind them; slots between are not written
  bool fused = false;
  Routing routing = Routing::softmax;  // route
  int top = 0;                         // route, experts: experts that a token takes
  int routes = -1;                     // experts: the slot with their weights, -1 where they are not taken
  int planes = 0;                      // experts: of what down is multiplied with; 0: numbers
  int rope = 0;                        // rope_store: which of the program's sets of frequencies
  size_t taken = 0;                    // experts: where its counts are; set by Program
};

struct Slot {
  int width;   // numbers a token
  int planes;  // 0: float32; 1, 2: codes
  int stride() const { return round_up(width, kBlock); }
};

struct CacheShape {
  CacheType type;
  int layers, kv_heads, head_dim;
  int stride() const { return round_up(head_dim, 16); }
  size_t number_bytes() const { return type == CacheType::f32 ? 4 : type == CacheType::f16 ? 2 : 1; }
  size_t scale_bytes() const { return type == CacheType::int8 ? kPage * 4 : 0; }
  size_t head_bytes() const { return size_t(kPage) * stride() * number_bytes() + scale_bytes(); }
  // A page: for each layer the keys, then the values, of each key/value head; scales behind the codes of each.
  size_t page_bytes() const { return size_t(layers) * 2 * kv_heads * head_bytes(); }
  // The largest power of two that divides the head size: what keys and queries are rotated by, where they are coded.
  int rotation() const { return type == CacheType::int8 ? head_dim & -head_dim : 1; }
  Page page(uint8_t* arena, int page, int layer, int head) const {
    uint8_t* keys = arena + size_t(page) * page_bytes() + (size_t(layer) * 2 * kv_heads + head) * head_bytes();
    uint8_t* values = keys + size_t(kv_heads) * head_bytes();
    const size_t codes = head_bytes() - scale_bytes();
    return {type,    keys, values, reinterpret_cast<float*>(keys + codes), reinterpret_cast<float*>(values + codes),
            stride()};
  }
};

struct Batch {
  int tokens, sequences, pages_a_sequence, wanted;
  const int32_t *ids, *positions, *sequence;  // (tokens)
  const int32_t* pages;                       // (sequences, pages_a_sequence): page numbers, -1 where none
  const int32_t* rows;                        // (wanted): tokens whose logits are wanted
  uint8_t* arena;                             // cache pages
  size_t arena_pages;
  float* logits;    // (wanted, vocabulary); null where only the best are wanted
  int count;        // of the best
  Candidate* best;  // (wanted, count); an id of -1: logits were not finite
};

class Buffer {  // 64-byte aligned, zeroed, grows only
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept : data_(other.data_), size_(other.size_) { other.data_ = nullptr, other.size_ = 0; }
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  void reserve(size_t bytes);

 private:
  void release();
  void* data_ = nullptr;
  size_t size_ = 0;
};

class Program {
 public:
  // Throws std::invalid_argument where an operation does not fit its slots or matrices.
  Program(std::vector<Slot> slots, std::vector<Op> ops, CacheShape cache, int heads,
          std::vector<std::vector<float>> inverse_frequency, float rope_factor);
  // Throws std::out_of_range where the batch does not fit the program or the cache.
  void run(const Kernels& kernels, Pool& pool, const Batch& batch);
  // Copies (tokens, width) numbers that the last batch left in a slot.
  void copy_slot(int slot, int tokens, float* out) const;
  int width(int slot) const { return slot < 0 || size_t(slot) >= slots_.size() ? -1 : slots_[size_t(slot)].width; }
  int vocabulary() const { return vocabulary_; }
  const CacheShape& cache() const { return cache_; }
  // For each operation that runs experts, in order: tokens that each one had, since the program was made.
  const std::vector<std::vector<int64_t>>& taken() const { return taken_; }

 private:
  struct Storage {
    Buffer numbers, codes, scales, sums;
  };
  // Tokens of one sequence, one after another, that attend together.
  struct Block {
    int first, tokens;
    const int32_t* pages;
    int page;  // the first that an operation looks at, sinks aside
  };
  // What one run hands to its operations.
  struct Run {
    const Kernels& k;
    Pool& pool;
    const Batch& batch;
    Shares& shares;
    int count;  // tokens, or wanted ones after gather
    int id, threads;
    int from() const { return int(int64_t(count) * id / threads); }
    int to() const { return int(int64_t(count) * (id + 1) / threads); }
  };
  struct Group {  // the pairs of an expert and its tokens, one after another
    int expert, first, count;
  };
  struct Visible {  // positions [from, to) of a page
    int from, to;
  };

  void check();
  void check(const Batch& batch) const;
  void check_fused(size_t op) const;
  void reserve(const Batch& batch, int threads);
  void cut_blocks(const Batch& batch, int threads);
  void split(Shares& shares, const Op& op, int threads, int tokens);
  void execute(Run run);
  void apply(const Op& op, const Run& run);
  void angles(const Run& run);
  static void quantize(const Kernels& k, const float* x, int block, const Slot& slot, Storage& to, int token);
  void linear(const Op& op, const Run& run);
  void gated(const Op& op, const Run& run);
  void route(const Op& op, const Run& run);
  void group(const Op& op, int tokens);
  void reserve_experts(const Op& op, int tokens);
  void gather_tokens(const Op& op, const Run& run);
  void times(const Run& run, const Matrix& w, const Storage& from, const Slot& slot, const Group& g, int first,
             int last, Output out);
  void experts(const Op& op, const Run& run);
  void make_block(const Op& op, const Run& run, const Group& g, const Slot& inner, int block, float* both);
  void add_panels(const Op& op, const Run& run, const Group& g, const Slot& inner, int first, int last, float* made);
  void check_experts(size_t op) const;
  void prefetch(const Op& op, const Run& run) const;
  void norm(const Op& op, const Run& run);
  void norm_all_heads(const Op& op, const Run& run);
  bool of_all_heads(const Op& op) const { return op.weight && op.weight_size != size_t(2 * cache_.stride()); }
  void rope_store(const Op& op, const Run& run);
  void attend(const Op& op, const Run& run);
  struct Rows;
  Rows read_queries(const Op& op, const Run& run, const Block& block, int head, bool of_sinks, void* scratch) const;
  bool look(const Op& op, const Run& run, const Block& block, int page, Rows& rows) const;
  void put_rows(const Op& op, const Block& block, int head, int row, const float* gathered, float denominator) const;
  size_t attention_scratch_bytes() const;
  size_t partial_floats() const;
  Gathered partial(int unit) const;
  void merge_pages(const Op& op, const Run& run);
  void choose(const Run& run);
  void collect(const Batch& batch, int threads);
  Visible visible(const Op& op, int position, int page) const;
  int first_page(int position) const;
  float* numbers(int slot, int token) const {
    return storage_[size_t(slot)].numbers.as<float>() + size_t(token) * slots_[size_t(slot)].stride();
  }

  std::vector<Slot> slots_;
  std::vector<Op> ops_;
  std::vector<bool> written_;  // slots; those between fused operations only are not
  CacheShape cache_;
  int heads_, vocabulary_ = 0, input_vocabulary_ = 0;
  std::vector<std::vector<float>> inverse_frequency_;  // sets of one size, head_dim / 2 or less: those pairs turn
  float rope_factor_;                                  // of sines and cosines
  std::vector<Storage> storage_;
  // What operations look at: the window of those with sinks, the first sinks_ positions, and none before the last
  // reach_ ones else (0: all).
  int stream_ = 0, sinks_ = 0, reach_ = 0;
  Buffer cosine_, sine_, sink_cosine_, sink_sine_, logits_, partial_, best_;
  Storage gathered_, inner_;   // what experts multiply, their tokens together; what gate and up make of it
  std::vector<Group> groups_;  // of experts that some token takes
  std::vector<int> pairs_;     // tokens, those of one expert together
  std::vector<std::vector<int64_t>> taken_;
  std::vector<Block> blocks_;
  std::vector<int> held_;  // by thread and wanted row
  int most_pages_ = 0;     // that a block looks at
  int lead_ = 0;           // looks at sinks before those at pages: 1 where a query of the batch has left them behind
  int most_rows_ = 0;      // of a block, with the heads that share a key/value head
  bool by_page_ = false;   // attention's work is cut at pages, which are merged afterwards
  std::vector<Buffer> scratch_;
  size_t scratch_bytes_ = 0;
  int room_ = 0;
};

}  // namespace chalot
