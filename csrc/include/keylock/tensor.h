// What every kernel is handed: raw memory with its type, sizes and strides. The kernels know no
// framework's tensor class, so one build serves every version of it.
#pragma once

#include <cstdint>

namespace keylock {

enum class DataType { float32, float64, float16, bfloat16, int32 };

// Strides count elements, not bytes. Plain arrays and no member functions: the struct crosses
// into files compiled for other instruction sets, and an inline function emitted in both could
// be linked from the wrong one.
template <int rank, class Data = const void>
struct Tensor {
  Data* data;
  DataType type;
  int64_t sizes[rank];
  int64_t strides[rank];
};

// Kernels return one of these and throw nothing; nothing is written unless it is `ok`.
enum class Status {
  ok,
  unsupported_type,
  shape_mismatch,
  slot_out_of_range,
  offset_out_of_range,
  token_out_of_range,
  out_of_memory,
  too_many_streams,
  too_large,      // more pixels, keys or blocks of work than one launch can have
  launch_failed,  // the GPU's driver refused
};

}  // namespace keylock
