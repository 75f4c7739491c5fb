r"""Finds the other half of a digit among all halves: trained over all items, and evaluated over all items.

    python examples/match_halves.py            # about 20 seconds on two cores
    python examples/match_halves.py --quick    # a few

Of scikit-learn's digits, the upper half is a query, and the items are the lower halves of all images; one of them is
relevant. Two towers embed queries and items. Training takes every item as a class, by `linear_cross_entropy`, which
never holds the matrix of scores; validation ranks the item among all of them, by `RetrievalMetrics`, which never holds
it either: no negatives are sampled, and no list is cut off. The learning rate follows the exact MRR of unseen images.

At the end the same numbers come from the matrix of scores, and from lists of the first 100, which lose what is behind.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau

import torchfast
from torchfast.metrics import RetrievalMetrics, ranking_metrics, retrieval_metrics, retrieval_ranks, retrieved_metrics

METRICS = ("mrr", "ndcg", "hit_rate@1", "hit_rate@10", "hit_rate@100")


def halves() -> tuple[Tensor, Tensor]:
    """The upper and the lower 4 rows of each image."""
    pixels, _ = load_digits(return_X_y=True)
    upper, lower = torch.from_numpy(pixels / 16).float().split(32, dim=1)
    return upper, lower


def tower() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 64))


@torch.no_grad()
def validate(query_tower: nn.Module, items: Tensor, upper: Tensor, ids: Tensor, seen: Tensor) -> dict[str, Tensor]:
    """Ranks the lower half of each image among those that were not trained on, batch by batch."""
    metrics = RetrievalMetrics(METRICS)
    for batch in ids.split(100):
        metrics.update(query_tower(upper[batch]), items, batch, exclude=seen.expand(len(batch), -1))
    return metrics.compute()


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few epochs")
    epochs = 5 if parser.parse_args(argv).quick else 25
    torch.manual_seed(0)
    upper, lower = halves()
    seen, unseen = torch.randperm(len(upper)).split([1397, 400])
    of_upper, of_lower = towers = nn.ModuleList([tower(), tower()])
    optimizer = AdamW(towers.parameters(), lr=2e-3)
    scheduler = ReduceLROnPlateau(optimizer, mode="max", patience=3)
    console = Console()

    found = {"untrained": validate(of_upper, of_lower(lower).detach(), upper, unseen, seen)}
    for epoch in range(epochs):
        for batch in seen[torch.randperm(len(seen))].split(64):
            optimizer.zero_grad()
            queries, items = of_upper(upper[batch]), of_lower(lower)
            torchfast.linear_cross_entropy(queries, items, batch).backward()  # an item's id is its class
            optimizer.step()
        items = of_lower(lower).detach()
        found["trained"] = validate(of_upper, items, upper, unseen, seen)
        scheduler.step(found["trained"]["mrr"])
        if epoch % 5 == 4:
            console.print(f"epoch {epoch + 1}: MRR of unseen images {found['trained']['mrr']:.4f}")

    queries = of_upper(upper[unseen]).detach()
    exclude = seen.expand(len(unseen), -1)
    # The same from the matrix, which a real catalogue has no memory for. Embeddings of real numbers do not tie.
    target = torch.zeros(len(unseen), len(items)).scatter_(1, unseen[:, None], 1)
    mask = torch.ones_like(target, dtype=torch.bool).scatter_(1, exclude, False)
    scores = queries @ items.T
    found["from the matrix"] = ranking_metrics(scores, target, METRICS, mask=mask)
    # And from lists of the first 100, in which an item that is further behind counts as missing.
    lists = scores.masked_fill(~mask, -torch.inf).topk(100).indices
    cut = retrieved_metrics(lists, unseen, ["mrr@100", "ndcg@100", *METRICS[2:]])
    found["lists of 100"] = dict(zip(METRICS, cut.values(), strict=True))
    # The items that were trained on are harder to tell apart from the right one: each of them was an answer.
    found["among all items"] = retrieval_metrics(queries, items, unseen, METRICS)

    table = Table(title=f"The lower half of {len(unseen)} unseen digits")
    table.add_column("")
    for name in METRICS:
        table.add_column(name, justify="right")
    for name, of in found.items():
        table.add_row(name, *(f"{of[metric]:.3f}" for metric in METRICS))
    console.print(table)
    larger, _, candidates = retrieval_ranks(queries, items, unseen, exclude=exclude)
    console.print(f"Median rank {larger.double().median() + 1:.0f} of {candidates[0]} candidates.")
    return {name: {metric: of[metric].item() for metric in METRICS} for name, of in found.items()}


if __name__ == "__main__":
    main()
