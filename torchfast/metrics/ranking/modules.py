"""The function as a torchmetrics metric, over many batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torchmetrics
from torch import Tensor

from torchfast._common import check
from torchfast.metrics.ranking.functional import check_weight, evaluate
from torchfast.metrics.ranking.inputs import Unretrieved
from torchfast.metrics.ranking.options import resolve


class RankingMetrics(torchmetrics.Metric):
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

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

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
        super().__init__(**kwargs)
        self.options = resolve(
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
        self.per_query = per_query
        # A MetricCollection lets metrics of the same state names and, after the first batch, the same values share
        # one state for ever, as recall and hit rate may have: so the name tells what is in it.
        self._state = f"state_{self.options.digest}"
        empty_state = torch.zeros(2, len(self.options.names), dtype=torch.float64)
        self.add_state(self._state, [] if per_query else empty_state, dist_reduce_fx="cat" if per_query else "sum")

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
        check("query_weight", query_weight is None or not self.per_query, "a tensor", "None for per_query=True")
        per_query = evaluate(
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
        state = getattr(self, self._state)
        if self.per_query:
            state.append(per_query.marked().t())
            return
        weight = None if query_weight is None else check_weight(query_weight, per_query.values)
        sums, weights = per_query.sums(weight)
        setattr(self, self._state, torch.stack([state[0] + sums, state[1] + weights]))

    def compute(self) -> dict[str, Tensor]:
        """The means of all queries so far, or with ``per_query=True`` their values."""
        state = getattr(self, self._state)
        if self.per_query:
            values = torch.cat([*state, self._no_queries()]) if isinstance(state, list) else state
            return dict(zip(self.options.names, values.unbind(1), strict=True))
        sums, weights = state
        return dict(zip(self.options.names, sums / weights, strict=True))

    def _no_queries(self) -> Tensor:
        return torch.zeros(0, len(self.options.names), dtype=torch.float64, device=self.device)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """A process without batches takes part in the exchange, too: it sends empty tensors."""
        if self.per_query and not self._is_synced and not getattr(self, self._state):
            getattr(self, self._state).append(self._no_queries())
        super().sync(*args, **kwargs)
