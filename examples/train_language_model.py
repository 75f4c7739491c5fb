r"""Trains a small language model on Python's own reference without ever holding its logits.

    python examples/train_language_model.py            # about 10 seconds on two cores
    python examples/train_language_model.py --quick    # a few seconds

The text is what `help("if")` and the like show, word by word: it comes with Python. The classifier is the embedding,
tied. `LinearCrossEntropyLoss` is the last layer and the loss in one: a chunk of rows of logits at a time. Words that
occur once have no entry of their own in the vocabulary, and as targets they are ignored. At the end, the loss, the
gradients and the memory of one step are compared with those of the linear layer and PyTorch's cross entropy after it.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

import torchfast

UNKNOWN, IGNORED = 0, -100


def words() -> tuple[Tensor, list[str]]:
    """The text as ids, and the word of each id."""
    text = re.findall(r"\w+|[.,:;()]", "\n".join(topics.values()))
    vocabulary = ["?", *(word for word, count in Counter(text).items() if count > 1)]
    ids = {word: i for i, word in enumerate(vocabulary)}
    return torch.tensor([ids.get(word, UNKNOWN) for word in text]), vocabulary


class LanguageModel(nn.Module):
    def __init__(self, vocabulary: int, features: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, features)
        self.mix = nn.Sequential(  # a word and the three before it, as in Bengio et al. 2003
            *(nn.ConstantPad1d((3, 0), 0.0), nn.Conv1d(features, 2 * features, kernel_size=4), nn.GELU()),
            *(nn.Conv1d(2 * features, features, kernel_size=1), nn.Dropout(0.2)),
        )
        self.criterion = torchfast.LinearCrossEntropyLoss(features, vocabulary, bias=True, z_loss=1e-4)
        nn.init.normal_(self.embedding.weight, std=features**-0.5)
        self.criterion.linear.weight = self.embedding.weight  # tied

    def hidden(self, ids: Tensor) -> Tensor:
        vectors = self.embedding(ids)
        return vectors + self.mix(vectors.mT).mT

    def forward(self, ids: Tensor) -> Tensor:
        """The loss of each next word of (N, T + 1) ids."""
        return self.criterion(self.hidden(ids[:, :-1]), targets(ids))


def targets(ids: Tensor) -> Tensor:
    return ids[:, 1:].masked_fill(ids[:, 1:] == UNKNOWN, IGNORED)


def train(model: LanguageModel, ids: Tensor, epochs: int, length: int = 32, batch: int = 8) -> None:
    windows = ids.unfold(0, length + 1, length)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    scheduler = OneCycleLR(optimizer, max_lr=1e-2, epochs=epochs, steps_per_epoch=-(-len(windows) // batch))
    for _ in range(epochs):
        for rows in torch.randperm(len(windows)).split(batch):
            optimizer.zero_grad()
            model(windows[rows]).backward()
            optimizer.step()
            scheduler.step()
    model.eval()


@torch.no_grad()
def perplexity(model: LanguageModel, ids: Tensor) -> float:
    linear, ids = model.criterion.linear, ids.unsqueeze(0)
    hidden = model.hidden(ids[:, :-1])
    return torchfast.linear_cross_entropy(hidden, linear.weight, targets(ids), linear_bias=linear.bias).exp().item()


def perplexity_of_counting(train: Tensor, test: Tensor, vocabulary: int) -> float:
    """Of a model that knows how frequent each word is, and no more."""
    counts = train.bincount(minlength=vocabulary) + 1.0
    return F.cross_entropy(counts.log().expand(len(test) - 1, -1), targets(test[None])[0]).exp().item()


@torch.no_grad()
def continued(model: LanguageModel, vocabulary: list[str], start: str, length: int = 24) -> str:
    ids = [vocabulary.index(word) for word in start.split()]
    for _ in range(length):
        logits = model.criterion.linear(model.hidden(torch.tensor([ids]))[0, -1])
        logits[UNKNOWN] = -torch.inf
        ids.append(int(torch.multinomial((logits / 0.7).softmax(0), 1)))
    return " ".join(vocabulary[i] for i in ids)


# ---- One step without the logits against two with them ------------------------------------------


def two_steps(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), target.flatten())


def peak_memory(run: Callable[[], object]) -> float | None:
    """In MiB, of the process at the worst moment beyond what it held before; None where Linux does not tell."""

    def resident(field: str) -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(field))

    try:
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")  # the high-water mark starts again
        before = resident("VmRSS")
        run()
        return (resident("VmHWM") - before) / 1024
    except OSError:
        return None


def step(criterion: Callable[..., Tensor], hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """The loss and the gradients of hidden states and classifier."""
    loss = criterion(hidden, weight, target)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def compare(model: LanguageModel, ids: Tensor, rows: int, length: int = 256) -> tuple[Table, dict[str, float | None]]:
    batch = ids[: rows * length + 1].unfold(0, length + 1, length)
    target, weight = targets(batch), model.embedding.weight
    hidden = model.hidden(batch[:, :-1]).detach().requires_grad_()
    size = 4 * target.numel() * len(weight) / 2**20
    table = Table("", "loss", "peak memory", title=f"{target.numel()} words, {size:.0f} MiB of logits")
    results, peaks = [], {}
    for name, criterion in {"one step": torchfast.linear_cross_entropy, "two steps": two_steps}.items():
        run = partial(step, criterion, hidden, weight, target)
        results.append(run())  # whatever is made at the first call is not counted
        peak = peaks[name] = peak_memory(run)
        table.add_row(name, f"{results[-1][0]:.6f}", "not measured" if peak is None else f"{peak:.0f} MiB")
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    return table, peaks


def main(argv: list[str] | None = None) -> dict[str, float | None]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one epoch, a small comparison")
    quick = parser.parse_args(argv).quick
    torch.manual_seed(0)
    console = Console()
    ids, vocabulary = words()
    known, unseen = ids.split([len(ids) - 8000, 8000])
    model = LanguageModel(len(vocabulary))
    train(model, known, epochs=1 if quick else 2)
    counting, reached = perplexity_of_counting(known, unseen, len(vocabulary)), perplexity(model, unseen)
    console.print(
        f"{len(known)} words of {len(vocabulary)} different ones for training. Perplexity of {len(unseen)} more: "
        f"{reached:.0f}; of their frequencies: {counting:.0f}\n\n{continued(model, vocabulary, 'The')}\n",
        highlight=False,
        markup=False,
    )
    table, peaks = compare(model, ids, rows=32 if quick else 64)
    console.print(table)
    return {"perplexity": reached, "of counting": counting, **peaks}


if __name__ == "__main__":
    main()
