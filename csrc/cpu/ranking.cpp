// Ranking metrics on the CPU. Definitions and reference: torchfast/metrics/ranking/.
//
// The metrics depend on the ranks of the documents that are judged (target > 0) alone, and a rank is a
// number of larger scores. Per query, the cheapest of three ways to them:
//   count   few judged documents: compare every document with each of them, chunk by chunk in L1, in short
//           rows as 16-bit numbers where that is exact
//   top     many, but only the first k ranks matter: sort the documents from the k-th score up
//   sort    many: sort all documents (radix sort)
// Each finds the groups of tied documents exactly; csrc/ranking.h turns these into the metrics. Where no
// documents are tied, the common case, places are enough.
//
// What did not help short rows: bytes marked by place and read as a vector (the load waits for the stores),
// places from popcounts of bits or by compressing vectors, prefetching (below a page), eight queries side by
// side, sums in any order (no early end), NaN found by a sum of the scores. What did: no SSE code between
// AVX-512 code (evaluate() outside of the instruction sets took twice as long).
#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../radix_sort.h"
#include "../ranking_op.h"

#ifndef TORCHFAST_FILE
namespace torchfast {
namespace {

using ranking::Arguments;

// ---- From groups to values ----------------------------------------------------------------------

// 1 / log2(rank + 1), and its sum over the first ranks: from tables as far as queries commonly reach.
class Discounts {
 public:
  explicit Discounts(int64_t ranks) : Discounts(ranks <= 4096 ? made<4096>() : made<1 << 20>()) {}
  double operator()(int64_t rank) const { return rank <= last_ ? at_[rank] : at(rank); }
  double up_to(int64_t rank) const {
    double sum = up_to_[std::min(rank, last_)];
    for (int64_t i = last_ + 1; i <= rank; ++i) sum += at(i);
    return sum;
  }

 private:
  struct Table {
    std::vector<double> at, up_to;
  };
  explicit Discounts(const Table& table)
      : at_(table.at.data()), up_to_(table.up_to.data()), last_(int64_t(table.at.size()) - 1) {}
  static double at(int64_t rank) { return 1 / std::log2(double(rank) + 1); }

  template <int64_t ranks>
  static const Table& made() {
    static const Table table = [] {
      Table made{std::vector<double>(ranks + 1), std::vector<double>(ranks + 1)};
      long double sum = 0;
      for (int64_t rank = 1; rank <= ranks; ++rank) {
        made.at[rank] = at(rank);
        made.up_to[rank] = double(sum += made.at[rank]);
      }
      return made;
    }();
    return table;
  }

  const double *at_, *up_to_;
  int64_t last_;  // rank of the table
};

}  // namespace
}  // namespace torchfast
#endif

#define TORCHFAST_FILE "cpu/ranking.cpp"
#include "../foreach_isa.h"
#include "../tensors.h"
#include "../walk.h"

namespace torchfast::TORCHFAST_ISA {
namespace {

using ranking::Group;

constexpr int64_t kChunk = 2048;   // scores that stay in L1
constexpr int64_t kShort = 2032;   // documents of a short row: 127 vectors of 16 (see Coarse)
constexpr int64_t kBlock = 32768;  // documents that a thread takes at a time

// What the metrics sum up to a cut-off, from groups of tied documents in any order.
class Groups {
 public:
  void clear() { groups_.clear(), alone_ = true; }
  void add(const Group& group) { groups_.push_back(group), alone_ &= group.n == 1; }

  template <ranking::Kind kind>
  double sum(int64_t k, const Discounts& discounts) const {
    double sum = 0;
    if (!alone_) {
      for (const Group& g : groups_) sum += ranking::contribution<kind>(g, k, discounts);
      return sum;
    }
    for (Group g : groups_) {
      g.n = 1;  // so that the compiler knows
      sum += ranking::contribution<kind>(g, k, discounts);
    }
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
  bool alone_ = true;  // each group is one document
};

// The same from the judged documents in order, where none is tied with any other.
class Untied {
 public:
  void begin(int64_t judged) {
    judged_ = relevant_ = judged;
    place_.need(judged + L), gain_.need(judged);
    hit_ = place_.get();
  }
  // The i-th one: how many documents have larger scores.
  void put(int64_t i, int32_t place, double gain) { place_[i] = place, gain_[i] = gain; }
  // Where not all are relevant, when all are put.
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
  // Their sum at the first so many relevant ones.
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

// The best DCG: gains in descending order.
class Ideal {
 public:
  // `gains` is reordered, up to the longest cut-off.
  Ideal(double* gains, int64_t n, int64_t longest) : gains_(gains), n_(n) {
    if (n == 0 || count_digits() || is_one_gain()) return;
    auto descending = [](double a, double b) { return a > b; };
    if (longest < n / 4) {
      std::nth_element(gains, gains + longest, gains + n, descending);
      n_ = longest;
    }
    if (n_ > 32 && sort_bytes()) return;
    std::sort(gains, gains + n_, descending);
  }

  double dcg(int64_t k, const Discounts& discounts) const {
    k = std::min(k, n_);
    double sum = 0;
    if (form_ == one_gain) return k > 0 ? gains_[0] * discounts.up_to(k) : 0;
    if (form_ == sorted) {
      for (int64_t i = 0; i < k; ++i) sum += gains_[i] * discounts(i + 1);
      return sum;
    }
    double before = 0;
    int64_t rank = 0;
    for (int gain = 7 - std::countl_zero(digits_) / 8; gain > 0 && rank < k; --gain) {
      int64_t count = int64_t(digits_ >> (8 * gain) & 255);
      if (count == 0) continue;
      double up_to = discounts.up_to(rank = std::min(k, rank + count));
      sum += gain * (up_to - before);
      before = up_to;
    }
    return sum;
  }

 private:
  // How many gains are 0, 1, ... 7, a byte each, if all are that.
  bool count_digits() {
    constexpr int L = Simd<double>::lanes;
    typedef uint64_t Bits __attribute__((vector_size(TORCHFAST_VECTOR_BYTES)));
    if (n_ > 255 - L) return false;
    Bits others{}, counts{};
    for (int64_t i = 0; i < n_; i += L) {
      Vec<double> gain = n_ - i < L ? load_first<double>(gains_ + i, n_ - i) : load<double>(gains_ + i);
      Vec<double> shifted = gain + 0x1p52;  // its last bits are an integer
      Bits digit = bit_cast<Bits>(shifted) - bit_cast<uint64_t>(0x1p52);
      others |= bit_cast<Bits>(gain - (shifted - 0x1p52)) | digit >> 3;
      counts += (Bits{} + 1) << (digit % 8 * 8);
    }
    auto either = [](uint64_t a, uint64_t b) __attribute__((always_inline)) { return a | b; };
    if (reduce_lanes<uint64_t>(others, either) != 0) return false;
    form_ = digits;
    digits_ = reduce_lanes<uint64_t>(
        counts, [](uint64_t a, uint64_t b) __attribute__((always_inline)) { return a + b; });
    return true;
  }
  bool is_one_gain() {
    for (int64_t i = 1; i < n_; ++i)
      if (gains_[i] != gains_[0]) return false;
    form_ = one_gain;
    return true;
  }
  // Sorts gains that are integers below 256.
  bool sort_bytes() {
    int64_t count[256] = {};
    for (int64_t i = 0; i < n_; ++i) {
      int gain = gains_[i] < 256 ? int(gains_[i]) : 0;
      if (gain != gains_[i]) return false;
      ++count[gain];
    }
    double* to = gains_;
    for (int gain = 255; gain >= 0; gain--) to = std::fill_n(to, count[gain], double(gain));
    return true;
  }

  enum { sorted, one_gain, digits } form_ = sorted;
  double* gains_;
  int64_t n_;
  uint64_t digits_ = 0;
};

// Values of all metrics for a query. `gains` holds those of all judged documents, and is reordered;
// `longest` is the longest cut-off of NDCG.
template <class Ranking>
void evaluate(const Arguments& a, const ranking::Query& query, const Ranking& ranked, double* gains,
              int64_t gains_count, int64_t longest, const Discounts& discounts, double* out, int64_t step) {
  using namespace ranking;
  Ideal ideal(gains, longest > 0 ? gains_count : 0, longest);
  for (size_t m = 0; m < a.kinds.size(); ++m, out += step) {
    int64_t kind = a.kinds[m], k = cut_of(kind, a.ks[m], query);
    if (kind == map && a.options.map_denominator == hits) {
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
    *out = value_of(kind, a.ks[m], sum, kind == ndcg ? ideal.dcg(k, discounts) : 0, query, a.options);
  }
}

// ---- Judged documents ---------------------------------------------------------------------------

// The documents of a query that matter: of target > 0, or all (ranking::zero_is_nothing).
struct Judged {
  int64_t count = 0;
  bool wrong = false;  // a target is none
  Buffer<int32_t> at;  // ascending
  Buffer<double> y;

  void clear() { count = 0, wrong = false; }
  void append(const Judged& other) {
    std::copy_n(other.at.get(), other.count, at.need(count + other.count, count) + count);
    std::copy_n(other.y.get(), other.count, y.need(count + other.count, count) + count);
    count += other.count;
    wrong |= other.wrong;
  }
};

template <int size>
using Signed = std::conditional_t<
    size == 8, int64_t,
    std::conditional_t<size == 4, int32_t, std::conditional_t<size == 2, int16_t, int8_t>>>;

// Appends those of y[begin .. end), `stride` apart.
template <class T>
void find_judged(const void* targets, int64_t stride, int64_t begin, int64_t end, const ranking::Options& o,
                 Judged& found) {
  constexpr int64_t kLook = 64;  // documents looked at together
  constexpr int L = TORCHFAST_VECTOR_BYTES / sizeof(T);
  typedef Signed<sizeof(T)> V __attribute__((vector_size(TORCHFAST_VECTOR_BYTES)));
  const T* y = static_cast<const T*>(targets);
  auto nonzero = [=](int64_t from) __attribute__((always_inline)) {
    V v;
    __builtin_memcpy(&v, y + from, sizeof(v));
    return nonzero_bits(v);
  };
  bool skip_zeros = ranking::zero_is_nothing(o), wrong = false;
  int64_t count = found.count;
  for (int64_t i = begin; i < end; i += kLook) {
    int64_t n = std::min(kLook, end - i);
    uint64_t look = 0;  // those whose bits are not all 0
    if (skip_zeros && stride == 1 && end - begin >= L) {
      for (int64_t j = 0; j < n; j += L) {
        int64_t from = std::min(i + j, end - L);  // the last vector may overlap the one before
        uint64_t bits = nonzero(from);
        look |= from < i ? bits >> (i - from) : bits << (from - i);
      }
    } else {
      look = n == kLook ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
    }
    if (!look) continue;
    int32_t* at = found.at.need(count + kLook, count);
    double* value = found.y.need(count + kLook, count);
    int64_t before = count;
    bool zeros =
        false;  // dropped later: if the next place waited for the value, this would take twice as long
    for (; look; look &= look - 1) {
      int64_t j = i + std::countr_zero(look);
      double v;
      if constexpr (std::is_integral_v<T>)
        v = double(y[j * stride]);
      else
        v = double(to_real(y[j * stride]));
      at[count] = int32_t(j);
      value[count++] = v;
      wrong |= !ranking::is_target(v, o);
      zeros |= v == 0;
    }
    if (!skip_zeros || !zeros) continue;
    int64_t kept = before;
    for (int64_t c = before; c < count; ++c) {
      at[kept] = at[c], value[kept] = value[c];
      kept += value[c] > 0;
    }
    count = kept;
  }
  found.count = count;
  found.wrong |= wrong;
}

// to[0 .. result) are those of the n elements that the mask keeps.
template <class T>
int64_t keep(const void* from, int64_t stride, const bool* mask, int64_t mask_stride, int64_t n, void* to) {
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    static_cast<T*>(to)[kept] = static_cast<const T*>(from)[i * stride];
    kept += mask[i * mask_stride];
  }
  return kept;
}

// A tensor with an element per document.
struct PerDocument {
  PerDocument() = default;
  PerDocument(const Tensor& x, bool flat)
      : data(static_cast<const char*>(x.const_data_ptr())),
        size(x.element_size()),
        query_stride(size * x.stride(0)),
        stride(x.stride(flat ? 0 : 1)) {}
  // Those of a query; where they are flat, of the query that begins with document i.
  const char* of(int64_t i) const { return data + i * query_stride; }

  const char* data = nullptr;
  int64_t size, query_stride;  // in bytes
  int64_t stride;              // between documents, in elements
};

struct Targets : PerDocument {
  Targets() = default;
  Targets(const Tensor& x, bool flat) : PerDocument(x, flat) {
    auto choose = [&](auto* typed) {
      using T = std::remove_cvref_t<decltype(*typed)>;
      find = find_judged<T>;
      keep = TORCHFAST_ISA::keep<T>;
    };
    if (x.scalar_type() == ScalarType::Bool)
      choose(static_cast<const uint8_t*>(nullptr));
    else if (is_integer(x.scalar_type()))
      with_index_type(x, choose);
    else
      with_float_type(x, choose);
  }
  decltype(&find_judged<float>) find;
  decltype(&TORCHFAST_ISA::keep<float>) keep;
};

// ---- Scores ---------------------------------------------------------------------------------------

template <class S>
struct Row {
  const S* scores;
  int64_t stride, n;
};

// f(scores, begin, n) for chunks of the row from begin to end, in the form that registers read: widened,
// contiguous, filled up with NaN to a full vector.
template <class R, class S, class F>
TORCHFAST_INLINE void for_each_chunk(const Row<S>& row, int64_t begin, int64_t end, const F& f) {
  constexpr int L = Simd<R>::lanes;
  R chunk[kChunk];
  bool direct = std::is_same_v<S, R> && row.stride == 1;
  for (int64_t i = begin, n; i < end; i += n) {
    n = std::min(kChunk, end - i);
    const S* x = row.scores + i * row.stride;
    if (direct && n >= L) {
      n = n / L * L;
      f(reinterpret_cast<const R*>(x), i, n);
    } else {
      if (n % L) store(chunk + n / L * L, splat(R(NAN)));
      gather(x, row.stride, n, chunk);
      f(static_cast<const R*>(chunk), i, n);
    }
  }
}

// Comparisons are counted in vectors of at most 32 bytes: those of 64 leave their results in mask registers,
// which took 1.3 times as long (Zen 4).
constexpr int kNarrow = TORCHFAST_VECTOR_BYTES < 32 ? TORCHFAST_VECTOR_BYTES : 32;
template <class R>
struct Narrow {
  static constexpr int lanes = kNarrow / sizeof(R);
  typedef R V __attribute__((vector_size(kNarrow)));
  typedef Int<R> I __attribute__((vector_size(kNarrow)));
};

// How many documents have a larger score than some one, and how many the same; lane by lane.
template <class R>
struct Counts {
  using V = typename Narrow<R>::V;
  using I = typename Narrow<R>::I;
  TORCHFAST_INLINE void add(V scores, V one) {
    larger -= (I)(scores > one);
    equal -= (I)(scores == one);
  }
  TORCHFAST_INLINE void add(const Counts& other) { larger += other.larger, equal += other.equal; }
  I larger{}, equal{};
};

// f(vector) for the scores x[0 .. n), filled up with NaN.
template <class R, class F>
TORCHFAST_INLINE void for_each_narrow(const R* x, int64_t n, const F& f) {
  using V = typename Narrow<R>::V;
  using I = typename Narrow<R>::I;
  constexpr int L = Narrow<R>::lanes;
  V v;
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    __builtin_memcpy(&v, x + i, sizeof(v));
    f(v);
  }
  if (i == n) return;
  I lane;
  for (int j = 0; j < L; ++j) lane[j] = j;
  if (n >= L) {  // the last vector begins earlier
    __builtin_memcpy(&v, x + n - L, sizeof(v));
    v = lane < Int<R>(i + L - n) - I{} ? R(NAN) - V{} : v;
  } else {
    R rest[L] = {};
    __builtin_memcpy(rest, x, n * sizeof(R));
    __builtin_memcpy(&v, rest, sizeof(v));
    v = lane < Int<R>(n) - I{} ? v : R(NAN) - V{};
  }
  f(v);
}

template <class I>
TORCHFAST_INLINE int64_t sum_of(I lanes) {
  return reduce_lanes<int64_t>(lanes,
                               [](int64_t a, int64_t b) __attribute__((always_inline)) { return a + b; });
}

// The sums of the lanes of so many counts, of fewer than 2^15 documents. Writes up to the next multiple of 4.
template <class R, int scores>
TORCHFAST_INLINE void sum_counts(const Counts<R>* counts, Int<R>* larger, Int<R>* equal) {
#if TORCHFAST_VECTOR_BYTES >= 32
  if constexpr (sizeof(R) == 4) {
    __m256i both[(scores + 3) / 4 * 4] = {};
    for (int j = 0; j < scores; ++j) both[j] = (__m256i)(counts[j].larger | counts[j].equal << 16);
    for (int j = 0; j < scores; j += 4) {
      __m256i halves = _mm256_hadd_epi32(_mm256_hadd_epi32(both[j], both[j + 1]),
                                         _mm256_hadd_epi32(both[j + 2], both[j + 3]));
      __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(larger + j), _mm_and_si128(sums, _mm_set1_epi32(0xffff)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(equal + j), _mm_srli_epi32(sums, 16));
    }
    return;
  }
#endif
  for (int j = 0; j < scores; ++j) {
    larger[j] = Int<R>(sum_of(counts[j].larger));
    equal[j] = Int<R>(sum_of(counts[j].equal));
  }
}

// How many of x[0 .. n) are not NaN.
template <class R>
TORCHFAST_INLINE int64_t count_numbers(const R* x, int64_t n) {
  typename Narrow<R>::I numbers{};
  for_each_narrow(x, n,
                  [&](auto v) __attribute__((always_inline)) { numbers -= (typename Narrow<R>::I)(v == v); });
  return sum_of(numbers);
}

// f(first, counts) of x[0 .. n) against each of so many scores, from score[first] on.
template <int scores, class R, class F>
TORCHFAST_INLINE void compare(const R* x, int64_t n, const R* score, int64_t first, const F& f) {
  typename Narrow<R>::V s[scores];
  Counts<R> counts[scores];
  for (int j = 0; j < scores; ++j) s[j] = score[first + j] - typename Narrow<R>::V{};
  for_each_narrow(x, n, [&](auto v) __attribute__((always_inline)) {
    for (int j = 0; j < scores; ++j) counts[j].add(v, s[j]);
  });
  f(first, std::integral_constant<int, scores>(), counts);
}

template <class R, class F, int... less>
TORCHFAST_INLINE void compare_all(const R* x, int64_t n, const R* score, int64_t scores, const F& f,
                                  std::integer_sequence<int, less...>) {
  constexpr int kAtOnce = sizeof...(less);
  for (int64_t j = 0; j < scores; j += kAtOnce)
    (void)((std::min<int64_t>(scores - j, kAtOnce) == less + 1 ? (compare<less + 1>(x, n, score, j, f), true)
                                                               : false) ||
           ...);
}

template <class R, class F>
TORCHFAST_INLINE void compare_all(const R* x, int64_t n, const R* score, int64_t scores, const F& f) {
  constexpr int kAtOnce = TORCHFAST_VECTOR_BYTES == 64 ? 8 : 4;  // by the number of registers
  compare_all(x, n, score, scores, f, std::make_integer_sequence<int, kAtOnce>());
}

// Bits of those of 1 to 64 numbers that are not 1. Reads whole vectors.
template <class R>
TORCHFAST_INLINE uint64_t not_one(const Int<R>* x, int64_t n) {
  uint64_t bits = 0;
  for (int64_t i = 0; i < n; i += Simd<R>::lanes) {
    IntVec<R> v;
    __builtin_memcpy(&v, x + i, sizeof(v));
    bits |= nonzero_bits(v - 1) << i;
  }
  return bits << (64 - n) >> (64 - n);
}

// compare_all for several scores in short rows: all are mapped to 16 bits by a function that nowhere
// decreases, where one sign says larger, smaller or equal. The counts of a score that has its place alone are
// exact; the others are counted again. Half of its time.
#if TORCHFAST_VECTOR_BYTES >= 32
class Coarse {
 public:
  // Counts in larger[j] and equal[j], up to the next multiple of 4, those larger than and equal to score[j].
  // False: it did not, because there are NaN, or scores of earlier rows have shared their places too often.
  TORCHFAST_INLINE bool count(const float* x, int64_t n, const float* score, int64_t scores, int32_t* larger,
                              int32_t* equal) {
    seen_ += scores;
    if (again_ > seen_ / 8 + 64 || !map_all(x, n)) return false;
    for (int64_t j = 0; j < scores; j += 16)
      store(score_ + j, _mm256_permute4x64_epi64(map(score + j, score + j + 8), 0xd8));
    for (int64_t j = 0; j < scores; j += 8) {
      switch ((std::min<int64_t>(scores - j, 8) + 1) / 2) {
        case 1: compare<2>(n, j, larger, equal); break;
        case 2: compare<4>(n, j, larger, equal); break;
        case 3: compare<6>(n, j, larger, equal); break;
        default: compare<8>(n, j, larger, equal);
      }
    }
    if (uint64_t others = not_one<float>(equal, scores))
      count_again(x, n, score, scores, others, larger, equal);
    return true;
  }

 private:
  TORCHFAST_INLINE static void store(int16_t* to, __m256i v) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), v);
  }
  TORCHFAST_INLINE __m256i map(__m256 a, __m256 b) const {
    auto whole = [this](__m256 v) __attribute__((always_inline)) {
      __m256 mapped = _mm256_fmadd_ps(v, _mm256_set1_ps(scale_), _mm256_set1_ps(offset_));
      return _mm256_cvtps_epi32(_mm256_min_ps(mapped, _mm256_set1_ps(32767)));  // beyond int: its least
    };
    return _mm256_packs_epi32(whole(a), whole(b));
  }
  TORCHFAST_INLINE __m256i map(const float* a, const float* b) const {
    return map(_mm256_loadu_ps(a), _mm256_loadu_ps(b));
  }

  // The documents, up to a full vector of the smallest; false if there are NaN.
  TORCHFAST_INLINE bool map_all(const float* x, int64_t n) {
    __m256 nan{};
    auto add = [&](__m256 a, __m256 b, int64_t i) __attribute__((always_inline)) {
      nan = _mm256_or_ps(nan, _mm256_cmp_ps(a, b, _CMP_UNORD_Q));
      store(document_ + i, map(a, b));
    };
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) add(_mm256_loadu_ps(x + i), _mm256_loadu_ps(x + i + 8), i);
    if (i < n) {
      float rest[16];
      if (n < 16) std::fill(std::copy_n(x, n, rest), rest + 16, -INFINITY);
      const float* from = n < 16 ? rest : x + n - 16;
      __m256 lane{0, 1, 2, 3, 4, 5, 6, 7}, first = float(n < 16 ? 0 : i + 16 - n) - __m256{};
      __m256 a = _mm256_loadu_ps(from), b = _mm256_loadu_ps(from + 8), least = -INFINITY - __m256{};
      add(lane < first ? least : a, lane + 8 < first ? least : b, i);
    }
    return _mm256_movemask_ps(nan) == 0;
  }

  template <int scores>
  TORCHFAST_INLINE void compare(int64_t n, int64_t first, int32_t* larger, int32_t* equal) const {
    // Of each word's documents, L larger and S smaller: the low byte is 128 + L - S, the high one -S.
    __m256i s[scores], signs[(scores + 3) / 4 * 4] = {};
    for (int j = 0; j < scores; ++j) {
      s[j] = _mm256_set1_epi16(score_[first + j]);
      signs[j] = _mm256_set1_epi16(128);
    }
    for (int64_t i = 0; i < n; i += 16) {
      __m256i v = _mm256_load_si256(reinterpret_cast<const __m256i*>(document_ + i));
      for (int j = 0; j < scores; ++j) {
        __m256i sign = _mm256_sign_epi16(_mm256_set1_epi16(1), _mm256_subs_epi16(v, s[j]));
        signs[j] = _mm256_add_epi8(signs[j], sign);
      }
    }
    // 128 * 16 + L + 2^14 S
    for (int j = 0; j < scores; ++j) {
      __m256i smaller =
          _mm256_madd_epi16(_mm256_srai_epi16(signs[j], 8), _mm256_set1_epi16(-(1 << 14) - 257));
      signs[j] = _mm256_add_epi32(_mm256_madd_epi16(signs[j], _mm256_set1_epi16(1)), smaller);
    }
    for (int j = 0; j < scores; j += 4) {
      __m256i halves = _mm256_hadd_epi32(_mm256_hadd_epi32(signs[j], signs[j + 1]),
                                         _mm256_hadd_epi32(signs[j + 2], signs[j + 3]));
      __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
      sums = _mm_sub_epi32(sums, _mm_set1_epi32(128 * 16));
      __m128i above = _mm_and_si128(sums, _mm_set1_epi32((1 << 14) - 1));
      __m128i others = _mm_add_epi32(above, _mm_srli_epi32(sums, 14));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(larger + first + j), above);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(equal + first + j),
                       _mm_sub_epi32(_mm_set1_epi32(int32_t((n + 15) / 16 * 16)), others));
    }
  }

  // Those whose bits are set.
  void count_again(const float* x, int64_t n, const float* score, int64_t scores, uint64_t those,
                   int32_t* larger, int32_t* equal) {
    float shared[64];
    int id[64], count = 0, alone = 0;
    for (; those; those &= those - 1) shared[count] = score[id[count] = std::countr_zero(those)], ++count;
    compare_all(x, n, shared, count, [&](int64_t first, auto scores, const Counts<float>* counts) {
      for (int j = 0; j < scores(); ++j) {
        larger[id[first + j]] = int32_t(sum_of(counts[j].larger));
        equal[id[first + j]] = int32_t(sum_of(counts[j].equal));
        alone += equal[id[first + j]] == 1;
      }
    });
    again_ += count;
    if (alone > scores / 4) fit(x, n);
  }

  // Spreads the scores of a row over two thirds of the places.
  void fit(const float* x, int64_t n) {
    Vec<float> low = splat(float(INFINITY)), high = -low;
    for_each_vec<float, 1>(n, [&](int64_t i, int, auto count) __attribute__((always_inline)) {
      Vec<float> v = only_n<float>(load_n<float>(x + i, count), count, x[0]);
      low = ((v < low) & (v > -INFINITY)) ? v : low;
      high = ((v > high) & (v < INFINITY)) ? v : high;
    });
    float least = -max_lanes<float>(-low), most = max_lanes<float>(high);
    float scale = 43690 / (most - least), offset = -scale * (least / 2 + most / 2);
    if (scale > 0 && scale < INFINITY && offset - offset == 0) scale_ = scale, offset_ = offset;
  }

  float scale_ = 1, offset_ = 0;
  int64_t seen_ = 0, again_ = 0;  // scores
  alignas(32) int16_t document_[kShort];
  alignas(32) int16_t score_[64];
};
#endif

// compare_all for 9 to 31 scores in rows that are worth it: each document's place among the scores is found
// in four or five steps, by lookups in registers; places are bytes, and compared 32 at a time. Half of the
// comparisons.
#if TORCHFAST_VECTOR_BYTES == 64
class Search {
 public:
  static bool serves(int64_t scores, int64_t documents) {
    return scores > 8 && scores < 32 && documents > 2 * kChunk;
  }

  Search(const float* score, int64_t count) : count_(count) {
    for (int64_t j = 0; j < count; ++j) order_[j] = int8_t(j);
    auto ascending = [=](int a, int b) {
      return score[a] < score[b] || (score[a] == score[a] && score[b] != score[b]);
    };
    std::sort(order_, order_ + count, ascending);
    std::fill_n(sorted_, 32, NAN);
    for (int64_t j = 0; j < count; ++j) sorted_[j] = score[order_[j]];
  }

  // Whether so few documents have had one of the scores that they could be counted one by one.
  bool is_worth_it() const { return hits_ <= seen_ / 16; }

  void add(const float* x, int64_t n) { count_ < 16 ? add_chunk<1>(x, n) : add_chunk<2>(x, n); }

  // Adds what was counted to larger[j] and equal[j] of the j-th score.
  void take(int32_t* larger, int32_t* equal) const {
    for (int64_t j = 0; j < count_; ++j) {
      larger[order_[j]] += int32_t(larger_[j]);
      int64_t first = j;  // of the same score
      while (first > 0 && sorted_[first - 1] == sorted_[j]) --first;
      equal[order_[j]] += int32_t(equal_[first]);
    }
  }

 private:
  template <int tables>
  void add_chunk(const float* x, int64_t n) {
    constexpr int kAtOnce = 4;  // vectors: what one waits for, another does
    alignas(64) uint8_t place[kChunk];
    const __m512 low = _mm512_loadu_ps(sorted_), high = _mm512_loadu_ps(sorted_ + 16);
    auto look_up = [&](__m512i at) __attribute__((always_inline)) {
      return tables == 1 ? _mm512_permutexvar_ps(at, low) : _mm512_permutex2var_ps(low, at, high);
    };
    auto find = [&](auto vectors, int64_t i) __attribute__((always_inline)) {
      __m512 v[vectors()];
      __m512i p[vectors()];
      for (int k = 0; k < vectors(); ++k)
        v[k] = _mm512_loadu_ps(x + i + 16 * k), p[k] = _mm512_setzero_si512();
#pragma GCC unroll 5
      for (int step = 8 * tables; step > 0; step /= 2)
        for (int k = 0; k < vectors(); ++k) {
          __m512 middle = look_up(_mm512_or_si512(p[k], _mm512_set1_epi32(step - 1)));
          __mmask16 beyond = _mm512_cmp_ps_mask(middle, v[k], _CMP_LT_OQ);
          p[k] = _mm512_mask_or_epi32(p[k], beyond, p[k], _mm512_set1_epi32(step));
        }
      uint64_t equal = 0;
      for (int k = 0; k < vectors(); ++k) {
        equal |= uint64_t(_mm512_cmp_ps_mask(look_up(p[k]), v[k], _CMP_EQ_OQ)) << (16 * k);
        _mm_store_si128(reinterpret_cast<__m128i*>(place + i + 16 * k), _mm512_cvtepi32_epi8(p[k]));
      }
      hits_ += std::popcount(equal);
      for (; equal; equal &= equal - 1) ++equal_[place[i + std::countr_zero(equal)]];
    };
    int64_t i = 0;
    for (; i + 16 * kAtOnce <= n; i += 16 * kAtOnce) find(std::integral_constant<int, kAtOnce>{}, i);
    for (; i < n; i += 16) find(std::integral_constant<int, 1>{}, i);
    seen_ += n;

    int64_t end = (n + 31) / 32 * 32;
    std::fill(place + n, place + end, 0);
    for (int j = 0; j < count_; j += 8) {
      __m256i more[8] = {};
      for (i = 0; i < end; i += 32) {
        __m256i places = _mm256_load_si256(reinterpret_cast<const __m256i*>(place + i));
        for (int k = 0; k < 8; ++k)
          more[k] = _mm256_sub_epi8(more[k], _mm256_cmpgt_epi8(places, _mm256_set1_epi8(int8_t(j + k))));
      }
      for (int k = 0; k < 8; ++k) {  // at most kChunk / 32 in a byte
        __m256i sums = _mm256_sad_epu8(more[k], _mm256_setzero_si256());
        larger_[j + k] += sum_of((typename Narrow<double>::I)sums);
      }
    }
  }

  int64_t count_, seen_ = 0, hits_ = 0;
  int8_t order_[32];
  float sorted_[32];
  int64_t larger_[32] = {}, equal_[32] = {};
};
#endif

// Larger scores have smaller keys; all NaN the largest.
template <class R>
using Key = std::make_unsigned_t<Int<R>>;

template <class R>
Key<R> to_key(R score) {
  return score == score ? descending(score) : Key<R>(-1);
}

// ---- One query ------------------------------------------------------------------------------------

template <class R>
class Ranker {
  static constexpr int L = Simd<R>::lanes;
  using Element = Keyed<Key<R>>;

 public:
  Ranker(const Arguments& a, const Discounts& discounts, int64_t step)
      : a_(a), o_(a.options), discounts_(discounts), step_(step) {
    for (size_t m = 0; m < a.kinds.size(); ++m) {
      of_all_ranks_ |= a.kinds[m] != ranking::r_precision && a.ks[m] == 0;
      longest_cut_ = std::max(longest_cut_, a.ks[m]);
      by_relevant_ |= a.kinds[m] == ranking::r_precision;
      if (a.kinds[m] == ranking::ndcg)
        longest_ndcg_ = std::max(longest_ndcg_, ranking::cut_of(ranking::ndcg, a.ks[m], {}));
    }
    plain_ = o_.gain == ranking::linear && o_.threshold == 0;
  }

  Judged judged;  // of the query
  Judged more;    // those that were not retrieved; at means nothing

  // Judged documents in, values out.
  template <class S>
  void rank(const Row<S>& row, const Parts& parts, int64_t num_relevant, double* out, bool* empty) {
    using namespace ranking;
    if (judged.wrong || more.wrong)
      return fail(out, empty);  // such a target has no gain: no place in a table
    Query query{row.n, 0, 0};
    double* gains = judged.y.get();
    int64_t gains_count = judged.count + more.count;
    bool gain = gains_count > 0;
    if (plain_ && more.count == 0) {
      query.relevant = query.n_rel = judged.count;
    } else {
      gain = false;
      double* to = gains = gains_.need(gains_count);
      for (const Judged* of : {&judged, &more})
        for (int64_t i = 0; i < of->count; ++i) {
          query.n_rel += is_relevant(of->y[i], o_);
          gain |= (*to++ = gain_of(of->y[i], o_)) > 0;
          if (of == &judged) query.relevant = query.n_rel;
        }
    }
    if (num_relevant >= 0) query.n_rel = num_relevant;
    gain_ = gains;

    groups_.clear();
    relevant_before_ = 0;
    int64_t cut = of_all_ranks_ ? row.n : std::max(longest_cut_, by_relevant_ ? query.n_rel : 0);
    bool untied = false;
    int64_t numbers;
    if (judged.count <= kCounted)
      numbers = rank_by_counting(row, parts, untied);
    else
      numbers = rank_by_sorting(row, cut, parts, untied);
    if (query.n_rel < query.relevant || (o_.nan == propagate && numbers < row.n)) return fail(out, empty);
    empty[0] = query.n_rel == 0;
    empty[step_] = !gain;
    if (untied)
      evaluate(a_, query, untied_, gains, gains_count, longest_ndcg_, discounts_, out, step_);
    else
      evaluate(a_, query, groups_, gains, gains_count, longest_ndcg_, discounts_, out, step_);
  }

  void fail(double* out, bool* empty) const {
    for (size_t m = 0; m < a_.kinds.size(); ++m) out[m * step_] = NAN;
    empty[0] = empty[step_] = false;
  }

 private:
  // ---- Groups, in order ----

  // The judged documents ids[0 .. count) are among n of one score, after `before` others.
  void add_group(int64_t before, int64_t n, int32_t* ids, int64_t count) {
    if (o_.ties == ranking::average) {
      Group group{int32_t(before), int32_t(n), 0, relevant_before_, 0};
      for (int64_t i = 0; i < count; ++i) {
        group.relevant += ranking::is_relevant(judged.y[ids[i]], o_);
        group.gain += gain_[ids[i]];
      }
      group.gain /= double(n);
      relevant_before_ += group.relevant;
      groups_.add(group);
      return;
    }
    bool first = o_.ties == ranking::optimistic;
    std::stable_sort(ids, ids + count, [&](int32_t a, int32_t b) {
      return first ? judged.y[a] > judged.y[b] : judged.y[a] < judged.y[b];
    });
    for (int64_t i = 0; i < count; ++i) add_one(first ? before + i : before + n - count + i, ids[i]);
  }
  void add_one(int64_t before, int32_t id) {
    bool relevant = ranking::is_relevant(judged.y[id], o_);
    groups_.add({int32_t(before), 1, relevant, relevant_before_, gain_[id]});
    relevant_before_ += relevant;
  }

  // ---- Count ----

  // Puts the judged documents into untied_ if they are, else into groups_.
  template <class S>
  int64_t rank_by_counting(const Row<S>& row, const Parts& parts, bool& untied) {
    int64_t count = judged.count;
    for (int64_t i = 0; i < count; ++i) score_[i] = R(to_real(row.scores[judged.at[i] * row.stride]));
    store(score_ + count, splat(R(NAN)));
    if (count == 0 && o_.nan == ranking::last) return row.n;  // no score matters
    int64_t numbers;
    if (row.n <= kShort) {
      numbers = count_short(row);
      if ((untied = is_untied())) return put_in_order(row.n), numbers;
    } else {
      numbers = count_long(row, parts);
    }
    uint64_t relevant = 0, nan = 0;  // bits of judged documents
    for (int64_t i = 0; i < count; ++i) {
      relevant |= uint64_t(ranking::is_relevant(judged.y[i], o_)) << i;
      nan |= uint64_t(score_[i] != score_[i]) << i;
    }
    for (int64_t i = 0; i < count; ++i) {
      uint64_t above = 0, same = 0;
      for (int64_t j = 0; j < count; j += L) {
        above |= larger_bits(load<R>(score_ + j), splat(score_[i])) << j;
        same |= equal_bits(load<R>(score_ + j), splat(score_[i])) << j;
      }
      if (std::countr_zero(same) != i) continue;  // in the group of an earlier one, or NaN
      relevant_before_ = std::popcount(above & relevant);
      add_counted(row, larger_[i], equal_[i], score_[i], same);
    }
    relevant_before_ = std::popcount(relevant & ~nan);
    if (nan) add_counted(row, numbers, row.n - numbers, R(NAN), nan);
    return numbers;
  }

  // Whether each judged document is the only one of its score.
  bool is_untied() const { return judged.count == 0 || not_one<R>(equal_, judged.count) == 0; }

  // Untied judged documents: larger_ is their places.
  TORCHFAST_INLINE void put_in_order(int64_t n) {
    int64_t count = judged.count;
    int32_t id[kCounted];
    untied_.begin(count);
    auto put = [&](int64_t at, int32_t i) __attribute__((always_inline)) {
      untied_.put(at, int32_t(larger_[i]), gain_[i]);
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
    if (!plain_)
      untied_.choose_relevant([&](int64_t at) { return ranking::is_relevant(judged.y[id[at]], o_); });
  }

  template <class S>
  void add_counted(const Row<S>& row, int64_t before, int64_t n, R score, uint64_t members) {
    if (n == 1) return add_one(before, std::countr_zero(members));
    int32_t ids[kCounted], *end = ids;
    for (; members; members &= members - 1) *end++ = std::countr_zero(members);
    if (o_.ties == ranking::stable)
      add_stable(row, before, score, ids, end - ids);
    else
      add_group(before, n, ids, end - ids);
  }

  // Counts in larger_ and equal_ the scores larger than and equal to each of score_; returns how many are
  // not NaN.
  template <class S>
  int64_t count_long(const Row<S>& row, const Parts& parts) {
    int64_t count = judged.count;
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
      if (judged.count > 6 && coarse_.count(x, row.n, score_, judged.count, larger_, equal_)) return row.n;
#endif
    constexpr int kLanes = Narrow<R>::lanes, kSummed = 2;  // adding up lanes takes as long as so many vectors
    int64_t vectors = (row.n + kLanes - 1) / kLanes, wide = (judged.count + kLanes - 1) / kLanes;
    if (judged.count * (vectors + kSummed) > row.n * wide) {
      int64_t i = 0;
      for (; i + 4 <= wide; i += 4) compare_beside<4>(x, row.n, i * kLanes);
      if (i + 2 <= wide) compare_beside<2>(x, row.n, i * kLanes), i += 2;
      if (i < wide) compare_beside<1>(x, row.n, i * kLanes);
    } else {
      compare_all(x, row.n, score_, judged.count,
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
      int64_t at = judged.at[ids[i]];
      int64_t equal = 0, numbers = 0;
      for_each_chunk<R>(row, from, at, [&](const R* x, int64_t, int64_t n) {
        numbers += count_numbers(x, n);
        compare<1>(x, n, &score, 0,
                   [&](int64_t, auto, const Counts<R>* counts) { equal += sum_of(counts->equal); });
      });
      before += score == score ? equal : at - from - numbers;
      add_one(before++, ids[i]);
      from = at + 1;
    }
  }

  // ---- Sort ----

  // All documents, or those from the cut-th score up.
  template <class S>
  int64_t rank_by_sorting(const Row<S>& row, int64_t cut, const Parts& parts, bool& untied) {
    int64_t numbers = -1, n = 0;
    if (cut > 0 && cut < row.n / 8) numbers = select_top(row, cut, parts, n);
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
      for (int64_t i = 0; i < judged.count; ++i) all[judged.at[i]].id = Key<R>(i + 1);
    }
    const Element* sorted = radix_sort(elements_.get(), elements_.get() + n, n, parts, digits_);
    untied = is_untied(sorted, n);
    if (untied)
      put_in_order(sorted, n);
    else
      add_groups(sorted, n);
    return numbers;
  }

  // Puts the documents from the cut-th score up into elements_, and their number into n: 0 where so many
  // scores above -inf do not exist. Returns how many scores are not NaN.
  template <class S>
  int64_t select_top(const Row<S>& row, int64_t cut, const Parts& parts, int64_t& n) {
    int64_t room = 2 * cut + kChunk;
    R* tops = tops_.need(parts.count * room);
    std::vector<int64_t> found(parts.count);
    std::atomic<int64_t> numbers{0};
    auto larger = std::greater<R>();
    parts.for_each_range(row.n, kChunk, [&](int64_t part, int64_t begin, int64_t end) {
      R *top = tops + part * room, least = -INFINITY;
      int64_t count = 0;
      for_each_chunk<R>(row, begin, end, [&](const R* x, int64_t, int64_t in_chunk) {
        numbers += count_numbers(x, in_chunk);
        if (count + in_chunk > room) {
          std::nth_element(top, top + cut - 1, top + count, larger);
          least = top[cut - 1];
          count = cut;
        }
        for_each_hit(
            x, in_chunk, least, [](auto a, auto b) { return a > b; },
            [&](int64_t j, bool hit) {
              top[count] = x[j];
              count += hit;
            });
      });
      found[part] = count;
    });
    int64_t count = found[0];
    for (int64_t part = 1; part < parts.count; count += found[part++])
      std::copy_n(tops + part * room, found[part], tops + count);
    if (count < cut) return numbers;
    std::nth_element(tops, tops + cut - 1, tops + count, larger);
    R least = tops[cut - 1];

    std::vector<std::vector<Element>> chosen(parts.count);
    parts.for_each_range(row.n, kChunk, [&](int64_t part, int64_t begin, int64_t end) {
      for_each_chunk<R>(row, begin, end, [&](const R* x, int64_t first, int64_t in_chunk) {
        for_each_hit(
            x, in_chunk, least, [](auto a, auto b) { return a >= b; },
            [&](int64_t j, bool hit) {
              if (hit) chosen[part].push_back({to_key(x[j]), Key<R>(first + j)});
            });
      });
    });
    for (const auto& of_part : chosen) n += of_part.size();
    Element* element = elements_.need(2 * n);
    for (const auto& of_part : chosen) element = std::copy(of_part.begin(), of_part.end(), element);
    int64_t i = 0;
    for (element = elements_.get(); element < elements_.get() + n; ++element) {
      while (i < judged.count && judged.at[i] < int64_t(element->id)) ++i;
      element->id = i < judged.count && judged.at[i] == int64_t(element->id) ? Key<R>(i + 1) : 0;
    }
    return numbers;
  }

  // f(j, is(x[j], score)) for all j of the vectors of which any is.
  template <class Is, class F>
  static void for_each_hit(const R* x, int64_t n, R score, const Is& is, const F& f) {
    for (int64_t j = 0; j < n; j += 4 * L) {
      IntVec<R> any{};
      for (int64_t i = j; i < std::min(n, j + 4 * L); i += L) any |= is(load<R>(x + i), splat(score));
      if (lane_bits(any))
        for (int64_t i = j; i < std::min(n, j + 4 * L); ++i) f(i, is(x[i], score));
    }
  }

  // In what follows documents are sorted by ascending key; id - 1 is the judged document's, 0 says none.

  static bool is_untied(const Element* sorted, int64_t n) {
    bool tied = false;
    for (int64_t i = 1; i < n; ++i) tied |= sorted[i].key == sorted[i - 1].key;
    return !tied;
  }

  // Where the judged documents are in the order.
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
    untied_.begin(count);
    for (int64_t i = 0; i < count; ++i) untied_.put(i, at[i], gain_[sorted[at[i]].id - 1]);
    if (!plain_)
      untied_.choose_relevant(
          [&](int64_t i) { return ranking::is_relevant(judged.y[sorted[at[i]].id - 1], o_); });
  }

  void add_groups(const Element* sorted, int64_t n) {
    int32_t* at = id_.need(n + judged.count + 1);
    int64_t count = find_places(sorted, n, at);
    int32_t* ids = at + count;
    for (int64_t c = 0; c < count;) {
      int64_t begin = at[c], end = begin + 1, in_group = 0;
      auto key = sorted[begin].key;
      if (o_.ties != ranking::stable) {
        while (begin > 0 && sorted[begin - 1].key == key) --begin;
        while (end < n && sorted[end].key == key) ++end;
      }
      for (; c < count && at[c] < end; ++c) ids[in_group++] = int32_t(sorted[at[c]].id - 1);
      if (end == begin + 1)
        add_one(begin, ids[0]);
      else
        add_group(begin, end - begin, ids, in_group);
    }
  }

  // Up to so many judged documents, counting is faster.
  static constexpr int64_t kCounted = std::min(64, 8 * L);

  const Arguments& a_;
  const ranking::Options& o_;
  const Discounts& discounts_;
  int64_t step_;
  bool of_all_ranks_ = false, by_relevant_ = false;  // metrics without cut-off; with n_rel as theirs
  int64_t longest_cut_ = 0, longest_ndcg_ = 0;
  bool plain_;  // each judged document is relevant, and its target its gain

  Buffer<double> gains_;  // of the judged documents, then of those not retrieved, where they are not plain
  const double* gain_;    // of the judged documents
  Groups groups_;
  Untied untied_;
  int32_t relevant_before_ = 0;
  // By counting: the judged documents' scores, and how many are larger and equal.
  R score_[kCounted + L];
  Int<R> larger_[kCounted], equal_[kCounted];
  Buffer<Counts<R>> counts_;
#if TORCHFAST_VECTOR_BYTES >= 32
  Coarse coarse_;
#endif
  // By sorting.
  Buffer<int32_t> id_;
  Buffer<Element> elements_;
  Buffer<R> tops_;
  Buffer<Key<R>> digits_;
};

// ---- All queries ------------------------------------------------------------------------------------

// int64 numbers that the op was given, or was not.
class Numbers {
 public:
  explicit Numbers(const std::optional<Tensor>& given) {
    if (given) tensor_ = as_contiguous(*given, ScalarType::Long), data_ = data<int64_t>(*tensor_);
  }
  explicit operator bool() const { return data_; }
  int64_t operator[](int64_t i) const { return data_[i]; }
  const int64_t* get() const { return data_; }

 private:
  std::optional<Tensor> tensor_;
  const int64_t* data_ = nullptr;
};

bool are_boundaries(const Numbers& offsets, int64_t queries, int64_t total) {
  bool legal = offsets[0] >= 0 && offsets[queries] <= total;
  for (int64_t q = 0; q < queries; ++q) legal &= offsets[q] <= offsets[q + 1];
  return legal;
}

template <class S, class R>
class Problem {
 public:
  Problem(const Arguments& a, double* values, bool* empty)
      : a_(a),
        values_(values),
        empty_(empty),
        flat_(a.offsets),
        queries_(flat_ ? a.offsets->numel() - 1 : a.preds.size(0)),
        width_(flat_ ? 0 : a.preds.size(1)),
        preds_(a.preds, flat_),
        target_(a.target, flat_),
        offsets_(a.offsets),
        lengths_(a.lengths),
        num_relevant_(a.num_relevant),
        other_offsets_(a.unretrieved_offsets) {
    if (a.mask) mask_ = PerDocument(*a.mask, flat_);
    if (a.unretrieved) others_ = Targets(*a.unretrieved, true);
  }

  void run() {
    int64_t total = a_.preds.numel(), threads = torch::stable::get_num_threads();
    bool legal = (!flat_ || are_boundaries(offsets_, queries_, total)) &&
                 (!other_offsets_ || are_boundaries(other_offsets_, queries_, a_.unretrieved->numel()));
    if (!legal) {
      std::fill_n(values_, a_.kinds.size() * queries_, NAN);
      std::fill_n(empty_, 2 * queries_, false);
      return;
    }
    int64_t longest = width_;
    for (int64_t q = 0; flat_ && q < queries_; ++q) longest = std::max(longest, documents_of(q));
    STD_TORCH_CHECK(longest <= INT32_MAX, "a query has ", longest,
                    " documents; at most 2^31 - 1 are allowed");
    const Discounts discounts(longest);

    // A query that one thread alone would keep busy for long is shared out, before the others.
    auto is_huge = [&](int64_t q) {
      return documents_of(q) > std::max(kHuge, total / (4 * threads)) && threads > 1;
    };
    if (longest > kHuge && threads > 1) {
      Worker worker(*this, discounts);
      for (int64_t q = 0; q < queries_; ++q)
        if (is_huge(q)) worker.rank(q, Parts{threads});
    }
    // The others block by block: a thread begins with a share of its own, side by side in memory, and then
    // helps the next one.
    int64_t blocks = total / kBlock + 1, shares = std::min(blocks, threads);
    std::vector<std::atomic<int64_t>> next(shares);
    auto first_block = [=](int64_t share) { return share * blocks / shares; };
    for (int64_t share = 0; share < shares; ++share) next[share] = first_block(share);
    torch::stable::parallel_for(0, shares, 1, [&](int64_t from, int64_t to) {
      for (; from < to; ++from) {
        Worker worker(*this, discounts);
        for (int64_t i = from; i < from + shares; ++i) {
          int64_t share = i % shares;
          for (int64_t block; (block = next[share]++) < first_block(share + 1);)
            for (int64_t q = first_of(block), end = first_of(block + 1); q < end; ++q) {
              if (q + 1 < end) prefetch(q + 1);
              if (!is_huge(q)) worker.rank(q, Parts{});
            }
        }
      }
    });
  }

 private:
  static constexpr int64_t kHuge = 1 << 18;

  int64_t documents_of(int64_t q) const { return flat_ ? offsets_[q + 1] - offsets_[q] : width_; }

  // The hardware prefetches page by page. Rows of about that size are asked for while the one before is
  // ranked, a tenth faster (10000 x 1000); much shorter or longer ones are not. Inline: GCC drops calls that
  // only prefetch.
  TORCHFAST_INLINE void prefetch(int64_t q) const {
    int64_t n = documents_of(q), first = flat_ ? offsets_[q] : q;
    if (n < 256 || n > kShort) return;
    for (const PerDocument* x : {static_cast<const PerDocument*>(&target_), &preds_})
      for (int64_t byte = 0; byte < n * x->size; byte += 64) __builtin_prefetch(x->of(first) + byte);
  }

  // The queries that begin in a block of documents.
  int64_t first_of(int64_t block) const {
    int64_t at = block * kBlock;
    if (at > a_.preds.numel()) return queries_;
    if (!flat_) return at == 0 ? 0 : std::min(queries_, (at + width_ - 1) / width_);
    return std::lower_bound(offsets_.get(), offsets_.get() + queries_, at) - offsets_.get();
  }

  struct Worker {
    Worker(const Problem& problem, const Discounts& discounts)
        : p(problem), ranker(p.a_, discounts, p.queries_) {}

    void rank(int64_t q, const Parts& parts) {
      double* values = p.values_ + q;
      bool* empty = p.empty_ + q;
      int64_t n = p.lengths_ ? p.lengths_[q] : p.documents_of(q);
      int64_t num_relevant = p.num_relevant_ ? p.num_relevant_[q] : 0;
      if (n < 0 || (p.lengths_ && n > p.width_) || num_relevant < 0) return ranker.fail(values, empty);

      int64_t first = p.flat_ ? p.offsets_[q] : q, stride = p.target_.stride;
      Row<S> row{reinterpret_cast<const S*>(p.preds_.of(first)), p.preds_.stride, n};
      const void* target = p.target_.of(first);
      if (p.mask_.data) {
        auto* mask = reinterpret_cast<const bool*>(p.mask_.of(first));
        std::byte* kept = targets.need((n + 1) * p.target_.size);
        p.target_.keep(target, stride, mask, p.mask_.stride, n, kept);
        row.n = keep<S>(row.scores, row.stride, mask, p.mask_.stride, n, scores.need(n + 1));
        row.scores = scores.get(), row.stride = 1;
        target = kept, stride = 1;
      }
      find(target, stride, row.n, parts);
      ranker.more.clear();
      if (p.other_offsets_) {
        int64_t begin = p.other_offsets_[q], end = p.other_offsets_[q + 1];
        p.others_.find(p.others_.of(begin), p.others_.stride, 0, end - begin, p.a_.options, ranker.more);
      }
      ranker.rank(row, parts, p.num_relevant_ ? num_relevant : -1, values, empty);
    }

    void find(const void* target, int64_t stride, int64_t n, const Parts& parts) {
      ranker.judged.clear();
      if (parts.count == 1) return p.target_.find(target, stride, 0, n, p.a_.options, ranker.judged);
      std::vector<Judged> found(parts.count);
      parts.for_each_range(n, kChunk, [&](int64_t part, int64_t begin, int64_t end) {
        p.target_.find(target, stride, begin, end, p.a_.options, found[part]);
      });
      for (const Judged& of_part : found) ranker.judged.append(of_part);
    }

    const Problem& p;
    Ranker<R> ranker;
    Buffer<S> scores;  // of the documents that the mask keeps
    Buffer<std::byte> targets;
  };

  const Arguments& a_;
  double* values_;
  bool* empty_;
  bool flat_;
  int64_t queries_, width_;
  PerDocument preds_, mask_;
  Targets target_, others_;
  Numbers offsets_, lengths_, num_relevant_, other_offsets_;
};

void rank_all(const Arguments& a, double* values, bool* empty) {
  with_logits_type(a.preds,
                   [&](auto s, auto r) { Problem<decltype(s), decltype(r)>(a, values, empty).run(); });
}

}  // namespace
}  // namespace torchfast::TORCHFAST_ISA

#ifdef TORCHFAST_LAST_ISA
namespace torchfast {
namespace {

void rank_all(const Arguments& a, double* values, bool* empty) {
  TORCHFAST_DISPATCH(rank_all)(a, values, empty);
}

// ---- Unsorted query ids -------------------------------------------------------------------------

int64_t* mutable_data(Tensor& x) { return static_cast<int64_t*>(x.mutable_data_ptr()); }

// Where each id begins, and the ids; id_at(i) is ascending.
template <class IdAt>
std::tuple<Tensor, Tensor> boundaries(const Tensor& like, int64_t n, const Parts& parts, const IdAt& id_at) {
  std::vector<int64_t> first(parts.count + 1);
  auto begins = [&](int64_t i) { return i == 0 || id_at(i) != id_at(i - 1); };
  parts.for_each_range(n, 1, [&](int64_t part, int64_t begin, int64_t end) {
    int64_t count = 0;
    for (int64_t i = begin; i < end; ++i) count += begins(i);
    first[part + 1] = count;
  });
  for (int64_t part = 0; part < parts.count; ++part) first[part + 1] += first[part];
  Tensor offsets = new_empty(like, {first.back() + 1}, ScalarType::Long);
  Tensor ids = new_empty(like, {first.back()}, ScalarType::Long);
  int64_t *offset = mutable_data(offsets), *id = mutable_data(ids);
  parts.for_each_range(n, 1, [&](int64_t part, int64_t begin, int64_t end) {
    int64_t to = first[part];
    for (int64_t i = begin; i < end; ++i)
      if (begins(i)) offset[to] = i, id[to++] = id_at(i);
  });
  offset[first.back()] = n;
  return {offsets, ids};
}

template <class Key>
std::tuple<Tensor, Tensor, Tensor> group_unsorted(const Tensor& indexes, const int64_t* id, int64_t n,
                                                  int64_t least, const Parts& parts) {
  Buffer<Keyed<Key>> elements;
  Buffer<Key> counts;
  Keyed<Key>* all = elements.need(2 * n);
  parts.for_each_range(n, 1, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) all[i] = {Key(uint64_t(id[i]) - uint64_t(least)), Key(i)};
  });
  const Keyed<Key>* sorted = radix_sort(all, all + n, n, parts, counts);
  Tensor order = new_empty(indexes, {n}, ScalarType::Long);
  int64_t* to = mutable_data(order);
  parts.for_each_range(n, 1, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = int64_t(sorted[i].id);
  });
  auto [offsets, ids] = boundaries(
      indexes, n, parts, [=](int64_t i) { return int64_t(uint64_t(sorted[i].key) + uint64_t(least)); });
  return {order, offsets, ids};
}

std::tuple<Tensor, Tensor, Tensor> group_by_query(Tensor given, bool skip_sorted) {
  STD_TORCH_CHECK(given.dim() == 1 && given.scalar_type() == ScalarType::Long,
                  "indexes must be one-dimensional and int64");
  Tensor indexes = as_contiguous(given, ScalarType::Long);
  const int64_t *id = baseline::data<int64_t>(indexes), n = indexes.numel();
  Parts parts{n < kGrainElements ? 1 : int64_t(torch::stable::get_num_threads())};
  if (skip_sorted && std::is_sorted(id, id + n)) {
    auto [offsets, ids] = boundaries(indexes, n, parts, [=](int64_t i) { return id[i]; });
    return {new_empty(indexes, {0}, ScalarType::Long), offsets, ids};
  }
  if (n == 0) return group_unsorted<uint32_t>(indexes, id, 0, 0, parts);
  auto [least, most] = std::minmax_element(id, id + n);
  bool small = uint64_t(*most) - uint64_t(*least) <= UINT32_MAX && n <= UINT32_MAX;
  return small ? group_unsorted<uint32_t>(indexes, id, n, *least, parts)
               : group_unsorted<uint64_t>(indexes, id, n, *least, parts);
}

}  // namespace
}  // namespace torchfast

STABLE_TORCH_LIBRARY_IMPL(torchfast, CPU, m) {
  m.impl("group_by_query", TORCH_BOX(&torchfast::group_by_query));
  m.impl("ranking_metrics", TORCH_BOX(&torchfast::ranking::ranking_metrics<torchfast::rank_all>));
}
#endif
