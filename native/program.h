// A model as a flat list of operations over buffer slots, and the one call that runs it on a ragged batch.
// Checked once when built and once a batch; the loops trust what was checked.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace chalot {

enum class OpKind : int { embed, norm, quantize, linear, rope_store, attend, gate, gather, restore };

struct Part {  // one matrix of a fused product
  Matrix w;
  const float* bias;
  int column;  // of the output slot
};

struct Op {
  OpKind kind;
  int in = -1, out = -1;  // slots; a linear op with out = -1 writes the batch's logits
  std::vector<Part> parts;
  const float* weight = nullptr;
  float number = 0;  // norm: epsilon; attend: the scores' scale
  int layer = 0;
  bool add = false;
  Gate gate = Gate::silu;
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
  size_t head_bytes() const { return size_t(kPage) * stride() * (type == CacheType::f32 ? 4 : 2); }
  // A page: for each layer the keys, then the values, of each key/value head.
  size_t page_bytes() const { return size_t(layers) * 2 * kv_heads * head_bytes(); }
  size_t offset(int layer, int head, bool values) const {
    return ((size_t(layer) * 2 + values) * kv_heads + head) * head_bytes();
  }
};

struct Batch {
  int tokens, sequences, pages_a_sequence, wanted;
  const int32_t *ids, *positions, *sequence;  // (tokens)
  const int32_t* pages;                       // (sequences, pages_a_sequence): page numbers, -1 where none
  const int32_t* rows;                        // (wanted): tokens whose logits are wanted
  uint8_t* arena;                             // cache pages
  size_t arena_pages;
  float* logits;  // (wanted, vocabulary)
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
  void* data_ = nullptr;
  size_t size_ = 0;
};

class Program {
 public:
  // Throws std::invalid_argument where an operation does not fit its slots or matrices.
  Program(std::vector<Slot> slots, std::vector<Op> ops, CacheShape cache, int heads,
          std::vector<float> inverse_frequency);
  // Throws std::out_of_range where the batch does not fit the program or the cache.
  void run(const Kernels& kernels, Pool& pool, const Batch& batch);
  // Copies (tokens, width) numbers that the last batch left in a slot.
  void copy_slot(int slot, int tokens, float* out) const;
  int width(int slot) const { return slot < 0 || size_t(slot) >= slots_.size() ? -1 : slots_[size_t(slot)].width; }
  int vocabulary() const { return vocabulary_; }
  const CacheShape& cache() const { return cache_; }

 private:
  struct Storage {
    Buffer numbers, codes, scales, sums;
  };
  void check() const;
  void check(const Batch& batch) const;
  void reserve(int tokens, int threads);
  void angles(const Batch& batch);
  void execute(const Kernels& k, Pool& pool, const Batch& batch, int id);
  void apply(const Kernels& k, const Op& op, const Batch& batch, int count, int id, int threads);
  void linear(const Kernels& k, const Op& op, const Batch& batch, int count, int id, int threads);
  void rope_store(const Kernels& k, const Op& op, const Batch& batch, int first, int last);
  void attend(const Kernels& k, const Op& op, const Batch& batch, int id, int threads);
  float* numbers(int slot, int token) const {
    return storage_[size_t(slot)].numbers.as<float>() + size_t(token) * slots_[size_t(slot)].stride();
  }

  std::vector<Slot> slots_;
  std::vector<Op> ops_;
  CacheShape cache_;
  int heads_, vocabulary_ = 0, input_vocabulary_ = 0;
  std::vector<float> inverse_frequency_;  // (head_dim / 2)
  std::vector<Storage> storage_;
  Buffer cosine_, sine_;
  std::vector<Buffer> scratch_;
  size_t scratch_bytes_ = 0;
  int room_ = 0;
};

}  // namespace chalot
