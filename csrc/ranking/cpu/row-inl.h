// A query's scores, in the form that registers read.
#if defined(TORCHFAST_RANKING_CPU_ROW_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_RANKING_CPU_ROW_INL_H
#undef TORCHFAST_RANKING_CPU_ROW_INL_H
#else
#define TORCHFAST_RANKING_CPU_ROW_INL_H
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "memory/walk-inl.h"
#include "simd/vec-inl.h"

TORCHFAST_KERNELS

constexpr int64_t kChunk = 2048;  // scores that stay in L1

template <class S>
struct Row {
  const S* scores;
  int64_t stride, n;
};

// Calls f(scores, begin, n) for chunks of the row from begin to end. Their scores are widened, contiguous,
// and filled up with NaN to a full vector.
template <class R, class S, class F>
TORCHFAST_INLINE void for_each_chunk(const Row<S>& row, int64_t begin, int64_t end, const F& f) {
  constexpr int L = Simd<R>::lanes;
  R chunk[kChunk];
  for (int64_t i = begin, n; i < end; i += n) {
    n = std::min(kChunk, end - i);
    const S* x = row.scores + i * row.stride;
    if (std::is_same_v<S, R> && row.stride == 1 && n % L == 0) {
      f(reinterpret_cast<const R*>(x), i, n);
    } else {
      if (n % L) store(chunk + n / L * L, splat(R(NAN)));
      gather(x, row.stride, n, chunk);
      f(static_cast<const R*>(chunk), i, n);
    }
  }
}

// Counts the scores of a chunk that are not NaN.
template <class R>
TORCHFAST_INLINE int64_t count_numbers(const R* x, int64_t n) {
  IntVec<R> numbers{};
  for (int64_t i = 0; i < n; i += Simd<R>::lanes) {
    Vec<R> v = load<R>(x + i);
    count_if(numbers, v == v);
  }
  return sum_lanes<R>(numbers);
}

TORCHFAST_END_KERNELS

#endif
