// exp, log, log1p and tanh of vectors, on the parts of their domains that the losses need.
// tests/kernels/math.cpp holds each to the error that is stated here.
#if defined(TORCHFAST_SIMD_MATH_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_SIMD_MATH_INL_H
#undef TORCHFAST_SIMD_MATH_INL_H
#else
#define TORCHFAST_SIMD_MATH_INL_H
#endif

#include <cmath>

#include "simd/vec-inl.h"

TORCHFAST_KERNELS

// exp() of anything less is no normal number.
template <class R>
constexpr R kLeastExponent = std::is_same_v<R, float> ? R(-87.3365) : R(-708.39);

// exp(x) for x <= 0, NaN for NaN, 0 below kLeastExponent. exp(r) = 1 + r + r^2 q(r) on
// |r| <= log(2)/2, q fitted at Chebyshev nodes: relative error 1e-8 and 2e-17 before rounding,
// at most 1.25 ulp of floats and 1 of doubles after it. The scale 2^n is multiplied in, not added to the
// exponent's bits: those of a NaN could turn finite. `low` makes the argument x + low, more precise than one
// number.
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

// log(x) for normal x > 0 (Cephes logf), at most 0.9 ulp.
TORCHFAST_INLINE Vec<float> log_positive(Vec<float> x) {
  // Mantissa in [sqrt(1/2), sqrt(2)): 0x3f3504f3 is sqrt(1/2). It is unsigned for the sake of lanes
  // that are not positive.
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

// log(1 + x) for finite x >= 0, at most 1.25 ulp; NaN for NaN.
TORCHFAST_INLINE Vec<float> log1p_nonnegative(Vec<float> x) {
  Vec<float> u = x + 1.0f;
  Vec<float> result = log_positive(u) + (x - (u - 1.0f)) / u;
  return x == x ? result : x;
}

// log(1 + x) for 0 <= x <= 1, NaN for NaN: x - x^2 q(x), fitted for the least relative error (3e-8
// before rounding), at most 1.7 ulp. Summed in pairs (Estrin): Horner's chain of ten would be waited for.
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

// tanh(x), at most 1.6 ulp.
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

TORCHFAST_END_KERNELS

#endif
