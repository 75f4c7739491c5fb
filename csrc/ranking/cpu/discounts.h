// The discounts of DCG.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace torchfast::ranking {

// 1 / log2(rank + 1): from a table as far as queries commonly reach.
class Discounts {
 public:
  explicit Discounts(int64_t ranks) : Discounts(ranks <= 4096 ? made<4096>() : made<1 << 20>()) {}
  double operator()(int64_t rank) const { return rank <= last_ ? at_[rank] : at(rank); }

 private:
  explicit Discounts(const std::vector<double>& table)
      : at_(table.data()), last_(int64_t(table.size()) - 1) {}
  static double at(int64_t rank) { return 1 / std::log2(double(rank) + 1); }

  template <int64_t ranks>
  static const std::vector<double>& made() {
    static const std::vector<double> table = [] {
      std::vector<double> made(ranks + 1);
      for (int64_t rank = 1; rank <= ranks; ++rank) made[rank] = at(rank);
      return made;
    }();
    return table;
  }

  const double* at_;
  int64_t last_;  // the last rank of the table
};

}  // namespace torchfast::ranking
