// The kernels of this instruction set, collected for cpu/instruction_set.cpp to choose from.

#include "load_store.h"

namespace rootfree::cpu::ROOTFREE_ISA {

bool rf_rmsprop(const DiagonalChunk&, const DiagonalScalars&);
float share_norm(const TypedPointer&, const float*, int64_t, int64_t, float, bool);
void share_momentum(const TypedPointer&, const float*, int64_t, float);
float gather(const Matrix&, int64_t, int64_t, float, const TypedPointer&);
float momentum_tile(const MomentumUpdate&, int64_t, int64_t, float*);
void mirror_tile(const TypedPointer&, int64_t, int64_t, int64_t);
void transpose_tile(const TypedPointer&, const TypedPointer&, int64_t, int64_t, int64_t, int64_t);
void update_factor(const Stored&, const TypedPointer&, uint32_t, int64_t, float);
void step_weight_row(const WeightRow&, const WeightScalars&);

const Kernels& kernel_table() {
  static constexpr Kernels kernels{rf_rmsprop,  share_norm,     share_momentum, gather,         momentum_tile,
                                   mirror_tile, transpose_tile, update_factor,  step_weight_row};
  return kernels;
}

}  // namespace rootfree::cpu::ROOTFREE_ISA
