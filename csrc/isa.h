// The instruction sets that foreach_isa.h compiles for, and which of them serves here.
#pragma once

#include <cstdlib>
#include <string>

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
