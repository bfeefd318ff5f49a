// The schemas of torch.ops.rootfree_native: what rootfree_kernels/cpp_kernels.py and cuda_kernels.py call. Each device's
// kernels register themselves in cpu/ and cuda/.
//
// These operators are private. The public ones, torch.ops.rootfree, choose among backends.

#include <torch/library.h>

TORCH_LIBRARY(rootfree_native, m) {
  // Tables of addresses (rootfree_kernels/tables.py), for GPUs, which read them from their own memory. rows [n, 8] and
  // grads [n]: see csrc/cuda/rf_rmsprop.h; owners [programs]: whose tensor a program works on; counters [n]: zeros, and zeros again
  // afterwards. All else as in rootfree_kernels/eager/rf_rmsprop.py.
  m.def(
      "rf_rmsprop_table(Tensor rows, Tensor grads, Tensor owners, Tensor(a!) counters, Tensor seeds, Tensor steps, "
      "Tensor lr, Tensor grad_scale, Tensor found_inf, int seed_stride, int step_stride, float step, float lr_value, "
      "float sign, float decay, float growth, float momentum, float damping, float weight_decay, "
      "float decoupled_decay, ScalarType param, ScalarType grad, ScalarType square, ScalarType buffer, "
      "int rounding, int weight_rounding) -> ()");
  // The same for both, CPUs too: sides [sides, 8]: addresses of m and delta; numbers of a block, of its last axis, of a share; shares of a block;
  // number of programs; first program. sums [programs]: for the kernels' use. clips [sides, L]: the result.
  m.def(
      "clipped_momentum(Tensor sides, Tensor owners, Tensor(a!) sums, Tensor found_inf, Tensor(b!) clips, "
      "float riemannian_momentum, ScalarType dtype, int clip) -> ()");
  // These have the arguments of their namesakes in rootfree_kernels/eager.
  m.def(
      "rf_rmsprop(Tensor(a0!)[] params, Tensor(a1!)[] squares, Tensor(a2!)[] buffers, Tensor(a3!)[] skipped, "
      "Tensor(a4!)[] square_residuals, Tensor(a5!)[] weight_residuals, Tensor[] grads, Tensor lr, Tensor seeds, "
      "Tensor steps, Tensor? grad_scale, Tensor? found_inf, float batch_size, float beta2, float gamma, "
      "float momentum, float damping, float weight_decay, bool decoupled, bool maximize, str rounding, "
      "str weight_rounding) -> ()");
  m.def(
      "kron_gather(Tensor[] grads, int[] tiles, int rows, int cols, Tensor[] factors, Tensor? grad_scale, "
      "ScalarType dtype, bool maximize) -> (Tensor, Tensor)");
  m.def(
      "kron_factor(Tensor(a0!) factor_c, Tensor(a1!) factor_k, Tensor(a2!) momentum_c, Tensor(a3!) momentum_k, "
      "Tensor(a4!)? residual_c, Tensor(a5!)? residual_k, Tensor(a6!)? product_c, Tensor(a7!)? product_k, Tensor grad, "
      "Tensor squares, Tensor seeds, Tensor steps, Tensor? found_inf, float batch_size, float beta2, "
      "float riemannian_momentum, float damping, float gamma, str clip, str rounding) -> Tensor");
  m.def("kron_products(Tensor factor_c, Tensor factor_k, ScalarType dtype) -> (Tensor, Tensor)");
  m.def(
      "kron_step(Tensor(a0!)[] params, Tensor(a1!)[] buffers, Tensor(a2!)[] residuals, int[] tiles, "
      "Tensor(a3!) skipped, Tensor factor_c, Tensor factor_k, Tensor(a4!) grad, Tensor squares, Tensor lr, Tensor? ok, "
      "Tensor seeds, Tensor steps, Tensor? found_inf, bool cached, float momentum, float weight_decay, bool decoupled, "
      "str rounding) -> ()");
}

// Autograd has no part in them. Without this it would walk through all arguments of every call, to find that out.
TORCH_LIBRARY_IMPL(rootfree_native, Autograd, m) {
  for (const char* name : {"rf_rmsprop_table", "clipped_momentum", "rf_rmsprop", "kron_gather", "kron_factor",
                           "kron_products", "kron_step"}) {
    m.impl(name, torch::CppFunction::makeFallthrough());
  }
}
