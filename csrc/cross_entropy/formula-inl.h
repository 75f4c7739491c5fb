// The formula of softmax cross entropy, label smoothing and focal loss, lane by lane; its derivation:
// torchfast/losses/cross_entropy/__init__.py.
#if defined(TORCHFAST_CROSS_ENTROPY_FORMULA_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_CROSS_ENTROPY_FORMULA_INL_H
#undef TORCHFAST_CROSS_ENTROPY_FORMULA_INL_H
#else
#define TORCHFAST_CROSS_ENTROPY_FORMULA_INL_H
#endif

#include <limits>

#include "simd/math-inl.h"
#include "simd/vec-inl.h"

TORCHFAST_KERNELS

// What u_c, the weighted target distribution, looks like along a row (the index target's own
// (1-e) w_t a_t is added apart).
enum class U { none, uniform, classes, probs };

// What makes u_c besides the index target's own class.
template <class R>
struct Weights {
  const R* classes;  // w a e/K of each class; w a for probabilities
  const R* probs;    // probabilities y of this row or tile
  R keep, uniform;   // 1-e, e/K
};

template <class R>
struct Focal {
  Vec<R> loss;  // (1-p)^gamma (-L)
  Vec<R> psi;   // -(1-p)^gamma (1 + gamma p r)
};

template <class R>
TORCHFAST_INLINE Vec<R> power(Vec<R> x, R gamma) {  // 0 <= x <= 1, gamma > 0
  if (gamma == R(1)) return x;
  if (gamma == R(2)) return x * x;
  Vec<R> y = log_positive(x) * gamma;
  return x > std::numeric_limits<R>::min() ? exp_nonpositive(y < 0 ? y : y - y) : splat<R>(0);
}

// d = z - m; the row's largest term is left out of rest, so 1 - p is exact for p near 1 too.
template <class R>
TORCHFAST_INLINE Focal<R> focal_terms(Vec<R> d, Vec<R> e, Vec<R> rest, Vec<R> log1p_rest, R gamma) {
  Vec<R> inv = R(1) / (rest + R(1));
  Vec<R> p = e * inv;
  Vec<R> one_minus_p = d == 0 ? rest * inv : R(1) - p;
  Vec<R> minus_log_p = log1p_rest - d;
  Vec<R> f = power<R>(one_minus_p, gamma);
  Vec<R> p_r = one_minus_p == 0 ? p : p * minus_log_p / one_minus_p;
  p_r = p == 0 ? p : p_r;  // 0 * inf would be NaN
  return {f * minus_log_p, -f * (p_r * gamma + R(1))};
}

// (u_j psi_j (1 - p_j) + p_j (u_j psi_j - sum u psi + z_term)) upstream: the formula of the gradient,
// arranged so that it keeps its digits where p_j rounds to 1.
template <class R>
TORCHFAST_INLINE Vec<R> accurate_gradient(Vec<R> d, Vec<R> e, Vec<R> own, Vec<R> rest, Vec<R> u_psi,
                                          Vec<R> z_term, Vec<R> upstream) {
  Vec<R> inv = R(1) / (rest + R(1));
  Vec<R> p = e * inv;
  Vec<R> one_minus_p = d == 0 ? rest * inv : R(1) - p;
  return (own * one_minus_p + p * (own - u_psi + z_term)) * upstream;
}

TORCHFAST_END_KERNELS

#endif
