// Localized attention on a GPU: the checks, and the way to the kernels, which are compiled apart.
#include "attention_plan.h"

namespace keylock::cuda {

template <class T>
Status attend(const LocalizedAttention& op, void* stream);
extern template Status attend<Half>(const LocalizedAttention& op, void* stream);
extern template Status attend<Bfloat>(const LocalizedAttention& op, void* stream);
extern template Status attend<float>(const LocalizedAttention& op, void* stream);

namespace {

template <int rank, class Data, class... Sizes>
bool has_shape(const Tensor<rank, Data>& tensor, Sizes... sizes) {
  static_assert(sizeof...(Sizes) == rank);
  const int64_t wanted[] = {static_cast<int64_t>(sizes)...};
  for (int d = 0; d < rank; ++d) {
    if (tensor.sizes[d] != wanted[d]) return false;
  }
  return true;
}

template <int rank>
bool is_side(const Tensor<rank>& tensor, DataType type) {
  return tensor.data == nullptr || tensor.type == type || tensor.type == DataType::float32;
}
template <int rank>
bool is_integer(const Tensor<rank>& tensor) {
  return tensor.data == nullptr || tensor.type == DataType::int32;
}

// An optional tensor fits where it is absent.
template <int rank, class... Sizes>
bool fits(const Tensor<rank>& tensor, Sizes... sizes) {
  return tensor.data == nullptr || has_shape(tensor, sizes...);
}

Status validate(const LocalizedAttention& op) {
  const auto& [rows, pixels, heads, width] = op.query.sizes;
  const int64_t keys = op.key.sizes[1], read = op.readout_tokens.sizes[1];
  const DataType type = op.query.type;
  const bool reads = op.readout_tokens.data != nullptr;
  if (op.images > kMaxImageStreams) return Status::too_many_streams;
  if (op.key.type != type || op.value.type != type || op.out.type != type ||
      !is_side(op.key_bias, type) || !is_side(op.image_key_bias, type) ||
      !is_side(op.image_weights, type) || !is_side(op.readout_weights, type) ||
      !is_integer(op.query_regions) || !is_integer(op.key_regions) ||
      !is_integer(op.readout_tokens) || (reads && op.readout.type != DataType::float32)) {
    return Status::unsupported_type;
  }
  int64_t image_keys = 0;
  if (op.images > 0) {
    if (op.image_key.type != type || op.image_value.type != type) return Status::unsupported_type;
    for (int64_t i = 0; i < op.images; ++i) {
      if (op.image_lengths[i] < 0) return Status::shape_mismatch;
      image_keys += op.image_lengths[i];
    }
    if (!has_shape(op.image_key, rows, image_keys, heads, width) ||
        !has_shape(op.image_value, rows, image_keys, heads, width) ||
        !fits(op.image_key_bias, rows, image_keys) ||
        !fits(op.image_weights, rows, op.images, pixels) || !is_row_contiguous(op.image_key) ||
        !is_row_contiguous(op.image_value)) {
      return Status::shape_mismatch;
    }
  }
  constexpr int64_t kMost = INT32_MAX - 128;  // that int32 counts, tiles filled up included
  if (pixels > kMost || keys > kMost || image_keys > kMost) return Status::too_large;
  const int64_t sums = (pixels + kReadoutPixels - 1) / kReadoutPixels;
  const bool is_valid =
      width >= 1 && width <= 256 && has_shape(op.key, rows, keys, heads, width) &&
      has_shape(op.value, rows, keys, heads, width) &&
      has_shape(op.out, rows, pixels, heads, width) && fits(op.key_bias, rows, keys) &&
      (op.query_regions.data == nullptr) == (op.key_regions.data == nullptr) &&
      fits(op.query_regions, rows, pixels) && fits(op.key_regions, rows, keys) &&
      fits(op.readout_tokens, rows, read) && fits(op.readout_weights, rows, pixels, read) &&
      (!reads || has_shape(op.readout, rows, heads,
                           op.readout_weights.data == nullptr ? pixels : sums, read)) &&
      is_row_contiguous(op.query) && is_row_contiguous(op.key) && is_row_contiguous(op.value) &&
      is_row_contiguous(op.out);
  return is_valid ? Status::ok : Status::shape_mismatch;
}

}  // namespace

Status localized_attention(const LocalizedAttention& op, void* stream) {
  const Status status = validate(op);
  if (status != Status::ok) return status;
  switch (op.query.type) {
    case DataType::float16: return attend<Half>(op, stream);
    case DataType::bfloat16: return attend<Bfloat>(op, stream);
    case DataType::float32: return attend<float>(op, stream);
    default: return Status::unsupported_type;
  }
}

}  // namespace keylock::cuda
