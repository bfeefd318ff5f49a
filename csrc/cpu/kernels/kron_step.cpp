// Step a row of a block of weights with heavy-ball momentum. u is a row of the preconditioned gradient CC'GKK':
//
//     m <- alpha1 m + u + kappa w,    w <- w - beta1 m                    (L2 decay)
//     m <- alpha1 m + u,              w <- (1 - beta1 kappa) w - beta1 m  (decoupled)

#include "load_store.h"

namespace rootfree::cpu::ROOTFREE_ISA {

// Step contiguous elements. An element of u that is not finite counts as 0.
static void step(const Stored& weight, const TypedPointer& buffer, const TypedPointer& direction, uint32_t first,
                 int64_t length, const WeightScalars& scalars) {
  alignas(64) float weights[buffer_length], buffers[buffer_length], directions[buffer_length];
  float* ROOTFREE_RESTRICT w = load(weight, 0, length, weights);
  float* ROOTFREE_RESTRICT m = load(buffer, 0, length, buffers);
  const float* ROOTFREE_RESTRICT u = load(direction, 0, length, directions);
  for (int64_t i = 0; i < length; ++i) {
    const float along = is_finite(u[i]) ? u[i] : 0.0f;
    // A coefficient of 0 is tested for, because 0 times an infinite weight is NaN.
    const float l2 = scalars.weight_decay != 0 ? scalars.weight_decay * w[i] : 0.0f;
    const float shrunk = scalars.shrinkage != 0 ? scalars.shrinkage * w[i] : 0.0f;
    m[i] = scalars.momentum * m[i] + along + l2;
    w[i] = w[i] - shrunk - scalars.lr * m[i];
  }
  store(buffer, 0, length, m);
  store(weight, 0, length, first, w);
}

// Contiguous access to the elements of a row of any stride: the row itself, or a copy if it has gaps.
class ContiguousRow {
 public:
  ContiguousRow(void* data, int64_t stride, int64_t size, int64_t length)
      : data_(data), stride_(stride), size_(size), length_(length) {
    if (stride_ != 1) {
      copy(data_, stride_, copy_, 1);
    }
  }

  void* data() { return stride_ == 1 ? data_ : copy_; }

  // Copy the new values into the row.
  void write_back() const {
    if (stride_ != 1) {
      copy(copy_, 1, data_, stride_);
    }
  }

 private:
  void copy(const void* source, int64_t source_stride, void* target, int64_t target_stride) const {
    if (size_ == 4) {
      copy_strided<float>(source, source_stride, target, target_stride, length_);
    } else {
      copy_strided<uint16_t>(source, source_stride, target, target_stride, length_);
    }
  }

  alignas(64) float copy_[buffer_length];
  void* data_;
  int64_t stride_, size_, length_;
};

// Return the bytes of an element.
static int64_t size_of(const TypedPointer& x) { return x.dtype == Dtype::f32 ? 4 : 2; }

void step_weight_row(const WeightRow& row, const WeightScalars& scalars) {
  const TypedPointer &w = row.weight.value, &m = row.buffer;
  for (int64_t start = 0; start < row.length; start += buffer_length) {
    const int64_t count = minimum(buffer_length, row.length - start);
    const uint32_t first = row.first + static_cast<uint32_t>(start);
    ContiguousRow weight(w.offset(start * row.weight_stride).data, row.weight_stride, size_of(w), count);
    ContiguousRow buffer(m.offset(start * row.buffer_stride).data, row.buffer_stride, size_of(m), count);
    int16_t* const residuals = row.weight.residual ? row.weight.residual + start * row.residual_stride : nullptr;
    ContiguousRow residual(residuals, residuals ? row.residual_stride : 1, 2, count);
    const Stored stored{
        {weight.data(), w.dtype}, static_cast<int16_t*>(residual.data()), row.weight.rounding, row.weight.key};
    step(stored, {buffer.data(), m.dtype}, row.direction.offset(start), first, count, scalars);
    weight.write_back();
    buffer.write_back();
    residual.write_back();
  }
}

}  // namespace rootfree::cpu::ROOTFREE_ISA
