// What the kernels of the classification metrics take and give. Definitions and references:
// torchfast/metrics/classification/.
//
//   class_counts   the largest score of each row and what it is counted as, block by block: the scores are
//                  read once, and no prediction outlives its block
//   label_counts   scores against a threshold, each label by itself
//   ranked_areas   areas under curves: a radix sort on the bits of the scores, then one walk
// Blocks and chunks do not depend on the number of threads, and floats are added up in their order.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "memory/view.h"
#include "sort/radix_sort.h"

namespace torchfast::classification {

// Places of `wrong`, as in counts.py.
enum Wrong { kNan, kTarget, kIds, kWeight, kProbability, kWrongs };

// Weights are one a row in each call, null where there are none.
struct ClassCall {
  View preds;  // scores [N, C, ...] of any strides, or ids, contiguous int64
  bool ids;
  const int64_t* target;
  const double* weight;
  int64_t rows, classes;
  std::optional<int64_t> ignore_index;
  std::vector<int64_t> ks;  // of scores alone
};

struct LabelCall {
  View preds;  // scores or ids [N, L]
  const int64_t* target;
  const double* weight;
  std::optional<int64_t> ignore_index;
  double threshold;
  bool probabilities;
};

struct AreaCall {
  View scores;  // [curves, N]
  const int64_t* labels;
  bool of_classes;  // labels are [N], and curve k tells class k from the others; else they are as scores
  const double* weight;
  std::optional<int64_t> ignore_index;
};

// ---- counts.cpp: N is int64_t without weights, double with them; outputs are zero before --------

template <class N>
struct ClassSums {
  N* classes;  // [3, C]
  N* matrix;   // [C, C] or null
  N* hits;
  int64_t wrong[kWrongs] = {};
};
void count_classes(const ClassCall& a, ClassSums<int64_t>& sums);
void count_classes(const ClassCall& a, ClassSums<double>& sums);

// What a chunk of rows adds up to: of each label its cells tn, fp, fn, tp; rows all right, all rows.
template <class N>
struct LabelSums {
  std::vector<N> cells;
  N exact{}, rows{};
  int64_t wrong[kWrongs] = {};
};
template <class N>
LabelSums<N> count_labels(const LabelCall& a);

// ---- areas.cpp: both results are [2, curves] ----------------------------------------------------

void rank_areas(const AreaCall& a, double* areas, double* totals);

// ---- kernels.cpp, of rows or elements begin .. end-1 --------------------------------------------

// The predicted classes, -1 where a score is NaN; the rank of the target among the scores, from 0, where that
// is not null.
void predict(const ClassCall& a, int64_t begin, int64_t end, int64_t* predicted, int64_t* rank);

template <class N>
void add_labels(const LabelCall& a, int64_t begin, int64_t end, LabelSums<N>& sums);

// Elements of curve k, ready to be sorted: their keys, and as id their label, or their place where the label
// goes to `labels`. False where one is wrong.
enum Label : uint8_t { kNegative, kPositive, kIgnored };
template <class Key>
bool keys_of(const AreaCall& a, int64_t k, int64_t begin, int64_t end, Keyed<Key>* elements, uint8_t* labels);

}  // namespace torchfast::classification
