// y[b, t, :] = base[b, t, :] + sum_r coefficients[b, t, r] * u[slots[b, r], :]
#pragma once

#include "keylock/instruction_set.h"
#include "keylock/tensor.h"

namespace keylock {

struct RankOneUpdate {
  Tensor<3> base;          // [B, T, O] any floating type, last dimension contiguous
  Tensor<2> u;             // [S, O] any floating type, last dimension contiguous
  Tensor<2> slots;         // [B, R] int32: the row of u, or -1 for none; duplicates add
  Tensor<3> coefficients;  // [B, T, R] float32 or float64
  Tensor<3, void> y;       // [B, T, O] base's type, last dimension contiguous, no overlap with any
};

// Sums in float32 (float64 for a float64 base), in the order of r, adds base last and rounds once.
// A slot of -1 is skipped, never multiplied by zero. The bits of a row depend on that row alone:
// not on the other rows, and not on the number of threads.
Status rank_one_update(const RankOneUpdate& op, InstructionSet set, int threads);

// The gradients of u and of the coefficients, either of which may be absent; base's is `grad`.
// grad_u[s] = sum of coefficients[b, t, r] * grad[b, t] over slots[b, r] = s
// grad_coefficients[b, t, r] = grad[b, t] . u[slots[b, r]], and 0 where there is no slot
struct RankOneUpdateBackward {
  Tensor<3> grad;                     // [B, T, O] any floating type, last dimension contiguous
  Tensor<2> u;                        // [S, O] any floating type, last dimension contiguous
  Tensor<2> slots;                    // [B, R] int32
  Tensor<3> coefficients;             // [B, T, R] float32 or float64
  Tensor<2, void> grad_u;             // [S, O] float32 (float64 for a float64 grad), contiguous
  Tensor<3, void> grad_coefficients;  // [B, T, R] that type, contiguous
};

// The bits of a row's part depend on that row alone, and none on the number of threads.
Status rank_one_update_backward(const RankOneUpdateBackward& op, InstructionSet set, int threads);

}  // namespace keylock
