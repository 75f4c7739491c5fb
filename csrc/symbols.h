// Functions of libraries that this binary must not link with, because not every torch has them; and its own
// ones that others find by name.
#pragma once

#include <dlfcn.h>

#define TORCHFAST_EXPORT __attribute__((visibility("default")))

namespace torchfast {

// Finds a symbol of a library that is loaded, or else of the program; null if there is none. The library must
// be named because RTLD_DEFAULT does not see torch's: Python loads them with RTLD_LOCAL.
inline void* find_symbol(const char* library, const char* symbol) {
  void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  return dlsym(handle ? handle : RTLD_DEFAULT, symbol);
}

}  // namespace torchfast
