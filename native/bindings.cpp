// The only file that knows Python. Views of arrays are checked here; their owners are kept as long as a program lives.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <stdexcept>

#ifndef _WIN32
#include <unistd.h>
#endif

#include "byte_pairs.h"
#include "matrix.h"
#include "offset.h"
#include "program.h"
#include "read.h"
#include "refine.h"

namespace nb = nanobind;
using namespace chalot;

namespace {

template <class T>
using In = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
template <class T>
using Out = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

void expect(bool good, const char* what) {
  if (!good) throw std::invalid_argument(what);
}

// (scheme, rows, columns, segment columns, data, tables or None); keeps the arrays alive in `keep`.
Matrix matrix_of(nb::handle h, nb::list& keep) {
  nb::tuple t = nb::cast<nb::tuple>(h);
  expect(t.size() == 6, "matrix: expected (scheme, rows, columns, segment, data, tables)");
  auto data = nb::cast<In<uint8_t>>(t[4]);
  In<int8_t> tables;
  if (!t[5].is_none()) tables = nb::cast<In<int8_t>>(t[5]);
  keep.append(h);
  return matrix_view(nb::cast<int>(t[0]), nb::cast<int>(t[1]), nb::cast<int>(t[2]), nb::cast<int>(t[3]), data.data(),
                     data.size(), tables.data(), tables.is_valid() ? tables.size() : 0);
}

std::pair<const float*, size_t> vector_of(nb::handle h, nb::list& keep) {
  if (h.is_none()) return {nullptr, 0};
  auto v = nb::cast<In<float>>(h);
  keep.append(h);
  return {v.data(), v.size()};
}

// Kernels of one instruction set on one pool. A forked child makes its own pool at first use.
class Machine {
 public:
  Machine(const std::string& isa, int threads) : threads_(threads) {
    expect(threads >= 1 && threads <= 1024, "threads: expected 1 to 1024");
    kernels = isa.empty() ? best_kernels() : find_kernels(isa.c_str());
    expect(kernels != nullptr, "instruction set cannot run here");
  }
  ~Machine() {
    if (owner_ != process()) (void)pool_.release();  // the parent's threads are not ours to join
  }
  Pool& pool() {
    if (owner_ != process()) {
      (void)pool_.release();
      pool_ = std::make_unique<Pool>(threads_);
      owner_ = process();
    }
    return *pool_;
  }
  int threads() const { return threads_; }
  const Kernels* kernels;
  std::mutex busy;

 private:
  static long process() {
#ifdef _WIN32
    return 1;
#else
    return getpid();
#endif
  }
  int threads_;
  long owner_ = 0;
  std::unique_ptr<Pool> pool_;
};

// A program and the Python objects whose memory it reads.
struct Model {
  Model(const std::vector<std::pair<int, int>>& slots, nb::list ops, std::tuple<int, int, int, int> cache, int heads,
        const std::vector<std::vector<float>>& inverse_frequency, float rope_factor)
      : program(slots_of(slots), ops_of(ops), cache_of(cache), heads, inverse_frequency, rope_factor) {}

  static std::vector<Slot> slots_of(const std::vector<std::pair<int, int>>& slots) {
    std::vector<Slot> out;
    for (auto [width, planes] : slots) out.push_back({width, planes});
    return out;
  }
  static CacheShape cache_of(std::tuple<int, int, int, int> c) {
    auto [type, layers, kv_heads, head_dim] = c;
    expect(type >= 0 && type <= int(CacheType::int8), "cache: unknown type");
    return {CacheType(type), layers, kv_heads, head_dim};
  }
  // Each operation: (kind, in, out, parts, weight, number, layer, add, gate, window, cap, fused, sinks, routing, top,
  // routes, planes, rope, bias); a part: (matrix, bias, column).
  std::vector<Op> ops_of(nb::list ops) {
    std::vector<Op> out;
    for (nb::handle h : ops) {
      nb::tuple t = nb::cast<nb::tuple>(h);
      expect(t.size() == 19, "operation: expected nineteen fields");
      Op op;
      int kind = nb::cast<int>(t[0]), gate = nb::cast<int>(t[8]), routing = nb::cast<int>(t[13]);
      expect(kind >= 0 && kind <= int(OpKind::prefetch) && gate >= 0 && gate <= int(Gate::relu2) && routing >= 0 &&
                 routing <= int(Routing::sigmoid),
             "operation: unknown kind");
      op.kind = OpKind(kind);
      op.in = nb::cast<int>(t[1]);
      op.out = nb::cast<int>(t[2]);
      for (nb::handle part : nb::cast<nb::list>(t[3])) {
        nb::tuple p = nb::cast<nb::tuple>(part);
        expect(p.size() == 3, "part: expected (matrix, bias, column)");
        Matrix w = matrix_of(p[0], keep);
        auto [bias, size] = vector_of(p[1], keep);
        expect(!bias || int64_t(size) >= round_up(w.rows, 16), "vector: must be padded to 16");
        op.parts.push_back({w, bias, nb::cast<int>(p[2])});
      }
      std::tie(op.weight, op.weight_size) = vector_of(t[4], keep);
      op.number = nb::cast<float>(t[5]);
      op.layer = nb::cast<int>(t[6]);
      op.add = nb::cast<bool>(t[7]);
      op.gate = Gate(gate);
      op.window = nb::cast<int>(t[9]);
      op.cap = nb::cast<float>(t[10]);
      op.fused = nb::cast<bool>(t[11]);
      op.sinks = nb::cast<int>(t[12]);
      op.routing = Routing(routing);
      op.top = nb::cast<int>(t[14]);
      op.routes = nb::cast<int>(t[15]);
      op.planes = nb::cast<int>(t[16]);
      op.rope = nb::cast<int>(t[17]);
      std::tie(op.bias, op.bias_size) = vector_of(t[18], keep);
      out.push_back(op);
    }
    return out;
  }

  // Logits of the wanted rows; or, with a `count`, the ids and logits of the best alone.
  void run(Machine& machine, In<int32_t> ids, In<int32_t> positions, In<int32_t> sequence, In<int32_t> pages,
           In<int32_t> rows, Out<uint8_t> arena, Out<float> logits) {
    expect(logits.size() == rows.size() * size_t(program.vocabulary()), "batch: logits size");
    Batch b = batch_of(ids, positions, sequence, pages, rows, arena);
    b.logits = logits.data();
    run(machine, b);
  }
  void best(Machine& machine, In<int32_t> ids, In<int32_t> positions, In<int32_t> sequence, In<int32_t> pages,
            In<int32_t> rows, Out<uint8_t> arena, Out<int32_t> best_ids, Out<float> best_logits) {
    expect(best_ids.ndim() == 2 && best_ids.shape(0) == rows.size() && best_logits.size() == best_ids.size(),
           "batch: sizes of the best");
    Batch b = batch_of(ids, positions, sequence, pages, rows, arena);
    b.count = int(best_ids.shape(1));
    expect(b.count >= 1 && b.count <= program.vocabulary(), "batch: expected to choose 1 to all of the vocabulary");
    std::vector<Candidate> found(best_ids.size());
    b.best = found.data();
    run(machine, b);
    for (size_t i = 0; i < found.size(); i++) best_ids.data()[i] = found[i].id, best_logits.data()[i] = found[i].logit;
  }

  Batch batch_of(In<int32_t>& ids, In<int32_t>& positions, In<int32_t>& sequence, In<int32_t>& pages, In<int32_t>& rows,
                 Out<uint8_t>& arena) const {
    expect(ids.ndim() == 1 && positions.size() == ids.size() && sequence.size() == ids.size(), "batch: sizes differ");
    expect(pages.ndim() == 2, "batch: pages must be (sequences, pages)");
    expect(rows.ndim() == 1, "batch: wanted rows must be a vector");
    return {int(ids.size()),
            int(pages.shape(0)),
            int(pages.shape(1)),
            int(rows.size()),
            ids.data(),
            positions.data(),
            sequence.data(),
            pages.data(),
            rows.data(),
            arena.data(),
            arena.size() / program.cache().page_bytes(),
            nullptr,
            0,
            nullptr};
  }
  void run(Machine& machine, const Batch& batch) {
    nb::gil_scoped_release release;
    std::scoped_lock lock(busy, machine.busy);
    program.run(*machine.kernels, machine.pool(), batch);
  }

  void copy_slot(int slot, Out<float> out) {
    expect(out.ndim() == 2 && int64_t(out.shape(1)) == program.width(slot), "slot: width differs");
    const int rows = int(out.shape(0));
    float* to = out.data();
    nb::gil_scoped_release release;
    std::scoped_lock lock(busy);
    program.copy_slot(slot, rows, to);
  }
  std::vector<std::vector<int64_t>> taken() {
    nb::gil_scoped_release release;
    std::scoped_lock lock(busy);
    return program.taken();
  }

  nb::list keep;
  Program program;
  std::mutex busy;
};

// Panels (16 rows each) of float32 weights, columns padded to 32, encoded over the machine's threads.
void encode(Machine& machine, int scheme, int segment, In<int8_t> tables, In<float> weights, Out<uint8_t> panels,
            Out<uint16_t> segments, Out<float> row_scale) {
  expect(weights.ndim() == 2 && weights.shape(0) % kPanel == 0 && weights.shape(1) % kGroup == 0, "encode: padding");
  expect(scheme == int(Scheme::int8) || (scheme >= 0 && scheme < kSchemes && kStored[scheme].levels),
         "encode: a scheme of int8 or levels");
  expect(segment > 0 && segment % kBlock == 0 && tables.size() == 4096, "encode: segment or tables");
  Matrix w{};
  w.scheme = Scheme(scheme);
  w.rows = int(weights.shape(0));
  w.columns = int(weights.shape(1));
  w.segment_blocks = segment / kBlock;
  w.tables = tables.data();
  expect(panels.size() == w.panels() * w.panel_bytes() && row_scale.size() == size_t(w.rows), "encode: output size");
  expect(segments.size() == size_t(w.panels()) * w.segment_count() * kPanel, "encode: segments size");
  const float* from = weights.data();
  uint8_t* to = panels.data();
  uint16_t* factors = segments.data();
  float* scales = row_scale.data();
  nb::gil_scoped_release release;
  std::scoped_lock lock(machine.busy);
  std::vector<Buffer> scratch(size_t(machine.threads()));
  for (Buffer& b : scratch) b.reserve(encode_scratch_bytes(w));
  // Panels go to whoever is free: another process, or a thread that reads, may have a core.
  const int share = std::max(1, w.panels() / (machine.threads() * 8));
  std::atomic<int> next = 0;
  machine.pool().run([&](int id) {
    for (int p; (p = next.fetch_add(share)) < w.panels();)
      machine.kernels->encode(w, from, p, std::min(p + share, w.panels()), to, factors, scales,
                              scratch[size_t(id)].as<void>());
  });
}

// y = x @ w.T for tokens of float32, quantised to `planes` where the matrix is coded.
void product(Machine& machine, nb::tuple matrix, int planes, In<float> x, Out<float> y) {
  nb::list keep;
  Matrix w = matrix_of(matrix, keep);
  expect(x.ndim() == 2 && int64_t(x.shape(1)) == w.columns, "product: columns differ");
  expect(y.ndim() == 2 && y.shape(0) == x.shape(0) && int64_t(y.shape(1)) == w.rows, "product: output size");
  expect(planes == 1 || planes == 2, "product: planes");
  const int tokens = int(x.shape(0));
  const float* from = x.data();
  Output out{y.data(), size_t(w.rows), 0, nullptr, false};
  nb::gil_scoped_release release;
  std::scoped_lock lock(machine.busy);
  const size_t stride = size_t(round_up(w.columns, kBlock)), blocks = stride / kBlock, n = size_t(tokens);
  Buffer numbers, codes, scales, sums;
  numbers.reserve(n * stride * 4);
  codes.reserve(size_t(round_up(tokens * planes, kRowsRead)) * stride);
  scales.reserve(n * blocks * 4);
  sums.reserve(n * blocks * planes * 4);
  std::vector<Buffer> scratch(size_t(machine.threads()));
  for (Buffer& b : scratch) b.reserve(scratch_bytes(w));
  machine.pool().run([&](int id) {
    const Kernels& k = *machine.kernels;
    const int threads = machine.threads();
    for (size_t t = n * id / threads; t < n * (id + 1) / threads; t++) {
      std::memcpy(numbers.as<float>() + t * stride, from + t * w.columns, size_t(w.columns) * 4);
      for (size_t i = 0; i < blocks && is_coded(w.scheme); i++)
        k.quantize(numbers.as<float>() + t * stride + i * kBlock, kBlock, planes,
                   codes.as<int8_t>() + t * planes * stride + i * kBlock, stride, scales.as<float>() + t * blocks + i,
                   sums.as<int32_t>() + t * planes * blocks + i, blocks);
    }
    machine.pool().barrier();
    const int first = w.panels() * id / threads, last = w.panels() * (id + 1) / threads;
    if (is_coded(w.scheme)) {
      Activations a{planes, int(stride), codes.as<int8_t>(), scales.as<float>(), sums.as<int32_t>()};
      multiply(k, w, a, tokens, first, last, out, scratch[size_t(id)].as<void>());
    } else {
      k.dense(w, numbers.as<float>(), stride, tokens, first, last, out);
    }
  });
}

// See round_columns in refine.h. `steps` is (step, middle, low, high); `tables` (128, points) or empty.
void refine(Machine& machine, std::tuple<float, float, float, float> steps, In<float> tables, Out<float> w,
            In<float> upper, In<float> unit, In<float> offset, In<uint8_t> levels, Out<uint8_t> codes) {
  expect(w.ndim() == 2 && w.shape(0) < 1 << 30 && w.shape(1) < 1 << 15, "refine: expected rows of few columns");
  const int rows = int(w.shape(0)), n = int(w.shape(1));
  auto [step, middle, low, high] = steps;
  Steps s{step, middle, low, high, nullptr, 0};
  if (tables.size()) {
    expect(tables.ndim() == 2 && tables.shape(0) == 128 && tables.shape(1) <= 256, "refine: tables");
    s.tables = tables.data(), s.points = int(tables.shape(1));
  }
  expect(upper.size() == size_t(n) * n && offset.size() == size_t(rows), "refine: factor or offsets");
  expect(unit.size() == w.size() && levels.size() == w.size() && codes.size() == w.size(), "refine: sizes differ");
  float* at = w.data();
  const float *factor = upper.data(), *one = unit.data(), *add = offset.data();
  const uint8_t* of_group = levels.data();
  uint8_t* out = codes.data();
  nb::gil_scoped_release release;
  std::scoped_lock lock(machine.busy);
  std::atomic<int> next = 0;
  machine.pool().run([&](int) {
    for (int first; (first = next.fetch_add(kPanel)) < rows;)
      round_columns(s, n, first, std::min(first + kPanel, rows), at, factor, one, add, of_group, out);
  });
}

void exp_all(Machine& machine, In<float> x, Out<float> y) {
  expect(x.size() == y.size(), "exp: sizes differ");
  PlainArithmetic plain;
  machine.kernels->exp(x.data(), y.data(), x.size());
}

uint64_t read_numbers(Machine& machine, In<uint64_t> numbers) {
  const uint64_t* data = numbers.data();
  const size_t count = numbers.size();
  nb::gil_scoped_release release;
  std::scoped_lock lock(machine.busy);
  return read_all(machine.pool(), data, count);
}

// Byte pairs for several Python threads, one after another; keeps the tables alive.
class Words {
 public:
  Words(In<uint64_t> pairs, In<uint32_t> merges, uint32_t tokens)
      : pairs_(pairs), merges_(merges), native_(check(pairs, merges), merges.data(), pairs.size(), tokens) {}

  std::vector<uint32_t> words(In<uint32_t> letters, In<uint64_t> ends) {
    return alone([&](auto& out) { native_.words(letters.data(), letters.size(), ends.data(), ends.size(), out); });
  }
  std::vector<uint32_t> text(nb::bytes text, std::tuple<bool, bool, bool, bool, bool, int> s) {
    const auto [folds, any_lead, digit_lead, newline_tail, newline_runs, digits] = s;
    const Style style{folds, any_lead, digit_lead, newline_tail, newline_runs, digits};
    expect(digits >= 0, "digits: expected 0 or more");
    return alone(
        [&](auto& out) { native_.text(reinterpret_cast<const uint8_t*>(text.data()), text.size(), style, out); });
  }
  void set_alphabet(In<uint32_t> bytes, In<uint8_t> kinds) {
    expect(bytes.size() == 256 && kinds.size() == 0x110000, "alphabet: expected 256 ids and a kind of each character");
    alone([&](auto&) { native_.set_alphabet(bytes.data(), kinds.data()); });
  }
  void set_whole(nb::bytes word, uint32_t id) {
    const std::string letters(word.c_str(), word.size());
    alone([&](auto&) { native_.set_whole(letters, id); });
  }

 private:
  static const uint64_t* check(const In<uint64_t>& pairs, const In<uint32_t>& merges) {
    expect(merges.size() == 2 * pairs.size(), "merges: expected two numbers of each pair");
    return pairs.data();
  }
  template <class F>
  std::vector<uint32_t> alone(F work) {
    nb::gil_scoped_release others_run;
    std::lock_guard<std::mutex> lock(busy_);
    std::vector<uint32_t> out;
    work(out);
    return out;
  }
  In<uint64_t> pairs_;
  In<uint32_t> merges_;
  BytePairs native_;
  std::mutex busy_;
};

}  // namespace

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // a daemon thread may hold a model when the interpreter ends: no leak
  m.doc() = "Compiled kernels of chalot. Use chalot.kernels.native.";
  m.def("instruction_sets", [] {
    std::vector<std::pair<std::string, bool>> out;
    for (int i = 0; i < kernel_count(); i++) out.emplace_back(kernel_at(i).name, kernel_at(i).runs_here());
    return out;
  });
  nb::class_<Machine>(m, "Machine")
      .def(nb::init<const std::string&, int>(), nb::arg("isa"), nb::arg("threads"))
      .def_prop_ro("isa", [](const Machine& s) { return std::string(s.kernels->name); })
      .def_prop_ro("threads", &Machine::threads)
      .def("encode", &encode)
      .def("refine", &refine)
      .def("product", &product)
      .def("exp", &exp_all)
      .def("read", &read_numbers);
  nb::class_<Words>(m, "BytePairs")
      .def(nb::init<In<uint64_t>, In<uint32_t>, uint32_t>())
      .def("words", &Words::words)
      .def("text", &Words::text)
      .def("set_alphabet", &Words::set_alphabet)
      .def("set_whole", &Words::set_whole);
  nb::class_<Model>(m, "Program")
      .def(nb::init<const std::vector<std::pair<int, int>>&, nb::list, std::tuple<int, int, int, int>, int,
                    const std::vector<std::vector<float>>&, float>())
      .def("run", nb::overload_cast<Machine&, In<int32_t>, In<int32_t>, In<int32_t>, In<int32_t>, In<int32_t>,
                                    Out<uint8_t>, Out<float>>(&Model::run))
      .def("best", &Model::best)
      .def("copy_slot", &Model::copy_slot)
      .def_prop_ro("taken", &Model::taken)
      .def_prop_ro("page_bytes", [](const Model& s) { return s.program.cache().page_bytes(); });
}
