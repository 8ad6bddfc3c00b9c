// The matrix product that the kernels are made of: c[rows, columns] = a[rows, depth] b[depth,
// columns], operands in cache. Each sum runs over the depth in order, wherever its element lies:
// what a row of a gives depends on that row alone.
#pragma once

#include "vector.h"

namespace keylock::KEYLOCK_ISA {
namespace {

constexpr bool kWide = KEYLOCK_VECTOR_BYTES == 64;  // and thus 32 vector registers
constexpr int kTileRows = 4;                        // of a, per register tile
constexpr int kTileVectors = kWide ? 6 : 3;         // of b, per register tile
constexpr int64_t kBlockDepth = 160;                // operands along the depth, per stretch of it

// How products are formed: of `Operand`s, each `kDepth` numbers along the depth, into `Real`s.
template <class Scalar>
struct Single {
  using Real = Scalar;
  using Operand = Scalar;
  static constexpr int kDepth = 1;

  static void add(Full<Real>& sum, Full<Operand> a, Full<Operand> b) { sum += a * b; }
};

#if defined(__AVX512BF16__)
#define KEYLOCK_HAVE_PAIRS
// Two bfloat16 numbers at a time. Products are exact, sums in float; subnormal numbers count as 0.
struct Pairs {
  using Real = float;
  using Operand = int32_t;
  static constexpr int kDepth = 2;

  static void add(Full<Real>& sum, Full<Operand> a, Full<Operand> b) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

template <class Step>
struct Product {
  const typename Step::Operand* a;
  int64_t a_row, a_depth;  // strides: a may lie transposed
  const typename Step::Operand* b;
  int64_t b_depth;
  int64_t depth;
};

// Where sums go, told of a stretch of a row of c at a time: here into memory, or added to it.
template <class Real, bool is_added = false>
struct Memory {
  Real* c;
  int64_t c_row;

  template <int vectors>
  void take(int64_t row, int64_t column, const Full<Real> (&sums)[vectors]) const {
    Real* to = c + row * c_row + column;
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j, to += kLanes<Real>) {
      write_bits(to, is_added ? read_bits<Real, kLanes<Real>>(to) + sums[j] : sums[j]);
    }
  }
};

template <class Step, int height, int vectors, class Output>
inline void multiply_tile(const Product<Step>& product, const Output& output, int64_t row,
                          int64_t column) {
  using Operand = typename Step::Operand;
  using Real = typename Step::Real;
  constexpr int lanes = kLanes<Real>;
  const Operand* a = product.a + row * product.a_row;
  const Operand* b = product.b + column;
  Full<Real> sums[height][vectors] = {};
  for (int64_t k = 0; k < product.depth; ++k) {
    Full<Operand> right[vectors];
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) right[j] = read_bits<Operand, lanes>(b + j * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < height; ++i) {
      const Full<Operand> left = all(read_one(a + i * product.a_row));
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) Step::add(sums[i][j], left, right[j]);
    }
    a += product.a_depth;
    b += product.b_depth;
  }
#pragma GCC unroll 8
  for (int i = 0; i < height; ++i) output.take(row + i, column, sums[i]);
}

template <class Step, int vectors, class Output>
void multiply_columns(const Product<Step>& product, const Output& output, int64_t rows,
                      int64_t column) {
  int64_t row = 0;
  if constexpr (2 * vectors <= kTileVectors) {  // twice the rows, to have as many sums in flight
    for (; row + 2 * kTileRows <= rows; row += 2 * kTileRows) {
      multiply_tile<Step, 2 * kTileRows, vectors>(product, output, row, column);
    }
  }
  for (; row + kTileRows <= rows; row += kTileRows) {
    multiply_tile<Step, kTileRows, vectors>(product, output, row, column);
  }
  for (; row < rows; ++row) multiply_tile<Step, 1, vectors>(product, output, row, column);
}

// `vectors` counts b's columns in vectors: what lies beyond columns in b is read, and goes on to
// the output.
template <class Step, class Output>
void multiply(const Product<Step>& product, const Output& output, int64_t rows, int64_t vectors) {
  constexpr int lanes = kLanes<typename Step::Real>;
  int64_t done = 0;
  for (int64_t passes = divide_up(vectors, kTileVectors); passes > 0; --passes) {
    const int64_t now = divide_up(vectors - done, passes);  // even shares: a lone vector is slow
    const int64_t column = done * lanes;
    switch (now) {
      case 1: multiply_columns<Step, 1>(product, output, rows, column); break;
      case 2: multiply_columns<Step, 2>(product, output, rows, column); break;
      case 3: multiply_columns<Step, 3>(product, output, rows, column); break;
#if KEYLOCK_VECTOR_BYTES == 64
      case 4: multiply_columns<Step, 4>(product, output, rows, column); break;
      case 5: multiply_columns<Step, 5>(product, output, rows, column); break;
      case 6: multiply_columns<Step, 6>(product, output, rows, column); break;
#endif
    }
    done += now;
  }
}

// Into c, `c_row` apart, by stretches of the depth: one that fits the first-level cache at a time,
// and sums of sums, which err less than one long sum does.
template <class Step>
void multiply_by_stretches(const Product<Step>& product, typename Step::Real* c, int64_t c_row,
                           int64_t rows, int64_t vectors) {
  using Real = typename Step::Real;
  const int64_t stretches = larger(1, divide_up(product.depth, kBlockDepth));
  for (int64_t i = 0; i < stretches; ++i) {
    Product<Step> part = product;
    const int64_t k = i * product.depth / stretches;
    part.a += k * product.a_depth;
    part.b += k * product.b_depth;
    part.depth = (i + 1) * product.depth / stretches - k;
    if (i == 0) {
      multiply<Step>(part, Memory<Real>{c, c_row}, rows, vectors);
    } else {
      multiply<Step>(part, Memory<Real, true>{c, c_row}, rows, vectors);
    }
  }
}

}  // namespace
}  // namespace keylock::KEYLOCK_ISA
