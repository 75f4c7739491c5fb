// simd/vec-inl.h against plain scalars.
#define TORCHFAST_FILE "vec.cpp"
#include "simd/foreach_isa.h"

#ifndef VEC_CPP_ONCE
#define VEC_CPP_ONCE
#include <sys/mman.h>
#include <unistd.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"

// A binary float of 16 bits by its definition, in double arithmetic.
struct Format {
  int mantissa, least_exponent, bias;

  double value(uint16_t bits) const {
    int exponent = (bits & 0x7fff) >> mantissa, fraction = bits & ((1 << mantissa) - 1);
    double sign = bits >> 15 ? -1 : 1;
    if (exponent == 2 * bias + 1) return fraction ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(fraction, least_exponent - mantissa);
    return sign * std::ldexp(fraction + (1 << mantissa), exponent - bias - mantissa);
  }
  // nearbyint rounds to nearest, ties to even. A carry moves into the exponent by itself.
  uint16_t bits(float x) const {
    uint16_t sign = std::signbit(x) ? 0x8000 : 0, infinity = (2 * bias + 1) << mantissa;
    double magnitude = std::fabs(double(x));
    if (magnitude >= std::ldexp(1, bias + 1)) return sign | infinity;
    int exponent = magnitude == 0 ? least_exponent : std::max(std::ilogb(magnitude), least_exponent);
    int steps = int(std::nearbyint(std::ldexp(magnitude, mantissa - exponent)));
    return sign | (steps + ((exponent - least_exponent) << mantissa));
  }
};
constexpr Format kHalf{10, -14, 15}, kBrain{7, -126, 127};

// Memory whose end is the end of what may be read and written.
class AtTheEnd {
 public:
  AtTheEnd() : page_(sysconf(_SC_PAGESIZE)) {
    begin_ =
        static_cast<char*>(mmap(nullptr, 2 * page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0));
    CHECK(begin_ != MAP_FAILED && mprotect(begin_ + page_, page_, PROT_NONE) == 0);
  }
  ~AtTheEnd() { munmap(begin_, 2 * page_); }
  template <class T>
  T* last(int64_t n) {
    return reinterpret_cast<T*>(begin_ + page_) - n;
  }

 private:
  int64_t page_;
  char* begin_;
};
#endif

#include "simd/vec-inl.h"

TORCHFAST_KERNELS

bool same(double a, double b) { return (a != a && b != b) || (a == b && std::signbit(a) == std::signbit(b)); }

// ---- Half precision -----------------------------------------------------------------------------

template <class H>
void every_half_is_widened(const Format& format) {
  constexpr int L = Simd<float>::lanes;
  std::vector<H> all(1 << 16);
  for (int i = 0; i < 1 << 16; ++i) all[i].bits = uint16_t(i);
  for (int i = 0; i < 1 << 16; i += L) {
    Vec<float> v = load<float>(&all[i]);
    for (int j = 0; j < L; ++j) {
      double expected = format.value(uint16_t(i + j));
      CHECK(same(v[j], expected) && same(to_real(all[i + j]), expected));
    }
  }
}

template <class H>
void check_rounded(const Format& format, const float (&x)[Simd<float>::lanes]) {
  H stored[Simd<float>::lanes], one;
  store(stored, load<float>(x));
  for (int j = 0; j < Simd<float>::lanes; ++j) {
    from_real(&one, x[j]);
    CHECK(stored[j].bits == one.bits);
    CHECK(x[j] != x[j] ? std::isnan(format.value(one.bits)) : one.bits == format.bits(x[j]));
  }
}

// Tries each half, the point halfway to the next one, and their neighbours: every rounding that there is.
// Then it tries the whole range of floats, NaN among them.
template <class H>
void floats_are_rounded_to_nearest_even(const Format& format) {
  constexpr int L = Simd<float>::lanes;
  float x[L];
  int n = 0;
  auto try_one = [&](float value) {
    x[n++] = value;
    if (n == L) check_rounded<H>(format, x), n = 0;
  };
  for (int i = 0; i < 1 << 16; ++i) {
    double half = format.value(uint16_t(i)), next = format.value(uint16_t(i + 1));
    if (!std::isfinite(half)) continue;
    // Behind the last finite one comes what would be the next.
    if (!std::isfinite(next)) next = half + (half - format.value(uint16_t(i - 1)));
    for (float middle : {float(half), float(half + (next - half) / 2)})
      for (float to : {-INFINITY, middle, INFINITY}) try_one(std::nextafter(middle, to));
  }
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 8191)
    try_one(std::bit_cast<float>(uint32_t(bits)));
}

template <class H>
void halves_survive_convert() {
  for (int64_t n : {0, 1, 5, 33, 1 << 16}) {
    std::vector<H> halves(n), back(n + 1);
    std::vector<float> floats(n + 1, 7);
    for (int64_t i = 0; i < n; ++i) halves[i].bits = uint16_t(i * 40503);
    back[n].bits = 0x1234;
    convert<float>(halves.data(), floats.data(), n);
    convert<float>(floats.data(), back.data(), n);
    CHECK(floats[n] == 7 && back[n].bits == 0x1234);
    for (int64_t i = 0; i < n; ++i)
      CHECK(floats[i] != floats[i] ? std::isnan(to_real(back[i])) : back[i].bits == halves[i].bits);
  }
}

// ---- Partial vectors ----------------------------------------------------------------------------

template <class R, class T>
void partial_vectors_touch_their_elements_alone() {
  constexpr int L = Simd<R>::lanes;
  AtTheEnd memory;
  for (int64_t n = 0; n < L; ++n) {
    T* p = memory.last<T>(n);
    for (int64_t i = 0; i < n; ++i) from_real(p + i, R(i + 1));
    Vec<R> v = load_first<R>(p, n);
    for (int i = 0; i < L; ++i) CHECK(v[i] == (i < n ? i + 1 : 0));
    Vec<R> filled = only_n<R>(v, n, R(-3));
    for (int i = 0; i < L; ++i) CHECK(filled[i] == (i < n ? i + 1 : -3));
    Vec<R> whole = only_n<R>(v, std::integral_constant<int64_t, L>{}, R(-3));
    for (int i = 0; i < L; ++i) CHECK(whole[i] == v[i]);
    store_first<R>(p, v + R(1), n);
    for (int64_t i = 0; i < n; ++i) CHECK(to_real(p[i]) == i + 2);
  }
  T whole[L + 1];
  from_real(whole + L, R(9));
  store(whole, splat(R(5)));
  for (int i = 0; i < L; ++i) CHECK(to_real(whole[i]) == 5);
  CHECK(to_real(whole[L]) == 9);
}

template <class R, int unroll>
void for_each_vec_visits_each_element_once() {
  constexpr int64_t L = Simd<R>::lanes;
  for (int64_t n = 0; n < 10 * L; ++n) {
    int64_t next = 0;
    for_each_vec<R, unroll>(n, [&](int64_t i, int k, auto count) {
      constexpr bool partial = std::is_same_v<decltype(count), int64_t>;
      CHECK(i == next && k >= 0 && k < unroll);
      CHECK(partial ? count > 0 && count < L : count == L);
      next += count;
    });
    CHECK(next == n);
  }
}

// ---- Lanes --------------------------------------------------------------------------------------

template <class T>
void lane_bits_are_the_lanes_in_order() {
  typedef T I __attribute__((vector_size(TORCHFAST_VECTOR_BYTES)));
  constexpr int lanes = TORCHFAST_VECTOR_BYTES / sizeof(T);
  Random random;
  for (int trial = 0; trial < 200; ++trial) {
    I condition{}, any{}, counts{};
    uint64_t expected = 0;
    for (int i = 0; i < lanes; ++i) {
      if (random.below(2) == 0) continue;
      condition[i] = -1, any[i] = T(T{1} << random.below(8 * sizeof(T)));
      expected |= uint64_t{1} << i;
    }
    CHECK(lane_bits(condition) == expected && nonzero_bits(any) == expected);
    count_if(counts, condition);
    for (int i = 0; i < lanes; ++i) CHECK(counts[i] == T(expected >> i & 1));
  }
}

template <class R>
void comparisons_and_reductions_are_those_of_the_lanes() {
  constexpr int L = Simd<R>::lanes;
  constexpr R values[] = {R(-INFINITY), -2, R(-0.0), 0, 1, R(INFINITY), R(NAN)};
  Random random;
  for (int trial = 0; trial < 1000; ++trial) {
    Vec<R> a, b, whole;
    IntVec<R> integers;
    uint64_t larger = 0, equal = 0;
    R most = -INFINITY;
    int64_t sum = 0, sum_of_integers = 0;
    for (int i = 0; i < L; ++i) {
      a[i] = values[random.below(7)], b[i] = values[random.below(7)];
      larger |= uint64_t(a[i] > b[i]) << i, equal |= uint64_t(a[i] == b[i]) << i;
      int64_t number = random.below(1 << 20) - (1 << 19);
      whole[i] = R(number), integers[i] = Int<R>(number << 11);
      sum += number, sum_of_integers += number << 11, most = std::max(most, R(number));
    }
    CHECK(larger_bits(a, b) == larger && equal_bits(a, b) == equal);
    CHECK(max_lanes<R>(whole) == most && sum_lanes<R>(whole) == double(sum));
    CHECK(sum_lanes<R>(integers) == sum_of_integers);
  }
  for (R value : values)
    for (int i = 0; i < L; ++i) CHECK(same(splat(value)[i], value));
}

void run() {
  every_half_is_widened<f16>(kHalf);
  every_half_is_widened<bf16>(kBrain);
  floats_are_rounded_to_nearest_even<f16>(kHalf);
  floats_are_rounded_to_nearest_even<bf16>(kBrain);
  halves_survive_convert<f16>();
  halves_survive_convert<bf16>();
  partial_vectors_touch_their_elements_alone<float, float>();
  partial_vectors_touch_their_elements_alone<float, bf16>();
  partial_vectors_touch_their_elements_alone<float, f16>();
  partial_vectors_touch_their_elements_alone<double, double>();
  for_each_vec_visits_each_element_once<float, 4>();
  for_each_vec_visits_each_element_once<double, 4>();
  for_each_vec_visits_each_element_once<float, 1>();
  lane_bits_are_the_lanes_in_order<int8_t>();
  lane_bits_are_the_lanes_in_order<int16_t>();
  lane_bits_are_the_lanes_in_order<int32_t>();
  lane_bits_are_the_lanes_in_order<int64_t>();
  comparisons_and_reductions_are_those_of_the_lanes<float>();
  comparisons_and_reductions_are_those_of_the_lanes<double>();
}

TORCHFAST_END_KERNELS

#ifdef TORCHFAST_LAST_ISA
int main() { RUN_IN_EVERY_ISA(run); }
#endif
