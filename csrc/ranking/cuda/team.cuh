// A team of threads, a warp or a block, that shares the work on a query: what its threads tell each other,
// and how they share a row out.
#pragma once

#include "ranking/cuda/elements.cuh"

namespace torchfast::ranking {
namespace {

// Memory that a team shares besides its judged documents.
template <int warps>
struct Shared {
  uint64_t scratch[warps];
  double sums[warps][kTerms];  // a row is a warp's; in the end row 0 has the sums of all
  double ideals[kMetrics];
  Group cut[kTerms];  // for each term the group that its cut-off parts; n = 0 if there is none
  Group group;        // the large group that the team works on
  Row row;            // the query's row; in registers it would cost threads
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
  // Combines what all threads bring, in a fixed order; every thread gets the result.
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

  // Returns the sum of what the threads before bring; `total` becomes the sum of what all bring.
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

  // Shares the row that all threads will look at, once all are done with the one before.
  __device__ const Row& take(const Row& row) const {
    sync();
    if (thread == 0) shared.row = row;
    sync();
    return shared.row;
  }

  // Returns the first thread whose x is true, or size.
  __device__ int first(bool x) const {
    return reduce(x ? thread : size, [](int a, int b) { return a < b ? a : b; });
  }

  Shared<warps>& shared;
  const int thread, lane, warp;
};

// Calls f(i, bits) for elements begin .. end-1 that the mask keeps, each by one of the threads. With
// `skip_zeros`, vectors of nothing but zeros are left out. The loops are not unrolled: f is large, and a warp
// that waits for its 32 bytes a lane lets others compute.
template <class U, class F>
__device__ void for_each(const char* row, int64_t stride, const char* mask, int64_t mask_stride, int begin,
                         int end, int thread, int threads, bool skip_zeros, const F& f) {
  constexpr int kEach = sizeof(uint4) / sizeof(U);
  const U* x = reinterpret_cast<const U*>(row) + begin * stride;
  int n = end - begin, head = n, vectors = 0;  // head: elements in front of the first vector
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
    if (i + threads < vectors) next = __ldg(v + i + threads);  // it is on its way while this one is looked at
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

}  // namespace
}  // namespace torchfast::ranking
