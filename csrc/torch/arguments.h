// A call's arguments in the order of the op's schema. TORCH_BOX would ask each of an op's functions for all
// options as parameters; so they are read into one struct, in one place.
#pragma once

#include <cstdint>

#include "torch/compat.h"

namespace torchfast {

class Arguments {
 public:
  Arguments(const StableIValue* stack, uint64_t count) : stack_(stack), left_(count) {}

  // Each tensor of the stack is owned by whoever takes it, so that all must be taken.
  template <class T>
  T take() {
    STD_TORCH_CHECK(left_ > 0, "the op's schema has fewer arguments than its kernel takes");
    --left_;
    return torch::stable::detail::to<T>(*stack_++);
  }
  void end() const {
    STD_TORCH_CHECK(left_ == 0, "the op's schema has more arguments than its kernel takes");
  }

 private:
  const StableIValue* stack_;
  uint64_t left_;
};

}  // namespace torchfast
