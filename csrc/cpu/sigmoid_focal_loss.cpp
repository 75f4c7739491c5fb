// Sigmoid focal loss / binary cross entropy / asymmetric loss on the CPU. Formula and reference:
// torchfast/losses/sigmoid_focal_loss.
//
// Forward and backward are one pass over the elements each, in the memory order of the output, in tiles
// that fit in L1. A tile is read where it lies if it is dense there, half precision widened in registers;
// else it is gathered first. Integer targets become a tile of codes of one byte; so do class ids, whose
// one-hot matrix never exists. All of the mathematics is in R = float (double for double logits).
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
  std::optional<Tensor> weight, pos_weight, mask;
  int64_t ignore_index, reduction;
  double alpha, gamma, gamma_neg, clip, label_smoothing;
  bool empty_zero;
};
}  // namespace
}  // namespace torchfast
#endif

#define TORCHFAST_FILE "cpu/sigmoid_focal_loss.cpp"
#include "../foreach_isa.h"
#include "../tensors.h"
#include "../walk.h"

namespace torchfast::TORCHFAST_ISA {
namespace {

constexpr int64_t kTile = 1024;    // elements that stay in L1 between gathering and use
constexpr int64_t kBlock = 16384;  // elements whose losses are one term of the sum, whatever the threads

// ---- Per-lane mathematics --------------------------------------------------------------------

// The first half of the digits: products of two such halves are exact.
template <class R>
TORCHFAST_INLINE Vec<R> leading_digits(Vec<R> x) {
  constexpr Int<R> rest = (Int<R>(1) << (sizeof(R) == 4 ? 12 : 27)) - 1;
  return bit_cast<Vec<R>>(bit_cast<IntVec<R>>(x) & ~rest);
}

// factor * value, but 0 for a factor of 0, whatever the value.
template <class R>
TORCHFAST_INLINE Vec<R> times(Vec<R> factor, Vec<R> value) {
  return factor == 0 ? splat<R>(0) : factor * value;
}

// x^g of 0 <= x <= 1, where x = exp(-(a + b)): powers other than the usual ones go through this
// logarithm, which is exact where x itself has underflowed.
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
    a = a > R(1e6) ? splat(R(1e6)) : a;  // what is multiplied by this power is 0 there, and inf - inf NaN
    Vec<R> a_high = leading_digits<R>(a), a_low = a - a_high;
    return exp_nonpositive(a_high * -high, -(a_low * high + a * low + b * g));
  }

  int integer;  // the exponent if it is 0 to 4, else -1
  R g, high, low;
};

// Which parts of the formula a kernel has. With one exponent for both sides they are mirror images.
enum class Mode { bce, focal, asymmetric };

constexpr double kLeastClip = 1e-30;  // less is nothing, and p - clip could be subnormal

// A and B of the formula are linear in the target: A = y a1 + a0, B = (1 - y) b1 + b0.
template <class R>
struct Formula {
  Formula(const Arguments& a, double factor)
      : positive(a.gamma),
        negative(a.gamma_neg),
        clip(a.clip < kLeastClip ? R(0) : R(a.clip)),
        mode(clip > 0 || a.gamma != a.gamma_neg ? Mode::asymmetric
             : a.gamma > 0                      ? Mode::focal
                                                : Mode::bce) {
    double alpha = factor * (a.alpha < 0 ? 1 : a.alpha), beta = factor * (a.alpha < 0 ? 1 : 1 - a.alpha);
    a1 = R(alpha * (1 - a.label_smoothing)), a0 = R(alpha * a.label_smoothing / 2);
    b1 = R(beta * (1 - a.label_smoothing)), b0 = R(beta * a.label_smoothing / 2);
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
  // Those of -z where `negative`.
  TORCHFAST_INLINE Sides mirrored(IntVec<R> negative) const {
    return {negative ? q : p, negative ? p : q, near, negative ? plus : minus, negative ? minus : plus};
  }
  Vec<R> p, q, near, minus, plus;
};

template <class R>
TORCHFAST_INLINE Vec<R> magnitude(Vec<R> z) {
  return bit_cast<Vec<R>>(bit_cast<IntVec<R>>(z) & std::numeric_limits<Int<R>>::max());
}

// p^g (-log q): the loss of a negative whose probability is p. A positive's is that of -z.
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

// The same with p_m = p - clip, and 0 where that is not positive.
template <class R>
struct Clipped {
  TORCHFAST_INLINE Clipped(const Sides<R>& s, const Power<R>& gamma, R clip)
      : p_q(s.p * s.q), p_m(s.p - clip), rest(s.q + clip), g(gamma.g) {
    // 1 - p_m keeps the digits of q, and its logarithm those of p_m: u is rounded, `lost` is what it
    // lost, and the polynomial is 1 / u closely enough for that.
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

// What multiplies the sides. A soft target has both A and B of the formula. A hard one, 0 or 1, has one
// of them, and the side of z or of -z.
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

// ---- Tiles -----------------------------------------------------------------------------------

// What a kernel reads of a tile; null pointers are not there.
template <class R>
struct Tile {
  const R *z, *y, *weight, *pos_weight, *upstream;
  const R* counts;  // 0 where the element does not count
  bool is_weighted() const { return weight || pos_weight || upstream || counts; }
};

template <bool hard, bool weighted, class R>
TORCHFAST_INLINE auto factors(const Tile<R>& t, const Formula<R>& k, int64_t i, auto count) {
  Vec<R> y = load_n<R>(t.y + i, count), one = splat<R>(1), both = one, pos_weight = one;
  if constexpr (weighted) {
    if (t.weight) both = load_n<R>(t.weight + i, count);
    if (t.upstream) both = both * load_n<R>(t.upstream + i, count);
    if (t.counts) both = load_n<R>(t.counts + i, count) != 0 ? both : splat<R>(0);
    if (t.pos_weight) pos_weight = load_n<R>(t.pos_weight + i, count);
  }
  auto weigh = [&](Vec<R> factor, Vec<R> by)
                   __attribute__((always_inline)) { return weighted ? times<R>(both, factor * by) : factor; };
  if constexpr (hard) {
    IntVec<R> positive = y != 0;
    return Hard<R>{positive, weigh(positive ? splat(k.a1) : splat(k.b1), positive ? pos_weight : one)};
  } else {
    return Soft<R>{weigh(y * k.a1 + k.a0, pos_weight), weigh((R(1) - y) * k.b1 + k.b0, one)};
  }
}

// Writes the losses to `out` (or null) and returns their sum.
template <Mode mode, bool hard, bool weighted, class R>
double tile_forward(const Tile<R>& t, const Formula<R>& k, int64_t n, R* out) {
  Vec<R> sum{};
  for_each_vec<R, 1>(n, [&](int64_t i, int, auto count) __attribute__((always_inline)) {
    Vec<R> loss = loss_of<mode, R>(load_n<R>(t.z + i, count), factors<hard, weighted>(t, k, i, count), k);
    if (out) store_n<R>(out + i, loss, count);
    sum += only_n<R>(loss, count, R(0));
  });
  return sum_lanes<R>(sum);
}

template <Mode mode, bool hard, bool weighted, class R>
void tile_backward(const Tile<R>& t, const Formula<R>& k, int64_t n, R* out) {
  for_each_vec<R, 1>(n, [&](int64_t i, int, auto count) __attribute__((always_inline)) {
    auto f = factors<hard, weighted>(t, k, i, count);
    store_n<R>(out + i, gradient_of<mode, R>(load_n<R>(t.z + i, count), f, k), count);
  });
}

// f(mode, hard, weighted). Double precision is for checking, not for speed: it has one kernel a mode.
template <class R, class F>
void with_kernel(const Tile<R>& t, const Formula<R>& k, bool hard, const F& f) {
  constexpr bool fast = std::is_same_v<R, float>;
  auto with_mode = [&](auto mode) {
    auto with_target = [&](auto hard) {
      if (fast && !t.is_weighted())
        f(mode, hard, std::bool_constant<!fast>{});
      else
        f(mode, hard, std::true_type{});
    };
    fast&& hard ? with_target(std::bool_constant<fast>{}) : with_target(std::false_type{});
  };
  switch (k.mode) {
    case Mode::bce: return with_mode(std::integral_constant<Mode, Mode::bce>{});
    case Mode::focal: return with_mode(std::integral_constant<Mode, Mode::focal>{});
    case Mode::asymmetric: return with_mode(std::integral_constant<Mode, Mode::asymmetric>{});
  }
}

// ---- Arguments, in the form the kernels read ---------------------------------------------------

// One thread's memory, for what has to be gathered.
template <class R>
struct Scratch {
  R z[kTile], y[kTile], weight[kTile], pos_weight[kTile], upstream[kTile], counts[kTile], out[kTile];
  int64_t ids[kTile], classes[kTile];
  uint8_t mask[kTile];
};

template <class R>
class Problem {
 public:
  Problem(const Arguments& arguments, const std::vector<int64_t>& in_order, const Tensor* upstream = nullptr)
      : a(arguments),
        numel(a.logits.numel()),
        blocks((numel + kBlock - 1) / kBlock),
        order_(checked(a), in_order),
        rows_(order_),
        z_(order_, a.logits) {
    int64_t last = a.logits.dim() - 1;
    bool integer = is_integer(a.target.scalar_type());
    form_ = a.target.dim() <= last ? Form::class_ids : integer ? Form::integers : Form::values;
    hard_ = (integer || a.target.scalar_type() == ScalarType::Bool) && a.label_smoothing == 0;
    if (form_ == Form::class_ids) {
      lowest_ = -1;
      highest_ = a.logits.size(last) - 1;
      if (order_.dims.back() == last)
        rows_.drop_last();
      else
        classes_.emplace(order_, [&](int64_t d) { return int64_t(d == last); });
    }
    if (integer)
      ids_.emplace(rows_, a.target);
    else
      y_.emplace(order_, a.target);
    if (a.weight) weight_.emplace(order_, *a.weight);
    if (a.pos_weight) pos_weight_.emplace(order_, *a.pos_weight);
    if (a.mask) mask_.emplace(order_, *a.mask);
    if (upstream) upstream_.emplace(order_, *upstream);
  }

  // f(first element, number of elements, block, scratch) for each tile, over threads.
  template <class F>
  void for_each_tile(const F& f) {
    torch::stable::parallel_for(0, blocks, kGrainElements / kBlock, [&](int64_t from, int64_t to) {
      auto scratch = std::make_unique_for_overwrite<Scratch<R>>();
      for (int64_t block = from; block < to; ++block) {
        int64_t end = std::min(numel, (block + 1) * kBlock);
        for (int64_t i = block * kBlock; i < end; i += kTile) f(i, std::min(kTile, end - i), block, *scratch);
      }
    });
    if (bad_) throw_first_bad();
  }

  Tile<R> tile(int64_t i, int64_t n, Scratch<R>& s) {
    auto read = [&](const auto& operand, auto* buffer) {
      return operand ? operand->read(i, n, buffer) : nullptr;
    };
    const uint8_t* mask = read(mask_, s.mask);
    for (int64_t j = 0; mask && j < n; ++j) s.counts[j] = mask[j];
    bool all_count = !mask && !ids_;
    const R* y = s.y;
    switch (form_) {
      case Form::values: y = read(y_, s.y); break;
      case Form::integers: all_count = decode(mask, i, n, s); break;
      case Form::class_ids: all_count = classes_ ? one_hot(mask, i, n, s) : one_hot_rows(mask, i, n, s);
    }
    return {z_.read(i, n, s.z),          y,
            read(weight_, s.weight),     read(pos_weight_, s.pos_weight),
            read(upstream_, s.upstream), all_count ? nullptr : s.counts};
  }
  bool is_hard() const { return hard_; }

  const Arguments& a;
  const int64_t numel, blocks;

 private:
  enum class Form { values, integers, class_ids };  // values: floats or bool

  // Memory safety for direct callers of the op; the messages are the public function's.
  static const Tensor& checked(const Arguments& a) {
    auto has_shape = [&](const Tensor& t, int64_t dims) {
      bool same = t.dim() == dims;
      for (int64_t d = 0; same && d < dims; ++d) same = t.size(d) == a.logits.size(d);
      return same;
    };
    int64_t dims = a.logits.dim();
    bool class_ids = is_integer(a.target.scalar_type()) && dims > 0 && has_shape(a.target, dims - 1);
    STD_TORCH_CHECK(class_ids || has_shape(a.target, dims), "target has a wrong shape");
    STD_TORCH_CHECK(a.target.is_cpu(), "target must be on the CPU");
    for (const auto* factor : {&a.weight, &a.pos_weight, &a.mask}) {
      STD_TORCH_CHECK(!*factor || has_shape(**factor, dims),
                      "weight, pos_weight and mask must have logits' shape");
      STD_TORCH_CHECK(!*factor || (*factor)->is_cpu(), "all tensors must be on the CPU");
    }
    STD_TORCH_CHECK(!a.mask || a.mask->scalar_type() == ScalarType::Bool, "mask must be of dtype bool");
    return a.logits;
  }

  // ---- Integer targets become s.y, and s.counts unless the result is true: all of the tile count

  bool skipped(int64_t id) const { return id == a.ignore_index || id < lowest_ || id > highest_; }

  // Elements begin .. end-1 do not count; if that is for neither of the good reasons, it is an error.
  void skip(int64_t id, const uint8_t* mask, int64_t begin, int64_t end, Scratch<R>& s) {
    std::fill(s.counts + begin, s.counts + end, R(0));
    auto is_set = [](uint8_t bit) { return bit != 0; };
    if (id != a.ignore_index && (!mask || std::any_of(mask + begin, mask + end, is_set))) bad_ = true;
  }

  bool decode(const uint8_t* mask, int64_t i, int64_t n, Scratch<R>& s) {
    const int64_t *ids = ids_->read(i, n, s.ids), ignored = a.ignore_index;
    int64_t others = 0;
    for (int64_t j = 0; j < n; ++j) {
      s.y[j] = R(int32_t(ids[j]));
      others |= (ids[j] & ~int64_t(1)) | -int64_t(ids[j] == ignored);
    }
    if (others == 0) return !mask;
    if (!mask) std::fill(s.counts, s.counts + n, R(1));
    for (int64_t j = 0; j < n; ++j)
      if (skipped(ids[j])) skip(ids[j], mask, j, j + 1, s);
    return false;
  }

  // The one-hot matrix of class ids. Rows lie one after the other: each is zeros but for one element.
  bool one_hot_rows(const uint8_t* mask, int64_t i, int64_t n, Scratch<R>& s) {
    int64_t classes = highest_ + 1, row = i / classes, rows = (i + n - 1) / classes - row + 1;
    const int64_t* ids = ids_->read(row, rows, s.ids);
    bool all_count = !mask;
    std::fill(s.y, s.y + n, R(0));
    for (int64_t begin = row * classes - i; begin < n; begin += classes) {  // of a row, in the tile
      int64_t id = *ids++;
      if (!skipped(id)) {
        if (uint64_t(begin + id) < uint64_t(n) && id >= 0) s.y[begin + id] = R(1);
        continue;
      }
      if (all_count) std::fill(s.counts, s.counts + n, R(1));
      all_count = false;
      skip(id, mask, std::max<int64_t>(begin, 0), std::min(begin + classes, n), s);
    }
    return all_count;
  }

  // The same where the classes of a row are not adjacent.
  bool one_hot(const uint8_t* mask, int64_t i, int64_t n, Scratch<R>& s) {
    const int64_t* ids = ids_->read(i, n, s.ids);
    int64_t* to = s.classes;
    classes_->for_each_run(i, n, [&](int64_t first, int64_t stride, int64_t count) {
      for (int64_t j = 0; j < count; ++j) *to++ = first + j * stride;
    });
    if (!mask) std::fill(s.counts, s.counts + n, R(1));
    for (int64_t j = 0; j < n; ++j) {
      s.y[j] = R(ids[j] == s.classes[j]);
      if (skipped(ids[j])) skip(ids[j], mask, j, j + 1, s);
    }
    return false;
  }

  // The first in the order of the elements, not in that of the memory or of the threads.
  void throw_first_bad() const {
    std::vector<int64_t> dims(a.logits.dim());
    std::iota(dims.begin(), dims.end(), 0);
    Order order(a.logits, dims);
    Operand<int64_t> targets(order, a.target);
    std::optional<Operand<uint8_t>> masks;
    if (a.mask) masks.emplace(order, *a.mask);
    auto s = std::make_unique_for_overwrite<Scratch<R>>();
    for (int64_t i = 0; i < numel; i += kTile) {
      int64_t n = std::min(kTile, numel - i);
      const int64_t* ids = targets.read(i, n, s->ids);
      const uint8_t* mask = masks ? masks->read(i, n, s->mask) : nullptr;
      for (int64_t j = 0; j < n; ++j) {
        if (!skipped(ids[j]) || ids[j] == a.ignore_index || (mask && !mask[j])) continue;
        throw std::out_of_range("target " + std::to_string(ids[j]) + " is out of range: allowed are " +
                                (form_ == Form::integers ? "0, 1" : "-1 to " + std::to_string(highest_)) +
                                " and ignore_index");
      }
    }
  }

  Order order_, rows_;  // rows_: without the classes, if those of a row are adjacent
  Operand<R> z_;
  Form form_;
  bool hard_;
  int64_t lowest_ = 0, highest_ = 1;  // integer that is allowed
  std::optional<Operand<R>> y_, weight_, pos_weight_, upstream_;
  std::optional<Operand<int64_t>> ids_;
  std::optional<Operand<uint8_t>> mask_;
  std::optional<Strides> classes_;  // the class of an element, as if it were an offset
  std::atomic<bool> bad_{false};
};

// The output is the leader of the walk: it is dense.
template <class R>
std::tuple<Tensor, Tensor> forward(const Arguments& a) {
  Tensor loss = a.reduction == 0 ? empty_like(a.logits, real_type<R>) : new_empty(a.logits, {}, real_type<R>);
  Tensor divisor = new_empty(a.logits, {1}, real_type<R>);
  R* each_loss = a.reduction == 0 ? static_cast<R*>(loss.mutable_data_ptr()) : nullptr;
  FreshMemory fresh(each_loss, each_loss ? loss.numel() * sizeof(R) : 0);
  Problem<R> problem(a, memory_order(each_loss ? loss : a.logits));
  Formula<R> k(a, 1);
  std::vector<double> sums(problem.blocks);
  std::vector<int64_t> skipped(problem.blocks);

  problem.for_each_tile([&](int64_t i, int64_t n, int64_t block, Scratch<R>& s) {
    if (each_loss) fresh.reach(each_loss + i, n * sizeof(R));
    Tile<R> tile = problem.tile(i, n, s);
    with_kernel(tile, k, problem.is_hard(), [&](auto mode, auto hard, auto weighted) {
      sums[block] +=
          tile_forward<mode(), hard(), weighted()>(tile, k, n, each_loss ? each_loss + i : nullptr);
    });
    for (int64_t j = 0; tile.counts && j < n; ++j) skipped[block] += tile.counts[j] == 0;
  });

  double total = 0;
  for (double sum : sums) total += sum;
  int64_t counted = problem.numel;
  for (int64_t count : skipped) counted -= count;
  double by = a.reduction == 1 ? double(counted) : 1;
  *static_cast<R*>(divisor.mutable_data_ptr()) = R(by);
  if (a.reduction != 0)
    *static_cast<R*>(loss.mutable_data_ptr()) = by == 0 && a.empty_zero ? R(0) : R(total / by);
  return {loss, divisor};
}

template <class T, class R>
void backward(const Arguments& a, const Tensor& grad_loss, const Tensor& divisor, const Tensor& gradient,
              FreshMemory& fresh) {
  STD_TORCH_CHECK(divisor.numel() == 1 && divisor.scalar_type() == real_type<R> && divisor.is_cpu() &&
                      grad_loss.is_cpu() && grad_loss.numel() == (a.reduction == 0 ? a.logits.numel() : 1),
                  "backward was given a divisor or a gradient of another forward");
  double factor = *data<R>(divisor) == 0 ? 0 : 1 / double(*data<R>(divisor));
  if (a.reduction != 0) factor *= double(*data<R>(as_contiguous(grad_loss, real_type<R>)));
  Problem<R> problem(a, memory_order(gradient), a.reduction == 0 ? &grad_loss : nullptr);
  Formula<R> k(a, factor);
  T* to = static_cast<T*>(gradient.mutable_data_ptr());

  problem.for_each_tile([&](int64_t i, int64_t n, int64_t, Scratch<R>& s) {
    fresh.reach(to + i, n * sizeof(T));
    Tile<R> tile = problem.tile(i, n, s);
    R* out = s.out;
    if constexpr (std::is_same_v<T, R>) out = to + i;
    with_kernel(tile, k, problem.is_hard(), [&](auto mode, auto hard, auto weighted) {
      tile_backward<mode(), hard(), weighted()>(tile, k, n, out);
    });
    if constexpr (!std::is_same_v<T, R>) convert<R>(out, to + i, n);
  });
}

// ---- Dispatcher ops --------------------------------------------------------------------------

std::tuple<Tensor, Tensor> run_forward(const Arguments& a) {
  return with_logits_type(a.logits, [&](auto, auto r) { return forward<decltype(r)>(a); });
}

void run_backward(const Arguments& a, const Tensor& grad_loss, const Tensor& divisor, const Tensor& gradient,
                  FreshMemory& fresh) {
  with_logits_type(a.logits, [&](auto t, auto r) {
    backward<decltype(t), decltype(r)>(a, grad_loss, divisor, gradient, fresh);
  });
}

}  // namespace
}  // namespace torchfast::TORCHFAST_ISA

#ifdef TORCHFAST_LAST_ISA
namespace torchfast {
namespace {

std::tuple<Tensor, Tensor> sigmoid_focal_loss(Tensor logits, Tensor target, std::optional<Tensor> weight,
                                              std::optional<Tensor> pos_weight, std::optional<Tensor> mask,
                                              int64_t ignore_index, int64_t reduction, double alpha,
                                              double gamma, double gamma_neg, double clip,
                                              double label_smoothing, bool empty_zero) {
  return TORCHFAST_DISPATCH(run_forward)({logits, target, weight, pos_weight, mask, ignore_index, reduction,
                                          alpha, gamma, gamma_neg, clip, label_smoothing, empty_zero});
}

Tensor sigmoid_focal_loss_backward(Tensor grad_loss, Tensor logits, Tensor target,
                                   std::optional<Tensor> weight, std::optional<Tensor> pos_weight,
                                   std::optional<Tensor> mask, int64_t ignore_index, int64_t reduction,
                                   double alpha, double gamma, double gamma_neg, double clip,
                                   double label_smoothing, bool empty_zero, Tensor divisor) {
  Tensor gradient = torch::stable::empty_like(logits);
  FreshMemory fresh(gradient.mutable_data_ptr(), gradient.numel() * gradient.element_size());
  TORCHFAST_DISPATCH(run_backward)({logits, target, weight, pos_weight, mask, ignore_index, reduction, alpha,
                                    gamma, gamma_neg, clip, label_smoothing, empty_zero},
                                   grad_loss, divisor, gradient, fresh);
  return gradient;
}

}  // namespace
}  // namespace torchfast

STABLE_TORCH_LIBRARY_IMPL(torchfast, CPU, m) {
  m.impl("sigmoid_focal_loss", TORCH_BOX(&torchfast::sigmoid_focal_loss));
  m.impl("sigmoid_focal_loss_backward", TORCH_BOX(&torchfast::sigmoid_focal_loss_backward));
}
#endif
