// torchfast._C: what was built, for the Python at hand. The kernels are a library of their own, _kernels.so.
#include <pybind11/pybind11.h>

#include "simd/isa.h"
#include "symbols.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "What torchfast's native kernels were built with, and what they find on this machine.";
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
  m.def(
      "has_symbol",
      [](const std::string& library, const std::string& symbol) {
        return torchfast::find_symbol(library.c_str(), symbol.c_str()) != nullptr;
      },
      py::arg("library"), py::arg("symbol"),
      "Whether native code finds a function of a loaded library, as the kernels must torch's CUDA stream.");
}
