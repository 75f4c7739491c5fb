"""The ops below the retrieval metrics: exact ranks over a whole catalogue, without the matrix of scores.

score(q, i) = <query_q, item_i> + item_bias_i. A rank is a number of larger scores. So the scores of the relevant items
come first, and then every tile of the product is compared with them while it is in the cache next to the core::

    scores = retrieval_scores(queries, items, item_bias, ids, offsets)              one number a listed item
    larger, equal = retrieval_counts(queries, items, item_bias, scores, offsets)    among all items
    more, same = retrieval_corrections(scores, offsets, others, other_offsets)      among scores of some of the items

``larger - more`` and ``equal - same`` then count among the items that are not left out. Lists are CSR: ``ids[offsets[i]
: offsets[i + 1]]`` are of query i. Counts of shards of a catalogue add up.

A score's bits depend on its two vectors and its bias alone: products are added in the order of the dimensions by
fused multiply-adds, whatever tile, thread, chunk or shard computes it, and in the listed scores too. So copies of an
item tie, and ``equal`` counts the listed item itself. Kernels for AVX2 and AVX-512 agree in these bits. Those for other
x86 processors and the reference round each product as well: they agree with each other, and with those for AVX where
nothing is rounded. -0.0 equals 0.0. Ids out of range score NaN.

On GPUs Triton's kernels add products up in float32 by ``tl.dot``, in an order that is the hardware's and the same in
every tile (``triton_kernels.py`` says what that assumes); so there the bits depend on the dtype too, and on
``torch.set_float32_matmul_precision``, which allows TF32 for float32. float64 is the reference's.

NaN never helps: an item whose score is NaN counts as larger than every number. A listed NaN counts all numbers as
larger and all NaN as equal. So whoever lists a NaN as well finds in its ``equal`` how many scores are NaN, which tells
if a query's ranks mean anything (``nan="propagate"``, ``"error"``); taken from ``larger``, they come last
(``nan="last"``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchfast import _triton
from torchfast._register import register_metric
from torchfast.metrics.retrieval import reference

# ---- Registration: csrc/retrieval serves the CPU, Triton GPUs ------------------------------------


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
for _op in retrieval_scores, retrieval_counts:
    _triton.register("torchfast.metrics.retrieval.triton_launch", _op)
