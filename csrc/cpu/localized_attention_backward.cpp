// The CPU kernel of localized attention's gradients, compiled once per instruction set (see
// vector.h).
//
// Work is cut as in the forward pass: pieces of one (row, head)'s pixels, a block of them at a
// time. Probabilities are computed again; nothing of the size of pixels times keys is stored. What
// is summed over pixels is summed per piece, and over pieces and heads at the end, in order.
#include <type_traits>

#include "attention_shapes.h"
#include "attention_softmax.h"
#include "attention_sums.h"

namespace keylock::KEYLOCK_ISA {
namespace {

template <class Step>
struct Scratch {
  using Real = typename Step::Real;
  using Operand = typename Step::Operand;
  using Integer = typename BitsOf<Real>::Type;

  Lanes<Real> lanes;
  Integer* is_reached;               // [lanes] ones where gradients come even with a weight of 0
  Operand *keys, *values;            // [depth, lanes] transposed
  Operand* key_rows;                 // [lanes / kDepth, padded]
  Operand *queries, *grads;          // [kBlock, depth_stride]
  Operand *query_rows, *grad_rows;   // [kBlock / kDepth, padded] the same, to sum over pixels
  Real* scores;                      // [kBlock, lanes] P
  Real* shares;                      // [kBlock, lanes] P times w
  Real* slopes;                      // [kBlock, lanes] dP, then the scores' gradient
  Real* weights;                     // [kBlock, lanes and a vector to spare]
  Operand* slope_operands;           // [kBlock, lanes / kDepth]
  Operand *slope_rows, *share_rows;  // [kBlock / kDepth, lanes]
  Real* grad_queries;                // [kBlock, padded]
  Integer* pixel_regions;            // [kBlock]
  Real *grad_keys, *grad_values;     // [lanes in whole tiles, padded] sums over a piece
  Real* grad_bias;                   // [lanes]
  double* grad_weights;              // [images]
};

#if defined(KEYLOCK_HAVE_PAIRS)
// Rounds two rows of `count` numbers, whole vectors, into one of pairs.
inline void pair_rows(const float* low, const float* high, int64_t count, int32_t* to) {
  constexpr int width = kLanes<float>;
  for (int64_t i = 0; i < count; i += width) {
    const auto bits = [&](const float* row) {
      return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(widen<width>(row + i)));
    };
    write_bits(to + i, (Full<int32_t>)bits(low) | (Full<int32_t>)bits(high) << 16);
  }
}
#endif

template <class Element, class Step>
class Backward {
  using Real = typename Step::Real;
  using Operand = typename Step::Operand;
  using Integer = typename BitsOf<Real>::Type;
  static constexpr int width = kLanes<Real>;

 public:
  explicit Backward(const LocalizedAttentionBackward& backward)
      : out(backward),
        op(backward.op),
        rows(op.query.sizes[0]),
        pixels(op.query.sizes[1]),
        heads(op.query.sizes[2]),
        dims(op.query.sizes[3]),
        padded(round_up(dims, width)),
        depth(divide_up(dims, Step::kDepth)),
        depth_stride(round_up(depth, width)),
        piece(piece_of(pixels)),
        pieces(divide_up(pixels, piece)),
        sums(backward) {}

  Status run(int threads) {
    const bool is_parallel =
        threads > 1 && rows * heads * pixels * dims * (sums.keys + 1) >= kSerialProducts;
    if (!is_parallel) threads = 1;
    Arena sizes = {};
    take(sizes);
    Arena shared = {};
    sums.take(shared);
    char* memory =
        static_cast<char*>(std::aligned_alloc(64, sizes.used * threads + shared.used + 64));
    if (memory == nullptr) return Status::out_of_memory;
    shared = {memory + sizes.used * threads, 0};
    sums.take(shared);
#pragma omp parallel num_threads(threads) if (is_parallel)
    {
      Arena arena = {memory + sizes.used * thread_number(), 0};
      Scratch<Step> scratch = take(arena);
      int64_t row = -1, column = -1;
#pragma omp for schedule(static)
      for (int64_t unit = 0; unit < rows * heads * pieces; ++unit) {
        if (unit / pieces / heads != row) {
          row = unit / pieces / heads;
          lay_out(op, row, sums.wants_weights(), scratch.lanes);
          find_reached(scratch);
        }
        if (unit / pieces != column) {
          column = unit / pieces;
          pack(scratch, row, column % heads);
        }
        run_piece(scratch, row, column % heads, unit);
      }
#pragma omp for schedule(static)
      for (int64_t index = 0; index < rows * sums.keys; ++index) {
        sums.add_key(index / sums.keys, index % sums.keys);
      }
#pragma omp for schedule(static)
      for (int64_t index = 0; index < rows; ++index) sums.add_weights(index);
    }
    std::free(memory);
    return Status::ok;
  }

 private:
  Scratch<Step> take(Arena& arena) const {
    Scratch<Step> scratch = {};
    scratch.lanes = Lanes<Real>::take(arena, op);
    const int64_t lanes = scratch.lanes.count;
    scratch.is_reached = arena.take<Integer>(lanes);
    const auto take_into = [&](int64_t count, auto&... matrices) {
      ((matrices = arena.take<std::remove_reference_t<decltype(*matrices)>>(count)), ...);
    };
    take_into(depth_stride * lanes, scratch.keys, scratch.values);
    take_into(lanes * padded, scratch.key_rows);
    take_into((lanes + kTileRows) * padded, scratch.grad_keys, scratch.grad_values);
    take_into(kBlock * depth_stride, scratch.queries, scratch.grads);
    take_into(kBlock * padded, scratch.grad_queries);
    take_into(kBlock * (lanes + width), scratch.scores, scratch.shares, scratch.slopes,
              scratch.weights);
    if constexpr (Step::kDepth == 1) {
      scratch.query_rows = scratch.queries, scratch.grad_rows = scratch.grads;
      scratch.slope_operands = scratch.slope_rows = scratch.slopes;
      scratch.share_rows = scratch.shares;
    } else {
      take_into(kBlock * padded, scratch.query_rows, scratch.grad_rows);
      take_into(kBlock * (lanes + width), scratch.slope_operands, scratch.slope_rows,
                scratch.share_rows);
    }
    scratch.pixel_regions = arena.take<Integer>(kBlock);
    scratch.grad_bias = arena.take<Real>(lanes);
    scratch.grad_weights = arena.take<double>(op.images);
    return scratch;
  }

  // A stream with a weight of 0 has a gradient only where it is read out.
  void find_reached(Scratch<Step>& scratch) const {
    const Lanes<Real>& lanes = scratch.lanes;
    for (int64_t lane = 0; lane < lanes.count; ++lane) {
      const int64_t image = lanes.stream[lane];
      scratch.is_reached[lane] = image >= 0 && sums.reads > 0 && lanes.is_read[image] ? -1 : 0;
    }
  }

  void pack(Scratch<Step>& scratch, int64_t row, int64_t head) const {
    Lanes<Real>& lanes = scratch.lanes;
    find_broken<Element>(op, row, head, lanes);
    const auto is_whole = [&](int64_t lane) { return !is_zero_in(lanes, lane); };
    const InLanes<Element> keys_in = {op.key, op.image_key, row, head};
    const InLanes<Element> values_in = {op.value, op.image_value, row, head};
    pack_columns<Step>(keys_in, lanes, is_whole, scratch.keys);
    pack_columns<Step>(values_in, lanes, is_whole, scratch.values);
    pack_rows<Step>(keys_in, lanes, is_whole, scratch.key_rows);
  }

  void run_piece(Scratch<Step>& scratch, int64_t row, int64_t head, int64_t unit) const {
    const Lanes<Real>& lanes = scratch.lanes;
    const int64_t begin = unit % pieces * piece, end = smaller(begin + piece, pixels);
    std::memset(scratch.grad_keys, 0, lanes.count * padded * sizeof(Real));
    std::memset(scratch.grad_values, 0, lanes.count * padded * sizeof(Real));
    std::memset(scratch.grad_bias, 0, lanes.count * sizeof(Real));
    for (int64_t image = 0; image < op.images; ++image) {
      scratch.grad_weights[image] = 0;
      if (!sums.wants_weights() || !has_weights_per_pixel(op)) continue;
      std::memset(sums.weights_of(row, head, image) + begin, 0, (end - begin) * sizeof(Real));
    }
    for (int64_t first = begin; first < end; first += kBlock) {
      run_block(scratch, row, head, first, smaller(kBlock, end - first));
    }
    sums.put_keys(lanes, scratch.grad_keys, unit);
    sums.put_values(lanes, scratch.grad_values, unit);
    sums.put_bias(lanes, scratch.grad_bias, unit);
    sums.put_weights(scratch.grad_weights, unit);
  }

  // A block of queries or their gradients: along the depth, and to be summed over pixels.
  void load_pixels(const Tensor<4>& tensor, int64_t row, int64_t head, int64_t first, int64_t count,
                   Operand* along, [[maybe_unused]] Operand* rows_of) const {
    const auto pixel = [&](int64_t i) {
      const bool is_there = i < count && tensor.data != nullptr;
      return is_there ? row_of<Element>(tensor, row, first + i, head) : nullptr;
    };
    for (int64_t i = 0; i < kBlock; ++i, along += depth_stride) {
      if (const Element* from = pixel(i)) {
        load_operands(from, dims, depth_stride, along);
      } else {
        std::memset(along, 0, depth_stride * sizeof(Operand));
      }
    }
    if constexpr (Step::kDepth == 2) {
      for (int64_t i = 0; i < kBlock; i += 2, rows_of += padded) {
        pair_rows(pixel(i), pixel(i + 1), dims, padded, rows_of);
      }
    }
  }

  // Slopes and shares as operands, where those are not the numbers themselves.
  void convert([[maybe_unused]] Scratch<Step>& scratch) const {
    if constexpr (Step::kDepth == 2) {
      const int64_t lanes = scratch.lanes.count;
      for (int64_t i = 0; i < kBlock; i += 2) {
        const float* slopes = scratch.slopes + i * lanes;
        const float* shares = scratch.shares + i * lanes;
        pair_rows(slopes, slopes + lanes, lanes, scratch.slope_rows + i / 2 * lanes);
        pair_rows(shares, shares + lanes, lanes, scratch.share_rows + i / 2 * lanes);
      }
      for (int64_t lane = 0; lane < kBlock * lanes; lane += width) {
        put_shares(scratch.slope_operands, lane, widen<width>(scratch.slopes + lane));
      }
    }
  }

  void run_block(Scratch<Step>& scratch, int64_t row, int64_t head, int64_t first,
                 int64_t count) const {
    const Lanes<Real>& lanes = scratch.lanes;
    const int64_t vectors = lanes.count / width, padded_vectors = padded / width;
    load_pixels(op.query, row, head, first, count, scratch.queries, scratch.query_rows);
    load_pixels(out.grad_out, row, head, first, count, scratch.grads, scratch.grad_rows);
    multiply<Step>({scratch.queries, depth_stride, 1, scratch.keys, lanes.count, depth},
                   Memory<Real>{scratch.scores, lanes.count}, kBlock, vectors);

    const auto softmax =
        softmax_of<Single<Real>>(op, lanes, row, first, count, scratch.scores, scratch.shares,
                                 scratch.weights, scratch.pixel_regions);
    soften(softmax);

    multiply<Step>({scratch.grads, depth_stride, 1, scratch.values, lanes.count, depth},
                   Memory<Real>{scratch.slopes, lanes.count}, kBlock, vectors);
    for (int64_t i = 0; i < kBlock; ++i) {
      weigh(scratch, softmax, row, head, first, i, i < count);
      if (i < count) add_readout(scratch, row, head, first, i);
      slope(scratch, softmax, i);
    }
    convert(scratch);

    if (out.query.data != nullptr) {
      multiply<Step>({scratch.slope_operands, lanes.count / Step::kDepth, 1, scratch.key_rows,
                      padded, lanes.count / Step::kDepth},
                     Memory<Real>{scratch.grad_queries, padded}, kBlock, padded_vectors);
      for (int64_t i = 0; i < count; ++i) {
        Real* grad = scratch.grad_queries + i * padded;
        for (int64_t d = 0; d < padded; ++d) grad[d] *= static_cast<Real>(op.scale);
        store_row(grad, dims, row_of<Element>(out.query, row, first + i, head));
      }
    }
    constexpr int64_t pixels_deep = kBlock / Step::kDepth;
    if (sums.wants_keys()) {
      multiply<Step>({scratch.slope_rows, 1, lanes.count, scratch.query_rows, padded, pixels_deep},
                     Memory<Real, true>{scratch.grad_keys, padded}, lanes.count, padded_vectors);
    }
    if (sums.wants_values() && out.grad_out.data != nullptr) {
      multiply<Step>({scratch.share_rows, 1, lanes.count, scratch.grad_rows, padded, pixels_deep},
                     Memory<Real, true>{scratch.grad_values, padded}, lanes.count, padded_vectors);
    }
  }

  // The image streams' dP = w (dO . V), and dw = sum of P (dO . V).
  void weigh(Scratch<Step>& scratch, const Softmax<Single<Real>>& softmax, int64_t row,
             int64_t head, int64_t first, int64_t i, bool is_inside) const {
    if (softmax.weights == nullptr) return;
    const Lanes<Real>& lanes = scratch.lanes;
    const Real* p = scratch.scores + i * lanes.count;
    const Real* weights = softmax.weights + i * softmax.weights_row;
    Real* slopes = scratch.slopes + i * lanes.count;
    for (int64_t index = 0; index < lanes.groups; ++index) {
      const Group& group = lanes.group[index];
      if (!group.is_image) continue;
      const int64_t end = group.first + group.vectors * width;
      Full<Real> sum{};
      for (int64_t lane = group.first; lane < end; lane += width) {
        const auto w = widen<width>(weights + lane);
        const auto slope = widen<width>(slopes + lane);
        sum += widen<width>(p + lane) * slope;
        write_bits(slopes + lane, w == 0 ? Full<Real>{} : w * slope);
      }
      if (out.image_weights.data == nullptr || !is_inside) continue;
      sum = over_groups<Real>(sum, group.span, [](Full<Real> a, Full<Real> b) { return a + b; });
      Real by_lane[width];
      write_bits(by_lane, sum);
      const int64_t step = group.vectors > 1 ? width : group.span;
      for (int64_t lane = 0; lane < width; lane += step) {
        const int64_t image = lanes.stream[group.first + lane];
        if (image < 0) continue;
        // Of a stream that is switched off only what is finite is seen.
        const bool is_off = weights[group.first + lane] == 0;
        const Real grad = is_off && by_lane[lane] - by_lane[lane] != 0 ? 0 : by_lane[lane];
        if (has_weights_per_pixel(op)) {
          sums.weights_of(row, head, image)[first + i] = grad;
        } else {
          scratch.grad_weights[image] += static_cast<double>(grad);
        }
      }
    }
  }

  void add_readout(Scratch<Step>& scratch, int64_t row, int64_t head, int64_t first,
                   int64_t i) const {
    const Lanes<Real>& lanes = scratch.lanes;
    const bool is_sum = op.readout_weights.data != nullptr;
    for (int64_t m = 0; m < sums.reads; ++m) {
      const int32_t lane = lanes.read_at[m];
      const Real* grads = row_of<Real>(out.grad_readout, row, head, is_sum ? 0 : first + i);
      Real grad = grads[m * out.grad_readout.strides[3]];
      if (out.readout_weights.data != nullptr) {
        sums.reads_of(row, head, first + i)[m] =
            lane < 0 ? 0 : grad * scratch.scores[i * lanes.count + lane];
      }
      if (lane < 0) continue;
      if (is_sum) grad *= readout_weight<Real>(op, row, first + i, m);
      scratch.slopes[i * lanes.count + lane] += grad;
    }
  }

  // From dP to the scores' gradient P (dP - sum P dP), and its sum over pixels: the bias' own.
  void slope(Scratch<Step>& scratch, const Softmax<Single<Real>>& softmax, int64_t i) const {
    const Lanes<Real>& lanes = scratch.lanes;
    const Real* p = scratch.scores + i * lanes.count;
    Real* slopes = scratch.slopes + i * lanes.count;
    for (int64_t index = 0; index < lanes.groups; ++index) {
      const Group& group = lanes.group[index];
      const int64_t end = group.first + group.vectors * width;
      Full<Real> mean{};
      for (int64_t lane = group.first; lane < end; lane += width) {
        mean += widen<width>(p + lane) * widen<width>(slopes + lane);
      }
      mean = over_groups<Real>(mean, group.span, [](Full<Real> a, Full<Real> b) { return a + b; });
      for (int64_t lane = group.first; lane < end; lane += width) {
        auto slope = widen<width>(p + lane) * (widen<width>(slopes + lane) - mean);
        Integers<Real> is_met = Integers<Real>{} - 1;
        if (group.is_image && softmax.weights != nullptr) {
          const auto w = widen<width>(softmax.weights + i * softmax.weights_row + lane);
          is_met = (w != 0) | read_bits<Integer, width>(scratch.is_reached + lane);
        } else if (!group.is_image && softmax.pixel_regions != nullptr) {
          const auto regions = read_bits<Integer, width>(lanes.regions + lane);
          is_met = (regions & softmax.pixel_regions[i]) != 0;
        }
        slope = is_met ? slope : Full<Real>{};
        write_bits(slopes + lane, slope);
        write_bits(scratch.grad_bias + lane, widen<width>(scratch.grad_bias + lane) + slope);
        if (lanes.has_broken) {
          Real* shares = scratch.shares + i * lanes.count + lane;
          write_bits(shares, is_met ? widen<width>(shares) : Full<Real>{});
        }
      }
    }
  }

  const LocalizedAttentionBackward& out;
  const LocalizedAttention& op;
  const int64_t rows, pixels, heads, dims, padded, depth, depth_stride, piece, pieces;
  Sums<Element, Real> sums;
};

// A gradient that is asked for has the sizes and the type of what it belongs to.
template <int rank>
Status validate_like(const Tensor<rank, void>& grad, const Tensor<rank>& input) {
  if (grad.data == nullptr) return Status::ok;
  if (grad.type != input.type) return Status::unsupported_type;
  return has_sizes(grad, input.sizes) ? Status::ok : Status::shape_mismatch;
}

Status validate(const LocalizedAttentionBackward& out) {
  const LocalizedAttention& op = out.op;
  if (out.grad_out.data != nullptr) {
    if (out.grad_out.type != op.query.type) return Status::unsupported_type;
    if (!has_sizes(out.grad_out, op.query.sizes) || !has_rows(out.grad_out)) {
      return Status::shape_mismatch;
    }
  }
  if (out.grad_readout.data != nullptr) {
    const Status status = validate_readout(op, out.grad_readout);
    if (status != Status::ok) return status;
  }
  const auto& weights = out.image_weights;
  if (weights.data != nullptr) {
    const int64_t* sizes = op.query.sizes;
    const int64_t pixels = has_weights_per_pixel(op) ? sizes[1] : smaller(1, weights.sizes[2]);
    if (weights.type != op.image_weights.type) return Status::unsupported_type;
    if (!has_sizes(weights, {sizes[0], op.images, pixels})) return Status::shape_mismatch;
  }
  const Status found[] = {validate_inputs(op),
                          validate_like(out.query, op.query),
                          validate_like(out.key, op.key),
                          validate_like(out.value, op.value),
                          validate_like(out.key_bias, op.key_bias),
                          validate_like(out.image_key, op.image_key),
                          validate_like(out.image_value, op.image_value),
                          validate_like(out.image_key_bias, op.image_key_bias),
                          validate_like(out.readout_weights, op.readout_weights)};
  for (const Status status : found) {
    if (status != Status::ok) return status;
  }
  return Status::ok;
}

}  // namespace

Status localized_attention_backward(const LocalizedAttentionBackward& backward, int threads) {
  const Status status = validate(backward);
  if (status != Status::ok) return status;
  return run_for<Backward>(backward.op.query.type, backward, threads);
}

}  // namespace keylock::KEYLOCK_ISA
