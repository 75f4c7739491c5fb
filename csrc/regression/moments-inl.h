// A chunk of samples in L1, widened to double: the sums, the mean, and the scatter around it.
#if defined(TORCHFAST_REGRESSION_MOMENTS_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_REGRESSION_MOMENTS_INL_H
#undef TORCHFAST_REGRESSION_MOMENTS_INL_H
#else
#define TORCHFAST_REGRESSION_MOMENTS_INL_H
#endif

#include <algorithm>
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

template <class F>
double sum_of(int64_t n, const F& term) {
  Vec<double> sums[4] = {};
  for_each_vec<double>(n, [&](int64_t i, int k, auto count) __attribute__((always_inline)) {
    sums[k] += only_n<double>(term(i, count), count, 0);
  });
  return sum_lanes<double>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

Moments chunk_moments(const Column& preds, const Column& target, const double* weight, int64_t begin,
                      int64_t n) {
  alignas(64) double p[kChunk], y[kChunk], w[kChunk];
  widen(preds, begin, n, p);
  widen(target, begin, n, y);
  Moments m;
  if (weight) {
    for (int64_t i = 0; i < n; ++i) {
      double given = weight[begin + i];
      w[i] = given >= 0 ? given : NAN;
      m.samples += given != 0;
      if (given == 0) p[i] = y[i] = 0;  // a sample of weight 0 does not count, even if it is NaN
    }
    m.weight = sum_of(n, [&](int64_t i, auto c) { return load_n<double>(w + i, c); });
  } else {
    std::fill_n(w, n, 1.0);
    m.samples = m.weight = double(n);
  }
  m.absolute = sum_of(n, [&](int64_t i, auto c) {
    Vec<double> d = load_n<double>(y + i, c) - load_n<double>(p + i, c);
    return load_n<double>(w + i, c) * (d < 0 ? -d : d);
  });
  m.squared = sum_of(n, [&](int64_t i, auto c) {
    Vec<double> d = load_n<double>(y + i, c) - load_n<double>(p + i, c);
    return load_n<double>(w + i, c) * d * d;
  });
  if (m.weight == 0) return m;
  m.mean = sum_of(n, [&](int64_t i, auto c) { return load_n<double>(w + i, c) * load_n<double>(y + i, c); }) /
           m.weight;
  m.rest = sum_of(n, [&](int64_t i,
                         auto c) { return load_n<double>(w + i, c) * (load_n<double>(y + i, c) - m.mean); }) /
           m.weight;
  m.scatter = sum_of(n, [&](int64_t i, auto c) {
    Vec<double> d = load_n<double>(y + i, c) - m.mean - m.rest;
    return load_n<double>(w + i, c) * d * d;
  });
  return m;
}

TORCHFAST_END_KERNELS

#endif
