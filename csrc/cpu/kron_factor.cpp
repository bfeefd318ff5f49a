// torch.ops.rootfree_native.kron_factor and kron_products on a CPU.
//
//     A = C'GK,    m <- alpha2 m + (1 - alpha2) delta,    C <- C - beta2 / max(1, |m|) C m,    P_C = CC'
//     delta_C = 1/2 [(B/d) AA' + (lambda/d) |K|^2 C'C - gamma I]
//
// K is updated likewise, with A' and p in place of A and d (rootfree_kernels/eager/kron_factor.py). PyTorch's libraries
// compute the products; between two products there is one pass over memory. The new m is a separate tensor until the
// momenta of both factors of a block are known to be finite.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "packing.h"
#include "products.h"
#include "slices.h"
#include "tensors.h"

namespace rootfree::cpu {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// The options of the operator, in FP32. `clips` and `row_sum` say which norm clips m, `overflow` skips every block.
struct Options {
  float batch_size, beta2, riemannian_momentum, damping, gamma;
  bool clips, row_sum, overflow;
  c10::string_view rounding;
};

// C (or K) of some blocks and the state that belongs to it.
struct FactorState {
  at::Tensor factor;        // [L, n, n]
  at::Tensor momentum;      // [L, n, n], or packed (packing.h)
  OptionalTensor residual;  // int16 [L, n, n], for compensated rounding
  OptionalTensor product;   // P_C [L, n, n], a cache that is written if it is there
  Slot slot;

  // Return the state of `length` blocks.
  FactorState narrow(int64_t first, int64_t length) const {
    const auto part = [&](const OptionalTensor& x) { return x ? OptionalTensor(x->narrow(0, first, length)) : x; };
    return {factor.narrow(0, first, length), momentum.narrow(0, first, length), part(residual), part(product), slot};
  }
};

// Call f(block, tile, row, col) for the tiles of the lower triangles of a batch of n x n matrices, in parallel. `tile`
// counts the tiles of a block row by row; (row, col) is its place, in tiles.
template <typename F>
void for_lower_tiles(int64_t num_blocks, int64_t n, const F& f) {
  const int64_t tiles = num_tiles(n), per_block = tiles * (tiles + 1) / 2;
  at::parallel_for(0, num_blocks * per_block, 16, [&](int64_t begin, int64_t end) {
    int64_t row = 0, col = begin % per_block;
    while (col > row) {  // row r has r + 1 tiles
      col -= ++row;
    }
    for (int64_t i = begin; i < end; ++i) {
      f(i / per_block, i % per_block, row, col);
      if (++col > row) {
        col = 0;
        row = row + 1 < tiles ? row + 1 : 0;
      }
    }
  });
}

// Return the largest absolute row sum of a matrix, infinity if one is not finite. `parts` [tiles, n] are the
// absolute row sums of tiles.
float largest_row(const float* parts, int64_t tiles, int64_t n) {
  float largest = 0;
  for (int64_t row = 0; row < n; ++row) {
    double sum = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      sum += parts[tile * n + row];
    }
    const auto rounded = static_cast<float>(sum);
    largest = std::max(largest, is_finite(rounded) ? rounded : INFINITY);
  }
  return largest;
}

// Return the new m of a factor, and append to `norms` [L] the norms of m before rounding.
at::Tensor new_momentum(const FactorState& state,
                        const at::Tensor& a,         // A [L, p, d], or A' [L, d, p] for K
                        const at::Tensor& factor,    // [L, n, n], in the dtype of products
                        const float* other_squares,  // [L], squared norms of the other factor
                        const Options& o, std::vector<float>& norms) {
  const Kernels& k = kernels();
  const int64_t num_blocks = a.size(0), n = a.size(1), tiles = num_tiles(n), per_block = tiles * (tiles + 1) / 2;
  const auto cols = static_cast<float>(a.size(2));
  const at::Tensor product = symmetric_product(a);
  const at::Tensor damping = o.damping != 0 ? symmetric_product(factor.mT()) : at::Tensor();
  const at::Tensor momentum =
      is_packed(state.momentum, state.factor) ? unpack_lower_triangles(state.momentum, n) : state.momentum;
  const at::Tensor result = at::empty_like(momentum);
  // Partial norms of m: a sum of squares for each tile, or row sums [L, tiles, n].
  std::vector<float> squares(num_blocks * per_block), rows(o.row_sum ? num_blocks * tiles * n : 0);
  const TypedPointer products = pointer_to(product), old = pointer_to(momentum), target = pointer_to(result);
  const TypedPointer dampings = damping.defined() ? pointer_to(damping) : TypedPointer{nullptr, Dtype::f32};

  for_lower_tiles(num_blocks, n, [&](int64_t block, int64_t tile, int64_t row, int64_t col) {
    const int64_t start = block * n * n;
    const MomentumUpdate update{products.offset(start),
                                dampings.data ? dampings.offset(start) : dampings,
                                old.offset(start),
                                target.offset(start),
                                n,
                                o.batch_size / (2 * cols),
                                dampings.data ? o.damping * other_squares[block] / (2 * cols) : 0.0f,
                                o.gamma / 2,
                                o.riemannian_momentum};
    float* row_sums = o.row_sum ? rows.data() + block * tiles * n : nullptr;
    squares[block * per_block + tile] = k.momentum_tile(update, row, col, row_sums);
  });
  for (int64_t block = 0; block < num_blocks; ++block) {
    norms.push_back(o.row_sum ? largest_row(rows.data() + block * tiles * n, tiles, n)
                              : std::sqrt(sum_of(squares.data() + block * per_block, per_block)));
  }
  return result;
}

// Update C <- C - scale C m and m of the blocks that are not skipped, then compute CC' of all of them.
void update_factors(const FactorState& state,
                    const at::Tensor& momentum,        // new m [L, n, n]
                    const std::vector<float>& scales,  // [L]
                    const bool* ok,                    // [L], false for blocks that are skipped
                    const Draws& draws, int64_t first_block, at::ScalarType dtype, c10::string_view rounding) {
  const Kernels& k = kernels();
  const int64_t n = state.factor.size(-1), size = n * n;
  const at::Tensor y = product(state.factor.to(dtype), momentum.to(dtype));
  const TypedPointer factors = pointer_to(state.factor), products = pointer_to(y);
  const TypedPointer stored_m = pointer_to(state.momentum), new_m = pointer_to(momentum);
  const Rounding mode = rounding_of(rounding, state.residual.has_value(), state.factor.scalar_type());
  int16_t* residuals = state.residual ? state.residual->mutable_data_ptr<int16_t>() : nullptr;
  constexpr int64_t share_size = 1 << 14;  // elements of a block that one thread takes at a time
  const int64_t shares = (size + share_size - 1) / share_size;
  const bool packed = is_packed(state.momentum, state.factor);
  at::parallel_for(0, state.factor.size(0) * shares, 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / shares, first = i % shares * share_size, length = std::min(share_size, size - first);
      const int64_t start = block * size + first;
      if (!ok[block]) {
        continue;
      }
      const uint32_t key = mode == Rounding::stochastic ? draws.key(first_block + block, state.slot) : 0;
      const Stored factor{factors.offset(start), residuals ? residuals + start : nullptr, mode, key};
      k.update_factor(factor, products.offset(start), static_cast<uint32_t>(first), length, scales[block]);
      if (!packed) {
        std::memcpy(stored_m.offset(start).data, new_m.offset(start).data, length * state.momentum.element_size());
      }
    }
  });
  if (packed) {
    pack(momentum, ok, state.momentum);
  }
  if (state.product) {
    symmetric_product(state.factor.to(state.product->scalar_type()), *state.product);
  }
}

// Squared norms [L] of the factors of a batch, and its result `ok` [L].
struct BatchValues {
  const float *squares_c, *squares_k;
  bool* ok;
};

// Update the factors of a slice of a batch. `first` is the index of its first block, `values` are the slice's own.
void update_slice(const FactorState& c, const FactorState& k,
                  const at::Tensor& grad,  // [L, p, d]
                  const BatchValues& values, const Draws& draws, int64_t first, const Options& o) {
  const at::ScalarType dtype = grad.scalar_type();
  const at::Tensor factor_c = c.factor.to(dtype), factor_k = k.factor.to(dtype);
  const at::Tensor a = product(product(factor_c.mT(), grad), factor_k);
  std::vector<float> norms_c, norms_k;
  const at::Tensor momentum_c = new_momentum(c, a, factor_c, values.squares_k, o, norms_c);
  const at::Tensor momentum_k = new_momentum(k, a.mT(), factor_k, values.squares_c, o, norms_k);
  for (size_t block = 0; block < norms_c.size(); ++block) {
    values.ok[block] = !o.overflow && is_finite(norms_c[block]) && is_finite(norms_k[block]);
  }
  const auto scales = [&](std::vector<float> norms) {
    for (float& norm : norms) {
      norm = o.beta2 / (o.clips ? std::max(norm, 1.0f) : 1.0f);
    }
    return norms;
  };
  update_factors(c, momentum_c, scales(norms_c), values.ok, draws, first, dtype, o.rounding);
  update_factors(k, momentum_k, scales(norms_k), values.ok, draws, first, dtype, o.rounding);
}

// Return the sums [L] of partial sums [L, shares].
std::vector<float> sum_rows(const at::Tensor& partial_sums) {
  std::vector<float> sums;
  const int64_t shares = partial_sums.size(1);
  for (int64_t block = 0; block < partial_sums.size(0); ++block) {
    sums.push_back(sum_of(partial_sums.const_data_ptr<float>() + block * shares, shares));
  }
  return sums;
}

// Update C, K, their momenta and residuals in place, and write P_C and P_K if they are there. Return ok [L]: false for
// blocks that were skipped because a new m is not finite or GradScaler found an overflow.
at::Tensor kron_factor(const at::Tensor& factor_c,        // [L, p, p]
                       const at::Tensor& factor_k,        // [L, d, d]
                       const at::Tensor& momentum_c,      // [L, p, p], or packed
                       const at::Tensor& momentum_k,      // [L, d, d], or packed
                       const OptionalTensor& residual_c,  // int16 [L, p, p]
                       const OptionalTensor& residual_k,  // int16 [L, d, d]
                       const OptionalTensor& product_c,   // [L, p, p]
                       const OptionalTensor& product_k,   // [L, d, d]
                       const at::Tensor& grad,            // [L, p, d]
                       const at::Tensor& squares,         // [3, L, shares], of G, C and K; [1, L, shares] undamped
                       const at::Tensor& seeds,           // int32 [L]
                       const at::Tensor& steps,           // [L] or [1]
                       const OptionalTensor& found_inf,   // [1]
                       double batch_size, double beta2, double riemannian_momentum, double damping, double gamma,
                       c10::string_view clip, c10::string_view rounding) {
  const OptionalTensor state[] = {factor_c,   factor_k,   momentum_c, momentum_k,
                                  residual_c, residual_k, product_c,  product_k};
  for (const OptionalTensor& x : state) {
    check_contiguous("a tensor of a factor's state", x);
  }
  check_contiguous("squares", squares);
  is_packed(momentum_c, factor_c);  // called for its error, which must come before anything changes
  is_packed(momentum_k, factor_k);
  const int64_t num_blocks = grad.size(0);
  const Options options{static_cast<float>(batch_size),
                        static_cast<float>(beta2),
                        static_cast<float>(riemannian_momentum),
                        static_cast<float>(damping),
                        static_cast<float>(gamma),
                        clip != "none",
                        clip == "row_sum",
                        item_or(found_inf, 0.0f) != 0,
                        rounding};
  const FactorState c{factor_c, momentum_c, residual_c, product_c, slot_factor_c};
  const FactorState k{factor_k, momentum_k, residual_k, product_k, slot_factor_k};
  const bool damps = options.damping != 0;
  const std::vector<float> zeros(num_blocks);
  const std::vector<float> squares_c = damps ? sum_rows(squares[1]) : zeros;
  const std::vector<float> squares_k = damps ? sum_rows(squares[2]) : zeros;
  const Draws draws(seeds, steps);
  const at::Tensor ok = at::empty({num_blocks}, grad.options().dtype(at::kBool));
  auto* oks = ok.mutable_data_ptr<bool>();

  for_slices(num_blocks, grad.size(1), grad.size(2), [&](int64_t first, int64_t length) {
    const BatchValues values{squares_c.data() + first, squares_k.data() + first, oks + first};
    update_slice(c.narrow(first, length), k.narrow(first, length), grad.narrow(0, first, length), values, draws, first,
                 options);
  });
  for (const OptionalTensor& x : state) {
    if (x) {
      bump_version(*x);
    }
  }
  return ok;
}

// Return P_C = CC' [L, p, p] and P_K = KK' [L, d, d] in `dtype`, computed as kron_factor computes them.
std::tuple<at::Tensor, at::Tensor> kron_products(const at::Tensor& factor_c,  // [L, p, p]
                                                 const at::Tensor& factor_k,  // [L, d, d]
                                                 at::ScalarType dtype) {
  const at::Tensor product_c = at::empty_like(factor_c, factor_c.options().dtype(dtype));
  const at::Tensor product_k = at::empty_like(factor_k, factor_k.options().dtype(dtype));
  for_slices(factor_c.size(0), factor_c.size(-1), factor_k.size(-1), [&](int64_t first, int64_t length) {
    for (const auto& [factor, product] : {std::pair(factor_c, product_c), std::pair(factor_k, product_k)}) {
      symmetric_product(factor.narrow(0, first, length).to(dtype), product.narrow(0, first, length));
    }
  });
  return {product_c, product_k};
}

}  // namespace

TORCH_LIBRARY_IMPL(rootfree_native, CPU, m) {
  m.impl("kron_factor", &kron_factor);
  m.impl("kron_products", &kron_products);
}

}  // namespace rootfree::cpu
