"""PyTorch-Ignite: torchfast's metrics in an evaluator, and a schedule that follows one of them.

    pip install "torchfast[examples]" pytorch-ignite
    python examples/recipes/with_ignite.py

`OfTorchfast` makes any torchmetrics metric one of Ignite's; the dict of its `compute` becomes one entry a name of
`engine.state.metrics`. Over several processes torchmetrics sums the counts, so Ignite need not.
"""

from __future__ import annotations

import torch
import torchmetrics
from ignite.engine import Engine, Events, create_supervised_evaluator, create_supervised_trainer
from ignite.metrics import Metric
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset, random_split

import torchfast
from torchfast.metrics import ClassificationMetrics


class OfTorchfast(Metric):
    def __init__(self, metrics: torchmetrics.Metric, **options) -> None:
        self.metrics = metrics
        super().__init__(**options)  # which resets

    def reset(self) -> None:
        self.metrics.reset()

    def update(self, output: tuple[Tensor, Tensor]) -> None:
        self.metrics.update(*output)

    def compute(self) -> dict[str, float]:
        return {name: value.item() for name, value in self.metrics.compute().items()}


def main(epochs: int = 8) -> dict[str, float]:
    torch.manual_seed(0)
    pixels, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    train, validation = random_split(TensorDataset(pixels.float() / 16, labels), [0.7, 0.3])

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = AdamW(model.parameters(), lr=1e-2)
    scheduler = ReduceLROnPlateau(optimizer, mode="max", factor=0.3, patience=2)
    trainer = create_supervised_trainer(model, optimizer, torchfast.LabelSmoothingCrossEntropy(0.1))
    evaluator = create_supervised_evaluator(model)
    metrics = ClassificationMetrics(["accuracy", "accuracy@3", "f1@macro"], num_classes=10)
    OfTorchfast(metrics, metrics_result_mode="flatten").attach(evaluator, "torchfast")

    @trainer.on(Events.EPOCH_COMPLETED)
    def validate(engine: Engine) -> None:
        evaluator.run(DataLoader(validation, 256))
        scheduler.step(evaluator.state.metrics["f1@macro"])
        found = ", ".join(f"{name} {value:.4f}" for name, value in evaluator.state.metrics.items())
        print(f"epoch {engine.state.epoch}: {found}")

    trainer.run(DataLoader(train, 64, shuffle=True), max_epochs=epochs)
    return evaluator.state.metrics


if __name__ == "__main__":
    main()
