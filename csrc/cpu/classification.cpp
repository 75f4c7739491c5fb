// Classification metrics on the CPU. Definitions and references: torchfast/metrics/classification/.
//
//   class_counts   the largest score of each row and what it is counted as, block by block: the scores are
//                  read once, and no prediction outlives its block
//   label_counts   scores against a threshold, each label by itself
//   ranked_areas   areas under curves: a radix sort on the bits of the scores, then one walk
// Blocks and chunks do not depend on the number of threads, and floats are added up in their order.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../radix_sort.h"

#ifndef TORCHFAST_FILE
namespace torchfast {
namespace {

// Places of `wrong`, as in counts.py.
enum Wrong { kNan, kTarget, kIds, kWeight, kProbability, kWrongs };

struct ClassArguments {
  Tensor preds, target;
  std::optional<Tensor> weight;
  int64_t classes;
  std::optional<int64_t> ignore_index;
  std::vector<int64_t> ks;
};

struct LabelArguments {
  Tensor preds, target;
  std::optional<Tensor> weight;
  std::optional<int64_t> ignore_index;
  double threshold;
  bool probabilities;
};

// Predictions of a block; the rank of the target among the scores, from 0, where that is asked for.
struct Predicted {
  std::vector<int64_t> classes, rank;
};

// What a chunk of rows adds up to: of each label its cells tn, fp, fn, tp; rows all right, all rows.
template <class N>
struct LabelSums {
  std::vector<N> cells;
  N exact{}, rows{};
  int64_t wrong[kWrongs] = {};
};

constexpr int64_t kNanRow = -1;   // as a predicted class
constexpr int64_t kBlock = 1024;  // rows, whose predictions are in L1

template <class T>
T* mutable_data(Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

inline const double* doubles(const std::optional<Tensor>& x) {
  return x ? static_cast<const double*>(x->const_data_ptr()) : nullptr;
}

inline std::optional<Tensor> as_doubles(const std::optional<Tensor>& x) {
  return x ? std::optional(as_contiguous(*x, ScalarType::Double)) : std::nullopt;
}

}  // namespace
}  // namespace torchfast
#endif

#define TORCHFAST_FILE "cpu/classification.cpp"
#include "../foreach_isa.h"
#include "../tensors.h"

namespace torchfast::TORCHFAST_ISA {
namespace {

// ---- The class of a row -------------------------------------------------------------------------

// The first of the largest, or kNanRow. The second pass finds the row in L1 or L2, and stops halfway on
// average.
template <class T, class R>
int64_t largest(const T* x, int64_t n) {
  constexpr R lowest = -std::numeric_limits<R>::infinity();
  constexpr int L = Simd<R>::lanes;
  if (n < 2 * L) {
    int64_t best = 0;
    R most = to_real(x[0]);
    bool nan = most != most;
    for (int64_t c = 1; c < n; ++c) {
      R v = to_real(x[c]);
      nan |= v != v;
      best = v > most ? c : best;
      most = v > most ? v : most;
    }
    return nan ? kNanRow : best;
  }
  Vec<R> most[4] = {splat(lowest), splat(lowest), splat(lowest), splat(lowest)};
  IntVec<R> nan{};
  for_each_vec<R>(n, [&](int64_t i, int k, auto count) __attribute__((always_inline)) {
    Vec<R> v = only_n<R>(load_n<R>(x + i, count), count, lowest);
    most[k] = v > most[k] ? v : most[k];
    nan |= v != v;
  });
  if (lane_bits(nan)) return kNanRow;
  for (int k = 1; k < 4; ++k) most[0] = most[k] > most[0] ? most[k] : most[0];
  Vec<R> most_of_all = splat(max_lanes<R>(most[0]));
  for (int64_t i = 0; i + L <= n; i += L)
    if (uint64_t bits = equal_bits(load<R>(x + i), most_of_all)) return i + std::countr_zero(bits);
  // The last vector again, whole: its other lanes are no match.
  return n - L + std::countr_zero(equal_bits(load<R>(x + n - L), most_of_all));
}

// How many classes come before class y: of equal scores the later ones.
template <class T, class R>
int64_t rank_of(const T* x, int64_t n, int64_t y) {
  Vec<R> own = splat(R(to_real(x[y])));
  IntVec<R> larger[4] = {};
  constexpr R lowest = -std::numeric_limits<R>::infinity();
  for_each_vec<R>(y, [&](int64_t i, int k, auto count) __attribute__((always_inline)) {
    Vec<R> v = only_n<R>(load_n<R>(x + i, count), count, lowest);
    count_if(larger[k], v > own);
  });
  int64_t ties_last = y + 1;
  int64_t left = n - ties_last;
  constexpr int L = Simd<R>::lanes;
  int64_t whole = left / L * L;
  for_each_vec<R>(whole, [&](int64_t i, int k, auto) __attribute__((always_inline)) {
    count_if(larger[k], load<R>(x + ties_last + i) >= own);
  });
  int64_t rank = sum_lanes<R>(larger[0] + larger[1] + larger[2] + larger[3]);
  for (int64_t c = ties_last + whole; c < n; ++c) rank += to_real(x[c]) >= own[0];
  return rank;
}

// ---- The classes of a block ---------------------------------------------------------------------

// Scores [N, C, ...] of any strides.
template <class T, class R>
struct Scores {
  explicit Scores(const ClassArguments& a)
      : x(data<T>(a.preds)),
        classes(a.classes),
        class_stride(a.preds.stride(1)),
        positions(a.preds, 1, {&a.preds, nullptr, nullptr}) {}

  // Of positions begin .. begin + n - 1, whose targets are y: into the n elements of `to`.
  void predict(int64_t begin, int64_t n, const int64_t* y, int64_t* predicted, int64_t* rank) const {
    constexpr int L = Simd<R>::lanes;
    if (class_stride != 1 && positions.inner_stride(0) == 1 && sizeof(R) == sizeof(float)) {
      int64_t i = 0;
      for (; i < n; i += L) {
        int64_t count = std::min<int64_t>(L, n - i);
        const T* at = x + positions.offset(begin + i, 0);
        if (count == L && positions.is_run(begin + i, L))
          predict_lanes(at, predicted + i);
        else
          for (int64_t j = i; j < i + count; ++j) predicted[j] = strided(begin + j);
      }
    } else {
      for (int64_t i = 0; i < n; ++i)
        predicted[i] = class_stride == 1 ? largest<T, R>(x + positions.offset(begin + i, 0), classes)
                                         : strided(begin + i);
    }
    for (int64_t i = 0; rank && i < n; ++i) {
      if (y[i] < 0 || y[i] >= classes) continue;
      const T* row = x + positions.offset(begin + i, 0);
      rank[i] = class_stride == 1 ? rank_of<T, R>(row, classes, y[i]) : strided_rank(row, y[i]);
    }
  }

 private:
  // Neighbouring positions, a lane each.
  void predict_lanes(const T* at, int64_t* predicted) const {
    Vec<R> most = load<R>(at);
    IntVec<R> best{}, nan = most != most;
    for (int64_t c = 1; c < classes; ++c) {
      Vec<R> v = load<R>(at + c * class_stride);
      IntVec<R> more = v > most;
      best = more ? IntVec<R>{} + Int<R>(c) : best;
      most = more ? v : most;
      nan |= v != v;
    }
    for (int j = 0; j < Simd<R>::lanes; ++j) predicted[j] = nan[j] ? kNanRow : int64_t(best[j]);
  }

  int64_t strided(int64_t position) const {
    const T* row = x + positions.offset(position, 0);
    int64_t best = 0;
    R most = to_real(row[0]);
    bool nan = most != most;
    for (int64_t c = 1; c < classes; ++c) {
      R v = to_real(row[c * class_stride]);
      nan |= v != v;
      if (v > most) most = v, best = c;
    }
    return nan ? kNanRow : best;
  }

  int64_t strided_rank(const T* row, int64_t y) const {
    R own = to_real(row[y * class_stride]);
    int64_t rank = 0;
    for (int64_t c = 0; c < classes; ++c) {
      R v = to_real(row[c * class_stride]);
      rank += v > own || (v == own && c > y);
    }
    return rank;
  }

  const T* x;
  int64_t classes, class_stride;
  Positions positions;
};

// Fills `to` with the predictions of rows begin .. begin + n - 1.
void predict(const ClassArguments& a, const int64_t* y, int64_t begin, int64_t n, Predicted& to) {
  with_logits_type(a.preds, [&](auto t, auto r) {
    Scores<decltype(t), decltype(r)>(a).predict(begin, n, y, to.classes.data(),
                                                to.rank.empty() ? nullptr : to.rank.data());
  });
}

// ---- Labels by themselves -----------------------------------------------------------------------

// The largest R that is no more than `threshold`: no score lies between them.
template <class R>
R at_most(double threshold) {
  R cut = R(threshold);
  return double(cut) > threshold ? std::nextafter(cut, -std::numeric_limits<R>::infinity()) : cut;
}

// x are scores (R is their type in registers) or ids (R is int64_t).
template <class N, class R, class T>
void label_rows(const LabelArguments& a, const T* x, const int64_t* y, const double* weight, int64_t begin,
                int64_t end, LabelSums<N>& sums) {
  constexpr bool ids = std::is_same_v<R, int64_t>;
  int64_t labels = a.preds.size(1), row_stride = a.preds.stride(0), label_stride = a.preds.stride(1);
  bool ignores = a.ignore_index.has_value();
  int64_t ignored = a.ignore_index.value_or(0);
  R cut{};
  if constexpr (!ids) cut = at_most<R>(a.threshold);
  for (int64_t i = begin; i < end; ++i) {
    double w = weight ? weight[i] : 1;
    if (w == 0) continue;
    bool weighable = w > 0 && w < INFINITY, counts = false, right = true;
    for (int64_t l = 0; l < labels; ++l) {
      int64_t target = y[i * labels + l];
      if (ignores && target == ignored) continue;
      const T& given = x[i * row_stride + l * label_stride];
      bool off = target != 0 && target != 1, bad, positive;
      if constexpr (ids) {
        bad = given != 0 && given != 1, positive = given == 1;
        sums.wrong[kIds] += bad;
      } else {
        R v = to_real(given);
        bool nan = v != v, improbable = a.probabilities && !nan && !(v >= 0 && v <= 1);
        bad = nan || improbable, positive = v > cut;
        sums.wrong[kNan] += nan, sums.wrong[kProbability] += improbable;
      }
      sums.wrong[kTarget] += off, sums.wrong[kWeight] += !weighable;
      if (off || bad || !weighable) continue;
      sums.cells[4 * l + 2 * target + positive] += N(w);
      counts = true, right &= target == int64_t(positive);
    }
    if (!counts) continue;
    sums.rows += N(w);
    if (right) sums.exact += N(w);
  }
}

// One label, no weights, side by side in memory: without a branch, for the compiler to vectorise.
template <class R, class T>
void label_run(const LabelArguments& a, const T* x, const int64_t* y, int64_t begin, int64_t end,
               LabelSums<int64_t>& sums) {
  R cut = at_most<R>(a.threshold);
  R low = a.probabilities ? R(0) : -std::numeric_limits<R>::infinity(), high = a.probabilities ? R(1) : -low;
  bool ignores = a.ignore_index.has_value();
  int64_t ignored = a.ignore_index.value_or(0);
  int64_t rows = 0, actual = 0, predicted = 0, both = 0, nans = 0, offs = 0, improbables = 0;
  for (int64_t i = begin; i < end; ++i) {
    R v = to_real(x[i]);
    int valid = !(ignores & (y[i] == ignored)), one = y[i] == 1, off = valid & (y[i] != 0) & (y[i] != 1);
    int nan = valid & (v != v), improbable = valid & ((v < low) | (v > high)), more = v > cut;
    int good = valid & ~off & ~nan & ~improbable;
    rows += good, actual += good & one, predicted += good & more, both += good & one & more;
    nans += nan, offs += off, improbables += improbable;
  }
  int64_t neither = rows - actual - predicted + both;
  sums.cells[0] += neither, sums.cells[1] += predicted - both, sums.cells[2] += actual - both;
  sums.cells[3] += both, sums.rows += rows, sums.exact += neither + both;
  sums.wrong[kNan] += nans, sums.wrong[kTarget] += offs, sums.wrong[kProbability] += improbables;
}

template <class N>
void label_chunk(const LabelArguments& a, const int64_t* y, const double* weight, int64_t begin, int64_t end,
                 LabelSums<N>& sums) {
  if (is_integer(a.preds.scalar_type()))
    return with_index_type(a.preds,
                           [&](auto* x) { label_rows<N, int64_t>(a, x, y, weight, begin, end, sums); });
  with_logits_type(a.preds, [&](auto t, auto r) {
    using T = decltype(t);
    using R = decltype(r);
    bool run = a.preds.size(1) == 1 && a.preds.stride(0) == 1;
    if constexpr (std::is_same_v<N, int64_t>)
      if (run) return label_run<R>(a, data<T>(a.preds), y, begin, end, sums);
    label_rows<N, R>(a, data<T>(a.preds), y, weight, begin, end, sums);
  });
}

}  // namespace
}  // namespace torchfast::TORCHFAST_ISA

#ifdef TORCHFAST_LAST_ISA
namespace torchfast {
namespace {

using Optional = std::optional<Tensor>;

// Memory safety for direct callers of the ops; the messages for users are the public functions'.
void check_sizes(const Tensor& x, const Tensor& target, const Optional& weight, int64_t rows,
                 int64_t targets) {
  STD_TORCH_CHECK(target.numel() == targets, "target has a wrong shape");
  STD_TORCH_CHECK(!weight || weight->numel() == rows, "weight must have one element a row");
  STD_TORCH_CHECK(x.is_cpu() && target.is_cpu() && (!weight || weight->is_cpu()),
                  "all tensors must be on the CPU");
  STD_TORCH_CHECK(baseline::is_integer(target.scalar_type()), "target must be of an integer dtype");
}

// ---- Counts of classes --------------------------------------------------------------------------

// Where a row with target y and prediction p is counted.
template <class N>
struct ClassSums {
  N* classes;  // [3, C]
  N* matrix;   // [C, C] or none
  N* hits;
  int64_t wrong[kWrongs] = {};

  // count(y, p, w) adds w to classes and matrix.
  template <class F>
  void add(const ClassArguments& a, const int64_t* y, const double* weight, const int64_t* predicted,
           const int64_t* rank, bool ids, int64_t n, const F& count) {
    int64_t c = a.classes;
    for (int64_t i = 0; i < n; ++i) {
      double w = weight ? weight[i] : 1;
      if ((a.ignore_index && y[i] == *a.ignore_index) || w == 0) continue;
      bool off = y[i] < 0 || y[i] >= c, outside = predicted[i] < 0 || predicted[i] >= c;
      bool weighable = w > 0 && w < INFINITY;
      wrong[kTarget] += off, wrong[ids ? kIds : kNan] += outside, wrong[kWeight] += !weighable;
      if (off || outside || !weighable) continue;
      count(y[i], predicted[i], N(w));
      for (size_t k = 0; k < a.ks.size() && !ids; ++k)
        if (rank[i] < a.ks[k]) hits[k] += N(w);
    }
  }
};

template <class N>
void add_to(N* classes, int64_t c, int64_t y, int64_t p, N w) {
  classes[c + p] += w, classes[2 * c + y] += w;
  if (p == y) classes[y] += w;
}

// f(first row, number of rows, their predictions) of rows begin .. end - 1, in blocks.
template <class F>
void for_each_block(const ClassArguments& a, bool ids, int64_t begin, int64_t end, const F& f) {
  const int64_t* y = baseline::data<int64_t>(a.target);
  Predicted to;
  int64_t block = std::min(kBlock, end - begin);
  if (!ids) to.classes.resize(block), to.rank.resize(a.ks.empty() ? 0 : block);
  for (int64_t at = begin; at < end; at += block) {
    int64_t n = std::min(block, end - at);
    if (!ids) TORCHFAST_DISPATCH(predict)(a, y + at, at, n, to);
    f(at, n, ids ? baseline::data<int64_t>(a.preds) + at : to.classes.data(), to.rank.data());
  }
}

// Each thread counts for itself. Few classes are counted in a matrix alone: one addition a row, and the rest
// are its sums. A matrix of many is shared by the threads.
void count_rows(const ClassArguments& a, bool ids, int64_t* classes, int64_t* matrix, int64_t* hits,
                int64_t* wrong) {
  constexpr int64_t kFew = 256;
  int64_t rows = a.target.numel(), c = a.classes, threads = torch::stable::get_num_threads();
  int64_t work = ids ? rows : rows * c, cells = c <= kFew ? c * c : 3 * c;
  Parts parts{std::clamp<int64_t>(work / std::max(kGrainElements, cells), 1, threads)};
  std::vector<std::vector<int64_t>> own(parts.count), own_hits(parts.count);
  std::vector<ClassSums<int64_t>> sums(parts.count);
  parts.for_each_range(rows, 1, [&](int64_t part, int64_t begin, int64_t end) {
    own[part].resize(cells), own_hits[part].resize(a.ks.size());
    int64_t* mine = own[part].data();
    sums[part] = {mine, matrix, own_hits[part].data()};
    for_each_block(a, ids, begin, end,
                   [&](int64_t at, int64_t n, const int64_t* predicted, const int64_t* rank) {
                     auto add = [&](const auto& count) {
                       sums[part].add(a, baseline::data<int64_t>(a.target) + at, nullptr, predicted, rank,
                                      ids, n, count);
                     };
                     if (c <= kFew) return add([=](int64_t y, int64_t p, int64_t) { ++mine[y * c + p]; });
                     add([=](int64_t y, int64_t p, int64_t w) {
                       add_to(mine, c, y, p, w);
                       if (matrix) __atomic_fetch_add(matrix + y * c + p, w, __ATOMIC_RELAXED);
                     });
                   });
  });
  for (int64_t part = 0; part < parts.count; ++part) {
    for (size_t k = 0; k < a.ks.size(); ++k) hits[k] += own_hits[part][k];
    for (int i = 0; i < kWrongs; ++i) wrong[i] += sums[part].wrong[i];
    const int64_t* of = own[part].data();
    for (int64_t i = 0; i < cells; ++i) {
      if (c > kFew) {
        classes[i] += of[i];
        continue;
      }
      add_to(classes, c, i / c, i % c, of[i]);
      if (matrix) matrix[i] += of[i];
    }
  }
}

// Floats are added up in the order of the rows: blocks of predictions are made side by side, then counted.
void count_weighted(const ClassArguments& a, bool ids, double* classes, double* matrix, double* hits,
                    int64_t* wrong) {
  constexpr int64_t kAtOnce = 1 << 18;
  int64_t rows = a.target.numel(), c = a.classes, at_once = std::min(rows, kAtOnce);
  int64_t grain = std::max<int64_t>(1, kGrainElements / (kBlock * c));
  ClassSums<double> sums{classes, matrix, hits};
  std::vector<int64_t> predicted(at_once), rank(ids || a.ks.empty() ? 0 : at_once);
  for (int64_t begin = 0; begin < rows; begin += at_once) {
    int64_t n = std::min(at_once, rows - begin);
    torch::stable::parallel_for(0, (n + kBlock - 1) / kBlock, grain, [&](int64_t from, int64_t to) {
      int64_t first = from * kBlock;
      auto keep = [&](int64_t at, int64_t m, const int64_t* of_block, const int64_t* ranks) {
        std::copy_n(of_block, m, predicted.data() + at - begin);
        if (!rank.empty()) std::copy_n(ranks, m, rank.data() + at - begin);
      };
      for_each_block(a, ids, begin + first, begin + std::min(n, to * kBlock), keep);
    });
    sums.add(a, baseline::data<int64_t>(a.target) + begin, doubles(a.weight) + begin, predicted.data(),
             rank.data(), ids, n, [=](int64_t y, int64_t p, double w) {
               add_to(classes, c, y, p, w);
               if (matrix) matrix[y * c + p] += w;
             });
  }
  std::copy_n(sums.wrong, kWrongs, wrong);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> class_counts(Tensor preds, Tensor target, Optional weight,
                                                        int64_t num_classes,
                                                        std::optional<int64_t> ignore_index,
                                                        std::vector<int64_t> ks, bool with_matrix) {
  bool ids = preds.dim() == target.dim();
  int64_t rows = target.numel();
  check_sizes(preds, target, weight, rows, rows);
  STD_TORCH_CHECK(num_classes > 0 && num_classes <= INT32_MAX, "num_classes must be 1 to 2^31-1");
  STD_TORCH_CHECK(ids ? preds.numel() == rows && baseline::is_integer(preds.scalar_type())
                      : preds.dim() >= 2 && preds.size(1) == num_classes &&
                            preds.numel() == rows * num_classes && baseline::is_score(preds.scalar_type()),
                  "preds must be scores [N, C, ...] or ids of target's shape");
  ClassArguments a{ids ? as_contiguous(preds, ScalarType::Long) : preds,
                   as_contiguous(target, ScalarType::Long),
                   as_doubles(weight),
                   num_classes,
                   ignore_index,
                   std::move(ks)};
  ScalarType dtype = weight ? ScalarType::Double : ScalarType::Long;
  int64_t side = with_matrix ? num_classes : 0;
  Tensor classes = torch::stable::new_zeros(preds, {3, num_classes}, dtype);
  Tensor matrix = torch::stable::new_zeros(preds, {side, side}, dtype);
  Tensor hits = torch::stable::new_zeros(preds, {int64_t(a.ks.size())}, dtype);
  Tensor wrong = torch::stable::new_zeros(preds, {kWrongs}, ScalarType::Long);
  auto run = [&](auto zero, const auto& count) {
    using N = decltype(zero);
    count(a, ids, mutable_data<N>(classes), with_matrix ? mutable_data<N>(matrix) : nullptr,
          mutable_data<N>(hits), mutable_data<int64_t>(wrong));
  };
  if (weight)
    run(double{}, count_weighted);
  else
    run(int64_t{}, count_rows);
  return {classes, matrix, hits, wrong};
}

// ---- Counts of labels ---------------------------------------------------------------------------

template <class N>
void count_labels(const LabelArguments& a, Tensor& matrix, Tensor& both, Tensor& wrong) {
  constexpr int64_t kMostChunks = 64;
  int64_t rows = a.preds.size(0), labels = a.preds.size(1);
  int64_t least = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(labels, 1));
  int64_t each = std::max(least, (rows + kMostChunks - 1) / kMostChunks), chunks = (rows + each - 1) / each;
  std::vector<LabelSums<N>> sums(chunks);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t from, int64_t to) {
    for (int64_t k = from; k < to; ++k) {
      sums[k].cells.resize(4 * labels);
      TORCHFAST_DISPATCH(label_chunk<N>)(a, baseline::data<int64_t>(a.target), doubles(a.weight), k * each,
                                         std::min(rows, (k + 1) * each), sums[k]);
    }
  });
  N *cells = mutable_data<N>(matrix), *exact = mutable_data<N>(both);
  int64_t* mistakes = mutable_data<int64_t>(wrong);
  for (const LabelSums<N>& of : sums) {
    for (int64_t i = 0; i < 4 * labels; ++i) cells[i] += of.cells[i];
    for (int i = 0; i < kWrongs; ++i) mistakes[i] += of.wrong[i];
    exact[0] += of.exact, exact[1] += of.rows;
  }
}

std::tuple<Tensor, Tensor, Tensor> label_counts(Tensor preds, Tensor target, Optional weight,
                                                std::optional<int64_t> ignore_index, double threshold,
                                                bool probabilities) {
  STD_TORCH_CHECK(preds.dim() == 2 && target.dim() == 2 && target.size(1) == preds.size(1),
                  "preds and target must be [N, L]");
  STD_TORCH_CHECK(baseline::is_score(preds.scalar_type()) || baseline::is_integer(preds.scalar_type()),
                  "preds must be scores or ids");
  check_sizes(preds, target, weight, preds.size(0), preds.numel());
  LabelArguments a{
      preds,        as_contiguous(target, ScalarType::Long), as_doubles(weight), ignore_index, threshold,
      probabilities};
  ScalarType dtype = weight ? ScalarType::Double : ScalarType::Long;
  Tensor matrix = torch::stable::new_zeros(preds, {preds.size(1), 2, 2}, dtype);
  Tensor rows = torch::stable::new_zeros(preds, {2}, dtype);
  Tensor wrong = torch::stable::new_zeros(preds, {kWrongs}, ScalarType::Long);
  if (weight)
    count_labels<double>(a, matrix, rows, wrong);
  else
    count_labels<int64_t>(a, matrix, rows, wrong);
  return {matrix, rows, wrong};
}

// ---- Areas under curves -------------------------------------------------------------------------

struct Area {
  double roc, average_precision, positives, negatives;
};

// Adds up one curve by groups of tied scores, in descending order. N is int64_t, or double for weights.
template <class N>
class Curve {
 public:
  void add(N positive, N negative) { t_ += positive, f_ += negative; }

  void end_of_tie() {
    // Of integers exact: twice the product of the totals is below 2^63 for 2^32 scores.
    trapezoids_ += Wide(f_ - f_before_) * Wide(t_ + t_before_);
    double t = double(t_);
    if (t_ > t_before_) steps_ += (t - double(t_before_)) * t / (t + double(f_));
    t_before_ = t_, f_before_ = f_;
  }

  Area area() const {
    double t = double(t_), f = double(f_);
    return {double(trapezoids_) / 2 / t / f, steps_ / t, t, f};
  }

 private:
  using Wide = std::conditional_t<std::is_same_v<N, double>, double, unsigned __int128>;
  N t_{}, f_{}, t_before_{}, f_before_{};
  Wide trapezoids_{};
  double steps_ = 0;
};

enum Label : uint8_t { kNegative, kPositive, kIgnored };

struct AreaArguments {
  Tensor scores, labels;
  Optional weight;
  std::optional<int64_t> ignore_index;
};

// Curve k: its elements, sorted and walked.
template <class Key, class T, class R>
Area area_of(const AreaArguments& a, int64_t k, const Parts& parts, Buffer<Keyed<Key>>& elements,
             Buffer<uint8_t>& codes, Buffer<Key>& counts) {
  int64_t n = a.scores.size(1), step = a.scores.stride(1);
  const T* x = baseline::data<T>(a.scores) + k * a.scores.stride(0);
  bool of_classes = a.labels.dim() == 1;
  const int64_t* y = baseline::data<int64_t>(a.labels) + (of_classes ? 0 : k * n);
  const double* weight = doubles(a.weight);
  Keyed<Key>* all = elements.need(2 * n);
  uint8_t* code = weight ? codes.need(n) : nullptr;
  int64_t most = of_classes ? a.scores.size(0) - 1 : 1, one = of_classes ? k : 1;
  std::atomic<bool> wrong{false};
  parts.for_each_range(n, 1, [&](int64_t, int64_t begin, int64_t end) {
    bool bad = false;
    for (int64_t i = begin; i < end; ++i) {
      R score = baseline::to_real(x[i * step]);
      double w = weight ? weight[i] : 1;
      Label label = y[i] == one ? kPositive : kNegative;
      bool mistaken = score != score || y[i] < 0 || y[i] > most || !(w > 0 && w < INFINITY);
      if (mistaken) {
        bool counts = !(a.ignore_index && y[i] == *a.ignore_index) && w != 0;
        bad |= counts, label = kIgnored;
      } else if (a.ignore_index && y[i] == *a.ignore_index) {
        label = kIgnored;
      }
      Key key = descending(score);
      if (code) code[i] = label;
      all[i] = {key, code ? Key(i) : Key(label)};
    }
    if (bad) wrong = true;
  });
  const Keyed<Key>* sorted = radix_sort(all, all + n, n, parts, counts);
  auto walk = [&](auto curve, const auto& add) {
    for (int64_t i = 0; i < n; ++i) {
      add(curve, sorted[i].id);
      if (i + 1 == n || sorted[i + 1].key != sorted[i].key) curve.end_of_tie();
    }
    return curve.area();
  };
  Area area =
      weight ? walk(Curve<double>(),
                    [&](auto& curve, Key i) {
                      curve.add(code[i] == kPositive ? weight[i] : 0, code[i] == kNegative ? weight[i] : 0);
                    })
             : walk(Curve<int64_t>(),
                    [](auto& curve, Key label) { curve.add(label == kPositive, label == kNegative); });
  if (wrong) area.roc = area.average_precision = NAN;
  return area;
}

template <class Key, class T, class R>
void all_areas(const AreaArguments& a, double* areas, double* totals) {
  int64_t curves = a.scores.size(0), n = a.scores.size(1), threads = torch::stable::get_num_threads();
  auto curve = [&](int64_t k, const Parts& parts, auto&... buffers) {
    Area area = area_of<Key, T, R>(a, k, parts, buffers...);
    areas[k] = area.roc, areas[curves + k] = area.average_precision;
    totals[k] = area.positives, totals[curves + k] = area.negatives;
  };
  auto range = [&](int64_t from, int64_t to, const Parts& parts) {
    Buffer<Keyed<Key>> elements;
    Buffer<uint8_t> codes;
    Buffer<Key> counts;
    for (int64_t k = from; k < to; ++k) curve(k, parts, elements, codes, counts);
  };
  if (curves < threads && n >= kGrainElements) return range(0, curves, Parts{threads});
  int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(n, 1));
  torch::stable::parallel_for(0, curves, grain, [&](int64_t from, int64_t to) { range(from, to, Parts{}); });
}

std::tuple<Tensor, Tensor> ranked_areas(Tensor scores, Tensor labels, Optional weight,
                                        std::optional<int64_t> ignore_index) {
  STD_TORCH_CHECK(scores.dim() == 2 && (labels.dim() == 1 || labels.dim() == 2),
                  "scores must be [curves, N]");
  int64_t curves = scores.size(0), n = scores.size(1);
  check_sizes(scores, labels, weight, n, labels.dim() == 1 ? n : curves * n);
  // A column of many is read best from a transposed copy.
  AreaArguments a{curves == 1 ? scores : torch::stable::contiguous(scores),
                  as_contiguous(labels, ScalarType::Long), as_doubles(weight), ignore_index};
  Tensor areas = new_empty(scores, {2, curves}, ScalarType::Double);
  Tensor totals = new_empty(scores, {2, curves}, ScalarType::Double);
  double *area = mutable_data<double>(areas), *total = mutable_data<double>(totals);
  baseline::with_logits_type(a.scores, [&](auto t, auto r) {
    using T = decltype(t);
    using R = decltype(r);
    if (std::is_same_v<R, float> && n <= int64_t(UINT32_MAX))
      all_areas<std::conditional_t<std::is_same_v<R, float>, uint32_t, uint64_t>, T, R>(a, area, total);
    else
      all_areas<uint64_t, T, R>(a, area, total);
  });
  return {areas, totals};
}

}  // namespace
}  // namespace torchfast

STABLE_TORCH_LIBRARY_IMPL(torchfast, CPU, m) {
  m.impl("class_counts", TORCH_BOX(&torchfast::class_counts));
  m.impl("label_counts", TORCH_BOX(&torchfast::label_counts));
  m.impl("ranked_areas", TORCH_BOX(&torchfast::ranked_areas));
}
#endif
