// Compiles TORCHFAST_FILE, which includes this header, once per instruction set, each time in its own
// namespace torchfast::TORCHFAST_ISA (the technique of Google Highway's foreach_target.h). The last
// pass, the baseline, is the file's own, and has what is compiled once: #ifdef TORCHFAST_LAST_ISA.
//
// Why not __attribute__((target_clones)): a 64-byte vector then also goes to AVX2 and SSE, where GCC
// takes comparisons apart into scalars (10 times slower), and it did so in the AVX-512 clone of
// functions as large as ours.
//
// With TORCHFAST_BASELINE_ONLY there is the last pass alone, for builds that look for what no instruction set
// changes.
//
// TORCHFAST_TOGGLE is defined in every second pass. A file's guard is, too, so that their difference tells
// whether this pass has had the file.
#ifndef TORCHFAST_EACH_ISA
#define TORCHFAST_EACH_ISA

#include "simd/isa.h"

#if defined(__x86_64__) && !defined(TORCHFAST_BASELINE_ONLY)

#undef TORCHFAST_ISA
#undef TORCHFAST_VECTOR_BYTES
#undef TORCHFAST_BEGIN_ISA
#undef TORCHFAST_END_ISA
#define TORCHFAST_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define TORCHFAST_TARGET(arch) \
  TORCHFAST_PRAGMA(clang attribute push(__attribute__((target(arch))), apply_to = function))
#define TORCHFAST_END_ISA TORCHFAST_PRAGMA(clang attribute pop)
#else
#define TORCHFAST_TARGET(arch) TORCHFAST_PRAGMA(GCC push_options) TORCHFAST_PRAGMA(GCC target(arch))
#define TORCHFAST_END_ISA TORCHFAST_PRAGMA(GCC pop_options)
#endif

#define TORCHFAST_ISA avx512
#define TORCHFAST_VECTOR_BYTES 64
#define TORCHFAST_BEGIN_ISA TORCHFAST_TARGET("arch=x86-64-v4")
#include TORCHFAST_FILE
#undef TORCHFAST_ISA
#undef TORCHFAST_VECTOR_BYTES
#undef TORCHFAST_BEGIN_ISA

#define TORCHFAST_TOGGLE
#define TORCHFAST_ISA avx2
#define TORCHFAST_VECTOR_BYTES 32
#define TORCHFAST_BEGIN_ISA TORCHFAST_TARGET("arch=x86-64-v3")
#include TORCHFAST_FILE
#undef TORCHFAST_ISA
#undef TORCHFAST_VECTOR_BYTES
#undef TORCHFAST_BEGIN_ISA
#undef TORCHFAST_END_ISA
#undef TORCHFAST_TOGGLE

#define TORCHFAST_ISA baseline
#define TORCHFAST_VECTOR_BYTES 16
#define TORCHFAST_BEGIN_ISA
#define TORCHFAST_END_ISA

// Picks f from the namespace of this machine's instruction set.
#define TORCHFAST_DISPATCH(f) (isa() == Isa::avx512 ? avx512::f : isa() == Isa::avx2 ? avx2::f : baseline::f)
#else
#define TORCHFAST_DISPATCH(f) baseline::f
#endif

#define TORCHFAST_LAST_ISA
#endif
