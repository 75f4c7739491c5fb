"""From ranks to values in PyTorch: the metrics' formulas, with their expectations over the orders of tied documents.

Without a loop over queries, and in memory of the order of the input: every sum is one over the documents, by query and
rank. A document that is not tied, and every document under a policy that orders ties, is a group of one: one set of
formulas serves all policies. A group without a relevant document and without a gain adds nothing to any sum, so such
documents may be left out: ``reference.py`` has all documents of a query, ``of_ranks.py`` those beside judged ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("ndcg", "dcg", "mrr", "map", "precision", "recall", "hit_rate", "r_precision")
NDCG, DCG, MRR, MAP, PRECISION, RECALL, HIT_RATE, R_PRECISION = range(len(KINDS))
TIES = ("average", "stable", "optimistic", "pessimistic")
GAINS = ("linear", "exp", "table")
MAP_DENOMINATORS = ("n_rel", "min(k,n_rel)", "hits")
PRECISION_DENOMINATORS = ("k", "min(k,docs)")
NANS = ("propagate", "last")


# ---- Documents by rank ------------------------------------------------------------------------


def _then_by(order: Tensor, key: Tensor, descending: bool = False) -> Tensor:
    """Sorts by ``key``, and keeps the order where keys are equal."""
    return order[key[order].argsort(stable=True, descending=descending)]


class Ranked(NamedTuple):
    """The documents by query and descending score. A group is the documents at one score, or just one document."""

    query: Tensor
    rank: Tensor  # 1, 2, ... in the query
    place: Tensor  # 1, 2, ... in the group
    n: Tensor  # documents in the group
    r: Tensor  # relevant documents in the group
    relevant_before: Tensor  # relevant documents of the query before the group
    gain: Tensor  # mean gain of the group


# ---- Expectations over the orders of tied documents ------------------------------------------


def _products(factor: Tensor, distance: Tensor) -> Tensor:
    """Product of the factors from an anchor to each element, both included.

    The anchor lies ``distance`` elements before (if negative, after). By doubling: log2 of the longest distance
    steps. Quotients of cumulative products would underflow, logarithms lose digits.
    """
    length = len(factor)
    position, towards, distance = torch.arange(length, device=factor.device), distance.sign(), distance.abs()
    reach = length
    if factor.device.type == "cpu":  # reading a value costs nothing there
        reach = int(distance.max()) + 1 if length else 0
    step = 1
    while step < reach:
        there = (position - towards * step).clamp(0, max(length - 1, 0))
        factor = torch.where(distance >= step, factor * factor[there], factor)
        step *= 2
    return factor


def _no_hit(docs: Ranked) -> Tensor:
    """P(none of the group's first i documents is relevant) = prod over j = 0 .. i-1 of (n-r-j) / (n-j)."""
    left = docs.n - docs.place + 1
    return _products((left - docs.r).clamp(min=0).to(docs.gain.dtype) / left, docs.place - 1)


def _precision_terms(docs: Ranked) -> Tensor:
    """Expected (relevant documents up to the position) / rank where the position holds a relevant one, else 0: that
    has probability r/n, and then (i-1)(r-1)/(n-1) of the i-1 documents of the group before it are relevant."""
    tied_before = (docs.place - 1) * (docs.r - 1) / (docs.n - 1).clamp(min=1).to(docs.gain.dtype)
    return docs.r / docs.n.to(docs.gain.dtype) * (docs.relevant_before + 1 + tied_before) / docs.rank


class _Queries:
    """Sums over the documents of each query."""

    def __init__(self, docs: Ranked, queries: int) -> None:
        self.docs, self.queries, self.dtype = docs, queries, docs.gain.dtype

    def sum(self, values: Tensor, where: Tensor) -> Tensor:
        values = torch.where(where, values, 0).to(self.dtype)
        return values.new_zeros(self.queries).index_add_(0, self.docs.query, values)

    def inside(self, k: int | Tensor) -> Tensor:
        """Marks the documents up to the cut-off k. 0 cuts nothing off, and a tensor has a cut-off for each query."""
        if isinstance(k, Tensor):
            return self.docs.rank <= k[self.docs.query]
        return self.docs.rank <= (k or torch.iinfo(torch.long).max)

    def hits(self, where: Tensor) -> Tensor:
        """The expected number of relevant documents."""
        return self.sum(self.docs.r / self.docs.n.to(self.dtype), where)

    def dcg(self, k: int) -> Tensor:
        return self.sum(self.docs.gain / (self.docs.rank + 1).to(self.dtype).log2(), self.inside(k))

    def first_hit(self, k: int, no_hit: Tensor) -> tuple[Tensor, Tensor]:
        """The expected reciprocal rank of the first relevant document, and the probability of one, up to k.

        Only the first group with a relevant document matters. Its i-th document is the first relevant one with
        probability P(i) = C(n-i, r-1) / C(n, r) = P(none of the i-1 before) r / (n-i+1).
        """
        docs = self.docs
        here = self.inside(k) & (docs.relevant_before == 0) & (docs.r > 0)
        none_before = torch.where(docs.place == 1, 1.0, no_hit.roll(1))
        probability = none_before * docs.r / (docs.n - docs.place + 1)
        last = here & ((docs.place == docs.n) | (docs.rank == k))
        return self.sum(probability / docs.rank, here), self.sum(1 - no_hit, last)

    def precisions(self, k: int) -> Tensor:
        """The expected sum of the precisions at the relevant documents."""
        return self.sum(_precision_terms(self.docs), self.inside(k))

    def precisions_over_hits(self, k: int) -> Tensor:
        """E[sum of the precisions / hits], both up to k.

        The hits vary in the group alone that k cuts (n documents, r relevant, after N with R): of its m = k - N
        documents up to k, h are relevant with hypergeometric probability, and given h all orders of these m are
        equally likely. So it is the expectation over h of (A + E[a | h]) / (R + h), where A is the expected sum
        before the group and E[a | h] that of m documents, h relevant, by the formula of ``_precision_terms``.

        Each h takes the place of one of the group's documents, of which there are enough. The probabilities are
        built from the most likely h outwards, so that none that counts underflows.
        """
        docs, dtype, query = self.docs, self.dtype, self.docs.query
        before, inside = docs.rank - docs.place, self.inside(k)
        cut = (before < k) & (k < before + docs.n)
        whole, hits = self.sum(_precision_terms(docs), inside & ~cut), self.hits(inside & ~cut)
        m = torch.where(cut, k - before, 1)
        low, high = (m - docs.n + docs.r).clamp(min=0), torch.minimum(m, docs.r)
        h = docs.place - 1 + low
        possible = cut & (h <= high)
        mode = torch.minimum(torch.maximum((docs.r + 1) * (m + 1) // (docs.n + 2), low), high)
        up = (docs.r - h + 1) * (m - h + 1) / (h * (docs.n - docs.r - m + h)).to(dtype)
        down = (h + 1) * (docs.n - docs.r - m + h + 1) / ((docs.r - h) * (m - h)).to(dtype)
        factor = torch.where(h > mode, up, torch.where(h < mode, down, 1.0))
        weight = _products(torch.where(possible, factor, 1.0), torch.where(possible, h - mode, 0))
        reciprocal = 1 / docs.rank.to(dtype)
        c0 = self.sum(reciprocal, inside & cut)[query]
        c1 = self.sum(reciprocal * (docs.place - 1), inside & cut)[query]
        in_group = (docs.relevant_before + 1) * c0 + c1 * (h - 1) / (m - 1).clamp(min=1)
        in_group = in_group * h / m
        ratio = (whole[query] + in_group) / (docs.relevant_before + h).clamp(min=1)
        mixed, mass = self.sum(weight * ratio, possible), self.sum(weight, possible)
        return torch.where(mass > 0, mixed / mass, whole / hits.clamp(min=1))


def _ideal(gain: Tensor, query: Tensor, queries: int) -> _Queries:
    """The documents in the best order."""
    order = _then_by(torch.arange(len(query), device=query.device), gain, descending=True)
    order = _then_by(order, query)
    query, ones = query[order], torch.ones_like(query)
    count = torch.zeros(queries, dtype=torch.long, device=query.device).index_add_(0, query, ones)
    rank = torch.arange(1, len(query) + 1, device=query.device) - (count.cumsum(0) - count)[query]
    return _Queries(Ranked(query, rank, ones, ones, ones, ones, gain[order]), queries)


# ---- The values of all metrics -----------------------------------------------------------------


class Judged(NamedTuple):
    """What the values depend on besides ranks. All but the gains have an element per query."""

    gain: Tensor  # of each judged document, retrieved or not
    query: Tensor  # the query of each gain
    n_rel: Tensor  # relevant documents, retrieved or not
    size: Tensor  # documents that were ranked
    bad: Tensor  # true where something is illegal: all values are NaN


def values_of(
    docs: Ranked,
    judged: Judged,
    kinds: Sequence[int],
    ks: Sequence[int],
    map_denominator: int,
    precision_denominator: int,
) -> tuple[Tensor, Tensor]:
    """The value of each metric by query, and where there is no relevant document and no positive gain."""
    n_rel, size, queries = judged.n_rel, judged.size, len(judged.bad)
    of_queries = _Queries(docs, queries)
    ideal = _ideal(judged.gain, judged.query, queries) if NDCG in kinds else None
    no_hit = _no_hit(docs) if {MRR, HIT_RATE} & set(kinds) else None

    def value(kind: int, k: int) -> Tensor:
        def over(numerator: Tensor, denominator: Tensor) -> Tensor:
            return torch.where(denominator > 0, numerator / denominator, 0.0)

        if kind == DCG:
            return of_queries.dcg(k)
        if ideal is not None and kind == NDCG:
            best = ideal.dcg(k)
            return torch.where(best.isfinite(), over(of_queries.dcg(k), best), torch.nan)
        if no_hit is not None and kind in (MRR, HIT_RATE):
            return of_queries.first_hit(k, no_hit)[kind == HIT_RATE]
        if kind == PRECISION:
            capped = PRECISION_DENOMINATORS[precision_denominator] == "min(k,docs)"
            divisor = size if not k else size.clamp(max=k) if capped else torch.full_like(size, k)
            return over(of_queries.hits(of_queries.inside(k)), divisor)
        if kind == RECALL:
            return over(of_queries.hits(of_queries.inside(k)), n_rel)
        if kind == R_PRECISION:
            return over(of_queries.hits(of_queries.inside(n_rel)), n_rel)
        if MAP_DENOMINATORS[map_denominator] == "hits":
            return of_queries.precisions_over_hits(k)
        at_most_k = k and MAP_DENOMINATORS[map_denominator] == "min(k,n_rel)"
        return over(of_queries.precisions(k), n_rel.clamp(max=k) if at_most_k else n_rel)

    values = torch.stack([value(kind, k) for kind, k in zip(kinds, ks, strict=True)])
    positive = torch.zeros_like(n_rel).index_add_(0, judged.query, (judged.gain > 0).long()) > 0
    return torch.where(judged.bad, torch.nan, values), torch.stack([n_rel == 0, ~positive]) & ~judged.bad
