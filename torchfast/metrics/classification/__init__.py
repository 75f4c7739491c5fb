"""Classification metrics: scikit-learn's, on tensors, streaming. The formulas are in :func:`classification_metrics`."""

from typing import TYPE_CHECKING, Any

from torchfast.metrics.classification.functional import (
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

if TYPE_CHECKING:
    from torchfast.metrics.classification.modules import ClassificationMetrics

__all__ = [
    "ClassificationMetrics",
    "accuracy",
    "average_precision_score",
    "classification_metrics",
    "confusion_matrix",
    "f1_score",
    "fbeta_score",
    "precision",
    "recall",
    "roc_auc_score",
]


def __getattr__(name: str) -> Any:
    """torchmetrics, which takes a second to import, is not imported before it is needed."""
    if name != "ClassificationMetrics":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torchfast.metrics.classification.modules import ClassificationMetrics

    return ClassificationMetrics
