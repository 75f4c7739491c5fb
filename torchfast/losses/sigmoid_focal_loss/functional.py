"""The public functions: what they take, what they refuse, what they return."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torchfast import _triton
from torchfast._common import (
    INTEGERS,
    REALS,
    check_device,
    check_factor,
    check_logits,
    check_mask,
    check_tensor,
    normalized,
)
from torchfast._register import Sample, register
from torchfast.losses.sigmoid_focal_loss.options import Options
from torchfast.losses.sigmoid_focal_loss.reference import fake, reference, reference_backward


def _check_target(inputs: Tensor, targets: Tensor) -> None:
    check_tensor("targets", targets, REALS, "a tensor of a floating, integer or bool dtype")
    ids = targets.dtype in INTEGERS and inputs.dim() > 0
    if targets.shape != inputs.shape and not (ids and targets.shape == inputs.shape[:-1]):
        shape = tuple(inputs.shape)
        rows = f"; class ids must have shape {shape[:-1]}" if ids else ""
        raise ValueError(f"targets must have inputs' shape {shape}{rows}, got {tuple(targets.shape)} ({targets.dtype})")
    check_device("targets", targets, "inputs", inputs)


def _expanded(name: str, tensor: Tensor, inputs: Tensor) -> Tensor:
    try:
        expanded = tensor.expand(inputs.shape)
    except RuntimeError:
        shape = tuple(inputs.shape)
        raise ValueError(
            f"{name}'s shape must be broadcastable to inputs' {shape}, got {tuple(tensor.shape)}"
        ) from None
    check_device(name, tensor, "inputs", inputs)
    return expanded


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    gamma_neg: float | None = None,
    clip: float = 0.0,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    normalizer: float | Tensor | None = None,
    empty: str = "nan",
) -> Tensor:
    r"""Sigmoid focal loss, and with other options binary cross entropy or the asymmetric loss.

    Per element, with :math:`p = \sigma(z)`, the target :math:`y' = (1-e)\,y + e/2` and
    :math:`p_m = \max(p - \text{clip}, 0)`:

    .. math:: l = w\,\bigl[\alpha\,\text{pos\_weight}\;y'\,(1-p)^{\gamma}\,(-\log p)
              + (1-\alpha)\,(1-y')\,p_m^{\gamma_-}\,(-\log(1-p_m))\bigr]

    With the defaults it is ``torchvision.ops.sigmoid_focal_loss``; with ``alpha=-1, gamma=0`` it is
    :func:`torch.nn.functional.binary_cross_entropy_with_logits`. Sources: Lin et al. 2017 (focal loss),
    Ridnik et al. 2021 (asymmetric loss).

    Args:
        inputs: logits, float32/64, bfloat16 or float16, any shape and strides. Never written to.
        targets: one of

            * a value y in [0, 1] for each element, shape as ``inputs``: any floating dtype (soft labels),
              bool, or any integer dtype (0 and 1);
            * class ids of any integer dtype, shape ``inputs.shape[:-1]``: the class of each row along the
              last dimension of ``inputs``, -1 where there is none (background). The same as their one-hot
              matrix, which then need not exist. For classes in another dimension give
              ``inputs.movedim(1, -1)``, which copies nothing.
        alpha: factor in [0, 1] of the positive part; the negative one has ``1 - alpha``. Negative: both 1.
        gamma: focal exponent >= 0; 0 does not modulate.
        reduction: ``"none"``; ``"sum"``; or ``"mean"``, which divides by the number of elements that count.
        gamma_neg: exponent of the negative part, if it is not ``gamma``.
        clip: in [0, 1): negatives of a smaller probability have no loss, others are shifted by it.
        label_smoothing: e in [0, 1], which moves each target towards 1/2.
        weight: factor of each element, broadcastable to ``inputs`` (for instance one a class).
        pos_weight: factor of the positive part, broadcastable to ``inputs``.
        mask: bool, broadcastable to ``inputs``. Elements where it is False have loss 0 and gradient 0,
            whatever their logits and targets, and do not count.
        ignore_index: integer targets with this value are masked (class ids: the row is).
        normalizer: divides the sum instead of the number of elements (RetinaNet: the number of
            positives); only with ``"mean"``.
        empty: the ``"mean"`` over no elements: ``"nan"`` as torch, or ``"zero"``. The gradient is 0 in either case.

    Returns:
        The loss: a scalar, or with ``"none"`` the shape of ``inputs``. float64 for float64 logits, otherwise
        float32, also for half-precision logits. The gradient has the dtype and layout of ``inputs``.

    Raises:
        ValueError, TypeError: an argument has a wrong value, shape, device or dtype.
        IndexError: an integer target is out of range (on the CPU). On other devices, which are never made
            to wait, the loss of that element or row is NaN and its gradient 0, unless
            ``TORCHFAST_CHECK=1`` is set in the environment; so it is under ``torch.func`` transforms.

    Gradients with respect to soft targets, ``weight`` and ``pos_weight``, double backward, ``torch.func``
    transforms and forward-mode AD work too, through plain PyTorch.

    Example:
        >>> import torch, torchfast
        >>> logits = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 0.0, 1.0]], requires_grad=True)
        >>> labels = torch.tensor([0, -1])  # the second row is background
        >>> loss = torchfast.sigmoid_focal_loss(logits, labels, reduction="mean", normalizer=1.0)
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}", tuple(logits.grad.shape))
        0.9570 (2, 3)
    """
    check_logits("inputs", inputs)
    _check_target(inputs, targets)
    options = Options.of(
        ignore_index=ignore_index,
        reduction=reduction,
        alpha=alpha,
        gamma=gamma,
        gamma_neg=gamma_neg,
        clip=clip,
        label_smoothing=label_smoothing,
        normalizer=normalizer,
        empty=empty,
    )
    if weight is not None:
        check_factor("weight", weight)
        weight = _expanded("weight", weight, inputs)
    if pos_weight is not None:
        check_factor("pos_weight", pos_weight)
        pos_weight = _expanded("pos_weight", pos_weight, inputs)
    if mask is not None:
        check_mask("mask", mask)
        mask = _expanded("mask", mask, inputs)
    return normalized(_op(inputs, targets, weight, pos_weight, mask, *options.flat), normalizer)


def asymmetric_loss(
    inputs: Tensor,
    targets: Tensor,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float = 0.05,
    reduction: str = "sum",
    **options: Any,
) -> Tensor:
    r"""Asymmetric loss for multi-label classification (Ridnik et al. 2021).

    :func:`sigmoid_focal_loss` without alpha, in the order and with the defaults of timm's
    ``AsymmetricLossMultiLabel``, whose reduction is the sum. ``gamma_pos`` is the ``gamma`` of positives. Takes every
    other option of :func:`sigmoid_focal_loss`; shapes, dtypes, errors and formula are the same.

    Example:
        >>> import torch, torchfast
        >>> logits, targets = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[1.0, 0.0, 0.0]])
        >>> print(f"{torchfast.asymmetric_loss(logits, targets):.4f}")
        0.1070
    """
    options = {"alpha": -1.0, **options}
    return sigmoid_focal_loss(
        inputs, targets, gamma=gamma_pos, gamma_neg=gamma_neg, clip=clip, reduction=reduction, **options
    )


# ---- Sample inputs: what the generic tests, selftest and benchmarks run ----------------------


def sample_inputs(device: str = "cpu", dtype: torch.dtype = torch.float32, *, large: bool = False) -> Iterator[Sample]:
    """One call per option, kind of target and layout; with ``large`` also sizes that many programs or threads share."""
    g = torch.Generator(device="cpu").manual_seed(0)

    def logits(*shape: int) -> Tensor:
        return (2 * torch.randn(*shape, generator=g, dtype=torch.float64)).to(device, dtype)

    def positive(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=g, dtype=torch.float64) + 0.5).to(device, dtype)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=g).to(device)

    for classes in (3, 70):
        x, one_hot, ids = logits(5, classes), integers(0, 2, 5, classes), integers(-1, classes, 5)
        ids[1], ids[2] = -100, -1
        yield Sample((x, one_hot.to(dtype)), {})
        yield Sample(
            (x, one_hot.bool(), -1.0, 0.0, "mean"), {"weight": positive(classes), "pos_weight": positive(classes)}
        )
        yield Sample((x, ids, 0.25, 1.5, "mean"), {})
        yield Sample((x, ids, 0.6, 1.0, "none"), {"label_smoothing": 0.1, "gamma_neg": 2.0, "clip": 0.1})
        soft = logits(5, classes).sigmoid()
        yield Sample((x, soft, 0.25, 0.5, "sum"), {"label_smoothing": 0.1, "weight": positive(5, classes)})
        yield Sample(
            (x, one_hot.to(torch.int8), -1.0, 1.0, "mean"),
            {"gamma_neg": 4.0, "clip": 0.05, "mask": integers(0, 3, 5, 1) > 0},
        )
        yield Sample((logits(classes, 6).t(), integers(0, 2, 6, classes).to(dtype)), {"gamma_neg": 0.0})
    yield Sample((logits(7), integers(0, 2, 7).to(dtype)), {"gamma": 3.0})
    image = logits(2, 3, 4, 5)
    yield Sample((image, integers(0, 2, 2, 3, 4, 5).int()), {"reduction": "mean", "normalizer": 3.0})
    yield Sample((image.contiguous(memory_format=torch.channels_last), integers(0, 2, 2, 3, 4, 5).to(dtype)), {})
    if not large:
        return
    for shape in ((300, 1000), (20011, 7), (3, 100003)):
        x = logits(*shape)
        yield Sample((x, integers(0, 2, *shape).to(dtype), 0.25, 2.0, "mean"), {})
        yield Sample((x, integers(-1, shape[-1], shape[0]), 0.25, 2.0, "sum"), {"weight": positive(shape[-1])})


# ---- Registration: csrc/sigmoid_focal_loss serves the CPU, triton_kernels.py GPUs ------------

_op = register(
    "sigmoid_focal_loss",
    "Tensor logits, Tensor target, Tensor? weight, Tensor? pos_weight, Tensor? mask",
    "Tensor divisor",
    function=sigmoid_focal_loss,
    reference=reference,
    reference_backward=reference_backward,
    fake=fake,
    sample_inputs=sample_inputs,
    options=Options,
)

_triton.register("torchfast.losses.sigmoid_focal_loss.triton_launch", _op)
