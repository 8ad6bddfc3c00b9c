// Updates of low rank on a GPU: the checks, and which kernel a call takes.
#include "low_rank_kernel.h"

namespace keylock::cuda {
namespace {

constexpr int64_t kPromptTokens = 160;  // a row of more tokens is tiled as pixels

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <int rank>
bool is_side(const Tensor<rank>& tensor, DataType type) {
  return tensor.type == type || tensor.type == DataType::float32;
}

bool has_types(const Updates& updates, DataType type) {
  return is_side(updates.up, type) && updates.slots.type == DataType::int32 &&
         updates.coefficients.type == DataType::float32;
}

bool fits_into(const Updates& updates, const Tensor<3, void>& y) {
  const Tensor<3>& c = updates.coefficients;
  return c.data != nullptr && updates.up.sizes[1] == y.sizes[2] && is_row_contiguous(updates.up) &&
         updates.slots.sizes[0] == y.sizes[0] && c.sizes[0] == y.sizes[0] &&
         c.sizes[1] == y.sizes[1] && c.sizes[2] == updates.slots.sizes[1];
}

template <class Kernel>
Status launch_linear(const LowRankLinear& op, int64_t tokens, int64_t outputs, void* stream) {
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
Status linear(const LowRankLinear& op, void* stream) {
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
Status update(const LowRankUpdate& op, void* stream) {
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

Status low_rank_linear(const LowRankLinear& op, void* stream) {
  const DataType type = op.x.type;
  if (op.weight.type != type || op.y.type != type ||
      (op.bias.data != nullptr && !is_side(op.bias, type)) ||
      (op.scale.data != nullptr && !is_side(op.scale, type)) || !has_types(op.updates, type)) {
    return Status::unsupported_type;
  }
  const int64_t rows = op.x.sizes[0], outputs = op.weight.sizes[0];
  const bool fits =
      op.weight.sizes[1] == op.x.sizes[2] && op.y.sizes[0] == rows &&
      op.y.sizes[1] == op.x.sizes[1] && op.y.sizes[2] == outputs &&
      (op.bias.data == nullptr || op.bias.sizes[0] == outputs) &&
      (op.scale.data == nullptr || (op.scale.sizes[0] == rows && op.scale.sizes[1] == outputs)) &&
      is_row_contiguous(op.x) && is_row_contiguous(op.weight) && is_row_contiguous(op.y) &&
      fits_into(op.updates, op.y);
  if (!fits) return Status::shape_mismatch;
  switch (type) {
    case DataType::float16: return linear<Half>(op, stream);
    case DataType::bfloat16: return linear<Bfloat>(op, stream);
    case DataType::float32: return linear<float>(op, stream);
    default: return Status::unsupported_type;
  }
}

Status low_rank_update(const LowRankUpdate& op, void* stream) {
  const DataType type = op.base.type;
  if (op.y.type != type || !has_types(op.updates, type)) return Status::unsupported_type;
  bool fits = is_row_contiguous(op.base) && is_row_contiguous(op.y) && fits_into(op.updates, op.y);
  for (int d = 0; d < 3; ++d) fits &= op.base.sizes[d] == op.y.sizes[d];
  if (!fits) return Status::shape_mismatch;
  switch (type) {
    case DataType::float16: return update<Half>(op, stream);
    case DataType::bfloat16: return update<Bfloat>(op, stream);
    case DataType::float32: return update<float>(op, stream);
    default: return Status::unsupported_type;
  }
}

}  // namespace keylock::cuda
