// The launchers of csrc/cuda as C functions, which Python's ctypes can call.

#include <cuda_runtime.h>

#include "../../../csrc/cuda/clipped_momentum.h"
#include "../../../csrc/cuda/rf_rmsprop.h"

using namespace rootfree::cuda;

extern "C" {

int chunk() { return kDiagonalChunk; }
int sizeof_diagonal() { return sizeof(DiagonalArguments); }
int sizeof_momentum() { return sizeof(MomentumArguments); }

int num_launches() { return cuda_on_cpu::num_launches; }
void run_backwards(int yes) { cuda_on_cpu::run_backwards = yes != 0; }

int rf_rmsprop(const DiagonalArguments* arguments, const DiagonalDtypes* dtypes, int64_t programs) {
  return rootfree::cuda::rf_rmsprop(*arguments, *dtypes, programs, nullptr);
}

int clipped_momentum(const MomentumArguments* arguments, int dtype, int clip, int64_t programs) {
  return rootfree::cuda::clipped_momentum(*arguments, static_cast<Dtype>(dtype), static_cast<Clip>(clip), programs,
                                          nullptr);
}

}  // extern "C"
