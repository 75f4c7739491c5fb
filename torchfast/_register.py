"""Turns the parts of an op into a PyTorch dispatcher op.

A loss is two dispatcher ops::

    torchfast::<name>(inputs...)                            -> (loss, residuals...)
    torchfast::<name>_backward(grad, inputs..., residuals...) -> grad of the first input

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


@dataclass(frozen=True)
class Sample:
    """Arguments of one call of the public function; the generic tests and selftest use it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Op:
    """A registered loss. Calling it dispatches, or differentiates through the reference."""

    name: str
    function: Callable[..., Tensor]
    """The public function, for tests that iterate over the registry."""
    forward: Any
    backward: Any
    reference: Callable[..., tuple[Tensor, ...]]
    """Plain differentiable PyTorch with the forward op's signature."""
    sample_inputs: Callable[..., Iterable[Sample]]

    def __call__(self, *args: Any) -> Tensor:
        return _dispatch(self.forward, self.reference, *args)


#: Every registered op by name.
registry: dict[str, Op] = {}


def _dispatch(forward: Any, reference: Callable[..., tuple[Tensor, ...]], *args: Any) -> Tensor:
    if _needs_reference(args):
        return reference(*args)[0]
    return forward(*args)[0]


def _needs_reference(args: tuple[Any, ...]) -> bool:
    """The fused op knows one derivative: reverse mode, of the first input.

    Under functorch transforms and forward-mode AD a custom op raises or silently loses tangents,
    and a gradient of any other input (probability targets, class weights) is not fused.
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(a, Tensor) and a.requires_grad for a in args[1:])


def register(
    name: str,
    inputs: str,
    residuals: str,
    *,
    reference: Callable[..., tuple[Tensor, ...]],
    reference_backward: Callable[..., Tensor],
    fake: Callable[..., tuple[Tensor, ...]],
) -> tuple[Any, Any]:
    """Defines ``torchfast::<name>`` and its backward; returns the two ops.

    ``inputs`` and ``residuals`` are schema text; the first input is the differentiable one. When
    the inputs include ``bool inplace_backward``, the backward has a second form that writes the
    gradient over the first input.
    """
    first, rest = inputs.split(",", 1)
    names = [argument.split("=")[0].split()[-1] for argument in inputs.split(",")]
    saved = f"{rest}, {residuals}"
    op, op_backward = f"torchfast::{name}", f"torchfast::{name}_backward"
    op_inplace = f"torchfast::{name}_backward_"
    mutable_first = first.replace("Tensor", "Tensor(a!)")
    outputs = ", ".join("Tensor" for _ in range(1 + len(residuals.split(","))))
    torch.library.define(op, f"({inputs}) -> ({outputs})")
    torch.library.define(op_backward, f"(Tensor grad_loss, {first}, {saved}) -> Tensor")
    torch.library.define(op_inplace, f"(Tensor grad_loss, {mutable_first}, {saved}) -> ()")

    def reference_backward_(grad: Tensor, x: Tensor, *args: Any) -> None:
        x.copy_(reference_backward(grad, x, *args))

    torch.library.register_kernel(op, None, reference)
    torch.library.register_kernel(op_backward, None, reference_backward)
    torch.library.register_kernel(op_inplace, None, reference_backward_)
    torch.library.register_fake(op, fake)
    torch.library.register_fake(op_backward, lambda grad, x, *_: torch.empty_like(x))
    torch.library.register_fake(op_inplace, lambda *_: None)

    namespace = torch.ops.torchfast
    backward_op = getattr(namespace, f"{name}_backward").default
    backward_inplace = getattr(namespace, f"{name}_backward_").default
    inplace_at = names.index("inplace_backward") if "inplace_backward" in names else None

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        tensors = [a for a in inputs if isinstance(a, Tensor)]
        ctx.save_for_backward(*tensors, *output[1:])
        # None where a tensor goes, to be put back from the saved ones.
        ctx.arguments = tuple(None if isinstance(a, Tensor) else a for a in inputs)
        ctx.tensor_at = tuple(i for i, a in enumerate(inputs) if isinstance(a, Tensor))

    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        none = (None,) * (len(names) - 1)
        if grad is None:
            return (None, *none)
        arguments = list(ctx.arguments)
        saved = ctx.saved_tensors
        for position, tensor in zip(ctx.tensor_at, saved, strict=False):
            arguments[position] = tensor
        inplace = inplace_at is not None and arguments[inplace_at]
        if torch.is_grad_enabled():  # create_graph=True: the gradient itself will be differentiated
            if inplace:
                raise RuntimeError(
                    f"{name}: inplace_backward=True overwrites the logits, which a second "
                    "derivative (create_graph=True) needs again; pass inplace_backward=False"
                )
            loss = reference(*arguments)[0]
            return (torch.autograd.grad(loss, arguments[0], grad, create_graph=True)[0], *none)
        residuals = saved[len(ctx.tensor_at) :]
        if inplace:
            logits = arguments[0]
            backward_inplace(grad, *arguments, *residuals)
            # Whoever saved the logits for its own backward must hear that they are gone.
            torch.autograd.graph.increment_version(logits)
            return (logits.detach(), *none)
        return (backward_op(grad, *arguments, *residuals), *none)

    torch.library.register_autograd(op, backward, setup_context=setup_context)
    return getattr(namespace, name).default, backward_op
