"""Ranking metrics from embeddings: the ranks of ``ranks.py``, evaluated by the code of ``ranking_metrics``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchfast._common import REALS, check, check_device, check_tensor, readable
from torchfast._register import Sample, register_metric
from torchfast.metrics.ranking import functional as ranking
from torchfast.metrics.ranking import of_ranks
from torchfast.metrics.ranking.functional import PerQuery, per_query
from torchfast.metrics.ranking.inputs import check_labels, from_jagged, refuse_labels
from torchfast.metrics.ranking.options import Options, resolve
from torchfast.metrics.ranking.reference import ragged
from torchfast.metrics.ranking.values import TIES
from torchfast.metrics.retrieval import pykeen
from torchfast.metrics.retrieval.ids import ItemIds, Lists
from torchfast.metrics.retrieval.ranks import Found, find_ranks

AnyOptions = Options | pykeen.Options


def options_of(
    metrics: str | Sequence[str],
    *,
    ties: str | None,
    gain: Any,
    relevance_threshold: float | None,
    map_denominator: str | None,
    precision_denominator: str | None,
    nan: str,
    empty: str | None,
    preset: str | None,
) -> AnyOptions:
    """Resolves them for items of which most are not listed, so that the gain of target 0 must be 0."""
    given: dict[str, Any] = dict(
        ties=ties,
        gain=gain,
        relevance_threshold=relevance_threshold,
        map_denominator=map_denominator,
        precision_denominator=precision_denominator,
        empty=empty,
    )
    if preset == "pykeen":
        return pykeen.resolve(metrics, nan=nan, **given)
    options = resolve(metrics, nan=nan, preset=preset, **given)
    if options.table is not None and readable(options.table):
        first = float(options.table[0])
        check("gain", first == 0, first, "0 for target 0, which all items have that are not relevant")
    return options


# ---- The values ----------------------------------------------------------------------------------


def evaluate(
    options: AnyOptions, queries: Tensor, items: Tensor, relevant: ItemIds, relevance: Any = None, **arguments: Any
) -> tuple[PerQuery, Lists]:
    """The values of all queries; with ``filtered`` or PyKEEN's definitions, of all relevant items."""
    stable = isinstance(options, Options) and TIES[options.ties] == "stable"
    found = find_ranks(queries, items, relevant, stable=stable, **arguments)
    if isinstance(options, pykeen.Options):
        check("relevance", relevance is None, type(relevance), "None with preset='pykeen'")
        if options.nan == "error":
            _refuse_nan(found.missing, found.relevant.query)
        return pykeen.evaluate(options, found), found.relevant
    target = relevance_of(relevance, found.relevant, options)
    return _of_ranks(options, found, target, arguments.get("filtered", False)), found.relevant


def _of_ranks(options: Options, found: Found, target: Tensor, filtered: bool) -> PerQuery:
    """Gives the ranks to the code that ``ranking_metrics`` has for its own; see ``of_ranks``."""
    offsets, candidates, missing = found.relevant.offsets, found.candidates, found.missing_of_query
    if filtered:  # each relevant item is a query of its own
        offsets = torch.arange(len(target) + 1, device=target.device)
        candidates, missing = found.ranks.candidates, found.missing
    kinds, ks, ties, gain, *denominators, _, threshold = options.numbers
    larger, equal, _ = found.ranks
    values, empty = _op(
        *(larger, equal, target, offsets, candidates, options.table_for(target)),
        *(kinds, ks, ties, gain, *denominators, threshold),
    )
    if options.nan != "last":
        values, empty = torch.where(missing > 0, torch.nan, values), empty & (missing == 0)

    def refuse() -> None:
        refuse_labels("relevance", target, ragged(offsets, len(target)), options)
        if options.nan == "error":
            _refuse_nan(missing, found.relevant.query if filtered else torch.arange(len(missing)))

    return per_query(options, values, empty, refuse)


def _refuse_nan(missing: Tensor, query: Tensor) -> None:
    at = (missing > 0).nonzero().flatten()
    if len(at):
        raise ValueError(f"scores must not be NaN with nan='error', got one in query {int(query[at[0]])}")


def relevance_of(relevance: Any, relevant: Lists, options: Options) -> Tensor:
    """The target of each relevant item."""
    if relevance is None:
        return torch.ones(len(relevant.ids), dtype=torch.long, device=relevant.ids.device)
    if isinstance(relevance, (tuple, list)):
        check("relevance's length", len(relevance) == 2, len(relevance), "2: values and offsets")
        relevance = relevance[0]
    relevance = check_labels("relevance", relevance, options)
    if relevance.is_nested:
        relevance = from_jagged("relevance", relevance)[0]
    given = tuple(relevance.shape)
    check("relevance's shape", given == tuple(relevant.shape), given, f"{tuple(relevant.shape)}, as of relevant")
    check_device("relevance", relevance, "relevant", relevant.ids)
    flat = relevance.reshape(-1)
    return flat if relevant.place is None else flat[relevant.place]


def retrieval_metrics(
    queries: Tensor,
    items: Tensor,
    relevant: ItemIds,
    metrics: str | Sequence[str],
    *,
    relevance: Tensor | None = None,
    exclude: ItemIds | None = None,
    item_bias: Tensor | None = None,
    similarity: str = "dot",
    filtered: bool = False,
    group: dist.ProcessGroup | None = None,
    item_offset: int | None = None,
    progress: bool = False,
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
    r"""Ranking metrics of a whole catalogue from embeddings: exact, without the matrix of scores, without sampling.

    The score of item i for query q is :math:`\langle \text{queries}_q, \text{items}_i\rangle + \text{item\_bias}_i`,
    or the cosine of the two vectors. All items that are not excluded are ranked, and the values are those of
    :func:`ranking_metrics` of the matrix of scores, which never exists.

    Args:
        queries: embeddings of shape ``(queries, d)``, float32/64, bfloat16 or float16, any strides. Products are
            summed in float32 (float64 for float64).
        items: embeddings of shape ``(items, d)`` and the same dtype. An item's id is its row.
        relevant: the relevant items of each query: ids of shape ``(queries,)`` or ``(queries, r)``, where -1 is none;
            or values and offsets (those of query q are ``values[offsets[q]:offsets[q + 1]]``); or a nested tensor
            (``layout=torch.jagged``); or a scipy matrix in CSR form, whose stored entries are taken, whatever their
            values.
        metrics: names as in :func:`ranking_metrics`. No cut-off is too long.
        relevance: graded relevance of the relevant items, finite and >= 0, in the shape of ``relevant`` (of a CSR
            matrix: of its ``indices``). Default: 1. All other items have 0.
        exclude: items that are no candidates of a query, such as those seen in training, in any form of ``relevant``.
        item_bias: a number that is added to the scores of each item, shape ``(items,)``.
        similarity: ``"dot"`` or ``"cosine"``. The cosine with a vector of zeros is 0.
        filtered: each relevant item is ranked without the other relevant ones of its query, as for knowledge graphs:
            it counts as a query of its own, with its query's weight.
        group: a process group of :mod:`torch.distributed`. Each process has some of the ``items`` and ``item_bias``,
            and all have the same other arguments. The result has the bits of one process with all items.
        item_offset: the id of this process's first item. Default: the items of the ranks before come first.
        progress: shows a bar.
        gain, relevance_threshold, ties, nan, empty, map_denominator, precision_denominator, reduction: as in
            :func:`ranking_metrics`; of tied items the smaller id is the earlier position; the gain of target 0 must be
            0. ``nan`` is about scores of candidates.
        query_weight: finite weight >= 0 of each query in the mean, shape ``(queries,)``, of a floating dtype.
        preset: as in :func:`ranking_metrics`, or ``"pykeen"``, whose metrics are ``"mean_rank"``,
            ``"adjusted_mean_rank_index"``, ``"mrr"`` and ``"hit_rate@k"`` over the relevant items, with ties
            ``"realistic"`` (default), ``"optimistic"`` or ``"pessimistic"``; usually with ``filtered=True``.

    Returns:
        The value of each metric by its name, in float64: a scalar, or with ``"none"`` shape ``(queries,)``. With
        ``filtered=True`` or ``preset="pykeen"`` the values are those of the relevant items, in the shape of
        ``relevant``, NaN where that is -1. The mean over nothing is NaN. Metrics have no gradient.

    Raises:
        ValueError, TypeError: an argument has a wrong value, shape, device or dtype; an item is listed twice in a
            query, or is both relevant and excluded, or does not exist. On GPUs values are not checked unless
            ``TORCHFAST_CHECK=1`` is set in the environment.
        RuntimeError: under ``torch.func`` transforms and forward-mode AD.

    Example:
        >>> import torch
        >>> from torchfast.metrics import retrieval_metrics
        >>> users, items = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 1.0], [2.0, 5.0], [1.0, 2.0]])
        >>> bought, seen = torch.tensor([1, 2]), torch.tensor([[0], [-1]])
        >>> for name, value in retrieval_metrics(users, items, bought, ["mrr", "ndcg@10"], exclude=seen).items():
        ...     print(name, f"{value:.4f}")
        mrr 0.7500
        ndcg@10 0.8155
    """
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
    found, lists = evaluate(
        options,
        queries,
        items,
        relevant,
        relevance,
        exclude=exclude,
        item_bias=item_bias,
        similarity=similarity,
        filtered=filtered,
        group=group,
        item_offset=item_offset,
        progress=progress,
    )
    of_items = filtered or preset == "pykeen"
    weight = weight_of(query_weight, lists, of_items)
    values = ranking.reduced(options.names, found, weight, reduction)
    if of_items and reduction == "none":
        return {name: lists.as_given(value, torch.nan) for name, value in values.items()}
    return values


def weight_of(query_weight: Tensor | None, lists: Lists, of_items: bool) -> Tensor | None:
    """The weight of what is averaged."""
    if query_weight is None or not of_items:
        return query_weight
    check_tensor("query_weight", query_weight, REALS, "a tensor of a floating dtype")
    good = query_weight.shape == (lists.queries,)
    check("query_weight's shape", good, tuple(query_weight.shape), (lists.queries,))
    return query_weight[lists.query]


# ---- Sample inputs: what the generic tests and selftest run ------------------------------------

ALL = ("ndcg", "ndcg@3", "dcg@5", "mrr", "mrr@2", "map", "map@4", "precision", "precision@3", "recall@3", "hit_rate@2")


def sample_inputs(device: str = "cpu", dtype: torch.dtype = torch.float32, *, large: bool = False) -> Iterator[Sample]:
    """Small integers, whose products every dtype adds up exactly, and which tie often."""
    g = torch.Generator(device="cpu").manual_seed(0)

    def values(*shape: int) -> Tensor:
        return (torch.randint(5, shape, generator=g) - 2).to(device, dtype)

    def lists(n: int, m: int, *longest: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Lists of up to so many items each, which have none in common."""
        ids = torch.rand(n, m, generator=g).argsort(1).split([*longest, m - sum(longest)], 1)
        for part in ids[:-1]:
            keep = torch.rand(part.shape, generator=g) < 0.7
            offsets = torch.cat([torch.zeros(1, dtype=torch.long), keep.sum(1).cumsum(0)])
            yield part[keep].to(device), offsets.to(device)

    metrics = (*ALL, "r_precision")
    n, m, d = 5, 20, 3
    queries, items = values(n, d), values(m, d)
    relevant, exclude = lists(n, m, 4, 2)
    grades = torch.randint(4, relevant[0].shape, generator=g).to(device)
    for ties in ("average", "stable", "optimistic", "pessimistic"):
        yield Sample((queries, items, relevant, metrics), {"ties": ties, "exclude": exclude, "reduction": "none"})
    graded = {"relevance": grades, "item_bias": values(m), "gain": (0.0, 1.0, 3.0, 3.5)}
    yield Sample((queries, items, relevant, metrics), {**graded, "map_denominator": "hits", "empty": "one"})
    yield Sample((queries, items, relevant, metrics), {"filtered": True, "query_weight": torch.ones(n, device=device)})
    yield Sample((queries, items, relevant, ("mean_rank", "mrr")), {"filtered": True, "preset": "pykeen"})
    table = torch.tensor([0.0, 1.0], device=device)
    yield Sample((queries, items, torch.arange(n, device=device), metrics), {"gain": table})
    if large:
        for n, m, d, longest in (300, 3000, 16, 20), (40, 9000, 64, 70):
            (many,) = lists(n, m, longest)
            yield Sample((values(n, d), values(m, d), many, metrics), {"reduction": "none"})


# ---- Registration: csrc/ranking serves the CPU -------------------------------------------------

_op = register_metric(
    "metrics_of_ranks",
    "(Tensor larger, Tensor equal, Tensor target, Tensor offsets, Tensor candidates, Tensor? gain_table, int[] kinds, "
    "int[] ks, int ties, int gain, int map_denominator, int precision_denominator, float relevance_threshold) "
    "-> (Tensor values, Tensor empty)",
    reference=of_ranks.reference,
    fake=of_ranks.fake,
    function=retrieval_metrics,
    sample_inputs=sample_inputs,
)
