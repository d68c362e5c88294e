// From what the processor and the operating system allow to the best table of kernels.
#include <cstring>
#include <vector>

#include "kernels.h"

namespace chalot {
namespace {

template <class Entry>
void inherit(Entry& own, const Entry& next) {
  if (!own) own = next;
}

std::vector<Kernels> complete_tables() {
  std::vector<Kernels> tables{
#if defined(__x86_64__) || defined(_M_X64)
      amx_kernels, avx512vnni_kernels, avxvnni_kernels, avx2_kernels,
#elif defined(__aarch64__)
      neon_kernels,
#endif
      scalar_kernels};
  for (size_t i = tables.size() - 1; i-- > 0;) {
    Kernels &own = tables[i], &next = tables[i + 1];
    inherit(own.exp, next.exp);
    inherit(own.rms_norm, next.rms_norm);
    inherit(own.rotate, next.rotate);
    inherit(own.spread, next.spread);
    inherit(own.gate, next.gate);
    inherit(own.quantize, next.quantize);
    inherit(own.row, next.row);
    inherit(own.product, next.product);
    inherit(own.dense, next.dense);
    inherit(own.top, next.top);
    inherit(own.store, next.store);
    inherit(own.attend, next.attend);
    inherit(own.merge, next.merge);
    inherit(own.encode, next.encode);
  }
  return tables;
}

const std::vector<Kernels>& tables() {
  static const std::vector<Kernels> all = complete_tables();
  return all;
}

}  // namespace

int kernel_count() { return int(tables().size()); }
const Kernels& kernel_at(int i) { return tables()[size_t(i)]; }

const Kernels* find_kernels(const char* name) {
  for (const Kernels& k : tables())
    if (!std::strcmp(k.name, name) && k.runs_here()) return &k;
  return nullptr;
}

const Kernels* best_kernels() {
  for (const Kernels& k : tables())
    if (k.runs_here()) return &k;
  return nullptr;
}

}  // namespace chalot
