"""One process of a catalogue that is shared out: ``retrieval_process.py RANK RUNS INIT_FILE``.

RUNS says how many items each process has in each run, as in [[3, 0]]. Prints ranks and metrics of each, as JSON.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import torch
import torch.distributed as dist

from torchfast.metrics import RetrievalMetrics, retrieval_metrics, retrieval_ranks

NAMES = ["ndcg@3", "mrr", "map"]


def data(items: int) -> dict[str, Any]:
    """Embeddings whose products are rounded, with copies of items that must tie, in other processes, too."""
    g = torch.Generator().manual_seed(items)
    catalogue = torch.randn(items, 13, generator=g)
    catalogue[items // 2 :] = catalogue[: items - items // 2].clone()
    ids = torch.rand(6, items, generator=g).argsort(1)
    relevant, exclude = ids[:, :4].contiguous(), ids[:, 4:9].contiguous()
    relevant[1], relevant[2, 1:], exclude[3] = -1, -1, -1
    return {
        "queries": torch.randn(6, 13, generator=g),
        "items": catalogue,
        "relevant": relevant,
        "exclude": exclude,
        "item_bias": torch.randint(3, (items,), generator=g).float(),
    }


def results(given: dict[str, Any], **where: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for filtered in False, True:
        ranks = retrieval_ranks(**given, filtered=filtered, **where)
        found[f"ranks {filtered}"] = [x.tolist() for x in ranks]
    for ties in "average", "stable":
        values = retrieval_metrics(**given, metrics=NAMES, ties=ties, reduction="none", **where)
        found[ties] = {name: value.tolist() for name, value in values.items()}
    values = retrieval_metrics(**given, metrics="mrr", similarity="cosine", filtered=True, **where)
    found["cosine"] = values["mrr"].item()
    missing = {**given, "queries": given["queries"].clone()}
    missing["queries"][0] = math.inf
    found["last"] = retrieval_metrics(**missing, metrics="mrr", nan="last", **where)["mrr"].item()
    streamed = RetrievalMetrics(NAMES, sync_on_compute=False)  # all processes have all queries
    streamed.update(**given, **where)
    found["streamed"] = [value.item() for value in streamed.compute().values()]
    return found


def main() -> None:
    rank, runs = int(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=len(runs[0]))
    found = []
    for counts in runs:
        given = data(sum(counts))
        first = sum(counts[:rank])
        for name in "items", "item_bias":
            given[name] = given[name][first : first + counts[rank]]
        of_run = results(given, group=dist.group.WORLD)
        assert results(given, group=dist.group.WORLD, item_offset=first) == of_run
        found.append(of_run)
        if len(counts) > 1 and min(counts) > 0:
            try:
                retrieval_ranks(**given, group=dist.group.WORLD, item_offset=0)
            except ValueError as error:
                assert "item_offset must be such that each item is in one process" in str(error)
            else:
                raise AssertionError("shards that overlap were taken")
    print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
