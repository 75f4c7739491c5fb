// The ops torchfast::ranking_metrics and torchfast::metrics_of_ranks on the CPU.
#include "ranking/op.h"

namespace torchfast::ranking {
namespace {

void run(const Call& call, const Tensor&) { rank_on_cpu(call); }

// The values from ranks that are known already: torchfast/metrics/ranking/of_ranks.py.
std::tuple<Tensor, Tensor> metrics_of_ranks(Tensor larger, Tensor equal, Tensor target, Tensor offsets,
                                            Tensor candidates, OptionalTensor gain_table,
                                            std::vector<int64_t> kinds, std::vector<int64_t> ks, int64_t ties,
                                            int64_t gain, int64_t map_denominator,
                                            int64_t precision_denominator, double relevance_threshold) {
  for (const Tensor* x : {&larger, &equal, &target, &offsets, &candidates})
    STD_TORCH_CHECK(x->is_cpu() && x->dim() == 1, "all tensors must be one-dimensional, and on the CPU");
  STD_TORCH_CHECK(!gain_table || (gain_table->is_cpu() && gain_table->dim() == 1),
                  "gain_table must be one-dimensional, and on the CPU");
  STD_TORCH_CHECK(larger.numel() == target.numel() && equal.numel() == target.numel(),
                  "larger, equal and target must have one element a document");
  STD_TORCH_CHECK(offsets.numel() == candidates.numel() + 1,
                  "offsets must have Q + 1 elements, candidates Q");
  STD_TORCH_CHECK(kinds.size() == ks.size(), "kinds and ks must have one element a metric");
  STD_TORCH_CHECK((gain == table) == gain_table.has_value(), "gain_table belongs to gain = table");
  std::vector<Tensor> kept;  // they live until the kernels have run
  auto numbers = [&](const Tensor& x) {
    kept.push_back(as_contiguous(x, ScalarType::Long));
    return view_of(kept.back()).as<int64_t>();
  };
  auto type = type_of(target.scalar_type());
  bool rare = type == Type::u16 || type == Type::u32 || type == Type::u64;
  Tensor targets = rare ? torch::stable::to(target, ScalarType::Double) : target;
  Call call{};
  call.options = {ties,    gain, map_denominator, precision_denominator, propagate, relevance_threshold,
                  nullptr, 0};
  call.larger = numbers(larger);
  call.equal = numbers(equal);
  call.candidates = numbers(candidates);
  call.offsets = numbers(offsets);
  call.target = elements_of(targets);
  call.documents = target.numel();
  call.queries = candidates.numel();
  call.metrics = int64_t(kinds.size());
  call.kinds = kinds.data(), call.ks = ks.data();
  if (gain_table) {
    kept.push_back(as_contiguous(*gain_table, ScalarType::Double));
    call.options.gains = view_of(kept.back()).as<double>();
    call.options.gains_size = gain_table->numel();
  }
  Tensor values = new_empty(larger, {call.metrics, call.queries}, ScalarType::Double);
  Tensor empty = new_empty(larger, {2, call.queries}, ScalarType::Bool);
  call.values = output_of(values).writable<double>();
  call.empty = output_of(empty).writable<bool>();
  evaluate_on_cpu(call);
  return {values, empty};
}

}  // namespace
}  // namespace torchfast::ranking

STABLE_TORCH_LIBRARY_IMPL(torchfast, CPU, m) {
  m.impl("ranking_metrics", TORCH_BOX(&torchfast::ranking::ranking_metrics<torchfast::ranking::run>));
  m.impl("metrics_of_ranks", TORCH_BOX(&torchfast::ranking::metrics_of_ranks));
}
