"""Metrics. The formulas of rankings are in :mod:`torchfast.metrics.ranking`, those of classification and regression
in :func:`classification_metrics` and :func:`regression_metrics`."""

import importlib
from typing import TYPE_CHECKING, Any

from torchfast.metrics import classification, ranking, regression, retrieval
from torchfast.metrics.classification import (
    accuracy,
    average_precision_score,
    classification_metrics,
    confusion_matrix,
    f1_score,
    fbeta_score,
    precision,
    recall,
    roc_auc_score,
)
from torchfast.metrics.ranking import ranking_metrics
from torchfast.metrics.regression import (
    mean_absolute_error,
    mean_squared_error,
    r2_score,
    regression_metrics,
    root_mean_squared_error,
)
from torchfast.metrics.retrieval.functional import retrieval_metrics
from torchfast.metrics.retrieval.ranks import retrieval_ranks
from torchfast.metrics.retrieval.retrieved import retrieved_metrics

if TYPE_CHECKING:
    from torchfast.metrics.classification import ClassificationMetrics
    from torchfast.metrics.ranking import RankingMetrics
    from torchfast.metrics.regression import RegressionMetrics
    from torchfast.metrics.retrieval.modules import RetrievalMetrics, RetrievedMetrics

__all__ = [
    "ClassificationMetrics",
    "RankingMetrics",
    "RegressionMetrics",
    "RetrievalMetrics",
    "RetrievedMetrics",
    "accuracy",
    "average_precision_score",
    "classification",
    "classification_metrics",
    "confusion_matrix",
    "f1_score",
    "fbeta_score",
    "mean_absolute_error",
    "mean_squared_error",
    "precision",
    "r2_score",
    "ranking",
    "ranking_metrics",
    "recall",
    "regression",
    "regression_metrics",
    "retrieval",
    "retrieval_metrics",
    "retrieval_ranks",
    "retrieved_metrics",
    "roc_auc_score",
    "root_mean_squared_error",
]

_MODULES = {
    "ClassificationMetrics": "classification",
    "RankingMetrics": "ranking",
    "RegressionMetrics": "regression",
    "RetrievalMetrics": "retrieval",
    "RetrievedMetrics": "retrieval",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}.modules"), name)
