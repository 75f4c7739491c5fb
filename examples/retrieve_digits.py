r"""Retrieves handwritten digits: learns embeddings, then evaluates them as a search engine is evaluated.

    python examples/retrieve_digits.py            # about 10 seconds on two cores
    python examples/retrieve_digits.py --quick    # a few

A network is trained on scikit-learn's digits as a classifier; the layer before the last is the embedding. Then each
unseen digit is a query, all other unseen digits are the documents, and those of the same class are relevant: NDCG@10,
MRR, MAP and recall@100 of pixels, of an untrained and of the trained network, all metrics in one pass over the scores.
The evaluation also runs batch by batch, as in a training loop, and is compared with torchmetrics in value and time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchmetrics.retrieval import RetrievalMAP, RetrievalMRR, RetrievalNormalizedDCG

import torchfast
from torchfast.metrics import RankingMetrics, ranking_metrics

METRICS = ("ndcg@10", "mrr", "map", "recall@100")


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels of a third for training, of the rest for retrieval."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(pixels / 16).float().reshape(-1, 1, 8, 8)[order]
    classes, third = torch.from_numpy(labels).long()[order], len(labels) // 3
    return images[:third], classes[:third], images[third:], classes[third:]


def network() -> nn.Sequential:
    embedding = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(512, 32)),
    )
    return nn.Sequential(embedding, nn.Linear(32, 10))


def train(images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    model, criterion = network(), torchfast.FocalLoss(gamma=1.0, label_smoothing=0.1)
    optimizer = AdamW(model.parameters(), lr=3e-3)
    scheduler = CosineAnnealingLR(optimizer, T_max=epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            criterion(model(images[rows]), labels[rows]).backward()
            optimizer.step()
        scheduler.step()
    return model[0].eval()


@torch.no_grad()
def rank(embed: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine similarities of every image with every other, which of them are relevant, and which are others."""
    vectors = F.normalize(embed(images).flatten(1), dim=1)
    return vectors @ vectors.T, labels[:, None] == labels, ~torch.eye(len(labels), dtype=torch.bool)


def by_torchmetrics(scores: Tensor, relevant: Tensor, others: Tensor) -> dict[str, float]:
    queries = torch.arange(len(scores))[:, None].expand(scores.shape)[others]
    # It drops the relevance of documents whose score is <= 0: exp makes all positive, and keeps their order.
    positive, relevance = scores[others].double().exp(), relevant[others]
    metrics = {"ndcg@10": RetrievalNormalizedDCG(top_k=10), "mrr": RetrievalMRR(), "map": RetrievalMAP()}
    return {name: metric(positive, relevance, indexes=queries).item() for name, metric in metrics.items()}


def main(argv: list[str] | None = None) -> dict[str, dict[str, Tensor]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few epochs, fewer queries")
    quick = parser.parse_args(argv).quick
    torch.manual_seed(0)
    train_images, train_labels, images, labels = digits()
    if quick:
        images, labels = images[:300], labels[:300]
    embeddings = {
        "pixels": nn.Flatten(),
        "untrained network": network()[0],
        "trained network": train(train_images, train_labels, 10 if quick else 20),
    }
    table = Table(title=f"Retrieval among {len(images)} unseen digits: each one a query, same class = relevant")
    table.add_column("embedding")
    for name in METRICS:
        table.add_column(name, justify="right")
    all_found = {}
    for name, embed in embeddings.items():
        scores, relevant, others = rank(embed, images, labels)
        found = all_found[name] = ranking_metrics(scores, relevant, METRICS, mask=others)
        table.add_row(name, *(f"{found[metric]:.4f}" for metric in METRICS))
    console = Console()
    console.print(table)

    # The same batch by batch; `scores`, `relevant` and `others` are those of the trained network.
    metrics = RankingMetrics(METRICS)
    start = time.perf_counter()
    for rows in torch.arange(len(scores)).split(200):
        metrics.update(scores[rows], relevant[rows], mask=others[rows])
    streamed = {name: value.item() for name, value in metrics.compute().items()}
    ours = time.perf_counter() - start
    start = time.perf_counter()
    peer = by_torchmetrics(scores, relevant, others)
    theirs = time.perf_counter() - start
    for name, value in found.items():
        assert abs(streamed[name] - value.item()) < 1e-12
    for name, value in peer.items():
        assert abs(streamed[name] - value) < 1e-6, (name, streamed[name], value)
    console.print(
        f"RankingMetrics in batches: the same to 1e-12, {1e3 * ours:.1f} ms; "
        f"torchmetrics: {', '.join(peer)} the same to 1e-6, {1e3 * theirs:.0f} ms"
    )
    return all_found


if __name__ == "__main__":
    main()
