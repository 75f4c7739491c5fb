// Compiles TORCHFAST_FILE, which includes this header, once per instruction set, each time in its own
// namespace torchfast::TORCHFAST_ISA (the technique of Google Highway's foreach_target.h). The last
// pass, the baseline, is the file's own.
//
// Why not __attribute__((target_clones)): a 64-byte vector then also goes to AVX2 and SSE, where GCC
// takes comparisons apart into scalars (10 times slower), and it did so in the AVX-512 clone of
// functions as large as ours.
#ifndef TORCHFAST_ISA

#include "common.h"

#if defined(__x86_64__) && defined(__clang__)
#define TORCHFAST_PRAGMA(x) _Pragma(#x)
#define TORCHFAST_BEGIN_ISA(arch) \
  TORCHFAST_PRAGMA(clang attribute push(__attribute__((target(arch))), apply_to = function))
#define TORCHFAST_END_ISA TORCHFAST_PRAGMA(clang attribute pop)
#elif defined(__x86_64__) && defined(__GNUC__)
#define TORCHFAST_PRAGMA(x) _Pragma(#x)
#define TORCHFAST_BEGIN_ISA(arch) TORCHFAST_PRAGMA(GCC push_options) TORCHFAST_PRAGMA(GCC target(arch))
#define TORCHFAST_END_ISA TORCHFAST_PRAGMA(GCC pop_options)
#endif

#ifdef TORCHFAST_BEGIN_ISA

#define TORCHFAST_ISA avx512
#define TORCHFAST_VECTOR_BYTES 64
TORCHFAST_BEGIN_ISA("arch=x86-64-v4")
#include "vec.h"
#include TORCHFAST_FILE
TORCHFAST_END_ISA
#undef TORCHFAST_ISA
#undef TORCHFAST_VECTOR_BYTES

#define TORCHFAST_ISA avx2
#define TORCHFAST_VECTOR_BYTES 32
TORCHFAST_BEGIN_ISA("arch=x86-64-v3")
#include "vec.h"
#include TORCHFAST_FILE
TORCHFAST_END_ISA
#undef TORCHFAST_ISA
#undef TORCHFAST_VECTOR_BYTES

// f of the namespace of this machine's instruction set.
#define TORCHFAST_DISPATCH(f) (isa() == Isa::avx512 ? avx512::f : isa() == Isa::avx2 ? avx2::f : baseline::f)
#else
#define TORCHFAST_DISPATCH(f) baseline::f
#endif

#define TORCHFAST_ISA baseline
#define TORCHFAST_VECTOR_BYTES 16
#define TORCHFAST_LAST_ISA
#include "vec.h"

#endif
