"""Exact ranks of relevant items over a whole catalogue, from embeddings: counts, in parts of bounded memory.

A rank is a number of larger scores, so all that is done to candidates is arithmetic on counts. ``retrieval_counts``
counts over all items; excluded items, and with ``filtered`` the other relevant ones, are subtracted; shards of the
catalogue are added up. A NaN beside each query's scores (unless no score can be NaN) counts its NaN scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from torchfast._common import check, check_device, check_factor, check_logits, readable, widened
from torchfast.metrics._common import check_choice, check_no_gradient
from torchfast.metrics.retrieval.ids import ItemIds, Lists, check_distinct, check_ids, has_values, lists_of
from torchfast.metrics.retrieval.ops import retrieval_corrections, retrieval_counts, retrieval_scores
from torchfast.metrics.retrieval.reference import score_dtype
from torchfast.metrics.retrieval.shards import Shard

SIMILARITIES = ("dot", "cosine")
_IDS_AT_ONCE = 2**19  # relevant and excluded ids whose scores are held at once
_ELEMENTS_AT_ONCE = 2**20  # of unit vectors, which cosine similarities need
_PRODUCTS_SHOWN = 2**34  # products after which a bar moves


class RetrievalRanks(NamedTuple):
    """Numbers for each relevant item, int64. Its rank is ``larger + 1`` if nothing is tied with it."""

    larger: Tensor
    """Candidates with a larger score."""
    equal: Tensor
    """Candidates with the same score, the item itself among them."""
    candidates: Tensor
    """All candidates."""


class Found(NamedTuple):
    """Ranks as lists, and how many candidates of each relevant item have a score of NaN."""

    relevant: Lists
    ranks: RetrievalRanks
    missing: Tensor
    candidates: Tensor
    """Those of each query, of which it may have no relevant one."""
    missing_of_query: Tensor


def retrieval_ranks(
    queries: Tensor,
    items: Tensor,
    relevant: ItemIds,
    *,
    exclude: ItemIds | None = None,
    item_bias: Tensor | None = None,
    similarity: str = "dot",
    filtered: bool = False,
    group: dist.ProcessGroup | None = None,
    item_offset: int | None = None,
    progress: bool = False,
) -> RetrievalRanks:
    """Ranks relevant items among all items by the products of embeddings, without the matrix of scores.

    Arguments, memory and errors are those of :func:`torchfast.metrics.retrieval_metrics`.

    Returns:
        For each relevant item ``larger``, how many candidates have a larger score; ``equal``, how many have the same
        score, itself included; ``candidates``, how many there are: int64, in the shape of ``relevant`` (of a CSR
        matrix: of its ``indices``; where ``relevant`` is -1, so are they). So ``larger + 1`` is the best rank, and
        ``larger + equal`` the worst. A score of NaN is behind all numbers, and tied with other NaN.

    Example:
        >>> import torch
        >>> from torchfast.metrics import retrieval_ranks
        >>> users, items = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 1.0], [2.0, 5.0], [2.0, 0.0]])
        >>> larger, equal, candidates = retrieval_ranks(users, items, torch.tensor([1, 2]))
        >>> larger, equal, candidates
        (tensor([1, 2]), tensor([2, 1]), tensor([3, 3]))
    """
    found = find_ranks(
        queries,
        items,
        relevant,
        exclude=exclude,
        item_bias=item_bias,
        similarity=similarity,
        filtered=filtered,
        group=group,
        item_offset=item_offset,
        progress=progress,
    )
    return RetrievalRanks(*map(found.relevant.as_given, found.ranks))


def find_ranks(
    queries: Tensor,
    items: Tensor,
    relevant: ItemIds,
    *,
    exclude: ItemIds | None = None,
    item_bias: Tensor | None = None,
    similarity: str = "dot",
    filtered: bool = False,
    group: dist.ProcessGroup | None = None,
    item_offset: int | None = None,
    progress: bool = False,
    stable: bool = False,
) -> Found:
    """The arguments are those of ``retrieval_ranks``; with ``stable`` a tie is broken by the smaller id."""
    check_embeddings(queries, items, item_bias)
    check_choice("similarity", similarity, SIMILARITIES)
    queries, items = queries.detach(), items.detach()
    bias = None if item_bias is None else widened(item_bias.detach()).to(score_dtype(queries, items))
    shard = Shard.of(items, group, item_offset)
    wanted = lists_of("relevant", relevant, len(queries), queries)
    check_ids("relevant", wanted, shard.total)
    left_out = None
    if exclude is not None:
        left_out = lists_of("exclude", exclude, len(queries), queries)
        check_ids("exclude", left_out, shard.total)
    check_distinct("relevant", wanted, shard.total, "exclude", left_out)
    scorer = Scorer(items, bias, similarity == "cosine", shard)
    counter = Counter(scorer, filtered, stable, not scorer.is_bounded(queries))
    parts = list(_parts(wanted, left_out, items, progress))
    total = wanted.counts.new_full((len(queries),), shard.total)
    candidates = total if left_out is None else total - left_out.counts
    found = []
    for begin, end in _shown(parts, len(queries)) if progress else parts:
        others = None if left_out is None else left_out.part(begin, end)
        found.append(counter.count(scorer.unit(queries[begin:end]), wanted.part(begin, end), others))
    larger, equal, missing, missing_of_query = (torch.cat(x) for x in zip(*found, strict=True))
    of_items = candidates[wanted.query]
    if filtered:
        of_items = of_items - wanted.counts[wanted.query] + 1
    return Found(wanted, RetrievalRanks(larger, equal, of_items), missing, candidates, missing_of_query)


def check_embeddings(queries: Tensor, items: Tensor, item_bias: Tensor | None) -> None:
    for name, x in ("queries", queries), ("items", items):
        check_logits(name, x)
        check_no_gradient("retrieval metrics", x)
        check(f"{name}' shape", x.dim() == 2, tuple(x.shape), f"({name}, dimensions)")
    check("items' dimensions", items.shape[1] == queries.shape[1], items.shape[1], f"{queries.shape[1]}, as of queries")
    if items.dtype != queries.dtype:
        raise TypeError(f"items must have queries' dtype {queries.dtype}, got {items.dtype}")
    check_device("items", items, "queries", queries)
    if item_bias is not None:
        check_factor("item_bias", item_bias)
        check("item_bias' shape", item_bias.shape == items.shape[:1], tuple(item_bias.shape), tuple(items.shape[:1]))
        check_device("item_bias", item_bias, "queries", queries)


# ---- Parts of the queries ----------------------------------------------------------------------


def _parts(relevant: Lists, exclude: Lists | None, items: Tensor, progress: bool) -> Iterator[tuple[int, int]]:
    """Ranges of queries that have few ids; if a bar is shown, short ones."""
    n, most = relevant.queries, relevant.queries
    if progress:
        most = max(64, _PRODUCTS_SHOWN // max(items.numel(), 1))
    ids = relevant.offsets if exclude is None else relevant.offsets + exclude.offsets
    if not has_values(ids) or (most >= n and relevant.ids.numel() + _size(exclude) <= _IDS_AT_ONCE):
        yield 0, n
        return
    begin = 0
    while begin < n:
        end = int(torch.searchsorted(ids, ids[begin] + _IDS_AT_ONCE, right=True)) - 1
        end = min(max(end, begin + 1), begin + most, n)
        yield begin, end
        begin = end


def _size(lists: Lists | None) -> int:
    return 0 if lists is None else lists.ids.numel()


def _shown(parts: list[tuple[int, int]], queries: int) -> Iterator[tuple[int, int]]:
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("ranking", total=queries)
        for begin, end in parts:
            yield begin, end
            bar.advance(task, end - begin)


# ---- Scores of one shard -----------------------------------------------------------------------


@dataclass(frozen=True)
class Scorer:
    """The items of a process, which it scores and counts. Cosines are products of unit vectors, made in chunks; the
    bits of a unit vector depend on the vector alone, like those of a score."""

    items: Tensor
    bias: Tensor | None
    cosine: bool
    shard: Shard

    def unit(self, x: Tensor) -> Tensor:
        """The rows in the form that is multiplied: as they are, or of length 1 (0 remains 0)."""
        if not self.cosine:
            return x
        wide = x.double()
        rows = torch.arange(len(x) + 1, device=x.device)
        norm = retrieval_scores(wide, wide, None, rows[:-1], rows).sqrt()[:, None]
        return (wide / torch.where(norm == 0, 1.0, norm)).to(score_dtype(x, x))

    def is_bounded(self, queries: Tensor) -> bool:
        """True if no score can be NaN: all numbers are finite, and no sum of products overflows."""
        if self.shard.group is not None or not readable(queries) or not readable(self.items):
            return False
        bound = 1.0
        for x in (queries, self.items):
            low, high = map(float, torch.aminmax(x)) if x.numel() else (0.0, 0.0)
            bound *= max(-low, high) if low == low and high == high else torch.inf
        bound *= queries.shape[1]
        if self.bias is not None and self.bias.numel():
            bound += float(self.bias.abs().max())
        return bound < torch.finfo(score_dtype(queries, self.items)).max / 2  # False for NaN

    def scores(self, queries: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
        """Scores of this process's own items, by their numbers here."""
        if not self.cosine:
            return retrieval_scores(queries, self.items, self.bias, ids.long(), offsets)
        found = []
        step = max(_ELEMENTS_AT_ONCE // max(self.items.shape[1], 1), 1)
        for begin in range(0, max(len(ids), 1), step):
            some = ids[begin : begin + step].long()
            rows, bounds = torch.arange(len(some), device=ids.device), (offsets - begin).clamp(0, len(some))
            bias = None if self.bias is None else self.bias[some]
            found.append(retrieval_scores(queries, self.unit(self.items[some]), bias, rows, bounds))
        return torch.cat(found)

    def counts(
        self, queries: Tensor, scores: Tensor, offsets: Tensor, some: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Larger and equal scores among this process's items."""
        items, bias = self.items[some], None if self.bias is None else self.bias[some]
        if not self.cosine:
            return retrieval_counts(queries, items, bias, scores, offsets)
        step = max(_ELEMENTS_AT_ONCE // max(items.shape[1], 1), 1)
        larger, equal = (torch.zeros(scores.shape, dtype=torch.long, device=scores.device) for _ in range(2))
        for begin in range(0, len(items), step):
            part = slice(begin, begin + step)
            more, same = retrieval_counts(
                queries, self.unit(items[part]), None if bias is None else bias[part], scores, offsets
            )
            larger, equal = larger + more, equal + same
        return larger, equal


# ---- Counts of one part ------------------------------------------------------------------------


@dataclass(frozen=True)
class Counter:
    """Counts the candidates of some queries."""

    scorer: Scorer
    filtered: bool
    stable: bool
    look_for_nan: bool

    def count(self, queries: Tensor, relevant: Lists, exclude: Lists | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Larger, equal and missing scores of each relevant item, and missing scores of each query."""
        shard, query, n = self.scorer.shard, relevant.query, relevant.queries
        mine, at = shard.own(relevant)
        scores = shard.summed_at(self.scorer.scores(queries, mine.ids, mine.offsets), at, len(relevant.ids))
        listed, offsets = scores, relevant.offsets
        place = torch.arange(len(scores), device=scores.device)
        if self.look_for_nan:  # each query has a NaN behind its scores
            place = place + query
            listed = scores.new_full((len(scores) + n,), torch.nan)
            listed[place] = scores
            offsets = offsets + torch.arange(n + 1, device=scores.device)
        larger, equal = self.scorer.counts(queries, listed, offsets)
        hidden = None
        if exclude is not None:
            own, _ = shard.own(exclude)
            hidden = own, self.scorer.scores(queries, own.ids, own.offsets)
            more, same = retrieval_corrections(listed, offsets, hidden[1], own.offsets)
            larger, equal = larger - more, equal - same
        larger, equal = shard.summed(torch.stack([larger, equal]))
        missing = torch.zeros(n, dtype=torch.long, device=scores.device)
        if self.filtered:
            more, same = retrieval_corrections(listed, offsets, scores, relevant.offsets)
            larger, equal = larger - more, equal - same
            equal[place] += 1  # the item itself
        if self.look_for_nan:
            missing = equal[offsets[1:] - 1]
        larger, equal, is_nan = larger[place], equal[place], scores.isnan()
        # The ops count NaN as larger than any number.
        larger = torch.where(is_nan, larger, larger - missing[query])
        if self.stable and has_values(scores):
            from torchfast.metrics.retrieval.stable import earlier

            before = earlier(self.scorer, queries, relevant, scores, equal > 1, hidden, self.filtered)
            larger, equal = larger + before, torch.ones_like(equal)
        of_items = missing[query]
        return larger, equal, of_items + is_nan if self.filtered else of_items, missing
