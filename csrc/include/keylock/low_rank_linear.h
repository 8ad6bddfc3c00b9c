// y[b, n, :] = scale[b, :] * (weight x[b, n, :] + the row's updates) + bias
#pragma once

#include "keylock/instruction_set.h"
#include "keylock/updates.h"

namespace keylock {

struct LowRankLinear {
  Tensor<3> x;        // [B, N, K] float32 or bfloat16, one distance from token to token, batch rows
                      // included; for bfloat16 it and K are even
  Tensor<2> weight;   // [O, K] x's type
  Tensor<1> bias;     // [O] float32 or bfloat16, optional
  Tensor<2> scale;    // [B, O] float32 or bfloat16, optional
  Updates updates;    // tables in float32 or bfloat16
  Tensor<3, void> y;  // [B, N, O] x's type, no overlap with any
};

// For tensors whose last dimension is contiguous, in float32 with AVX-512 and in bfloat16 with
// AVX-512 BF16; unsupported_type elsewhere. Sums in float32 and rounds once, which a library's
// product in bfloat16, rounded itself, does not allow for. The bits of a row depend on that row
// alone: not on the other rows, not on where it stands, and not on the number of threads.
Status low_rank_linear(const LowRankLinear& op, InstructionSet set, int threads);

}  // namespace keylock
