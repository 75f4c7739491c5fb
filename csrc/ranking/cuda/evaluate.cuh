// The metrics of a query from its judged documents, sorted and counted.
#pragma once

#include "ranking/cuda/locate.cuh"

namespace torchfast::ranking {
namespace {

struct Discount {
  __device__ double operator()(int64_t rank) const { return 1 / log2(double(rank) + 1); }
};

// Returns the thread's share of what the group contributes to a term. `cut` keeps a group that the cut-off
// parts.
__device__ inline double contribution_of(const Term& term, const Group& g, int64_t n_rel, Share share,
                                         bool over_hits, Group& cut) {
  int64_t m = up_to(g, term.k > 0 ? term.k : n_rel);
  if (m == 0) return 0;
  switch (term.kind) {
    case dcg: return gains(g, m, Discount(), share);
    case map:
      if (!over_hits || m == g.n) return precisions(g, m, share);
      if (share.first == 0) cut = g;
      return 0;
    case mrr: return share.first == 0 ? first_hit(g, m).reciprocal : 0;
    case hit_rate: return share.first == 0 ? first_hit(g, m).probability : 0;
    default: return share.first == 0 ? hits_among(g, m) : 0;
  }
}

// Adds what all threads' groups contribute to the terms; a group of n = 0 is none.
template <int warps>
__device__ void add_groups(const Team<warps>& team, const Pass& p, const Group& g, int64_t n_rel,
                           Share share) {
  bool over_hits = p.call.options.map_denominator == hits;
#pragma unroll 1
  for (int t = 0; t < p.term_count; ++t) {
    double x = contribution_of(p.terms[t], g, n_rel, share, over_hits, team.shared.cut[t]);
    x = team.sum_of_warp(x);
    if (team.lane == 0) team.shared.sums[team.warp][t] += x;
  }
}

// It is not inlined, since it needs many registers and few queries need it.
__device__ __noinline__ double parted_over_hits(const Group& cut, int64_t k, double sum) {
  return precisions_over_hits(cut, up_to(cut, k), sum);
}

// Finds the best DCG up to each metric's cut-off. `positive` documents of the query have a gain; all of them
// have the gain `one`, unless that is 0. The counts in `list` are written over.
template <class U, int warps, class List>
__device__ void find_ideals(const Team<warps>& team, const Pass& p, const Row& row, const List& list, int n,
                            int positive, double one, void* memory) {
  const Call& c = p.call;
  InShared<U> shared_list(memory, p.capacity);
  uint64_t* gains = shared_list.gains();
  int ranked = n + row.unretrieved_count, *sorted = nullptr;
  auto key_of_document = [&](int id) {
    double y = id < row.n ? target_of(c, row, id) : unretrieved_target_of(c, row, id - row.n);
    return descending(gain_of(y, c.options));
  };
  auto id_at = [&](int i) { return i < n ? list.ids[i] : row.n + (i - n); };
  if (one == 0 && (warps == 1 || ranked <= p.capacity)) {
    if (team.thread == 0) team.shared.count = 0;
    team.sync();
    for (int i = team.thread; i < ranked; i += team.size)
      if (uint64_t key = key_of_document(id_at(i)); key != descending(0))
        gains[atomicAdd(&team.shared.count, 1)] = key;
    team.sync();
    bitonic_sort(
        team, positive, [&](int i) { gains[i] = ~uint64_t(0); },
        [&](int i, int j, bool up) {
          uint64_t a = gains[i], b = gains[j];
          if (up == (b < a)) gains[i] = b, gains[j] = a;
        });
  } else if (one == 0) {
    if constexpr (warps > 1) {
      int *ids = p.ids + row.place, *other = p.larger + row.place;
#pragma unroll 1
      for (int64_t i = team.thread; i < ranked; i += team.size) other[i] = id_at(int(i));
      team.sync();
      sorted = radix_sort(team, other, ids, ranked, static_cast<int*>(memory), key_of_document);
    }
  }
  for (int m = 0; m < p.metric_count; ++m) {
    if (p.metrics[m].kind != ndcg) continue;
    int64_t k = p.metrics[m].k;
    int end = k > 0 && k < positive ? int(k) : positive;
    double sum = 0;
#pragma unroll 1
    for (int64_t i = team.thread; i < end; i += team.size) {
      double gain = one != 0 ? one : bits_as<double>(~(sorted ? key_of_document(sorted[i]) : gains[i]));
      sum += gain * Discount()(i + 1);
    }
    sum = team.sum(sum);
    if (team.thread == 0) team.shared.ideals[m] = sum;
  }
}

// Writes NaN for a query that has no value.
template <int warps>
__device__ void fail(const Team<warps>& team, const Pass& p, int64_t q) {
  if (team.thread < p.metric_count) p.metrics[team.thread].values[q] = NAN;
  if (team.thread < 2) p.call.empty[team.thread * p.call.queries + q] = false;
}

// The query's values from its n judged documents, sorted and counted. `memory` is what InShared takes.
template <class U, int warps, class List>
__device__ void evaluate(const Team<warps>& team, const Pass& p, const Row& row, int64_t q, const List& list,
                         int n, Seen seen, bool wrong, void* memory) {
  const Call& c = p.call;
  const Options& o = c.options;
  Shared<warps>& shared = team.shared;

  wrong = team.any(wrong);  // an illegal target has no gain: it may lie beyond the table
  int relevant = 0, unretrieved_relevant = 0, positive = 0;
  double least = INFINITY, most = 0;
  auto count_gain = [&](double y) {
    double gain = gain_of(y, o);
    positive += gain > 0;
    if (gain > 0) least = fmin(least, gain), most = fmax(most, gain);
  };
#pragma unroll 1
  for (int64_t j = team.thread; j < n && !wrong; j += team.size) {
    double y = target_of(c, row, list.ids[j]);
    relevant += is_relevant(y, o);
    count_gain(y);
  }
#pragma unroll 1
  for (int64_t i = team.thread; i < row.unretrieved_count; i += team.size) {
    double y = unretrieved_target_of(c, row, i);
    if (is_target(y, o)) {
      unretrieved_relevant += is_relevant(y, o);
      count_gain(y);
    } else {
      wrong = true;
    }
  }
  relevant = team.sum(relevant);
  unretrieved_relevant = team.sum(unretrieved_relevant);
  positive = team.sum(positive);
  least = team.reduce(least, [](double a, double b) { return fmin(a, b); });
  most = team.reduce(most, [](double a, double b) { return fmax(a, b); });
  Query query{seen.documents, relevant, c.num_relevant ? c.num_relevant[q] : relevant + unretrieved_relevant};
  bool bad = team.any(wrong) || row.bad || query.n_rel < relevant ||
             (o.nan == propagate && seen.numbers < seen.documents);
  if (bad) return fail(team, p, q);

  // A group has the documents of one score, or one document where the ties are parted.
  const bool alone = o.ties != average;
  if (o.ties >= optimistic) part_ties(team, c, list, n);
  if (team.thread < kTerms) shared.cut[team.thread].n = 0;
  if (team.lane < kTerms) shared.sums[team.warp][team.lane] = 0;
  team.sync();
  uint64_t before = 0;  // documents in the lower half, relevant ones in the upper
  for (int64_t base = 0; base < n; base += team.size) {
    int j = int(base) + team.thread;
    bool is_there = base + team.thread < n;
    Group g{0, 0, 0, 0, 0};
    uint64_t here = 0;
    if (is_there) {
      g.n = list.same[j];
      here = uint64_t(list.larger[j]) + uint64_t(g.n) +
             (uint64_t(is_relevant(target_of(c, row, list.ids[j]), o)) << 32);
    }
    uint64_t total, ahead = before + team.scan(here, total);
    before += total;
    bool begins = is_there && (alone || begins_group(list, j));
    if (begins) {
      g.before = int(ahead) + list.larger[j];
      g.relevant_before = int(ahead >> 32);
    }
    auto add_members = [&](Group& group, int from, int to, int step) {
#pragma unroll 1
      for (int64_t i = from; i < to; i += step) {
        double y = target_of(c, row, list.ids[i]);
        group.relevant += is_relevant(y, o);
        group.gain += gain_of(y, o);
      }
    };
    bool large = begins && g.n > kSmallGroup;
    Group mine{0, 0, 0, 0, 0};
    if (begins && !large) {
      mine = g;
      add_members(mine, j, alone ? j + 1 : end_of_group(list, j, n), 1);
      mine.gain /= double(g.n);
    }
    add_groups(team, p, mine, query.n_rel, Share{});
    // The whole team works on each large group.
    for (int owner; (owner = team.first(large)) < team.size;) {
      if (team.thread == owner) {
        shared.group = g;
        shared.at = j;
        large = false;
      }
      team.sync();
      Group all = shared.group;
      int from = shared.at;
      add_members(all, from + team.thread, end_of_group(list, from, n), team.size);
      all.relevant = team.sum(all.relevant);
      all.gain = team.sum(all.gain) / double(all.n);
      add_groups(team, p, all, query.n_rel, Share{team.thread, team.size});
      team.sync();
    }
  }
  team.sync();
  if (team.thread < p.term_count)
    for (int w = 1; w < warps; ++w) shared.sums[0][team.thread] += shared.sums[w][team.thread];

  bool asked = false;
  for (int m = 0; m < p.metric_count; ++m) asked |= p.metrics[m].kind == ndcg;
  team.sync();
  if (asked) find_ideals<U>(team, p, row, list, n, positive, least >= most ? most : 0.0, memory);
  team.sync();
  if (team.thread < p.metric_count) {
    const Metric& metric = p.metrics[team.thread];
    int64_t k = cut_of(metric.kind, metric.k, query);
    double sum = shared.sums[0][metric.term], value;
    if (metric.kind != map || o.map_denominator != hits)
      value = value_of(metric.kind, metric.k, sum, shared.ideals[team.thread], query, o);
    else if (const Group& cut = shared.cut[metric.term]; cut.n > 0)
      value = parted_over_hits(cut, k, sum);
    else
      value = shared.sums[0][metric.hits] > 0 ? sum / shared.sums[0][metric.hits] : 0.0;
    metric.values[q] = value;
  }
  if (team.thread == 0) c.empty[q] = query.n_rel == 0;
  if (team.thread == 1) c.empty[c.queries + q] = positive == 0;
}

}  // namespace
}  // namespace torchfast::ranking
