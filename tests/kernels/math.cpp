// simd/math-inl.h against libm in more digits: no result is further off than its function's bound, in units
// in the last place of the exact result.
#define TORCHFAST_FILE "math.cpp"
#include "simd/foreach_isa.h"

#ifndef MATH_CPP_ONCE
#define MATH_CPP_ONCE
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>

#include "check.h"

// libm's double is exact enough for floats, and its long double for doubles.
template <class R>
using Wide = std::conditional_t<std::is_same_v<R, float>, double, long double>;

// Subnormals have the unit of the least normal number.
template <class R>
double ulps(R got, Wide<R> exact) {
  if (std::isnan(exact)) return std::isnan(got) ? 0 : INFINITY;
  int exponent = exact == 0 ? std::numeric_limits<int>::min() / 2 : std::ilogb(exact);
  exponent = std::max(exponent, std::numeric_limits<R>::min_exponent - 1);
  Wide<R> unit = std::ldexp(Wide<R>(1), exponent - std::numeric_limits<R>::digits + 1);
  return double(std::fabs(Wide<R>(got) - exact) / unit);
}
#endif

#include "simd/math-inl.h"

TORCHFAST_KERNELS

template <class R>
using Bits = std::conditional_t<std::is_same_v<R, float>, uint32_t, uint64_t>;

// Checks f at `least`, `most` and about `samples` numbers between them (both of one sign, the smaller
// magnitude first), evenly spread over the bit patterns, thus over each binade.
template <class R, class F, class Exact>
void check_within(const char* name, double bound, R least, R most, int samples, const F& f,
                  const Exact& exact) {
  constexpr int L = Simd<R>::lanes;
  Bits<R> from = std::bit_cast<Bits<R>>(least), to = std::bit_cast<Bits<R>>(most);
  Bits<R> step = std::max<Bits<R>>(1, (to - from) / samples);
  double worst = 0;
  R where = least;
  for (Bits<R> bits = from;;) {
    Vec<R> x;
    for (int i = 0; i < L; ++i) {
      x[i] = std::bit_cast<R>(bits);
      bits = to - bits > step ? bits + step : to;
    }
    Vec<R> y = f(x);
    for (int i = 0; i < L; ++i) {
      double error = ulps<R>(y[i], exact(Wide<R>(x[i])));
      if (!(error <= worst)) worst = error, where = x[i];
    }
    if (x[L - 1] == most) break;
  }
  std::printf("%s %s of %d bits: %.3f ulp at %a, bound %g\n", isa_under_test, name, int(8 * sizeof(R)), worst,
              double(where), bound);
  CHECK(worst <= bound);
}

template <class R>
void check_special_values() {
  constexpr R inf = std::numeric_limits<R>::infinity(), nan = std::numeric_limits<R>::quiet_NaN();
  auto first = [](Vec<R> v) { return v[0]; };
  CHECK(first(exp_nonpositive(splat(R(0)))) == 1 && first(exp_nonpositive(splat(-inf))) == 0);
  CHECK(first(exp_nonpositive(splat(std::nextafter(kLeastExponent<R>, -inf)))) == 0);
  CHECK(first(log_positive(splat(R(1)))) == 0);
  CHECK(first(log1p_nonnegative(splat(R(0)))) == 0 && first(log1p_unit(splat(R(0)))) == 0);
  CHECK(first(tanh(splat(inf))) == 1 && first(tanh(splat(-inf))) == -1 && first(tanh(splat(R(0)))) == 0);
  for (R quiet : {nan, -nan}) {
    CHECK(std::isnan(first(exp_nonpositive(splat(quiet)))) && std::isnan(first(tanh(splat(quiet)))));
    CHECK(std::isnan(first(log1p_nonnegative(splat(quiet)))) && std::isnan(first(log1p_unit(splat(quiet)))));
  }
}

template <class R>
void check_all(int samples, double exp_bound, double log_bound, double log1p_bound, double unit_bound,
               double tanh_bound) {
  using W = Wide<R>;
  constexpr R least = std::numeric_limits<R>::min(), most = std::numeric_limits<R>::max();
  auto exp = [](Vec<R> x) { return exp_nonpositive(x); };
  check_within<R>("exp", exp_bound, R(-0.0), kLeastExponent<R>, samples, exp,
                  [](W x) { return std::exp(x); });
  // The low part of x + low is half a unit of x, and would be lost in the sum.
  constexpr R part = std::numeric_limits<R>::epsilon() / 4;
  auto exp_of_two = [](Vec<R> x) { return exp_nonpositive(x, x * part); };
  check_within<R>("exp of x + low", exp_bound, R(-0.0), R(kLeastExponent<R> * 0.99), samples, exp_of_two,
                  [](W x) { return std::exp(x + W(R(x) * part)); });
  auto log = [](Vec<R> x) { return log_positive(x); };
  check_within<R>("log", log_bound, least, most, samples, log, [](W x) { return std::log(x); });
  check_within<R>("log near 1", log_bound, R(0.5), R(2), samples, log, [](W x) { return std::log(x); });
  auto log1p = [](Vec<R> x) { return log1p_nonnegative(x); };
  check_within<R>("log1p", log1p_bound, R(0), most, samples, log1p, [](W x) { return std::log1p(x); });
  auto unit = [](Vec<R> x) { return log1p_unit(x); };
  check_within<R>("log1p up to 1", unit_bound, R(0), R(1), samples, unit, [](W x) { return std::log1p(x); });
  auto tangent = [](Vec<R> x) { return tanh(x); };
  for (R sign : {R(1), R(-1)})
    check_within<R>("tanh", tanh_bound, sign * R(0), sign * most, samples, tangent,
                    [](W x) { return std::tanh(x); });
  check_special_values<R>();
}

void run() {
  // The bounds of floats are those that simd/math-inl.h states. Among doubles, exp alone is its own; glibc
  // states the bounds of the others.
  check_all<float>(1 << 20, 1.25, 0.9, 1.25, 1.7, 1.6);
  check_all<double>(1 << 16, 1, 1, 1, 1, 2);
}

TORCHFAST_END_KERNELS

#ifdef TORCHFAST_LAST_ISA
int main() { RUN_IN_EVERY_ISA(run); }
#endif
