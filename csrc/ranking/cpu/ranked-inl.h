// The judged documents with their ranks, and what the metrics sum over them up to a cut-off: from groups of
// tied documents, or, where no documents are tied, the common case, from their places.
#if defined(TORCHFAST_RANKING_CPU_RANKED_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_RANKING_CPU_RANKED_INL_H
#undef TORCHFAST_RANKING_CPU_RANKED_INL_H
#else
#define TORCHFAST_RANKING_CPU_RANKED_INL_H
#endif

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "memory/buffer.h"
#include "ranking/cpu/discounts.h"
#include "ranking/cpu/judged-inl.h"
#include "ranking/metrics.h"
#include "simd/vec-inl.h"

TORCHFAST_KERNELS

using ranking::Discounts, ranking::Group;

// What the metrics sum up to a cut-off, from groups of tied documents in any order.
class Groups {
 public:
  void clear() { groups_.clear(); }
  void add(const Group& group) { groups_.push_back(group); }

  template <ranking::Kind kind>
  double sum(int64_t k, const Discounts& discounts) const {
    double sum = 0;
    for (const Group& g : groups_) sum += ranking::contribution<kind>(g, k, discounts);
    return sum;
  }

  double map_over_hits(int64_t k, const Discounts&) const {
    double sum = 0, hits = 0;
    const Group* cut = nullptr;
    for (const Group& g : groups_) {
      if (int64_t m = ranking::up_to(g, k); m == g.n)
        sum += ranking::precisions(g, m), hits += double(g.relevant);
      else if (m > 0)
        cut = &g;
    }
    if (cut) return ranking::precisions_over_hits(*cut, k - cut->before, sum);
    return hits > 0 ? sum / hits : 0;
  }

 private:
  std::vector<Group> groups_;
};

// What the metrics sum up to a cut-off, from the judged documents in order, where none is tied with another.
class Untied {
 public:
  void begin(int64_t judged) {
    judged_ = relevant_ = judged;
    place_.need(judged + L), gain_.need(judged);
    hit_ = place_.get();
  }
  // Puts the i-th judged document; `place` documents have larger scores.
  void put(int64_t i, int32_t place, double gain) { place_[i] = place, gain_[i] = gain; }
  // Must be called when all are put, if not all are relevant.
  template <class F>
  void choose_relevant(const F& is_relevant) {
    int32_t* hit = hits_.need(judged_ + L);
    hit_ = hit;
    relevant_ = 0;
    for (int64_t i = 0; i < judged_; ++i) {
      hit[relevant_] = place_[i];
      relevant_ += is_relevant(i);
    }
  }

  template <ranking::Kind kind>
  double sum(int64_t k, const Discounts& discounts) const {
    if constexpr (kind == ranking::dcg) {
      double sum = 0;
      for (int64_t i = 0; i < judged_ && place_[i] < k; ++i) sum += gain_[i] * discounts(place_[i] + 1);
      return sum;
    }
    if constexpr (kind == ranking::mrr) return relevant_ > 0 && hit_[0] < k ? 1 / double(hit_[0] + 1) : 0;
    if constexpr (kind == ranking::hit_rate) return relevant_ > 0 && hit_[0] < k;
    if constexpr (kind == ranking::map) return precisions(hits(k));
    return double(hits(k));
  }

  double map_over_hits(int64_t k, const Discounts&) const {
    int64_t found = hits(k);
    return found > 0 ? precisions(found) / double(found) : 0;
  }

 private:
  static constexpr int L = Simd<double>::lanes;

  int64_t hits(int64_t k) const {
    if (relevant_ == 0 || hit_[relevant_ - 1] < k) return relevant_;
    int64_t hits = 0;
    while (hit_[hits] < k) ++hits;
    return hits;
  }
  // Sums the precisions at the first `count` relevant documents.
  double precisions(int64_t count) const {
    typedef int32_t Places __attribute__((vector_size(L * 4)));
    Vec<double> sums{}, rank;
    for (int j = 0; j < L; ++j) rank[j] = j + 1;
    for (int64_t i = 0; i < count; i += L, rank += L) {
      Places place;
      __builtin_memcpy(&place, hit_ + i, sizeof(place));
      Vec<double> precision = rank / (__builtin_convertvector(place, Vec<double>) + 1);
      sums += rank <= double(count) ? precision : Vec<double>{};
    }
    return sum_lanes<double>(sums);
  }

  int64_t judged_, relevant_;
  Buffer<int32_t> place_, hits_;
  Buffer<double> gain_;
  const int32_t* hit_;  // places of the relevant ones
};

// A query's judged documents and the ranks that counting or sorting found: in `untied`, or in `groups`.
class Ranked {
 public:
  Ranked(const ranking::Options& options, const Judged& of)
      : o(options), judged(of), plain(o.gain == ranking::linear && o.threshold == 0) {}

  void begin(const double* gains) {
    gain = gains;
    is_untied = false;
    groups.clear();
    relevant_before = 0;
  }

  // The judged documents ids[0 .. count) are among n of one score, after `before` others.
  void add_group(int64_t before, int64_t n, int32_t* ids, int64_t count) {
    if (o.ties == ranking::average) {
      Group group{int32_t(before), int32_t(n), 0, relevant_before, 0};
      for (int64_t i = 0; i < count; ++i) {
        group.relevant += ranking::is_relevant(judged.y[ids[i]], o);
        group.gain += gain[ids[i]];
      }
      group.gain /= double(n);
      relevant_before += group.relevant;
      groups.add(group);
      return;
    }
    bool first = o.ties == ranking::optimistic;
    std::stable_sort(ids, ids + count, [&](int32_t a, int32_t b) {
      return first ? judged.y[a] > judged.y[b] : judged.y[a] < judged.y[b];
    });
    for (int64_t i = 0; i < count; ++i) add_one(first ? before + i : before + n - count + i, ids[i]);
  }
  // Tells `untied`, when all are put, which of them are relevant; its i-th one is the judged document
  // id_at(i).
  template <class F>
  void choose_relevant(const F& id_at) {
    if (!plain)
      untied.choose_relevant([&](int64_t i) { return ranking::is_relevant(judged.y[id_at(i)], o); });
  }
  void add_one(int64_t before, int32_t id) {
    bool relevant = ranking::is_relevant(judged.y[id], o);
    groups.add({int32_t(before), 1, relevant, relevant_before, gain[id]});
    relevant_before += relevant;
  }

  const ranking::Options& o;
  const Judged& judged;
  const bool plain;      // each judged document is relevant, and its target its gain
  const double* gain{};  // one a judged document
  bool is_untied = false;
  Untied untied;
  Groups groups;
  int32_t relevant_before = 0;  // relevant documents of the groups so far
};

TORCHFAST_END_KERNELS

#endif
