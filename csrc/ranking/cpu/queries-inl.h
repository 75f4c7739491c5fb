// All queries of a call, shared out to the threads.
#if defined(TORCHFAST_RANKING_CPU_QUERIES_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_RANKING_CPU_QUERIES_INL_H
#undef TORCHFAST_RANKING_CPU_QUERIES_INL_H
#else
#define TORCHFAST_RANKING_CPU_QUERIES_INL_H
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "memory/parallel.h"
#include "ranking/call.h"
#include "ranking/cpu/query-inl.h"

TORCHFAST_KERNELS

constexpr int64_t kBlockDocuments = 32768;  // fewer documents are not worth waking a thread

inline bool are_boundaries(const int64_t* offsets, int64_t queries, int64_t total) {
  bool legal = offsets[0] >= 0 && offsets[queries] <= total;
  for (int64_t q = 0; q < queries; ++q) legal &= offsets[q] <= offsets[q + 1];
  return legal;
}

template <class S, class R>
class Queries {
 public:
  explicit Queries(const ranking::Call& call)
      : c_(call),
        target_(call.target),
        unretrieved_(call.unretrieved_offsets ? call.unretrieved : call.target) {}

  void rank() const {
    bool legal = (!c_.offsets || are_boundaries(c_.offsets, c_.queries, c_.documents)) &&
                 (!c_.unretrieved_offsets ||
                  are_boundaries(c_.unretrieved_offsets, c_.queries, c_.unretrieved_documents));
    if (!legal) {
      std::fill_n(c_.values, c_.metrics * c_.queries, NAN);
      std::fill_n(c_.empty, 2 * c_.queries, false);
      return;
    }
    int64_t longest = c_.width, threads = thread_count();
    for (int64_t q = 0; c_.offsets && q < c_.queries; ++q) longest = std::max(longest, documents_of(q));
    if (longest > INT32_MAX)
      throw std::invalid_argument("a query has " + std::to_string(longest) +
                                  " documents; at most 2^31 - 1 are allowed");
    const Discounts discounts(longest);

    // A query that one thread alone would keep busy for long is shared out, before the others.
    auto is_huge = [&](int64_t q) {
      return documents_of(q) > std::max(kHuge, c_.documents / (4 * threads)) && threads > 1;
    };
    if (longest > kHuge && threads > 1) {
      Worker worker(*this, discounts);
      for (int64_t q = 0; q < c_.queries; ++q)
        if (is_huge(q)) worker.rank(q, Parts{threads});
    }
    parallel_for(0, c_.documents / kBlockDocuments + 1, 1, [&](int64_t from, int64_t to) {
      Worker worker(*this, discounts);
      for (int64_t q = first_of(from), end = first_of(to); q < end; ++q)
        if (!is_huge(q)) worker.rank(q, Parts{});
    });
  }

 private:
  static constexpr int64_t kHuge = 1 << 18;

  int64_t documents_of(int64_t q) const { return c_.offsets ? c_.offsets[q + 1] - c_.offsets[q] : c_.width; }

  // Returns the first query that begins in a block of documents or behind it.
  int64_t first_of(int64_t block) const {
    int64_t at = block * kBlockDocuments;
    if (at > c_.documents) return c_.queries;
    if (!c_.offsets) return at == 0 ? 0 : std::min(c_.queries, (at + c_.width - 1) / c_.width);
    return std::lower_bound(c_.offsets, c_.offsets + c_.queries, at) - c_.offsets;
  }

  struct Worker {
    Worker(const Queries& queries, const Discounts& discounts) : of(queries), ranker(of.c_, discounts) {}

    void rank(int64_t q, const Parts& parts) {
      const ranking::Call& c = of.c_;
      int64_t n = c.lengths ? c.lengths[q] : of.documents_of(q);
      int64_t num_relevant = c.num_relevant ? c.num_relevant[q] : 0;
      if (n < 0 || (c.lengths && n > c.width) || num_relevant < 0) return ranker.fail(q);

      int64_t first = c.offsets ? c.offsets[q] : q, stride = c.target.stride;
      Row<S> row{reinterpret_cast<const S*>(c.preds.from(first)), c.preds.stride, n};
      const void* target = c.target.from(first);
      if (c.mask.data) {
        auto* mask = reinterpret_cast<const bool*>(c.mask.from(first));
        std::byte* kept = targets.need((n + 1) * size_of(c.target.type));
        of.target_.keep(target, stride, mask, c.mask.stride, n, kept);
        row.n = keep<S>(row.scores, row.stride, mask, c.mask.stride, n, scores.need(n + 1));
        row.scores = scores.get(), row.stride = 1;
        target = kept, stride = 1;
      }
      find(target, stride, row.n, parts);
      ranker.unretrieved.clear();
      if (c.unretrieved_offsets) {
        int64_t begin = c.unretrieved_offsets[q], end = c.unretrieved_offsets[q + 1];
        of.unretrieved_.find(c.unretrieved.from(begin), c.unretrieved.stride, 0, end - begin, c.options,
                             ranker.unretrieved);
      }
      ranker.rank(row, parts, c.num_relevant ? num_relevant : -1, q);
    }

    void find(const void* target, int64_t stride, int64_t n, const Parts& parts) {
      const ranking::Options& o = of.c_.options;
      ranker.judged.clear();
      if (parts.count == 1) return of.target_.find(target, stride, 0, n, o, ranker.judged);
      std::vector<Judged> found(parts.count);
      parts.for_each_range(n, kChunk, [&](int64_t part, int64_t begin, int64_t end) {
        of.target_.find(target, stride, begin, end, o, found[part]);
      });
      for (const Judged& of_part : found) ranker.judged.append(of_part);
    }

    const Queries& of;
    Ranker<R> ranker;
    Buffer<S> scores;  // scores of the documents that the mask keeps
    Buffer<std::byte> targets;
  };

  const ranking::Call& c_;
  Targets target_, unretrieved_;
};

inline void rank_queries(const ranking::Call& call) {
  with_logits_type(View{nullptr, call.preds.type},
                   [&](auto s, auto r) { Queries<decltype(s), decltype(r)>(call).rank(); });
}

TORCHFAST_END_KERNELS

#endif
