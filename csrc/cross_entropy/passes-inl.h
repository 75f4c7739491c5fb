// The passes over the logits: for the loss, for the gradient, or for both at once, which reads them from
// memory once and writes the gradient once; nothing else is input-sized. Long contiguous rows go chunk by
// chunk with an online maximum, few classes or a strided class dimension tile by tile.
#if defined(TORCHFAST_CROSS_ENTROPY_PASSES_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_CROSS_ENTROPY_PASSES_INL_H
#undef TORCHFAST_CROSS_ENTROPY_PASSES_INL_H
#else
#define TORCHFAST_CROSS_ENTROPY_PASSES_INL_H
#endif

#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "cross_entropy/batch-inl.h"

TORCHFAST_KERNELS

template <class F>
void with_bools(bool a, bool b, const F& f) {
  if (a)
    b ? f(std::true_type{}, std::true_type{}) : f(std::true_type{}, std::false_type{});
  else
    b ? f(std::false_type{}, std::true_type{}) : f(std::false_type{}, std::false_type{});
}

template <class F>
void with_kind(U kind, const F& f) {
  switch (kind) {
    case U::none: return f(std::integral_constant<U, U::none>{});
    case U::uniform: return f(std::integral_constant<U, U::uniform>{});
    case U::classes: return f(std::integral_constant<U, U::classes>{});
    case U::probs: return f(std::integral_constant<U, U::probs>{});
  }
}

// A focal sum over classes reads class_u for the uniform case too: one kernel less.
constexpr U focal_kind(U kind) { return kind == U::uniform ? U::classes : kind; }

// ---- Forward ---------------------------------------------------------------------------------

template <class R>
struct RowResult {
  double loss;
  R m, rest, u_psi;
};

template <U kind, class T, class R>
RowResult<R> forward_row(const Batch<T, R>& batch, int64_t i, Int<R> target, Scratch<R>& s) {
  const Options& o = batch.options;
  constexpr R lowest = -std::numeric_limits<R>::infinity();
  const T* row = batch.x + batch.of_logits.offset(i);
  R m = lowest, z_target = 0;
  double ties = 0;  // elements equal to m, none of which is in sums.rest before the end
  Sums sums;
  for (int64_t c = 0; c < batch.classes; c += kChunk) {
    int64_t n = std::min(kChunk, batch.classes - c);
    const R* z = batch.stage_logits(row, c, n, s.z.get());
    Weights<R> w = batch.weights(i, c, n, s.y.get());
    if (target >= c && target < c + n) z_target = z[target - c];
    R chunk = chunk_max<R>(z, n);
    if (chunk > m) {
      if (m > lowest) {
        sums.rest = (sums.rest + ties) * std::exp(double(m) - double(chunk));
        sums.ud += (double(m) - double(chunk)) * sums.u;
      }
      m = chunk;
      ties = 0;
    }
    if (m == lowest) {  // all so far is -inf (or NaN): z - m is undefined, the sums are not
      for (int64_t j = 0; j < n; ++j) {
        R u = kind == U::none    ? R(0)
              : kind == U::probs ? w.classes[j] * (w.probs[j] * w.keep + w.uniform)
                                 : w.classes[j];
        sums.u += u;
        if (u != 0) sums.ud += u * -INFINITY;
        if (std::isnan(z[j])) sums.rest = NAN;
      }
      continue;
    }
    if (chunk == m) ties += chunk_count<R>(z, n, m);
    Sums part = chunk_sums<R, kind>(z, w, m, n, reinterpret_cast<const char*>(row + c + n));
    sums.rest += part.rest;
    sums.u += part.u;
    sums.ud += part.ud;
  }
  double rest = ties > 0 ? sums.rest + (ties - 1) : NAN, log1p_rest = std::log1p(rest);
  double own_u = batch.own_u(target), own_d = double(z_target) - double(m), loss = 0, u_psi = 0;
  if (own_u != 0) {
    loss = own_u * (log1p_rest - own_d);
    u_psi = -own_u;
    if (o.gamma > 0) {
      auto f =
          focal_terms<double>(splat(own_d), splat(std::exp(own_d)), splat(rest), splat(log1p_rest), o.gamma);
      loss = own_u * f.loss[0];
      u_psi = own_u * f.psi[0];
    }
  }
  if (kind != U::none && o.gamma > 0) {
    for (int64_t c = 0; c < batch.classes; c += kChunk) {
      int64_t n = std::min(kChunk, batch.classes - c);
      const R* z = batch.stage_logits(row, c, n, s.z.get());
      Weights<R> w = batch.weights(i, c, n, s.y.get());
      FocalSums part = chunk_focal<R, focal_kind(kind)>(z, w, m, R(rest), R(log1p_rest), R(o.gamma), n);
      loss += part.loss;
      u_psi += part.u_psi;
    }
  } else if (kind != U::none) {
    loss += (sums.u == 0 ? 0 : log1p_rest * sums.u) - sums.ud;
    u_psi -= sums.u;
  }
  if (o.z_loss != 0) loss += o.z_loss * (m + log1p_rest) * (m + log1p_rest);
  return {loss, m, R(rest), R(u_psi)};
}

// ---- Backward --------------------------------------------------------------------------------

template <U kind, bool focal, class T, class R>
void backward_row(const Batch<T, R>& batch, int64_t i, Int<R> target, const R* stats, R upstream, T* out,
                  int64_t out_stride, Scratch<R>& s) {
  const Options& o = batch.options;
  const T* row = batch.x + batch.of_logits.offset(i);
  R rest = stats[batch.rows + i];
  double log1p_rest = focal || o.z_loss != 0 ? std::log1p(double(rest)) : 0.0;
  R z_term = R(2 * o.z_loss * (stats[i] + log1p_rest));
  RowGradient<R> r{stats[i], rest, R(log1p_rest), stats[2 * batch.rows + i], z_term, upstream};
  bool direct = std::is_same_v<T, R> && out_stride == 1 && !o.transformed();
  for (int64_t c = 0; c < batch.classes; c += kChunk) {
    int64_t n = std::min(kChunk, batch.classes - c);
    const R* z = batch.stage_logits(row, c, n, s.z.get());
    R* g = direct ? reinterpret_cast<R*>(out + c) : s.g.get();
    bool own_here = target >= c && target < c + n;
    double d = own_here ? double(z[target - c]) - r.m : 0;
    chunk_gradient<R, kind, focal>(z, g, batch.weights(i, c, n, s.y.get()), r, R(o.gamma), n);
    if (own_here) {
      double e = std::exp(d), own = r.u_psi;  // u_psi is this class's alone if there is no smoothing
      if constexpr (kind != U::none) {
        own = -double(batch.own_u(target)) - batch.class_u[target];
        if (focal && own != 0)
          own *= -focal_terms<double>(splat(d), splat(e), splat(double(rest)), splat(log1p_rest), o.gamma)
                      .psi[0];
      }
      g[target - c] = R(accurate_gradient<double>(splat(d), splat(e), splat(own), splat(double(rest)),
                                                  splat(double(r.u_psi)), splat(double(z_term)),
                                                  splat(double(upstream)))[0]);
    }
    if (direct) continue;
    if (o.transformed()) transform_gradient<R>(g, z, n, R(o.logit_scale), R(o.softcap));
    scatter(g, n, out + c * out_stride, out_stride);
  }
}

// ---- The passes ------------------------------------------------------------------------------

// A call with its outputs; `gradient` is null where none is wanted.
template <class T, class R>
class Passes {
 public:
  Passes(const Call& call, const View& residuals, const View* gradient)
      : batch(call, gradient),
        o(batch.options),
        stats(residuals.writable<R>()),
        out(gradient ? gradient->writable<T>() : nullptr),
        out_stride(gradient ? gradient->stride(batch.class_dim) : 0) {}

  // Writes the loss and the residuals; and, block by block while the logits are in cache, the gradient, if
  // one is wanted, for an upstream gradient of `upstream`.
  void forward(const View& loss, double upstream) {
    bool mean = o.reduction == Reduction::mean, each = o.reduction == Reduction::none;
    R* each_loss = each ? loss.writable<R>() : nullptr;
    std::vector<double> losses(batch.blocks), divisors(batch.blocks);
    if (mean && out)
      batch.for_each_block([&](int64_t begin, int64_t n, int64_t block, Scratch<R>& s) {
        divisors[block] = batch.divisor(begin, n, s.target.get());
      });
    double divisor = mean && out ? total(divisors) : 1;
    R grad = R(upstream);
    batch.for_each_block([&](int64_t begin, int64_t n, int64_t block, Scratch<R>& s) {
      if (mean && !out) divisors[block] = batch.divisor(begin, n, s.target.get());
      if (out) find_upstream(begin, n, &grad, 0, divisor, s);
      if (!batch.by_rows) {
        Tile<R> tile = batch.tile(begin, n, s);
        losses[block] = tile_losses(tile, begin, each_loss);
        if (out) tile_gradient(tile, begin, s);
        return;
      }
      for (int64_t j = 0; j < n; ++j) {
        losses[block] += row_loss(begin + j, s.target[j], each_loss, s);
        if (out) row_gradient(begin + j, s.target[j], s.upstream[j], s);
      }
    });
    if (mean) divisor = total(divisors);
    stats[3 * batch.rows] = R(divisor);
    if (!each) *loss.writable<R>() = divisor == 0 && o.empty_zero ? R(0) : R(total(losses) / divisor);
  }

  // Writes the gradient from the residuals of a forward.
  void backward(const View& grad_loss) {
    int64_t step = o.reduction == Reduction::none ? 1 : 0;
    batch.for_each_block([&](int64_t begin, int64_t n, int64_t, Scratch<R>& s) {
      find_upstream(begin, n, grad_loss.as<R>() + begin * step, step, stats[3 * batch.rows], s);
      if (!batch.by_rows) return tile_gradient(batch.tile(begin, n, s), begin, s);
      for (int64_t j = 0; j < n; ++j) row_gradient(begin + j, s.target[j], s.upstream[j], s);
    });
  }

 private:
  static double total(const std::vector<double>& parts) {
    return std::accumulate(parts.begin(), parts.end(), 0.0);
  }

  // Decides what the gradients of rows begin .. begin+n-1 are multiplied by.
  void find_upstream(int64_t begin, int64_t n, const R* grads, int64_t step, R divisor, Scratch<R>& s) const {
    double per_row = divisor == 0 ? 0 : 1 / double(divisor);
    for (int64_t j = 0; j < n; ++j) {
      double sample = batch.samples ? batch.samples[begin + j] : R(1);
      s.upstream[j] = s.target[j] == kIgnored ? R(0) : R(grads[j * step] * per_row * sample);
    }
  }

  double row_loss(int64_t i, Int<R> target, R* each_loss, Scratch<R>& s) const {
    RowResult<R> r{};
    if (target != kIgnored)
      with_kind(batch.kind, [&](auto kind) { r = forward_row<kind()>(batch, i, target, s); });
    if (batch.samples && target != kIgnored) r.loss *= batch.samples[i];
    stats[i] = r.m;
    stats[batch.rows + i] = r.rest;
    stats[2 * batch.rows + i] = r.u_psi;
    if (each_loss) each_loss[i] = R(r.loss);
    return r.loss;
  }

  void row_gradient(int64_t i, Int<R> target, R upstream, Scratch<R>& s) const {
    T* to = out + batch.of_gradient.offset(i);
    if (upstream == 0) {  // an ignored row is not read, whatever it holds
      for (int64_t c = 0; c < batch.classes; ++c) to[c * out_stride] = T{};
      return;
    }
    with_kind(batch.kind, [&](auto kind) {
      if (o.gamma > 0 && kind() != U::none)
        backward_row<focal_kind(kind()), kind() != U::none>(batch, i, target, stats, upstream, to, out_stride,
                                                            s);
      else
        backward_row<kind(), false>(batch, i, target, stats, upstream, to, out_stride, s);
    });
  }

  double tile_losses(const Tile<R>& tile, int64_t begin, R* each_loss) const {
    double sum = 0;
    with_bools(batch.kind != U::none, o.gamma > 0, [&](auto dense, auto focal) {
      sum = tile_forward<R, dense(), focal()>(tile, R(o.gamma), R(o.z_loss),
                                              batch.samples ? batch.samples + begin : nullptr, stats + begin,
                                              batch.rows, each_loss ? each_loss + begin : nullptr);
    });
    return sum;
  }

  // The gradient takes the place of the tile.
  void tile_gradient(const Tile<R>& tile, int64_t begin, Scratch<R>& s) const {
    std::fill(s.upstream.get() + tile.n, s.upstream.get() + tile.width, R(0));
    with_bools(batch.kind != U::none, o.gamma > 0, [&](auto dense, auto focal) {
      tile_backward<R, dense(), focal()>(tile, R(o.gamma), R(o.z_loss), R(o.logit_scale), R(o.softcap),
                                         stats + begin, batch.rows, s.upstream.get());
    });
    batch.unstage_tile(tile.z, out, out_stride, begin, tile.n, tile.width);
  }

  Batch<T, R> batch;
  const Options& o;
  R* stats;
  T* out;
  int64_t out_stride;
};

TORCHFAST_END_KERNELS

#endif
