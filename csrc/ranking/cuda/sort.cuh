// Judged documents: a team finds them, and sorts them by descending score.
#pragma once

#include "ranking/cuda/team.cuh"

namespace torchfast::ranking {
namespace {

// Calls f(i) for those of the documents begin .. end-1 whose target has a say (ranking::zero_is_nothing).
// Returns true if a target is illegal.
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

// Sorts n elements in shared memory, which has room for the next power of two. `fill(i)` makes element i >= n
// one that comes last; `swap_if(i, j, up)` brings elements i and j into ascending (up) or descending order.
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
      // `peers` become the lanes that have this lane's digit.
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

// Gives doubles >= 0 keys that sort them by descending value.
__device__ inline uint64_t descending(double x) { return ~bits_as<uint64_t>(x + 0.0); }  // -0.0 becomes 0.0

// The judged documents by descending score. `larger` counts the documents between the judged one before and
// this one; `same` counts those of one score, at the first judged one that has it.
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
  // Uses the first 8 bytes per element, which are free once all is counted.
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

// Sorts by score, then by the policy for ties, then by place.
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

// Gives documents in global memory the order of sort_shared; before, list.ids must ascend.
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

}  // namespace
}  // namespace torchfast::ranking
