// The passes of the sigmoid losses in every instruction set, and the choice among them.
#define TORCHFAST_FILE "sigmoid_focal_loss/kernels.cpp"
#include "simd/foreach_isa.h"

#include "sigmoid_focal_loss/tiles-inl.h"

#ifdef TORCHFAST_LAST_ISA
namespace torchfast::sigmoid_focal_loss {

Total forward(const Call& call, const View& each_loss) {
  return TORCHFAST_DISPATCH(all_losses)(call, each_loss);
}

void backward(const Call& call, double factor, const View& upstream, const View& gradient) {
  TORCHFAST_DISPATCH(all_gradients)(call, factor, upstream, gradient);
}

Total forward_with_gradient(const Call& call, double upstream, const View& gradient) {
  return TORCHFAST_DISPATCH(all_losses_and_gradients)(call, upstream, gradient);
}

}  // namespace torchfast::sigmoid_focal_loss
#endif
