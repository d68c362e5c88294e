// The matrix view, the activation view and the table of kernels that each instruction set fills in.
// Layouts are those of docs/format.md; the rule of sums is in docs/exactness.md.
#pragma once
#include <cstddef>
#include <cstdint>

namespace chalot {

constexpr int kPanel = 16;       // rows stored together
constexpr int kGroup = 32;       // columns that share a level
constexpr int kBlock = 128;      // columns that share an activation scale
constexpr int kPage = 256;       // positions of a cache page
constexpr int kMaxHead = 1024;   // numbers of one head, padded to 16
constexpr int kPlaneStep = 128;  // a 16-bit activation is kPlaneStep * first plane + second plane

inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

enum class Scheme : int { f32, bf16, f16, int8, nl4, int6, int4, nl3, nl2, ternary, sign, row8, row4, row2, row1 };
constexpr int kSchemes = int(Scheme::row1) + 1;
inline bool is_coded(Scheme s) { return s >= Scheme::int8; }

// How a coded scheme is stored: bytes of a block's codes, levels behind them, no short last block, one factor a row
// instead of segments, an offset a row.
struct Stored {
  int block_bytes;
  bool levels, whole, by_row, offset;
};
constexpr Stored kStored[kSchemes] = {
    {},                                  // f32
    {},                                  // bf16
    {},                                  // f16
    {2048, false, false, false, false},  // int8
    {1024, true, false, false, false},   // nl4
    {1536, false, true, false, false},   // int6
    {1024, true, false, false, false},   // int4
    {768, true, true, false, false},     // nl3
    {512, true, true, false, false},     // nl2
    {416, false, true, false, false},    // ternary
    {256, false, true, false, false},    // sign
    {2048, false, false, true, true},    // row8
    {1024, false, false, true, true},    // row4
    {512, false, true, true, true},      // row2
    {256, false, true, true, false},     // row1
};

struct Matrix {
  Scheme scheme;
  int rows, columns;
  const uint8_t* data;       // panels, or rows of numbers padded to 16
  const uint16_t* segments;  // float16 (panels, segment_count, 16); sixteen ones for schemes that have none
  const float* row_scale;    // (rows padded to 16)
  const int8_t* tables;      // (256, 16), for schemes with levels
  int segment_blocks;        // blocks under one segment factor
  const float* row_offset;   // (rows padded to 16), or null: y[r] += row_offset[r] * sum of x
  int panels() const { return (rows + kPanel - 1) / kPanel; }
  int groups() const { return (columns + kGroup - 1) / kGroup; }
  int blocks() const { return (columns + kBlock - 1) / kBlock; }
  const Stored& stored() const { return kStored[int(scheme)]; }
  // 0 where a row has no segments: every index into them is then one of the sixteen ones.
  int segment_count() const { return stored().by_row ? 0 : (blocks() + segment_blocks - 1) / segment_blocks; }
  int group_bytes() const { return stored().block_bytes / 4 + (stored().levels ? kPanel : 0); }
  size_t panel_bytes() const { return size_t(stored().whole ? blocks() * 4 : groups()) * group_bytes(); }
};

// Quantised activations: `planes` rows of codes a token, each with a sum a block. Their memory goes on to a multiple of
// kRowsRead rows, which may be read and must not matter.
constexpr int kRowsRead = 32;
struct Activations {
  int planes;           // 1: 8 bits, 2: 16 bits
  int stride;           // columns padded to 128, with zeros
  const int8_t* codes;  // (tokens, planes, stride), -127..127
  const float* scale;   // (tokens, stride / 128)
  const int32_t* sums;  // (tokens, planes, stride / 128)
};

// Where a product goes: row r of token t to y[t * stride + r - origin] = (add ? y : 0) + (product + bias[r]).
struct Output {
  float* y;
  size_t stride;
  int origin;
  const float* bias;  // may be null
  bool add;
};

enum class Gate : int { silu, gelu_tanh, relu2 };
enum class CacheType : int { f32, f16, int8 };

// One page of keys and values of one key/value head. Numbers lie in rows of `stride`; codes as tiles: keys with 16
// positions to a panel, (16, stride / 4, 16, 4), values with 16 channels to a panel, (stride / 16, 64, 16, 4), and a
// scale a position.
struct Page {
  CacheType type;
  void *keys, *values;
  float *key_scale, *value_scale;  // (kPage), for codes
  int stride;                      // head size padded to 16
};

// Rows of queries that look at one page, times the scores' scale; `codes` for a cache of codes, else `numbers`.
struct Queries {
  int rows;
  const float* numbers;  // (rows, stride)
  const int8_t* codes;   // (rows, 2, stride): two planes
  const int32_t* sums;   // (rows, 2)
  const float* scale;    // (rows)
  const int *from, *to;  // (rows): the positions of the page that a row sees; none where from >= to
  float cap;             // scores become cap * tanh(score / cap), unless 0
};

// What rows of queries gathered: softmax numerators, largest scores, denominators.
struct Gathered {
  float* out;  // (rows, stride)
  float *largest, *denominator;
};

// The most likely of a part of the vocabulary: ids by descending logit, then ascending id.
struct Candidate {
  float logit;
  int32_t id;
};

struct Kernels {
  const char* name;
  bool (*runs_here)();
  void (*exp)(const float* x, float* y, size_t n);
  void (*rms_norm)(const float* x, const float* weight, int n, float eps, float* y, bool add);
  void (*cap)(float* x, size_t n, float cap);  // each x becomes cap * tanh(x / cap)
  void (*rotate)(float* x, const float* cosine, const float* sine, int half);
  void (*spread)(float* x, int n, int size);
  void (*gate)(Gate kind, const float* gate, const float* up, int n, float* y);
  // `n` numbers (a multiple of 16) under one scale, in one plane of codes or two; a sum a plane.
  void (*quantize)(const float* x, int n, int planes, int8_t* codes, size_t plane_stride, float* scale, int32_t* sums,
                   size_t sums_stride);
  void (*row)(const Matrix& w, int row, float* out);
  // Rows [16 * first, 16 * last) of w times all tokens. `scratch` holds scratch_bytes(w).
  void (*product)(const Matrix& w, const Activations& x, int tokens, int first, int last, Output out, void* scratch);
  void (*dense)(const Matrix& w, const float* x, size_t stride, int tokens, int first, int last, Output out);
  // Puts logits[0..n), whose ids start at `first`, among the `held` of `best`, which keeps the `count` best in order.
  // Returns how many it holds then; -1 if a logit is infinite or not a number.
  int (*top)(const float* logits, int n, int first, int count, Candidate* best, int held);
  void (*store)(const Page& page, int at, const float* key, const float* value);
  void (*attend)(const Page& page, const Queries& queries, Gathered out, void* scratch);
  void (*merge)(float* out, float& top, float& denominator, const float* page_out, float page_top,
                float page_denominator, int n);
  // Rows [16 * first, 16 * last) of float32 weights (rows, columns padded to 32) to panels in the layout of `w`.
  void (*encode)(const Matrix& w, const float* weights, int first, int last, uint8_t* panels, uint16_t* segments,
                 float* row_scale, void* scratch);
};

// A panel as tiles: for each 4 columns, 16 rows of 4 bytes.
inline size_t tile_bytes(const Matrix& w) { return size_t(round_up(w.columns, kBlock)) * kPanel; }
// What `product` needs: two panels as tiles, and room for sums.
inline size_t scratch_bytes(const Matrix& w) { return tile_bytes(w) * 2 + 32768; }
// What `attend` needs: for each row its scores, their codes in two planes, sums and scale.
inline size_t attend_scratch_bytes(int rows) { return size_t(rows) * (kPage * 6 + 12); }

// What `encode` needs: its tables as numbers, and a number a segment.
constexpr size_t kGridsBytes = 17 << 10;
inline size_t encode_scratch_bytes(const Matrix& w) { return kGridsBytes + size_t(w.segment_count()) * 4; }

// Best first; a null entry of a table is inherited from the next one in the list.
extern const Kernels amx_kernels, avx512vnni_kernels, avxvnni_kernels, avx2_kernels, neon_kernels, scalar_kernels;

const Kernels* find_kernels(const char* name);  // null: not built, or it cannot run here
const Kernels* best_kernels();
int kernel_count();
const Kernels& kernel_at(int i);

}  // namespace chalot
