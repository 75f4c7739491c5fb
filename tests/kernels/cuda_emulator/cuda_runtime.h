// CUDA on the CPU, for tests: g++ compiles a plain .cu with this folder first on its include path, and
// the program runs it. It has enough of CUDA for kernels that keep to these forms, which nvcc compiles too:
//   - launches through cudaLaunchKernelEx, not <<<>>>
//   - `static __shared__ T x[n]`, in an anonymous namespace, and `extern __shared__ uint4 dynamic_shared[]`
//
// Blocks run one after the other in random order. A block's threads are fibers, each of which runs from
// one synchronisation to the next; which is next is random too, and warps run far ahead of others
// (CUDA_EMULATOR_SEED). So a missing barrier shows as a wrong result. What CUDA leaves undefined ends the
// program with a message: masks that leave the caller out or name a lane that is not there; lanes that
// call different things; shuffles from lanes outside the mask; barriers that not all threads reach, or
// reach in different places; deadlocks. Accesses out of bounds, shared memory included, and misaligned
// ones are found by g++'s sanitizers (__init__.py has the flags). Shared memory starts as noise. What this
// cannot show: a race between two synchronisations, where a fiber is never interrupted, such as an
// increment that is not atomic.
//
// It runs on x86-64 alone, for the sake of speed: ucontext would switch fibers by a system call.
#pragma once

#if !defined(__x86_64__)
#error "the CUDA emulator runs on x86-64"
#endif

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ __attribute__((section("cuda_shared")))

// ---- Types ------------------------------------------------------------------------------------

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

constexpr size_t kMaxDynamicShared = 48 << 10;  // what a launch may ask for without an attribute
alignas(128) __shared__ uint4 dynamic_shared[kMaxDynamicShared / sizeof(uint4)];

extern "C" unsigned char __start_cuda_shared[], __stop_cuda_shared[];  // made by the linker

namespace cuda_emulator {

inline std::mt19937 random_bits{[] {
  const char* seed = std::getenv("CUDA_EMULATOR_SEED");
  return unsigned(seed ? std::atoi(seed) : 1);
}()};
inline unsigned random_below(unsigned n) { return unsigned(uint64_t(random_bits()) * n >> 32); }

[[noreturn]] inline void fail(const char* format, ...) {
  std::fprintf(stderr, "CUDA emulator: block (%u, %u, %u): ", blockIdx.x, blockIdx.y, blockIdx.z);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  std::_Exit(3);
}

// ---- Fibers -----------------------------------------------------------------------------------

constexpr size_t kStack = 64 << 10;

struct Stack {  // what is not running: where it goes on, and what ASan must know of it
  void* pointer = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
};

struct Fiber {
  Stack stack;
  uint3 index;
  // What it waits in, what it brought there, and what the lanes of the mask brought.
  const char* call = "";
  int line = 0;
  unsigned mask = 0;
  uint64_t value = 0;
  std::array<uint64_t, 32> values{};
};

// Bits of lanes. A lane that is in none of them waits for other lanes of its warp.
struct Warp {
  unsigned all, ready, at_barrier, returned;
};

inline std::vector<Fiber> fibers;  // the threads of a block; those beyond blockDim are idle
inline std::vector<Warp> warps;
inline unsigned threads, current;
inline Stack scheduler;
inline std::function<void()> kernel;

// Saves the registers that belong to the caller, and the stack pointer at *from; goes on at `to`.
extern "C" void cuda_emulator_switch(void** from, void* to);
asm(R"(
.pushsection .text
.weak cuda_emulator_switch
cuda_emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.popsection
)");

inline void switch_stacks(Stack& from, const Stack& to, bool for_good = false) {
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack, to.bottom, to.size);
  cuda_emulator_switch(&from.pointer, to.pointer);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

inline unsigned lane() { return current % 32; }
inline Warp& warp() { return warps[current / 32]; }

inline void wait(bool for_good = false) { switch_stacks(fibers[current].stack, scheduler, for_good); }

inline void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.bottom, &scheduler.size);
  kernel();
  warp().ready ^= 1u << lane();
  warp().returned |= 1u << lane();
  wait(true);
}

inline void start(unsigned thread) {
  Fiber& fiber = fibers[thread];
  if (!fiber.stack.bottom) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for a stack");
    mprotect(memory, 4096, PROT_NONE);
    fiber.stack.bottom = memory;
    fiber.stack.size = kStack;
  }
  __asan_unpoison_memory_region(fiber.stack.bottom, kStack);
  // The stack looks as if fiber_main had been called with 6 registers saved: the return address lies 8 below
  // a multiple of 16.
  auto** top = reinterpret_cast<void**>(static_cast<char*>(const_cast<void*>(fiber.stack.bottom)) + kStack);
  top[-2] = reinterpret_cast<void*>(&fiber_main);
  fiber.stack.pointer = top - 8;
  fiber.index = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y};
}

[[noreturn]] inline void fail_of_deadlock() {
  for (unsigned i = 0; i < threads; ++i) {
    const Fiber& fiber = fibers[i];
    if (warps[i / 32].returned >> i % 32 & 1)
      std::fprintf(stderr, "  thread %u has returned\n", i);
    else
      std::fprintf(stderr, "  thread %u waits in %s, line %d, mask %08x\n", i, fiber.call, fiber.line,
                   fiber.mask);
  }
  fail("deadlock: a barrier that not all threads reach");
}

// It fills the section, redzones included: hence without ASan.
__attribute__((no_sanitize("address"))) inline void fill_shared_with_noise() {
  auto* begin = reinterpret_cast<volatile uint64_t*>(__start_cuda_shared);
  auto* end = reinterpret_cast<volatile uint64_t*>(__stop_cuda_shared);
  for (uint64_t noise = random_bits(); begin < end; ++begin) *begin = noise *= 6364136223846793005u;
}

// Returns true if all threads are at a barrier and may go on, false if all have returned.
inline bool pass_barrier() {
  for (Warp& w : warps)
    if (w.at_barrier != w.all && (warps[0].at_barrier || w.returned != w.all)) fail_of_deadlock();
  if (!warps[0].at_barrier) return false;
  for (unsigned i = 0; i < threads; ++i)
    if (fibers[i].line != fibers[0].line)
      fail("threads 0 and %u are at different barriers, lines %d and %d", i, fibers[0].line, fibers[i].line);
  for (Warp& w : warps) std::swap(w.ready, w.at_barrier);
  return true;
}

// Picks the first warp in a random order that can run, and any lane of it that can: some warps run far ahead
// of others, until the order changes.
inline void run_block() {
  fill_shared_with_noise();
  for (unsigned i = 0; i < threads; ++i) start(i);
  warps.clear();
  std::vector<unsigned> order;
  for (unsigned first = 0; first < threads; first += 32) {
    unsigned all = threads - first < 32 ? (1u << (threads - first)) - 1 : ~0u;
    order.push_back(warps.size());
    warps.push_back({all, all, 0, 0});
  }
  do {
    for (size_t i = 0; i < order.size();) {
      if (i == 0 && random_below(64) == 0) std::shuffle(order.begin(), order.end(), random_bits);
      unsigned ready = warps[order[i]].ready;
      if (!ready) {
        ++i;
        continue;
      }
      for (unsigned skip = random_below(__builtin_popcount(ready)); skip > 0; --skip) ready &= ready - 1;
      current = 32 * order[i] + __builtin_ctz(ready);
      threadIdx = fibers[current].index;
      switch_stacks(scheduler, fibers[current].stack);
      i = 0;
    }
  } while (pass_barrier());
}

inline void run_grid(dim3 grid, dim3 block) {
  gridDim = grid, blockDim = block;
  threads = block.x * block.y * block.z;
  if (fibers.size() < threads) fibers.resize(threads);
  std::vector<unsigned> blocks(grid.x * grid.y * grid.z);
  for (unsigned i = 0; i < blocks.size(); ++i) blocks[i] = i;
  std::shuffle(blocks.begin(), blocks.end(), random_bits);
  for (unsigned i : blocks) {
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    run_block();
  }
}

// ---- Synchronisation --------------------------------------------------------------------------

// Every lane of the mask brings a value and gets those of all.
template <class T>
std::array<uint64_t, 32>& exchange(const char* call, unsigned mask, T value, int line) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA has no such shuffle");
  Fiber& self = fibers[current];
  self.call = call, self.line = line, self.mask = mask, self.value = 0;
  std::memcpy(&self.value, &value, sizeof(T));
  Warp& w = warp();
  w.ready ^= 1u << lane();
  if (!(mask >> lane() & 1))
    fail("thread %u calls %s (line %d) with mask %08x, which leaves it out", current, call, line, mask);
  if (unsigned missing = mask & (~w.all | w.returned))
    fail("thread %u calls %s (line %d) with mask %08x, but lanes %08x are not there", current, call, line,
         mask, missing);
  Fiber* lanes = &fibers[current / 32 * 32];
  unsigned waiting = w.all & ~w.ready & ~w.at_barrier & ~w.returned;
  for (unsigned i = 0; i < 32; ++i)
    if ((mask & waiting) >> i & 1 &&
        (lanes[i].mask != mask || lanes[i].line != line || lanes[i].call != call))
      fail("lanes %u and %u are in different calls: %s (line %d, mask %08x) and %s (line %d, mask %08x)",
           lane(), i, call, line, mask, lanes[i].call, lanes[i].line, lanes[i].mask);
  for (unsigned i = 0; (mask & waiting) == mask && i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    for (unsigned j = 0; j < 32; ++j)
      if (mask >> j & 1) lanes[i].values[j] = lanes[j].value;
    w.ready |= 1u << i;
  }
  wait();
  return self.values;
}

// The value that the source lane brought.
template <class T>
T shuffle(const char* call, unsigned mask, T value, unsigned source, int line) {
  const auto& values = exchange(call, mask, value, line);
  if (!(mask >> source & 1))
    fail("thread %u calls %s (line %d) with mask %08x, and reads lane %u", current, call, line, mask, source);
  std::memcpy(&value, &values[source], sizeof(T));
  return value;
}

template <class T, class Op>
T atomic(T* address, const Op& op) {
  T old = *address;
  *address = op(old);
  return old;
}

}  // namespace cuda_emulator

inline void __syncthreads(int line = __builtin_LINE()) {
  cuda_emulator::Fiber& self = cuda_emulator::fibers[cuda_emulator::current];
  self.call = "__syncthreads", self.line = line, self.mask = 0;
  cuda_emulator::warp().ready ^= 1u << cuda_emulator::lane();
  cuda_emulator::warp().at_barrier |= 1u << cuda_emulator::lane();
  cuda_emulator::wait();
}

inline void __syncwarp(unsigned mask = 0xffffffff, int line = __builtin_LINE()) {
  cuda_emulator::exchange("__syncwarp", mask, 0, line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  const auto& values = cuda_emulator::exchange("__ballot_sync", mask, predicate, line);
  unsigned ballot = 0;
  for (unsigned i = 0; i < 32; ++i) ballot |= unsigned((mask >> i & 1) && values[i]) << i;
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) == mask;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  unsigned base = cuda_emulator::lane() / width * width;
  return cuda_emulator::shuffle("__shfl_sync", mask, value, base + unsigned(source) % width, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  unsigned lane = cuda_emulator::lane();
  return cuda_emulator::shuffle("__shfl_up_sync", mask, value, lane % width < delta ? lane : lane - delta,
                                line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  unsigned lane = cuda_emulator::lane(),
           source = lane % width + delta < unsigned(width) ? lane + delta : lane;
  return cuda_emulator::shuffle("__shfl_down_sync", mask, value, source, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, int line = __builtin_LINE()) {
  unsigned lane = cuda_emulator::lane(), source = lane ^ unsigned(bits);
  if (source / width > lane / width) source = lane;
  return cuda_emulator::shuffle("__shfl_xor_sync", mask, value, source, line);
}

// ---- Atomics, intrinsics, the runtime ---------------------------------------------------------

template <class T, class U>
T atomicAdd(T* address, U value) {
  return cuda_emulator::atomic(address, [=](T old) { return T(old + value); });
}
template <class T, class U>
T atomicMin(T* address, U value) {
  return cuda_emulator::atomic(address, [=](T old) { return std::min(old, T(value)); });
}
template <class T, class U>
T atomicMax(T* address, U value) {
  return cuda_emulator::atomic(address, [=](T old) { return std::max(old, T(value)); });
}
template <class T, class U>
T atomicOr(T* address, U value) {
  return cuda_emulator::atomic(address, [=](T old) { return T(old | value); });
}
template <class T, class U>
T atomicExch(T* address, U value) {
  return cuda_emulator::atomic(address, [=](T) { return T(value); });
}
template <class T, class U, class V>
T atomicCAS(T* address, U expected, V value) {
  return cuda_emulator::atomic(address, [=](T old) { return old == T(expected) ? T(value) : old; });
}
inline void __threadfence() {}
inline void __threadfence_block() {}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline float __uint_as_float(unsigned x) {
  float y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}
inline unsigned __float_as_uint(float x) {
  unsigned y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 &grid = config->gridDim, &block = config->blockDim;
  if (uint64_t(grid.x) * grid.y * grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 ||
      uint64_t(block.x) * block.y * block.z - 1 >= 1024 || block.z > 64 ||
      config->dynamicSmemBytes > kMaxDynamicShared)
    return cudaErrorInvalidConfiguration;
  auto* unused = reinterpret_cast<char*>(dynamic_shared) + config->dynamicSmemBytes;
  __asan_poison_memory_region(unused, kMaxDynamicShared - config->dynamicSmemBytes);
  cuda_emulator::kernel = [=] { kernel(Parameters(arguments)...); };
  cuda_emulator::run_grid(grid, block);
  __asan_unpoison_memory_region(dynamic_shared, kMaxDynamicShared);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}
