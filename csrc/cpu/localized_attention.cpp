// The CPU kernel of localized attention, compiled once per instruction set (see vector.h).
//
// A thread takes pieces of the pixels of one (row, head): it lays that row's keys and values out
// once, in cache, and then goes over its queries once, a block at a time: scores of every stream
// in one product, softmax, values in one product, round, write.
#include "attention_shapes.h"
#include "attention_softmax.h"

namespace keylock::KEYLOCK_ISA {
namespace {

template <class Step>
struct Scratch {
  using Real = typename Step::Real;
  using Operand = typename Step::Operand;

  Lanes<Real> lanes;
  Operand* keys;                               // [depth, lanes] transposed
  Operand* values;                             // [lanes / kDepth, padded head dimension]
  Operand* queries;                            // [kBlock, depth_stride]
  Real* scores;                                // [kBlock, lanes]
  Operand* shares;                             // [kBlock, lanes / kDepth]
  Real* weights;                               // [kBlock, lanes]
  Real* sums;                                  // [kBlock, padded head dimension]
  double* readout;                             // [M]
  typename BitsOf<Real>::Type* pixel_regions;  // [kBlock]
};

template <class Element, class Step>
class Forward {
  using Real = typename Step::Real;
  using Operand = typename Step::Operand;
  static constexpr int width = kLanes<Real>;

 public:
  explicit Forward(const LocalizedAttention& op)
      : op(op),
        rows(op.query.sizes[0]),
        pixels(op.query.sizes[1]),
        heads(op.query.sizes[2]),
        dims(op.query.sizes[3]),
        padded(round_up(dims, width)),
        depth(divide_up(dims, Step::kDepth)),
        depth_stride(round_up(depth, width)),
        piece(piece_of(pixels)),
        pieces(divide_up(pixels, piece)),
        reads(op.readout_tokens.data ? op.readout_tokens.sizes[1] : 0) {}

  Status run(int threads) {
    const int64_t units = rows * heads * pieces;
    const bool is_parallel =
        threads > 1 && rows * heads * pixels * dims * (op.key.sizes[1] + 1) >= kSerialProducts;
    if (!is_parallel) threads = 1;
    Arena sizes = {};
    take(sizes);
    const bool adds = reads > 0 && op.readout_weights.data != nullptr;
    const int64_t sums_bytes = adds ? units * reads * static_cast<int64_t>(sizeof(double)) : 0;
    char* memory = static_cast<char*>(
        std::aligned_alloc(64, sizes.used * threads + round_up(sums_bytes + 1, 64)));
    if (memory == nullptr) return Status::out_of_memory;
    partial = reinterpret_cast<double*>(memory + sizes.used * threads);
#pragma omp parallel num_threads(threads) if (is_parallel)
    {
      Arena arena = {memory + sizes.used * thread_number(), 0};
      Scratch<Step> scratch = take(arena);
      int64_t row = -1, column = -1;
#pragma omp for schedule(static)
      for (int64_t unit = 0; unit < units; ++unit) {
        if (unit / pieces / heads != row) {
          row = unit / pieces / heads;
          lay_out(op, row, false, scratch.lanes);
        }
        if (unit / pieces != column) {
          column = unit / pieces;
          pack(scratch, row, column % heads);
        }
        attend(scratch, row, column % heads, unit);
      }
    }
    if (adds) add_pieces();
    std::free(memory);
    return Status::ok;
  }

 private:
  Scratch<Step> take(Arena& arena) const {
    Scratch<Step> scratch = {};
    scratch.lanes = Lanes<Real>::take(arena, op);
    const int64_t lanes = scratch.lanes.count;
    scratch.keys = arena.take<Operand>(depth_stride * lanes);
    scratch.values = arena.take<Operand>(divide_up(lanes, Step::kDepth) * padded);
    scratch.queries = arena.take<Operand>(kBlock * depth_stride);
    scratch.scores = arena.take<Real>(kBlock * lanes);
    scratch.shares = arena.take<Operand>(kBlock * lanes / Step::kDepth);
    scratch.weights = arena.take<Real>(kBlock * (lanes + width));
    scratch.sums = arena.take<Real>(kBlock * padded);
    scratch.readout = arena.take<double>(reads);
    scratch.pixel_regions = arena.take<typename BitsOf<Real>::Type>(kBlock);
    return scratch;
  }

  // A stream whose weight is 0 may have lanes, to be read out; its values are never met.
  void pack(Scratch<Step>& scratch, int64_t row, int64_t head) const {
    Lanes<Real>& lanes = scratch.lanes;
    lanes.has_broken = false;
    if (hides_by_pixel(op)) find_broken<Element>(op, row, head, lanes);
    const auto is_whole = [&](int64_t lane) { return !is_zero_in(lanes, lane); };
    const auto is_heard = [&](int64_t lane) { return is_whole(lane) && lanes.weights[lane] != 0; };
    pack_columns<Step, Element>({op.key, op.image_key, row, head}, lanes, is_whole, scratch.keys);
    pack_rows<Step, Element>({op.value, op.image_value, row, head}, lanes, is_heard,
                             scratch.values);
  }

  void attend(Scratch<Step>& scratch, int64_t row, int64_t head, int64_t unit) const {
    const int64_t begin = unit % pieces * piece, end = smaller(begin + piece, pixels);
    for (int64_t m = 0; m < reads; ++m) scratch.readout[m] = 0;
    for (int64_t first = begin; first < end; first += kBlock) {
      attend_block(scratch, row, head, first, smaller(kBlock, end - first));
    }
    if (op.readout_weights.data != nullptr) {
      for (int64_t m = 0; m < reads; ++m) partial[unit * reads + m] = scratch.readout[m];
    }
  }

  void attend_block(Scratch<Step>& scratch, int64_t row, int64_t head, int64_t first,
                    int64_t count) const {
    const Lanes<Real>& lanes = scratch.lanes;
    for (int64_t i = 0; i < kBlock; ++i) {
      Operand* to = scratch.queries + i * depth_stride;
      if (i < count) {
        load_operands(row_of<Element>(op.query, row, first + i, head), dims, depth_stride, to);
      } else {
        std::memset(to, 0, depth_stride * sizeof(Operand));
      }
    }
    multiply<Step>({scratch.queries, depth_stride, 1, scratch.keys, lanes.count, depth},
                   Memory<Real>{scratch.scores, lanes.count}, kBlock, lanes.count / width);

    Operand* shares = scratch.shares;
    if constexpr (Step::kDepth == 1) {
      if (reads == 0) shares = scratch.scores;
    }
    const Softmax<Step> softmax = softmax_of<Step>(op, lanes, row, first, count, scratch.scores,
                                                   shares, scratch.weights, scratch.pixel_regions);
    soften(softmax);
    if (reads > 0) read_out(scratch, row, head, first, count);

    // Images apart: a long sum on top of the text's would round as often as it has terms, at that
    // size.
    const int64_t text = text_lanes(lanes) / Step::kDepth, all_lanes = lanes.count / Step::kDepth;
    multiply<Step>({shares, all_lanes, 1, scratch.values, padded, text},
                   Memory<Real>{scratch.sums, padded}, kBlock, padded / width);
    if (text < all_lanes) {
      multiply<Step>(
          {shares + text, all_lanes, 1, scratch.values + text * padded, padded, all_lanes - text},
          Memory<Real, true>{scratch.sums, padded}, kBlock, padded / width);
    }
    for (int64_t i = 0; i < count; ++i) {
      store_row(scratch.sums + i * padded, dims, row_of<Element>(op.out, row, first + i, head));
    }
  }

  void read_out(Scratch<Step>& scratch, int64_t row, int64_t head, int64_t first,
                int64_t count) const {
    const Lanes<Real>& lanes = scratch.lanes;
    for (int64_t i = 0; i < count; ++i) {
      const Real* p = scratch.scores + i * lanes.count;
      for (int64_t m = 0; m < reads; ++m) {
        const int32_t lane = lanes.read_at[m];
        const Real share = lane < 0 ? 0 : p[lane];
        if (op.readout_weights.data == nullptr) {
          row_of<Real>(op.readout, row, head, first + i)[m * op.readout.strides[3]] = share;
        } else if (lane >= 0) {
          scratch.readout[m] +=
              static_cast<double>(readout_weight<Real>(op, row, first + i, m) * share);
        }
      }
    }
  }

  void add_pieces() const {
    for (int64_t column = 0; column < rows * heads; ++column) {
      for (int64_t m = 0; m < reads; ++m) {
        double sum = 0;
        for (int64_t i = 0; i < pieces; ++i) sum += partial[(column * pieces + i) * reads + m];
        row_of<Real>(op.readout, column / heads, column % heads, 0)[m * op.readout.strides[3]] =
            static_cast<Real>(sum);
      }
    }
  }

  const LocalizedAttention& op;
  const int64_t rows, pixels, heads, dims;
  const int64_t padded;               // dims in whole vectors
  const int64_t depth, depth_stride;  // dims in operands, and in whole vectors of them
  const int64_t piece, pieces;
  const int64_t reads;
  double* partial = nullptr;  // [units, M]
};

Status validate(const LocalizedAttention& op) {
  const Status status = validate_inputs(op);
  if (status != Status::ok) return status;
  if (op.out.type != op.query.type) return Status::unsupported_type;
  if (!has_sizes(op.out, op.query.sizes) || !has_rows(op.out)) return Status::shape_mismatch;
  return op.readout_tokens.data == nullptr ? Status::ok : validate_readout(op, op.readout);
}

}  // namespace

Status localized_attention(const LocalizedAttention& op, int threads) {
  const Status status = validate(op);
  if (status != Status::ok) return status;
  return run_for<Forward>(op.query.type, op, threads);
}

}  // namespace keylock::KEYLOCK_ISA
