"""The formula of this package in differentiable PyTorch: every device's fallback, and the truth of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchfast._common import NONE, SUM, accumulate_dtype, check_range, mean
from torchfast.losses.sigmoid_focal_loss.options import Options


def is_index(logits: Tensor, target: Tensor) -> bool:
    """True if the target holds a class id a row instead of a value an element."""
    return target.dim() < logits.dim()


def read_integers(
    logits: Tensor, target: Tensor, mask: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns an integer target as int64, where it is ignore_index, and where it is out of range (an error, unless
    masked)."""
    index = is_index(logits, target)
    low, high = (-1, logits.shape[-1] - 1) if index else (0, 1)
    values = target.long()
    ignored = values == ignore_index
    out = ~ignored & ((values < low) | (values > high))
    used = out if mask is None else out & (mask.any(dim=-1) if index else mask)
    check_range(target, used, f"{low} to {high}" if index else "0, 1")
    return values, ignored, out


def _factors(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    mask: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns z, A and B, and per element if it counts, and if its target is out of range."""
    dtype = accumulate_dtype(logits)
    counts = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask
    bad = torch.zeros_like(counts)
    if target.is_floating_point() or target.dtype == torch.bool:
        y = target.to(dtype)
    else:
        values, ignored, out = read_integers(logits, target, mask, options.ignore_index)
        y = torch.where(ignored | out, 0, values).to(dtype)
        if is_index(logits, target):
            y = (values.unsqueeze(-1) == torch.arange(logits.shape[-1], device=values.device)).to(dtype)
            ignored, out = ignored.unsqueeze(-1), out.unsqueeze(-1)
        bad = counts & out
        counts = counts & ~ignored & ~out
    keep, half = 1 - options.label_smoothing, options.label_smoothing / 2
    positive, negative = keep * y + half, keep * (1 - y) + half
    if options.alpha >= 0:
        positive, negative = options.alpha * positive, (1 - options.alpha) * negative
    if pos_weight is not None:
        positive = positive * pos_weight.to(dtype)
    if weight is not None:
        positive, negative = positive * weight.to(dtype), negative * weight.to(dtype)
    z = torch.where(counts, logits.to(dtype), 0.0)
    return z, positive, negative, counts, bad


def _modulated(z: Tensor, gamma: float) -> Tensor:
    """(1 - sigmoid(z))^gamma softplus(-z), twice differentiable also where 1 - sigmoid(z) or its power vanishes."""
    impossible = z == -torch.inf  # the loss is -z there
    log_p = F.logsigmoid(torch.where(impossible, 0.0, z))
    if gamma == 0:
        return torch.where(impossible, -z, -log_p)
    q = torch.sigmoid(-z)
    tiny = q < 1e-12  # powers below 2 have no derivatives at 0
    power = torch.where(tiny, (gamma * F.logsigmoid(-z)).exp(), torch.where(tiny, 1.0, q) ** gamma)
    return torch.where(impossible, -z, power * -log_p)


def _shifted(z: Tensor, gamma: float, clip: float) -> Tensor:
    """p_m^gamma (-log(1 - p_m)) with p_m = max(sigmoid(z) - clip, 0)."""
    if clip == 0:
        return _modulated(-z, gamma)
    q = torch.sigmoid(-z)
    p = torch.where(z > 0, 1 - q, torch.sigmoid(z))  # the derivative of sigmoid itself, p (1 - p), loses digits there
    on, large = ~(p <= clip), p > 0.5  # `on` also where p is NaN
    p_m = torch.where(on, p - clip, 0.25)
    loss = torch.where(large, -(torch.where(large, q, 0.25) + clip).log(), -torch.log1p(-torch.where(large, 0.25, p_m)))
    return torch.where(on, loss * p_m**gamma if gamma else loss, 0.0)


def _times(factor: Tensor, z: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """Multiplies factor and f(z): the result is exactly 0 where the factor is 0, whatever the logit."""
    excluded = (factor == 0) & ~z.isfinite()
    return torch.where(excluded, 0.0, factor * f(torch.where(excluded, 0.0, z)))


def reference(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    mask: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    z, positive, negative, counts, bad = _factors(logits, target, weight, pos_weight, mask, options)
    loss = _times(positive, z, lambda z: _modulated(z, options.gamma))
    loss = loss + _times(negative, z, lambda z: _shifted(z, options.gamma_neg, options.clip))
    loss = torch.where(bad, torch.nan, torch.where(counts, loss, 0.0))
    if options.reduction == NONE:
        divisor = loss.new_ones(1)
        if loss.stride() != fake(logits, options)[0].stride() and not loss.requires_grad:
            loss = torch.empty_like(logits, dtype=loss.dtype).copy_(loss)
        return loss, divisor
    if options.reduction == SUM:
        return loss.sum(), loss.new_ones(1)
    divisor = (counts | bad).expand(loss.shape).sum().to(loss.dtype)
    return mean(loss.sum(), divisor, options.empty_zero), divisor.reshape(1)


def reference_backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    mask: Tensor | None,
    options: Options,
    divisor: Tensor,
) -> Tensor:
    z, positive, negative, counts, _ = _factors(logits, target, weight, pos_weight, mask, options)
    gamma_neg, clip = options.gamma_neg, options.clip

    def slope(z: Tensor, gamma: float) -> Tensor:
        """-d/dz of (1 - p)^gamma softplus(-z)."""
        p, q = torch.sigmoid(z), torch.sigmoid(-z)
        return q**gamma * (q + gamma * torch.where(p == 0, 0.0, p * -F.logsigmoid(z)))

    def slope_shifted(z: Tensor) -> Tensor:
        p, q = torch.sigmoid(z), torch.sigmoid(-z)
        p_m = torch.where(p > clip, p - clip, 0.25)
        minus_log = torch.where(p > 0.5, -(q + clip).log(), -torch.log1p(-torch.where(p > 0.5, 0.25, p_m)))
        grad = p * q * p_m**gamma_neg * (1 / (q + clip) + gamma_neg * minus_log / p_m)
        return torch.where(p <= clip, 0.0, grad)

    grad = _times(negative, z, slope_shifted if clip else lambda z: slope(-z, gamma_neg))
    grad = grad - _times(positive, z, lambda z: slope(z, options.gamma))
    upstream = torch.where(divisor == 0, 0.0, grad_loss / divisor)
    upstream = torch.where(counts, upstream.reshape(grad_loss.shape), 0.0)
    return torch.empty_like(logits).copy_(torch.where(upstream == 0, 0.0, upstream * grad))


def fake(logits: Tensor, *tensors_and_options: Any) -> tuple[Tensor, Tensor]:
    options: Options = tensors_and_options[-1]
    dtype = accumulate_dtype(logits)
    loss = torch.empty_like(logits, dtype=dtype) if options.reduction == NONE else logits.new_empty([], dtype=dtype)
    return loss, logits.new_empty([1], dtype=dtype)
