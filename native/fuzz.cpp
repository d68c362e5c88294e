// Random programs, matrices, batches and byte pairs under sanitizers: each is refused, or runs without a fault.
//
// The input is whole numbers of 16 bits, in the order of replay.cpp's file (written by tests/attacks/programs.py);
// those from kFirstOdd on stand for kOdd. Arrays are not in it: each is made with as many bytes as it must have, plus a
// number of the input, in memory of its own, so that a read past its end is seen. The first number: what is tried.
#include <algorithm>
#include <array>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "byte_pairs.h"
#include "matrix.h"
#include "program.h"

using namespace chalot;

namespace {

constexpr int kFirstOdd = 0x7ff0;
constexpr int kOdd[16] = {INT_MAX,       INT_MIN, INT_MAX - 15, 1 << 24,       (1 << 24) + 1, 1 << 28,
                          (1 << 28) + 1, 1 << 30, 65535,        INT_MAX - 127, 1 << 18,       1 << 20,
                          32768,         -32768,  INT_MIN + 1,  1 << 26};
constexpr float kNumbers[16] = {0,    1e-6f, 1,        0.125f,    -1,  30,     1e30f,   1e-30f,
                                0.5f, 10,    INFINITY, -INFINITY, NAN, 1e-45f, 3.4e38f, 1e4f};
// Beyond these a program is refused or would need more memory than a run of many programs has.
constexpr int kMostSide = 2048, kMostMembers = 64;
constexpr size_t kMostArrays = 8 << 20, kMostWidths = 1 << 16, kMostPage = 4 << 20;
constexpr int kPages = 3, kMostTokens = 40;

struct Outcomes {
  long programs = 0, batches = 0, texts = 0, refused = 0;
  ~Outcomes() {
    std::fprintf(stderr, "ran %ld programs with %ld batches, %ld texts; refused %ld\n", programs, batches, texts,
                 refused);
  }
} outcomes;

alignas(64) constexpr uint8_t kAnywhere[64] = {};

struct TooMuch {};  // neither a fault nor a refusal: more than is tried here

struct Free {
  void operator()(void* p) const { std::free(p); }
};

class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  int whole() {
    if (size_ < 2) return 0;
    int16_t value;
    std::memcpy(&value, data_, 2);
    data_ += 2, size_ -= 2;
    return value >= kFirstOdd ? kOdd[value - kFirstOdd] : value;
  }
  int below(int n) { return int(unsigned(whole()) % unsigned(n)); }
  float number() { return kNumbers[below(16)]; }
  template <class Enum>
  Enum one_of(Enum last) {
    return Enum(below(int(last) + 1));
  }
  size_t count() { return size_t(below(kMostMembers)); }
  bool left() const { return size_ >= 2; }

  // Memory of `bytes` plus a number of the input, of random bits.
  std::pair<uint8_t*, size_t> array(size_t bytes) {
    const int more = whole();
    const size_t size = more < 0 && size_t(-int64_t(more)) > bytes ? 0 : bytes + size_t(int64_t(more));
    if (size > kMostArrays || (arrays_ += size) > kMostArrays) throw TooMuch();
    void* made = nullptr;
    if (posix_memalign(&made, 64, size)) throw TooMuch();
    held_.emplace_back(made);
    uint8_t* bits = static_cast<uint8_t*>(made);
    for (size_t i = 0; i < size; i++)
      bits[i] = uint8_t((state_ = state_ * 6364136223846793005u + 1442695040888963407u) >> 56);
    return {bits, size};
  }
  // As many numbers, finite unless the input asks for any bits; null where it asks for none.
  std::pair<float*, size_t> floats(size_t count) {
    const int kind = below(3);
    if (kind == 2) return {nullptr, 0};
    const auto [bits, size] = array(count * 4);
    float* numbers = reinterpret_cast<float*>(bits);
    for (size_t i = 0; kind == 0 && i < size / 4; i++) numbers[i] = float(bits[4 * i]) / 128;
    return {numbers, size / 4};
  }

 private:
  const uint8_t* data_;
  size_t size_, arrays_ = 0;
  uint64_t state_ = 1;
  std::vector<std::unique_ptr<void, Free>> held_;
};

Matrix read_matrix(Input& f) {
  const int scheme = f.whole(), rows = f.whole(), columns = f.whole(), segment = f.whole(), any = f.below(4);
  Matrix w{};
  size_t bytes = 64;
  if (scheme >= 0 && scheme < kSchemes && std::clamp(rows, 1, kMostSide) == rows &&
      std::clamp(columns, 1, kMostSide) == columns && (segment >= kBlock || scheme < int(Scheme::int8))) {
    w.scheme = Scheme(scheme), w.rows = rows, w.columns = columns;
    w.segment_blocks = std::max(1, segment / kBlock);
    bytes = place(w, kAnywhere);
  }
  const auto [data, size] = f.array(bytes);
  const auto [tables, tables_size] = f.array(4096);
  w = matrix_view(scheme, rows, columns, segment, data, size, reinterpret_cast<int8_t*>(tables), tables_size);
  if (any == 3) return w;
  // finite, as a loaded file's scales are
  auto fill = [](const auto* at, size_t n, auto value) {
    std::fill_n(const_cast<std::remove_const_t<std::remove_pointer_t<decltype(at)>>*>(at), n, value);
  };
  const size_t padded = size_t(w.panels()) * kPanel;
  if (w.scheme == Scheme::f32)
    fill(reinterpret_cast<const float*>(w.data), size / 4, 0.01f);
  else if (!is_coded(w.scheme))
    fill(reinterpret_cast<const uint16_t*>(w.data), size / 2, uint16_t(0x3c00));
  else
    fill(w.row_scale, padded, 0.001f);
  if (is_coded(w.scheme) && w.segment_count()) fill(w.segments, padded * size_t(w.segment_count()), uint16_t(0x3c00));
  if (w.row_offset) fill(w.row_offset, padded, 0.001f);
  return w;
}

Op read_op(Input& f) {
  Op op;
  op.kind = f.one_of(OpKind::prefetch);
  op.in = f.whole();
  op.out = f.whole();
  op.parts.resize(f.count());
  for (Part& part : op.parts) {
    part.w = read_matrix(f);
    const auto [bias, size] = f.floats(size_t(round_up(part.w.rows, kPanel)));
    part.bias = int64_t(size) >= round_up(part.w.rows, kPanel) ? bias : nullptr;  // as bindings.cpp asks
    part.column = f.whole();
  }
  std::tie(op.weight, op.weight_size) = f.floats(size_t(f.below(kMostSide)));
  op.number = f.number();
  op.layer = f.whole();
  op.add = f.whole();
  op.gate = f.one_of(Gate::relu2);
  op.window = f.whole();
  op.cap = f.number();
  op.fused = f.whole();
  op.sinks = f.whole();
  op.routing = f.one_of(Routing::sigmoid);
  op.top = f.whole();
  op.routes = f.whole();
  op.planes = f.whole();
  op.rope = f.whole();
  std::tie(op.bias, op.bias_size) = f.floats(size_t(f.below(kMostSide)));
  return op;
}

Program read_program(Input& f) {
  std::vector<Slot> slots(f.count());
  size_t widths = 0;
  for (Slot& s : slots) {
    s.width = f.whole();
    s.planes = f.whole();
    widths += size_t(std::max(0, std::min(s.width, 1 << 24)));
  }
  std::vector<Op> ops(f.count());
  for (Op& op : ops) op = read_op(f);
  CacheShape cache;
  cache.type = f.one_of(CacheType::int8);
  cache.layers = f.whole();
  cache.kv_heads = f.whole();
  cache.head_dim = f.whole();
  const int heads = f.whole();
  std::vector<std::vector<float>> inverse_frequency(f.count());
  const int pairs = std::clamp(cache.head_dim / 2, 0, kMaxHead);
  for (std::vector<float>& set : inverse_frequency) {
    set.resize(size_t(std::max(0, pairs - f.below(16))));
    for (size_t i = 0; i < set.size(); i++) set[i] = 1.0f / float(i + 1);
  }
  if (f.below(8) == 7 && !inverse_frequency.empty()) inverse_frequency[0].assign(size_t(pairs) / 2, f.number());
  Program program(slots, ops, cache, heads, inverse_frequency, f.number());  // checks
  if (widths > kMostWidths || cache.page_bytes() > kMostPage || size_t(heads) * cache.head_dim > kMostWidths)
    throw TooMuch();
  return program;
}

// A batch that fits, but for what the input changes.
void run_batch(Input& f, Program& program, const Kernels& kernels, Pool& pool) {
  const int tokens = f.below(kMostTokens), sequences = 1 + f.below(2), pages_each = 1 + f.below(kPages);
  const int wanted = f.below(tokens + 1), count = f.below(4), first = f.below(pages_each * kPage);
  const bool wild = f.below(16) == 15;
  std::vector<int32_t> ids(tokens), positions(tokens), sequence(tokens), rows(wanted), pages(sequences * pages_each);
  const int vocabulary = std::max(1, program.vocabulary());
  for (int t = 0; t < tokens; t++) {
    ids[t] = wild ? f.whole() : t % vocabulary;
    positions[t] = wild ? f.whole() : (first + t) % (pages_each * kPage);
    sequence[t] = wild ? f.whole() : t * sequences / std::max(1, tokens);
  }
  for (int i = 0; i < wanted; i++) rows[i] = wild ? f.whole() : tokens - wanted + i;
  for (int i = 0; i < sequences * pages_each; i++) pages[i] = wild ? f.whole() : i;
  const size_t held = size_t(sequences) * pages_each;
  const size_t bytes = held * program.cache().page_bytes();
  void* made = nullptr;
  if (bytes > kMostArrays || posix_memalign(&made, 64, bytes)) throw TooMuch();
  std::unique_ptr<void, Free> keep(made);
  std::memset(made, f.below(2) ? 0x3c : 0, bytes);
  std::vector<float> logits(size_t(wanted) * size_t(program.vocabulary()));
  const int best = std::min(count, program.vocabulary());
  std::vector<Candidate> found(size_t(wanted) * size_t(best));
  program.run(kernels, pool,
              {.tokens = tokens,
               .sequences = sequences,
               .pages_a_sequence = pages_each,
               .wanted = wanted,
               .ids = ids.data(),
               .positions = positions.data(),
               .sequence = sequence.data(),
               .pages = pages.data(),
               .rows = rows.data(),
               .arena = static_cast<uint8_t*>(made),
               .arena_pages = held,
               .logits = best ? nullptr : logits.data(),
               .count = best,
               .best = best ? found.data() : nullptr});
  outcomes.batches++;
}

void try_program(Input& f) {
  static Pool one(1), three(3);
  std::vector<const Kernels*> here;
  for (int i = 0; i < kernel_count(); i++)
    if (kernel_at(i).runs_here()) here.push_back(&kernel_at(i));
  const Kernels& kernels = *here[size_t(f.below(int(here.size())))];
  Pool& pool = f.below(2) ? three : one;
  Program program = read_program(f);
  outcomes.programs++;
  for (int batches = 0; batches < 3; batches++) run_batch(f, program, kernels, pool);
}

void try_text(Input& f) {
  const uint32_t tokens = uint32_t(f.below(400));
  std::vector<uint64_t> pairs(f.count());
  std::vector<uint32_t> merges;
  for (uint64_t& pair : pairs) {
    pair = uint64_t(uint32_t(f.whole())) << 32 | uint32_t(f.whole());
    merges.push_back(uint32_t(f.whole()));
    merges.push_back(uint32_t(f.whole()));
  }
  if (f.below(8)) std::sort(pairs.begin(), pairs.end());
  BytePairs native(pairs.data(), merges.data(), pairs.size(), tokens);
  const Style style{f.below(2) > 0, f.below(2) > 0, f.below(2) > 0, f.below(2) > 0, f.below(2) > 0, f.below(4)};
  std::vector<uint32_t> bytes(256), out;
  for (size_t i = 0; i < bytes.size(); i++) bytes[i] = f.below(4) ? uint32_t(i) : uint32_t(f.whole());
  static std::vector<uint8_t> kinds = [] {
    std::vector<uint8_t> made(0x110000);
    for (size_t i = 0; i < made.size(); i++) made[i] = uint8_t(uint32_t(i) * 2654435761u >> 30);
    for (int space : {'\n', '\r', ' '}) made[size_t(space)] = SPACE;
    return made;
  }();
  native.set_alphabet(bytes.data(), kinds.data());
  native.set_whole("ab", 7);
  std::vector<uint32_t> letters(f.count() * (f.below(2) ? 1 : 40));
  for (uint32_t& letter : letters) letter = uint32_t(f.whole());
  std::vector<uint64_t> ends{letters.size() / 2, uint64_t(f.below(8) ? int64_t(letters.size()) : f.whole())};
  native.words(letters.data(), letters.size(), ends.data(), ends.size(), out);
  std::vector<uint8_t> text;
  while (f.left()) {
    const int letter = f.whole();
    text.push_back(uint8_t(letter));
    text.push_back(uint8_t(letter >> 8));
  }
  text.shrink_to_fit();
  native.text(text.data(), text.size(), style, out);
  outcomes.texts++;
}

}  // namespace

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t most);

// Mostly a few numbers become others, so that what follows keeps its meaning.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t most, unsigned seed) {
  std::minstd_rand random(seed + 1);
  auto below = [&](size_t n) { return size_t(random()) % n; };
  const size_t numbers = size / 2;
  if (!numbers || below(8) == 0) return LLVMFuzzerMutate(data, size, most);
  for (size_t changes = 1 + below(3); changes; changes--) {
    uint8_t* at = data + 2 * below(numbers);
    int16_t value;
    std::memcpy(&value, at, 2);
    switch (below(5)) {
      case 0:
        value = int16_t(value + 1 - 2 * int(below(2)));
        break;
      case 1:
        value = int16_t(below(20)) - 2;
        break;
      case 2:
        std::memcpy(&value, data + 2 * below(numbers), 2);
        break;
      case 3:
        value = int16_t(kFirstOdd + int(below(16)));
        break;
      default:
        value = int16_t(16 * below(70) + 8 * below(2));
    }
    std::memcpy(at, &value, 2);
  }
  return size;
}

// What was refused is not changed further: nearly all of it would be refused again.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  try {
    (input.below(8) == 7 ? try_text : try_program)(input);
    return 0;
  } catch (const std::invalid_argument&) {
    outcomes.refused++;
  } catch (const std::out_of_range&) {
    outcomes.refused++;
  } catch (const TooMuch&) {
  }
  return -1;
}
