// What a Python module offers of csrc/cuda: on a GPU in bindings.cpp, and emulated in a test's own
// module.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "descriptions.h"
#include "keylock/cuda.h"

namespace keylock::cuda {

inline Status localized_attention_of(const AttentionInputs& inputs, const Description<4>& out,
                                     const Optional<4>& readout, uintptr_t stream) {
  LocalizedAttention op = attention_of(inputs);
  op.out = describe<void, 4>(out);
  op.readout = describe<void, 4>(readout);
  const pybind11::gil_scoped_release release;
  return localized_attention(op, reinterpret_cast<void*>(stream));
}

inline Status low_rank_linear_of(const Description<3>& x, const Description<2>& weight,
                                 const Optional<1>& bias, const Optional<2>& scale,
                                 const UpdatesInputs& updates, const Description<3>& y,
                                 uintptr_t stream) {
  const LowRankLinear op{describe<const void, 3>(x),    describe<const void, 2>(weight),
                         describe<const void, 1>(bias), describe<const void, 2>(scale),
                         updates_of(updates),           describe<void, 3>(y)};
  const pybind11::gil_scoped_release release;
  return low_rank_linear(op, reinterpret_cast<void*>(stream));
}

inline Status low_rank_update_of(const Description<3>& base, const UpdatesInputs& updates,
                                 const Description<3>& y, uintptr_t stream) {
  const LowRankUpdate op{
      describe<const void, 3>(base), {}, updates_of(updates), describe<void, 3>(y)};
  const pybind11::gil_scoped_release release;
  return low_rank_update(op, reinterpret_cast<void*>(stream));
}

inline void define_ops(pybind11::module_& module) {
  module.attr("cuda_sources") = KEYLOCK_CUDA_SOURCES;  // a digest of csrc/cuda
  module.attr("max_image_streams") = kMaxImageStreams;
  module.attr("readout_pixels") = kReadoutPixels;
  module.def("cuda_localized_attention", &localized_attention_of);
  module.def("cuda_low_rank_linear", &low_rank_linear_of);
  module.def("cuda_low_rank_update", &low_rank_update_of);
}

}  // namespace keylock::cuda
