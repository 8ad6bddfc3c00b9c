// What a batch row adds to an output: which rows of the tables, with which coefficients, and the
// product of the two.
#pragma once

#include "keylock/updates.h"
#include "multiply.h"
#include "scratch.h"
#include "shapes.h"
#include "transpose.h"

namespace keylock::KEYLOCK_ISA {
namespace {

template <class Scalar, int rank>
Scalar at(const Tensor<rank>& tensor, const int64_t (&index)[rank]) {
  int64_t offset = 0;
  for (int d = 0; d < rank; ++d) offset += index[d] * tensor.strides[d];
  return static_cast<const Scalar*>(tensor.data)[offset];
}

// Whole rows of any type, widened; zeros up to whole vectors.
template <class Real>
void load_any(const void* data, DataType type, int64_t offset, int64_t count, Real* to) {
  switch (type) {
    case DataType::float32: return load_row(static_cast<const float*>(data) + offset, count, to);
    case DataType::float64: return load_row(static_cast<const double*>(data) + offset, count, to);
    case DataType::float16: return load_row(static_cast<const Float16*>(data) + offset, count, to);
    case DataType::bfloat16:
      return load_row(static_cast<const Bfloat16*>(data) + offset, count, to);
    default: return;
  }
}

template <class A, class B>
constexpr bool kIsSame = false;
template <class A>
constexpr bool kIsSame<A, A> = true;

// The rows of the tables that one slot of one batch row takes.
struct Taken {
  int64_t first, rank;
};

inline Status validate_updates(const Updates& updates, const Tensor<3, void>& y, const Tensor<3>& x,
                               DataType real) {
  const int64_t rows = y.sizes[0], tokens = y.sizes[1], slots = updates.slots.sizes[1];
  const Tensor<2>&up = updates.up, &down = updates.down;
  const bool is_given = down.data == nullptr, has_offsets = updates.offsets.data != nullptr;
  if (updates.slots.type != DataType::int32 || !is_floating(up)) return Status::unsupported_type;
  if (!has_sizes(up, {up.sizes[0], y.sizes[2]}) || !has_rows(up) ||
      updates.slots.sizes[0] != rows) {
    return Status::shape_mismatch;
  }
  if (is_given) {
    if (updates.coefficients.type != real) return Status::unsupported_type;
    if (has_offsets || !has_sizes(updates.coefficients, {rows, tokens, slots})) {
      return Status::shape_mismatch;
    }
  } else {
    if (!is_floating(down)) return Status::unsupported_type;
    if (!has_sizes(x, {rows, tokens, down.sizes[1]}) || !has_rows(x) || !has_rows(down) ||
        down.sizes[0] != up.sizes[0]) {
      return Status::shape_mismatch;
    }
  }
  if (updates.strength.data != nullptr) {
    if (updates.strength.type != real) return Status::unsupported_type;
    if (!has_sizes(updates.strength, {rows, slots})) return Status::shape_mismatch;
  }
  if (updates.token_weights.data != nullptr) {
    if (updates.token_weights.type != real) return Status::unsupported_type;
    if (!has_sizes(updates.token_weights, {rows, slots, tokens})) return Status::shape_mismatch;
  }
  int64_t count = up.sizes[0];
  if (has_offsets) {
    const Tensor<1>& offsets = updates.offsets;
    if (offsets.type != DataType::int32) return Status::unsupported_type;
    count = offsets.sizes[0] - 1;
    int32_t last = 0;
    for (int64_t k = 0; k <= count; ++k) {
      const int32_t offset = at<int32_t>(offsets, {k});
      if (offset < last || offset > up.sizes[0]) return Status::offset_out_of_range;
      last = offset;
    }
    if (count < 0) return Status::shape_mismatch;
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t j = 0; j < slots; ++j) {
      const int32_t slot = at<int32_t>(updates.slots, {row, j});
      if (slot < -1 || slot >= count) return Status::slot_out_of_range;
    }
  }
  return Status::ok;
}

// y = scale * (base + sums) + bias, rounded once: what becomes of a tile's sums.
template <class Real, class Base, class Element>
struct Finish {
  const Base* base;  // of the tile's tokens and columns, as y is
  int64_t base_row;
  Element* y;
  int64_t y_row;
  const Real* scale;  // [columns], or null
  const Real* bias;   // [columns], or null
  int64_t columns;    // nothing beyond is read or written
  bool is_added;      // whether there are sums: not base + 0, which would turn -0 into 0

  template <int vectors>
  void take(int64_t row, int64_t column, const Full<Real> (&sums)[vectors]) const {
    constexpr int lanes = kLanes<Real>;
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j, column += lanes) {
      const Base* from = base + row * base_row + column;
      Element* to = y + row * y_row + column;
      if (column + lanes <= columns) {
        narrow(to, value(widen<lanes>(from), sums[j], column));
      } else if (column < columns) {
        Base padded[lanes] = {};
        Element rest[lanes];
        std::memcpy(padded, from, (columns - column) * sizeof(Base));
        narrow(rest, value(widen<lanes>(padded), sums[j], column));
        std::memcpy(to, rest, (columns - column) * sizeof(Element));
      }
    }
  }

  Full<Real> value(Full<Real> whole, Full<Real> sum, int64_t column) const {
    constexpr int lanes = kLanes<Real>;
    if (is_added) whole += sum;
    if (scale != nullptr) whole *= widen<lanes>(scale + column);
    if (bias != nullptr) whole += widen<lanes>(bias + column);
    return whole;
  }
};

// The updates of every row. Coefficients come first, in units of some tokens of one row; then what
// they add, a part of the columns at a time.
template <class Element>
class RowUpdates {
 public:
  using Real = Accumulator<Element>;
  static constexpr int lanes = kLanes<Real>;
  static constexpr int64_t kColumns = kTileVectors * lanes;  // of y, together
  static constexpr int64_t kUnitTokens = 64;

  RowUpdates(const Updates& updates, const Tensor<3>& x, int64_t rows, int64_t tokens)
      : updates(updates),
        x(x),
        rows(rows),
        tokens(tokens),
        slots(updates.slots.sizes[1]),
        inner(updates.down.data == nullptr ? 0 : updates.down.sizes[1]) {
    for (int64_t row = 0; row < rows; ++row) {
      int64_t rank = 0;
      for (int64_t j = 0; j < slots; ++j) rank += taken_of(row, j).rank;
      most = larger(most, rank);
    }
  }

  int64_t width() const { return most; }
  int64_t units() const { return rows * divide_up(tokens, kUnitTokens); }
  int64_t row_of(int64_t unit) const { return unit / divide_up(tokens, kUnitTokens); }
  int64_t first_of(int64_t unit) const {
    return unit % divide_up(tokens, kUnitTokens) * kUnitTokens;
  }
  int64_t count_of(int64_t unit) const { return smaller(kUnitTokens, tokens - first_of(unit)); }
  // Of a token's coefficients, with room for whole vectors.
  int64_t stride() const { return round_up(most, lanes); }

  int64_t rank_of(int64_t row) const {
    int64_t rank = 0;
    for (int64_t j = 0; j < slots; ++j) rank += taken_of(row, j).rank;
    return rank;
  }

  struct Scratch {
    Real* directions;   // [K, stride] the row's rows of down, across
    Real* lines;        // [lanes, K] some of them as they lie
    Real* activations;  // [kUnitTokens, K] unless x can be read as it is
    Real* up;           // [width, kColumns]
    Real* token;        // [kColumns]
  };

  Scratch take(Arena& arena) const {
    const int64_t depth = round_up(inner, lanes);
    return {arena.take<Real>(depth * stride()), arena.take<Real>(lanes * depth),
            arena.take<Real>(reads_x_as_it_is() ? 0 : kUnitTokens * depth),
            arena.take<Real>(most * kColumns), arena.take<Real>(kColumns)};
  }

  // The coefficients of a row's tokens, c [count, stride]. `held` says which row's directions are
  // in the scratch.
  void coefficients(const Scratch& scratch, int64_t& held, int64_t row, int64_t first,
                    int64_t count, Real* c) const {
    if (updates.down.data == nullptr) {
      int64_t r = 0;
      for (int64_t j = 0; j < slots; ++j) {
        if (taken_of(row, j).rank == 0) continue;
        for (int64_t i = 0; i < count; ++i) {
          c[i * stride() + r] = at<Real>(updates.coefficients, {row, first + i, j});
        }
        ++r;
      }
      return;
    }
    if (is_paired()) {
#if defined(KEYLOCK_HAVE_PAIRS)
      if constexpr (kIsBfloat16) multiply_with<Pairs>(scratch, held, row, first, count, c);
#endif
    } else {
      multiply_with<Single<Real>>(scratch, held, row, first, count, c);
    }
    int64_t r = 0;
    for (int64_t j = 0; j < slots; ++j) {
      const int64_t rank = taken_of(row, j).rank;
      if (rank == 0) continue;
      for (int64_t i = 0; i < count; ++i) {
        const Real factor = factor_of(row, j, first + i);
        Real* of_token = c + i * stride() + r;
        for (int64_t p = 0; p < rank; ++p) of_token[p] = factor == 0 ? 0 : of_token[p] * factor;
      }
      r += rank;
    }
  }

  // Adds to some tokens of a row what their coefficients c [count, stride] say, in the columns
  // from `begin` on, and finishes them.
  template <class Base>
  void finish(const Scratch& scratch, int64_t row, const Real* c, int64_t begin, int64_t count,
              Finish<Real, Base, Element> output) const {
    const int64_t rank = rank_of(row);
    output.is_added = rank > 0;
    const bool is_finite = load_up(row, begin, output.columns, scratch.up);
    const int64_t vectors = divide_up(output.columns, lanes);
    if (is_finite) {
      const Product<Single<Real>> product = {c, stride(), 1, scratch.up, kColumns, rank};
      return multiply<Single<Real>>(product, output, count, vectors);
    }
    // A coefficient of 0 is nothing whatever it meets.
    for (int64_t i = 0; i < count; ++i, c += stride()) {
      load_row(output.base + i * output.base_row, output.columns, scratch.token);
      for (int64_t r = 0; r < rank; ++r) {
        if (c[r] == 0) continue;
        for (int64_t column = 0; column < output.columns; ++column) {
          scratch.token[column] += c[r] * scratch.up[r * kColumns + column];
        }
      }
      const Finish<Real, Real, Element> one = {
          scratch.token,  0,    output.y + i * output.y_row, 0, output.scale, output.bias,
          output.columns, false};
      multiply<Single<Real>>({c, 0, 1, scratch.up, kColumns, 0}, one, 1, vectors);
    }
  }

 private:
  static constexpr bool kIsBfloat16 = kIsSame<Element, Bfloat16>;

  Taken taken_of(int64_t row, int64_t j) const {
    const int64_t slot = at<int32_t>(updates.slots, {row, j});
    if (slot < 0) return {0, 0};
    if (updates.strength.data != nullptr && at<Real>(updates.strength, {row, j}) == 0) {
      return {0, 0};
    }
    if (updates.offsets.data == nullptr) return {slot, 1};
    const int64_t first = at<int32_t>(updates.offsets, {slot});
    return {first, at<int32_t>(updates.offsets, {slot + 1}) - first};
  }

  Real factor_of(int64_t row, int64_t j, int64_t token) const {
    Real factor = 1;
    if (updates.strength.data != nullptr) factor = at<Real>(updates.strength, {row, j});
    if (updates.token_weights.data != nullptr) {
      factor *= at<Real>(updates.token_weights, {row, j, token});
    }
    return factor;
  }

  // Whether bfloat16 numbers are multiplied as they are, in pairs.
  bool is_paired() const {
#if defined(KEYLOCK_HAVE_PAIRS)
    return kIsBfloat16 && updates.down.type == DataType::bfloat16 && inner % 2 == 0 &&
           x.strides[0] % 2 == 0 && x.strides[1] % 2 == 0;
#else
    return false;
#endif
  }

  bool reads_x_as_it_is() const { return is_paired() || sizeof(Element) == sizeof(Real); }

  template <class Step>
  void multiply_with(const Scratch& scratch, int64_t& held, int64_t row, int64_t first,
                     int64_t count, Real* c) const {
    using Operand = typename Step::Operand;
    const int64_t depth = inner / Step::kDepth;
    auto* const directions = reinterpret_cast<Operand*>(scratch.directions);
    if (held != row) lay_out<Step>(row, directions, reinterpret_cast<Operand*>(scratch.lines));
    held = row;
    const Element* from =
        static_cast<const Element*>(x.data) + row * x.strides[0] + first * x.strides[1];
    const Operand* a = reinterpret_cast<const Operand*>(from);
    int64_t a_row = x.strides[1] / Step::kDepth;
    if (!reads_x_as_it_is()) {
      a_row = round_up(inner, lanes);
      for (int64_t i = 0; i < count; ++i) {
        load_row(from + i * x.strides[1], inner, scratch.activations + i * a_row);
      }
      a = reinterpret_cast<const Operand*>(scratch.activations);
    }
    multiply_by_stretches<Step>({a, a_row, 1, directions, stride(), depth}, c, stride(), count,
                                stride() / lanes);
  }

  // The row's rows of down as columns [depth, stride], zeros beyond them.
  template <class Step>
  void lay_out(int64_t row, typename Step::Operand* to, typename Step::Operand* lines) const {
    const int64_t depth = inner / Step::kDepth, line = round_up(inner, lanes);
    int64_t done = 0;  // of the columns
    const auto flush = [&](int64_t count) {
      for (; count < lanes; ++count) std::memset(lines + count * line, 0, depth * sizeof(*lines));
      for (int64_t k = 0; k < depth; k += lanes) {
        transpose(lines + k, line, to + k * stride() + done, stride());
      }
    };
    int64_t waiting = 0;
    for (int64_t j = 0; j < slots; ++j) {
      const Taken taken = taken_of(row, j);
      for (int64_t p = taken.first; p < taken.first + taken.rank; ++p) {
        const int64_t offset = p * updates.down.strides[0];
        if constexpr (Step::kDepth == 1) {
          load_any(updates.down.data, updates.down.type, offset, inner, lines + waiting * line);
        } else {
          const auto* halves = static_cast<const Bfloat16*>(updates.down.data) + offset;
          std::memcpy(lines + waiting * line, halves, inner * sizeof(Bfloat16));
        }
        if (++waiting == lanes) {
          flush(waiting);
          done += lanes;
          waiting = 0;
        }
      }
    }
    if (waiting > 0) {
      flush(waiting);
      done += lanes;
    }
    for (int64_t k = 0; k < depth && done < stride(); ++k) {  // of a row that takes fewer
      std::memset(to + k * stride() + done, 0, (stride() - done) * sizeof(*to));
    }
  }

  // The row's rows of up in some columns, and whether they are finite.
  bool load_up(int64_t row, int64_t begin, int64_t columns, Real* to) const {
    Full<Real> zeros = {};  // NaN once anything is not finite
    for (int64_t j = 0; j < slots; ++j) {
      const Taken taken = taken_of(row, j);
      for (int64_t p = taken.first; p < taken.first + taken.rank; ++p, to += kColumns) {
        load_any(updates.up.data, updates.up.type, p * updates.up.strides[0] + begin, columns, to);
        for (int64_t column = 0; column < columns; column += lanes) {
          zeros += 0 * widen<lanes>(to + column);
        }
      }
    }
    for (int lane = 0; lane < lanes; ++lane) {
      if (!(zeros[lane] == 0)) return false;
    }
    return true;
  }

  const Updates& updates;
  const Tensor<3>& x;
  const int64_t rows, tokens, slots, inner;
  int64_t most = 0;  // rows of the tables that one batch row takes
};

}  // namespace
}  // namespace keylock::KEYLOCK_ISA
