"""Sample inputs: what the generic tests and selftest run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torchfast._register import Sample

_F = tuple(f"{kind}@{average}" for kind in ("precision", "recall", "f1") for average in ("micro", "macro", "weighted"))
DECISIONS = ("accuracy", "confusion_matrix", *_F)
AREAS = ("roc_auc", "average_precision")


class _Draw:
    """Few different scores, for ties; multiples of 1/4, which every dtype holds."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype, self.g = device, dtype, torch.Generator(device="cpu").manual_seed(0)

    def scores(self, *shape: int) -> Tensor:
        return ((torch.randint(7, shape, generator=self.g) - 3) / 4).to(self.device, self.dtype)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.g).to(self.device, self.dtype)

    def ids(self, *shape: int, classes: int = 2) -> Tensor:
        return torch.randint(classes, shape, generator=self.g).to(self.device)

    def weights(self, *shape: int) -> Tensor:
        return (torch.randint(4, shape, generator=self.g) / 4).to(self.device)


def class_samples(device: str = "cpu", dtype: torch.dtype = torch.float32, *, large: bool = False) -> Iterator[Sample]:
    """Makes inputs for multiclass decisions; with ``large`` also one per way in which a kernel shares out its work."""
    of = _Draw(device, dtype)
    top = (*DECISIONS, "accuracy@2", "accuracy@3")
    x, y = of.scores(40, 5), of.ids(40, classes=5)
    yield Sample((x, y, top), {})
    yield Sample((x, y, top), {"sample_weight": of.weights(40), "ignore_index": 2})
    yield Sample((of.scores(40, 70), y, (*DECISIONS, "accuracy@5")), {})
    yield Sample((of.scores(3, 5, 4, 6), of.ids(3, 4, 6, classes=5), top), {"ignore_index": 4})
    yield Sample((of.ids(40, classes=5), y, DECISIONS), {"num_classes": 5})
    yield Sample((of.ids(40, classes=5), y, DECISIONS), {"num_classes": 5, "sample_weight": of.weights(40)})
    if not large:
        return
    x, y = of.scores(70_000, 10), of.ids(70_000, classes=10)
    yield Sample((x, y, top), {})
    yield Sample((x, y, top), {"sample_weight": of.weights(70_000)})
    yield Sample((of.normal(2000, 1000), of.ids(2000, classes=1000), top), {})
    yield Sample((of.scores(2, 19, 100, 100), of.ids(2, 100, 100, classes=19), top), {})


def label_samples(device: str = "cpu", dtype: torch.dtype = torch.float32, *, large: bool = False) -> Iterator[Sample]:
    """Makes inputs for decisions of binary and multilabel."""
    of = _Draw(device, dtype)
    logits: dict[str, Any] = {"from_logits": True}
    many = logits | {"task": "multilabel"}
    binary = (*DECISIONS, "f1")
    yield Sample((of.scores(40), of.ids(40), binary), logits)
    yield Sample((of.scores(40).sigmoid(), of.ids(40) == 1, binary), {"threshold": 0.25})
    yield Sample((of.scores(5, 9), of.ids(5, 9, classes=3), binary), logits | {"task": "binary", "ignore_index": 2})
    yield Sample((of.scores(40), of.ids(40), binary), logits | {"sample_weight": of.weights(40)})
    yield Sample((of.ids(40), of.ids(40), binary), {"task": "binary"})
    yield Sample((of.scores(40, 6), of.ids(40, 6, classes=3), DECISIONS), many | {"ignore_index": 2})
    yield Sample((of.scores(40, 6), of.ids(40, 6), DECISIONS), many | {"sample_weight": of.weights(40)})
    if large:
        yield Sample((of.scores(100_000), of.ids(100_000), binary), logits)
        yield Sample((of.scores(100_000), of.ids(100_000), binary), logits | {"sample_weight": of.weights(100_000)})
        yield Sample((of.scores(20_000, 9), of.ids(20_000, 9), DECISIONS), many)


def area_samples(device: str = "cpu", dtype: torch.dtype = torch.float32, *, large: bool = False) -> Iterator[Sample]:
    """Makes inputs for the areas of every task."""
    of = _Draw(device, dtype)
    logits: dict[str, Any] = {"from_logits": True}
    several = (*AREAS, "roc_auc@weighted", "average_precision@micro", "roc_auc@none")
    yield Sample((of.scores(40), of.ids(40), AREAS), {})
    yield Sample((of.scores(40), of.ids(40, classes=3), AREAS), {"sample_weight": of.weights(40), "ignore_index": 2})
    x, y = of.scores(40, 5), torch.arange(40).to(device) % 5
    yield Sample((x, y, several), logits)
    yield Sample((x, y, several), logits | {"sample_weight": of.weights(40) + 1, "ignore_index": 9})
    many = logits | {"task": "multilabel"}
    yield Sample((of.scores(40, 6), of.ids(40, 6), several), many)
    yield Sample((of.scores(40, 6), of.ids(40, 6), several), many | {"sample_weight": of.weights(40) + 1})
    if large:
        for x in of.scores(100_000), of.normal(100_000):
            yield Sample((x, of.ids(100_000), AREAS), {})
            yield Sample((x, of.ids(100_000), AREAS), {"sample_weight": of.weights(100_000)})
        yield Sample((of.normal(5000, 20), of.ids(5000, classes=20), several), logits)
