// Implements what torch/tensor.h declares.
#include "torch/tensor.h"

#include <numeric>

#include "memory/regions.h"
#include "symbols.h"

namespace torchfast {
namespace {

// The stable ABI's function, which a library for torch 2.10 must look up.
using FromBlob = AOTITorchError (*)(void* data, int64_t dims, const int64_t* sizes, const int64_t* strides,
                                    int64_t offset, int32_t dtype, int32_t device_type, int32_t device_index,
                                    AtenTensorHandle* made, int32_t layout, const uint8_t* metadata,
                                    int64_t metadata_size, void (*deleter)(void* data, void* context),
                                    void* context);

FromBlob from_blob() {
  static const auto found = reinterpret_cast<FromBlob>(find_symbol("libtorch_cpu.so", "torch_from_blob"));
  return found;
}

// True if the elements fill a piece of memory, each once, in whatever order.
bool is_dense(const View& view) {
  std::vector<int64_t> dims(view.dims);
  std::iota(dims.begin(), dims.end(), 0);
  std::sort(dims.begin(), dims.end(), [&](int64_t a, int64_t b) { return view.stride(a) < view.stride(b); });
  int64_t step = 1;
  for (int64_t d : dims) {
    if (view.size(d) == 1) continue;
    if (view.stride(d) != step) return false;
    step *= view.size(d);
  }
  return true;
}

}  // namespace

Tensor empty_like(const Tensor& tensor, ScalarType dtype) {
  View view = view_of(tensor);
  int64_t bytes = view.elements * size_of(*type_of(dtype));
  if (bytes >= kLeastRegion && tensor.is_cpu() && from_blob() && is_dense(view)) {
    if (void* data = take_region(bytes)) {
      AtenTensorHandle made;
      AOTITorchError failed = from_blob()(
          data, view.dims, view.sizes, view.strides, 0,
          torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
          aoti_torch_device_type_cpu(), tensor.get_device_index(), &made, aoti_torch_layout_strided(),
          nullptr, 0, [](void* data, void*) { return_region(data); }, nullptr);
      if (!failed) return Tensor(made);
      return_region(data);
    }
  }
  std::array<StableIValue, 6> stack{};
  stack[0] = torch::stable::detail::from(tensor);
  stack[1] = torch::stable::detail::from(std::optional(dtype));
  for (size_t i = 2; i < stack.size(); ++i) stack[i] = torch::stable::detail::from(std::nullopt);
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace torchfast
