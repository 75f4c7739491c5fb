// Memory that is not initialised and only grows. A large one is a region, which the next call takes again:
// the page faults of fresh memory would cost a third of the time in which millions of keys are sorted.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>

#include "memory/regions.h"

namespace torchfast {

template <class T>
class Buffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_[i]; }
  // Makes room for n elements, of which the first `keep` stay as they are.
  T* need(int64_t n, int64_t keep = 0) {
    if (n > size_) {
      size_ = std::max(n, size_ + size_ / 2);
      Memory larger = fresh(size_ * sizeof(T));
      std::copy(get(), get() + keep, larger.get());
      data_ = std::move(larger);
    }
    return get();
  }

 private:
  using Memory = std::unique_ptr<T[], void (*)(void*)>;

  static Memory fresh(int64_t bytes) {
    if (void* region = bytes >= kLeastRegion ? take_region(bytes) : nullptr) {
      return Memory(static_cast<T*>(region), return_region);
    }
    return Memory(static_cast<T*>(::operator new(bytes)), [](void* data) { ::operator delete(data); });
  }

  Memory data_{nullptr, return_region};
  int64_t size_ = 0;
};

}  // namespace torchfast
