// What the rows of a batch add to a projection: each its own updates of low rank.
//   sum over j and p of s m (down[p] . x[b, n]) * up[p, :]
// with s = strength[b, j], m = token_weights[b, j, n] and offsets[k] <= p < offsets[k + 1] for
// k = slots[b, j]. Without offsets a slot is itself the row p; it then may have a coefficient given
// for each token instead.
#pragma once

#include "keylock/tensor.h"

namespace keylock {

// A slot of -1 is nothing, and so is a coefficient of 0, whatever the tables hold; duplicates add.
// Absent tensors have null data.
struct Updates {
  Tensor<2> up;             // [P, O] rows contiguous
  Tensor<2> down;           // [P, K] rows contiguous; absent where coefficients are given
  Tensor<1> offsets;        // [S + 1] int32, contiguous; absent: S = P, and every slot one row
  Tensor<2> slots;          // [B, J] int32
  Tensor<2> strength;       // [B, J] optional, float32 (float64 beside float64 activations)
  Tensor<3> token_weights;  // [B, J, N] optional, that type
  Tensor<3> coefficients;   // [B, N, J] that type; absent where down is given
};

}  // namespace keylock
