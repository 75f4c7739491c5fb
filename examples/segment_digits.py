r"""Finds the pixels of handwritten digits that lie on a photograph: segmentation with rare classes and void pixels.

    python examples/segment_digits.py            # half a minute
    python examples/segment_digits.py --quick    # a few seconds

The digits and the photograph come with scikit-learn. Most pixels are background, 1% are of each digit, and the faint
borders of the strokes are void: they are ignored, as in Pascal VOC. Cross entropy without and with class weights and
focal loss take (N, C, H, W) logits as they are, here in channels_last. The intersection over union (IoU) of each class
comes from a confusion matrix that is gathered batch by batch.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits, load_sample_image
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

import torchfast
from torchfast.metrics import ClassificationMetrics

BACKGROUND, CLASSES, VOID = 10, 11, 255
SIZE, DIGIT = 32, 8


def scatter(digits: np.ndarray, labels: np.ndarray, images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 32, 32) of eight digits, some over others, on a piece of the photograph; a class for each pixel."""
    rng = np.random.default_rng(seed)
    photograph = load_sample_image("china.jpg").mean(axis=2, dtype=np.float32) / 255
    canvas = np.empty((images, SIZE, SIZE), np.float32)
    classes = np.full((images, SIZE, SIZE), BACKGROUND)
    for image, label in zip(canvas, classes, strict=True):
        top, left = (rng.integers(length - SIZE) for length in photograph.shape)
        image[:] = photograph[top : top + SIZE, left : left + SIZE] / 2
        for k in rng.integers(len(digits), size=8):
            top, left = rng.integers(SIZE - DIGIT, size=2)
            place = np.s_[top : top + DIGIT, left : left + DIGIT]
            image[place] = np.maximum(image[place], digits[k] / 16)
            label[place] = np.select([digits[k] > 8, digits[k] > 2], [labels[k], VOID], label[place])
    return torch.from_numpy(canvas).unsqueeze(1), torch.from_numpy(classes)


def network() -> nn.Module:
    def block(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU()]

    head = nn.Conv2d(64, 4 * CLASSES, 1), nn.PixelShuffle(2)  # back to all pixels
    model = nn.Sequential(*block(1, 32, 2), *block(32, 64), *block(64, 64), *head)
    return model.to(memory_format=torch.channels_last)


def train(criterion: nn.Module, images: Tensor, classes: Tensor, epochs: int, batch: int = 8) -> nn.Module:
    torch.manual_seed(0)
    model = network()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    scheduler = OneCycleLR(optimizer, max_lr=1e-2, epochs=epochs, steps_per_epoch=-(-len(images) // batch))
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(batch):
            optimizer.zero_grad()
            criterion(model(images[rows]), classes[rows]).backward()
            optimizer.step()
            scheduler.step()
    return model.eval()


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, classes: Tensor) -> dict[str, float]:
    metrics = ClassificationMetrics(["accuracy", "confusion_matrix"], num_classes=CLASSES, ignore_index=VOID)
    for some, truth in zip(images.split(64), classes.split(64), strict=True):
        metrics.update(model(some), truth)
    accuracy, matrix = metrics.compute().values()
    both = matrix.diagonal()
    iou = both / (matrix.sum(0) + matrix.sum(1) - both)
    digits = iou[:BACKGROUND]
    return {
        "accuracy": accuracy.item(),
        "background": iou[BACKGROUND].item(),
        "digits": digits.mean().item(),
        "worst digit": digits.min().item(),
    }


def largest_difference(images: Tensor, classes: Tensor, weight: Tensor) -> float:
    """Of the loss and the gradient to PyTorch's, relative to the largest."""
    model, found = network(), []
    for module in torchfast.CrossEntropyLoss, nn.CrossEntropyLoss:
        logits = model(images[:16]).detach().requires_grad_()
        loss = module(weight, ignore_index=VOID)(logits, classes[:16])
        found.append((loss.detach(), *torch.autograd.grad(loss, logits)))
    return max(((ours - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in zip(*found, strict=True))


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images, few epochs")
    quick = parser.parse_args(argv).quick
    digits, labels = load_digits(return_X_y=True)
    seen, unseen, seen_labels, unseen_labels = train_test_split(
        digits.reshape(-1, DIGIT, DIGIT), labels, test_size=0.3, random_state=0, stratify=labels
    )
    images, classes = scatter(seen, seen_labels, 256 if quick else 512, seed=1)
    test = scatter(unseen, unseen_labels, 256, seed=2)

    share = classes[classes != VOID].bincount() / (classes != VOID).sum()
    weight = share.rsqrt() / share.rsqrt().mean()
    losses = {
        "cross entropy": torchfast.CrossEntropyLoss(ignore_index=VOID),
        "weighted": torchfast.CrossEntropyLoss(weight, ignore_index=VOID),
        "focal": torchfast.FocalLoss(gamma=2.0, ignore_index=VOID),
    }
    difference = largest_difference(images, classes, weight)
    assert difference < 1e-5, difference
    console = Console()
    console.print(
        f"{share[BACKGROUND]:.0%} background, {share[:BACKGROUND].min():.1%} to {share[:BACKGROUND].max():.1%} of each "
        f"digit, {(classes == VOID).float().mean():.0%} void. Loss and gradient with weights differ from PyTorch's by "
        f"{difference:.0e}.",
        highlight=False,
    )
    found = {}
    table = Table(title=f"{len(test[0])} unseen images: accuracy of pixels, and IoU")
    for name, criterion in losses.items():
        start = time.perf_counter()
        scores = found[name] = evaluate(train(criterion, images, classes, epochs=4 if quick else 10), *test)
        if not table.columns:
            for column in ("loss", *scores, "seconds"):
                table.add_column(column, justify="left" if column == "loss" else "right")
        table.add_row(name, *(f"{s:.3f}" for s in scores.values()), f"{time.perf_counter() - start:.0f}")
    console.print(table)
    return found


if __name__ == "__main__":
    main()
