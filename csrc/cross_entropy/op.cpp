// The ops torchfast::cross_entropy, cross_entropy_with_gradient, cross_entropy_backward and
// cross_entropy_backward_ on the CPU: checks, conversions, outputs.
#include <optional>
#include <vector>

#include "cross_entropy/call.h"
#include "torch/arguments.h"
#include "torch/tensor.h"

namespace torchfast::cross_entropy {
namespace {

// What all of them take. A call looks at these tensors, converted to what the kernels read.
struct Inputs {
  explicit Inputs(Arguments& next)
      : logits(next.take<Tensor>()),
        target(next.take<Tensor>()),
        weight(next.take<OptionalTensor>()),
        alpha(next.take<OptionalTensor>()),
        sample_weight(next.take<OptionalTensor>()) {
    options.ignore_index = next.take<int64_t>();
    options.reduction = Reduction(next.take<int64_t>());
    options.label_smoothing = next.take<double>();
    options.gamma = next.take<double>();
    options.z_loss = next.take<double>();
    options.softcap = next.take<double>();
    options.logit_scale = next.take<double>();
    options.empty_zero = next.take<bool>();
    next.take<bool>();  // inplace_backward chooses between the ops
  }

  ScalarType real() const {
    return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

  // Keeps direct calls of the op memory-safe; users meet the public function's messages first.
  Call call() {
    STD_TORCH_CHECK(is_floating(logits), "input must be float32, bfloat16, float16 or float64");
    int64_t class_dim = logits.dim() == 1 ? 0 : 1;
    STD_TORCH_CHECK(logits.dim() > 0 && logits.size(class_dim) > 0 && logits.size(class_dim) <= INT32_MAX,
                    "input must have 1 to 2^31-1 classes");
    int64_t classes = logits.size(class_dim), rows = logits.numel() / classes;
    bool same_shape = target.dim() == logits.dim();
    for (int64_t d = 0; same_shape && d < logits.dim(); ++d) same_shape = target.size(d) == logits.size(d);
    STD_TORCH_CHECK(is_integer(target) ? target.numel() == rows : same_shape, "target has a wrong shape");
    STD_TORCH_CHECK(!weight || weight->numel() == classes, "weight must have one element a class");
    STD_TORCH_CHECK(!alpha || alpha->numel() == classes || alpha->numel() == 1,
                    "alpha must have one element, or one a class");
    STD_TORCH_CHECK(!sample_weight || sample_weight->numel() == rows,
                    "sample_weight must have one element a row");
    for (const auto* tensor : {&weight, &alpha, &sample_weight})
      STD_TORCH_CHECK(!*tensor || (*tensor)->is_cpu(), "all tensors must be on the CPU");
    STD_TORCH_CHECK(target.is_cpu(), "target must be on the CPU");
    target = readable_target();
    for (auto* tensor : {&weight, &alpha, &sample_weight})
      if (*tensor) *tensor = as_contiguous(**tensor, real());
    return {view_of(logits), view_of(target),        view_of(weight),
            view_of(alpha),  view_of(sample_weight), options};
  }

  // Kernels read probabilities in the dtype of sums or in half precision, and class ids if contiguous.
  Tensor readable_target() const {
    auto dtype = target.scalar_type();
    if (is_integer(target)) return as_contiguous(target, dtype);
    bool half = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
    return dtype == real() || (real() == ScalarType::Float && half) ? target
                                                                    : torch::stable::to(target, real());
  }

  Tensor logits, target;
  OptionalTensor weight, alpha, sample_weight;
  Options options;
};

template <bool with_gradient>
void run_forward(StableIValue* stack, uint64_t count, uint64_t) {
  Arguments next(stack, count);
  Inputs inputs(next);
  double upstream = with_gradient ? next.take<double>() : 1;
  next.end();
  Call call = inputs.call();
  STD_TORCH_CHECK(!with_gradient || call.options.reduction != Reduction::none,
                  "the loss of each row has an upstream gradient of its own");
  std::vector<int64_t> loss_sizes;
  for (int64_t d = 0; call.options.reduction == Reduction::none && d < call.logits.dims; ++d)
    if (d != call.class_dim()) loss_sizes.push_back(call.logits.size(d));
  Tensor loss = new_empty(inputs.logits, loss_sizes, inputs.real());
  Tensor residuals = new_empty(inputs.logits, {3 * call.rows() + 1}, inputs.real());
  if constexpr (with_gradient) {
    Tensor gradient = empty_like(inputs.logits, inputs.logits.scalar_type());
    forward_with_gradient(call, upstream, output_of(loss), output_of(residuals), output_of(gradient));
    stack[2] = torch::stable::detail::from(gradient);
  } else {
    forward(call, output_of(loss), output_of(residuals));
  }
  stack[0] = torch::stable::detail::from(loss);
  stack[1] = torch::stable::detail::from(residuals);
}

// Gives the gradient in memory of its own, or writes it over the logits.
template <bool in_place>
void run_backward(StableIValue* stack, uint64_t count, uint64_t) {
  Arguments next(stack, count);
  Tensor grad_loss = next.take<Tensor>();
  Inputs inputs(next);
  Tensor residuals = next.take<Tensor>();
  next.end();
  Call call = inputs.call();
  STD_TORCH_CHECK(residuals.numel() == 3 * call.rows() + 1 && residuals.scalar_type() == inputs.real() &&
                      grad_loss.numel() == (call.options.reduction == Reduction::none ? call.rows() : 1),
                  "backward was given residuals or a gradient of another forward");
  Tensor grad = as_contiguous(grad_loss, inputs.real()), kept = as_contiguous(residuals, inputs.real());
  if constexpr (in_place) {
    backward(call, view_of(grad), view_of(kept), output_of(inputs.logits));
  } else {
    Tensor gradient = empty_like(inputs.logits, inputs.logits.scalar_type());
    backward(call, view_of(grad), view_of(kept), output_of(gradient));
    stack[0] = torch::stable::detail::from(gradient);
  }
}

}  // namespace
}  // namespace torchfast::cross_entropy

STABLE_TORCH_LIBRARY_IMPL(torchfast, CPU, m) {
  m.impl("cross_entropy", &torchfast::cross_entropy::run_forward<false>);
  m.impl("cross_entropy_with_gradient", &torchfast::cross_entropy::run_forward<true>);
  m.impl("cross_entropy_backward", &torchfast::cross_entropy::run_backward<false>);
  m.impl("cross_entropy_backward_", &torchfast::cross_entropy::run_backward<true>);
}
