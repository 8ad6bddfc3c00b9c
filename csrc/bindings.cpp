// The Python module keylock_kernels._native: the only file here that knows Python. It trusts its
// caller, keylock_kernels/native.py, with pointers that stay valid during the call, and nothing
// more: kernels check every size and slot themselves.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>
#include <vector>

#if defined(KEYLOCK_HAVE_CUDA)
#include "cuda_bindings.h"
#endif
#include "keylock/instruction_set.h"
#include "keylock/rank_one_update.h"
#include "keylock/tensor.h"

namespace py = pybind11;

namespace keylock {
namespace {

// A tensor comes as (address, DataType, sizes, strides).
template <int rank>
using Description =
    std::tuple<uintptr_t, DataType, std::array<int64_t, rank>, std::array<int64_t, rank>>;

template <class Data, int rank>
Tensor<rank, Data> describe(const Description<rank>& description) {
  const auto& [address, type, sizes, strides] = description;
  Tensor<rank, Data> tensor{reinterpret_cast<Data*>(address), type, {}, {}};
  for (int d = 0; d < rank; ++d) {
    tensor.sizes[d] = sizes[d];
    tensor.strides[d] = strides[d];
  }
  return tensor;
}

Status rank_one_update_of(const Description<3>& base, const Description<2>& u,
                          const Description<2>& slots, const Description<3>& coefficients,
                          const Description<3>& y, InstructionSet set, int threads) {
  if (!is_usable(set)) throw py::value_error("this machine cannot run that instruction set");
  const RankOneUpdate op{describe<const void, 3>(base), describe<const void, 2>(u),
                         describe<const void, 2>(slots), describe<const void, 3>(coefficients),
                         describe<void, 3>(y)};
  const py::gil_scoped_release release;
  return rank_one_update(op, set, threads);
}

std::vector<InstructionSet> sets_where(bool (*holds)(InstructionSet)) {
  std::vector<InstructionSet> sets;
  for (const auto set : {InstructionSet::portable, InstructionSet::avx2, InstructionSet::avx512}) {
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
      .value("too_many_streams", Status::too_many_streams)
      .value("too_large", Status::too_large)
      .value("launch_failed", Status::launch_failed);
  py::enum_<InstructionSet>(module, "InstructionSet")
      .value("portable", InstructionSet::portable)
      .value("avx2", InstructionSet::avx2)
      .value("avx512", InstructionSet::avx512);

  module.attr("compiler") = KEYLOCK_COMPILER;
#if defined(_OPENMP)
  module.attr("openmp") = true;
#else
  module.attr("openmp") = false;
#endif
  module.def("compiled_instruction_sets", [] { return sets_where(is_compiled); });
  module.def("usable_instruction_sets", [] { return sets_where(is_usable); });
  module.def("rank_one_update", &rank_one_update_of, py::arg("base"), py::arg("u"),
             py::arg("slots"), py::arg("coefficients"), py::arg("y"), py::kw_only(),
             py::arg("instruction_set"), py::arg("threads"));
#if defined(KEYLOCK_HAVE_CUDA)
  cuda::define_ops(module);
#endif
}
