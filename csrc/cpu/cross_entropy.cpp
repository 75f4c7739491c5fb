// Softmax cross entropy / label smoothing / focal loss on the CPU. Formula and reference:
// torchfast/losses/cross_entropy.py.
//
// Two kernels, both in R = float (double for double logits), fed by staging that widens half
// precision, applies scale and softcap, and gathers strides in cache:
//   rows    long contiguous rows: chunks of a row in L1, online maximum, one read of memory
//   tiles   few classes or a strided class dimension: a tile of positions, one position per lane
// Backward reads the logits again and writes the gradient once; nothing else is input-sized.
// Measured and dropped: see PERFORMANCE notes at the end of this header.
#include <atomic>
#include <cmath>
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

namespace torchfast::TORCHFAST_ISA {
namespace {

constexpr int64_t kChunk = 4096;  // elements of a row that stay in L1 between its two passes
constexpr int64_t kRowClasses = 64;
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

template <class R, class T>
void widen(const T* x, R* z, int64_t n) {
  for_each_vec<R>(n, [&](int64_t i, int, auto count) __attribute__((always_inline)) {
    store_n<R>(z + i, load_n<R>(x + i, count), count);
  });
}

template <class R, class T>
void narrow(const R* g, T* out, int64_t n) {
  for_each_vec<R>(n, [&](int64_t i, int, auto count) __attribute__((always_inline)) {
    store_n<R>(out + i, load_n<R>(g + i, count), count);
  });
}

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
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += z[i] == value;
  return count;
}

template <class R, U kind>
TORCHFAST_INLINE Vec<R> row_u(const R* classes, const R* probs, R keep, R uniform, int64_t i,
                              auto count) {
  if constexpr (kind == U::uniform) return splat(uniform);
  if constexpr (kind == U::classes) return load_n<R>(classes + i, count);  // already times e/K
  if constexpr (kind == U::probs)
    return load_n<R>(classes + i, count) * (load_n<R>(probs + i, count) * keep + uniform);
  return splat<R>(0);
}

struct Sums {
  double rest = 0;  // sum of exp(z - m) over z != m
  double u = 0;     // sum of u
  double ud = 0;    // sum of u (z - m)
};

template <class R, U kind>
Sums chunk_sums(const R* z, const R* classes, const R* probs, R keep, R uniform,
                                 R m, int64_t n) {
  Vec<R> rest[4] = {}, us[4] = {}, ud[4] = {};
  for_each_vec<R>(n, [&](int64_t i, int k, auto count) __attribute__((always_inline)) {
    Vec<R> d = load_n<R>(z + i, count) - m;
    rest[k] += only_n<R>(d == 0 ? splat<R>(0) : exp_nonpositive(d), count, R(0));
    if constexpr (kind == U::uniform) ud[k] += only_n<R>(d, count, R(0));
    if constexpr (kind == U::classes || kind == U::probs) {
      Vec<R> u = only_n<R>(row_u<R, kind>(classes, probs, keep, uniform, i, count), count, R(0));
      us[k] += u;
      ud[k] += u == 0 ? u : u * d;
    }
  });
  auto total = [](const Vec<R>* v) __attribute__((always_inline)) {
    return sum_lanes<R>(v[0]) + sum_lanes<R>(v[1]) + sum_lanes<R>(v[2]) + sum_lanes<R>(v[3]);
  };
  if constexpr (kind == U::uniform)
    return {total(rest), double(uniform) * n, double(uniform) * total(ud)};
  return {total(rest), total(us), total(ud)};
}

template <class R>
struct FocalSums {
  double loss = 0, u_psi = 0;
};

template <class R, U kind>
FocalSums<R> chunk_focal(const R* z, const R* classes, const R* probs, R keep,
                                          R uniform, R m, R rest, R log1p_rest, R gamma,
                                          int64_t n) {
  Vec<R> loss{}, u_psi{};
  for_each_vec<R>(n, [&](int64_t i, int, auto count) __attribute__((always_inline)) {
    Vec<R> d = load_n<R>(z + i, count) - m;
    Vec<R> u = only_n<R>(row_u<R, kind>(classes, probs, keep, uniform, i, count), count, R(0));
    Focal<R> f = focal_terms<R>(d, exp_nonpositive(d), splat(rest), splat(log1p_rest), gamma);
    loss += u == 0 ? u : u * f.loss;
    u_psi += u == 0 ? u : u * f.psi;
  });
  return {sum_lanes<R>(loss), sum_lanes<R>(u_psi)};
}

// g_j = upstream * (u_j psi_j) + per_exp * exp(z_j - m)
template <class R, U kind, bool focal>
void chunk_gradient(const R* z, R* g, const R* classes, const R* probs, R keep,
                                     R uniform, R m, R rest, R log1p_rest, R gamma, R upstream,
                                     R per_exp, int64_t n) {
  for_each_vec<R>(n, [&](int64_t i, int, auto count) __attribute__((always_inline)) {
    Vec<R> d = load_n<R>(z + i, count) - m;
    Vec<R> e = exp_nonpositive(d);
    Vec<R> v = e * per_exp;
    if constexpr (kind != U::none) {
      Vec<R> u = row_u<R, kind>(classes, probs, keep, uniform, i, count) * upstream;
      if constexpr (focal) {
        Focal<R> f = focal_terms<R>(d, e, splat(rest), splat(log1p_rest), gamma);
        v += u == 0 ? u : u * f.psi;
      } else {
        v -= u;
      }
    }
    store_n<R>(g + i, v, count);
  });
}

// ---- Tiles: lanes are positions, z is [classes][width] ----------------------------------------

template <class R>
struct TileRow {  // per position, `width` of each
  R *m, *rest, *u_psi, *loss, *own_u, *upstream;
  Int<R>* target;  // -1: none
};

template <class R>
struct TileU {
  const R* classes;  // per class, or null
  const R* probs;    // [classes][width], or null
  R keep, uniform;
};

template <class R>
TORCHFAST_INLINE Vec<R> tile_u(const TileU<R>& u, const TileRow<R>& row, int64_t c, int64_t width,
                               int64_t i, IntVec<R> target, Vec<R> own_u) {
  if (u.probs) return (load<R>(u.probs + c * width + i) * u.keep + u.uniform) * u.classes[c];
  return u.classes[c] + (target == Int<R>(c) ? own_u : splat<R>(0));
}

// dense: u has more than the index target's own class.
template <class R, bool dense, bool focal>
void tile_forward(const R* z, const TileU<R>& tile, const TileRow<R>& row,
                                   int64_t classes, int64_t width, R gamma, R z_loss) {
  constexpr int L = Simd<R>::lanes;
  for (int64_t i = 0; i < width; i += L) {
    Vec<R> m = splat(-std::numeric_limits<R>::infinity());
    for (int64_t c = 0; c < classes; ++c) {
      Vec<R> v = load<R>(z + c * width + i);
      m = v > m ? v : m;
    }
    IntVec<R> target;
    __builtin_memcpy(&target, row.target + i, sizeof(target));
    Vec<R> own_u = load<R>(row.own_u + i), own_d{};
    Vec<R> rest{}, ties = splat<R>(-1);
    for (int64_t block = 0; block < classes; block += 64) {  // two-level sum: 64 terms, then blocks
      Vec<R> part{};
      for (int64_t c = block; c < std::min(block + 64, classes); ++c) {
        Vec<R> d = load<R>(z + c * width + i) - m;
        part += d == 0 ? splat<R>(0) : exp_nonpositive(d);
        ties += d == 0 ? splat<R>(1) : splat<R>(0);
        own_d = target == Int<R>(c) ? d : own_d;
      }
      rest += part;
    }
    rest += ties;
    Vec<R> log1p_rest = log1p_nonnegative(rest);
    Vec<R> loss{}, u_psi{};
    if constexpr (!dense) {
      if constexpr (focal) {
        auto f = focal_terms<R>(own_d, exp_nonpositive(own_d), rest, log1p_rest, gamma);
        loss = own_u * f.loss;
        u_psi = own_u * f.psi;
      } else {
        loss = own_u * (log1p_rest - own_d);
        u_psi = -own_u;
      }
      loss = own_u == 0 ? own_u : loss;
    } else {
      for (int64_t c = 0; c < classes; ++c) {
        Vec<R> d = load<R>(z + c * width + i) - m;
        Vec<R> u = tile_u<R>(tile, row, c, width, i, target, own_u);
        if constexpr (focal) {
          auto f = focal_terms<R>(d, exp_nonpositive(d), rest, log1p_rest, gamma);
          loss += u == 0 ? u : u * f.loss;
          u_psi += u == 0 ? u : u * f.psi;
        } else {
          loss += u == 0 ? u : u * (log1p_rest - d);
          u_psi -= u;
        }
      }
    }
    if (z_loss != 0) {
      Vec<R> lse = m + log1p_rest;
      loss += lse * lse * z_loss;
    }
    store(row.m + i, m);
    store(row.rest + i, rest);
    store(row.u_psi + i, u_psi);
    store(row.loss + i, loss);
  }
}

// z becomes the gradient with respect to z.
template <class R, bool dense, bool focal>
void tile_backward(R* z, const TileU<R>& tile, const TileRow<R>& row,
                                    int64_t classes, int64_t width, R gamma, R z_loss, R scale,
                                    R softcap) {
  constexpr int L = Simd<R>::lanes;
  for (int64_t i = 0; i < width; i += L) {
    Vec<R> m = load<R>(row.m + i), rest = load<R>(row.rest + i), u_psi = load<R>(row.u_psi + i);
    Vec<R> upstream = load<R>(row.upstream + i), own_u = load<R>(row.own_u + i) * upstream;
    IntVec<R> target;
    __builtin_memcpy(&target, row.target + i, sizeof(target));
    Vec<R> log1p_rest{};
    if (focal || z_loss != 0) log1p_rest = log1p_nonnegative(rest);
    Vec<R> per_exp = -u_psi;
    if (z_loss != 0) per_exp += (m + log1p_rest) * (R(2) * z_loss);
    per_exp = per_exp * upstream / (rest + R(1));
    Vec<R> own = u_psi * upstream;
    for (int64_t c = 0; c < classes; ++c) {
      R* zc = z + c * width + i;
      Vec<R> value = load<R>(zc);
      Vec<R> d = value - m;
      Vec<R> e = exp_nonpositive(d);
      Vec<R> g = e * per_exp;
      if constexpr (!dense) {
        g += target == Int<R>(c) ? own : splat<R>(0);
      } else {
        Vec<R> u = tile_u<R>(tile, row, c, width, i, target, splat<R>(0)) * upstream;
        u += target == Int<R>(c) ? own_u : splat<R>(0);
        if constexpr (focal) {
          auto f = focal_terms<R>(d, e, rest, log1p_rest, gamma);
          g += u == 0 ? u : u * f.psi;
        } else {
          g -= u;
        }
      }
      g = g * scale;
      if (softcap != 0) g = g * (R(1) - (value / softcap) * (value / softcap));
      store(zc, upstream == 0 ? splat<R>(0) : g);
    }
  }
}

// ---- Arguments -------------------------------------------------------------------------------

double to_double(float x) { return x; }
double to_double(double x) { return x; }
double to_double(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
double to_double(f16 x) {
  Vec<float> v = load_first<float>(&x, 1);
  return v[0];
}
template <class T, class R>
T from_real(R x) {
  if constexpr (std::is_same_v<T, R>) {
    return x;
  } else {
    T result;
    store_first<float>(&result, splat<float>(x), 1);
    return result;
  }
}

int64_t load_index(const void* p, ScalarType dtype, int64_t i) {
  switch (dtype) {
    case ScalarType::Long: return static_cast<const int64_t*>(p)[i];
    case ScalarType::Int: return static_cast<const int32_t*>(p)[i];
    case ScalarType::Short: return static_cast<const int16_t*>(p)[i];
    case ScalarType::Char: return static_cast<const int8_t*>(p)[i];
    case ScalarType::Byte: return static_cast<const uint8_t*>(p)[i];
    default: return -1;
  }
}

bool is_float(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
         dtype == ScalarType::BFloat16;
}

template <class R>
constexpr ScalarType real_type = std::is_same_v<R, float> ? ScalarType::Float : ScalarType::Double;

Tensor as_contiguous(const Tensor& x, ScalarType dtype) {
  Tensor converted = x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
  return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
}

// Memory of one tile, per thread.
template <class R>
struct TileBuffers {
  TileBuffers(int64_t classes, int64_t width, bool probs)
      : z(classes * width), y(probs ? classes * width : 0), rows(6 * width), target(width) {
    R* p = rows.data();
    row = {p, p + width, p + 2 * width, p + 3 * width, p + 4 * width, p + 5 * width, target.data()};
  }
  std::vector<R> z, y, rows;
  std::vector<Int<R>> target;
  TileRow<R> row;
};

// The arguments both passes share, in the form the kernels read.
template <class T, class R>
struct Problem {
  Problem(const Arguments& arguments, const Tensor* gradient)
      : a(arguments),
        class_dim(a.logits.dim() == 1 ? 0 : 1),
        classes(a.logits.size(class_dim)),
        probabilities(is_float(a.target.scalar_type())),
        target(readable_target()),
        positions(a.logits, class_dim, {&a.logits, probabilities ? &target : nullptr, gradient}) {
    check();
    keep = R(1 - a.label_smoothing);
    uniform = R(a.label_smoothing / classes);
    bool weighted = a.weight || a.alpha;
    class_u.assign(classes, probabilities ? R(1) : uniform);
    if (a.weight) class_weight.assign(classes, R(1));
    if (weighted) own.assign(classes, keep);
    for (const auto* source : {&a.weight, &a.alpha}) {
      if (!*source) continue;
      Tensor contiguous = as_contiguous(**source, real_type<R>);
      const R* values = static_cast<const R*>(contiguous.const_data_ptr());
      int64_t step = contiguous.numel() == 1 ? 0 : 1;
      for (int64_t c = 0; c < classes; ++c) {
        class_u[c] *= values[c * step];
        own[c] *= values[c * step];
        if (source == &a.weight) class_weight[c] = values[c * step];
      }
    }
    if (a.sample_weight) {
      sample_weight_tensor = as_contiguous(*a.sample_weight, real_type<R>);
      sample_weight = static_cast<const R*>(sample_weight_tensor->const_data_ptr());
    }
    if (probabilities)
      kind = U::probs;
    else if (a.label_smoothing == 0)
      kind = U::none;
    else
      kind = weighted ? U::classes : U::uniform;
    x = static_cast<const T*>(a.logits.const_data_ptr());
    t = target.const_data_ptr();
    by_rows = classes >= kRowClasses && a.logits.stride(class_dim) == 1;
    width = std::clamp<int64_t>(kTileElements / classes, 16, 512) / 16 * 16;
    per_block = by_rows ? std::max<int64_t>(1, 16384 / classes) : width;
    blocks = (positions.count() + per_block - 1) / per_block;
  }

  // Probabilities as R or half precision, indices as an integer type that load_index reads.
  Tensor readable_target() const {
    auto dtype = a.target.scalar_type();
    if (probabilities) {
      bool staged = dtype == real_type<R> || (std::is_same_v<R, float> && dtype != ScalarType::Double);
      return staged ? a.target : torch::stable::to(a.target, real_type<R>);
    }
    bool known = dtype == ScalarType::Long || dtype == ScalarType::Int || dtype == ScalarType::Short ||
                 dtype == ScalarType::Char || dtype == ScalarType::Byte;
    return as_contiguous(a.target, known ? dtype : ScalarType::Long);
  }

  void check() const {  // memory safety for direct callers of the op; the messages are the public function's
    int64_t rows = positions.count();
    STD_TORCH_CHECK(classes > 0, "input must have at least one class");
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

  // The index target of position i, or -1 for an ignored row. An illegal one is noted, and ignored.
  int64_t index(int64_t i) {
    if (probabilities) return 0;
    int64_t value = load_index(t, target.scalar_type(), i);
    if (value == a.ignore_index) return -1;
    if (value >= 0 && value < classes) return value;
    int64_t seen = first_bad.load(std::memory_order_relaxed);
    while (i < seen && !first_bad.compare_exchange_weak(seen, i)) {
    }
    return -1;
  }
  void throw_if_out_of_range() const {
    int64_t i = first_bad.load();
    if (i == INT64_MAX) return;
    throw std::out_of_range("target " + std::to_string(load_index(t, target.scalar_type(), i)) +
                            " is out of range: allowed are 0 to " + std::to_string(classes - 1) +
                            " and ignore_index");
  }
  R own_u(int64_t index) const {
    if (probabilities || index < 0) return 0;
    return own.empty() ? keep : own[index];
  }
  double sample(int64_t i) const { return sample_weight ? double(sample_weight[i]) : 1.0; }
  double divisor_term(int64_t index) const {
    return class_weight.empty() || probabilities ? 1.0 : double(class_weight[index]);
  }

  // n values from p (stride apart) as R in `buffer`, or p itself where it is that already.
  template <class S>
  static const R* stage(const S* p, int64_t stride, int64_t n, R* buffer) {
    if (stride != 1) {
      for (int64_t c = 0; c < n; ++c) buffer[c] = R(to_double(p[c * stride]));
      return buffer;
    }
    if constexpr (std::is_same_v<S, R>) {
      return p;
    } else {
      widen<R>(p, buffer, n);
      return buffer;
    }
  }
  const R* stage_logits(int64_t i, int64_t c, int64_t n, R* buffer) const {
    int64_t stride = a.logits.stride(class_dim);
    const R* z = stage(x + positions.offset(i, 0) + c * stride, stride, n, buffer);
    if (a.transformed()) {
      if (z != buffer) std::copy(z, z + n, buffer);
      transform<R>(buffer, n, R(a.logit_scale), R(a.softcap));
      return buffer;
    }
    return z;
  }
  // f(pointer to the probabilities as their own type)
  template <class F>
  auto with_probs(const F& f) const {
    auto dtype = target.scalar_type();
    if constexpr (std::is_same_v<R, float>) {
      if (dtype == ScalarType::BFloat16) return f(static_cast<const bf16*>(t));
      if (dtype == ScalarType::Half) return f(static_cast<const f16*>(t));
    }
    return f(static_cast<const R*>(t));
  }
  const R* stage_probs(int64_t i, int64_t c, int64_t n, R* buffer) const {
    if (!probabilities) return nullptr;
    int64_t stride = target.stride(class_dim);
    return with_probs([&](auto* y) {
      return stage(y + positions.offset(i, 1) + c * stride, stride, n, buffer);
    });
  }

  // Positions i .. i+n-1 of p as [classes][width]; idle lanes 0.
  template <class S>
  void stage_tile(const S* p, int k, int64_t class_stride, int64_t i, int64_t n, R* tile) const {
    if (n < width) std::fill(tile, tile + classes * width, R(0));
    if (positions.inner_stride(k) == 1 && positions.is_run(i, n)) {
      const S* from = p + positions.offset(i, k);
      for (int64_t c = 0; c < classes; ++c) widen<R>(from + c * class_stride, tile + c * width, n);
      return;
    }
    for_each_offset(k, i, n, [&](int64_t j, int64_t offset) {
      for (int64_t c = 0; c < classes; ++c) {
        if constexpr (std::is_same_v<S, R>)
          tile[c * width + j] = p[offset + c * class_stride];
        else
          tile[c * width + j] = R(to_double(p[offset + c * class_stride]));
      }
    });
  }
  // Fills z, y, target and own_u for positions i .. i+n-1.
  TileU<R> load_tile(TileBuffers<R>& tile, int64_t i, int64_t n) {
    stage_tile(x, 0, a.logits.stride(class_dim), i, n, tile.z.data());
    if (a.transformed()) transform<R>(tile.z.data(), classes * width, R(a.logit_scale), R(a.softcap));
    if (probabilities)
      with_probs([&](auto* y) { stage_tile(y, 1, target.stride(class_dim), i, n, tile.y.data()); });
    for (int64_t j = 0; j < width; ++j) {
      int64_t own_class = j < n ? index(i + j) : -1;
      tile.row.target[j] = probabilities ? -1 : own_class;
      tile.row.own_u[j] = own_u(own_class);
    }
    return {class_u.data(), probabilities ? tile.y.data() : nullptr, keep, uniform};
  }
  template <class F>
  void for_each_offset(int k, int64_t i, int64_t n, const F& f) const {
    if (positions.is_run(i, n)) {
      int64_t base = positions.offset(i, k), step = positions.inner_stride(k);
      for (int64_t j = 0; j < n; ++j) f(j, base + j * step);
    } else {
      for (int64_t j = 0; j < n; ++j) f(j, positions.offset(i + j, k));
    }
  }
  void unstage_tile(const R* tile, T* out, int64_t class_stride, int64_t i, int64_t n) const {
    if (positions.inner_stride(2) == 1 && positions.is_run(i, n)) {
      T* to = out + positions.offset(i, 2);
      for (int64_t c = 0; c < classes; ++c) narrow<R>(tile + c * width, to + c * class_stride, n);
      return;
    }
    for_each_offset(2, i, n, [&](int64_t j, int64_t offset) {
      for (int64_t c = 0; c < classes; ++c)
        out[offset + c * class_stride] = from_real<T>(tile[c * width + j]);
    });
  }

  const Arguments& a;
  int64_t class_dim, classes;
  bool probabilities;
  Tensor target;
  Positions positions;
  std::optional<Tensor> sample_weight_tensor;
  const R* sample_weight = nullptr;
  const T* x;
  const void* t;
  R keep, uniform;                           // 1-e, e/K
  std::vector<R> class_u, class_weight, own;  // w a e/K (w a for probabilities); w; w a (1-e)
  U kind;
  bool by_rows;
  int64_t width, per_block, blocks;
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

// ---- Forward ---------------------------------------------------------------------------------

template <class R>
struct RowResult {
  double loss;
  R m, rest, u_psi;
};

template <U kind, class T, class R>
RowResult<R> forward_row(const Problem<T, R>& problem, int64_t i, int64_t target) {
  const Arguments& o = problem.a;
  alignas(64) R z_buffer[kChunk], y_buffer[kChunk];
  R m = -std::numeric_limits<R>::infinity(), z_target = 0;
  double ties = 0;
  Sums sums;
  for (int64_t c = 0; c < problem.classes; c += kChunk) {
    int64_t n = std::min(kChunk, problem.classes - c);
    const R* z = problem.stage_logits(i, c, n, z_buffer);
    const R* y = problem.stage_probs(i, c, n, y_buffer);
    const R* u = problem.class_u.data() + c;
    if (target >= c && target < c + n) z_target = z[target - c];
    R chunk = chunk_max<R>(z, n);
    if (chunk > m) {
      if (m > -std::numeric_limits<R>::infinity()) {
        sums.rest = (sums.rest + ties) * std::exp(double(m) - double(chunk));
        sums.ud += (double(m) - double(chunk)) * sums.u;
      }
      m = chunk;
      ties = 0;
    }
    if (m == -std::numeric_limits<R>::infinity()) {
      Sums& s = sums;
      for (int64_t j = 0; j < n; ++j) {
        if (std::isnan(z[j])) s.rest = NAN;
        R uj = kind == U::none ? R(0) : kind == U::probs ? u[j] * (y[j] * problem.keep + problem.uniform) : u[j];
        s.u += uj;
        if (uj != 0) s.ud = -INFINITY;
      }
      continue;
    }
    if (chunk == m) ties += chunk_count<R>(z, n, m);
    Sums part = chunk_sums<R, kind>(z, u, y, problem.keep, problem.uniform, m, n);
    sums.rest += part.rest;
    sums.u += part.u;
    sums.ud += part.ud;
  }
  double rest = ties > 0 ? sums.rest + (ties - 1) : NAN;
  double log1p_rest = std::log1p(rest);
  double own_u = problem.own_u(target), own_d = double(z_target) - double(m);
  double loss = 0, u_psi = 0;
  if (own_u != 0) {
    loss = own_u * (log1p_rest - own_d);
    u_psi = -own_u;
    if (o.gamma > 0) {
      auto f = focal_terms<double>(splat(own_d), splat(std::exp(own_d)), splat(rest),
                                   splat(log1p_rest), o.gamma);
      loss = own_u * f.loss[0];
      u_psi = own_u * f.psi[0];
    }
  }
  if constexpr (kind != U::none) {
    if (o.gamma == 0) {
      if (sums.u != 0) loss += log1p_rest * sums.u;
      loss -= sums.ud;
      u_psi -= sums.u;
    } else {
      for (int64_t c = 0; c < problem.classes; c += kChunk) {
        int64_t n = std::min(kChunk, problem.classes - c);
        const R* z = problem.stage_logits(i, c, n, z_buffer);
        const R* y = problem.stage_probs(i, c, n, y_buffer);
        constexpr U dense = kind == U::uniform ? U::classes : kind;
        auto part = chunk_focal<R, dense>(z, problem.class_u.data() + c, y, problem.keep,
                                          problem.uniform, m, R(rest), R(log1p_rest), R(o.gamma), n);
        loss += part.loss;
        u_psi += part.u_psi;
      }
    }
  }
  if (o.z_loss != 0) loss += o.z_loss * (m + log1p_rest) * (m + log1p_rest);
  return {loss, m, R(rest), R(u_psi)};
}

template <class T, class R>
std::tuple<Tensor, Tensor, Tensor> forward(const Arguments& a) {
  Problem<T, R> problem(a, nullptr);
  int64_t rows = problem.positions.count();
  bool each = a.reduction == 0;
  std::vector<int64_t> loss_sizes;
  for (int64_t d = 0; each && d < a.logits.dim(); ++d)
    if (d != problem.class_dim) loss_sizes.push_back(a.logits.size(d));
  auto dtype = real_type<R>;
  Tensor loss = torch::stable::new_empty(a.logits, loss_sizes, dtype);
  Tensor divisor = torch::stable::new_empty(a.logits, {}, dtype);
  Tensor stats = torch::stable::new_empty(a.logits, {3, rows}, dtype);
  R* loss_out = static_cast<R*>(loss.mutable_data_ptr());
  R* stats_out = static_cast<R*>(stats.mutable_data_ptr());
  std::vector<double> loss_sum(problem.blocks), divisor_sum(problem.blocks);

  auto finish = [&](int64_t block, int64_t i, int64_t index, const RowResult<R>& r) {
    double sample = problem.sample(i);
    bool counts = index >= 0 && sample != 0;
    double row_loss = counts ? r.loss * sample : 0.0;
    stats_out[i] = counts ? r.m : R(0);
    stats_out[rows + i] = counts ? r.rest : R(0);
    stats_out[2 * rows + i] = counts ? r.u_psi : R(0);
    loss_sum[block] += row_loss;
    if (index >= 0) divisor_sum[block] += sample * problem.divisor_term(index);
    if (each) loss_out[i] = R(row_loss);
  };
  for_each_block(problem.blocks, problem.per_block * problem.classes, [&](int64_t block) {
    int64_t begin = block * problem.per_block, end = std::min(rows, begin + problem.per_block);
    if (problem.by_rows) {
      with_kind(problem.kind, [&](auto kind) {
        for (int64_t i = begin; i < end; ++i) {
          int64_t index = problem.index(i);
          bool skip = index < 0 || problem.sample(i) == 0;
          finish(block, i, index, skip ? RowResult<R>{} : forward_row<kind()>(problem, i, index));
        }
      });
      return;
    }
    int64_t n = end - begin, width = problem.width;
    thread_local std::optional<TileBuffers<R>> buffers;
    buffers.emplace(problem.classes, width, problem.probabilities);
    auto& row = buffers->row;
    TileU<R> tile = problem.load_tile(*buffers, begin, n);
    with_bools(problem.kind != U::none, a.gamma > 0, [&](auto dense, auto focal) {
      tile_forward<R, dense(), focal()>(buffers->z.data(), tile, row, problem.classes, width,
                                        R(a.gamma), R(a.z_loss));
    });
    for (int64_t j = 0; j < n; ++j)
      finish(block, begin + j, problem.probabilities ? 0 : row.target[j],
             {double(row.loss[j]), row.m[j], row.rest[j], row.u_psi[j]});
  });
  problem.throw_if_out_of_range();

  double total = 0, total_divisor = 0;
  for (int64_t block = 0; block < problem.blocks; ++block) {
    total += loss_sum[block];
    total_divisor += divisor_sum[block];
  }
  if (a.reduction != 1) total_divisor = 1;
  if (!each) *loss_out = total_divisor == 0 && a.empty_zero ? R(0) : R(total / total_divisor);
  *static_cast<R*>(divisor.mutable_data_ptr()) = R(total_divisor);
  return {loss, divisor, stats};
}

// ---- Backward --------------------------------------------------------------------------------

template <U kind, bool focal, class T, class R>
void backward_row(const Problem<T, R>& problem, int64_t i, int64_t target, R m, R rest, R u_psi,
                  R upstream, T* out, int64_t out_stride) {
  const Arguments& o = problem.a;
  alignas(64) R z_buffer[kChunk], y_buffer[kChunk], g_buffer[kChunk];
  double log1p_rest = focal || o.z_loss != 0 ? std::log1p(double(rest)) : 0.0;
  double per_exp = (-double(u_psi) + 2 * o.z_loss * (m + log1p_rest)) * upstream / (1 + double(rest));
  bool direct = std::is_same_v<T, R> && out_stride == 1 && !o.transformed();
  for (int64_t c = 0; c < problem.classes; c += kChunk) {
    int64_t n = std::min(kChunk, problem.classes - c);
    const R* z = problem.stage_logits(i, c, n, z_buffer);
    const R* y = problem.stage_probs(i, c, n, y_buffer);
    R* g = direct ? reinterpret_cast<R*>(out + c) : g_buffer;
    R z_target = target >= c && target < c + n ? z[target - c] : R(0);
    chunk_gradient<R, kind, focal>(z, g, problem.class_u.data() + c, y, problem.keep,
                                   problem.uniform, m, rest, R(log1p_rest), R(o.gamma), upstream,
                                   R(per_exp), n);
    if (!problem.probabilities && target >= c && target < c + n) {
      double own = u_psi;
      if constexpr (kind != U::none) {
        double d = double(z_target) - m;
        own = -double(problem.own_u(target));
        if constexpr (focal)
          own = -own * focal_terms<double>(splat(d), splat(std::exp(d)), splat(double(rest)),
                                           splat(log1p_rest), o.gamma).psi[0];
        if (problem.own_u(target) == 0) own = 0;
      }
      g[target - c] += R(own * upstream);
    }
    if (direct) continue;
    if (o.transformed()) transform_gradient<R>(g, z, n, R(o.logit_scale), R(o.softcap));
    if (out_stride == 1)
      narrow<R>(g, out + c, n);
    else
      for (int64_t j = 0; j < n; ++j) out[(c + j) * out_stride] = from_real<T>(g[j]);
  }
}

template <class T, class R>
void backward(const Arguments& a, const Tensor& grad_loss, const Tensor& divisor, const Tensor& stats,
              const Tensor& gradient) {
  Problem<T, R> problem(a, &gradient);
  int64_t rows = problem.positions.count();
  STD_TORCH_CHECK(stats.numel() == 3 * rows && divisor.numel() == 1 &&
                      (grad_loss.numel() == 1 || grad_loss.numel() == rows),
                  "backward was given residuals of another forward");
  Tensor grad = as_contiguous(grad_loss, real_type<R>), residuals = as_contiguous(stats, real_type<R>);
  Tensor divisor_tensor = as_contiguous(divisor, real_type<R>);
  const R* grad_in = static_cast<const R*>(grad.const_data_ptr());
  const R* stats_in = static_cast<const R*>(residuals.const_data_ptr());
  double divided = *static_cast<const R*>(divisor_tensor.const_data_ptr());
  double per_row = divided == 0 ? 0 : 1 / divided;
  int64_t grad_step = a.reduction == 0 ? 1 : 0;
  int64_t out_stride = gradient.stride(problem.class_dim);
  T* out = static_cast<T*>(gradient.mutable_data_ptr());

  auto upstream = [&](int64_t i, int64_t index) {
    double sample = problem.sample(i);
    return index < 0 || sample == 0 ? R(0) : R(grad_in[i * grad_step] * per_row * sample);
  };
  for_each_block(problem.blocks, problem.per_block * problem.classes, [&](int64_t block) {
    int64_t begin = block * problem.per_block, end = std::min(rows, begin + problem.per_block);
    if (problem.by_rows) {
      for (int64_t i = begin; i < end; ++i) {
        int64_t index = problem.index(i);
        R g = upstream(i, index);
        T* row = out + problem.positions.offset(i, 2);
        if (g == 0) {
          for (int64_t c = 0; c < problem.classes; ++c) row[c * out_stride] = T{};
          continue;
        }
        R m = stats_in[i], rest = stats_in[rows + i], u_psi = stats_in[2 * rows + i];
        with_kind(problem.kind, [&](auto kind) {
          constexpr U dense = kind() == U::uniform ? U::classes : kind();
          if (a.gamma > 0 && kind() != U::none)
            backward_row<dense, dense != U::none>(problem, i, index, m, rest, u_psi, g, row, out_stride);
          else
            backward_row<kind(), false>(problem, i, index, m, rest, u_psi, g, row, out_stride);
        });
      }
      return;
    }
    int64_t n = end - begin, width = problem.width;
    thread_local std::optional<TileBuffers<R>> buffers;
    buffers.emplace(problem.classes, width, problem.probabilities);
    auto& row = buffers->row;
    TileU<R> tile = problem.load_tile(*buffers, begin, n);
    for (int64_t j = 0; j < width; ++j) {
      int64_t i = begin + j;
      bool idle = j >= n || (!problem.probabilities && row.target[j] < 0);
      row.upstream[j] = idle ? R(0) : upstream(i, 0);
      row.m[j] = idle ? R(0) : stats_in[i];
      row.rest[j] = idle ? R(0) : stats_in[rows + i];
      row.u_psi[j] = idle ? R(0) : stats_in[2 * rows + i];
    }
    with_bools(problem.kind != U::none, a.gamma > 0, [&](auto dense, auto focal) {
      tile_backward<R, dense(), focal()>(buffers->z.data(), tile, row, problem.classes, width,
                                         R(a.gamma), R(a.z_loss),
                                         R(a.logit_scale), R(a.softcap));
    });
    problem.unstage_tile(buffers->z.data(), out, out_stride, begin, n);
  });
}

// ---- Dispatcher ops --------------------------------------------------------------------------

template <class F>
auto with_logits_type(const Tensor& logits, const F& f) {
  switch (logits.scalar_type()) {
    case ScalarType::Float: return f(float{}, float{});
    case ScalarType::BFloat16: return f(bf16{}, float{});
    case ScalarType::Half: return f(f16{}, float{});
    case ScalarType::Double: return f(double{}, double{});
    default: STD_TORCH_CHECK(false, "input must be float32, bfloat16, float16 or float64");
  }
  throw std::logic_error("unreachable");
}

std::tuple<Tensor, Tensor, Tensor> run_forward(const Arguments& a) {
  return with_logits_type(a.logits, [&](auto t, auto r) { return forward<decltype(t), decltype(r)>(a); });
}

void run_backward(const Arguments& a, const Tensor& grad_loss, const Tensor& divisor, const Tensor& stats,
                  const Tensor& gradient) {
  with_logits_type(a.logits, [&](auto t, auto r) {
    backward<decltype(t), decltype(r)>(a, grad_loss, divisor, stats, gradient);
  });
}

}  // namespace
}  // namespace torchfast::TORCHFAST_ISA

#ifdef TORCHFAST_LAST_ISA
namespace torchfast {
namespace {

std::tuple<Tensor, Tensor, Tensor> cross_entropy(Tensor logits, Tensor target, std::optional<Tensor> weight, std::optional<Tensor> alpha,
    std::optional<Tensor> sample_weight, int64_t ignore_index, int64_t reduction, double label_smoothing,
    double gamma, double z_loss, double softcap, double logit_scale, bool empty_zero, bool) {
  return TORCHFAST_DISPATCH(run_forward)({logits, target, weight, alpha, sample_weight, ignore_index, reduction,
                         label_smoothing, gamma, z_loss, softcap, logit_scale, empty_zero});
}

Tensor cross_entropy_backward(Tensor grad_loss, Tensor logits, Tensor target, std::optional<Tensor> weight, std::optional<Tensor> alpha,
    std::optional<Tensor> sample_weight, int64_t ignore_index, int64_t reduction, double label_smoothing,
    double gamma, double z_loss, double softcap, double logit_scale, bool empty_zero, bool, Tensor divisor, Tensor stats) {
  Tensor gradient = torch::stable::empty_like(logits);
  advise_huge_pages(gradient.mutable_data_ptr(), gradient.numel() * gradient.element_size());
  TORCHFAST_DISPATCH(run_backward)({logits, target, weight, alpha, sample_weight, ignore_index, reduction,
                         label_smoothing, gamma, z_loss, softcap, logit_scale, empty_zero}, grad_loss, divisor, stats, gradient);
  return gradient;
}

// Writes the gradient over the logits.
void cross_entropy_backward_(Tensor grad_loss, Tensor logits, Tensor target, std::optional<Tensor> weight, std::optional<Tensor> alpha,
    std::optional<Tensor> sample_weight, int64_t ignore_index, int64_t reduction, double label_smoothing,
    double gamma, double z_loss, double softcap, double logit_scale, bool empty_zero, bool, Tensor divisor, Tensor stats) {
  TORCHFAST_DISPATCH(run_backward)({logits, target, weight, alpha, sample_weight, ignore_index, reduction,
                         label_smoothing, gamma, z_loss, softcap, logit_scale, empty_zero}, grad_loss, divisor, stats, logits);
}

}  // namespace
}  // namespace torchfast

STABLE_TORCH_LIBRARY_IMPL(torchfast, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&torchfast::cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&torchfast::cross_entropy_backward));
  m.impl("cross_entropy_backward_", TORCH_BOX(&torchfast::cross_entropy_backward_));
}
#endif
