// The op torchfast::ranking_metrics as PyTorch calls it, for the CPU and CUDA alike: its checks, its outputs,
// and the call that the kernels get.
#pragma once

#include <tuple>
#include <vector>

#include "ranking/call.h"
#include "torch/tensor.h"

namespace torchfast::ranking {

struct Inputs {
  Tensor preds, target;
  OptionalTensor offsets, mask, lengths, num_relevant, unretrieved, unretrieved_offsets, gain_table;

  bool flat() const { return offsets.has_value(); }
  int64_t queries() const { return flat() ? offsets->numel() - 1 : preds.size(0); }
};

// Keeps direct calls of the op memory-safe; users meet the public function's messages first.
inline void check(const Inputs& in, const Options& options) {
  bool flat = in.flat();
  STD_TORCH_CHECK(in.preds.dim() == (flat ? 1 : 2), "preds must be [Q, D], or [T] with offsets");
  STD_TORCH_CHECK(is_floating(in.preds), "preds must be float32, bfloat16, float16 or float64");
  int64_t queries = in.queries();
  STD_TORCH_CHECK(queries >= 0, "offsets must have Q + 1 elements");
  for (const Tensor* x : {&in.target, in.mask ? &*in.mask : &in.target}) {
    STD_TORCH_CHECK(x->dim() == in.preds.dim() && x->size(0) == in.preds.size(0) &&
                        (flat || x->size(1) == in.preds.size(1)),
                    "target and mask must have the shape of preds");
  }
  STD_TORCH_CHECK(flat || in.preds.size(1) <= INT32_MAX, "a query has ", flat ? 0 : in.preds.size(1),
                  " documents; at most 2^31 - 1 are allowed");
  STD_TORCH_CHECK(!in.mask || in.mask->scalar_type() == ScalarType::Bool, "mask must be bool");
  STD_TORCH_CHECK(!in.lengths || (!flat && in.lengths->numel() == queries),
                  "lengths must have Q elements, beside preds [Q, D]");
  STD_TORCH_CHECK(!in.num_relevant || in.num_relevant->numel() == queries,
                  "num_relevant must have Q elements");
  STD_TORCH_CHECK(
      in.unretrieved.has_value() == in.unretrieved_offsets.has_value() &&
          (!in.unretrieved || (in.unretrieved->dim() == 1 && in.unretrieved_offsets->numel() == queries + 1)),
      "unretrieved must be one-dimensional, with Q + 1 unretrieved_offsets");
  STD_TORCH_CHECK((options.gain == table) == in.gain_table.has_value(), "gain_table belongs to gain = table");
  auto beside_preds = [&](const Tensor& x) {
    return x.is_cpu() == in.preds.is_cpu() && x.get_device_index() == in.preds.get_device_index();
  };
  for (const auto* x : {&in.offsets, &in.mask, &in.lengths, &in.num_relevant, &in.unretrieved,
                        &in.unretrieved_offsets, &in.gain_table})
    STD_TORCH_CHECK(!*x || beside_preds(**x), "all tensors must be on the device of preds");
  STD_TORCH_CHECK(beside_preds(in.target), "target must be on the device of preds");
}

inline Elements elements_of(const Tensor& x) {
  return {static_cast<const char*>(x.const_data_ptr()), x.stride(0), x.stride(x.dim() - 1), view_of(x).type};
}

// The op, whose kernels `run(call, preds)` starts.
template <void (*run)(const Call&, const Tensor&)>
std::tuple<Tensor, Tensor> ranking_metrics(Tensor preds, Tensor target, OptionalTensor offsets,
                                           OptionalTensor mask, OptionalTensor lengths,
                                           OptionalTensor num_relevant, OptionalTensor unretrieved,
                                           OptionalTensor unretrieved_offsets, OptionalTensor gain_table,
                                           std::vector<int64_t> kinds, std::vector<int64_t> ks, int64_t ties,
                                           int64_t gain, int64_t map_denominator,
                                           int64_t precision_denominator, int64_t nan,
                                           double relevance_threshold) {
  Inputs in{preds,     target, offsets, mask, lengths, num_relevant, unretrieved, unretrieved_offsets,
            gain_table};
  Call call{};
  call.options = {ties, gain, map_denominator, precision_denominator, nan, relevance_threshold, nullptr, 0};
  check(in, call.options);
  STD_TORCH_CHECK(kinds.size() == ks.size(), "kinds and ks must have one element a metric");

  std::vector<Tensor> kept;  // they live until the kernels have run, or a stream's order keeps their memory
  auto numbers = [&](const OptionalTensor& x) -> const int64_t* {
    if (!x) return nullptr;
    kept.push_back(as_contiguous(*x, ScalarType::Long));
    return view_of(kept.back()).as<int64_t>();
  };
  auto targets = [&](const Tensor& x) {
    auto type = type_of(x.scalar_type());
    bool rare = type == Type::u16 || type == Type::u32 || type == Type::u64;
    kept.push_back(rare ? torch::stable::to(x, ScalarType::Double) : x);
    return elements_of(kept.back());
  };
  call.preds = elements_of(preds);
  call.target = targets(target);
  if (mask) call.mask = elements_of(*mask);
  if (unretrieved) call.unretrieved = targets(*unretrieved);
  call.offsets = numbers(offsets);
  call.lengths = numbers(lengths);
  call.num_relevant = numbers(num_relevant);
  call.unretrieved_offsets = numbers(unretrieved_offsets);
  call.queries = in.queries();
  call.width = in.flat() ? 0 : preds.size(1);
  call.documents = preds.numel();
  call.unretrieved_documents = unretrieved ? unretrieved->numel() : 0;
  call.metrics = int64_t(kinds.size());
  call.kinds = kinds.data(), call.ks = ks.data();
  if (gain_table) {
    kept.push_back(as_contiguous(*gain_table, ScalarType::Double));
    call.options.gains = view_of(kept.back()).as<double>();
    call.options.gains_size = gain_table->numel();
  }
  Tensor values = new_empty(preds, {call.metrics, call.queries}, ScalarType::Double);
  Tensor empty = new_empty(preds, {2, call.queries}, ScalarType::Bool);
  call.values = output_of(values).writable<double>();
  call.empty = output_of(empty).writable<bool>();
  run(call, preds);
  return {values, empty};
}

}  // namespace torchfast::ranking
