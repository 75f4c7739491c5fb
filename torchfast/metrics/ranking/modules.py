"""The function as a torchmetrics metric, over many batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torchfast.metrics.ranking.functional import evaluate
from torchfast.metrics.ranking.inputs import Unretrieved
from torchfast.metrics.ranking.options import resolve
from torchfast.metrics.ranking.streaming import QueryMetrics


class RankingMetrics(QueryMetrics):
    """:func:`ranking_metrics` over many batches: a :class:`torchmetrics.Metric`.

    A query belongs to one batch and one process whole: nothing of it is kept but its part in the sums, so documents of
    one query in two batches count, without an error, as two queries, whatever their ``indexes``. The state is the sum
    of the values and of the weights, in float64, of a fixed size, and synchronised over ``torch.distributed`` by one
    sum; processes may have had different numbers of batches, or none.

    Args:
        metrics, ties, gain, relevance_threshold, map_denominator, precision_denominator, nan, empty, preset: as in
            :func:`ranking_metrics`.
        per_query: keeps the values of all queries, which ``compute`` then returns instead of their means, those of
            the first process first.
        kwargs: those of :class:`torchmetrics.Metric`.

    ``compute`` returns a dict: the mean of each metric, NaN before the first query.

    Example:
        >>> import torch
        >>> from torchfast.metrics import RankingMetrics
        >>> metrics = RankingMetrics(["ndcg@10", "mrr"])
        >>> metrics.update(torch.tensor([[0.9, 0.8, 0.1]]), torch.tensor([[0, 2, 1]]))
        >>> metrics.update(torch.tensor([0.3, 0.7, 0.6]), torch.tensor([0, 1, 1]), indexes=torch.tensor([8, 8, 9]))
        >>> print({name: round(value.item(), 4) for name, value in metrics.compute().items()})
        {'ndcg@10': 0.8899, 'mrr': 0.8333}
    """

    def __init__(
        self,
        metrics: str | Sequence[str],
        *,
        ties: str | None = None,
        gain: str | Tensor | Sequence[float] | None = None,
        relevance_threshold: float | None = None,
        map_denominator: str | None = None,
        precision_denominator: str | None = None,
        nan: str = "propagate",
        empty: str | None = None,
        preset: str | None = None,
        per_query: bool = False,
        **kwargs: Any,
    ) -> None:
        options = resolve(
            metrics,
            ties=ties,
            gain=gain,
            relevance_threshold=relevance_threshold,
            map_denominator=map_denominator,
            precision_denominator=precision_denominator,
            nan=nan,
            empty=empty,
            preset=preset,
        )
        super().__init__(options, per_query, **kwargs)

    def update(
        self,
        preds: Tensor,
        target: Tensor,
        *,
        offsets: Tensor | None = None,
        indexes: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        num_relevant: Tensor | None = None,
        unretrieved: Unretrieved | None = None,
        query_weight: Tensor | None = None,
    ) -> None:
        """Adds the queries of a batch. The arguments are those of :func:`ranking_metrics`."""
        self._check_weight(query_weight)
        found = evaluate(
            self.options,
            preds,
            target,
            offsets=offsets,
            indexes=indexes,
            mask=mask,
            lengths=lengths,
            num_relevant=num_relevant,
            unretrieved=unretrieved,
        )
        self._add(found, query_weight)
