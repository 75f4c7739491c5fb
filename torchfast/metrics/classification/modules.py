"""The function as a torchmetrics metric, over many batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torchmetrics
from torch import Tensor

from torchfast._common import check
from torchfast.metrics.classification.areas import areas_of
from torchfast.metrics.classification.functional import areas, count, warn_of_undefined
from torchfast.metrics.classification.inputs import Batch, Curves, check_inputs, curves_of, refuse, wrong_in_curves
from torchfast.metrics.classification.options import resolve
from torchfast.metrics.classification.values import Areas, Counts, bin_counts, bounds_of, empty_counts, values_of

IGNORED = -1


class ClassificationMetrics(torchmetrics.Metric):
    """:func:`classification_metrics` over many batches: a :class:`torchmetrics.Metric`.

    Metrics of decisions keep counts: a fixed size, synchronised over ``torch.distributed`` by one sum. The areas
    ``"roc_auc"`` and ``"average_precision"`` need all scores together, and are kept in one of two ways:

    - **exact** (default): the scores in ``score_dtype`` and the labels in 1 to 4 bytes: 5 bytes a sample of binary
      float32 scores, 5 GB of 1e9; of multiclass 4 a class and sample. Use it wherever that fits: evaluations up to
      some 1e8 scores, early stopping on small differences, scores of a narrow range.
    - **bins=** n: counts of positives and negatives in n equal bins of the probability: 16 n bytes a class, whatever
      was seen, one sum over processes. Scores of one bin count as tied, so with p_b and n_b the shares of all
      positives and negatives that fall into bin b, the ROC AUC is wrong by **at most sum of p_b n_b / 2**: below
      1 / (2 n) where scores of either kind are spread evenly, but up to 1/2 where all lie in one bin, as those of a
      confident model may. ``error_bounds`` tells the bound of the data seen. Use it for pixels, for training curves,
      and for streams that never end.

    Args:
        metrics, threshold, from_logits, ignore_index, beta, zero_division, absent, nan: as in
            :func:`classification_metrics`.
        task: ``"binary"``, ``"multiclass"`` or ``"multilabel"``. Default: multiclass with ``num_classes``, else binary.
        num_classes: C, or the number of labels of multilabel.
        weighted: ``update`` takes ``sample_weight``: counts are then float64.
        bins: see above. Asks for probabilities, or logits with ``from_logits``.
        score_dtype: of the scores that are kept: float32 (default; it holds half precision exactly), or float64,
            without which float64 scores are refused rather than rounded.
        kwargs: those of :class:`torchmetrics.Metric`.

    ``compute`` returns a dict: the value of each metric.

    Example:
        >>> import torch
        >>> from torchfast.metrics import ClassificationMetrics
        >>> metrics = ClassificationMetrics(["accuracy", "f1@macro", "roc_auc"], num_classes=3, from_logits=True)
        >>> metrics.update(torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]]), torch.tensor([0, 2]))
        >>> metrics.update(torch.tensor([[1.0, 2.0, 0.0], [0.0, 2.5, 1.0]]), torch.tensor([1, 2]))
        >>> {name: round(value.item(), 4) for name, value in metrics.compute().items()}
        {'accuracy': 0.75, 'f1@macro': 0.7778, 'roc_auc': 0.8889}
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    def __init__(
        self,
        metrics: str | Sequence[str],
        *,
        num_classes: int | None = None,
        task: str | None = None,
        threshold: float = 0.5,
        from_logits: bool = False,
        ignore_index: int | None = None,
        beta: float = 1.0,
        zero_division: float = 0.0,
        absent: str = "skip",
        nan: str = "error",
        weighted: bool = False,
        bins: int | None = None,
        score_dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.options = options = resolve(
            metrics,
            task=task or ("binary" if num_classes is None else "multiclass"),
            num_classes=num_classes,
            threshold=threshold,
            from_logits=from_logits,
            ignore_index=ignore_index,
            beta=beta,
            zero_division=zero_division,
            absent=absent,
            nan=nan,
        )
        integer = isinstance(bins, int) and not isinstance(bins, bool) and bins >= 2
        check("bins", bins is None or integer, bins, "None or an integer >= 2")
        check(
            "bins",
            bins is None or bool(options.areas),
            bins,
            "None where neither roc_auc nor average_precision is asked",
        )
        check(
            "score_dtype", score_dtype in (torch.float32, torch.float64), score_dtype, "torch.float32 or torch.float64"
        )
        self.weighted, self.bins, self.score_dtype = weighted, bins, score_dtype
        self._curves = 1 if options.task == "binary" else options.num_classes
        # A MetricCollection lets metrics of the same state names and, after the first batch, the same values share
        # one state for ever, as precision and recall may have: so the name tells what is in it.
        self._suffix = f"_{options.digest}_{bins}"
        self._counts = [f"{field}{self._suffix}" for field in Counts._fields]
        for name, value in zip(self._counts, empty_counts(options, weighted), strict=True):
            self.add_state(name, value, dist_reduce_fx="sum")
        self._kept: list[str] = []
        if options.areas and bins is None:
            self._kept = [f"{field}{self._suffix}" for field in Curves._fields[: 2 + weighted]]
            for name in self._kept:
                self.add_state(name, [], dist_reduce_fx="cat")
        elif bins is not None:
            self._binned = f"binned{self._suffix}"
            dtype = torch.float64 if weighted else torch.long
            self.add_state(self._binned, torch.zeros(2, self._curves, bins, dtype=dtype), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, *, sample_weight: Tensor | None = None) -> None:
        """Adds a batch. The arguments are those of :func:`classification_metrics`."""
        options = self.options
        if sample_weight is not None and not self.weighted:
            raise ValueError("sample_weight must be None unless the metric was made with weighted=True, got a tensor")
        batch = check_inputs(options, preds, target, sample_weight)
        if self.weighted and batch.weight is None:
            ones = torch.ones((), dtype=torch.float64, device=batch.preds.device)
            rows = batch.target.shape if options.task == "multiclass" else batch.target.shape[:1]
            batch = batch._replace(weight=ones.expand(rows))
        wrong, curves = torch.zeros(5, dtype=torch.long, device=preds.device), None
        found = count(options, batch) if options.decisions else None
        if options.areas:
            curves = self._check_curves(curves_of(options, batch))
            wrong = wrong_in_curves(options, curves)
        if found is not None:
            wrong = wrong + found.wrong
        refuse(options, batch, wrong)  # before anything is added
        if found is not None:
            self._add(found._replace(wrong=wrong))
        else:
            setattr(self, self._counts[-1], getattr(self, self._counts[-1]) + wrong)
        if curves is not None:
            self._keep(curves, batch)

    def _add(self, found: Counts) -> None:
        for name, value in zip(self._counts, found, strict=True):
            setattr(self, name, getattr(self, name) + value)

    def _check_curves(self, curves: Curves) -> Curves:
        scores = curves.scores
        if scores.dtype == torch.float64 and self.score_dtype != torch.float64 and self.bins is None:
            raise TypeError("preds must be float32 or half precision, or score_dtype=torch.float64, got torch.float64")
        if self.bins is not None and self.options.from_logits and self.options.task != "multiclass":
            scores = scores.to(torch.float64).sigmoid()
        return curves._replace(scores=scores)

    def _keep(self, curves: Curves, batch: Batch) -> None:
        if self.bins is not None:
            binned = bin_counts(self.options, curves, self.bins)
            setattr(self, self._binned, getattr(self, self._binned) + binned)
            return
        scores, labels, weight = curves
        ignored = self.options.ignore_index
        if ignored is not None:
            labels = torch.where(labels == ignored, IGNORED, labels.long())
        of_labels = _smallest(self.options.num_classes) if self.options.task == "multiclass" else torch.int8
        kept = [scores.t().to(self.score_dtype), (labels if labels.dim() == 1 else labels.t()).to(of_labels)]
        if weight is not None:
            kept.append(weight.to(torch.float64))
        for name, value in zip(self._kept, kept, strict=True):
            getattr(self, name).append(value.clone())

    def compute(self) -> dict[str, Tensor]:
        """The values over all samples so far."""
        counts = Counts(*(getattr(self, name) for name in self._counts))
        found = self._areas() if self.options.areas else None
        if found is not None:
            warn_of_undefined(self.options, found)
        return values_of(self.options, counts, found, counts.wrong)

    def _areas(self) -> Areas:
        if self.bins is not None:
            negatives, positives = getattr(self, self._binned)
            pooled = areas_of(negatives.sum(0, keepdim=True), positives.sum(0, keepdim=True))
            return Areas(areas_of(negatives, positives), pooled)
        kept = [self._all(name) for name in self._kept]
        scores, labels = kept[:2]
        curves = Curves(scores.t(), labels if labels.dim() == 1 else labels.t(), kept[2] if self.weighted else None)
        return areas(self.options, curves, IGNORED)

    def _all(self, name: str) -> Tensor:
        state = getattr(self, name)
        return torch.cat([*state, self._nothing(name)]) if isinstance(state, list) else state

    def _nothing(self, name: str) -> Tensor:
        """The state of no samples, in the dtype of all."""
        place, multiclass = self._kept.index(name), self.options.task == "multiclass"
        if place == 2:
            return torch.zeros(0, dtype=torch.float64, device=self.device)
        if place == 0:
            return torch.zeros(0, self._curves, dtype=self.score_dtype, device=self.device)
        shape = (0,) if multiclass else (0, self._curves)
        dtype = _smallest(self.options.num_classes) if multiclass else torch.int8
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """A process without batches takes part in the exchange, too: it sends empty tensors."""
        for name in self._kept if not self._is_synced else ():
            if not getattr(self, name):
                getattr(self, name).append(self._nothing(name))
        super().sync(*args, **kwargs)

    def error_bounds(self) -> dict[str, Tensor]:
        """By how much the areas of ``bins`` may differ from the exact ones: those of this process's state.

        Of each ``roc_auc`` and ``average_precision`` asked for, in its average; exact areas have a bound of 0.

        Example:
            >>> import torch
            >>> from torchfast.metrics import ClassificationMetrics
            >>> metrics = ClassificationMetrics("roc_auc", bins=4)
            >>> metrics.update(torch.tensor([0.9, 0.4, 0.3, 0.1]), torch.tensor([1, 1, 0, 0]))
            >>> metrics.compute()["roc_auc"].item(), metrics.error_bounds()["roc_auc"].item()
            (0.875, 0.125)
        """
        names = self.options.areas
        if self.bins is None:
            zero = torch.zeros((), dtype=torch.float64, device=self.device)
            return {name.text: zero for name in names}
        return bounds_of(self.options, *getattr(self, self._binned))


def _smallest(num_classes: int) -> torch.dtype:
    """The smallest dtype that holds class ids and IGNORED."""
    return next(d for d in (torch.int8, torch.int16, torch.int32, torch.long) if num_classes - 1 <= torch.iinfo(d).max)
