"""The kernel, which serves every device: chunks of rows, whose losses and gradients are those of cross_entropy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchfast._common import MEAN, NONE, check_logits, mean
from torchfast.losses.linear_cross_entropy.reference import Arguments, row_losses

_write_gradient = torch.ops.torchfast.cross_entropy_backward_.default


def _checked(*arguments: Any) -> Arguments:
    """Protects direct callers of the op: a gradient that is rounded to a dtype without a sign is wrong."""
    a = Arguments(*arguments)
    for name, x in zip(("input", "linear_weight", "linear_bias"), a, strict=False):
        if x is not None:
            check_logits(name, x)
    return a


def _rows_of_chunk(rows: int, classes: int, device: torch.device) -> int:
    """The default is 80 MB of fp32 logits, and so many rows that reading and adding to (V, D) matrices, once a chunk,
    costs little beside the products: on the CPU 128 rows are 2% slower than 512, and a GPU needs more. All chunks are
    of one size."""
    cpu = device.type == "cpu"
    at_most = max(128, 20 * 2**20 // classes) if cpu else max(1024, 2**27 // classes)
    chunks = max(1, -(-rows // at_most))
    return max(1, -(-rows // chunks))


def _counting(a: Arguments) -> Tensor | None:
    """Marks the rows that count; None means all. The others may hold anything, also in their hidden states."""
    counting = None if a.target.is_floating_point() else a.target.long() != a.options.ignore_index
    if a.sample_weight is not None:
        counting = a.sample_weight != 0 if counting is None else counting & (a.sample_weight != 0)
    return counting


def _divisor(a: Arguments) -> Tensor:
    """A mean is divided by the sum of sample_weight * weight[target] over the rows that count; all else by 1."""
    if a.options.reduction != MEAN:
        return a.input.new_ones((), dtype=a.wide)
    each = a.input.new_ones(a.target.shape[0], dtype=a.wide)
    if not a.target.is_floating_point():
        target = a.target.long()
        valid = (target != a.options.ignore_index) & (target >= 0) & (target < a.linear_weight.shape[0])
        if a.weight is not None:
            each = a.weight.to(a.wide)[torch.where(valid, target, 0)]
        each = torch.where(valid, each, 0.0)
    return (each if a.sample_weight is None else each * a.sample_weight.to(a.wide)).sum()


@functools.cache
def _adds_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """True if addmm adds a half-precision product to an fp32 matrix. Its signature says so since torch 2.8, but it
    refused such a matrix until pytorch#167931, so it is asked: with a product of nothing, for which nothing runs."""
    total, x = (torch.empty(0, 0, dtype=of, device=device) for of in (torch.float32, dtype))
    try:
        torch.addmm(total, x, x, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True


def _add_product(total: Tensor, x: Tensor, y: Tensor, widens: bool) -> None:
    """total += x y. Half-precision products are added up, and arrive, in the dtype of the total."""
    if x.dtype == total.dtype:
        total.addmm_(x, y)
        return
    if widens and _adds_in_place(total.device, x.dtype):  # reads and writes the total once; below it moves four times
        torch.addmm(total, x, y, out_dtype=total.dtype, out=total)
        return
    if not widens:
        y = y.to(total.dtype)
    for start in range(0, len(total), 8192):  # in parts, so that no product has the size of the total
        part = slice(start, start + 8192)
        if widens:
            total[part] += torch.mm(x[part], y, out_dtype=total.dtype)
        else:
            total[part].addmm_(x[part].to(total.dtype), y)


def _new_gradients(like: Callable[..., Tensor], a: Arguments) -> list[Tensor]:
    """The gradients of weight and bias are sums over all rows, in the dtype of sums; the input's has the dtype of a
    product."""
    dtypes = a.wide if a.widens else a.dtype, a.wide, a.wide
    each = zip(a[:3], dtypes, a.gradients, strict=True)
    return [like(x, dtype=dtype) if need else a.input.new_empty(0) for x, dtype, need in each]


def _walk(a: Arguments, upstream: Tensor) -> tuple[Tensor, ...]:
    """Computes the row losses and, for an upstream gradient of each row, the gradients that are needed."""
    w = a.linear_weight.to(a.dtype)
    if 1 not in w.stride():  # every product would copy the weight
        w = w.contiguous()
    b = None if a.linear_bias is None else a.linear_bias.to(a.dtype)
    rows, classes, device = a.input.shape[0], w.shape[0], w.device
    counting, index = _counting(a), None
    if counting is not None and device.type == "cpu":  # other devices would have to be waited for
        index, counting = counting.nonzero().squeeze(1), None
        index, rows = (None, rows) if len(index) == rows else (index, len(index))
    loss = a.input.new_zeros(a.input.shape[0], dtype=a.wide)
    grad_input, grad_weight, grad_bias = gradients = _new_gradients(torch.zeros_like, a)
    need_input, need_weight, need_bias = a.gradients
    step = a.chunk_size or _rows_of_chunk(rows, classes, device)
    options = replace(a.options, reduction=NONE).flat
    buffer = w.new_empty(min(step, rows), classes)
    for start in range(0, rows, step):
        chunk = slice(start, min(start + step, rows)) if index is None else index[start : start + step]
        h = a.input[chunk].to(a.dtype)
        if counting is not None:
            h = torch.where(counting[chunk].unsqueeze(1), h, 0.0)
        logits = buffer[: len(h)]
        if b is None:
            torch.mm(h, w.t(), out=logits)
        else:
            torch.addmm(b, h, w.t(), out=logits)
        sample_weight = None if a.sample_weight is None else a.sample_weight[chunk]
        call = (logits, a.target[chunk], a.weight, a.alpha, sample_weight, *options)
        loss[chunk], residuals = row_losses.forward(*call)
        if not any(a.gradients):
            continue
        _write_gradient(upstream[chunk], *call, residuals)
        if need_input:
            grad_input[chunk] = torch.mm(logits, w, out_dtype=a.wide) if a.widens else torch.mm(logits, w)
        if need_weight:
            _add_product(grad_weight, logits.t(), h, a.widens)
        if need_bias:
            grad_bias += logits.sum(0, dtype=a.wide)
    return loss, *gradients


def _inverse(divisor: Tensor) -> Tensor:
    return torch.where(divisor == 0, 0.0, 1 / divisor)


def forward(*arguments: Any) -> tuple[Tensor, ...]:
    """Returns the loss, a scale, and the gradients that are needed, not multiplied by the scale yet. It is 1, but for a
    mean in fp16: this cannot hold p / rows, so that the gradients are those of the sum."""
    a = _checked(*arguments)
    with torch.autocast(a.input.device.type, enabled=False):
        divisor = _divisor(a)
        scale = torch.ones_like(divisor)
        upstream = _inverse(divisor)
        if a.dtype == torch.float16:
            scale, upstream = upstream, scale
        loss, *gradients = _walk(a, upstream.expand(a.input.shape[0]))
        if a.options.reduction != NONE:
            loss = loss.sum()
        if a.options.reduction == MEAN:
            loss = mean(loss, divisor, a.options.empty_zero)
        return loss, scale, *gradients


def backward(grad_loss: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Computes, from new logits, the gradients that are needed and that the forward did not compute."""
    a = _checked(*arguments[:-4])
    with torch.autocast(a.input.device.type, enabled=False):
        upstream = grad_loss * _inverse(_divisor(a))
        _, *gradients = _walk(a, upstream.expand(a.input.shape[0]))
        each = zip(a[:3], gradients, a.gradients, strict=True)
        return tuple(g.to(x.dtype) if need and x is not None else g for x, g, need in each)


def fake(*arguments: Any) -> tuple[Tensor, ...]:
    a = Arguments(*arguments)
    loss = a.input.new_empty(() if a.options.reduction != NONE else a.input.shape[:1], dtype=a.wide)
    return loss, a.input.new_empty((), dtype=a.wide), *_new_gradients(torch.empty_like, a)
