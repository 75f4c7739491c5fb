"""Queries given by the number of each document's query, in any order."""

from __future__ import annotations

import torch
from torch import Tensor

from torchfast._register import register_metric


def reference(indexes: Tensor, skip_sorted: bool) -> tuple[Tensor, Tensor, Tensor]:
    ordered, order = indexes.sort(stable=True)
    ids, counts = ordered.unique_consecutive(return_counts=True)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    if skip_sorted and torch.equal(ordered, indexes):
        order = order[:0]
    return order, offsets, ids


def fake(indexes: Tensor, skip_sorted: bool) -> tuple[Tensor, Tensor, Tensor]:
    context = torch.library.get_ctx()
    queries = context.new_dynamic_size()
    sizes = context.new_dynamic_size() if skip_sorted else len(indexes), queries + 1, queries
    return tuple(indexes.new_empty(size, dtype=torch.long) for size in sizes)  # type: ignore[return-value]


def group_by_query(indexes: Tensor, *, skip_sorted: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The order that sorts documents by the number of their query, the offsets of the queries, and their numbers.

    The order is stable. With ``skip_sorted`` it has no elements where the documents are sorted already.

    Example:
        >>> import torch
        >>> from torchfast.metrics.ranking.group import group_by_query
        >>> order, offsets, ids = group_by_query(torch.tensor([7, -2, 7]))
        >>> order.tolist(), offsets.tolist(), ids.tolist()
        ([1, 0, 2], [0, 1, 3], [-2, 7])
    """
    try:
        order, offsets, ids = _op(indexes, skip_sorted)
    except RuntimeError as error:
        if type(indexes) is Tensor and not indexes.is_meta:
            raise
        raise NotImplementedError(
            "indexes must have values, which say how many queries there are: meta and fake tensors have none; "
            "offsets, lengths or preds of shape (queries, documents) say it by their shapes"
        ) from error
    return order, offsets, ids


_op = register_metric(
    "group_by_query",
    "(Tensor indexes, bool skip_sorted) -> (Tensor order, Tensor offsets, Tensor ids)",
    reference=reference,
    fake=fake,
)
