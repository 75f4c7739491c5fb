// The kernels: one for short queries, one for long ones, and four for those that many blocks share.
#pragma once

#include "ranking/cuda/evaluate.cuh"

extern __shared__ uint4 dynamic_shared[];

namespace torchfast::ranking {
namespace {

// ---- A query by one team ----------------------------------------------------------------------------

// Sums up what the team's threads have seen.
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
constexpr int kWarpTeams = sizeof(U) == 8 ? 4 : 8;  // a block's shared memory has room for so many

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
__global__ void __launch_bounds__(kBlockThreads, 2) rank_long(const __grid_constant__ Pass p) {
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

// ---- A query by many blocks ---------------------------------------------------------------------------

__global__ void check_boundaries(const int64_t* offsets, int64_t queries, int64_t total, int* illegal) {
  bool wrong = offsets[0] < 0 || offsets[queries] > total;
  for (int64_t q = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; q < queries;
       q += int64_t(gridDim.x) * blockDim.x)
    wrong |= offsets[q] > offsets[q + 1];
  if (wrong) atomicOr(illegal, 1);
}

// Returns the last of the queries that begin at the document or before it.
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

// Calls f(row, slot, begin, end) for the huge queries that have documents begin .. end-1 in the block's
// slice. Only the queries at its ends are looked at: a huge one is longer than a slice.
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

__global__ void __launch_bounds__(kBlockThreads, 4) find_in_slice(const __grid_constant__ Pass p) {
  for_each_part(p, [&](const Row& row, Slot& slot, int begin, int end) {
    volatile int* judged = &slot.judged;
    bool wrong = for_each_judged(p.call, row, begin, end, threadIdx.x, kBlockThreads, [&](int i) {
      if (*judged > p.capacity) return;  // then the sorting block lists them itself
      int at = atomicAdd(&slot.judged, 1);
      if (at < p.capacity) p.ids[row.place + at] = i;
    });
    if (wrong) atomicOr(&slot.wrong, 1);
  });
}

// Returns the huge query that begins among the kHuge documents of the block's slot, or -1. It can only be the
// last one that begins there, since it is longer than the slot.
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
__global__ void __launch_bounds__(kBlockThreads, 4) sort_slot(const __grid_constant__ Pass p) {
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
__global__ void __launch_bounds__(kBlockThreads, 4) locate_in_slice(const __grid_constant__ Pass p) {
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
__global__ void __launch_bounds__(kBlockThreads, 2) evaluate_slot(const __grid_constant__ Pass p) {
  auto* shared = reinterpret_cast<Shared<kBlockWarps>*>(dynamic_shared);
  Team<kBlockWarps> team(*shared);
  if (p.illegal && *p.illegal) {  // if all rows are huge, no other kernel says so
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

}  // namespace
}  // namespace torchfast::ranking
