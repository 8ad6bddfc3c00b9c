// What the kernels ask of a GPU, and nothing else: the same bodies also run on a CPU, where
// host_emulation.h stands in for the machine. In both, a kernel is a struct with Params, kThreads,
// kBlocks (per multiprocessor, at least) and a static run(params, shared memory).
#pragma once

#include <cstdint>

#include "keylock/tensor.h"

namespace keylock::cuda {

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};
struct alignas(16) Chunk {  // the widest access to memory there is
  uint32_t words[4];
};
struct alignas(8) Pair {
  float first, second;
};
template <class T>
inline constexpr int kChunk = 16 / sizeof(T);  // elements in it
constexpr int kWarp = 32;
constexpr int kMaxSharedBytes = 99 << 10;  // of a block, on every GPU since Ampere

template <class T>
inline constexpr DataType kDataType = DataType::float32;
template <>
inline constexpr DataType kDataType<Half> = DataType::float16;
template <>
inline constexpr DataType kDataType<Bfloat> = DataType::bfloat16;

}  // namespace keylock::cuda

#if defined(KEYLOCK_EMULATED)
#include "host_emulation.h"
#else
#include <cuda_runtime.h>

#include <atomic>

#define KEYLOCK_DEVICE __device__ __forceinline__
#define KEYLOCK_EVERYWHERE __host__ __device__ inline
#define KEYLOCK_UNROLL _Pragma("unroll")
#define KEYLOCK_ONCE _Pragma("unroll 1")

namespace keylock::cuda {

template <class T>
using Shared = T*;  // an array in shared memory

template <class To, class From>
KEYLOCK_DEVICE Shared<To> shared_cast(From* from) {
  return reinterpret_cast<To*>(from);
}

KEYLOCK_DEVICE int thread_index() { return threadIdx.x; }
KEYLOCK_DEVICE int64_t block_index() { return blockIdx.x; }
KEYLOCK_DEVICE void sync_block() { __syncthreads(); }
KEYLOCK_DEVICE void sync_warp() { __syncwarp(); }

// Another lane's value: the one whose number differs in `bits`, or lane `from`.
KEYLOCK_DEVICE float exchange(float value, int bits) {
  return __shfl_xor_sync(0xffffffffu, value, bits);
}
KEYLOCK_DEVICE float take(float value, int from) { return __shfl_sync(0xffffffffu, value, from); }

KEYLOCK_DEVICE bool any(bool value) { return __any_sync(0xffffffffu, value); }

// Starts a copy of `bytes` bytes, 0 or 16, and fills up with zeros.
template <class T>
KEYLOCK_DEVICE void copy_async(Shared<T> to, const T* from, int bytes) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes)
               : "memory");
}
KEYLOCK_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for this thread's copies but those of the `latest` last commits.
template <int latest>
KEYLOCK_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(latest) : "memory");
}

// Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
template <class T>
KEYLOCK_DEVICE void load_matrices(uint32_t (&r)[4], Shared<T> row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
template <class T>
KEYLOCK_DEVICE void load_matrices_transposed(uint32_t (&r)[4], Shared<T> row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// c += a b: [16, 16] times [16, 8].
template <class T>
KEYLOCK_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
KEYLOCK_DEVICE void multiply<Half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                   uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
KEYLOCK_DEVICE void multiply<Bfloat>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                     uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

KEYLOCK_DEVICE float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
KEYLOCK_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
KEYLOCK_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
KEYLOCK_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
KEYLOCK_DEVICE float from_bits(uint32_t bits) { return __uint_as_float(bits); }
KEYLOCK_DEVICE uint32_t to_bits(float value) { return __float_as_uint(value); }

KEYLOCK_DEVICE float widen(float x) { return x; }
KEYLOCK_DEVICE float widen(Bfloat x) { return from_bits(uint32_t{x.bits} << 16); }
KEYLOCK_DEVICE float widen(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// Two numbers rounded to nearest even, the first in the lower half.
template <class T>
KEYLOCK_DEVICE uint32_t pack(float first, float second);
template <>
KEYLOCK_DEVICE uint32_t pack<Half>(float first, float second) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
}
template <>
KEYLOCK_DEVICE uint32_t pack<Bfloat>(float first, float second) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
}

inline int processors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

KEYLOCK_DEVICE void note_access(bool, int) {}

template <class T>
KEYLOCK_DEVICE Chunk load_chunk(const T* from) {
  const uint4 four = *reinterpret_cast<const uint4*>(from);
  return {{four.x, four.y, four.z, four.w}};
}
// In so many words, since a compiler may merge a wide store with the narrow ones of another branch.
template <class T>
KEYLOCK_DEVICE void store_chunk(T* to, const Chunk& chunk) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(chunk.words[0]),
               "r"(chunk.words[1]), "r"(chunk.words[2]), "r"(chunk.words[3])
               : "memory");
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocks)
    run(const __grid_constant__ typename Kernel::Params params) {
  extern __shared__ Chunk memory[];
  Kernel::run(params, reinterpret_cast<unsigned char*>(memory));
}

// Lets a kernel's blocks have all the shared memory that any launch asks for; once on each device.
// Set to what one launch needs, another thread could lower the limit before that launch.
template <class Kernel>
cudaError_t allow_shared_memory() {
  static std::atomic<uint64_t> allowed{0};  // a bit for each device; from the 64th on, none
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (error != cudaSuccess || (allowed.load(std::memory_order_relaxed) & bit) != 0) return error;
  error = cudaFuncSetAttribute(run<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               kMaxSharedBytes);
  if (error == cudaSuccess) allowed.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

template <class Kernel>
Status launch(const typename Kernel::Params& params, int64_t blocks, int shared_bytes,
              void* stream) {
  if (blocks == 0) return Status::ok;
  if (blocks > INT32_MAX) return Status::too_large;
  constexpr int kAlwaysGranted = 48 << 10;
  cudaError_t error = shared_bytes > kAlwaysGranted ? allow_shared_memory<Kernel>() : cudaSuccess;
  if (error == cudaSuccess) {
    void* arguments[] = {const_cast<typename Kernel::Params*>(&params)};
    error =
        cudaLaunchKernel(run<Kernel>, dim3(static_cast<unsigned>(blocks)), dim3(Kernel::kThreads),
                         arguments, shared_bytes, static_cast<cudaStream_t>(stream));
  }
  if (error == cudaSuccess) return Status::ok;
  cudaGetLastError();  // else it would surface in a call that has nothing to do with it
  return Status::launch_failed;
}

}  // namespace keylock::cuda
#endif

namespace keylock::cuda {

template <class T>
KEYLOCK_DEVICE T narrow(float x) {
  return {static_cast<uint16_t>(pack<T>(x, x))};
}
template <>
KEYLOCK_DEVICE float narrow<float>(float x) {
  return x;
}

// Which bits of a word of T all being set means infinite or NaN.
template <class T>
inline constexpr uint32_t kExponent = 0x7f800000;
template <>
inline constexpr uint32_t kExponent<Half> = 0x7c007c00;
template <>
inline constexpr uint32_t kExponent<Bfloat> = 0x7f807f80;

template <class T>
KEYLOCK_DEVICE bool is_finite(const Chunk& chunk) {
  bool finite = true;
  KEYLOCK_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t missing = ~chunk.words[i] & kExponent<T>;
    finite &= (missing & 0xffff0000) != 0;
    if (sizeof(T) == 2) finite &= (missing & 0xffff) != 0;
  }
  return finite;
}

KEYLOCK_DEVICE int warp_index() { return thread_index() / kWarp; }
KEYLOCK_DEVICE int lane_index() { return thread_index() % kWarp; }

}  // namespace keylock::cuda
