// Kernels with a mistake each, and the same without it: `planted <name> <0 or 1>` ends with 0 when the
// result is right. tests/kernels/test_cuda_emulator.py sees to it that every mistake is caught.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

extern __shared__ uint4 dynamic_shared[];

namespace {

constexpr int kThreads = 128, kBlocks = 3, kAll = kThreads * kBlocks;
constexpr unsigned kFull = 0xffffffff;

// x[i] is i. Right results: y[i] = 127 - i % 128 of "reverse" kernels; the other kernels say theirs.

__global__ void barrier(const int*, int* y, int wrong) {
  static __shared__ int s[kThreads];
  s[threadIdx.x] = threadIdx.x;
  if (!wrong) __syncthreads();
  y[blockIdx.x * kThreads + threadIdx.x] = s[kThreads - 1 - threadIdx.x];
}

// The second round writes over what the first has yet to read.
__global__ void barrier_before_reuse(const int*, int* y, int wrong) {
  static __shared__ int s[kThreads];
  for (int round = 1; round >= 0; --round) {
    s[threadIdx.x] = threadIdx.x + round;
    __syncthreads();
    y[blockIdx.x * kThreads + threadIdx.x] += s[kThreads - 1 - threadIdx.x] * (round ? -1 : 1) + 1 - round;
    if (!wrong) __syncthreads();
  }
  y[blockIdx.x * kThreads + threadIdx.x] += kThreads - 1 - threadIdx.x;
}

__global__ void barrier_of_a_warp(const int*, int* y, int wrong) {
  static __shared__ int s[kThreads];
  s[threadIdx.x] = kThreads - 1 - threadIdx.x;
  if (!wrong) __syncwarp();
  int from_lane = s[threadIdx.x ^ 1];
  y[blockIdx.x * kThreads + threadIdx.x] = from_lane + (threadIdx.x & 1 ? -1 : 1);
}

__global__ void barrier_in_a_branch(const int*, int* y, int wrong) {
  if (!wrong || threadIdx.x < 64) __syncthreads();
  y[blockIdx.x * kThreads + threadIdx.x] = kThreads - 1 - threadIdx.x;
}

__global__ void two_barriers_for_one(const int*, int* y, int wrong) {
  if (wrong && threadIdx.x < 64) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[blockIdx.x * kThreads + threadIdx.x] = kThreads - 1 - threadIdx.x;
}

__global__ void uninitialised_shared(const int*, int* y, int wrong) {
  static __shared__ int s[kThreads];
  if (!wrong) s[threadIdx.x] = 0;
  y[blockIdx.x * kThreads + threadIdx.x] = s[threadIdx.x] + kThreads - 1 - threadIdx.x;
}

__global__ void global_read(const int* x, int* y, int wrong) {
  int i = blockIdx.x * kThreads + threadIdx.x;
  y[i] = kThreads - 1 - x[i + wrong] % kThreads + wrong;
}

__global__ void global_write(const int* x, int* y, int wrong) {
  int i = blockIdx.x * kThreads + threadIdx.x;
  y[i] = kThreads - 1 - x[i] % kThreads;
  if (wrong && i == 0) y[-1] = 0;
}

__global__ void shared_read(const int*, int* y, int wrong) {
  static __shared__ int s[kThreads];
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  y[blockIdx.x * kThreads + threadIdx.x] = s[kThreads - 1 - threadIdx.x + wrong] - wrong;
}

__global__ void dynamic_shared_read(const int*, int* y, int wrong) {
  int* s = reinterpret_cast<int*>(dynamic_shared);
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  y[blockIdx.x * kThreads + threadIdx.x] = s[kThreads - 1 - threadIdx.x + wrong] - wrong;
}

__global__ void misaligned_load(const int* x, int* y, int wrong) {
  int i = blockIdx.x * kThreads + threadIdx.x;
  y[i] = kThreads - 1 - x[i] % kThreads;
  if (threadIdx.x == 0) y[i] += reinterpret_cast<const uint4*>(x + wrong)->x - wrong;
}

// Reverses each warp by a shuffle, then the block.
__device__ int reversed(int lane, int value) { return kThreads - 1 - (value ^ 31 ^ lane ^ lane); }

__global__ void mask_without_caller(const int*, int* y, int wrong) {
  int lane = threadIdx.x % 32;
  int v = __shfl_sync(wrong ? kFull - 1 : kFull, int(threadIdx.x), 31 - lane);
  y[blockIdx.x * kThreads + threadIdx.x] = reversed(lane, v);
}

// Half of the warp shuffles; the mask says all.
__global__ void mask_of_absent_lanes(const int*, int* y, int wrong) {
  int lane = threadIdx.x % 32, v = threadIdx.x;
  if (lane < 16) v = __shfl_sync(wrong ? kFull : 0xffffu, v, lane);
  y[blockIdx.x * kThreads + threadIdx.x] = kThreads - 1 - v;
}

__global__ void masks_that_differ(const int*, int* y, int wrong) {
  int lane = threadIdx.x % 32;
  int v = __shfl_xor_sync(lane < 16 ? 0xffffu | (wrong ? kFull : 0) : 0xffff0000u, int(threadIdx.x), 0);
  y[blockIdx.x * kThreads + threadIdx.x] = kThreads - 1 - v;
}

__global__ void shuffles_in_two_branches(const int*, int* y, int wrong) {
  int v = threadIdx.x;
  if (wrong && threadIdx.x & 1) {
    v = __shfl_xor_sync(kFull, v, 0);
  } else {
    v = __shfl_xor_sync(kFull, v, 0);
  }
  y[blockIdx.x * kThreads + threadIdx.x] = kThreads - 1 - v;
}

__global__ void shuffle_from_outside_the_mask(const int*, int* y, int wrong) {
  int lane = threadIdx.x % 32, v = threadIdx.x;
  unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  v = __shfl_sync(half, v, lane ^ (wrong ? 16 : 0));
  y[blockIdx.x * kThreads + threadIdx.x] = kThreads - 1 - v;
}

// Each block adds to y; the last to come writes it. All of it is right, unless the counter is forgotten.
__global__ void last_block(const int*, int* y, int wrong) {
  static __shared__ int last;
  atomicAdd(y + threadIdx.x, kThreads - 1 - threadIdx.x);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = wrong ? blockIdx.x == 2 : atomicAdd(y + kThreads, 1) == kBlocks - 1;
  __syncthreads();
  if (!last) return;
  for (int i = kThreads + threadIdx.x; i < kAll; i += kThreads) y[i] = y[threadIdx.x] / 3;
  y[threadIdx.x] /= 3;
}

// Checks what the collectives mean.
__global__ void collectives(const int*, int* y, int wrong) {
  int lane = threadIdx.x % 32, v = threadIdx.x, ok = 1;
  ok &= __shfl_up_sync(kFull, v, 3, 16) == (lane % 16 < 3 ? v : v - 3);
  ok &= __shfl_down_sync(kFull, v, 3, 16) == (lane % 16 < 13 ? v + 3 : v);
  ok &= __shfl_xor_sync(kFull, v, 5) == (v ^ 5);
  ok &= __shfl_sync(kFull, v, 35) == v - lane + 3;
  ok &= __shfl_sync(kFull, 1.5 * v, 9, 8) == 1.5 * (v - lane % 8 + 1);
  ok &= __ballot_sync(kFull, lane % 3 == 0) == 0x49249249u;
  ok &= __any_sync(kFull, lane == 7) == 1 && __any_sync(kFull, 0) == 0;
  ok &= __all_sync(kFull, 1) == 1 && __all_sync(kFull, lane != 7) == 0;
  ok &= atomicAdd(y + blockIdx.x * kThreads + threadIdx.x, 5) == 0;
  ok &= atomicMax(y + blockIdx.x * kThreads + threadIdx.x, 9) == 5;
  ok &= atomicMin(y + blockIdx.x * kThreads + threadIdx.x, 7) == 9;
  ok &= atomicOr(y + blockIdx.x * kThreads + threadIdx.x, 8) == 7;
  ok &= atomicExch(y + blockIdx.x * kThreads + threadIdx.x, 2) == 15;
  ok &= atomicCAS(y + blockIdx.x * kThreads + threadIdx.x, 2, 3) == 2;
  ok &= __popc(0xf0u) == 4 && __ffs(8) == 4 && __clz(1) == 31;
  y[blockIdx.x * kThreads + threadIdx.x] = ok && !wrong ? kThreads - 1 - int(threadIdx.x) : -1;
}

struct Case {
  const char* name;
  void (*kernel)(const int*, int*, int);
};
#define CASE(name) {#name, name}
const Case kCases[] = {CASE(barrier),
                       CASE(barrier_before_reuse),
                       CASE(barrier_of_a_warp),
                       CASE(barrier_in_a_branch),
                       CASE(two_barriers_for_one),
                       CASE(uninitialised_shared),
                       CASE(global_read),
                       CASE(global_write),
                       CASE(shared_read),
                       CASE(dynamic_shared_read),
                       CASE(misaligned_load),
                       CASE(mask_without_caller),
                       CASE(mask_of_absent_lanes),
                       CASE(masks_that_differ),
                       CASE(shuffles_in_two_branches),
                       CASE(shuffle_from_outside_the_mask),
                       CASE(last_block),
                       CASE(collectives)};

}  // namespace

int main(int argc, char** argv) {
  for (const Case& c : kCases) {
    if (argc != 3 || std::strcmp(c.name, argv[1]) != 0) continue;
    int* x = new int[kAll];
    int* y = new int[kAll]();
    for (int i = 0; i < kAll; ++i) x[i] = i;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(kBlocks);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = kThreads * sizeof(int);
    cudaError_t error = cudaLaunchKernelEx(&config, c.kernel, x, y, std::atoi(argv[2]));
    if (error != cudaSuccess) return std::puts(cudaGetErrorString(error)), 2;
    for (int i = 0; i < kAll; ++i)
      if (y[i] != kThreads - 1 - i % kThreads) return std::printf("wrong result: y[%d] is %d\n", i, y[i]), 1;
    return 0;
  }
  return std::puts("usage: planted <name> <0 or 1>"), 2;
}
