// What every op's native code shares: positions of a tensor that are walked together, outputs, fresh memory.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <optional>
#include <vector>

#include "isa.h"
#include "torch/compat.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define TORCHFAST_INLINE inline __attribute__((always_inline))

namespace torchfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrainElements = 32768;  // less than this is not worth waking a thread

// Positions (all dimensions but one) of up to three tensors of one shape, in logical order.
// Neighbouring dimensions that every tensor can walk with one stride are merged.
class Positions {
 public:
  Positions(const Tensor& shape_of, int64_t skip_dim, std::array<const Tensor*, 3> tensors) {
    auto sizes = shape_of.sizes();
    for (int64_t d = 0; d < static_cast<int64_t>(sizes.size()); ++d) {
      count_ *= d == skip_dim ? 1 : sizes[d];
      if (d == skip_dim || sizes[d] == 1) continue;
      Dim dim{sizes[d], {}};
      for (int k = 0; k < 3; ++k) dim.stride[k] = tensors[k] ? tensors[k]->stride(d) : 0;
      bool merge = !dims_.empty();
      for (int k = 0; merge && k < 3; ++k) merge = dims_.back().stride[k] == dim.stride[k] * dim.size;
      if (merge) {
        dim.size *= dims_.back().size;
        dims_.back() = dim;
      } else {
        dims_.push_back(dim);
      }
    }
    if (dims_.empty()) dims_.push_back({1, {}});
  }

  int64_t count() const { return count_; }
  int64_t inner_stride(int k) const { return dims_.back().stride[k]; }

  // Element offset of position i in tensor k.
  int64_t offset(int64_t i, int k) const {
    int64_t result = 0;
    for (size_t d = dims_.size(); d-- > 1; i /= dims_[d].size)
      result += (i % dims_[d].size) * dims_[d].stride[k];
    return result + i * dims_[0].stride[k];
  }

  // Whether positions i .. i+n-1 lie at one constant stride.
  bool is_run(int64_t i, int64_t n) const {
    return dims_.size() == 1 || i % dims_.back().size + n <= dims_.back().size;
  }

 private:
  struct Dim {
    int64_t size;
    std::array<int64_t, 3> stride;
  };
  std::vector<Dim> dims_;
  int64_t count_ = 1;
};

inline Tensor as_contiguous(const Tensor& x, ScalarType dtype) {
  Tensor converted = x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
  return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
}

// Contiguous, on the device of `like`. torch::stable::new_empty, which looks the operator up by its name each
// time and calls it with boxed arguments, took a sixth of a small call whose code had left the caches.
inline Tensor new_empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                        ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  int32_t device = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device,
                               like.get_device_index(), &made));
  return Tensor(made);
}

// Of the tensor's shape, layout and device.
inline Tensor empty_like(const Tensor& tensor, ScalarType dtype) {
  std::array<StableIValue, 6> stack{};
  stack[0] = torch::stable::detail::from(tensor);
  stack[1] = torch::stable::detail::from(std::optional(dtype));
  for (size_t i = 2; i < stack.size(); ++i) stack[i] = torch::stable::detail::from(std::nullopt);
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Memory of an output that nobody has written yet. 262 MB of it fault 64,000 small pages, half the time of a
// loss and its gradient. Under transparent_hugepage=madvise (the default of many systems) huge ones must be
// asked for. In a virtual machine whose host has taken free memory back, each of these can cost 3 ms instead
// of 0.15, because it is the large free blocks that are given back. The first ones are often fast: each is
// timed, and from the second slow one on small pages serve. (Waiting until a quarter is slow: 200 ms instead
// of 125 for focal loss of 512 x 128256; never: 65 to 325. Until two of eight are: no difference.)
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

  // To be told, by any thread, before it writes these bytes.
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
