// The metrics of queries whose judged documents' ranks are known already.
#if defined(TORCHFAST_RANKING_CPU_OF_RANKS_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_RANKING_CPU_OF_RANKS_INL_H
#undef TORCHFAST_RANKING_CPU_OF_RANKS_INL_H
#else
#define TORCHFAST_RANKING_CPU_OF_RANKS_INL_H
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>

#include "memory/parallel.h"
#include "ranking/cpu/queries-inl.h"

TORCHFAST_KERNELS

class KnownRanks : public Evaluator {
 public:
  KnownRanks(const ranking::Call& call, const Discounts& discounts, const Targets& target)
      : Evaluator(call, discounts), target_(target) {}

  void evaluate_one(int64_t q) {
    int64_t begin = c_.offsets[q], end = c_.offsets[q + 1], size = c_.candidates[q];
    if (size < 0) return fail(q);
    judged.clear();
    target_.find(c_.target.from(begin), c_.target.stride, 0, end - begin, c_.options, judged);
    evaluate_query(size, -1, q, [&](Ranked& ranked, int64_t) {
      return add_groups(ranked, c_.larger + begin, c_.equal + begin, size);
    });
  }

 private:
  // Adds a group for each place that a judged document has. Returns false if they are no ranks of a query.
  bool add_groups(Ranked& ranked, const int64_t* larger, const int64_t* equal, int64_t size) {
    int32_t *ids = ids_.need(judged.count), *last = ids + judged.count, *end;
    auto larger_of = [&](int32_t id) { return larger[judged.at[id]]; };
    std::iota(ids, last, 0);
    std::stable_sort(ids, last, [&](int32_t a, int32_t b) { return larger_of(a) < larger_of(b); });
    for (int64_t free = 0; ids < last; ids = end) {
      int64_t before = larger_of(*ids), n = equal[judged.at[*ids]];
      bool same = true;
      for (end = ids; end < last && larger_of(*end) == before; ++end) same &= equal[judged.at[*end]] == n;
      if (!same || before < free || n < end - ids || n > size || before > size - n) return false;
      ranked.add_group(before, n, ids, end - ids);
      free = before + n;
    }
    return true;
  }

  const Targets& target_;
  Buffer<int32_t> ids_;
};

inline void evaluate_queries(const ranking::Call& call) {
  int64_t most = 0;
  for (int64_t q = 0; q < call.queries; ++q) most = std::max(most, call.candidates[q]);
  if (most > INT32_MAX)
    throw std::invalid_argument("a query has " + std::to_string(most) +
                                " candidates; at most 2^31 - 1 are allowed");
  if (!are_boundaries(call.offsets, call.queries, call.documents)) {
    std::fill_n(call.values, call.metrics * call.queries, NAN);
    std::fill_n(call.empty, 2 * call.queries, false);
    return;
  }
  const Discounts discounts(most);
  const Targets target(call.target);
  constexpr int64_t kAtOnce = 64;  // fewer queries are not worth waking a thread
  parallel_for(0, call.queries, kAtOnce, [&](int64_t begin, int64_t end) {
    KnownRanks ranks(call, discounts, target);
    for (int64_t q = begin; q < end; ++q) ranks.evaluate_one(q);
  });
}

TORCHFAST_END_KERNELS

#endif
