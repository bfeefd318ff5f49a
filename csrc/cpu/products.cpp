// Products go to PyTorch's BLAS, but large FP32 products go to oneDNN on AVX-512 processors that are not Intel's. MKL
// uses narrower instructions on those, and oneDNN was twice as fast on an AMD processor. To compare the two, set
// ROOTFREE_ONEDNN=0 in the environment.
//
// oneDNN's product is in PyTorch's library, but in none of its headers. It is declared as a weak symbol, which is null
// if the library lacks it.

#include "products.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <cstdlib>

#include "tensors.h"

#if defined(__GNUC__) && defined(__x86_64__)
namespace at::native {
// result <- alpha A B + beta result
__attribute__((weak)) void mkldnn_matmul(const Tensor& a, const Tensor& b, const Tensor& result, float beta,
                                         float alpha);
}  // namespace at::native
#endif

namespace rootfree::cpu {
namespace {

constexpr int64_t onednn_min = 128 * 128 * 128;  // smaller products are not worth oneDNN's set-up

// Rows up to which a symmetric product is computed as a full one, since skipping half of it would save no time.
int64_t max_full_rows(const at::Tensor& a) { return a.scalar_type() == at::kFloat ? 256 : 384; }

// Rows up to which the recursion of `lower_product` computes a diagonal block as a full product.
int64_t max_leaf_rows(const at::Tensor& a) { return a.scalar_type() == at::kFloat ? 128 : 256; }

#if defined(__GNUC__) && defined(__x86_64__)
// Return whether large products go to oneDNN. ROOTFREE_ONEDNN=0 in the environment prevents it.
bool find_onednn() {
  const char* wanted = std::getenv("ROOTFREE_ONEDNN");
  __builtin_cpu_init();
  return at::native::mkldnn_matmul != nullptr && !__builtin_cpu_is("intel") && at::get_cpu_capability() == "AVX512" &&
         !(wanted && wanted[0] == '0');
}

// Write A B to `out` by oneDNN. Return false, and write nothing, if oneDNN is missing or not worth it.
bool multiply_by_onednn(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out) {
  static const bool has_onednn = find_onednn();
  if (!has_onednn || !at::globalContext().userEnabledMkldnn() || a.scalar_type() != at::kFloat ||
      a.size(-2) * a.size(-1) * b.size(-1) < onednn_min) {
    return false;
  }
  at::native::mkldnn_matmul(a, b, out, 0.0f, 1.0f);
  return true;
}
#else
bool multiply_by_onednn(const at::Tensor&, const at::Tensor&, const at::Tensor&) { return false; }
#endif

// Write A B to `out`, for matrices or batches of matrices.
void multiply(const at::Tensor& a, const at::Tensor& b, at::Tensor out) {
  if (!multiply_by_onednn(a, b, out)) {
    a.dim() == 2 ? at::mm_out(out, a, b) : at::bmm_out(out, a, b);
  }
}

// Return X' [L, n, m] as a contiguous tensor.
at::Tensor transposed(const at::Tensor& view) {  // X [L, m, n]
  const at::Tensor x = view.contiguous();
  const at::Tensor out = at::empty({x.size(0), x.size(2), x.size(1)}, x.options());
  const Kernels& k = kernels();
  const int64_t rows = x.size(1), cols = x.size(2), down = num_tiles(rows), across = num_tiles(cols);
  const TypedPointer source = pointer_to(x), target = pointer_to(out);
  at::parallel_for(0, x.size(0) * down * across, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t start = i / (down * across) * rows * cols, tile = i % (down * across);
      k.transpose_tile(source.offset(start), target.offset(start), rows, cols, tile / across, tile % across);
    }
  });
  return out;
}

// Write the lower triangle of A A' to `out`: the lower left quarter by one product, the diagonal quarters by recursion.
// A must be contiguous, since the library would copy it at every product otherwise.
void lower_product(const at::Tensor& a,      // [m, k]
                   const at::Tensor& out) {  // [m, m]
  const int64_t rows = a.size(0), half = (rows / 2 + 31) / 32 * 32;
  if (rows <= max_leaf_rows(a)) {
    return multiply(a, a.t(), out);
  }
  const at::Tensor upper = a.narrow(0, 0, half), lower = a.narrow(0, half, rows - half);
  const at::Tensor bottom = out.narrow(0, half, rows - half);
  multiply(lower, upper.t(), bottom.narrow(1, 0, half));
  lower_product(upper, out.narrow(0, 0, half).narrow(1, 0, half));
  lower_product(lower, bottom.narrow(1, half, rows - half));
}

// Write A A' to `out`. Only the lower triangles of the result are defined.
void lower_products(const at::Tensor& a,      // [L, m, k]
                    const at::Tensor& out) {  // [L, m, m]
  if (a.size(1) <= max_full_rows(a)) {
    return multiply(a, a.mT(), out);
  }
  const at::Tensor x = a.is_contiguous() ? a : transposed(a.mT());
  for (int64_t block = 0; block < a.size(0); ++block) {
    lower_product(x[block], out[block]);
  }
}

// Copy the lower triangles of X [L, n, n] to the upper ones.
void mirror(const at::Tensor& x) {
  const Kernels& k = kernels();
  const int64_t n = x.size(-1), tiles = num_tiles(n);
  const TypedPointer all = pointer_to(x);
  at::parallel_for(0, x.size(0) * tiles, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const TypedPointer matrix = all.offset(i / tiles * n * n);
      for (int64_t tile_col = 0; tile_col <= i % tiles; ++tile_col) {
        k.mirror_tile(matrix, n, i % tiles, tile_col);
      }
    }
  });
}

}  // namespace

at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor out = at::empty({a.size(0), a.size(1), b.size(2)}, a.options());
  multiply(a, b, out);
  return out;
}

at::Tensor symmetric_product(const at::Tensor& a) {
  const at::Tensor out = at::empty({a.size(0), a.size(1), a.size(1)}, a.options());
  lower_products(a, out);
  return out;
}

void symmetric_product(const at::Tensor& a, const at::Tensor& out) {
  lower_products(a, out);
  mirror(out);
}

}  // namespace rootfree::cpu
