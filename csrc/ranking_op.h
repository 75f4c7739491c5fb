// The op torchfast::ranking_metrics as PyTorch calls it: its arguments, for the CPU and CUDA alike.
#pragma once

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common.h"
#include "ranking.h"

namespace torchfast::ranking {

struct Arguments {
  Tensor preds, target;
  std::optional<Tensor> offsets, mask, lengths, num_relevant, unretrieved, unretrieved_offsets, gain_table;
  std::vector<int64_t> kinds, ks;
  Options options;

  bool flat() const { return offsets.has_value(); }
  int64_t queries() const { return flat() ? offsets->numel() - 1 : preds.size(0); }
};

// Memory safety for direct callers of the op; the messages for users are the public function's.
inline void check(const Arguments& a) {
  bool flat = a.flat();
  STD_TORCH_CHECK(a.preds.dim() == (flat ? 1 : 2), "preds must be [Q, D], or [T] with offsets");
  int64_t queries = a.queries();
  STD_TORCH_CHECK(queries >= 0, "offsets must have Q + 1 elements");
  for (const Tensor* x : {&a.target, a.mask ? &*a.mask : &a.target}) {
    STD_TORCH_CHECK(
        x->dim() == a.preds.dim() && x->size(0) == a.preds.size(0) && (flat || x->size(1) == a.preds.size(1)),
        "target and mask must have the shape of preds");
  }
  STD_TORCH_CHECK(flat || a.preds.size(1) <= INT32_MAX, "a query has ", flat ? 0 : a.preds.size(1),
                  " documents; at most 2^31 - 1 are allowed");
  STD_TORCH_CHECK(!a.mask || a.mask->scalar_type() == ScalarType::Bool, "mask must be bool");
  STD_TORCH_CHECK(!a.lengths || (!flat && a.lengths->numel() == queries),
                  "lengths must have Q elements, beside preds [Q, D]");
  STD_TORCH_CHECK(!a.num_relevant || a.num_relevant->numel() == queries, "num_relevant must have Q elements");
  STD_TORCH_CHECK(
      a.unretrieved.has_value() == a.unretrieved_offsets.has_value() &&
          (!a.unretrieved || (a.unretrieved->dim() == 1 && a.unretrieved_offsets->numel() == queries + 1)),
      "unretrieved must be one-dimensional, with Q + 1 unretrieved_offsets");
  STD_TORCH_CHECK(a.kinds.size() == a.ks.size(), "kinds and ks must have one element a metric");
  STD_TORCH_CHECK((a.options.gain == table) == a.gain_table.has_value(),
                  "gain_table belongs to gain = table");
  auto beside_preds = [&](const Tensor& x) {
    return x.is_cpu() == a.preds.is_cpu() && x.get_device_index() == a.preds.get_device_index();
  };
  for (const auto* x : {&a.offsets, &a.mask, &a.lengths, &a.num_relevant, &a.unretrieved,
                        &a.unretrieved_offsets, &a.gain_table})
    STD_TORCH_CHECK(!*x || beside_preds(**x), "all tensors must be on the device of preds");
  STD_TORCH_CHECK(beside_preds(a.target), "target must be on the device of preds");
}

// The op; evaluate(arguments, values, empty) fills [metrics, Q] and [2, Q].
template <void (*evaluate)(const Arguments&, double*, bool*)>
std::tuple<Tensor, Tensor> ranking_metrics(
    Tensor preds, Tensor target, std::optional<Tensor> offsets, std::optional<Tensor> mask,
    std::optional<Tensor> lengths, std::optional<Tensor> num_relevant, std::optional<Tensor> unretrieved,
    std::optional<Tensor> unretrieved_offsets, std::optional<Tensor> gain_table, std::vector<int64_t> kinds,
    std::vector<int64_t> ks, int64_t ties, int64_t gain, int64_t map_denominator,
    int64_t precision_denominator, int64_t nan, double relevance_threshold) {
  Arguments a{preds,
              target,
              offsets,
              mask,
              lengths,
              num_relevant,
              unretrieved,
              unretrieved_offsets,
              gain_table,
              std::move(kinds),
              std::move(ks),
              {ties, gain, map_denominator, precision_denominator, nan, relevance_threshold, nullptr, 0}};
  check(a);
  if (gain_table) {
    a.gain_table = as_contiguous(*gain_table, ScalarType::Double);
    a.options.gains = static_cast<const double*>(a.gain_table->const_data_ptr());
    a.options.gains_size = gain_table->numel();
  }
  Tensor values = new_empty(preds, {int64_t(a.kinds.size()), a.queries()}, ScalarType::Double);
  Tensor empty = new_empty(preds, {2, a.queries()}, ScalarType::Bool);
  evaluate(a, static_cast<double*>(values.mutable_data_ptr()), static_cast<bool*>(empty.mutable_data_ptr()));
  return {values, empty};
}

}  // namespace torchfast::ranking
