"""Hugging Face Trainer: a loss of torchfast that is right under gradient accumulation, and streaming metrics.

    pip install "torchfast[examples]" transformers accelerate
    python examples/recipes/with_transformers.py

Sequences differ in length, so the mean over the bytes of a step is not the mean of the means of its micro-batches.
The Trainer counts the bytes of the whole step, `num_items_in_batch`; with `normalizer` the loss is the sum over it.
With `batch_eval_metrics` the logits of an evaluation are counted batch by batch, and not kept.
"""

from __future__ import annotations

import tempfile
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import torchfast
from torchfast.metrics import ClassificationMetrics

BYTES, IGNORED = 256, -100


def loss(outputs, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # not a copy of the logits, as logits[:, :-1] would be
    logits = outputs.logits.flatten(0, 1)
    return torchfast.cross_entropy(logits, following.flatten(), z_loss=1e-4, normalizer=num_items_in_batch)


class Metrics:
    def __init__(self) -> None:
        # The Trainer has gathered the predictions of all processes: not again.
        options = {"num_classes": BYTES, "ignore_index": IGNORED, "sync_on_compute": False}
        self.metrics = ClassificationMetrics(["accuracy", "accuracy@5"], **options)

    def __call__(self, prediction, compute_result: bool) -> dict[str, float]:
        self.metrics.update(prediction.predictions[:, :-1].movedim(-1, 1), prediction.label_ids[:, 1:])
        if not compute_result:
            return {}
        found = {name: value.item() for name, value in self.metrics.compute().items()}
        self.metrics.reset()
        return found


def paragraphs() -> list[Tensor]:
    """Of Python's reference, as bytes: of very different length."""
    text = "\n\n".join(topics.values()).split("\n\n")
    return [torch.tensor(list(paragraph.encode()[:200])) for paragraph in text if len(paragraph) > 1]


def collate(texts: list[Tensor]) -> dict[str, Tensor]:
    labels = pad_sequence(texts, batch_first=True, padding_value=IGNORED)
    return {"input_ids": labels.clamp(min=0), "attention_mask": (labels >= 0).long(), "labels": labels}


def main(steps: int = 60, batch: int = 8, accumulate: int = 2) -> dict[str, float]:
    transformers.set_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=BYTES, initializer_range=0.1, **shape))
    texts = paragraphs()
    with tempfile.TemporaryDirectory() as folder:
        optimization = {"max_steps": steps, "learning_rate": 1e-2, "lr_scheduler_type": "cosine"}
        batches = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
        quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        arguments = TrainingArguments(folder, use_cpu=True, batch_eval_metrics=True, **optimization, **batches, **quiet)
        data = {"train_dataset": texts[:-200], "eval_dataset": texts[-200:], "data_collator": collate}
        trainer = Trainer(model, arguments, compute_loss_func=loss, compute_metrics=Metrics(), **data)
        trainer.train()
        return trainer.evaluate()


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name} {value:.4f}")
