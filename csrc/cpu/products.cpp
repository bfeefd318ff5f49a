// Large FP32 products go to oneDNN where MKL would take a lesser instruction set than the processor has: on AVX-512
// processors that are not Intel's. On one of AMD's, oneDNN was twice as fast (`python -m bench.cpu_step`). PyTorch has
// oneDNN's product in its library and in no header, hence the weak declaration: where it is not, it is null.

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

constexpr int64_t onednn_min = 128 * 128 * 128;  // multiplications that are worth oneDNN's set-up

// Rows up to which a symmetric product is taken whole, since halves would take as long: at the outset, and of a half.
int64_t largest_whole(const at::Tensor& a) { return a.scalar_type() == at::kFloat ? 256 : 384; }
int64_t leaf(const at::Tensor& a) { return a.scalar_type() == at::kFloat ? 128 : 256; }

#if defined(__GNUC__) && defined(__x86_64__)
// ROOTFREE_ONEDNN=0 leaves products to the BLAS.
bool find_onednn() {
  const char* wanted = std::getenv("ROOTFREE_ONEDNN");
  __builtin_cpu_init();
  return at::native::mkldnn_matmul != nullptr && !__builtin_cpu_is("intel") &&
         at::get_cpu_capability() == "AVX512" && !(wanted && wanted[0] == '0');
}

bool multiply_by_onednn(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out) {
  static const bool there = find_onednn();
  if (!there || !at::globalContext().userEnabledMkldnn() || a.scalar_type() != at::kFloat || a.size(-2) * a.size(-1) * b.size(-1) < onednn_min) {
    return false;
  }
  at::native::mkldnn_matmul(a, b, out, 0.0f, 1.0f);
  return true;
}
#else
bool multiply_by_onednn(const at::Tensor&, const at::Tensor&, const at::Tensor&) { return false; }
#endif

void multiply(const at::Tensor& a, const at::Tensor& b, at::Tensor out) {
  if (!multiply_by_onednn(a, b, out)) {
    a.dim() == 2 ? at::mm_out(out, a, b) : at::bmm_out(out, a, b);
  }
}

// X' [L, n, m] of X [L, m, n], as a tensor of its own.
at::Tensor transposed(const at::Tensor& view) {
  const at::Tensor x = view.contiguous();
  const at::Tensor out = at::empty({x.size(0), x.size(2), x.size(1)}, x.options());
  const Kernels& k = kernels();
  const int64_t rows = x.size(1), cols = x.size(2), down = num_tiles(rows), across = num_tiles(cols);
  const Numbers source = numbers_of(x), target = numbers_of(out);
  at::parallel_for(0, x.size(0) * down * across, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t start = i / (down * across) * rows * cols, tile = i % (down * across);
      k.transpose_tile(source.from(start), target.from(start), rows, cols, tile / across, tile % across);
    }
  });
  return out;
}

// The lower triangle of A A' into `out` [m, m], of A [m, k] without gaps (the library would copy others).
void lower_product(const at::Tensor& a, const at::Tensor& out) {
  const int64_t rows = a.size(0), half = (rows / 2 + 31) / 32 * 32;
  if (rows <= leaf(a)) {
    return multiply(a, a.t(), out);
  }
  const at::Tensor upper = a.narrow(0, 0, half), lower = a.narrow(0, half, rows - half);
  const at::Tensor bottom = out.narrow(0, half, rows - half);
  multiply(lower, upper.t(), bottom.narrow(1, 0, half));
  lower_product(upper, out.narrow(0, 0, half).narrow(1, 0, half));
  lower_product(lower, bottom.narrow(1, half, rows - half));
}

// The lower triangles, at least, of A A' into `out`.
void lower_products(const at::Tensor& a, const at::Tensor& out) {
  if (a.size(1) <= largest_whole(a)) {
    return multiply(a, a.mT(), out);
  }
  const at::Tensor x = a.is_contiguous() ? a : transposed(a.mT());
  for (int64_t block = 0; block < a.size(0); ++block) {
    lower_product(x[block], out[block]);
  }
}

// Write the mirror image of the lower triangles of X [L, n, n] into their upper ones.
void mirror(const at::Tensor& x) {
  const Kernels& k = kernels();
  const int64_t n = x.size(-1), tiles = num_tiles(n);
  const Numbers all = numbers_of(x);
  at::parallel_for(0, x.size(0) * tiles, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Numbers matrix = all.from(i / tiles * n * n);
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
