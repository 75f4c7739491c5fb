"""Lists of item ids, one a query, in any of the forms in which people have them; and what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from torchfast._common import INTEGERS, check, check_device, check_tensor, readable
from torchfast.metrics.ranking.group import group_by_query
from torchfast.metrics.ranking.inputs import from_jagged

if TYPE_CHECKING:
    from scipy.sparse import csr_array, csr_matrix

    ItemIds: TypeAlias = Tensor | tuple[Tensor, Tensor] | csr_array | csr_matrix
else:
    ItemIds = Any

_CHUNK = 2**19  # ids that are sorted at once


@dataclass(frozen=True)
class Lists:
    """The items ``ids[offsets[q] : offsets[q + 1]]`` are of query q."""

    ids: Tensor
    offsets: Tensor
    place: Tensor | None
    """Of ids that came as a dense tensor, filled up with -1: where each of ``ids`` was."""
    shape: torch.Size
    """That of the tensor which held the ids."""
    nested_offsets: Tensor | None

    @property
    def queries(self) -> int:
        return len(self.offsets) - 1

    @property
    def counts(self) -> Tensor:
        return self.offsets.diff()

    @property
    def query(self) -> Tensor:
        """The query of each id."""
        numbers = torch.arange(self.queries, device=self.ids.device)
        return numbers.repeat_interleave(self.counts, output_size=len(self.ids))

    def part(self, begin: int, end: int) -> Lists:
        """The lists of the queries from ``begin`` to ``end - 1``."""
        if (begin, end) == (0, self.queries):
            return self
        own = self.offsets[begin : end + 1]
        ids = self.ids[int(own[0]) : int(own[-1])]
        return Lists(ids, own - own[0], None, ids.shape, None)

    def as_given(self, values: Tensor, none: float = -1) -> Tensor:
        """Puts a value for each id into the shape that the ids came in; ``none`` where there was no id."""
        if self.nested_offsets is not None:
            return torch.nested.nested_tensor_from_jagged(values, self.nested_offsets)
        if self.place is None:
            return values.reshape(self.shape)
        filled = values.new_full((self.shape.numel(),), none)
        filled[self.place] = values
        return filled.reshape(self.shape)


def has_values(x: Tensor) -> bool:
    """False of tensors on meta and fake ones."""
    return not x.is_meta and type(x) is Tensor


# ---- Forms -------------------------------------------------------------------------------------


def lists_of(name: str, given: ItemIds, queries: int, like: Tensor) -> Lists:
    """The lists of all queries, whose embeddings are ``like``.

    Raises:
        ValueError, TypeError: the form, a dtype, a shape or a device is wrong.

    Example:
        >>> import torch
        >>> from torchfast.metrics.retrieval.ids import lists_of
        >>> lists = lists_of("relevant", torch.tensor([[7, 3], [5, -1]]), 2, torch.zeros(2, 4))
        >>> lists.ids.tolist(), lists.offsets.tolist()
        ([7, 3, 5], [0, 2, 3])
    """
    if isinstance(given, (tuple, list)):
        check(f"{name}'s length", len(given) == 2, len(given), "2: values and offsets")
        ids, offsets = map(_of_integers, (name, f"{name}'s offsets"), given)
        return _flat(name, ids, offsets, queries, like)
    if getattr(given, "format", None) is not None and hasattr(given, "indptr"):
        return _from_scipy(name, given, queries, like)
    ids = _of_integers(name, given, "a tensor of integers, values and offsets, or a scipy matrix in CSR form", True)
    check_device(name, ids, "queries", like)
    if ids.is_nested:
        values, offsets = from_jagged(name, ids)
        found = _flat(name, values, offsets, queries, like)
        return Lists(found.ids, found.offsets, None, found.shape, offsets)
    good = ids.dim() in (1, 2) and len(ids) == queries
    check(f"{name}'s shape", good, tuple(ids.shape), f"({queries},) or ({queries}, items of each query)")
    return _dense(ids)


def _of_integers(name: str, x: object, allowed: str = "a tensor of integers", jagged: bool = False) -> Tensor:
    check_tensor(name, x, INTEGERS, allowed, jagged=jagged)
    assert isinstance(x, Tensor)
    return x if x.dtype not in (torch.uint16, torch.uint32, torch.uint64) else x.long()


def _dense(ids: Tensor) -> Lists:
    width = 1 if ids.dim() == 1 else ids.shape[1]
    full = torch.arange(len(ids) + 1, device=ids.device) * width
    flat = ids.reshape(-1)
    if not has_values(flat) or not bool((flat == -1).any()):
        return Lists(flat, full, None, ids.shape, None)
    place = (flat != -1).nonzero().flatten()
    counts = (ids != -1).reshape(len(ids), -1).sum(1)
    return Lists(flat[place], torch.cat([counts.new_zeros(1), counts.cumsum(0)]), place, ids.shape, None)


def _flat(name: str, ids: Tensor, offsets: Tensor, queries: int, like: Tensor) -> Lists:
    check(f"{name}'s values' shape", ids.dim() == 1, tuple(ids.shape), "(items of all queries,)")
    check(f"{name}'s offsets' shape", offsets.shape == (queries + 1,), tuple(offsets.shape), (queries + 1,))
    for what, x in (name, ids), (f"{name}'s offsets", offsets):
        check_device(what, x, "queries", like)
    offsets = offsets.long().contiguous()
    if readable(offsets):
        ends = int(offsets[0]), int(offsets[-1])
        check(f"{name}'s first and last offset", ends == (0, len(ids)), ends, (0, len(ids)))
        check(f"{name}'s offsets", bool((offsets.diff() >= 0).all()), offsets.tolist()[:9], "nowhere decreasing")
    return Lists(ids, offsets, None, ids.shape, None)


def _from_scipy(name: str, given: Any, queries: int, like: Tensor) -> Lists:
    check(f"{name}'s format", given.format == "csr", given.format, "'csr' (scipy: .tocsr())")
    check(f"{name}'s rows", given.shape[0] == queries, given.shape[0], f"{queries}, the number of queries")
    ids, offsets = (torch.from_numpy(x).to(like.device) for x in (given.indices, given.indptr))
    ids = ids[: int(given.indptr[-1])]  # scipy may keep more than its matrix has
    return _flat(name, ids, offsets, queries, like)


# ---- What is wrong with the ids -------------------------------------------------------------------


def check_ids(name: str, lists: Lists, items: int) -> None:
    """Raises where an id is no item's."""
    if not readable(lists.ids) or not len(lists.ids):
        return
    low, high = torch.aminmax(lists.ids)
    if int(low) >= 0 and int(high) < items:
        return
    at = int(((lists.ids < 0) | (lists.ids >= items)).nonzero()[0])
    allowed = f"item ids from 0 to {items - 1}" if items else "none, as there are no items"
    raise ValueError(f"{name} must be {allowed}, got {int(lists.ids[at])} in query {_query_at(lists, at)}")


def check_distinct(
    name: str,
    lists: Lists,
    items: int,
    other_name: str = "",
    others: Lists | None = None,
    names: Tensor | None = None,
) -> None:
    """Raises where a query has an id twice in a list, or in both. The ids must be checked. Where they are but the ranks
    of ``names``, errors say those."""
    if not readable(lists.ids):
        return
    total = lists.offsets if others is None else lists.offsets + others.offsets
    begin = 0
    while begin < lists.queries:  # so many queries at once that sorting takes little memory
        end = int(torch.searchsorted(total, total[begin] + _CHUNK, right=True)) - 1
        end = min(max(end, begin + 1), lists.queries)
        keys = _ascending(name, lists.part(begin, end), items, begin, names)
        if others is not None:
            other_keys = _ascending(other_name, others.part(begin, end), items, begin)
            _check_apart(name, keys, other_name, other_keys, items, begin)
        begin = end


def _ascending(name: str, lists: Lists, items: int, first: int, names: Tensor | None = None) -> Tensor:
    """A number for each pair of query and id, in order. None may be there twice."""
    keys = lists.query * items + lists.ids
    if bool((keys.diff() > 0).all()):  # as scipy's matrices mostly are
        return keys
    _, offsets, distinct = group_by_query(keys)  # a radix sort
    if len(distinct) < len(keys):
        query, item = divmod(int(distinct[int((offsets.diff() > 1).nonzero()[0])]), items)
        item = item if names is None else int(names[item])
        raise ValueError(f"{name} must have an item once in a query, got item {item} twice in query {first + query}")
    return distinct


def _check_apart(name: str, keys: Tensor, other_name: str, others: Tensor, items: int, first: int) -> None:
    if not len(others):
        return
    at = torch.searchsorted(others, keys).clamp(max=len(others) - 1)
    both = (others[at] == keys).nonzero()
    if len(both):
        query, item = divmod(int(keys[int(both[0])]), items)
        raise ValueError(f"{other_name} must not have an item that is {name}, got item {item} in query {first + query}")


def _query_at(lists: Lists, at: int) -> int:
    return int(torch.searchsorted(lists.offsets, at, right=True)) - 1
