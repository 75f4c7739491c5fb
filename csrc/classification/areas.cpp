// Areas under curves: elements sorted by their scores, then walked.
#include <atomic>
#include <cmath>
#include <type_traits>

#include "classification/call.h"
#include "memory/buffer.h"
#include "memory/parallel.h"

namespace torchfast::classification {
namespace {

struct Area {
  double roc, average_precision, positives, negatives;
};

// Adds up one curve by groups of tied scores, in descending order. N is int64_t, or double for weights.
template <class N>
class Curve {
 public:
  void add(N positive, N negative) { t_ += positive, f_ += negative; }

  void end_of_tie() {
    // Integers keep this exact: twice the product of the totals is below 2^63 for 2^32 scores.
    trapezoids_ += Wide(f_ - f_before_) * Wide(t_ + t_before_);
    double t = double(t_);
    if (t_ > t_before_) steps_ += (t - double(t_before_)) * t / (t + double(f_));
    t_before_ = t_, f_before_ = f_;
  }

  Area area() const {
    double t = double(t_), f = double(f_);
    return {double(trapezoids_) / 2 / t / f, steps_ / t, t, f};
  }

 private:
  using Wide = std::conditional_t<std::is_same_v<N, double>, double, unsigned __int128>;
  N t_{}, f_{}, t_before_{}, f_before_{};
  Wide trapezoids_{};
  double steps_ = 0;
};

template <class Key>
struct Sorter {
  Buffer<Keyed<Key>> elements;
  Buffer<uint8_t> labels;
  Buffer<Key> counts;
};

// Sorts the elements of curve k, and walks them.
template <class Key>
Area area_of(const AreaCall& a, int64_t k, const Parts& parts, Sorter<Key>& sorter) {
  int64_t n = a.scores.size(1);
  const double* weight = a.weight;
  Keyed<Key>* all = sorter.elements.need(2 * n);
  uint8_t* label = weight ? sorter.labels.need(n) : nullptr;
  std::atomic<bool> right{true};
  parts.for_each_range(n, 1, [&](int64_t, int64_t begin, int64_t end) {
    if (!keys_of(a, k, begin, end, all, label)) right = false;
  });
  const Keyed<Key>* sorted = radix_sort(all, all + n, n, parts, sorter.counts);
  auto walk = [&](auto curve, const auto& add) {
    for (int64_t i = 0; i < n; ++i) {
      add(curve, sorted[i].id);
      if (i + 1 == n || sorted[i + 1].key != sorted[i].key) curve.end_of_tie();
    }
    return curve.area();
  };
  Area area =
      weight
          ? walk(Curve<double>(),
                 [&](auto& curve, Key i) {
                   curve.add(label[i] == kPositive ? weight[i] : 0, label[i] == kNegative ? weight[i] : 0);
                 })
          : walk(Curve<int64_t>(), [](auto& curve, Key of) { curve.add(of == kPositive, of == kNegative); });
  if (!right) area.roc = area.average_precision = NAN;
  return area;
}

template <class Key>
void all_areas(const AreaCall& a, double* areas, double* totals) {
  int64_t curves = a.scores.size(0), n = a.scores.size(1), threads = thread_count();
  auto range = [&](int64_t from, int64_t to, const Parts& parts) {
    Sorter<Key> sorter;
    for (int64_t k = from; k < to; ++k) {
      Area area = area_of(a, k, parts, sorter);
      areas[k] = area.roc, areas[curves + k] = area.average_precision;
      totals[k] = area.positives, totals[curves + k] = area.negatives;
    }
  };
  if (curves < threads && n >= kGrainElements) return range(0, curves, Parts{threads});
  int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(n, 1));
  parallel_for(0, curves, grain, [&](int64_t from, int64_t to) { range(from, to, Parts{}); });
}

}  // namespace

void rank_areas(const AreaCall& a, double* areas, double* totals) {
  bool wide = a.scores.type == Type::f64 || a.scores.size(1) > int64_t(UINT32_MAX);
  wide ? all_areas<uint64_t>(a, areas, totals) : all_areas<uint32_t>(a, areas, totals);
}

}  // namespace torchfast::classification
