// Rows of a block of weights, of its gradient and of the preconditioned gradient u = CC'GKK' or CGK.

#include "step_weights.h"
#include "sums.h"

namespace rootfree::cpu::ROOTFREE_ISA {

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

// Average contiguous elements: see `average_gradient_row`.
static void average(const TypedPointer& buffer, const TypedPointer& grad, int64_t length, float alpha, bool nesterov) {
  alignas(64) float buffers[buffer_length], grads[buffer_length];
  float* ROOTFREE_RESTRICT m = load(buffer, 0, length, buffers);
  float* ROOTFREE_RESTRICT g = load(grad, 0, length, grads);
  const float beta = 1 - alpha;
  for (int64_t i = 0; i < length; ++i) {
    m[i] = alpha * m[i] + beta * g[i];
    g[i] = select(nesterov, beta * g[i] + alpha * m[i], m[i]);
  }
  store(buffer, 0, length, m);
  store(grad, 0, length, g);
}

void average_gradient_row(const GradientRow& row, float momentum, bool nesterov) {
  const TypedPointer& m = row.buffer;
  for (int64_t start = 0; start < row.length; start += buffer_length) {
    const int64_t count = minimum(buffer_length, row.length - start);
    ContiguousRow buffer(m.offset(start * row.buffer_stride).data, row.buffer_stride, size_of(m), count);
    average({buffer.data(), m.dtype}, row.grad.offset(start), count, momentum, nesterov);
    buffer.write_back();
  }
}

float direction_squares(const TypedPointer& direction, int64_t length) {
  alignas(64) float directions[buffer_length], finite[buffer_length];
  double total = 0;
  for (int64_t start = 0; start < length; start += buffer_length) {
    const int64_t count = minimum(buffer_length, length - start);
    const float* ROOTFREE_RESTRICT u = load(direction, start, count, directions);
    for (int64_t i = 0; i < count; ++i) {
      finite[i] = select(is_finite(u[i]), u[i], 0.0f);
    }
    Lanes sums;
    add_squares(sums, finite, count);
    total += sums.total();
  }
  return static_cast<float>(total);
}

// Step contiguous elements. Return whether an element of u counted as 0. The buffer may be a null pointer if the momentum
// averages gradients.
static bool step(const Stored& weight, const TypedPointer& buffer, const TypedPointer& direction, float scale,
                 uint32_t first, int64_t length, const WeightScalars& scalars) {
  alignas(64) float weights[buffer_length], buffers[buffer_length], directions[buffer_length];
  float* w = load(weight, 0, length, weights);
  float* m = scalars.averages ? nullptr : load(buffer, 0, length, buffers);
  const bool lost = step_weights(w, m, load(direction, 0, length, directions), length, scale, scalars);
  if (!scalars.averages) {
    store(buffer, 0, length, m);
  }
  store(weight, 0, length, first, w);
  return lost;
}

bool step_weight_row(const WeightRow& row, const WeightScalars& scalars) {
  bool lost = false;
  const TypedPointer &w = row.weight.value, &m = row.buffer;
  for (int64_t start = 0; start < row.length; start += buffer_length) {
    const int64_t count = minimum(buffer_length, row.length - start);
    const uint32_t first = row.first + static_cast<uint32_t>(start);
    ContiguousRow weight(w.offset(start * row.weight_stride).data, row.weight_stride, size_of(w), count);
    void* const buffers = m.data ? m.offset(start * row.buffer_stride).data : nullptr;
    ContiguousRow buffer(buffers, buffers ? row.buffer_stride : 1, size_of(m), count);
    int16_t* const residuals = row.weight.residual ? row.weight.residual + start * row.residual_stride : nullptr;
    ContiguousRow residual(residuals, residuals ? row.residual_stride : 1, 2, count);
    const Stored stored{
        {weight.data(), w.dtype}, static_cast<int16_t*>(residual.data()), row.weight.rounding, row.weight.key};
    lost |= step(stored, {buffer.data(), m.dtype}, row.direction.offset(start), row.scale, first, count, scalars);
    weight.write_back();
    buffer.write_back();
    residual.write_back();
  }
  return lost;
}

}  // namespace rootfree::cpu::ROOTFREE_ISA
