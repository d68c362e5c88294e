// AVX2's kernels where the processor multiplies and adds bytes in one instruction (AVX-VNNI): compiled with that.
#include "avx2.cpp"
