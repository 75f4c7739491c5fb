// What the programs of test_units.py share: a check, numbers to try, and a run in every instruction set.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "simd/isa.h"

inline const char* isa_under_test = "no instruction set";

#define CHECK(condition)                                                                                   \
  do {                                                                                                     \
    if (!(condition)) {                                                                                    \
      std::fprintf(stderr, "%s:%d, in %s: %s is false\n", __FILE__, __LINE__, isa_under_test, #condition); \
      std::exit(1);                                                                                        \
    }                                                                                                      \
  } while (false)

// SplitMix64: the same numbers on every machine.
struct Random {
  uint64_t state = 0;
  uint64_t operator()() {
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return int64_t((*this)() % uint64_t(n)); }
};

// Runs f, which foreach_isa.h has compiled, in each instruction set that this machine has.
#define RUN(isa_name, f) (isa_under_test = #isa_name, torchfast::isa_name::f(), std::puts(#isa_name))
#if defined(__x86_64__)
#define RUN_IN_EVERY_ISA(f)                                   \
  RUN(baseline, f);                                           \
  if (torchfast::isa() >= torchfast::Isa::avx2) RUN(avx2, f); \
  if (torchfast::isa() >= torchfast::Isa::avx512) RUN(avx512, f)
#else
#define RUN_IN_EVERY_ISA(f) RUN(baseline, f)
#endif
