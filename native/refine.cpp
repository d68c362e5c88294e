// Every operation as in chalot/quant/refine.py, so both find the same codes.
#include "refine.h"

namespace chalot {
namespace {

struct Rounded {
  int code;
  float value;
};

// To the nearest whole number, ties to even; |x| < 2^22.
inline float whole(float x) {
  constexpr float big = 0x1.8p23f;
  return (x + big) - big;
}

inline Rounded round_in_steps(const Steps& s, float v) {
  float x = (v + s.middle) / s.step;
  x = x > s.low ? x : s.low;
  x = whole(x < s.high ? x : s.high);
  return {int(x), x * s.step - s.middle};
}

inline Rounded round_in_table(const Steps& s, float v, int level) {
  const float* t = s.tables + (level & 127) * s.points;
  const float sign = level > 127 ? -1.0f : 1.0f, x = v * sign;
  int code = 0;
  for (int i = 0; i + 1 < s.points; i++) code += x > (t[i] + t[i + 1]) * 0.5f;
  return {code, t[code] * sign};
}

}  // namespace

void round_columns(const Steps& steps, int n, int first, int last, float* w, const float* upper, const float* unit,
                   const float* offset, const uint8_t* levels, uint8_t* codes) {
  for (int r = first; r < last; r++) {
    const int64_t at = int64_t(r) * n;
    float* row = w + at;
    for (int i = 0; i < n; i++) {
      const float one = unit[at + i], v = one > 0 ? (row[i] - offset[r]) / one : 0.0f;
      const Rounded q = steps.tables ? round_in_table(steps, v, levels[at + i]) : round_in_steps(steps, v);
      codes[at + i] = uint8_t(q.code);
      const float* u = upper + int64_t(i) * n;
      const float error = (row[i] - (q.value * one + offset[r])) / u[i];
      row[i] = error;
      for (int k = i + 1; k < n; k++) row[k] -= u[k] * error;
    }
  }
}

}  // namespace chalot
