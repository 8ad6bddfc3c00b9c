// How Python describes tensors to a kernel, for bindings.cpp and the module that tests emulate a
// GPU with: nothing of Python in it but what pybind11 makes of its tuples and None.
#pragma once

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "keylock/localized_attention.h"
#include "keylock/updates.h"

namespace keylock {

// A tensor comes as (address, DataType, sizes, strides).
template <int rank>
using Description =
    std::tuple<uintptr_t, DataType, std::array<int64_t, rank>, std::array<int64_t, rank>>;

template <class Data, int rank>
Tensor<rank, Data> describe(const Description<rank>& description) {
  static char nothing;  // an empty tensor is not an absent one
  const auto& [address, type, sizes, strides] = description;
  Tensor<rank, Data> tensor{
      address == 0 ? &nothing : reinterpret_cast<Data*>(address), type, {}, {}};
  for (int d = 0; d < rank; ++d) {
    tensor.sizes[d] = sizes[d];
    tensor.strides[d] = strides[d];
  }
  return tensor;
}

// An absent tensor comes as None, and goes on with null data.
template <int rank>
using Optional = std::optional<Description<rank>>;

template <class Data, int rank>
Tensor<rank, Data> describe(const Optional<rank>& description) {
  return description ? describe<Data, rank>(*description) : Tensor<rank, Data>{};
}

// Updates' members.
using UpdatesInputs = std::tuple<Description<2>, Optional<2>, Optional<1>, Description<2>,
                                 Optional<2>, Optional<3>, Optional<3>>;

inline Updates updates_of(const UpdatesInputs& inputs) {
  const auto& [up, down, offsets, slots, strength, token_weights, coefficients] = inputs;
  return {describe<const void, 2>(up),          describe<const void, 2>(down),
          describe<const void, 1>(offsets),     describe<const void, 2>(slots),
          describe<const void, 2>(strength),    describe<const void, 3>(token_weights),
          describe<const void, 3>(coefficients)};
}

// LocalizedAttention's members up to the outputs, with the lengths where the op's schema has them.
using AttentionInputs =
    std::tuple<Description<4>, Description<4>, Description<4>, double, Optional<2>, Optional<2>,
               Optional<2>, Optional<4>, Optional<4>, std::vector<int64_t>, Optional<2>,
               Optional<3>, Optional<2>, Optional<3>>;

// Points into `inputs`, which must outlive it.
inline LocalizedAttention attention_of(const AttentionInputs& inputs) {
  const auto& [query, key, value, scale, key_bias, query_regions, key_regions, image_key,
               image_value, image_lengths, image_key_bias, image_weights, readout_tokens,
               readout_weights] = inputs;
  return {describe<const void, 4>(query),
          describe<const void, 4>(key),
          describe<const void, 4>(value),
          scale,
          describe<const void, 2>(key_bias),
          describe<const void, 2>(query_regions),
          describe<const void, 2>(key_regions),
          describe<const void, 4>(image_key),
          describe<const void, 4>(image_value),
          image_lengths.data(),
          static_cast<int64_t>(image_lengths.size()),
          describe<const void, 2>(image_key_bias),
          describe<const void, 3>(image_weights),
          describe<const void, 2>(readout_tokens),
          describe<const void, 3>(readout_weights),
          {},
          {}};
}

}  // namespace keylock
