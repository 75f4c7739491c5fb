"""The formulas of this package in PyTorch: every device's fallback, and the truth of the others.

Without a loop over queries, in memory of the order of the input, and without reading a value on the host: all
documents are sorted by (query, score). ``values.py`` has what follows from the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchfast.metrics._common import value_dtype
from torchfast.metrics.ranking.values import GAINS, NANS, TIES, Judged, Ranked, _then_by, values_of

# ---- Documents and their queries -------------------------------------------------------------


class Documents(NamedTuple):
    """``query`` and ``valid`` (true: no padding) have an element per document, ``bad`` (boundaries) one per query."""

    query: Tensor
    valid: Tensor
    bad: Tensor


def ragged(offsets: Tensor, total: int) -> Documents:
    """Offsets that are no boundaries make every query bad, but are never read through."""
    queries = offsets.shape[0] - 1
    bad = (offsets[:-1] < 0) | (offsets[1:] < offsets[:-1]) | (offsets[1:] > total)
    bad = bad.any().expand(queries)
    index = torch.arange(total, device=offsets.device)
    end = offsets.clamp(0, total).cummax(0).values[1:]
    query = torch.searchsorted(end, index, right=True)
    return Documents(query.clamp(max=queries - 1), (query < queries) & (index >= offsets[0]), bad)


def documents_of(preds: Tensor, offsets: Tensor | None, mask: Tensor | None, lengths: Tensor | None) -> Documents:
    if offsets is not None:
        documents = ragged(offsets, preds.shape[0])
    else:
        queries, width = preds.shape
        index = torch.arange(queries * width, device=preds.device)
        query = torch.div(index, max(width, 1), rounding_mode="floor")
        bad = torch.zeros(queries, dtype=torch.bool, device=preds.device)
        valid = torch.ones_like(index, dtype=torch.bool)
        if lengths is not None:
            bad = (lengths < 0) | (lengths > width)
            valid = index - query * width < lengths[query]
        documents = Documents(query, valid, bad)
    if mask is not None:
        documents = documents._replace(valid=documents.valid & mask.reshape(-1))
    return documents


class Labels(NamedTuple):
    """What each document's target says; ``wrong`` is true where the target is illegal."""

    gain: Tensor
    relevant: Tensor
    wrong: Tensor


def labels_of(target: Tensor, valid: Tensor, gain: int, table: Tensor | None, threshold: float) -> Labels:
    y = target.reshape(-1).to(value_dtype(target.device))
    wrong = valid & ~((y >= 0) & (y < torch.inf))
    if table is not None:
        wrong = wrong | (valid & (y >= table.shape[0]))
    valid = valid & ~wrong
    y = torch.where(valid, y, 0.0)
    g = y
    if GAINS[gain] == "exp":
        g = torch.expm1(y * math.log(2))  # 2^y - 1, which expm1 also knows of a tiny y
    elif table is not None:
        g = torch.where(valid, table.to(y.dtype)[y.long()], 0.0)
    relevant = valid & (y >= threshold if threshold else y > 0)
    return Labels(g, relevant, wrong)


# ---- Sorting ---------------------------------------------------------------------------------


def _rank(preds: Tensor, documents: Documents, labels: Labels, target: Tensor, ties: int) -> Ranked:
    query, valid, bad = documents
    s = preds.reshape(-1) + 0.0  # -0.0 becomes 0.0
    missing = s.isnan()
    s = torch.where(valid & ~missing, s, -torch.inf)
    # NaN comes after -inf, padding after NaN.
    key = query * 3 + torch.where(valid, missing.long(), 2)
    order = torch.arange(len(query), device=query.device)
    if TIES[ties] in ("optimistic", "pessimistic"):
        order = _then_by(order, target.reshape(-1), descending=TIES[ties] == "optimistic")
    order = _then_by(_then_by(order, s, descending=True), key)

    position = torch.arange(len(query), device=query.device)
    query, s, key, relevant = query[order], s[order], key[order], labels.relevant[order].long()
    starts = torch.ones_like(query, dtype=torch.bool)
    if TIES[ties] == "average":
        starts[1:] = (s[1:] != s[:-1]) | (key[1:] != key[:-1])
    group = starts.long().cumsum(0) - 1
    first = torch.where(starts, position, 0).cummax(0).values if len(query) else position

    def of_group(values: Tensor) -> Tensor:
        return torch.zeros_like(values).index_add_(0, group, values)[group]

    n = of_group(torch.ones_like(group))
    before = relevant.cumsum(0) - relevant
    begin = torch.searchsorted(query, torch.arange(len(bad), device=query.device))
    return Ranked(
        query,
        rank=position - begin[query] + 1,
        place=position - first + 1,
        n=n,
        r=of_group(relevant),
        relevant_before=before[first] - before[begin[query]],
        gain=of_group(labels.gain[order]) / n,
    )


# ---- The op ----------------------------------------------------------------------------------


def fake(
    preds: Tensor,
    target: Tensor,
    offsets: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    num_relevant: Tensor | None,
    unretrieved: Tensor | None,
    unretrieved_offsets: Tensor | None,
    gain_table: Tensor | None,
    kinds: Sequence[int],
    *_: Any,
) -> tuple[Tensor, Tensor]:
    queries = preds.shape[0] if offsets is None else offsets.shape[0] - 1
    values = preds.new_empty((len(kinds), queries), dtype=value_dtype(preds.device))
    return values, preds.new_empty((2, queries), dtype=torch.bool)


def reference(
    preds: Tensor,
    target: Tensor,
    offsets: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    num_relevant: Tensor | None,
    unretrieved: Tensor | None,
    unretrieved_offsets: Tensor | None,
    gain_table: Tensor | None,
    kinds: Sequence[int],
    ks: Sequence[int],
    ties: int,
    gain: int,
    map_denominator: int,
    precision_denominator: int,
    nan: int,
    relevance_threshold: float,
) -> tuple[Tensor, Tensor]:
    documents = documents_of(preds, offsets, mask, lengths)
    queries, dtype = len(documents.bad), value_dtype(preds.device)
    if queries == 0:
        shape = (len(kinds), 0), (2, 0)
        return preds.new_empty(shape[0], dtype=dtype), preds.new_empty(shape[1], dtype=torch.bool)
    labels = labels_of(target, documents.valid, gain, gain_table, relevance_threshold)
    wrong = labels.wrong
    if NANS[nan] == "propagate":
        wrong = wrong | (documents.valid & preds.reshape(-1).isnan())

    def count(what: Tensor, query: Tensor) -> Tensor:
        return torch.zeros(queries, dtype=torch.long, device=what.device).index_add_(0, query, what.long())

    found = count(labels.relevant, documents.query)
    bad = documents.bad | (count(wrong, documents.query) > 0)
    gains, query = labels.gain, documents.query
    n_rel = found
    if unretrieved is not None:
        assert unretrieved_offsets is not None
        others = ragged(unretrieved_offsets, len(unretrieved))
        judged = labels_of(unretrieved, others.valid, gain, gain_table, relevance_threshold)
        n_rel = n_rel + count(judged.relevant, others.query)
        bad = bad | others.bad | (count(judged.wrong, others.query) > 0)
        gains, query = torch.cat([gains, judged.gain]), torch.cat([query, others.query])
    if num_relevant is not None:
        bad = bad | (num_relevant < found)
        n_rel = num_relevant

    docs = _rank(preds, documents, labels, target, ties)
    all_judged = Judged(gains, query, n_rel, count(documents.valid, documents.query), bad)
    return values_of(docs, all_judged, kinds, ks, map_denominator, precision_denominator)
