// What the kernels of the softmax losses take: plain pointers, and the options of a call.
// Formula and reference: torchfast/losses/cross_entropy/.
#pragma once

#include <cstdint>

#include "memory/view.h"

namespace torchfast::cross_entropy {

enum class Reduction : int64_t { none, mean, sum };

struct Options {
  int64_t ignore_index;
  Reduction reduction;
  double label_smoothing, gamma, z_loss, softcap, logit_scale;
  bool empty_zero;

  bool transformed() const { return softcap != 0 || logit_scale != 1; }
};

// R below is float, and double for double logits: the dtype of sums, losses, residuals and factors.
struct Call {
  View logits;                        // [N, C, ...], or [C]
  View target;                        // class ids, contiguous; or probabilities, in R or half precision
  View weight, alpha, sample_weight;  // contiguous, in R; alpha has one element, or one a class
  Options options;

  bool probabilities() const { return !is_integer(target.type); }
  int64_t class_dim() const { return logits.dims == 1 ? 0 : 1; }
  int64_t classes() const { return logits.size(class_dim()); }
  int64_t rows() const { return logits.elements / classes(); }
};

// `loss` has an element a row for Reduction::none, else one. `residuals` has 3 rows() + 1: the maximum, the
// sum of the other exponentials and sum u psi of each row, in planes; then the divisor.
void forward(const Call& call, const View& loss, const View& residuals);

// The same, and what `backward` will write if the gradient of the loss, a sum or mean, turns out to be
// `upstream`.
void forward_with_gradient(const Call& call, double upstream, const View& loss, const View& residuals,
                           const View& gradient);

// Writes the gradient, of the logits' shape and dtype; it may be the logits' own memory.
void backward(const Call& call, const View& grad_loss, const View& residuals, const View& gradient);

}  // namespace torchfast::cross_entropy
