// Regression metrics on the CPU. Definitions and reference: torchfast/metrics/regression/.
//
// Chunk by chunk in L1, widened to double: the sums, the mean, and the scatter around it. Chunks do not
// depend on the number of threads, and are merged in their order (Chan, Golub & LeVeque 1979).
#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../common.h"

#ifndef TORCHFAST_FILE
namespace torchfast {
namespace {

constexpr int64_t kChunk = 1024;  // samples: three rows of doubles are 24 KB

// Of one output, as in functional.py; the rest is what rounding the mean has left.
struct Moments {
  double samples = 0, weight = 0, absolute = 0, squared = 0, mean = 0, rest = 0, scatter = 0;

  void merge(const Moments& b) {
    double total = weight + b.weight;
    if (b.weight == 0) return;
    double share = weight / total, other = b.weight / total;
    double center = share * mean + other * b.mean;
    double mine = mean - center + rest, its = b.mean - center + b.rest;
    double left = share * mine + other * its;
    scatter += b.scatter + weight * (mine - left) * (mine - left) + b.weight * (its - left) * (its - left);
    samples += b.samples, weight = total, absolute += b.absolute, squared += b.squared;
    mean = center, rest = left;
  }
};

// One output's samples: element i of x at i * stride.
struct Column {
  const Tensor& x;
  int64_t offset, stride;
};

}  // namespace
}  // namespace torchfast
#endif

#define TORCHFAST_FILE "cpu/regression.cpp"
#include "../foreach_isa.h"
#include "../tensors.h"

namespace torchfast::TORCHFAST_ISA {
namespace {

void widen(const Column& column, int64_t begin, int64_t n, double* to) {
  with_float_type(column.x, [&](auto* x) {
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

Moments moments(const Column& preds, const Column& target, const double* weight, int64_t begin, int64_t n) {
  alignas(64) double p[kChunk], y[kChunk], w[kChunk];
  widen(preds, begin, n, p);
  widen(target, begin, n, y);
  Moments m;
  if (weight) {
    for (int64_t i = 0; i < n; ++i) {
      double given = weight[begin + i];
      w[i] = given >= 0 ? given : NAN;
      m.samples += given != 0;
      if (given == 0) p[i] = y[i] = 0;  // as if it were not there, even if NaN
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

}  // namespace
}  // namespace torchfast::TORCHFAST_ISA

#ifdef TORCHFAST_LAST_ISA
namespace torchfast {
namespace {

std::tuple<Tensor, Tensor> regression_moments(Tensor preds, Tensor target, std::optional<Tensor> weight) {
  STD_TORCH_CHECK(preds.dim() == 2 && target.dim() == 2 && target.size(0) == preds.size(0) &&
                      target.size(1) == preds.size(1),
                  "preds and target must be [N, outputs]");
  STD_TORCH_CHECK(!weight || weight->numel() == preds.size(0), "weight must have one element a sample");
  STD_TORCH_CHECK(preds.is_cpu() && target.is_cpu() && (!weight || weight->is_cpu()),
                  "all tensors must be on the CPU");
  for (const Tensor* x : {&preds, &target})
    STD_TORCH_CHECK(baseline::is_score(x->scalar_type()),
                    "preds and target must be float32, bfloat16, float16 or float64");
  std::optional<Tensor> weights;
  if (weight) weights = as_contiguous(*weight, ScalarType::Double);
  const double* w = weights ? static_cast<const double*>(weights->const_data_ptr()) : nullptr;
  int64_t n = preds.size(0), outputs = preds.size(1), chunks = (n + kChunk - 1) / kChunk;
  std::vector<Moments> parts(chunks * outputs);
  torch::stable::parallel_for(0, chunks * outputs, kGrainElements / kChunk, [&](int64_t from, int64_t to) {
    for (int64_t part = from; part < to; ++part) {
      int64_t output = part % outputs, begin = part / outputs * kChunk;
      Column p{preds, output * preds.stride(1), preds.stride(0)};
      Column y{target, output * target.stride(1), target.stride(0)};
      parts[part] = TORCHFAST_DISPATCH(moments)(p, y, w, begin, std::min(kChunk, n - begin));
    }
  });
  Tensor sums = new_empty(preds, {4, outputs}, ScalarType::Double);
  Tensor spread = new_empty(preds, {3, outputs}, ScalarType::Double);
  double* sum = static_cast<double*>(sums.mutable_data_ptr());
  double* around = static_cast<double*>(spread.mutable_data_ptr());
  for (int64_t output = 0; output < outputs; ++output) {
    Moments all;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) all.merge(parts[chunk * outputs + output]);
    double of_sums[] = {all.samples, all.weight, all.absolute, all.squared};
    double of_spread[] = {all.mean, all.rest, all.scatter};
    for (int row = 0; row < 4; ++row) sum[row * outputs + output] = of_sums[row];
    for (int row = 0; row < 3; ++row) around[row * outputs + output] = of_spread[row];
  }
  return {sums, spread};
}

}  // namespace
}  // namespace torchfast

STABLE_TORCH_LIBRARY_IMPL(torchfast, CPU, m) {
  m.impl("regression_moments", TORCH_BOX(&torchfast::regression_moments));
}
#endif
