// One query: its judged documents ranked, and the metrics from that.
#if defined(TORCHFAST_RANKING_CPU_QUERY_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_RANKING_CPU_QUERY_INL_H
#undef TORCHFAST_RANKING_CPU_QUERY_INL_H
#else
#define TORCHFAST_RANKING_CPU_QUERY_INL_H
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "ranking/call.h"
#include "ranking/cpu/count-inl.h"
#include "ranking/cpu/ranked-inl.h"
#include "ranking/cpu/sort-inl.h"

TORCHFAST_KERNELS

// Puts the largest of the gains, so many as the longest cut-off looks at, first and in descending order. Most
// are small integers, which are counted: with std::sort, NDCG of 1,000 documents, half of them graded,
// took 1.6 times as long (10 graded of 100: 1.1 times).
inline void sort_gains(double* gains, int64_t n, int64_t longest) {
  constexpr int kCounted = 256;
  int32_t count[kCounted];
  int cleared = 0;
  if (n == 0 || std::count(gains, gains + n, gains[0]) == n) return;
  for (int64_t i = 0; i < n; ++i) {
    int gain = gains[i] >= 0 && gains[i] < kCounted ? int(gains[i]) : -1;
    if (gain < 0 || gain != gains[i]) {
      auto descending = [](double a, double b) { return a > b; };
      if (longest < n) std::nth_element(gains, gains + longest, gains + n, descending);
      return std::sort(gains, gains + std::min(longest, n), descending);
    }
    for (; cleared <= gain; ++cleared) count[cleared] = 0;
    ++count[gain];
  }
  while (cleared-- > 0) gains = std::fill_n(gains, count[cleared], double(cleared));
}

// Writes the values of all metrics for a query. `gains` holds the gains of all judged documents, and is
// reordered; `longest` is the longest cut-off of NDCG.
template <class Ranking>
void evaluate(const ranking::Call& c, const ranking::Query& query, const Ranking& ranked, double* gains,
              int64_t gains_count, int64_t longest, const Discounts& discounts, double* out, int64_t step) {
  using namespace ranking;
  if (longest > 0) sort_gains(gains, gains_count, longest);
  auto best_dcg = [=, &discounts](int64_t k) {
    double sum = 0;
    for (int64_t i = 0; i < std::min(k, gains_count); ++i) sum += gains[i] * discounts(i + 1);
    return sum;
  };
  for (int64_t m = 0; m < c.metrics; ++m, out += step) {
    int64_t kind = c.kinds[m], k = cut_of(kind, c.ks[m], query);
    if (kind == map && c.options.map_denominator == hits) {
      *out = ranked.map_over_hits(k, discounts);
      continue;
    }
    double sum = 0;
    switch (kind) {
      case ndcg:
      case dcg: sum = ranked.template sum<dcg>(k, discounts); break;
      case mrr: sum = ranked.template sum<mrr>(k, discounts); break;
      case hit_rate: sum = ranked.template sum<hit_rate>(k, discounts); break;
      case map: sum = ranked.template sum<map>(k, discounts); break;
      default: sum = ranked.template sum<precision>(k, discounts);
    }
    *out = value_of(kind, c.ks[m], sum, kind == ndcg ? best_dcg(k) : 0, query, c.options);
  }
}

// Evaluates one query after the other, wherever its ranks come from.
class Evaluator {
 public:
  Evaluator(const ranking::Call& call, const Discounts& discounts) : c_(call), discounts_(discounts) {
    for (int64_t m = 0; m < c_.metrics; ++m) {
      of_all_ranks_ |= c_.kinds[m] != ranking::r_precision && c_.ks[m] == 0;
      longest_cut_ = std::max(longest_cut_, c_.ks[m]);
      by_relevant_ |= c_.kinds[m] == ranking::r_precision;
      if (c_.kinds[m] == ranking::ndcg)
        longest_ndcg_ = std::max(longest_ndcg_, ranking::cut_of(ranking::ndcg, c_.ks[m], {}));
    }
  }
  Evaluator(const Evaluator&) = delete;  // its parts refer to each other

  Judged judged;       // the query's, which the caller fills in
  Judged unretrieved;  // those that were not retrieved; `at` means nothing

  // Turns the judged documents of `documents` into the values of query q. If num_relevant < 0, the targets
  // say how many are relevant. locate(ranked, cut) finds the ranks up to the cut-off, and returns if they
  // have a meaning.
  template <class Locate>
  void evaluate_query(int64_t documents, int64_t num_relevant, int64_t q, const Locate& locate) {
    using namespace ranking;
    const Options& o = c_.options;
    if (judged.wrong || unretrieved.wrong) return fail(q);  // an illegal target has no gain
    Query query{documents, 0, 0};
    double* gains = judged.y.get();
    int64_t gains_count = judged.count + unretrieved.count;
    bool gain = gains_count > 0;
    if (ranked_.plain && unretrieved.count == 0) {
      query.relevant = query.n_rel = judged.count;
    } else {
      gain = false;
      double* to = gains = gains_.need(gains_count);
      for (const Judged* of : {&judged, &unretrieved})
        for (int64_t i = 0; i < of->count; ++i) {
          query.n_rel += is_relevant(of->y[i], o);
          gain |= (*to++ = gain_of(of->y[i], o)) > 0;
          if (of == &judged) query.relevant = query.n_rel;
        }
    }
    if (num_relevant >= 0) query.n_rel = num_relevant;

    ranked_.begin(gains);
    int64_t cut = of_all_ranks_ ? documents : std::max(longest_cut_, by_relevant_ ? query.n_rel : 0);
    if (!locate(ranked_, cut) || query.n_rel < query.relevant) return fail(q);
    double* out = c_.values + q;
    c_.empty[q] = query.n_rel == 0;
    c_.empty[q + c_.queries] = !gain;
    if (ranked_.is_untied)
      evaluate(c_, query, ranked_.untied, gains, gains_count, longest_ndcg_, discounts_, out, c_.queries);
    else
      evaluate(c_, query, ranked_.groups, gains, gains_count, longest_ndcg_, discounts_, out, c_.queries);
  }

  void fail(int64_t q) const {
    for (int64_t m = 0; m < c_.metrics; ++m) c_.values[q + m * c_.queries] = NAN;
    c_.empty[q] = c_.empty[q + c_.queries] = false;
  }

 protected:
  const ranking::Call& c_;
  Ranked ranked_{c_.options, judged};

 private:
  const Discounts& discounts_;
  bool of_all_ranks_ = false, by_relevant_ = false;  // a metric has no cut-off; has the cut-off n_rel
  int64_t longest_cut_ = 0, longest_ndcg_ = 0;
  Buffer<double> gains_;  // of judged, then of unretrieved documents, unless the targets of `judged` serve
};

// Ranks one query after the other by its scores.
template <class R>
class Ranker : public Evaluator {
 public:
  using Evaluator::Evaluator;

  template <class S>
  void rank(const Row<S>& row, const Parts& parts, int64_t num_relevant, int64_t q) {
    evaluate_query(row.n, num_relevant, q, [&](Ranked&, int64_t cut) {
      int64_t numbers =
          judged.count <= Counting<R>::kMost ? counting_.rank(row, parts) : sorting_.rank(row, cut, parts);
      return c_.options.nan != ranking::propagate || numbers == row.n;
    });
  }

 private:
  Counting<R> counting_{ranked_};
  Sorting<R> sorting_{ranked_};
};

TORCHFAST_END_KERNELS

#endif
