// The passes of the softmax losses in every instruction set, and the choice among them.
#define TORCHFAST_FILE "cross_entropy/kernels.cpp"
#include "simd/foreach_isa.h"

#include "cross_entropy/passes-inl.h"

TORCHFAST_KERNELS

void any_forward(const Call& call, const View& loss, const View& residuals) {
  with_logits_type(call.logits,
                   [&](auto t, auto r) { forward_pass<decltype(t), decltype(r)>(call, loss, residuals); });
}

void any_backward(const Call& call, const View& grad_loss, const View& residuals, const View& gradient,
                  FreshMemory* fresh) {
  with_logits_type(call.logits, [&](auto t, auto r) {
    backward_pass<decltype(t), decltype(r)>(call, grad_loss, residuals, gradient, fresh);
  });
}

TORCHFAST_END_KERNELS

#ifdef TORCHFAST_LAST_ISA
namespace torchfast::cross_entropy {

void forward(const Call& call, const View& loss, const View& residuals) {
  TORCHFAST_DISPATCH(any_forward)(call, loss, residuals);
}

void backward(const Call& call, const View& grad_loss, const View& residuals, const View& gradient,
              FreshMemory* fresh) {
  TORCHFAST_DISPATCH(any_backward)(call, grad_loss, residuals, gradient, fresh);
}

}  // namespace torchfast::cross_entropy
#endif
