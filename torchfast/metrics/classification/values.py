"""From counts and areas to the values of metrics: scikit-learn's formulas."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from torchfast.metrics._common import value_dtype
from torchfast.metrics.classification.areas import membership, running_sums
from torchfast.metrics.classification.counts import sum_by
from torchfast.metrics.classification.inputs import Curves
from torchfast.metrics.classification.options import FSCORES, Name, Options


class Counts(NamedTuple):
    """Sums over samples, int64, or float64 if weighted. What two batches have is the sum of what each has."""

    classes: Tensor  # [3, C]: right, predicted, in the target
    matrix: Tensor  # [C, C], if asked for; [L, 2, 2] for multilabel
    hits: Tensor  # right in the first k of each top k; for multilabel: samples all right, all samples
    wrong: Tensor  # see counts.py


def empty_counts(options: Options, weighted: bool) -> Counts:
    """The counts of no samples."""
    c, dtype = options.num_classes, torch.float64 if weighted else torch.long
    side = (c, 2, 2) if options.task == "multilabel" else (c, c) if options.matrix else (0, 0)
    hits = 2 if options.task == "multilabel" else len(options.ks)
    shapes = (3, c), side, (hits,)
    classes, matrix, right = (torch.zeros(shape, dtype=dtype) for shape in shapes)
    return Counts(classes, matrix, right, torch.zeros(5, dtype=torch.long))


# ---- Metrics of decisions --------------------------------------------------------------------


def _over(numerator: Tensor, denominator: Tensor, zero_division: float) -> Tensor:
    dtype = value_dtype(numerator.device)
    empty = denominator == 0
    return torch.where(empty, zero_division, numerator.to(dtype) / torch.where(empty, 1, denominator).to(dtype))


def _average(values: Tensor, kept: Tensor, weights: Tensor | None = None) -> Tensor:
    """scikit-learn's average of the values that are kept and not NaN; all weigh alike where all weights are zero."""
    kept = kept & ~values.isnan()
    values = torch.where(kept, values, 0.0)
    equal = kept.to(values.dtype)
    if weights is not None:
        weighted = torch.where(kept, weights.to(values.dtype), 0.0)
        equal = torch.where((weighted == 0).all(), equal, weighted)
    return (values * equal).sum() / equal.sum()


def _fscore(options: Options, name: Name, classes: Tensor) -> Tensor:
    if name.detail == "binary":
        right, predicted, actual = classes[:, 1]
    elif name.detail == "micro":
        right, predicted, actual = classes.sum(1)
    else:
        right, predicted, actual = classes
    beta = {"precision": 0.0, "recall": math.inf, "f1": 1.0, "fbeta": options.beta}[name.kind]
    if beta == 0:
        values = _over(right, predicted, options.zero_division)
    elif beta == math.inf:
        values = _over(right, actual, options.zero_division)
    else:
        square, dtype = beta * beta, value_dtype(classes.device)
        denominator = square * actual.to(dtype) + predicted.to(dtype)
        values = _over((1 + square) * right.to(dtype), denominator, options.zero_division)
    if values.dim() == 0 or name.detail == "none":
        return values
    every = options.task == "multilabel" or options.absent == "zero_division"
    kept = torch.ones_like(values, dtype=torch.bool) if every else (predicted + actual) > 0
    return _average(values, kept, actual if name.detail == "weighted" else None)


def _confusion(name: Name, matrix: Tensor) -> Tensor:
    if not name.detail:
        return matrix
    over = {"true": matrix.sum(-1, keepdim=True), "pred": matrix.sum(-2, keepdim=True), "all": matrix.sum()}
    return _over(matrix, over[name.detail], 0.0)


def _decision(options: Options, name: Name, counts: Counts) -> Tensor:
    if name.kind in FSCORES:
        return _fscore(options, name, counts.classes)
    if name.kind == "confusion_matrix":
        return _confusion(name, counts.matrix)
    right, total = counts.classes[0].sum(), counts.classes[2].sum()
    if options.task == "multilabel":
        right, total = counts.hits
    elif name.k:
        right = counts.hits[options.ks.index(name.k)]
    return _over(right, total, math.nan)


# ---- Metrics of scores -----------------------------------------------------------------------


class Areas(NamedTuple):
    """Both areas [2, curves] and the totals of positives and negatives [2, curves]; and as one curve, for micro."""

    each: tuple[Tensor, Tensor]
    pooled: tuple[Tensor, Tensor] | None


def as_one(curves: Curves) -> Curves:
    """Makes one curve, in which every pair of sample and class is a sample."""
    scores, labels, weight = curves
    if labels.dim() == 1:
        classes = torch.arange(len(scores), device=labels.device)[:, None]
        labels = torch.where((labels >= 0) & (labels < len(scores)), (labels == classes).long(), labels)
    weight = None if weight is None else weight.expand(scores.shape).reshape(-1)
    return Curves(scores.reshape(1, -1), labels.reshape(1, -1), weight)


def area(name: Name, found: Areas) -> Tensor:
    place = int(name.kind == "average_precision")
    if name.detail == "micro":
        assert found.pooled is not None
        return found.pooled[0][place, 0]
    (values, totals) = found.each[0][place], found.each[1]
    if name.detail == "":
        return values[0]
    if name.detail == "none":
        return values
    if name.detail == "macro":
        return values.mean()
    positives = totals[0]
    weighted = torch.where(positives > 0, values * positives, 0.0).sum()
    return weighted / positives.sum()


# ---- In bins ---------------------------------------------------------------------------------


def bin_counts(options: Options, curves: Curves, bins: int) -> Tensor:
    """How many negatives and positives of each curve have their score in each of the bins of [0, 1], the highest
    first: ``[2, curves, bins]``."""
    scores, labels, weight = curves
    positive, valid, _ = membership(scores, labels, weight, options.ignore_index)
    dtype = value_dtype(scores.device)
    places = (scores.to(dtype) * bins).floor().nan_to_num(0, 0, 0).clamp(0, bins - 1).long()
    n = len(scores)
    index = (positive.long() * n + torch.arange(n, device=scores.device)[:, None]) * bins + (bins - 1 - places)
    w = valid.long() if weight is None else torch.where(valid, weight.to(dtype), 0.0)
    return sum_by(index, w.expand(index.shape), 2 * n * bins).view(2, n, bins)


def bounds_of(options: Options, negatives: Tensor, positives: Tensor) -> dict[str, Tensor]:
    """Bounds how far the areas of bins may differ from those of the scores in them.

    ROC AUC: the pairs within a bin count half, and may count nothing or one. Average precision: a bin with T and F
    before it, P positives and N negatives has a precision of (T + P) / (T + F + P + N) for each of its positives;
    their true ones are at most (T + P) / (T + F + P), and at least T / (T + F + N), of counts that with T + 1 for T.
    """
    every = Areas(
        *[_bin_bounds(n, p) for n, p in ((negatives, positives), (negatives.sum(0)[None], positives.sum(0)[None]))]
    )
    return {name.text: area(name, every) for name in options.areas}


def _bin_bounds(negatives: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the bounds in the shape of areas, and the totals."""
    dtype = value_dtype(negatives.device)
    n, p = negatives.to(dtype), positives.to(dtype)
    total, others = p.sum(1), n.sum(1)
    t, f = running_sums(p) - p, running_sums(n) - n
    roc = (p * n).sum(1) / 2 / total / others
    here = (t + p) / (t + f + p + n)
    first = 0 if positives.is_floating_point() else 1
    least = (t + first) / (t + first + f + n).clamp(min=torch.finfo(dtype).tiny)
    error = torch.maximum((t + p) / (t + f + p) - here, here - least)
    average_precision = torch.where(p > 0, p * error, 0.0).sum(1) / total
    return torch.stack([roc, average_precision]), torch.stack([total, others])


# ---- All metrics -----------------------------------------------------------------------------


def values_of(options: Options, counts: Counts | None, found: Areas | None, wrong: Tensor) -> dict[str, Tensor]:
    """The metrics by name. If something was wrong, they are NaN, or -1 in a confusion matrix of integers."""
    bad = wrong.any()
    values = {}
    for name in options.names:
        if name in options.areas:
            assert found is not None
            value = area(name, found)
        else:
            assert counts is not None
            value = _decision(options, name, counts)
        values[name.text] = torch.where(bad, math.nan if value.is_floating_point() else -1, value)
    return values
