// The scores of a curve as keys that sort in descending order, each with its label.
#if defined(TORCHFAST_CLASSIFICATION_KEYS_INL_H) == defined(TORCHFAST_TOGGLE)
#ifdef TORCHFAST_CLASSIFICATION_KEYS_INL_H
#undef TORCHFAST_CLASSIFICATION_KEYS_INL_H
#else
#define TORCHFAST_CLASSIFICATION_KEYS_INL_H
#endif

#include <cmath>
#include <cstdint>

#include "classification/call.h"
#include "memory/elements-inl.h"

TORCHFAST_KERNELS

using classification::AreaCall, classification::Label;
using enum classification::Label;

template <class Key>
bool sort_keys(const AreaCall& a, int64_t k, int64_t begin, int64_t end, Keyed<Key>* elements,
               uint8_t* labels) {
  int64_t step = a.scores.stride(1);
  const int64_t* y = a.labels + (a.of_classes ? 0 : k * a.scores.size(1));
  int64_t most = a.of_classes ? a.scores.size(0) - 1 : 1, one = a.of_classes ? k : 1;
  return with_float_type(a.scores, [&](auto* x) {
    x += k * a.scores.stride(0);
    bool right = true;
    for (int64_t i = begin; i < end; ++i) {
      auto score = to_real(x[i * step]);
      double w = a.weight ? a.weight[i] : 1;
      bool ignored = a.ignore_index && y[i] == *a.ignore_index;
      bool mistaken = score != score || y[i] < 0 || y[i] > most || !(w > 0 && w < INFINITY);
      if (mistaken) right &= ignored || w == 0;
      Label label = mistaken || ignored ? kIgnored : y[i] == one ? kPositive : kNegative;
      if (labels) labels[i] = label;
      elements[i] = {Key(descending(score)), labels ? Key(i) : Key(label)};
    }
    return right;
  });
}

TORCHFAST_END_KERNELS

#endif
