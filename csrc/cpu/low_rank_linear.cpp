// The CPU kernel of low_rank_linear, compiled once per instruction set (see vector.h), for those
// that have enough registers.
//
// The weight is laid out for the register tiles once, for all threads, in strips of columns. Then a
// thread takes a block of tokens, finds its coefficients, and multiplies it with a strip after the
// other: by a stretch of the depth that fits the first-level cache, so that sums wait in the
// second. The updates are one stretch more, whose tiles scale, add the bias, round and write.
#include "keylock/low_rank_linear.h"

#include "updates.h"

namespace keylock::KEYLOCK_ISA {

#if defined(__AVX512F__) && KEYLOCK_VECTOR_BYTES == 64
namespace {

constexpr int64_t kBlockTokens = 192;
constexpr int64_t kHeldBytes = 8 << 20;       // of the weight, laid out at a time
constexpr int64_t kSerialProducts = 1 << 20;  // below this, waking threads costs more than it saves
constexpr int width = kLanes<float>;

template <class Element, class Step>
class Linear {
  using Operand = typename Step::Operand;
  using Rows = RowUpdates<Element>;
  static constexpr int64_t kColumns = Rows::kColumns;

 public:
  Linear(const LowRankLinear& op, int threads)
      : op(op),
        updates(op.updates, op.x, op.y.sizes[0], op.y.sizes[1]),
        tokens(op.y.sizes[0] * op.y.sizes[1]),
        outputs(op.y.sizes[2]),
        depth(op.x.sizes[2] / Step::kDepth),
        vectors(divide_up(outputs, width)),
        strips(round_up(divide_up(vectors, kTileVectors), smaller(threads, larger(vectors, 1)))),
        blocks(divide_up(tokens, kBlockTokens)),
        groups(divide_up(strips, larger(1, kHeldBytes / (depth * kColumns * 4 + 1)))),
        together(divide_up(strips, larger(1, groups))),
        parts(parts_for(threads)) {}

  Status run(int threads) const {
    const bool is_parallel = threads > 1 && tokens * outputs * depth >= kSerialProducts;
    if (!is_parallel) threads = 1;
    Arena sizes = {}, shared = {};
    take(sizes);
    take_shared(shared);
    char* memory = static_cast<char*>(std::aligned_alloc(64, sizes.used * threads + shared.used));
    if (memory == nullptr) return Status::out_of_memory;
    shared = {memory + sizes.used * threads, 0};
    const Shared held = take_shared(shared);
    // Where a block meets all of the weight at once, its coefficients are made as it comes.
    const bool is_one_pass = groups == 1 && parts == 1;
    const int64_t apart = is_one_pass || updates.width() == 0 ? 0 : updates.units();
#pragma omp parallel num_threads(threads) if (is_parallel)
    {
      Arena arena = {memory + sizes.used * thread_number(), 0};
      const Scratch scratch = take(arena);
      int64_t row_held = -1;  // whose directions are laid out
#pragma omp for schedule(static)
      for (int64_t unit = 0; unit < apart; ++unit) {
        const int64_t first = updates.row_of(unit) * op.y.sizes[1] + updates.first_of(unit);
        find_coefficients(scratch, row_held, first, first + updates.count_of(unit),
                          held.coefficients);
      }
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t from = group * strips / groups, to = (group + 1) * strips / groups;
#pragma omp for schedule(static)
        for (int64_t strip = from; strip < to; ++strip) {
          pack(strip, held.weight + (strip - from) * round_up(depth, width) * kColumns);
        }
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < parts * blocks; ++unit) {
          const int64_t part = unit / blocks, first = begin_of_block(unit % blocks);
          const int64_t last = begin_of_block(unit % blocks + 1);
          if (is_one_pass && updates.width() > 0) {
            find_coefficients(scratch, row_held, first, last, held.coefficients);
          }
          for (int64_t strip = from + part * (to - from) / parts;
               strip < from + (part + 1) * (to - from) / parts; ++strip) {
            run_block(scratch, strip,
                      held.weight + (strip - from) * round_up(depth, width) * kColumns, first,
                      last - first, held.coefficients);
          }
        }
      }
    }
    std::free(memory);
    return Status::ok;
  }

 private:
  struct Scratch {
    float* sums;   // [kBlockTokens, kColumns]
    float* bias;   // [kColumns]
    float* scale;  // [kColumns]
    typename Rows::Scratch updates;
  };
  struct Shared {
    Operand* weight;      // [together, depth, kColumns]
    float* coefficients;  // [B N, stride]
  };

  Scratch take(Arena& arena) const {
    return {arena.take<float>(kBlockTokens * kColumns), arena.take<float>(kColumns),
            arena.take<float>(kColumns), updates.take(arena)};
  }
  Shared take_shared(Arena& arena) const {
    return {arena.take<Operand>(together * round_up(depth, width) * kColumns),
            arena.take<float>(tokens * updates.stride())};
  }

  // Into how many parts the strips of a group are cut for threads to be equally busy.
  int64_t parts_for(int64_t threads) const {
    int64_t parts = 1;
    while (parts < together) {
      const int64_t units = parts * larger(blocks, 1);
      if (8 * divide_up(units, threads) * threads <= 9 * units) break;
      ++parts;
    }
    return parts;
  }

  // Strips share the vectors evenly, as blocks do the tokens, by whole tiles.
  int64_t begin_of_block(int64_t block) const {
    return smaller(block * divide_up(tokens, kTileRows) / blocks * kTileRows, tokens);
  }
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

  // Of tokens of all batch rows, as y counts them.
  void find_coefficients(const Scratch& scratch, int64_t& row_held, int64_t first, int64_t last,
                         float* coefficients) const {
    while (first < last) {
      const int64_t row = first / op.y.sizes[1], token = first - row * op.y.sizes[1];
      const int64_t count =
          smaller(smaller(Rows::kUnitTokens, op.y.sizes[1] - token), last - first);
      updates.coefficients(scratch.updates, row_held, row, token, count,
                           coefficients + first * updates.stride());
      first += count;
    }
  }

  // Tokens of all batch rows in one go: each has sums of its own.
  void run_block(const Scratch& scratch, int64_t strip, const Operand* packed, int64_t first,
                 int64_t count, const float* coefficients) const {
    const int64_t begin = begin_of(strip), across = (begin_of(strip + 1) - begin) / width;
    const int64_t stride = op.x.strides[1] / Step::kDepth;
    const auto* x = reinterpret_cast<const Operand*>(static_cast<const Element*>(op.x.data) +
                                                     first * op.x.strides[1]);
    multiply_by_stretches<Step>({x, stride, 1, packed, kColumns, depth}, scratch.sums, kColumns,
                                count, across);
    const int64_t columns = smaller(across * width, outputs - begin), last = first + count;
    const float* bias = load(op.bias.data, op.bias.type, begin, columns, scratch.bias);
    const float* sums = scratch.sums;
    while (first < last) {  // the part of each batch row
      const int64_t row = first / op.y.sizes[1], next = smaller((row + 1) * op.y.sizes[1], last);
      const int64_t token = first - row * op.y.sizes[1];
      Element* y = static_cast<Element*>(op.y.data) + row * op.y.strides[0] +
                   token * op.y.strides[1] + begin;
      const float* scale = load(op.scale.data, op.scale.type, row * op.scale.strides[0] + begin,
                                columns, scratch.scale);
      updates.template finish<float>(
          scratch.updates, row, coefficients + first * updates.stride(), begin, next - first,
          {sums, kColumns, y, op.y.strides[1], scale, bias, columns, false});
      sums += (next - first) * kColumns;
      first = next;
    }
  }

  static const float* load(const void* data, DataType type, int64_t offset, int64_t count,
                           float* to) {
    if (data == nullptr) return nullptr;
    load_any(data, type, offset, count, to);
    return to;
  }

  const LowRankLinear& op;
  const Rows updates;
  const int64_t tokens;  // of all rows
  const int64_t outputs, depth, vectors, strips, blocks;
  const int64_t groups;    // of strips, one after the other
  const int64_t together;  // strips of a group, at most
  const int64_t parts;     // of a group, for threads
};

bool is_single_or_half(DataType type) {
  return type == DataType::float32 || type == DataType::bfloat16;
}

Status validate(const LowRankLinear& op) {
  const int64_t (&sizes)[3] = op.y.sizes;
  const DataType type = op.x.type;
  if (!is_single_or_half(type) || op.weight.type != type || op.y.type != type ||
      !is_single_or_half(op.bias.type) || !is_single_or_half(op.scale.type) ||
      !is_single_or_half(op.updates.up.type) || !is_single_or_half(op.updates.down.type)) {
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
  if (op.scale.data != nullptr &&
      (!has_sizes(op.scale, {sizes[0], sizes[2]}) || !has_rows(op.scale))) {
    return Status::shape_mismatch;
  }
  return validate_updates(op.updates, op.y, op.x, DataType::float32);
}

}  // namespace

Status low_rank_linear(const LowRankLinear& op, int threads) {
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

Status low_rank_linear(const LowRankLinear&, int) { return Status::unsupported_type; }

#endif

}  // namespace keylock::KEYLOCK_ISA
