// What the update and its gradients share: reading slots and coefficients, and checking them.
#pragma once

#include "keylock/rank_one_update.h"
#include "shapes.h"
#include "vector.h"

namespace keylock::KEYLOCK_ISA {
namespace {

template <class Accumulated>
Accumulated coefficient_at(const Tensor<3>& coefficients, int64_t row, int64_t token, int64_t r) {
  const int64_t* strides = coefficients.strides;
  const int64_t offset = row * strides[0] + token * strides[1] + r * strides[2];
  if (coefficients.type == DataType::float64) {
    return static_cast<Accumulated>(static_cast<const double*>(coefficients.data)[offset]);
  }
  return static_cast<Accumulated>(static_cast<const float*>(coefficients.data)[offset]);
}

inline int32_t slot_at(const Tensor<2>& slots, int64_t row, int64_t r) {
  const int64_t offset = row * slots.strides[0] + r * slots.strides[1];
  return static_cast<const int32_t*>(slots.data)[offset];
}

// What is added to an output of these sizes, [B, T, O].
template <class Op>
Status validate_updates(const Op& op, const int64_t (&sizes)[3]) {
  const int64_t rows = sizes[0], rank = op.slots.sizes[1];
  if (op.slots.type != DataType::int32 || !is_floating(op.u) ||
      (op.coefficients.type != DataType::float32 && op.coefficients.type != DataType::float64)) {
    return Status::unsupported_type;
  }
  if (op.slots.sizes[0] != rows || !has_sizes(op.u, {op.u.sizes[0], sizes[2]}) || !has_rows(op.u) ||
      !has_sizes(op.coefficients, {rows, sizes[1], rank})) {
    return Status::shape_mismatch;
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t r = 0; r < rank; ++r) {
      const int32_t slot = slot_at(op.slots, row, r);
      if (slot < -1 || slot >= op.u.sizes[0]) return Status::slot_out_of_range;
    }
  }
  return Status::ok;
}

}  // namespace
}  // namespace keylock::KEYLOCK_ISA
