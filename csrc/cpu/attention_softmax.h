// The softmax over each group of lanes, for a block of pixels.
#pragma once

#include "attention_lanes.h"

namespace keylock::KEYLOCK_ISA {
namespace {

template <class Step>
struct Softmax {
  using Real = typename Step::Real;
  using Integer = typename BitsOf<Real>::Type;

  const Lanes<Real>* lanes;
  Real scale;                      // on products, in powers of two
  Real* scores;                    // [kBlock, lanes] in: products; out: P
  typename Step::Operand* shares;  // [kBlock, lanes / kDepth] P times w; may be `scores`
  const Real* weights;             // [kBlock, lanes] or, with a stride of 0, [lanes]
  int64_t weights_row;
  const Integer* pixel_regions;  // [kBlock], or null: everything is seen from everywhere
};

// For `count` pixels from `first` on. `weights` [kBlock, lanes and a vector to spare] and
// `pixel_regions` [kBlock] are filled where the op has them.
template <class Step, class Real = typename Step::Real>
Softmax<Step> softmax_of(const LocalizedAttention& op, const Lanes<Real>& lanes, int64_t row,
                         int64_t first, int64_t count, Real* scores, typename Step::Operand* shares,
                         Real* weights, typename BitsOf<Real>::Type* pixel_regions) {
  Softmax<Step> softmax = {&lanes, static_cast<Real>(op.scale * kLog2e), scores, shares, nullptr, 0,
                           nullptr};
  if (has_weights_per_pixel(op)) {
    load_weights(op, lanes, row, first, count, weights);
    softmax.weights = weights;
    softmax.weights_row = lanes.count + kLanes<Real>;
  } else if (op.image_weights.data != nullptr) {
    softmax.weights = lanes.weights;
  }
  if (op.query_regions.data != nullptr) {
    load_regions(op, row, first, count, pixel_regions);
    softmax.pixel_regions = pixel_regions;
  }
  return softmax;
}

inline void put_shares(float* shares, int64_t lane, Full<float> p) { write_bits(shares + lane, p); }
inline void put_shares(double* shares, int64_t lane, Full<double> p) {
  write_bits(shares + lane, p);
}
#if defined(KEYLOCK_HAVE_PAIRS)
inline void put_shares(int32_t* shares, int64_t lane, Full<float> p) {
  write_bits(reinterpret_cast<uint16_t*>(shares) + lane, _mm512_cvtneps_pbh(p));
}
#endif

constexpr int kTogether = 4;  // pixels whose softmax is computed side by side, to hide latencies

template <class Step, bool has_regions>
void soften_group(const Softmax<Step>& softmax, const Group& group, int64_t pixel) {
  using Real = typename Step::Real;
  constexpr int width = kLanes<Real>;
  const Lanes<Real>& lanes = *softmax.lanes;
  const int64_t end = group.first + group.vectors * width, row = lanes.count;
  Real* const scores = softmax.scores + pixel * row;
  const auto sum = [](Full<Real> a, Full<Real> b) { return a + b; };
  const auto is_seen = [&](int64_t lane, int i) {
    const auto regions = read_bits<typename BitsOf<Real>::Type, width>(lanes.regions + lane);
    return (regions & softmax.pixel_regions[pixel + i]) != 0;
  };

  Full<Real> top[kTogether], total[kTogether];
#pragma GCC unroll 4
  for (int i = 0; i < kTogether; ++i) {
    top[i] = all(-kInfinity<Real>);
    total[i] = Full<Real>{};
  }
  for (int64_t lane = group.first; lane < end; lane += width) {
    const auto bias = widen<width>(lanes.bias + lane);
#pragma GCC unroll 4
    for (int i = 0; i < kTogether; ++i) {
      auto score = widen<width>(scores + i * row + lane) * softmax.scale + bias;
      if constexpr (has_regions) score = is_seen(lane, i) ? score : all(-kInfinity<Real>);
      top[i] = largest<Real>(top[i], score);
      write_bits(scores + i * row + lane, score);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kTogether; ++i) {
    top[i] = over_groups<Real>(top[i], group.span, largest<Real>);
    top[i] = top[i] > -kInfinity<Real> ? top[i] : Full<Real>{};  // nothing to see: e^(-inf - 0) = 0
  }
  for (int64_t lane = group.first; lane < end; lane += width) {
#pragma GCC unroll 4
    for (int i = 0; i < kTogether; ++i) {
      const auto e = exp2_of<Real>(widen<width>(scores + i * row + lane) - top[i]);
      total[i] += e;
      write_bits(scores + i * row + lane, e);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kTogether; ++i) {
    total[i] = over_groups<Real>(total[i], group.span, sum);
    total[i] = total[i] == 0 ? total[i] : 1 / total[i];
    if (lanes.has_broken) {
      Full<Real> seen{};
      for (int64_t lane = group.first; lane < end; lane += width) {
        auto broken = read_bits<typename BitsOf<Real>::Type, width>(lanes.broken + lane) != 0;
        if constexpr (has_regions) broken &= is_seen(lane, i);
        seen = broken ? all(kInfinity<Real>) : seen;
      }
      seen = over_groups<Real>(seen, group.span, largest<Real>);
      total[i] += seen - seen;  // 0, or NaN
    }
  }
  typename Step::Operand* const shares = softmax.shares + pixel * row / Step::kDepth;
  const bool is_weighted = group.is_image && softmax.weights != nullptr;
  const bool keeps = static_cast<const void*>(shares) != scores;
  for (int64_t lane = group.first; lane < end; lane += width) {
#pragma GCC unroll 4
    for (int i = 0; i < kTogether; ++i) {
      auto p = widen<width>(scores + i * row + lane) * total[i];
      if (keeps) write_bits(scores + i * row + lane, p);
      if (is_weighted) {
        const auto w = widen<width>(softmax.weights + (pixel + i) * softmax.weights_row + lane);
        p = w == 0 ? Full<Real>{} : p * w;  // selected: a weight of 0 silences NaN too
      }
      put_shares(shares + i * row / Step::kDepth, lane, p);
    }
  }
}

template <class Step>
void soften(const Softmax<Step>& softmax) {
  for (int64_t index = 0; index < softmax.lanes->groups; ++index) {
    const Group& group = softmax.lanes->group[index];
    for (int64_t pixel = 0; pixel < kBlock; pixel += kTogether) {
      if (softmax.pixel_regions != nullptr && !group.is_image) {
        soften_group<Step, true>(softmax, group, pixel);
      } else {
        soften_group<Step, false>(softmax, group, pixel);
      }
    }
  }
}

// Runs one of the two passes for the type of query, keys and values.
template <template <class Element, class Step> class Pass, class Op>
Status run_for(DataType type, const Op& op, int threads) {
  switch (type) {
    case DataType::float32: return Pass<float, Single<float>>(op).run(threads);
    case DataType::float64: return Pass<double, Single<double>>(op).run(threads);
    case DataType::float16: return Pass<Float16, Single<float>>(op).run(threads);
#if defined(KEYLOCK_HAVE_PAIRS)
    case DataType::bfloat16: return Pass<Bfloat16, Pairs>(op).run(threads);
#else
    case DataType::bfloat16: return Pass<Bfloat16, Single<float>>(op).run(threads);
#endif
    default: return Status::unsupported_type;
  }
}

}  // namespace
}  // namespace keylock::KEYLOCK_ISA
