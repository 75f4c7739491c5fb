// Ranks of few judged documents: they are numbers of larger scores, which are counted.
#if defined(TORCHFAST_RANKING_CPU_COUNT_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_RANKING_CPU_COUNT_INL_H
#undef TORCHFAST_RANKING_CPU_COUNT_INL_H
#else
#define TORCHFAST_RANKING_CPU_COUNT_INL_H
#endif

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <vector>

#include "memory/parallel.h"
#include "ranking/cpu/coarse-inl.h"
#include "ranking/cpu/ranked-inl.h"
#include "ranking/cpu/search-inl.h"

TORCHFAST_KERNELS

// Ranks by comparing every document with each judged one, chunk by chunk in L1.
template <class R>
class Counting {
  static constexpr int L = Simd<R>::lanes;

 public:
  static constexpr int64_t kMost = std::min(64, 8 * L);  // judged documents; with more, sorting is faster

  explicit Counting(Ranked& ranked) : ranked_(ranked) {}

  // Ranks the judged documents, and returns how many of the row's scores are not NaN.
  template <class S>
  int64_t rank(const Row<S>& row, const Parts& parts) {
    int64_t count = ranked_.judged.count;
    for (int64_t i = 0; i < count; ++i) score_[i] = R(to_real(row.scores[ranked_.judged.at[i] * row.stride]));
    store(score_ + count, splat(R(NAN)));
    if (count == 0 && ranked_.o.nan == ranking::last) return row.n;  // no score matters
    int64_t numbers;
    if (row.n <= kShort) {
      numbers = count_short(row);
      if ((ranked_.is_untied = is_untied())) return put_in_order(row.n), numbers;
    } else {
      numbers = count_long(row, parts);
    }
    uint64_t relevant = 0, nan = 0;  // bits of judged documents
    for (int64_t i = 0; i < count; ++i) {
      relevant |= uint64_t(ranking::is_relevant(ranked_.judged.y[i], ranked_.o)) << i;
      nan |= uint64_t(score_[i] != score_[i]) << i;
    }
    for (int64_t i = 0; i < count; ++i) {
      uint64_t above = 0, same = 0;
      for (int64_t j = 0; j < count; j += L) {
        above |= larger_bits(load<R>(score_ + j), splat(score_[i])) << j;
        same |= equal_bits(load<R>(score_ + j), splat(score_[i])) << j;
      }
      if (std::countr_zero(same) != i) continue;  // in the group of an earlier one, or NaN
      ranked_.relevant_before = std::popcount(above & relevant);
      add_counted(row, larger_[i], equal_[i], score_[i], same);
    }
    ranked_.relevant_before = std::popcount(relevant & ~nan);
    if (nan) add_counted(row, numbers, row.n - numbers, R(NAN), nan);
    return numbers;
  }

 private:
  // Whether each judged document is the only one of its score.
  bool is_untied() const {
    return ranked_.judged.count == 0 || not_one<R>(equal_, ranked_.judged.count) == 0;
  }

  // Untied judged documents: larger_ is their places.
  TORCHFAST_INLINE void put_in_order(int64_t n) {
    int64_t count = ranked_.judged.count;
    int32_t id[kMost];
    ranked_.untied.begin(count);
    auto put = [&](int64_t at, int32_t i) __attribute__((always_inline)) {
      ranked_.untied.put(at, int32_t(larger_[i]), ranked_.gain[i]);
      id[at] = i;
    };
    if (count <= 2 * L) {
      for (int32_t i = 0; i < count; ++i) {
        uint64_t above = larger_bits(load<R>(score_), splat(score_[i]));
        if (count > L) above |= larger_bits(load<R>(score_ + L), splat(score_[i])) << L;
        put(std::popcount(above), i);
      }
    } else {
      constexpr int kLook = TORCHFAST_VECTOR_BYTES / 2;
      typedef int16_t Ids __attribute__((vector_size(TORCHFAST_VECTOR_BYTES)));
      int16_t id_at[kShort + kLook];  // + 1; 0 says none
      std::fill_n(id_at, n + kLook, 0);
      for (int32_t i = 0; i < count; ++i) id_at[larger_[i]] = int16_t(i + 1);
      int64_t at = 0;
      for (int64_t begin = 0; begin < n; begin += kLook) {
        Ids ids;
        __builtin_memcpy(&ids, id_at + begin, sizeof(ids));
        for (uint64_t taken = nonzero_bits(ids); taken; taken &= taken - 1)
          put(at++, id_at[begin + std::countr_zero(taken)] - 1);
      }
    }
    if (!ranked_.plain)
      ranked_.untied.choose_relevant(
          [&](int64_t at) { return ranking::is_relevant(ranked_.judged.y[id[at]], ranked_.o); });
  }

  template <class S>
  void add_counted(const Row<S>& row, int64_t before, int64_t n, R score, uint64_t members) {
    if (n == 1) return ranked_.add_one(before, std::countr_zero(members));
    int32_t ids[kMost], *end = ids;
    for (; members; members &= members - 1) *end++ = std::countr_zero(members);
    if (ranked_.o.ties == ranking::stable)
      add_stable(row, before, score, ids, end - ids);
    else
      ranked_.add_group(before, n, ids, end - ids);
  }

  // Counts in larger_ and equal_ the scores larger than and equal to each of score_; returns how many are
  // not NaN.
  template <class S>
  int64_t count_long(const Row<S>& row, const Parts& parts) {
    int64_t count = ranked_.judged.count;
    counts_.need(parts.count * count);
    std::atomic<int64_t> numbers{0};
    std::fill_n(larger_, count, 0);
    std::fill_n(equal_, count, 0);
#if TORCHFAST_VECTOR_BYTES == 64
    const bool searched = std::is_same_v<R, float> && Search::serves(count, row.n);
    std::vector<Search> searches;
    if constexpr (std::is_same_v<R, float>)
      if (searched) searches.assign(parts.count, Search(score_, count));
#endif
    parts.for_each_range(row.n, kChunk, [&](int64_t part, int64_t begin, int64_t end) {
      Counts<R>* counts = counts_.get() + part * count;
      std::fill_n(counts, count, Counts<R>{});
      int64_t in_part = 0;
      for_each_chunk<R>(row, begin, end, [&](const R* x, int64_t, int64_t n) {
        in_part += count_numbers(x, n);
#if TORCHFAST_VECTOR_BYTES == 64
        if constexpr (std::is_same_v<R, float>)
          if (searched && searches[part].is_worth_it()) return searches[part].add(x, n);
#endif
        compare_all(x, n, score_, count, [=](int64_t first, auto scores, const Counts<R>* of_chunk) {
          for (int j = 0; j < scores(); ++j) counts[first + j].add(of_chunk[j]);
        });
      });
      numbers += in_part;
    });
#if TORCHFAST_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<R, float>)
      for (const Search& search : searches) search.take(larger_, equal_);
#endif
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t part = 0; part < parts.count; ++part) {
        const Counts<R>& of_part = counts_[part * count + j];
        larger_[j] += sum_of(of_part.larger);
        equal_[j] += sum_of(of_part.equal);
      }
    }
    return numbers;
  }

  // The same for a short row. Few judged documents: each is compared with all documents, side by side. Many:
  // they lie side by side, and each document is compared with all of them.
  template <class S>
  TORCHFAST_INLINE int64_t count_short(const Row<S>& row) {
    R staged[kShort];
    const R* x = reinterpret_cast<const R*>(row.scores);
    if (!std::is_same_v<S, R> || row.stride != 1) {
      gather(row.scores, row.stride, row.n, staged);
      x = staged;
    }
#if TORCHFAST_VECTOR_BYTES >= 32
    if constexpr (std::is_same_v<R, float>)
      if (ranked_.judged.count > 6 && coarse_.count(x, row.n, score_, ranked_.judged.count, larger_, equal_))
        return row.n;
#endif
    constexpr int kLanes = Narrow<R>::lanes, kSummed = 2;  // adding up lanes takes as long as so many vectors
    int64_t vectors = (row.n + kLanes - 1) / kLanes, wide = (ranked_.judged.count + kLanes - 1) / kLanes;
    if (ranked_.judged.count * (vectors + kSummed) > row.n * wide) {
      int64_t i = 0;
      for (; i + 4 <= wide; i += 4) compare_beside<4>(x, row.n, i * kLanes);
      if (i + 2 <= wide) compare_beside<2>(x, row.n, i * kLanes), i += 2;
      if (i < wide) compare_beside<1>(x, row.n, i * kLanes);
    } else {
      compare_all(x, row.n, score_, ranked_.judged.count,
                  [this](int64_t first, auto scores, const Counts<R>* counts) __attribute__((always_inline)) {
                    sum_counts<R, scores()>(counts, larger_ + first, equal_ + first);
                  });
    }
    return count_numbers(x, row.n);
  }
  template <int vectors>
  TORCHFAST_INLINE void compare_beside(const R* x, int64_t n, int64_t first) {
    typename Narrow<R>::V s[vectors];
    Counts<R> counts[vectors];
    std::memcpy(s, score_ + first, sizeof(s));
    for (int64_t i = 0; i < n; ++i)
      for (int v = 0; v < vectors; ++v) counts[v].add(x[i] - typename Narrow<R>::V{}, s[v]);
    for (int v = 0; v < vectors; ++v) {
      std::memcpy(larger_ + first + v * Narrow<R>::lanes, &counts[v].larger, kNarrow);
      std::memcpy(equal_ + first + v * Narrow<R>::lanes, &counts[v].equal, kNarrow);
    }
  }

  // A group whose order is that of the positions.
  template <class S>
  void add_stable(const Row<S>& row, int64_t before, R score, const int32_t* ids, int64_t count) {
    int64_t from = 0;
    for (int64_t i = 0; i < count; ++i) {
      int64_t at = ranked_.judged.at[ids[i]];
      int64_t equal = 0, numbers = 0;
      for_each_chunk<R>(row, from, at, [&](const R* x, int64_t, int64_t n) {
        numbers += count_numbers(x, n);
        compare<1>(x, n, &score, 0,
                   [&](int64_t, auto, const Counts<R>* counts) { equal += sum_of(counts->equal); });
      });
      before += score == score ? equal : at - from - numbers;
      ranked_.add_one(before++, ids[i]);
      from = at + 1;
    }
  }

  Ranked& ranked_;
  // The judged documents' scores, and how many are larger and equal.
  R score_[kMost + L];
  Int<R> larger_[kMost], equal_[kMost];
  Buffer<Counts<R>> counts_;
#if TORCHFAST_VECTOR_BYTES >= 32
  Coarse coarse_;
#endif
};

TORCHFAST_END_KERNELS

#endif
