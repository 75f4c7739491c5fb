// What ranking.cu, which knows no torch, offers to its binding.
#pragma once

#include <cstddef>

#include "ranking/call.h"

namespace torchfast::ranking {

// Returns how many bytes of device memory `launch` works in; they need not be initialised.
size_t working_bytes(const Call& call);

// Starts the kernels, or says why not.
const char* launch(const Call& call, void* working, void* stream);

}  // namespace torchfast::ranking
