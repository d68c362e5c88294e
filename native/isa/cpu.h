// What this processor has and the operating system saves (x86: CPUID leaves 1, 7; XCR0. ARM: what the system says).
#pragma once
#include <cstdint>

namespace chalot {
bool has_avx2();
bool has_avxvnni();
bool has_avx512vnni();
bool has_amx();
bool has_neon_dot_product();
}  // namespace chalot
