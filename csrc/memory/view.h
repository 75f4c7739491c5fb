// A tensor as the kernels see it, which know no torch: where its elements lie, and what they are.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TORCHFAST_ANYWHERE __host__ __device__  // marks what GPUs call, too
#else
#define TORCHFAST_ANYWHERE
#endif

namespace torchfast {

enum class Type : int { boolean, u8, i8, u16, i16, u32, i32, u64, i64, f16, bf16, f32, f64 };

constexpr bool is_integer(Type type) { return type > Type::boolean && type < Type::f16; }
constexpr bool is_floating(Type type) { return type >= Type::f16; }

// Bytes of an element.
TORCHFAST_ANYWHERE constexpr int size_of(Type type) {
  if (type <= Type::i8) return 1;
  if (type <= Type::i16 || type == Type::f16 || type == Type::bf16) return 2;
  return type <= Type::i32 || type == Type::f32 ? 4 : 8;
}

// Sizes and strides belong to the tensor that is viewed, and live as long as it does. Strides count elements.
struct View {
  void* data = nullptr;
  Type type = Type::f32;
  int64_t dims = 0, elements = 0;
  const int64_t *sizes = nullptr, *strides = nullptr;

  explicit operator bool() const { return strides != nullptr; }  // false where an optional tensor is absent
  int64_t size(int64_t d) const { return sizes[d]; }
  int64_t stride(int64_t d) const { return strides[d]; }
  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
  template <class T>
  T* writable() const {
    return static_cast<T*>(data);
  }
};

}  // namespace torchfast
