// The CPU kernel of rank_one_update, compiled once per instruction set (see vector.h).
//
// The work is cut into tiles of one batch row, some tokens and some columns. A tile gathers the
// rows of u that its batch row uses, converted to the accumulation type, and then visits its part
// of y once: read base, add the updates, round, write. Where tiles begin depends on the shape
// only, which keeps results independent of the number of threads.
#include "rank_one.h"

namespace keylock::KEYLOCK_ISA {
namespace {

constexpr int64_t kMaxUpdates = 16;           // updates added per visit of a tile
constexpr int64_t kTileTokens = 32;           // what the gathered rows of u are shared by
constexpr int64_t kGatheredBytes = 16 << 10;  // half of the smallest first-level cache in use
constexpr int64_t kSerialElements = 32768;    // below this, waking threads costs more than it saves

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

struct Tile {
  int64_t row, token_begin, token_end, column_begin, column_end;
};

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
      load_row(static_cast<const Stored*>(op.u.data) + slot * op.u.strides[0] + tile.column_begin,
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

Status validate(const RankOneUpdate& op) {
  const int64_t (&sizes)[3] = op.y.sizes;
  if (op.y.type != op.base.type) return Status::unsupported_type;
  if (!has_sizes(op.base, sizes) || !has_rows(op.base) || !has_rows(op.y)) {
    return Status::shape_mismatch;
  }
  return validate_updates(op, sizes);
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
