// The kernel of localized attention, forward.
//
// A block takes tiles of 64 pixels of one (row, head), each of its four warps 16 pixels: one pass
// over the queries, and one write of what comes out. Where keys and values of all streams fit into
// shared memory they are fetched once for all of a block's tiles, and its warps go their own ways;
// else they pass through it tile by tile. Scores stay in registers. Groups of keys that one tile
// holds (text of up to 80 tokens, images of up to 16 several together) have their softmax there;
// the first longer one has a running softmax, and if there are more, they are looked at twice: for
// their largest score and sum, then for the values.
#pragma once

#include "attention_pixels.h"
#include "products.h"

namespace keylock::cuda {

template <class T, int kWidth>
struct AttentionForward : AttentionPixels<T, kWidth> {
  using Block = AttentionPixels<T, kWidth>;
  using Block::bias, Block::head, Block::keys, Block::p, Block::regions, Block::row, Block::values;
  using Block::kColumns, Block::kMaxKeys, Block::kStride;
  using Block::mine, Block::pixel_regions;
  using typename Block::Params;
  using typename Block::Step;
  using typename Block::Tiles;
  static constexpr int kOutTiles = (kWidth + 7) / 8;

  float out[kOutTiles][4];
  float top[2], total[2];  // largest score and sum of a long group

  KEYLOCK_DEVICE AttentionForward(const Params& params, Shared<unsigned char> memory)
      : Block(params, memory) {}

  static KEYLOCK_DEVICE void run(const Params& params, Shared<unsigned char> memory) {
    AttentionForward(params, memory).run_tiles();
  }

  KEYLOCK_DEVICE void run_tiles() {
    const int tiles = (static_cast<int>(p.op.query.sizes[1]) + kPixels - 1) / kPixels;
    const int begin = static_cast<int>(block_index()) % p.blocks * p.tiles_per_block;
    const int end = begin + p.tiles_per_block < tiles ? begin + p.tiles_per_block : tiles;
    const bool is_resident = p.plan.slots == 0;
    this->fetch_first();
    commit_copies();
    this->fetch_queries(begin);
    commit_copies();
    if (is_resident) {
      wait_for_copies<1>();
      this->clear_all();
      sync_block();
    }
    int slot = 0;  // where the tile of keys is, if they come one after another
    KEYLOCK_ONCE
    for (int tile = begin; tile < end; ++tile) {
      const bool is_last = tile + 1 == end;
      if (Tiles::kQueryTiles == 1 ? tile > begin : !is_last) {
        this->fetch_queries(tile + Tiles::kQueryTiles - 1);
      }
      commit_copies();
      // What was fetched ahead may still be under way, but the tile's own queries are there.
      wait_for_copies<Tiles::kQueryTiles - 1>();
      sync_warp();
      this->start(tile);
      KEYLOCK_UNROLL
      for (int n = 0; n < kOutTiles; ++n) {
        KEYLOCK_UNROLL
        for (int i = 0; i < 4; ++i) out[n][i] = 0;
      }
      Step step;
      KEYLOCK_ONCE
      for (bool has_more = p.plan.count > 0; has_more;) {
        const Step now = step;
        has_more = this->advance(step);
        if (!is_resident) {
          slot =
              stream(now, step, slot, tile == begin && this->is_first(now), is_last && !has_more);
        }
        if (this->has_pixels()) {
          take_in(now, is_resident ? this->place_of(now) : slot);
        }
        if (!is_resident) sync_block();
      }
      finish(tile);
    }
    wait_for_copies<0>();
  }

  // Where keys come tile by tile: waits for the one that is due, and fetches ahead the next one
  // where there are two slots. Returns where the due one is.
  KEYLOCK_DEVICE int stream(const Step& due, const Step& next, int slot, bool is_first,
                            bool is_last) {
    const bool is_ahead = p.plan.slots == 2;
    const int half = p.plan.capacity / 2;
    if (is_ahead && !is_first) slot = half - slot;
    if (is_ahead ? !is_last : !is_first) {
      this->fetch(is_ahead ? next : due, is_ahead ? half - slot : 0);
    }
    commit_copies();
    if (is_ahead) {
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    this->clear(due, slot);
    sync_block();
    return slot;
  }

  KEYLOCK_DEVICE void finish(int tile) {
    if (!this->has_pixels()) return;
    const int lane = lane_index();
    sync_warp();
    KEYLOCK_UNROLL
    for (int n = 0; n < kOutTiles; ++n) {
      KEYLOCK_UNROLL
      for (int r = 0; r < 2; ++r) {
        put_pair(mine + ((lane / 4 + r * 8) * kStride + n * 8 + lane % 4 * 2), out[n][2 * r],
                 out[n][2 * r + 1]);
      }
    }
    sync_warp();
    const Tensor<4, void>& o = p.op.out;
    const int first = tile * kPixels + warp_index() * 16;
    T* data =
        static_cast<T*>(o.data) + row * o.strides[0] + first * o.strides[1] + head * o.strides[2];
    store_rows<kOutTiles * 8>(Piece<T>{data, o.strides[1], this->pixels_from(first),
                                       static_cast<int>(o.sizes[3]), p.out_is_wide},
                              mine, kStride, lane, kWarp);
    this->read_absent();
    sync_warp();
  }

  KEYLOCK_DEVICE void take_in(const Step& step, int place) {
    const int size = tile_size(this->keys_in(step));
    if (kMaxKeys >= 80 && size == 80) {
      attend<(kMaxKeys >= 80 ? 5 : 1)>(step, place);
    } else if (kMaxKeys >= 48 && size == 48) {
      attend<(kMaxKeys >= 48 ? 3 : 1)>(step, place);
    } else {
      attend<1>(step, place);
    }
  }

  // One tile of 16 kSteps keys: what it adds to `out`, and to what is read out.
  template <int kSteps>
  KEYLOCK_DEVICE void attend(const Step& step, int place) {
    const Group& group = p.plan.groups[step.group];
    float s[2 * kSteps][4];
    score<kSteps>(s, place, group.stream < 0);
    const bool is_running = this->is_long(group) && !step.is_second_look;
    if (is_running) {
      const bool has_values = !this->needs_two_looks(step);
      absorb<kSteps>(s, step.tile == 0, has_values);
      if (!has_values) return;
    } else if (kSteps == 1 && group.streams > 1) {
      soften_streams<kSteps>(s, group, this->first_token(step));
    } else {
      float share[2];  // of what a pixel's powers of two are to be multiplied with
      if (this->is_long(group)) {
        raise<kSteps>(s, share);
      } else {
        soften<kSteps, false>(s, 0, 0, share);
      }
      this->template read_columns<kSteps>(s, share, this->first_token(step), 0,
                                          this->keys_in(step));
      weigh<kSteps, false>(s, 0, 0, share, group.stream);
    }
    multiply_columns<T, 2 * kSteps, kOutTiles>(out, s, values + place * kStride, kStride);
    if (is_running && this->is_last_tile(step)) {
      KEYLOCK_UNROLL
      for (int r = 0; r < 2; ++r) {
        const float factor = this->weighted(inverse(total[r]), group.stream, r);
        KEYLOCK_UNROLL
        for (int n = 0; n < kOutTiles; ++n) {
          out[n][2 * r] = times(factor, out[n][2 * r]);
          out[n][2 * r + 1] = times(factor, out[n][2 * r + 1]);
        }
      }
    }
  }

  // Scores in powers of two; -inf where a pixel does not see a key.
  template <int kSteps>
  KEYLOCK_DEVICE void score(float (&s)[2 * kSteps][4], int place, bool is_text) {
    const bool has_regions = is_text && p.op.key_regions.data != nullptr;
    const bool has_bias = (is_text ? p.op.key_bias.data : p.op.image_key_bias.data) != nullptr;
    float products[1][2 * kSteps][4] = {};
    multiply_rows<T, kColumns>(products, mine, keys + place * kStride, kStride);
    KEYLOCK_UNROLL
    for (int t = 0; t < 2 * kSteps; ++t) {
      const int first = place + t * 8 + lane_index() % 4 * 2;
      const Pair biases = *shared_cast<Pair>(bias + first);
      KEYLOCK_UNROLL
      for (int odd = 0; odd < 2; ++odd) {
        const float b = odd ? biases.second : biases.first;
        KEYLOCK_UNROLL
        for (int r = 0; r < 2; ++r) {
          const float product = products[0][t][2 * r + odd];
          s[t][2 * r + odd] =
              multiply_add(product, p.scale_high, multiply_add(product, p.scale_low, b));
        }
        // -inf on top of what is not finite would be NaN.
        if (has_bias && b == minus_infinity()) {
          KEYLOCK_UNROLL
          for (int r = 0; r < 2; ++r) s[t][2 * r + odd] = b;
        }
        if (has_regions) {
          const int32_t seen_from = regions[first + odd];
          KEYLOCK_UNROLL
          for (int r = 0; r < 2; ++r) {
            if ((seen_from & pixel_regions[r]) == 0) s[t][2 * r + odd] = minus_infinity();
          }
        }
      }
    }
  }

  static KEYLOCK_DEVICE float or_zero(float x) { return x == minus_infinity() ? 0.f : x; }
  static KEYLOCK_DEVICE float inverse(float sum) { return sum == 0 ? 0.f : reciprocal(sum); }
  // Over the four lanes that share a row of pixels.
  static KEYLOCK_DEVICE float largest_of_row(float x) {
    x = larger(x, exchange(x, 1));
    return larger(x, exchange(x, 2));
  }
  static KEYLOCK_DEVICE float sum_of_row(float x) {
    x += exchange(x, 1);
    return x + exchange(x, 2);
  }
  // Whether one of a lane's keys lies in a stream, where several share a tile.
  template <bool is_part>
  static KEYLOCK_DEVICE bool belongs(int t, int odd, int begin, int end) {
    const int key = t * 8 + lane_index() % 4 * 2 + odd;
    return !is_part || (begin <= key && key < end);
  }

  // Scores to powers of two, and what each pixel's are to be multiplied with to add up to 1.
  template <int kSteps, bool is_part>
  KEYLOCK_DEVICE void soften(float (&s)[2 * kSteps][4], int begin, int end, float (&share)[2]) {
    KEYLOCK_UNROLL
    for (int r = 0; r < 2; ++r) {
      float most = minus_infinity(), sum = 0;
      KEYLOCK_UNROLL
      for (int t = 0; t < 2 * kSteps; ++t) {
        KEYLOCK_UNROLL
        for (int odd = 0; odd < 2; ++odd) {
          if (belongs<is_part>(t, odd, begin, end)) most = larger(most, s[t][2 * r + odd]);
        }
      }
      const float base = or_zero(largest_of_row(most));
      KEYLOCK_UNROLL
      for (int t = 0; t < 2 * kSteps; ++t) {
        KEYLOCK_UNROLL
        for (int odd = 0; odd < 2; ++odd) {
          if (!belongs<is_part>(t, odd, begin, end)) continue;
          float& x = s[t][2 * r + odd];
          x = power_of_two(x - base);
          sum += x;
        }
      }
      share[r] = inverse(sum_of_row(sum));
    }
  }

  template <int kSteps, bool is_part>
  KEYLOCK_DEVICE void weigh(float (&s)[2 * kSteps][4], int begin, int end, const float (&share)[2],
                            int stream) {
    // Without a weight nothing needs to be silenced: where no key is seen all powers are 0.
    const bool has_weight = stream >= 0 && p.op.image_weights.data != nullptr;
    KEYLOCK_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float factor = this->weighted(share[r], stream, r);
      KEYLOCK_UNROLL
      for (int t = 0; t < 2 * kSteps; ++t) {
        KEYLOCK_UNROLL
        for (int odd = 0; odd < 2; ++odd) {
          float& x = s[t][2 * r + odd];
          if (!belongs<is_part>(t, odd, begin, end)) continue;
          x *= factor;
          if (has_weight && factor == 0) x = 0;
        }
      }
    }
  }

  // The streams of a group, side by side in one tile, a softmax each.
  template <int kSteps>
  KEYLOCK_DEVICE void soften_streams(float (&s)[2 * kSteps][4], const Group& group, int64_t first) {
    int begin = 0;
    KEYLOCK_ONCE
    for (int stream = group.stream; stream < group.stream + group.streams; ++stream) {
      const int end = begin + p.plan.lengths[stream];
      float share[2];
      soften<kSteps, true>(s, begin, end, share);
      this->template read_columns<kSteps>(s, share, first, begin, end);
      weigh<kSteps, true>(s, begin, end, share, stream);
      begin = end;
    }
    // Behind the last key there is no stream whose softmax would make zeros of what lies there.
    KEYLOCK_UNROLL
    for (int t = 0; t < 2 * kSteps; ++t) {
      KEYLOCK_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (belongs<true>(t, i % 2, begin, 16 * kSteps)) s[t][i] = 0;
      }
    }
  }

  // The second look at a long group, whose largest scores and sums are known.
  template <int kSteps>
  KEYLOCK_DEVICE void raise(float (&s)[2 * kSteps][4], float (&share)[2]) {
    KEYLOCK_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float base = or_zero(top[i / 2]);
      KEYLOCK_UNROLL
      for (int t = 0; t < 2 * kSteps; ++t) s[t][i] = power_of_two(s[t][i] - base);
    }
    KEYLOCK_UNROLL
    for (int r = 0; r < 2; ++r) share[r] = inverse(total[r]);
  }

  // A running softmax: scores become powers of two of what is largest so far, and what was summed
  // with less fades; so does `out`, if it is about values.
  template <int kSteps>
  KEYLOCK_DEVICE void absorb(float (&s)[2 * kSteps][4], bool is_first, bool has_values) {
    KEYLOCK_UNROLL
    for (int r = 0; r < 2; ++r) {
      if (is_first) top[r] = minus_infinity(), total[r] = 0;
      float most = top[r], sum = 0;
      KEYLOCK_UNROLL
      for (int t = 0; t < 2 * kSteps; ++t) {
        most = larger(most, larger(s[t][2 * r], s[t][2 * r + 1]));
      }
      most = largest_of_row(most);
      const float base = or_zero(most), fade = power_of_two(top[r] - base);
      KEYLOCK_UNROLL
      for (int t = 0; t < 2 * kSteps; ++t) {
        KEYLOCK_UNROLL
        for (int odd = 0; odd < 2; ++odd) {
          s[t][2 * r + odd] = power_of_two(s[t][2 * r + odd] - base);
          sum += s[t][2 * r + odd];
        }
      }
      top[r] = most;
      total[r] = multiply_add(total[r], fade, sum_of_row(sum));
      if (has_values) {
        KEYLOCK_UNROLL
        for (int n = 0; n < kOutTiles; ++n) {
          out[n][2 * r] *= fade;
          out[n][2 * r + 1] *= fade;
        }
      }
    }
  }
};

}  // namespace keylock::cuda
