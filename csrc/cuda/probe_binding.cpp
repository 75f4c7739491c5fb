// The op torchfast::cuda_probe, which torchfast.info calls: the architecture of the device code that a GPU
// runs.
#ifdef TORCHFAST_WITH_CUDA

#include <cstdint>

#include "../torch/compat.h"

extern "C" const char* torchfast_cuda_probe(int device, int* arch);

namespace {

int64_t probe(int64_t device) {
  int arch = 0;
  const char* error = torchfast_cuda_probe(static_cast<int>(device), &arch);
  STD_TORCH_CHECK(!error, "CUDA: ", error ? error : "");
  return arch;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchfast, m) { m.def("cuda_probe(int device) -> int"); }
// The op takes no tensor, so that no device chooses among kernels.
STABLE_TORCH_LIBRARY_IMPL(torchfast, CompositeExplicitAutograd, m) {
  m.impl("cuda_probe", TORCH_BOX(&probe));
}

#endif
