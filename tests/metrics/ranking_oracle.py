"""Ranking metrics of one query in plain Python, twice, neither by the closed forms of torchfast.

``brute_force`` averages over every order of the tied documents. ``oracle`` walks down the ranking and carries the exact
distribution of the relevant documents seen so far; it takes any number of documents, padding, NaN and every option.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

KINDS = ("ndcg", "dcg", "mrr", "map", "precision", "recall", "hit_rate", "r_precision")


def split(name: str) -> tuple[str, int]:
    kind, _, k = name.partition("@")
    return kind, int(k or 0)


def dcg(gains: Sequence[float], k: int) -> float:
    return math.fsum(g / math.log2(rank + 1) for rank, g in enumerate(gains[: k or None], 1))


# ---- One order of the documents ----------------------------------------------------------------


def of_order(name: str, y: Sequence[float], map_denominator: str = "n_rel") -> float:
    """The textbook's formula for documents in this order."""
    kind, k = split(name)
    relevant = [target > 0 for target in y]
    n_rel, top = sum(relevant), relevant[: k or None]
    if kind == "dcg":
        return dcg(y, k)
    if n_rel == 0:
        return 0.0
    if kind == "ndcg":
        return dcg(y, k) / dcg(sorted(y, reverse=True), k)
    if kind == "mrr":
        return 1 / (top.index(True) + 1) if True in top else 0.0
    if kind == "hit_rate":
        return float(True in top)
    if kind == "precision":
        return sum(top) / (k or len(y))
    if kind == "recall":
        return sum(top) / n_rel
    if kind == "r_precision":
        return sum(relevant[:n_rel]) / n_rel
    total = sum(sum(relevant[: i + 1]) / (i + 1) for i, hit in enumerate(top) if hit)
    divisor = {"n_rel": n_rel, "min(k,n_rel)": min(k or n_rel, n_rel), "hits": sum(top)}[map_denominator]
    return total / divisor if divisor else 0.0


def orders(scores: Sequence[float], y: Sequence[float]) -> list[list[float]]:
    """The targets in every order that the scores allow."""
    groups = [[t for s, t in zip(scores, y, strict=True) if s == score] for score in sorted(set(scores), reverse=True)]
    return [list(itertools.chain(*chosen)) for chosen in itertools.product(*map(itertools.permutations, groups))]


def brute_force(name: str, scores: Sequence[float], y: Sequence[float], map_denominator: str = "n_rel") -> float:
    found = [of_order(name, order, map_denominator) for order in orders(scores, y)]
    return math.fsum(found) / len(found)


# ---- The distribution over all orders -----------------------------------------------------------


def _rank_key(score: float) -> tuple[bool, float]:
    """NaN behind everything; -0.0 is 0.0."""
    return (True, 0.0) if math.isnan(score) else (False, -score)


def oracle(
    name: str,
    scores: Sequence[float],
    y: Sequence[float],
    *,
    ties: str = "average",
    gain: str | Sequence[float] = "linear",
    threshold: float | None = None,
    map_denominator: str = "n_rel",
    precision_denominator: str = "k",
    nan: str = "propagate",
    unretrieved: Sequence[float] = (),
    num_relevant: int | None = None,
) -> float | None:
    """None where the metric is undefined."""
    kind, k = split(name)
    if nan == "propagate" and any(map(math.isnan, scores)):
        return math.nan

    def gain_of(target: float) -> float:
        if gain == "linear":
            return target
        return 2**target - 1 if gain == "exp" else gain[int(target)]

    def is_relevant(target: float) -> bool:
        return target > 0 if threshold is None else target >= threshold

    keys = [_rank_key(s) for s in scores]
    documents = sorted(range(len(scores)), key=keys.__getitem__)  # stable
    if ties in ("optimistic", "pessimistic"):
        sign = -1 if ties == "optimistic" else 1
        documents.sort(key=lambda d: (keys[d], sign * y[d]))
    same = (lambda d: keys[d]) if ties == "average" else (lambda d: d)
    groups = [[y[d] for d in tied] for _, tied in itertools.groupby(documents, same)]
    gains = [gain_of(t) for t in [*y, *unretrieved]]
    n_rel = sum(map(is_relevant, [*y, *unretrieved])) if num_relevant is None else num_relevant

    if kind in ("ndcg", "dcg"):
        if not any(g > 0 for g in gains):
            return None
        expected = [math.fsum(map(gain_of, group)) / len(group) for group in groups for _ in group]
        return dcg(expected, k) / (1 if kind == "dcg" else dcg(sorted(gains, reverse=True), k))
    if n_rel == 0:
        return None
    end = n_rel if kind == "r_precision" else k or len(scores)

    # By the number of hits so far: the probability, and with it the expected sums of 1/rank of the first hit and of
    # precisions at hits.
    states = {0: (Fraction(1), Fraction(0), Fraction(0))}
    rank = 0
    for group in groups:
        if rank == end:
            break
        relevant = sum(map(is_relevant, group))
        (before,) = states  # what precedes a group is whole, so its hits are certain
        for place in range(len(group)):
            if rank == end:
                break
            rank += 1
            left = len(group) - place
            after: dict[int, tuple[Fraction, Fraction, Fraction]] = {}
            for hits, (p, first, precisions) in states.items():
                hit = Fraction(relevant - (hits - before), left)
                here = (p, first + (p / rank if hits == 0 else 0), precisions + p * Fraction(hits + 1, rank))
                for n, q, values in ((hits + 1, hit, here), (hits, 1 - hit, (p, first, precisions))):
                    if q:
                        old = after.get(n, (Fraction(0),) * 3)
                        after[n] = tuple(a + q * b for a, b in zip(old, values, strict=True))
            states = after
    hits = sum(h * p for h, (p, _, _) in states.items())
    precisions = sum(a for _, _, a in states.values())
    if kind == "mrr":
        return float(sum(first for _, first, _ in states.values()))
    if kind == "hit_rate":
        return float(sum(p for h, (p, _, _) in states.items() if h))
    if kind == "precision":
        divisor = min(k or len(scores), len(scores)) if precision_denominator == "min(k,docs)" else k or len(scores)
        return float(hits / divisor) if divisor else 0.0
    if kind in ("recall", "r_precision"):
        return float(hits / n_rel)
    if map_denominator == "hits":
        return float(sum(a / h for h, (_, _, a) in states.items() if h))
    return float(precisions / (min(k, n_rel) if k and map_denominator == "min(k,n_rel)" else n_rel))
