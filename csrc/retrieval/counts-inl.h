// How many items score up to each of a query's listed scores, and how many equal it: a tile's scores go to
// L1, where they are compared with those of each of its queries. Those that are not <= are larger, NaN among
// them.
#if defined(TORCHFAST_RETRIEVAL_COUNTS_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_RETRIEVAL_COUNTS_INL_H
#undef TORCHFAST_RETRIEVAL_COUNTS_INL_H
#else
#define TORCHFAST_RETRIEVAL_COUNTS_INL_H
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "memory/buffer.h"
#include "retrieval/call.h"
#include "retrieval/scores-inl.h"
#include "simd/vec-inl.h"

TORCHFAST_KERNELS

using retrieval::Block, retrieval::Counts;

constexpr int64_t kPanelBytes = 1 << 18;  // of packed items, which stay in L2
constexpr int64_t kScoreBytes = 1 << 12;  // of a query's scores: those of a tile's queries stay in L1
constexpr int64_t kMany =
    256;  // with so many listed scores, a search among them is faster than comparing all

// Compares n scores (whole vectors) with `bounds` listed ones. The counts have a vector for each.
template <int bounds, class R>
TORCHFAST_INLINE void compare_some(const R* scores, int64_t n, const R* bound, Int<R>* up_to, Int<R>* equal) {
  constexpr int L = Simd<R>::lanes;
  Vec<R> limit[bounds];
  IntVec<R> below[bounds], same[bounds];
  for (int b = 0; b < bounds; ++b) {
    limit[b] = splat<R>(bound[b]);
    __builtin_memcpy(&below[b], up_to + b * L, sizeof(below[b]));
    __builtin_memcpy(&same[b], equal + b * L, sizeof(same[b]));
  }
  for (int64_t i = 0; i < n; i += L) {
    Vec<R> x = load<R>(scores + i);
    for (int b = 0; b < bounds; ++b) {
      count_if(below[b], x <= limit[b]);
      count_if(same[b], x == limit[b]);
    }
  }
  for (int b = 0; b < bounds; ++b) {
    __builtin_memcpy(up_to + b * L, &below[b], sizeof(below[b]));
    __builtin_memcpy(equal + b * L, &same[b], sizeof(same[b]));
  }
}

// The listed scores of one query, and what was counted so far.
template <class R>
class Query {
 public:
  static constexpr int L = Simd<R>::lanes;

  Query(int64_t first, int64_t listed) : first_(first), listed_(listed) {}
  int64_t counters() const { return is_many() ? listed_ + 1 : listed_ * L; }

  // `bound` has room for the listed scores, the counters are zero.
  void begin(const R* scores, R* bound, Int<R>* up_to, Int<R>* equal) {
    bound_ = bound, up_to_ = up_to, equal_ = equal;
    auto limit = [&](int64_t i) {  // a listed NaN is compared with all numbers
      R score = scores[first_ + i];
      return score == score ? score : std::numeric_limits<R>::infinity();
    };
    if (is_many()) {
      order_.resize(listed_);
      std::iota(order_.begin(), order_.end(), 0);
      std::sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return limit(a) < limit(b); });
    }
    for (int64_t i = 0; i < listed_; ++i) bound[i] = limit(is_many() ? order_[i] : i);
  }

  // Counts `width` scores, which are followed by NaN up to a whole vector.
  void compare(const R* scores, int64_t width) {
    if (is_many()) return search(scores, width);
    int64_t n = (width + L - 1) / L * L, b = 0;
    for (; b + 4 <= listed_; b += 4) compare_some<4>(scores, n, bound_ + b, up_to_ + b * L, equal_ + b * L);
    for (; b < listed_; ++b) compare_some<1>(scores, n, bound_ + b, up_to_ + b * L, equal_ + b * L);
  }

  // Adds the counts of `items` scores to the results.
  void finish(int64_t items, const Counts& counts) {
    auto* scores = static_cast<const R*>(counts.scores);
    auto add = [&](int64_t i, int64_t larger, int64_t equal) {
      R score = scores[first_ + i];
      if (score != score) equal = larger, larger = items - larger;
      __atomic_fetch_add(counts.larger + first_ + i, larger, __ATOMIC_RELAXED);
      __atomic_fetch_add(counts.equal + first_ + i, equal, __ATOMIC_RELAXED);
    };
    int64_t up_to = 0, equal = 0;
    for (int64_t i = 0; i < listed_; ++i) {
      if (is_many()) {
        up_to += up_to_[i];
        equal = i > 0 && bound_[i] == bound_[i - 1] ? equal : equal_[i];
        add(order_[i], items - up_to, equal);
      } else {
        add(i, items - std::accumulate(up_to_ + i * L, up_to_ + (i + 1) * L, int64_t(0)),
            std::accumulate(equal_ + i * L, equal_ + (i + 1) * L, int64_t(0)));
      }
    }
  }

 private:
  bool is_many() const { return listed_ >= kMany; }

  // Counts each score at the first of the bounds, which ascend, that it is <= to; there alone it may be
  // equal.
  void search(const R* scores, int64_t width) {
    for (int64_t i = 0; i < width; ++i) {
      R x = scores[i];
      const R* at = bound_;
      for (int64_t left = listed_; left > 0;) {
        int64_t half = (left + 1) / 2;
        at = x <= at[half - 1] ? at : at + half;
        left -= half;
      }
      ++up_to_[at - bound_];
      if (at != bound_ + listed_) equal_[at - bound_] += x == *at;
    }
  }

  int64_t first_, listed_;
  R* bound_ = nullptr;
  Int<R>*up_to_ = nullptr, *equal_ = nullptr;
  std::vector<int64_t> order_;
};

template <class R>
void count_block_as(const Embeddings& e, const Counts& counts, const Block& block) {
  constexpr int rows = Tile<R>::queries, items = Tile<R>::items;
  int64_t d = e.items.size(1), listed = 0, counters = 0;
  std::vector<Query<R>> queries;
  std::vector<int64_t> ids;
  for (int64_t i = block.query_begin; i < block.query_end; ++i) {
    int64_t n = counts.offsets[i + 1] - counts.offsets[i];
    if (n == 0) continue;
    ids.push_back(i);
    queries.emplace_back(counts.offsets[i], n);
    listed += n, counters += queries.back().counters();
  }
  int64_t n = ids.size(), padded = (n + rows - 1) / rows * rows;
  Buffer<R> query_buffer, bound_buffer, panel_buffer, score_buffer;
  Buffer<Int<R>> counter_buffer;
  R *query = query_buffer.need(padded * d), *bound = bound_buffer.need(listed);
  std::fill(query + n * d, query + padded * d, R(0));
  Int<R>* counter = counter_buffer.need(2 * counters);
  std::fill(counter, counter + 2 * counters, 0);
  for (int64_t i = 0; i < n; ++i) {
    widen_query(e, ids[i], query + i * d);
    int64_t size = queries[i].counters();
    queries[i].begin(static_cast<const R*>(counts.scores), bound, counter, counter + size);
    bound += counts.offsets[ids[i] + 1] - counts.offsets[ids[i]], counter += 2 * size;
  }

  int64_t size = panel_size<R>(d);
  int64_t most = std::min(kPanelBytes / int64_t(size * sizeof(R)), kScoreBytes / int64_t(items * sizeof(R)));
  int64_t panels = std::max<int64_t>(most, 1), step = panels * items;
  R *panel = aligned(panel_buffer, panels * size), *scores = aligned(score_buffer, rows * step);
  for (int64_t first = block.item_begin; first < block.item_end; first += step) {
    int64_t width = std::min(step, block.item_end - first);
    for (int64_t j = 0; j < width; j += items)
      pack(
          e, std::min<int64_t>(items, width - j), [&](int64_t i) { return first + j + i; },
          panel + j / items * size);
    for (int64_t i = 0; i < n; i += rows) {
      for (int64_t j = 0; j < width; j += items)
        score_tile<rows>(query + i * d, d, panel + j / items * size, scores + j, step);
      for (int64_t q = i; q < std::min(n, i + rows); ++q) queries[q].compare(scores + (q - i) * step, width);
    }
  }
  for (Query<R>& q : queries) q.finish(block.item_end - block.item_begin, counts);
}

void count_block(const Embeddings& e, const Counts& counts, const Block& block) {
  e.is_double() ? count_block_as<double>(e, counts, block) : count_block_as<float>(e, counts, block);
}

TORCHFAST_END_KERNELS

#endif
