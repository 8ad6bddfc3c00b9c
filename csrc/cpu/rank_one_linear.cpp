// The CPU kernel of rank_one_linear, compiled once per instruction set (see vector.h), for those
// that have enough registers.
//
// A thread takes some columns of y at a time, lays their part of the weight out for the register
// tiles once, and multiplies it with a block of tokens after the other: by a stretch of the depth
// that fits the first-level cache, so that sums wait in the second. Then it adds bias and updates,
// rounds, and writes.
#include "keylock/rank_one_linear.h"

#include "multiply.h"
#include "rank_one.h"
#include "scratch.h"
#include "transpose.h"

namespace keylock::KEYLOCK_ISA {

#if defined(__AVX512F__) && KEYLOCK_VECTOR_BYTES == 64
namespace {

constexpr int64_t kBlockTokens = 192;
constexpr int64_t kBlockDepth = 160;          // operands per stretch of the depth
constexpr int64_t kHeldBytes = 512 << 10;     // of the weight, where there are many tokens
constexpr int64_t kSerialProducts = 1 << 20;  // below this, waking threads costs more than it saves
constexpr int width = kLanes<float>;
constexpr int64_t kColumns = kTileVectors * width;  // of y, together

template <class Element, class Step>
class Linear {
  using Operand = typename Step::Operand;

 public:
  Linear(const RankOneLinear& op, int threads)
      : op(op),
        tokens(op.y.sizes[0] * op.y.sizes[1]),
        outputs(op.y.sizes[2]),
        rank(op.slots.sizes[1]),
        depth(op.x.sizes[2] / Step::kDepth),
        vectors(divide_up(outputs, width)),
        strips(round_up(divide_up(vectors, kTileVectors), smaller(threads, larger(vectors, 1)))),
        blocks(divide_up(tokens, kBlockTokens)),
        together(blocks == 1 ? 1 : larger(1, kHeldBytes / (depth * kColumns * 4 + 1))) {}

  Status run(int threads) const {
    const bool is_parallel = threads > 1 && tokens * outputs * depth >= kSerialProducts;
    if (!is_parallel) threads = 1;
    Arena sizes = {};
    take(sizes);
    char* memory = static_cast<char*>(std::aligned_alloc(64, sizes.used * threads));
    if (memory == nullptr) return Status::out_of_memory;
#pragma omp parallel num_threads(threads) if (is_parallel)
    {
      Arena arena = {memory + sizes.used * thread_number(), 0};
      const Scratch scratch = take(arena);
      int64_t held = -1;  // which strips are laid out
#pragma omp for schedule(static)
      for (int64_t unit = 0; unit < divide_up(strips, together) * blocks; ++unit) {
        const int64_t begin = unit / blocks * together, end = smaller(begin + together, strips);
        const int64_t block = unit % blocks, first = block * tokens / blocks;
        for (int64_t strip = begin; strip < end; ++strip) {
          Operand* weight = scratch.weight + (strip - begin) * round_up(depth, width) * kColumns;
          if (held != begin) pack(strip, weight);
          run_block(scratch, strip, weight, first, (block + 1) * tokens / blocks - first);
        }
        held = begin;
      }
    }
    std::free(memory);
    return Status::ok;
  }

 private:
  struct Scratch {
    Operand* weight;      // [together, depth, kColumns]
    Operand* last;        // [kTileRows, depth] where the tokens end within a tile
    float* sums;          // [kBlockTokens, kColumns]
    float* bias;          // [kColumns]
    int64_t* taken;       // [R] which of a row's updates there are
    float* added;         // [R, kColumns] their rows of u
    float* coefficients;  // [R] their coefficients of a token
  };

  Scratch take(Arena& arena) const {
    return {arena.take<Operand>(together * round_up(depth, width) * kColumns),
            arena.take<Operand>(kTileRows * depth),
            arena.take<float>(kBlockTokens * kColumns),
            arena.take<float>(kColumns),
            arena.take<int64_t>(rank),
            arena.take<float>(rank * kColumns),
            arena.take<float>(rank)};
  }

  // Strips share the vectors evenly, as blocks do the tokens.
  int64_t begin_of(int64_t strip) const { return strip * vectors / strips * width; }

  void pack(int64_t strip, Operand* packed) const {
    const int64_t begin = begin_of(strip), end = begin_of(strip + 1);
    alignas(64) Operand rest[width][width];
    for (int64_t column = begin; column < end; column += width) {
      const int64_t count = smaller(width, outputs - column);
      for (int64_t k = 0; k < depth; k += width) {
        Operand* to = packed + k * kColumns + column - begin;
        if (count == width && k + width <= depth && op.weight.strides[0] % Step::kDepth == 0) {
          transpose(weight_at(column, k), op.weight.strides[0] / Step::kDepth, to, kColumns);
          continue;
        }
        std::memset(rest, 0, sizeof rest);
        for (int64_t i = 0; i < count; ++i) {
          std::memcpy(rest[i], weight_at(column + i, k),
                      smaller(width, depth - k) * sizeof(Operand));
        }
        transpose(rest[0], width, to, kColumns);
      }
    }
  }

  const Operand* weight_at(int64_t column, int64_t k) const {
    return reinterpret_cast<const Operand*>(static_cast<const Element*>(op.weight.data) +
                                            column * op.weight.strides[0] + k * Step::kDepth);
  }

  // Tokens of all batch rows in one go: each has sums of its own.
  void run_block(const Scratch& scratch, int64_t strip, const Operand* packed, int64_t first,
                 int64_t count) const {
    const int64_t begin = begin_of(strip), across = (begin_of(strip + 1) - begin) / width;
    const int64_t whole = count / kTileRows * kTileRows;
    const int64_t stride = op.x.strides[1] / Step::kDepth;
    const auto* x = reinterpret_cast<const Operand*>(static_cast<const Element*>(op.x.data) +
                                                     first * op.x.strides[1]);
    for (int64_t i = whole; i < count; ++i) {
      std::memcpy(scratch.last + (i - whole) * depth, x + i * stride, depth * sizeof(Operand));
    }
    float* const rest = scratch.sums + whole * kColumns;
    const int64_t stretches = larger(1, divide_up(depth, kBlockDepth));
    for (int64_t i = 0; i < stretches; ++i) {
      const int64_t k = i * depth / stretches, now = (i + 1) * depth / stretches - k;
      const Product<Step> most = {x + k, stride,       1,       packed + k * kColumns, kColumns,
                                  now,   scratch.sums, kColumns};
      const Product<Step> few = {scratch.last + k, depth, 1, most.b, kColumns, now, rest, kColumns};
      if (i == 0) {
        multiply<Step>(most, whole, across);
        multiply<Step>(few, count - whole, across);
      } else {
        multiply<Step, true>(most, whole, across);
        multiply<Step, true>(few, count - whole, across);
      }
    }
    const int64_t end = smaller(begin + across * width, outputs), last = first + count;
    while (first < last) {  // the part of each batch row
      const int64_t row = first / op.y.sizes[1], next = smaller((row + 1) * op.y.sizes[1], last);
      finish(scratch, begin, end, row, first, next - first,
             scratch.sums + (first - last + count) * kColumns);
      first = next;
    }
  }

  void finish(const Scratch& scratch, int64_t begin, int64_t end, int64_t row, int64_t first,
              int64_t count, float* sums) const {
    const int64_t columns = end - begin;
    if (op.bias.data != nullptr) load(op.bias.data, op.bias.type, begin, columns, scratch.bias);
    int64_t taken = 0;
    for (int64_t r = 0; r < rank; ++r) {
      const int64_t slot = slot_at(op.slots, row, r);
      if (slot < 0) continue;
      scratch.taken[taken] = r;
      load(op.u.data, op.u.type, slot * op.u.strides[0] + begin, columns,
           scratch.added + taken++ * kColumns);
    }
    for (int64_t i = 0; i < count; ++i, sums += kColumns) {
      const int64_t token = first + i - row * op.y.sizes[1];
      for (int64_t j = 0; j < taken; ++j) {
        scratch.coefficients[j] =
            coefficient_at<float>(op.coefficients, row, token, scratch.taken[j]);
      }
      for (int64_t column = 0; column < columns; column += width) {
        auto sum = widen<width>(sums + column);
        if (op.bias.data != nullptr) sum += widen<width>(scratch.bias + column);
        Full<float> update{};
        for (int64_t j = 0; j < taken; ++j) {
          update += scratch.coefficients[j] * widen<width>(scratch.added + j * kColumns + column);
        }
        write_bits(sums + column, sum + update);
      }
      store_row(sums, columns,
                static_cast<Element*>(op.y.data) + row * op.y.strides[0] + token * op.y.strides[1] +
                    begin);
    }
  }

  static void load(const void* data, DataType type, int64_t offset, int64_t count, float* to) {
    if (type == DataType::float32) {
      load_row(static_cast<const float*>(data) + offset, count, to);
    } else {
      load_row(static_cast<const Bfloat16*>(data) + offset, count, to);
    }
  }

  const RankOneLinear& op;
  const int64_t tokens;  // of all rows
  const int64_t outputs, rank, depth, vectors, strips, blocks;
  const int64_t together;  // strips whose weights a thread holds at once
};

bool is_single_or_half(DataType type) {
  return type == DataType::float32 || type == DataType::bfloat16;
}

Status validate(const RankOneLinear& op) {
  const int64_t (&sizes)[3] = op.y.sizes;
  const DataType type = op.x.type;
  if (!is_single_or_half(type) || op.weight.type != type || op.y.type != type ||
      !is_single_or_half(op.u.type) || !is_single_or_half(op.bias.type)) {
    return Status::unsupported_type;
  }
  const int64_t depth = op.x.sizes[2];
  if (!has_sizes(op.x, {sizes[0], sizes[1], depth}) || !has_sizes(op.weight, {sizes[2], depth}) ||
      !has_rows(op.x) || !has_rows(op.weight) || !has_rows(op.y) ||
      (sizes[0] * sizes[1] > sizes[1] && op.x.strides[0] != sizes[1] * op.x.strides[1])) {
    return Status::shape_mismatch;
  }
  if (type == DataType::bfloat16 && (depth % 2 != 0 || (depth > 0 && op.x.strides[1] % 2 != 0))) {
    return Status::shape_mismatch;
  }
  if (op.bias.data != nullptr && (!has_sizes(op.bias, {sizes[2]}) || !has_rows(op.bias))) {
    return Status::shape_mismatch;
  }
  return validate_updates(op, sizes);
}

}  // namespace

Status rank_one_linear(const RankOneLinear& op, int threads) {
  const Status status = validate(op);
  if (status != Status::ok) return status;
  if (op.x.type == DataType::float32) return Linear<float, Single<float>>(op, threads).run(threads);
#if defined(KEYLOCK_HAVE_PAIRS)
  return Linear<Bfloat16, Pairs>(op, threads).run(threads);
#else
  return Status::unsupported_type;
#endif
}

#else

Status rank_one_linear(const RankOneLinear&, int) { return Status::unsupported_type; }

#endif

}  // namespace keylock::KEYLOCK_ISA
