// The choice among the kernels of several instruction sets. setup.py defines a macro for each set that was compiled.

#include <ATen/Version.h>

#include <string>

#include "kernels.h"

namespace rootfree::cpu {

namespace isa_default {
const Kernels& kernel_table();
}
namespace isa_avx2 {
const Kernels& kernel_table();
}
namespace isa_avx512 {
const Kernels& kernel_table();
}

// Return the kernels of the widest instruction set that was compiled and that PyTorch reports for this processor.
static const Kernels& best_kernels() {
  [[maybe_unused]] const std::string capability = at::get_cpu_capability();
#ifdef ROOTFREE_WITH_AVX512
  if (capability == "AVX512") {
    return isa_avx512::kernel_table();
  }
#endif
#ifdef ROOTFREE_WITH_AVX2
  if (capability == "AVX2" || capability == "AVX512") {
    return isa_avx2::kernel_table();
  }
#endif
  return isa_default::kernel_table();
}

const Kernels& kernels() {
  static const Kernels& chosen = best_kernels();
  return chosen;
}

}  // namespace rootfree::cpu
