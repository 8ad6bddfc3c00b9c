// The CPU kernel of rank_one_update, compiled once per instruction set (see vector.h).
//
// The work is cut into tiles of one batch row, some tokens and some columns. A tile gathers the
// rows of u that its batch row uses, converted to the accumulation type, and then visits its part
// of y once: read base, add the updates, round, write. Where tiles begin depends on the shape
// only, which keeps results independent of the number of threads.
#include "keylock/rank_one_update.h"

#include "vector.h"

namespace keylock::KEYLOCK_ISA {
namespace {

constexpr int64_t kMaxUpdates = 16;           // updates added per visit of a tile
constexpr int64_t kTileTokens = 32;           // what the gathered rows of u are shared by
constexpr int64_t kGatheredBytes = 16 << 10;  // half of the smallest first-level cache in use
constexpr int64_t kSerialElements = 32768;    // below this, waking threads costs more than it saves

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One token's columns within a tile. Its updates may come in several groups of kMaxUpdates, with
// `partial` holding the sums between them in full precision.
template <class Accumulated>
struct Updates {
  Accumulated coefficients[kMaxUpdates];
  int64_t count;
  const Accumulated* u;  // [count, u_stride]
  int64_t u_stride;
  Accumulated* partial;
  bool is_first, is_last;
};

// The loops over i must be unrolled entirely, or `sums` lives in memory instead of registers.
template <int vectors, class Element, class Accumulated>
inline void update_columns(const Updates<Accumulated>& updates, int64_t column, const Element* base,
                           Element* y) {
  constexpr int lanes = kLanes<Accumulated>;
  Accumulated* partial = updates.partial + column;
  Vector<Accumulated, lanes> sums[vectors] = {};
  if (!updates.is_first) {
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) sums[i] = widen<lanes>(partial + i * lanes);
  }
  for (int64_t k = 0; k < updates.count; ++k) {
    const Accumulated* u = updates.u + k * updates.u_stride + column;
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) {
      sums[i] += updates.coefficients[k] * widen<lanes>(u + i * lanes);
    }
  }
  if (updates.is_last) {
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) {
      narrow(y + i * lanes, widen<lanes>(base + i * lanes) + sums[i]);
    }
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) narrow(partial + i * lanes, sums[i]);
  }
}

template <class Element, class Accumulated>
void update_token(const Updates<Accumulated>& updates, int64_t columns, const Element* base,
                  Element* y) {
  constexpr int lanes = kLanes<Accumulated>;
  constexpr int unroll = 8;  // reuses a broadcast coefficient and hides the latency of the sums
  int64_t column = 0;
  for (; column + unroll * lanes <= columns; column += unroll * lanes) {
    update_columns<unroll>(updates, column, base + column, y + column);
  }
  for (; column + lanes <= columns; column += lanes) {
    update_columns<1>(updates, column, base + column, y + column);
  }
  if (column < columns) {
    Element padded[lanes] = {};
    const size_t rest = (columns - column) * sizeof(Element);
    std::memcpy(padded, base + column, rest);
    update_columns<1>(updates, column, padded, padded);
    std::memcpy(y + column, padded, rest);
  }
}

template <class Stored, class Accumulated>
void gather(const Stored* u, int64_t columns, Accumulated* to) {
  constexpr int lanes = kLanes<Accumulated>;
  using Converted = Vector<Accumulated, lanes>;
  int64_t column = 0;
  for (; column + lanes <= columns; column += lanes) {
    write_bits(to + column, __builtin_convertvector(widen<lanes>(u + column), Converted));
  }
  if (column < columns) {
    Stored padded[lanes] = {};
    std::memcpy(padded, u + column, (columns - column) * sizeof(Stored));
    write_bits(to + column, __builtin_convertvector(widen<lanes>(padded), Converted));
  }
}

struct Tile {
  int64_t row, token_begin, token_end, column_begin, column_end;
};

template <class Accumulated>
Accumulated coefficient_at(const Tensor<3>& coefficients, int64_t row, int64_t token, int64_t r) {
  const int64_t* strides = coefficients.strides;
  const int64_t offset = row * strides[0] + token * strides[1] + r * strides[2];
  if (coefficients.type == DataType::float64) {
    return static_cast<Accumulated>(static_cast<const double*>(coefficients.data)[offset]);
  }
  return static_cast<Accumulated>(static_cast<const float*>(coefficients.data)[offset]);
}

inline int32_t slot_at(const Tensor<2>& slots, int64_t row, int64_t r) {
  const int64_t offset = row * slots.strides[0] + r * slots.strides[1];
  return static_cast<const int32_t*>(slots.data)[offset];
}

// Columns per tile: as many as kGatheredBytes holds of the rows gathered together.
template <class Accumulated>
int64_t tile_columns(const RankOneUpdate& op) {
  const int64_t rank = op.slots.sizes[1];
  const int64_t gathered = smaller(rank > 0 ? rank : 1, kMaxUpdates);
  constexpr int64_t lanes = kLanes<Accumulated>;
  return kGatheredBytes / static_cast<int64_t>(sizeof(Accumulated)) / gathered / lanes * lanes;
}

template <class Element, class Stored>
void update_tile(const RankOneUpdate& op, const Tile& tile) {
  using Accumulated = Accumulator<Element>;
  constexpr int64_t gathered_size = kGatheredBytes / sizeof(Accumulated);
  // Sums wait only where one group of updates is not enough, and tiles are then at their narrowest.
  constexpr int64_t partial_stride = gathered_size / kMaxUpdates;
  alignas(64) Accumulated gathered[gathered_size];
  alignas(64) Accumulated partial[kTileTokens * partial_stride];

  const int64_t rank = op.slots.sizes[1];
  const int64_t columns = tile.column_end - tile.column_begin;
  const Element* base =
      static_cast<const Element*>(op.base.data) + tile.row * op.base.strides[0] + tile.column_begin;
  Element* y = static_cast<Element*>(op.y.data) + tile.row * op.y.strides[0] + tile.column_begin;

  Updates<Accumulated> updates;
  updates.u = gathered;
  updates.u_stride = tile_columns<Accumulated>(op);
  updates.is_first = true;
  int64_t r = 0;
  do {
    int64_t taken[kMaxUpdates];
    updates.count = 0;
    for (; r < rank && updates.count < kMaxUpdates; ++r) {
      const int32_t slot = slot_at(op.slots, tile.row, r);
      if (slot < 0) continue;
      gather(static_cast<const Stored*>(op.u.data) + slot * op.u.strides[0] + tile.column_begin,
             columns, gathered + updates.count * updates.u_stride);
      taken[updates.count++] = r;
    }
    updates.is_last = r == rank;
    for (int64_t token = tile.token_begin; token < tile.token_end; ++token) {
      const Element* base_row = base + token * op.base.strides[1];
      Element* y_row = y + token * op.y.strides[1];
      if (updates.is_first && updates.count == 0) {
        // Not base + 0, which would turn -0 into 0.
        std::memcpy(y_row, base_row, columns * sizeof(Element));
        continue;
      }
      for (int64_t k = 0; k < updates.count; ++k) {
        updates.coefficients[k] =
            coefficient_at<Accumulated>(op.coefficients, tile.row, token, taken[k]);
      }
      updates.partial = partial + (token - tile.token_begin) * partial_stride;
      update_token(updates, columns, base_row, y_row);
    }
    updates.is_first = false;
  } while (r < rank);
}

template <class Element, class Stored>
Status update_all(const RankOneUpdate& op, int threads) {
  const int64_t rows = op.y.sizes[0], tokens = op.y.sizes[1], columns = op.y.sizes[2];
  const int64_t width = tile_columns<Accumulator<Element>>(op);
  const int64_t across = divide_up(columns, width), down = divide_up(tokens, kTileTokens);
  // All the threads or one: a team of another size makes OpenMP end and restart the others.
  const bool is_parallel = threads > 1 && rows * tokens * columns >= kSerialElements;
#pragma omp parallel for schedule(static) num_threads(threads) if (is_parallel)
  for (int64_t index = 0; index < rows * down * across; ++index) {
    const int64_t token = index / across % down * kTileTokens;
    const int64_t column = index % across * width;
    update_tile<Element, Stored>(
        op, {index / across / down, token, smaller(token + kTileTokens, tokens), column,
             smaller(column + width, columns)});
  }
  return Status::ok;
}

template <class Element>
Status update_from(const RankOneUpdate& op, int threads) {
  switch (op.u.type) {
    case DataType::float32: return update_all<Element, float>(op, threads);
    case DataType::float64: return update_all<Element, double>(op, threads);
    case DataType::float16: return update_all<Element, Float16>(op, threads);
    case DataType::bfloat16: return update_all<Element, Bfloat16>(op, threads);
    default: return Status::unsupported_type;
  }
}

template <int rank, class Data>
bool is_row_contiguous(const Tensor<rank, Data>& tensor) {
  return tensor.strides[rank - 1] == 1 || tensor.sizes[rank - 1] <= 1;
}

Status validate(const RankOneUpdate& op) {
  const int64_t rows = op.y.sizes[0], tokens = op.y.sizes[1], columns = op.y.sizes[2];
  const int64_t rank = op.slots.sizes[1];
  if (op.slots.type != DataType::int32 || op.y.type != op.base.type ||
      (op.coefficients.type != DataType::float32 && op.coefficients.type != DataType::float64)) {
    return Status::unsupported_type;
  }
  const bool fits = op.base.sizes[0] == rows && op.base.sizes[1] == tokens &&
                    op.base.sizes[2] == columns && op.u.sizes[1] == columns &&
                    op.slots.sizes[0] == rows && op.coefficients.sizes[0] == rows &&
                    op.coefficients.sizes[1] == tokens && op.coefficients.sizes[2] == rank;
  if (!fits || !is_row_contiguous(op.base) || !is_row_contiguous(op.u) ||
      !is_row_contiguous(op.y)) {
    return Status::shape_mismatch;
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t r = 0; r < rank; ++r) {
      const int32_t slot = slot_at(op.slots, row, r);
      if (slot < -1 || slot >= op.u.sizes[0]) return Status::slot_out_of_range;
    }
  }
  return Status::ok;
}

}  // namespace

Status rank_one_update(const RankOneUpdate& op, int threads) {
  const Status status = validate(op);
  if (status != Status::ok) return status;
  switch (op.base.type) {
    case DataType::float32: return update_from<float>(op, threads);
    case DataType::float64: return update_from<double>(op, threads);
    case DataType::float16: return update_from<Float16>(op, threads);
    case DataType::bfloat16: return update_from<Bfloat16>(op, threads);
    default: return Status::unsupported_type;
  }
}

}  // namespace keylock::KEYLOCK_ISA
