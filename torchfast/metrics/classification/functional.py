"""The public functions: what they take, what they refuse, what they return."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchfast._common import readable
from torchfast._register import register_metric
from torchfast.metrics.classification.areas import fake as areas_fake
from torchfast.metrics.classification.areas import reference as areas_reference
from torchfast.metrics.classification.counts import (
    PROBABILITY,
    class_fake,
    class_reference,
    label_fake,
    label_reference,
)
from torchfast.metrics.classification.inputs import (
    Batch,
    Curves,
    check_inputs,
    curves_of,
    improbable_rows,
    refuse,
    task_of,
    wrong_in_curves,
)
from torchfast.metrics.classification.options import Options, resolve
from torchfast.metrics.classification.samples import area_samples, class_samples, label_samples
from torchfast.metrics.classification.values import Areas, Counts, as_one, values_of

# ---- From a batch to sums and areas ------------------------------------------------------------


def count(options: Options, batch: Batch) -> Counts:
    preds, target, weight = batch
    if options.task == "multiclass":
        return Counts(
            *_class_counts(preds, target, weight, options.num_classes, options.ignore_index, options.ks, options.matrix)
        )
    probabilities = batch.scores and not options.from_logits
    table, rows, wrong = _label_counts(preds, target, weight, options.ignore_index, options.cut, probabilities)
    if options.task == "binary":
        table = table[0]
        classes = torch.stack([table.diagonal(), table.sum(0), table.sum(1)])
        return Counts(classes, table if options.matrix else table[:0, :0], rows[:0], wrong)
    classes = torch.stack([table[:, 1, 1], table[:, :, 1].sum(1), table[:, 1].sum(1)])
    return Counts(classes, table, rows, wrong)


def _areas(curves: Curves, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    areas, totals = _ranked_areas(*curves, ignore_index)
    return areas, totals


def areas(options: Options, curves: Curves, ignore_index: int | None) -> Areas:
    details = {name.detail for name in options.areas}
    pooled = _areas(as_one(curves), ignore_index) if "micro" in details else None
    if details == {"micro"} and pooled is not None:
        return Areas(pooled, pooled)
    return Areas(_areas(curves, ignore_index), pooled)


def improbable(options: Options, curves: Curves) -> Tensor:
    """Counts in ``wrong`` only the rows that do not sum to 1."""
    wrong = torch.zeros(5, dtype=torch.long, device=curves.scores.device)
    rows = improbable_rows(options, curves)
    if rows is not None:
        wrong[PROBABILITY] = rows.sum()
    return wrong


def warn_of_undefined(options: Options, found: Areas) -> None:
    """Warns, where reading is free, of areas without positives and of ROC AUCs without negatives: they are NaN."""
    if not options.areas or not readable(found.each[1]):
        return
    (_, totals), names = found.each, ", ".join(name.text for name in options.areas)
    roc = any(name.kind == "roc_auc" for name in options.areas)
    for side, row, concerned in (("positive", totals[0], True), ("negative", totals[1], roc)):
        empty = (row == 0).nonzero().flatten().tolist() if concerned else []
        if empty:
            where = "" if options.task == "binary" else f" of class {empty[0]}"
            warnings.warn(f"there are no {side} samples{where}, so {names} is NaN there", UserWarning, stacklevel=4)
            return


def classification_metrics(
    preds: Tensor,
    target: Tensor,
    metrics: str | Sequence[str],
    *,
    task: str | None = None,
    num_classes: int | None = None,
    threshold: float = 0.5,
    from_logits: bool = False,
    ignore_index: int | None = None,
    sample_weight: Tensor | None = None,
    beta: float = 1.0,
    zero_division: float = 0.0,
    absent: str = "skip",
    nan: str = "error",
) -> dict[str, Tensor]:
    r"""Classification metrics, all of one pass over the predictions. They are scikit-learn's, on tensors.

    With tp_c, predicted_c and actual_c the samples of class c that are predicted right, predicted, and there::

        precision = tp / predicted     recall = tp / actual
        f_beta    = (1 + beta^2) tp / (beta^2 actual + predicted)     accuracy = sum of tp / samples

    ``"micro"`` takes them of the sums over the classes, ``"macro"`` the mean over the classes, ``"weighted"`` the
    mean weighted by actual, ``"none"`` one value a class, ``"binary"`` those of class 1. The areas of the curves are
    defined in :mod:`torchfast.metrics.classification.areas`; of multiclass they are those of each class against the
    rest.

    Args:
        preds: scores in float32/64, bfloat16 or float16, or decisions in bool or integers; any strides. Shape of
            binary: that of ``target``; multilabel: ``(N, L, ...)``; multiclass: scores ``(N, C, ...)``, whose
            largest (the first of them, if tied) is the decision, or class ids ``(N, ...)``.
        target: bool, integers, or floats that are integers: 0 and 1, of multiclass 0 to C - 1, shape ``(N, ...)``, of
            multilabel ``(N, L, ...)``.
        metrics: ``"accuracy"`` (of multilabel: all labels of a sample right), of multiclass also ``"accuracy@5"``, the
            target among the 5 largest scores (tied ones by descending class, as scikit-learn's
            ``top_k_accuracy_score``); ``"precision"``, ``"recall"``, ``"f1"``, ``"fbeta"`` with ``@binary`` (the
            default of binary), ``@micro``, ``@macro``, ``@weighted`` or ``@none``; ``"confusion_matrix"`` (rows:
            target; of multilabel ``(L, 2, 2)``), and of it ``@true``, ``@pred`` and ``@all``, normalized;
            ``"roc_auc"`` and ``"average_precision"``, of several classes with ``@macro`` (default), ``@micro``,
            ``@weighted`` or ``@none``.
        task: ``"binary"``, ``"multiclass"`` or ``"multilabel"``. Default: multiclass with ``num_classes`` or with
            scores of one dimension more than ``target``, binary with one-dimensional floats or bools.
        num_classes: C of multiclass class ids.
        threshold: of binary and multilabel scores: a probability above it is a decision for 1.
        from_logits: the scores are logits, not probabilities: of multiclass, areas rank by their softmax, which is
            not how one-vs-rest decision values rank (for these ``task="multilabel"`` with one-hot targets). It does
            not matter to decisions of multiclass. Without it, probabilities outside of 0 to 1 where ``threshold`` is
            applied, and rows of multiclass that do not sum to 1 where areas are asked for, are refused.
        ignore_index: what has this target does not count, whatever is predicted.
        sample_weight: finite weight >= 0 of each sample, of a floating dtype, of ``target``'s shape, of multilabel
            without the label dimension. A sample of weight 0 is as if it were not there.
        beta: of ``"fbeta"``: the weight of recall.
        zero_division: 0, 1 or NaN: the value of 0 / 0; NaN is left out of averages.
        absent: classes that are neither in the target nor predicted: ``"skip"`` (default), macro leaves them out, as
            scikit-learn does by default; ``"zero_division"``, they count, as with its ``labels=range(C)``.
        nan: NaN predictions: ``"error"`` (default), or ``"propagate"``: all values are NaN.

    Returns:
        The value of each metric by its name, in float64: scalars, or ``(C,)`` with ``"none"``. A confusion matrix is
        in int64, with weights in float64. An area of a class without positive samples, or a ROC AUC without negative
        ones, is NaN, with a warning (scikit-learn has 0 for the average precision). Accuracy of nothing is NaN.
        Metrics have no gradient.

    Raises:
        ValueError, TypeError: an argument has a wrong value, shape, device or dtype.
        IndexError: a target or a class id is out of range.
        RuntimeError: under ``torch.func`` transforms and forward-mode AD.

        On GPUs, which are not made to wait, the values of tensors are not checked and nothing is warned of, unless
        ``TORCHFAST_CHECK=1`` is set in the environment: where something is wrong, all values are NaN, and all of
        an integer confusion matrix is -1.

    Example:
        >>> import torch
        >>> from torchfast.metrics import classification_metrics
        >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0], [1.0, 2.0, 0.0], [0.0, 2.0, 1.0]])
        >>> target = torch.tensor([0, 2, 1, 2])
        >>> found = classification_metrics(logits, target, ["accuracy", "accuracy@2", "f1@macro", "confusion_matrix"])
        >>> found["accuracy"].item(), found["accuracy@2"].item(), round(found["f1@macro"].item(), 4)
        (0.75, 1.0, 0.7778)
        >>> found["confusion_matrix"]
        tensor([[1, 0, 0],
                [0, 1, 0],
                [0, 1, 1]])
    """
    task, num_classes = task_of(preds, target, num_classes, task)
    options = resolve(
        metrics,
        task=task,
        num_classes=num_classes,
        threshold=threshold,
        from_logits=from_logits,
        ignore_index=ignore_index,
        beta=beta,
        zero_division=zero_division,
        absent=absent,
        nan=nan,
    )
    batch = check_inputs(options, preds, target, sample_weight)
    wrong = torch.zeros(5, dtype=torch.long, device=preds.device)
    counts = found = None
    if options.decisions:
        counts = count(options, batch)
        wrong = counts.wrong
        refuse(options, batch, wrong)
    if options.areas:
        curves = curves_of(options, batch)
        of_rows = improbable(options, curves)
        found = areas(options, curves, options.ignore_index)
        _refuse_areas(options, batch, curves, of_rows, found)
        wrong = wrong + of_rows
        warn_of_undefined(options, found)
    return values_of(options, counts, found, wrong)


def _refuse_areas(options: Options, batch: Batch, curves: Curves, of_rows: Tensor, found: Areas) -> None:
    """Looks for what is wrong where an area came out as NaN."""
    values = found.each[0]
    if readable(values) and (values.isnan().any() or of_rows.any()):
        refuse(options, batch, wrong_in_curves(options, curves))


# ---- One metric ------------------------------------------------------------------------------


def _one(preds: Tensor, target: Tensor, name: str, detail: str | None, options: dict[str, Any]) -> Tensor:
    text = name if detail is None else f"{name}@{detail}"
    (value,) = classification_metrics(preds, target, text, **options).values()
    return value


def accuracy(preds: Tensor, target: Tensor, *, top_k: int | None = None, **options: Any) -> Tensor:
    """The share of right predictions; ``options`` are those of :func:`classification_metrics`.

    ``top_k`` of multiclass scores: the target is among the k largest.

    Example:
        >>> import torch
        >>> from torchfast.metrics import accuracy
        >>> accuracy(torch.tensor([0.9, 0.2, 0.6]), torch.tensor([1, 1, 1])).item() == 2 / 3
        True
    """
    return _one(preds, target, "accuracy", None if top_k is None else str(top_k), options)


def precision(preds: Tensor, target: Tensor, *, average: str | None = None, **options: Any) -> Tensor:
    """The share of predictions that are right; ``options`` are those of :func:`classification_metrics`.

    ``average``: ``"binary"`` (default, of binary alone), ``"micro"``, ``"macro"``, ``"weighted"`` or ``"none"``.

    Example:
        >>> import torch
        >>> from torchfast.metrics import precision
        >>> precision(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2]), average="none", num_classes=3)
        tensor([1.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    return _one(preds, target, "precision", average, options)


def recall(preds: Tensor, target: Tensor, *, average: str | None = None, **options: Any) -> Tensor:
    """The share of the samples of a class that are found; ``options`` are those of :func:`classification_metrics`.

    ``average`` as of :func:`precision`. ``"macro"`` is the balanced accuracy.

    Example:
        >>> import torch
        >>> from torchfast.metrics import recall
        >>> recall(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2]), average="none", num_classes=3)
        tensor([1.0000, 1.0000, 0.5000], dtype=torch.float64)
    """
    return _one(preds, target, "recall", average, options)


def f1_score(preds: Tensor, target: Tensor, *, average: str | None = None, **options: Any) -> Tensor:
    """The harmonic mean of precision and recall; ``options`` are those of :func:`classification_metrics`.

    ``average`` as of :func:`precision`.

    Example:
        >>> import torch
        >>> from torchfast.metrics import f1_score
        >>> round(f1_score(torch.tensor([-1.0, 2.0, 0.5]), torch.tensor([0, 1, 0]), from_logits=True).item(), 4)
        0.6667
    """
    return _one(preds, target, "f1", average, options)


def fbeta_score(preds: Tensor, target: Tensor, beta: float, *, average: str | None = None, **options: Any) -> Tensor:
    """F-measure that weighs recall ``beta`` times as much as precision; ``options``: :func:`classification_metrics`.

    ``average`` as of :func:`precision`.

    Example:
        >>> import torch
        >>> from torchfast.metrics import fbeta_score
        >>> round(fbeta_score(torch.tensor([0.1, 0.9, 0.7]), torch.tensor([0, 1, 0]), beta=2.0).item(), 4)
        0.8333
    """
    return _one(preds, target, "fbeta", average, {**options, "beta": beta})


def confusion_matrix(preds: Tensor, target: Tensor, *, normalize: str | None = None, **options: Any) -> Tensor:
    """How often each class (rows) is predicted as which (columns); of multilabel one matrix of 0 and 1 a label.

    ``normalize``: over ``"true"``, ``"pred"`` or ``"all"``. ``options``: :func:`classification_metrics`.

    Example:
        >>> import torch
        >>> from torchfast.metrics import confusion_matrix
        >>> confusion_matrix(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2]), num_classes=3)
        tensor([[1, 0, 0],
                [0, 1, 0],
                [0, 1, 1]])
    """
    return _one(preds, target, "confusion_matrix", normalize, options)


def roc_auc_score(preds: Tensor, target: Tensor, *, average: str | None = None, **options: Any) -> Tensor:
    """Area under the ROC curve, exact, ties included; ``options`` are those of :func:`classification_metrics`.

    It is the probability that a positive sample has a larger score than a negative one, ties counting half; the formula
    is in :mod:`torchfast.metrics.classification.areas`.
    ``average`` of several classes: ``"macro"`` (default), ``"micro"``, ``"weighted"`` or ``"none"``.

    Example:
        >>> import torch
        >>> from torchfast.metrics import roc_auc_score
        >>> roc_auc_score(torch.tensor([0.9, 0.4, 0.4, 0.1]), torch.tensor([1, 1, 0, 0])).item()
        0.875
    """
    return _one(preds, target, "roc_auc", average, options)


def average_precision_score(preds: Tensor, target: Tensor, *, average: str | None = None, **options: Any) -> Tensor:
    """Area under the precision-recall curve, in steps; ``options`` are those of :func:`classification_metrics`.

    ``average`` as of :func:`roc_auc_score`; the formula is in :mod:`torchfast.metrics.classification.areas`.

    Example:
        >>> import torch
        >>> from torchfast.metrics import average_precision_score
        >>> round(average_precision_score(torch.tensor([0.9, 0.4, 0.4, 0.1]), torch.tensor([1, 1, 0, 0])).item(), 4)
        0.8333
    """
    return _one(preds, target, "average_precision", average, options)


# ---- Registration: csrc/classification/ serves the CPU ---------------------------------

_class_counts = register_metric(
    "class_counts",
    "(Tensor preds, Tensor target, Tensor? weight, int num_classes, int? ignore_index, int[] ks, bool matrix) "
    "-> (Tensor counts, Tensor matrix, Tensor hits, Tensor wrong)",
    reference=class_reference,
    fake=class_fake,
    function=classification_metrics,
    sample_inputs=class_samples,
)
_label_counts = register_metric(
    "label_counts",
    "(Tensor preds, Tensor target, Tensor? weight, int? ignore_index, float threshold, bool probabilities) "
    "-> (Tensor matrix, Tensor rows, Tensor wrong)",
    reference=label_reference,
    fake=label_fake,
    function=classification_metrics,
    sample_inputs=label_samples,
)
_ranked_areas = register_metric(
    "ranked_areas",
    "(Tensor scores, Tensor labels, Tensor? weight, int? ignore_index) -> (Tensor areas, Tensor totals)",
    reference=areas_reference,
    fake=areas_fake,
    function=classification_metrics,
    sample_inputs=area_samples,
)
