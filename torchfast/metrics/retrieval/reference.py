"""Ranks over a whole catalogue in PyTorch: every device's fallback, and the truth of the others.

A score adds the products of its two vectors in the order of the dimensions, each product and each sum rounded. So its
bits depend on the two vectors alone, which no product of matrices promises, and copies of an item tie. It is slow.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torchfast.metrics.ranking.reference import ragged

_CHUNK = 2**20  # scores, or elements of embeddings, at once: memory does not grow with the catalogue
_CHUNK_ITEMS = 2**13


def score_dtype(queries: Tensor, items: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (queries.dtype, items.dtype) else torch.float32


def _dot(queries: Tensor, items: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Adds up products of ``[..., d]`` and ``[..., d]``, which broadcast, and then the bias."""
    queries, items = queries.to(dtype), items.to(dtype)
    shape = torch.broadcast_shapes(queries.shape[:-1], items.shape[:-1])
    sums = torch.zeros(shape, dtype=dtype, device=queries.device)
    for x, y in zip(queries.movedim(-1, 0).contiguous(), items.movedim(-1, 0).contiguous(), strict=True):
        sums += x * y
    return sums if bias is None else sums + bias.to(dtype)


def _ranges(n: int, step: int) -> Iterator[slice]:
    for begin in range(0, n, max(step, 1)):
        yield slice(begin, min(n, begin + max(step, 1)))


def scores(queries: Tensor, items: Tensor, item_bias: Tensor | None, ids: Tensor, offsets: Tensor) -> tuple[Tensor]:
    (n, d), m, dtype = queries.shape, len(items), score_dtype(queries, items)
    found = queries.new_full(ids.shape, torch.nan, dtype=dtype)
    if n == 0 or m == 0:
        return (found,)
    query, listed, _ = ragged(offsets, len(ids))
    listed = listed & (ids >= 0) & (ids < m)
    for part in _ranges(len(ids), _CHUNK // max(d, 1)):
        item = ids[part].clamp(0, m - 1)
        bias = None if item_bias is None else item_bias[item]
        of_part = _dot(queries[query[part]], items[item], bias, dtype)
        found[part] = torch.where(listed[part], of_part, torch.nan)
    return (found,)


# ---- Numbers of larger and of equal scores -----------------------------------------------------


def _up_to(ordered: Tensor, begin: Tensor, end: Tensor, bound: Tensor, or_equal: bool) -> Tensor:
    """How many of ``ordered[begin:end]``, which ascend with NaN last, are below the bound, or equal to it."""
    low, high = begin, end
    for _ in range(len(ordered).bit_length()):
        middle = (low + high) // 2
        there = ordered[middle.clamp(max=len(ordered) - 1)]
        below = (low < high) & ((there <= bound) if or_equal else (there < bound))
        low, high = torch.where(below, middle + 1, low), torch.where(below, high, middle)
    return low - begin


def _compare(ordered: Tensor, begin: Tensor, end: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """How many of ``ordered[begin:end]`` are larger than each score, and how many equal."""
    missing = scores.isnan()
    bound = torch.where(missing, torch.inf, scores)
    up_to, below = (_up_to(ordered, begin, end, bound, or_equal) for or_equal in (True, False))
    rest = end - begin - up_to
    return torch.where(missing, up_to, rest), torch.where(missing, rest, up_to - below)


def counts(
    queries: Tensor, items: Tensor, item_bias: Tensor | None, scores: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    (n, d), m, dtype = queries.shape, len(items), score_dtype(queries, items)
    larger, equal = (torch.zeros(scores.shape, dtype=torch.long, device=scores.device) for _ in range(2))
    if n == 0 or m == 0:
        return larger, equal
    query, listed, _ = ragged(offsets, len(scores))
    for some in _ranges(m, min(_CHUNK_ITEMS, _CHUNK // max(d, 1))):
        bias, width = None if item_bias is None else item_bias[some], some.stop - some.start
        for part in _ranges(n, _CHUNK // width):
            tile = _dot(queries[part, None], items[some], bias, dtype).sort(1).values
            begin = (query - part.start) * width
            here = listed & (query >= part.start) & (query < part.stop)
            begin = torch.where(here, begin, 0)
            more, same = _compare(tile.reshape(-1), begin, begin + width, scores)
            larger += torch.where(here, more, 0)
            equal += torch.where(here, same, 0)
    return larger, equal


def corrections(scores: Tensor, offsets: Tensor, others: Tensor, other_offsets: Tensor) -> tuple[Tensor, Tensor]:
    query, listed, _ = ragged(offsets, len(scores))
    owner, owned, _ = ragged(other_offsets, len(others))
    owner = torch.where(owned, owner, len(offsets) - 1)
    order = others.argsort(stable=True)
    order = order[owner[order].argsort(stable=True)]
    bounds = torch.searchsorted(owner[order], torch.arange(len(offsets), device=offsets.device))
    begin, end = bounds[:-1][query], bounds[1:][query]
    if len(others) == 0:
        begin = end = torch.zeros_like(query)
        ordered = scores.new_zeros(1)
    else:
        ordered = others[order]
    larger, equal = _compare(ordered, begin, end, scores)
    return torch.where(listed, larger, 0), torch.where(listed, equal, 0)
