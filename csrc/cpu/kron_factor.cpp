// torch.ops.rootfree_native.kron_factor and kron_products on a CPU.
//
//     A = C'GK,    m <- alpha2 m + (1 - alpha2) delta,    C <- C - beta2 / max(1, |m|) C m,    P_C = CC'
//     delta_C = 1/2 [(B/d) AA' + (lambda/d) |K|^2 C'C - gamma I]
//
// K is updated likewise, with A' and p in place of A and d. If directions are whitened, C stays symmetric:
//
//     delta_C = 1/2 [(B/d) AA' + sqrt(lambda) (tr K / d) C - gamma I],    C <- C - beta2 / (2 max(1, |m|)) (C m + m C)
//
// rootfree_kernels/eager/kron_factor.py is the specification. PyTorch's libraries compute the products; between two
// products there is one pass over memory. The new m is a separate tensor until the momenta of both factors of a block
// are known to be finite.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "factor_state.h"
#include "packing.h"
#include "products.h"
#include "slices.h"
#include "tensors.h"

namespace rootfree::cpu {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

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

// Return the factors [L] of the damping in delta_C: of C'C, or of C if directions are whitened.
std::vector<float> damping_factors(const float* dampings,       // [L], lambda
                                   const float* other_squares,  // [L], squared norms of K
                                   const at::Tensor& other,     // K [L, d, d], in the dtype of products
                                   const FactorOptions& o) {
  const int64_t num_blocks = other.size(0), cols = other.size(1);
  std::vector<float> factors(num_blocks);
  if (o.damping != 0 && o.whitened) {
    const at::Tensor diagonals = other.diagonal(0, 1, 2).to(at::kFloat).contiguous();
    for (int64_t block = 0; block < num_blocks; ++block) {
      const float trace = sum_of(diagonals.const_data_ptr<float>() + block * cols, cols);
      factors[block] = 0.5f * std::sqrt(dampings[block]) * trace / static_cast<float>(cols);
    }
  } else if (o.damping != 0) {
    for (int64_t block = 0; block < num_blocks; ++block) {
      factors[block] = dampings[block] * other_squares[block] / (2 * static_cast<float>(cols));
    }
  }
  return factors;
}

// Return the new m of a factor, and append to `norms` [L] the norms of m before rounding.
at::Tensor new_momentum(const FactorState& state,
                        const at::Tensor& a,       // A [L, p, d], or A' [L, d, p] for K
                        const at::Tensor& factor,  // [L, n, n], in the dtype of products
                        const std::vector<float>& damping_factors,  // [L]
                        const FactorOptions& o, std::vector<float>& norms) {
  const Kernels& k = kernels();
  const int64_t num_blocks = a.size(0), n = a.size(1), tiles = num_tiles(n), per_block = tiles * (tiles + 1) / 2;
  const auto cols = static_cast<float>(a.size(2));
  const at::Tensor product = symmetric_product(a);
  const at::Tensor damping = o.damping == 0 ? at::Tensor() : o.whitened ? factor : symmetric_product(factor.mT());
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
                                damping_factors[block],
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

// Call f(block, first, length) for shares of the elements of a batch of blocks, in parallel. `first` is the index of
// the share's first element in its block.
template <typename F>
void for_shares(int64_t num_blocks, int64_t size, const F& f) {
  constexpr int64_t share_size = 1 << 14;  // elements of a block that one thread takes at a time
  const int64_t shares = (size + share_size - 1) / share_size;
  at::parallel_for(0, num_blocks * shares, 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % shares * share_size;
      f(i / shares, first, std::min(share_size, size - first));
    }
  });
}

// Update C <- C - scale C m of the chosen blocks, with Y = C m.
void move_factors(const at::Tensor& y,               // [L, n, n]
                  const std::vector<float>& scales,  // [L]
                  const bool* chosen,                // [L]
                  const StoredFactors& factors) {
  const Kernels& k = kernels();
  const int64_t size = y.size(-1) * y.size(-1);
  const TypedPointer products = pointer_to(y);
  for_shares(y.size(0), size, [&](int64_t block, int64_t first, int64_t length) {
    if (chosen[block]) {
      const TypedPointer product = products.offset(block * size + first);
      k.update_factor(factors.at(block, first), product, static_cast<uint32_t>(first), length, scales[block]);
    }
  });
}

// Update C <- C - scale / 2 (C m + m C) of the chosen blocks, with X = C m and X' = m C. Both halves of C stay equal.
void move_symmetric_factors(const at::Tensor& x,               // [L, n, n]
                            const std::vector<float>& scales,  // [L]
                            const bool* chosen,                // [L]
                            const StoredFactors& factors) {
  const Kernels& k = kernels();
  const int64_t n = x.size(-1);
  const TypedPointer products = pointer_to(x);
  for_lower_tiles(x.size(0), n, [&](int64_t block, int64_t, int64_t row, int64_t col) {
    if (chosen[block]) {
      const TypedPointer product = products.offset(block * n * n);
      k.update_symmetric_tile(factors.at(block, 0), product, n, row, col, scales[block] / 2);
    }
  });
}

// Store the new m of the chosen blocks.
void store_momentum(const FactorState& state,
                    const at::Tensor& momentum,  // [L, n, n]
                    const bool* chosen) {        // [L]
  if (is_packed(state.momentum, state.factor)) {
    return pack(momentum, chosen, state.momentum);
  }
  const int64_t size = momentum.size(-1) * momentum.size(-1);
  const TypedPointer target = pointer_to(state.momentum), source = pointer_to(momentum);
  for_shares(momentum.size(0), size, [&](int64_t block, int64_t first, int64_t length) {
    if (chosen[block]) {
      const int64_t start = block * size + first;
      std::memcpy(target.offset(start).data, source.offset(start).data, length * momentum.element_size());
    }
  });
}

// Update C and m of the blocks that are not skipped, then compute CC' of all of them.
void update_factors(const FactorState& state,
                    const at::Tensor& momentum,        // new m [L, n, n]
                    const std::vector<float>& scales,  // [L]
                    const bool* ok,                    // [L], false for blocks that are skipped
                    const Draws& draws, int64_t first_block, at::ScalarType dtype, const FactorOptions& o) {
  const at::Tensor y = product(state.factor.to(dtype), momentum.to(dtype));
  const StoredFactors factors(state, draws, first_block, o.rounding);
  if (o.whitened) {
    move_symmetric_factors(y, scales, ok, factors);
  } else {
    move_factors(y, scales, ok, factors);
  }
  store_momentum(state, momentum, ok);
  if (state.product) {
    symmetric_product(state.factor.to(state.product->scalar_type()), *state.product);
  }
}

// Update the factors of a slice of a batch, whose first block is `first`.
void update_slice(const FactorState& c, const FactorState& k,
                  const at::Tensor& grad,  // [L, p, d]
                  const BatchValues& values, const Draws& draws, int64_t first, const FactorOptions& o) {
  const at::ScalarType dtype = grad.scalar_type();
  const at::Tensor factor_c = c.factor.to(dtype), factor_k = k.factor.to(dtype);
  const at::Tensor a = product(product(factor_c.mT(), grad), factor_k);
  const float* dampings = values.dampings.data() + first;
  const auto factors_c = damping_factors(dampings, values.squares_k.data() + first, factor_k, o);
  const auto factors_k = damping_factors(dampings, values.squares_c.data() + first, factor_c, o);
  std::vector<float> norms_c, norms_k;
  const at::Tensor momentum_c = new_momentum(c, a, factor_c, factors_c, o, norms_c);
  const at::Tensor momentum_k = new_momentum(k, a.mT(), factor_k, factors_k, o, norms_k);
  bool* const ok = values.ok + first;
  for (size_t block = 0; block < norms_c.size(); ++block) {
    ok[block] = !o.overflow && is_finite(norms_c[block]) && is_finite(norms_k[block]);
    ok[block] = ok[block] && !values.curvatures[first + block].idle;
  }
  const auto scales = [&](std::vector<float> norms) {
    for (float& norm : norms) {
      norm = o.beta2 / (o.clips ? std::max(norm, 1.0f) : 1.0f);
    }
    return norms;
  };
  update_factors(c, momentum_c, scales(norms_c), ok, draws, first, dtype, o);
  update_factors(k, momentum_k, scales(norms_k), ok, draws, first, dtype, o);
}

// Update C, K, their momenta and residuals and q in place, and write P_C and P_K if they are there. Return ok [L]:
// false for blocks that were skipped because a new m is not finite or GradScaler found an overflow.
at::Tensor kron_factor(const at::Tensor& factor_c,        // [L, p, p]
                       const at::Tensor& factor_k,        // [L, d, d]
                       const at::Tensor& momentum_c,      // [L, p, p], or packed
                       const at::Tensor& momentum_k,      // [L, d, d], or packed
                       const OptionalTensor& residual_c,  // int16 [L, p, p]
                       const OptionalTensor& residual_k,  // int16 [L, d, d]
                       const OptionalTensor& product_c,   // [L, p, p]
                       const OptionalTensor& product_k,   // [L, d, d]
                       const OptionalTensor& curvature,   // q, FP32 [L]
                       const at::Tensor& grad,            // [L, p, d]
                       const at::Tensor& squares,         // [1 or 3, L, shares], of G, and of C and K if they damp
                       const at::Tensor& seeds,           // int32 [L]
                       const at::Tensor& steps,           // [L] or [1]
                       const OptionalTensor& found_inf,   // [1]
                       double batch_size, double beta2, double riemannian_momentum, double damping, double gamma,
                       c10::string_view clip, c10::string_view rounding, c10::string_view direction,
                       bool relative_damping, c10::string_view factor_init) {
  const OptionalTensor state[] = {factor_c,   factor_k,  momentum_c, momentum_k, residual_c,
                                  residual_k, product_c, product_k,  curvature};
  for (const OptionalTensor& x : state) {
    check_contiguous("a tensor of a factor's state", x);
  }
  check_contiguous("squares", squares);
  is_packed(momentum_c, factor_c);  // called for its error, which must come before anything changes
  is_packed(momentum_k, factor_k);
  const int64_t num_blocks = grad.size(0);
  const FactorOptions options{static_cast<float>(batch_size),
                        static_cast<float>(beta2),
                        static_cast<float>(riemannian_momentum),
                        static_cast<float>(damping),
                        static_cast<float>(gamma),
                        clip != "none",
                        clip == "row_sum",
                        item_or(found_inf, 0.0f) != 0,
                        rounding,
                        direction == "whitened",
                        relative_damping && curvature,
                        factor_init == "gradient"};
  const FactorState c{factor_c, momentum_c, residual_c, product_c, slot_factor_c};
  const FactorState k{factor_k, momentum_k, residual_k, product_k, slot_factor_k};
  const Draws draws(seeds, steps);
  const at::Tensor ok = at::empty({num_blocks}, grad.options().dtype(at::kBool));
  BatchValues values = start_blocks(c, k, curvature, squares, options);
  values.ok = ok.mutable_data_ptr<bool>();

  for_slices(num_blocks, grad.size(1), grad.size(2), [&](int64_t first, int64_t length) {
    update_slice(c.narrow(first, length), k.narrow(first, length), grad.narrow(0, first, length), values, draws, first,
                 options);
  });
  store_curvatures(curvature, values);
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
