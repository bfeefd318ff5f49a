// The schemas of torch.ops.rootfree_native, the private operators of the C++ and CUDA backends.
//
// The public operators, torch.ops.rootfree (rootfree_kernels/ops/), choose a backend and call these.
//
// To add an operator:
//   1. Declare its schema here, and list its name at the end of this file.
//   2. Write its kernels in csrc/<device>/<stem>.cpp (.cu for CUDA) and register them with TORCH_LIBRARY_IMPL: in the
//      same file for CPUs, in csrc/cuda/operators.cpp for CUDA. Loops that should use the widest vector instructions
//      of a CPU go into csrc/cpu/kernels/<stem>.cpp; csrc/cpu/kernels.h and kernels/kernel_table.cpp list them.
//   3. Call it from Python in rootfree_kernels/native/<device>.py.
// The stem is the operator's name. It names the operator's files in every backend.

#include <torch/library.h>

TORCH_LIBRARY(rootfree_native, m) {
  // ---- operators that take tables of addresses ----------------------------------------------------------------------
  // rootfree_kernels/pointer_tables/tables.py makes the tables, rootfree_kernels/native/table_calls.py passes them.
  // A program is a unit of work of a launch: a thread block in CUDA, an iteration of a parallel loop on a CPU.

  // CUDA only. The update of rootfree_kernels/eager/rf_rmsprop.py over n tensors.
  //   rows      int64 [n, 8]: addresses and sizes, the columns of DiagonalRow in csrc/cuda/rf_rmsprop.h
  //   grads     int64 [n]: addresses of the gradients
  //   owners    int32 [programs]: index of the tensor that a program works on
  //   counters  int64 [n]: scratch memory, zero before and after the call
  //   seeds, steps: int32 and int64; element i * seed_stride (or i * step_stride) belongs to tensor i
  //   lr, grad_scale, found_inf: float32 [1], on the device
  m.def(
      "rf_rmsprop_table(Tensor rows, Tensor grads, Tensor owners, Tensor(a!) counters, Tensor seeds, Tensor steps, "
      "Tensor lr, Tensor grad_scale, Tensor found_inf, int seed_stride, int step_stride, int step, float lr_value, "
      "float sign, float decay, float growth, float momentum, float damping, float weight_decay, "
      "float decoupled_decay, ScalarType param, ScalarType grad, ScalarType square, ScalarType buffer, "
      "int rounding, int weight_rounding) -> ()");
  // CPU and CUDA. The update of rootfree_kernels/eager/clipped_momentum.py. A side is one of the two Kronecker factors
  // of a batch of L blocks. A share is the contiguous part of one block that one program works on.
  //   sides   int64 [sides, 8]: address of m, address of delta, elements of a block, elements of its last axis,
  //           elements of a share, shares of a block, number of programs, index of the first program
  //   owners  int32 [programs]: index of the side that a program works on
  //   sums    float32 [programs]: scratch memory for partial norms
  //   clips   float32 [sides, L]: output, the factor by which the step of a block is scaled
  m.def(
      "clipped_momentum(Tensor sides, Tensor owners, Tensor(a!) sums, Tensor found_inf, Tensor(b!) clips, "
      "float riemannian_momentum, ScalarType dtype, int clip) -> ()");

  // ---- operators that take tensors, CPU only ------------------------------------------------------------------------
  // Each has the flat arguments of torch.ops.rootfree.<name>, without the name of the backend.
  m.def(
      "rf_rmsprop(Tensor(a0!)[] params, Tensor(a1!)[] squares, Tensor(a2!)[] buffers, Tensor(a3!)[] skipped, "
      "Tensor(a4!)[] square_residuals, Tensor(a5!)[] weight_residuals, Tensor[] grads, Tensor lr, Tensor seeds, "
      "Tensor steps, Tensor? grad_scale, Tensor? found_inf, float batch_size, float beta2, float gamma, "
      "float momentum, float damping, float weight_decay, bool decoupled, bool maximize, str rounding, "
      "str weight_rounding) -> ()");
  m.def(
      "scaled_rmsprop(Tensor(a0!)[] params, Tensor(a1!)[] squares, Tensor(a2!)[] buffers, Tensor(a3!)[] skipped, "
      "Tensor(a4!)[] curvatures, Tensor(a5!)[] square_residuals, Tensor(a6!)[] weight_residuals, "
      "Tensor? update_norms, Tensor[] grads, Tensor lr, Tensor seeds, Tensor steps, Tensor? grad_scale, "
      "Tensor? found_inf, float batch_size, float beta2, float gamma, float momentum, float damping, "
      "float weight_decay, bool decoupled, bool maximize, str rounding, str weight_rounding, str direction, "
      "bool relative_damping, str momentum_on, bool nesterov) -> ()");
  m.def(
      "kron_gather(Tensor[] grads, int[] tiles, int rows, int cols, Tensor[] factors, Tensor? grad_scale, "
      "ScalarType dtype, bool maximize) -> (Tensor, Tensor)");
  m.def(
      "kron_factor(Tensor(a0!) factor_c, Tensor(a1!) factor_k, Tensor(a2!) momentum_c, Tensor(a3!) momentum_k, "
      "Tensor(a4!)? residual_c, Tensor(a5!)? residual_k, Tensor(a6!)? product_c, Tensor(a7!)? product_k, "
      "Tensor(a8!)? curvature, Tensor grad, Tensor squares, Tensor seeds, Tensor steps, Tensor? found_inf, "
      "float batch_size, float beta2, float riemannian_momentum, float damping, float gamma, str clip, str rounding, "
      "str direction, bool relative_damping, str factor_init) -> Tensor");
  m.def("kron_products(Tensor factor_c, Tensor factor_k, ScalarType dtype) -> (Tensor, Tensor)");
  m.def(
      "kron_step(Tensor(a0!)[] params, Tensor(a1!)[] buffers, Tensor(a2!)[] residuals, int[] tiles, "
      "Tensor(a3!) skipped, Tensor? update_norms, Tensor factor_c, Tensor factor_k, Tensor(a4!) grad, Tensor squares, "
      "Tensor lr, Tensor? ok, Tensor seeds, Tensor steps, Tensor? found_inf, bool cached, float momentum, "
      "float weight_decay, bool decoupled, str rounding, str momentum_on, bool nesterov) -> ()");
}

// These operators are not differentiable. Falling through spares autograd a search of all arguments at every call.
TORCH_LIBRARY_IMPL(rootfree_native, Autograd, m) {
  for (const char* name : {"rf_rmsprop_table", "clipped_momentum", "rf_rmsprop", "scaled_rmsprop", "kron_gather",
                           "kron_factor", "kron_products", "kron_step"}) {
    m.impl(name, torch::CppFunction::makeFallthrough());
  }
}
