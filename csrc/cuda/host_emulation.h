// A GPU on the CPU, to check kernels where there is none: each thread of a block is a fiber, and
// what lanes or threads do together happens when the last of them arrives. Memory that a kernel
// has not filled is NaN: all of shared memory at first, and the target of an asynchronous copy
// until the copying thread has waited for it. Accesses to shared memory are checked. Blocks run
// one after another, and warps as far as they get alone, in a chosen order, so that a missing
// barrier shows.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define KEYLOCK_DEVICE inline
#define KEYLOCK_EVERYWHERE inline
#define KEYLOCK_UNROLL
#define KEYLOCK_ONCE

namespace keylock::cuda {

struct Emulation {
  int processors = 1;
  bool reversed = false;                                   // whether the last thread goes first
  int64_t wide_bytes = 0, narrow_bytes = 0, products = 0;  // what kernels did so far
};
inline Emulation emulation;

class Machine {
 public:
  Machine(int threads, int shared_bytes, std::function<void()> body)
      : shared_(shared_bytes + 16), warps_(threads / kWarp), body_(std::move(body)) {
    base = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(shared_.data()) + 15) &
                                            ~uintptr_t{15});
    end = base + shared_bytes;
    for (int i = 0; i < threads; ++i) {
      fibers_.push_back(std::make_unique<Fiber>());
      fibers_.back()->stack.resize(256 << 10);
    }
  }

  void run_block(int64_t block) {
    this->block = block;
    std::memset(base, 0xff, end - base);
    for (auto& fiber : fibers_) {
      fiber->is_done = false;
      fiber->copies.clear();
      getcontext(&fiber->context);
      fiber->context.uc_stack.ss_sp = fiber->stack.data();
      fiber->context.uc_stack.ss_size = fiber->stack.size();
      fiber->context.uc_link = &scheduler_;
      makecontext(&fiber->context, &Machine::enter, 0);
    }
    const int warps = static_cast<int>(warps_.size());
    for (bool all_done = false; !all_done;) {
      const uint64_t before = progress_;
      all_done = true;
      for (int i = 0; i < warps; ++i) {
        all_done &= run_warp(emulation.reversed ? warps - 1 - i : i);
      }
      if (!all_done && progress_ == before) fail("threads wait for each other forever");
    }
  }

  // Where all lanes of a warp, or threads of a block, come together.
  struct Meeting {
    std::string name;
    int arrived = 0;
    uint64_t held = 0;  // how many meetings there were
    struct Slot {
      alignas(16) unsigned char bytes[48];
    } brought[kWarp], given[kWarp];
  };

  // The last to arrive runs `act`; the others wait until it has.
  template <class Act>
  void meet(Meeting& meeting, int size, const char* name, const Act& act) {
    if (meeting.arrived == 0) meeting.name = name;
    if (meeting.name != name) fail("lanes of a warp diverge: " + meeting.name + " and " + name);
    ++progress_;
    const uint64_t mine = meeting.held;
    if (++meeting.arrived == size) {
      act();
      meeting.arrived = 0;
      ++meeting.held;
    }
    while (meeting.held == mine) yield();
  }

  // What each lane gets of what all of them bring: act(array of Brought, array of Given).
  template <class Brought, class Given, class Act>
  Given meet_warp(const char* name, const Brought& brought, const Act& act) {
    static_assert(sizeof(Brought) <= 48 && sizeof(Given) <= 48);
    Meeting& meeting = warps_[current / kWarp];
    const int lane = current % kWarp;
    std::memcpy(meeting.brought[lane].bytes, &brought, sizeof(Brought));
    meet(meeting, kWarp, name, [&] {
      Brought all[kWarp];
      Given results[kWarp]{};
      for (int i = 0; i < kWarp; ++i) {
        std::memcpy(&all[i], meeting.brought[i].bytes, sizeof(Brought));
      }
      act(all, results);
      for (int i = 0; i < kWarp; ++i) {
        std::memcpy(meeting.given[i].bytes, &results[i], sizeof(Given));
      }
    });
    Given result;
    std::memcpy(&result, meeting.given[lane].bytes, sizeof(Given));
    return result;
  }
  void meet_block() {
    meet(whole_, static_cast<int>(fibers_.size()), "barrier", [] {});
  }

  void check(const void* address, size_t bytes, size_t alignment) const {
    const auto* first = static_cast<const unsigned char*>(address);
    if (first < base || first + bytes > end) fail("access outside of shared memory");
    if (reinterpret_cast<uintptr_t>(first) % alignment != 0) fail("misaligned access");
  }
  [[noreturn]] static void fail(const std::string& what) { throw std::runtime_error(what); }

  struct Copy {
    unsigned char* to;
    const void* from;
    int bytes, group;
  };
  void start_copy(void* to, const void* from, int bytes) {
    check(to, 16, 16);
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("misaligned copy");
    std::memset(to, 0xff, 16);
    Fiber& fiber = *fibers_[current];
    fiber.copies.push_back({static_cast<unsigned char*>(to), from, bytes, fiber.groups});
  }
  void commit_copies() { ++fibers_[current]->groups; }
  void finish_copies(int latest) {
    Fiber& fiber = *fibers_[current];
    std::vector<Copy> rest;
    for (const Copy& copy : fiber.copies) {
      if (copy.group >= fiber.groups - latest) {
        rest.push_back(copy);
        continue;
      }
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
    fiber.copies = std::move(rest);
  }

  int current = 0;  // thread
  int64_t block = 0;
  unsigned char *base, *end;  // of shared memory
  std::string error;
  inline static Machine* running = nullptr;

 private:
  struct Fiber {
    ucontext_t context;
    std::vector<unsigned char> stack;
    std::vector<Copy> copies;
    int groups = 0;
    bool is_done = false;
  };

  // Runs a warp as far as it gets without the others, which shows a missing barrier best; whether
  // it is done.
  bool run_warp(int warp) {
    bool all_done;
    uint64_t before;
    do {
      before = progress_;
      all_done = true;
      for (int i = 0; i < kWarp; ++i) {
        current = warp * kWarp + (emulation.reversed ? kWarp - 1 - i : i);
        Fiber& fiber = *fibers_[current];
        if (fiber.is_done) continue;
        all_done = false;
        swapcontext(&scheduler_, &fiber.context);
        if (!error.empty()) fail(error);
      }
    } while (progress_ != before);
    return all_done;
  }

  static void enter() {
    Machine& machine = *running;
    const int mine = machine.current;
    try {
      machine.body_();
    } catch (const std::exception& error) {
      machine.error = error.what();
    }
    machine.fibers_[mine]->is_done = true;
    ++machine.progress_;
  }
  void yield() {
    Fiber& fiber = *fibers_[current];
    swapcontext(&fiber.context, &scheduler_);
  }

  std::vector<unsigned char> shared_;
  std::vector<Meeting> warps_;
  Meeting whole_;
  std::function<void()> body_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  ucontext_t scheduler_;
  uint64_t progress_ = 0;
};

// An array in shared memory whose accesses are checked.
template <class T>
class Shared {
 public:
  Shared() = default;
  explicit Shared(void* data) : data_(static_cast<T*>(data)) {}
  T& operator[](int64_t i) const {
    Machine::running->check(data_ + i, sizeof(T), alignof(T));
    return data_[i];
  }
  T& operator*() const { return (*this)[0]; }
  Shared operator+(int64_t offset) const { return Shared(data_ + offset); }
  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
};

template <class To, class From>
Shared<To> shared_cast(Shared<From> from) {
  return Shared<To>(from.data());
}

inline int thread_index() { return Machine::running->current; }
inline int64_t block_index() { return Machine::running->block; }
inline void sync_block() { Machine::running->meet_block(); }
inline void sync_warp() {
  Machine::running->meet_warp<char, char>("sync_warp", 0, [](auto&, auto&) {});
}

inline float exchange(float value, int bits) {
  return Machine::running->meet_warp<float, float>("exchange", value,
                                                   [bits](auto& all, auto& results) {
                                                     for (int lane = 0; lane < kWarp; ++lane)
                                                       results[lane] = all[lane ^ bits];
                                                   });
}
inline float take(float value, int from) {
  struct Brought {
    float value;
    int from;
  };
  return Machine::running->meet_warp<Brought, float>(
      "take", {value, from}, [](auto& all, auto& results) {
        for (int lane = 0; lane < kWarp; ++lane) {
          results[lane] = all[all[lane].from % kWarp].value;
        }
      });
}

inline bool any(bool value) {
  return Machine::running->meet_warp<bool, bool>("any", value, [](auto& all, auto& results) {
    bool found = false;
    for (const bool one : all) found |= one;
    for (int lane = 0; lane < kWarp; ++lane) results[lane] = found;
  });
}

// Bytes of the tensors that are wide where they can be: 16 at once, or an element at a time.
inline void note_access(bool wide, int bytes) {
  (wide ? emulation.wide_bytes : emulation.narrow_bytes) += bytes;
}

template <class T>
Chunk load_chunk(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) Machine::fail("misaligned load");
  return *reinterpret_cast<const Chunk*>(from);
}
template <class T>
void store_chunk(T* to, const Chunk& chunk) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) Machine::fail("misaligned store");
  *reinterpret_cast<Chunk*>(to) = chunk;
}

template <class T>
void copy_async(Shared<T> to, const T* from, int bytes) {
  Machine::running->start_copy(to.data(), from, bytes);
}
inline void commit_copies() { Machine::running->commit_copies(); }
template <int latest>
void wait_for_copies() {
  Machine::running->finish_copies(latest);
}

struct Registers {
  uint32_t r[4];
};

template <bool transposed>
void emulate_load_matrices(uint32_t (&r)[4], unsigned char* row) {
  Machine::running->check(row, 16, 16);
  const auto result = Machine::running->meet_warp<unsigned char*, Registers>(
      transposed ? "load_matrices_transposed" : "load_matrices", row,
      [](auto& rows, auto& results) {
        for (int lane = 0; lane < kWarp; ++lane) {
          for (int matrix = 0; matrix < 4; ++matrix) {
            uint16_t pair[2];
            for (int i = 0; i < 2; ++i) {
              const int first = lane / 4, second = lane % 4 * 2 + i;
              const int of_row = transposed ? second : first, column = transposed ? first : second;
              std::memcpy(&pair[i], rows[matrix * 8 + of_row] + column * 2, 2);
            }
            results[lane].r[matrix] = pair[0] | uint32_t{pair[1]} << 16;
          }
        }
      });
  std::memcpy(r, result.r, sizeof(r));
}
template <class T>
void load_matrices(uint32_t (&r)[4], Shared<T> row) {
  emulate_load_matrices<false>(r, reinterpret_cast<unsigned char*>(row.data()));
}
template <class T>
void load_matrices_transposed(uint32_t (&r)[4], Shared<T> row) {
  emulate_load_matrices<true>(r, reinterpret_cast<unsigned char*>(row.data()));
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float power_of_two(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1 / x; }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float larger(float a, float b) { return std::fmax(a, b); }

inline float widen(float x) { return x; }
inline float widen(Bfloat x) { return from_bits(uint32_t{x.bits} << 16); }
inline float widen(Half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31;
  const uint32_t fraction = x.bits & 0x3ffu;
  if (exponent == 31) return from_bits(sign | 0x7f800000u | fraction << 13);
  if (exponent != 0) return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
  const float small = static_cast<float>(fraction) * 0x1p-24f;
  return sign ? -small : small;
}

inline uint16_t round_to(float x, Bfloat) {
  const uint32_t bits = to_bits(x);
  if (std::isnan(x)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t round_to(float x, Half) {
  const uint16_t sign = to_bits(x) >> 16 & 0x8000;
  const float size = std::fabs(x);
  if (std::isnan(x)) return 0x7fff;
  if (size >= 65520.f) return sign | 0x7c00;  // halfway to the number behind the largest
  if (size < 0x1p-14f) return sign | static_cast<uint16_t>(std::nearbyint(size * 0x1p24f));
  const uint32_t bits = to_bits(size), lost = bits & 0x1fff;
  const uint32_t up = lost > 0x1000 || (lost == 0x1000 && (bits >> 13 & 1));
  return sign | static_cast<uint16_t>((bits >> 13) - (112u << 10) + up);
}
template <class T>
uint32_t pack(float first, float second) {
  return round_to(first, T{}) | uint32_t{round_to(second, T{})} << 16;
}

template <class T>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Brought {
    uint32_t a[4], b[2];
    float c[4];
  };
  struct Sums {
    float c[4];
  };
  Brought mine{{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  const auto result =
      Machine::running->meet_warp<Brought, Sums>("multiply", mine, [](auto& all, auto& results) {
        const auto half_of = [](uint32_t word, int i) {
          return widen(T{static_cast<uint16_t>(word >> 16 * i)});
        };
        float left[16][16], right[16][8];
        for (int lane = 0; lane < kWarp; ++lane) {
          for (int r = 0; r < 4; ++r) {
            for (int i = 0; i < 2; ++i) {
              left[lane / 4 + r % 2 * 8][lane % 4 * 2 + i + r / 2 * 8] = half_of(all[lane].a[r], i);
              if (r < 2) right[lane % 4 * 2 + i + r * 8][lane / 4] = half_of(all[lane].b[r], i);
            }
          }
        }
        for (int lane = 0; lane < kWarp; ++lane) {
          for (int i = 0; i < 4; ++i) {
            double sum = all[lane].c[i];  // rounded once, as far as is known
            for (int k = 0; k < 16; ++k) {
              sum += double{left[lane / 4 + i / 2 * 8][k]} * right[k][lane % 4 * 2 + i % 2];
            }
            results[lane].c[i] = static_cast<float>(sum);
          }
        }
        emulation.products += 16 * 8 * 16;
      });
  std::memcpy(c, result.c, sizeof(c));
}

inline int processors() { return emulation.processors; }

template <class Kernel>
Status launch(const typename Kernel::Params& params, int64_t blocks, int shared_bytes, void*) {
  Machine machine(Kernel::kThreads, shared_bytes,
                  [&] { Kernel::run(params, Shared<unsigned char>(Machine::running->base)); });
  Machine::running = &machine;
  for (int64_t block = 0; block < blocks; ++block) machine.run_block(block);
  return Status::ok;
}

}  // namespace keylock::cuda
