"""The formula of this package in differentiable PyTorch: every device's fallback, and the truth of the others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchfast._common import MEAN, NONE, accumulate_dtype, check_range, mean
from torchfast.losses.cross_entropy.options import Options


def class_dim(logits: Tensor) -> int:
    return 0 if logits.dim() == 1 else 1


def _row_terms(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    alpha: Tensor | None,
    sample_weight: Tensor | None,
    options: Options,
) -> tuple[Any, ...]:
    """With the class dimension last: z, m, rest, L; the parts of u; per row: valid, bad, w_t.

    u is the sum of its parts (values, classes): of all classes where the latter is None. The index
    target's own class is a part by itself, for its digits and for the memory of a one-hot tensor.
    """
    dtype = accumulate_dtype(logits)
    x = logits.movedim(class_dim(logits), -1).to(dtype)
    classes = x.shape[-1]
    w = torch.ones(classes, dtype=dtype, device=x.device) if weight is None else weight.to(dtype)
    if target.is_floating_point():
        t = None
        valid = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        bad = ~valid
        w_t = valid.to(dtype)
    else:
        t = target.long()
        valid = t != options.ignore_index
        bad = valid & ((t < 0) | (t >= classes))
        check_range(target, bad, f"0 to {classes - 1}")
        valid = valid & ~bad
        t = torch.where(valid, t, 0)
        w_t = torch.where(valid, w.gather(0, t.reshape(-1)).reshape(t.shape), 0.0)
    if sample_weight is not None:  # a row of weight 0 is ignored, whatever it holds
        valid = valid & ((sample_weight != 0) | (x < torch.inf).all(dim=-1))
    x = torch.where(valid.unsqueeze(-1), x, 0.0)
    z = options.logit_scale * x
    if options.softcap:
        z = options.softcap * torch.tanh(z / options.softcap)
    m, top = z.max(dim=-1, keepdim=True)
    d = z - m
    # The gather is 0, or NaN where m is not finite: torch.softmax of such a row is NaN too.
    rest = d.exp().scatter(-1, top, 0.0).sum(dim=-1, keepdim=True) + d.gather(-1, top)
    log_p = d - rest.log1p()
    wa = w if alpha is None else w * alpha.to(dtype)
    keep, uniform = 1 - options.label_smoothing, options.label_smoothing / classes
    parts: list[tuple[Tensor, Tensor | None]]
    if t is None:
        parts = [((keep * target.movedim(class_dim(logits), -1).to(dtype) + uniform) * wa, None)]
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


def reference(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    alpha: Tensor | None,
    sample_weight: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    terms = _row_terms(logits, target, weight, alpha, sample_weight, options)
    _, m, rest, log_p, parts, valid, bad, w_t = terms
    loss = _sum_over_classes(parts, log_p, lambda log_p: _modulated(log_p, options.gamma))
    if options.z_loss:
        loss = loss + options.z_loss * (m + rest.log1p()).squeeze(-1) ** 2
    if sample_weight is not None:
        sample_weight = sample_weight.to(loss.dtype)
        valid = valid & ((sample_weight != 0) | loss.isfinite())
        loss, w_t = loss * sample_weight, w_t * sample_weight
    loss = torch.where(bad, torch.nan, torch.where(valid, loss, 0.0))
    divisor = w_t.sum() if options.reduction == MEAN else torch.ones_like(loss.sum())
    if options.reduction != NONE:
        loss = loss.sum()
    if options.reduction == MEAN:
        loss = mean(loss, divisor, options.empty_zero)
    sum_u_psi = _sum_over_classes(parts, log_p.detach(), lambda log_p: _psi(log_p, options.gamma))
    stats = torch.stack([m.squeeze(-1), rest.squeeze(-1), sum_u_psi]).detach()
    used = valid if sample_weight is None else valid & (sample_weight != 0)
    stats = torch.where(used, stats, 0.0).flatten()
    return loss, torch.cat([stats, divisor.detach().reshape(1)])


def reference_backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    alpha: Tensor | None,
    sample_weight: Tensor | None,
    options: Options,
    residuals: Tensor,
) -> Tensor:
    terms = _row_terms(logits, target, weight, alpha, sample_weight, options)
    z, m, rest, log_p, parts, valid, _, w_t = terms
    p, u = log_p.exp(), torch.zeros_like(log_p)
    for values, classes in parts:
        u = u + values if classes is None else u.scatter_add(-1, classes, values)
    u_psi = torch.where(u == 0, 0.0, u * _psi(log_p, options.gamma))
    others = u_psi - u_psi.sum(dim=-1, keepdim=True) + 2 * options.z_loss * (m + rest.log1p())
    grad = (u_psi * -log_p.expm1() + p * others) * options.logit_scale  # it keeps its digits where p rounds to 1
    if options.softcap:
        grad = grad * (1 - (z / options.softcap) ** 2)
    divisor = residuals[-1]
    upstream = torch.where(divisor == 0, 0.0, grad_loss / divisor).expand(w_t.shape)
    if sample_weight is not None:
        upstream = upstream * sample_weight
    upstream = torch.where(valid, upstream, 0.0).unsqueeze(-1)
    grad = torch.where(upstream == 0, 0.0, upstream * grad)
    return torch.empty_like(logits).copy_(grad.movedim(-1, class_dim(logits)))


def fake(logits: Tensor, *tensors_and_options: Any) -> tuple[Tensor, Tensor]:
    options: Options = tensors_and_options[-1]
    rows = list(logits.shape)
    del rows[class_dim(logits)]
    dtype = accumulate_dtype(logits)
    loss = logits.new_empty(rows if options.reduction == NONE else [], dtype=dtype)
    return loss, logits.new_empty([3 * math.prod(rows) + 1], dtype=dtype)
