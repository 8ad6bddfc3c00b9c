// y[b, t, :] = weight x[b, t] + bias + sum_r coefficients[b, t, r] * u[slots[b, r], :]
#pragma once

#include "keylock/tensor.h"

namespace keylock {

// Last dimensions are contiguous but those of slots and coefficients.
struct RankOneLinear {
  Tensor<3> x;             // [B, T, K]
  Tensor<2> weight;        // [O, K] the type of x
  Tensor<1> bias;          // [O], optional: absent where its data is null
  Tensor<2> u;             // [S, O]
  Tensor<2> slots;         // [B, R] int32: the row of u, or -1 for none; duplicates add
  Tensor<3> coefficients;  // [B, T, R] float32
  Tensor<3, void> y;       // [B, T, O] the type of x, no overlap with any
};

}  // namespace keylock
