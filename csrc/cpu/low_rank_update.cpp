// The CPU kernel of low_rank_update, compiled once per instruction set (see vector.h).
//
// The work is cut into units of some tokens of one batch row, whatever the number of threads: first
// their coefficients, then a part of the columns after the other, each read, added to, rounded and
// written once.
#include "keylock/low_rank_update.h"

#include "updates.h"

namespace keylock::KEYLOCK_ISA {
namespace {

constexpr int64_t kSerialElements = 32768;  // below this, waking threads costs more than it saves

template <class Element>
Status update_all(const LowRankUpdate& op, int threads) {
  using Rows = RowUpdates<Element>;
  using Real = typename Rows::Real;
  const int64_t rows = op.y.sizes[0], tokens = op.y.sizes[1], outputs = op.y.sizes[2];
  const Rows updates(op.updates, op.x, rows, tokens);
  // All the threads or one: a team of another size makes OpenMP end and restart the others.
  const bool is_parallel = threads > 1 && rows * tokens * outputs >= kSerialElements;
  if (!is_parallel) threads = 1;
  Arena sizes = {};
  updates.take(sizes);
  sizes.take<Real>(Rows::kUnitTokens * updates.stride());
  char* memory = static_cast<char*>(std::aligned_alloc(64, sizes.used * threads + 64));
  if (memory == nullptr) return Status::out_of_memory;
#pragma omp parallel num_threads(threads) if (is_parallel)
  {
    Arena arena = {memory + sizes.used * thread_number(), 0};
    const auto scratch = updates.take(arena);
    Real* const coefficients = arena.take<Real>(Rows::kUnitTokens * updates.stride());
    int64_t held = -1;
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < updates.units(); ++unit) {
      const int64_t row = updates.row_of(unit), first = updates.first_of(unit);
      const int64_t count = updates.count_of(unit);
      updates.coefficients(scratch, held, row, first, count, coefficients);
      for (int64_t begin = 0; begin < outputs; begin += Rows::kColumns) {
        const Element* base = static_cast<const Element*>(op.base.data) + row * op.base.strides[0] +
                              first * op.base.strides[1] + begin;
        Element* y = static_cast<Element*>(op.y.data) + row * op.y.strides[0] +
                     first * op.y.strides[1] + begin;
        updates.template finish<Element>(
            scratch, row, coefficients, begin, count,
            {base, op.base.strides[1], y, op.y.strides[1], nullptr, nullptr,
             smaller(Rows::kColumns, outputs - begin), false});
      }
    }
  }
  std::free(memory);
  return Status::ok;
}

Status validate(const LowRankUpdate& op) {
  const int64_t (&sizes)[3] = op.y.sizes;
  const bool has_x = op.updates.down.data != nullptr;
  if (op.y.type != op.base.type || (has_x && op.x.type != op.base.type)) {
    return Status::unsupported_type;
  }
  if (!has_sizes(op.base, sizes) || !has_rows(op.base) || !has_rows(op.y)) {
    return Status::shape_mismatch;
  }
  const DataType real = op.base.type == DataType::float64 ? DataType::float64 : DataType::float32;
  return validate_updates(op.updates, op.y, op.x, real);
}

}  // namespace

Status low_rank_update(const LowRankUpdate& op, int threads) {
  const Status status = validate(op);
  if (status != Status::ok) return status;
  switch (op.base.type) {
    case DataType::float32: return update_all<float>(op, threads);
    case DataType::float64: return update_all<double>(op, threads);
    case DataType::float16: return update_all<Float16>(op, threads);
    case DataType::bfloat16: return update_all<Bfloat16>(op, threads);
    default: return Status::unsupported_type;
  }
}

}  // namespace keylock::KEYLOCK_ISA
