"""The op that ranks scores: the areas under the ROC and the precision-recall curve, exact, ties included.

With the distinct scores in descending order, P_i positives and N_i negatives at the i-th, T_i and F_i positives and
negatives up to it, P and N all of them (sums of weights, where there are some)::

    ROC AUC            = sum of N_i (T_{i-1} + T_i) / 2 / (P N)     the trapezoids of scikit-learn's roc_auc_score
    average precision  = sum of P_i / P  T_i / (T_i + F_i)          the steps of its average_precision_score
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchfast.metrics._common import value_dtype

#: These devices' cumsum of floats adds in any order, and raises under ``torch.use_deterministic_algorithms``.
_UNORDERED = ("cuda",)


def running_sums(x: Tensor) -> Tensor:
    """The sums along the last dimension, up to each element, in the same order in every run."""
    if not (x.is_floating_point() and x.device.type in _UNORDERED):
        return x.cumsum(-1)
    step = 1
    while step < x.shape[-1]:  # by doubling: each element then has the sum of the 2 * step up to it
        x = torch.cat([x[..., :step], x[..., step:] + x[..., :-step]], -1)
        step *= 2
    return x


def areas_of(negatives: Tensor, positives: Tensor, ends: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The areas [2, curves] and the totals of positives and negatives [2, curves], from counts or weights by
    descending score, ``[curves, n]``. ``ends`` are the last elements of ties; None where there are none."""
    t, f = running_sums(positives), running_sums(negatives)
    dtype = value_dtype(t.device)
    if t.shape[1] == 0:
        nothing = torch.zeros(2, len(t), dtype=dtype, device=t.device)
        return nothing / 0, nothing

    def before(x: Tensor) -> Tensor:
        """Gives x at the end of the tie before."""
        if ends is not None:
            x = torch.where(ends, x, 0).cummax(1).values
        return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)

    t_before, f_before, total, others = before(t), before(f), t[:, -1].to(dtype), f[:, -1].to(dtype)
    # Products of int64 would overflow: that of the totals is up to 2^63 for 4e9 elements.
    trapezoids = (f - f_before).to(dtype) * (t + t_before).to(dtype)
    steps = (t - t_before).to(dtype) * t.to(dtype) / (t + f).to(dtype)
    steps = torch.where(t > t_before, steps, 0.0)
    if ends is not None:
        trapezoids, steps = torch.where(ends, trapezoids, 0.0), torch.where(ends, steps, 0.0)
    areas = torch.stack([trapezoids.sum(1) / 2 / total / others, steps.sum(1) / total])
    return areas, torch.stack([total, others])


def membership(
    scores: Tensor, labels: Tensor, weight: Tensor | None, ignore_index: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Tells of each element of ``[curves, n]`` if it is positive, if it counts, and if it is a mistake."""
    y = labels.long()
    valid = torch.ones_like(y, dtype=torch.bool) if ignore_index is None else y != ignore_index
    if y.dim() == 1:
        off = valid & ((y < 0) | (y >= len(scores)))
        positive = y == torch.arange(len(scores), device=y.device)[:, None]
    else:
        off, positive = valid & (y != 0) & (y != 1), y == 1
    if weight is not None:
        valid, off = valid & (weight != 0), (off & (weight != 0)) | (valid & ~((weight >= 0) & (weight < torch.inf)))
    wrong = off | (valid & scores.isnan())
    return positive, valid & ~wrong, wrong


def reference(scores: Tensor, labels: Tensor, weight: Tensor | None, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    # They become contiguous because strides decide in which order torch adds up.
    scores, labels = scores.contiguous(), labels.contiguous()
    positive, valid, wrong = membership(scores, labels, weight, ignore_index)
    w = valid.long() if weight is None else torch.where(valid, weight.to(value_dtype(scores.device)), 0.0)
    # What does not count may lie anywhere, as it is worth nothing.
    ordered, order = torch.where(valid, scores, 0.0).sort(1, descending=True)
    w, positive = w.expand(scores.shape).gather(1, order), positive.expand(scores.shape).gather(1, order)
    ends = torch.ones_like(positive)
    ends[:, :-1] = ordered[:, 1:] != ordered[:, :-1]
    areas, totals = areas_of(torch.where(positive, 0, w), torch.where(positive, w, 0), ends)
    return torch.where(wrong.any(1), torch.nan, areas), totals


def fake(scores: Tensor, labels: Tensor, weight: Tensor | None, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    shape, dtype = (2, len(scores)), value_dtype(scores.device)
    return scores.new_empty(shape, dtype=dtype), scores.new_empty(shape, dtype=dtype)
