// Memory that is not initialised and only grows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

namespace torchfast {

template <class T>
class Buffer {
 public:
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_[i]; }
  // Makes room for n elements, of which the first `keep` stay as they are.
  T* need(int64_t n, int64_t keep = 0) {
    if (n > size_) {
      size_ = std::max(n, size_ + size_ / 2);
      std::unique_ptr<T[]> larger(new T[size_]);
      std::copy(get(), get() + keep, larger.get());
      data_ = std::move(larger);
    }
    return get();
  }

 private:
  std::unique_ptr<T[]> data_;
  int64_t size_ = 0;
};

}  // namespace torchfast
