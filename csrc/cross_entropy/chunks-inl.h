// A chunk of a row, in L1: its maximum, its sums, its gradient.
#if defined(TORCHFAST_CROSS_ENTROPY_CHUNKS_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_CROSS_ENTROPY_CHUNKS_INL_H
#undef TORCHFAST_CROSS_ENTROPY_CHUNKS_INL_H
#else
#define TORCHFAST_CROSS_ENTROPY_CHUNKS_INL_H
#endif

#include <cmath>
#include <cstdint>
#include <limits>

#include "cross_entropy/formula-inl.h"

TORCHFAST_KERNELS

template <class R>
void transform(R* z, int64_t n, R scale, R softcap) {
  for_each_vec<R>(n, [&](int64_t i, int, auto count) __attribute__((always_inline)) {
    Vec<R> v = load_n<R>(z + i, count) * scale;
    if (softcap != 0) v = tanh(v / softcap) * softcap;
    store_n<R>(z + i, v, count);
  });
}

template <class R>
void transform_gradient(R* g, const R* z, int64_t n, R scale, R softcap) {
  for_each_vec<R>(n, [&](int64_t i, int, auto count) __attribute__((always_inline)) {
    Vec<R> v = load_n<R>(g + i, count) * scale;
    if (softcap != 0) {
      Vec<R> t = load_n<R>(z + i, count) / softcap;
      v = v * (R(1) - t * t);
    }
    store_n<R>(g + i, v, count);
  });
}

template <class R>
R chunk_max(const R* z, int64_t n) {
  constexpr R lowest = -std::numeric_limits<R>::infinity();
  Vec<R> max[4] = {splat(lowest), splat(lowest), splat(lowest), splat(lowest)};
  for_each_vec<R>(n, [&](int64_t i, int k, auto count) __attribute__((always_inline)) {
    Vec<R> v = only_n<R>(load_n<R>(z + i, count), count, lowest);
    max[k] = v > max[k] ? v : max[k];  // a NaN is dropped here and kept by the sum
  });
  max[0] = max[0] > max[1] ? max[0] : max[1];
  max[2] = max[2] > max[3] ? max[2] : max[3];
  return max_lanes<R>(max[0] > max[2] ? max[0] : max[2]);
}

template <class R>
int64_t chunk_count(const R* z, int64_t n, R value) {
  IntVec<R> found[4] = {};
  for_each_vec<R>(n, [&](int64_t i, int k, auto count) __attribute__((always_inline)) {
    found[k] -= only_n<R>(load_n<R>(z + i, count), count, R(NAN)) == value;
  });
  return reduce_lanes<int64_t>(found[0] + found[1] + found[2] + found[3],
                               [](int64_t a, int64_t b) __attribute__((always_inline)) { return a + b; });
}

template <class R, U kind>
TORCHFAST_INLINE Vec<R> row_u(const Weights<R>& w, int64_t i, auto count) {
  if constexpr (kind == U::uniform) return splat(w.uniform);
  if constexpr (kind == U::classes) return load_n<R>(w.classes + i, count);
  if constexpr (kind == U::probs)
    return load_n<R>(w.classes + i, count) * (load_n<R>(w.probs + i, count) * w.keep + w.uniform);
  return splat<R>(0);
}

struct Sums {
  double rest = 0;  // sum of exp(z - m) over z != m
  double u = 0;     // sum of u
  double ud = 0;    // sum of u (z - m)
};

// Prefetches what lies at `ahead` meanwhile: memory would be idle during this pass.
template <class R, U kind>
Sums chunk_sums(const R* z, const Weights<R>& w, R m, int64_t n, const char* ahead) {
  Vec<R> rest[4] = {}, us[4] = {}, ud[4] = {};
  for_each_vec<R>(n, [&](int64_t i, int k, auto count) __attribute__((always_inline)) {
    __builtin_prefetch(ahead + i * sizeof(R));
    Vec<R> d = load_n<R>(z + i, count) - m;
    rest[k] += only_n<R>(d == 0 ? splat<R>(0) : exp_nonpositive(d), count, R(0));
    if constexpr (kind == U::uniform) ud[k] += only_n<R>(d, count, R(0));
    if constexpr (kind == U::classes || kind == U::probs) {
      Vec<R> u = only_n<R>(row_u<R, kind>(w, i, count), count, R(0));
      us[k] += u;
      ud[k] += u == 0 ? u : u * d;
    }
  });
  auto total = [](const Vec<R>* v) __attribute__((always_inline)) {
    return sum_lanes<R>(v[0] + v[1]) + sum_lanes<R>(v[2] + v[3]);
  };
  if constexpr (kind == U::uniform)
    return {total(rest), double(w.uniform) * n, double(w.uniform) * total(ud)};
  return {total(rest), total(us), total(ud)};
}

struct FocalSums {
  double loss = 0, u_psi = 0;
};

template <class R, U kind>
FocalSums chunk_focal(const R* z, const Weights<R>& w, R m, R rest, R log1p_rest, R gamma, int64_t n) {
  Vec<R> loss{}, u_psi{};
  for_each_vec<R>(n, [&](int64_t i, int, auto count) __attribute__((always_inline)) {
    Vec<R> d = load_n<R>(z + i, count) - m;
    Vec<R> u = only_n<R>(row_u<R, kind>(w, i, count), count, R(0));
    Focal<R> f = focal_terms<R>(d, exp_nonpositive(d), splat(rest), splat(log1p_rest), gamma);
    loss += u == 0 ? u : u * f.loss;
    u_psi += u == 0 ? u : u * f.psi;
  });
  return {sum_lanes<R>(loss), sum_lanes<R>(u_psi)};
}

// What backward needs of a row besides its logits.
template <class R>
struct RowGradient {
  R m, rest, log1p_rest, u_psi;  // u_psi is the sum over the classes
  R z_term;                      // 2 z_loss lse
  R upstream;
};

// z and g may be the same memory. The caller corrects the index target's own class.
template <class R, U kind, bool focal>
void chunk_gradient(const R* z, R* g, const Weights<R>& w, const RowGradient<R>& row, R gamma, int64_t n) {
  R per_exp = (row.z_term - row.u_psi) * row.upstream / (1 + row.rest);
  for_each_vec<R>(n, [&](int64_t i, int, auto count) __attribute__((always_inline)) {
    Vec<R> d = load_n<R>(z + i, count) - row.m;
    Vec<R> e = exp_nonpositive(d);
    Vec<R> own{}, v = e * per_exp;
    if constexpr (kind != U::none) {
      Vec<R> u = row_u<R, kind>(w, i, count);
      own = -u;
      if constexpr (focal)
        own = u == 0 ? u : u * focal_terms<R>(d, e, splat(row.rest), splat(row.log1p_rest), gamma).psi;
      if constexpr (kind == U::probs)
        v = accurate_gradient<R>(d, e, own, splat(row.rest), splat(row.u_psi), splat(row.z_term),
                                 splat(row.upstream));
      else
        v += own * row.upstream;
    }
    store_n<R>(g + i, v, count);
  });
}

TORCHFAST_END_KERNELS

#endif
