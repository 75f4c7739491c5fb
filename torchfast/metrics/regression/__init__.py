"""Regression metrics: scikit-learn's, on tensors, streaming. The formulas are in :func:`regression_metrics`."""

from typing import TYPE_CHECKING, Any

from torchfast.metrics.regression.functional import (
    mean_absolute_error,
    mean_squared_error,
    r2_score,
    regression_metrics,
    root_mean_squared_error,
)

if TYPE_CHECKING:
    from torchfast.metrics.regression.modules import RegressionMetrics

__all__ = [
    "RegressionMetrics",
    "mean_absolute_error",
    "mean_squared_error",
    "r2_score",
    "regression_metrics",
    "root_mean_squared_error",
]


def __getattr__(name: str) -> Any:
    """torchmetrics, which takes a second to import, is not imported before it is needed."""
    if name != "RegressionMetrics":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torchfast.metrics.regression.modules import RegressionMetrics

    return RegressionMetrics
