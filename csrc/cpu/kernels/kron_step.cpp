// The heavy-ball step of a row of a block of weights along u, a row of CC'GKK':
//
//     m <- alpha1 m + u + kappa w,    w <- w - beta1 m                    (L2 decay)
//     m <- alpha1 m + u,              w <- (1 - beta1 kappa) w - beta1 m  (decoupled)

#include "numbers.h"

namespace rootfree::cpu::ROOTFREE_ISA {

static void step(const Stored& weight, const Numbers& buffer, const Numbers& direction, uint32_t first, int64_t length,
                 const WeightStep& n) {
  alignas(64) float weights[piece], buffers[piece], directions[piece];
  float* ROOTFREE_RESTRICT w = load(weight, 0, length, weights);
  float* ROOTFREE_RESTRICT m = load(buffer, 0, length, buffers);
  const float* ROOTFREE_RESTRICT u = load(direction, 0, length, directions);
  for (int64_t i = 0; i < length; ++i) {
    const float along = is_finite(u[i]) ? u[i] : 0.0f;
    // A decay of 0 times a weight that is not finite would be NaN.
    const float l2 = n.weight_decay != 0 ? n.weight_decay * w[i] : 0.0f;
    const float shrunk = n.shrinkage != 0 ? n.shrinkage * w[i] : 0.0f;
    m[i] = n.momentum * m[i] + along + l2;
    w[i] = w[i] - shrunk - n.lr * m[i];
  }
  store(buffer, 0, length, m);
  store(weight, 0, length, first, w);
}

// Numbers of a row with gaps between them, packed for a while.
class Packed {
 public:
  Packed(void* data, int64_t stride, int64_t size, int64_t length)
      : data_(data), stride_(stride), size_(size), length_(length) {
    if (stride_ != 1) {
      copy(data_, stride_, packed_, 1);
    }
  }

  void* data() { return stride_ == 1 ? data_ : packed_; }

  void put_back() const {
    if (stride_ != 1) {
      copy(packed_, 1, data_, stride_);
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

  alignas(64) float packed_[piece];
  void* data_;
  int64_t stride_, size_, length_;
};

static int64_t size_of(const Numbers& x) { return x.dtype == Dtype::f32 ? 4 : 2; }

void weight_row(const WeightRow& row, const WeightStep& numbers) {
  const Numbers &w = row.weight.value, &m = row.buffer;
  for (int64_t start = 0; start < row.length; start += piece) {
    const int64_t some = smaller(piece, row.length - start);
    const uint32_t first = row.first + static_cast<uint32_t>(start);
    Packed weight(w.from(start * row.weight_stride).data, row.weight_stride, size_of(w), some);
    Packed buffer(m.from(start * row.buffer_stride).data, row.buffer_stride, size_of(m), some);
    int16_t* const there = row.weight.residual ? row.weight.residual + start * row.residual_stride : nullptr;
    Packed residual(there, there ? row.residual_stride : 1, 2, some);
    const Stored stored{{weight.data(), w.dtype}, static_cast<int16_t*>(residual.data()), row.weight.rounding,
                        row.weight.key};
    step(stored, {buffer.data(), m.dtype}, row.direction.from(start), first, some, numbers);
    weight.put_back();
    buffer.put_back();
    residual.put_back();
  }
}

}  // namespace rootfree::cpu::ROOTFREE_ISA
