// y[b, t, :] = weight x[b, t, :] + bias + sum_r coefficients[b, t, r] * u[slots[b, r], :]
#pragma once

#include "keylock/instruction_set.h"
#include "keylock/tensor.h"

namespace keylock {

struct RankOneLinear {
  Tensor<3> x;             // [B, T, K] float32 or bfloat16, one distance from token to token, batch
                           // rows included; for bfloat16 it and K are even
  Tensor<2> weight;        // [O, K] x's type
  Tensor<1> bias;          // [O] float32 or bfloat16, optional: null data
  Tensor<2> u;             // [S, O] float32 or bfloat16
  Tensor<2> slots;         // [B, R] int32: the row of u, or -1 for none; duplicates add
  Tensor<3> coefficients;  // [B, T, R] float32 or float64
  Tensor<3, void> y;       // [B, T, O] x's type, no overlap with any
};

// For tensors whose last dimension is contiguous, in float32 with AVX-512 and in bfloat16 with
// AVX-512 BF16; unsupported_type elsewhere. Sums in float32 and rounds once, which a library's
// product in bfloat16, rounded itself, does not allow for. A slot of -1 is skipped, never
// multiplied by zero. The bits of a row depend on that row alone: not on the other rows, not on
// where it stands, and not on the number of threads.
Status rank_one_linear(const RankOneLinear& op, InstructionSet set, int threads);

}  // namespace keylock
