// Functions of libraries that this binary must not link with, because not every torch has them.
#pragma once

#include <dlfcn.h>

namespace torchfast {

// Of a library that is loaded; null: it is not, or has none. RTLD_DEFAULT does not see torch's libraries,
// for Python loads them with RTLD_LOCAL.
inline void* find_symbol(const char* library, const char* symbol) {
  void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  return dlsym(handle ? handle : RTLD_DEFAULT, symbol);
}

}  // namespace torchfast
