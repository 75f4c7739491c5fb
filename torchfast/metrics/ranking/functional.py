"""The public functions: what they take, what they refuse, what they return."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchfast._common import check, check_device, check_factor, readable, widened
from torchfast._register import Sample, register_metric
from torchfast.metrics.ranking.inputs import Unretrieved, check_inputs, refuse
from torchfast.metrics.ranking.options import Options, named, resolve
from torchfast.metrics.ranking.reference import fake, reference

# ---- The values of all queries, and their means ------------------------------------------------


class PerQuery(NamedTuple):
    """Values, and where a query is skipped, both by metric and query."""

    values: Tensor
    skipped: Tensor | None
    totals: Tensor | None = None
    """The sum of each metric's values, if it is known."""
    weights: Tensor | None = None
    """By metric and query, beside the query's own weight; None if they are all 1."""

    def sums(self, weight: Tensor | None) -> tuple[Tensor, Tensor | float]:
        """Sums up weighted values and weights, by metric. A query of weight 0 does not count, even if it is NaN."""
        values = self.values
        if weight is None and self.skipped is None and self.weights is None:
            return values.sum(1) if self.totals is None else self.totals, float(values.shape[1])
        weight = torch.ones_like(values[0]) if weight is None else weight.to(values.dtype)
        weights = weight.expand_as(values)
        if self.weights is not None:
            weights = weights * self.weights
        if self.skipped is not None:
            weights = torch.where(self.skipped, 0.0, weights)
        return torch.where(weights == 0, 0.0, weights * values).sum(1), weights.sum(1)

    def marked(self) -> Tensor:
        """The values, NaN where a query is skipped."""
        return self.values if self.skipped is None else torch.where(self.skipped, torch.nan, self.values)


def evaluate(options: Options, preds: Tensor, target: Tensor, **arguments: Any) -> PerQuery:
    """Computes all values; ``arguments`` are those of ``ranking_metrics`` that describe the input."""
    inputs = check_inputs(options, preds, target, **arguments)
    values, empty = _op(*inputs, options.table_for(preds), *options.numbers)
    return per_query(options, values, empty, lambda: refuse(inputs, options))


def per_query(options: Options, values: Tensor, empty: Tensor, refuse: Callable[[], None]) -> PerQuery:
    """Treats queries without a relevant document as the options say. Where a value is not finite, ``refuse`` raises if
    an argument is to blame."""
    strict = "error" in (options.nan, options.empty) and not (
        torch.compiler.is_compiling() or type(values) is not Tensor or values.is_meta
    )
    totals = None
    if strict or readable(values):
        totals = values.sum(1)
        if not all(map(math.isfinite, totals.tolist())):
            refuse()
    if options.empty == "zero":
        return PerQuery(values, None, totals)
    undefined = torch.stack(
        [torch.zeros_like(empty[0]) if where is None else empty[where] for where in options.undefined]
    )
    if options.empty == "error" and strict and undefined.any():
        metric, query = undefined.nonzero()[0].tolist()
        what = "positive gain" if options.undefined[metric] else "relevant document"
        raise ValueError(f"query {query} has no {what}, so {options.names[metric]} is undefined (empty='error')")
    if options.empty == "skip":
        return PerQuery(values, undefined)
    return PerQuery(torch.where(undefined, 1.0, values) if options.empty == "one" else values, None)


def reduced(names: Sequence[str], found: PerQuery, query_weight: Tensor | None, reduction: str) -> dict[str, Tensor]:
    """The values by name: their means, or with ``reduction="none"`` those of all queries."""
    check("reduction", reduction in ("mean", "none"), reduction, "'mean' or 'none'")
    check("query_weight", query_weight is None or reduction == "mean", query_weight, "None for reduction='none'")
    if reduction == "none":
        return dict(zip(names, found.marked(), strict=True))
    weight = None if query_weight is None else check_weight(query_weight, found.values)
    sums, weights = found.sums(weight)
    return dict(zip(names, (sums / weights).unbind(), strict=True))


def check_weight(weight: Tensor, values: Tensor) -> Tensor:
    check_factor("query_weight", weight)
    weight = widened(weight)
    check("query_weight's shape", weight.shape == values.shape[1:], tuple(weight.shape), tuple(values.shape[1:]))
    check_device("query_weight", weight, "preds", values)
    if readable(weight):
        wrong = weight[~((weight >= 0) & (weight < torch.inf))]
        check("query_weight", len(wrong) == 0, wrong[:1].tolist(), "finite and >= 0")
    return weight.detach()


def ranking_metrics(
    preds: Tensor,
    target: Tensor,
    metrics: str | Sequence[str],
    *,
    offsets: Tensor | None = None,
    indexes: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    num_relevant: Tensor | None = None,
    unretrieved: Unretrieved | None = None,
    gain: str | Tensor | Sequence[float] | None = None,
    relevance_threshold: float | None = None,
    ties: str | None = None,
    nan: str = "propagate",
    empty: str | None = None,
    map_denominator: str | None = None,
    precision_denominator: str | None = None,
    query_weight: Tensor | None = None,
    reduction: str = "mean",
    preset: str | None = None,
) -> dict[str, Tensor]:
    r"""Ranking metrics of many queries, all in one pass over the scores.

    The formulas, with their treatment of ties, are in :mod:`torchfast.metrics.ranking`. Every result is the
    same, up to rounding, whatever other metrics and cut-offs are asked for.

    Args:
        preds: scores, float32/64, bfloat16 or float16, any strides; higher is better, whatever the sign. Shape
            ``(queries, documents)``, or ``(documents of all queries,)`` with ``offsets``, or any shape with
            ``indexes``, or a nested tensor (``layout=torch.jagged``). -0.0 and 0.0 are tied; infinities are scores.
        target: shape as ``preds``; bool, integers or floats, finite and >= 0: the graded relevance.
        metrics: of ``"ndcg"``, ``"dcg"``, ``"mrr"``, ``"map"``, ``"precision"``, ``"recall"``, ``"hit_rate"`` with or
            without a cut-off (``"ndcg@10"``), and ``"r_precision"``.
        offsets: query q has the documents ``offsets[q]`` to ``offsets[q + 1] - 1``; integers, shape ``(queries + 1,)``.
        indexes: the query of each document, any integers in any order. Queries are taken by ascending number.
        mask: bool, shape as ``preds``: False is padding, whose score and target are not looked at.
        lengths: the first so many documents of each row are no padding; integers, shape ``(queries,)``.
        num_relevant: the number of relevant documents of each query, retrieved or not, shape ``(queries,)``: what
            recall, r_precision and map divide by. Default: those in ``target`` and ``unretrieved``.
        unretrieved: targets of judged documents that were not retrieved: they enter the best order of ndcg, and the
            number of relevant documents. Values and offsets, or a nested tensor, or ``(queries, n)`` filled up with 0.
        gain: ``"linear"`` (default), ``"exp"`` (2^target - 1), or the gain of target 0, 1, 2, ..., nowhere decreasing.
        relevance_threshold: a document is relevant where target >= it. Default: where target > 0.
        ties: documents of the same score: ``"average"`` (default), the exact expectation over their orders;
            ``"stable"``, the earlier position first; ``"optimistic"`` or ``"pessimistic"``, the best or worst first.
        nan: NaN scores: ``"propagate"`` (default), all metrics of that query are NaN; ``"last"``, they are tied with
            each other behind all others; ``"error"``.
        empty: the value for queries without a relevant document (for ndcg and dcg: without a positive gain):
            ``"zero"`` (default), ``"one"``; ``"skip"`` leaves them out of the mean (NaN with ``reduction="none"``);
            ``"error"``.
        map_denominator: ``"n_rel"`` (default), ``"min(k,n_rel)"``, or ``"hits"``, the relevant documents up to k.
        precision_denominator: ``"k"`` (default), or ``"min(k,docs)"``, with a cut-off no more than the documents that
            the query has.
        query_weight: finite weight >= 0 of each query in the mean, shape ``(queries,)``, of a floating dtype.
        reduction: ``"mean"`` over the queries, or ``"none"``: their values.
        preset: sets ``ties``, ``gain``, ``empty``, ``map_denominator`` and ``precision_denominator``, which must then
            be left out, to what ``"trec_eval"``, ``"sklearn"`` (its ``ndcg_score`` and ``dcg_score``),
            ``"torchmetrics"``, ``"ranx"``, ``"xgboost"`` or ``"lightgbm"`` compute. trec_eval and ranx count judged
            documents that were not retrieved, so tell of them by ``unretrieved``; trec_eval takes tied documents by
            descending name, so give them in that order. scikit-learn's ``average_precision_score`` of tied scores is
            not the map here but :func:`torchfast.metrics.average_precision_score`.

    Returns:
        The value of each metric by its name, in float64: a scalar, or shape ``(queries,)`` with ``"none"``. The mean
        over nothing is NaN. Metrics have no gradient: whatever the scores require, the values do not require one.

        On GPUs the host waits for nothing, and a CUDA graph can capture the call, unless the shapes do not say how
        many queries or documents there are (``indexes``, nested tensors with holes), or ``"error"`` is asked for. The
        first call with a ``gain`` that is not on the GPU copies it there; capture a later one.

    Raises:
        ValueError, TypeError: an argument has a wrong value, shape, device or dtype. On GPUs, which are not made to
            wait, the values of tensors are not checked unless ``TORCHFAST_CHECK=1`` is set in the environment:
            queries with a wrong target, length or ``num_relevant``, or decreasing offsets, come out as NaN, as do
            gains too large for their sum in an ndcg (in a dcg as inf).
        RuntimeError: under ``torch.func`` transforms and forward-mode AD.

    Example:
        >>> import torch
        >>> from torchfast.metrics import ranking_metrics
        >>> preds = torch.tensor([[0.9, 0.8, 0.1], [0.3, 0.7, 0.7]])
        >>> target = torch.tensor([[0, 2, 1], [0, 1, 0]])
        >>> for name, value in ranking_metrics(preds, target, ["ndcg@10", "mrr", "map"]).items():
        ...     print(name, f"{value:.4f}")
        ndcg@10 0.7426
        mrr 0.6250
        map 0.6667
        >>> ranking_metrics(preds, target, "mrr", ties="pessimistic", reduction="none")
        {'mrr': tensor([0.5000, 0.5000], dtype=torch.float64)}
    """
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
    found = evaluate(
        options,
        preds,
        target,
        offsets=offsets,
        indexes=indexes,
        mask=mask,
        lengths=lengths,
        num_relevant=num_relevant,
        unretrieved=unretrieved,
    )
    return reduced(options.names, found, query_weight, reduction)


# ---- One metric ------------------------------------------------------------------------------


def _one(kind: str, preds: Tensor, target: Tensor, k: int | None, options: dict[str, Any]) -> Tensor:
    (value,) = ranking_metrics(preds, target, named(kind, k), **options).values()
    return value


def ndcg(preds: Tensor, target: Tensor, k: int | None = None, **options: Any) -> Tensor:
    """Normalised discounted cumulative gain of the first ``k`` documents (default: of all).

    ``options``, shapes and errors are those of :func:`ranking_metrics`, formulas in :mod:`torchfast.metrics.ranking`.

    Example:
        >>> import torch
        >>> from torchfast.metrics.ranking import ndcg
        >>> print(f"{ndcg(torch.tensor([[0.9, 0.8, 0.1]]), torch.tensor([[0, 2, 1]]), k=2):.4f}")
        0.4796
    """
    return _one("ndcg", preds, target, k, options)


def mrr(preds: Tensor, target: Tensor, k: int | None = None, **options: Any) -> Tensor:
    """Mean reciprocal rank of the first relevant document, 0 where that is not among the first ``k`` (default: any).

    ``options``, shapes and errors are those of :func:`ranking_metrics`, formulas in :mod:`torchfast.metrics.ranking`.

    Example:
        >>> import torch
        >>> from torchfast.metrics.ranking import mrr
        >>> mrr(torch.tensor([[0.9, 0.8, 0.1]]), torch.tensor([[0, 1, 1]])).item()
        0.5
    """
    return _one("mrr", preds, target, k, options)


def mean_average_precision(preds: Tensor, target: Tensor, k: int | None = None, **options: Any) -> Tensor:
    """Mean average precision over the relevant documents among the first ``k`` (default: all).

    ``options``, shapes and errors are those of :func:`ranking_metrics`, formulas in :mod:`torchfast.metrics.ranking`.

    Example:
        >>> import torch
        >>> from torchfast.metrics.ranking import mean_average_precision
        >>> print(f"{mean_average_precision(torch.tensor([[0.9, 0.8, 0.1]]), torch.tensor([[0, 1, 1]])):.4f}")
        0.5833
    """
    return _one("map", preds, target, k, options)


def precision(preds: Tensor, target: Tensor, k: int | None = None, **options: Any) -> Tensor:
    """The share of the first ``k`` documents (default: of all) that is relevant.

    ``options``, shapes and errors are those of :func:`ranking_metrics`, formulas in :mod:`torchfast.metrics.ranking`.

    Example:
        >>> import torch
        >>> from torchfast.metrics.ranking import precision
        >>> precision(torch.tensor([[0.9, 0.8, 0.1]]), torch.tensor([[0, 1, 1]]), k=2).item()
        0.5
    """
    return _one("precision", preds, target, k, options)


def recall(preds: Tensor, target: Tensor, k: int | None = None, **options: Any) -> Tensor:
    """The share of the relevant documents that is among the first ``k`` (default: all).

    ``options``, shapes and errors are those of :func:`ranking_metrics`, formulas in :mod:`torchfast.metrics.ranking`.

    Example:
        >>> import torch
        >>> from torchfast.metrics.ranking import recall
        >>> recall(torch.tensor([[0.9, 0.8, 0.1]]), torch.tensor([[1, 0, 1]]), k=1).item()
        0.5
    """
    return _one("recall", preds, target, k, options)


def hit_rate(preds: Tensor, target: Tensor, k: int | None = None, **options: Any) -> Tensor:
    """The share of queries that have a relevant document among the first ``k`` (default: among all).

    ``options``, shapes and errors are those of :func:`ranking_metrics`, formulas in :mod:`torchfast.metrics.ranking`.

    Example:
        >>> import torch
        >>> from torchfast.metrics.ranking import hit_rate
        >>> hit_rate(torch.tensor([[0.9, 0.9, 0.1]]), torch.tensor([[0, 1, 1]]), k=1).item()  # tied: even chances
        0.5
    """
    return _one("hit_rate", preds, target, k, options)


def r_precision(preds: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Precision at the number of relevant documents.

    ``options``, shapes and errors are those of :func:`ranking_metrics`, formulas in :mod:`torchfast.metrics.ranking`.

    Example:
        >>> import torch
        >>> from torchfast.metrics.ranking import r_precision
        >>> r_precision(torch.tensor([[0.9, 0.8, 0.1]]), torch.tensor([[0, 1, 1]])).item()
        0.5
    """
    return _one("r_precision", preds, target, None, options)


# ---- Sample inputs: what the generic tests, selftest and benchmarks run ----------------------

ALL = ("ndcg", "ndcg@3", "dcg@5", "mrr", "mrr@2", "map", "map@4", "precision", "precision@3", "recall@3", "hit_rate@2")


def sample_inputs(device: str = "cpu", dtype: torch.dtype = torch.float32, *, large: bool = False) -> Iterator[Sample]:
    """One call per form of input and policy; with ``large`` also one per way in which a kernel shares out its work."""
    g = torch.Generator(device="cpu").manual_seed(0)

    def scores(*shape: int, values: int = 5) -> Tensor:
        """Makes few different scores, for ties."""
        return (torch.randint(values, shape, generator=g) - values // 2).to(device, dtype)

    def grades(*shape: int, relevant: float = 0.4) -> Tensor:
        return (torch.randint(1, 4, shape, generator=g) * (torch.rand(shape, generator=g) < relevant)).to(device)

    def counts(queries: int, most: int) -> Tensor:
        return torch.randint(most + 1, (queries,), generator=g).to(device)

    metrics = (*ALL, "r_precision")
    x, y = scores(6, 9), grades(6, 9)
    for ties in ("average", "stable", "optimistic", "pessimistic"):
        yield Sample((x, y, metrics), {"ties": ties, "reduction": "none"})
    yield Sample((x, y, metrics), {"map_denominator": "hits", "gain": "exp", "empty": "one"})
    yield Sample((x, y, (*metrics, "precision@20")), {"preset": "xgboost", "lengths": counts(6, 9)})
    yield Sample((x, y, metrics), {"map_denominator": "min(k,n_rel)", "gain": (0.0, 1.0, 3.0, 3.5)})
    yield Sample((x, y.bool(), metrics), {"lengths": counts(6, 9), "empty": "skip"})
    yield Sample((x, y / 4, metrics), {"mask": y != 2, "relevance_threshold": 0.5})
    yield Sample((x / 0, y, metrics), {"nan": "last"})
    total = 30
    flat = scores(total), grades(total)
    offsets = torch.cat(
        [torch.tensor([0]), torch.randint(total, (7,), generator=g).sort().values, torch.tensor([total])]
    )
    yield Sample((*flat, metrics), {"offsets": offsets.to(device)})
    yield Sample((*flat, metrics), {"indexes": counts(total, 6) - 3, "reduction": "none"})
    others = grades(6, 3)
    yield Sample((x, y, metrics), {"unretrieved": others, "num_relevant": counts(6, 5) + 9})
    if not large:
        return
    for shape, values, relevant in (
        ((5000, 7), 3, 0.3),
        ((300, 100), 100, 0.05),
        ((300, 100), 20, 0.5),
        ((4, 20_000), 1000, 0.001),
        ((4, 20_000), 1000, 0.5),
        ((2, 300_000), 2000, 0.0001),
        ((2, 300_000), 2000, 0.5),
    ):
        x, y = scores(*shape, values=values), grades(*shape, relevant=relevant)
        for ties in ("average", "stable"):
            yield Sample((x, y, metrics), {"ties": ties, "reduction": "none", "map_denominator": "hits"})
    yield Sample((*(f(50_000) for f in (scores, grades)), metrics), {"indexes": counts(50_000, 3000) * 2**40})


# ---- Registration: csrc/ranking serves the CPU and CUDA ---------------------------------------

_op = register_metric(
    "ranking_metrics",
    "(Tensor preds, Tensor target, Tensor? offsets, Tensor? mask, Tensor? lengths, Tensor? num_relevant, "
    "Tensor? unretrieved, Tensor? unretrieved_offsets, Tensor? gain_table, int[] kinds, int[] ks, int ties, int gain, "
    "int map_denominator, int precision_denominator, int nan, float relevance_threshold) "
    "-> (Tensor values, Tensor empty)",
    reference=reference,
    fake=fake,
    function=ranking_metrics,
    sample_inputs=sample_inputs,
)
