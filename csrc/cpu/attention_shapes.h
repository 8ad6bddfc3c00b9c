// Whether what attention is handed fits together.
#pragma once

#include "attention_lanes.h"
#include "shapes.h"

namespace keylock::KEYLOCK_ISA {
namespace {

// Everything but out and readout.
inline Status validate_inputs(const LocalizedAttention& op) {
  const int64_t *sizes = op.query.sizes, text = op.key.sizes[1];
  const int64_t rows = sizes[0], pixels = sizes[1], heads = sizes[2], dims = sizes[3];
  const DataType type = op.query.type;
  if (!is_floating(op.query) || op.key.type != type || op.value.type != type ||
      !is_floating(op.key_bias) || !is_floating(op.image_key_bias) ||
      !is_floating(op.image_weights) || !is_floating(op.readout_weights)) {
    return Status::unsupported_type;
  }
  bool fits = dims >= 1 && dims <= kMaxHeadDim && has_sizes(op.key, {rows, text, heads, dims}) &&
              has_sizes(op.value, {rows, text, heads, dims}) && has_rows(op.query) &&
              has_rows(op.key) && has_rows(op.value);
  if (op.key_bias.data != nullptr) fits &= has_sizes(op.key_bias, {rows, text});
  if (op.query_regions.data != nullptr) {
    if (op.query_regions.type != DataType::int32 || op.key_regions.type != DataType::int32) {
      return Status::unsupported_type;
    }
    fits &= has_sizes(op.query_regions, {rows, pixels}) && has_sizes(op.key_regions, {rows, text});
  }
  int64_t length = 0;
  for (int64_t i = 0; i < op.images; ++i) {
    fits &= op.image_lengths[i] >= 0;
    length += op.image_lengths[i];
  }
  if (op.images > 0 && length > 0) {
    if (op.image_key.type != type || op.image_value.type != type) return Status::unsupported_type;
    fits &= has_sizes(op.image_key, {rows, length, heads, dims}) && has_rows(op.image_key) &&
            has_sizes(op.image_value, {rows, length, heads, dims}) && has_rows(op.image_value);
  }
  if (op.image_key_bias.data != nullptr) fits &= has_sizes(op.image_key_bias, {rows, length});
  if (op.image_weights.data != nullptr) {
    fits &= has_sizes(op.image_weights, {rows, op.images, pixels});
  }
  if (op.readout_tokens.data != nullptr) {
    if (op.readout_tokens.type != DataType::int32) return Status::unsupported_type;
    const int64_t read = op.readout_tokens.sizes[1];
    fits &= op.readout_tokens.sizes[0] == rows;
    if (op.readout_weights.data != nullptr) {
      fits &= has_sizes(op.readout_weights, {rows, pixels, read});
    }
    for (int64_t i = 0; fits && i < rows * read; ++i) {
      const int64_t* strides = op.readout_tokens.strides;
      const int32_t token = static_cast<const int32_t*>(
          op.readout_tokens.data)[i / read * strides[0] + i % read * strides[1]];
      if (token < -1 || token >= text + length) return Status::token_out_of_range;
    }
  }
  return fits ? Status::ok : Status::shape_mismatch;
}

// Columns or sums, or their gradient.
template <class Data>
Status validate_readout(const LocalizedAttention& op, const Tensor<4, Data>& readout) {
  const DataType wide = op.query.type == DataType::float64 ? DataType::float64 : DataType::float32;
  if (readout.type != wide || op.readout_tokens.data == nullptr) return Status::unsupported_type;
  const int64_t *sizes = op.query.sizes, read = op.readout_tokens.sizes[1];
  const int64_t pixels = op.readout_weights.data != nullptr ? 1 : sizes[1];
  const bool fits = has_sizes(readout, {sizes[0], sizes[2], pixels, read});
  return fits ? Status::ok : Status::shape_mismatch;
}

}  // namespace
}  // namespace keylock::KEYLOCK_ISA
