"""Which metrics of which task: names and options, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torchfast._common import check
from torchfast.metrics._common import check_choice, check_kind, digest, listed, names_of

TASKS = ("binary", "multiclass", "multilabel")
AVERAGES = ("binary", "micro", "macro", "weighted", "none")
NORMALIZE = ("true", "pred", "all")
ABSENT = ("skip", "zero_division")
NANS = ("error", "propagate")

FSCORES = ("precision", "recall", "f1", "fbeta")
AREAS = ("roc_auc", "average_precision")
KINDS = ("accuracy", *FSCORES, "confusion_matrix", *AREAS)


@dataclass(frozen=True)
class Name:
    """A metric: ``f1@macro`` is kind f1, detail macro."""

    text: str
    kind: str
    detail: str

    @property
    def k(self) -> int:
        """The k of a top-k accuracy, else 0."""
        return int(self.detail) if self.kind == "accuracy" and self.detail else 0


def _details(kind: str, task: str) -> tuple[str, ...]:
    """What may follow the @."""
    if kind in FSCORES:
        return AVERAGES if task == "binary" else AVERAGES[1:]
    if kind in AREAS:
        return () if task == "binary" else AVERAGES[1:]
    return NORMALIZE if kind == "confusion_matrix" and task != "multilabel" else ()


def _default(kind: str, task: str) -> str:
    if kind in AREAS:
        return "" if task == "binary" else "macro"
    return "binary" if kind in FSCORES else ""


def _parse(text: str, task: str) -> Name:
    kind, at, detail = text.partition("@")
    check_kind(kind, text, KINDS, ", some with a detail as in 'f1@macro'")
    if kind == "accuracy" and at:
        check("metrics", task == "multiclass", text, f"'accuracy', without a top k, for task={task!r}")
        good = detail.isascii() and detail.isdecimal() and int(detail) > 0
        check("metrics: the top k of 'accuracy'", good, text, "an integer >= 1")
        return Name(text, kind, str(int(detail)))
    if kind in FSCORES and task != "binary" and detail in ("", "binary"):
        raise ValueError(
            f"metrics must name an average for task={task!r}, of {listed(AVERAGES[1:])}, as in '{kind}@macro', "
            f"got {text!r}"
        )
    allowed = _details(kind, task)
    if at and detail not in allowed:
        fitting = f"{kind!r} alone" + (f" or with {listed(allowed)} after @" if allowed else "")
        raise ValueError(f"metrics must have {fitting} for task={task!r}, got {text!r}")
    return Name(text, kind, detail or _default(kind, task))


@dataclass(frozen=True)
class Options:
    """What to compute, checked. ``num_classes`` is 2 for binary, the number of labels for multilabel."""

    names: tuple[Name, ...]
    task: str
    num_classes: int
    threshold: float
    from_logits: bool
    ignore_index: int | None
    beta: float
    zero_division: float
    absent: str
    nan: str

    @property
    def ks(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(name.k for name in self.names if name.k))

    @property
    def matrix(self) -> bool:
        return any(name.kind == "confusion_matrix" for name in self.names)

    @property
    def decisions(self) -> bool:
        """True if a metric of decisions is asked for, which is made of counts."""
        return any(name.kind not in AREAS for name in self.names)

    @property
    def areas(self) -> tuple[Name, ...]:
        return tuple(name for name in self.names if name.kind in AREAS)

    @property
    def cut(self) -> float:
        """The threshold on the scale of ``preds``."""
        if not self.from_logits:
            return self.threshold
        p = self.threshold
        return math.log(p / (1 - p)) if 0 < p < 1 else math.copysign(math.inf, p - 0.5)

    @property
    def digest(self) -> str:
        return digest(self)


def resolve(
    metrics: str | Sequence[str],
    *,
    task: str,
    num_classes: int | None,
    threshold: float = 0.5,
    from_logits: bool = False,
    ignore_index: int | None = None,
    beta: float = 1.0,
    zero_division: float = 0.0,
    absent: str = "skip",
    nan: str = "error",
) -> Options:
    check_choice("task", task, TASKS)
    names = tuple(_parse(text, task) for text in names_of(metrics, "f1@macro"))
    if task == "binary":
        check("num_classes", num_classes in (None, 2), num_classes, "2 or left out for task='binary'")
        num_classes = 2
    if num_classes is None:
        raise ValueError(f"num_classes must be given for task={task!r}")
    least = 1 if task == "multilabel" else 2
    integer = isinstance(num_classes, int) and not isinstance(num_classes, bool) and num_classes >= least
    check("num_classes", integer, num_classes, f"an integer >= {least}")
    check("threshold", 0 <= threshold <= 1, threshold, "a probability, from 0 to 1 (from_logits=True converts it)")
    check("beta", beta >= 0, beta, ">= 0")
    zero = float(zero_division)
    check("zero_division", zero in (0.0, 1.0) or math.isnan(zero), zero_division, "0, 1 or NaN")
    check_choice("absent", absent, ABSENT)
    check_choice("nan", nan, NANS)
    if ignore_index is not None and not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an integer or None, got {ignore_index!r}")
    return Options(
        names, task, num_classes, float(threshold), bool(from_logits), ignore_index, float(beta), zero, absent, nan
    )
