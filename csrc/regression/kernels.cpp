// The kernel of the regression metrics in every instruction set, and the choice among them.
#define TORCHFAST_FILE "regression/kernels.cpp"
#include "simd/foreach_isa.h"

#include "regression/moments-inl.h"

#ifdef TORCHFAST_LAST_ISA
namespace torchfast::regression {

Moments moments(const Column& preds, const Column& target, const double* weight, int64_t begin, int64_t n) {
  return TORCHFAST_DISPATCH(chunk_moments)(preds, target, weight, begin, n);
}

}  // namespace torchfast::regression
#endif
