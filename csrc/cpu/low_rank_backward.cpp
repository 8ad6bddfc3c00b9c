// The CPU kernel of the gradients that few updates have, compiled once per instruction set (see
// vector.h).
//
// The work is cut into tiles of one batch row, some tokens and some columns, by the shape alone. A
// tile reads its part of grad once and gives a part of both sums; the parts are added in order.
#include "keylock/low_rank_update.h"
#include "updates.h"

namespace keylock::KEYLOCK_ISA {
namespace {

constexpr int64_t kTileTokens = 512;
constexpr int64_t kSerialElements = 32768;  // below this, waking threads costs more than it saves

template <class Element>
class UpdateBackward {
  using Real = Accumulator<Element>;
  static constexpr int width = kLanes<Real>;
  static constexpr int vectors = 8;  // of a token's columns, in registers
  static constexpr int64_t columns = vectors * width;

 public:
  explicit UpdateBackward(const LowRankBackward& op)
      : op(op),
        rows(op.grad.sizes[0]),
        tokens(op.grad.sizes[1]),
        outputs(op.grad.sizes[2]),
        rank(op.rows.sizes[1]),
        down(divide_up(tokens, kTileTokens)),
        across(divide_up(outputs, columns)) {}

  Status run(int threads) {
    const bool is_parallel = threads > 1 && rows * tokens * outputs >= kSerialElements;
    if (!is_parallel) threads = 1;
    Arena sizes = {}, shared = {};
    take(sizes);
    take_partials(shared);
    char* memory =
        static_cast<char*>(std::aligned_alloc(64, sizes.used * threads + shared.used + 64));
    if (memory == nullptr) return Status::out_of_memory;
    shared = {memory + sizes.used * threads, 0};
    take_partials(shared);
#pragma omp parallel num_threads(threads) if (is_parallel)
    {
      Arena arena = {memory + sizes.used * thread_number(), 0};
      take(arena);
      Real* const gathered = reinterpret_cast<Real*>(arena.memory);
      Real* const sums = gathered + rank * columns;
#pragma omp for schedule(static)
      for (int64_t tile = 0; tile < rows * down * across; ++tile) {
        run_tile(tile / across / down, tile / across % down, tile % across, gathered, sums);
      }
#pragma omp for schedule(static)
      for (int64_t index = 0; index < rows * tokens; ++index) add_coefficients(index);
#pragma omp for schedule(static)
      for (int64_t slot = 0; slot < op.up.sizes[0]; ++slot) add_slot(slot);
    }
    std::free(memory);
    return Status::ok;
  }

 private:
  // The rows of u that a tile uses, and what it adds up for them: [2, R, columns].
  void take(Arena& arena) const { arena.take<Real>(2 * rank * columns); }

  void take_partials(Arena& arena) {
    partial_u = arena.take<Real>(op.grad_up.data ? rows * down * rank * across * columns : 0);
    partial_coefficients =
        arena.take<Real>(op.grad_coefficients.data ? rows * tokens * across * rank : 0);
  }

  void run_tile(int64_t row, int64_t piece, int64_t strip, Real* gathered, Real* sums) const {
    const int64_t first = strip * columns, count = smaller(columns, outputs - first);
    for (int64_t r = 0; r < rank; ++r) {
      const int64_t from = at<int32_t>(op.rows, {row, r});
      Real* to = gathered + r * columns;
      for (int64_t i = 0; i < columns; ++i) to[i] = sums[r * columns + i] = 0;
      if (from >= 0) load_any(op.up.data, op.up.type, from * op.up.strides[0] + first, count, to);
    }
    const int64_t end = smaller((piece + 1) * kTileTokens, tokens);
    for (int64_t token = piece * kTileTokens; token < end; ++token) {
      alignas(64) Real grads[columns] = {};
      load_row(static_cast<const Element*>(op.grad.data) + row * op.grad.strides[0] +
                   token * op.grad.strides[1] + first,
               count, grads);
      run_token(row, token, strip, grads, gathered, sums);
    }
    if (op.grad_up.data == nullptr) return;
    for (int64_t r = 0; r < rank; ++r) {
      std::memcpy(partial_of(row, piece, r) + first, sums + r * columns, columns * sizeof(Real));
    }
  }

  void run_token(int64_t row, int64_t token, int64_t strip, const Real* grads, const Real* gathered,
                 Real* sums) const {
    Full<Real> grad[vectors];
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) grad[i] = widen<width>(grads + i * width);
    for (int64_t r = 0; r < rank; ++r) {
      const bool is_taken = at<int32_t>(op.rows, {row, r}) >= 0;
      if (op.grad_coefficients.data != nullptr) {
        Full<Real> dot{};
        const Real* u = gathered + r * columns;
#pragma GCC unroll 8
        for (int i = 0; i < vectors; ++i) dot += grad[i] * widen<width>(u + i * width);
        dot = over_groups<Real>(dot, width, [](Full<Real> a, Full<Real> b) { return a + b; });
        partial_coefficients[((row * tokens + token) * across + strip) * rank + r] =
            is_taken ? dot[0] : 0;
      }
      if (op.grad_up.data != nullptr && is_taken) {
        const Real coefficient = at<Real>(op.coefficients, {row, token, r});
        if (coefficient == 0) continue;  // which is nothing whatever it meets
        Real* sum = sums + r * columns;
#pragma GCC unroll 8
        for (int i = 0; i < vectors; ++i) {
          write_bits(sum + i * width, widen<width>(sum + i * width) + coefficient * grad[i]);
        }
      }
    }
  }

  Real* partial_of(int64_t row, int64_t piece, int64_t r) const {
    return partial_u + ((row * down + piece) * rank + r) * across * columns;
  }

  void add_coefficients(int64_t index) const {
    if (op.grad_coefficients.data == nullptr) return;
    for (int64_t r = 0; r < rank; ++r) {
      Real sum = 0;
      for (int64_t i = 0; i < across; ++i) {
        sum += partial_coefficients[(index * across + i) * rank + r];
      }
      static_cast<Real*>(op.grad_coefficients.data)[index * rank + r] = sum;
    }
  }

  void add_slot(int64_t slot) const {
    if (op.grad_up.data == nullptr) return;
    Real* to = static_cast<Real*>(op.grad_up.data) + slot * outputs;
    std::memset(to, 0, outputs * sizeof(Real));
    for (int64_t index = 0; index < rows * rank; ++index) {
      const int64_t row = index / rank, r = index % rank;
      if (at<int32_t>(op.rows, {row, r}) != slot) continue;
      for (int64_t piece = 0; piece < down; ++piece) {
        const Real* from = partial_of(row, piece, r);
        for (int64_t i = 0; i < outputs; ++i) to[i] += from[i];
      }
    }
  }

  const LowRankBackward& op;
  const int64_t rows, tokens, outputs, rank, down, across;
  Real* partial_u;             // [B, down, R, across * columns]
  Real* partial_coefficients;  // [B, T, across, R]
};

Status validate(const LowRankBackward& op) {
  const DataType wide = op.grad.type == DataType::float64 ? DataType::float64 : DataType::float32;
  if (!is_floating(op.grad)) return Status::unsupported_type;
  if (!has_rows(op.grad)) return Status::shape_mismatch;
  if (op.grad_up.data != nullptr) {
    if (op.grad_up.type != wide) return Status::unsupported_type;
    if (!has_sizes(op.grad_up, op.up.sizes)) return Status::shape_mismatch;
  }
  if (op.grad_coefficients.data != nullptr) {
    if (op.grad_coefficients.type != wide) return Status::unsupported_type;
    if (!has_sizes(op.grad_coefficients, op.coefficients.sizes)) return Status::shape_mismatch;
  }
  const int64_t rank = op.rows.sizes[1];
  if (op.rows.type != DataType::int32 || !is_floating(op.up) || op.coefficients.type != wide) {
    return Status::unsupported_type;
  }
  if (op.rows.sizes[0] != op.grad.sizes[0] || !has_rows(op.up) ||
      !has_sizes(op.up, {op.up.sizes[0], op.grad.sizes[2]}) ||
      !has_sizes(op.coefficients, {op.grad.sizes[0], op.grad.sizes[1], rank})) {
    return Status::shape_mismatch;
  }
  for (int64_t row = 0; row < op.rows.sizes[0]; ++row) {
    for (int64_t r = 0; r < rank; ++r) {
      const int32_t from = at<int32_t>(op.rows, {row, r});
      if (from < -1 || from >= op.up.sizes[0]) return Status::slot_out_of_range;
    }
  }
  return Status::ok;
}

}  // namespace

Status low_rank_backward(const LowRankBackward& op, int threads) {
  const Status status = validate(op);
  if (status != Status::ok) return status;
  switch (op.grad.type) {
    case DataType::float32: return UpdateBackward<float>(op).run(threads);
    case DataType::float64: return UpdateBackward<double>(op).run(threads);
    case DataType::float16: return UpdateBackward<Float16>(op).run(threads);
    case DataType::bfloat16: return UpdateBackward<Bfloat16>(op).run(threads);
    default: return Status::unsupported_type;
  }
}

}  // namespace keylock::KEYLOCK_ISA
