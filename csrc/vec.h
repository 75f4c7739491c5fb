// The portable SIMD vector: TORCHFAST_VECTOR_BYTES of GCC/Clang vector extension, one register of the
// instruction set that foreach_isa.h is compiling for. Loops that GCC vectorises by itself took 3.5
// times as long as these (2048 x 32000 softmax).
//
// No include guard: the contents are compiled once per instruction set, in its namespace.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "common.h"

namespace torchfast::TORCHFAST_ISA {
namespace {

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
  return value - Vec<R>{};  // a broadcast; 0 + value is an addition, for the sake of -0.0
}

// ---- Conversions: half precision is widened and rounded (to nearest even) in registers --------

template <class R>
TORCHFAST_INLINE Vec<R> load(const R* p) {
  Vec<R> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

// The same bit arithmetic on one word and on a vector of them; F is the float(s) of W's size.
template <class F, class W>
TORCHFAST_INLINE F from_f16(W w) {
  W magnitude = (w & 0x7fff) << 13;
  // 2^112 moves the exponent's bias from 15 to 127, subnormals included; inf and NaN by hand.
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
  h = magnitude >= 0x477ff000 ? W{} + 0x7c00 : h;  // 65520 and more, inf
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

// body(index, accumulator, count) over n elements, `unroll` vectors a step, each with an accumulator of
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

// v where the lane holds an element, `other` in the idle lanes of a partial vector.
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

// Adds 1 where the condition holds. Of doubles it is a vector of long or long long: compilers differ.
template <class I, class Condition>
TORCHFAST_INLINE void count_if(I& counts, Condition condition) {
#if TORCHFAST_VECTOR_BYTES == 64
  counts = condition ? counts + 1 : counts;  // one addition under a mask
#else
  counts -= (I)condition;
#endif
}

// Bit i is the i-th lane's, of a vector of integers 0 and -1.
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

// Of a vector of any integers, those that are not 0.
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

// Lanes where a > b, and where a == b: lane_bits without a detour by a vector where there is a way.
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

// Half precision (or R itself) to R, or back.
template <class R, class From, class To>
void convert(const From* x, To* y, int64_t n) {
  for_each_vec<R>(n, [&](int64_t i, int, auto count) __attribute__((always_inline)) {
    store_n<R>(y + i, load_n<R>(x + i, count), count);
  });
}

// ---- Functions ------------------------------------------------------------------------------

// Below it exp() is no normal number.
template <class R>
constexpr R kLeastExponent = std::is_same_v<R, float> ? R(-87.3365) : R(-708.39);

// exp(x) for x <= 0, NaN for NaN, 0 below kLeastExponent. exp(r) = 1 + r + r^2 q(r) on
// |r| <= log(2)/2, q fitted at Chebyshev nodes: relative error 1e-8 and 2e-17 before rounding. The
// scale 2^n is multiplied in, not added to the exponent's bits: those of a NaN could turn finite.
// `low` makes the argument x + low, more precise than one number.
TORCHFAST_INLINE Vec<float> exp_nonpositive(Vec<float> x, auto... low) {
  constexpr float magic = 0x1.8p23f + 127;  // rounds to an integer, held in the low bits
  Vec<float> sum = (x + ... + low);
  Vec<float> t = sum * 1.44269504f + magic;
  Vec<float> n = t - magic;
  Vec<float> r = x - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
  r = (r + ... + low);
  Vec<float> r2 = r * r, q2 = r * 8.36377387e-3f + 4.16665501e-2f;
  Vec<float> q = r * 1.66665734e-1f + 0.5f;
  q = (r2 * 1.39269266e-3f + q2) * r2 + q;
  q = q * r2 + r + 1.0f;
  Vec<float> scale = bit_cast<Vec<float>>(bit_cast<IntVec<float>>(t) << 23);
  return sum < kLeastExponent<float> ? splat(0.0f) : q * scale;
}

TORCHFAST_INLINE Vec<double> exp_nonpositive(Vec<double> x, auto... low) {
  constexpr double magic = 0x1.8p52 + 1023;
  Vec<double> sum = (x + ... + low);
  Vec<double> t = sum * 1.4426950408889634 + magic;
  Vec<double> n = t - magic;
  Vec<double> r = x - n * 0x1.62e42feep-1;
  r = r - n * 0x1.a39ef35793c76p-33;
  r = (r + ... + low);
  Vec<double> q = r * 2.51013469283503402e-8 + 2.76213386691429238e-7;
  q = q * r + 2.75572664186123037e-6;
  q = q * r + 2.48015186413959936e-5;
  q = q * r + 1.98412698643805133e-4;
  q = q * r + 1.38888889189391678e-3;
  q = q * r + 8.3333333333297935e-3;
  q = q * r + 4.16666666666206386e-2;
  q = q * r + 1.66666666666666675e-1;
  q = q * r + 0.5;
  q = (q * r) * r + r + 1.0;
  Vec<double> scale = bit_cast<Vec<double>>(bit_cast<IntVec<double>>(t) << 52);
  return sum < kLeastExponent<double> ? splat(0.0) : q * scale;
}

// log(x) for normal x > 0 (Cephes logf), about 1 ulp.
TORCHFAST_INLINE Vec<float> log_positive(Vec<float> x) {
  // Mantissa in [sqrt(1/2), sqrt(2)): 0x3f3504f3 is sqrt(1/2). Unsigned, for lanes that are not positive.
  IntVec<float> shifted = bit_cast<IntVec<float>>(bit_cast<WordBits>(x) - 0x3f3504f3u);
  Vec<float> e = __builtin_convertvector(shifted >> 23, Vec<float>);
  Vec<float> f = bit_cast<Vec<float>>((shifted & 0x7fffff) + 0x3f3504f3) - 1.0f;
  Vec<float> q = f * 7.0376836292e-2f - 1.1514610310e-1f;
  q = q * f + 1.1676998740e-1f;
  q = q * f - 1.2420140846e-1f;
  q = q * f + 1.4249322787e-1f;
  q = q * f - 1.6668057665e-1f;
  q = q * f + 2.0000714765e-1f;
  q = q * f - 2.4999993993e-1f;
  q = q * f + 3.3333331174e-1f;
  Vec<float> f2 = f * f;
  Vec<float> low = q * f2 * f + e * -2.12194440e-4f - f2 * 0.5f;
  return f + low + e * 0.693359375f;
}

// log(1 + x) for x >= 0, NaN for NaN.
TORCHFAST_INLINE Vec<float> log1p_nonnegative(Vec<float> x) {
  Vec<float> u = x + 1.0f;
  Vec<float> result = log_positive(u) + (x - (u - 1.0f)) / u;
  return x == x ? result : x;
}

// log(1 + x) for 0 <= x <= 1, NaN for NaN: x - x^2 q(x), fitted for the least relative error (3e-8
// before rounding), 1.7 ulp. Summed in pairs (Estrin): Horner's chain of ten would be waited for.
TORCHFAST_INLINE Vec<float> log1p_unit(Vec<float> x) {
  Vec<float> x2 = x * x, x4 = x2 * x2;
  Vec<float> q0 = x * 3.33213211e-1f - 4.99996479e-1f;
  Vec<float> q2 = x * 1.91536057e-1f - 2.48571513e-1f;
  Vec<float> q4 = x * 7.92032837e-2f - 1.37536967e-1f;
  Vec<float> q6 = x * 5.36463147e-3f - 3.00650211e-2f;
  q4 = q6 * x2 + q4;
  q0 = q2 * x2 + q0;
  return (q4 * x4 + q0) * x2 + x;
}

TORCHFAST_INLINE Vec<float> tanh(Vec<float> x) {
  Vec<float> a = x < 0 ? -x : x;
  Vec<float> x2 = x * x;
  Vec<float> q = x2 * -5.70498872745e-3f + 2.06390887954e-2f;  // Cephes tanhf
  q = q * x2 - 5.37397155531e-2f;
  q = q * x2 + 1.33314422036e-1f;
  q = q * x2 - 3.33332819422e-1f;
  Vec<float> small = q * x2 * x + x;
  Vec<float> e = exp_nonpositive(a * -2.0f);
  Vec<float> large = (1.0f - e) / (1.0f + e);
  large = x < 0 ? -large : large;
  return a < 0.625f ? small : large;
}

// Double precision is for checking, not for speed: these go through libm, lane by lane.
TORCHFAST_INLINE Vec<double> log_positive(Vec<double> x) {
  for (int i = 0; i < Simd<double>::lanes; ++i) x[i] = std::log(x[i]);
  return x;
}
TORCHFAST_INLINE Vec<double> log1p_nonnegative(Vec<double> x) {
  for (int i = 0; i < Simd<double>::lanes; ++i) x[i] = std::log1p(x[i]);
  return x;
}
TORCHFAST_INLINE Vec<double> log1p_unit(Vec<double> x) { return log1p_nonnegative(x); }
TORCHFAST_INLINE Vec<double> tanh(Vec<double> x) {
  for (int i = 0; i < Simd<double>::lanes; ++i) x[i] = std::tanh(x[i]);
  return x;
}

}  // namespace
}  // namespace torchfast::TORCHFAST_ISA
