#include "cpu.h"
#ifdef __aarch64__
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace chalot {
namespace {

bool find_neon_dot_product() {
#if defined(__linux__)
  constexpr unsigned long kAsimdDp = 1ul << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & kAsimdDp;
#elif defined(__APPLE__)
  int found = 0;
  size_t size = sizeof found;
  return !sysctlbyname("hw.optional.arm.FEAT_DotProd", &found, &size, nullptr, 0) && found;
#else
  return false;
#endif
}

}  // namespace

bool has_neon_dot_product() {
  static const bool found = find_neon_dot_product();
  return found;
}

}  // namespace chalot
#endif
