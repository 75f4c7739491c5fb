"""Ranking metrics of lists of retrieved items: a join of two lists of ids, and then ``ranking_metrics``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from torchfast._common import INTEGERS, check, check_tensor, readable
from torchfast.metrics.ranking import functional as ranking
from torchfast.metrics.ranking.functional import PerQuery
from torchfast.metrics.ranking.options import Options
from torchfast.metrics.ranking.values import R_PRECISION
from torchfast.metrics.retrieval import pykeen
from torchfast.metrics.retrieval.functional import AnyOptions, options_of, relevance_of
from torchfast.metrics.retrieval.ids import ItemIds, Lists, check_distinct, has_values, lists_of


def evaluate_retrieved(
    options: AnyOptions, retrieved: Tensor, relevant: ItemIds, relevance: Tensor | None = None
) -> PerQuery:
    """The values of all queries."""
    if isinstance(options, pykeen.Options):
        raise ValueError("preset must not be 'pykeen' for retrieved lists, which do not have the ranks of all items")
    check_tensor("retrieved", retrieved, INTEGERS, "a tensor of integers")
    check("retrieved's shape", retrieved.dim() == 2, tuple(retrieved.shape), "(queries, k)")
    n, k = retrieved.shape
    for name, kind, cut in zip(options.names, options.kinds, options.ks, strict=True):
        good = 0 < cut <= k or kind == R_PRECISION
        check("metrics", good, name, f"cut off at most at {k}, the length of the retrieved lists")
    retrieved = retrieved.long()
    wanted = lists_of("relevant", relevant, n, retrieved)
    listed = lists_of("retrieved", retrieved, n, retrieved)
    target = relevance_of(relevance, wanted, options)
    for name, ids in ("relevant", wanted.ids), ("retrieved", listed.ids):
        if readable(ids):
            wrong = ids[ids < 0]
            check(name, len(wrong) == 0, wrong[:1].tolist(), "item ids >= 0, or -1 for none")
    both = torch.cat([wanted.ids.long(), listed.ids.long()])
    most = int(both.max()) + 1 if len(both) and has_values(both) else 1
    names = None
    if most > torch.iinfo(torch.long).max // max(n, 1):  # of ids such as hashes, the ranks serve as well
        names, both = both.unique(return_inverse=True)
        wanted, listed = replace(wanted, ids=both[: len(wanted.ids)]), replace(listed, ids=both[len(wanted.ids) :])
        most = len(names)
    check_distinct("relevant", wanted, most, names=names)
    check_distinct("retrieved", listed, most, names=names)
    of_wanted, keys = wanted.query * most + wanted.ids, listed.query * most + listed.ids
    order = of_wanted.argsort()
    at = torch.searchsorted(of_wanted[order], keys)
    hit = torch.zeros_like(keys, dtype=torch.bool)
    grades = target.new_zeros(len(keys))
    lost = torch.ones_like(of_wanted, dtype=torch.bool)
    if len(order):
        match = order[at.clamp(max=len(order) - 1)]
        hit = of_wanted[match] == keys
        grades = torch.where(hit, target[match], grades)
        lost[match[hit]] = False
    if options.kinds.count(R_PRECISION) and readable(target):
        _check_r_precision(wanted, target, options, k)
    counts = lost.long().cumsum(0)
    left = torch.cat([counts.new_zeros(1), counts])[wanted.offsets]
    scores = -torch.arange(len(keys), device=keys.device).double()
    return ranking.evaluate(
        options,
        scores,
        grades,
        offsets=listed.offsets,
        indexes=None,
        mask=None,
        lengths=None,
        num_relevant=None,
        unretrieved=(target[lost], left),
    )


def _check_r_precision(wanted: Lists, target: Tensor, options: Options, k: int) -> None:
    relevant = (target >= options.threshold) if options.threshold else target > 0
    counts = torch.zeros(wanted.queries, dtype=torch.long).index_add_(0, wanted.query, relevant.long())
    most = int(counts.max()) if len(counts) else 0
    check("metrics", most <= k, "r_precision", f"cut off at most at {k}, but a query has {most} relevant items")


def retrieved_metrics(
    retrieved: Tensor,
    relevant: ItemIds,
    metrics: str | Sequence[str],
    *,
    relevance: Tensor | None = None,
    gain: str | Tensor | Sequence[float] | None = None,
    relevance_threshold: float | None = None,
    empty: str | None = None,
    map_denominator: str | None = None,
    precision_denominator: str | None = None,
    query_weight: Tensor | None = None,
    reduction: str = "mean",
    preset: str | None = None,
) -> dict[str, Tensor]:
    """Ranking metrics of lists of retrieved items, such as an index or a recommender returns.

    What is relevant and not retrieved counts: in the number of relevant items, and in the best order of ndcg.

    Args:
        retrieved: item ids of shape ``(queries, k)``, the best first; -1 is none. A query must not have an id twice.
        relevant, relevance: as in :func:`retrieval_metrics`. Ids are any numbers >= 0.
        metrics: names as in :func:`ranking_metrics`, with cut-offs up to k; ``"r_precision"`` if no query has more
            than k relevant items.
        gain, relevance_threshold, empty, map_denominator, precision_denominator, query_weight, reduction, preset: as in
            :func:`ranking_metrics`. Nothing is tied.

    Returns:
        The value of each metric by its name, in float64: a scalar, or with ``"none"`` shape ``(queries,)``.

    Raises:
        ValueError, TypeError: as of :func:`retrieval_metrics`; a metric looks further than the lists go.

    Example:
        >>> import torch
        >>> from torchfast.metrics import retrieved_metrics
        >>> retrieved, relevant = torch.tensor([[4, 7, 1], [2, 0, -1]]), torch.tensor([[7, 9], [2, -1]])
        >>> for name, value in retrieved_metrics(retrieved, relevant, ["mrr@3", "recall@3"]).items():
        ...     print(name, value.item())
        mrr@3 0.75
        recall@3 0.75
    """
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
    found = evaluate_retrieved(options, retrieved, relevant, relevance)
    return ranking.reduced(options.names, found, query_weight, reduction)
