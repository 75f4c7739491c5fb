// Implements memory/parallel.h with torch's threads.
#include "memory/parallel.h"

#include "torch/compat.h"

namespace torchfast {

int64_t thread_count() { return torch::stable::get_num_threads(); }

void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*work)(const void*, int64_t, int64_t),
                  const void* context) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) { work(context, from, to); });
}

}  // namespace torchfast
