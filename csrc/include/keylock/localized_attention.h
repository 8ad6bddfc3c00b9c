// out[b, n, h] = sum_t P[t] V[t] + sum_i w_i[n] sum_t P_i[t] V_i[t], each P a softmax of its own
#pragma once

#include "keylock/instruction_set.h"
#include "keylock/tensor.h"

namespace keylock {

// An optional tensor is absent where its data is null, which an empty one's must not be; `images`
// then says whether there are image streams. Query, keys, values and out have one floating type and
// a contiguous last dimension; what stands beside them ("side") has that type or float32.
struct LocalizedAttention {
  Tensor<4> query;               // [B, N, H, D]
  Tensor<4> key, value;          // [B, T, H, D]
  double scale;                  // on query . key
  Tensor<2> key_bias;            // [B, T] side, optional: added to the scores; -inf hides a key
  Tensor<2> query_regions;       // [B, N] int32, optional: the regions a pixel lies in, a bit each
  Tensor<2> key_regions;         // [B, T] int32, with query_regions: where a key is seen
  Tensor<4> image_key;           // [B, L, H, D], optional: the image streams side by side
  Tensor<4> image_value;         // [B, L, H, D], with image_key
  const int64_t* image_lengths;  // [images], on the host, adding up to L
  int64_t images;
  Tensor<2> image_key_bias;   // [B, L] side, optional
  Tensor<3> image_weights;    // [B, images, N] side, optional: w; stride 0 where one holds for all
  Tensor<2> readout_tokens;   // [B, M] int32, optional: text keys, then image keys; -1 is none
  Tensor<3> readout_weights;  // [B, N, M] side, optional: r, for sums instead of columns
  Tensor<4, void> out;        // [B, N, H, D], the query's type
  Tensor<4, void> readout;    // with readout_tokens: columns P[n, m] [B, H, N, M], or with
                              // readout_weights sum_n r[n, m] P[n, m] [B, H, 1, M]; float32
                              // (float64 for a float64 query), no overlap with any
};

// The gradients of what it computes, from those of `out` and `readout`, either of which may be
// absent; gradients that nobody asks for are absent too. `op.out` and `op.readout` are not used.
struct LocalizedAttentionBackward {
  LocalizedAttention op;
  Tensor<4> grad_out;      // [B, N, H, D] the query's type, last dimension contiguous
  Tensor<4> grad_readout;  // readout's shape and type, any strides
  Tensor<4, void> query;   // like their inputs, contiguous
  Tensor<4, void> key, value;
  Tensor<2, void> key_bias;
  Tensor<4, void> image_key, image_value;
  Tensor<2, void> image_key_bias;
  Tensor<3, void> image_weights;  // [B, images, N], or [B, images, 1] where one holds for all
  Tensor<3, void> readout_weights;
};

// In float32 (float64 for a float64 query); with AVX-512 BF16, bfloat16 products are exact and
// probabilities are rounded to bfloat16 before they meet the values. The bits of a row depend on
// that row alone: not on the other rows, and not on the number of threads.
Status localized_attention(const LocalizedAttention& op, InstructionSet set, int threads);
Status localized_attention_backward(const LocalizedAttentionBackward& op, InstructionSet set,
                                    int threads);

}  // namespace keylock
