// A chunk of samples in L1, widened to double: the sums, the mean, and the scatter around it.
#if defined(TORCHFAST_REGRESSION_MOMENTS_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_REGRESSION_MOMENTS_INL_H
#undef TORCHFAST_REGRESSION_MOMENTS_INL_H
#else
#define TORCHFAST_REGRESSION_MOMENTS_INL_H
#endif

#include <array>
#include <cmath>
#include <cstdint>

#include "memory/elements-inl.h"
#include "regression/call.h"
#include "simd/vec-inl.h"

TORCHFAST_KERNELS

using regression::Column, regression::kChunk, regression::Moments;

void widen(const Column& column, int64_t begin, int64_t n, double* to) {
  with_float_type(column.view, [&](auto* x) {
    x += column.offset + begin * column.stride;
    if (column.stride == 1)
      for (int64_t i = 0; i < n; ++i) to[i] = to_real(x[i]);
    else
      for (int64_t i = 0; i < n; ++i) to[i] = to_real(x[i * column.stride]);
  });
}

// Calls term(i, count, sums) for each vector of n elements, and adds up each of the sums that it adds to.
template <int terms, class F>
std::array<double, terms> sums_of(int64_t n, const F& term) {
  Vec<double> sums[4][terms] = {};
  for_each_vec<double>(
      n, [&](int64_t i, int k, auto count) __attribute__((always_inline)) { term(i, count, sums[k]); });
  std::array<double, terms> totals;
  for (int t = 0; t < terms; ++t)
    totals[t] = sum_lanes<double>((sums[0][t] + sums[1][t]) + (sums[2][t] + sums[3][t]));
  return totals;
}

// Loads `count` elements of float or double as doubles; the other lanes are 0.
template <class S>
TORCHFAST_INLINE Vec<double> widened(const S* p, auto count) {
  typedef S Part __attribute__((vector_size(Simd<double>::lanes * sizeof(S))));
  Part part{};
  __builtin_memcpy(&part, p, count * sizeof(S));
  return __builtin_convertvector(part, Vec<double>);
}

// Sums about the chunk's own mean in a second walk of the chunk: what rounding has left of the mean there
// moves the scatter to it.
template <bool weighted, class S>
void sum_up(const S* p, const S* y, const double* w, int64_t n, Moments& m) {
  auto weigh = [&](Vec<double> v, int64_t i, auto count) __attribute__((always_inline)) {
    if constexpr (weighted) v = v * load_n<double>(w + i, count);
    return only_n<double>(v, count, 0);
  };
  auto [absolute, squared, sum] =
      sums_of<3>(n, [&](int64_t i, auto count, Vec<double>* sums) __attribute__((always_inline)) {
        Vec<double> v = widened(y + i, count), d = v - widened(p + i, count);
        sums[0] += weigh(d < 0 ? -d : d, i, count);
        sums[1] += weigh(d * d, i, count);
        sums[2] += weigh(v, i, count);
      });
  m.absolute = absolute, m.squared = squared;
  if (m.weight == 0) return;
  m.mean = sum / m.weight;
  auto [left, scatter] =
      sums_of<2>(n, [&](int64_t i, auto count, Vec<double>* sums) __attribute__((always_inline)) {
        Vec<double> d = widened(y + i, count) - m.mean;
        sums[0] += weigh(d, i, count);
        sums[1] += weigh(d * d, i, count);
      });
  m.rest = left / m.weight;
  m.scatter = scatter - m.rest * left;
}

Moments chunk_moments(const Column& preds, const Column& target, const double* weight, int64_t begin,
                      int64_t n) {
  Moments m;
  m.samples = m.weight = double(n);
  auto is_read = [](const Column& column) { return column.view.type == Type::f32 && column.stride == 1; };
  if (!weight && is_read(preds) && is_read(target)) {
    auto at = [&](const Column& column) { return column.view.as<float>() + column.offset + begin; };
    sum_up<false>(at(preds), at(target), weight, n, m);
    return m;
  }
  alignas(64) double p[kChunk], y[kChunk], w[kChunk];
  widen(preds, begin, n, p);
  widen(target, begin, n, y);
  if (!weight) {
    sum_up<false>(p, y, w, n, m);
    return m;
  }
  m.samples = m.weight = 0;
  for (int64_t i = 0; i < n; ++i) {
    double given = weight[begin + i];
    w[i] = given >= 0 ? given : NAN;
    m.samples += given != 0;
    m.weight += w[i];
    if (given == 0) p[i] = y[i] = 0;  // a sample of weight 0 does not count, even if it is NaN
  }
  sum_up<true>(p, y, w, n, m);
  return m;
}

TORCHFAST_END_KERNELS

#endif
