r"""Trains a small network on long-tailed handwritten digits with the losses of torchfast.

    python examples/train_digits.py            # about a minute on two cores
    python examples/train_digits.py --quick    # a few seconds

Cross entropy, label smoothing, focal loss and class-balanced focal loss, each with three
combinations of optimizer and learning-rate schedule, each from several seeds. `train` is the loop
to copy. At the end, the losses of torchfast are timed against PyTorch's own on this machine.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws into a file, needs no screen

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

import torchfast
import torchfast.info

CLASSES = 10
TAIL = 4  # the tail is the four rarest classes

# ---- What is compared: four losses, three ways to train ---------------------------------------

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

# ---- Data: balanced test and validation images, long-tailed training images --------------------


@dataclass
class Digits:
    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset
    counts: Tensor
    """Training images of each digit."""
    tail: list[int]
    """The rarest digits."""


def long_tailed_digits(seed: int, largest: int = 100, imbalance: float = 50) -> Digits:
    """The 8x8 digits of scikit-learn; the class of rank r keeps largest * imbalance^(-r/9) images.

    Which digits are rare, and which images are drawn, depends on the seed.
    """
    rng = np.random.default_rng(seed)
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels / 16).float().reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(labels).long()

    test: list[int] = []
    validation: list[int] = []
    train: list[int] = []
    counts = torch.zeros(CLASSES)
    by_frequency = rng.permutation(CLASSES).tolist()
    for rank, digit in enumerate(by_frequency):
        members = rng.permutation(np.flatnonzero(labels == digit))
        counts[digit] = round(largest * imbalance ** (-rank / (CLASSES - 1)))
        test.extend(members[:40])
        validation.extend(members[40:70])
        train.extend(members[70 : 70 + int(counts[digit])])

    def subset(rows: list[int]) -> TensorDataset:
        return TensorDataset(images[rows], labels[rows])

    return Digits(subset(train), subset(validation), subset(test), counts, by_frequency[-TAIL:])


# ---- Training: the loop of the textbook ---------------------------------------------------------


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


@torch.no_grad()
def predict(model: nn.Module, data: TensorDataset, device: torch.device) -> tuple[Tensor, Tensor]:
    """The labels and the predicted classes, on the CPU."""
    model.eval()
    images, labels = data.tensors
    return labels, model(images.to(device)).argmax(dim=1).cpu()


@dataclass
class Epoch:
    train_loss: float
    validation_f1: float
    learning_rate: float


def train(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    data: Digits,
    epochs: int,
    device: torch.device,
    show: Callable[[Epoch], None],
) -> list[Epoch]:
    train_loader = DataLoader(data.train, batch_size=32, shuffle=True)
    history = []
    for _ in range(epochs):
        model.train()
        total_loss = 0.0
        for images, labels in train_loader:
            images, labels = images.to(device), labels.to(device)

            optimizer.zero_grad()
            logits = model(images)
            loss = criterion(logits, labels)
            loss.backward()
            optimizer.step()

            total_loss += loss.item() * len(labels)

        validation_f1 = f1_score(*predict(model, data.validation, device), average="macro")
        learning_rate = optimizer.param_groups[0]["lr"]
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(validation_f1)
        else:
            scheduler.step()

        history.append(Epoch(total_loss / len(data.train), validation_f1, learning_rate))
        show(history[-1])
    return history


# ---- One run, and its scores ---------------------------------------------------------------------


@dataclass
class Run:
    recipe: str
    loss: str
    seed: int
    history: list[Epoch]
    scores: dict[str, float]
    """On the test images, in percent."""


def score_on_test(model: nn.Module, data: Digits, device: torch.device) -> dict[str, float]:
    labels, predicted = predict(model, data.test, device)
    in_tail = torch.isin(labels, torch.tensor(data.tail))
    f1 = f1_score(labels, predicted, average=None, labels=range(CLASSES), zero_division=0)
    return {
        "accuracy, all": 100 * accuracy_score(labels, predicted),
        "accuracy, tail": 100 * accuracy_score(labels[in_tail], predicted[in_tail]),
        "macro-F1, all": 100 * f1.mean(),
        "macro-F1, tail": 100 * f1[data.tail].mean(),
    }


def run_once(
    recipe: str, loss: str, seed: int, epochs: int, device: torch.device, show: Callable[[Epoch], None]
) -> Run:
    data = long_tailed_digits(seed)
    torch.manual_seed(seed)  # the same start and the same batches for every loss and recipe
    model = small_cnn().to(device)
    criterion = LOSSES[loss](data.counts).to(device)
    optimizer, scheduler = RECIPES[recipe](model, epochs)
    history = train(model, criterion, optimizer, scheduler, data, epochs, device, show)
    return Run(recipe, loss, seed, history, score_on_test(model, data, device))


def run_all(seeds: int, epochs: int, device: torch.device, console: Console) -> list[Run]:
    planned = [(recipe, loss, seed) for recipe in RECIPES for loss in LOSSES for seed in range(seeds)]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}{task.fields[status]}"),
        TimeElapsedColumn(),
    )
    runs = []
    with Progress(*columns, console=console) as progress:
        all_runs = progress.add_task("", total=len(planned), unit="runs", status="")
        one_run = progress.add_task("", total=epochs, unit="epochs", status="")

        def show(epoch: Epoch) -> None:
            status = f", loss {epoch.train_loss:.3f}, val F1 {epoch.validation_f1:.3f}"
            progress.update(one_run, advance=1, status=status)

        for recipe, loss, seed in planned:
            progress.update(all_runs, description=recipe)
            progress.reset(one_run, description=f"{loss}, seed {seed}", unit="epochs", status="")
            runs.append(run_once(recipe, loss, seed, epochs, device, show))
            progress.advance(all_runs)
    return runs


# ---- What came out: two tables and a picture ----------------------------------------------------


TABLE_STYLE: dict[str, Any] = dict(
    box=box.SIMPLE_HEAD,
    show_edge=False,
    pad_edge=False,
    title_justify="left",
    caption_justify="left",
    title_style="bold",
)


def mean_and_spread(values: list[float], form: str = ".1f") -> str:
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{spread}"


def score_table(runs: list[Run], seeds: int) -> Table:
    what = f"Mean ± standard deviation of {seeds} seeds" if seeds > 1 else "One seed"
    caption = f"{what}; bold: the highest of its block."
    table = Table(title="Test scores in percent", caption=caption, **TABLE_STYLE)
    scores = list(runs[0].scores)
    table.add_column("", no_wrap=True)
    for score in scores:
        table.add_column(score.replace(", ", "\n"), justify="right", no_wrap=True)
    for recipe in RECIPES:
        table.add_section()
        table.add_row(recipe, style="cyan")
        of_recipe = {
            loss: {score: [r.scores[score] for r in runs if (r.recipe, r.loss) == (recipe, loss)] for score in scores}
            for loss in LOSSES
        }
        best = {score: max(mean(of_recipe[loss][score]) for loss in LOSSES) for score in scores}
        for loss in LOSSES:
            cells = []
            for score in scores:
                values = of_recipe[loss][score]
                style = "[bold]" if mean(values) == best[score] else ""
                cells.append(style + mean_and_spread(values))
            table.add_row(f"  {loss}", *cells)
    return table


def paired_table(runs: list[Run]) -> Table:
    """Every loss against cross entropy on the same images, start, batches and recipe."""
    baseline, *others = LOSSES
    base = {(r.recipe, r.seed): r.scores for r in runs if r.loss == baseline}
    table = Table(
        title=f"Difference to {baseline}, in points of macro-F1",
        caption=f"Mean ± standard deviation over {len(base)} pairs of runs that share seed and "
        "recipe. With so few pairs, only large differences mean something.",
        **TABLE_STYLE,
    )
    table.add_column("", no_wrap=True)
    for part in ("all", "tail"):
        table.add_column(f"macro-F1\n{part}", justify="right", no_wrap=True)
        table.add_column("\nhigher in", justify="right", no_wrap=True)
    for loss in others:
        cells = []
        for score in ("macro-F1, all", "macro-F1, tail"):
            gains = [r.scores[score] - base[r.recipe, r.seed][score] for r in runs if r.loss == loss]
            cells += [mean_and_spread(gains, "+.1f"), f"{sum(g > 0 for g in gains)} of {len(gains)}"]
        table.add_row(loss, *cells)
    return table


PLOT_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": "#E6E6E6",
    "xtick.color": "#555555",
    "xtick.major.size": 0,
    "ytick.color": "#555555",
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}
COLORS = dict(zip(LOSSES, ("#0072B2", "#E69F00", "#009E73", "#CC4778"), strict=True))


def draw_curves(runs: list[Run], path: Path) -> None:
    """Columns: recipes. Rows: training loss, validation macro-F1, learning rate."""
    plt.rcParams.update(PLOT_STYLE)
    figure, axes = plt.subplots(3, len(RECIPES), figsize=(12, 8.4), sharex=True, sharey="row", height_ratios=(3, 3, 2))
    epochs = range(1, len(runs[0].history) + 1)
    seeds = len({r.seed for r in runs})

    for column, recipe in zip(axes.T, RECIPES, strict=True):
        loss_axis, f1_axis, rate_axis = column
        loss_axis.set_title(recipe, loc="left", fontsize=11, fontweight="bold", color="#333333")
        for loss, color in COLORS.items():
            histories = [r.history for r in runs if (r.recipe, r.loss) == (recipe, loss)]
            for axis, quantity in ((loss_axis, "train_loss"), (f1_axis, "validation_f1")):
                curves = np.array([[getattr(epoch, quantity) for epoch in history] for history in histories])
                axis.fill_between(epochs, curves.min(0), curves.max(0), color=color, alpha=0.13, linewidth=0)
                axis.plot(epochs, curves.mean(0), color=color, linewidth=1.8, label=loss)

        rates = {(r.loss, r.seed): [e.learning_rate for e in r.history] for r in runs if r.recipe == recipe}
        if len({tuple(rate) for rate in rates.values()}) == 1:
            rate_axis.step(epochs, next(iter(rates.values())), where="mid", color="#555555", linewidth=1.8)
            rate_note = "the same for every loss"
        else:
            for (loss, _), rate in rates.items():
                rate_axis.step(epochs, rate, where="mid", color=COLORS[loss], linewidth=1.2, alpha=0.6)
            rate_note = "one line per run"
        rate_axis.set_title(rate_note, loc="right", fontsize=9, color="#555555")
        rate_axis.set_xlabel("epoch")

    axes[0, 0].set(ylabel="training loss\n(each its own scale)", yscale="log")
    axes[1, 0].set(ylabel="validation macro-F1", ylim=(0, 1))
    axes[2, 0].set(ylabel="learning rate", yscale="log")
    figure.align_ylabels()

    figure.suptitle("Four losses on long-tailed digits", x=0.01, y=0.985, ha="left", fontsize=15, fontweight="bold")
    what = f"Mean of {seeds} seeds; the band spans the lowest to the highest." if seeds > 1 else "One seed."
    figure.text(0.01, 0.928, what, color="#555555")
    legend = axes[0, 0].get_legend_handles_labels()
    figure.legend(*legend, loc="upper right", ncols=len(LOSSES), frameon=False, bbox_to_anchor=(0.995, 0.985))
    figure.tight_layout(rect=(0, 0, 1, 0.955), h_pad=1.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---- Speed: torchfast against PyTorch on this machine ---------------------------------------------


def eager_focal_loss(logits: Tensor, target: Tensor, gamma: float = 2.0) -> Tensor:
    """Focal loss as it is usually written."""
    cross_entropy = F.cross_entropy(logits, target, reduction="none")
    p = torch.exp(-cross_entropy)
    return ((1 - p) ** gamma * cross_entropy).mean()


RIVALS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "cross entropy": (nn.CrossEntropyLoss(), torchfast.CrossEntropyLoss()),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), torchfast.LabelSmoothingCrossEntropy(0.1)),
    "focal": (eager_focal_loss, torchfast.FocalLoss(gamma=2.0)),
}
SHAPES = [(2048, 32000), (16384, 1000), (4, 19, 512, 512)]
QUICK_SHAPES = [(256, 1000), (1, 19, 64, 64)]


def free_memory(device: torch.device) -> int:
    """In bytes; a careful guess where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    available = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    return int(available[1]) * 1024 if available else 4 * 2**30


def check_equal(criteria: tuple[Callable[..., Tensor], ...], logits: Tensor, target: Tensor) -> None:
    """Raises unless the losses agree, and the gradients, relative to their largest element."""
    losses = [criterion(logits, target) for criterion in criteria]
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in losses]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    largest = gradients[0].abs().max().item()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-5 * largest)


def forward_backward_time(criterion: Callable[..., Tensor], logits: Tensor, target: Tensor) -> float:
    """In milliseconds."""
    logits.grad = None
    if logits.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    loss = criterion(logits, target)
    loss.backward()
    if logits.is_cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def speed_table(shapes: list[tuple[int, ...]], seconds: float, device: torch.device, console: Console) -> Table:
    table = Table(
        title="Forward and backward in milliseconds, float32",
        caption="Medians of alternating repetitions, after losses and gradients were seen to agree. "
        "Ratio: PyTorch's time over torchfast's; above 1, torchfast is faster.",
        **TABLE_STYLE,
    )
    table.add_column("logits", no_wrap=True)
    table.add_column("loss", no_wrap=True)
    for name in ("PyTorch", "torchfast", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)

    with console.status("") as status:
        for shape in shapes:
            label = " x ".join(map(str, shape))
            if free_memory(device) < 16 * 4 * math.prod(shape):
                table.add_row(label, "skipped: too little memory")
                continue
            torch.manual_seed(0)
            logits = torch.randn(shape, device=device, requires_grad=True)
            target = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
            for name, rivals in RIVALS.items():
                status.update(f"timing {name}, {label}")
                end = time.perf_counter() + seconds / (len(shapes) * len(RIVALS))
                check_equal(rivals, logits, target)  # also the warm-up
                times: tuple[list[float], list[float]] = ([], [])
                while len(times[0]) < 3 or (time.perf_counter() < end and len(times[0]) < 100):
                    for criterion, measured in zip(rivals, times, strict=True):
                        measured.append(forward_backward_time(criterion, logits, target))
                theirs, ours = map(median, times)
                table.add_row(label, name, f"{theirs:.1f}", f"{ours:.1f}", f"{theirs / ours:.2f}")
            table.add_section()
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Long-tailed digits with the losses of torchfast.")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=4, help="runs per loss and recipe")
    parser.add_argument("--quick", action="store_true", help="2 epochs, 1 seed and small timings: a few seconds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "train_digits.png")
    parser.add_argument("--no-benchmark", action="store_true", help="skip the timings")
    options = parser.parse_args(argv)
    epochs, seeds = (2, 1) if options.quick else (options.epochs, options.seeds)
    device = torch.device(options.device)
    console = Console()

    counts = long_tailed_digits(seed=0).counts.int().sort(descending=True).values.tolist()
    console.print(
        f"[bold]Long-tailed digits.[/] {sum(counts)} training images: {', '.join(map(str, counts))} "
        f"of the ten digits. The tail is the {TAIL} rarest; which digits these are changes with the "
        "seed. Validation and test are balanced, 30 and 40 images of each digit. Every loss starts "
        "with the same weights, batches and learning rate.\n",
        highlight=False,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a network this small gains nothing from more
    runs = run_all(seeds, epochs, device, console)
    torch.set_num_threads(threads)
    console.print("", score_table(runs, seeds), "", paired_table(runs), "")
    draw_curves(runs, options.out)
    console.print(f"Curves: {options.out}\n", soft_wrap=True)

    if not options.no_benchmark:
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{threads} CPU threads"
        kernel = torchfast.info.report()["kernels"]["cross_entropy"].get(device.type, "reference")
        small = options.quick or kernel == "reference"  # which is right, and slow
        shapes, seconds = (QUICK_SHAPES, 1.0) if small else (SHAPES, 15.0)
        console.print(
            f"[bold]Speed[/] on {where} with torch {torch.__version__}. The kernel of torchfast is: {kernel} "
            "(python -m torchfast.info says more).\n",
            highlight=False,
        )
        console.print(speed_table(shapes, seconds, device, console))


if __name__ == "__main__":
    main()
