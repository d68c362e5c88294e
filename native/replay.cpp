// Runs a program from a file (written by tests/replay.py) without Python: for processors that are emulated, counted or
// far away. Logits of every token go to standard output as float32, the instruction set's name to standard error.
//
// The file is 16 bytes of magic, then what the constructor of Program takes, then the tokens, all little-endian: whole
// numbers and floats in four bytes; a list as its length, then its members; an array as its length in bytes, then its
// bytes, which begin at a multiple of 64. An empty array stands for none.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "matrix.h"
#include "program.h"

using namespace chalot;

namespace {

constexpr char kMagic[17] = "chalot replay 3\n";

struct alignas(64) Line {
  uint8_t bytes[64];
};

void expect(bool good, const std::string& what) {
  if (!good) throw std::invalid_argument(what);
}

class File {
 public:
  explicit File(const char* path) {
    std::FILE* f = std::fopen(path, "rb");
    expect(f, std::string(path) + " cannot be opened");
    for (size_t got = 64; got == 64; size_ += got) got = std::fread(lines_.emplace_back().bytes, 1, 64, f);
    std::fclose(f);
    expect(!std::memcmp(take(16), kMagic, 16),
           std::string(path) + " was not written by this version's tests/replay.py");
  }
  int whole() { return read<int32_t>(); }
  float number() { return read<float>(); }
  template <class Enum>
  Enum one_of(Enum last) {
    int n = whole();
    expect(n >= 0 && n <= int(last), "unknown kind " + std::to_string(n));
    return Enum(n);
  }
  size_t count() {
    int n = whole();
    expect(n >= 0 && n <= 1 << 20, "a list has " + std::to_string(n) + " members");
    return size_t(n);
  }
  template <class T>
  std::span<const T> array() {
    const size_t bytes = read<uint32_t>();
    expect(bytes % sizeof(T) == 0, "an array ends in the middle of a number");
    take((64 - at_ % 64) % 64);
    return {reinterpret_cast<const T*>(take(bytes)), bytes / sizeof(T)};
  }

 private:
  template <class T>
  T read() {
    T value;
    std::memcpy(&value, take(sizeof value), sizeof value);
    return value;
  }
  const uint8_t* take(size_t bytes) {
    expect(bytes <= size_ - at_, "the file ends at byte " + std::to_string(size_) + ", too early");
    at_ += bytes;
    return lines_[0].bytes + at_ - bytes;
  }
  std::vector<Line> lines_;
  size_t size_ = 0, at_ = 0;
};

Matrix read_matrix(File& f) {
  const int scheme = f.whole(), rows = f.whole(), columns = f.whole(), segment = f.whole();
  const auto data = f.array<uint8_t>();
  const auto tables = f.array<int8_t>();
  return matrix_view(scheme, rows, columns, segment, data.data(), data.size(), tables.data(), tables.size());
}

Op read_op(File& f) {
  Op op;
  op.kind = f.one_of(OpKind::prefetch);
  op.in = f.whole();
  op.out = f.whole();
  op.parts.resize(f.count());
  for (Part& part : op.parts) {
    part.w = read_matrix(f);
    const auto bias = f.array<float>();
    expect(bias.empty() || int64_t(bias.size()) >= round_up(part.w.rows, 16), "a vector is not padded to 16");
    part.bias = bias.empty() ? nullptr : bias.data();
    part.column = f.whole();
  }
  const auto weight = f.array<float>();
  op.weight = weight.empty() ? nullptr : weight.data();
  op.weight_size = weight.size();
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
  const auto added = f.array<float>();
  op.bias = added.empty() ? nullptr : added.data();
  op.bias_size = added.size();
  return op;
}

Program read_program(File& f) {
  std::vector<Slot> slots(f.count());
  for (Slot& s : slots) {
    s.width = f.whole();
    s.planes = f.whole();
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
  for (std::vector<float>& set : inverse_frequency) {
    set.resize(f.count());
    for (float& v : set) v = f.number();
  }
  return Program(slots, ops, cache, heads, inverse_frequency, f.number());
}

struct Options {
  const char *file = nullptr, *isa = nullptr;
  // `last`: logits of each chunk's last token alone
  int threads = 1, chunk = 1, tokens = 1 << 20, last = 0;
};

Options read_options(int count, char** arguments) {
  const char* usage = "usage: replay FILE [--isa NAME] [--threads N] [--chunk N] [--tokens N] [--last 1]";
  Options o;
  const std::map<std::string, int*> numbers{
      {"--threads", &o.threads}, {"--chunk", &o.chunk}, {"--tokens", &o.tokens}, {"--last", &o.last}};
  expect(count % 2 == 0, usage);
  o.file = arguments[1];
  for (int i = 2; i < count; i += 2) {
    const std::string name = arguments[i];
    if (name == "--isa") {
      o.isa = arguments[i + 1];
      continue;
    }
    expect(numbers.count(name), usage);
    const int value = *numbers.at(name) = std::atoi(arguments[i + 1]);
    expect(value >= 1 && value <= 1 << 20, name + " takes a number from 1 to 1,048,576");
  }
  return o;
}

void replay(const Options& o) {
  const Kernels* kernels = o.isa ? find_kernels(o.isa) : best_kernels();
  expect(kernels, std::string(o.isa ? o.isa : "no instruction set") + " is not built, or cannot run here");
  std::fprintf(stderr, "%s\n", kernels->name);
  File file(o.file);
  Program program = read_program(file);
  const auto ids = file.array<int32_t>();
  const int total = std::min(int(ids.size()), o.tokens);
  std::vector<int32_t> positions(ids.size()), sequence(ids.size()), pages(size_t(total) / kPage + 1);
  std::iota(positions.begin(), positions.end(), 0);
  std::iota(pages.begin(), pages.end(), 0);
  std::vector<Line> arena(pages.size() * program.cache().page_bytes() / sizeof(Line) + 1);
  Pool pool(o.threads);
  for (int at = 0; at < total; at += o.chunk) {
    const int tokens = std::min(o.chunk, total - at), first = o.last ? tokens - 1 : 0, wanted = tokens - first;
    std::vector<float> logits(size_t(wanted) * size_t(program.vocabulary()));
    program.run(*kernels, pool,
                {.tokens = tokens,
                 .sequences = 1,
                 .pages_a_sequence = int(pages.size()),
                 .wanted = wanted,
                 .ids = ids.data() + at,
                 .positions = positions.data() + at,
                 .sequence = sequence.data(),
                 .pages = pages.data(),
                 .rows = positions.data() + first,
                 .arena = arena[0].bytes,
                 .arena_pages = pages.size(),
                 .logits = logits.data(),
                 .count = 0,
                 .best = nullptr});
    expect(std::fwrite(logits.data(), 4, logits.size(), stdout) == logits.size(), "logits cannot be written");
  }
}

}  // namespace

int main(int count, char** arguments) {
  try {
    replay(read_options(count, arguments));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "replay: %s\n", error.what());
    return 1;
  }
}
