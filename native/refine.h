// GPTQ's inner loop: columns rounded one after another, each one's error carried on to those behind it.
#pragma once
#include <cstdint>

namespace chalot {

// Values are `step * code - middle` with low <= code <= high; or, where there are `points`, the ascending values
// tables[(level % 128) * points + code], all with the other sign for levels from 128 on.
struct Steps {
  float step, middle, low, high;
  const float* tables;
  int points;
};

// Rows [first, last) of `n` columns. `w` comes as weights and goes as errors / upper's diagonal; `upper` is (n, n);
// `unit` and `levels` (rows, n) say what a value of 1 is worth and which table holds; `offset` (rows) is in no unit.
void round_columns(const Steps& steps, int n, int first, int last, float* w, const float* upper, const float* unit,
                   const float* offset, const uint8_t* levels, uint8_t* codes);

}  // namespace chalot
