// What ranking.cu, which knows no torch, offers to its binding.
#pragma once

#include <cstddef>

#include "ranking/call.h"

namespace torchfast::ranking {

// Bytes of device memory that `launch` works in, not initialised.
size_t working_bytes(const Call& call);

// Starts the kernels, or says why not.
const char* launch(const Call& call, void* working, void* stream);

}  // namespace torchfast::ranking
