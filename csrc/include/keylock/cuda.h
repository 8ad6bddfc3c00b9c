// The ops on a GPU, forward. Tensors lie in the memory of the current device; `stream` is a
// cudaStream_t. Results are there once the stream has come to them, and repeat bit for bit. What
// these need and cannot have, they say in their status; nothing here waits for the device.
#pragma once

#include "keylock/localized_attention.h"
#include "keylock/low_rank_linear.h"
#include "keylock/low_rank_update.h"

namespace keylock::cuda {

constexpr int64_t kMaxImageStreams = 128;
constexpr int64_t kReadoutPixels = 16;

// As on a CPU, for float16, bfloat16 and float32, with two differences: a read-out token that does
// not exist reads NaN; and with readout_weights, `readout` is [B, H, ceil(N / kReadoutPixels), M],
// the sums over that many pixels each, for the caller to add up.
Status localized_attention(const LocalizedAttention& op, void* stream);

// For float16, bfloat16 and float32 x or base of any strides but that the last dimension is
// contiguous, as it is in weight and the table; weight and y have x's type, table, bias and scale
// that or float32. Updates come with their coefficients, float32, and slots that are rows of the
// table. Sums as on a CPU; a slot outside [-1, P) makes its row NaN.
Status low_rank_linear(const LowRankLinear& op, void* stream);
Status low_rank_update(const LowRankUpdate& op, void* stream);

}  // namespace keylock::cuda
