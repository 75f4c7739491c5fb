// What the kernel of the regression metrics takes and gives. Definitions and reference:
// torchfast/metrics/regression/.
#pragma once

#include <cstdint>

#include "memory/view.h"

namespace torchfast::regression {

constexpr int64_t kChunk = 1024;  // samples: three rows of doubles are 24 KB

// The sums of one output, as functional.py describes them; `rest` is what rounding the mean has left.
struct Moments {
  double samples = 0, weight = 0, absolute = 0, squared = 0, mean = 0, rest = 0, scatter = 0;

  void merge(const Moments& b) {
    double total = weight + b.weight;
    if (b.weight == 0) return;
    double share = weight / total, other = b.weight / total;
    double center = share * mean + other * b.mean;
    double mine = mean - center + rest, its = b.mean - center + b.rest;
    double left = share * mine + other * its;
    scatter += b.scatter + weight * (mine - left) * (mine - left) + b.weight * (its - left) * (its - left);
    samples += b.samples, weight = total, absolute += b.absolute, squared += b.squared;
    mean = center, rest = left;
  }
};

// One output's samples: element i of the view at offset + i * stride.
struct Column {
  View view;
  int64_t offset, stride;
};

// Sums up samples begin .. begin+n-1, at most kChunk of them; weight may be null.
Moments moments(const Column& preds, const Column& target, const double* weight, int64_t begin, int64_t n);

}  // namespace torchfast::regression
