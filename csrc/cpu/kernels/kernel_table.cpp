// The kernels of this instruction set, collected for cpu/instruction_set.cpp to choose from.

#include "load_store.h"

namespace rootfree::cpu::ROOTFREE_ISA {

bool rf_rmsprop(const DiagonalChunk&, const DiagonalScalars&);
double gradient_squares(const DiagonalChunk&, float);
double scaled_squares(const DiagonalChunk&, const ScaledScalars&);
bool scaled_rmsprop(const DiagonalChunk&, const ScaledScalars&);
float share_norm(const TypedPointer&, const float*, int64_t, int64_t, float, bool);
void share_momentum(const TypedPointer&, const float*, int64_t, float);
float gather(const Matrix&, int64_t, int64_t, float, const TypedPointer&);
float momentum_tile(const MomentumUpdate&, int64_t, int64_t, float*);
void mirror_tile(const TypedPointer&, int64_t, int64_t, int64_t);
void transpose_tile(const TypedPointer&, const TypedPointer&, int64_t, int64_t, int64_t, int64_t);
void update_factor(const Stored&, const TypedPointer&, uint32_t, int64_t, float);
void update_symmetric_tile(const Stored&, const TypedPointer&, int64_t, int64_t, int64_t, float);
void average_gradient_row(const GradientRow&, float, bool);
float direction_squares(const TypedPointer&, int64_t);
bool step_weight_row(const WeightRow&, const WeightScalars&);

const Kernels& kernel_table() {
  static constexpr Kernels kernels{
      rf_rmsprop,  gradient_squares, scaled_squares, scaled_rmsprop, share_norm,    share_momentum,
      gather,      momentum_tile,    mirror_tile,    transpose_tile, update_factor, update_symmetric_tile,
      average_gradient_row, direction_squares, step_weight_row};
  return kernels;
}

}  // namespace rootfree::cpu::ROOTFREE_ISA
