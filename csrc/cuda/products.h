// Products of tiles in shared memory, added to the registers of a warp.
//
// A lane holds of each [16, 8] tile of a product the elements (l / 4, 2 (l % 4) + {0, 1}) and the
// same of row l / 4 + 8: the layout of the tensor cores' results. Half types use the tensor cores.
// float keeps the layout but multiplies in the ordinary units, because it must be a full float32
// product: splitting it in three for the tensor cores would save time where no time is spent, and
// rests on how they round, which is not documented.
#pragma once

#include "device.h"

namespace keylock::cuda {

template <int kRowTiles, int kColumnTiles>
KEYLOCK_DEVICE void multiply_floats(float (&c)[kRowTiles][kColumnTiles][4], Shared<float> a,
                                    Shared<float> b, int stride, int k) {
  const int lane = lane_index();
  Chunk rows[kRowTiles][2];
  KEYLOCK_UNROLL
  for (int m = 0; m < kRowTiles; ++m) {
    KEYLOCK_UNROLL
    for (int half = 0; half < 2; ++half) {
      rows[m][half] = *shared_cast<Chunk>(a + ((m * 16 + half * 8 + lane / 4) * stride + k));
    }
  }
  KEYLOCK_UNROLL
  for (int n = 0; n < kColumnTiles; ++n) {
    KEYLOCK_UNROLL
    for (int odd = 0; odd < 2; ++odd) {
      const Chunk column = *shared_cast<Chunk>(b + ((n * 8 + lane % 4 * 2 + odd) * stride + k));
      KEYLOCK_UNROLL
      for (int m = 0; m < kRowTiles; ++m) {
        KEYLOCK_UNROLL
        for (int half = 0; half < 2; ++half) {
          float& sum = c[m][n][half * 2 + odd];
          KEYLOCK_UNROLL
          for (int i = 0; i < 4; ++i) {
            sum = multiply_add(from_bits(rows[m][half].words[i]), from_bits(column.words[i]), sum);
          }
        }
      }
    }
  }
}

// c += a b^T: a [16 kRowTiles, kInner] and b [8 kColumnTiles, kInner], rows `stride` apart.
template <class T, int kInner, int kRowTiles, int kColumnTiles>
KEYLOCK_DEVICE void multiply_rows(float (&c)[kRowTiles][kColumnTiles][4], Shared<T> a, Shared<T> b,
                                  int stride) {
  if constexpr (sizeof(T) == 4) {
    KEYLOCK_ONCE
    for (int k = 0; k < kInner; k += 4) multiply_floats(c, a, b, stride, k);
  } else {
    const int lane = lane_index();
    const Shared<T> a_row = a + (lane % 16 * stride + lane / 16 * 8);
    const Shared<T> b_row = b + ((lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
    KEYLOCK_UNROLL
    for (int k = 0; k < kInner; k += 16) {
      uint32_t left[kRowTiles][4];
      KEYLOCK_UNROLL
      for (int m = 0; m < kRowTiles; ++m) load_matrices(left[m], a_row + (m * 16 * stride + k));
      KEYLOCK_UNROLL
      for (int n = 0; n < kColumnTiles; n += 2) {
        uint32_t right[4];
        load_matrices(right, b_row + (n * 8 * stride + k));
        KEYLOCK_UNROLL
        for (int m = 0; m < kRowTiles; ++m) {
          multiply<T>(c[m][n], left[m], right[0], right[1]);
          multiply<T>(c[m][n + 1], left[m], right[2], right[3]);
        }
      }
    }
  }
}

// c += p v: p [16, 8 kKeyTiles] in registers and v [8 kKeyTiles, 8 kColumnTiles], rows `stride`
// apart. An odd last tile of columns reads, and leaves alone, the 8 columns behind it.
template <class T, int kKeyTiles, int kColumnTiles>
KEYLOCK_DEVICE void multiply_columns(float (&c)[kColumnTiles][4], const float (&p)[kKeyTiles][4],
                                     Shared<T> v, int stride) {
  const int lane = lane_index();
  if constexpr (sizeof(T) == 4) {
    KEYLOCK_UNROLL
    for (int t = 0; t < kKeyTiles; ++t) {
      KEYLOCK_UNROLL
      for (int key = 0; key < 8; ++key) {
        const int from = lane / 4 * 4 + key / 2;
        const float upper = take(p[t][key % 2], from), lower = take(p[t][2 + key % 2], from);
        KEYLOCK_UNROLL
        for (int n = 0; n < kColumnTiles; ++n) {
          const Pair value =
              *shared_cast<Pair>(v + ((t * 8 + key) * stride + n * 8 + lane % 4 * 2));
          c[n][0] = multiply_add(upper, value.first, c[n][0]);
          c[n][1] = multiply_add(upper, value.second, c[n][1]);
          c[n][2] = multiply_add(lower, value.first, c[n][2]);
          c[n][3] = multiply_add(lower, value.second, c[n][3]);
        }
      }
    }
  } else {
    const Shared<T> v_row = v + (lane % 16 * stride + lane / 16 * 8);
    KEYLOCK_UNROLL
    for (int t = 0; t < kKeyTiles; t += 2) {
      const uint32_t left[4] = {pack<T>(p[t][0], p[t][1]), pack<T>(p[t][2], p[t][3]),
                                pack<T>(p[t + 1][0], p[t + 1][1]),
                                pack<T>(p[t + 1][2], p[t + 1][3])};
      KEYLOCK_UNROLL
      for (int n = 0; n < kColumnTiles; n += 2) {
        uint32_t right[4];
        load_matrices_transposed(right, v_row + (t * 8 * stride + n * 8));
        multiply<T>(c[n], left, right[0], right[1]);
        if (n + 1 < kColumnTiles) multiply<T>(c[n + 1], left, right[2], right[3]);
      }
    }
  }
}

}  // namespace keylock::cuda
