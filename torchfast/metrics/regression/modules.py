"""The function as a torchmetrics metric, over many batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torchmetrics
from torch import Tensor

from torchfast._common import check
from torchfast.metrics.regression.functional import batch_moments, merged, resolve, values_of


class RegressionMetrics(torchmetrics.Metric):
    """:func:`regression_metrics` over many batches: a :class:`torchmetrics.Metric`.

    The state is seven float64 numbers an output, whatever was seen: r2 is merged from means and scatters, not from sums
    of squares, so that a target far from 0 keeps its digits. Processes may have had different numbers of batches.

    Args:
        metrics, multioutput, nan: as in :func:`regression_metrics`.
        num_outputs: of ``preds`` and ``target`` of shape ``(N, num_outputs)``; 1 takes ``(N,)`` too.
        kwargs: those of :class:`torchmetrics.Metric`.

    ``compute`` returns a dict: the value of each metric, NaN before the first sample.

    Example:
        >>> import torch
        >>> from torchfast.metrics import RegressionMetrics
        >>> metrics = RegressionMetrics(["mae", "r2"])
        >>> metrics.update(torch.tensor([2.5, 0.0]), torch.tensor([3.0, -0.5]))
        >>> metrics.update(torch.tensor([2.0, 8.0]), torch.tensor([2.0, 7.0]))
        >>> {name: round(value.item(), 4) for name, value in metrics.compute().items()}
        {'mae': 0.5, 'r2': 0.9486}
    """

    full_state_update = False
    is_differentiable = False

    def __init__(
        self,
        metrics: str | Sequence[str],
        *,
        num_outputs: int = 1,
        multioutput: str = "uniform_average",
        nan: str = "error",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.options = resolve(metrics, multioutput=multioutput, nan=nan)
        check("num_outputs", isinstance(num_outputs, int) and num_outputs >= 1, num_outputs, "an integer >= 1")
        self.num_outputs = num_outputs
        # A MetricCollection lets metrics of the same state names and, after the first batch, the same values share
        # one state for ever: so the name tells what is in it.
        self._state = f"state_{self.options.digest}"
        self.add_state(self._state, torch.zeros(7, num_outputs, dtype=torch.float64), dist_reduce_fx=merged)

    def update(self, preds: Tensor, target: Tensor, *, sample_weight: Tensor | None = None) -> None:
        """Adds a batch. The arguments are those of :func:`regression_metrics`."""
        state = batch_moments(self.options, preds, target, sample_weight)
        expected = f"{self.num_outputs}, as num_outputs says"
        check("outputs of preds", state.shape[1] == self.num_outputs, state.shape[1], expected)
        setattr(self, self._state, merged(torch.stack([getattr(self, self._state), state])))

    def compute(self) -> dict[str, Tensor]:
        """The values over all samples so far."""
        return values_of(self.options.names, self.options.multioutput, getattr(self, self._state))
