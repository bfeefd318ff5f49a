// The launcher of the diagonal step of a list of tensors. Nothing of PyTorch is needed to compile it.

#pragma once

#include "../rf_rmsprop.h"
#include "dtypes.h"

namespace rootfree::cuda {

// A row of the table of tensors: addresses, how many numbers they have, and the first program that works on them.
struct DiagonalRow {
  int64_t param, square, buffer, square_residual, weight_residual, skipped, size, first_program;
};

// Numbers of one tensor that a program works on.
constexpr int kDiagonalChunk = 2048;

// What the kernel reads, all of it on the device but for the numbers here.
struct DiagonalArguments {
  const DiagonalRow* rows;       // [n]
  const int64_t* grads;          // [n]: addresses
  const int32_t* owners;         // [programs]: whose tensor a program works on
  unsigned long long* counters;  // [n]: programs that finished, and, in the upper half, those that left numbers out
  const int32_t* seeds;          // of tensor i: seeds[i * seed_stride]; read only where random bits are drawn,
  const float* steps;            // as is step + steps[i * step_stride]
  const float* lr;               // the learning rate is lr_value + *lr
  const float* grad_scale;
  const float* found_inf;
  int64_t seed_stride, step_stride;
  float step, lr_value;
  float sign;  // -1 to maximize
  float decay, growth, momentum, damping, weight_decay;
  float decoupled_decay;
  Rounding rounding, weight_rounding;  // of s and of the parameters, where these are BF16
};

struct DiagonalDtypes {
  Dtype param, grad, square, buffer;
};

// Whether there is a kernel: parameters FP32, BF16, FP16; gradients of the same or FP32, and BF16 next to FP32
// parameters; s and m FP32 or BF16.
bool is_served(const DiagonalDtypes& dtypes);

// One step, in place, in one launch; cudaErrorInvalidValue of dtypes that are not served.
cudaError_t rf_rmsprop(const DiagonalArguments& arguments, const DiagonalDtypes& dtypes, int64_t programs,
                       cudaStream_t stream);

}  // namespace rootfree::cuda
