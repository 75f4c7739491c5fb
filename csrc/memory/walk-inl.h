// Tensors of one shape, walked together element by element, in one order of the dimensions. Where a
// tensor is one dense run in that order (as all of them are in most calls) a kernel reads its memory;
// others are gathered tile by tile, in cache.
#if defined(TORCHFAST_MEMORY_WALK_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_MEMORY_WALK_INL_H
#undef TORCHFAST_MEMORY_WALK_INL_H
#else
#define TORCHFAST_MEMORY_WALK_INL_H
#endif

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <type_traits>
#include <vector>

#include "memory/elements-inl.h"

TORCHFAST_KERNELS

// The leader's dimensions from the slowest to the fastest: a dense tensor is one run in this order.
// Expanded ones (stride 0) come first: as the last ones they would tear every other tensor apart.
inline std::vector<int64_t> memory_order(const View& leader) {
  std::vector<int64_t> order(leader.dims);
  std::iota(order.begin(), order.end(), 0);
  auto step = [&](int64_t d) { return leader.stride(d) == 0 ? INT64_MAX : leader.stride(d); };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return step(a) > step(b); });
  return order;
}

// The dimensions as they are numbered, but for one.
inline std::vector<int64_t> logical_order(const View& shape_of, int64_t without = -1) {
  std::vector<int64_t> order;
  for (int64_t d = 0; d < shape_of.dims; ++d)
    if (d != without) order.push_back(d);
  return order;
}

// A shape whose dimensions are walked in some order, the last of them fastest.
struct Order {
  Order(const View& shape_of, const std::vector<int64_t>& in_order) : dims(in_order) {
    for (int64_t d : dims) sizes.push_back(shape_of.size(d));
  }
  void drop_last() {
    dims.pop_back();
    sizes.pop_back();
  }
  std::vector<int64_t> dims, sizes;
};

// Where the elements lie. Neighbouring dimensions that one stride can walk are merged.
class Strides {
 public:
  template <class StrideOf>
  Strides(const Order& order, const StrideOf& stride_of) {
    for (size_t i = 0; i < order.dims.size(); ++i) {
      int64_t size = order.sizes[i], stride = stride_of(order.dims[i]);
      if (size == 1) continue;
      if (!dims_.empty() && dims_.back().stride == stride * size)
        dims_.back() = {dims_.back().size * size, stride};
      else
        dims_.push_back({size, stride});
    }
    if (dims_.empty()) dims_.push_back({1, 1});
  }
  // Dimensions that the tensor does not have, the last ones, are expanded.
  Strides(const Order& order, const View& view)
      : Strides(order, [&](int64_t d) { return d < view.dims ? view.stride(d) : 0; }) {}

  bool is_dense() const { return dims_.size() == 1 && dims_[0].stride == 1; }

  int64_t offset(int64_t i) const {
    int64_t result = 0;
    for (size_t d = dims_.size(); d-- > 1; i /= dims_[d].size) result += i % dims_[d].size * dims_[d].stride;
    return result + i * dims_[0].stride;
  }

  // Calls f(offset, stride, count) for each run of the elements i .. i+n-1.
  template <class F>
  TORCHFAST_INLINE void for_each_run(int64_t i, int64_t n, const F& f) const {
    constexpr size_t kMaxDims = 64;  // no torch tensor has more
    int64_t at[kMaxDims], offset = 0;
    size_t inner = dims_.size() - 1;
    for (size_t d = inner; d > 0; i /= dims_[d--].size) {
      at[d] = i % dims_[d].size;
      offset += at[d] * dims_[d].stride;
    }
    at[0] = i;
    offset += i * dims_[0].stride;
    while (n > 0) {
      int64_t count = std::min(n, dims_[inner].size - at[inner]);
      f(offset, dims_[inner].stride, count);
      n -= count;
      at[inner] += count;
      offset += count * dims_[inner].stride;
      for (size_t d = inner; d > 0 && at[d] == dims_[d].size; --d) {
        offset += dims_[d - 1].stride - at[d] * dims_[d].stride;
        at[d] = 0;
        ++at[d - 1];
      }
    }
  }

 private:
  struct Dim {
    int64_t size, stride;
  };
  std::vector<Dim> dims_;
};

template <class To, class From>
TORCHFAST_INLINE To element_as(From x) {
  if constexpr (std::is_same_v<To, From> || std::is_integral_v<From>)
    return To(x);
  else
    return To(to_real(x));
}

template <class To, class From>
void gather(const From* p, int64_t stride, int64_t n, To* out) {
  auto copy = [&](auto step) __attribute__((always_inline)) {
    for (int64_t j = 0; j < n; ++j) out[j] = element_as<To>(p[j * step]);
  };
  if (stride == 0)
    std::fill_n(out, n, element_as<To>(*p));
  else if (stride != 1)
    copy(stride);
  else if constexpr (std::is_same_v<To, float> && (std::is_same_v<From, bf16> || std::is_same_v<From, f16>))
    convert<float>(p, out, n);
  else
    copy(std::integral_constant<int64_t, 1>{});  // GCC vectorises this one
}

template <class To, class From>
void scatter(const From* p, int64_t n, To* out, int64_t stride) {
  if (stride == 1)
    convert<From>(p, out, n);
  else
    for (int64_t j = 0; j < n; ++j) from_real(out + j * stride, p[j]);
}

// A tensor that a kernel reads as elements of type To: float or double, int64_t, or uint8_t for bool.
template <class To>
class Operand {
 public:
  Operand(const Order& order, const View& view) : view_(view), strides_(order, view) {}

  // Returns elements i .. i+n-1 where they lie, or gathered in `buffer` if they are no dense run.
  const To* read(int64_t i, int64_t n, To* buffer) const {
    if (view_.type == Type::boolean) return read(view_.as<uint8_t>(), i, n, buffer);
    if constexpr (std::is_same_v<To, int64_t>)
      return with_index_type(view_, [&](auto* p) { return read(p, i, n, buffer); });
    else if constexpr (std::is_floating_point_v<To>)
      return with_float_type(view_, [&](auto* p) { return read(p, i, n, buffer); });
    refuse_dtype("bool");
  }

 private:
  template <class From>
  const To* read(const From* p, int64_t i, int64_t n, To* buffer) const {
    if constexpr (std::is_same_v<From, To>)
      if (strides_.is_dense()) return p + i;
    To* to = buffer;
    strides_.for_each_run(i, n, [&](int64_t offset, int64_t stride, int64_t count) {
      gather(p + offset, stride, count, to);
      to += count;
    });
    return buffer;
  }

  View view_;
  Strides strides_;
};

TORCHFAST_END_KERNELS

#endif
