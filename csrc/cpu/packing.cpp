// Rows are copied as they are. Of D, whose triangle is stored transposed, packing reads the upper one, which is the
// same, and unpacking turns tiles that stay near a core.

#include "packing.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>

#include "tensors.h"

namespace rootfree::cpu {
namespace {

// Where the triangles of one packed n x n matrix lie.
struct Places {
  int64_t n, half, rest, down;

  explicit Places(int64_t size) : n(size), half((size + 1) / 2), rest(size / 2), down(1 - size % 2) {}

  int64_t rows() const { return n + down; }
  int64_t numbers() const { return rows() * half; }
  int64_t row(int64_t i) const { return (down + i) * half; }                // of A, or of B from row `half` on
  int64_t column_of_d(int64_t j) const { return j * half + j + 1 - down; }  // from the diagonal on
};

// Rows [first, last) of a lower triangle.
template <typename T>
void unpack_rows(const T* packed, T* matrix, const Places& where, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    std::memcpy(matrix + i * where.n, packed + where.row(i), std::min(i + 1, where.half) * sizeof(T));
  }
  const int64_t from = std::max<int64_t>(first - where.half, 0), to = last - where.half;  // rows of D
  for (int64_t tile = 0; tile < to; tile += tile_size) {
    for (int64_t i = std::max(from, tile); i < to; ++i) {
      T* row = matrix + (where.half + i) * where.n + where.half;
      for (int64_t j = tile; j < std::min(tile + tile_size, i + 1); ++j) {
        row[j] = packed[where.column_of_d(j) + i - j];
      }
    }
  }
}

// Row q of a packed matrix: a row of A or B, and of D what fits to it.
template <typename T>
void pack_row(const T* matrix, T* packed, const Places& where, int64_t q) {
  const int64_t i = q - where.down;
  if (i >= 0) {
    std::memcpy(packed + where.row(i), matrix + i * where.n, std::min(i + 1, where.half) * sizeof(T));
  }
  if (q < where.rest) {
    std::memcpy(packed + where.column_of_d(q), matrix + (where.half + q) * (where.n + 1), (where.rest - q) * sizeof(T));
  }
}

template <typename T>
void unpack_all(const at::Tensor& packed, const at::Tensor& matrices, const Places& where) {
  const T* source = static_cast<const T*>(packed.const_data_ptr());
  T* target = static_cast<T*>(matrices.mutable_data_ptr());
  const int64_t tiles = num_tiles(where.n);
  at::parallel_for(0, matrices.size(0) * tiles, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / tiles, first = i % tiles * tile_size;
      unpack_rows(source + block * where.numbers(), target + block * where.n * where.n, where, first,
                  std::min(first + tile_size, where.n));
    }
  });
}

template <typename T>
void pack_all(const at::Tensor& matrices, const bool* chosen, const at::Tensor& packed, const Places& where) {
  const T* source = static_cast<const T*>(matrices.const_data_ptr());
  T* target = static_cast<T*>(packed.mutable_data_ptr());
  at::parallel_for(0, matrices.size(0) * where.rows(), 128, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / where.rows();
      if (chosen[block]) {
        pack_row(source + block * where.n * where.n, target + block * where.numbers(), where, i % where.rows());
      }
    }
  });
}

}  // namespace

bool is_packed(const at::Tensor& m, const at::Tensor& factor) {
  if (m.sizes() == factor.sizes()) {
    return false;
  }
  const Places places(factor.size(-1));
  TORCH_CHECK_VALUE(m.sizes() == at::IntArrayRef({factor.size(0), places.rows(), places.half}), "m of shape ",
                    m.sizes(), " for a factor of ", factor.sizes(), ": pass the factor's shape, or one packed.");
  return true;
}

at::Tensor lower_triangles(const at::Tensor& packed, int64_t n) {
  const at::Tensor matrices = at::empty({packed.size(0), n, n}, packed.options());
  const Places places(n);
  packed.element_size() == 4 ? unpack_all<uint32_t>(packed, matrices, places)
                             : unpack_all<uint16_t>(packed, matrices, places);
  return matrices;
}

void pack(const at::Tensor& matrices, const bool* chosen, const at::Tensor& packed) {
  const Places places(matrices.size(-1));
  packed.element_size() == 4 ? pack_all<uint32_t>(matrices, chosen, packed, places)
                             : pack_all<uint16_t>(matrices, chosen, packed, places);
}

}  // namespace rootfree::cpu
