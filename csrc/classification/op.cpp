// The ops of the classification metrics on the CPU: their checks, conversions and outputs.
#include <algorithm>
#include <tuple>
#include <vector>

#include "classification/call.h"
#include "torch/tensor.h"

namespace torchfast::classification {
namespace {

// Keeps direct calls of the ops memory-safe; users meet the public functions' messages first.
void check_sizes(const Tensor& x, const Tensor& target, const OptionalTensor& weight, int64_t rows,
                 int64_t targets) {
  STD_TORCH_CHECK(target.numel() == targets, "target has a wrong shape");
  STD_TORCH_CHECK(!weight || weight->numel() == rows, "weight must have one element a row");
  STD_TORCH_CHECK(x.is_cpu() && target.is_cpu() && (!weight || weight->is_cpu()),
                  "all tensors must be on the CPU");
  STD_TORCH_CHECK(is_integer(target), "target must be of an integer dtype");
}

// Converts both to what the kernels read.
void convert(Tensor& target, OptionalTensor& weight) {
  target = as_contiguous(target, ScalarType::Long);
  if (weight) weight = as_contiguous(*weight, ScalarType::Double);
}

// Calls f(N{}), where N is the type that is counted in.
template <class F>
Tensor with_count_type(const OptionalTensor& weight, const F& f) {
  return weight ? f(double{}) : f(int64_t{});
}

ScalarType count_dtype(const OptionalTensor& weight) {
  return weight ? ScalarType::Double : ScalarType::Long;
}

Tensor wrong_of(const Tensor& like, const int64_t (&wrong)[kWrongs]) {
  Tensor result = new_empty(like, {kWrongs}, ScalarType::Long);
  std::copy_n(wrong, kWrongs, output_of(result).writable<int64_t>());
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> class_counts(Tensor preds, Tensor target, OptionalTensor weight,
                                                        int64_t num_classes,
                                                        std::optional<int64_t> ignore_index,
                                                        std::vector<int64_t> ks, bool with_matrix) {
  bool ids = preds.dim() == target.dim();
  int64_t rows = target.numel();
  check_sizes(preds, target, weight, rows, rows);
  STD_TORCH_CHECK(num_classes > 0 && num_classes <= INT32_MAX, "num_classes must be 1 to 2^31-1");
  STD_TORCH_CHECK(ids ? preds.numel() == rows && is_integer(preds)
                      : preds.dim() >= 2 && preds.size(1) == num_classes &&
                            preds.numel() == rows * num_classes && is_floating(preds),
                  "preds must be scores [N, C, ...] or ids of target's shape");
  convert(target, weight);
  if (ids) preds = as_contiguous(preds, ScalarType::Long);
  int64_t side = with_matrix ? num_classes : 0;
  ScalarType dtype = count_dtype(weight);
  Tensor classes = torch::stable::new_zeros(preds, {3, num_classes}, dtype);
  Tensor matrix = torch::stable::new_zeros(preds, {side, side}, dtype);
  Tensor hits = torch::stable::new_zeros(preds, {int64_t(ks.size())}, dtype);
  if (ids) ks.clear();
  ClassCall a{view_of(preds),
              ids,
              view_of(target).as<int64_t>(),
              view_of(weight).as<double>(),
              rows,
              num_classes,
              ignore_index,
              std::move(ks)};
  Tensor wrong = with_count_type(weight, [&](auto zero) {
    using N = decltype(zero);
    ClassSums<N> sums{output_of(classes).writable<N>(),
                      with_matrix ? output_of(matrix).writable<N>() : nullptr, output_of(hits).writable<N>()};
    count_classes(a, sums);
    return wrong_of(preds, sums.wrong);
  });
  return {classes, matrix, hits, wrong};
}

std::tuple<Tensor, Tensor, Tensor> label_counts(Tensor preds, Tensor target, OptionalTensor weight,
                                                std::optional<int64_t> ignore_index, double threshold,
                                                bool probabilities) {
  STD_TORCH_CHECK(preds.dim() == 2 && target.dim() == 2 && target.size(1) == preds.size(1),
                  "preds and target must be [N, L]");
  STD_TORCH_CHECK(is_floating(preds) || is_integer(preds), "preds must be scores or ids");
  check_sizes(preds, target, weight, preds.size(0), preds.numel());
  convert(target, weight);
  Tensor matrix = new_empty(preds, {preds.size(1), 2, 2}, count_dtype(weight));
  Tensor rows = new_empty(preds, {2}, count_dtype(weight));
  LabelCall a{
      view_of(preds), view_of(target).as<int64_t>(), view_of(weight).as<double>(), ignore_index, threshold,
      probabilities};
  Tensor wrong = with_count_type(weight, [&](auto zero) {
    using N = decltype(zero);
    LabelSums<N> sums = count_labels<N>(a);
    std::copy(sums.cells.begin(), sums.cells.end(), output_of(matrix).writable<N>());
    N* of_rows = output_of(rows).writable<N>();
    of_rows[0] = sums.exact, of_rows[1] = sums.rows;
    return wrong_of(preds, sums.wrong);
  });
  return {matrix, rows, wrong};
}

std::tuple<Tensor, Tensor> ranked_areas(Tensor scores, Tensor labels, OptionalTensor weight,
                                        std::optional<int64_t> ignore_index) {
  STD_TORCH_CHECK(scores.dim() == 2 && (labels.dim() == 1 || labels.dim() == 2),
                  "scores must be [curves, N]");
  STD_TORCH_CHECK(is_floating(scores), "scores must be float32, bfloat16, float16 or float64");
  int64_t curves = scores.size(0), n = scores.size(1);
  bool of_classes = labels.dim() == 1;
  check_sizes(scores, labels, weight, n, of_classes ? n : curves * n);
  convert(labels, weight);
  if (curves != 1) scores = torch::stable::contiguous(scores);  // a column of many is read best from a copy
  Tensor areas = new_empty(scores, {2, curves}, ScalarType::Double);
  Tensor totals = new_empty(scores, {2, curves}, ScalarType::Double);
  AreaCall a{view_of(scores), view_of(labels).as<int64_t>(), of_classes, view_of(weight).as<double>(),
             ignore_index};
  rank_areas(a, output_of(areas).writable<double>(), output_of(totals).writable<double>());
  return {areas, totals};
}

}  // namespace
}  // namespace torchfast::classification

STABLE_TORCH_LIBRARY_IMPL(torchfast, CPU, m) {
  m.impl("class_counts", TORCH_BOX(&torchfast::classification::class_counts));
  m.impl("label_counts", TORCH_BOX(&torchfast::classification::label_counts));
  m.impl("ranked_areas", TORCH_BOX(&torchfast::classification::ranked_areas));
}
