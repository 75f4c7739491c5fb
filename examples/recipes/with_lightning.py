"""PyTorch Lightning: a loss of torchfast, its metrics logged, and a schedule that follows one of them.

    pip install "torchfast[examples]" pytorch-lightning
    python examples/recipes/with_lightning.py

A metric of torchfast is a torchmetrics metric whose `compute` returns a dict, one value a name, from one pass over the
logits. Lightning's `self.log` takes numbers, so: `update` in each step, and at the end `self.log_dict(compute())`, then
`reset`. Over several processes `compute` has summed the counts already: no `sync_dist`.
"""

from __future__ import annotations

import logging

import pytorch_lightning as lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset, random_split

import torchfast
from torchfast.metrics import ClassificationMetrics, RankingMetrics


class Classifier(lightning.LightningModule):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, num_classes))
        self.criterion = torchfast.FocalLoss(gamma=2.0, label_smoothing=0.1)
        # As attributes they move to the device with the module.
        self.decisions = ClassificationMetrics(["accuracy", "accuracy@3", "f1@macro"], num_classes=num_classes)
        self.ranks = RankingMetrics("mrr")  # of the right class among all, by logit

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        pixels, labels = batch
        loss = self.criterion(self.model(pixels), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        pixels, labels = batch
        logits = self.model(pixels)
        self.decisions.update(logits, labels)
        self.ranks.update(logits, nn.functional.one_hot(labels, logits.shape[1]))

    def on_validation_epoch_end(self) -> None:
        for metrics in self.decisions, self.ranks:
            self.log_dict(metrics.compute())
            metrics.reset()

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = AdamW(self.parameters(), lr=1e-2)
        scheduler = ReduceLROnPlateau(optimizer, mode="max", factor=0.3, patience=2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "f1@macro"}}


def main() -> dict[str, float]:
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    lightning.seed_everything(0, verbose=False)
    pixels, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    train, validation = random_split(TensorDataset(pixels.float() / 16, labels), [0.7, 0.3])
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(max_epochs=8, accelerator="cpu", num_sanity_val_steps=0, **quiet)
    trainer.fit(Classifier(), DataLoader(train, 64, shuffle=True), DataLoader(validation, 256))
    found = {name: value.item() for name, value in trainer.callback_metrics.items()}
    print(*(f"{name} {value:.4f}" for name, value in found.items()), sep="\n")
    return found


if __name__ == "__main__":
    main()
