// Counts labels, each by itself: its score is compared with the threshold.
#if defined(TORCHFAST_CLASSIFICATION_LABELS_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_CLASSIFICATION_LABELS_INL_H
#undef TORCHFAST_CLASSIFICATION_LABELS_INL_H
#else
#define TORCHFAST_CLASSIFICATION_LABELS_INL_H
#endif

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "classification/call.h"
#include "memory/elements-inl.h"

TORCHFAST_KERNELS

using classification::LabelCall, classification::LabelSums;
using enum classification::Wrong;

// The largest R that is no more than `threshold`: no score lies between them.
template <class R>
R at_most(double threshold) {
  R cut = R(threshold);
  return double(cut) > threshold ? std::nextafter(cut, -std::numeric_limits<R>::infinity()) : cut;
}

// x are scores (R is their type in registers) or ids (R is int64_t).
template <class N, class R, class T>
void label_rows(const LabelCall& a, const T* x, int64_t begin, int64_t end, LabelSums<N>& sums) {
  constexpr bool ids = std::is_same_v<R, int64_t>;
  int64_t labels = a.preds.size(1), row_stride = a.preds.stride(0), label_stride = a.preds.stride(1);
  bool ignores = a.ignore_index.has_value();
  int64_t ignored = a.ignore_index.value_or(0);
  R cut{};
  if constexpr (!ids) cut = at_most<R>(a.threshold);
  for (int64_t i = begin; i < end; ++i) {
    double w = a.weight ? a.weight[i] : 1;
    if (w == 0) continue;
    bool weighable = w > 0 && w < INFINITY, counts = false, right = true;
    for (int64_t l = 0; l < labels; ++l) {
      int64_t target = a.target[i * labels + l];
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

// Counts one label without weights, side by side in memory. It has no branch, so that the compiler can
// vectorise it.
template <class R, class T>
void label_run(const LabelCall& a, const T* x, int64_t begin, int64_t end, LabelSums<int64_t>& sums) {
  const int64_t* y = a.target;
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
void add_label_rows(const LabelCall& a, int64_t begin, int64_t end, LabelSums<N>& sums) {
  if (is_integer(a.preds.type))
    return with_index_type(a.preds, [&](auto* x) { label_rows<N, int64_t>(a, x, begin, end, sums); });
  bool run = a.preds.size(1) == 1 && a.preds.stride(0) == 1;
  with_float_type(a.preds, [&](auto* x) {
    using R = decltype(to_real(*x));
    if constexpr (std::is_same_v<N, int64_t>)
      if (run) return label_run<R>(a, x, begin, end, sums);
    label_rows<N, R>(a, x, begin, end, sums);
  });
}

TORCHFAST_END_KERNELS

#endif
