// Tensors of one shape, walked together element by element, in one order of the dimensions. Where a
// tensor is one dense run in that order (as all of them are in most calls) a kernel reads its memory;
// others are gathered tile by tile, in cache.
//
// No include guard: the contents are compiled once per instruction set, in its namespace.
#include <numeric>

namespace torchfast::TORCHFAST_ISA {
namespace {

// The leader's dimensions from the slowest to the fastest: a dense tensor is one run in this order.
// Expanded ones (stride 0) come first: last, they would tear every other tensor apart.
inline std::vector<int64_t> memory_order(const Tensor& leader) {
  std::vector<int64_t> order(leader.dim());
  std::iota(order.begin(), order.end(), 0);
  auto step = [&](int64_t d) { return leader.stride(d) == 0 ? INT64_MAX : leader.stride(d); };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return step(a) > step(b); });
  return order;
}

// A shape whose dimensions are walked in some order, the last of them fastest.
struct Order {
  Order(const Tensor& shape_of, const std::vector<int64_t>& in_order) : dims(in_order) {
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
  Strides(const Order& order, const Tensor& tensor)
      : Strides(order, [&](int64_t d) { return d < tensor.dim() ? tensor.stride(d) : 0; }) {}

  bool is_dense() const { return dims_.size() == 1 && dims_[0].stride == 1; }

  // f(offset, stride, count) for each run of the elements i .. i+n-1.
  template <class F>
  TORCHFAST_INLINE void for_each_run(int64_t i, int64_t n, const F& f) const {
    constexpr size_t kMaxDims = 64;  // of any torch tensor
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
    copy(std::integral_constant<int64_t, 1>{});  // which GCC vectorises
}

// A tensor that a kernel reads as elements of type To: float or double, int64_t, or uint8_t for bool.
template <class To>
class Operand {
 public:
  Operand(const Order& order, const Tensor& tensor) : tensor_(readable(tensor)), strides_(order, tensor_) {}

  // Elements i .. i+n-1, in memory or else gathered in `buffer`.
  const To* read(int64_t i, int64_t n, To* buffer) const {
    if (tensor_.scalar_type() == ScalarType::Bool) return read(data<uint8_t>(tensor_), i, n, buffer);
    if constexpr (std::is_same_v<To, int64_t>)
      return with_index_type(tensor_, [&](auto* p) { return read(p, i, n, buffer); });
    else if constexpr (std::is_floating_point_v<To>)
      return with_float_type(tensor_, [&](auto* p) { return read(p, i, n, buffer); });
    return nullptr;  // uint8_t reads bool alone
  }

 private:
  static Tensor readable(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
      case ScalarType::Float:
      case ScalarType::BFloat16:
      case ScalarType::Half:
      case ScalarType::Double:
      case ScalarType::Bool: return tensor;
      default: return std::is_floating_point_v<To> ? torch::stable::to(tensor, real_type<To>) : tensor;
    }
  }
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

  Tensor tensor_;
  Strides strides_;
};

}  // namespace
}  // namespace torchfast::TORCHFAST_ISA
