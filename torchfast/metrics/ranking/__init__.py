r"""Ranking metrics: one op that turns scores, targets and query boundaries into the values of all queries.

Of one query, with documents d ranked by descending score, rank 1, 2, ..., target y_d, gain g_d = g(y_d), and relevant
where y_d > 0 (or y_d >= relevance_threshold); n_rel relevant documents, retrieved or not; k the cut-off, or none::

    dcg@k        = sum of g_d / log2(rank_d + 1) over rank_d <= k
    ndcg@k       = dcg@k / dcg@k of the best order of all judged documents
    mrr@k        = 1 / rank of the first relevant document, 0 if that is beyond k
    hit_rate@k   = whether there is a relevant document up to k
    precision@k  = (relevant documents up to k) / k (or / min(k, documents));  over all documents without a cut-off
    recall@k     = (relevant documents up to k) / n_rel
    r_precision  = (relevant documents up to n_rel) / n_rel
    map@k        = sum of precision@rank_d over the relevant documents d up to k, / n_rel (or / min(k, n_rel), / hits)

Documents of one score are tied. With ties="average" a metric is its expectation over all orders of tied documents, in
closed form. For a group of n tied documents, r of them relevant, after N others with R relevant, its i-th position
(rank N + i) contributes::

    dcg          mean gain of the group / log2(N + i + 1)
    hits         r / n
    map          r/n (R + 1 + (i-1)(r-1)/(n-1)) / (N + i)
    mrr          if R = 0: C(n-i, r-1) / C(n, r) / (N + i)
    hit_rate     if R = 0: C(n-i, r-1) / C(n, r)

and a group that the cut-off k splits contributes its first m = k - N positions. Only map over hits is a ratio of two
random numbers: there the number h of hits among the m is hypergeometric, and the expectation is that over h of
(expected sum before + sum over i = 1 .. m of h/m (R + 1 + (i-1)(h-1)/(m-1)) / (N + i)) / (R + h), 0 where R + h = 0.
The other policies order tied documents: "stable" by position, "optimistic" by descending, "pessimistic" by ascending
target. (McSherry & Najork, Computing information retrieval performance measures efficiently in the presence of tied
scores, ECIR 2008.)
"""

from typing import TYPE_CHECKING, Any

from torchfast.metrics.ranking.functional import (
    hit_rate,
    mean_average_precision,
    mrr,
    ndcg,
    precision,
    r_precision,
    ranking_metrics,
    recall,
)

if TYPE_CHECKING:
    from torchfast.metrics.ranking.modules import RankingMetrics

__all__ = [
    "RankingMetrics",
    "hit_rate",
    "mean_average_precision",
    "mrr",
    "ndcg",
    "precision",
    "r_precision",
    "ranking_metrics",
    "recall",
]


def __getattr__(name: str) -> Any:
    """torchmetrics, which takes a second to import, is not imported before it is needed."""
    if name != "RankingMetrics":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torchfast.metrics.ranking.modules import RankingMetrics

    return RankingMetrics
