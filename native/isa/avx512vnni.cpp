#include "avx512.h"

namespace {
bool runs() { return has_avx512vnni(); }
}  // namespace

#include "loops.h"

namespace chalot {
extern const Kernels avx512vnni_kernels = table("avx512vnni", runs);
}
