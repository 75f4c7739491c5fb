"""One process of a distributed run of RankingMetrics: ``ranking_process.py RANK RUNS INIT_FILE``.

RUNS says how many updates each process has in each run, as in [[3, 0]]. Prints what ``compute`` gives in each, as JSON.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from torchmetrics import MetricCollection

from torchfast.metrics import RankingMetrics


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, targets and weights; the number of queries depends on the batch."""
    g = torch.Generator().manual_seed(number)
    queries = 1 + 3 * number
    preds, target = torch.randn(queries, 9, generator=g), torch.randint(3, (queries, 9), generator=g)
    target[::4] = 0
    return preds, target, torch.rand(queries, generator=g)


NAMES = ["ndcg@3", "mrr", "map"]


def metrics() -> MetricCollection:
    return MetricCollection(
        {
            "mean": RankingMetrics(NAMES),
            "skip": RankingMetrics(NAMES, empty="skip"),
            "each": RankingMetrics(NAMES, per_query=True),
        }
    )


def run(rank: int, counts: list[int]) -> dict[str, list[float]]:
    collection, weighted = metrics(), RankingMetrics(NAMES)
    for number in range(sum(counts[:rank]), sum(counts[: rank + 1])):
        preds, target, weight = batch(number)
        collection.update(preds, target)
        weighted.update(preds, target, query_weight=weight)
    found = dict(collection.compute())
    found |= {f"weighted_{name}": value for name, value in weighted.compute().items()}
    again = collection.compute()
    assert all(
        torch.equal(
            found[name],
            again[name],
        )
        or found[name].isnan().any()
        for name in again
    )
    return {name: value.tolist() for name, value in found.items()}


def main() -> None:
    rank, runs = int(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=len(runs[0]))
    print(json.dumps([run(rank, counts) for counts in runs]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
