// Each primitive of one instruction set (-DISA="NAME.cpp" -DTABLE=NAME_kernels) over numbers that lie at edges; prints
// a line of its name and a hash of the results' bits. Every NaN counts as the same one: its sign and payload are no
// result.
#include ISA

#include <cstdio>
#include <initializer_list>

namespace {

constexpr float kInfinity = __builtin_inff(), kNan = __builtin_nanf("");
// Zeros, subnormals, ends of int32, halves between whole numbers, ends of float16, infinities.
// clang-format off
constexpr float kEdges[64] = {
    0.0f, -0.0f, 1.0f, -1.0f, kNan, kInfinity, -kInfinity, 0x1p-149f, -0x1p-149f, 0x1p-126f, -0x1p-126f,
    0x1.fffffcp-127f, 0x1.fffffep127f, -0x1.fffffep127f, 3.0f, 0.1f, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -2.5f, 126.5f,
    127.5f, 8388607.5f, 8388608.0f, 16777217.0f, 2147483520.0f, 2147483648.0f, -2147483648.0f, -2147483904.0f,
    4294967296.0f, 0x1p-24f, 0x1p-25f, 0x1.8p-25f, 0x1.8p-24f, 0x1p-14f, 0x1.ffcp-15f, 0x1.ffep-15f, 65504.0f,
    65519.996f, 65520.0f, -65520.0f, 2049.0f, 2051.0f, 1e-30f, 1e30f, -1e30f, 88.0f, 88.5f, -87.0f, -87.00001f,
    -88.0f, -126.0f, 100.0f, 0.69314718f, 0.34657359f, -0.34657359f, 0x1p-100f, 0x1.000002p0f, 7.0f, 1e-7f, 12345.678f,
    -3.1415927f};
// clang-format on

class Line {
 public:
  explicit Line(const char* name) : name_(name) {}
  ~Line() { std::printf("%s %016llx\n", name_, static_cast<unsigned long long>(hash_)); }
  void add(uint32_t word) { hash_ = (hash_ ^ word) * 0x100000001b3; }  // FNV-1a, a word at a time
  void add(F x) {
    float lanes[16];
    store(lanes, x);
    for (float f : lanes) add(f);
  }
  void add(float f) {
    uint32_t bits;
    __builtin_memcpy(&bits, &f, 4);
    add((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : bits);
  }
  void add_halves(F x) {
    uint16_t lanes[16];
    store_f16(lanes, x);
    for (uint16_t h : lanes) add(uint32_t((h & 0x7fff) > 0x7c00 ? 0x7e00 : h));
  }
  void add(I x) {
    int32_t lanes[16];
    __builtin_memcpy(lanes, &x, sizeof lanes);
    for (int32_t i : lanes) add(uint32_t(i));
  }

 private:
  const char* name_;
  uint64_t hash_ = 0xcbf29ce484222325;
};

template <class Operation>
void pairs(const char* name, Operation f) {
  Line line(name);
  for (float a : kEdges)
    for (int i = 0; i < 64; i += 16) line.add(f(set(a), load(kEdges + i)));
}

uint32_t random_state = 1;
float random_number() {  // within -1..1
  random_state = random_state * 1664525 + 1013904223;
  return float(int32_t(random_state)) * 0x1p-31f;
}

void of_lanes() {
  Line sums("sum"), pairs("sum of two"), high("largest"), whole("join"), below("count_below"), found("look_up");
  float x[16], bounds[8];
  for (int n = 0; n < 1000; n++) {
    for (float& f : x) f = random_number() * 100;
    for (int i = 0; i < 8; i++) bounds[i] = float((i - 4) * (n % 15 + 1));
    x[n % 16] = bounds[n % 7];
    sums.add(sum(load(x)));
    pairs.add(sum(load(x), mul(load(x), set(0.7f))));
    high.add(largest(load(x)));
    whole.add(join(to_int(load(x)), to_int(mul(load(x), set(-1.0f)))));
    below.add(count_below(load(x), bounds));
    found.add(look_up(bounds, count_below(load(x), bounds)));
  }
}

void of_whole_numbers() {
  Line sums("add, sum"), held("clamp"), halves("split"), codes("store_codes"), turned("flip");
  float x[16];
  for (int n = 0; n < 1000; n++) {
    for (float& f : x) f = random_number() * (n % 2 ? 16256.0f : 200.0f);
    const I whole = to_int(round(load(x))), low = clamp(whole);
    sums.add(add(whole, whole));
    sums.add(uint32_t(sum(whole)));
    held.add(low);
    I first, second;
    split(whole, first, second);
    halves.add(first);
    halves.add(second);
    int8_t bytes[16];
    store_codes(bytes, low);
    for (int8_t b : bytes) codes.add(uint32_t(b));
    turned.add(flip<1>(load(x)));
    turned.add(flip<2>(load(x)));
    turned.add(flip<4>(load(x)));
    turned.add(flip<8>(load(x)));
  }
}

// Packed blocks of one to four groups as tiles, and they and tiles times codes at the ends of their range.
template <class Coder>
void of_tiles(const char* name, const char* product) {
  Line made(name), sums(product);
  alignas(64) uint8_t block[4 * 512];
  alignas(64) int8_t tables[4096], tiles[4 * 512], x[2 * 128];
  for (int groups = Coder::groups(1); groups <= 4; groups++) {
    for (uint8_t& b : block) b = uint8_t(int(random_number() * 255));
    for (int8_t& t : tables) t = int8_t(random_number() * 127);
    for (int8_t& c : x) c = int8_t(random_number() > 0 ? 127 : -127 + int(random_number() * 3 + 3));
    to_tiles<Coder>(block, groups, tables, tiles);
    for (int i = 0; i < groups * 512; i++) {
      made.add(uint32_t(tiles[i]));
    }
    int32_t of_codes[2] = {0, 0};
    for (int k = 0; k < groups * 32; k++) of_codes[0] += x[k], of_codes[1] += x[128 + k];
    I few[2];
    dot<1, Coder>(block, groups, tables, x, 128, of_codes, 1, few);
    sums.add(few[0]);
    dot<2, Coder>(block, groups, tables, x, 128, of_codes, 1, few);
    sums.add(few[0]);
    sums.add(few[1]);
    I out[2][1];
    tile_product<2, 1>(tiles, 0, groups * 8, x, 128, of_codes, 1, out);
    sums.add(out[0][0]);
    sums.add(out[1][0]);
  }
}

void of_halves() {
  Line from("load_f16"), from_b("load_bf16"), to("store_f16");
  for (int at = 0; at < 65536; at += 16) {
    uint16_t h[16];
    for (int i = 0; i < 16; i++) h[i] = uint16_t(at + i);
    from.add(load_f16(h));
    from_b.add(load_bf16(h));
    to.add_halves(load_f16(h));
    to.add_halves(mul(load_f16(h), set(0x1.002p0f)));  // halfway to the next, and around it
    to.add_halves(mul(load_f16(h), set(0x1.002002p0f)));
    to.add_halves(mul(load_f16(h), set(0x1.001ffep0f)));
  }
  for (int i = 0; i < 64; i += 16) to.add_halves(load(kEdges + i));
}

// Weights to codes and, of the table's entries, what no program calls.
void of_table(const Kernels& k) {
  constexpr int kColumns = 1056, kBytes = kColumns * kPanel;
  alignas(64) static float weights[kBytes], scale[kPanel];
  alignas(64) static uint8_t panel[kBytes * 2], scratch[1 << 16];
  static int8_t tables[4096];
  static uint16_t segments[kPanel * 64];
  for (float& w : weights) w = random_number() * random_number();
  for (int i = 0; i < 4096; i++) tables[i] = int8_t((i % 16 - 8) * (i / 16 % 64 + 1) / 4);
  weights[5] = 90.0f, weights[kColumns] = 1e-40f;
  for (Scheme scheme : {Scheme::int8, Scheme::nl4, Scheme::nl3, Scheme::nl2}) {
    const char* names[] = {"encode nl4", "encode int6", "encode int4", "encode nl3", "encode nl2"};
    Line line(scheme == Scheme::int8 ? "encode int8" : names[int(scheme) - int(Scheme::nl4)]);
    Matrix w{scheme, kPanel, kColumns, panel, segments, scale, tables, 1};
    k.encode(w, weights, 0, 1, panel, segments, scale, scratch);
    for (size_t i = 0; i < w.panel_bytes(); i++) line.add(uint32_t(panel[i]));
    for (int i = 0; i < kPanel * w.segment_count(); i++) line.add(uint32_t(segments[i]));
    for (float f : scale) line.add(f);
  }
  Line line("exp");
  alignas(64) static float y[kBytes];
  for (float& w : weights) w *= 100.0f;
  k.exp(weights, y, kBytes - 7);
  k.exp(kEdges, y, 64);
  for (float f : y) line.add(f);
}

}  // namespace

int main() {
  pairs("add", [](F a, F b) { return add(a, b); });
  pairs("sub", [](F a, F b) { return sub(a, b); });
  pairs("mul", [](F a, F b) { return mul(a, b); });
  pairs("div", [](F a, F b) { return div(a, b); });
  pairs("max", [](F a, F b) { return max(a, b); });
  pairs("min", [](F a, F b) { return min(a, b); });
  pairs("round", [](F a, F b) { return round(add(a, b)); });
  pairs("to_int", [](F a, F b) { return to_int(mul(a, b)); });
  pairs("to_float", [](F a, F b) { return to_float(to_int(mul(a, b))); });
  pairs("zero_below", [](F a, F b) { return zero_below(a, a, b); });
  pairs("exponential", [](F a, F b) { return exponential(add(a, b)); });
  {
    Line line("fma");
    for (float a : kEdges)
      for (float b : kEdges)
        for (int i = 0; i < 64; i += 16) line.add(fma(load(kEdges + i), set(a), set(b)));
  }
  {
    Line line("scale2");
    for (int n = -126; n <= 127; n++)
      for (int i = 0; i < 64; i += 16) line.add(scale2(load(kEdges + i), set(float(n))));
  }
  of_lanes();
  of_whole_numbers();
  of_tiles<Int8>("to_tiles int8", "products int8");
  of_tiles<Nl4>("to_tiles nl4", "products nl4");
  of_tiles<Nibbles>("to_tiles nibbles", "products nibbles");
  of_tiles<Sixes>("to_tiles sixes", "products sixes");
  of_tiles<Nl3>("to_tiles nl3", "products nl3");
  of_tiles<Nl2>("to_tiles nl2", "products nl2");
  of_tiles<Crumbs>("to_tiles crumbs", "products crumbs");
  of_tiles<Trits>("to_tiles trits", "products trits");
  of_tiles<Bits>("to_tiles bits", "products bits");
  of_halves();
  of_table(TABLE);
}
