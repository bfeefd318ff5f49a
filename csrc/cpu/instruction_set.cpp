// The choice among the kernels that were compiled for several instruction sets; setup.py defines which there are.

#include <ATen/Version.h>

#include <string>

#include "kernels.h"

namespace rootfree::cpu {

namespace isa_default {
const Kernels& table();
}
namespace isa_avx2 {
const Kernels& table();
}
namespace isa_avx512 {
const Kernels& table();
}

static const Kernels& best() {
  [[maybe_unused]] const std::string capability = at::get_cpu_capability();
#ifdef ROOTFREE_WITH_AVX512
  if (capability == "AVX512") {
    return isa_avx512::table();
  }
#endif
#ifdef ROOTFREE_WITH_AVX2
  if (capability == "AVX2" || capability == "AVX512") {
    return isa_avx2::table();
  }
#endif
  return isa_default::table();
}

const Kernels& kernels() {
  static const Kernels& chosen = best();
  return chosen;
}

}  // namespace rootfree::cpu
