// Softmax cross entropy / label smoothing / focal loss on the CPU. Formula and reference:
// torchfast/losses/cross_entropy.py.
//
// Two kernels, both in R = float (double for double logits), fed by staging that widens half
// precision, applies scale and softcap, and gathers strides in cache:
//   rows    long contiguous rows: chunks of a row in L1, online maximum, one read of memory
//   tiles   few classes or a strided class dimension: a tile of positions, one position per lane
// Backward reads the logits again and writes the gradient once; nothing else is input-sized.
// Tried and not faster: chunks of 512, 2048, 4096 and 8192 elements; prefetching beyond the next chunk;
// reading a tile of contiguous rows row by row (1.4 times as long as class by class).
#include <atomic>
#include <cmath>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "../common.h"

#ifndef TORCHFAST_FILE
namespace torchfast {
namespace {
struct Arguments {
  Tensor logits, target;
  std::optional<Tensor> weight, alpha, sample_weight;
  int64_t ignore_index, reduction;
  double label_smoothing, gamma, z_loss, softcap, logit_scale;
  bool empty_zero;
  bool transformed() const { return softcap != 0 || logit_scale != 1; }
};
}  // namespace
}  // namespace torchfast
#endif

#define TORCHFAST_FILE "cpu/cross_entropy.cpp"
#include "../foreach_isa.h"
#include "../tensors.h"

namespace torchfast::TORCHFAST_ISA {
namespace {

constexpr int64_t kChunk = 1024;     // elements of a row that stay in L1 between its two passes
constexpr int64_t kRowClasses = 64;  // from here on a row is worth a walk of its own
constexpr int64_t kTileElements = 8192;

// What u_c, the weighted target distribution, looks like along a row (the index target's own
// (1-e) w_t a_t is added apart).
enum class U { none, uniform, classes, probs };

// ---- Per-lane mathematics --------------------------------------------------------------------

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
  p_r = p == 0 ? p : p_r;  // 0 * inf
  return {f * minus_log_p, -f * (p_r * gamma + R(1))};
}

// ---- Rows ------------------------------------------------------------------------------------

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

// What makes u_c besides the index target's own class.
template <class R>
struct Weights {
  const R* classes;  // w a e/K of each class; w a for probabilities
  const R* probs;    // probabilities y of this row or tile
  R keep, uniform;   // 1-e, e/K
};

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

// `ahead`: memory to prefetch meanwhile, or this pass would leave it idle.
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
  R m, rest, log1p_rest, u_psi;  // u_psi: sum over the classes
  R z_term;                      // 2 z_loss lse
  R upstream;
};

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

// z and g may be the same memory. The index target's own class is the caller's to correct.
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

// ---- Tiles: lanes are positions, z is [classes][width] ----------------------------------------

constexpr int kNone = -1, kIgnored = -2;  // in place of a target class: probabilities; no row

template <class R>
struct Tile {
  R* z;
  int64_t classes, width, n;  // lanes n .. width-1 idle
  Weights<R> weights;
  const Int<R>* target;
  const R* own_u;  // (1-e) w_t a_t, or null where it is 1-e
};

// u_c of the lanes, but for the index target's own class.
template <class R>
TORCHFAST_INLINE Vec<R> tile_u(const Tile<R>& t, int64_t c, int64_t i) {
  const Weights<R>& w = t.weights;
  if (!w.probs) return splat(w.classes[c]);
  return (load<R>(w.probs + c * t.width + i) * w.keep + w.uniform) * w.classes[c];
}

// Writes m, rest and sum u psi to `stats` (planes `rows` apart) and the loss to `loss` (or null).
// dense: u has more than the index target's own class. Returns the sum of the losses.
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

// ---- Arguments, in the form the kernels read ---------------------------------------------------

// One thread's memory: a tile, or chunks of a row.
template <class R>
struct Scratch {
  Scratch(int64_t size, bool by_rows, bool probabilities, int64_t positions)
      : z(new R[size]),
        y(new R[probabilities ? size : 0]),
        g(new R[by_rows ? size : 0]),
        own_u(new R[positions]),
        upstream(new R[positions]),
        target(new Int<R>[positions]),
        offsets(new int64_t[positions]) {}
  std::unique_ptr<R[]> z, y, g, own_u, upstream;
  std::unique_ptr<Int<R>[]> target;
  std::unique_ptr<int64_t[]> offsets;
};

template <class T, class R>
struct Problem {
  Problem(const Arguments& arguments, const Tensor* gradient)
      : a(arguments),
        class_dim(a.logits.dim() == 1 ? 0 : 1),
        classes(a.logits.size(class_dim)),
        class_stride(a.logits.stride(class_dim)),
        probabilities(!is_integer(a.target.scalar_type())),
        target(readable_target()),
        positions(a.logits, class_dim, {&a.logits, probabilities ? &target : nullptr, gradient}),
        rows(positions.count()) {
    check();
    keep = R(1 - a.label_smoothing);
    uniform = R(a.label_smoothing / classes);
    bool weighted = a.weight || a.alpha;
    class_u.assign(classes, probabilities ? R(1) : uniform);
    if (weighted) own.assign(classes, keep);
    for (const auto* source : {&a.weight, &a.alpha}) {
      if (!*source) continue;
      Tensor factor = as_contiguous(**source, real_type<R>);
      int64_t step = factor.numel() == 1 ? 0 : 1;
      for (int64_t c = 0; c < classes; ++c) {
        class_u[c] *= data<R>(factor)[c * step];
        own[c] *= data<R>(factor)[c * step];
      }
      if (source == &a.weight) class_weight.assign(data<R>(factor), data<R>(factor) + classes);
    }
    if (a.sample_weight) {
      sample_weight = as_contiguous(*a.sample_weight, real_type<R>);
      samples = data<R>(*sample_weight);
    }
    kind = probabilities ? U::probs : a.label_smoothing == 0 ? U::none : weighted ? U::classes : U::uniform;
    x = static_cast<const T*>(a.logits.const_data_ptr());
    by_rows = classes >= kRowClasses && class_stride == 1;
    per_block = by_rows ? std::max<int64_t>(1, 16384 / classes)
                        : std::clamp<int64_t>(kTileElements / classes, kLanes, 512) / kLanes * kLanes;
    blocks = (rows + per_block - 1) / per_block;
  }

  // Probabilities as R or half precision, indices contiguous.
  Tensor readable_target() const {
    auto dtype = a.target.scalar_type();
    if (probabilities) {
      bool half = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
      bool staged = dtype == real_type<R> || (std::is_same_v<R, float> && half);
      return staged ? a.target : torch::stable::to(a.target, real_type<R>);
    }
    return as_contiguous(a.target, dtype);
  }

  void check() const {  // memory safety for direct callers of the op; the messages are the public function's
    STD_TORCH_CHECK(classes > 0 && classes <= INT32_MAX, "input must have 1 to 2^31-1 classes");
    bool same_shape = a.target.dim() == a.logits.dim();
    for (int64_t d = 0; same_shape && d < a.logits.dim(); ++d)
      same_shape = a.target.size(d) == a.logits.size(d);
    STD_TORCH_CHECK(probabilities ? same_shape : a.target.numel() == rows, "target has a wrong shape");
    STD_TORCH_CHECK(!a.weight || a.weight->numel() == classes, "weight must have one element a class");
    STD_TORCH_CHECK(!a.alpha || a.alpha->numel() == classes || a.alpha->numel() == 1,
                    "alpha must have one element, or one a class");
    STD_TORCH_CHECK(!a.sample_weight || a.sample_weight->numel() == rows,
                    "sample_weight must have one element a row");
    for (const auto* tensor : {&a.weight, &a.alpha, &a.sample_weight})
      STD_TORCH_CHECK(!*tensor || (*tensor)->is_cpu(), "all tensors must be on the CPU");
    STD_TORCH_CHECK(a.target.is_cpu(), "target must be on the CPU");
  }

  // f(first position, number of positions, block, scratch) with scratch.target decoded.
  template <class F>
  void for_each_block(const F& f) {
    int64_t size = by_rows ? std::min(kChunk, classes) : classes * per_block;
    int64_t grain = std::max<int64_t>(1, kGrainElements / (per_block * classes));
    torch::stable::parallel_for(0, blocks, grain, [&](int64_t from, int64_t to) {
      Scratch<R> scratch(size, by_rows, probabilities, per_block);
      for (int64_t block = from; block < to; ++block) {
        int64_t begin = block * per_block, n = std::min(per_block, rows - begin);
        decode(begin, n, scratch.target.get());
        f(begin, n, block, scratch);
      }
    });
    int64_t i = first_bad.load();
    if (i == INT64_MAX) return;
    int64_t value = with_index_type(target, [&](auto* t) { return int64_t(t[i]); });
    throw std::out_of_range("target " + std::to_string(value) + " is out of range: allowed are 0 to " +
                            std::to_string(classes - 1) + " and ignore_index");
  }

  // Target classes of positions begin .. begin+n-1. Rows of sample weight 0 are ignored; so is an
  // illegal class, once it is noted.
  void decode(int64_t begin, int64_t n, Int<R>* out) {
    if (probabilities) {
      std::fill_n(out, n, kNone);
    } else {
      bool bad = with_index_type(target, [&](auto* t) {
        bool any = false;
        for (int64_t j = 0; j < n; ++j) {
          int64_t value = t[begin + j];
          bool legal = uint64_t(value) < uint64_t(classes), counts = value != a.ignore_index;
          out[j] = legal && counts ? Int<R>(value) : kIgnored;
          any |= counts && !legal;
        }
        return any;
      });
      if (bad) note_first_bad(begin, n);
    }
    for (int64_t j = 0; samples && j < n; ++j)
      if (samples[begin + j] == 0) out[j] = kIgnored;
  }
  void note_first_bad(int64_t begin, int64_t n) {
    with_index_type(target, [&](auto* t) {
      int64_t i = begin;
      while (int64_t(t[i]) == a.ignore_index || uint64_t(int64_t(t[i])) < uint64_t(classes)) ++i;
      int64_t seen = first_bad.load();
      while (i < seen && !first_bad.compare_exchange_weak(seen, i)) {
      }
    });
  }

  R own_u(Int<R> t) const { return t < 0 ? R(0) : own.empty() ? keep : own[t]; }

  double divisor(int64_t begin, int64_t n, const Int<R>* targets) const {
    if (class_weight.empty() && !samples) {
      int64_t count = 0;
      for (int64_t j = 0; j < n; ++j) count += targets[j] != kIgnored;
      return count;
    }
    double sum = 0;
    for (int64_t j = 0; j < n; ++j) {
      if (targets[j] == kIgnored) continue;
      double weight = targets[j] >= 0 && !class_weight.empty() ? class_weight[targets[j]] : R(1);
      sum += samples ? weight * samples[begin + j] : weight;
    }
    return sum;
  }

  // ---- Staging: strides and half precision are dealt with here, in cache

  // n values from p (stride apart) as R in `buffer`, or p itself where it is that already.
  template <class S>
  static const R* stage(const S* p, int64_t stride, int64_t n, R* buffer) {
    if (stride != 1) {
      for (int64_t c = 0; c < n; ++c) buffer[c] = to_real(p[c * stride]);
      return buffer;
    }
    if constexpr (std::is_same_v<S, R>)
      return p;
    else {
      convert<R>(p, buffer, n);
      return buffer;
    }
  }
  const R* stage_logits(const T* row, int64_t c, int64_t n, R* buffer) const {
    const R* z = stage(row + c * class_stride, class_stride, n, buffer);
    if (!a.transformed()) return z;
    if (z != buffer) std::copy(z, z + n, buffer);
    transform<R>(buffer, n, R(a.logit_scale), R(a.softcap));
    return buffer;
  }
  template <class F>
  auto with_probs(const F& f) const {
    const void* p = target.const_data_ptr();
    if constexpr (std::is_same_v<R, float>) {
      if (target.scalar_type() == ScalarType::BFloat16) return f(static_cast<const bf16*>(p));
      if (target.scalar_type() == ScalarType::Half) return f(static_cast<const f16*>(p));
    }
    return f(static_cast<const R*>(p));
  }
  Weights<R> weights(int64_t i, int64_t c, int64_t n, R* buffer) const {
    const R* probs = nullptr;
    if (probabilities) {
      int64_t stride = target.stride(class_dim);
      probs = with_probs(
          [&](auto* y) { return stage(y + positions.offset(i, 1) + c * stride, stride, n, buffer); });
    }
    return {class_u.data() + c, probs, keep, uniform};
  }

  // Where positions i .. i+n-1 of p lie: at `run`, `step` apart, or else at p + offsets.
  template <class S>
  S* find_run(S* p, int k, int64_t i, int64_t n, int64_t* offsets) const {
    if (positions.is_run(i, n)) return p + positions.offset(i, k);
    for (int64_t j = 0; j < n; ++j) offsets[j] = positions.offset(i + j, k);
    return nullptr;
  }
  // Those positions as [classes][width]; idle lanes 0.
  template <class S>
  void stage_tile(const S* p, int k, int64_t stride, int64_t i, int64_t n, int64_t width, R* tile,
                  int64_t* offsets) const {
    int64_t step = positions.inner_stride(k);
    const S* run = find_run(p, k, i, n, offsets);
    for (int64_t c = 0; c < classes; ++c, tile += width) {
      if (run && step == 1)
        convert<R>(run + c * stride, tile, n);
      else if (run)
        for (int64_t j = 0; j < n; ++j) tile[j] = to_real(run[j * step + c * stride]);
      else
        for (int64_t j = 0; j < n; ++j) tile[j] = to_real(p[offsets[j] + c * stride]);
      std::fill(tile + n, tile + width, R(0));
    }
  }
  void unstage_tile(const R* tile, T* out, int64_t stride, int64_t i, int64_t n, int64_t width,
                    int64_t* offsets) const {
    int64_t step = positions.inner_stride(2);
    T* run = find_run(out, 2, i, n, offsets);
    for (int64_t c = 0; c < classes; ++c, tile += width) {
      if (run && step == 1)
        convert<R>(tile, run + c * stride, n);
      else if (run)
        for (int64_t j = 0; j < n; ++j) from_real(run + j * step + c * stride, tile[j]);
      else
        for (int64_t j = 0; j < n; ++j) from_real(out + offsets[j] + c * stride, tile[j]);
    }
  }
  Tile<R> tile(int64_t i, int64_t n, Scratch<R>& s) const {
    int64_t width = (n + kLanes - 1) / kLanes * kLanes;
    std::fill(s.target.get() + n, s.target.get() + width, kIgnored);
    stage_tile(x, 0, class_stride, i, n, width, s.z.get(), s.offsets.get());
    if (a.transformed()) transform<R>(s.z.get(), classes * width, R(a.logit_scale), R(a.softcap));
    if (probabilities)
      with_probs([&](auto* y) {
        stage_tile(y, 1, target.stride(class_dim), i, n, width, s.y.get(), s.offsets.get());
      });
    for (int64_t j = 0; !own.empty() && j < width; ++j) s.own_u[j] = own_u(s.target[j]);
    Weights<R> weights{class_u.data(), probabilities ? s.y.get() : nullptr, keep, uniform};
    return {s.z.get(), classes, width, n, weights, s.target.get(), own.empty() ? nullptr : s.own_u.get()};
  }

  static constexpr int64_t kLanes = 16;  // a multiple of every Simd<R>::lanes
  const Arguments& a;
  int64_t class_dim, classes, class_stride;
  bool probabilities;
  Tensor target;
  Positions positions;
  int64_t rows;
  std::optional<Tensor> sample_weight;
  const R* samples = nullptr;
  const T* x;
  R keep, uniform;
  std::vector<R> class_u, class_weight, own;  // see Weights::classes; w; (1-e) w a
  U kind;
  bool by_rows;
  int64_t per_block, blocks;
  std::atomic<int64_t> first_bad{INT64_MAX};
};

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
RowResult<R> forward_row(const Problem<T, R>& problem, int64_t i, Int<R> target, Scratch<R>& s) {
  const Arguments& a = problem.a;
  constexpr R lowest = -std::numeric_limits<R>::infinity();
  const T* row = problem.x + problem.positions.offset(i, 0);
  R m = lowest, z_target = 0;
  double ties = 0;  // elements equal to m; rest is without all of them until the end
  Sums sums;
  for (int64_t c = 0; c < problem.classes; c += kChunk) {
    int64_t n = std::min(kChunk, problem.classes - c);
    const R* z = problem.stage_logits(row, c, n, s.z.get());
    Weights<R> w = problem.weights(i, c, n, s.y.get());
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
    if (m == lowest) {  // nothing but -inf so far (or NaN): z - m is undefined, the sums are not
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
  double own_u = problem.own_u(target), own_d = double(z_target) - double(m), loss = 0, u_psi = 0;
  if (own_u != 0) {
    loss = own_u * (log1p_rest - own_d);
    u_psi = -own_u;
    if (a.gamma > 0) {
      auto f =
          focal_terms<double>(splat(own_d), splat(std::exp(own_d)), splat(rest), splat(log1p_rest), a.gamma);
      loss = own_u * f.loss[0];
      u_psi = own_u * f.psi[0];
    }
  }
  if (kind != U::none && a.gamma > 0) {
    for (int64_t c = 0; c < problem.classes; c += kChunk) {
      int64_t n = std::min(kChunk, problem.classes - c);
      const R* z = problem.stage_logits(row, c, n, s.z.get());
      Weights<R> w = problem.weights(i, c, n, s.y.get());
      FocalSums part = chunk_focal<R, focal_kind(kind)>(z, w, m, R(rest), R(log1p_rest), R(a.gamma), n);
      loss += part.loss;
      u_psi += part.u_psi;
    }
  } else if (kind != U::none) {
    loss += (sums.u == 0 ? 0 : log1p_rest * sums.u) - sums.ud;
    u_psi -= sums.u;
  }
  if (a.z_loss != 0) loss += a.z_loss * (m + log1p_rest) * (m + log1p_rest);
  return {loss, m, R(rest), R(u_psi)};
}

template <class T, class R>
std::tuple<Tensor, Tensor> forward(const Arguments& a) {
  Problem<T, R> problem(a, nullptr);
  int64_t rows = problem.rows;
  std::vector<int64_t> loss_sizes;
  for (int64_t d = 0; a.reduction == 0 && d < a.logits.dim(); ++d)
    if (d != problem.class_dim) loss_sizes.push_back(a.logits.size(d));
  Tensor loss = new_empty(a.logits, loss_sizes, real_type<R>);
  Tensor residuals = new_empty(a.logits, {3 * rows + 1}, real_type<R>);
  R* each_loss = a.reduction == 0 ? static_cast<R*>(loss.mutable_data_ptr()) : nullptr;
  R* stats = static_cast<R*>(residuals.mutable_data_ptr());
  std::vector<double> loss_sum(problem.blocks), divisor_sum(problem.blocks);

  problem.for_each_block([&](int64_t begin, int64_t n, int64_t block, Scratch<R>& s) {
    divisor_sum[block] = problem.divisor(begin, n, s.target.get());
    if (!problem.by_rows) {
      Tile<R> tile = problem.tile(begin, n, s);
      with_bools(problem.kind != U::none, a.gamma > 0, [&](auto dense, auto focal) {
        loss_sum[block] = tile_forward<R, dense(), focal()>(
            tile, R(a.gamma), R(a.z_loss), problem.samples ? problem.samples + begin : nullptr, stats + begin,
            rows, each_loss ? each_loss + begin : nullptr);
      });
      return;
    }
    for (int64_t i = begin; i < begin + n; ++i) {
      Int<R> target = s.target[i - begin];
      RowResult<R> r{};
      if (target != kIgnored)
        with_kind(problem.kind, [&](auto kind) { r = forward_row<kind()>(problem, i, target, s); });
      if (problem.samples && target != kIgnored) r.loss *= problem.samples[i];
      stats[i] = r.m;
      stats[rows + i] = r.rest;
      stats[2 * rows + i] = r.u_psi;
      loss_sum[block] += r.loss;
      if (each_loss) each_loss[i] = R(r.loss);
    }
  });

  double total = 0, divisor = a.reduction == 1 ? 0 : 1;
  for (double sum : loss_sum) total += sum;
  for (double sum : divisor_sum) divisor += a.reduction == 1 ? sum : 0;
  stats[3 * rows] = R(divisor);
  if (a.reduction != 0)
    *static_cast<R*>(loss.mutable_data_ptr()) = divisor == 0 && a.empty_zero ? R(0) : R(total / divisor);
  return {loss, residuals};
}

// ---- Backward --------------------------------------------------------------------------------

template <U kind, bool focal, class T, class R>
void backward_row(const Problem<T, R>& problem, int64_t i, Int<R> target, const R* stats, R upstream, T* out,
                  int64_t out_stride, Scratch<R>& s) {
  const Arguments& a = problem.a;
  const T* row = problem.x + problem.positions.offset(i, 0);
  R rest = stats[problem.rows + i];
  double log1p_rest = focal || a.z_loss != 0 ? std::log1p(double(rest)) : 0.0;
  R z_term = R(2 * a.z_loss * (stats[i] + log1p_rest));
  RowGradient<R> r{stats[i], rest, R(log1p_rest), stats[2 * problem.rows + i], z_term, upstream};
  bool direct = std::is_same_v<T, R> && out_stride == 1 && !a.transformed();
  for (int64_t c = 0; c < problem.classes; c += kChunk) {
    int64_t n = std::min(kChunk, problem.classes - c);
    const R* z = problem.stage_logits(row, c, n, s.z.get());
    R* g = direct ? reinterpret_cast<R*>(out + c) : s.g.get();
    bool own_here = target >= c && target < c + n;
    double d = own_here ? double(z[target - c]) - r.m : 0;
    chunk_gradient<R, kind, focal>(z, g, problem.weights(i, c, n, s.y.get()), r, R(a.gamma), n);
    if (own_here) {
      double e = std::exp(d), own = r.u_psi;  // of this class alone if there is no smoothing
      if constexpr (kind != U::none) {
        own = -double(problem.own_u(target)) - problem.class_u[target];
        if (focal && own != 0)
          own *= -focal_terms<double>(splat(d), splat(e), splat(double(rest)), splat(log1p_rest), a.gamma)
                      .psi[0];
      }
      g[target - c] = R(accurate_gradient<double>(splat(d), splat(e), splat(own), splat(double(rest)),
                                                  splat(double(r.u_psi)), splat(double(z_term)),
                                                  splat(double(upstream)))[0]);
    }
    if (direct) continue;
    if (a.transformed()) transform_gradient<R>(g, z, n, R(a.logit_scale), R(a.softcap));
    if (out_stride == 1)
      convert<R>(g, out + c, n);
    else
      for (int64_t j = 0; j < n; ++j) from_real(out + (c + j) * out_stride, g[j]);
  }
}

template <class T, class R>
void backward(const Arguments& a, const Tensor& grad_loss, const Tensor& residuals, const Tensor& gradient,
              FreshMemory* fresh) {
  Problem<T, R> problem(a, &gradient);
  STD_TORCH_CHECK(residuals.numel() == 3 * problem.rows + 1 && residuals.scalar_type() == real_type<R> &&
                      grad_loss.numel() == (a.reduction == 0 ? problem.rows : 1),
                  "backward was given residuals or a gradient of another forward");
  Tensor grad = as_contiguous(grad_loss, real_type<R>), kept = as_contiguous(residuals, real_type<R>);
  const R *stats = data<R>(kept), *grads = data<R>(grad);
  double divisor = stats[3 * problem.rows], per_row = divisor == 0 ? 0 : 1 / divisor;
  int64_t grad_step = a.reduction == 0 ? 1 : 0, out_stride = gradient.stride(problem.class_dim);
  T* out = static_cast<T*>(gradient.mutable_data_ptr());

  problem.for_each_block([&](int64_t begin, int64_t n, int64_t, Scratch<R>& s) {
    for (int64_t j = 0; j < n; ++j) {
      double sample = problem.samples ? problem.samples[begin + j] : R(1);
      R g = R(grads[(begin + j) * grad_step] * per_row * sample);
      s.upstream[j] = s.target[j] == kIgnored ? R(0) : g;
    }
    if (!problem.by_rows) {
      Tile<R> tile = problem.tile(begin, n, s);
      std::fill(s.upstream.get() + n, s.upstream.get() + tile.width, R(0));
      with_bools(problem.kind != U::none, a.gamma > 0, [&](auto dense, auto focal) {
        tile_backward<R, dense(), focal()>(tile, R(a.gamma), R(a.z_loss), R(a.logit_scale), R(a.softcap),
                                           stats + begin, problem.rows, s.upstream.get());
      });
      problem.unstage_tile(tile.z, out, out_stride, begin, n, tile.width, s.offsets.get());
      return;
    }
    for (int64_t i = begin; i < begin + n; ++i) {
      T* to = out + problem.positions.offset(i, 2);
      if (fresh && out_stride == 1) fresh->reach(to, problem.classes * sizeof(T));
      R upstream = s.upstream[i - begin];
      if (upstream == 0) {  // an ignored row is not read, whatever it holds
        for (int64_t c = 0; c < problem.classes; ++c) to[c * out_stride] = T{};
        continue;
      }
      with_kind(problem.kind, [&](auto kind) {
        Int<R> target = s.target[i - begin];
        if (a.gamma > 0 && kind() != U::none)
          backward_row<focal_kind(kind()), kind() != U::none>(problem, i, target, stats, upstream, to,
                                                              out_stride, s);
        else
          backward_row<kind(), false>(problem, i, target, stats, upstream, to, out_stride, s);
      });
    }
  });
}

// ---- Dispatcher ops --------------------------------------------------------------------------

std::tuple<Tensor, Tensor> run_forward(const Arguments& a) {
  return with_logits_type(a.logits, [&](auto t, auto r) { return forward<decltype(t), decltype(r)>(a); });
}

void run_backward(const Arguments& a, const Tensor& grad_loss, const Tensor& residuals,
                  const Tensor& gradient, FreshMemory* fresh) {
  with_logits_type(a.logits, [&](auto t, auto r) {
    backward<decltype(t), decltype(r)>(a, grad_loss, residuals, gradient, fresh);
  });
}

}  // namespace
}  // namespace torchfast::TORCHFAST_ISA

#ifdef TORCHFAST_LAST_ISA
namespace torchfast {
namespace {

std::tuple<Tensor, Tensor> cross_entropy(Tensor logits, Tensor target, std::optional<Tensor> weight,
                                         std::optional<Tensor> alpha, std::optional<Tensor> sample_weight,
                                         int64_t ignore_index, int64_t reduction, double label_smoothing,
                                         double gamma, double z_loss, double softcap, double logit_scale,
                                         bool empty_zero, bool) {
  return TORCHFAST_DISPATCH(run_forward)({logits, target, weight, alpha, sample_weight, ignore_index,
                                          reduction, label_smoothing, gamma, z_loss, softcap, logit_scale,
                                          empty_zero});
}

Tensor cross_entropy_backward(Tensor grad_loss, Tensor logits, Tensor target, std::optional<Tensor> weight,
                              std::optional<Tensor> alpha, std::optional<Tensor> sample_weight,
                              int64_t ignore_index, int64_t reduction, double label_smoothing, double gamma,
                              double z_loss, double softcap, double logit_scale, bool empty_zero, bool,
                              Tensor residuals) {
  Tensor gradient = torch::stable::empty_like(logits);
  FreshMemory fresh(gradient.mutable_data_ptr(), gradient.numel() * gradient.element_size());
  TORCHFAST_DISPATCH(run_backward)({logits, target, weight, alpha, sample_weight, ignore_index, reduction,
                                    label_smoothing, gamma, z_loss, softcap, logit_scale, empty_zero},
                                   grad_loss, residuals, gradient, &fresh);
  return gradient;
}

// Writes the gradient over the logits.
void cross_entropy_backward_(Tensor grad_loss, Tensor logits, Tensor target, std::optional<Tensor> weight,
                             std::optional<Tensor> alpha, std::optional<Tensor> sample_weight,
                             int64_t ignore_index, int64_t reduction, double label_smoothing, double gamma,
                             double z_loss, double softcap, double logit_scale, bool empty_zero, bool,
                             Tensor residuals) {
  TORCHFAST_DISPATCH(run_backward)({logits, target, weight, alpha, sample_weight, ignore_index, reduction,
                                    label_smoothing, gamma, z_loss, softcap, logit_scale, empty_zero},
                                   grad_loss, residuals, logits, nullptr);
}

}  // namespace
}  // namespace torchfast

STABLE_TORCH_LIBRARY_IMPL(torchfast, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&torchfast::cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&torchfast::cross_entropy_backward));
  m.impl("cross_entropy_backward_", TORCH_BOX(&torchfast::cross_entropy_backward_));
}
#endif
