// The passes of the softmax losses in every instruction set, and the choice among them.
#define TORCHFAST_FILE "cross_entropy/kernels.cpp"
#include "simd/foreach_isa.h"

#include "cross_entropy/passes-inl.h"

TORCHFAST_KERNELS

void any_forward(const Call& call, double upstream, const View& loss, const View& residuals,
                 const View* gradient) {
  with_logits_type(call.logits, [&](auto t, auto r) {
    Passes<decltype(t), decltype(r)>(call, residuals, gradient).forward(loss, upstream);
  });
}

void any_backward(const Call& call, const View& grad_loss, const View& residuals, const View& gradient) {
  with_logits_type(call.logits, [&](auto t, auto r) {
    Passes<decltype(t), decltype(r)>(call, residuals, &gradient).backward(grad_loss);
  });
}

TORCHFAST_END_KERNELS

#ifdef TORCHFAST_LAST_ISA
namespace torchfast::cross_entropy {

void forward(const Call& call, const View& loss, const View& residuals) {
  TORCHFAST_DISPATCH(any_forward)(call, 1, loss, residuals, nullptr);
}

void forward_with_gradient(const Call& call, double upstream, const View& loss, const View& residuals,
                           const View& gradient) {
  TORCHFAST_DISPATCH(any_forward)(call, upstream, loss, residuals, &gradient);
}

void backward(const Call& call, const View& grad_loss, const View& residuals, const View& gradient) {
  TORCHFAST_DISPATCH(any_backward)(call, grad_loss, residuals, gradient);
}

}  // namespace torchfast::cross_entropy
#endif
