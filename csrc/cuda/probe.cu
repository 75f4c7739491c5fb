// Does this binary's device code run on this GPU? Writes the architecture the code was compiled
// for, so that `python -m torchfast.info` can say which of the embedded ones the driver picked.
#include <cuda_runtime.h>

__global__ void write_arch(int* arch) {
#ifdef __CUDA_ARCH__
  *arch = __CUDA_ARCH__ / 10;
#endif
}

extern "C" const char* torchfast_cuda_probe(int device, int* arch) {
  int previous = 0;
  int* on_device = nullptr;
  cudaError_t error = cudaGetDevice(&previous);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    error = cudaMalloc(&on_device, sizeof(int));
    if (error == cudaSuccess) {
      write_arch<<<1, 1>>>(on_device);
      error = cudaGetLastError();
      if (error == cudaSuccess) error = cudaMemcpy(arch, on_device, sizeof(int), cudaMemcpyDeviceToHost);
      cudaFree(on_device);
    }
    cudaSetDevice(previous);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
