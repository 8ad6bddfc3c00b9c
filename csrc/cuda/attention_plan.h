// How one call of localized attention is cut: which keys lie in one tile, and what stays in shared
// memory.
#pragma once

#include "keylock/cuda.h"
#include "rows.h"

namespace keylock::cuda {

constexpr int kPixels = 64;  // of a tile, 16 for each warp
constexpr int kShortTile = 16;

// Keys that one tile, or a row of tiles, holds: the text, one image stream, or several short ones.
struct Group {
  int32_t first;  // key, in the text or in the image streams side by side
  int32_t keys;
  int32_t place;   // of its first key in shared memory, if everything stays there
  int16_t stream;  // first image stream; -1: the text
  int16_t streams;
};

struct AttentionPlan {
  Group groups[kMaxImageStreams + 1];
  int32_t lengths[kMaxImageStreams];
  int32_t count;     // of groups
  int32_t capacity;  // keys that shared memory holds
  int32_t slots;     // tiles that they are, of one size, or 0: they are all keys there are
};

// The keys that a tile of `keys` keys is padded to: the sizes that kernels are compiled for.
KEYLOCK_EVERYWHERE constexpr int tile_size(int keys) {
  return keys <= 16 ? 16 : keys <= 48 ? 48 : 80;
}

template <class T, int kWidth>
struct AttentionTiles {
  static constexpr int kColumns = round_up(kWidth, 16);
  static constexpr int kStride = row_stride<T>(kWidth);
  static constexpr int kMaxKeys = sizeof(T) == 4 ? (kWidth <= 64    ? 80
                                                    : kWidth <= 128 ? 48
                                                                    : 16)
                                                 : (kWidth <= 160 ? 80 : 48);
  // Wide heads leave room for one tile of queries only, the next one is then not fetched ahead.
  static constexpr int kQueryTiles = kWidth * sizeof(T) <= 160 ? 2 : 1;
  static constexpr int kBytesPerKey = (2 * kStride * static_cast<int>(sizeof(T))) + 8;
  static constexpr int kQueryBytes = kQueryTiles * kPixels * kStride * static_cast<int>(sizeof(T));

  static_assert(kQueryBytes + kMaxKeys * kBytesPerKey <= kMaxSharedBytes);

  static int padded(int keys) {
    return keys / kMaxKeys * kMaxKeys + (keys % kMaxKeys ? tile_size(keys % kMaxKeys) : 0);
  }
  static int shared_bytes(const AttentionPlan& plan) {
    return kQueryBytes + plan.capacity * kBytesPerKey;
  }

  static void add(AttentionPlan& plan, const Group& group) {
    Group* last = plan.count > 0 ? &plan.groups[plan.count - 1] : nullptr;
    if (last != nullptr && last->stream >= 0 && last->keys + group.keys <= kShortTile) {
      last->keys += group.keys;
      ++last->streams;
    } else {
      plan.groups[plan.count++] = group;
    }
  }

  // `lengths` are at most kMaxImageStreams; `keys` and their sum fit an int32.
  static AttentionPlan plan(int64_t keys, const int64_t* lengths, int64_t streams) {
    AttentionPlan all{};
    if (keys > 0) all.groups[all.count++] = {0, static_cast<int32_t>(keys), 0, -1, 1};
    int32_t first = 0;
    for (int64_t i = 0; i < streams; ++i) {
      const int32_t length = static_cast<int32_t>(lengths[i]);
      all.lengths[i] = length;
      add(all, {first, length, 0, static_cast<int16_t>(i), 1});
      first += length;
    }
    // Long groups go first: the first of them may then use the accumulator alone.
    AttentionPlan plan = all;
    plan.count = 0;
    int largest = 0, total = 0;
    for (const bool is_long : {true, false}) {
      for (int g = 0; g < all.count; ++g) {
        Group& group = all.groups[g];
        if (group.keys == 0 || (group.keys > kMaxKeys) != is_long) continue;
        group.place = total;
        plan.groups[plan.count++] = group;
        const int size = padded(group.keys < kMaxKeys ? group.keys : kMaxKeys);
        largest = largest < size ? size : largest;
        // Beyond what fits it only matters that it does not.
        if (total <= kMaxSharedBytes) total += padded(group.keys);
      }
    }
    const int room = (kMaxSharedBytes - kQueryBytes) / kBytesPerKey;
    plan.slots = total <= room ? 0 : 2 * largest <= room ? 2 : 1;
    plan.capacity = plan.slots == 0 ? total : plan.slots * largest;
    return plan;
  }
};

}  // namespace keylock::cuda
