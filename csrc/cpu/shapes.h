// Questions that every kernel asks of what it is handed.
#pragma once

#include "keylock/tensor.h"

namespace keylock::KEYLOCK_ISA {
namespace {

template <int rank, class Data>
bool is_floating(const Tensor<rank, Data>& tensor) {
  return tensor.type != DataType::int32;
}

template <int rank, class Data>
bool has_sizes(const Tensor<rank, Data>& tensor, const int64_t (&sizes)[rank]) {
  bool fits = true;
  for (int d = 0; d < rank; ++d) fits &= tensor.sizes[d] == sizes[d];
  return fits;
}

// Whether the last dimension is contiguous.
template <int rank, class Data>
bool has_rows(const Tensor<rank, Data>& tensor) {
  return tensor.strides[rank - 1] == 1 || tensor.sizes[rank - 1] <= 1;
}

}  // namespace
}  // namespace keylock::KEYLOCK_ISA
