// Implements memory/regions.h: regions of huge pages, of which those that are returned are marked so that the
// system can take their pages whenever it needs them, and serve again without a page fault if it did not.
#include "memory/regions.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "symbols.h"

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace torchfast {
namespace {

#if defined(__linux__)

constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr size_t kMostKept = 16;  // they are searched one by one

struct Region {
  void* data;
  int64_t bytes;
};

class Regions {
 public:
  // It is never destroyed, since a tensor may outlive whatever is destroyed at exit.
  static Regions& all() {
    static auto* regions = new Regions;
    return *regions;
  }

  void* take(int64_t bytes) {
    if (!enabled_) return nullptr;
    bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    std::lock_guard lock(mutex_);
    Region region = find(bytes, 2 * bytes);  // batches of varied sizes share one
    if (region.data)
      ++reused_;
    else
      region = {map(bytes), bytes};
    if (!region.data) return nullptr;
    used_[region.data] = region.bytes;
    in_use_ += region.bytes;
    most_in_use_ = std::max(most_in_use_, in_use_);
    return region.data;
  }

  void give_back(void* data) {
    std::lock_guard lock(mutex_);
    auto used = used_.find(data);
    Region region{data, used->second};
    used_.erase(used);
    in_use_ -= region.bytes;
    madvise(region.data, region.bytes, MADV_FREE);
    kept_.push_back(region);
    in_keep_ += region.bytes;
    keep(most_bytes_, kMostKept);
  }

  void empty() {
    std::lock_guard lock(mutex_);
    keep(0, 0);
    most_in_use_ = in_use_;
  }

  void stats(int64_t* out) {
    std::lock_guard lock(mutex_);
    int64_t values[] = {in_use_, in_keep_, most_in_use_, mapped_, reused_};
    std::copy(std::begin(values), std::end(values), out);
  }

 private:
  Regions() {
    const char* wish = std::getenv("TORCHFAST_CACHE");
    enabled_ = !wish || std::strcmp(wish, "0") != 0;
    most_bytes_ = int64_t(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE) / 8;
    // A child must not find the lock held by a thread that it does not have.
    pthread_atfork([] { all().mutex_.lock(); }, [] { all().mutex_.unlock(); }, [] { all().mutex_.unlock(); });
  }

  // Takes the smallest of the kept regions of so many bytes.
  Region find(int64_t least, int64_t most) {
    auto best = kept_.end();
    for (auto it = kept_.begin(); it != kept_.end(); ++it)
      if (it->bytes >= least && it->bytes <= most && (best == kept_.end() || it->bytes < best->bytes))
        best = it;
    if (best == kept_.end()) return {nullptr, 0};
    Region region = *best;
    kept_.erase(best);
    in_keep_ -= region.bytes;
    return region;
  }

  // Maps new memory, for which kept regions make room: with them there is never more mapped than was in use
  // at once.
  void* map(int64_t bytes) {
    keep(std::max(most_in_use_ - in_use_ - bytes, int64_t{0}), kMostKept);
    auto mapped = [&] {
      return mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    };
    void* at = mapped();
    if (at == MAP_FAILED) {
      keep(0, 0);
      at = mapped();
    }
    if (at == MAP_FAILED) return nullptr;
    char* begin = static_cast<char*>(at);
    int64_t before = (kHugePage - reinterpret_cast<uintptr_t>(at) % kHugePage) % kHugePage;
    if (before) munmap(begin, before);
    munmap(begin + before + bytes, kHugePage - before);
    madvise(begin + before, bytes, MADV_HUGEPAGE);
    ++mapped_;
    return begin + before;
  }

  // Gives the oldest of the kept regions to the system until so many bytes and regions are left.
  void keep(int64_t bytes, size_t count) {
    auto it = kept_.begin();
    for (; it != kept_.end() && (in_keep_ > bytes || size_t(kept_.end() - it) > count); ++it) {
      munmap(it->data, it->bytes);
      in_keep_ -= it->bytes;
    }
    kept_.erase(kept_.begin(), it);
  }

  std::mutex mutex_;
  bool enabled_;
  std::vector<Region> kept_;  // the oldest first
  std::unordered_map<void*, int64_t> used_;
  int64_t most_bytes_, in_use_ = 0, in_keep_ = 0, most_in_use_ = 0, mapped_ = 0, reused_ = 0;
};

#endif

}  // namespace

#if defined(__linux__)
void* take_region(int64_t bytes) { return Regions::all().take(bytes); }
void return_region(void* data) { Regions::all().give_back(data); }
#else
void* take_region(int64_t) { return nullptr; }
void return_region(void*) {}
#endif

}  // namespace torchfast

// Python calls these by ctypes: the library knows no Python.
extern "C" TORCHFAST_EXPORT void torchfast_empty_cache() {
#if defined(__linux__)
  torchfast::Regions::all().empty();
#endif
}

// Writes bytes in use, bytes kept, the most bytes that were in use, regions that were mapped, and how often
// one was used again.
extern "C" TORCHFAST_EXPORT void torchfast_memory_stats(int64_t* out) {
#if defined(__linux__)
  torchfast::Regions::all().stats(out);
#else
  for (int i = 0; i < 5; ++i) out[i] = 0;
#endif
}
