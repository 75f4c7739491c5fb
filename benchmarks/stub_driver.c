/* A CUDA driver that does nothing, for host.py: Triton's own launcher runs down to the call of the driver. The
 * arguments that are not listed are not looked at. */
#include <stddef.h>

typedef int Result;
#define NOTHING(name) Result name(void) { return 0; }
#define HANDLE(name) Result name(void **handle) { *handle = (void *)8; return 0; }

NOTHING(cuDeviceGet)
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxGetLimit)
NOTHING(cuCtxSetLimit)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuFuncSetAttribute)
NOTHING(cuOccupancyMaxActiveClusters)
NOTHING(cuTensorMapEncodeTiled)
NOTHING(cuTensorMapEncodeIm2col)
HANDLE(cuCtxGetCurrent)
HANDLE(cuDevicePrimaryCtxRetain)
HANDLE(cuModuleLoadData)
HANDLE(cuModuleGetFunction)

Result cuGetErrorString(Result error, const char **text) { *text = "none"; return 0; }
Result cuDriverGetVersion(int *version) { *version = 13000; return 0; }
Result cuDeviceGetAttribute(int *value) { *value = 1 << 20; return 0; }  /* of shared memory: enough */
Result cuFuncGetAttribute(int *value, int attribute) { *value = attribute ? 0 : 1024; return 0; }  /* 0: threads */

/* Every pointer is one of the device. */
Result cuPointerGetAttribute(void *data, int attribute, unsigned long long pointer) {
  *(unsigned long long *)data = pointer;
  return 0;
}

static long count;
Result cuLaunchKernelEx(void) { count++; return 0; }
long launches(void) { return count; }
