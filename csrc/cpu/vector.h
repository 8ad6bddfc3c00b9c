// Vectors of the width this file is compiled for, on the vector extension of GCC and Clang: one
// source gives SSE2, AVX2, AVX-512 and NEON code. KEYLOCK_ISA and KEYLOCK_VECTOR_BYTES come from
// the build, which compiles each kernel once per instruction set.
//
// Everything sits in an unnamed namespace on purpose. A shared inline function would be emitted
// once per instruction set under one name, and the linker could hand AVX-512 code to a machine
// without it; for the same reason no template of the standard library is used here.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace keylock::KEYLOCK_ISA {
namespace {

// Storage formats; arithmetic happens in float.
enum class Float16 : uint16_t {};
enum class Bfloat16 : uint16_t {};

template <class Element>
struct AccumulatorOf {
  using Type = float;
};
template <>
struct AccumulatorOf<double> {
  using Type = double;
};
template <class Element>
using Accumulator = typename AccumulatorOf<Element>::Type;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

template <class Scalar, int lanes>
struct VectorOf {
  typedef Scalar Type __attribute__((vector_size(lanes * sizeof(Scalar))));
};
template <class Scalar, int lanes>
using Vector = typename VectorOf<Scalar, lanes>::Type;

template <class Scalar>
constexpr int kLanes = KEYLOCK_VECTOR_BYTES / static_cast<int>(sizeof(Scalar));

template <class Scalar, int lanes>
inline Vector<Scalar, lanes> read_bits(const void* from) {
  Vector<Scalar, lanes> value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Wherever it lies: two bfloat16 numbers read as one integer need not be aligned as one.
template <class Scalar>
inline Scalar read_one(const Scalar* from) {
  Scalar value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class Vector>
inline void write_bits(void* to, Vector value) {
  std::memcpy(to, &value, sizeof value);
}

template <int lanes>
inline Vector<float, lanes> widen(const float* from) {
  return read_bits<float, lanes>(from);
}

template <int lanes>
inline Vector<double, lanes> widen(const double* from) {
  return read_bits<double, lanes>(from);
}

template <int lanes>
inline Vector<float, lanes> widen(const Bfloat16* from) {
  const auto bits = read_bits<uint16_t, lanes>(from);
  return (Vector<float, lanes>)(__builtin_convertvector(bits, Vector<uint32_t, lanes>) << 16);
}

template <int lanes>
inline Vector<float, lanes> widen(const Float16* from) {
#if defined(__AVX512F__)
  if constexpr (lanes == 16) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
#endif
#if defined(__F16C__)
  if constexpr (lanes == 8) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
#endif
  using Floats = Vector<float, lanes>;
  using Bits = Vector<uint32_t, lanes>;
  const Bits half = __builtin_convertvector(read_bits<uint16_t, lanes>(from), Bits);
  const Bits sign = (half & 0x8000u) << 16;
  const Bits magnitude = (half & 0x7fffu) << 13;
  // The exponent's bias moves from 15 to 127 by a multiplication, which also brings infinities
  // and NaN out above every finite number; subnormals are integers in units of 2^-24.
  const Floats normal = (Floats)(magnitude + (0xe0u << 23)) * 0x1p-112f;
  const Floats subnormal =
      __builtin_convertvector((Vector<int32_t, lanes>)(half & 0x7fffu), Floats) * 0x1p-24f;
  return (Floats)(sign | ((half & 0x7c00u) == 0u ? (Bits)subnormal : (Bits)normal));
}

template <int lanes>
inline Vector<int32_t, lanes> widen(const int32_t* from) {
  return read_bits<int32_t, lanes>(from);
}

// Round to nearest, ties to even, as torch's conversions do.

inline void narrow(float* to, Vector<float, kLanes<float>> value) { write_bits(to, value); }

inline void narrow(double* to, Vector<double, kLanes<double>> value) { write_bits(to, value); }

inline void narrow(Bfloat16* to, Vector<float, kLanes<float>> value) {
#if KEYLOCK_VECTOR_BYTES == 64 && defined(__AVX512BF16__)
  constexpr int kSubnormal = 0x20;  // which the instruction for it would take for 0
  if (_mm512_fpclass_ps_mask(value, kSubnormal) == 0) {
    return write_bits(to, _mm512_cvtneps_pbh(value));
  }
#endif
  constexpr int lanes = kLanes<float>;
  using Bits = Vector<uint32_t, lanes>;
  const Bits bits = (Bits)value;
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  // Rounding up could carry a NaN into an infinity.
  const Bits result = value != value ? Bits{} + 0x7fc0u : rounded;
  write_bits(to, __builtin_convertvector(result, Vector<uint16_t, lanes>));
}

inline void narrow(Float16* to, Vector<float, kLanes<float>> value) {
#if KEYLOCK_VECTOR_BYTES == 64 && defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#elif KEYLOCK_VECTOR_BYTES == 32 && defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#else
  constexpr int lanes = kLanes<float>;
  using Floats = Vector<float, lanes>;
  using Bits = Vector<uint32_t, lanes>;
  const Bits magnitude = (Bits)value & 0x7fffffffu;
  // Normal halves: rebase the exponent and round at bit 13; a carry may reach infinity.
  const Bits normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal halves: adding 0.5 leaves the multiple of 2^-24 in the low bits, rounded by the FPU.
  const Bits subnormal = (Bits)((Floats)magnitude + 0.5f) - 0x3f000000u;
  Bits half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? Bits{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : half;
  half |= ((Bits)value >> 16) & 0x8000u;
  write_bits(to, __builtin_convertvector(half, Vector<uint16_t, lanes>));
#endif
}

// The integers as wide as a vector's elements, which its comparisons also give.
template <class Scalar>
struct BitsOf {
  using Type = int32_t;
};
template <>
struct BitsOf<double> {
  using Type = int64_t;
};
template <class Scalar>
using Integers = Vector<typename BitsOf<Scalar>::Type, kLanes<Scalar>>;

template <class Scalar>
using Full = Vector<Scalar, kLanes<Scalar>>;

template <class Scalar>
inline Full<Scalar> all(Scalar value) {
  return value - Full<Scalar>{};
}

template <class Scalar>
constexpr Scalar kInfinity = static_cast<Scalar>(__builtin_inf());

template <class Scalar>
inline Full<Scalar> largest(Full<Scalar> a, Full<Scalar> b) {
  return a > b ? a : b;
}

// Lanes in groups of `span`, a power of two: each lane gets the result over its group. Every lane
// adds the same pairs, so that all of them hold the same bits.
template <class Scalar, int distance, class Combine>
inline Full<Scalar> with_partner(Full<Scalar> value, Combine combine) {
  typename BitsOf<Scalar>::Type partner[kLanes<Scalar>];
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes<Scalar>; ++lane) partner[lane] = lane ^ distance;
  const auto index = read_bits<typename BitsOf<Scalar>::Type, kLanes<Scalar>>(partner);
  return combine(value, __builtin_shuffle(value, index));
}

template <class Scalar, class Combine>
inline Full<Scalar> over_groups(Full<Scalar> value, int span, Combine combine) {
  if (span > 1) value = with_partner<Scalar, 1>(value, combine);
  if constexpr (kLanes<Scalar> > 2) {
    if (span > 2) value = with_partner<Scalar, 2>(value, combine);
  }
  if constexpr (kLanes<Scalar> > 4) {
    if (span > 4) value = with_partner<Scalar, 4>(value, combine);
  }
  if constexpr (kLanes<Scalar> > 8) {
    if (span > 8) value = with_partner<Scalar, 8>(value, combine);
  }
  return value;
}

// 2^r for |r| <= 1/2, within 5e-9 and 2e-19 of itself.
inline Full<float> power_of_two(Full<float> r) {
  auto p = all(1.5453163e-4f);
  p = p * r + 1.3390863e-3f;
  p = p * r + 9.6180826e-3f;
  p = p * r + 5.5503571e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314719e-1f;
  return p * r + 1.0f;
}

inline Full<double> power_of_two(Full<double> r) {
  auto p = all(1.3688996294117282e-12);
  p = p * r + 2.576458965148218e-11;
  p = p * r + 4.4454945906886011e-10;
  p = p * r + 7.0548728010717218e-09;
  p = p * r + 1.0178086355000416e-07;
  p = p * r + 1.321548687033104e-06;
  p = p * r + 1.5252733803175073e-05;
  p = p * r + 1.5403530393303202e-4;
  p = p * r + 1.3333558146349431e-3;
  p = p * r + 9.6181291076285098e-3;
  p = p * r + 5.5504108664821576e-2;
  p = p * r + 2.4022650695910072e-1;
  p = p * r + 6.9314718055994529e-1;
  return p * r + 1.0;
}

// 2^x for x <= 0, and NaN for NaN; below the smallest normal number, 0.
template <class Scalar>
inline Full<Scalar> exp2_of(Full<Scalar> x) {
  constexpr bool is_float = sizeof(Scalar) == 4;
  constexpr Scalar smallest = is_float ? -126 : -1022;
  // Adding 1.5 * 2^mantissa rounds to an integer, which then stands in the low bits.
  constexpr Scalar magic = is_float ? static_cast<Scalar>(0x1.8p23) : static_cast<Scalar>(0x1.8p52);
  const Full<Scalar> shifted = x + magic;
  const Full<Scalar> rest = x - (shifted - magic);
  const Full<Scalar> fraction = power_of_two(rest);
#if defined(__AVX512F__) && KEYLOCK_VECTOR_BYTES == 64
  if constexpr (is_float) {
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, all(smallest), _CMP_NLT_UQ), fraction,
                                  shifted - magic);
  }
#endif
  const auto exponent = (Integers<Scalar>)shifted << (is_float ? 23 : 52);
  const auto result = (Full<Scalar>)((Integers<Scalar>)fraction + exponent);
  return x < smallest ? Full<Scalar>{} : (x == x ? result : x);
}

// `count` numbers in `Real`s, and zeros up to whole vectors.
template <class Real, class Element>
void load_row(const Element* from, int64_t count, Real* to) {
  constexpr int lanes = kLanes<Real>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    write_bits(to + i, __builtin_convertvector(widen<lanes>(from + i), Full<Real>));
  }
  if (i < count) {
    Element rest[lanes] = {};
    std::memcpy(rest, from + i, (count - i) * sizeof(Element));
    write_bits(to + i, __builtin_convertvector(widen<lanes>(rest), Full<Real>));
  }
}

template <class Real, class Element>
void store_row(const Real* from, int64_t count, Element* to) {
  constexpr int lanes = kLanes<Real>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) narrow(to + i, widen<lanes>(from + i));
  if (i < count) {
    Element rest[lanes];
    narrow(rest, widen<lanes>(from + i));
    std::memcpy(to + i, rest, (count - i) * sizeof(Element));
  }
}

}  // namespace
}  // namespace keylock::KEYLOCK_ISA
