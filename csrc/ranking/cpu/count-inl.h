// Ranks of few judged documents: they are numbers of larger scores, which are counted.
#if defined(TORCHFAST_RANKING_CPU_COUNT_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_RANKING_CPU_COUNT_INL_H
#undef TORCHFAST_RANKING_CPU_COUNT_INL_H
#else
#define TORCHFAST_RANKING_CPU_COUNT_INL_H
#endif

#include <algorithm>
#include <bit>
#include <cstdint>
#include <utility>

#include "memory/parallel.h"
#include "ranking/cpu/ranked-inl.h"
#include "ranking/cpu/row-inl.h"

TORCHFAST_KERNELS

// Comparisons are counted in vectors of at most 32 bytes: those of 64 leave their results in mask registers,
// which took 1.3 times as long (Zen 4).
constexpr int kNarrow = TORCHFAST_VECTOR_BYTES < 32 ? TORCHFAST_VECTOR_BYTES : 32;

// Sums the lanes.
template <class T, class V>
TORCHFAST_INLINE T sum_halves(V v) {
  if constexpr (sizeof(V) == sizeof(T)) {
    return v[0];
  } else {
    typedef T Half __attribute__((vector_size(sizeof(V) / 2)));
    Half half[2];
    __builtin_memcpy(half, &v, sizeof(v));
    return sum_halves<T>(half[0] + half[1]);
  }
}

// Counts for each of `scores` scores how many of a chunk are larger and how many equal, and adds both up.
template <int scores, class R>
TORCHFAST_INLINE void compare(const R* x, int64_t n, const R* score, Int<R>* larger, Int<R>* equal) {
  typedef R V __attribute__((vector_size(kNarrow)));
  typedef Int<R> I __attribute__((vector_size(kNarrow)));
  V s[scores];
  I above[scores] = {}, same[scores] = {};
  for (int j = 0; j < scores; ++j) s[j] = score[j] - V{};
  for (int64_t i = 0; i < n; i += kNarrow / sizeof(R)) {
    V v;
    __builtin_memcpy(&v, x + i, sizeof(v));
    for (int j = 0; j < scores; ++j) {
      above[j] -= (I)(v > s[j]);
      same[j] -= (I)(v == s[j]);
    }
  }
  static_assert(kChunk < 1 << 15);
  for (int j = 0; j < scores; ++j) {  // both are summed at once, as halves of a number
    auto both = sum_halves<Int<R>>(above[j] | same[j] << 16);
    larger[j] += both & 0xffff;
    equal[j] += both >> 16;
  }
}

// Compares with any number of scores, at most sizeof...(less) at a time.
template <class R, int... less>
TORCHFAST_INLINE void compare_all(const R* x, int64_t n, const R* score, int64_t scores, Int<R>* larger,
                                  Int<R>* equal, std::integer_sequence<int, less...>) {
  for (int64_t j = 0; j < scores; j += sizeof...(less)) {
    int64_t now = std::min<int64_t>(scores - j, sizeof...(less));
    ((now == less + 1 ? compare<less + 1>(x, n, score + j, larger + j, equal + j) : void()), ...);
  }
}

// Ranks by comparing every document with each judged one, chunk by chunk in L1.
template <class R>
class Counting {
  static constexpr int L = Simd<R>::lanes;
  static constexpr int kAtOnce = TORCHFAST_VECTOR_BYTES == 64 ? 8 : 4;  // as many as there are registers for

 public:
  static constexpr int64_t kMost = std::min(64, 8 * L);  // judged documents: a word has bits for no more

  explicit Counting(Ranked& ranked) : ranked_(ranked) {}

  // Ranks the judged documents, and returns how many of the row's scores are not NaN.
  template <class S>
  int64_t rank(const Row<S>& row, const Parts& parts) {
    int64_t count = ranked_.judged.count;
    for (int64_t i = 0; i < count; ++i) score_[i] = R(to_real(row.scores[ranked_.judged.at[i] * row.stride]));
    store(score_ + count, splat(R(NAN)));
    if (count == 0 && ranked_.o.nan == ranking::last) return row.n;  // no score matters
    const Counts& counts = counted(row, parts);
    bool untied = row.n <= kChunk;  // in longer rows the order costs little beside the counts
    for (int64_t i = 0; i < count; ++i) untied &= counts.equal[i] == 1;
    ranked_.is_untied = untied;
    if (untied)
      put_in_order(counts, row.n);
    else
      add_groups(row, counts);
    return counts.numbers;
  }

 private:
  struct Counts {
    int64_t numbers;                     // scores that are not NaN
    Int<R> larger[kMost], equal[kMost];  // scores that are larger than each judged one, or equal
  };
  static constexpr IntVec<R> kZeros{};

  template <class S>
  const Counts& counted(const Row<S>& row, const Parts& parts) {
    int64_t judged = ranked_.judged.count;
    Counts* counts = counts_.need(parts.count);
    parts.for_each_range(row.n, kChunk, [&](int64_t part, int64_t begin, int64_t end) {
      Counts& c = counts[part];
      c.numbers = 0;
      for (int64_t i = 0; i < judged; i += L) {  // std::fill_n makes `rep stos` of it, which is slow to start
        __builtin_memcpy(c.larger + i, &kZeros, sizeof(kZeros));
        __builtin_memcpy(c.equal + i, &kZeros, sizeof(kZeros));
      }
      for_each_chunk<R>(row, begin, end, [&](const R* x, int64_t, int64_t n) {
        c.numbers += count_numbers(x, n);
        compare_all(x, n, score_, judged, c.larger, c.equal, std::make_integer_sequence<int, kAtOnce>());
      });
    });
    for (int64_t part = 1; part < parts.count; ++part) {
      counts->numbers += counts[part].numbers;
      for (int64_t i = 0; i < judged; ++i) {
        counts->larger[i] += counts[part].larger[i];
        counts->equal[i] += counts[part].equal[i];
      }
    }
    return *counts;
  }

  // Both return the bits of the judged documents whose score is larger than a score, or equal to it.
  uint64_t larger_than(R score) const {
    uint64_t bits = 0;
    for (int64_t j = 0; j < ranked_.judged.count; j += L)
      bits |= larger_bits(load<R>(score_ + j), splat(score)) << j;
    return bits;
  }
  uint64_t equal_to(R score) const {
    uint64_t bits = 0;
    for (int64_t j = 0; j < ranked_.judged.count; j += L)
      bits |= equal_bits(load<R>(score_ + j), splat(score)) << j;
    return bits;
  }

  // If each judged document is the only one of its score, it can be marked at its place among the n
  // documents.
  void put_in_order(const Counts& counts, int64_t n) {
    int64_t count = ranked_.judged.count, at = 0;
    uint64_t taken[kChunk / 64 + 1] = {};
    int8_t id_of[kChunk], id[kMost];
    for (int64_t i = 0; i < count; ++i) {
      taken[counts.larger[i] / 64] |= uint64_t{1} << counts.larger[i] % 64;
      id_of[counts.larger[i]] = int8_t(i);
    }
    ranked_.untied.begin(count);
    for (int64_t first = 0; first < n; first += 64)
      for (uint64_t bits = taken[first / 64]; bits; bits &= bits - 1) {
        int64_t place = first + std::countr_zero(bits);
        id[at] = id_of[place];
        ranked_.untied.put(at, int32_t(place), ranked_.gain[id[at]]);
        ++at;
      }
    ranked_.choose_relevant([&](int64_t i) { return id[i]; });
  }

  template <class S>
  void add_groups(const Row<S>& row, const Counts& counts) {
    int64_t count = ranked_.judged.count;
    uint64_t relevant = 0, nan = 0;  // bits of judged documents
    for (int64_t i = 0; i < count; ++i) {
      relevant |= uint64_t(ranking::is_relevant(ranked_.judged.y[i], ranked_.o)) << i;
      nan |= uint64_t(score_[i] != score_[i]) << i;
    }
    for (int64_t i = 0; i < count; ++i) {
      uint64_t same = equal_to(score_[i]);
      if (std::countr_zero(same) != i) continue;  // it is in the group of an earlier one, or NaN
      ranked_.relevant_before = std::popcount(larger_than(score_[i]) & relevant);
      add_group(row, counts.larger[i], counts.equal[i], score_[i], same);
    }
    ranked_.relevant_before = std::popcount(relevant & ~nan);
    if (nan) add_group(row, counts.numbers, row.n - counts.numbers, R(NAN), nan);
  }

  // Adds the group of the n documents that have the score; the bits `members` are its judged ones.
  template <class S>
  void add_group(const Row<S>& row, int64_t before, int64_t n, R score, uint64_t members) {
    int32_t ids[kMost], *end = ids;
    for (; members; members &= members - 1) *end++ = std::countr_zero(members);
    if (ranked_.o.ties == ranking::stable)
      add_stable(row, before, score, ids, end);
    else
      ranked_.add_group(before, n, ids, end - ids);
  }

  // Adds a group whose documents keep the order of their positions.
  template <class S>
  void add_stable(const Row<S>& row, int64_t before, R score, const int32_t* id, const int32_t* end) {
    for (int64_t from = 0; id < end; ++id) {
      int64_t at = ranked_.judged.at[*id], numbers = 0;
      Int<R> larger = 0, equal = 0;
      for_each_chunk<R>(row, from, at, [&](const R* x, int64_t, int64_t n) {
        numbers += count_numbers(x, n);
        compare<1>(x, n, &score, &larger, &equal);
      });
      before += score == score ? equal : at - from - numbers;
      ranked_.add_one(before++, *id);
      from = at + 1;
    }
  }

  Ranked& ranked_;
  R score_[kMost + L];  // one a judged document
  Buffer<Counts> counts_;
};

TORCHFAST_END_KERNELS

#endif
