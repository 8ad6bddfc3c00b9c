// Which instruction sets there are, and each op's way to its kernel for one of them. Compiled
// for the plainest CPU: it runs before anything is known about this one.
#include "keylock/instruction_set.h"
#include "keylock/localized_attention.h"
#include "keylock/low_rank_linear.h"
#include "keylock/low_rank_update.h"

// What every kernel file defines for the instruction set it is compiled for.
#define KEYLOCK_DECLARE_KERNELS(set)                                           \
  namespace keylock::set {                                                     \
  Status low_rank_linear(const LowRankLinear& op, int threads);                \
  Status low_rank_update(const LowRankUpdate& op, int threads);                \
  Status low_rank_backward(const LowRankBackward& op, int threads);            \
  Status localized_attention(const LocalizedAttention& op, int threads);       \
  Status localized_attention_backward(const LocalizedAttentionBackward&, int); \
  }

KEYLOCK_DECLARE_KERNELS(portable)
KEYLOCK_DECLARE_KERNELS(avx2)
KEYLOCK_DECLARE_KERNELS(avx512)
KEYLOCK_DECLARE_KERNELS(avx512_bf16)

namespace keylock {

bool is_compiled(InstructionSet set) {
  switch (set) {
    case InstructionSet::portable: return true;
#if defined(KEYLOCK_HAVE_AVX2)
    case InstructionSet::avx2: return true;
#endif
#if defined(KEYLOCK_HAVE_AVX512)
    case InstructionSet::avx512: return true;
#endif
#if defined(KEYLOCK_HAVE_AVX512_BF16)
    case InstructionSet::avx512_bf16: return true;
#endif
    default: return false;
  }
}

// The builtin also asks whether the operating system saves the wide registers. F16C needs no
// question of its own: it is older than AVX2, and every CPU with the one has the other.
bool is_usable(InstructionSet set) {
  if (!is_compiled(set)) return false;
#if defined(__x86_64__) || defined(__i386__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (set) {
    case InstructionSet::portable: return true;
    case InstructionSet::avx2: return has_avx2;
    case InstructionSet::avx512: return has_avx512;
    case InstructionSet::avx512_bf16: return has_avx512 && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return set == InstructionSet::portable;
}

#if defined(KEYLOCK_HAVE_AVX2)
#define KEYLOCK_AVX2(call) \
  case InstructionSet::avx2: return avx2::call;
#else
#define KEYLOCK_AVX2(call)
#endif
#if defined(KEYLOCK_HAVE_AVX512)
#define KEYLOCK_AVX512(call) \
  case InstructionSet::avx512: return avx512::call;
#else
#define KEYLOCK_AVX512(call)
#endif
#if defined(KEYLOCK_HAVE_AVX512_BF16)
#define KEYLOCK_AVX512_BF16(call) \
  case InstructionSet::avx512_bf16: return avx512_bf16::call;
#else
#define KEYLOCK_AVX512_BF16(call)
#endif
#define KEYLOCK_RUN(set, call)      \
  switch (set) {                    \
    KEYLOCK_AVX2(call)              \
    KEYLOCK_AVX512(call)            \
    KEYLOCK_AVX512_BF16(call)       \
    default: return portable::call; \
  }

Status low_rank_linear(const LowRankLinear& op, InstructionSet set, int threads) {
  KEYLOCK_RUN(set, low_rank_linear(op, threads));
}

Status low_rank_update(const LowRankUpdate& op, InstructionSet set, int threads) {
  KEYLOCK_RUN(set, low_rank_update(op, threads));
}

Status low_rank_backward(const LowRankBackward& op, InstructionSet set, int threads) {
  KEYLOCK_RUN(set, low_rank_backward(op, threads));
}

Status localized_attention(const LocalizedAttention& op, InstructionSet set, int threads) {
  KEYLOCK_RUN(set, localized_attention(op, threads));
}

Status localized_attention_backward(const LocalizedAttentionBackward& op, InstructionSet set,
                                    int threads) {
  KEYLOCK_RUN(set, localized_attention_backward(op, threads));
}

}  // namespace keylock
