"""The ops that count predictions, in PyTorch: every device's fallback, and the truth of the kernels.

From scores or class ids to what every metric of decisions is made of.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchfast.metrics._common import value_dtype

#: The places of ``wrong``, which counts rows with such a mistake; they count nowhere else.
NAN, TARGET, IDS, WEIGHT, PROBABILITY = range(5)


def sum_by(index: Tensor, values: Tensor, size: int) -> Tensor:
    """The sum of the values of each index from 0 to size - 1, in the same order in every run."""
    sums = values.new_zeros(size)
    if values.is_floating_point() and values.device.type == "cuda":  # CUDA's index_add_ adds in any order
        return sums.index_put_((index.reshape(-1),), values.reshape(-1), accumulate=True)
    return sums.index_add_(0, index.reshape(-1), values.reshape(-1))


def _weights(good: Tensor, weight: Tensor | None) -> Tensor:
    """Returns what a row counts, as int64 without weights, else as float64."""
    return good.long() if weight is None else torch.where(good, weight.to(value_dtype(good.device)), 0.0)


# ---- Binary and multiclass: one class of many ------------------------------------------------


def class_reference(
    preds: Tensor,
    target: Tensor,
    weight: Tensor | None,
    num_classes: int,
    ignore_index: int | None,
    ks: Sequence[int],
    matrix: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = target.long()
    valid = torch.ones_like(y, dtype=torch.bool) if ignore_index is None else y != ignore_index
    if weight is not None:
        valid = valid & (weight != 0)
    off = valid & ((y < 0) | (y >= num_classes))
    scores = preds.dim() > target.dim()
    if scores:
        predicted, missing = preds.argmax(1), valid & preds.isnan().any(1)
        outside = torch.zeros_like(valid)
    else:
        predicted, missing = preds.long(), torch.zeros_like(valid)
        outside = valid & ((predicted < 0) | (predicted >= num_classes))
    unweighable = torch.zeros_like(valid) if weight is None else valid & ~((weight > 0) & (weight < torch.inf))
    good = valid & ~off & ~missing & ~outside & ~unweighable
    w = _weights(good, weight)
    y, predicted = torch.where(good, y, 0), torch.where(good, predicted, 0)
    right = torch.where(y == predicted, w, 0)
    counts = torch.stack([sum_by(i, v, num_classes) for i, v in ((y, right), (predicted, w), (y, w))])
    table = w.new_zeros(0, 0)
    if matrix:
        table = sum_by(y * num_classes + predicted, w, num_classes**2).view(num_classes, num_classes)
    hits = w.new_zeros(len(ks))
    if scores and ks:
        own = preds.gather(1, y.unsqueeze(1))
        of_class = torch.arange(num_classes, device=preds.device).view(-1, *[1] * (preds.dim() - 2))
        rank = ((preds > own) | ((preds == own) & (of_class > y.unsqueeze(1)))).sum(1)
        hits = torch.stack([torch.where(rank < k, w, 0).sum() for k in ks])
    wrong = torch.stack([x.sum() for x in (missing, off, outside, unweighable, torch.zeros_like(valid))])
    return counts, table, hits, wrong


def _count_dtype(weight: Tensor | None) -> torch.dtype:
    return torch.long if weight is None else value_dtype(weight.device)


def class_fake(
    preds: Tensor,
    target: Tensor,
    weight: Tensor | None,
    num_classes: int,
    ignore_index: int | None,
    ks: Sequence[int],
    matrix: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, side = _count_dtype(weight), num_classes if matrix else 0
    shapes = (3, num_classes), (side, side), (len(ks),)
    counts, table, hits = (preds.new_empty(shape, dtype=dtype) for shape in shapes)
    return counts, table, hits, preds.new_empty(5, dtype=torch.long)


# ---- Binary decisions: each label by itself ---------------------------------------------------


def label_reference(
    preds: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int | None,
    threshold: float,
    probabilities: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # They become contiguous because strides decide in which order torch adds up.
    preds, y = preds.contiguous(), target.long().contiguous()
    valid = torch.ones_like(y, dtype=torch.bool) if ignore_index is None else y != ignore_index
    if weight is not None:
        weight = weight[:, None]
        valid = valid & (weight != 0)
    off = valid & (y != 0) & (y != 1)
    none = torch.zeros_like(valid)
    missing = outside = improbable = none
    if preds.is_floating_point():
        x = preds.to(value_dtype(preds.device))
        predicted, missing = x > threshold, valid & x.isnan()
        if probabilities:
            improbable = valid & ~missing & ~((x >= 0) & (x <= 1))
    else:
        ids = preds.long()
        predicted, outside = ids == 1, valid & (ids != 0) & (ids != 1)
    unweighable = none if weight is None else valid & ~((weight > 0) & (weight < torch.inf))
    good = valid & ~off & ~missing & ~outside & ~unweighable & ~improbable
    w = _weights(good, weight)
    positive = y == 1
    cells = (~positive & ~predicted, ~positive & predicted, positive & ~predicted, positive & predicted)
    matrix = torch.stack([torch.where(cell, w, 0).sum(0) for cell in cells], 1).view(-1, 2, 2)
    of_row = w.amax(1) if w.shape[1] else w.sum(1)
    exact = torch.where((good & (positive != predicted)).any(1), 0, of_row)
    rows = torch.stack([exact.sum(), of_row.sum()])
    wrong = torch.stack([x.sum() for x in (missing, off, outside, unweighable, improbable)])
    return matrix, rows, wrong


def label_fake(
    preds: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int | None,
    threshold: float,
    probabilities: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _count_dtype(weight)
    matrix = preds.new_empty((preds.shape[1], 2, 2), dtype=dtype)
    return matrix, preds.new_empty(2, dtype=dtype), preds.new_empty(5, dtype=torch.long)
