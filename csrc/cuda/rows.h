// Rows of a tensor between global and shared memory, and single numbers from either width.
#pragma once

#include "device.h"

namespace keylock::cuda {

constexpr int round_up(int value, int to) { return (value + to - 1) / to * to; }
// Elements from row to row in shared memory: an odd number of 16-byte pieces, so that eight rows
// of one column lie in different banks.
template <class T>
constexpr int row_stride(int columns) {
  return round_up(columns, 16) + kChunk<T>;
}

template <class T>
KEYLOCK_DEVICE void copy_narrow(Shared<T> to, const T* from, int count) {
  KEYLOCK_ONCE
  for (int i = 0; i < kChunk<T>; ++i) to[i] = i < count ? from[i] : T{};
  note_access(false, count * static_cast<int>(sizeof(T)));
}

template <class T>
KEYLOCK_DEVICE void copy_wide(Shared<T> to, const T* from, bool inside) {
  copy_async(to, from, inside ? 16 : 0);
  note_access(true, inside ? 16 : 0);
}

template <class T>
KEYLOCK_DEVICE void store_narrow(T* to, Shared<T> from, int count) {
  KEYLOCK_ONCE
  for (int i = 0; i < count; ++i) to[i] = from[i];
  note_access(false, count * static_cast<int>(sizeof(T)));
}

template <class T>
KEYLOCK_DEVICE void store_wide(T* to, Shared<T> from) {
  store_chunk(to, *shared_cast<Chunk>(from));
  note_access(true, 16);
}

// A [rows, columns] piece of a tensor, rows `step` elements apart. It is wide where it can be moved
// in pieces of 16 bytes.
template <class T>
struct Piece {
  T* data;
  int64_t step;
  int rows, columns;
  bool is_wide;
};

// Fills [rows, kColumns] of shared memory, `threads` threads together, with zeros around the
// piece. What is wide arrives asynchronously.
template <int kColumns, class T>
KEYLOCK_DEVICE void copy_rows(Shared<T> to, int stride, int rows, const Piece<const T>& piece,
                              int thread, int threads) {
  constexpr int kPieces = kColumns / kChunk<T>;
  for (int i = thread; i < rows * kPieces; i += threads) {
    const int row = i / kPieces, column = i % kPieces * kChunk<T>;
    const int count = row < piece.rows ? piece.columns - column : 0;
    // Nothing is read where nothing is inside, but the address must be one that exists.
    const T* from = piece.data + (count > 0 ? row * piece.step + column : 0);
    if (piece.is_wide) {
      copy_wide(to + (row * stride + column), from, count > 0);
    } else {
      copy_narrow(to + (row * stride + column), from, count);
    }
  }
}

template <int kColumns, class T>
KEYLOCK_DEVICE void store_rows(const Piece<T>& piece, Shared<T> from, int stride, int thread,
                               int threads) {
  constexpr int kPieces = kColumns / kChunk<T>;
  for (int i = thread; i < piece.rows * kPieces; i += threads) {
    const int row = i / kPieces, column = i % kPieces * kChunk<T>;
    if (column >= piece.columns) continue;
    T* to = piece.data + row * piece.step + column;
    const int count = piece.columns - column;
    if (piece.is_wide) {
      store_wide(to, from + (row * stride + column));
    } else {
      store_narrow(to, from + (row * stride + column), count < kChunk<T> ? count : kChunk<T>);
    }
  }
}

// Two neighbouring results, rounded once.
template <class T>
KEYLOCK_DEVICE void put_pair(Shared<T> to, float first, float second) {
  if constexpr (sizeof(T) == 4) {
    *shared_cast<Pair>(to) = {first, second};
  } else {
    *shared_cast<uint32_t>(to) = pack<T>(first, second);
  }
}

// An element of a tensor that holds T or float.
template <class T>
KEYLOCK_DEVICE float side(const void* data, DataType type, int64_t offset) {
  if (type == DataType::float32) return static_cast<const float*>(data)[offset];
  return widen(static_cast<const T*>(data)[offset]);
}

// Whether all rows of a tensor, if it has any, start on 16 bytes and are made of 16-byte pieces.
template <int rank, class Data>
bool is_wide(const Tensor<rank, Data>& tensor) {
  const int64_t piece = tensor.type == DataType::float32 ? 4 : 8;
  bool wide =
      reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 && tensor.sizes[rank - 1] % piece == 0;
  for (int d = 0; d < rank; ++d) {
    if (tensor.sizes[d] == 0) return true;
    wide &= d == rank - 1 || tensor.sizes[d] == 1 || tensor.strides[d] % piece == 0;
  }
  return wide;
}

template <int rank, class Data>
bool is_row_contiguous(const Tensor<rank, Data>& tensor) {
  return tensor.strides[rank - 1] == 1 || tensor.sizes[rank - 1] <= 1;
}

}  // namespace keylock::cuda
