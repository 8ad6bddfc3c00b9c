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

#if defined(__F16C__)
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

// Round to nearest, ties to even, as torch's conversions do.

inline void narrow(float* to, Vector<float, kLanes<float>> value) { write_bits(to, value); }

inline void narrow(double* to, Vector<double, kLanes<double>> value) { write_bits(to, value); }

inline void narrow(Bfloat16* to, Vector<float, kLanes<float>> value) {
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

}  // namespace
}  // namespace keylock::KEYLOCK_ISA
