// Scores, and how many of them are larger than some, and how many the same.
#if defined(TORCHFAST_RANKING_CPU_COMPARE_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_RANKING_CPU_COMPARE_INL_H
#undef TORCHFAST_RANKING_CPU_COMPARE_INL_H
#else
#define TORCHFAST_RANKING_CPU_COMPARE_INL_H
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "memory/walk-inl.h"
#include "simd/vec-inl.h"

TORCHFAST_KERNELS

constexpr int64_t kChunk = 2048;  // scores that stay in L1

template <class S>
struct Row {
  const S* scores;
  int64_t stride, n;
};

// f(scores, begin, n) for chunks of the row from begin to end, in the form that registers read: widened,
// contiguous, filled up with NaN to a full vector.
template <class R, class S, class F>
TORCHFAST_INLINE void for_each_chunk(const Row<S>& row, int64_t begin, int64_t end, const F& f) {
  constexpr int L = Simd<R>::lanes;
  R chunk[kChunk];
  bool direct = std::is_same_v<S, R> && row.stride == 1;
  for (int64_t i = begin, n; i < end; i += n) {
    n = std::min(kChunk, end - i);
    const S* x = row.scores + i * row.stride;
    if (direct && n >= L) {
      n = n / L * L;
      f(reinterpret_cast<const R*>(x), i, n);
    } else {
      if (n % L) store(chunk + n / L * L, splat(R(NAN)));
      gather(x, row.stride, n, chunk);
      f(static_cast<const R*>(chunk), i, n);
    }
  }
}

// Comparisons are counted in vectors of at most 32 bytes: those of 64 leave their results in mask registers,
// which took 1.3 times as long (Zen 4).
constexpr int kNarrow = TORCHFAST_VECTOR_BYTES < 32 ? TORCHFAST_VECTOR_BYTES : 32;
template <class R>
struct Narrow {
  static constexpr int lanes = kNarrow / sizeof(R);
  typedef R V __attribute__((vector_size(kNarrow)));
  typedef Int<R> I __attribute__((vector_size(kNarrow)));
};

// How many documents have a larger score than some one, and how many the same; lane by lane.
template <class R>
struct Counts {
  using V = typename Narrow<R>::V;
  using I = typename Narrow<R>::I;
  TORCHFAST_INLINE void add(V scores, V one) {
    larger -= (I)(scores > one);
    equal -= (I)(scores == one);
  }
  TORCHFAST_INLINE void add(const Counts& other) { larger += other.larger, equal += other.equal; }
  I larger{}, equal{};
};

// f(vector) for the scores x[0 .. n), filled up with NaN.
template <class R, class F>
TORCHFAST_INLINE void for_each_narrow(const R* x, int64_t n, const F& f) {
  using V = typename Narrow<R>::V;
  using I = typename Narrow<R>::I;
  constexpr int L = Narrow<R>::lanes;
  V v;
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    __builtin_memcpy(&v, x + i, sizeof(v));
    f(v);
  }
  if (i == n) return;
  I lane;
  for (int j = 0; j < L; ++j) lane[j] = j;
  if (n >= L) {  // the last vector begins earlier
    __builtin_memcpy(&v, x + n - L, sizeof(v));
    v = lane < Int<R>(i + L - n) - I{} ? R(NAN) - V{} : v;
  } else {
    R rest[L] = {};
    __builtin_memcpy(rest, x, n * sizeof(R));
    __builtin_memcpy(&v, rest, sizeof(v));
    v = lane < Int<R>(n) - I{} ? v : R(NAN) - V{};
  }
  f(v);
}

template <class I>
TORCHFAST_INLINE int64_t sum_of(I lanes) {
  return reduce_lanes<int64_t>(lanes,
                               [](int64_t a, int64_t b) __attribute__((always_inline)) { return a + b; });
}

// The sums of the lanes of so many counts, of fewer than 2^15 documents. Writes up to the next multiple of 4.
template <class R, int scores>
TORCHFAST_INLINE void sum_counts(const Counts<R>* counts, Int<R>* larger, Int<R>* equal) {
#if TORCHFAST_VECTOR_BYTES >= 32
  if constexpr (sizeof(R) == 4) {
    __m256i both[(scores + 3) / 4 * 4] = {};
    for (int j = 0; j < scores; ++j) both[j] = (__m256i)(counts[j].larger | counts[j].equal << 16);
    for (int j = 0; j < scores; j += 4) {
      __m256i halves = _mm256_hadd_epi32(_mm256_hadd_epi32(both[j], both[j + 1]),
                                         _mm256_hadd_epi32(both[j + 2], both[j + 3]));
      __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(larger + j), _mm_and_si128(sums, _mm_set1_epi32(0xffff)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(equal + j), _mm_srli_epi32(sums, 16));
    }
    return;
  }
#endif
  for (int j = 0; j < scores; ++j) {
    larger[j] = Int<R>(sum_of(counts[j].larger));
    equal[j] = Int<R>(sum_of(counts[j].equal));
  }
}

// How many of x[0 .. n) are not NaN.
template <class R>
TORCHFAST_INLINE int64_t count_numbers(const R* x, int64_t n) {
  typename Narrow<R>::I numbers{};
  for_each_narrow(x, n,
                  [&](auto v) __attribute__((always_inline)) { numbers -= (typename Narrow<R>::I)(v == v); });
  return sum_of(numbers);
}

// f(first, counts) of x[0 .. n) against each of so many scores, from score[first] on.
template <int scores, class R, class F>
TORCHFAST_INLINE void compare(const R* x, int64_t n, const R* score, int64_t first, const F& f) {
  typename Narrow<R>::V s[scores];
  Counts<R> counts[scores];
  for (int j = 0; j < scores; ++j) s[j] = score[first + j] - typename Narrow<R>::V{};
  for_each_narrow(x, n, [&](auto v) __attribute__((always_inline)) {
    for (int j = 0; j < scores; ++j) counts[j].add(v, s[j]);
  });
  f(first, std::integral_constant<int, scores>(), counts);
}

template <class R, class F, int... less>
TORCHFAST_INLINE void compare_all(const R* x, int64_t n, const R* score, int64_t scores, const F& f,
                                  std::integer_sequence<int, less...>) {
  constexpr int kAtOnce = sizeof...(less);
  for (int64_t j = 0; j < scores; j += kAtOnce)
    (void)((std::min<int64_t>(scores - j, kAtOnce) == less + 1 ? (compare<less + 1>(x, n, score, j, f), true)
                                                               : false) ||
           ...);
}

template <class R, class F>
TORCHFAST_INLINE void compare_all(const R* x, int64_t n, const R* score, int64_t scores, const F& f) {
  constexpr int kAtOnce = TORCHFAST_VECTOR_BYTES == 64 ? 8 : 4;  // by the number of registers
  compare_all(x, n, score, scores, f, std::make_integer_sequence<int, kAtOnce>());
}

// Bits of those of 1 to 64 numbers that are not 1. Reads whole vectors.
template <class R>
TORCHFAST_INLINE uint64_t not_one(const Int<R>* x, int64_t n) {
  uint64_t bits = 0;
  for (int64_t i = 0; i < n; i += Simd<R>::lanes) {
    IntVec<R> v;
    __builtin_memcpy(&v, x + i, sizeof(v));
    bits |= nonzero_bits(v - 1) << i;
  }
  return bits << (64 - n) >> (64 - n);
}

TORCHFAST_END_KERNELS

#endif
