// The discounts of DCG.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace torchfast::ranking {

// 1 / log2(rank + 1), and its sum over the first ranks: from tables as far as queries commonly reach.
class Discounts {
 public:
  explicit Discounts(int64_t ranks) : Discounts(ranks <= 4096 ? made<4096>() : made<1 << 20>()) {}
  double operator()(int64_t rank) const { return rank <= last_ ? at_[rank] : at(rank); }
  double up_to(int64_t rank) const {
    double sum = up_to_[std::min(rank, last_)];
    for (int64_t i = last_ + 1; i <= rank; ++i) sum += at(i);
    return sum;
  }

 private:
  struct Table {
    std::vector<double> at, up_to;
  };
  explicit Discounts(const Table& table)
      : at_(table.at.data()), up_to_(table.up_to.data()), last_(int64_t(table.at.size()) - 1) {}
  static double at(int64_t rank) { return 1 / std::log2(double(rank) + 1); }

  template <int64_t ranks>
  static const Table& made() {
    static const Table table = [] {
      Table made{std::vector<double>(ranks + 1), std::vector<double>(ranks + 1)};
      long double sum = 0;
      for (int64_t rank = 1; rank <= ranks; ++rank) {
        made.at[rank] = at(rank);
        made.up_to[rank] = double(sum += made.at[rank]);
      }
      return made;
    }();
    return table;
  }

  const double *at_, *up_to_;
  int64_t last_;  // rank of the table
};

}  // namespace torchfast::ranking
