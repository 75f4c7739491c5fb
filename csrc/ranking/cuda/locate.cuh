// Where all documents stand among the judged ones: how many are in front of each, and how many are tied with
// it.
#pragma once

#include "ranking/cuda/sort.cuh"

namespace torchfast::ranking {
namespace {

struct Seen {
  int documents = 0, numbers = 0;  // without padding; scores that are not NaN
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
                int low = 0, high = n;  // they close in on the first that is not in front of the document
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
                  ++in_front;  // a register counts these: most documents, where few are judged
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

// Returns the first judged document after j that has another score, or n.
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
    list.same[j] = 1;  // no other thread reads it
  }
  team.sync();
}

}  // namespace
}  // namespace torchfast::ranking
