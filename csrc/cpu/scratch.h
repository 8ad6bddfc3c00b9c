// Memory for the time of one call, and who uses which part of it.
#pragma once

#include <cstdlib>

#include "vector.h"

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace keylock::KEYLOCK_ISA {
namespace {

inline int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Hands out pieces of one allocation. Without memory it only counts what is asked for.
struct Arena {
  char* memory;
  int64_t used;

  template <class Item>
  Item* take(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(Item));
    char* start = memory == nullptr ? nullptr : memory + used;
    used += round_up(bytes, 64);
#if defined(__SANITIZE_ADDRESS__)
    used += 256;  // a moat: pieces are checked like allocations of their own
    if (memory != nullptr) ASAN_POISON_MEMORY_REGION(start + bytes, memory + used - start - bytes);
#endif
    return reinterpret_cast<Item*>(start);
  }
};

}  // namespace
}  // namespace keylock::KEYLOCK_ISA
