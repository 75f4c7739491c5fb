r"""Finds handwritten digits scattered over an image: dense detection with sigmoid losses and class ids as targets.

    python examples/detect_digits.py            # half a minute on two cores
    python examples/detect_digits.py --quick    # a few seconds

Each image holds a few digits of scikit-learn's set on an empty canvas; the network says for each of its 8 x 8 cells
which digit has its centre there, if any. 19 of 20 cells are background: the imbalance for which the focal loss was
made (Lin et al. 2017). The target is the class id of each cell, -1 for background; its one-hot form, ten times the
size, never exists. Binary cross entropy, focal loss and asymmetric loss differ in their options alone.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

import torchfast

CLASSES, CANVAS, STRIDE, DIGIT = 10, 32, 4, 8
CELLS = CANVAS // STRIDE
PRIOR = 0.01  # the probability that each class is given at first (Lin et al. 2017, section 4.1)

LOSSES: dict[str, dict[str, Any]] = {
    "binary cross entropy": {"alpha": -1.0, "gamma": 0.0},
    "focal": {"alpha": 0.25, "gamma": 2.0},
    "asymmetric": {"alpha": -1.0, "gamma": 0.0, "gamma_neg": 2.0, "clip": 0.05},
}


def scatter(digits: np.ndarray, labels: np.ndarray, images: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 32, 32) of one to six digits that may touch, and the class id of each cell (N, 8, 8)."""
    canvas = np.zeros((images, CANVAS, CANVAS), np.float32)
    ids = np.full((images, CELLS, CELLS), -1)
    for image, cells in zip(canvas, ids, strict=True):
        for k in rng.integers(len(digits), size=rng.integers(1, 7)):
            top, left = rng.integers(CANVAS - DIGIT + 1, size=2)
            cell = (top + DIGIT // 2) // STRIDE, (left + DIGIT // 2) // STRIDE
            patch = image[top : top + DIGIT, left : left + DIGIT]
            if (patch > 0).mean() < 0.1:  # else the place is taken
                np.maximum(patch, digits[k] / 16, out=patch)
                cells[cell] = labels[k]
    return torch.from_numpy(canvas).unsqueeze(1), torch.from_numpy(ids)


def detector() -> nn.Module:
    def block(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU()]

    head = nn.Conv2d(64, CLASSES, 1)
    nn.init.constant_(head.bias, -math.log((1 - PRIOR) / PRIOR))
    return nn.Sequential(*block(1, 16), *block(16, 32, 2), *block(32, 64, 2), *block(64, 64), *block(64, 64), head)


def train(options: dict[str, Any], images: Tensor, ids: Tensor, epochs: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model, batch = detector(), 64
    steps = len(images) // batch
    optimizer = AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    scheduler = OneCycleLR(optimizer, max_lr=3e-3, total_steps=epochs * steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(images))[: steps * batch].split(batch):
            target = ids[rows]
            logits = model(images[rows]).movedim(1, -1)  # a view: the loss reads any strides
            found = (target >= 0).sum().clamp(min=1)
            loss = torchfast.sigmoid_focal_loss(logits, target, reduction="mean", normalizer=found, **options)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return model.eval()


@torch.no_grad()
def average_precision(model: nn.Module, images: Tensor, ids: Tensor) -> float:
    """Over all cells and classes together."""
    scores = model(images).movedim(1, -1)
    truth = ids.unsqueeze(-1) == torch.arange(CLASSES)
    return float(average_precision_score(truth.flatten(), scores.flatten()))


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images, few epochs, one seed")
    quick = parser.parse_args(argv).quick
    epochs, seeds, size = (3, 1, 1024) if quick else (8, 2, 1536)

    digits, labels = load_digits(return_X_y=True)
    of_train, of_test, train_labels, test_labels = train_test_split(
        digits.reshape(-1, DIGIT, DIGIT), labels, test_size=0.3, random_state=0, stratify=labels
    )
    images, ids = scatter(of_train, train_labels, size, np.random.default_rng(1))
    test_images, test_ids = scatter(of_test, test_labels, 512, np.random.default_rng(2))
    table = Table(title=f"{(test_ids >= 0).sum()} unseen digits in {test_ids.numel()} cells")
    for column in ("loss", "average precision", "seconds"):
        table.add_column(column, justify="left" if column == "loss" else "right")
    all_found = {}
    for name, options in LOSSES.items():
        start = time.perf_counter()
        found = [average_precision(train(options, images, ids, epochs, s), test_images, test_ids) for s in range(seeds)]
        all_found[name] = found
        table.add_row(name, " ".join(f"{ap:.3f}" for ap in found), f"{time.perf_counter() - start:.0f}")
    Console().print(table)
    return all_found


if __name__ == "__main__":
    main()
