// A view's elements by their own type, as template arguments.
#if defined(TORCHFAST_MEMORY_ELEMENTS_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_MEMORY_ELEMENTS_INL_H
#undef TORCHFAST_MEMORY_ELEMENTS_INL_H
#else
#define TORCHFAST_MEMORY_ELEMENTS_INL_H
#endif

#include <stdexcept>
#include <string>

#include "memory/view.h"
#include "simd/vec-inl.h"

TORCHFAST_KERNELS

// Dtypes that a kernel does not read end here, whatever the checks before it have let through: torch has
// many, and more with each release.
[[noreturn]] inline void refuse_dtype(const char* allowed) {
  throw std::invalid_argument(std::string("a tensor must be of ") + allowed);
}

// Calls f with the data of integers as a pointer to their own type.
template <class F>
auto with_index_type(const View& x, const F& f) {
  const void* p = x.data;
  switch (x.type) {
    case Type::i32: return f(static_cast<const int32_t*>(p));
    case Type::i16: return f(static_cast<const int16_t*>(p));
    case Type::i8: return f(static_cast<const int8_t*>(p));
    case Type::u8: return f(static_cast<const uint8_t*>(p));
    case Type::u16: return f(static_cast<const uint16_t*>(p));
    case Type::u32: return f(static_cast<const uint32_t*>(p));
    case Type::i64:
    case Type::u64: return f(static_cast<const int64_t*>(p));  // large values are negative here
    default: refuse_dtype("an integer dtype");
  }
}

constexpr const char* kFloats = "float32, bfloat16, float16 or float64";

// Calls f with the data of floats as a pointer to their own type.
template <class F>
auto with_float_type(const View& x, const F& f) {
  const void* p = x.data;
  switch (x.type) {
    case Type::f32: return f(static_cast<const float*>(p));
    case Type::bf16: return f(static_cast<const bf16*>(p));
    case Type::f16: return f(static_cast<const f16*>(p));
    case Type::f64: return f(static_cast<const double*>(p));
    default: refuse_dtype(kFloats);
  }
}

template <class F>
auto with_logits_type(const View& logits, const F& f) {
  switch (logits.type) {
    case Type::f32: return f(float{}, float{});
    case Type::bf16: return f(bf16{}, float{});
    case Type::f16: return f(f16{}, float{});
    case Type::f64: return f(double{}, double{});
    default: refuse_dtype(kFloats);
  }
}

TORCHFAST_END_KERNELS

#endif
