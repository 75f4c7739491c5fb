// The class of a row: the first of its largest scores, and the rank of the target's among them.
#if defined(TORCHFAST_CLASSIFICATION_PREDICT_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_CLASSIFICATION_PREDICT_INL_H
#undef TORCHFAST_CLASSIFICATION_PREDICT_INL_H
#else
#define TORCHFAST_CLASSIFICATION_PREDICT_INL_H
#endif

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>

#include "classification/call.h"
#include "memory/walk-inl.h"
#include "simd/vec-inl.h"

TORCHFAST_KERNELS

using classification::ClassCall;

constexpr int64_t kNanRow = -1;  // the predicted class of a row with a NaN

// Returns the first of the largest scores, or kNanRow. The second pass finds the row in L1 or L2, and stops
// halfway on average.
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
  // The last vector is whole, too: the lanes that it has in common with the one before do not match.
  return n - L + std::countr_zero(equal_bits(load<R>(x + n - L), most_of_all));
}

// Counts the classes that come before class y: larger scores, and later ones that are equal.
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

// The scores of a call, [N, C, ...] of any strides.
template <class T, class R>
struct Scores {
  explicit Scores(const ClassCall& a)
      : x(a.preds.as<T>()),
        classes(a.classes),
        class_stride(a.preds.stride(1)),
        of_rows(Order(a.preds, logical_order(a.preds, 1)), a.preds) {}

  // Writes the predictions and, if `rank` is not null, the ranks of positions begin .. begin + n - 1, whose
  // targets are y.
  void predict(int64_t begin, int64_t n, const int64_t* y, int64_t* predicted, int64_t* rank) const {
    of_rows.for_each_run(begin, n, [&](int64_t offset, int64_t step, int64_t count) {
      const T* at = x + offset;
      int64_t i = 0;
      if (class_stride != 1 && step == 1 && sizeof(R) == sizeof(float))
        for (; i + Simd<R>::lanes <= count; i += Simd<R>::lanes) predict_lanes(at + i, predicted + i);
      for (; i < count; ++i) {
        const T* row = at + i * step;
        predicted[i] = class_stride == 1 ? largest<T, R>(row, classes) : strided(row);
      }
      for (i = 0; rank && i < count; ++i) {
        if (y[i] < 0 || y[i] >= classes) continue;
        const T* row = at + i * step;
        rank[i] = class_stride == 1 ? rank_of<T, R>(row, classes, y[i]) : strided_rank(row, y[i]);
      }
      y += count, predicted += count;
      if (rank) rank += count;
    });
  }

 private:
  // Each lane has one of the neighbouring positions.
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

  int64_t strided(const T* row) const {
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
  Strides of_rows;
};

void predict_rows(const ClassCall& a, int64_t begin, int64_t end, int64_t* predicted, int64_t* rank) {
  with_logits_type(a.preds, [&](auto t, auto r) {
    Scores<decltype(t), decltype(r)>(a).predict(begin, end - begin, a.target + begin, predicted, rank);
  });
}

TORCHFAST_END_KERNELS

#endif
