"""A catalogue that is shared out: each process has some of the items, and all have the same queries and lists.

A score is computed by the process that has its item, and a sum of it with zeros brings it to all. Counts add up. Both
sums are exact, so that the result has the bits of one process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from torchfast._common import check
from torchfast.metrics.retrieval.ids import Lists


@dataclass(frozen=True)
class Shard:
    """The items ``first`` to ``first + count - 1`` of ``total`` are this process's."""

    first: int
    count: int
    total: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, items: Tensor, group: dist.ProcessGroup | None, item_offset: int | None) -> Shard:
        """Finds where this process's items are among all: at ``item_offset``, or behind those of the ranks before."""
        if group is None:
            check("item_offset", item_offset is None, item_offset, "left out without a group")
            return cls(0, len(items), len(items), None)
        rank, processes = dist.get_rank(group), dist.get_world_size(group)
        check("group", rank >= 0, "a group without this process", "a process group that this process belongs to")
        told = torch.zeros(2, processes, dtype=torch.long, device=items.device)
        told[0, rank], told[1, rank] = len(items), -1 if item_offset is None else item_offset
        dist.all_reduce(told, group=group)
        counts, firsts = told.tolist()
        if all(first == -1 for first in firsts):
            firsts = [sum(counts[:r]) for r in range(processes)]
        end = 0
        for first, count in sorted(zip(firsts, counts, strict=True)):
            if count:
                given = f"{firsts} of {counts} items"
                check("item_offset", first == end, given, "such that each item is in one process of the group")
                end += count
        return cls(firsts[rank], counts[rank], sum(counts), group)

    def own(self, lists: Lists) -> tuple[Lists, Tensor | None]:
        """The ids of this process's items, from 0 on, and where they are in the lists; None if that is everywhere."""
        if self.group is None:
            return lists, None
        ids = lists.ids.long() - self.first
        mine = (ids >= 0) & (ids < self.count)
        at = mine.nonzero().flatten()
        before = torch.cat([at.new_zeros(1), mine.long().cumsum(0)])
        return Lists(ids[at], before[lists.offsets], None, at.shape, None), at

    def summed_at(self, values: Tensor, at: Tensor | None, count: int) -> Tensor:
        """Brings together values that each process has at its own places."""
        if at is None:
            return values
        return self.summed(values.new_zeros(count).index_copy_(0, at, values))

    def summed(self, values: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values
