"""The public functions: what they take, what they refuse, what they return."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torchfast import _triton
from torchfast._common import (
    FLOATS,
    INTEGERS,
    accumulate_dtype,
    check,
    check_device,
    check_factor,
    check_logits,
    check_tensor,
    normalized,
)
from torchfast._register import Sample, register
from torchfast.losses.cross_entropy.options import Options
from torchfast.losses.cross_entropy.reference import class_dim, fake, reference, reference_backward


def _overlaps(x: Tensor) -> bool:
    """True if two elements may share memory."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


_TARGETS = INTEGERS | FLOATS


def check_tensors(
    target: Tensor, others: dict[str, Tensor | None], input: Tensor, logits: str, shape: tuple[int, ...], dim: int
) -> None:
    """Checks the tensors beside the logits, which errors call ``logits``; ``dim`` of ``shape`` has the classes."""
    rows, classes = shape[:dim] + shape[dim + 1 :], shape[dim]
    check_tensor("target", target, _TARGETS, "a tensor of integer class indices or float probabilities")
    if target.is_floating_point():
        if target.shape != shape:
            raise ValueError(
                f"target of class probabilities ({target.dtype}) must have {logits}'s shape {tuple(shape)}, "
                f"got {tuple(target.shape)}; class indices must be of an integer dtype"
            )
    elif target.shape != rows:
        raise ValueError(
            f"target of class indices must have shape {tuple(rows)} for {logits} of shape {tuple(shape)}, "
            f"got {tuple(target.shape)}; class probabilities must be of a floating dtype"
        )
    check_device("target", target, "input", input)
    for name, tensor in others.items():
        if tensor is None:
            continue
        check_factor(name, tensor)
        allowed = rows if name == "sample_weight" else (classes,)
        scalar = name == "alpha" and tensor.numel() == 1
        check(f"{name}'s shape", scalar or tensor.shape == allowed, tuple(tensor.shape), tuple(allowed))
        check_device(name, tensor, "input", input)


def _check_input(input: Tensor) -> None:
    check_logits("input", input)
    if input.dim() == 0:
        raise ValueError("input must have shape (C,), (N, C) or (N, C, d1, ...), got a scalar")
    if input.shape[class_dim(input)] == 0:
        raise ValueError(f"input must be logits of at least one class, got {tuple(input.shape)}")


def _may_be_written(input: Tensor) -> bool:
    """True if the backward may write over the logits, which ``inplace_backward`` asks for."""
    if not input.requires_grad:
        return True
    root = input if input._base is None else input._base
    check("inplace_backward", not root.is_leaf, True, "False for a leaf of autograd or a view of one")
    check("inplace_backward", not _overlaps(input), True, "False for an input that is expanded or overlaps itself")
    # Under saved-tensor hooks, such as checkpointing's, autograd does not see that the logits are gone.
    return not torch.compiler.is_compiling() and torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
    alpha: float | Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    sample_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    empty: str = "nan",
    inplace_backward: bool = False,
) -> Tensor:
    r"""Softmax cross entropy with label smoothing, focal modulation, class and sample weights.

    Per row, with :math:`p = \operatorname{softmax}(z)`, :math:`z = s\tanh(\text{logit\_scale}\,x/s)`
    (or no softcap), and target distribution :math:`q` smoothed by :math:`e`:

    .. math:: l = \sum_c w_c\,\alpha_c\,q_c\,(1-p_c)^\gamma\,(-\log p_c) + \text{z\_loss}\cdot\operatorname{lse}(z)^2

    With the defaults it is :func:`torch.nn.functional.cross_entropy`. Sources: Szegedy et al. 2016
    (label smoothing), Lin et al. 2017 (focal loss), Chowdhery et al. 2022 (z-loss).

    Args:
        input: logits, float32/64, bfloat16 or float16, shape ``(C,)``, ``(N, C)`` or
            ``(N, C, d1, ...)``, any strides. Never written to (but see ``inplace_backward``).
        target: class indices of any integer dtype, shape ``()``, ``(N,)`` or ``(N, d1, ...)``; or
            class probabilities of any floating dtype, shape as ``input``.
        weight: weight of each class, shape ``(C,)``.
        ignore_index: rows with this class index have loss 0 and gradient 0, whatever their logits.
        reduction: ``"none"``; ``"sum"``; or ``"mean"``, which divides by the sum of
            ``sample_weight * weight[target]`` over the rows that count (of ``sample_weight`` alone
            for class probabilities), as torch does.
        label_smoothing: e in [0, 1].
        gamma: focal exponent >= 0; 0 is cross entropy.
        alpha: factor of the loss, one number or one per class, shape ``(C,)``. Unlike ``weight``
            it does not enter the divisor of ``"mean"``.
        z_loss: factor of the squared log-sum-exp.
        softcap: s > 0 caps the logits smoothly to (-s, s); None does not.
        logit_scale: factor of the logits, an inverse temperature.
        sample_weight: weight of each row, shape as class indices. A row of weight 0 is ignored.
        normalizer: divides the sum instead of the divisor above; only with ``"mean"``.
        empty: the ``"mean"`` when its divisor is 0 (no rows, or all ignored): ``"nan"`` as torch, or
            ``"zero"``. The gradient is 0 in either case.
        inplace_backward: the backward writes the gradient over ``input``'s memory, which saves an
            allocation of that size. PyTorch then refuses any later use of the logits by autograd. Without
            effect under ``torch.compile``, activation checkpointing and other saved-tensor hooks.

    Returns:
        The loss: a scalar, or shape ``()``, ``(N,)`` or ``(N, d1, ...)`` with ``"none"``. float64 for
        float64 logits, otherwise float32, also for half-precision logits. The gradient has
        ``input``'s dtype and layout.

    Raises:
        ValueError, TypeError: an argument has a wrong value, shape, device or dtype.
        IndexError: a class index is out of range (on the CPU). On other devices, which are never
            made to wait, that row's loss is NaN and its gradient 0, unless ``TORCHFAST_CHECK=1``
            is set in the environment; so it is under ``torch.func`` transforms.

    Gradients with respect to probabilities, ``weight``, ``alpha`` and ``sample_weight``, double
    backward, ``torch.func`` transforms and forward-mode AD work too, through plain PyTorch.

    Example:
        >>> import torch, torchfast
        >>> logits = torch.tensor([[2.0, 0.5, -1.0], [0.1, 3.0, 0.2]], requires_grad=True)
        >>> loss = torchfast.cross_entropy(logits, torch.tensor([0, 2]), label_smoothing=0.1)
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}", tuple(logits.grad.shape))
        1.6055 (2, 3)
    """
    _check_input(input)
    if isinstance(alpha, (int, float)):
        alpha = torch.full((1,), alpha, dtype=accumulate_dtype(input), device=input.device)
    factors = {"weight": weight, "alpha": alpha, "sample_weight": sample_weight}
    check_tensors(target, factors, input, "input", input.shape, class_dim(input))
    options = Options.of(
        target,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        gamma=gamma,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        normalizer=normalizer,
        empty=empty,
        inplace_backward=inplace_backward and _may_be_written(input),
    )
    return normalized(_op(input, target, weight, alpha, sample_weight, *options.flat), normalizer)


def focal_loss(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, gamma: float = 2.0, **options: Any
) -> Tensor:
    r"""Softmax focal loss (Lin et al. 2017): :func:`cross_entropy` with ``gamma=2.0``.

    Takes every option of :func:`cross_entropy`; shapes, dtypes and errors are the same.

    Example:
        >>> import torch, torchfast
        >>> logits = torch.tensor([[2.0, 0.5, -1.0], [0.1, 3.0, 0.2]])
        >>> print(f"{torchfast.focal_loss(logits, torch.tensor([0, 2]), alpha=0.25):.4f}")
        0.3265
    """
    return cross_entropy(input, target, weight, gamma=gamma, **options)


# ---- Sample inputs: what the generic tests, selftest and benchmarks run ----------------------


def sample_inputs(device: str = "cpu", dtype: torch.dtype = torch.float32, *, large: bool = False) -> Iterator[Sample]:
    """One call per option and layout; with ``large`` also one per way in which a kernel shares out its work."""
    g = torch.Generator(device="cpu").manual_seed(0)

    def logits(*shape: int) -> Tensor:
        return (2 * torch.randn(*shape, generator=g, dtype=torch.float64)).to(device, dtype)

    def indices(classes: int, *shape: int) -> Tensor:
        return torch.randint(classes, shape, generator=g).to(device)

    def positive(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=g, dtype=torch.float64) + 0.5).to(device, dtype)

    for classes in (3, 70):
        t = indices(classes, 5)
        t[1] = -100
        x = logits(5, classes)
        yield Sample((x, t), {})
        yield Sample((x, t, positive(classes)), {"reduction": "sum", "label_smoothing": 0.1})
        yield Sample((x, t), {"gamma": 2.0, "alpha": 0.25, "sample_weight": positive(5)})
        yield Sample((x, t), {"gamma": 1.5, "label_smoothing": 0.1, "alpha": positive(classes), "reduction": "none"})
        yield Sample((x, logits(5, classes).softmax(1)), {"gamma": 0.5, "z_loss": 1e-2})
        yield Sample((x, logits(5, classes).softmax(1), positive(classes)), {"softcap": 5.0, "logit_scale": 0.7})
    yield Sample((logits(5), indices(5)), {"label_smoothing": 0.2})
    image, labels = logits(2, 3, 4, 5), indices(3, 2, 4, 5)
    yield Sample((image, labels), {"gamma": 1.0})
    yield Sample((image.contiguous(memory_format=torch.channels_last), labels), {"label_smoothing": 0.1})
    yield Sample((logits(70, 6).t(), indices(70, 6)), {"normalizer": 3.0})
    if not large:
        return
    shapes = [(2, 24000), (2, 20011), (40, 1000), (2, 19, 24, 40)]  # rows split, ragged, whole; positions
    if torch.device(device).type != "cpu":
        shapes.append((300, 9000))  # rows walked by one program each
    for shape in shapes:
        x, t = logits(*shape), indices(shape[1], shape[0], *shape[2:])
        yield Sample((x, t), {})
        yield Sample((x, t, positive(shape[1])), {"gamma": 2.0, "label_smoothing": 0.1, "reduction": "sum"})


# ---- Registration: csrc/cross_entropy serves the CPU, triton_kernels.py GPUs -----------------

_op = register(
    "cross_entropy",
    "Tensor logits, Tensor target, Tensor? weight, Tensor? alpha, Tensor? sample_weight",
    "Tensor residuals",
    function=cross_entropy,
    reference=reference,
    reference_backward=reference_backward,
    fake=fake,
    sample_inputs=sample_inputs,
    options=Options,
)

_triton.register("torchfast.losses.cross_entropy.triton_launch", _op)
