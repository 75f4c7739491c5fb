"""One process of a distributed run of the metrics: ``classification_process.py RANK RUNS INIT_FILE``.

RUNS says how many updates each process has in each run, as in [[3, 0]]. Prints what ``compute`` gives in each, as JSON.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torchmetrics import Metric

from torchfast.metrics import ClassificationMetrics, RegressionMetrics

CLASSES = 3
DECISIONS = ["accuracy", "accuracy@2", "f1@macro", "confusion_matrix"]
AREAS = ["roc_auc", "average_precision", "roc_auc@micro", "average_precision@weighted"]
LABELS = ["accuracy", "f1@macro", "confusion_matrix", *AREAS]
BINARY = ["accuracy", "f1", "roc_auc", "average_precision"]
VALUES = ["mae", "rmse", "r2"]


def batch(number: int) -> dict[str, tuple[torch.Tensor, ...]]:
    """By task: predictions, targets, weights; how many depends on the batch."""
    g = torch.Generator().manual_seed(number)
    n = 5 + 4 * number
    logits, weight = torch.randn(n, CLASSES, generator=g), torch.randint(3, (n,), generator=g) / 2
    ids, labels = torch.randint(CLASSES, (n,), generator=g), torch.randint(2, (n, CLASSES), generator=g)
    ids[: CLASSES + 1] = torch.tensor([0, 1, 2, -100])
    labels[:2] = torch.tensor([[0], [1]])
    y = 1e6 + torch.randn(n, 2, generator=g, dtype=torch.float64)
    noisy = y + torch.randn(n, 2, generator=g, dtype=torch.float64)
    return {
        "multiclass": (logits, ids, weight),
        "multilabel": (logits, labels, weight),
        "binary": (logits[:, 0].sigmoid(), labels[:, 0], weight),
        "regression": (noisy, y, weight),
    }


OPTIONS = {
    "multiclass": {"num_classes": CLASSES, "ignore_index": -100, "from_logits": True},
    "multilabel": {"num_classes": CLASSES, "task": "multilabel", "from_logits": True},
    "binary": {},
}
NAMES = {"multiclass": DECISIONS + AREAS, "multilabel": LABELS, "binary": BINARY}


def metrics(weighted: bool) -> dict[tuple[str, str], Metric]:
    """By task and name: exact, and the areas in bins."""
    made: dict[tuple[str, str], Metric] = {("regression", "exact"): RegressionMetrics(VALUES, num_outputs=2)}
    for task, options in OPTIONS.items():
        made[task, "exact"] = ClassificationMetrics(NAMES[task], weighted=weighted, **options)
        made[task, "binned"] = ClassificationMetrics(["roc_auc"], weighted=weighted, bins=8, **options)
    return made


def run(rank: int, counts: list[int]) -> dict[str, Any]:
    found = {}
    for weighted in False, True:
        made = metrics(weighted)
        for number in range(sum(counts[:rank]), sum(counts[: rank + 1])):
            for (task, _), metric in made.items():
                preds, target, weight = batch(number)[task]
                metric.update(preds, target, **({"sample_weight": weight} if weighted else {}))
        for (task, part), metric in made.items():
            computed = metric.compute()
            found |= {f"{task} {part} {name} {weighted}": v.tolist() for name, v in computed.items()}
            metric.sync()  # by hand, what compute has done and undone
            assert str(metric.compute()) == str(computed)
            metric.unsync()
    return found


def main() -> None:
    warnings.simplefilter("ignore")  # of computing before the first update
    rank, runs = int(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=len(runs[0]))
    print(json.dumps([run(rank, counts) for counts in runs]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
