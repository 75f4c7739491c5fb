// The ops torchfast::retrieval_* on the CPU: their checks, their threads, their outputs.
//
// Each block of queries walks over the items in as many ranges as there are threads. Results are sums of
// integers, so that they do not depend on who adds first.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "memory/buffer.h"
#include "memory/parallel.h"
#include "retrieval/call.h"
#include "torch/tensor.h"

namespace torchfast::retrieval {
namespace {

constexpr int64_t kRangeItems = 1 << 12;  // fewer are not worth another packing of the queries
constexpr int64_t kMostItems = 1 << 30;   // counters of a range are 32 bits

// The offsets of n lists, which hold `total` elements.
const int64_t* offsets_of(Tensor& offsets, int64_t n, int64_t total, const char* problem) {
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.scalar_type() == ScalarType::Long &&
                      offsets.size(0) == n + 1 && offsets.is_cpu(),
                  problem);
  offsets = as_contiguous(offsets, ScalarType::Long);
  auto* offset = view_of(offsets).as<int64_t>();
  STD_TORCH_CHECK(offset[0] == 0 && offset[n] == total && std::is_sorted(offset, offset + n + 1), problem);
  return offset;
}

constexpr const char* kOffsets =
    "offsets must be int64 on the CPU, ascend from 0 to the number of listed elements, and "
    "have one element more than there are queries";
constexpr const char* kOtherOffsets =
    "other_offsets must be int64 on the CPU, ascend from 0 to the number of others, "
    "and have one element more than there are queries";

Embeddings embeddings_of(const Tensor& queries, const Tensor& items, const OptionalTensor& bias) {
  STD_TORCH_CHECK(queries.dim() == 2 && items.dim() == 2 && queries.size(1) == items.size(1),
                  "queries and items must be [n, d] and [m, d]");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == items.size(0)), "item_bias must be [m]");
  STD_TORCH_CHECK(is_floating(queries) && is_floating(items) && (!bias || is_floating(*bias)),
                  "queries, items and item_bias must be float32, bfloat16, float16 or float64");
  STD_TORCH_CHECK(queries.is_cpu() && items.is_cpu() && (!bias || bias->is_cpu()),
                  "all tensors must be on the CPU");
  return {view_of(queries), view_of(items), view_of(bias)};
}

ScalarType score_type(const Embeddings& e) { return e.is_double() ? ScalarType::Double : ScalarType::Float; }

Tensor retrieval_scores(Tensor queries, Tensor items, OptionalTensor item_bias, Tensor ids, Tensor offsets) {
  Embeddings e = embeddings_of(queries, items, item_bias);
  STD_TORCH_CHECK(ids.dim() == 1 && ids.scalar_type() == ScalarType::Long && ids.is_cpu(),
                  "ids must be one-dimensional, int64, and on the CPU");
  ids = as_contiguous(ids, ScalarType::Long);
  int64_t total = ids.size(0), grain = kGrainElements / std::max<int64_t>(e.items.size(1), 1) + 1;
  const int64_t *offset = offsets_of(offsets, e.queries.size(0), total, kOffsets),
                *id = view_of(ids).as<int64_t>();
  Tensor scores = new_empty(queries, {total}, score_type(e));
  void* to = output_of(scores).data;
  parallel_for(0, total, grain,
               [&](int64_t from, int64_t end) { score_listed(e, offset, id, from, end, to); });
  return scores;
}

// ---- Counts among all items --------------------------------------------------------------------

// Where the blocks of queries begin, and the end of the last. Queries without listed scores take no room.
std::vector<int64_t> blocks_of(const int64_t* offsets, int64_t n, int64_t most) {
  std::vector<int64_t> begins{0};
  int64_t queries = 0, listed = 0;
  for (int64_t i = 0; i < n; ++i) {
    int64_t more = offsets[i + 1] - offsets[i];
    if (more == 0) continue;
    if (queries > 0 && (queries == most || listed + more > kBlockListed)) {
      begins.push_back(i);
      queries = listed = 0;
    }
    ++queries, listed += more;
  }
  begins.push_back(n);
  return begins;
}

std::tuple<Tensor, Tensor> retrieval_counts(Tensor queries, Tensor items, OptionalTensor item_bias,
                                            Tensor scores, Tensor offsets) {
  Embeddings e = embeddings_of(queries, items, item_bias);
  STD_TORCH_CHECK(scores.dim() == 1 && scores.scalar_type() == score_type(e) && scores.is_cpu(),
                  "scores must be one-dimensional, on the CPU, and float64 if embeddings are, else float32");
  scores = as_contiguous(scores, score_type(e));
  int64_t n = e.queries.size(0), d = e.queries.size(1), m = e.items.size(0), total = scores.size(0);
  const int64_t* offset = offsets_of(offsets, n, total, kOffsets);
  Tensor larger = new_empty(scores, {total}, ScalarType::Long),
         equal = new_empty(scores, {total}, ScalarType::Long);
  Counts counts{offset, view_of(scores).data, output_of(larger).writable<int64_t>(),
                output_of(equal).writable<int64_t>()};
  std::fill(counts.larger, counts.larger + total, 0);
  std::fill(counts.equal, counts.equal + total, 0);
  if (total == 0 || m == 0) return {larger, equal};
  int64_t row_bytes = d * (e.is_double() ? sizeof(double) : sizeof(float));
  std::vector<int64_t> begins = blocks_of(offset, n, kBlockBytes / std::max<int64_t>(row_bytes, 64) + 1);
  int64_t blocks = begins.size() - 1;
  int64_t ranges = std::max(std::min(thread_count(), m / kRangeItems + 1), m / kMostItems + 1);
  int64_t grain = kGrainElements * blocks * ranges / (total * m) + 1;
  parallel_for(0, blocks * ranges, grain, [&](int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) {
      int64_t block = task / ranges, range = task % ranges;
      count_block(e, counts,
                  {begins[block], begins[block + 1], m * range / ranges, m * (range + 1) / ranges});
    }
  });
  return {larger, equal};
}

// ---- Counts among the scores of other items ----------------------------------------------------

// As count_block, for one query: NaN among the others is larger than every number, a listed NaN is below
// these.
template <class R>
void correct(const R* scores, int64_t n, const R* others, int64_t count, Buffer<R>& buffer, int64_t* larger,
             int64_t* equal) {
  R* sorted = buffer.need(count);
  std::copy(others, others + count, sorted);
  R* end = std::partition(sorted, sorted + count, [](R x) { return !std::isnan(x); });
  std::sort(sorted, end);
  int64_t numbers = end - sorted;
  for (int64_t i = 0; i < n; ++i) {
    auto [from, to] = std::equal_range(sorted, end, scores[i]);
    bool missing = std::isnan(scores[i]);
    larger[i] = missing ? numbers : count - (to - sorted);
    equal[i] = missing ? count - numbers : to - from;
  }
}

std::tuple<Tensor, Tensor> retrieval_corrections(Tensor scores, Tensor offsets, Tensor others,
                                                 Tensor other_offsets) {
  auto dtype = scores.scalar_type();
  STD_TORCH_CHECK(scores.dim() == 1 && others.dim() == 1 && others.scalar_type() == dtype &&
                      (dtype == ScalarType::Float || dtype == ScalarType::Double),
                  "scores and others must be one-dimensional, and both float32 or both float64");
  STD_TORCH_CHECK(scores.is_cpu() && others.is_cpu() && offsets.dim() == 1 && offsets.size(0) > 0, kOffsets);
  scores = as_contiguous(scores, dtype), others = as_contiguous(others, dtype);
  int64_t n = offsets.size(0) - 1;
  const int64_t* offset = offsets_of(offsets, n, scores.size(0), kOffsets);
  const int64_t* other = offsets_of(other_offsets, n, others.size(0), kOtherOffsets);
  Tensor larger = new_empty(scores, {scores.size(0)}, ScalarType::Long);
  Tensor equal = new_empty(scores, {scores.size(0)}, ScalarType::Long);
  int64_t *more = output_of(larger).writable<int64_t>(), *same = output_of(equal).writable<int64_t>();
  auto of_type = [&](auto* score) {
    using R = std::remove_const_t<std::remove_pointer_t<decltype(score)>>;
    auto* all = view_of(others).as<R>();
    parallel_for(0, n, 1 + n * 1000 / (1 + scores.size(0) + others.size(0)), [&](int64_t from, int64_t to) {
      Buffer<R> buffer;
      for (int64_t i = from; i < to; ++i) {
        int64_t begin = offset[i];
        correct(score + begin, offset[i + 1] - begin, all + other[i], other[i + 1] - other[i], buffer,
                more + begin, same + begin);
      }
    });
  };
  if (dtype == ScalarType::Float)
    of_type(view_of(scores).as<float>());
  else
    of_type(view_of(scores).as<double>());
  return {larger, equal};
}

}  // namespace
}  // namespace torchfast::retrieval

STABLE_TORCH_LIBRARY_IMPL(torchfast, CPU, m) {
  m.impl("retrieval_scores", TORCH_BOX(&torchfast::retrieval::retrieval_scores));
  m.impl("retrieval_counts", TORCH_BOX(&torchfast::retrieval::retrieval_counts));
  m.impl("retrieval_corrections", TORCH_BOX(&torchfast::retrieval::retrieval_corrections));
}
