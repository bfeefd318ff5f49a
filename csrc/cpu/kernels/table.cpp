// The table of this instruction set's kernels.

#include "numbers.h"

namespace rootfree::cpu::ROOTFREE_ISA {

bool rf_rmsprop(const DiagonalPiece&, const DiagonalNumbers&);
float share_norm(const Numbers&, const float*, int64_t, int64_t, float, bool);
void share_momentum(const Numbers&, const float*, int64_t, float);
float gather(const Matrix&, int64_t, int64_t, float, const Numbers&);
float momentum_tile(const MomentumUpdate&, int64_t, int64_t, float*);
void mirror_tile(const Numbers&, int64_t, int64_t, int64_t);
void transpose_tile(const Numbers&, const Numbers&, int64_t, int64_t, int64_t, int64_t);
void move_factor(const Stored&, const Numbers&, uint32_t, int64_t, float);
void weight_row(const WeightRow&, const WeightStep&);

const Kernels& table() {
  static constexpr Kernels kernels{rf_rmsprop,    share_norm,  share_momentum, gather,
                                   momentum_tile, mirror_tile, transpose_tile, move_factor, weight_row};
  return kernels;
}

}  // namespace rootfree::cpu::ROOTFREE_ISA
