"""Rank-based metrics of knowledge graphs, as PyKEEN defines them: means over the relevant items, not over queries.

The rank of an item is ``larger + 1`` (optimistic), ``larger + equal`` (pessimistic), or the mean of both (realistic,
the default), which need not be whole. With ranks r, numbers of candidates c, and means over all relevant items::

    mean_rank                 mean of r
    mrr                       mean of 1 / r: of the realistic rank, which is not the expectation of 1 / rank
    hit_rate@k                mean of [r <= k]
    adjusted_mean_rank_index  1 - (mean of r - 1) / (mean of (c + 1) / 2 - 1): 1 if all are first, 0 for a random order

Source: Berrendorf et al., On the Ambiguity of Rank-Based Evaluation of Entity Alignment or Link Prediction Methods,
2020; pykeen.evaluation.RankBasedEvaluator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from torchfast._common import check
from torchfast.metrics._common import check_choice, check_kind, digest, names_of, value_dtype
from torchfast.metrics.ranking.functional import PerQuery
from torchfast.metrics.ranking.values import NANS
from torchfast.metrics.retrieval.ranks import Found

KINDS = ("mean_rank", "adjusted_mean_rank_index", "mrr", "hit_rate")
TIES = ("realistic", "optimistic", "pessimistic")


@dataclass(frozen=True)
class Options:
    """What to compute, checked."""

    names: tuple[str, ...]
    parts: tuple[tuple[str, int], ...]
    ties: str
    nan: str

    @property
    def digest(self) -> str:
        return digest(self)


def _parse(name: str) -> tuple[str, int]:
    kind, at, k = name.partition("@")
    check_kind(kind, name, KINDS, " with preset='pykeen'")
    number = int(k) if k.isascii() and k.isdecimal() else 0
    good = number > 0 if kind == "hit_rate" else not at
    check(
        f"metrics: the cut-off of {kind!r}", good, name, "an integer >= 1, as in 'hit_rate@10', and of hit_rate alone"
    )
    return kind, number


def resolve(
    metrics: str | Sequence[str], *, ties: str | None = None, nan: str = "propagate", **given: object
) -> Options:
    for name, value in given.items():
        check(name, value is None, value, "left out with preset='pykeen', where it has no meaning")
    check_choice("nan", nan, (*NANS, "error"))
    ties = TIES[0] if ties is None else ties
    check_choice("ties", ties, TIES)
    names = names_of(metrics, "hit_rate@10")
    return Options(names, tuple(map(_parse, names)), ties, nan)


def evaluate(options: Options, found: Found) -> PerQuery:
    """The values of all relevant items, with their weights in the adjusted mean rank index."""
    larger, equal, candidates = (x.to(value_dtype(x.device)) for x in found.ranks)
    rank = {
        "realistic": larger + (equal + 1) / 2,
        "optimistic": larger + 1,
        "pessimistic": larger + equal,
    }[options.ties]
    if options.nan != "last":
        rank = torch.where(found.missing > 0, torch.nan, rank)
    values, weights = [], []
    for kind, k in options.parts:
        weight = torch.ones_like(rank)
        if kind == "mean_rank":
            value = rank
        elif kind == "mrr":
            value = 1 / rank
        elif kind == "hit_rate":
            value = torch.where(rank.isnan(), rank, (rank <= k).to(rank.dtype))
        else:  # it is the mean of each item's own index, in which many candidates weigh more
            weight = (candidates - 1) / 2
            value = 1 - (rank - 1) / weight
        values.append(value)
        weights.append(weight)
    return PerQuery(torch.stack(values), None, None, torch.stack(weights))
