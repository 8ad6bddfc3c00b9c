// The Python module keylock_kernels._native: the only file here that knows Python. It trusts its
// caller, keylock_kernels/native.py, with pointers that stay valid during the call, and nothing
// more: kernels check every size and slot themselves.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#if defined(KEYLOCK_HAVE_CUDA)
#include "cuda_bindings.h"
#endif
#include "descriptions.h"
#include "keylock/instruction_set.h"
#include "keylock/localized_attention.h"
#include "keylock/low_rank_linear.h"
#include "keylock/low_rank_update.h"

namespace py = pybind11;

namespace keylock {
namespace {

void require_usable(InstructionSet set) {
  if (!is_usable(set)) throw py::value_error("this machine cannot run that instruction set");
}

Status low_rank_linear_of(const Description<3>& x, const Description<2>& weight,
                          const Optional<1>& bias, const Optional<2>& scale,
                          const UpdatesInputs& updates, const Description<3>& y, InstructionSet set,
                          int threads) {
  require_usable(set);
  const LowRankLinear op{describe<const void, 3>(x),    describe<const void, 2>(weight),
                         describe<const void, 1>(bias), describe<const void, 2>(scale),
                         updates_of(updates),           describe<void, 3>(y)};
  const py::gil_scoped_release release;
  return low_rank_linear(op, set, threads);
}

Status low_rank_update_of(const Description<3>& base, const Optional<3>& x,
                          const UpdatesInputs& updates, const Description<3>& y, InstructionSet set,
                          int threads) {
  require_usable(set);
  const LowRankUpdate op{describe<const void, 3>(base), describe<const void, 3>(x),
                         updates_of(updates), describe<void, 3>(y)};
  const py::gil_scoped_release release;
  return low_rank_update(op, set, threads);
}

Status low_rank_backward_of(const Description<3>& grad, const Description<2>& up,
                            const Description<2>& rows, const Description<3>& coefficients,
                            const Optional<2>& grad_up, const Optional<3>& grad_coefficients,
                            InstructionSet set, int threads) {
  require_usable(set);
  const LowRankBackward op{describe<const void, 3>(grad), describe<const void, 2>(up),
                           describe<const void, 2>(rows), describe<const void, 3>(coefficients),
                           describe<void, 2>(grad_up),    describe<void, 3>(grad_coefficients)};
  const py::gil_scoped_release release;
  return low_rank_backward(op, set, threads);
}

Status localized_attention_of(const AttentionInputs& inputs, const Description<4>& out,
                              const Optional<4>& readout, InstructionSet set, int threads) {
  require_usable(set);
  LocalizedAttention op = attention_of(inputs);
  op.out = describe<void, 4>(out);
  op.readout = describe<void, 4>(readout);
  const py::gil_scoped_release release;
  return localized_attention(op, set, threads);
}

// The gradients of the floating-point inputs, in their order.
using AttentionGradients =
    std::tuple<Optional<4>, Optional<4>, Optional<4>, Optional<2>, Optional<4>, Optional<4>,
               Optional<2>, Optional<3>, Optional<3>>;

Status localized_attention_backward_of(const AttentionInputs& inputs, const Optional<4>& grad_out,
                                       const Optional<4>& grad_readout,
                                       const AttentionGradients& gradients, InstructionSet set,
                                       int threads) {
  require_usable(set);
  const auto& [query, key, value, key_bias, image_key, image_value, image_key_bias, image_weights,
               readout_weights] = gradients;
  const LocalizedAttentionBackward op{attention_of(inputs),
                                      describe<const void, 4>(grad_out),
                                      describe<const void, 4>(grad_readout),
                                      describe<void, 4>(query),
                                      describe<void, 4>(key),
                                      describe<void, 4>(value),
                                      describe<void, 2>(key_bias),
                                      describe<void, 4>(image_key),
                                      describe<void, 4>(image_value),
                                      describe<void, 2>(image_key_bias),
                                      describe<void, 3>(image_weights),
                                      describe<void, 3>(readout_weights)};
  const py::gil_scoped_release release;
  return localized_attention_backward(op, set, threads);
}

std::vector<InstructionSet> sets_where(bool (*holds)(InstructionSet)) {
  std::vector<InstructionSet> sets;
  for (const auto set : {InstructionSet::portable, InstructionSet::avx2, InstructionSet::avx512,
                         InstructionSet::avx512_bf16}) {
    if (holds(set)) sets.push_back(set);
  }
  return sets;
}

}  // namespace
}  // namespace keylock

PYBIND11_MODULE(_native, module) {
  using namespace keylock;

  py::enum_<DataType>(module, "DataType")
      .value("float32", DataType::float32)
      .value("float64", DataType::float64)
      .value("float16", DataType::float16)
      .value("bfloat16", DataType::bfloat16)
      .value("int32", DataType::int32);
  py::enum_<Status>(module, "Status")
      .value("ok", Status::ok)
      .value("unsupported_type", Status::unsupported_type)
      .value("shape_mismatch", Status::shape_mismatch)
      .value("slot_out_of_range", Status::slot_out_of_range)
      .value("offset_out_of_range", Status::offset_out_of_range)
      .value("token_out_of_range", Status::token_out_of_range)
      .value("out_of_memory", Status::out_of_memory)
      .value("too_many_streams", Status::too_many_streams)
      .value("too_large", Status::too_large)
      .value("launch_failed", Status::launch_failed);
  py::enum_<InstructionSet>(module, "InstructionSet")
      .value("portable", InstructionSet::portable)
      .value("avx2", InstructionSet::avx2)
      .value("avx512", InstructionSet::avx512)
      .value("avx512_bf16", InstructionSet::avx512_bf16);

  module.attr("compiler") = KEYLOCK_COMPILER;
#if defined(_OPENMP)
  module.attr("openmp") = true;
#else
  module.attr("openmp") = false;
#endif
  module.def("compiled_instruction_sets", [] { return sets_where(is_compiled); });
  module.def("usable_instruction_sets", [] { return sets_where(is_usable); });
  module.def("low_rank_linear", &low_rank_linear_of, py::arg("x"), py::arg("weight"),
             py::arg("bias"), py::arg("scale"), py::arg("updates"), py::arg("y"), py::kw_only(),
             py::arg("instruction_set"), py::arg("threads"));
  module.def("low_rank_update", &low_rank_update_of, py::arg("base"), py::arg("x"),
             py::arg("updates"), py::arg("y"), py::kw_only(), py::arg("instruction_set"),
             py::arg("threads"));
  module.def("low_rank_backward", &low_rank_backward_of, py::arg("grad"), py::arg("up"),
             py::arg("rows"), py::arg("coefficients"), py::arg("grad_up"),
             py::arg("grad_coefficients"), py::kw_only(), py::arg("instruction_set"),
             py::arg("threads"));
  module.def("localized_attention", &localized_attention_of, py::arg("inputs"), py::arg("out"),
             py::arg("readout"), py::kw_only(), py::arg("instruction_set"), py::arg("threads"));
  module.def("localized_attention_backward", &localized_attention_backward_of, py::arg("inputs"),
             py::arg("grad_out"), py::arg("grad_readout"), py::arg("gradients"), py::kw_only(),
             py::arg("instruction_set"), py::arg("threads"));
#if defined(KEYLOCK_HAVE_CUDA)
  cuda::define_ops(module);
#endif
}
