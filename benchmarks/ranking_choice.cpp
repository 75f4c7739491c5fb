// Where one way to the ranks becomes cheaper than another: what stands behind the constants Counting::kMost,
// Sorting::kWhole and the share of a row that a cut-off may have for Sorting to select. From the checkout:
//
//   g++ -O3 -std=c++20 -ffp-contract=fast -Wno-psabi -Icsrc -Ibenchmarks benchmarks/ranking_choice.cpp \
//       -o build/ranking_choice && build/ranking_choice
#define TORCHFAST_FILE "ranking_choice.cpp"
#include "simd/foreach_isa.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <numeric>
#include <random>
#include <vector>

#include "ranking/cpu/query-inl.h"

TORCHFAST_KERNELS

// The median time of f in microseconds.
template <class F>
double time(const F& f) {
  std::vector<double> taken(15);
  for (double& t : taken) {
    auto start = std::chrono::steady_clock::now();
    f();
    t = std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count();
  }
  std::nth_element(taken.begin(), taken.begin() + 7, taken.end());
  return taken[7];
}

void measure() {
  constexpr int64_t kRows = 20;
  ranking::Options options{ranking::average,
                           ranking::linear,
                           ranking::all_relevant,
                           ranking::always_k,
                           ranking::last,
                           0,
                           nullptr,
                           0};
  std::mt19937 random;
  std::printf("%9s %7s %10s %10s %10s   us a row\n", "documents", "judged", "counting", "sorting", "top 10");
  for (int64_t n : {100, 300, 1000, 4000, 16000, 64000})
    for (int64_t judged : {8, 16, 32, 64, int(n / 2)}) {
      if (judged > n / 2) continue;
      std::vector<float> scores(kRows * n);
      std::iota(scores.begin(), scores.end(), 0.0f);
      Judged chosen;
      std::vector<double> gains(judged, 1.0);
      for (int64_t i = 0; i < judged; ++i) {
        chosen.at.need(i + 1, i)[i] = int32_t(i * (n / judged));
        chosen.y.need(i + 1, i)[i] = 1;
      }
      chosen.count = judged;
      for (int64_t row = 0; row < kRows; ++row)
        std::shuffle(scores.begin() + row * n, scores.begin() + (row + 1) * n, random);
      Ranked ranked(options, chosen);
      Counting<float> counting(ranked);
      Sorting<float> sorting(ranked);
      auto each = [&](const auto& rank) {
        return time([&] {
                 for (int64_t row = 0; row < kRows; ++row) {
                   ranked.begin(gains.data());
                   rank(Row<float>{scores.data() + row * n, 1, n});
                 }
               }) /
               kRows;
      };
      bool counts = judged <= Counting<float>::kMost;
      double counted = counts ? each([&](const Row<float>& row) { counting.rank(row, Parts{}); }) : NAN;
      double sorted = each([&](const Row<float>& row) { sorting.rank(row, n, Parts{}); });
      double top = each([&](const Row<float>& row) { sorting.rank(row, 10, Parts{}); });
      std::printf("%9d %7d %10.2f %10.2f %10.2f\n", int(n), int(judged), counted, sorted, top);
    }
}

TORCHFAST_END_KERNELS

#ifdef TORCHFAST_LAST_ISA
namespace torchfast {
int64_t thread_count() { return 1; }
void parallel_for(int64_t begin, int64_t end, int64_t, void (*work)(const void*, int64_t, int64_t),
                  const void* context) {
  work(context, begin, end);
}
}  // namespace torchfast

int main() {
  using namespace torchfast;
  TORCHFAST_DISPATCH(measure)();
  ;
}
#endif
