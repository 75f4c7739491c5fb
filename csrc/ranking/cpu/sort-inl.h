// Ranks of many judged documents.
#if defined(TORCHFAST_RANKING_CPU_SORT_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_RANKING_CPU_SORT_INL_H
#undef TORCHFAST_RANKING_CPU_SORT_INL_H
#else
#define TORCHFAST_RANKING_CPU_SORT_INL_H
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <functional>

#include "memory/parallel.h"
#include "ranking/cpu/ranked-inl.h"
#include "ranking/cpu/row-inl.h"
#include "sort/radix_sort.h"

TORCHFAST_KERNELS

// Larger scores have smaller keys; all NaN have the largest.
template <class R>
using Key = std::make_unsigned_t<Int<R>>;

template <class R>
Key<R> to_key(R score) {
  return score == score ? descending(score) : Key<R>(-1);
}

// Ranks by sorting all documents, or, if only the first `cut` ranks matter, those from the cut-th score up.
template <class R>
class Sorting {
  static constexpr int L = Simd<R>::lanes;
  static constexpr int64_t kWhole = 4096;  // a row of no more documents is always sorted as a whole
  using Element = Keyed<Key<R>>;

 public:
  explicit Sorting(Ranked& ranked) : ranked_(ranked) {}

  // Ranks the judged documents, and returns how many of the row's scores are not NaN.
  template <class S>
  int64_t rank(const Row<S>& row, int64_t cut, const Parts& parts) {
    int64_t numbers = -1, n = 0;
    if (cut > 0 && row.n > kWhole && cut < row.n / 8) numbers = select_top(row, cut, n);
    if (n == 0) {
      n = row.n;
      Element* all = elements_.need(2 * n);
      std::atomic<int64_t> counted{0};
      parts.for_each_range(n, kChunk, [&](int64_t, int64_t begin, int64_t end) {
        for_each_chunk<R>(row, begin, end, [&](const R* x, int64_t first, int64_t in_chunk) {
          counted += count_numbers(x, in_chunk);
          for (int64_t j = 0; j < in_chunk; ++j) all[first + j] = {to_key(x[j]), 0};
        });
      });
      numbers = counted;
      for (int64_t i = 0; i < ranked_.judged.count; ++i) all[ranked_.judged.at[i]].id = Key<R>(i + 1);
    }
    const Element* sorted = radix_sort(elements_.get(), elements_.get() + n, n, parts, digits_);
    ranked_.is_untied = is_untied(sorted, n);
    if (ranked_.is_untied)
      put_in_order(sorted, n);
    else
      add_groups(sorted, n);
    return numbers;
  }

 private:
  // Puts the documents from the cut-th score up into elements_, and their number into n, which stays 0 if
  // fewer scores are above -inf. Returns how many scores are not NaN.
  template <class S>
  int64_t select_top(const Row<S>& row, int64_t cut, int64_t& n) {
    R *top = tops_.need(2 * cut + kChunk), least = -INFINITY;
    int64_t count = 0, numbers = 0;
    auto keep_largest = [&] {
      std::nth_element(top, top + cut - 1, top + count, std::greater<R>());
      count = cut, least = top[cut - 1];
    };
    for_each_chunk<R>(row, 0, row.n, [&](const R* x, int64_t, int64_t in_chunk) {
      numbers += count_numbers(x, in_chunk);
      if (count + in_chunk > 2 * cut + kChunk) keep_largest();
      for_each_hit(
          x, in_chunk, [&](auto a) { return a > least; },
          [&](int64_t j, bool hit) {
            top[count] = x[j];
            count += hit;
          });
    });
    if (count < cut) return numbers;
    keep_largest();
    const Judged& judged = ranked_.judged;
    int64_t next = 0;
    for_each_chunk<R>(row, 0, row.n, [&](const R* x, int64_t first, int64_t in_chunk) {
      for_each_hit(
          x, in_chunk, [&](auto a) { return a >= least; },
          [&](int64_t j, bool hit) {
            if (!hit) return;
            while (next < judged.count && judged.at[next] < first + j) ++next;
            bool is_judged = next < judged.count && judged.at[next] == first + j;
            elements_.need(2 * (n + 1), n)[n] = {to_key(x[j]), is_judged ? Key<R>(next + 1) : 0};
            ++n;
          });
    });
    return numbers;
  }

  // Calls f(j, is(x[j])) for all j of every four vectors of which any element is.
  template <class Is, class F>
  static void for_each_hit(const R* x, int64_t n, const Is& is, const F& f) {
    for (int64_t j = 0; j < n; j += 4 * L) {
      int64_t end = std::min(n, j + 4 * L);
      IntVec<R> any{};
      for (int64_t i = j; i < end; i += L) any |= is(load<R>(x + i));
      if (lane_bits(any))
        for (int64_t i = j; i < end; ++i) f(i, is(x[i]));
    }
  }

  // Below, documents are sorted by ascending key. The id of a judged one is its number + 1; others have id 0.

  static bool is_untied(const Element* sorted, int64_t n) {
    bool tied = false;
    for (int64_t i = 1; i < n; ++i) tied |= sorted[i].key == sorted[i - 1].key;
    return !tied;
  }

  // Writes where the judged documents stand in the order, and returns their number.
  int64_t find_places(const Element* sorted, int64_t n, int32_t* at) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
      at[count] = int32_t(i);
      count += sorted[i].id != 0;
    }
    return count;
  }

  void put_in_order(const Element* sorted, int64_t n) {
    int32_t* at = id_.need(n + 1);
    int64_t count = find_places(sorted, n, at);
    ranked_.untied.begin(count);
    for (int64_t i = 0; i < count; ++i) ranked_.untied.put(i, at[i], ranked_.gain[sorted[at[i]].id - 1]);
    ranked_.choose_relevant([&](int64_t i) { return sorted[at[i]].id - 1; });
  }

  void add_groups(const Element* sorted, int64_t n) {
    int32_t* at = id_.need(n + ranked_.judged.count + 1);
    int64_t count = find_places(sorted, n, at);
    int32_t* ids = at + count;
    for (int64_t c = 0; c < count;) {
      int64_t begin = at[c], end = begin + 1, in_group = 0;
      auto key = sorted[begin].key;
      if (ranked_.o.ties != ranking::stable) {
        while (begin > 0 && sorted[begin - 1].key == key) --begin;
        while (end < n && sorted[end].key == key) ++end;
      }
      for (; c < count && at[c] < end; ++c) ids[in_group++] = int32_t(sorted[at[c]].id - 1);
      if (end == begin + 1)
        ranked_.add_one(begin, ids[0]);
      else
        ranked_.add_group(begin, end - begin, ids, in_group);
    }
  }

  Ranked& ranked_;
  Buffer<int32_t> id_;
  Buffer<Element> elements_;
  Buffer<R> tops_;
  Buffer<Key<R>> digits_;
};

TORCHFAST_END_KERNELS

#endif
