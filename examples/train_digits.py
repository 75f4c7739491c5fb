r"""Trains a small network on long-tailed handwritten digits with the losses of torchfast.

    python examples/train_digits.py            # about a minute on two cores
    python examples/train_digits.py --quick    # a few seconds

Cross entropy, label smoothing, focal loss and class-balanced focal loss, each with three pairs of optimizer and
learning-rate schedule, one of which follows a metric of torchfast, each from several seeds. `train` is the loop to
copy. At the end, the losses of torchfast are timed against PyTorch's own on this machine.

Do not read a ranking of the losses from it: there are few images and few seeds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

import torchfast
import torchfast.info
from torchfast.metrics import ClassificationMetrics, classification_metrics

CLASSES = 10
TAIL = 4  # the tail is the four rarest classes

# ---- What is compared: four losses, three ways to train -----------------------------------------

LOSSES: dict[str, Callable[[Tensor], nn.Module]] = {
    "cross entropy": lambda counts: torchfast.CrossEntropyLoss(),
    "label smoothing": lambda counts: torchfast.LabelSmoothingCrossEntropy(0.1),
    "focal": lambda counts: torchfast.FocalLoss(gamma=2.0),
    # alpha: one factor per class, larger for rarer classes, 1 on average over the training images
    "focal, balanced": lambda counts: torchfast.FocalLoss(gamma=2.0, alpha=counts.mean() / counts),
}


def sgd_step(model: nn.Module, epochs: int) -> tuple[Optimizer, LRScheduler]:
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    return optimizer, StepLR(optimizer, step_size=max(1, epochs // 2), gamma=0.1)


def adamw_cosine(model: nn.Module, epochs: int) -> tuple[Optimizer, LRScheduler]:
    optimizer = AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    return optimizer, CosineAnnealingLR(optimizer, T_max=epochs)


def adamw_plateau(model: nn.Module, epochs: int) -> tuple[Optimizer, LRScheduler]:
    optimizer = AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    return optimizer, ReduceLROnPlateau(optimizer, mode="max", factor=0.3, patience=3)


RECIPES = {
    "SGD, StepLR": sgd_step,
    "AdamW, CosineAnnealingLR": adamw_cosine,
    "AdamW, ReduceLROnPlateau": adamw_plateau,
}

# ---- Data: balanced test and validation images, long-tailed training images ----------------------


@dataclass
class Digits:
    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset
    counts: Tensor
    """Training images of each digit."""

    @property
    def tail(self) -> Tensor:
        """The rarest digits."""
        return self.counts.argsort()[:TAIL]


def long_tailed_digits(seed: int, largest: int = 100, imbalance: float = 50) -> Digits:
    """The 8x8 digits of scikit-learn; the class of rank r keeps largest * imbalance^(-r/9) images.

    Which digits are rare, and which images are drawn, depends on the seed.
    """
    rng = np.random.default_rng(seed)
    pixels, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    images, parts = pixels.float().reshape(-1, 1, 8, 8) / 16, []
    counts = torch.empty(CLASSES)
    for rank, digit in enumerate(rng.permutation(CLASSES)):
        counts[digit] = round(largest * imbalance ** (-rank / (CLASSES - 1)))
        members = rng.permutation(np.flatnonzero(labels == digit))
        parts.append(np.split(members, [40, 70, 70 + int(counts[digit])])[:3])
    test, validation, train = (torch.from_numpy(np.concatenate(rows)) for rows in zip(*parts, strict=True))
    return Digits(*(TensorDataset(images[rows], labels[rows]) for rows in (train, validation, test)), counts)


# ---- Training: the loop of the textbook ----------------------------------------------------------


def small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1),  # 8x8 to 4x4
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, CLASSES),
    )


def train(
    model: nn.Module, criterion: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, data: Digits, epochs: int
) -> list[dict[str, float]]:
    device = next(model.parameters()).device
    train_loader, validation_loader = DataLoader(data.train, 32, shuffle=True), DataLoader(data.validation, 100)
    metrics = ClassificationMetrics("f1@macro", num_classes=CLASSES).to(device)
    history = []
    for _ in range(epochs):
        total_loss = torch.zeros((), device=device)
        for images, labels in train_loader:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            total_loss += loss.detach() * len(labels)

        metrics.reset()
        with torch.no_grad():
            for images, labels in validation_loader:
                metrics.update(model(images.to(device)), labels.to(device))
        f1 = metrics.compute()["f1@macro"].item()
        mean_loss, rate = total_loss.item() / len(data.train), optimizer.param_groups[0]["lr"]
        history.append({"training loss": mean_loss, "validation macro-F1": f1, "learning rate": rate})
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(f1)
        else:
            scheduler.step()
    return history


# ---- One run, and its scores ---------------------------------------------------------------------


@dataclass
class Run:
    recipe: str
    loss: str
    seed: int
    history: list[dict[str, float]]
    scores: dict[str, float]
    """On the test images, in percent."""


def run_once(recipe: str, loss: str, seed: int, epochs: int, device: torch.device) -> Run:
    data = long_tailed_digits(seed)
    torch.manual_seed(seed)  # the same start and the same batches for every loss and recipe
    model = small_cnn().to(device)
    history = train(model, LOSSES[loss](data.counts).to(device), *RECIPES[recipe](model, epochs), data, epochs)
    images, labels = data.test.tensors
    with torch.no_grad():
        logits = model(images.to(device))
    names = ["accuracy", "f1@macro", "f1@none"]
    accuracy, f1, f1_of_each = classification_metrics(logits, labels.to(device), names, absent="zero_division").values()
    scores = {"accuracy": accuracy, "macro-F1": f1, "tail's F1": f1_of_each[data.tail].mean()}
    return Run(recipe, loss, seed, history, {name: 100 * value.item() for name, value in scores.items()})


# ---- What came out: a table and a picture --------------------------------------------------------


def mean_and_spread(values: list[float], form: str = ".1f") -> str:
    return f"{mean(values):{form}}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def score_table(runs: list[Run]) -> Table:
    """Of 80 columns at most. The gains compare runs of the same images, start and batches."""
    baseline, names = next(iter(LOSSES)), list(runs[0].scores)
    table = Table(title="Test scores in percent: mean ± standard deviation over seeds", box=box.SIMPLE, show_edge=False)
    table.caption = f"gain: in {names[-1]}, over {baseline} with the same images, start and batches"
    table.add_column("", no_wrap=True)
    for column in (*names, "gain"):
        table.add_column(column, justify="right", no_wrap=True)
    for recipe in RECIPES:
        table.add_section()
        table.add_row(recipe.replace(" ", "\n"), style="bold")
        of_recipe = {loss: [r.scores for r in runs if (r.recipe, r.loss) == (recipe, loss)] for loss in LOSSES}
        for loss, scores in of_recipe.items():
            cells = [mean_and_spread([s[name] for s in scores]) for name in names]
            gains = [s[names[-1]] - b[names[-1]] for s, b in zip(scores, of_recipe[baseline], strict=True)]
            table.add_row(f"  {loss}", *cells, "" if loss == baseline else mean_and_spread(gains, "+.1f"))
    return table


def draw_curves(runs: list[Run], path: Path) -> None:
    """Columns: recipes. Rows: training loss, validation macro-F1, learning rate; means and ranges over seeds."""
    quantities = list(runs[0].history[0])
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(len(quantities), len(RECIPES), sharex=True, sharey="row")
    for recipe, column in zip(RECIPES, axes.T, strict=True):
        column[0].set_title(recipe)
        for quantity, axis in zip(quantities, column, strict=True):
            for loss in LOSSES:
                of_loss = [r.history for r in runs if (r.recipe, r.loss) == (recipe, loss)]
                curves = np.array([[epoch[quantity] for epoch in history] for history in of_loss])
                epochs = range(1, curves.shape[1] + 1)
                axis.plot(epochs, curves.mean(0), label=loss)
                axis.fill_between(epochs, curves.min(0), curves.max(0), alpha=0.15)
            axis.set_yscale("linear" if "F1" in quantity else "log")
    for quantity, axis in zip(quantities, axes[:, 0], strict=True):
        axis.set_ylabel(quantity)
    axes[1, 0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


# ---- Speed: torchfast against PyTorch on this machine --------------------------------------------


def eager_focal_loss(logits: Tensor, target: Tensor, gamma: float = 2.0) -> Tensor:
    """Focal loss as it is usually written."""
    cross_entropy = F.cross_entropy(logits, target, reduction="none")
    return ((1 - torch.exp(-cross_entropy)) ** gamma * cross_entropy).mean()


RIVALS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "cross entropy": (nn.CrossEntropyLoss(), torchfast.CrossEntropyLoss()),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), torchfast.LabelSmoothingCrossEntropy(0.1)),
    "focal": (eager_focal_loss, torchfast.FocalLoss(gamma=2.0)),
}
SHAPES = [(1024, 32000), (16384, 1000), (4, 19, 512, 512)]
QUICK_SHAPES = [(256, 1000), (1, 19, 64, 64)]


def milliseconds(criterion: Callable[..., Tensor], logits: Tensor, target: Tensor) -> tuple[float, Tensor, Tensor]:
    """Of forward and backward, and what they give."""
    wait = torch.cuda.synchronize if logits.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    loss = criterion(logits, target)
    (gradient,) = torch.autograd.grad(loss, logits)
    wait()
    return 1000 * (time.perf_counter() - start), loss.detach(), gradient


def check_equal(logits: Tensor, target: Tensor, *criteria: Callable[..., Tensor]) -> None:
    """Raises unless the losses agree, and the gradients, relative to their largest element. Also the warm-up."""
    (_, loss, gradient), (_, other_loss, other_gradient) = (milliseconds(c, logits, target) for c in criteria)
    torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(other_gradient, gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())


def speed_table(shapes: list[tuple[int, ...]], repetitions: int, device: torch.device) -> Table:
    table = Table(title="Forward and backward, ms, float32: medians, taken in turns")
    for column in ("logits", "loss", "PyTorch", "torchfast", "ratio"):
        table.add_column(column, justify="left" if column in ("logits", "loss") else "right")
    for shape in shapes:
        logits = torch.randn(shape, device=device, requires_grad=True)
        target = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
        for name, rivals in RIVALS.items():
            check_equal(logits, target, *rivals)
            times = [[milliseconds(rival, logits, target)[0] for rival in rivals] for _ in range(repetitions)]
            theirs, ours = map(median, zip(*times, strict=True))
            table.add_row(" x ".join(map(str, shape)), name, f"{theirs:.1f}", f"{ours:.1f}", f"{theirs / ours:.2f}")
        table.add_section()
    return table


def main(argv: list[str] | None = None) -> list[Run]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=4, help="runs per loss and recipe")
    parser.add_argument("--quick", action="store_true", help="5 epochs, 1 seed and small timings: a few seconds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "train_digits.png")
    parser.add_argument("--no-benchmark", action="store_true", help="skip the timings")
    options = parser.parse_args(argv)
    epochs, seeds = (5, 1) if options.quick else (options.epochs, options.seeds)
    device, console = torch.device(options.device), Console()

    counts = ", ".join(f"{count:.0f}" for count in long_tailed_digits(seed=0).counts.sort(descending=True).values)
    console.print(
        f"[bold]Long-tailed digits.[/] {counts} training images of the ten digits. The tail is the {TAIL} rarest; "
        "which these are changes with the seed. Validation and test are balanced.\n",
        highlight=False,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a network this small gains nothing from more
    planned = [(recipe, loss, seed) for recipe in RECIPES for loss in LOSSES for seed in range(seeds)]
    runs = [run_once(*run, epochs, device) for run in track(planned, "training", console=console)]
    torch.set_num_threads(threads)
    draw_curves(runs, options.out)
    console.print(score_table(runs), f"Curves: {options.out}\n", soft_wrap=True)

    if not options.no_benchmark:
        kernel = torchfast.info.report()["kernels"]["cross_entropy"].get(device.type, "reference")
        small = options.quick or kernel == "reference"  # which is right, and slow
        console.print(speed_table(QUICK_SHAPES if small else SHAPES, 5 if small else 10, device))
        console.print(f"{device.type}, torch {torch.__version__}, kernel of torchfast: {kernel}", highlight=False)
    return runs


if __name__ == "__main__":
    main()
