// torch.ops.rootfree_native.kron_factor and kron_products on a CPU.
//
//     A = C'GK,    m <- alpha2 m + (1 - alpha2) delta,    C <- C - beta2 / max(1, |m|) C m,    P_C = CC'
//     delta_C = 1/2 [(B/d) AA' + (lambda/d) |K|^2 C'C - gamma I]
//
// and the same of K with A' (rootfree_kernels/eager/kron_factor.py). Products are the libraries'; each pass between two
// of them is one. A new m waits in memory of its own until both sides of its block are known to be finite.

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

struct Options {
  float batch_size, beta2, riemannian_momentum, damping, gamma;
  bool clips, row_sum, overflow;
  c10::string_view rounding;
};

// C or K of some blocks, and what belongs to it. The momentum may be packed.
struct Side {
  at::Tensor factor, momentum;
  OptionalTensor residual, product;
  Slot slot;

  Side narrow(int64_t first, int64_t length) const {
    const auto part = [&](const OptionalTensor& x) { return x ? OptionalTensor(x->narrow(0, first, length)) : x; };
    return {factor.narrow(0, first, length), momentum.narrow(0, first, length), part(residual), part(product), slot};
  }
};

// What the lower triangles of a batch of n x n matrices are worked on by: tile t of num_tiles (num_tiles + 1) / 2.
template <typename F>
void for_lower_tiles(int64_t num_blocks, int64_t n, const F& f) {
  const int64_t tiles = num_tiles(n), per_block = tiles * (tiles + 1) / 2;
  at::parallel_for(0, num_blocks * per_block, 16, [&](int64_t begin, int64_t end) {
    int64_t row = 0, first = begin % per_block;
    while (first > row) {
      first -= ++row;
    }
    int64_t col = first;
    for (int64_t i = begin; i < end; ++i) {
      f(i / per_block, i % per_block, row, col);
      if (++col > row) {
        col = 0;
        row = row + 1 < tiles ? row + 1 : 0;
      }
    }
  });
}

// The largest of the row sums of a matrix, each in `tiles` parts; infinity where one is not finite.
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

// The new m of a side, and norms [L] of what it was before it was rounded. `a` is A, or A' for K; `other_squares` [L]
// are the squared norms of the other factor.
at::Tensor new_momentum(const Side& side, const at::Tensor& a, const at::Tensor& factor, const float* other_squares,
                        const Options& o, std::vector<float>& norms) {
  const Kernels& k = kernels();
  const int64_t num_blocks = a.size(0), n = a.size(1), tiles = num_tiles(n), per_block = tiles * (tiles + 1) / 2;
  const auto cols = static_cast<float>(a.size(2));
  const at::Tensor product = symmetric_product(a);
  const at::Tensor damping = o.damping != 0 ? symmetric_product(factor.mT()) : at::Tensor();
  const at::Tensor momentum = is_packed(side.momentum, side.factor) ? lower_triangles(side.momentum, n) : side.momentum;
  const at::Tensor result = at::empty_like(momentum);
  std::vector<float> squares(num_blocks * per_block), rows(o.row_sum ? num_blocks * tiles * n : 0);
  const Numbers products = numbers_of(product), old = numbers_of(momentum), target = numbers_of(result);
  const Numbers dampings = damping.defined() ? numbers_of(damping) : Numbers{nullptr, Dtype::f32};

  for_lower_tiles(num_blocks, n, [&](int64_t block, int64_t tile, int64_t row, int64_t col) {
    const int64_t start = block * n * n;
    const MomentumUpdate update{products.from(start),
                                dampings.data ? dampings.from(start) : dampings,
                                old.from(start),
                                target.from(start),
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
                              : std::sqrt(total_of(squares.data() + block * per_block, per_block)));
  }
  return result;
}

// C <- C - scale C m of the blocks that are not left out, and their m; then CC'.
void move(const Side& side, const at::Tensor& momentum, const std::vector<float>& scales, const bool* ok,
          const Draws& draws, int64_t first_block, at::ScalarType dtype, c10::string_view rounding) {
  const Kernels& k = kernels();
  const int64_t n = side.factor.size(-1), size = n * n;
  const at::Tensor y = product(side.factor.to(dtype), momentum.to(dtype));
  const Numbers factors = numbers_of(side.factor), products = numbers_of(y);
  const Numbers old = numbers_of(side.momentum), fresh = numbers_of(momentum);
  const Rounding mode = rounding_of(rounding, side.residual.has_value(), side.factor.scalar_type());
  int16_t* residuals = side.residual ? side.residual->mutable_data_ptr<int16_t>() : nullptr;
  constexpr int64_t share = 1 << 14;
  const int64_t shares = (size + share - 1) / share;
  const bool packed = is_packed(side.momentum, side.factor);
  at::parallel_for(0, side.factor.size(0) * shares, 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / shares, first = i % shares * share, length = std::min(share, size - first);
      const int64_t start = block * size + first;
      if (!ok[block]) {
        continue;
      }
      const uint32_t key = mode == Rounding::stochastic ? draws.key(first_block + block, side.slot) : 0;
      const Stored factor{factors.from(start), residuals ? residuals + start : nullptr, mode, key};
      k.move_factor(factor, products.from(start), static_cast<uint32_t>(first), length, scales[block]);
      if (!packed) {
        std::memcpy(old.from(start).data, fresh.from(start).data, length * side.momentum.element_size());
      }
    }
  });
  if (packed) {
    pack(momentum, ok, side.momentum);
  }
  if (side.product) {
    symmetric_product(side.factor.to(side.product->scalar_type()), *side.product);
  }
}

// The update of blocks from `first` on; `squares` [L] are the squared norms of C and K.
void update(const Side& c, const Side& k, const at::Tensor& grad, const float* squares_c, const float* squares_k,
            bool* ok, const Draws& draws, int64_t first, const Options& o) {
  const at::ScalarType dtype = grad.scalar_type();
  const at::Tensor factor_c = c.factor.to(dtype), factor_k = k.factor.to(dtype);
  const at::Tensor a = product(product(factor_c.mT(), grad), factor_k);
  std::vector<float> norms_c, norms_k;
  const at::Tensor momentum_c = new_momentum(c, a, factor_c, squares_k, o, norms_c);
  const at::Tensor momentum_k = new_momentum(k, a.mT(), factor_k, squares_c, o, norms_k);
  for (size_t block = 0; block < norms_c.size(); ++block) {
    ok[block] = !o.overflow && is_finite(norms_c[block]) && is_finite(norms_k[block]);
  }
  const auto scales = [&](std::vector<float> norms) {
    for (float& norm : norms) {
      norm = o.beta2 / (o.clips ? std::max(norm, 1.0f) : 1.0f);
    }
    return norms;
  };
  move(c, momentum_c, scales(norms_c), ok, draws, first, dtype, o.rounding);
  move(k, momentum_k, scales(norms_k), ok, draws, first, dtype, o.rounding);
}

// Sums of shares [L, shares], added up.
std::vector<float> added_up(const at::Tensor& shares) {
  std::vector<float> sums;
  for (int64_t block = 0; block < shares.size(0); ++block) {
    sums.push_back(total_of(shares.const_data_ptr<float>() + block * shares.size(1), shares.size(1)));
  }
  return sums;
}

at::Tensor kron_factor(const at::Tensor& factor_c, const at::Tensor& factor_k, const at::Tensor& momentum_c,
                       const at::Tensor& momentum_k, const OptionalTensor& residual_c,
                       const OptionalTensor& residual_k, const OptionalTensor& product_c,
                       const OptionalTensor& product_k, const at::Tensor& grad, const at::Tensor& squares,
                       const at::Tensor& seeds, const at::Tensor& steps, const OptionalTensor& found_inf,
                       double batch_size, double beta2, double riemannian_momentum, double damping, double gamma,
                       c10::string_view clip, c10::string_view rounding) {
  const OptionalTensor state[] = {factor_c,   factor_k,   momentum_c, momentum_k,
                                  residual_c, residual_k, product_c,  product_k};
  for (const OptionalTensor& x : state) {
    check_contiguous("the state of a factor", x);
  }
  check_contiguous("squares", squares);
  is_packed(momentum_c, factor_c);  // an error of a shape comes before anything changes
  is_packed(momentum_k, factor_k);
  const int64_t num_blocks = grad.size(0);
  const Options options{static_cast<float>(batch_size),
                        static_cast<float>(beta2),
                        static_cast<float>(riemannian_momentum),
                        static_cast<float>(damping),
                        static_cast<float>(gamma),
                        clip != "none",
                        clip == "row_sum",
                        value_of(found_inf, 0.0f) != 0,
                        rounding};
  const Side c{factor_c, momentum_c, residual_c, product_c, slot_factor_c};
  const Side k{factor_k, momentum_k, residual_k, product_k, slot_factor_k};
  const bool damps = options.damping != 0;
  const std::vector<float> nothing(num_blocks);
  const std::vector<float> squares_c = damps ? added_up(squares[1]) : nothing;
  const std::vector<float> squares_k = damps ? added_up(squares[2]) : nothing;
  const Draws draws(seeds, steps);
  const at::Tensor ok = at::empty({num_blocks}, grad.options().dtype(at::kBool));
  auto* oks = ok.mutable_data_ptr<bool>();

  for_slices(num_blocks, grad.size(1), grad.size(2), [&](int64_t first, int64_t length) {
    update(c.narrow(first, length), k.narrow(first, length), grad.narrow(0, first, length), squares_c.data() + first,
           squares_k.data() + first, oks + first, draws, first, options);
  });
  for (const OptionalTensor& x : state) {
    if (x) {
      changed(*x);
    }
  }
  return ok;
}

// P_C and P_K in `dtype`, as an update makes them.
std::tuple<at::Tensor, at::Tensor> kron_products(const at::Tensor& factor_c, const at::Tensor& factor_k,
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
