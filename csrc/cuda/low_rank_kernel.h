// The kernels of updates of low rank: a GEMM with the updates in its epilogue, and the update of
// what is already there. A tile lies within one row of the batch, so that no product mixes rows.
#pragma once

#include "keylock/cuda.h"
#include "products.h"
#include "rows.h"

namespace keylock::cuda {

constexpr int kUpdates = 16;  // of a row, dealt with at once

KEYLOCK_DEVICE int32_t slot_at(const Tensor<2>& slots, int64_t row, int64_t r) {
  return static_cast<const int32_t*>(slots.data)[row * slots.strides[0] + r * slots.strides[1]];
}
KEYLOCK_DEVICE float coefficient_at(const Tensor<3>& c, int64_t row, int64_t token, int64_t r) {
  return static_cast<const float*>(
      c.data)[row * c.strides[0] + token * c.strides[1] + r * c.strides[2]];
}

// A tile of tokens times a tile of outputs, kDown x kAcross warps; what is multiplied comes through
// shared memory in kStages pieces of kInner columns.
template <class T, int kTokens, int kOutputs, int kDown, int kAcross>
struct LinearForward {
  static constexpr int kThreads = kDown * kAcross * kWarp;
  static constexpr int kBlocks = kThreads > 128 || sizeof(T) == 4 ? 2 : 3;
  static constexpr int kInner = (kTokens > 80 ? 64 : 128) / sizeof(T), kStages = 3;
  static constexpr int kStride = row_stride<T>(kInner);
  static constexpr int kStage = (kTokens + kOutputs) * kStride;  // elements
  static constexpr int kRowTiles = kTokens / kDown / 16, kColumnTiles = kOutputs / kAcross / 8;
  static constexpr int kOutStride = row_stride<T>(kOutputs);
  static constexpr int kSharedBytes = kStages * kStage * static_cast<int>(sizeof(T));
  static_assert(kSharedBytes <= kMaxSharedBytes);
  static_assert(kUpdates * (kTokens + kOutputs) * sizeof(float) <= kSharedBytes);
  static_assert(kTokens * kOutStride * sizeof(T) <= kSharedBytes);

  struct Params {
    LowRankLinear op;
    int64_t down, across;  // tiles of a row of the batch
    bool is_wide, y_is_wide;
  };

  const Params& p;
  Shared<T> pieces;
  Shared<float> chunk;  // [kUpdates, kTokens] coefficients, then [kUpdates, kOutputs] of u
  int64_t row, first_token, first_output;
  int token, output;  // of this lane's first element, within the tile
  float sums[kRowTiles][kColumnTiles][4] = {};

  KEYLOCK_DEVICE LinearForward(const Params& params, Shared<unsigned char> memory)
      : p(params), pieces(shared_cast<T>(memory)), chunk(shared_cast<float>(memory)) {
    const int64_t tile = block_index() / p.across;
    row = tile / p.down;
    first_token = tile % p.down * kTokens;
    first_output = block_index() % p.across * kOutputs;
    token = warp_index() / kAcross * (kTokens / kDown) + lane_index() / 4;
    output = warp_index() % kAcross * (kOutputs / kAcross) + lane_index() % 4 * 2;
  }

  static KEYLOCK_DEVICE void run(const Params& p, Shared<unsigned char> memory) {
    LinearForward tile(p, memory);
    tile.multiply_all();
    const int64_t updates = p.op.updates.slots.sizes[1];
    for (int64_t first = 0; first < updates; first += kUpdates) {
      sync_block();
      tile.fetch_updates(first);
      sync_block();
      tile.add_updates();
    }
    tile.finish();
  }

  static KEYLOCK_DEVICE int at_most(int64_t left, int size) {
    return left < size ? static_cast<int>(left) : size;
  }

  KEYLOCK_DEVICE void fetch(int64_t k, int stage) {
    const Tensor<3>& x = p.op.x;
    const Tensor<2>& w = p.op.weight;
    const int columns = at_most(x.sizes[2] - k, kInner);
    const T* of_x =
        static_cast<const T*>(x.data) + row * x.strides[0] + first_token * x.strides[1] + k;
    const T* of_w = static_cast<const T*>(w.data) + first_output * w.strides[0] + k;
    const Shared<T> to = pieces + stage * kStage;
    copy_rows<kInner>(to, kStride, kTokens,
                      Piece<const T>{of_x, x.strides[1], at_most(x.sizes[1] - first_token, kTokens),
                                     columns, p.is_wide},
                      thread_index(), kThreads);
    copy_rows<kInner>(
        to + kTokens * kStride, kStride, kOutputs,
        Piece<const T>{of_w, w.strides[0], at_most(w.sizes[0] - first_output, kOutputs), columns,
                       p.is_wide},
        thread_index(), kThreads);
  }

  KEYLOCK_DEVICE void multiply_all() {
    const int64_t inner = p.op.x.sizes[2];
    for (int stage = 0; stage < kStages - 1; ++stage) {
      if (stage * kInner < inner) fetch(stage * kInner, stage);
      commit_copies();
    }
    const Shared<T> mine = pieces + (token - lane_index() / 4) * kStride;
    const Shared<T> weights = pieces + (kTokens + output - lane_index() % 4 * 2) * kStride;
    int stage = 0;
    KEYLOCK_ONCE
    for (int64_t k = 0; k < inner; k += kInner) {
      wait_for_copies<kStages - 2>();
      sync_block();
      const int64_t ahead = k + (kStages - 1) * kInner;
      if (ahead < inner) fetch(ahead, (stage + kStages - 1) % kStages);
      commit_copies();
      multiply_rows<T, kInner>(sums, mine + stage * kStage, weights + stage * kStage, kStride);
      stage = (stage + 1) % kStages;
    }
    wait_for_copies<0>();
  }

  // A chunk of the row's updates; what is not taken is zero, and a slot that does not exist NaN.
  KEYLOCK_DEVICE void fetch_updates(int64_t first) {
    const Tensor<2>&up = p.op.updates.up, &slots = p.op.updates.slots;
    KEYLOCK_ONCE
    for (int i = thread_index(); i < kUpdates * kTokens; i += kThreads) {
      const int64_t r = first + i / kTokens, t = first_token + i % kTokens;
      float c = 0;
      if (r < slots.sizes[1] && t < p.op.x.sizes[1]) {
        const int32_t slot = slot_at(slots, row, r);
        if (slot < -1 || slot >= up.sizes[0]) {
          c = from_bits(0x7fc00000);
        } else if (slot >= 0) {
          c = coefficient_at(p.op.updates.coefficients, row, t, r);
        }
      }
      chunk[i] = c;
    }
    const Shared<float> vectors = chunk + kUpdates * kTokens;
    KEYLOCK_ONCE
    for (int i = thread_index(); i < kUpdates * kOutputs; i += kThreads) {
      const int64_t r = first + i / kOutputs, o = first_output + i % kOutputs;
      float value = 0;
      if (r < slots.sizes[1] && o < p.op.weight.sizes[0]) {
        const int32_t slot = slot_at(slots, row, r);
        if (slot >= 0 && slot < up.sizes[0]) {
          value = side<T>(up.data, up.type, slot * up.strides[0] + o);
        }
      }
      vectors[i] = value;
    }
  }

  KEYLOCK_DEVICE void add_updates() {
    KEYLOCK_ONCE
    for (int r = 0; r < kUpdates; ++r) {
      Pair u[kColumnTiles];
      KEYLOCK_UNROLL
      for (int n = 0; n < kColumnTiles; ++n) {
        u[n] = *shared_cast<Pair>(chunk + (kUpdates * kTokens + r * kOutputs + output + n * 8));
      }
      KEYLOCK_UNROLL
      for (int m = 0; m < 2 * kRowTiles; ++m) {
        const float c = chunk[r * kTokens + token + m * 8];
        if (c == 0) continue;  // which is nothing whatever it meets
        KEYLOCK_UNROLL
        for (int n = 0; n < kColumnTiles; ++n) {
          float (&sum)[4] = sums[m / 2][n];
          sum[m % 2 * 2] = multiply_add(c, u[n].first, sum[m % 2 * 2]);
          sum[m % 2 * 2 + 1] = multiply_add(c, u[n].second, sum[m % 2 * 2 + 1]);
        }
      }
    }
  }

  KEYLOCK_DEVICE float bias_at(int64_t o) const {
    const Tensor<1>& bias = p.op.bias;
    if (bias.data == nullptr || o >= p.op.weight.sizes[0]) return 0;
    return side<T>(bias.data, bias.type, o * bias.strides[0]);
  }

  KEYLOCK_DEVICE float scale_at(int64_t o) const {
    const Tensor<2>& scale = p.op.scale;
    if (scale.data == nullptr || o >= p.op.weight.sizes[0]) return 1;
    return side<T>(scale.data, scale.type, row * scale.strides[0] + o * scale.strides[1]);
  }

  // Scales, adds the bias and writes the tile, rounded once, through shared memory.
  KEYLOCK_DEVICE void finish() {
    sync_block();
    KEYLOCK_UNROLL
    for (int n = 0; n < kColumnTiles; ++n) {
      const int64_t o = first_output + output + n * 8;
      const float first = bias_at(o), second = bias_at(o + 1);
      const float by_first = scale_at(o), by_second = scale_at(o + 1);
      KEYLOCK_UNROLL
      for (int m = 0; m < 2 * kRowTiles; ++m) {
        const float (&sum)[4] = sums[m / 2][n];
        put_pair(pieces + ((token + m * 8) * kOutStride + output + n * 8),
                 multiply_add(sum[m % 2 * 2], by_first, first),
                 multiply_add(sum[m % 2 * 2 + 1], by_second, second));
      }
    }
    sync_block();
    const Tensor<3, void>& y = p.op.y;
    T* to =
        static_cast<T*>(y.data) + row * y.strides[0] + first_token * y.strides[1] + first_output;
    store_rows<kOutputs>(Piece<T>{to, y.strides[1], at_most(y.sizes[1] - first_token, kTokens),
                                  at_most(y.sizes[2] - first_output, kOutputs), p.y_is_wide},
                         pieces, kOutStride, thread_index(), kThreads);
  }
};

// A thread has kTokens tokens and one piece of 16 bytes of their columns.
template <class T>
struct UpdateForward {
  static constexpr int kThreads = 128, kBlocks = 4;
  static constexpr int kTokens = 4;

  struct Params {
    LowRankUpdate op;
    int64_t pieces, blocks;  // of a token; of a row
    bool is_wide;
  };

  static KEYLOCK_DEVICE void run(const Params& p, Shared<unsigned char>) {
    const Tensor<3>& base = p.op.base;
    const Tensor<2>&up = p.op.updates.up, &slots = p.op.updates.slots;
    const Tensor<3, void>& y = p.op.y;
    const int64_t row = block_index() / p.blocks;
    const int64_t index = block_index() % p.blocks * kThreads + thread_index();
    const int64_t first = index / p.pieces * kTokens, column = index % p.pieces * kChunk<T>;
    const int64_t tokens = y.sizes[1] - first;
    if (tokens <= 0) return;
    const int columns =
        y.sizes[2] - column < kChunk<T> ? static_cast<int>(y.sizes[2] - column) : kChunk<T>;
    float sums[kTokens][kChunk<T>] = {};
    bool takes_any = false;
    KEYLOCK_ONCE
    for (int64_t r = 0; r < slots.sizes[1]; ++r) {
      const int32_t slot = slot_at(slots, row, r);
      if (slot == -1) continue;
      takes_any = true;
      const bool exists = slot >= 0 && slot < up.sizes[0];
      KEYLOCK_UNROLL
      for (int i = 0; i < kChunk<T>; ++i) {
        float value = from_bits(0x7fc00000);
        if (exists && i < columns) {
          value = side<T>(up.data, up.type, slot * up.strides[0] + column + i);
        }
        KEYLOCK_UNROLL
        for (int t = 0; t < kTokens; ++t) {
          if (t >= tokens) continue;
          const float c = coefficient_at(p.op.updates.coefficients, row, first + t, r);
          if (c != 0 || !exists) sums[t][i] = multiply_add(c, value, sums[t][i]);
        }
      }
    }
    KEYLOCK_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      if (t >= tokens) continue;
      const T* from = static_cast<const T*>(base.data) + row * base.strides[0] +
                      (first + t) * base.strides[1] + column;
      T* to = static_cast<T*>(y.data) + row * y.strides[0] + (first + t) * y.strides[1] + column;
      if (p.is_wide) {
        update_wide(to, from, sums[t], takes_any);
      } else {
        update_narrow(to, from, sums[t], takes_any, columns);
      }
    }
  }

  // Not base + 0 where there is no update: that would turn -0 into 0.
  static KEYLOCK_DEVICE float updated(float base, float sum, bool takes_any) {
    return takes_any ? base + sum : base;
  }
  static KEYLOCK_DEVICE void update_wide(T* to, const T* from, const float (&sums)[kChunk<T>],
                                         bool takes_any) {
    Chunk chunk = load_chunk(from);
    KEYLOCK_UNROLL
    for (int i = 0; i < 4; ++i) {
      uint32_t& word = chunk.words[i];
      if constexpr (sizeof(T) == 4) {
        word = to_bits(updated(from_bits(word), sums[i], takes_any));
      } else {
        const T low{static_cast<uint16_t>(word)}, high{static_cast<uint16_t>(word >> 16)};
        word = pack<T>(updated(widen(low), sums[2 * i], takes_any),
                       updated(widen(high), sums[2 * i + 1], takes_any));
      }
    }
    store_chunk(to, chunk);
    note_access(true, 32);
  }
  static KEYLOCK_DEVICE void update_narrow(T* to, const T* from, const float (&sums)[kChunk<T>],
                                           bool takes_any, int columns) {
    KEYLOCK_UNROLL
    for (int i = 0; i < kChunk<T>; ++i) {
      if (i < columns) to[i] = narrow<T>(updated(widen(from[i]), sums[i], takes_any));
    }
    note_access(false, 2 * columns * static_cast<int>(sizeof(T)));
  }
};

}  // namespace keylock::cuda
