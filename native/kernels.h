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
constexpr int kPlaneStep = 128;  // a 16-bit activation is kPlaneStep * first plane + second plane

inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

enum class Scheme : int { f32, bf16, f16, int8, nl4 };
inline bool is_coded(Scheme s) { return s >= Scheme::int8; }

struct Matrix {
  Scheme scheme;
  int rows, columns;
  const uint8_t* data;       // panels, or rows of numbers padded to 16
  const uint16_t* segments;  // float16 (panels, segment_count, 16)
  const float* row_scale;    // (rows padded to 16)
  const int8_t* tables;      // (256, 16), for schemes with levels
  int segment_blocks;        // blocks under one segment factor
  int panels() const { return (rows + kPanel - 1) / kPanel; }
  int groups() const { return (columns + kGroup - 1) / kGroup; }
  int blocks() const { return (columns + kBlock - 1) / kBlock; }
  int segment_count() const { return (blocks() + segment_blocks - 1) / segment_blocks; }
  int group_bytes() const { return scheme == Scheme::nl4 ? kPanel * kGroup / 2 + kPanel : kPanel * kGroup; }
  size_t panel_bytes() const { return size_t(groups()) * group_bytes(); }
};

// Quantised activations: `planes` rows of codes a token, each with a sum a block.
struct Activations {
  int planes;           // 1: 8 bits, 2: 16 bits
  int stride;           // columns padded to 128, with zeros
  const int8_t* codes;  // (tokens, planes, stride), -127..127
  const float* scale;   // (tokens, stride / 128)
  const int32_t* sums;  // (tokens, planes, stride / 128)
};

// Where a product goes: y[t * stride + r] = (add ? y : 0) + (product + bias[r]).
struct Output {
  float* y;
  size_t stride;
  const float* bias;  // may be null
  bool add;
};

enum class Gate : int { silu, gelu_tanh };
enum class CacheType : int { f32, f16 };

// One page of keys and values of one key/value head: rows of `stride` numbers.
struct Page {
  CacheType type;
  const void *keys, *values;
  int stride;  // head size padded to 16
};

// What a query has gathered so far: softmax numerator, largest score, denominator.
struct Gathered {
  float* out;  // (stride)
  float largest, denominator;
};

struct Kernels {
  const char* name;
  bool (*runs_here)();
  void (*exp)(const float* x, float* y, size_t n);
  void (*rms_norm)(const float* x, const float* weight, int n, float eps, float* y);
  void (*rotate)(float* x, const float* cosine, const float* sine, int half);
  void (*gate)(Gate kind, const float* gate, const float* up, int n, float* y);
  void (*quantize)(const float* x, int stride, int planes, int8_t* codes, float* scale, int32_t* sums);
  void (*row)(const Matrix& w, int row, float* out);
  // Rows [16 * first, 16 * last) of w times all tokens. `scratch` holds scratch_bytes(w).
  void (*product)(const Matrix& w, const Activations& x, int tokens, int first, int last, Output out, void* scratch);
  void (*dense)(const Matrix& w, const float* x, size_t stride, int tokens, int first, int last, Output out);
  void (*store)(CacheType type, const float* x, int n, void* out);
  // Adds the first `count` positions of a page; `query` is scaled and padded to the page's stride.
  void (*attend)(const Page& page, const float* query, int count, Gathered& so_far);
  // Rows [16 * first, 16 * last) of float32 weights (rows, columns padded to 32) to panels in the layout of `w`.
  void (*encode)(const Matrix& w, const float* weights, int first, int last, uint8_t* panels, uint16_t* segments,
                 float* row_scale, void* scratch);
};

inline size_t scratch_bytes(const Matrix& w) { return size_t(round_up(w.columns, kBlock)) * 2 * kPanel + 4096; }

// What `encode` needs: its tables as numbers, and a number a segment.
constexpr size_t kGridsBytes = 17 << 10;
inline size_t encode_scratch_bytes(const Matrix& w) { return kGridsBytes + size_t(w.segment_count()) * 4; }

// Best first; a null entry of a table is inherited from the next one in the list.
extern const Kernels avx512vnni_kernels, avx2_kernels, scalar_kernels;

const Kernels* find_kernels(const char* name);  // null: not built, or it cannot run here
const Kernels* best_kernels();
int kernel_count();
const Kernels& kernel_at(int i);

}  // namespace chalot
