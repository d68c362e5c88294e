// What this processor has and the operating system saves (CPUID leaves 1, 7; XCR0).
#pragma once
#include <cstdint>

namespace chalot {
bool has_avx2();
bool has_avx512vnni();
}  // namespace chalot
