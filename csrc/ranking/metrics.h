// The formulas of the ranking metrics, one text for the CPU and the GPU. Their derivation:
// torchfast/metrics/ranking/__init__.py.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define TORCHFAST_FORMULA __host__ __device__ inline
#define TORCHFAST_ROLLED _Pragma("unroll 1")  // nvcc would unroll divisions, whose registers cost threads
#else
#define TORCHFAST_FORMULA inline
#define TORCHFAST_ROLLED
#endif

namespace torchfast::ranking {

// The numbers by which the op's arguments name these.
enum Kind : int64_t { ndcg, dcg, mrr, map, precision, recall, hit_rate, r_precision };
enum Ties : int64_t { average, stable, optimistic, pessimistic };
enum Gain : int64_t { linear, exponential, table };
enum MapDenominator : int64_t { all_relevant, at_most_k, hits };
enum PrecisionDenominator : int64_t { always_k, at_most_documents };
enum Nan : int64_t { propagate, last };

struct Options {
  int64_t ties, gain, map_denominator, precision_denominator, nan;
  double threshold;     // targets from here on are relevant; 0 means all above 0
  const double* gains;  // the table of gain = table
  int64_t gains_size;
};

constexpr int64_t kNoCut = INT64_MAX;  // a cut-off that cuts nothing off

// ---- Targets ----------------------------------------------------------------------------------

TORCHFAST_FORMULA bool is_target(double y, const Options& o) {
  return y >= 0 && y < INFINITY && (o.gain != table || y < double(o.gains_size));
}

TORCHFAST_FORMULA bool is_relevant(double y, const Options& o) {
  return o.threshold > 0 ? y >= o.threshold : y > 0;
}

TORCHFAST_FORMULA double gain_of(double y, const Options& o) {
  if (o.gain == linear) return y;
  if (o.gain == table) return o.gains[int64_t(y)];
  int whole = y < 1000 ? int(y) : 1000;
  return y == whole ? ldexp(1.0, whole) - 1 : expm1(y * 0.693147180559945309);
}

// True if documents of target 0 have no say: they are neither relevant nor have a gain.
TORCHFAST_FORMULA bool zero_is_nothing(const Options& o) {
  return o.gain != table || o.gains_size == 0 || o.gains[0] == 0;
}

// ---- Groups of tied documents -------------------------------------------------------------------

// Documents of one score; or one document, where the policy for ties gives it a place.
struct Group {
  int32_t before;           // documents of the query with larger scores
  int32_t n, relevant;      // documents of the group
  int32_t relevant_before;  // relevant ones of `before`
  double gain;              // the mean of its documents
};

// Counts the group's documents up to the cut-off.
TORCHFAST_FORMULA int64_t up_to(const Group& g, int64_t k) {
  int64_t m = k - g.before;
  return m < 0 ? 0 : m < g.n ? m : g.n;
}

// The documents of a group that a thread sums over: the first, and the step to the next.
struct Share {
  int64_t first = 0, step = 1;
};

// Expected sum of the precisions at the relevant ones of the group's first m documents.
TORCHFAST_FORMULA double precisions(const Group& g, int64_t m, Share share = {}) {
  if (g.relevant == 0) return 0;
  double first = double(g.relevant_before + 1), rank = double(g.before);
  if (g.n == 1) return share.first < m ? first / (rank + 1) : 0.0;
  double slope = double(g.relevant - 1) / double(g.n - 1), sum = 0;
  TORCHFAST_ROLLED
  for (int64_t i = share.first; i < m; i += share.step)
    sum += (first + double(i) * slope) / (rank + 1 + double(i));
  return sum * (double(g.relevant) / double(g.n));
}

// Expected DCG of the group's first m documents. discount(rank) is 1 / log2(rank + 1).
template <class Discount>
TORCHFAST_FORMULA double gains(const Group& g, int64_t m, const Discount& discount, Share share = {}) {
  if (share.first >= m) return 0;
  double sum = discount(share.first + 1 + g.before);
  TORCHFAST_ROLLED
  for (int64_t i = share.first + share.step; i < m; i += share.step) sum += discount(i + 1 + g.before);
  return g.gain * sum;
}

// Expected number of relevant ones among the group's first m documents.
TORCHFAST_FORMULA double hits_among(const Group& g, int64_t m) {
  return g.n == 1 ? double(g.relevant) * double(m) : double(g.relevant) * double(m) / double(g.n);
}

struct FirstHit {
  double reciprocal;   // expected 1 / rank of the first relevant document; 0 if it is not among the m
  double probability;  // that one of the m is relevant
};

TORCHFAST_FORMULA FirstHit first_hit(const Group& g, int64_t m) {
  FirstHit result{0, 0};
  if (g.relevant == 0 || g.relevant_before > 0) return result;
  double n = double(g.n), r = double(g.relevant), rank = double(g.before) + 1;
  double none = 1;  // probability that no document before the one at hand is relevant
  TORCHFAST_ROLLED
  for (int64_t i = 0; i < m && none > 0; ++i) {
    double left = n - double(i);
    result.reciprocal += none * r / (left * (rank + double(i)));
    none *= (left - r) / left;
  }
  result.probability = 1 - none;
  return result;
}

// E[sum of the precisions / hits], both up to a cut-off that leaves m < n documents of the group;
// `sum` has the precisions of the groups before. See values.py, precisions_over_hits.
TORCHFAST_FORMULA double precisions_over_hits(const Group& g, int64_t m, double sum) {
  double c0 = 0, c1 = 0;
  TORCHFAST_ROLLED
  for (int64_t i = 0; i < m; ++i) {
    double rank = double(g.before) + 1 + double(i);
    c0 += 1 / rank;
    c1 += double(i) / rank;
  }
  double n = double(g.n), r = double(g.relevant), before = double(g.relevant_before), cut = double(m);
  double low = fmax(cut - n + r, 0.0), high = fmin(cut, r);
  double mode = fmin(fmax(floor((r + 1) * (cut + 1) / (n + 2)), low), high);
  double mixed = 0, mass = 0;  // over hypergeometric probabilities, in units of the largest
  auto add = [&](double h, double weight) {
    double inside = ((before + 1) * c0 + (m > 1 ? c1 * (h - 1) / (cut - 1) : 0.0)) * h / cut;
    if (before + h > 0) mixed += weight * (sum + inside) / (before + h);
    mass += weight;
  };
  double weight = 1;
  TORCHFAST_ROLLED
  for (double h = mode; h <= high && weight > 0; ++h) {
    add(h, weight);
    weight *= (r - h) * (cut - h) / ((h + 1) * (n - r - cut + h + 1));
  }
  weight = 1;
  TORCHFAST_ROLLED
  for (double h = mode; h > low && weight > 0; --h) {
    weight *= h * (n - r - cut + h) / ((r - h + 1) * (cut - h + 1));
    add(h - 1, weight);
  }
  return mixed / mass;
}

// What the metric sums over the groups; kinds that are not named here count hits.
template <Kind kind, class Discount>
TORCHFAST_FORMULA double contribution(const Group& g, int64_t k, const Discount& discount) {
  int64_t m = up_to(g, k);
  if (m == 0) return 0;
  if (kind == dcg) return gains(g, m, discount);
  if (kind == mrr) return first_hit(g, m).reciprocal;
  if (kind == hit_rate) return first_hit(g, m).probability;
  if (kind == map) return precisions(g, m);
  return hits_among(g, m);
}

// What the value of a metric needs of a query besides the sum.
struct Query {
  int64_t documents, relevant;  // retrieved ones
  int64_t n_rel;
};

// The cut-off that the metric looks at.
TORCHFAST_FORMULA int64_t cut_of(int64_t kind, int64_t k, const Query& query) {
  return kind == r_precision ? query.n_rel : k > 0 ? k : kNoCut;
}

// The value of every metric but map over hits, from the sum of its contributions. `ideal` is the best dcg@k;
// where it overflows, ndcg is NaN.
TORCHFAST_FORMULA double value_of(int64_t kind, int64_t k, double sum, double ideal, const Query& query,
                                  const Options& o) {
  double divisor = double(query.n_rel);
  if (kind == ndcg) divisor = ideal < INFINITY ? ideal : NAN;
  if (kind == dcg || kind == mrr || kind == hit_rate) return sum;
  if (kind == precision) divisor = double(k > 0 ? k : query.documents);
  if (kind == precision && o.precision_denominator == at_most_documents)
    divisor = fmin(divisor, double(query.documents));
  if (kind == map && o.map_denominator == at_most_k && k > 0) divisor = fmin(divisor, double(k));
  return divisor <= 0 ? 0.0 : sum / divisor;
}

}  // namespace torchfast::ranking
