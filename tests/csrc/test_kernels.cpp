// The CPU kernels against loops over every element, in every instruction set this machine runs.
//
// Shapes are ragged, and every tensor lies in memory of exactly its size: built with sanitizers,
// this also finds what reads or writes beyond. Exact accuracy is for the Python tests to judge.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "keylock/instruction_set.h"
#include "keylock/localized_attention.h"
#include "keylock/low_rank_linear.h"
#include "keylock/low_rank_update.h"

namespace {

using keylock::DataType;
using keylock::InstructionSet;
using keylock::Status;

uint64_t state = 1;
int failures = 0;

int64_t below(int64_t limit) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<int64_t>((state >> 33) % static_cast<uint64_t>(limit));
}
template <size_t count>
int64_t one_of(const int64_t (&choices)[count]) {
  return choices[below(count)];
}
double drawn() { return static_cast<double>(below(20001)) / 10000 - 1; }

struct Half {
  uint16_t bits;
};

template <class Element>
constexpr DataType kType = std::is_same_v<Element, float>    ? DataType::float32
                           : std::is_same_v<Element, double> ? DataType::float64
                           : std::is_same_v<Element, int>    ? DataType::int32
                           : std::is_same_v<Element, Half>   ? DataType::float16
                                                             : DataType::bfloat16;

// Storage of float32, float64, int32, float16, and bfloat16 as its upper half.
template <class Element>
Element stored(double value) {
  if constexpr (std::is_same_v<Element, Half>) {
    const int sign = std::signbit(value) ? 0x8000 : 0;
    if (!std::isfinite(value)) return {static_cast<uint16_t>(sign | 0x7c00 | std::isnan(value))};
    int exponent = 0;  // value = +-0.1... 2^exponent
    std::frexp(value, &exponent);
    exponent = exponent < -13 ? -13 : exponent;
    const double mantissa = std::nearbyint(std::ldexp(std::fabs(value), 11 - exponent));
    // A mantissa without its leading bit is subnormal, and one bit more carries into the exponent.
    return {static_cast<uint16_t>(sign | ((exponent + 13) * 1024 + static_cast<int>(mantissa)))};
  } else if constexpr (std::is_same_v<Element, uint16_t>) {
    const float single = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &single, sizeof bits);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  } else {
    return static_cast<Element>(value);
  }
}
template <class Element>
double value_of(Element element) {
  if constexpr (std::is_same_v<Element, Half>) {
    const int exponent = element.bits >> 10 & 31, mantissa = element.bits & 1023;
    const double size = exponent == 31  ? (mantissa ? NAN : INFINITY)
                        : exponent == 0 ? std::ldexp(mantissa, -24)
                                        : std::ldexp(1024 + mantissa, exponent - 25);
    return element.bits & 0x8000 ? -size : size;
  } else if constexpr (std::is_same_v<Element, uint16_t>) {
    const uint32_t bits = static_cast<uint32_t>(element) << 16;
    float single;
    std::memcpy(&single, &bits, sizeof single);
    return static_cast<double>(single);
  } else {
    return static_cast<double>(element);
  }
}

template <class Element, int rank>
struct Array {
  std::vector<Element> data;
  int64_t sizes[rank];
  bool is_given = true;

  int64_t count() const {
    int64_t product = 1;
    for (const int64_t size : sizes) product *= size;
    return product;
  }
  template <class... Indices>
  int64_t offset(Indices... indices) const {
    const int64_t index[] = {static_cast<int64_t>(indices)...};
    int64_t sum = 0;
    for (int d = 0; d < rank; ++d) sum = sum * sizes[d] + index[d];
    return sum;
  }
  template <class... Indices>
  double operator()(Indices... indices) const {
    return value_of(data[static_cast<size_t>(offset(indices...))]);
  }
  template <class Data>
  keylock::Tensor<rank, Data> describe() {
    if (!is_given) return {};
    static char nothing;
    Data* const memory = data.empty() ? static_cast<Data*>(&nothing) : data.data();
    keylock::Tensor<rank, Data> tensor{memory, kType<Element>, {}, {}};
    int64_t stride = 1;
    for (int d = rank - 1; d >= 0; --d) {
      tensor.sizes[d] = sizes[d];
      tensor.strides[d] = stride;
      stride *= sizes[d];
    }
    return tensor;
  }
  keylock::Tensor<rank> in() { return describe<const void>(); }
  keylock::Tensor<rank, void> out() { return describe<void>(); }
};

template <class Element, int rank>
Array<Element, rank> array(const int64_t (&sizes)[rank], bool is_given = true) {
  Array<Element, rank> made;
  std::memcpy(made.sizes, sizes, sizeof sizes);
  made.is_given = is_given;
  made.data.resize(static_cast<size_t>(is_given ? made.count() : 0));
  for (auto& element : made.data) element = stored<Element>(drawn());
  return made;
}

template <class Element>
constexpr double kTolerance = std::is_same_v<Element, double>  ? 1e-11
                              : std::is_same_v<Element, float> ? 1e-4
                              : std::is_same_v<Element, Half>  ? 0.01
                                                               : 0.05;

void expect(double actual, double exact, double tolerance, const char* what) {
  if (std::abs(actual - exact) <= tolerance * (1 + std::abs(exact))) return;
  if (!std::isfinite(exact) && !std::isfinite(actual)) return;
  if (++failures < 20) std::printf("%s: %g instead of %g\n", what, actual, exact);
}
void expect_status(Status status, Status wanted, const char* what) {
  if (status == wanted) return;
  if (++failures < 20) std::printf("%s: status %d\n", what, static_cast<int>(status));
}
void expect_ok(Status status, const char* what) { expect_status(status, Status::ok, what); }

template <class Element>
using RealOf = std::conditional_t<std::is_same_v<Element, double>, double, float>;

// Some of what a coefficient of 0 may meet.
template <class Element, int rank>
void spoil(Array<Element, rank>& array) {
  for (const double bad : {NAN, INFINITY}) {
    if (array.data.empty()) return;
    array.data[static_cast<size_t>(below(array.count()))] = stored<Element>(bad);
  }
}

// The two forms of an update's layer: adapters of ragged ranks, and rows with given coefficients.
template <class Element, class Table>
struct LowRank {
  using Real = RealOf<Element>;

  int64_t rows, tokens, depth, outputs, taken;
  bool is_given;
  Array<Element, 3> x, base, y, layer;
  Array<Element, 2> weight;
  Array<Real, 1> bias;
  Array<Real, 2> scale, strength;
  Array<Table, 2> up, down;
  Array<int, 1> offsets;
  Array<int, 2> slots;
  Array<Real, 3> token_weights, coefficients;

  LowRank()
      : LowRank(below(3), one_of({0, 1, 5, 40, 77}), 2 * below(40),
                one_of({0, 1, 7, 16, 33, 100, 193, 260}), one_of({0, 1, 2, 5})) {}

  LowRank(int64_t rows, int64_t tokens, int64_t depth, int64_t outputs, int64_t taken)
      : rows(rows), tokens(tokens), depth(depth), outputs(outputs), taken(taken) {
    is_given = below(4) == 0;
    const bool has_offsets = !is_given && below(4) > 0;
    const int64_t count = below(5);
    offsets = array<int, 1>({count + 1}, has_offsets);
    int64_t end = has_offsets ? below(3) : count;
    for (auto& offset : offsets.data) {
      offset = static_cast<int>(end);
      end += one_of({0, 1, 3, 8, 17, 40});
    }
    x = array<Element, 3>({rows, tokens, depth});
    base = array<Element, 3>({rows, tokens, outputs});
    y = layer = base;
    weight = array<Element, 2>({outputs, depth});
    bias = array<Real, 1>({outputs}, below(2) == 0);
    scale = array<Real, 2>({rows, outputs}, below(2) == 0);
    up = array<Table, 2>({end, outputs});
    down = array<Table, 2>({end, depth}, !is_given);
    slots = array<int, 2>({rows, taken});
    for (auto& slot : slots.data) slot = static_cast<int>(below(count + 1)) - 1;
    strength = array<Real, 2>({rows, taken}, !is_given && below(2) == 0);
    token_weights = array<Real, 3>({rows, taken, tokens}, !is_given && below(2) == 0);
    coefficients = array<Real, 3>({rows, tokens, taken}, is_given);
    for (auto& s : strength.data) s = below(4) == 0 ? 0 : s;
    for (auto* many : {&token_weights, &coefficients}) {
      for (auto& w : many->data) w = below(4) == 0 ? 0 : w;
    }
    if (below(3) == 0) spoil(up);
    if (below(3) == 0) spoil(down);
    if (below(3) == 0) spoil(x);
  }

  keylock::Updates describe() {
    return {up.in(),       down.in(),          offsets.in(),     slots.in(),
            strength.in(), token_weights.in(), coefficients.in()};
  }

  struct Term {
    int64_t p;  // a row of up
    double coefficient;
  };

  // What a token's output is told to add, less what is nothing.
  std::vector<Term> terms(int64_t b, int64_t n) const {
    std::vector<Term> found;
    for (int64_t j = 0; j < taken; ++j) {
      const auto slot = static_cast<int64_t>(slots(b, j));
      if (slot < 0) continue;
      double factor = strength.is_given ? strength(b, j) : 1;
      if (token_weights.is_given) factor *= token_weights(b, j, n);
      if (factor == 0) continue;
      const auto first = offsets.is_given ? static_cast<int64_t>(offsets(slot)) : slot;
      const auto end = offsets.is_given ? static_cast<int64_t>(offsets(slot + 1)) : slot + 1;
      for (int64_t p = first; p < end; ++p) {
        double c = is_given ? coefficients(b, n, j) : 0;
        for (int64_t k = 0; k < depth && !is_given; ++k) c += factor * x(b, n, k) * down(p, k);
        if (c != 0) found.push_back({p, c});
      }
    }
    return found;
  }

  void check(InstructionSet set) {
    const keylock::Updates updates = describe();
    const auto of_x = is_given ? keylock::Tensor<3>{} : x.in();
    expect_ok(keylock::low_rank_update({base.in(), of_x, updates, y.out()}, set, 2),
              "low_rank_update");
    const Status status = keylock::low_rank_linear(
        {x.in(), weight.in(), bias.in(), scale.in(), updates, layer.out()}, set, 2);
    const bool has_layer = multiplies(set);
    expect_status(status, has_layer ? Status::ok : Status::unsupported_type, "low_rank_linear");
    for (int64_t b = 0; b < rows; ++b) {
      for (int64_t n = 0; n < tokens; ++n) {
        const auto of_token = terms(b, n);
        for (int64_t o = 0; o < outputs; ++o) {
          double more = 0;
          for (const auto& term : of_token) more += term.coefficient * up(term.p, o);
          expect(y(b, n, o), base(b, n, o) + more, kTolerance<Element>, "low_rank_update");
          if (!has_layer) continue;
          double product = more;
          for (int64_t k = 0; k < depth; ++k) product += x(b, n, k) * weight(o, k);
          if (scale.is_given) product *= scale(b, o);
          if (bias.is_given) product += bias(o);
          expect(layer(b, n, o), product, kTolerance<Element>, "low_rank_linear");
        }
      }
    }
  }

  static bool multiplies(InstructionSet set) {
    const auto is_read = [](DataType type) {
      return type == DataType::float32 || type == DataType::bfloat16;
    };
    if (!is_read(kType<Element>) || !is_read(kType<Table>)) return false;
    return set == InstructionSet::avx512_bf16 ||
           (set == InstructionSet::avx512 && kType<Element> == DataType::float32);
  }
};

template <class Element, class Table>
void test_low_rank_backward(InstructionSet set) {
  using Real = RealOf<Element>;
  const int64_t rows = below(3), tokens = one_of({0, 1, 5, 40, 77}), taken = one_of({0, 1, 3, 17});
  const int64_t outputs = one_of({0, 1, 7, 16, 33, 100, 193, 260}), count = 1 + below(4);
  auto grad = array<Element, 3>({rows, tokens, outputs});
  auto up = array<Table, 2>({count, outputs});
  auto slots = array<int, 2>({rows, taken});
  auto coefficients = array<Real, 3>({rows, tokens, taken});
  auto grad_up = array<Real, 2>({count, outputs}, below(4) > 0);
  auto grad_c = array<Real, 3>({rows, tokens, taken}, below(4) > 0);
  for (auto& slot : slots.data) slot = static_cast<int>(below(count + 1)) - 1;
  for (auto& c : coefficients.data) c = below(4) == 0 ? 0 : c;
  if (below(3) == 0) spoil(grad);
  if (below(3) == 0) spoil(up);
  expect_ok(
      keylock::low_rank_backward(
          {grad.in(), up.in(), slots.in(), coefficients.in(), grad_up.out(), grad_c.out()}, set, 2),
      "low_rank_backward");

  std::vector<double> exact(up.data.size());
  for (int64_t b = 0; b < rows; ++b) {
    for (int64_t n = 0; n < tokens; ++n) {
      for (int64_t r = 0; r < taken; ++r) {
        const auto p = static_cast<int64_t>(slots(b, r));
        double dot = 0;
        for (int64_t o = 0; o < outputs && p >= 0; ++o) {
          dot += grad(b, n, o) * up(p, o);
          const double c = coefficients(b, n, r);
          if (c != 0) exact[static_cast<size_t>(up.offset(p, o))] += c * grad(b, n, o);
        }
        if (grad_c.is_given) expect(grad_c(b, n, r), dot, kTolerance<Real>, "grad_coefficients");
      }
    }
  }
  for (size_t i = 0; i < grad_up.data.size(); ++i) {
    expect(value_of(grad_up.data[i]), exact[i], kTolerance<Real>, "grad_up");
  }
}

// What the kernels refuse, without a word written.
void test_low_rank_refusals(InstructionSet set) {
  auto x = array<float, 3>({2, 5, 8}), y = array<float, 3>({2, 5, 33}), base = y;
  auto weight = array<float, 2>({33, 8}), up = array<float, 2>({7, 33});
  auto down = array<float, 2>({7, 8}), strength = array<float, 2>({2, 3});
  auto token_weights = array<float, 3>({2, 3, 5}), coefficients = array<float, 3>({2, 5, 3});
  auto scale = array<float, 2>({2, 33});
  auto offsets = array<int, 1>({3});
  auto slots = array<int, 2>({2, 3});
  offsets.data = {0, 3, 7};
  slots.data = {0, 1, -1, 1, 1, 0};
  const keylock::Updates good = {
      up.in(), down.in(), offsets.in(), slots.in(), strength.in(), token_weights.in(), {}};
  y.data.assign(y.data.size(), 7);

  const auto runs = [&](const keylock::Updates& updates, Status wanted, const char* what) {
    const keylock::LowRankUpdate update = {base.in(), x.in(), updates, y.out()};
    expect_status(keylock::low_rank_update(update, set, 2), wanted, what);
    if (!LowRank<float, float>::multiplies(set)) return;
    const keylock::LowRankLinear layer = {x.in(), weight.in(), {}, scale.in(), updates, y.out()};
    expect_status(keylock::low_rank_linear(layer, set, 2), wanted, what);
  };
  const auto refuses = [&](const keylock::Updates& updates, Status wanted, const char* what) {
    runs(updates, wanted, what);
    for (const float element : y.data) expect(element, 7, 0, what);
  };

  keylock::Updates bad = good;
  for (const int slot : {2, -2, std::numeric_limits<int>::max(), std::numeric_limits<int>::min()}) {
    slots.data[4] = slot;
    refuses(good, Status::slot_out_of_range, "a slot");
  }
  slots.data[4] = 1;
  for (const auto& wrong : {std::vector<int>{0, 4, 3}, {0, 3, 8}, {-1, 3, 7}, {8, 8, 8}}) {
    std::copy(wrong.begin(), wrong.end(), offsets.data.begin());
    refuses(good, Status::offset_out_of_range, "offsets");
  }
  offsets.data = {0, 3, 7};
  bad.offsets.sizes[0] = 0;
  refuses(bad, Status::shape_mismatch, "no offsets at all");
  bad = good, bad.offsets.type = DataType::float32;
  refuses(bad, Status::unsupported_type, "offsets of another type");
  bad = good, bad.slots.sizes[0] = 1;
  refuses(bad, Status::shape_mismatch, "slots of fewer rows");
  bad = good, bad.up.sizes[1] = 32;
  refuses(bad, Status::shape_mismatch, "up of fewer columns");
  bad = good, bad.down.sizes[0] = 6;
  refuses(bad, Status::shape_mismatch, "down of fewer rows");
  bad = good, bad.down.strides[1] = 2;
  refuses(bad, Status::shape_mismatch, "rows of down that are not contiguous");
  bad = good, bad.strength.sizes[1] = 2;
  refuses(bad, Status::shape_mismatch, "strength of fewer slots");
  bad = good, bad.strength.type = DataType::float64;
  refuses(bad, Status::unsupported_type, "strength of another type");
  bad = good, bad.token_weights.sizes[2] = 4;
  refuses(bad, Status::shape_mismatch, "weights of fewer tokens");
  bad = good, bad.down = {}, bad.coefficients = coefficients.in();
  refuses(bad, Status::shape_mismatch, "coefficients beside offsets");
  bad.offsets = {}, bad.coefficients.sizes[2] = 2;
  refuses(bad, Status::shape_mismatch, "coefficients of fewer slots");
  bad = good, bad.down = {};
  refuses(bad, Status::shape_mismatch, "neither down nor coefficients");
  runs(good, Status::ok, "nothing is wrong");
}

template <class Element>
void test_low_rank(InstructionSet set) {
  LowRank<Element, Element>().check(set);
  LowRank<Element, float>().check(set);
  LowRank<Element, double>().check(set);
  LowRank<Element, Half>().check(set);
  LowRank<Element, uint16_t>().check(set);
  test_low_rank_backward<Element, Element>(set);
  test_low_rank_backward<Element, float>(set);
}

// One set of inputs, and the op written as loops.
template <class Element>
struct Attention {
  using Real = std::conditional_t<std::is_same_v<Element, double>, double, float>;

  int64_t rows, pixels, heads, dims, text, images, length = 0, read;
  std::vector<int64_t> lengths;
  double scale;
  Array<Element, 4> query, key, value, image_key, image_value, out, grad_out;
  Array<Real, 2> key_bias, image_key_bias;
  Array<int, 2> query_regions, key_regions, tokens;
  Array<Real, 3> image_weights, readout_weights;
  Array<Real, 4> readout, grad_readout;
  Array<Element, 4> grad_query, grad_key, grad_value, grad_image_key, grad_image_value;
  Array<Real, 2> grad_key_bias, grad_image_key_bias;
  Array<Real, 3> grad_image_weights, grad_readout_weights;

  Attention() {
    rows = below(3);
    pixels = one_of({0, 1, 5, 17, 40, 300});
    heads = 1 + below(3);
    dims = one_of({1, 3, 8, 16, 17, 40, 64, 100});
    text = one_of({0, 1, 5, 16, 17, 33, 77});
    images = below(4);
    for (int64_t i = 0; i < images; ++i) lengths.push_back(one_of({0, 1, 3, 4, 16, 17, 20}));
    for (const int64_t l : lengths) length += l;
    read = one_of({0, 1, 4});
    scale = 1 / std::sqrt(static_cast<double>(dims));
    query = array<Element, 4>({rows, pixels, heads, dims});
    key = array<Element, 4>({rows, text, heads, dims});
    value = key;
    for (auto& element : value.data) element = stored<Element>(drawn());
    image_key = array<Element, 4>({rows, length, heads, dims});
    image_value = array<Element, 4>({rows, length, heads, dims});
    key_bias = array<Real, 2>({rows, text}, below(2) == 0);
    image_key_bias = array<Real, 2>({rows, length}, below(2) == 0);
    for (auto* bias : {&key_bias, &image_key_bias}) {
      for (auto& b : bias->data) b = below(4) == 0 ? -std::numeric_limits<Real>::infinity() : b;
    }
    const bool has_regions = below(2) == 0;
    query_regions = array<int, 2>({rows, pixels}, has_regions);
    key_regions = array<int, 2>({rows, text}, has_regions);
    for (auto* regions : {&query_regions, &key_regions}) {
      for (auto& bits : regions->data) bits = static_cast<int>(below(4));
    }
    image_weights = array<Real, 3>({rows, images, pixels}, below(2) == 0);
    for (auto& w : image_weights.data) w = below(4) == 0 ? 0 : w;
    const bool reads = read > 0, sums = below(2) == 0;
    tokens = array<int, 2>({rows, read}, reads);
    for (auto& token : tokens.data) token = static_cast<int>(below(text + length + 1)) - 1;
    readout_weights = array<Real, 3>({rows, pixels, read}, reads && sums);
    readout = array<Real, 4>({rows, heads, readout_weights.is_given ? 1 : pixels, read}, reads);
    grad_readout = readout;
    out = query;
    grad_out = query;
    grad_query = query, grad_key = key, grad_value = value;
    grad_image_key = image_key, grad_image_value = image_value;
    grad_key_bias = key_bias, grad_image_key_bias = image_key_bias;
    grad_image_weights = image_weights, grad_readout_weights = readout_weights;
  }

  keylock::LocalizedAttention describe() {
    return {query.in(),
            key.in(),
            value.in(),
            scale,
            key_bias.in(),
            query_regions.in(),
            key_regions.in(),
            image_key.in(),
            image_value.in(),
            lengths.data(),
            images,
            image_key_bias.in(),
            image_weights.in(),
            tokens.in(),
            readout_weights.in(),
            out.out(),
            readout.out()};
  }

  double key_at(int64_t b, int64_t t, int64_t h, int64_t d) const {
    return t < text ? key(b, t, h, d) : image_key(b, t - text, h, d);
  }
  double value_at(int64_t b, int64_t t, int64_t h, int64_t d) const {
    return t < text ? value(b, t, h, d) : image_value(b, t - text, h, d);
  }

  // Keys [first, end) of stream i (-1: text) as one pixel sees them.
  std::vector<double> probabilities(int64_t b, int64_t n, int64_t h, int64_t first,
                                    int64_t end) const {
    std::vector<double> p;
    double top = -INFINITY, sum = 0;
    for (int64_t t = first; t < end; ++t) {
      double score = 0;
      for (int64_t d = 0; d < dims; ++d) score += query(b, n, h, d) * key_at(b, t, h, d) * scale;
      if (t < text && key_bias.is_given) score += key_bias(b, t);
      if (t >= text && image_key_bias.is_given) score += image_key_bias(b, t - text);
      if (t < text && query_regions.is_given &&
          (static_cast<int>(query_regions(b, n)) & static_cast<int>(key_regions(b, t))) == 0) {
        score = -INFINITY;
      }
      p.push_back(score);
      top = std::fmax(top, score);
    }
    for (auto& share : p) sum += share = top == -INFINITY ? 0 : std::exp(share - top);
    for (auto& share : p) share = sum == 0 ? 0 : share / sum;
    return p;
  }

  void check(InstructionSet set) {
    keylock::LocalizedAttention op = describe();
    expect_ok(keylock::localized_attention(op, set, 2), "localized_attention");
    expect_ok(
        keylock::localized_attention_backward(
            {op, grad_out.in(), grad_readout.in(), grad_query.out(), grad_key.out(),
             grad_value.out(), grad_key_bias.out(), grad_image_key.out(), grad_image_value.out(),
             grad_image_key_bias.out(), grad_image_weights.out(), grad_readout_weights.out()},
            set, 2),
        "localized_attention_backward");

    const double tolerance = 4 * kTolerance<Element>;
    const int64_t keys = text + length;
    const auto zeros = [](int64_t count) {
      return std::vector<double>(static_cast<size_t>(count));
    };
    auto grad_q = zeros(query.count()), grad_k = zeros(rows * keys * heads * dims), grad_v = grad_k;
    auto grad_b = zeros(rows * keys), grad_w = zeros(rows * images * pixels);
    auto grad_r = zeros(rows * pixels * read), sums = zeros(rows * heads * read);
    const auto at = [](std::vector<double>& values, int64_t index) -> double& {
      return values[static_cast<size_t>(index)];
    };
    for (int64_t b = 0; b < rows; ++b) {
      for (int64_t n = 0; n < pixels; ++n) {
        for (int64_t h = 0; h < heads; ++h) {
          std::vector<double> exact = zeros(dims), columns = zeros(read);
          int64_t first = 0;
          for (int64_t i = -1; i < images; ++i) {
            const int64_t end = i < 0 ? text : first + lengths[static_cast<size_t>(i)];
            const double w = i >= 0 && image_weights.is_given ? image_weights(b, i, n) : 1;
            const auto p = probabilities(b, n, h, first, end);
            auto slopes = zeros(end - first);
            double mean = 0;
            for (int64_t t = first; t < end; ++t) {
              const double share = p[static_cast<size_t>(t - first)];
              double& slope = at(slopes, t - first);
              for (int64_t d = 0; d < dims; ++d) {
                const double g = grad_out(b, n, h, d);
                at(exact, d) += w * share * value_at(b, t, h, d);
                slope += g * value_at(b, t, h, d);
                at(grad_v, ((b * keys + t) * heads + h) * dims + d) += w * share * g;
              }
              if (i >= 0) at(grad_w, (b * images + i) * pixels + n) += share * slope;
              slope *= w;
              for (int64_t m = 0; m < read; ++m) {
                if (static_cast<int64_t>(tokens(b, m)) != t) continue;
                at(columns, m) = share;
                if (readout_weights.is_given) {
                  slope += grad_readout(b, h, 0, m) * readout_weights(b, n, m);
                  at(grad_r, (b * pixels + n) * read + m) += grad_readout(b, h, 0, m) * share;
                } else {
                  slope += grad_readout(b, h, n, m);
                }
              }
              mean += share * slope;
            }
            for (int64_t t = first; t < end; ++t) {
              const double slope =
                  p[static_cast<size_t>(t - first)] * (at(slopes, t - first) - mean);
              at(grad_b, b * keys + t) += slope;
              for (int64_t d = 0; d < dims; ++d) {
                at(grad_q, query.offset(b, n, h, d)) += slope * scale * key_at(b, t, h, d);
                at(grad_k, ((b * keys + t) * heads + h) * dims + d) +=
                    slope * scale * query(b, n, h, d);
              }
            }
            first = end;
          }
          for (int64_t d = 0; d < dims; ++d) {
            expect(out(b, n, h, d), at(exact, d), tolerance, "out");
            expect(grad_query(b, n, h, d), at(grad_q, query.offset(b, n, h, d)), tolerance,
                   "grad_query");
          }
          for (int64_t m = 0; m < read; ++m) {
            if (readout_weights.is_given) {
              at(sums, (b * heads + h) * read + m) += readout_weights(b, n, m) * at(columns, m);
            } else {
              expect(readout(b, h, n, m), at(columns, m), tolerance, "readout");
            }
          }
        }
        for (int64_t i = 0; i < images && image_weights.is_given; ++i) {
          expect(grad_image_weights(b, i, n), at(grad_w, (b * images + i) * pixels + n), tolerance,
                 "grad_image_weights");
        }
        for (int64_t m = 0; m < read && readout_weights.is_given; ++m) {
          expect(grad_readout_weights(b, n, m), at(grad_r, (b * pixels + n) * read + m), tolerance,
                 "grad_readout_weights");
        }
      }
      for (int64_t t = 0; t < keys; ++t) {
        const bool is_text = t < text;
        const auto& bias = is_text ? grad_key_bias : grad_image_key_bias;
        if (bias.is_given) {
          expect(bias(b, is_text ? t : t - text), at(grad_b, b * keys + t), tolerance, "grad_bias");
        }
        for (int64_t h = 0; h < heads; ++h) {
          for (int64_t d = 0; d < dims; ++d) {
            const int64_t index = ((b * keys + t) * heads + h) * dims + d;
            expect(is_text ? grad_key(b, t, h, d) : grad_image_key(b, t - text, h, d),
                   at(grad_k, index), tolerance, "grad_key");
            expect(is_text ? grad_value(b, t, h, d) : grad_image_value(b, t - text, h, d),
                   at(grad_v, index), tolerance, "grad_value");
          }
        }
      }
      for (int64_t h = 0; h < heads && readout_weights.is_given; ++h) {
        for (int64_t m = 0; m < read; ++m) {
          expect(readout(b, h, 0, m), at(sums, (b * heads + h) * read + m), tolerance, "sums");
        }
      }
    }
  }
};

}  // namespace

int main() {
  for (const auto set : {InstructionSet::portable, InstructionSet::avx2, InstructionSet::avx512,
                         InstructionSet::avx512_bf16}) {
    if (!keylock::is_usable(set)) continue;
    for (int i = 0; i < 40; ++i) {
      test_low_rank<float>(set);
      test_low_rank<double>(set);
      test_low_rank<Half>(set);
      test_low_rank<uint16_t>(set);
      Attention<float>().check(set);
      Attention<double>().check(set);
      Attention<uint16_t>().check(set);
    }
    // A weight that is laid out in several pieces, and more tokens than a block has.
    LowRank<float, float>(1, 5, 1100, 2000, 2).check(set);
    LowRank<uint16_t, float>(1, 2, 1100, 4100, 2).check(set);
    LowRank<float, uint16_t>(3, 150, 66, 200, 3).check(set);
    test_low_rank_refusals(set);
    std::printf("instruction set %d: %d failures so far\n", static_cast<int>(set), failures);
  }
  return failures == 0 ? 0 : 1;
}
