"""The values of metrics from ranks that are known already: the op ``torchfast::metrics_of_ranks``.

A metric of a query depends on its judged documents alone: on how many documents score larger and how many equal, on
their targets, and on the number of documents. So whoever has these, as :mod:`torchfast.metrics.retrieval` has, which
counts them over a catalogue without its scores, gets the values by the code that ``ranking_metrics`` itself uses after
it has located its judged documents: in PyTorch ``values.py``, in C++ ``evaluate`` of csrc/ranking/cpu/query-inl.h.

Documents that are not listed have target 0 and gain 0, and those of target 0 need not be listed. What cannot be ranks
makes a query's values NaN: groups of tied documents that overlap, more listed documents at a place than are tied there,
places beyond the last document.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchfast.metrics._common import value_dtype
from torchfast.metrics.ranking.reference import Labels, labels_of, ragged
from torchfast.metrics.ranking.values import TIES, Judged, Ranked, _then_by, values_of

#: Tied documents that are held at once: all of them where a model scores them alike, and then query by query.
MOST_TIED = 2**20


def _ranked(
    larger: Tensor, equal: Tensor, target: Tensor, labels: Labels, query: Tensor, size: Tensor, ties: int
) -> tuple[Ranked, Tensor]:
    """The documents of all groups that have a listed one, and which queries have no such ranks."""
    by_target = target.double()
    order = torch.arange(len(query), device=query.device)
    if TIES[ties] in ("optimistic", "pessimistic"):
        order = _then_by(order, by_target, descending=TIES[ties] == "optimistic")
    order = _then_by(_then_by(order, larger), query)
    query, larger, equal = query[order], larger[order], equal[order]
    gain, relevant = labels.gain[order], labels.relevant[order].long()

    position = torch.arange(len(query), device=query.device)
    begins = torch.ones_like(query, dtype=torch.bool)
    begins[1:] = (query[1:] != query[:-1]) | (larger[1:] != larger[:-1])
    group = begins.long().cumsum(0) - 1
    first = torch.where(begins, position, 0).cummax(0).values

    def of_group(values: Tensor) -> Tensor:
        return torch.zeros_like(values).index_add_(0, group, values)[group]

    listed, same = of_group(torch.ones_like(group)), equal == equal[first]
    wrong = (larger < 0) | ~same | (listed > equal) | (larger > size[query] - equal)
    wrong[1:] |= begins[1:] & (query[1:] == query[:-1]) & (larger[1:] < larger[:-1] + equal[:-1])
    bad = torch.zeros_like(size).index_add_(0, query, wrong.long()) > 0

    before = relevant.cumsum(0) - relevant
    start = torch.searchsorted(query, torch.arange(len(size), device=query.device))
    keep, n, relevant_before = ~bad[query], torch.ones_like(equal), before - before[start[query]]
    if TIES[ties] == "average":
        keep, n = keep & begins, equal
        docs = Ranked(query, larger, n, n, of_group(relevant), relevant_before, of_group(gain) / equal.clamp(min=1))
    else:  # stable ties are none: whoever knows the order of tied documents gives each its own rank
        ahead = larger if TIES[ties] != "pessimistic" else larger + equal - listed
        docs = Ranked(query, ahead + position - first, n, n, relevant, relevant_before, gain)
    docs, n = Ranked(*(x[keep] for x in docs)), n[keep]
    docs = Ranked(*(x.repeat_interleave(n) for x in docs))
    ends = n.cumsum(0)
    place = torch.arange(1, len(docs.query) + 1, device=query.device) - (ends - n).repeat_interleave(n)
    return docs._replace(rank=docs.rank + place, place=place), bad


def _parts(equal: Tensor, offsets: Tensor) -> list[tuple[int, int]]:
    """Ranges of queries whose tied documents are few enough to be held at once."""
    sums = torch.cat([equal.new_zeros(1), equal.clamp(min=0).cumsum(0)])[offsets].tolist()
    found, begin = [], 0
    for q in range(1, len(sums)):
        if q > begin and sums[q] - sums[begin] > MOST_TIED and q - 1 > begin:
            found.append((begin, q - 1))
            begin = q - 1
    return [*found, (begin, len(sums) - 1)]


def fake(
    larger: Tensor, equal: Tensor, target: Tensor, offsets: Tensor, candidates: Tensor, table: Any, kinds: Any, *_: Any
) -> tuple[Tensor, Tensor]:
    values = larger.new_empty((len(kinds), len(candidates)), dtype=value_dtype(larger.device))
    return values, larger.new_empty((2, len(candidates)), dtype=torch.bool)


def reference(
    larger: Tensor,
    equal: Tensor,
    target: Tensor,
    offsets: Tensor,
    candidates: Tensor,
    gain_table: Tensor | None,
    kinds: Sequence[int],
    ks: Sequence[int],
    ties: int,
    gain: int,
    map_denominator: int,
    precision_denominator: int,
    relevance_threshold: float,
) -> tuple[Tensor, Tensor]:
    query, valid, bad = ragged(offsets, len(larger))
    if len(candidates) == 0 or bool(bad.any()):
        values, empty = fake(larger, equal, target, offsets, candidates, None, kinds)
        return values.fill_(torch.nan), empty.fill_(False)
    options: tuple[Any, ...] = kinds, ks, ties, gain, map_denominator, precision_denominator, relevance_threshold
    if len(parts := _parts(equal, offsets)) > 1:
        found = []
        for begin, end in parts:
            some = slice(int(offsets[begin]), int(offsets[end]))
            lists = larger[some], equal[some], target[some], offsets[begin : end + 1] - offsets[begin]
            found.append(reference(*lists, candidates[begin:end], gain_table, *options))
        return torch.cat([values for values, _ in found], 1), torch.cat([empty for _, empty in found], 1)
    nothing = target == 0 if gain_table is None else (target == 0) & (gain_table[:1].sum() == 0)
    larger, equal, target, query = (x[valid & ~nothing] for x in (larger, equal, target, query))
    labels = labels_of(target, torch.ones_like(query, dtype=torch.bool), gain, gain_table, relevance_threshold)
    docs, wrong = _ranked(larger, equal, target, labels, query, candidates, ties)

    def count(what: Tensor) -> Tensor:
        return torch.zeros_like(candidates).index_add_(0, query, what.long())

    bad = wrong | (count(labels.wrong) > 0) | (candidates < 0)
    judged = Judged(labels.gain, query, count(labels.relevant), candidates, bad)
    return values_of(docs, judged, kinds, ks, map_denominator, precision_denominator)
