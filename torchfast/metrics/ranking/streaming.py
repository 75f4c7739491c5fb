"""Values of queries, summed over many batches and processes."""

from __future__ import annotations

from typing import Any

import torch
import torchmetrics
from torch import Tensor

from torchfast._common import check
from torchfast.metrics.ranking.functional import PerQuery, check_weight


class QueryMetrics(torchmetrics.Metric):
    """The state of metrics that are means over queries: sums of values and of weights, or all values."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    def __init__(self, options: Any, per_query: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.options = options
        self.per_query = per_query
        # A MetricCollection lets metrics of the same state names and, after the first batch, the same values share
        # one state for ever, as recall and hit rate may have: so the name tells what is in it.
        self._state = f"state_{self.options.digest}"
        empty_state = torch.zeros(2, len(self.options.names), dtype=torch.float64)
        self.add_state(self._state, [] if per_query else empty_state, dist_reduce_fx="cat" if per_query else "sum")

    def _check_weight(self, query_weight: Tensor | None) -> None:
        check("query_weight", query_weight is None or not self.per_query, "a tensor", "None for per_query=True")

    def _add(self, found: PerQuery, query_weight: Tensor | None) -> None:
        state = getattr(self, self._state)
        if self.per_query:
            state.append(found.marked().t())
            return
        weight = None if query_weight is None else check_weight(query_weight, found.values)
        sums, weights = found.sums(weight)
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
