// Memory for the time of one call, and who uses which part of it.
#pragma once

#include <cstdlib>

#include "vector.h"

#if defined(_OPENMP)
#include <omp.h>
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
    char* start = memory == nullptr ? nullptr : memory + used;
    used += round_up(count * static_cast<int64_t>(sizeof(Item)), 64);
    return reinterpret_cast<Item*>(start);
  }
};

}  // namespace
}  // namespace keylock::KEYLOCK_ISA
