// What a lane knows of its two pixels: where they are, what the image streams weigh there, and how
// their columns of attention are read out.
#pragma once

#include "attention_block.h"

namespace keylock::cuda {

// By selection: a factor of 0 silences NaN too.
KEYLOCK_DEVICE float times(float factor, float x) { return factor == 0 ? 0.f : factor * x; }

template <class T, int kWidth>
struct AttentionPixels : AttentionBlock<T, kWidth> {
  using Block = AttentionBlock<T, kWidth>;
  using Block::head, Block::p, Block::row, Block::kMaxKeys;
  using typename Block::Params;
  using typename Block::Step;

  Shared<T> mine;  // this warp's queries
  int pixel[2];    // of this lane's two rows
  int32_t pixel_regions[2];

  KEYLOCK_DEVICE AttentionPixels(const Params& params, Shared<unsigned char> memory)
      : Block(params, memory) {}

  KEYLOCK_DEVICE void start(int tile) {
    mine = this->warp_queries(tile);
    const int first = tile * kPixels + warp_index() * 16 + lane_index() / 4;
    KEYLOCK_UNROLL
    for (int r = 0; r < 2; ++r) {
      pixel[r] = first + r * 8;
      pixel_regions[r] = 0;
      const Tensor<2>& q = p.op.query_regions;
      if (q.data != nullptr && is_pixel(r)) {
        pixel_regions[r] =
            static_cast<const int32_t*>(q.data)[row * q.strides[0] + pixel[r] * q.strides[1]];
      }
    }
  }
  KEYLOCK_DEVICE bool is_pixel(int r) const { return pixel[r] < p.op.query.sizes[1]; }
  KEYLOCK_DEVICE bool has_pixels() const {
    return pixel[0] - lane_index() / 4 < p.op.query.sizes[1];
  }

  // A share of a stream's values in out: times the stream's weight for one of this lane's pixels.
  KEYLOCK_DEVICE float weighted(float share, int stream, int r) const {
    const Tensor<3>& w = p.op.image_weights;
    if (stream < 0 || w.data == nullptr) return share;
    const float weight =
        is_pixel(r) ? side<T>(w.data, w.type,
                              row * w.strides[0] + stream * w.strides[1] + pixel[r] * w.strides[2])
                    : 0;
    return times(weight, share);
  }

  // The number that read-out tokens have for the first key of a tile.
  KEYLOCK_DEVICE int64_t first_token(const Step& step) const {
    const Group& group = p.plan.groups[step.group];
    return group.first + step.tile * kMaxKeys + (group.stream < 0 ? 0 : p.op.key.sizes[1]);
  }

  // Reads the keys begin .. end - 1 of a tile out, where a token asks for them.
  template <int kSteps>
  KEYLOCK_DEVICE void read_columns(const float (&s)[2 * kSteps][4], const float (&share)[2],
                                   int64_t first, int begin, int end) {
    const Tensor<2>& tokens = p.op.readout_tokens;
    if (tokens.data == nullptr) return;
    KEYLOCK_ONCE
    for (int64_t m = 0; m < tokens.sizes[1]; ++m) {
      const int64_t key = token(m) - first;
      if (key < begin || key >= end) continue;
      float found[2] = {0, 0};
      KEYLOCK_UNROLL
      for (int t = 0; t < 2 * kSteps; ++t) {
        if (key / 8 != t) continue;
        KEYLOCK_UNROLL
        for (int r = 0; r < 2; ++r) found[r] = key % 2 ? s[t][2 * r + 1] : s[t][2 * r];
      }
      KEYLOCK_UNROLL
      for (int r = 0; r < 2; ++r) found[r] = times(share[r], found[r]);
      put_readout(m, found, static_cast<int>(key % 8 / 2));
    }
  }
  KEYLOCK_DEVICE int32_t token(int64_t m) const {
    const Tensor<2>& tokens = p.op.readout_tokens;
    return static_cast<const int32_t*>(
        tokens.data)[row * tokens.strides[0] + m * tokens.strides[1]];
  }

  // A token that is none reads 0, one that does not exist reads NaN.
  KEYLOCK_DEVICE void read_absent() {
    const Tensor<2>& tokens = p.op.readout_tokens;
    if (tokens.data == nullptr) return;
    const int64_t count = p.op.key.sizes[1] + (p.op.images > 0 ? p.op.image_key.sizes[1] : 0);
    KEYLOCK_ONCE
    for (int64_t m = 0; m < tokens.sizes[1]; ++m) {
      const int32_t asked = token(m);
      if (0 <= asked && asked < count) continue;
      const float absent = asked == -1 ? 0.f : not_a_number();
      const float found[2] = {absent, absent};
      put_readout(m, found, 0);
    }
  }

  // Column m of what is read out, which the lanes l with l % 4 == owner hold.
  KEYLOCK_DEVICE void put_readout(int64_t m, const float (&found)[2], int owner) {
    const Tensor<4, void>& to = p.op.readout;
    const int lane = lane_index();
    const int64_t place = row * to.strides[0] + head * to.strides[1] + m * to.strides[3];
    const Tensor<3>& weights = p.op.readout_weights;
    if (weights.data == nullptr) {
      KEYLOCK_UNROLL
      for (int r = 0; r < 2; ++r) {
        if (lane % 4 != owner || !is_pixel(r)) continue;
        static_cast<float*>(to.data)[place + pixel[r] * to.strides[2]] = found[r];
      }
      return;
    }
    float sum = 0;
    KEYLOCK_UNROLL
    for (int r = 0; r < 2; ++r) {
      if (lane % 4 != owner || !is_pixel(r)) continue;
      const int64_t at =
          row * weights.strides[0] + pixel[r] * weights.strides[1] + m * weights.strides[2];
      // A token that is none adds nothing, whatever its weights are.
      if (token(m) != -1) sum += side<T>(weights.data, weights.type, at) * found[r];
    }
    KEYLOCK_UNROLL
    for (int bits = 4; bits < kWarp; bits *= 2) sum += exchange(sum, bits);
    if (lane == owner) {
      static_cast<float*>(to.data)[place + pixel[0] / kReadoutPixels * to.strides[2]] = sum;
    }
  }
};

}  // namespace keylock::cuda
