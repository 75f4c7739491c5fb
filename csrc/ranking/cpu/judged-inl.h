// Judged documents: those whose target says something.
#if defined(TORCHFAST_RANKING_CPU_JUDGED_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_RANKING_CPU_JUDGED_INL_H
#undef TORCHFAST_RANKING_CPU_JUDGED_INL_H
#else
#define TORCHFAST_RANKING_CPU_JUDGED_INL_H
#endif

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>

#include "memory/buffer.h"
#include "memory/elements-inl.h"
#include "ranking/call.h"
#include "simd/vec-inl.h"

TORCHFAST_KERNELS

// The documents of a query that matter: those of target > 0, or all (ranking::zero_is_nothing).
struct Judged {
  int64_t count = 0;
  bool wrong = false;  // a target is illegal
  Buffer<int32_t> at;  // ascending
  Buffer<double> y;

  void clear() { count = 0, wrong = false; }
  void append(const Judged& other) {
    std::copy_n(other.at.get(), other.count, at.need(count + other.count, count) + count);
    std::copy_n(other.y.get(), other.count, y.need(count + other.count, count) + count);
    count += other.count;
    wrong |= other.wrong;
  }
};

template <int size>
using Signed = std::conditional_t<
    size == 8, int64_t,
    std::conditional_t<size == 4, int32_t, std::conditional_t<size == 2, int16_t, int8_t>>>;

// Appends the judged ones of documents begin .. end-1, whose targets are `stride` apart.
template <class T>
void find_judged(const void* targets, int64_t stride, int64_t begin, int64_t end, const ranking::Options& o,
                 Judged& found) {
  constexpr int64_t kLook = 64;  // documents looked at together
  constexpr int L = TORCHFAST_VECTOR_BYTES / sizeof(T);
  typedef Signed<sizeof(T)> V __attribute__((vector_size(TORCHFAST_VECTOR_BYTES)));
  const T* y = static_cast<const T*>(targets);
  auto nonzero = [=](int64_t from) __attribute__((always_inline)) {
    V v;
    __builtin_memcpy(&v, y + from, sizeof(v));
    return nonzero_bits(v);
  };
  bool skip_zeros = ranking::zero_is_nothing(o), wrong = false;
  int64_t count = found.count;
  for (int64_t i = begin; i < end; i += kLook) {
    int64_t n = std::min(kLook, end - i);
    uint64_t look = 0;  // documents whose target has bits that are not 0
    if (skip_zeros && stride == 1 && end - begin >= L) {
      for (int64_t j = 0; j < n; j += L) {
        int64_t from = std::min(i + j, end - L);  // the last vector may overlap the one before
        uint64_t bits = nonzero(from);
        look |= from < i ? bits >> (i - from) : bits << (from - i);
      }
    } else {
      look = n == kLook ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
    }
    if (!look) continue;
    int32_t* at = found.at.need(count + kLook, count);
    double* value = found.y.need(count + kLook, count);
    int64_t before = count;
    // Zeros are dropped later: if the next place waited for the value, this would take twice as long.
    bool zeros = false;
    for (; look; look &= look - 1) {
      int64_t j = i + std::countr_zero(look);
      double v;
      if constexpr (std::is_integral_v<T>)
        v = double(y[j * stride]);
      else
        v = double(to_real(y[j * stride]));
      at[count] = int32_t(j);
      value[count++] = v;
      wrong |= !ranking::is_target(v, o);
      zeros |= v == 0;
    }
    if (!skip_zeros || !zeros) continue;
    int64_t kept = before;
    for (int64_t c = before; c < count; ++c) {
      at[kept] = at[c], value[kept] = value[c];
      kept += value[c] > 0;
    }
    count = kept;
  }
  found.count = count;
  found.wrong |= wrong;
}

// Copies those of the n elements that the mask keeps, and returns their number.
template <class T>
int64_t keep(const void* from, int64_t stride, const bool* mask, int64_t mask_stride, int64_t n, void* to) {
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    static_cast<T*>(to)[kept] = static_cast<const T*>(from)[i * stride];
    kept += mask[i * mask_stride];
  }
  return kept;
}

// Reads targets, whose type is known when the op is called.
struct Targets {
  explicit Targets(const ranking::Elements& given) : elements(given) {
    auto choose = [&](auto* typed) {
      using T = std::remove_cvref_t<decltype(*typed)>;
      find = find_judged<T>;
      keep = TORCHFAST_ISA::keep<T>;
    };
    View view{nullptr, given.type};
    if (given.type == Type::boolean)
      choose(static_cast<const uint8_t*>(nullptr));
    else if (is_integer(given.type))
      with_index_type(view, choose);
    else
      with_float_type(view, choose);
  }

  const ranking::Elements& elements;
  decltype(&find_judged<float>) find;
  decltype(&TORCHFAST_ISA::keep<float>) keep;
};

TORCHFAST_END_KERNELS

#endif
