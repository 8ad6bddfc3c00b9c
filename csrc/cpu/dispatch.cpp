// Which instruction sets there are, and each op's way to its kernel for one of them. Compiled
// for the plainest CPU: it runs before anything is known about this one.
#include "keylock/instruction_set.h"
#include "keylock/rank_one_update.h"

namespace keylock {

namespace portable {
Status rank_one_update(const RankOneUpdate& op, int threads);
}
namespace avx2 {
Status rank_one_update(const RankOneUpdate& op, int threads);
}
namespace avx512 {
Status rank_one_update(const RankOneUpdate& op, int threads);
}

bool is_compiled(InstructionSet set) {
  switch (set) {
    case InstructionSet::portable: return true;
#if defined(KEYLOCK_HAVE_AVX2)
    case InstructionSet::avx2: return true;
#endif
#if defined(KEYLOCK_HAVE_AVX512)
    case InstructionSet::avx512: return true;
#endif
    default: return false;
  }
}

// The builtin also asks whether the operating system saves the wide registers. F16C needs no
// question of its own: it is older than AVX2, and every CPU with the one has the other.
bool is_usable(InstructionSet set) {
  switch (set) {
    case InstructionSet::portable: return true;
#if defined(KEYLOCK_HAVE_AVX2)
    case InstructionSet::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#if defined(KEYLOCK_HAVE_AVX512)
    case InstructionSet::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    default: return false;
  }
}

Status rank_one_update(const RankOneUpdate& op, InstructionSet set, int threads) {
  switch (set) {
#if defined(KEYLOCK_HAVE_AVX2)
    case InstructionSet::avx2: return avx2::rank_one_update(op, threads);
#endif
#if defined(KEYLOCK_HAVE_AVX512)
    case InstructionSet::avx512: return avx512::rank_one_update(op, threads);
#endif
    default: return portable::rank_one_update(op, threads);
  }
}

}  // namespace keylock
