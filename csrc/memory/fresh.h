// Memory of an output that nobody has written yet.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace torchfast {

// 262 MB of fresh memory fault 64,000 small pages, which takes half the time of a loss and its gradient.
// Under transparent_hugepage=madvise (the default of many systems) huge pages must be asked for. In a virtual
// machine whose host has taken free memory back, a huge page can cost 3 ms instead of 0.15, because it is the
// large free blocks that are given back. The first pages are often fast: so each is timed, and from the
// second slow one on small pages serve. (Focal loss of 512 x 128256 takes 125 ms; 200 if small pages wait
// until a quarter is slow, 65 to 325 if they never serve. Waiting until two of eight are slow makes no
// difference.)
class FreshMemory {
 public:
  FreshMemory(void* data, int64_t bytes) {
#if defined(__linux__)
    if (bytes < int64_t(4 * kHuge)) return;
    begin_ = up(reinterpret_cast<uintptr_t>(data));
    end_ = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHuge - 1);
    advise(MADV_HUGEPAGE);
    reach(reinterpret_cast<void*>(begin_), 1);
#else
    (void)data, (void)bytes;
#endif
  }

  // Any thread must call this before it writes these bytes.
  void reach(const void* data, int64_t bytes) {
#if defined(__linux__)
    uintptr_t from = reinterpret_cast<uintptr_t>(data), to = std::min(from + bytes, end_);
    for (uintptr_t page = std::max(up(from), begin_); page < to && !small_; page += kHuge) {
      auto start = std::chrono::steady_clock::now();
      *reinterpret_cast<volatile char*>(page) = 0;
      if (std::chrono::steady_clock::now() - start < std::chrono::milliseconds(1) || ++slow_ < 2) continue;
      small_ = true;
      advise(MADV_NOHUGEPAGE);
    }
#else
    (void)data, (void)bytes;
#endif
  }

 private:
#if defined(__linux__)
  static constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  static uintptr_t up(uintptr_t address) { return (address + kHuge - 1) & ~(kHuge - 1); }
  void advise(int advice) { madvise(reinterpret_cast<void*>(begin_), end_ - begin_, advice); }

  uintptr_t begin_ = 0, end_ = 0;
  std::atomic<int> slow_{0};
  std::atomic<bool> small_{false};
#endif
};

}  // namespace torchfast
