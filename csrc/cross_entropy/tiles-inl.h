// Tiles of few classes, or of a strided class dimension: lanes are positions, z is [classes][width].
#if defined(TORCHFAST_CROSS_ENTROPY_TILES_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_CROSS_ENTROPY_TILES_INL_H
#undef TORCHFAST_CROSS_ENTROPY_TILES_INL_H
#else
#define TORCHFAST_CROSS_ENTROPY_TILES_INL_H
#endif

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cross_entropy/formula-inl.h"

TORCHFAST_KERNELS

// They stand in for a target class: the target is probabilities, or the row is ignored.
constexpr int kNone = -1, kIgnored = -2;

template <class R>
struct Tile {
  R* z;
  int64_t classes, width, n;  // lanes n .. width-1 are idle
  Weights<R> weights;
  const Int<R>* target;
  const R* own_u;  // (1-e) w_t a_t, or null where it is 1-e
};

// Gives u_c of the lanes, without what the index target's own class adds.
template <class R>
TORCHFAST_INLINE Vec<R> tile_u(const Tile<R>& t, int64_t c, int64_t i) {
  const Weights<R>& w = t.weights;
  if (!w.probs) return splat(w.classes[c]);
  return (load<R>(w.probs + c * t.width + i) * w.keep + w.uniform) * w.classes[c];
}

// Writes m, rest and sum u psi to `stats` (planes `rows` apart) and the loss to `loss` (or null).
// `dense` says that u has more than the index target's own class. Returns the sum of the losses.
template <class R, bool dense, bool focal>
double tile_forward(const Tile<R>& t, R gamma, R z_loss, const R* sample, R* stats, int64_t rows,
                    R* loss_out) {
  constexpr int L = Simd<R>::lanes;
  Vec<R> sum{};
  for (int64_t i = 0; i < t.width; i += L) {
    const R* z = t.z + i;
    Vec<R> m = splat(-std::numeric_limits<R>::infinity());
    for (int64_t c = 0; c < t.classes; ++c) {
      Vec<R> v = load<R>(z + c * t.width);
      m = v > m ? v : m;
    }
    IntVec<R> target;
    __builtin_memcpy(&target, t.target + i, sizeof(target));
    Vec<R> own_u = t.own_u ? load<R>(t.own_u + i) : splat(t.weights.keep);
    own_u = target >= 0 ? own_u : splat<R>(0);
    Vec<R> own_d{}, rest{}, ties = splat<R>(-1);
    for (int64_t block = 0; block < t.classes; block += 64) {  // two-level sum: 64 terms, then blocks
      Vec<R> part{};
      for (int64_t c = block; c < std::min(block + 64, t.classes); ++c) {
        Vec<R> d = load<R>(z + c * t.width) - m;
        part += d == 0 ? splat<R>(0) : exp_nonpositive(d);
        ties += d == 0 ? splat<R>(1) : splat<R>(0);
        own_d = target == Int<R>(c) ? d : own_d;
      }
      rest += part;
    }
    rest += ties;
    Vec<R> log1p_rest = log1p_nonnegative(rest);
    Vec<R> loss{}, u_psi{}, zero{};
    if constexpr (dense && focal) {
      for (int64_t c = 0; c < t.classes; ++c) {
        Vec<R> d = load<R>(z + c * t.width) - m;
        Vec<R> u = tile_u<R>(t, c, i) + (target == Int<R>(c) ? own_u : zero);
        auto f = focal_terms<R>(d, exp_nonpositive(d), rest, log1p_rest, gamma);
        loss += u == 0 ? u : u * f.loss;
        u_psi += u == 0 ? u : u * f.psi;
      }
    } else {
      if constexpr (dense) {
        Vec<R> sum_u{}, sum_ud{};
        for (int64_t c = 0; c < t.classes; ++c) {
          Vec<R> u = tile_u<R>(t, c, i);
          sum_u += u;
          sum_ud += u == 0 ? u : u * (load<R>(z + c * t.width) - m);
        }
        loss = (sum_u == 0 ? zero : log1p_rest * sum_u) - sum_ud;
        u_psi = -sum_u;
      }
      Focal<R> own{log1p_rest - own_d, splat<R>(-1)};
      if constexpr (focal) own = focal_terms<R>(own_d, exp_nonpositive(own_d), rest, log1p_rest, gamma);
      loss += own_u == 0 ? zero : own_u * own.loss;
      u_psi += own_u * own.psi;
    }
    if (z_loss != 0) {
      Vec<R> lse = m + log1p_rest;
      loss += lse * lse * z_loss;
    }
    int64_t n = std::min<int64_t>(L, t.n - i);
    if (n <= 0) break;
    auto finish = [&](auto count) __attribute__((always_inline)) {
      if (sample) loss = loss * load_n<R>(sample + i, count);
      IntVec<R> counts = target > kIgnored;
      auto keep = [&](Vec<R> v) __attribute__((always_inline)) { return counts ? v : splat<R>(0); };
      loss = keep(loss);
      sum += loss;
      store_n<R>(stats + i, keep(m), count);
      store_n<R>(stats + rows + i, keep(rest), count);
      store_n<R>(stats + 2 * rows + i, keep(u_psi), count);
      if (loss_out) store_n<R>(loss_out + i, loss, count);
    };
    if (n == L)
      finish(std::integral_constant<int64_t, L>{});
    else
      finish(n);
  }
  return sum_lanes<R>(sum);
}

// z becomes the gradient with respect to the logits; `upstream` has `width` values.
template <class R, bool dense, bool focal>
void tile_backward(const Tile<R>& t, R gamma, R z_loss, R scale, R softcap, const R* stats, int64_t rows,
                   const R* upstreams) {
  constexpr int L = Simd<R>::lanes;
  for (int64_t i = 0; i < t.width; i += L) {
    int64_t n = std::min<int64_t>(L, t.n - i);
    if (n <= 0) break;
    auto stat = [&](int k) __attribute__((always_inline)) {
      return n == L ? load<R>(stats + k * rows + i) : load_first<R>(stats + k * rows + i, n);
    };
    Vec<R> m = stat(0), rest = stat(1), u_psi = stat(2), upstream = load<R>(upstreams + i);
    IntVec<R> target;
    __builtin_memcpy(&target, t.target + i, sizeof(target));
    Vec<R> own_u = t.own_u ? load<R>(t.own_u + i) : splat(t.weights.keep);
    Vec<R> log1p_rest{}, z_term{}, inv = R(1) / (rest + R(1));
    if (focal || z_loss != 0) log1p_rest = log1p_nonnegative(rest);
    if (z_loss != 0) z_term = (m + log1p_rest) * (R(2) * z_loss);
    Vec<R> per_exp = (z_term - u_psi) * upstream * inv;
    for (int64_t c = 0; c < t.classes; ++c) {
      R* zc = t.z + c * t.width + i;
      Vec<R> value = load<R>(zc);
      Vec<R> d = value - m;
      Vec<R> e = exp_nonpositive(d);
      Vec<R> g;
      if constexpr (!dense) {
        Vec<R> own = accurate_gradient<R>(d, e, u_psi, rest, u_psi, z_term, upstream);
        g = target == Int<R>(c) ? own : e * per_exp;
      } else {
        Vec<R> u = tile_u<R>(t, c, i) + (target == Int<R>(c) ? own_u : splat<R>(0)), own = -u;
        if constexpr (focal) own = u == 0 ? u : u * focal_terms<R>(d, e, rest, log1p_rest, gamma).psi;
        g = accurate_gradient<R>(d, e, own, rest, u_psi, z_term, upstream);
      }
      g = g * scale;
      if (softcap != 0) g = g * (R(1) - (value / softcap) * (value / softcap));
      store(zc, upstream == 0 ? splat<R>(0) : g);
    }
  }
}

TORCHFAST_END_KERNELS

#endif
