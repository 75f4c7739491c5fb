// Positions of a batch, and where each tensor has them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "memory/view.h"

namespace torchfast {

// Positions (all dimensions but one) of up to three tensors of one shape, in logical order.
// Neighbouring dimensions that every tensor can walk with one stride are merged.
class Positions {
 public:
  Positions(const View& shape_of, int64_t skip_dim, std::array<const View*, 3> views) {
    for (int64_t d = 0; d < shape_of.dims; ++d) {
      int64_t size = shape_of.size(d);
      count_ *= d == skip_dim ? 1 : size;
      if (d == skip_dim || size == 1) continue;
      Dim dim{size, {}};
      for (int k = 0; k < 3; ++k) dim.stride[k] = views[k] ? views[k]->stride(d) : 0;
      bool merge = !dims_.empty();
      for (int k = 0; merge && k < 3; ++k) merge = dims_.back().stride[k] == dim.stride[k] * dim.size;
      if (merge) {
        dim.size *= dims_.back().size;
        dims_.back() = dim;
      } else {
        dims_.push_back(dim);
      }
    }
    if (dims_.empty()) dims_.push_back({1, {}});
  }

  int64_t count() const { return count_; }
  int64_t inner_stride(int k) const { return dims_.back().stride[k]; }

  // Element offset of position i in tensor k.
  int64_t offset(int64_t i, int k) const {
    int64_t result = 0;
    for (size_t d = dims_.size(); d-- > 1; i /= dims_[d].size)
      result += (i % dims_[d].size) * dims_[d].stride[k];
    return result + i * dims_[0].stride[k];
  }

  // True if positions i .. i+n-1 lie at one constant stride.
  bool is_run(int64_t i, int64_t n) const {
    return dims_.size() == 1 || i % dims_.back().size + n <= dims_.back().size;
  }

 private:
  struct Dim {
    int64_t size;
    std::array<int64_t, 3> stride;
  };
  std::vector<Dim> dims_;
  int64_t count_ = 1;
};

}  // namespace torchfast
