// Gives ranking.cu to PyTorch's dispatcher. The emulator's build (tests/cuda_emulator) gives its own to the
// CPU.
#if defined(TORCHFAST_WITH_CUDA) || defined(TORCHFAST_EMULATED)

#include "../ranking_op.h"
#include "ranking_launch.h"

#ifndef TORCHFAST_EMULATED
#include <torch/csrc/stable/accelerator.h>

#include "../symbols.h"
#endif

namespace torchfast::ranking {
namespace {

// None: not one that the kernels read.
std::optional<Type> type_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Bool:
    case ScalarType::Byte: return u8;
    case ScalarType::Char: return i8;
    case ScalarType::Short: return i16;
    case ScalarType::Int: return i32;
    case ScalarType::Long: return i64;
    case ScalarType::Half: return f16;
    case ScalarType::BFloat16: return bf16;
    case ScalarType::Float: return f32;
    case ScalarType::Double: return f64;
    default: return std::nullopt;
  }
}

Elements elements_of(const Tensor& x) {
  return {static_cast<const char*>(x.const_data_ptr()), x.stride(0), x.stride(x.dim() - 1),
          type_of(x.scalar_type()).value()};
}

// Of a dtype that the kernels read.
Tensor readable(const Tensor& x) {
  return type_of(x.scalar_type()) ? x : torch::stable::to(x, ScalarType::Double);
}

#ifdef TORCHFAST_EMULATED
void* current_stream(const Tensor&) { return nullptr; }
struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor&) {}
};
#else
void* current_stream(const Tensor& x) {
  using Current = AOTITorchError (*)(int32_t, void**);
  static const auto current =
      reinterpret_cast<Current>(find_symbol("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream"));
  STD_TORCH_CHECK(current, "this torch has CUDA tensors, but not aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(current(x.get_device_index(), &stream));
  return stream;
}
struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor& x) : guard(x.get_device_index()) {}
  torch::stable::accelerator::DeviceGuard guard;
};
#endif

void evaluate(const Arguments& a, double* values, bool* empty) {
  OnDeviceOf guard(a.preds);
  std::vector<Tensor> kept;  // until all is launched; then the stream's order keeps their memory
  auto numbers = [&](const std::optional<Tensor>& x) -> const int64_t* {
    if (!x) return nullptr;
    kept.push_back(as_contiguous(*x, ScalarType::Long));
    return static_cast<const int64_t*>(kept.back().const_data_ptr());
  };
  auto targets = [&](const Tensor& x) {
    kept.push_back(readable(x));
    return elements_of(kept.back());
  };
  switch (a.preds.scalar_type()) {
    case ScalarType::Float:
    case ScalarType::Double:
    case ScalarType::Half:
    case ScalarType::BFloat16: break;
    default: STD_TORCH_CHECK(false, "preds must be float32, bfloat16, float16 or float64");
  }
  Call call{};
  call.preds = elements_of(a.preds);
  call.target = targets(a.target);
  if (a.mask) call.mask = elements_of(*a.mask);
  if (a.unretrieved) call.others = targets(*a.unretrieved);
  call.offsets = numbers(a.offsets);
  call.lengths = numbers(a.lengths);
  call.num_relevant = numbers(a.num_relevant);
  call.other_offsets = numbers(a.unretrieved_offsets);
  call.queries = a.queries();
  call.width = a.flat() ? 0 : a.preds.size(1);
  call.documents = a.preds.numel();
  call.other_documents = a.unretrieved ? a.unretrieved->numel() : 0;
  call.options = a.options;
  call.values = values;
  call.empty = empty;
  Tensor working = new_empty(a.preds, {int64_t(working_bytes(call))}, ScalarType::Byte);
  const char* problem = launch(call, a.kinds.data(), a.ks.data(), int64_t(a.kinds.size()),
                               working.mutable_data_ptr(), current_stream(a.preds));
  STD_TORCH_CHECK(!problem, "ranking_metrics: ", problem ? problem : "");
}

}  // namespace
}  // namespace torchfast::ranking

#ifdef TORCHFAST_EMULATED
#define TORCHFAST_DEVICE CPU
#else
#define TORCHFAST_DEVICE CUDA
#endif
STABLE_TORCH_LIBRARY_IMPL(torchfast, TORCHFAST_DEVICE, m) {
  m.impl("ranking_metrics", TORCH_BOX(&torchfast::ranking::ranking_metrics<torchfast::ranking::evaluate>));
}

#endif
