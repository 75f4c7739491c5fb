"""The classification and regression metrics' cases: areas and decisions of 1M scores, of 1000 classes; errors of 1M.

Of a contender's values the first ones are compared: not every library has all. Scores are distinct, so that sorting
alone is enough for naive torch. A metric has no gradient.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from cases import NO_AIMS, Aims, Case, Inputs, Step
from torch import Tensor

from torchfast.metrics import classification_metrics, regression_metrics


class Values(NamedTuple):
    values: Tensor

    def errors(self, values: Tensor, _: Tensor | None) -> tuple[float, float]:
        """Compares the values that a contender has, always the first ones; there is no gradient."""
        return (values.double() - self.values[: len(values)]).abs().max().item(), 0.0


def listed(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.double().flatten() for value in found.values()])


def available(peers: dict[str, tuple[str, Step]]) -> dict[str, Step]:
    return {name: step for name, (module, step) in peers.items() if importlib.util.find_spec(module)}


# ---- Areas under the curves of binary scores ----------------------------------------------------

AREAS = ("roc_auc", "average_precision")


def scored(samples: int, device: str) -> Inputs:
    """Makes scores of a model that has learnt something."""
    target = torch.randint(2, (samples,), device=device)
    order = (torch.randn(samples, device=device) + target).argsort()
    scores = torch.empty(samples, device=device)
    scores[order] = (torch.arange(samples, device=device) + 0.5) / samples
    return scores, target


def naive_areas(scores: Tensor, target: Tensor) -> Tensor:
    """Sorts once for both areas, and knows no ties: this is what people write."""
    y = target[scores.argsort(descending=True)]
    hits = y.cumsum(0)
    positives, n = hits[-1], len(y)
    precision = hits / torch.arange(1, n + 1, device=y.device, dtype=torch.float64)
    roc = torch.where(y == 0, hits, 0).sum() / (positives * (n - positives)).double()
    return torch.stack([roc, torch.where(y == 1, precision, 0).sum() / positives])


def fast_areas(scores: Tensor, target: Tensor) -> Tensor:
    return listed(classification_metrics(scores, target, AREAS))


def fast_roc(scores: Tensor, target: Tensor) -> Tensor:
    return listed(classification_metrics(scores, target, "roc_auc"))


def areas_by_torchmetrics(scores: Tensor, target: Tensor) -> Tensor:
    from torchmetrics.functional.classification import binary_auroc

    return binary_auroc(scores, target)[None]


def areas_by_torcheval(scores: Tensor, target: Tensor) -> Tensor:
    from torcheval.metrics.functional import binary_auroc

    return binary_auroc(scores, target)[None]


def areas_by_sklearn(scores: Tensor, target: Tensor) -> Tensor:
    from sklearn.metrics import roc_auc_score

    return torch.tensor([roc_auc_score(target.numpy(), scores.numpy())])


def areas_case(samples: int, family: str = "classification") -> Case:
    peers = {
        "torchmetrics, ROC AUC alone": ("torchmetrics", areas_by_torchmetrics),
        "torcheval, ROC AUC alone": ("torcheval", areas_by_torcheval),
        "scikit-learn, ROC AUC alone": ("sklearn", areas_by_sklearn),
    }
    steps = {"torchfast": fast_areas, "eager": naive_areas}
    if family != "scaling":
        steps |= {"torchfast, ROC AUC alone": fast_roc} | available(peers)
    return Case(
        family,
        "ROC AUC + average precision",
        (samples,),
        torch.float32,
        lambda device: scored(samples, device),
        steps,
        lambda scores, target: Values(naive_areas(scores, target)),
        NO_AIMS if family == "scaling" else Aims(eager=1),
        floors={"sort": lambda scores, _: scores.sort().values},
    )


# ---- Decisions -----------------------------------------------------------------------------------


class Decisions(NamedTuple):
    """Gives accuracy, F1 and the confusion matrix."""

    names: tuple[str, str, str]
    classes: int

    def fast(self, preds: Tensor, target: Tensor) -> Tensor:
        return listed(classification_metrics(preds, target, self.names))

    def naive(self, preds: Tensor, target: Tensor) -> Tensor:
        predicted = preds.argmax(1) if preds.dim() == 2 else (preds > 0.5).long()
        c = self.classes
        matrix = torch.bincount(target * c + predicted, minlength=c * c).view(c, c).double()
        right = matrix.diagonal()
        f1 = 2 * right / (matrix.sum(0) + matrix.sum(1))
        f1 = f1[1] if c == 2 else f1.mean()
        return torch.cat([(right.sum() / matrix.sum())[None], f1[None], matrix.flatten()])

    def torchmetrics(self, preds: Tensor, target: Tensor) -> Tensor:
        """Uses one collection, whose members share their counts."""
        from torchmetrics import MetricCollection
        from torchmetrics import classification as of

        c = self.classes
        if c == 2:
            each = [of.BinaryAccuracy(), of.BinaryF1Score(), of.BinaryConfusionMatrix()]
        else:
            average: dict[str, Any] = {"average": "micro", "validate_args": False}
            each = [
                of.MulticlassAccuracy(c, **average),
                of.MulticlassF1Score(c, validate_args=False),
                of.MulticlassConfusionMatrix(c, validate_args=False),
            ]
        collection = MetricCollection(dict(zip("abc", each, strict=True)))
        return listed(collection(preds, target))

    def torcheval(self, preds: Tensor, target: Tensor) -> Tensor:
        from torcheval.metrics import functional as of

        if self.classes == 2:
            found = of.binary_accuracy(preds, target), of.binary_f1_score(preds, target)
            return torch.cat(
                [torch.stack(found).double(), of.binary_confusion_matrix(preds, target).double().flatten()]
            )
        f1 = of.multiclass_f1_score(preds, target, num_classes=self.classes, average="macro")
        found = of.multiclass_accuracy(preds, target, num_classes=self.classes), f1
        matrix = of.multiclass_confusion_matrix(preds, target, self.classes)
        return torch.cat([torch.stack(found).double(), matrix.double().flatten()])

    def sklearn(self, preds: Tensor, target: Tensor) -> Tensor:
        """Starts from the predictions that NumPy makes of the scores."""
        from sklearn import metrics

        x, y = preds.numpy(), target.numpy()
        predicted = x.argmax(1) if x.ndim == 2 else x > 0.5
        average = "binary" if self.classes == 2 else "macro"
        found = metrics.accuracy_score(y, predicted), metrics.f1_score(y, predicted, average=average)
        matrix = metrics.confusion_matrix(y, predicted, labels=range(self.classes))
        return torch.cat([torch.tensor(found), torch.from_numpy(matrix).double().flatten()])

    @property
    def contenders(self) -> dict[str, Step]:
        peers: dict[str, tuple[str, Step]] = {
            "torchmetrics": ("torchmetrics", self.torchmetrics),
            "torcheval": ("torcheval", self.torcheval),
            "scikit-learn": ("sklearn", self.sklearn),
        }
        return {"torchfast": self.fast, "eager": self.naive} | available(peers)


def logits(shape: tuple[int, int], device: str) -> Inputs:
    """Every class is there; the right one is raised by 0 to 6."""
    rows, classes = shape
    target = torch.randint(classes, (rows,), device=device)
    target[:classes] = torch.arange(classes, device=device)
    raised = 6 * torch.rand(rows, 1, device=device)
    return torch.randn(shape, device=device).scatter_add_(1, target[:, None], raised), target


def binary_case(samples: int) -> Case:
    of = Decisions(("accuracy", "f1", "confusion_matrix"), 2)
    return Case(
        "classification",
        "accuracy + F1 + confusion matrix",
        (samples,),
        torch.float32,
        lambda device: scored(samples, device),
        of.contenders,
        lambda preds, target: Values(of.naive(preds, target)),
        NO_AIMS,
        floors={"read": lambda preds, target: preds.sum() + target.sum()},
    )


def multiclass_case(shape: tuple[int, int]) -> Case:
    of = Decisions(("accuracy", "f1@macro", "confusion_matrix"), shape[1])
    return Case(
        "classification",
        "accuracy + macro F1 + confusion matrix",
        shape,
        torch.float32,
        lambda device: logits(shape, device),
        of.contenders,
        lambda preds, target: Values(of.naive(preds, target)),
        Aims(eager=1),
        floors={
            "read": lambda preds, target: preds.sum() + target.sum(),
            "argmax": lambda preds, _: preds.argmax(1),
        },
    )


# ---- Errors of regression ------------------------------------------------------------------------

ERRORS = ("mae", "mse", "rmse", "r2")


def naive_errors(preds: Tensor, target: Tensor) -> Tensor:
    difference = target - preds
    mse = difference.square().mean()
    r2 = 1 - mse / target.var(correction=0)
    return torch.stack([difference.abs().mean(), mse, mse.sqrt(), r2])


def errors_by_torchmetrics(preds: Tensor, target: Tensor) -> Tensor:
    from torchmetrics import functional as f

    mse = f.mean_squared_error(preds, target)
    return torch.stack([f.mean_absolute_error(preds, target), mse, mse.sqrt(), f.r2_score(preds, target)])


def errors_by_sklearn(preds: Tensor, target: Tensor) -> Tensor:
    from sklearn import metrics

    y, p = target.numpy(), preds.numpy()
    mse = metrics.mean_squared_error(y, p)
    return torch.tensor([metrics.mean_absolute_error(y, p), mse, mse**0.5, metrics.r2_score(y, p)])


def errors_case(samples: int) -> Case:
    def setup(device: str) -> Inputs:
        target = torch.randn(samples, device=device)
        return target + 0.5 * torch.randn(samples, device=device), target

    peers = {"torchmetrics": ("torchmetrics", errors_by_torchmetrics), "scikit-learn": ("sklearn", errors_by_sklearn)}
    return Case(
        "regression",
        "MAE + MSE + RMSE + R2",
        (samples,),
        torch.float32,
        setup,
        {"torchfast": lambda p, y: listed(regression_metrics(p, y, ERRORS)), "eager": naive_errors} | available(peers),
        lambda preds, target: Values(naive_errors(preds.double(), target.double())),
        Aims(eager=1),
        floors={"read": lambda preds, target: preds.sum() + target.sum()},
    )


def classification_cases() -> Iterator[Case]:
    yield areas_case(1_000_000)
    yield binary_case(1_000_000)
    yield multiclass_case((65536, 1000))
    yield multiclass_case((1_000_000, 10))
    yield errors_case(1_000_000)
    yield errors_case(16_000_000)
    for doubling in range(7):
        yield areas_case(62_500 * 2**doubling, "scaling")
