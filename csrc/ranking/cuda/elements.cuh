// Elements of scores and targets, whose type is known when the kernel runs, and a query's row of them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "ranking/cuda/pass.cuh"

namespace torchfast::ranking {
namespace {

template <class To, class From>
__device__ To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof(To));
  return y;
}

__device__ inline double from_half(unsigned bits) {
  int exponent = bits >> 10 & 31, fraction = bits & 1023;
  double y = exponent == 31  ? (fraction ? NAN : INFINITY)
             : exponent == 0 ? ldexp(double(fraction), -24)
                             : ldexp(double(fraction + 1024), exponent - 25);
  return bits >> 15 ? -y : y;
}

// Converts an element's bits to the number that they are in its type.
template <class U>
__device__ double to_double(U bits, Type type) {
  if constexpr (sizeof(U) == 1) return type != Type::i8 ? double(bits) : double(int8_t(bits));
  if constexpr (sizeof(U) == 2) {
    if (type == Type::i16) return double(int16_t(bits));
    return type == Type::f16 ? from_half(bits) : double(bits_as<float>(unsigned(bits) << 16));
  }
  if constexpr (sizeof(U) == 4)
    return type == Type::i32 ? double(int32_t(bits)) : double(bits_as<float>(bits));
  if constexpr (sizeof(U) == 8) return type == Type::i64 ? double(int64_t(bits)) : bits_as<double>(bits);
}

// Calls f with a zero of the elements' size.
template <class F>
__device__ auto with_size(Type type, const F& f) {
  switch (size_of(type)) {
    case 1: return f(uint8_t{});
    case 2: return f(uint16_t{});
    case 4: return f(uint32_t{});
    default: return f(uint64_t{});
  }
}

// It is not inlined, since many places call it, none of them hot.
__device__ __noinline__ double element(const char* row, int64_t at, Type type) {
  return with_size(type, [&](auto zero) {
    return to_double(__ldg(reinterpret_cast<const decltype(zero)*>(row) + at), type);
  });
}

// Larger scores have smaller keys; all NaN have the largest. U has the size of the score.
template <class U>
using Key = std::conditional_t<sizeof(U) == 8, uint64_t, uint32_t>;

template <class U>
__device__ Key<U> key_of(U bits, U infinity) {
  constexpr U sign = U(1) << (sizeof(U) * 8 - 1);
  if (U(bits & ~sign) > infinity) return Key<U>(U(~U(0)));
  if (bits == sign) bits = 0;  // -0 has the key of 0
  return Key<U>(bits & sign ? bits : U(bits ^ U(~sign)));
}

template <class U>
__device__ constexpr U infinity_of(Type type) {
  if (sizeof(U) == 8) return U(0x7ff0000000000000);
  if (sizeof(U) == 4) return U(0x7f800000);
  return type == Type::f16 ? U(0x7c00) : U(0x7f80);
}

struct Row {
  const char *scores, *targets, *mask, *unretrieved;
  int n, unretrieved_count;  // documents, padding included; targets that were not retrieved
  int64_t place;             // where its part of the working memory begins
  bool bad;
};

__device__ inline Row row_of(const Call& c, int64_t q) {
  Row row{};
  int64_t first = c.offsets ? c.offsets[q] : q, n = c.offsets ? c.offsets[q + 1] - first : c.width;
  row.place = c.offsets ? first : q * c.width;
  row.scores = c.preds.from(first);
  row.targets = c.target.from(first);
  if (c.mask.data) row.mask = c.mask.from(first);
  if (c.lengths) {
    row.bad |= c.lengths[q] < 0 || c.lengths[q] > n;
    n = c.lengths[q];
  }
  row.bad |= n > INT32_MAX || (c.num_relevant && c.num_relevant[q] < 0);
  if (c.unretrieved_offsets) {
    int64_t begin = c.unretrieved_offsets[q], count = c.unretrieved_offsets[q + 1] - begin;
    row.unretrieved = c.unretrieved.from(begin);
    row.place += begin;
    row.bad |= count > INT32_MAX - n;
    row.unretrieved_count = int(count);
  }
  row.n = int(n);
  if (row.bad) row.n = row.unretrieved_count = 0;
  return row;
}

__device__ inline double target_of(const Call& c, const Row& row, int64_t i) {
  return element(row.targets, i * c.target.stride, c.target.type);
}
__device__ inline double unretrieved_target_of(const Call& c, const Row& row, int64_t i) {
  return element(row.unretrieved, i * c.unretrieved.stride, c.unretrieved.type);
}

enum class Size { warp, block, huge };

__device__ inline Size size_of_query(const Call& c, int64_t q) {
  int64_t n = c.offsets ? c.offsets[q + 1] - c.offsets[q] : c.width;
  int64_t unretrieved = c.unretrieved_offsets ? c.unretrieved_offsets[q + 1] - c.unretrieved_offsets[q] : 0;
  return n > kHuge ? Size::huge : n + unretrieved > kWarpDocuments ? Size::block : Size::warp;
}

}  // namespace
}  // namespace torchfast::ranking
