// Ranking metrics on CUDA GPUs. Definitions and reference: torchfast/metrics/ranking/.
//
// As on the CPU, the metrics depend on the ranks of the judged documents (target > 0) alone. A team of
// threads finds them, sorts them by score, looks up every document's place among them, and so counts the
// documents in front of each and tied with it: scores and targets are read once, no document is sorted
// or moved. The team is
//   a warp              for queries of up to kWarpDocuments,
//   a block             for longer ones,
//   blocks of kSlice    for those longer than kHuge, in four kernels: find, sort, locate, evaluate.
// Judged documents that do not fit in shared memory (kCapacity) are sorted by one block in global memory
// (radix sort of their places, three ints a document, set aside where a query could be so long); so a huge
// query with very many of them keeps one block busy for long.
//
// Counts are integers, sums of doubles have a fixed order: results are the same in every run. One thread
// alone walks through a tie group for mrr, hit_rate and map over hits, as far as the cut-off.
//
// Plain CUDA, which tests/cuda_emulator also compiles for the CPU.
#include <cuda_runtime.h>

#include <algorithm>

#include "ranking_launch.h"

extern __shared__ uint4 dynamic_shared[];

namespace torchfast::ranking {
namespace {

constexpr int kWarpDocuments = 256;
constexpr int kCapacity = 2048;
constexpr int64_t kHuge = 1 << 17;  // longer than two slices, so that a slice has parts of two at most
constexpr int64_t kSlice = 1 << 15;
constexpr int kBlockWarps = 8, kBlock = 32 * kBlockWarps;
constexpr int kSmallGroup = 64;  // documents of one score that one thread goes through
constexpr int kTerms = 16;       // sums that one pass over the input can carry
constexpr int kMetrics = 16;     // metrics that one pass can return
constexpr unsigned kFull = 0xffffffff;

// ---- What a kernel is given ---------------------------------------------------------------------

// A sum over the groups: of gains, reciprocal ranks, ... up to a cut-off.
struct Term {
  int kind;   // dcg, mrr, map, hit_rate, or precision for hits
  int64_t k;  // 0: n_rel of the query
};

struct Metric {
  int kind, term, hits;  // hits: the term that counts them, of map over hits
  int64_t k;             // as the op takes it
  double* values;        // of each query
};

// A query that several blocks share.
struct Slot {
  int judged, documents, numbers, wrong;
};

struct Pass {
  Call call;
  Term terms[kTerms];
  Metric metrics[kMetrics];
  int term_count, metric_count;
  int capacity;              // judged documents that a team's shared memory holds
  int64_t queries_at_once;   // that a block looks at
  int* illegal;              // whether offsets are no boundaries; null: there are none
  int *ids, *larger, *same;  // one element a document; null where shared memory suffices
  Slot* slots;
};

// ---- Values of elements -------------------------------------------------------------------------

template <class To, class From>
__device__ To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof(To));
  return y;
}

__device__ inline double from_half(unsigned bits) {
  int exponent = bits >> 10 & 31, fraction = bits & 1023;
  double y = exponent == 31  ? (fraction ? NAN : INFINITY)
             : exponent == 0 ? ldexp(double(fraction), -24)
                             : ldexp(double(fraction + 1024), exponent - 25);
  return bits >> 15 ? -y : y;
}

// The number that an element of U's size is.
template <class U>
__device__ double to_double(U bits, Type type) {
  if constexpr (sizeof(U) == 1) return type == u8 ? double(bits) : double(int8_t(bits));
  if constexpr (sizeof(U) == 2) {
    if (type == i16) return double(int16_t(bits));
    return type == f16 ? from_half(bits) : double(bits_as<float>(unsigned(bits) << 16));
  }
  if constexpr (sizeof(U) == 4) return type == i32 ? double(int32_t(bits)) : double(bits_as<float>(bits));
  if constexpr (sizeof(U) == 8) return type == i64 ? double(int64_t(bits)) : bits_as<double>(bits);
}

// f of a zero of the size of the elements.
template <class F>
__device__ auto with_size(Type type, const F& f) {
  switch (size_of(type)) {
    case 1: return f(uint8_t{});
    case 2: return f(uint16_t{});
    case 4: return f(uint32_t{});
    default: return f(uint64_t{});
  }
}

// Not inlined: it stands in many places, none of them hot.
__device__ __noinline__ double element(const char* row, int64_t at, Type type) {
  return with_size(type, [&](auto zero) {
    return to_double(__ldg(reinterpret_cast<const decltype(zero)*>(row) + at), type);
  });
}

// Larger scores have smaller keys; all NaN the largest. U has the size of the score.
template <class U>
using Key = std::conditional_t<sizeof(U) == 8, uint64_t, uint32_t>;

template <class U>
__device__ Key<U> key_of(U bits, U infinity) {
  constexpr U sign = U(1) << (sizeof(U) * 8 - 1);
  if (U(bits & ~sign) > infinity) return Key<U>(U(~U(0)));
  if (bits == sign) bits = 0;  // -0 is 0
  return Key<U>(bits & sign ? bits : U(bits ^ U(~sign)));
}

template <class U>
__device__ constexpr U infinity_of(Type type) {
  if (sizeof(U) == 8) return U(0x7ff0000000000000);
  if (sizeof(U) == 4) return U(0x7f800000);
  return type == f16 ? U(0x7c00) : U(0x7f80);
}

// ---- Queries ------------------------------------------------------------------------------------

struct Row {
  const char *scores, *targets, *mask, *others;
  int n, others_count;  // documents, padding included; judged ones that were not retrieved
  int64_t place;        // its part of the working memory
  bool bad;
};

__device__ inline Row row_of(const Call& c, int64_t q) {
  Row row{};
  int64_t first = c.offsets ? c.offsets[q] : q, n = c.offsets ? c.offsets[q + 1] - first : c.width;
  row.place = c.offsets ? first : q * c.width;
  row.scores = c.preds.data + first * c.preds.query_stride * size_of(c.preds.type);
  row.targets = c.target.data + first * c.target.query_stride * size_of(c.target.type);
  if (c.mask.data) row.mask = c.mask.data + first * c.mask.query_stride;
  if (c.lengths) {
    row.bad |= c.lengths[q] < 0 || c.lengths[q] > n;
    n = c.lengths[q];
  }
  row.bad |= n > INT32_MAX || (c.num_relevant && c.num_relevant[q] < 0);
  if (c.other_offsets) {
    int64_t begin = c.other_offsets[q], count = c.other_offsets[q + 1] - begin;
    row.others = c.others.data + begin * c.others.stride * size_of(c.others.type);
    row.place += begin;
    row.bad |= count > INT32_MAX - n;
    row.others_count = int(count);
  }
  row.n = int(n);
  if (row.bad) row.n = row.others_count = 0;
  return row;
}

__device__ inline double target_of(const Call& c, const Row& row, int64_t i) {
  return element(row.targets, i * c.target.stride, c.target.type);
}
__device__ inline double other_target_of(const Call& c, const Row& row, int64_t i) {
  return element(row.others, i * c.others.stride, c.others.type);
}

enum class Size { warp, block, huge };

__device__ inline Size size_of_query(const Call& c, int64_t q) {
  int64_t n = c.offsets ? c.offsets[q + 1] - c.offsets[q] : c.width;
  int64_t others = c.other_offsets ? c.other_offsets[q + 1] - c.other_offsets[q] : 0;
  return n > kHuge ? Size::huge : n + others > kWarpDocuments ? Size::block : Size::warp;
}

// ---- Teams --------------------------------------------------------------------------------------

// Memory that a team shares besides its judged documents.
template <int warps>
struct Shared {
  uint64_t scratch[warps];
  double sums[warps][kTerms];  // of each warp; then row 0 is that of all
  double ideals[kMetrics];
  Group cut[kTerms];  // that the cut-off parts; n = 0: there is none
  Group group;        // at hand
  Row row;            // at hand; here, since every register that it needs is a thread less
  int at, count;
};

template <int warps>
struct Team {
  static constexpr int size = 32 * warps;

  __device__ Team(Shared<warps>& memory)
      : shared(memory),
        thread(int(threadIdx.x) % size),
        lane(int(threadIdx.x) % 32),
        warp(int(threadIdx.x) % size / 32) {}

  __device__ void sync() const {
    if (warps == 1)
      __syncwarp();
    else
      __syncthreads();
  }

  __device__ double sum_of_warp(double x) const {
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kFull, x, distance);
    return x;
  }
  // What all threads bring, put together in a fixed order; every thread gets it.
  template <class T, class Op>
  __device__ T reduce(T x, const Op& op) const {
    for (int distance = 16; distance > 0; distance /= 2) x = op(x, __shfl_xor_sync(kFull, x, distance));
    if (warps == 1) return x;
    T* parts = reinterpret_cast<T*>(shared.scratch);
    sync();
    if (lane == 0) parts[warp] = x;
    sync();
    x = parts[0];
    for (int w = 1; w < warps; ++w) x = op(x, parts[w]);
    return x;
  }
  template <class T>
  __device__ T sum(T x) const {
    return reduce(x, [](T a, T b) { return a + b; });
  }
  __device__ bool any(bool x) const {
    return reduce(unsigned(x), [](unsigned a, unsigned b) { return a | b; });
  }

  // The sum of what the threads before bring; `total` that of all.
  __device__ uint64_t scan(uint64_t x, uint64_t& total) const {
    uint64_t inclusive = x;
    for (int distance = 1; distance < 32; distance *= 2) {
      uint64_t of_others = __shfl_up_sync(kFull, inclusive, distance);
      if (lane >= distance) inclusive += of_others;
    }
    uint64_t before = 0;
    if (warps == 1) {
      total = __shfl_sync(kFull, inclusive, 31);
    } else {
      sync();
      if (lane == 31) shared.scratch[warp] = inclusive;
      sync();
      total = 0;
      for (int w = 0; w < warps; ++w) {
        if (w < warp) before += shared.scratch[w];
        total += shared.scratch[w];
      }
    }
    return before + inclusive - x;
  }

  // The row that all will look at; the one before is done with.
  __device__ const Row& take(const Row& row) const {
    sync();
    if (thread == 0) shared.row = row;
    sync();
    return shared.row;
  }

  // The first thread of which it is true, or size.
  __device__ int first(bool x) const {
    return reduce(x ? thread : size, [](int a, int b) { return a < b ? a : b; });
  }

  Shared<warps>& shared;
  const int thread, lane, warp;
};

// f(i, bits) for elements begin .. end-1 that the mask keeps, each by one of the threads. Elements of a
// zero vector are left out where `skip_zeros`. The loops are not unrolled: f is large, and a warp that
// waits for its 32 bytes a lane lets others compute.
template <class U, class F>
__device__ void for_each(const char* row, int64_t stride, const char* mask, int64_t mask_stride, int begin,
                         int end, int thread, int threads, bool skip_zeros, const F& f) {
  constexpr int kEach = sizeof(uint4) / sizeof(U);
  const U* x = reinterpret_cast<const U*>(row) + begin * stride;
  int n = end - begin, head = n, vectors = 0;  // elements up to where vectors begin
  if (!mask && stride == 1) {
    int to_boundary = int(-reinterpret_cast<uintptr_t>(x) % sizeof(uint4) / sizeof(U));
    head = to_boundary < n ? to_boundary : n;
    vectors = (n - head) / kEach;
  }
  const uint4* v = reinterpret_cast<const uint4*>(x + head);
  uint4 next = thread < vectors ? __ldg(v + thread) : uint4{};
#pragma unroll 1
  for (int i = thread; i < vectors; i += threads) {
    uint4 words = next;
    if (i + threads < vectors) next = __ldg(v + i + threads);  // on its way while this one is looked at
    if (skip_zeros && !(words.x | words.y | words.z | words.w)) continue;
    int at = begin + head + i * kEach;
#pragma unroll 1
    for (int j = 0; j < kEach; ++j) {
      f(at + j, sizeof(U) == 8 ? U(words.x | uint64_t(words.y) << 32) : U(words.x));
      if (sizeof(U) < 4 && (j + 1) * sizeof(U) % 4 != 0) {
        words.x >>= sizeof(U) % 4 * 8;
      } else if (sizeof(U) == 8) {
        words.x = words.z, words.y = words.w;
      } else {
        words.x = words.y, words.y = words.z, words.z = words.w;
      }
    }
  }
  int alone = n - vectors * kEach;
#pragma unroll 1
  for (int64_t i = thread; i < alone; i += threads) {
    int64_t at = i < head ? i : i + vectors * kEach;
    if (!mask || mask[(begin + at) * mask_stride]) f(int(begin + at), __ldg(x + at * stride));
  }
}

// ---- Judged documents: find ---------------------------------------------------------------------

// f(i) for those of the documents begin .. end-1 whose target has a say (ranking::zero_is_nothing);
// whether a target is none.
template <class F>
__device__ bool for_each_judged(const Call& c, const Row& row, int begin, int end, int thread, int threads,
                                const F& f) {
  bool wrong = false, skip = zero_is_nothing(c.options);
  with_size(c.target.type, [&](auto zero) {
    using U = decltype(zero);
    for_each<U>(row.targets, c.target.stride, row.mask, c.mask.stride, begin, end, thread, threads, skip,
                [&](int i, U bits) {
                  if (skip && bits == 0) return;
                  double y = to_double(bits, c.target.type);
                  wrong |= !is_target(y, c.options);
                  if (!skip || y > 0) f(i);
                });
  });
  return wrong;
}

// Puts the judged documents into `ids` in ascending order, and returns their number.
template <int warps>
__device__ int list_judged(const Team<warps>& team, const Call& c, const Row& row, int* ids) {
  bool skip = zero_is_nothing(c.options);
  int count = 0;
  for (int64_t base = 0; base < row.n; base += team.size) {
    int64_t i = base + team.thread;
    bool judged = i < row.n && (!row.mask || row.mask[i * c.mask.stride]);
    if (judged && skip) judged = target_of(c, row, i) > 0;
    uint64_t total, at = team.scan(judged, total);
    if (judged) ids[count + int(at)] = int(i);
    count += int(total);
  }
  team.sync();
  return count;
}

// ---- Judged documents: sort ---------------------------------------------------------------------

// Sorts n elements in shared memory, of which there is room for a power of two: `fill(i)` makes element
// i >= n one that comes last; `swap_if(i, j, up)` brings elements i and j into ascending order, or
// descending.
template <int warps, class Fill, class Swap>
__device__ void bitonic_sort(const Team<warps>& team, int n, const Fill& fill, const Swap& swap_if) {
  int size = 1;
  while (size < n) size *= 2;
  for (int i = n + team.thread; i < size; i += team.size) fill(i);
  team.sync();
  for (int run = 2; run <= size; run *= 2)
    for (int distance = run / 2; distance > 0; distance /= 2) {
      for (int t = team.thread; t < size / 2; t += team.size) {
        int i = 2 * t - (t & (distance - 1));
        swap_if(i, i + distance, (i & run) == 0);
      }
      team.sync();
    }
}

// Sorts ids by key_of(id), ascending and stable; returns ids or other, whichever holds the result.
// `digits` has room for 256 (warps + 1) numbers.
template <int warps, class KeyOf>
__device__ int* radix_sort(const Team<warps>& team, int* ids, int* other, int n, int* digits,
                           const KeyOf& key_of) {
  static_assert(Team<warps>::size == 256, "a thread a digit");
  uint64_t differing = 0, any = n > 0 ? key_of(ids[0]) : 0;
#pragma unroll 1
  for (int64_t i = team.thread; i < n; i += team.size) differing |= key_of(ids[i]) ^ any;
  differing = team.reduce(differing, [](uint64_t a, uint64_t b) { return a | b; });
  int *next = digits + 256 * warps, *of_warp = digits + 256 * team.warp;
  for (int shift = 0; shift < 64; shift += 8) {
    if (!(differing >> shift & 255)) continue;
    auto digit_of = [&](int id) { return int(key_of(id) >> shift & 255); };
    next[team.thread] = 0;
    team.sync();
#pragma unroll 1
    for (int64_t i = team.thread; i < n; i += team.size) atomicAdd(next + digit_of(ids[i]), 1);
    team.sync();
    uint64_t total, before = team.scan(next[team.thread], total);
    next[team.thread] = int(before);
    for (int64_t base = 0; base < n; base += team.size) {
      int64_t i = base + team.thread;
      int id = i < n ? ids[i] : 0, digit = i < n ? digit_of(id) : 0;
      // Lanes of the same digit.
      unsigned peers = __ballot_sync(kFull, i < n);
      for (int bit = 1; bit < 256; bit *= 2) {
        unsigned set = __ballot_sync(kFull, digit & bit);
        peers &= digit & bit ? set : ~set;
      }
      int rank = __popc(peers & ((1u << team.lane) - 1));
      for (int w = 0; w < warps; ++w) digits[256 * w + team.thread] = 0;
      team.sync();
      if (i < n && rank == 0) of_warp[digit] = __popc(peers);
      team.sync();
      int to = next[team.thread];
      for (int w = 0; w < warps; ++w) {
        int count = digits[256 * w + team.thread];
        digits[256 * w + team.thread] = to;
        to += count;
      }
      next[team.thread] = to;
      team.sync();
      if (i < n) other[of_warp[digit] + rank] = id;
      team.sync();
    }
    int* sorted = other;
    other = ids, ids = sorted;
  }
  return ids;
}

// Doubles >= 0 by descending value.
__device__ inline uint64_t descending(double x) { return ~bits_as<uint64_t>(x + 0.0); }  // -0.0 is 0.0

// ---- Judged documents: lists --------------------------------------------------------------------

// The judged documents by descending score. `larger` and `same` count documents: those between the one
// before and this one, and those of the same score, at the first of that score.
template <class U>
struct InShared {
  Key<U>* keys;
  int *larger, *same, *ids;
  __device__ Key<U> key(int j) const { return keys[j]; }
  __device__ InShared(void* memory, int capacity)
      : keys(static_cast<Key<U>*>(memory)),
        larger(reinterpret_cast<int*>(keys + capacity)),
        same(larger + capacity),
        ids(same + capacity) {}
  // The first 8 bytes an element, which are free once all is counted.
  __device__ uint64_t* gains() const { return reinterpret_cast<uint64_t*>(keys); }
};

template <class U>
__device__ Key<U> key_at(const Call& c, const Row& row, int64_t i) {
  return key_of(__ldg(reinterpret_cast<const U*>(row.scores) + i * c.preds.stride),
                infinity_of<U>(c.preds.type));
}

template <class U>
struct InGlobal {
  const Call& call;
  const Row& row;
  int *ids, *larger, *same;
  __device__ Key<U> key(int j) const { return key_at<U>(call, row, ids[j]); }
  __device__ InGlobal(const Pass& p, const Row& of)
      : call(p.call), row(of), ids(p.ids + of.place), larger(p.larger + of.place), same(p.same + of.place) {}
};

// In one order: by score, where that is the same by the policy for ties, else by place.
template <class U, int warps>
__device__ void sort_shared(const Team<warps>& team, const Call& c, const Row& row, const InShared<U>& list,
                            int n) {
  int64_t ties = c.options.ties;
  auto before = [&](int i, int j) {
    if (list.keys[i] != list.keys[j]) return list.keys[i] < list.keys[j];
    int a = list.ids[i], b = list.ids[j];
    if (ties >= optimistic && a != INT32_MAX && b != INT32_MAX) {
      double of_a = target_of(c, row, a), of_b = target_of(c, row, b);
      if (of_a != of_b) return ties == optimistic ? of_a > of_b : of_a < of_b;
    }
    return a < b;
  };
  bitonic_sort(
      team, n, [&](int i) { list.keys[i] = ~Key<U>(0), list.ids[i] = INT32_MAX; },
      [&](int i, int j, bool up) {
        if (before(j, i) != up) return;
        Key<U> key = list.keys[i];
        list.keys[i] = list.keys[j], list.keys[j] = key;
        int id = list.ids[i];
        list.ids[i] = list.ids[j], list.ids[j] = id;
      });
}

// The same for documents in list.ids in ascending order.
template <class U, int warps>
__device__ void sort_global(const Team<warps>& team, const Call& c, const Row& row, InGlobal<U>& list, int n,
                            int* digits) {
  int *ids = list.ids, *other = list.larger;
  auto sort = [&](auto key_of) {
    int* sorted = radix_sort(team, ids, other, n, digits, key_of);
    if (sorted != ids) other = ids, ids = sorted;
  };
  if (c.options.ties >= optimistic)
    sort([&](int i) {
      uint64_t key = descending(target_of(c, row, i));
      return c.options.ties == optimistic ? key : ~key;
    });
  sort([&](int i) { return uint64_t(key_at<U>(c, row, i)); });
  list.ids = ids, list.larger = other;
  team.sync();
}

// ---- Count --------------------------------------------------------------------------------------

struct Seen {
  int documents = 0, numbers = 0;  // no padding; not NaN
};

// Looks up each of the documents begin .. end-1 among the n judged ones, and counts it there.
template <class U, class List>
__device__ Seen locate(const Call& c, const Row& row, const List& list, int n, int begin, int end, int thread,
                       int threads) {
  const U infinity = infinity_of<U>(c.preds.type);
  const bool stable_ties = c.options.ties == stable;
  Seen seen;
  int in_front = 0;
  Key<U> last = n > 0 ? list.key(n - 1) : 0;
  for_each<U>(row.scores, c.preds.stride, row.mask, c.mask.stride, begin, end, thread, threads, false,
              [&](int i, U bits) {
                Key<U> key = key_of(bits, infinity);
                ++seen.documents;
                seen.numbers += key != Key<U>(U(~U(0)));
                if (n == 0 || key > last) return;
                int low = 0, high = n;  // of the first that is not in front of the document
                while (low < high) {
                  int middle = low + (high - low) / 2;
                  Key<U> other = list.key(middle);
                  if (other < key || (stable_ties && other == key && list.ids[middle] < i))
                    low = middle + 1;
                  else
                    high = middle;
                }
                if (low == n) return;
                bool equal = list.key(low) == key && (!stable_ties || list.ids[low] == i);
                if (equal)
                  atomicAdd(list.same + low, 1);
                else if (low == 0)
                  ++in_front;  // often: most documents, where few are judged
                else
                  atomicAdd(list.larger + low, 1);
              });
  if (in_front > 0) atomicAdd(list.larger, in_front);
  return seen;
}

template <int warps, class List>
__device__ void clear_counts(const Team<warps>& team, const List& list, int n) {
#pragma unroll 1
  for (int64_t j = team.thread; j < n; j += team.size) list.larger[j] = list.same[j] = 0;
  team.sync();
}

// The first judged document from j on with another score.
template <class List>
__device__ int end_of_group(const List& list, int j, int n) {
  auto key = list.key(j);
  int low = j + 1, high = n;
  while (low < high) {
    int middle = low + (high - low) / 2;
    if (list.key(middle) == key)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

template <class List>
__device__ bool begins_group(const List& list, int j) {
  return j == 0 || list.key(j - 1) != list.key(j);
}

// Optimistic and pessimistic ties: every judged document gets a rank of its own, in front of the others
// of its score or behind them.
template <int warps, class List>
__device__ void part_ties(const Team<warps>& team, const Call& c, const List& list, int n) {
#pragma unroll 1
  for (int64_t j = team.thread; j < n; j += team.size) {
    int others = 0;
    if (begins_group(list, int(j))) {
      int end = end_of_group(list, int(j), n);
      others = list.same[j] - (end - int(j));
      int at = c.options.ties == pessimistic ? int(j) : end;
      if (others > 0 && at < n) atomicAdd(list.larger + at, others);
    }
    list.same[j] = 1;  // which no other thread reads
  }
  team.sync();
}

// ---- Evaluate -----------------------------------------------------------------------------------

struct Discount {
  __device__ double operator()(int64_t rank) const { return 1 / log2(double(rank) + 1); }
};

// The thread's share of what the group contributes to a term. `cut` keeps a group that the cut-off parts.
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

// Adds what all threads' groups contribute to the terms; n = 0: there is none.
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

// Not inlined, for it needs many registers, and few queries.
__device__ __noinline__ double parted_over_hits(const Group& cut, int64_t k, double sum) {
  return precisions_over_hits(cut, up_to(cut, k), sum);
}

// The best DCG up to each metric's cut-off, of the gains of the query's `positive` documents that have
// any, all of the gain `one` unless that is 0. What `list` counts is written over.
template <class U, int warps, class List>
__device__ void find_ideals(const Team<warps>& team, const Pass& p, const Row& row, const List& list, int n,
                            int positive, double one, void* memory) {
  const Call& c = p.call;
  InShared<U> shared_list(memory, p.capacity);
  uint64_t* gains = shared_list.gains();
  int ranked = n + row.others_count, *sorted = nullptr;
  auto key_of_document = [&](int id) {
    double y = id < row.n ? target_of(c, row, id) : other_target_of(c, row, id - row.n);
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

// No value: NaN.
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

  wrong = team.any(wrong);  // such a target has no gain: no place in a table
  int relevant = 0, others_relevant = 0, positive = 0;
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
  for (int64_t i = team.thread; i < row.others_count; i += team.size) {
    double y = other_target_of(c, row, i);
    if (is_target(y, o)) {
      others_relevant += is_relevant(y, o);
      count_gain(y);
    } else {
      wrong = true;
    }
  }
  relevant = team.sum(relevant);
  others_relevant = team.sum(others_relevant);
  positive = team.sum(positive);
  least = team.reduce(least, [](double a, double b) { return fmin(a, b); });
  most = team.reduce(most, [](double a, double b) { return fmax(a, b); });
  Query query{seen.documents, relevant, c.num_relevant ? c.num_relevant[q] : relevant + others_relevant};
  bool bad = team.any(wrong) || row.bad || query.n_rel < relevant ||
             (o.nan == propagate && seen.numbers < seen.documents);
  if (bad) return fail(team, p, q);

  // Groups of one score, or documents alone where the ties are parted.
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
    // Large groups are everyone's.
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

// ---- Kernels: a query by one team ---------------------------------------------------------------

// Documents seen by the whole team.
template <int warps>
__device__ Seen sum(const Team<warps>& team, Seen seen) {
  seen.documents = team.sum(seen.documents);
  seen.numbers = team.sum(seen.numbers);
  return seen;
}

template <class U, int warps>
__device__ void rank(const Team<warps>& team, const Pass& p, int64_t q, void* memory) {
  const Call& c = p.call;
  const Row& row = team.take(row_of(c, q));
  InShared<U> list(memory, p.capacity);
  if (team.thread == 0) team.shared.count = 0;
  team.sync();
  bool wrong = for_each_judged(c, row, 0, row.n, team.thread, team.size, [&](int i) {
    int at = atomicAdd(&team.shared.count, 1);
    if (at < p.capacity) list.ids[at] = i, list.keys[at] = key_at<U>(c, row, i);
  });
  team.sync();
  int n = team.shared.count;
  if (warps == 1 || n <= p.capacity) {
    sort_shared(team, c, row, list, n);
    clear_counts(team, list, n);
    Seen seen = sum(team, locate<U>(c, row, list, n, 0, row.n, team.thread, team.size));
    team.sync();
    evaluate<U>(team, p, row, q, list, n, seen, wrong, memory);
  } else if constexpr (warps > 1) {
    InGlobal<U> all(p, row);
    n = list_judged(team, c, row, all.ids);
    sort_global(team, c, row, all, n, static_cast<int*>(memory));
    clear_counts(team, all, n);
    Seen seen = sum(team, locate<U>(c, row, all, n, 0, row.n, team.thread, team.size));
    team.sync();
    evaluate<U>(team, p, row, q, all, n, seen, wrong, memory);
  }
}

__host__ __device__ constexpr size_t list_bytes(int capacity, size_t key) { return capacity * (key + 12); }

template <class U>
constexpr int kWarpTeams = sizeof(U) == 8 ? 4 : 8;  // of a block, as shared memory has room for

template <class U>
__global__ void __launch_bounds__(32 * kWarpTeams<U>, 16 / kWarpTeams<U>)
    rank_short(const __grid_constant__ Pass p) {
  auto* shared = reinterpret_cast<Shared<1>*>(dynamic_shared);
  auto* lists = reinterpret_cast<char*>(shared + kWarpTeams<U>);
  int warp = threadIdx.x / 32;
  Team<1> team(shared[warp]);
  char* memory = lists + warp * list_bytes(p.capacity, sizeof(Key<U>));
  for (int64_t q = int64_t(blockIdx.x) * kWarpTeams<U> + warp; q < p.call.queries;
       q += int64_t(gridDim.x) * kWarpTeams<U>) {
    if (p.illegal && *p.illegal)
      fail(team, p, q);
    else if (size_of_query(p.call, q) == Size::warp)
      rank<U>(team, p, q, memory);
  }
}

template <class U>
__global__ void __launch_bounds__(kBlock, 2) rank_long(const __grid_constant__ Pass p) {
  auto* shared = reinterpret_cast<Shared<kBlockWarps>*>(dynamic_shared);
  Team<kBlockWarps> team(*shared);
  for (int64_t base = int64_t(blockIdx.x) * p.queries_at_once; base < p.call.queries;
       base += int64_t(gridDim.x) * p.queries_at_once) {
    int64_t q = base + team.thread;
    bool mine = team.thread < p.queries_at_once && q < p.call.queries;
    if (p.illegal && *p.illegal) {
      for (int64_t i = 0; i < p.queries_at_once && base + i < p.call.queries; ++i) fail(team, p, base + i);
      continue;
    }
    mine = mine && size_of_query(p.call, q) == Size::block;
    for (int next; (next = team.first(mine)) < team.size;) {
      if (team.thread == next) mine = false;
      rank<U>(team, p, base + next, shared + 1);
    }
  }
}

// ---- Kernels: a query by many blocks ------------------------------------------------------------

__global__ void check_boundaries(const int64_t* offsets, int64_t queries, int64_t total, int* illegal) {
  bool wrong = offsets[0] < 0 || offsets[queries] > total;
  for (int64_t q = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; q < queries;
       q += int64_t(gridDim.x) * blockDim.x)
    wrong |= offsets[q] > offsets[q + 1];
  if (wrong) atomicOr(illegal, 1);
}

// The last of the queries that begin at a document or before it.
__device__ inline int64_t query_at(const Call& c, int64_t document) {
  if (!c.offsets) return document / c.width;
  int64_t low = 0, high = c.queries - 1;
  while (low < high) {
    int64_t middle = low + (high - low + 1) / 2;
    if (c.offsets[middle] <= document)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

__device__ inline int64_t beginning_of(const Call& c, int64_t q) {
  return c.offsets ? c.offsets[q] : q * c.width;
}

// f(row, slot, begin, end) for the huge queries that have documents begin .. end-1 in the block's slice:
// those at its ends, since none is as short as a slice.
template <class F>
__device__ void for_each_part(const Pass& p, const F& f) {
  const Call& c = p.call;
  if (p.illegal && *p.illegal) return;
  int64_t from = int64_t(blockIdx.x) * kSlice, to = from + kSlice < c.documents ? from + kSlice : c.documents;
  int64_t first = query_at(c, from), last = query_at(c, to - 1);
  for (int64_t q = first;; q = last) {
    if (size_of_query(c, q) == Size::huge) {
      Row row = row_of(c, q);
      int64_t start = beginning_of(c, q), begin = from > start ? from - start : 0, end = to - start;
      if (end > row.n) end = row.n;
      if (begin < end) f(row, p.slots[start / kHuge], int(begin), int(end));
    }
    if (q == last) return;
  }
}

__global__ void __launch_bounds__(kBlock, 4) find_in_slice(const __grid_constant__ Pass p) {
  for_each_part(p, [&](const Row& row, Slot& slot, int begin, int end) {
    volatile int* judged = &slot.judged;
    bool wrong = for_each_judged(p.call, row, begin, end, threadIdx.x, kBlock, [&](int i) {
      if (*judged > p.capacity) return;  // then the sorting block lists them itself
      int at = atomicAdd(&slot.judged, 1);
      if (at < p.capacity) p.ids[row.place + at] = i;
    });
    if (wrong) atomicOr(&slot.wrong, 1);
  });
}

// The huge query that begins among the documents of the block's slot, or -1. Those that begin before it
// there are none, those that begin after it lie beyond.
__device__ inline int64_t query_of_slot(const Pass& p) {
  if (p.illegal && *p.illegal) return -1;
  int64_t from = int64_t(blockIdx.x) * kHuge;
  int64_t to = from + kHuge < p.call.documents ? from + kHuge : p.call.documents;
  int64_t q = query_at(p.call, to - 1);
  return size_of_query(p.call, q) == Size::huge && beginning_of(p.call, q) >= from ? q : -1;
}

template <class U>
__device__ void load_list(const Team<kBlockWarps>& team, const Pass& p, const Row& row,
                          const InShared<U>& list, int n) {
  for (int j = team.thread; j < n; j += team.size) {
    list.ids[j] = p.ids[row.place + j];
    list.keys[j] = key_at<U>(p.call, row, list.ids[j]);
  }
  team.sync();
}

template <class U>
__global__ void __launch_bounds__(kBlock, 4) sort_slot(const __grid_constant__ Pass p) {
  auto* shared = reinterpret_cast<Shared<kBlockWarps>*>(dynamic_shared);
  Team<kBlockWarps> team(*shared);
  int64_t q = query_of_slot(p);
  if (q < 0) return;
  Slot& slot = p.slots[blockIdx.x];
  const Row& row = team.take(row_of(p.call, q));
  InGlobal<U> all(p, row);
  int n = slot.judged, *ids = all.ids;
  if (n <= p.capacity) {
    InShared<U> list(shared + 1, p.capacity);
    load_list(team, p, row, list, n);
    sort_shared(team, p.call, row, list, n);
    for (int j = team.thread; j < n; j += team.size) ids[j] = list.ids[j];
  } else {
    n = list_judged(team, p.call, row, ids);
    sort_global(team, p.call, row, all, n, reinterpret_cast<int*>(shared + 1));
    if (all.ids != ids) {
#pragma unroll 1
      for (int64_t j = team.thread; j < n; j += team.size) ids[j] = all.ids[j];
      team.sync();
      all.larger = all.ids;
    }
    if (team.thread == 0) slot.judged = n;
  }
  clear_counts(team, all, n);
}

template <class U>
__global__ void __launch_bounds__(kBlock, 4) locate_in_slice(const __grid_constant__ Pass p) {
  auto* shared = reinterpret_cast<Shared<kBlockWarps>*>(dynamic_shared);
  Team<kBlockWarps> team(*shared);
  for_each_part(p, [&](const Row& of_part, Slot& slot, int begin, int end) {
    const Row& row = team.take(of_part);
    InGlobal<U> all(p, row);
    int n = slot.judged;
    Seen seen;
    if (n <= p.capacity) {
      InShared<U> list(shared + 1, p.capacity);
      load_list(team, p, row, list, n);
      clear_counts(team, list, n);
      seen = locate<U>(p.call, row, list, n, begin, end, team.thread, team.size);
      team.sync();
      for (int j = team.thread; j < n; j += team.size) {
        if (list.larger[j]) atomicAdd(all.larger + j, list.larger[j]);
        if (list.same[j]) atomicAdd(all.same + j, list.same[j]);
      }
    } else {
      seen = locate<U>(p.call, row, all, n, begin, end, team.thread, team.size);
    }
    seen = sum(team, seen);
    if (team.thread == 0) {
      atomicAdd(&slot.documents, seen.documents);
      atomicAdd(&slot.numbers, seen.numbers);
    }
  });
}

template <class U>
__global__ void __launch_bounds__(kBlock, 2) evaluate_slot(const __grid_constant__ Pass p) {
  auto* shared = reinterpret_cast<Shared<kBlockWarps>*>(dynamic_shared);
  Team<kBlockWarps> team(*shared);
  if (p.illegal && *p.illegal) {  // where rows are huge no other kernel says so
    for (int64_t q = blockIdx.x; !p.call.offsets && q < p.call.queries; q += gridDim.x) fail(team, p, q);
    return;
  }
  int64_t q = query_of_slot(p);
  if (q < 0) return;
  const Slot& slot = p.slots[blockIdx.x];
  const Row& row = team.take(row_of(p.call, q));
  InGlobal<U> all(p, row);
  int n = slot.judged;
  Seen seen{slot.documents, slot.numbers};
  if (n > p.capacity) return evaluate<U>(team, p, row, q, all, n, seen, slot.wrong, shared + 1);
  InShared<U> list(shared + 1, p.capacity);
  load_list(team, p, row, list, n);
  for (int j = team.thread; j < n; j += team.size) list.larger[j] = all.larger[j], list.same[j] = all.same[j];
  team.sync();
  evaluate<U>(team, p, row, q, list, n, seen, slot.wrong, shared + 1);
}

// ---- Launch -------------------------------------------------------------------------------------

// The most documents that a query can have, those not retrieved included.
int64_t longest(const Call& c) { return (c.offsets ? c.documents : c.width) + c.other_documents; }

int64_t slots_of(const Call& c) {
  return (c.offsets ? c.documents : c.width) > kHuge ? c.documents / kHuge + 1 : 0;
}

struct Working {
  int64_t slots_at, lists_at, list, bytes;
  explicit Working(const Call& c)
      : slots_at(c.offsets || c.other_offsets ? 16 : 0),
        lists_at(slots_at + slots_of(c) * int64_t(sizeof(Slot))),
        list(longest(c) > kCapacity ? c.documents + c.other_documents : 0),
        bytes(lists_at + 3 * list * int64_t(sizeof(int))) {}
};

class Launcher {
 public:
  explicit Launcher(cudaStream_t stream) : stream_(stream) {}

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared,
                  const Arguments&... arguments) {
    if (error_ != cudaSuccess || blocks == 0) return;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(std::min<int64_t>(blocks, INT32_MAX)));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream_;
    error_ = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  void clear(void* memory, int64_t bytes) {
    if (error_ == cudaSuccess && bytes > 0) error_ = cudaMemsetAsync(memory, 0, bytes, stream_);
  }
  const char* problem() const { return error_ == cudaSuccess ? nullptr : cudaGetErrorString(error_); }

 private:
  cudaStream_t stream_;
  cudaError_t error_ = cudaSuccess;
};

int power_of_2_from(int64_t n) {
  int power = 2;  // of keys of 8 bytes and three ints: a multiple of 8 bytes
  while (power < n) power *= 2;
  return power;
}

template <class U>
void launch_pass(Pass p, Launcher& launch) {
  const Call& c = p.call;
  const int64_t most = longest(c), least = c.offsets ? 0 : c.width, slots = slots_of(c);
  auto list = [&] { return list_bytes(p.capacity, sizeof(Key<U>)); };
  if (least <= kWarpDocuments) {
    p.capacity = power_of_2_from(std::min<int64_t>(most, kWarpDocuments));
    constexpr int teams = kWarpTeams<U>;
    launch(rank_short<U>, std::min<int64_t>((c.queries + teams - 1) / teams, 1 << 16), 32 * teams,
           teams * (sizeof(Shared<1>) + list()), p);
  }
  p.capacity = power_of_2_from(std::min<int64_t>(most, kCapacity));
  const size_t shared = sizeof(Shared<kBlockWarps>) + list();
  if (most > kWarpDocuments && least <= kHuge) {
    p.queries_at_once = std::min<int64_t>(std::max<int64_t>(c.queries >> 12, 1), kBlock);
    int64_t blocks = (c.queries + p.queries_at_once - 1) / p.queries_at_once;
    launch(rank_long<U>, blocks, kBlock, shared, p);
  }
  if (slots > 0) {
    int64_t slices = (c.documents + kSlice - 1) / kSlice;
    launch.clear(p.slots, slots * int64_t(sizeof(Slot)));
    launch(find_in_slice, slices, kBlock, 0, p);
    launch(sort_slot<U>, slots, kBlock, shared, p);
    launch(locate_in_slice<U>, slices, kBlock, shared, p);
    launch(evaluate_slot<U>, slots, kBlock, shared, p);
  }
}

// The number of the term, which is added if it is new.
int term_of(Pass& p, int kind, int64_t k) {
  for (int t = 0; t < p.term_count; ++t)
    if (p.terms[t].kind == kind && p.terms[t].k == k) return t;
  p.terms[p.term_count] = {kind, k};
  return p.term_count++;
}

void add_metric(Pass& p, int64_t kind, int64_t k, double* values) {
  int64_t cut = kind == r_precision ? 0 : k > 0 ? k : kNoCut;
  bool own = kind == dcg || kind == mrr || kind == map || kind == hit_rate;
  int term = term_of(p, int(kind == ndcg ? dcg : own ? kind : precision), cut);
  bool over_hits = kind == map && p.call.options.map_denominator == hits;
  p.metrics[p.metric_count++] = {int(kind), term, over_hits ? term_of(p, precision, cut) : 0, k, values};
}

}  // namespace

size_t working_bytes(const Call& call) { return size_t(Working(call).bytes); }

const char* launch(const Call& call, const int64_t* kinds, const int64_t* ks, int64_t metrics, void* working,
                   void* stream) {
  if (call.queries == 0) return nullptr;
  Launcher launch(static_cast<cudaStream_t>(stream));
  const Working plan(call);
  char* memory = static_cast<char*>(working);
  Pass pass{};
  pass.call = call;
  if (plan.slots_at > 0) {
    pass.illegal = reinterpret_cast<int*>(memory);
    launch.clear(pass.illegal, sizeof(int));
    auto check = [&](const int64_t* offsets, int64_t total) {
      if (offsets)
        launch(check_boundaries, std::min<int64_t>((call.queries + 255) / 256, 4096), 256, 0, offsets,
               call.queries, total, pass.illegal);
    };
    check(call.offsets, call.documents);
    check(call.other_offsets, call.other_documents);
  }
  pass.slots = reinterpret_cast<Slot*>(memory + plan.slots_at);
  if (plan.list > 0) {
    pass.ids = reinterpret_cast<int*>(memory + plan.lists_at);
    pass.larger = pass.ids + plan.list;
    pass.same = pass.larger + plan.list;
  }
  for (int64_t m = 0; m < metrics; ++m) {
    add_metric(pass, kinds[m], ks[m], call.values + m * call.queries);
    if (m + 1 < metrics && pass.metric_count < kMetrics && pass.term_count + 2 <= kTerms) continue;
    switch (size_of(call.preds.type)) {
      case 2: launch_pass<uint16_t>(pass, launch); break;
      case 4: launch_pass<uint32_t>(pass, launch); break;
      default: launch_pass<uint64_t>(pass, launch);
    }
    pass.metric_count = pass.term_count = 0;
  }
  return launch.problem();
}

}  // namespace torchfast::ranking
