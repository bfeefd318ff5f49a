// Packing and unpacking of symmetric matrices. packing.h describes the packed layout.
//
// Rows of A and B are copied as they are. The triangle of D is stored transposed: packing reads D's upper triangle,
// which is the same matrix, and unpacking transposes one tile at a time, so that its elements stay in the cache.

#include "packing.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>

#include "tensors.h"

namespace rootfree::cpu {
namespace {

// Positions in a packed n x n matrix.
struct PackedLayout {
  int64_t n;
  int64_t half;   // rows of A, columns of the packed matrix
  int64_t rest;   // rows of D
  int64_t shift;  // packed rows above A: 1 if n is even, else 0

  explicit PackedLayout(int64_t size) : n(size), half((size + 1) / 2), rest(size / 2), shift(1 - size % 2) {}

  int64_t rows() const { return n + shift; }
  int64_t num_elements() const { return rows() * half; }

  // Return where row i of the matrix begins: a row of A, or of B from row `half` on.
  int64_t row(int64_t i) const { return (shift + i) * half; }

  // Return where column j of D begins, at the diagonal.
  int64_t column_of_d(int64_t j) const { return j * half + j + 1 - shift; }
};

// Unpack rows [first, last) of one lower triangle.
template <typename T>
void unpack_rows(const T* packed, T* matrix, const PackedLayout& layout, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    std::memcpy(matrix + i * layout.n, packed + layout.row(i), std::min(i + 1, layout.half) * sizeof(T));
  }
  const int64_t from = std::max<int64_t>(first - layout.half, 0), to = last - layout.half;  // rows of D
  for (int64_t tile = 0; tile < to; tile += tile_size) {
    for (int64_t i = std::max(from, tile); i < to; ++i) {
      T* row = matrix + (layout.half + i) * layout.n + layout.half;
      for (int64_t j = tile; j < std::min(tile + tile_size, i + 1); ++j) {
        row[j] = packed[layout.column_of_d(j) + i - j];
      }
    }
  }
}

// Write row q of one packed matrix: a row of A or B, and the column of D that shares it.
template <typename T>
void pack_row(const T* matrix, T* packed, const PackedLayout& layout, int64_t q) {
  const int64_t i = q - layout.shift;
  if (i >= 0) {
    std::memcpy(packed + layout.row(i), matrix + i * layout.n, std::min(i + 1, layout.half) * sizeof(T));
  }
  if (q < layout.rest) {
    std::memcpy(packed + layout.column_of_d(q), matrix + (layout.half + q) * (layout.n + 1),
                (layout.rest - q) * sizeof(T));
  }
}

// Unpack the lower triangles of a batch. T has the size of an element; values are only copied.
template <typename T>
void unpack_all(const at::Tensor& packed, const at::Tensor& matrices, const PackedLayout& layout) {
  const T* source = static_cast<const T*>(packed.const_data_ptr());
  T* target = static_cast<T*>(matrices.mutable_data_ptr());
  const int64_t tiles = num_tiles(layout.n);
  at::parallel_for(0, matrices.size(0) * tiles, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / tiles, first = i % tiles * tile_size;
      unpack_rows(source + block * layout.num_elements(), target + block * layout.n * layout.n, layout, first,
                  std::min(first + tile_size, layout.n));
    }
  });
}

// Pack the chosen matrices of a batch. T has the size of an element.
template <typename T>
void pack_all(const at::Tensor& matrices, const bool* chosen, const at::Tensor& packed, const PackedLayout& layout) {
  const T* source = static_cast<const T*>(matrices.const_data_ptr());
  T* target = static_cast<T*>(packed.mutable_data_ptr());
  at::parallel_for(0, matrices.size(0) * layout.rows(), 128, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / layout.rows();
      if (chosen[block]) {
        pack_row(source + block * layout.n * layout.n, target + block * layout.num_elements(), layout,
                 i % layout.rows());
      }
    }
  });
}

}  // namespace

bool is_packed(const at::Tensor& momentum, const at::Tensor& factor) {
  if (momentum.sizes() == factor.sizes()) {
    return false;
  }
  const PackedLayout layout(factor.size(-1));
  TORCH_CHECK_VALUE(momentum.sizes() == at::IntArrayRef({factor.size(0), layout.rows(), layout.half}),
                    "the momentum has shape ", momentum.sizes(), " and its factor ", factor.sizes(),
                    ": pass the factor's shape, or one packed as in rootfree_kernels/packing.py.");
  return true;
}

at::Tensor unpack_lower_triangles(const at::Tensor& packed, int64_t n) {
  const at::Tensor matrices = at::empty({packed.size(0), n, n}, packed.options());
  const PackedLayout layout(n);
  packed.element_size() == 4 ? unpack_all<uint32_t>(packed, matrices, layout)
                             : unpack_all<uint16_t>(packed, matrices, layout);
  return matrices;
}

void pack(const at::Tensor& matrices, const bool* chosen, const at::Tensor& packed) {
  const PackedLayout layout(matrices.size(-1));
  packed.element_size() == 4 ? pack_all<uint32_t>(matrices, chosen, packed, layout)
                             : pack_all<uint16_t>(matrices, chosen, packed, layout);
}

}  // namespace rootfree::cpu
