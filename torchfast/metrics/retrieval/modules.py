"""The functions as torchmetrics metrics, over many batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from torchfast.metrics.ranking.streaming import QueryMetrics
from torchfast.metrics.retrieval.functional import evaluate, options_of, weight_of
from torchfast.metrics.retrieval.ids import ItemIds
from torchfast.metrics.retrieval.pykeen import Options as PykeenOptions
from torchfast.metrics.retrieval.retrieved import evaluate_retrieved


class RetrievalMetrics(QueryMetrics):
    """:func:`retrieval_metrics` over many batches of queries: a :class:`torchmetrics.Metric`.

    A query belongs to one batch and one process whole. The state is that of :class:`RankingMetrics`: sums of a fixed
    size, synchronised over ``torch.distributed`` by one sum. That shares out the queries. To share out the items, pass
    ``group=`` to ``update``: then all processes have all queries, and ``sync_on_compute=False`` keeps their sums apart.

    Args:
        metrics, similarity, filtered, ties, gain, relevance_threshold, map_denominator, precision_denominator, nan,
            empty, preset: as in :func:`retrieval_metrics`.
        per_query: keeps the values of all queries, which ``compute`` then returns instead of their means, those of
            the first process first. With ``filtered=True`` or ``preset="pykeen"`` they are those of all relevant items.
        kwargs: those of :class:`torchmetrics.Metric`.

    ``compute`` returns a dict: the mean of each metric, NaN before the first query.

    Example:
        >>> import torch
        >>> from torchfast.metrics import RetrievalMetrics
        >>> items = torch.tensor([[3.0, 1.0], [2.0, 5.0], [1.0, 2.0]])
        >>> metrics = RetrievalMetrics(["mrr", "recall@2"])
        >>> metrics.update(torch.tensor([[1.0, 0.0]]), items, torch.tensor([1]))
        >>> metrics.update(torch.tensor([[0.0, 1.0]]), items, torch.tensor([[0, 1]]))
        >>> print({name: round(value.item(), 4) for name, value in metrics.compute().items()})
        {'mrr': 0.75, 'recall@2': 0.75}
    """

    def __init__(
        self,
        metrics: str | Sequence[str],
        *,
        similarity: str = "dot",
        filtered: bool = False,
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
        options = options_of(
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
        self.similarity = similarity
        self.filtered = filtered

    def update(
        self,
        queries: Tensor,
        items: Tensor,
        relevant: ItemIds,
        *,
        relevance: Tensor | None = None,
        exclude: ItemIds | None = None,
        item_bias: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
        item_offset: int | None = None,
        progress: bool = False,
        query_weight: Tensor | None = None,
    ) -> None:
        """Adds the queries of a batch. The arguments are those of :func:`retrieval_metrics`."""
        self._check_weight(query_weight)
        found, lists = evaluate(
            self.options,
            queries,
            items,
            relevant,
            relevance,
            exclude=exclude,
            item_bias=item_bias,
            similarity=self.similarity,
            filtered=self.filtered,
            group=group,
            item_offset=item_offset,
            progress=progress,
        )
        of_items = self.filtered or isinstance(self.options, PykeenOptions)
        self._add(found, weight_of(query_weight, lists, of_items))


class RetrievedMetrics(QueryMetrics):
    """:func:`retrieved_metrics` over many batches of lists: a :class:`torchmetrics.Metric`.

    State and synchronisation are those of :class:`RankingMetrics`.

    Args:
        metrics, gain, relevance_threshold, map_denominator, precision_denominator, empty, preset: as in
            :func:`retrieved_metrics`.
        per_query, kwargs: as in :class:`RankingMetrics`.

    ``compute`` returns a dict: the mean of each metric, NaN before the first query.

    Example:
        >>> import torch
        >>> from torchfast.metrics import RetrievedMetrics
        >>> metrics = RetrievedMetrics(["mrr@3", "recall@3"])
        >>> metrics.update(torch.tensor([[4, 7, 1]]), torch.tensor([[7, 9]]))
        >>> metrics.update(torch.tensor([[2, 0, -1]]), torch.tensor([2]))
        >>> print({name: value.item() for name, value in metrics.compute().items()})
        {'mrr@3': 0.75, 'recall@3': 0.75}
    """

    def __init__(
        self,
        metrics: str | Sequence[str],
        *,
        gain: str | Tensor | Sequence[float] | None = None,
        relevance_threshold: float | None = None,
        map_denominator: str | None = None,
        precision_denominator: str | None = None,
        empty: str | None = None,
        preset: str | None = None,
        per_query: bool = False,
        **kwargs: Any,
    ) -> None:
        options = options_of(
            metrics,
            ties=None,
            gain=gain,
            relevance_threshold=relevance_threshold,
            map_denominator=map_denominator,
            precision_denominator=precision_denominator,
            nan="propagate",
            empty=empty,
            preset=preset,
        )
        super().__init__(options, per_query, **kwargs)

    def update(
        self,
        retrieved: Tensor,
        relevant: ItemIds,
        *,
        relevance: Tensor | None = None,
        query_weight: Tensor | None = None,
    ) -> None:
        """Adds the queries of a batch. The arguments are those of :func:`retrieved_metrics`."""
        self._check_weight(query_weight)
        self._add(evaluate_retrieved(self.options, retrieved, relevant, relevance), query_weight)
