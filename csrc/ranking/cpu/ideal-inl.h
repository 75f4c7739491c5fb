// The best DCG that a query could have.
#if defined(TORCHFAST_RANKING_CPU_IDEAL_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_RANKING_CPU_IDEAL_INL_H
#undef TORCHFAST_RANKING_CPU_IDEAL_INL_H
#else
#define TORCHFAST_RANKING_CPU_IDEAL_INL_H
#endif

#include <algorithm>
#include <bit>
#include <cstdint>

#include "ranking/cpu/discounts.h"
#include "simd/vec-inl.h"

TORCHFAST_KERNELS

using ranking::Discounts;

// The best DCG: gains in descending order.
class Ideal {
 public:
  // `gains` is reordered, up to the longest cut-off.
  Ideal(double* gains, int64_t n, int64_t longest) : gains_(gains), n_(n) {
    if (n == 0 || count_digits() || is_one_gain()) return;
    auto descending = [](double a, double b) { return a > b; };
    if (longest < n / 4) {
      std::nth_element(gains, gains + longest, gains + n, descending);
      n_ = longest;
    }
    if (n_ > 32 && sort_bytes()) return;
    std::sort(gains, gains + n_, descending);
  }

  double dcg(int64_t k, const Discounts& discounts) const {
    k = std::min(k, n_);
    double sum = 0;
    if (form_ == one_gain) return k > 0 ? gains_[0] * discounts.up_to(k) : 0;
    if (form_ == sorted) {
      for (int64_t i = 0; i < k; ++i) sum += gains_[i] * discounts(i + 1);
      return sum;
    }
    double before = 0;
    int64_t rank = 0;
    for (int gain = 7 - std::countl_zero(digits_) / 8; gain > 0 && rank < k; --gain) {
      int64_t count = int64_t(digits_ >> (8 * gain) & 255);
      if (count == 0) continue;
      double up_to = discounts.up_to(rank = std::min(k, rank + count));
      sum += gain * (up_to - before);
      before = up_to;
    }
    return sum;
  }

 private:
  // How many gains are 0, 1, ... 7, a byte each, if all are that.
  bool count_digits() {
    constexpr int L = Simd<double>::lanes;
    typedef uint64_t Bits __attribute__((vector_size(TORCHFAST_VECTOR_BYTES)));
    if (n_ > 255 - L) return false;
    Bits others{}, counts{};
    for (int64_t i = 0; i < n_; i += L) {
      Vec<double> gain = n_ - i < L ? load_first<double>(gains_ + i, n_ - i) : load<double>(gains_ + i);
      Vec<double> shifted = gain + 0x1p52;  // its last bits are an integer
      Bits digit = bit_cast<Bits>(shifted) - bit_cast<uint64_t>(0x1p52);
      others |= bit_cast<Bits>(gain - (shifted - 0x1p52)) | digit >> 3;
      counts += (Bits{} + 1) << (digit % 8 * 8);
    }
    auto either = [](uint64_t a, uint64_t b) __attribute__((always_inline)) { return a | b; };
    if (reduce_lanes<uint64_t>(others, either) != 0) return false;
    form_ = digits;
    digits_ = reduce_lanes<uint64_t>(
        counts, [](uint64_t a, uint64_t b) __attribute__((always_inline)) { return a + b; });
    return true;
  }
  bool is_one_gain() {
    for (int64_t i = 1; i < n_; ++i)
      if (gains_[i] != gains_[0]) return false;
    form_ = one_gain;
    return true;
  }
  // Sorts gains that are integers below 256.
  bool sort_bytes() {
    int64_t count[256] = {};
    for (int64_t i = 0; i < n_; ++i) {
      int gain = gains_[i] < 256 ? int(gains_[i]) : 0;
      if (gain != gains_[i]) return false;
      ++count[gain];
    }
    double* to = gains_;
    for (int gain = 255; gain >= 0; gain--) to = std::fill_n(to, count[gain], double(gain));
    return true;
  }

  enum { sorted, one_gain, digits } form_ = sorted;
  double* gains_;
  int64_t n_;
  uint64_t digits_ = 0;
};

TORCHFAST_END_KERNELS

#endif
