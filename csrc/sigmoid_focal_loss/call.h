// What the kernels of the sigmoid losses take and give. Formula and reference:
// torchfast/losses/sigmoid_focal_loss/.
#pragma once

#include <cstdint>

#include "memory/view.h"

namespace torchfast::sigmoid_focal_loss {

enum class Reduction : int64_t { none, mean, sum };

// The names and the order are the op's.
struct Options {
  int64_t ignore_index;
  Reduction reduction;
  double alpha, gamma, gamma_neg, clip, label_smoothing;
  bool empty_zero;
};

// All views have the logits' shape and any strides; an absent one converts to false.
struct Call {
  View logits;
  View target;  // floats, bool or integers; or class ids, which lack the last dimension
  View weight, pos_weight;
  View mask;  // bool
  Options options;

  bool class_ids() const { return target.dims < logits.dims; }
};

struct Total {
  double loss = 0;
  int64_t counted = 0;  // elements that are neither masked nor ignored
};

// Sums up the losses, and writes each to `each_loss`, if that is given: dense, of float, or of double for
// double logits.
Total forward(const Call& call, const View& each_loss);

// Writes the gradient, dense and of the logits' dtype: that of each loss times `factor`, and times the loss's
// own upstream gradient if `upstream` is given.
void backward(const Call& call, double factor, const View& upstream, const View& gradient);

// Does both for a sum or mean, whose gradient turns out to be `upstream`.
Total forward_with_gradient(const Call& call, double upstream, const View& gradient);

}  // namespace torchfast::sigmoid_focal_loss
