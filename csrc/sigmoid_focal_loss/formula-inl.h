// The loss of a vector of logits, and its slope. All of the mathematics is in R = float (double for double
// logits).
#if defined(TORCHFAST_SIGMOID_FOCAL_LOSS_FORMULA_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_SIGMOID_FOCAL_LOSS_FORMULA_INL_H
#undef TORCHFAST_SIGMOID_FOCAL_LOSS_FORMULA_INL_H
#else
#define TORCHFAST_SIGMOID_FOCAL_LOSS_FORMULA_INL_H
#endif

#include <cmath>
#include <limits>

#include "sigmoid_focal_loss/call.h"
#include "simd/math-inl.h"

TORCHFAST_KERNELS

using sigmoid_focal_loss::Options;

// Keeps the first half of the digits: products of two such halves are exact.
template <class R>
TORCHFAST_INLINE Vec<R> leading_digits(Vec<R> x) {
  constexpr Int<R> rest = (Int<R>(1) << (sizeof(R) == 4 ? 12 : 27)) - 1;
  return bit_cast<Vec<R>>(bit_cast<IntVec<R>>(x) & ~rest);
}

// Multiplies; a factor of 0 gives 0 even where the value is inf or NaN.
template <class R>
TORCHFAST_INLINE Vec<R> times(Vec<R> factor, Vec<R> value) {
  return factor == 0 ? splat<R>(0) : factor * value;
}

// x^g for 0 <= x <= 1, where x = exp(-(a + b)). Powers other than the usual ones are made from a + b, which
// is exact where x itself has underflowed.
template <class R>
struct Power {
  explicit Power(double gamma)
      : integer(gamma == std::floor(gamma) && gamma <= 4 ? int(gamma) : -1),
        g(R(gamma)),
        high(leading_digits<R>(splat(g))[0]),
        low(g - high) {}

  TORCHFAST_INLINE Vec<R> operator()(Vec<R> x, Vec<R> a, Vec<R> b) const {
    if (integer == 2) return x * x;
    if (integer == 1) return x;
    if (integer == 4) return (x * x) * (x * x);
    if (integer == 3) return x * x * x;
    if (integer == 0) return splat<R>(1);
    a = a > R(1e6) ? splat(R(1e6)) : a;  // the factor beside this power is 0 there; inf - inf would be NaN
    Vec<R> a_high = leading_digits<R>(a), a_low = a - a_high;
    return exp_nonpositive(a_high * -high, -(a_low * high + a * low + b * g));
  }

  int integer;  // the exponent if it is 0 to 4, else -1
  R g, high, low;
};

// Which parts of the formula a kernel has. With one exponent for both sides they are mirror images.
enum class Mode { bce, focal, asymmetric };

constexpr double kLeastClip = 1e-30;  // a smaller clip counts as none, for p - clip could be subnormal

// A and B of the formula are linear in the target: A = y a1 + a0, B = (1 - y) b1 + b0.
template <class R>
struct Formula {
  Formula(const Options& o, double factor)
      : positive(o.gamma),
        negative(o.gamma_neg),
        clip(o.clip < kLeastClip ? R(0) : R(o.clip)),
        mode(clip > 0 || o.gamma != o.gamma_neg ? Mode::asymmetric
             : o.gamma > 0                      ? Mode::focal
                                                : Mode::bce) {
    double alpha = factor * (o.alpha < 0 ? 1 : o.alpha), beta = factor * (o.alpha < 0 ? 1 : 1 - o.alpha);
    a1 = R(alpha * (1 - o.label_smoothing)), a0 = R(alpha * o.label_smoothing / 2);
    b1 = R(beta * (1 - o.label_smoothing)), b0 = R(beta * o.label_smoothing / 2);
  }
  R a1, a0, b1, b0;
  Power<R> positive, negative;
  R clip;
  Mode mode;
};

// p = sigmoid(z), q = 1 - p and their logarithms, -log p = near + minus and -log q = near + plus, all made
// from exp(-|z|): so each keeps its digits where another rounds to 0 or 1.
template <class R>
struct Sides {
  static TORCHFAST_INLINE Sides of_magnitude(Vec<R> a) {
    Vec<R> e = exp_nonpositive(-a), large = R(1) / (e + R(1));
    return {large, e * large, log1p_unit(e), splat<R>(0), a};
  }
  TORCHFAST_INLINE Sides mirrored() const { return {q, p, near, plus, minus}; }
  // Gives the sides of -z where `negative`.
  TORCHFAST_INLINE Sides mirrored(IntVec<R> negative) const {
    return {negative ? q : p, negative ? p : q, near, negative ? plus : minus, negative ? minus : plus};
  }
  Vec<R> p, q, near, minus, plus;
};

template <class R>
TORCHFAST_INLINE Vec<R> magnitude(Vec<R> z) {
  return bit_cast<Vec<R>>(bit_cast<IntVec<R>>(z) & std::numeric_limits<Int<R>>::max());
}

// p^g (-log q): the loss of a negative whose probability is p. A positive has the loss of a negative at -z.
template <Mode mode, class R>
TORCHFAST_INLINE Vec<R> side_loss(const Sides<R>& s, const Power<R>& gamma) {
  if constexpr (mode == Mode::bce) return s.near + s.plus;
  return gamma(s.p, s.minus, s.near) * (s.near + s.plus);
}

template <Mode mode, class R>
TORCHFAST_INLINE Vec<R> side_slope(const Sides<R>& s, const Power<R>& gamma) {
  if constexpr (mode == Mode::bce) return s.p;
  return gamma(s.p, s.minus, s.near) * (s.p + s.q * (s.near + s.plus) * gamma.g);
}

// The loss of a negative, and its slope, with p_m = p - clip in place of p; 0 where p_m is not positive.
template <class R>
struct Clipped {
  TORCHFAST_INLINE Clipped(const Sides<R>& s, const Power<R>& gamma, R clip)
      : p_q(s.p * s.q), p_m(s.p - clip), rest(s.q + clip), g(gamma.g) {
    // 1 - p_m keeps the digits of q, and its logarithm those of p_m: `lost` is what rounding u has lost, and
    // the polynomial is close enough to 1 / u for it.
    Vec<R> u = p_m < R(0.5) ? R(1) - p_m : rest, lost = p_m < R(0.5) ? (R(1) - u) - p_m : splat<R>(0);
    minus_log = -(log_positive(u) + lost * ((p_m * R(2) + R(1)) * p_m + R(1)));
    if (gamma.integer < 0) {
      Vec<R> x = p_m > std::numeric_limits<R>::min() ? p_m : splat(std::numeric_limits<R>::min());
      power = gamma(x, -log_positive(x), splat<R>(0));
    } else {
      power = gamma(p_m, p_m, p_m);
    }
  }
  TORCHFAST_INLINE Vec<R> loss() const { return p_m <= 0 ? splat<R>(0) : power * minus_log; }
  TORCHFAST_INLINE Vec<R> slope() const {  // p q p_m^g (1 / rest + g minus_log / p_m), with one division
    return p_m <= 0 ? splat<R>(0) : p_q * power * (minus_log * rest * g + p_m) / (rest * p_m);
  }
  Vec<R> p_q, p_m, rest, minus_log, power;
  R g;
};

template <Mode mode, class R>
TORCHFAST_INLINE Vec<R> negative_loss(const Sides<R>& s, const Formula<R>& k) {
  if constexpr (mode == Mode::asymmetric)
    if (k.clip > 0) return Clipped<R>(s, k.negative, k.clip).loss();
  return side_loss<mode>(s, k.negative);
}

template <Mode mode, class R>
TORCHFAST_INLINE Vec<R> negative_slope(const Sides<R>& s, const Formula<R>& k) {
  if constexpr (mode == Mode::asymmetric)
    if (k.clip > 0) return Clipped<R>(s, k.negative, k.clip).slope();
  return side_slope<mode>(s, k.negative);
}

// What multiplies the sides. A soft target has both A and B of the formula. A hard one, 0 or 1, has one of
// them, and takes the side of z or of -z.
template <class R>
struct Soft {
  Vec<R> a, b;
};
template <class R>
struct Hard {
  IntVec<R> positive;
  Vec<R> factor;
};

template <Mode mode, class R>
TORCHFAST_INLINE Vec<R> loss_of(Vec<R> z, const Soft<R>& f, const Formula<R>& k) {
  auto s = Sides<R>::of_magnitude(magnitude<R>(z));
  if constexpr (mode == Mode::asymmetric) {
    s = s.mirrored(z < 0);
    return times<R>(f.a, side_loss<mode>(s.mirrored(), k.positive)) +
           times<R>(f.b, negative_loss<mode>(s, k));
  }
  return times<R>(z < 0 ? f.a : f.b, side_loss<mode>(s, k.positive)) +
         times<R>(z < 0 ? f.b : f.a, side_loss<mode>(s.mirrored(), k.positive));
}

template <Mode mode, class R>
TORCHFAST_INLINE Vec<R> loss_of(Vec<R> z, const Hard<R>& f, const Formula<R>& k) {
  z = f.positive ? -z : z;
  auto s = Sides<R>::of_magnitude(magnitude<R>(z)).mirrored(z < 0);
  Vec<R> loss = side_loss<mode>(s, k.positive);
  if constexpr (mode == Mode::asymmetric) loss = f.positive ? loss : negative_loss<mode>(s, k);
  return times<R>(f.factor, loss);
}

// exp(-|z|) is 0 far out, and so is p or q; times softplus(|z|) it must be 0, also for infinite z.
template <class R>
TORCHFAST_INLINE Sides<R> sides_for_gradient(Vec<R> z) {
  Vec<R> a = magnitude<R>(z);
  auto s = Sides<R>::of_magnitude(a);
  s.plus = -a < kLeastExponent<R> ? splat<R>(0) : a;
  return s;
}

template <Mode mode, class R>
TORCHFAST_INLINE Vec<R> gradient_of(Vec<R> z, const Soft<R>& f, const Formula<R>& k) {
  auto s = sides_for_gradient<R>(z);
  if constexpr (mode == Mode::asymmetric) {
    s = s.mirrored(z < 0);
    return times<R>(f.b, negative_slope<mode>(s, k)) -
           times<R>(f.a, side_slope<mode>(s.mirrored(), k.positive));
  }
  Vec<R> g = times<R>(z < 0 ? f.a : f.b, side_slope<mode>(s, k.positive)) -
             times<R>(z < 0 ? f.b : f.a, side_slope<mode>(s.mirrored(), k.positive));
  return z < 0 ? -g : g;
}

template <Mode mode, class R>
TORCHFAST_INLINE Vec<R> gradient_of(Vec<R> z, const Hard<R>& f, const Formula<R>& k) {
  z = f.positive ? -z : z;
  auto s = sides_for_gradient<R>(z).mirrored(z < 0);
  Vec<R> slope = side_slope<mode>(s, k.positive);
  if constexpr (mode == Mode::asymmetric) slope = f.positive ? slope : negative_slope<mode>(s, k);
  return times<R>(f.positive ? -f.factor : f.factor, slope);
}

TORCHFAST_END_KERNELS

#endif
