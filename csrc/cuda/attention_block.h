// A block's way to its keys, values and queries: what lies where in shared memory, and how it gets
// there.
#pragma once

#include "attention_plan.h"
#include "rows.h"

namespace keylock::cuda {

constexpr float kLog2E = 1.44269504f;

KEYLOCK_DEVICE float minus_infinity() { return from_bits(0xff800000); }
KEYLOCK_DEVICE float not_a_number() { return from_bits(0x7fc00000); }

template <class T, int kWidth>
struct AttentionBlock {
  using Tiles = AttentionTiles<T, kWidth>;
  static constexpr int kWarps = kPixels / 16;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kBlocks = kWidth * sizeof(T) <= 80 ? 4 : kWidth * sizeof(T) <= 160 ? 3 : 2;
  static constexpr int kColumns = Tiles::kColumns, kStride = Tiles::kStride;
  static constexpr int kMaxKeys = Tiles::kMaxKeys;
  static constexpr int kOutTiles = (kWidth + 7) / 8;

  struct Params {
    LocalizedAttention op;
    AttentionPlan plan;
    float scale_high, scale_low;  // together the factor that makes scores powers of two
    int32_t tiles_per_block;
    int32_t blocks;  // of one (row, head)
    bool keys_are_wide, queries_are_wide, out_is_wide;
  };
  static_assert(sizeof(Params) <= 4000, "what a launch hands over is at most 4 KiB");

  // A tile of keys on its way, in the order in which they are dealt with.
  struct Step {
    int group = 0, tile = 0;
    bool is_second_look = false;
  };

  const Params& p;
  int row, head;
  Shared<T> keys, values, queries;  // [capacity, kStride] twice, [kQueryTiles, kPixels, kStride]
  Shared<float> bias;               // [capacity] in powers of two; -inf hides, NaN is seen
  Shared<int32_t> regions;          // [capacity]

  KEYLOCK_DEVICE AttentionBlock(const Params& params, Shared<unsigned char> memory) : p(params) {
    const int capacity = p.plan.capacity;
    const int heads = static_cast<int>(p.op.query.sizes[2]);
    const int both = static_cast<int>(block_index()) / p.blocks;
    row = both / heads;
    head = both % heads;
    keys = shared_cast<T>(memory);
    values = keys + capacity * kStride;
    queries = values + capacity * kStride;
    bias = shared_cast<float>(queries + Tiles::kQueryTiles * kPixels * kStride);
    regions = shared_cast<int32_t>(bias + capacity);
  }

  KEYLOCK_DEVICE bool is_long(const Group& group) const { return group.keys > kMaxKeys; }
  KEYLOCK_DEVICE bool needs_two_looks(const Step& step) const {
    return is_long(p.plan.groups[step.group]) &&
           (step.group > 0 || p.op.readout_tokens.data != nullptr);
  }
  KEYLOCK_DEVICE int keys_in(const Step& step) const {
    const int left = p.plan.groups[step.group].keys - step.tile * kMaxKeys;
    return left < kMaxKeys ? left : kMaxKeys;
  }
  KEYLOCK_DEVICE bool is_last_tile(const Step& step) const {
    return (step.tile + 1) * kMaxKeys >= p.plan.groups[step.group].keys;
  }
  // Whether there is a next step; if not, the first of them all comes next.
  KEYLOCK_DEVICE bool advance(Step& step) const {
    if (!is_last_tile(step)) {
      ++step.tile;
      return true;
    }
    step.tile = 0;
    if (needs_two_looks(step) && !step.is_second_look) {
      step.is_second_look = true;
      return true;
    }
    step.is_second_look = false;
    if (++step.group < p.plan.count) return true;
    step.group = 0;
    return false;
  }

  KEYLOCK_DEVICE void fetch(const Step& step, int place) {
    const Group& group = p.plan.groups[step.group];
    const bool is_text = group.stream < 0;
    const int first = group.first + step.tile * kMaxKeys, count = keys_in(step);
    const int size = tile_size(count);
    fetch_rows(is_text ? p.op.key : p.op.image_key, keys + place * kStride, first, count, size);
    fetch_rows(is_text ? p.op.value : p.op.image_value, values + place * kStride, first, count,
               size);
    const Tensor<2>& biases = is_text ? p.op.key_bias : p.op.image_key_bias;
    const bool has_regions = is_text && p.op.key_regions.data != nullptr;
    KEYLOCK_ONCE
    for (int t = thread_index(); t < size; t += kThreads) {
      float b = t < count ? 0.f : minus_infinity();
      if (t < count && biases.data != nullptr) {
        b = kLog2E * side<T>(biases.data, biases.type,
                             row * biases.strides[0] + (first + t) * biases.strides[1]);
      }
      bias[place + t] = b;
      int32_t seen_from = -1;
      if (has_regions) {
        const Tensor<2>& r = p.op.key_regions;
        seen_from = t < count ? static_cast<const int32_t*>(
                                    r.data)[row * r.strides[0] + (first + t) * r.strides[1]]
                              : 0;
      }
      regions[place + t] = seen_from;
    }
  }

  KEYLOCK_DEVICE void fetch_rows(const Tensor<4>& from, Shared<T> to, int first, int count,
                                 int size) {
    const T* data = static_cast<const T*>(from.data) + row * from.strides[0] +
                    first * from.strides[1] + head * from.strides[2];
    copy_rows<kColumns>(to, kStride, size,
                        Piece<const T>{data, from.strides[1], count,
                                       static_cast<int>(from.sizes[3]), p.keys_are_wide},
                        thread_index(), kThreads);
  }

  // Zero times NaN is NaN, so what a pixel may not see must be finite where it meets a probability
  // of zero. A hidden key is cleared. So is a broken one, which is not finite: whoever sees it is
  // told by its bias.
  KEYLOCK_DEVICE void clear(const Step& step, int place) {
    const bool is_text = p.plan.groups[step.group].stream < 0;
    const bool is_seen_by_all =
        is_text ? p.op.key_bias.data == nullptr && p.op.key_regions.data == nullptr
                : p.op.image_key_bias.data == nullptr && p.op.image_weights.data == nullptr;
    if (is_seen_by_all) return;
    sync_block();
    const int size = tile_size(keys_in(step));
    KEYLOCK_ONCE
    for (int t = place + warp_index(); t < place + size; t += kWarps) {
      bool is_broken = false;
      for (int c = lane_index() * kChunk<T>; c < kColumns; c += kWarp * kChunk<T>) {
        is_broken |= !is_finite<T>(*shared_cast<Chunk>(keys + (t * kStride + c))) ||
                     !is_finite<T>(*shared_cast<Chunk>(values + (t * kStride + c)));
      }
      const bool is_hidden =
          bias[t] == minus_infinity();  // seen by all lanes before one changes it
      is_broken = any(is_broken);
      if (!is_broken && !is_hidden) continue;
      for (int c = lane_index() * kChunk<T>; c < kColumns; c += kWarp * kChunk<T>) {
        *shared_cast<Chunk>(keys + (t * kStride + c)) = Chunk{};
        *shared_cast<Chunk>(values + (t * kStride + c)) = Chunk{};
      }
      if (!is_hidden && lane_index() == 0) bias[t] = not_a_number();
    }
  }

  // Starts on this warp's queries of a tile, or on none where there is no such tile.
  KEYLOCK_DEVICE void fetch_queries(int tile) {
    const int first = tile * kPixels + warp_index() * 16;
    const int count = pixels_from(first);
    if (count == 0) return;
    const Tensor<4>& q = p.op.query;
    const T* data = static_cast<const T*>(q.data) + row * q.strides[0] + first * q.strides[1] +
                    head * q.strides[2];
    copy_rows<kColumns>(
        warp_queries(tile), kStride, 16,
        Piece<const T>{data, q.strides[1], count, static_cast<int>(q.sizes[3]), p.queries_are_wide},
        lane_index(), kWarp);
  }
  KEYLOCK_DEVICE Shared<T> warp_queries(int tile) const {
    return queries + (tile % Tiles::kQueryTiles * kPixels + warp_index() * 16) * kStride;
  }
  KEYLOCK_DEVICE int pixels_from(int first) const {
    const int left = static_cast<int>(p.op.query.sizes[1]) - first;
    return left < 0 ? 0 : left < 16 ? left : 16;
  }

  KEYLOCK_DEVICE bool is_first(const Step& step) const {
    return step.group == 0 && step.tile == 0 && !step.is_second_look;
  }
  KEYLOCK_DEVICE int place_of(const Step& step) const {
    return p.plan.groups[step.group].place + step.tile * kMaxKeys;
  }

  // All keys that stay in shared memory, or the first tile of those that do not.
  KEYLOCK_DEVICE void fetch_first() {
    Step step;
    KEYLOCK_ONCE
    for (bool has_more = p.plan.count > 0; has_more;) {
      if (!step.is_second_look) fetch(step, place_of(step));
      has_more = advance(step) && p.plan.slots == 0;
    }
  }
  KEYLOCK_DEVICE void clear_all() {
    Step step;
    KEYLOCK_ONCE
    for (bool has_more = p.plan.count > 0; has_more;) {
      if (!step.is_second_look) clear(step, place_of(step));
      has_more = advance(step);
    }
  }
};

}  // namespace keylock::cuda
