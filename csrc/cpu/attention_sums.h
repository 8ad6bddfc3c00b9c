// What the gradients sum over pixels or heads: each piece of pixels, and each head, leaves its
// part, and the parts are added in order.
#pragma once

#include "attention_lanes.h"

namespace keylock::KEYLOCK_ISA {
namespace {

template <class Element, class Real>
class Sums {
  static constexpr int width = kLanes<Real>;

 public:
  explicit Sums(const LocalizedAttentionBackward& backward)
      : out(backward),
        op(backward.op),
        rows(op.query.sizes[0]),
        pixels(op.query.sizes[1]),
        heads(op.query.sizes[2]),
        dims(op.query.sizes[3]),
        pieces(divide_up(pixels, piece_of(pixels))),
        text(op.key.sizes[1]),
        keys(text + (op.image_key.data ? op.image_key.sizes[1] : 0)),
        reads(out.grad_readout.data ? op.readout_tokens.sizes[1] : 0) {}

  void take(Arena& arena) {
    const int64_t units = rows * heads * pieces;
    const bool per_pixel = has_weights_per_pixel(op);
    partial_keys = arena.take<Real>(wants_keys() ? units * keys * dims : 0);
    partial_values = arena.take<Real>(wants_values() ? units * keys * dims : 0);
    partial_bias = arena.take<Real>(wants_bias() ? units * keys : 0);
    const int64_t weights = out.image_weights.data != nullptr ? op.images : 0;
    partial_weights = arena.take<double>(per_pixel ? 0 : units * weights);
    pixel_weights = arena.take<Real>(per_pixel ? rows * heads * weights * pixels : 0);
    const bool weighted = out.readout_weights.data != nullptr;
    pixel_reads = arena.take<Real>(weighted ? rows * heads * pixels * reads : 0);
  }

  bool wants_keys() const { return out.key.data != nullptr || out.image_key.data != nullptr; }
  bool wants_values() const { return out.value.data != nullptr || out.image_value.data != nullptr; }
  bool wants_bias() const {
    return out.key_bias.data != nullptr || out.image_key_bias.data != nullptr;
  }
  bool wants_weights() const { return out.image_weights.data != nullptr; }

  // A piece's sums over its pixels. Unit: the number of the piece, counted over rows and heads.
  void put_keys(const Lanes<Real>& lanes, const Real* grads, int64_t unit) const {
    if (wants_keys())
      put_rows(lanes, grads, partial_keys + unit * keys * dims, static_cast<Real>(op.scale));
  }
  void put_values(const Lanes<Real>& lanes, const Real* grads, int64_t unit) const {
    if (wants_values()) put_rows(lanes, grads, partial_values + unit * keys * dims, 1);
  }
  void put_bias(const Lanes<Real>& lanes, const Real* grads, int64_t unit) const {
    if (!wants_bias()) return;
    Real* to = partial_bias + unit * keys;
    std::memset(to, 0, keys * sizeof(Real));
    for (int64_t lane = 0; lane < lanes.count; ++lane) {
      if (lanes.source[lane] >= 0) to[lanes.source[lane]] = grads[lane];
    }
  }
  void put_weights(const double* grads, int64_t unit) const {
    if (!wants_weights() || has_weights_per_pixel(op)) return;
    std::memcpy(partial_weights + unit * op.images, grads, op.images * sizeof(double));
  }

  // A head's part of what pixels keep apart.
  Real* weights_of(int64_t row, int64_t head, int64_t image) const {
    return pixel_weights + ((row * heads + head) * op.images + image) * pixels;
  }
  Real* reads_of(int64_t row, int64_t head, int64_t pixel) const {
    return pixel_reads + ((row * heads + head) * pixels + pixel) * reads;
  }

  // Sums over pieces, and over heads where heads share a number, in order.
  void add_key(int64_t row, int64_t key) const {
    const bool is_text = key < text;
    const int64_t index = is_text ? key : key - text;
    const auto& grad_key = is_text ? out.key : out.image_key;
    const auto& grad_value = is_text ? out.value : out.image_value;
    const auto& grad_bias = is_text ? out.key_bias : out.image_key_bias;
    double bias = 0;
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t first = (row * heads + head) * pieces;
      if (grad_key.data != nullptr) {
        add_row(partial_keys, first, key, row_of<Element>(grad_key, row, index, head));
      }
      if (grad_value.data != nullptr) {
        add_row(partial_values, first, key, row_of<Element>(grad_value, row, index, head));
      }
      for (int64_t i = 0; grad_bias.data != nullptr && i < pieces; ++i) {
        bias += static_cast<double>(partial_bias[(first + i) * keys + key]);
      }
    }
    if (grad_bias.data != nullptr) {
      put_side(grad_bias.data, grad_bias.type, row * grad_bias.sizes[1] + index, bias);
    }
  }

  void add_weights(int64_t row) const {
    const auto& weights = out.image_weights;
    const bool is_wanted = weights.data != nullptr && weights.sizes[2] > 0;
    for (int64_t image = 0; is_wanted && image < op.images; ++image) {
      if (has_weights_per_pixel(op)) {
        for (int64_t pixel = 0; pixel < pixels; ++pixel) {
          double sum = 0;
          for (int64_t head = 0; head < heads; ++head) {
            sum += static_cast<double>(
                pixel_weights[((row * heads + head) * op.images + image) * pixels + pixel]);
          }
          put_side(weights.data, weights.type, (row * op.images + image) * pixels + pixel, sum);
        }
      } else {
        double sum = 0;
        for (int64_t i = 0; i < heads * pieces; ++i) {
          sum += partial_weights[(row * heads * pieces + i) * op.images + image];
        }
        put_side(weights.data, weights.type, row * op.images + image, sum);
      }
    }
    const auto& reading = out.readout_weights;
    for (int64_t i = 0; reading.data != nullptr && i < pixels * reads; ++i) {
      double sum = 0;
      for (int64_t head = 0; head < heads; ++head) {
        sum += static_cast<double>(pixel_reads[(row * heads + head) * pixels * reads + i]);
      }
      put_side(reading.data, reading.type, row * pixels * reads + i, sum);
    }
  }

 private:
  // From lanes to keys; those without a lane get zeros.
  void put_rows(const Lanes<Real>& lanes, const Real* from, Real* to, Real factor) const {
    const int64_t padded = round_up(dims, width);
    std::memset(to, 0, keys * dims * sizeof(Real));
    for (int64_t lane = 0; lane < lanes.count; ++lane) {
      const int64_t key = lanes.source[lane];
      for (int64_t d = 0; key >= 0 && d < dims; ++d) {
        to[key * dims + d] = from[lane * padded + d] * factor;
      }
    }
  }

  void add_row(const Real* partial, int64_t first, int64_t key, Element* to) const {
    alignas(64) Real sum[kMaxHeadDim] = {};
    for (int64_t i = 0; i < pieces; ++i) {
      const Real* from = partial + ((first + i) * keys + key) * dims;
      for (int64_t d = 0; d < dims; ++d) sum[d] += from[d];
    }
    store_row(sum, dims, to);
  }

  static void put_side(void* data, DataType type, int64_t index, double value) {
    Real number[width] = {static_cast<Real>(value)};
    switch (type) {
      case DataType::float64: static_cast<double*>(data)[index] = value; break;
      case DataType::float32: static_cast<float*>(data)[index] = static_cast<float>(value); break;
      case DataType::float16: put_half(static_cast<Float16*>(data) + index, number); break;
      default: put_half(static_cast<Bfloat16*>(data) + index, number);
    }
  }

  template <class Half>
  static void put_half(Half* to, const Real* number) {
    if constexpr (sizeof(Real) == 4) store_row(number, 1, to);
  }

  const LocalizedAttentionBackward& out;
  const LocalizedAttention& op;
  const int64_t rows, pixels, heads, dims, pieces, text;

 public:
  const int64_t keys, reads;

 private:
  Real *partial_keys, *partial_values;  // [units, T + L, D]
  Real* partial_bias;                   // [units, T + L]
  double* partial_weights;              // [units, images]
  Real* pixel_weights;                  // [B, H, images, N]
  Real* pixel_reads;                    // [B, H, N, M]
};

}  // namespace
}  // namespace keylock::KEYLOCK_ISA
