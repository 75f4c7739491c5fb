r"""Softmax cross entropy, label smoothing and focal loss: one formula, one op.

Per row (one position of the batch), with z = softcap(logit_scale * x), p = softmax(z), L = log p,
and q the target distribution (class index t: q_c = (1-e) [c = t] + e/K; probabilities y:
q_c = (1-e) y_c + e/K, where e is label_smoothing and K the number of classes)::

    u_c  = w_c a_c q_c                                 w: class weight, a: alpha, g: gamma
    loss = sum_c u_c (1 - p_c)^g (-L_c)  +  z_loss * lse(z)^2
    psi_c = -(1 - p_c)^g (1 + g p_c r_c),   r_c = -L_c / (1 - p_c)   (1 where p_c = 1)
    dloss/dz_j = u_j psi_j - p_j sum_c u_c psi_c + 2 z_loss lse p_j,   dz/dx = scale (1 - (z/s)^2)

g = 0 is cross entropy (Szegedy et al. 2016 for e > 0), e = 0 the softmax focal loss (Lin et al.
2017). Everything is computed in coordinates shifted by the row's maximum m, with the largest term
left out of the sum: rest = sum_{j != top} exp(z_j - m), L_c = (z_c - m) - log1p(rest). So 1 - p is
exact where p rounds to 1, and the row's residuals (m, rest, sum_c u_c psi_c) are all that backward
needs besides the logits.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchfast._register import Sample, register

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# ---- Reference: the formula above in differentiable PyTorch ---------------------------------


def _accumulate_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _class_dim(logits: Tensor) -> int:
    return 0 if logits.dim() == 1 else 1


def _check_range(target: Tensor, out_of_range: Tensor, classes: int) -> None:
    """Raises where reading the data is free (CPU) or asked for (TORCHFAST_CHECK=1)."""
    readable = target.device.type == "cpu" or os.environ.get("TORCHFAST_CHECK") == "1"
    traced = torch.compiler.is_compiling() or type(out_of_range) is not Tensor  # has no values to look at
    if traced or torch._C._are_functorch_transforms_active() or not readable or not out_of_range.any():
        return
    value = int(target[out_of_range].flatten()[0])
    raise IndexError(f"target {value} is out of range: allowed are 0 to {classes - 1} and ignore_index")


def _row_terms(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    alpha: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    logit_scale: float,
) -> tuple[Any, ...]:
    """Class dimension last: z, m, rest, L; the parts of u; per row: valid, bad, w_t.

    u is the sum of its parts (values, classes): of all classes where the latter is None. The index
    target's own class is a part by itself, for its digits and for the memory of a one-hot tensor.
    """
    dtype = _accumulate_dtype(logits)
    x = logits.movedim(_class_dim(logits), -1).to(dtype)
    classes = x.shape[-1]
    w = torch.ones(classes, dtype=dtype, device=x.device) if weight is None else weight.to(dtype)
    if target.is_floating_point():
        t = None
        valid = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        bad = ~valid
        w_t = valid.to(dtype)
    else:
        t = target.long()
        valid = t != ignore_index
        bad = valid & ((t < 0) | (t >= classes))
        _check_range(target, bad, classes)
        valid = valid & ~bad
        t = torch.where(valid, t, 0)
        w_t = torch.where(valid, w.gather(0, t.reshape(-1)).reshape(t.shape), 0.0)
    if sample_weight is not None:  # a row of weight 0 is ignored, whatever it holds
        valid = valid & ((sample_weight != 0) | (x < torch.inf).all(dim=-1))
    x = torch.where(valid.unsqueeze(-1), x, 0.0)
    z = logit_scale * x
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    m, top = z.max(dim=-1, keepdim=True)
    d = z - m
    # The gather is 0, or NaN where m is not finite: torch.softmax of such a row is NaN too.
    rest = d.exp().scatter(-1, top, 0.0).sum(dim=-1, keepdim=True) + d.gather(-1, top)
    log_p = d - rest.log1p()
    wa = w if alpha is None else w * alpha.to(dtype)
    keep, uniform = 1 - label_smoothing, label_smoothing / classes
    parts: list[tuple[Tensor, Tensor | None]]
    if t is None:
        parts = [((keep * target.movedim(_class_dim(logits), -1).to(dtype) + uniform) * wa, None)]
    else:
        own = keep * wa.gather(0, t.reshape(-1)).reshape(t.shape)
        parts = [(own.unsqueeze(-1), t.unsqueeze(-1))] + ([(uniform * wa, None)] if uniform else [])
    return z, m, rest, log_p, parts, valid, bad, w_t


def _sum_over_classes(
    parts: list[tuple[Tensor, Tensor | None]], log_p: Tensor, f: Callable[[Tensor], Tensor]
) -> Tensor:
    """sum_c u_c f(L_c). A class that does not count contributes exactly 0, also where its logit is -inf."""
    total = torch.zeros_like(log_p[..., 0])
    for u, classes in parts:
        terms = log_p if classes is None else log_p.gather(-1, classes)
        excluded = (u == 0) & ~terms.isfinite()
        total = total + torch.where(excluded, 0.0, u * f(torch.where(excluded, -1.0, terms))).sum(dim=-1)
    return total


def _modulated(log_p: Tensor, gamma: float) -> Tensor:
    """(1 - p)^gamma (-log p), differentiable (and 0) also at p = 1 with gamma < 1, and at p = 0."""
    if gamma == 0:
        return -log_p
    certain, impossible = log_p == 0, log_p == -torch.inf
    factor = (-torch.where(certain | impossible, -1.0, log_p).expm1()) ** gamma
    return torch.where(certain, 0.0, torch.where(impossible, 1.0, factor)) * -log_p


def _psi(log_p: Tensor, gamma: float) -> Tensor:
    if gamma == 0:
        return torch.full_like(log_p, -1.0)
    p, rest_p = log_p.exp(), -log_p.expm1()
    p_r = torch.where(p == 0, 0.0, torch.where(rest_p == 0, p, p * -log_p / rest_p))
    return -(rest_p**gamma) * (1 + gamma * p_r)


def _reference(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    alpha: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    gamma: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    empty_zero: bool,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor]:
    _, m, rest, log_p, parts, valid, bad, w_t = _row_terms(
        logits, target, weight, alpha, sample_weight, ignore_index, label_smoothing, softcap, logit_scale
    )
    loss = _sum_over_classes(parts, log_p, lambda terms: _modulated(terms, gamma))
    if z_loss:
        loss = loss + z_loss * (m + rest.log1p()).squeeze(-1) ** 2
    if sample_weight is not None:
        sample_weight = sample_weight.to(loss.dtype)
        valid = valid & ((sample_weight != 0) | loss.isfinite())
        loss, w_t = loss * sample_weight, w_t * sample_weight
    loss = torch.where(bad, torch.nan, torch.where(valid, loss, 0.0))
    divisor = w_t.sum() if reduction == 1 else torch.ones_like(loss.sum())
    if reduction:
        loss = loss.sum()
    if reduction == 1:
        # Over a divisor of 0 the gradient is 0: the division that fails must not be differentiated.
        empty = torch.zeros_like(loss) if empty_zero else (loss / divisor).detach()
        loss = torch.where(divisor == 0, empty, loss / torch.where(divisor == 0, 1.0, divisor))
    sum_u_psi = _sum_over_classes(parts, log_p.detach(), lambda terms: _psi(terms, gamma))
    stats = torch.stack([m.squeeze(-1), rest.squeeze(-1), sum_u_psi]).detach()
    used = valid if sample_weight is None else valid & (sample_weight != 0)
    stats = torch.where(used, stats, 0.0).flatten()
    return loss, torch.cat([stats, divisor.detach().reshape(1)])


def _reference_backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    alpha: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    gamma: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    empty_zero: bool,
    inplace_backward: bool,
    residuals: Tensor,
) -> Tensor:
    z, m, rest, log_p, parts, valid, _, w_t = _row_terms(
        logits, target, weight, alpha, sample_weight, ignore_index, label_smoothing, softcap, logit_scale
    )
    p, u = log_p.exp(), torch.zeros_like(log_p)
    for values, classes in parts:
        u = u + values if classes is None else u.scatter_add(-1, classes, values)
    u_psi = torch.where(u == 0, 0.0, u * _psi(log_p, gamma))
    others = u_psi - u_psi.sum(dim=-1, keepdim=True) + 2 * z_loss * (m + rest.log1p())
    grad = (u_psi * -log_p.expm1() + p * others) * logit_scale  # keeps its digits where p rounds to 1
    if softcap:
        grad = grad * (1 - (z / softcap) ** 2)
    divisor = residuals[-1]
    upstream = torch.where(divisor == 0, 0.0, grad_loss / divisor).expand(w_t.shape)
    if sample_weight is not None:
        upstream = upstream * sample_weight
    upstream = torch.where(valid, upstream, 0.0).unsqueeze(-1)
    grad = torch.where(upstream == 0, 0.0, upstream * grad)
    return torch.empty_like(logits).copy_(grad.movedim(-1, _class_dim(logits)))


def _fake(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    rows = list(logits.shape)
    del rows[_class_dim(logits)]
    dtype, reduction = _accumulate_dtype(logits), options[4]
    loss = logits.new_empty([] if reduction else rows, dtype=dtype)
    return loss, logits.new_empty([3 * math.prod(rows) + 1], dtype=dtype)


# ---- Public functions ------------------------------------------------------------------------


def _overlaps(x: Tensor) -> bool:
    """Whether two elements may share memory."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _check(name: str, ok: bool, given: object, allowed: object) -> None:
    if not ok:
        raise ValueError(f"{name} must be {allowed}, got {given!r}")


def _check_tensors(input: Tensor, target: Tensor, others: dict[str, Tensor | None]) -> None:
    if input.dtype not in _LOGITS_DTYPES:
        raise TypeError(f"input must be float32, bfloat16, float16 or float64, got {input.dtype}")
    if input.dim() == 0:
        raise ValueError("input must have shape (C,), (N, C) or (N, C, d1, ...), got a scalar")
    shape = input.shape
    rows = shape[:1] + shape[2:] if len(shape) > 1 else shape[1:]
    classes = shape[_class_dim(input)]
    _check("input", classes > 0, tuple(shape), "logits of at least one class")
    if target.is_floating_point():
        if target.shape != shape:
            raise ValueError(
                f"target of class probabilities ({target.dtype}) must have input's shape {tuple(shape)}, "
                f"got {tuple(target.shape)}; class indices must be of an integer dtype"
            )
    elif target.dtype == torch.bool or target.is_complex():
        raise TypeError(f"target must be integer class indices or float probabilities, got {target.dtype}")
    elif target.shape != rows:
        raise ValueError(
            f"target of class indices must have shape {tuple(rows)} for input of shape {tuple(shape)}, "
            f"got {tuple(target.shape)}; class probabilities must be of a floating dtype"
        )
    if target.device != input.device:
        raise ValueError(f"target must be on input's device {input.device}, got {target.device}")
    for name, tensor in others.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a tensor of a floating dtype, got {given}")
        allowed = rows if name == "sample_weight" else (classes,)
        scalar = name == "alpha" and tensor.numel() == 1
        _check(f"{name}'s shape", scalar or tensor.shape == allowed, tuple(tensor.shape), tuple(allowed))
        if tensor.device != input.device:
            raise ValueError(f"{name} must be on input's device {input.device}, got {tensor.device}")


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
    if isinstance(alpha, (int, float)):
        alpha = torch.full((1,), alpha, dtype=_accumulate_dtype(input), device=input.device)
    _check_tensors(input, target, {"weight": weight, "alpha": alpha, "sample_weight": sample_weight})
    _check("reduction", reduction in _REDUCTIONS, reduction, "'none', 'mean' or 'sum'")
    _check("empty", empty in ("nan", "zero"), empty, "'nan' or 'zero'")
    _check("label_smoothing", 0 <= label_smoothing <= 1, label_smoothing, "in [0, 1]")
    _check("gamma", 0 <= gamma < float("inf"), gamma, "finite and >= 0")
    _check("softcap", softcap is None or 0 < softcap < float("inf"), softcap, "None or finite and > 0")
    if target.is_floating_point():
        _check("ignore_index", ignore_index < 0, ignore_index, "negative for a target of class probabilities")
    if normalizer is not None:
        _check("normalizer", reduction == "mean", normalizer, f"None for reduction={reduction!r}")
        shape = tuple(normalizer.shape) if isinstance(normalizer, Tensor) else ()
        _check("normalizer's shape", shape == (), shape, "()")
        reduction = "sum"
    if inplace_backward and input.requires_grad:
        root = input if input._base is None else input._base
        _check("inplace_backward", not root.is_leaf, True, "False for a leaf of autograd or a view of one")
        _check("inplace_backward", not _overlaps(input), True, "False for an input that is expanded or overlaps itself")
        # With saved-tensor hooks (as under checkpointing) autograd does not see that the logits are gone.
        hooks = torch.compiler.is_compiling() or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        inplace_backward = not hooks
    loss = _op(
        input,
        target,
        weight,
        alpha,
        sample_weight,
        ignore_index,
        _REDUCTIONS[reduction],
        label_smoothing,
        gamma,
        z_loss,
        softcap or 0.0,
        logit_scale,
        empty == "zero",
        inplace_backward,
    )
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(loss.dtype)
    return loss if normalizer is None else loss / normalizer


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


# ---- Modules ---------------------------------------------------------------------------------


class CrossEntropyLoss(nn.Module):
    """Drop-in for :class:`torch.nn.CrossEntropyLoss` with every option of :func:`cross_entropy`.

    ``weight`` and a tensor ``alpha`` are buffers: they move with the module. ``sample_weight`` and
    ``normalizer`` belong to the batch and are given to the call.

    Example:
        >>> import torch, torchfast
        >>> criterion = torchfast.CrossEntropyLoss(label_smoothing=0.1, weight=torch.tensor([1.0, 2.0]))
        >>> logits = torch.zeros(4, 2, 8, 8, requires_grad=True)
        >>> loss = criterion(logits, torch.ones(4, 8, 8, dtype=torch.long))
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}")
        0.6758
    """

    weight: Tensor | None
    alpha: float | Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        gamma: float = 0.0,
        alpha: float | Tensor | None = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        empty: str = "nan",
        inplace_backward: bool = False,
    ) -> None:
        super().__init__()
        if size_average is not None or reduce is not None:  # torch's deprecated spelling
            reduction = nn._reduction.legacy_get_string(size_average, reduce)
        self.register_buffer("weight", weight)
        if isinstance(alpha, Tensor):
            self.register_buffer("alpha", alpha)
        else:
            self.alpha = alpha
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.gamma = gamma
        self.z_loss = z_loss
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.empty = empty
        self.inplace_backward = inplace_backward

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            gamma=self.gamma,
            alpha=self.alpha,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            sample_weight=sample_weight,
            normalizer=normalizer,
            empty=self.empty,
            inplace_backward=self.inplace_backward,
        )

    def extra_repr(self) -> str:
        shown = ("gamma", "alpha", "label_smoothing", "z_loss", "softcap", "logit_scale", "reduction")
        return ", ".join(
            f"{name}={getattr(self, name)!r}" for name in shown if not isinstance(getattr(self, name), Tensor)
        )


class FocalLoss(CrossEntropyLoss):
    """Softmax focal loss: :class:`CrossEntropyLoss` whose first argument is ``gamma``.

    Example:
        >>> import torch, torchfast
        >>> criterion = torchfast.FocalLoss(gamma=2.0, alpha=0.25)
        >>> print(f"{criterion(torch.zeros(4, 10), torch.arange(4)):.4f}")
        0.4663
    """

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: float | Tensor | None = None,
        weight: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(weight, gamma=gamma, alpha=alpha, **options)


class LabelSmoothingCrossEntropy(CrossEntropyLoss):
    """Cross entropy with label smoothing: :class:`CrossEntropyLoss` whose first argument is it.

    Example:
        >>> import torch, torchfast
        >>> criterion = torchfast.LabelSmoothingCrossEntropy(0.1)
        >>> print(f"{criterion(torch.eye(3), torch.arange(3)):.4f}")
        0.6181
    """

    def __init__(self, smoothing: float = 0.1, weight: Tensor | None = None, **options: Any) -> None:
        super().__init__(weight, label_smoothing=smoothing, **options)


# ---- Sample inputs: what the generic tests, selftest and benchmarks run ----------------------


def sample_inputs(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Sample]:
    """One call per kernel path and option: short and long rows, strided and channels_last."""
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


# ---- Registration. The CPU kernels are csrc/cpu/cross_entropy.cpp ----------------------------

_op = register(
    "cross_entropy",
    "Tensor logits, Tensor target, Tensor? weight, Tensor? alpha, Tensor? sample_weight, "
    "int ignore_index, int reduction, float label_smoothing, float gamma, float z_loss, "
    "float softcap, float logit_scale, bool empty_zero, bool inplace_backward",
    "Tensor residuals",
    function=cross_entropy,
    reference=_reference,
    reference_backward=_reference_backward,
    fake=_fake,
    sample_inputs=sample_inputs,
)
