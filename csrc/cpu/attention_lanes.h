// How a batch row's keys lie in vector lanes, and how they are packed so.
//
// Scores of a block of pixels are a matrix with a lane per key. The text stream takes whole
// vectors. Image streams follow; short ones share a vector, each on 1, 2, 4.. lanes of it, so that
// a softmax over groups of lanes is one per stream. Keys that no pixel may see get no lane, nor
// does a stream whose weight is 0 all over the row: what they hold is never read.
#pragma once

#include "keylock/localized_attention.h"
#include "multiply.h"
#include "scratch.h"
#include "transpose.h"

namespace keylock::KEYLOCK_ISA {
namespace {

constexpr int64_t kBlock = 32;  // pixels whose scores are held at once
constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kSerialProducts = 1 << 20;  // below this, waking threads costs more than it saves
constexpr double kLog2e = 1.4426950408889634;

// The pixels of a (row, head) that are one piece of work. By their number alone, so that sums over
// pieces are the same for any number of threads.
inline int64_t piece_of(int64_t pixels) {
  return round_up(larger(divide_up(pixels, 8), 256), kBlock);
}

template <class Element>
inline const Element* row_of(const Tensor<4>& tensor, int64_t row, int64_t item, int64_t head) {
  const int64_t* strides = tensor.strides;
  return static_cast<const Element*>(tensor.data) + row * strides[0] + item * strides[1] +
         head * strides[2];
}

template <class Element>
inline Element* row_of(const Tensor<4, void>& tensor, int64_t row, int64_t item, int64_t head) {
  const int64_t* strides = tensor.strides;
  return static_cast<Element*>(tensor.data) + row * strides[0] + item * strides[1] +
         head * strides[2];
}

// Any floating type, any stride.
template <class Real, class Element>
void load_strided(const void* data, int64_t offset, int64_t stride, int64_t count, Real* to) {
  const Element* from = static_cast<const Element*>(data) + offset;
  constexpr int lanes = kLanes<Real>;
  for (int64_t i = 0; i < count; ++i) {
    Element one[lanes] = {from[i * stride]};
    to[i] = static_cast<Real>(widen<lanes>(one)[0]);
  }
}

template <class Real>
void load_side(const void* data, DataType type, int64_t offset, int64_t stride, int64_t count,
               Real* to) {
  switch (type) {
    case DataType::float64: load_strided<Real, double>(data, offset, stride, count, to); break;
    case DataType::float16: load_strided<Real, Float16>(data, offset, stride, count, to); break;
    case DataType::bfloat16: load_strided<Real, Bfloat16>(data, offset, stride, count, to); break;
    default: load_strided<Real, float>(data, offset, stride, count, to);
  }
}

// A softmax each: every group of `span` lanes of a vector, or several whole vectors together.
struct Group {
  int64_t first, vectors;
  int span;
  bool is_image;
};

template <class Real>
struct Lanes {
  using Integer = typename BitsOf<Real>::Type;

  int64_t count;  // of lanes, whole vectors
  int64_t groups;
  Group* group;
  int32_t* source;   // [count] the key, images' after the text's; -1: none
  int32_t* stream;   // [count] the image stream; -1: text, or no key
  Real* bias;        // [count] in powers of two; -inf where there is no key
  Integer* regions;  // [count] where a key is seen
  Real* weights;     // [count] of the stream in every pixel; 1 where pixels differ
  Integer* broken;   // [count] ones where a key or value is not finite
  bool has_broken;
  int32_t* read_at;  // [M] the lane that is read out; -1: zeros
  bool* is_read;     // [images]

  static Lanes take(Arena& arena, const LocalizedAttention& op) {
    constexpr int64_t width = kLanes<Real>;
    int64_t most = round_up(op.key.sizes[1], width);
    for (int64_t i = 0; i < op.images; ++i) most += round_up(op.image_lengths[i], width);
    Lanes lanes = {};
    lanes.group = arena.take<Group>(most / width);
    lanes.source = arena.take<int32_t>(most);
    lanes.stream = arena.take<int32_t>(most);
    lanes.bias = arena.take<Real>(most);
    lanes.regions = arena.take<Integer>(most);
    lanes.weights = arena.take<Real>(most);
    lanes.broken = arena.take<Integer>(most);
    lanes.read_at = arena.take<int32_t>(op.readout_tokens.data ? op.readout_tokens.sizes[1] : 0);
    lanes.is_read = arena.take<bool>(op.images);
    lanes.count = most;
    return lanes;
  }

  void open(int64_t vectors, int span, bool is_image) {
    constexpr int64_t width = kLanes<Real>;
    group[groups++] = {count, vectors, span, is_image};
    for (int64_t lane = count; lane < count + vectors * width; ++lane) {
      source[lane] = stream[lane] = -1;
      bias[lane] = -kInfinity<Real>;
      regions[lane] = 0;
      weights[lane] = 1;
    }
    count += vectors * width;
  }

  void put(int64_t lane, int64_t key, int64_t image, Real key_bias, Integer seen) {
    source[lane] = static_cast<int32_t>(key);
    stream[lane] = static_cast<int32_t>(image);
    bias[lane] = key_bias * static_cast<Real>(kLog2e);
    regions[lane] = seen;
  }
};

inline bool has_weights_per_pixel(const LocalizedAttention& op) {
  return op.image_weights.data != nullptr && op.image_weights.strides[2] != 0 &&
         op.image_weights.sizes[2] > 1;
}

template <class Real>
Real bias_of(const Tensor<2>& bias, int64_t row, int64_t key) {
  Real value = 0;
  if (bias.data != nullptr) {
    const int64_t offset = row * bias.strides[0] + key * bias.strides[1];
    load_side(bias.data, bias.type, offset, 0, 1, &value);
  }
  return value;
}

template <class Real>
Real readout_weight(const LocalizedAttention& op, int64_t row, int64_t pixel, int64_t m) {
  const int64_t* strides = op.readout_weights.strides;
  const int64_t offset = row * strides[0] + pixel * strides[1] + m * strides[2];
  Real weight;
  load_side(op.readout_weights.data, op.readout_weights.type, offset, 0, 1, &weight);
  return weight;
}

// Lanes of the text, which come before all images'.
template <class Real>
int64_t text_lanes(const Lanes<Real>& lanes) {
  const bool has_text = lanes.groups > 0 && !lanes.group[0].is_image;
  return has_text ? lanes.group[0].vectors * kLanes<Real> : 0;
}

// Which keys of a row get which lane. `keeps_silent` keeps streams whose weight is 0 (their
// weight's gradient is asked for).
template <class Real>
void lay_out(const LocalizedAttention& op, int64_t row, bool keeps_silent, Lanes<Real>& lanes) {
  constexpr int64_t width = kLanes<Real>;
  using Integer = typename BitsOf<Real>::Type;
  const int64_t text = op.key.sizes[1];
  const int64_t read = op.readout_tokens.data ? op.readout_tokens.sizes[1] : 0;
  const auto token_at = [&](int64_t m) {
    const int64_t* strides = op.readout_tokens.strides;
    return static_cast<const int32_t*>(op.readout_tokens.data)[row * strides[0] + m * strides[1]];
  };
  lanes.count = lanes.groups = 0;

  int64_t seen = 0;
  for (int64_t key = 0; key < text; ++key) {
    seen += bias_of<Real>(op.key_bias, row, key) != -kInfinity<Real>;
  }
  if (seen > 0) {
    lanes.open(divide_up(seen, width), static_cast<int>(width), false);
    int64_t lane = 0;
    for (int64_t key = 0; key < text; ++key) {
      const Real bias = bias_of<Real>(op.key_bias, row, key);
      if (bias == -kInfinity<Real>) continue;
      Integer regions = -1;
      if (op.key_regions.data != nullptr) {
        const int64_t* strides = op.key_regions.strides;
        regions =
            static_cast<const int32_t*>(op.key_regions.data)[row * strides[0] + key * strides[1]];
      }
      lanes.put(lane++, key, -1, bias, regions);
    }
  }

  int64_t start = text, room = 0;  // room: where the last vector can still take a stream
  int last_span = 0;
  for (int64_t image = 0; image < op.images; ++image) {
    const int64_t length = op.image_lengths[image], end = start + length;
    lanes.is_read[image] = false;
    for (int64_t m = 0; m < read; ++m) {
      lanes.is_read[image] |= token_at(m) >= start && token_at(m) < end;
    }
    Real weight = 1;
    if (op.image_weights.data != nullptr && !has_weights_per_pixel(op) && op.query.sizes[1] > 0) {
      const int64_t* strides = op.image_weights.strides;
      load_side(op.image_weights.data, op.image_weights.type, row * strides[0] + image * strides[1],
                0, 1, &weight);
    }
    seen = 0;
    for (int64_t key = start; key < end; ++key) {
      seen += bias_of<Real>(op.image_key_bias, row, key - text) != -kInfinity<Real>;
    }
    if (seen > 0 && (weight != 0 || keeps_silent || lanes.is_read[image])) {
      int span = 1;
      while (span < width && span < seen) span *= 2;
      const int64_t vectors = divide_up(seen, width);
      if (vectors > 1 || span != last_span || room == lanes.count) {
        room = lanes.count;
        lanes.open(vectors, span, true);
        last_span = vectors > 1 ? 0 : span;
      }
      int64_t lane = room;
      room += vectors > 1 ? vectors * width : span;
      for (int64_t i = lane; i < room; ++i) lanes.weights[i] = weight;
      for (int64_t key = start; key < end; ++key) {
        const Real bias = bias_of<Real>(op.image_key_bias, row, key - text);
        if (bias != -kInfinity<Real>) lanes.put(lane++, key, image, bias, -1);
      }
    }
    start = end;
  }

  for (int64_t m = 0; m < read; ++m) {
    lanes.read_at[m] = -1;
    for (int64_t lane = 0; lane < lanes.count && token_at(m) >= 0; ++lane) {
      if (lanes.source[lane] == token_at(m)) lanes.read_at[m] = static_cast<int32_t>(lane);
    }
  }
}

// The key (or value) in a lane, of whichever stream; null where there is none.
template <class Element, class Real>
const Element* in_lane(const Tensor<4>& text, const Tensor<4>& images, const Lanes<Real>& lanes,
                       int64_t lane, int64_t row, int64_t head) {
  const int64_t key = lanes.source[lane];
  if (key < 0) return nullptr;
  return lanes.stream[lane] < 0 ? row_of<Element>(text, row, key, head)
                                : row_of<Element>(images, row, key - text.sizes[1], head);
}

// Whether some pixels see a key that others do not.
inline bool hides_by_pixel(const LocalizedAttention& op) {
  return op.key_regions.data != nullptr || has_weights_per_pixel(op);
}

// Finds keys that are not finite, or whose values are not: zeros will stand in for them, and the
// softmax puts NaN where they are seen. For where a product with 0 would not do to silence them.
template <class Element, class Real>
void find_broken(const LocalizedAttention& op, int64_t row, int64_t head, Lanes<Real>& lanes) {
  lanes.has_broken = false;
  constexpr int width = kLanes<Real>;
  const int64_t dims = op.query.sizes[3], padded = round_up(dims, width);
  alignas(64) Real numbers[kMaxHeadDim];
  for (int64_t lane = 0; lane < lanes.count; ++lane) {
    Full<Real> zeros{};  // NaN where a number is not finite
    const auto look_at = [&](const Element* from) {
      if (from == nullptr) return;
      load_row(from, dims, numbers);
      for (int64_t d = 0; d < padded; d += width) zeros += widen<width>(numbers + d) * Real{0};
    };
    look_at(in_lane<Element>(op.key, op.image_key, lanes, lane, row, head));
    look_at(in_lane<Element>(op.value, op.image_value, lanes, lane, row, head));
    lanes.broken[lane] = 0;
    for (int d = 0; d < width; ++d) lanes.broken[lane] |= zeros[d] != 0 ? -1 : 0;
    lanes.has_broken |= lanes.broken[lane] != 0;
  }
}

template <class Real>
bool is_zero_in(const Lanes<Real>& lanes, int64_t lane) {
  return lanes.has_broken && lanes.broken[lane] != 0;
}

// A row of a tensor as operands along the depth, numbers or pairs of them, and zeros up to
// `padded`.
template <class Real, class Element>
inline void load_operands(const Element* from, int64_t count, int64_t, Real* to) {
  load_row(from, count, to);
}
template <class Element>
inline void load_operands(const Element* from, int64_t count, int64_t padded, int32_t* to) {
  std::memcpy(to, from, count * sizeof(Element));
  std::memset(reinterpret_cast<Element*>(to) + count, 0,
              padded * sizeof(int32_t) - count * sizeof(Element));
}

// Two rows of bfloat16 numbers as one of pairs; a null row is one of zeros.
inline void pair_rows(const Bfloat16* low, const Bfloat16* high, int64_t count, int64_t padded,
                      int32_t* to) {
  alignas(64) Bfloat16 rows[2][kMaxHeadDim + kLanes<int32_t>] = {};
  if (low != nullptr) std::memcpy(rows[0], low, count * sizeof(Bfloat16));
  if (high != nullptr) std::memcpy(rows[1], high, count * sizeof(Bfloat16));
  constexpr int lanes = kLanes<int32_t>;
  for (int64_t i = 0; i < padded; i += lanes) {
    const auto bits = [&](const Bfloat16* row) {
      return __builtin_convertvector(read_bits<uint16_t, lanes>(row + i), Full<int32_t>);
    };
    write_bits(to + i, bits(rows[0]) | bits(rows[1]) << 16);
  }
}

// One (row, head)'s keys or values, lane by lane; `is_met` says of a lane whether to read it.
template <class Element>
struct InLanes {
  const Tensor<4>& text;
  const Tensor<4>& images;
  int64_t row, head;
};

// [depth, lanes], transposed.
template <class Step, class Element, class Real, class IsMet>
void pack_columns(const InLanes<Element>& from, const Lanes<Real>& lanes, IsMet is_met,
                  typename Step::Operand* to) {
  using Operand = typename Step::Operand;
  constexpr int64_t width = kLanes<Real>;
  const int64_t dims = from.text.sizes[3], depth = divide_up(dims, Step::kDepth);
  const int64_t padded = round_up(depth, width);
  alignas(64) Operand rows[width * kMaxHeadDim];
  for (int64_t first = 0; first < lanes.count; first += width) {
    for (int64_t i = 0; i < width; ++i) {
      const auto* row =
          in_lane<Element>(from.text, from.images, lanes, first + i, from.row, from.head);
      if (row != nullptr && is_met(first + i)) {
        load_operands(row, dims, padded, rows + i * padded);
      } else {
        std::memset(rows + i * padded, 0, padded * sizeof(Operand));
      }
    }
    for (int64_t k = 0; k < depth; k += width) {
      transpose(rows + k, padded, to + k * lanes.count + first, lanes.count);
    }
  }
}

// [lanes / kDepth, padded head dimension].
template <class Step, class Element, class Real, class IsMet>
void pack_rows(const InLanes<Element>& from, const Lanes<Real>& lanes, IsMet is_met,
               typename Step::Operand* to) {
  const int64_t dims = from.text.sizes[3], padded = round_up(dims, kLanes<Real>);
  const auto row_in = [&](int64_t lane) {
    return is_met(lane) ? in_lane<Element>(from.text, from.images, lanes, lane, from.row, from.head)
                        : nullptr;
  };
  for (int64_t lane = 0; lane < lanes.count; lane += Step::kDepth, to += padded) {
    const Element* row = row_in(lane);
    if constexpr (Step::kDepth == 2) {
      pair_rows(row, row_in(lane + 1), dims, padded, to);
    } else if (row != nullptr) {
      load_row(row, dims, to);
    } else {
      std::memset(to, 0, padded * sizeof(Real));
    }
  }
}

// Each lane's weight in `count` pixels from `first` on: [kBlock, lanes and a vector to spare].
template <class Real>
void load_weights(const LocalizedAttention& op, const Lanes<Real>& lanes, int64_t row,
                  int64_t first, int64_t count, Real* to) {
  constexpr int width = kLanes<Real>;
  const int64_t* strides = op.image_weights.strides;
  Real numbers[kBlock] = {};
  for (int64_t index = 0; index < lanes.groups; ++index) {
    const Group& group = lanes.group[index];
    const int64_t end = group.first + group.vectors * width;
    const int64_t step = group.vectors > 1 ? end - group.first : group.span;
    for (int64_t start = group.first; group.is_image && start < end; start += step) {
      const int64_t image = lanes.stream[start];
      if (image >= 0) {
        const int64_t offset = row * strides[0] + image * strides[1] + first * strides[2];
        load_side(op.image_weights.data, op.image_weights.type, offset, strides[2], count, numbers);
      }
      // Whole vectors: the next stream's lanes are overwritten in its turn.
      for (int64_t i = 0; i < kBlock; ++i) {
        for (int64_t lane = start; lane < start + step; lane += width) {
          write_bits(to + i * (lanes.count + width) + lane, all(numbers[i]));
        }
      }
    }
  }
}

template <class Integer>
void load_regions(const LocalizedAttention& op, int64_t row, int64_t first, int64_t count,
                  Integer* to) {
  const int64_t* strides = op.query_regions.strides;
  const auto* from = static_cast<const int32_t*>(op.query_regions.data) + row * strides[0];
  for (int64_t i = 0; i < kBlock; ++i) to[i] = i < count ? from[(first + i) * strides[1]] : 0;
}

}  // namespace
}  // namespace keylock::KEYLOCK_ISA
