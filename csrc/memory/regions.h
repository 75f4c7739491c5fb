// Memory of large outputs that is used again. A fresh output costs more in page faults than a loss and its
// gradient cost in arithmetic: 262 MB are 64,000 small pages, or 131 huge ones, which a virtual machine may
// have to fetch from its host first.
#pragma once

#include <cstdint>

namespace torchfast {

// Outputs of fewer bytes are left to the system's allocator, which keeps their memory itself.
constexpr int64_t kLeastRegion = int64_t{4} << 20;

// Gives memory for an output, or null where none is to be had: the caller allocates as ever.
// It must be given back by return_region, from whichever thread.
void* take_region(int64_t bytes);
void return_region(void* data);

}  // namespace torchfast
