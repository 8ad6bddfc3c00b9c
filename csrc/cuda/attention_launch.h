// From a call of localized attention to the launch of the kernel for its type and head dimension.
#pragma once

#include "attention_kernel.h"

namespace keylock::cuda {

constexpr int64_t kBlocksWanted = 4;  // per multiprocessor, before a block takes another tile
constexpr int64_t kMaxTiles = 16;

template <class T, int kWidth>
Status launch_attention(const LocalizedAttention& op, void* stream) {
  using Kernel = AttentionForward<T, kWidth>;
  typename Kernel::Params params{};
  params.op = op;
  params.op.image_lengths = nullptr;  // lies on the host
  params.plan = Kernel::Tiles::plan(op.key.sizes[1], op.image_lengths, op.images);
  const double scale = op.scale * 1.4426950408889634;
  params.scale_high = static_cast<float>(scale);
  params.scale_low = static_cast<float>(scale - params.scale_high);
  const int64_t heads = op.query.sizes[0] * op.query.sizes[2];
  const int64_t tiles = (op.query.sizes[1] + kPixels - 1) / kPixels;
  const int64_t each = tiles * heads / (kBlocksWanted * processors());
  params.tiles_per_block = static_cast<int32_t>(each < 1 ? 1 : each > kMaxTiles ? kMaxTiles : each);
  params.blocks =
      static_cast<int32_t>((tiles + params.tiles_per_block - 1) / params.tiles_per_block);
  params.keys_are_wide = is_wide(op.key) && is_wide(op.value) &&
                         (op.images == 0 || (is_wide(op.image_key) && is_wide(op.image_value)));
  params.queries_are_wide = is_wide(op.query);
  params.out_is_wide = is_wide(op.out);
  return launch<Kernel>(params, heads * params.blocks, Kernel::Tiles::shared_bytes(params.plan),
                        stream);
}

// The widths that models have, and some in between: what lies below is padded.
template <class T>
Status attend(const LocalizedAttention& op, void* stream) {
  const int64_t width = op.query.sizes[3];
  if constexpr (sizeof(T) == 4) {
    if (width <= 64) return launch_attention<T, 64>(op, stream);
    if (width <= 128) return launch_attention<T, 128>(op, stream);
  } else {
    if (width <= 16) return launch_attention<T, 16>(op, stream);
    if (width <= 40) return launch_attention<T, 40>(op, stream);
    if (width <= 64) return launch_attention<T, 64>(op, stream);
    if (width <= 80) return launch_attention<T, 80>(op, stream);
    if (width <= 128) return launch_attention<T, 128>(op, stream);
    if (width <= 160) return launch_attention<T, 160>(op, stream);
  }
  return launch_attention<T, 256>(op, stream);
}

}  // namespace keylock::cuda
