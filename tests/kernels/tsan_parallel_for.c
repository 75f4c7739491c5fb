/* What ThreadSanitizer cannot see, as torch is not built with it: that torch's threads start after the call
   and end before it returns. Preloaded, this takes the place of the function by which the kernels use those
   threads. */
#include <dlfcn.h>
#include <stdint.h>

void __tsan_acquire(void*);
void __tsan_release(void*);

typedef void (*Body)(int64_t begin, int64_t end, void* context);
typedef int32_t (*ParallelFor)(int64_t begin, int64_t end, int64_t grain, Body, void* context);
struct Call {
  Body body;
  void* context;
  char start, finish;
};

static void run(int64_t begin, int64_t end, void* context) {
  struct Call* call = context;
  __tsan_acquire(&call->start);
  call->body(begin, end, call->context);
  __tsan_release(&call->finish);
}

int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, Body body, void* context) {
  ParallelFor real =
      (ParallelFor)dlsym(dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD), "torch_parallel_for");
  struct Call call = {body, context, 0, 0};
  __tsan_release(&call.start);
  int32_t error = real(begin, end, grain, run, &call);
  __tsan_acquire(&call.finish);
  return error;
}
