// The portable SIMD vector: TORCHFAST_VECTOR_BYTES of GCC/Clang vector extension, one register of the
// instruction set that foreach_isa.h is compiling for. Loops that GCC vectorises by itself took 3.5
// times as long as these (2048 x 32000 softmax).
#if defined(TORCHFAST_SIMD_VEC_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_SIMD_VEC_INL_H
#undef TORCHFAST_SIMD_VEC_INL_H
#else
#define TORCHFAST_SIMD_VEC_INL_H
#endif

#include <cstdint>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "simd/isa.h"

TORCHFAST_KERNELS

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class R>
struct Simd;
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(TORCHFAST_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(TORCHFAST_VECTOR_BYTES)));
  using Int = int32_t;
  static constexpr int lanes = TORCHFAST_VECTOR_BYTES / 4;
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(TORCHFAST_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(TORCHFAST_VECTOR_BYTES)));
  using Int = int64_t;
  static constexpr int lanes = TORCHFAST_VECTOR_BYTES / 8;
};
template <class R>
using Vec = typename Simd<R>::V;
template <class R>
using IntVec = typename Simd<R>::I;
template <class R>
using Int = typename Simd<R>::Int;
typedef uint16_t HalfBits __attribute__((vector_size(TORCHFAST_VECTOR_BYTES / 2)));
typedef uint32_t WordBits __attribute__((vector_size(TORCHFAST_VECTOR_BYTES)));

template <class To, class From>
TORCHFAST_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <class R>
TORCHFAST_INLINE Vec<R> splat(R value) {
  return value - Vec<R>{};  // a broadcast; 0 + value would be an addition, for the sake of -0.0
}

// ---- Conversions: half precision is widened and rounded (to nearest even) in registers --------

template <class R>
TORCHFAST_INLINE Vec<R> load(const R* p) {
  Vec<R> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

// This bit arithmetic serves one word and a vector of words; F is the float or floats of W's size.
template <class F, class W>
TORCHFAST_INLINE F from_f16(W w) {
  W magnitude = (w & 0x7fff) << 13;
  // 2^112 moves the exponent's bias from 15 to 127, subnormals included, but not that of inf and NaN.
  W finite = bit_cast<W>(bit_cast<F>(magnitude) * 0x1p112f);
  return bit_cast<F>((magnitude >= (0x7c00u << 13) ? magnitude | (0xffu << 23) : finite) | (w & 0x8000)
                                                                                               << 16);
}

template <class W, class F>
TORCHFAST_INLINE W to_f16(F v) {
  W w = bit_cast<W>(v);
  W magnitude = w & 0x7fffffff;
  W normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  W subnormal = bit_cast<W>(bit_cast<F>(magnitude) + 0.5f) - (126u << 23);
  W h = magnitude < (113u << 23) ? subnormal : normal;
  h = magnitude >= 0x477ff000 ? W{} + 0x7c00 : h;  // 65520 and more become inf
  h = magnitude > 0x7f800000 ? W{} + 0x7e00 : h;
  return h | (w & 0x80000000) >> 16;
}

template <class W, class F>
TORCHFAST_INLINE W to_bf16(F v) {
  W w = bit_cast<W>(v);
  W rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
  return (w & 0x7fffffff) > 0x7f800000 ? W{} + 0x7fc0 : rounded;
}

TORCHFAST_INLINE float to_real(float x) { return x; }
TORCHFAST_INLINE double to_real(double x) { return x; }
TORCHFAST_INLINE float to_real(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
TORCHFAST_INLINE float to_real(f16 x) { return from_f16<float>(uint32_t(x.bits)); }
TORCHFAST_INLINE void from_real(float* p, float x) { *p = x; }
TORCHFAST_INLINE void from_real(double* p, double x) { *p = x; }
TORCHFAST_INLINE void from_real(bf16* p, float x) { p->bits = to_bf16<uint32_t>(x); }
TORCHFAST_INLINE void from_real(f16* p, float x) { p->bits = to_f16<uint32_t>(x); }

template <class R>
TORCHFAST_INLINE Vec<R> load(const bf16* p) {
  HalfBits h;
  __builtin_memcpy(&h, p, sizeof(h));
  return bit_cast<Vec<float>>(__builtin_convertvector(h, WordBits) << 16);
}

template <class R>
TORCHFAST_INLINE Vec<R> load(const f16* p) {
  HalfBits h;
  __builtin_memcpy(&h, p, sizeof(h));
  return from_f16<Vec<float>>(__builtin_convertvector(h, WordBits));
}

template <class R>
TORCHFAST_INLINE void store(R* p, Vec<R> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

TORCHFAST_INLINE void store(bf16* p, Vec<float> v) {
  HalfBits h = __builtin_convertvector(to_bf16<WordBits>(v), HalfBits);
  __builtin_memcpy(p, &h, sizeof(h));
}

TORCHFAST_INLINE void store(f16* p, Vec<float> v) {
  HalfBits h = __builtin_convertvector(to_f16<WordBits>(v), HalfBits);
  __builtin_memcpy(p, &h, sizeof(h));
}

// A partial vector: n < lanes elements; the other lanes read as 0.
template <class R, class T>
TORCHFAST_INLINE Vec<R> load_first(const T* p, int64_t n) {
#if TORCHFAST_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>) return _mm512_maskz_loadu_ps((1u << n) - 1, p);
  if constexpr (std::is_same_v<T, double>) return _mm512_maskz_loadu_pd((1u << n) - 1, p);
#endif
  T buffer[Simd<R>::lanes] = {};
  __builtin_memcpy(buffer, p, n * sizeof(T));
  return load<R>(buffer);
}

template <class R, class T>
TORCHFAST_INLINE void store_first(T* p, Vec<R> v, int64_t n) {
  T buffer[Simd<R>::lanes];
  store(buffer, v);
  __builtin_memcpy(p, buffer, n * sizeof(T));
}

// Calls body(index, accumulator, count) over n elements, `unroll` vectors a step, each with an accumulator of
// its own. `count` is a compile-time constant but for the partial vector at the end.
template <class R, int unroll = 4, class Body>
TORCHFAST_INLINE void for_each_vec(int64_t n, const Body& body) {
  constexpr int L = Simd<R>::lanes;
  int64_t i = 0;
  if constexpr (unroll == 4) {
    for (; i + 4 * L <= n; i += 4 * L) {
      body(i, 0, std::integral_constant<int64_t, L>{});
      body(i + L, 1, std::integral_constant<int64_t, L>{});
      body(i + 2 * L, 2, std::integral_constant<int64_t, L>{});
      body(i + 3 * L, 3, std::integral_constant<int64_t, L>{});
    }
  }
  for (; i + L <= n; i += L) body(i, 0, std::integral_constant<int64_t, L>{});
  if (i < n) body(i, 0, n - i);
}

template <class R, class T, class Count>
TORCHFAST_INLINE Vec<R> load_n(const T* p, Count n) {
  if constexpr (std::is_same_v<Count, int64_t>)
    return load_first<R>(p, n);
  else
    return load<R>(p);
}

template <class R, class T, class Count>
TORCHFAST_INLINE void store_n(T* p, Vec<R> v, Count n) {
  if constexpr (std::is_same_v<Count, int64_t>)
    store_first<R>(p, v, n);
  else
    store(p, v);
}

// Keeps v where the lane holds an element, and puts `other` into the idle lanes of a partial vector.
template <class R, class Count>
TORCHFAST_INLINE Vec<R> only_n(Vec<R> v, Count n, R other) {
  if constexpr (std::is_same_v<Count, int64_t>)
    for (int64_t i = n; i < Simd<R>::lanes; ++i) v[i] = other;
  return v;
}

// Lanes are combined as a tree: one after the other they would wait for each other.
template <class T, class V, class Op>
TORCHFAST_INLINE T reduce_lanes(V v, const Op& op) {
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  T t[lanes];
  for (int i = 0; i < lanes; ++i) t[i] = v[i];
  for (int half = lanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) t[i] = op(t[i], t[i + half]);
  return t[0];
}

template <class R>
TORCHFAST_INLINE double sum_lanes(Vec<R> v) {
  return reduce_lanes<double>(v, [](double a, double b) __attribute__((always_inline)) { return a + b; });
}

template <class R>
TORCHFAST_INLINE int64_t sum_lanes(IntVec<R> v) {
  return reduce_lanes<int64_t>(v, [](int64_t a, int64_t b) __attribute__((always_inline)) { return a + b; });
}

template <class R>
TORCHFAST_INLINE R max_lanes(Vec<R> v) {
  return reduce_lanes<R>(v, [](R a, R b) __attribute__((always_inline)) { return b > a ? b : a; });
}

// ---- Comparisons: counted, or as bits of an integer -------------------------------------------

// Adds 1 where the condition holds. For doubles that is a vector of long or long long: compilers differ.
template <class I, class Condition>
TORCHFAST_INLINE void count_if(I& counts, Condition condition) {
#if TORCHFAST_VECTOR_BYTES == 64
  counts = condition ? counts + 1 : counts;  // one addition under a mask
#else
  counts -= (I)condition;
#endif
}

// Bit i tells if lane i is -1; all lanes must be 0 or -1.
template <class I>
TORCHFAST_INLINE uint64_t lane_bits(I condition) {
  constexpr int size = sizeof(condition[0]);
#if TORCHFAST_VECTOR_BYTES == 64
  if constexpr (size == 1) return _mm512_movepi8_mask((__m512i)condition);
  if constexpr (size == 2) return _mm512_movepi16_mask((__m512i)condition);
  if constexpr (size == 4) return _mm512_movepi32_mask((__m512i)condition);
  if constexpr (size == 8) return _mm512_movepi64_mask((__m512i)condition);
#elif TORCHFAST_VECTOR_BYTES == 32
  if constexpr (size == 1) return uint32_t(_mm256_movemask_epi8((__m256i)condition));
  if constexpr (size == 2)
    return uint32_t(_mm_movemask_epi8(_mm_packs_epi16(_mm256_castsi256_si128((__m256i)condition),
                                                      _mm256_extracti128_si256((__m256i)condition, 1))));
  if constexpr (size == 4) return _mm256_movemask_ps((__m256)condition);
  if constexpr (size == 8) return _mm256_movemask_pd((__m256d)condition);
#elif defined(__x86_64__)
  if constexpr (size == 1) return _mm_movemask_epi8((__m128i)condition);
  if constexpr (size == 2) return _mm_movemask_epi8(_mm_packs_epi16((__m128i)condition, __m128i{}));
  if constexpr (size == 4) return _mm_movemask_ps((__m128)condition);
  if constexpr (size == 8) return _mm_movemask_pd((__m128d)condition);
#else
  uint64_t bits = 0;
  for (size_t i = 0; i < sizeof(condition) / size; ++i) bits |= uint64_t(condition[i] & 1) << i;
  return bits;
#endif
}

// Bit i tells if lane i, which may be any integer, is not 0.
template <class I>
TORCHFAST_INLINE uint64_t nonzero_bits(I v) {
#if TORCHFAST_VECTOR_BYTES == 64
  constexpr int size = sizeof(v[0]);
  if constexpr (size == 1) return _mm512_test_epi8_mask((__m512i)v, (__m512i)v);
  if constexpr (size == 2) return _mm512_test_epi16_mask((__m512i)v, (__m512i)v);
  if constexpr (size == 4) return _mm512_test_epi32_mask((__m512i)v, (__m512i)v);
  if constexpr (size == 8) return _mm512_test_epi64_mask((__m512i)v, (__m512i)v);
#else
  return lane_bits(v != 0);
#endif
}

// The bits of lanes where a > b, or where a == b: in one instruction where there is one, else by lane_bits.
TORCHFAST_INLINE uint64_t larger_bits(Vec<float> a, Vec<float> b) {
#if TORCHFAST_VECTOR_BYTES == 64
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
#else
  return lane_bits(a > b);
#endif
}
TORCHFAST_INLINE uint64_t larger_bits(Vec<double> a, Vec<double> b) {
#if TORCHFAST_VECTOR_BYTES == 64
  return _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ);
#else
  return lane_bits(a > b);
#endif
}
TORCHFAST_INLINE uint64_t equal_bits(Vec<float> a, Vec<float> b) {
#if TORCHFAST_VECTOR_BYTES == 64
  return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ);
#else
  return lane_bits(a == b);
#endif
}
TORCHFAST_INLINE uint64_t equal_bits(Vec<double> a, Vec<double> b) {
#if TORCHFAST_VECTOR_BYTES == 64
  return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ);
#else
  return lane_bits(a == b);
#endif
}

// Converts half precision (or R itself) to R, or back.
template <class R, class From, class To>
void convert(const From* x, To* y, int64_t n) {
  for_each_vec<R>(n, [&](int64_t i, int, auto count) __attribute__((always_inline)) {
    store_n<R>(y + i, load_n<R>(x + i, count), count);
  });
}

TORCHFAST_END_KERNELS

#endif
