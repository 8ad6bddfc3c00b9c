// The Python module that tests drive the CUDA kernels with, on the CPU: the same sources, compiled
// for the host (csrc/cuda/host_emulation.h). Never installed.
#include "cuda_bindings.h"
#include "device.h"

namespace keylock::cuda {
namespace {

// Copies numbers through shared memory, reversed, with at most one mistake on the way.
struct Reversal {
  static constexpr int kThreads = 64;
  struct Params {
    std::string mistake;
    const float* from;  // [4 kThreads], aligned to 16 bytes
    float* to;
  };

  static void run(const Params& p, Shared<unsigned char> memory) {
    const auto has = [&](const char* mistake) { return p.mistake == mistake; };
    const Shared<float> numbers = shared_cast<float>(memory);
    const int mine = thread_index() * 4;
    if (!has("uninitialised") || thread_index() != 7) {
      copy_async(numbers + (mine + (has("misaligned") ? 1 : 0)), p.from + mine, 16);
    }
    if (!has("no commit")) commit_copies();
    if (!has("no wait")) wait_for_copies<0>();
    if (has("divergence") && thread_index() == 5) {
      exchange(0, 1);
    } else if (!has("some lanes only") || thread_index() != 5) {
      sync_warp();
    }
    if (!has("no barrier")) sync_block();
    const int last = 4 * kThreads - 1 + (has("outside") ? 1 : 0);
    for (int i = mine; i < mine + 4; ++i) p.to[i] = numbers[last - i];
  }
};

// What is wrong with the result, or what the machine noticed; empty if nothing.
std::string run_with(const std::string& mistake) {
  constexpr int kNumbers = 4 * Reversal::kThreads;
  alignas(16) float from[kNumbers], to[kNumbers];
  for (int i = 0; i < kNumbers; ++i) from[i] = static_cast<float>(i);
  try {
    launch<Reversal>({mistake, from, to}, 1, sizeof(from), nullptr);
  } catch (const std::exception& error) {
    return error.what();
  }
  for (int i = 0; i < kNumbers; ++i) {
    if (to[i] != from[kNumbers - 1 - i]) return "wrong result";
  }
  return "";
}

}  // namespace
}  // namespace keylock::cuda

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
  module.def("run_with", &cuda::run_with);
  module.def("counts", [] {
    const cuda::Emulation& e = cuda::emulation;
    return py::dict(py::arg("wide") = e.wide_bytes, py::arg("narrow") = e.narrow_bytes,
                    py::arg("products") = e.products);
  });
}
