// y[b, n, :] = base[b, n, :] + the row's updates
#pragma once

#include "keylock/instruction_set.h"
#include "keylock/updates.h"

namespace keylock {

struct LowRankUpdate {
  Tensor<3> base;     // [B, N, O] any floating type, last dimension contiguous
  Tensor<3> x;        // [B, N, K] base's type, last dimension contiguous; absent as updates.down
  Updates updates;    // tables of any floating type
  Tensor<3, void> y;  // [B, N, O] base's type, last dimension contiguous; base, or no overlap
};

// Sums in float32 (float64 for a float64 base), adds base last and rounds once. The bits of a row
// depend on that row alone: not on the other rows, and not on the number of threads.
Status low_rank_update(const LowRankUpdate& op, InstructionSet set, int threads);

// The gradients of up and of the coefficients, either of which may be absent; base's is `grad`.
// grad_up[p] = sum of coefficients[b, n, r] * grad[b, n] over rows[b, r] = p
// grad_coefficients[b, n, r] = grad[b, n] . up[rows[b, r]], and 0 where there is no row
struct LowRankBackward {
  Tensor<3> grad;                     // [B, N, O] any floating type, last dimension contiguous
  Tensor<2> up;                       // [P, O] any floating type, last dimension contiguous
  Tensor<2> rows;                     // [B, R] int32, -1 for none
  Tensor<3> coefficients;             // [B, N, R] float32 or float64
  Tensor<2, void> grad_up;            // [P, O] float32 (float64 for a float64 grad), contiguous
  Tensor<3, void> grad_coefficients;  // [B, N, R] that type, contiguous
};

// The bits of a row's part depend on that row alone, and none on the number of threads.
Status low_rank_backward(const LowRankBackward& op, InstructionSet set, int threads);

}  // namespace keylock
