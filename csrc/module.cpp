// torchfast._C: what this binary holds. The kernels register themselves when it loads.
#include <pybind11/pybind11.h>

#include "common.h"

#ifdef TORCHFAST_WITH_CUDA
#include "cuda/symbols.h"

extern "C" const char* torchfast_cuda_probe(int device, int* arch);
#endif

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of torchfast; importing it registers them.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = TORCHFAST_COMPILER;
        info["built_with_torch"] = TORCHFAST_BUILT_WITH_TORCH;
        info["cuda_archs"] = TORCHFAST_CUDA_ARCHS;
        auto isa = torchfast::isa();
        using torchfast::Isa;
        info["simd"] = isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline";
        return info;
      },
      "Compiler, torch version, CUDA architectures ('' without CUDA) and this machine's SIMD level.");
#ifdef TORCHFAST_WITH_CUDA
  m.def(
      "cuda_probe",
      [](int device) {
        int arch = 0;
        const char* error = torchfast_cuda_probe(device, &arch);
        if (error) throw std::runtime_error(error);
        return arch;
      },
      py::arg("device") = 0,
      "Runs this binary's device code on a GPU; returns the architecture it was compiled for.");
  m.def(
      "has_symbol",
      [](const std::string& library, const std::string& symbol) {
        return torchfast::find_symbol(library.c_str(), symbol.c_str()) != nullptr;
      },
      py::arg("library"), py::arg("symbol"),
      "Whether this binary finds a function of a loaded library, as it must torch's CUDA stream.");
#endif
}
