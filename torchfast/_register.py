"""Turns the parts of an op into a PyTorch dispatcher op.

A loss is two dispatcher ops::

    torchfast::<name>(inputs...)                              -> (loss, residuals...)
    torchfast::<name>_backward(grad, inputs..., residuals...) -> gradient of each differentiable input

and, where the loss is differentiated by one input, a third, which reads that input once for both::

    torchfast::<name>_with_gradient(inputs..., upstream)      -> (loss, residuals..., gradient)

A metric is one, and has no derivative.

The pure-PyTorch reference is registered for every device. A native or Triton kernel registered
for one backend wins over it in the dispatcher, so no code anywhere asks which one is there.

Autocast needs no rule: PyTorch's autocast falls through for ops it does not know, so half-precision
logits arrive as they are and are widened inside the kernels, in registers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchfast._common import NONE
from torchfast._options import Options, as_object
from torchfast._upstream import Guess


@dataclass(frozen=True)
class Sample:
    """Arguments of one call of the public function; the generic tests and selftest use it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Op:
    """A registered loss. Calling it gives the loss, differentiable in every way autograd knows."""

    name: str
    function: Callable[..., Tensor]
    """The public function, for tests that iterate over the registry."""
    sample_inputs: Callable[..., Iterable[Sample]]
    reference: Callable[..., tuple[Tensor, ...]]
    """Plain differentiable PyTorch with the forward op's signature."""
    forward: Any
    backward: Any
    with_gradient: Any
    """None if there are several differentiable inputs."""
    autograd: type[torch.autograd.Function]
    differentiable: int
    """The backward op has gradients of so many inputs, the first ones."""
    tensors: int
    """So many inputs, the first ones, are tensors or None."""
    inplace: bool
    """True if its last option is ``inplace_backward``."""
    options: type[Options] | None
    around: str | None
    """The op whose kernels serve this one, which adds products of matrices around it."""

    def __call__(self, *inputs: Any) -> Tensor:
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            # A custom op raises inside of transforms, or silently loses tangents.
            return self.reference(*inputs)[0]
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled():
            required = [x is not None and x.requires_grad for x in inputs[: self.tensors]]
            if any(required[self.differentiable :]):  # the backward op has no gradients of the further inputs
                return self.reference(*inputs)[0]
            if any(required) and not compiling:
                return self.autograd.apply(*inputs)
        if compiling:
            return self.forward(*inputs)[0]
        with torch._C._AutoDispatchBelowAutograd():
            return self.forward(*inputs)[0]

    def partial(self, sample: Sample) -> tuple[list[Tensor], Callable[..., Tensor]]:
        """The differentiable inputs of a sample, and the public function of these alone (and of further options)."""
        given = inspect.signature(self.function).bind(*sample.args, **sample.kwargs).arguments
        first, *others = [argument.name for argument in self.forward._schema.arguments[: self.differentiable]]
        names = [next(iter(given), first), *(name for name in others if given.get(name) is not None)]

        def call(*tensors: Tensor, function: Callable[..., Tensor] = self.function, **options: Any) -> Tensor:
            return function(**{**given, **dict(zip(names, tensors, strict=True)), **options})

        return [given[name] for name in names], call


_PROXY, _FAKE = torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE
_BATCHED: Any = torch._C._parse_dispatch_key("Batched")  # to have it parsed at each call takes 4 of 40 microseconds

#: Every registered op by name.
registry: dict[str, Op] = {}


def _define(op: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    torch.library.define(f"torchfast::{op}", schema)
    torch.library.register_kernel(f"torchfast::{op}", None, kernel)
    torch.library.register_fake(f"torchfast::{op}", fake)
    return getattr(torch.ops.torchfast, op).default


def register(
    name: str,
    inputs: str,
    residuals: str,
    *,
    function: Callable[..., Tensor],
    reference: Callable[..., tuple[Tensor, ...]],
    reference_backward: Callable[..., Any],
    fake: Callable[..., tuple[Tensor, ...]],
    sample_inputs: Callable[..., Iterable[Sample]],
    options: type[Options] | None = None,
    kernel: Callable[..., tuple[Tensor, ...]] | None = None,
    around: str | None = None,
) -> Op:
    """Defines ``torchfast::<name>`` and its backward, and enters them in the registry.

    ``inputs`` and ``residuals`` are schema text. Tensors come before options, differentiable ones first: one, unless
    the last option says otherwise. The options may be given as a dataclass instead, ``options``, of which the other
    functions then take one object in their place.

    - ``bool inplace_backward``: there is also ``<name>_backward_``, which writes the gradient over the first input
      where that option is true.
    - ``bool[n] gradients``: n inputs are differentiable, and this says of which of them the op computes the gradient;
      the others' are empty. The forward op does so as well if the loss is one number: its residuals are a scale and,
      multiplied by it, the gradients for an upstream gradient of 1.

    ``kernel`` is the forward op where the reference is not (which it must then equal), and ``around`` as of ``Op``.
    """
    if options is not None:
        inputs = f"{inputs}, {options.schema()}"
    returned = f"(Tensor loss, {residuals})"
    arguments = torch._C.parse_schema(f"{name}({inputs}) -> {returned}").arguments
    tensors = sum("Tensor" in str(argument.type) for argument in arguments)
    inplace, several = (arguments[-1].name == option for option in ("inplace_backward", "gradients"))
    differentiable = arguments[-1].N if several else 1  # type: ignore[attr-defined]
    not_differentiable = (None,) * (len(arguments) - differentiable)
    reference, fake = as_object(reference, options, tensors), as_object(fake, options, tensors)
    reference_backward = as_object(reference_backward, options, 1 + tensors)
    forward_op = _define(name, f"({inputs}) -> {returned}", kernel or reference, fake)

    def fake_backward(grad: Tensor, *args: Any) -> Any:
        if not several:
            return torch.empty_like(args[0])
        each = zip(args, args[len(arguments) - 1], strict=False)
        return tuple(torch.empty_like(x) if need else grad.new_empty(0) for x, need in each)

    def reference_backward_(grad: Tensor, x: Tensor, *args: Any) -> None:
        x.copy_(reference_backward(grad, x, *args))

    schema = f"(Tensor grad_loss, {inputs}, {residuals})"
    outputs = ", ".join(["Tensor"] * differentiable)
    backward_op = _define(f"{name}_backward", f"{schema} -> ({outputs})", reference_backward, fake_backward)
    if inplace:
        schema = schema.replace(f", {inputs}", ", " + inputs.replace("Tensor", "Tensor(a!)", 1))
        backward_inplace = _define(f"{name}_backward_", f"{schema} -> ()", reference_backward_, lambda *_: None)

    if not several:
        schema = f"({inputs}, float upstream) -> (Tensor loss, {residuals}, Tensor gradient)"

        def composed_with_gradient(*args: Any) -> tuple[Tensor, ...]:
            *inputs, upstream = args
            with torch._C._AutoDispatchBelowAutograd():  # The two ops give the bits of whatever serves them.
                loss, *kept = forward_op(*inputs)
                gradient = backward_op(torch.full_like(loss, upstream), *inputs, *kept)
            return loss, *kept, gradient

        def fake_with_gradient(*args: Any) -> tuple[Tensor, ...]:
            return *fake(*args[:-1]), torch.empty_like(args[0])

        with_gradient = _define(f"{name}_with_gradient", schema, composed_with_gradient, fake_with_gradient)
    else:
        with_gradient = None
    reduction = {argument.name: i for i, argument in enumerate(arguments)}.get("reduction", -1)
    guess = Guess()

    @functools.cache
    def at_once() -> bool:
        """True if compiled code serves the CPU: there the upstream gradient can be looked at without waiting."""
        return (
            not several
            and reduction >= 0
            and torch._C._dispatch_has_kernel_for_dispatch_key(with_gradient.name(), "CPU")
        )

    def traced() -> bool:
        """True where what happens is recorded, in which no guess must have a part."""
        mode = torch._C._get_dispatch_mode
        return bool(mode(_PROXY) or mode(_FAKE) or torch.compiler.is_compiling())

    def guessed(inputs: tuple[Any, ...]) -> float | None:
        """The upstream gradient to compute the gradient for in the forward; None to leave it to the backward."""
        if not at_once() or not inputs[0].is_cpu or inputs[reduction] == NONE or (inplace and inputs[-1]):
            return None
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:  # who offloads wants its memory
            return None
        if traced():
            return None
        return guess.of(inputs[tensors:])

    def save(ctx: Any, inputs: tuple[Any, ...], residuals: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:tensors], *residuals)
        ctx.options = inputs[tensors:]
        ctx.computed = None
        # A hook of checkpointing or offloading may keep what it hands out.
        ctx.hooked = several and torch._C._autograd._top_saved_tensors_default_hooks(False) is not None

    def again(inputs: list[Any], grad: Tensor, needs: tuple[bool, ...]) -> Iterable[Tensor]:
        """Gives the gradients that are needed, which can be differentiated again."""
        each = zip(inputs[:differentiable], needs, strict=True)
        # Views make each tensor have its own derivative, even if it is another one, or was made from it.
        own = [x.view_as(x) if need else x for x, need in each]
        wanted = [x for x, need in zip(own, needs, strict=True) if need]
        return torch.autograd.grad(reference(*own, *inputs[differentiable:])[0], wanted, grad, create_graph=True)

    def kept(ctx: Any, grad: Tensor) -> bool:
        """True if the gradients of the forward may be needed again: in a graph that is retained, or traced, and for
        several upstream gradients (is_grads_batched=True)."""
        graph = ctx.hooked or torch._C._autograd._get_current_graph_task_keep_graph() or type(grad) is not Tensor
        batched = torch._C._dispatch_keys(grad).has(_BATCHED)
        return graph or batched or torch._C._are_functorch_transforms_active()

    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(arguments)
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[:differentiable]
        inputs, residuals = [*saved[:tensors], *ctx.options], saved[tensors:]
        if torch.is_grad_enabled():  # create_graph=True: the gradient itself will be differentiated
            if inplace and inputs[-1]:
                raise RuntimeError(
                    f"{name}: inplace_backward=True overwrites the logits, which a second derivative "
                    "(create_graph=True) needs again; pass inplace_backward=False"
                )
            if ctx.computed:
                guess.learn(ctx.options, None)
            found = iter(again(inputs, grad, needs))
            return (*(next(found) if need else None for need in needs), *not_differentiable)
        if inplace and inputs[-1]:
            backward_inplace(grad, *inputs, *residuals)
            # Whoever saved the logits for its own backward must hear that they are gone.
            torch.autograd.graph.increment_version(inputs[0])
            return (inputs[0].detach(), *not_differentiable)
        if not several:
            if at_once() and grad.is_cpu and not grad.dim() and not traced():
                upstream = None if kept(ctx, grad) else grad.item()
                guess.learn(ctx.options, upstream)
                computed, ctx.computed = ctx.computed, None
                if computed and computed[0] == upstream:
                    return (computed[1], *not_differentiable)
                del computed  # its memory serves again
            with torch._C._AutoDispatchBelowAutograd():
                return (backward_op(grad, *inputs, *residuals), *not_differentiable)
        if not grad.dim() and all(have or not need for have, need in zip(inputs[-1], needs, strict=True)):
            scale, *gradients = residuals
            multiply = torch.Tensor.mul if kept(ctx, grad) else torch.Tensor.mul_
            factor = grad * scale
            gradients = [multiply(g, factor) if need else g for g, need in zip(gradients, needs, strict=True)]
        else:
            with torch._C._AutoDispatchBelowAutograd():
                gradients = backward_op(grad, *inputs[:-1], needs, *residuals)
        each = zip(inputs, gradients, needs, strict=False)
        return (*(g.to(x.dtype) if need else None for x, g, need in each), *not_differentiable)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        save(ctx, inputs, output[1:])

    torch.library.register_autograd(f"torchfast::{name}", backward, setup_context=setup_context)

    class Fused(torch.autograd.Function):
        """Does what the registered autograd does, with less overhead on tiny inputs: outside torch.compile
        the dispatcher does not need to call back into Python."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            upstream = guessed(inputs)
            with torch._C._AutoDispatchBelowAutograd():
                if upstream is None:
                    loss, *residuals = forward_op(*inputs)
                else:
                    loss, *residuals, gradient = with_gradient(*inputs, upstream)
            save(ctx, inputs, residuals)
            if upstream is not None:
                ctx.computed = upstream, gradient
            return loss

    Fused.backward = staticmethod(backward)  # type: ignore[assignment]
    ops = forward_op, backward_op, with_gradient, Fused
    registry[name] = Op(
        name, function, sample_inputs, reference, *ops, differentiable, tensors, inplace, options, around
    )
    return registry[name]


@dataclass(frozen=True)
class Metric:
    """A registered metric, or a part of one. Its outputs carry no graph, whatever its inputs carry."""

    name: str
    reference: Callable[..., tuple[Tensor, ...]]
    """Plain PyTorch with the op's signature; a tuple even of one output."""
    op: Any
    function: Callable[..., Any] | None
    """The public function, for tests that iterate over the registry. It is None for a part, which the samples call."""
    sample_inputs: Callable[..., Iterable[Sample]]

    def __call__(self, *inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.op(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return self.op(*inputs)


#: Every registered metric by name.
metrics: dict[str, Metric] = {}


def register_metric(
    name: str,
    schema: str,
    *,
    reference: Callable[..., tuple[Tensor, ...]],
    fake: Callable[..., tuple[Tensor, ...]],
    function: Callable[..., Any] | None = None,
    sample_inputs: Callable[..., Iterable[Sample]] = lambda *_, **__: (),
) -> Metric:
    """Defines ``torchfast::<name>`` with the schema ``(inputs) -> (outputs)``, and enters it in ``metrics``.

    ``reference`` and ``fake`` give a tuple even of one output, which the op gives as it is.
    """
    single = len(torch._C.parse_schema(f"{name}{schema}").returns) == 1

    def as_given(f: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
        return (lambda *inputs: f(*inputs)[0]) if single else f

    op = _define(name, schema, as_given(reference), as_given(fake))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(*((output,) if single else output))

    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"{name} is not differentiable")

    torch.library.register_autograd(f"torchfast::{name}", backward, setup_context=setup_context)
    metrics[name] = Metric(name, reference, op, function, sample_inputs)
    return metrics[name]
