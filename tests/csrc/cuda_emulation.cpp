// The Python module that tests drive the CUDA kernels with, on the CPU: the same sources, compiled
// for the host (csrc/cuda/host_emulation.h). Never installed.
#include "cuda_bindings.h"
#include "device.h"

PYBIND11_MODULE(_cuda_emulation, module) {
  using namespace keylock;
  namespace py = pybind11;

  // Local to this module, since the installed one has these types too.
  py::enum_<DataType>(module, "DataType", py::module_local())
      .value("float32", DataType::float32)
      .value("float64", DataType::float64)
      .value("float16", DataType::float16)
      .value("bfloat16", DataType::bfloat16)
      .value("int32", DataType::int32);
  py::enum_<Status>(module, "Status", py::module_local())
      .value("ok", Status::ok)
      .value("unsupported_type", Status::unsupported_type)
      .value("shape_mismatch", Status::shape_mismatch)
      .value("slot_out_of_range", Status::slot_out_of_range)
      .value("too_many_streams", Status::too_many_streams)
      .value("too_large", Status::too_large)
      .value("launch_failed", Status::launch_failed);
  cuda::define_ops(module);
  module.def(
      "configure",
      [](int processors, bool reversed) {
        cuda::emulation.processors = processors;
        cuda::emulation.reversed = reversed;
      },
      py::kw_only(), py::arg("processors"), py::arg("reversed"));
  module.def("counts", [] {
    const cuda::Emulation& e = cuda::emulation;
    return py::dict(py::arg("wide") = e.wide_bytes, py::arg("narrow") = e.narrow_bytes,
                    py::arg("products") = e.products);
  });
}
