// Tensors on torch's side: checks, conversions, outputs, and how they become the views that kernels take.
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "memory/view.h"
#include "torch/compat.h"

namespace torchfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Knows the dtypes that kernels read: torch has many others, and more with each release.
inline std::optional<Type> type_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Bool: return Type::boolean;
    case ScalarType::Byte: return Type::u8;
    case ScalarType::Char: return Type::i8;
    case ScalarType::UInt16: return Type::u16;
    case ScalarType::Short: return Type::i16;
    case ScalarType::UInt32: return Type::u32;
    case ScalarType::Int: return Type::i32;
    case ScalarType::UInt64: return Type::u64;
    case ScalarType::Long: return Type::i64;
    case ScalarType::Half: return Type::f16;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Float: return Type::f32;
    case ScalarType::Double: return Type::f64;
    default: return std::nullopt;
  }
}
inline bool is_floating(const Tensor& x) {
  auto type = type_of(x.scalar_type());
  return type && is_floating(*type);
}
inline bool is_integer(const Tensor& x) {
  auto type = type_of(x.scalar_type());
  return type && is_integer(*type);
}

// The tensor must outlive the view.
inline View view_of(const Tensor& x) {
  auto type = type_of(x.scalar_type());
  STD_TORCH_CHECK(type, "a tensor has a dtype that the kernels do not read");
  auto sizes = x.sizes(), strides = x.strides();
  return {const_cast<void*>(x.const_data_ptr()), *type, x.dim(), x.numel(), sizes.data(), strides.data()};
}
inline View view_of(const OptionalTensor& x) { return x ? view_of(*x) : View{}; }
// Views a tensor that the kernel writes to.
inline View output_of(Tensor& x) {
  View view = view_of(x);
  view.data = x.mutable_data_ptr();
  return view;
}

inline Tensor as_contiguous(const Tensor& x, ScalarType dtype) {
  Tensor converted = x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
  return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
}

// Makes a contiguous tensor on the device of `like`. torch::stable::new_empty, which looks the operator up by
// its name each time and calls it with boxed arguments, took a sixth of a small call whose code had left the
// caches.
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

// Makes a tensor of the given one's shape, layout and device. A large one has memory that is used again,
// where torch can be told what to do with it in the end (from 2.11 on).
Tensor empty_like(const Tensor& tensor, ScalarType dtype);

}  // namespace torchfast
