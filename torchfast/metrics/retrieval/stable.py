"""Ties broken by the smaller id: how many tied candidates come before a relevant item.

Few items are tied in real embeddings, so nothing is done for the others. For the tied ones the items are counted once
more, block by block: all of a block before the item's own, and of its own the scores of the items before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchfast.metrics.retrieval.ids import Lists

if TYPE_CHECKING:
    from torchfast.metrics.retrieval.ranks import Scorer

_BLOCK = 4096
_PAIRS_AT_ONCE = 2**19


def earlier(
    scorer: Scorer,
    queries: Tensor,
    relevant: Lists,
    scores: Tensor,
    tied: Tensor,
    hidden: tuple[Lists, Tensor] | None,
    filtered: bool,
) -> Tensor:
    """Candidates of the same score and a smaller id, for each relevant item that is tied; 0 for the others."""
    found = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
    at = tied.nonzero().flatten()
    if not len(at):
        return found
    ids, query, score = relevant.ids.long()[at], relevant.query[at], scores[at]
    shard = scorer.shard
    before = torch.zeros_like(at)
    for begin in range(0, shard.count, _BLOCK):
        end = min(begin + _BLOCK, shard.count)
        behind = (ids >= shard.first + end).nonzero().flatten()
        counts = torch.bincount(query[behind], minlength=len(queries))
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        before[behind] += scorer.counts(queries, score[behind], offsets, slice(begin, end))[1]
        within = ((ids > shard.first + begin) & (ids < shard.first + end)).nonzero().flatten()
        for some in within.split(_PAIRS_AT_ONCE // _BLOCK):
            lengths = ids[some] - shard.first - begin
            offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
            owner = torch.arange(len(some), device=at.device).repeat_interleave(lengths)
            own = begin + torch.arange(len(owner), device=at.device) - offsets[owner]
            same = _same(scorer.scores(queries[query[some]], own, offsets), score[some][owner])
            before[some] += torch.zeros_like(lengths).index_add_(0, owner, same)
    if hidden is not None:
        lists, of_hidden = hidden
        before -= _among(lists.ids.long() + shard.first, of_hidden, lists.offsets, ids, query, score)
    before = shard.summed(before)
    if filtered:
        before -= _among(relevant.ids.long(), scores, relevant.offsets, ids, query, score)
    return found.index_copy_(0, at, before)


def _same(a: Tensor, b: Tensor) -> Tensor:
    return ((a == b) | (a.isnan() & b.isnan())).long()


def _among(others: Tensor, of_others: Tensor, offsets: Tensor, ids: Tensor, query: Tensor, score: Tensor) -> Tensor:
    """How many of a query's other items have the same score as one, and a smaller id."""
    found, lengths = torch.zeros_like(ids), offsets.diff()[query]
    step = max(_PAIRS_AT_ONCE // max(int(lengths.max()), 1), 1)
    for some in torch.arange(len(ids), device=ids.device).split(step):
        ends = lengths[some].cumsum(0)
        owner = some.repeat_interleave(lengths[some])
        first = offsets[query[some]] - ends + lengths[some]
        pair = torch.arange(len(owner), device=ids.device) + first.repeat_interleave(lengths[some])
        same = _same(of_others[pair], score[owner]) * (others[pair] < ids[owner])
        found.index_add_(0, owner, same)
    return found
