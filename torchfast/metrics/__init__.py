"""Metrics. The formulas of rankings are in :mod:`torchfast.metrics.ranking`."""

from typing import TYPE_CHECKING, Any

from torchfast.metrics import ranking
from torchfast.metrics.ranking import ranking_metrics

if TYPE_CHECKING:
    from torchfast.metrics.ranking import RankingMetrics

__all__ = ["RankingMetrics", "ranking", "ranking_metrics"]


def __getattr__(name: str) -> Any:
    if name != "RankingMetrics":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return ranking.RankingMetrics
