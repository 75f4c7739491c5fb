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

// These are the places of `wrong`, in the order of counts.py.
enum Wrong { kNan, kTarget, kIds, kWeight, kProbability, kWrongs };

// In each call, weight has one element a row or is null.
struct ClassCall {
  View preds;  // scores [N, C, ...] of any strides, or ids, contiguous int64
  bool ids;
  const int64_t* target;
  const double* weight;
  int64_t rows, classes;
  std::optional<int64_t> ignore_index;
  std::vector<int64_t> ks;  // one a top-k accuracy; ids have none
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
  bool of_classes;  // labels are [N], and curve k tells class k from the others; else [curves, N]
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

// What a chunk of rows adds up to: `cells` has tn, fp, fn, tp of each label, `exact` counts the rows whose
// labels are all right, `rows` all rows.
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

// ---- kernels.cpp: each takes rows or elements begin .. end-1 ------------------------------------

// Writes the predicted classes, -1 where a score is NaN, and, if `rank` is not null, the target's rank among
// the scores, from 0.
void predict(const ClassCall& a, int64_t begin, int64_t end, int64_t* predicted, int64_t* rank);

template <class N>
void add_labels(const LabelCall& a, int64_t begin, int64_t end, LabelSums<N>& sums);

// Fills in elements of curve k, ready to be sorted. Their id is their label, or, if `labels` is there to
// take that, their place. Returns false if an element is wrong.
enum Label : uint8_t { kNegative, kPositive, kIgnored };
template <class Key>
bool keys_of(const AreaCall& a, int64_t k, int64_t begin, int64_t end, Keyed<Key>* elements, uint8_t* labels);

}  // namespace torchfast::classification
