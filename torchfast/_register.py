"""Turns the parts of an op into a PyTorch dispatcher op.

A loss is two dispatcher ops::

    torchfast::<name>(inputs...)                            -> (loss, residuals...)
    torchfast::<name>_backward(grad, inputs..., residuals...) -> grad of the first input

A metric is one, and has no derivative.

The pure-PyTorch reference is registered for every device. A native or Triton kernel registered
for one backend wins over it in the dispatcher, so no code anywhere asks which one is there.

Autocast needs no rule: PyTorch's autocast falls through for ops it does not know, so half-precision
logits arrive as they are and are widened inside the kernels, in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchfast._options import Options, as_object


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
    autograd: type[torch.autograd.Function]
    tensors: int
    """How many of the inputs, the first ones, are tensors or None."""
    inplace: bool
    """Whether its last option is ``inplace_backward``."""
    options: type[Options] | None

    def __call__(self, *inputs: Any) -> Tensor:
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            # A custom op raises there, or silently loses tangents.
            return self.reference(*inputs)[0]
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled():
            for other in inputs[1 : self.tensors]:
                if other is not None and other.requires_grad:  # fused is the gradient of the first alone
                    return self.reference(*inputs)[0]
            if inputs[0].requires_grad and not compiling:
                return self.autograd.apply(*inputs)
        if compiling:
            return self.forward(*inputs)[0]
        with torch._C._AutoDispatchBelowAutograd():
            return self.forward(*inputs)[0]


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
    reference_backward: Callable[..., Tensor],
    fake: Callable[..., tuple[Tensor, ...]],
    sample_inputs: Callable[..., Iterable[Sample]],
    options: type[Options] | None = None,
) -> Op:
    """Defines ``torchfast::<name>`` and its backward, and enters them in the registry.

    ``inputs`` and ``residuals`` are schema text. The differentiable input is the first, and tensors come
    before options. These may be given as a dataclass instead, ``options``, of which the other functions then take one
    object in their place. If the last option is ``bool inplace_backward``, there is also ``<name>_backward_``,
    which writes the gradient over the first input where that option is true.
    """
    if options is not None:
        inputs = f"{inputs}, {options.schema()}"
    first, rest = inputs.split(",", 1)
    tensors = sum(argument.split()[0].startswith("Tensor") for argument in inputs.split(","))
    reference, fake = as_object(reference, options, tensors), as_object(fake, options, tensors)
    reference_backward = as_object(reference_backward, options, 1 + tensors)
    others = inputs.count(",")
    outputs = ", ".join(["Tensor"] * (2 + residuals.count(",")))
    saved = f"{rest}, {residuals}"
    has_inplace = inputs.endswith("bool inplace_backward")

    def reference_backward_(grad: Tensor, x: Tensor, *args: Any) -> None:
        x.copy_(reference_backward(grad, x, *args))

    forward_op = _define(name, f"({inputs}) -> ({outputs})", reference, fake)
    schema = f"(Tensor grad_loss, {first}, {saved})"
    backward_op = _define(
        f"{name}_backward", f"{schema} -> Tensor", reference_backward, lambda grad, x, *_: torch.empty_like(x)
    )
    if has_inplace:
        schema = schema.replace(f", {first},", f", {first.replace('Tensor', 'Tensor(a!)')},")
        backward_inplace = _define(f"{name}_backward_", f"{schema} -> ()", reference_backward_, lambda *_: None)

    def save(ctx: Any, inputs: tuple[Any, ...], residuals: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:tensors], *residuals)
        ctx.options = inputs[tensors:]

    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        none = (None,) * others
        if grad is None:
            return (None, *none)
        saved, inplace = ctx.saved_tensors, has_inplace and ctx.options[-1]
        inputs, residuals = (*saved[:tensors], *ctx.options), saved[tensors:]
        if torch.is_grad_enabled():  # create_graph=True: the gradient itself will be differentiated
            if inplace:
                raise RuntimeError(
                    f"{name}: inplace_backward=True overwrites the logits, which a second derivative "
                    "(create_graph=True) needs again; pass inplace_backward=False"
                )
            loss = reference(*inputs)[0]
            return (*torch.autograd.grad(loss, inputs[0], grad, create_graph=True), *none)
        if inplace:
            backward_inplace(grad, *inputs, *residuals)
            # Whoever saved the logits for its own backward must hear that they are gone.
            torch.autograd.graph.increment_version(inputs[0])
            return (inputs[0].detach(), *none)
        with torch._C._AutoDispatchBelowAutograd():
            return (backward_op(grad, *inputs, *residuals), *none)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        save(ctx, inputs, output[1:])

    torch.library.register_autograd(f"torchfast::{name}", backward, setup_context=setup_context)

    class Fused(torch.autograd.Function):
        """The same as the registered autograd, with less overhead on tiny inputs: outside torch.compile
        the dispatcher needs not to call back into Python."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            with torch._C._AutoDispatchBelowAutograd():
                loss, *residuals = forward_op(*inputs)
            save(ctx, inputs, residuals)
            return loss

    Fused.backward = staticmethod(backward)  # type: ignore[assignment]
    ops = forward_op, backward_op
    registry[name] = Op(name, function, sample_inputs, reference, *ops, Fused, tensors, has_inplace, options)
    return registry[name]


@dataclass(frozen=True)
class Metric:
    """A registered metric, or a part of one. Its outputs carry no graph, whatever its inputs carry."""

    name: str
    reference: Callable[..., tuple[Tensor, ...]]
    """Plain PyTorch with the op's signature."""
    op: Any
    function: Callable[..., Any] | None
    """The public function, for tests that iterate over the registry. None of a part, which its samples call too."""
    sample_inputs: Callable[..., Iterable[Sample]]

    def __call__(self, *inputs: Any) -> tuple[Tensor, ...]:
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
    """Defines ``torchfast::<name>`` with the schema ``(inputs) -> (outputs)``, and enters it in ``metrics``."""
    op = _define(name, schema, reference, fake)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"{name} is not differentiable")

    torch.library.register_autograd(f"torchfast::{name}", backward, setup_context=setup_context)
    metrics[name] = Metric(name, reference, op, function, sample_inputs)
    return metrics[name]
