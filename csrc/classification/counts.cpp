// Counts of classes and of labels, added up by threads.
#include <algorithm>
#include <cmath>

#include "classification/call.h"
#include "memory/parallel.h"

namespace torchfast::classification {
namespace {

// Adds rows begin .. begin+n-1, whose predictions are given; count(y, p, w) adds w to classes and matrix.
template <class N, class F>
void add_rows(const ClassCall& a, int64_t begin, int64_t n, const int64_t* predicted, const int64_t* rank,
              ClassSums<N>& sums, const F& count) {
  const int64_t *y = a.target + begin, c = a.classes;
  const double* weight = a.weight ? a.weight + begin : nullptr;
  for (int64_t i = 0; i < n; ++i) {
    double w = weight ? weight[i] : 1;
    if ((a.ignore_index && y[i] == *a.ignore_index) || w == 0) continue;
    bool off = y[i] < 0 || y[i] >= c, outside = predicted[i] < 0 || predicted[i] >= c;
    bool weighable = w > 0 && w < INFINITY;
    sums.wrong[kTarget] += off, sums.wrong[a.ids ? kIds : kNan] += outside;
    sums.wrong[kWeight] += !weighable;
    if (off || outside || !weighable) continue;
    count(y[i], predicted[i], N(w));
    for (size_t k = 0; k < a.ks.size(); ++k)
      if (rank[i] < a.ks[k]) sums.hits[k] += N(w);
  }
}

template <class N>
void add_to(N* classes, int64_t c, int64_t y, int64_t p, N w) {
  classes[c + p] += w, classes[2 * c + y] += w;
  if (p == y) classes[y] += w;
}

constexpr int64_t kBlock = 1024;  // rows: their predictions stay in L1

// Calls f(first row, number of rows, their predictions, their ranks) for rows begin .. end-1, in blocks.
template <class F>
void for_each_block(const ClassCall& a, int64_t begin, int64_t end, const F& f) {
  int64_t block = std::min(kBlock, end - begin);
  std::vector<int64_t> classes(a.ids ? 0 : block), ranks(a.ks.empty() ? 0 : block);
  int64_t* rank = a.ks.empty() ? nullptr : ranks.data();
  for (int64_t at = begin; at < end; at += block) {
    int64_t n = std::min(block, end - at);
    if (!a.ids) predict(a, at, at + n, classes.data(), rank);
    f(at, n, a.ids ? a.preds.as<int64_t>() + at : classes.data(), rank);
  }
}

}  // namespace

// Each thread counts for itself. A few classes are counted in a matrix alone, with one addition a row: the
// other counts are its sums. The matrix of many classes is shared by the threads.
void count_classes(const ClassCall& a, ClassSums<int64_t>& sums) {
  constexpr int64_t kFew = 256;
  int64_t c = a.classes, work = a.ids ? a.rows : a.rows * c, cells = c <= kFew ? c * c : 3 * c;
  Parts parts{std::clamp<int64_t>(work / std::max(kGrainElements, cells), 1, thread_count())};
  std::vector<std::vector<int64_t>> own(parts.count), own_hits(parts.count);
  std::vector<ClassSums<int64_t>> own_sums(parts.count);
  int64_t* matrix = sums.matrix;
  parts.for_each_range(a.rows, 1, [&](int64_t part, int64_t begin, int64_t end) {
    own[part].resize(cells), own_hits[part].resize(a.ks.size());
    int64_t* mine = own[part].data();
    own_sums[part].hits = own_hits[part].data();
    for_each_block(a, begin, end, [&](int64_t at, int64_t n, const int64_t* predicted, const int64_t* rank) {
      auto add = [&](const auto& count) { add_rows(a, at, n, predicted, rank, own_sums[part], count); };
      if (c <= kFew) return add([=](int64_t y, int64_t p, int64_t) { ++mine[y * c + p]; });
      add([=](int64_t y, int64_t p, int64_t w) {
        add_to(mine, c, y, p, w);
        if (matrix) __atomic_fetch_add(matrix + y * c + p, w, __ATOMIC_RELAXED);
      });
    });
  });
  for (int64_t part = 0; part < parts.count; ++part) {
    for (size_t k = 0; k < a.ks.size(); ++k) sums.hits[k] += own_hits[part][k];
    for (int i = 0; i < kWrongs; ++i) sums.wrong[i] += own_sums[part].wrong[i];
    const int64_t* of = own[part].data();
    for (int64_t i = 0; i < cells; ++i) {
      if (c > kFew) {
        sums.classes[i] += of[i];
        continue;
      }
      add_to(sums.classes, c, i / c, i % c, of[i]);
      if (matrix) matrix[i] += of[i];
    }
  }
}

// Floats are added up in the order of the rows: blocks of predictions are made side by side, then counted.
void count_classes(const ClassCall& a, ClassSums<double>& sums) {
  constexpr int64_t kAtOnce = 1 << 18;
  int64_t c = a.classes, at_once = std::min(a.rows, kAtOnce);
  int64_t grain = std::max<int64_t>(1, kGrainElements / (kBlock * c));
  std::vector<int64_t> predicted(at_once), ranks(a.ks.empty() ? 0 : at_once);
  for (int64_t begin = 0; begin < a.rows; begin += at_once) {
    int64_t n = std::min(at_once, a.rows - begin);
    parallel_for(0, (n + kBlock - 1) / kBlock, grain, [&](int64_t from, int64_t to) {
      auto keep = [&](int64_t at, int64_t m, const int64_t* of_block, const int64_t* rank) {
        std::copy_n(of_block, m, predicted.data() + at - begin);
        if (rank) std::copy_n(rank, m, ranks.data() + at - begin);
      };
      for_each_block(a, begin + from * kBlock, begin + std::min(n, to * kBlock), keep);
    });
    add_rows(a, begin, n, predicted.data(), ranks.data(), sums, [&](int64_t y, int64_t p, double w) {
      add_to(sums.classes, c, y, p, w);
      if (sums.matrix) sums.matrix[y * c + p] += w;
    });
  }
}

template <class N>
LabelSums<N> count_labels(const LabelCall& a) {
  constexpr int64_t kMostChunks = 64;
  int64_t rows = a.preds.size(0), labels = a.preds.size(1);
  int64_t least = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(labels, 1));
  int64_t each = std::max(least, (rows + kMostChunks - 1) / kMostChunks), chunks = (rows + each - 1) / each;
  std::vector<LabelSums<N>> sums(chunks);
  parallel_for(0, chunks, 1, [&](int64_t from, int64_t to) {
    for (int64_t k = from; k < to; ++k) {
      sums[k].cells.resize(4 * labels);
      add_labels(a, k * each, std::min(rows, (k + 1) * each), sums[k]);
    }
  });
  LabelSums<N> all{std::vector<N>(4 * labels)};
  for (const LabelSums<N>& of : sums) {
    for (int64_t i = 0; i < 4 * labels; ++i) all.cells[i] += of.cells[i];
    for (int i = 0; i < kWrongs; ++i) all.wrong[i] += of.wrong[i];
    all.exact += of.exact, all.rows += of.rows;
  }
  return all;
}
template LabelSums<int64_t> count_labels(const LabelCall&);
template LabelSums<double> count_labels(const LabelCall&);

}  // namespace torchfast::classification
