// The instruction sets that kernels are compiled for, and which of them serves here.
//
// A kernel lives in files named *-inl.h, which foreach_isa.h has compiled once per instruction set. Such a
// file begins with a guard that lets it in once for each of them, includes what it uses, and stands between
// TORCHFAST_KERNELS and TORCHFAST_END_KERNELS. Compiled by itself it is that of the baseline.
#pragma once

#include <cstdlib>
#include <string>

#define TORCHFAST_INLINE inline __attribute__((always_inline))

// The standard library is included before the first of these: its functions must not be compiled for an
// instruction set that another machine, which links the same symbol, does not have.
#define TORCHFAST_KERNELS   \
  TORCHFAST_BEGIN_ISA       \
  namespace torchfast {     \
  namespace TORCHFAST_ISA { \
  namespace {
#define TORCHFAST_END_KERNELS \
  }                           \
  }                           \
  }                           \
  TORCHFAST_END_ISA

#define TORCHFAST_ISA baseline
#define TORCHFAST_VECTOR_BYTES 16
#define TORCHFAST_BEGIN_ISA
#define TORCHFAST_END_ISA

namespace torchfast {

enum class Isa { baseline, avx2, avx512 };

// The widest instruction set of this machine that foreach_isa.h compiles for; TORCHFAST_ISA in the
// environment asks for less.
inline Isa isa() {
  static const Isa best = [] {
    const char* asked = std::getenv("TORCHFAST_ISA");
    std::string limit = asked ? asked : "avx512";
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd");
    if (avx512 && limit == "avx512") return Isa::avx512;
    if (avx2 && limit != "baseline") return Isa::avx2;
#endif
    return Isa::baseline;
  }();
  return best;
}

}  // namespace torchfast
