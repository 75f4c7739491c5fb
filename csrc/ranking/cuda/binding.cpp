// Gives ranking.cu to PyTorch's dispatcher. The emulator's build (tests/kernels/cuda_emulator) gives its own
// to the CPU.
#if defined(TORCHFAST_WITH_CUDA) || defined(TORCHFAST_EMULATED)

#include "ranking/cuda/launch.h"
#include "ranking/op.h"

#ifndef TORCHFAST_EMULATED
#include <torch/csrc/stable/accelerator.h>

#include "symbols.h"
#endif

namespace torchfast::ranking {
namespace {

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

void run(const Call& call, const Tensor& preds) {
  OnDeviceOf guard(preds);
  Tensor working = new_empty(preds, {int64_t(working_bytes(call))}, ScalarType::Byte);
  const char* problem = launch(call, working.mutable_data_ptr(), current_stream(preds));
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
  m.impl("ranking_metrics", TORCH_BOX(&torchfast::ranking::ranking_metrics<torchfast::ranking::run>));
}

#endif
