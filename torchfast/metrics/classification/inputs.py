"""The ops' tensors from those of the caller, and what is refused."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchfast._common import FLOAT8, REALS, check, check_device, check_factor, check_tensor, readable, widened
from torchfast.metrics._common import check_choice, check_no_gradient
from torchfast.metrics.classification.areas import membership
from torchfast.metrics.classification.counts import IDS, NAN, PROBABILITY, TARGET, WEIGHT
from torchfast.metrics.classification.options import TASKS, Options

_KINDS = "a tensor of bool, integers or floats"
#: It takes the place of a target that is no integer.
NO_CLASS = -(2**62)


class Batch(NamedTuple):
    """preds are ``[N, C, ...]`` or ids ``[N, ...]`` for multiclass, ``[N, L]`` for the other tasks. target and weight
    have these shapes without C, and weight lacks L too."""

    preds: Tensor
    target: Tensor
    weight: Tensor | None

    @property
    def scores(self) -> bool:
        return self.preds.is_floating_point()


def task_of(preds: Tensor, target: Tensor, num_classes: int | None, task: str | None) -> tuple[str, int | None]:
    """Returns the task and the number of classes, which the caller gives or the shapes leave no doubt about."""
    if task is not None:
        check_choice("task", task, TASKS)
    for name, x in (("preds", preds), ("target", target)):
        check_tensor(name, x, REALS, _KINDS)
    scores = preds.dim() == target.dim() + 1
    if task is None and (num_classes is not None or scores):
        task = "multiclass"
    if task is None:
        decided = preds.dim() == 1 and (preds.is_floating_point() or preds.dtype == torch.bool)
        check(
            "task", decided, task, "given (with num_classes for class ids) where preds are not one-dimensional floats"
        )
        task = "binary"
    if num_classes is None and task == "multiclass" and scores and preds.dim() > 1:
        num_classes = preds.shape[1]
    if num_classes is None and task == "multilabel" and preds.dim() > 1:
        num_classes = preds.shape[1]
    return task, num_classes


def _ids(x: Tensor) -> Tensor:
    """Converts to an integer dtype that the kernels take; floats that are no integers become NO_CLASS."""
    x = widened(x.detach())
    if x.dtype == torch.bool:
        return x.to(torch.uint8)
    if not x.is_floating_point():
        return x.long() if x.dtype in (torch.uint16, torch.uint32, torch.uint64) else x
    whole = x.long()
    return torch.where(whole.to(x.dtype) == x, whole, NO_CLASS)


def _check_preds(options: Options, preds: Tensor) -> None:
    if preds.dtype in FLOAT8:
        raise TypeError(f"preds must be float32, bfloat16, float16 or float64, or class ids, got {preds.dtype}")
    check_no_gradient("metrics", preds)
    for name in options.names:
        if (name.k or name in options.areas) and not preds.is_floating_point():
            raise TypeError(f"preds must be scores, of a floating dtype, for {name.text!r}, got {preds.dtype}")


def check_inputs(options: Options, preds: Tensor, target: Tensor, sample_weight: Tensor | None) -> Batch:
    for name, x in (("preds", preds), ("target", target)):
        check_tensor(name, x, REALS, _KINDS)
    _check_preds(options, preds)
    preds = preds.detach() if preds.is_floating_point() else _ids(preds)
    target = _ids(target)
    check_device("target", target, "preds", preds)
    classes, given = options.num_classes, (tuple(preds.shape), tuple(target.shape))
    rows = target.shape
    if options.task == "multiclass" and preds.is_floating_point():
        good = target.dim() >= 1 and preds.shape == (*target.shape[:1], classes, *target.shape[1:])
        check("shapes of preds and target", good, given, f"(N, {classes}, ...) of scores and (N, ...)")
    else:
        check("shapes of preds and target", preds.shape == target.shape, given, f"the same for task={options.task!r}")
        if options.task == "multilabel":
            good = target.dim() >= 2 and target.shape[1] == classes
            check("shape of target", good, given[1], f"(N, {classes}, ...)")
            rows = torch.Size((*target.shape[:1], *target.shape[2:]))
    weight = None
    if sample_weight is not None:
        check_factor("sample_weight", sample_weight)
        check("sample_weight's shape", sample_weight.shape == rows, tuple(sample_weight.shape), tuple(rows))
        check_device("sample_weight", sample_weight, "preds", preds)
        weight = widened(sample_weight.detach())
    if options.task == "binary":
        preds, target = preds.reshape(-1, 1), target.reshape(-1, 1)
        weight = None if weight is None else weight.reshape(-1)
    elif options.task == "multilabel":
        preds, target = (x.movedim(1, -1).reshape(-1, classes) for x in (preds, target))
        weight = None if weight is None else weight.reshape(-1)
    return Batch(preds, target, weight)


# ---- Scores as curves ------------------------------------------------------------------------


class Curves(NamedTuple):
    """Scores ``[curves, n]``; labels of that shape, or class ids ``[n]`` if each class has a curve; weights ``[n]``."""

    scores: Tensor
    labels: Tensor
    weight: Tensor | None


def _rows(x: Tensor) -> Tensor:
    """Puts the class dimension last, and merges the others into one."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def curves_of(options: Options, batch: Batch) -> Curves:
    preds, target, weight = batch
    if options.task != "multiclass":
        return Curves(preds.t(), target.t(), weight)
    weight = None if weight is None else weight.reshape(-1)
    preds = _rows(preds)
    if options.from_logits:
        # One-vs-rest ranks the rows of a class by its probability, not by its logit.
        preds = preds.to(torch.float32 if preds.dtype != torch.float64 else preds.dtype).softmax(1)
    return Curves(preds.t(), target.reshape(-1), weight)


def sum_tolerance(dtype: torch.dtype) -> float:
    """The sum of a row's probabilities may miss 1 by so much: scikit-learn's 1e-5, or one rounding."""
    return max(1e-5, torch.finfo(dtype).eps)


def improbable_rows(options: Options, curves: Curves) -> Tensor | None:
    """Marks multiclass rows that do not sum to 1, as logits without from_logits=True. scikit-learn refuses them."""
    if options.task != "multiclass" or options.from_logits:
        return None
    scores, labels, weight = curves
    counted = torch.ones_like(labels, dtype=torch.bool)
    if options.ignore_index is not None:
        counted = labels != options.ignore_index
    if weight is not None:
        counted = counted & (weight != 0)
    total = scores.sum(0, dtype=torch.float32 if scores.dtype != torch.float64 else None)
    return counted & ((total - 1).abs() > sum_tolerance(scores.dtype))


def wrong_in_curves(options: Options, curves: Curves) -> Tensor:
    """Counts what ``wrong`` of the counting ops does; every mistake but a NaN score counts as one of a target."""
    scores, labels, weight = curves
    _, _, wrong = membership(scores, labels, weight, options.ignore_index)
    missing = (wrong & scores.isnan()).sum()
    improbable = improbable_rows(options, curves)
    found = [torch.zeros_like(missing)] * 5
    found[NAN], found[TARGET] = missing, (wrong & ~scores.isnan()).sum()
    if improbable is not None:
        found[PROBABILITY] = improbable.sum()
    return torch.stack(found)


# ---- What is wrong with the values: looked for where something is ------------------------------


def refuse(options: Options, batch: Batch, wrong: Tensor) -> None:
    """Raises if values are to blame; NaN predictions are not with nan="propagate"."""
    if not readable(wrong):
        return
    found = wrong.tolist()
    if not any(found):
        return
    preds, target, weight = batch
    rows = target if target.dim() == 1 or options.task == "multiclass" else target[:, 0]
    counted = torch.ones_like(target, dtype=torch.bool)
    if options.ignore_index is not None:
        counted = target != options.ignore_index
    if weight is not None:
        counted = counted & (weight if weight.shape == target.shape else weight[:, None]).ne(0)
    most = options.num_classes - 1 if options.task == "multiclass" else 1
    y = target.long()
    off = counted & ((y < 0) | (y > most))
    if off.any():
        value = int(y[off][0])
        given = "a number that is no integer" if value == NO_CLASS else str(value)
        ignored = "" if options.ignore_index is None else f", and ignore_index={options.ignore_index}"
        raise IndexError(f"target {given} is out of range: allowed are 0 to {most}{ignored}")
    if weight is not None and found[WEIGHT] + found[TARGET]:
        of_rows = counted if counted.shape == weight.shape else counted.any(1)
        bad = weight[of_rows & ~((weight >= 0) & (weight < torch.inf))]
        check("sample_weight", len(bad) == 0, bad[:1].tolist(), "finite and >= 0")
    if found[IDS]:
        ids = preds.long()
        value = int(ids[counted & ((ids < 0) | (ids > most))][0])
        raise IndexError(f"preds {value} is out of range: class ids from 0 to {most} are allowed")
    if found[PROBABILITY]:
        if options.task == "multiclass":
            raise ValueError(
                "preds must be probabilities, which sum to 1 over the classes, got rows with other sums; of logits "
                "from_logits=True takes the softmax; for decision values of one-vs-rest classifiers give one-hot "
                "targets and task='multilabel', which ranks each class by its own scores"
            )
        x = preds[counted & ~((preds >= 0) & (preds <= 1))]
        x = x[~x.isnan()]
        raise ValueError(
            f"preds must be probabilities, from 0 to 1, or logits with from_logits=True, got {x[0].item():.6g}"
        )
    if found[NAN] and options.nan == "error":
        raise ValueError(
            f"preds must not hold NaN with nan='error', got {found[NAN]} of them in {rows.numel()} samples"
            if options.task != "multiclass"
            else f"preds must not hold NaN with nan='error', got some in {found[NAN]} of {rows.numel()} samples"
        )
