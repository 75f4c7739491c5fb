// torchfast._C: what this binary holds. The kernels register themselves when it loads.
#include <pybind11/pybind11.h>

#include <string>

#ifdef TORCHFAST_WITH_CUDA
extern "C" const char* torchfast_cuda_probe(int device, int* arch);
#endif

namespace py = pybind11;

static std::string simd_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) return "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
  return "sse2";
#else
  return "baseline";
#endif
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of torchfast; importing it registers them.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = TORCHFAST_COMPILER;
        info["built_with_torch"] = TORCHFAST_BUILT_WITH_TORCH;
        info["cuda_archs"] = TORCHFAST_CUDA_ARCHS;
        info["simd"] = simd_level();
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
#endif
}
