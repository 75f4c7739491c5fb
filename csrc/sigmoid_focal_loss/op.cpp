// The ops torchfast::sigmoid_focal_loss, sigmoid_focal_loss_with_gradient and sigmoid_focal_loss_backward on
// the CPU: checks, conversions, outputs.
#include "sigmoid_focal_loss/call.h"
#include "torch/arguments.h"
#include "torch/tensor.h"

namespace torchfast::sigmoid_focal_loss {
namespace {

// What all of them take. A call looks at these tensors, converted to what the kernels read.
struct Inputs {
  explicit Inputs(Arguments& next)
      : logits(next.take<Tensor>()),
        target(next.take<Tensor>()),
        weight(next.take<OptionalTensor>()),
        pos_weight(next.take<OptionalTensor>()),
        mask(next.take<OptionalTensor>()) {
    options.ignore_index = next.take<int64_t>();
    options.reduction = Reduction(next.take<int64_t>());
    options.alpha = next.take<double>();
    options.gamma = next.take<double>();
    options.gamma_neg = next.take<double>();
    options.clip = next.take<double>();
    options.label_smoothing = next.take<double>();
    options.empty_zero = next.take<bool>();
  }

  // The dtype of losses, of divisors and of the mathematics.
  ScalarType real() const {
    return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }
  bool each() const { return options.reduction == Reduction::none; }

  bool same_shape(const Tensor& x, int64_t dims) const {
    bool same = x.dim() == dims;
    for (int64_t d = 0; same && d < dims; ++d) same = x.size(d) == logits.size(d);
    return same;
  }
  Tensor readable(const Tensor& values) const {
    bool read = is_floating(values) || values.scalar_type() == ScalarType::Bool;
    return read ? values : torch::stable::to(values, real());
  }

  // Keeps direct calls of the op memory-safe; users meet the public function's messages first.
  Call call() {
    STD_TORCH_CHECK(is_floating(logits), "input must be float32, bfloat16, float16 or float64");
    int64_t dims = logits.dim();
    bool class_ids = is_integer(target) && dims > 0 && same_shape(target, dims - 1);
    STD_TORCH_CHECK(class_ids || same_shape(target, dims), "target has a wrong shape");
    STD_TORCH_CHECK(target.is_cpu(), "target must be on the CPU");
    for (const auto* factor : {&weight, &pos_weight, &mask}) {
      STD_TORCH_CHECK(!*factor || same_shape(**factor, dims),
                      "weight, pos_weight and mask must have logits' shape");
      STD_TORCH_CHECK(!*factor || (*factor)->is_cpu(), "all tensors must be on the CPU");
    }
    STD_TORCH_CHECK(!mask || mask->scalar_type() == ScalarType::Bool, "mask must be of dtype bool");
    if (!is_integer(target)) target = readable(target);
    for (auto* factor : {&weight, &pos_weight})
      if (*factor) *factor = readable(**factor);
    return {view_of(logits), view_of(target), view_of(weight), view_of(pos_weight), view_of(mask), options};
  }

  Tensor logits, target;
  OptionalTensor weight, pos_weight, mask;
  Options options;
};

// Reads the one element of a tensor of dtype Inputs::real().
double read(const Tensor& x) {
  View view = view_of(x);
  return view.type == Type::f64 ? *view.as<double>() : *view.as<float>();
}
void write(Tensor& x, double value) {
  View view = output_of(x);
  if (view.type == Type::f64)
    *view.writable<double>() = value;
  else
    *view.writable<float>() = float(value);
}

template <bool with_gradient>
void run_forward(StableIValue* stack, uint64_t count, uint64_t) {
  Arguments next(stack, count);
  Inputs in(next);
  double upstream = with_gradient ? next.take<double>() : 1;
  next.end();
  Call call = in.call();
  STD_TORCH_CHECK(!with_gradient || !in.each(), "each loss has an upstream gradient of its own");
  Tensor loss = in.each() ? empty_like(in.logits, in.real()) : new_empty(in.logits, {}, in.real());
  Tensor divisor = new_empty(in.logits, {1}, in.real());
  Total total;
  if constexpr (with_gradient) {
    Tensor gradient = empty_like(in.logits, in.logits.scalar_type());
    total = forward_with_gradient(call, upstream, output_of(gradient));
    stack[2] = torch::stable::detail::from(gradient);
  } else {
    total = forward(call, in.each() ? output_of(loss) : View{});
  }
  double by = in.options.reduction == Reduction::mean ? double(total.counted) : 1;
  write(divisor, by);
  if (!in.each()) write(loss, by == 0 && in.options.empty_zero ? 0 : total.loss / by);
  stack[0] = torch::stable::detail::from(loss);
  stack[1] = torch::stable::detail::from(divisor);
}

void run_backward(StableIValue* stack, uint64_t count, uint64_t) {
  Arguments next(stack, count);
  Tensor grad_loss = next.take<Tensor>();
  Inputs in(next);
  Tensor divisor = next.take<Tensor>();
  next.end();
  Call call = in.call();
  STD_TORCH_CHECK(divisor.numel() == 1 && divisor.scalar_type() == in.real() && divisor.is_cpu() &&
                      grad_loss.is_cpu() &&
                      (in.each() ? in.same_shape(grad_loss, in.logits.dim()) : grad_loss.numel() == 1),
                  "backward was given a divisor or a gradient of another forward");
  double factor = read(divisor) == 0 ? 0 : 1 / read(divisor);
  grad_loss = in.each() ? in.readable(grad_loss) : as_contiguous(grad_loss, in.real());
  if (!in.each()) factor *= read(grad_loss);
  Tensor gradient = empty_like(in.logits, in.logits.scalar_type());
  backward(call, factor, in.each() ? view_of(grad_loss) : View{}, output_of(gradient));
  stack[0] = torch::stable::detail::from(gradient);
}

}  // namespace
}  // namespace torchfast::sigmoid_focal_loss

STABLE_TORCH_LIBRARY_IMPL(torchfast, CPU, m) {
  m.impl("sigmoid_focal_loss", &torchfast::sigmoid_focal_loss::run_forward<false>);
  m.impl("sigmoid_focal_loss_with_gradient", &torchfast::sigmoid_focal_loss::run_forward<true>);
  m.impl("sigmoid_focal_loss_backward", &torchfast::sigmoid_focal_loss::run_backward);
}
