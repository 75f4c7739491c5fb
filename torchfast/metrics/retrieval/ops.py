"""The ops below the retrieval metrics: exact ranks over a whole catalogue, without the matrix of scores.

score(q, i) = <query_q, item_i> + item_bias_i. A rank is a number of larger scores. So the scores of the relevant items
come first, and then every tile of the product is compared with them while it is in registers::

    scores = retrieval_scores(queries, items, item_bias, ids, offsets)              one number a listed item
    larger, equal = retrieval_counts(queries, items, item_bias, scores, offsets)    among all items
    more, same = retrieval_corrections(scores, offsets, others, other_offsets)      among the scores of other items

``larger - more`` and ``equal - same`` then count among the items that are not left out. Lists are CSR: ``ids[offsets[i]
: offsets[i + 1]]`` are of query i. Counts of shards of a catalogue add up.

A score's bits depend on its two vectors and its bias alone: products are added in the order of the dimensions by
fused multiply-adds, whatever tile, thread, chunk or shard computes it, and in the listed scores too. So copies of an
item tie, and ``equal`` counts the listed item itself. Kernels for AVX2 and AVX-512 agree in these bits. The baseline
instruction set, which rounds each product, and the reference, which does so too, agree with each other, but with those
only where nothing is rounded. -0.0 equals 0.0.

NaN never helps: an item whose score is NaN counts as larger than every number. A listed NaN counts all numbers as
larger and all NaN as equal. So whoever lists a NaN as well finds in its ``equal`` how many scores are NaN, which tells
if a query's ranks mean anything (``nan="propagate"``, ``"error"``); taken from ``larger``, they come last
(``nan="last"``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchfast._register import register_metric
from torchfast.metrics.retrieval import reference


def count_ranks(
    queries: Tensor,
    items: Tensor,
    item_bias: Tensor | None,
    ids: Tensor,
    offsets: Tensor,
    excluded: Tensor | None = None,
    excluded_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """How many items that are not excluded score larger than each listed one, and how many equal, itself included.

    Args:
        queries, items: embeddings ``[n, d]`` and ``[m, d]``, float32, bfloat16, float16 or float64.
        item_bias: ``[m]``, or None.
        ids, offsets: int64, the listed items ``[K]`` of each query, which begin at ``offsets``, ``[n + 1]``.
        excluded, excluded_offsets: likewise. No id may be both listed and excluded.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together. Ids out of range score NaN.

    Example:
        >>> import torch
        >>> from torchfast.metrics.retrieval.ops import count_ranks
        >>> queries, items = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 1.0], [2.0, 5.0], [2.0, 0.0]])
        >>> count_ranks(queries, items, None, torch.tensor([1]), torch.tensor([0, 1]))
        (tensor([1]), tensor([2]))
    """
    scores = retrieval_scores(queries, items, item_bias, ids, offsets)
    larger, equal = retrieval_counts(queries, items, item_bias, scores, offsets)
    if excluded is None or excluded_offsets is None:
        return larger, equal
    others = retrieval_scores(queries, items, item_bias, excluded, excluded_offsets)
    more, same = retrieval_corrections(scores, offsets, others, excluded_offsets)
    return larger - more, equal - same


# ---- Registration: csrc/retrieval serves the CPU -----------------------------------------------


def _fake_scores(queries: Tensor, items: Tensor, item_bias: Tensor | None, ids: Tensor, *_: Any) -> tuple[Tensor]:
    return (queries.new_empty(ids.shape, dtype=reference.score_dtype(queries, items)),)


def _fake_counts(queries: Tensor, items: Tensor, item_bias: Tensor | None, scores: Tensor, *_: Any) -> Any:
    return tuple(scores.new_empty(scores.shape, dtype=torch.long) for _ in range(2))


def _fake_corrections(scores: Tensor, *_: Any) -> Any:
    return tuple(scores.new_empty(scores.shape, dtype=torch.long) for _ in range(2))


retrieval_scores = register_metric(
    "retrieval_scores",
    "(Tensor queries, Tensor items, Tensor? item_bias, Tensor ids, Tensor offsets) -> Tensor scores",
    reference=reference.scores,
    fake=_fake_scores,
)
retrieval_counts = register_metric(
    "retrieval_counts",
    "(Tensor queries, Tensor items, Tensor? item_bias, Tensor scores, Tensor offsets) -> (Tensor larger, Tensor equal)",
    reference=reference.counts,
    fake=_fake_counts,
)
retrieval_corrections = register_metric(
    "retrieval_corrections",
    "(Tensor scores, Tensor offsets, Tensor others, Tensor other_offsets) -> (Tensor larger, Tensor equal)",
    reference=reference.corrections,
    fake=_fake_corrections,
)
