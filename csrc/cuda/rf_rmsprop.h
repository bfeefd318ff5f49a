// The launcher of rf_rmsprop. It does not depend on PyTorch, so that nvcc alone can check it.
//
// A program is a CUDA thread block: "block" always means a block of a matrix in this project.

#pragma once

#include "../rf_rmsprop.h"
#include "dtypes.h"

namespace rootfree::cuda {

// A row of the table of tensors: one parameter and its state.
struct DiagonalRow {
  int64_t param, square, buffer, square_residual, weight_residual, skipped;  // addresses, 0 for a missing residual
  int64_t size;           // elements of each tensor but `skipped`, which has one
  int64_t first_program;  // index of the first program that works on them
};

// Elements of one tensor that a program works on.
constexpr int kDiagonalChunk = 2048;

// The arguments of the kernel. Pointers are to device memory. The scalars are explained in csrc/rf_rmsprop.h.
struct DiagonalArguments {
  const DiagonalRow* rows;       // [n]
  const int64_t* grads;          // [n]: addresses
  const int32_t* owners;         // [programs]: index of the tensor that a program works on
  unsigned long long* counters;  // [n]: lower half: finished programs; upper half: those that skipped elements
  const int32_t* seeds;          // seeds[i * seed_stride] is tensor i's; read only for stochastic rounding
  const int64_t* steps;          // step + steps[i * step_stride] is tensor i's; likewise
  const float* lr;               // the learning rate is lr_value + *lr
  const float* grad_scale;       // [1]: gradients are divided by it
  const float* found_inf;        // [1]: not 0 skips every element
  int64_t seed_stride, step_stride, step;
  float lr_value;
  float sign;  // -1 to maximize
  float decay, growth, momentum, damping, weight_decay;
  float decoupled_decay;               // kappa if weight decay is decoupled, else 0; weight_decay is 0 or kappa
  Rounding rounding, weight_rounding;  // of s and of the parameters, if they are BF16
};

struct DiagonalDtypes {
  Dtype param, grad, square, buffer;
};

// Return whether a kernel exists for these dtypes. Parameters may be FP32, BF16 or FP16. Gradients may have the
// parameters' dtype or FP32, or BF16 if parameters are FP32. s and m may be FP32 or BF16.
bool is_supported(const DiagonalDtypes& dtypes);

// Step all tensors in place, in one launch. Return cudaErrorInvalidValue for dtypes that are not supported.
cudaError_t rf_rmsprop(const DiagonalArguments& arguments, const DiagonalDtypes& dtypes, int64_t programs,
                       cudaStream_t stream);

}  // namespace rootfree::cuda
