// The gated rank-one updates on a GPU: the checks, and which kernel a call takes.
#include "rank_one_kernel.h"

namespace keylock::cuda {
namespace {

constexpr int64_t kPromptTokens = 160;  // a row of more tokens is tiled as pixels

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <int rank>
bool is_side(const Tensor<rank>& tensor, DataType type) {
  return tensor.type == type || tensor.type == DataType::float32;
}

template <class Kernel>
Status launch_linear(const RankOneLinear& op, int64_t tokens, int64_t outputs, void* stream) {
  typename Kernel::Params params{};
  params.op = op;
  params.down = divide_up(op.x.sizes[1], tokens);
  params.across = divide_up(op.weight.sizes[0], outputs);
  params.is_wide = is_wide(op.x) && is_wide(op.weight);
  params.y_is_wide = is_wide(op.y);
  return launch<Kernel>(params, op.x.sizes[0] * params.down * params.across, Kernel::kSharedBytes,
                        stream);
}

// The 77 tokens of a prompt fill a tile of 80.
template <class T>
Status linear(const RankOneLinear& op, void* stream) {
  if constexpr (sizeof(T) == 4) {
    return launch_linear<LinearForward<T, 80, 64, 1, 4>>(op, 80, 64, stream);
  } else {
    if (op.x.sizes[1] <= kPromptTokens) {
      return launch_linear<LinearForward<T, 80, 64, 1, 4>>(op, 80, 64, stream);
    }
    return launch_linear<LinearForward<T, 128, 128, 4, 2>>(op, 128, 128, stream);
  }
}

template <class T>
Status update(const RankOneUpdate& op, void* stream) {
  using Kernel = UpdateForward<T>;
  typename Kernel::Params params{};
  params.op = op;
  params.pieces = divide_up(op.y.sizes[2], kChunk<T>);
  params.blocks =
      divide_up(divide_up(op.y.sizes[1], Kernel::kTokens) * params.pieces, Kernel::kThreads);
  params.is_wide = is_wide(op.base) && is_wide(op.y);
  return launch<Kernel>(params, op.y.sizes[0] * params.blocks, 0, stream);
}

}  // namespace

Status rank_one_linear(const RankOneLinear& op, void* stream) {
  const DataType type = op.x.type;
  if (op.weight.type != type || op.y.type != type || !is_side(op.u, type) ||
      (op.bias.data != nullptr && !is_side(op.bias, type)) || op.slots.type != DataType::int32 ||
      op.coefficients.type != DataType::float32) {
    return Status::unsupported_type;
  }
  const int64_t rows = op.x.sizes[0], tokens = op.x.sizes[1], outputs = op.weight.sizes[0];
  const bool fits =
      op.weight.sizes[1] == op.x.sizes[2] && op.u.sizes[1] == outputs &&
      (op.bias.data == nullptr || op.bias.sizes[0] == outputs) && op.slots.sizes[0] == rows &&
      op.coefficients.sizes[0] == rows && op.coefficients.sizes[1] == tokens &&
      op.coefficients.sizes[2] == op.slots.sizes[1] && op.y.sizes[0] == rows &&
      op.y.sizes[1] == tokens && op.y.sizes[2] == outputs && is_row_contiguous(op.x) &&
      is_row_contiguous(op.weight) && is_row_contiguous(op.u) && is_row_contiguous(op.y);
  if (!fits) return Status::shape_mismatch;
  switch (type) {
    case DataType::float16: return linear<Half>(op, stream);
    case DataType::bfloat16: return linear<Bfloat>(op, stream);
    case DataType::float32: return linear<float>(op, stream);
    default: return Status::unsupported_type;
  }
}

Status rank_one_update(const RankOneUpdate& op, void* stream) {
  const DataType type = op.base.type;
  if (op.y.type != type || !is_side(op.u, type) || op.slots.type != DataType::int32 ||
      op.coefficients.type != DataType::float32) {
    return Status::unsupported_type;
  }
  const int64_t rows = op.y.sizes[0], tokens = op.y.sizes[1], columns = op.y.sizes[2];
  const bool fits =
      op.base.sizes[0] == rows && op.base.sizes[1] == tokens && op.base.sizes[2] == columns &&
      op.u.sizes[1] == columns && op.slots.sizes[0] == rows && op.coefficients.sizes[0] == rows &&
      op.coefficients.sizes[1] == tokens && op.coefficients.sizes[2] == op.slots.sizes[1] &&
      is_row_contiguous(op.base) && is_row_contiguous(op.u) && is_row_contiguous(op.y);
  if (!fits) return Status::shape_mismatch;
  switch (type) {
    case DataType::float16: return update<Half>(op, stream);
    case DataType::bfloat16: return update<Bfloat>(op, stream);
    case DataType::float32: return update<float>(op, stream);
    default: return Status::unsupported_type;
  }
}

}  // namespace keylock::cuda
