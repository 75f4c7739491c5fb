// The op torchfast::regression_moments on the CPU: its checks, its threads, its outputs.
//
// Chunks do not depend on the number of threads, and are merged in their order (Chan, Golub & LeVeque 1979).
#include <algorithm>
#include <tuple>
#include <vector>

#include "memory/parallel.h"
#include "regression/call.h"
#include "torch/tensor.h"

namespace torchfast::regression {
namespace {

std::tuple<Tensor, Tensor> regression_moments(Tensor preds, Tensor target, OptionalTensor weight) {
  STD_TORCH_CHECK(preds.dim() == 2 && target.dim() == 2 && target.size(0) == preds.size(0) &&
                      target.size(1) == preds.size(1),
                  "preds and target must be [N, outputs]");
  STD_TORCH_CHECK(!weight || weight->numel() == preds.size(0), "weight must have one element a sample");
  STD_TORCH_CHECK(preds.is_cpu() && target.is_cpu() && (!weight || weight->is_cpu()),
                  "all tensors must be on the CPU");
  STD_TORCH_CHECK(is_floating(preds) && is_floating(target),
                  "preds and target must be float32, bfloat16, float16 or float64");
  if (weight) weight = as_contiguous(*weight, ScalarType::Double);
  const double* weights = view_of(weight).as<double>();
  View p = view_of(preds), y = view_of(target);
  int64_t n = p.size(0), outputs = p.size(1), chunks = (n + kChunk - 1) / kChunk;
  std::vector<Moments> parts(chunks * outputs);
  parallel_for(0, chunks * outputs, kGrainElements / kChunk, [&](int64_t from, int64_t to) {
    for (int64_t part = from; part < to; ++part) {
      int64_t output = part % outputs, begin = part / outputs * kChunk;
      parts[part] = moments({p, output * p.stride(1), p.stride(0)}, {y, output * y.stride(1), y.stride(0)},
                            weights, begin, std::min(kChunk, n - begin));
    }
  });
  Tensor sums = new_empty(preds, {4, outputs}, ScalarType::Double);
  Tensor spread = new_empty(preds, {3, outputs}, ScalarType::Double);
  double *sum = output_of(sums).writable<double>(), *around = output_of(spread).writable<double>();
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
}  // namespace torchfast::regression

STABLE_TORCH_LIBRARY_IMPL(torchfast, CPU, m) {
  m.impl("regression_moments", TORCH_BOX(&torchfast::regression::regression_moments));
}
