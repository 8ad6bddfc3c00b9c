// What a Python module offers of csrc/cuda: on a GPU in bindings.cpp, and emulated in a test's own
// module. Tensors are described as in bindings.cpp; None stands for an absent one.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "keylock/cuda.h"

namespace keylock::cuda {

template <int rank>
using Described =
    std::tuple<uintptr_t, DataType, std::array<int64_t, rank>, std::array<int64_t, rank>>;
template <int rank>
using Optional = std::optional<Described<rank>>;

template <int rank, class Data = const void>
Tensor<rank, Data> tensor_of(const Optional<rank>& described) {
  Tensor<rank, Data> tensor{};
  if (!described.has_value()) return tensor;
  const auto& [address, type, sizes, strides] = *described;
  tensor.data = reinterpret_cast<Data*>(address);
  tensor.type = type;
  for (int d = 0; d < rank; ++d) {
    tensor.sizes[d] = sizes[d];
    tensor.strides[d] = strides[d];
  }
  return tensor;
}

inline Status localized_attention_of(
    const Optional<4>& query, const Optional<4>& key, const Optional<4>& value, double scale,
    const Optional<2>& key_bias, const Optional<2>& query_regions, const Optional<2>& key_regions,
    const Optional<4>& image_key, const Optional<4>& image_value,
    const std::vector<int64_t>& image_lengths, const Optional<2>& image_key_bias,
    const Optional<3>& image_weights, const Optional<2>& readout_tokens,
    const Optional<3>& readout_weights, const Optional<4>& out, const Optional<4>& readout,
    uintptr_t stream) {
  const LocalizedAttention op{tensor_of<4>(query),
                              tensor_of<4>(key),
                              tensor_of<4>(value),
                              scale,
                              tensor_of<2>(key_bias),
                              tensor_of<2>(query_regions),
                              tensor_of<2>(key_regions),
                              tensor_of<4>(image_key),
                              tensor_of<4>(image_value),
                              image_lengths.data(),
                              static_cast<int64_t>(image_lengths.size()),
                              tensor_of<2>(image_key_bias),
                              tensor_of<3>(image_weights),
                              tensor_of<2>(readout_tokens),
                              tensor_of<3>(readout_weights),
                              tensor_of<4, void>(out),
                              tensor_of<4, void>(readout)};
  const pybind11::gil_scoped_release release;
  return localized_attention(op, reinterpret_cast<void*>(stream));
}

inline Status rank_one_linear_of(const Optional<3>& x, const Optional<2>& weight,
                                 const Optional<1>& bias, const Optional<2>& u,
                                 const Optional<2>& slots, const Optional<3>& coefficients,
                                 const Optional<3>& y, uintptr_t stream) {
  const RankOneLinear op{tensor_of<3>(x),      tensor_of<2>(weight), tensor_of<1>(bias),
                         tensor_of<2>(u),      tensor_of<2>(slots),  tensor_of<3>(coefficients),
                         tensor_of<3, void>(y)};
  const pybind11::gil_scoped_release release;
  return rank_one_linear(op, reinterpret_cast<void*>(stream));
}

inline Status rank_one_update_of(const Optional<3>& base, const Optional<2>& u,
                                 const Optional<2>& slots, const Optional<3>& coefficients,
                                 const Optional<3>& y, uintptr_t stream) {
  const RankOneUpdate op{tensor_of<3>(base), tensor_of<2>(u), tensor_of<2>(slots),
                         tensor_of<3>(coefficients), tensor_of<3, void>(y)};
  const pybind11::gil_scoped_release release;
  return rank_one_update(op, reinterpret_cast<void*>(stream));
}

inline void define_ops(pybind11::module_& module) {
  module.attr("cuda_sources") = KEYLOCK_CUDA_SOURCES;  // a digest of csrc/cuda
  module.attr("max_image_streams") = kMaxImageStreams;
  module.attr("readout_pixels") = kReadoutPixels;
  module.def("cuda_localized_attention", &localized_attention_of);
  module.def("cuda_rank_one_linear", &rank_one_linear_of);
  module.def("cuda_rank_one_update", &rank_one_update_of);
}

}  // namespace keylock::cuda
