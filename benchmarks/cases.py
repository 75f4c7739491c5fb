"""What is measured. A case is data: fresh inputs, contenders, the truth in fp64, and the aims.

The inputs' first tensor is the one whose gradient is verified. A contender takes the inputs and returns the
tensor to differentiate; where that needs no gradient, as a metric's, both times are of the call. ``run.py`` adds
torch.compile of "eager" and the floors (copy, clone) to every case. ``cases()`` are the CPU's,
``gpu_cases()`` the GPU's, set up on the device: some would not fit in the host's memory.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import torchfast

Inputs = tuple[Tensor, ...]
Step = Callable[..., Tensor]


class Aims(NamedTuple):
    """torchfast aims to be at least so many times faster than a peer, and to take at most so many times as long as
    copying the logits into memory that is there, as reading all inputs, or as the product of matrices alone."""

    eager: float | None = None
    compile: float | None = None
    copy: float | None = None
    read: float | None = None
    mm: float | None = None


NO_AIMS = Aims()


class Truth(NamedTuple):
    loss: float
    gradient: Tensor
    pick: Callable[[Tensor], Tensor]
    """The part of a contender's gradient that ``gradient`` is the truth of."""

    def errors(self, loss: Tensor, gradient: Tensor) -> tuple[float, float]:
        """Returns the loss's relative error, and the gradient's relative to its largest element."""
        difference = self.pick(gradient).double() - self.gradient
        # abs() of a NaN is not <= any tolerance, so NaN and inf fail as they should.
        return abs(loss.item() / self.loss - 1), (difference.abs().max() / self.gradient.abs().max()).item()


@dataclass(frozen=True)
class Case:
    family: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    setup: Callable[[str], Inputs]
    contenders: dict[str, Step]
    truth: Callable[..., Truth]
    aims: Aims
    floors: dict[str, Step] = dataclasses.field(default_factory=dict)
    """The floors besides copy_ and clone."""
    slow: bool = False
    """Has contenders that are too slow for --quick."""
    if_asked: bool = False
    """Takes so long that only --only runs it."""
    read_too: int = 0
    """Tensors of the logits' size and dtype that both passes must read besides them."""
    features: int = 1
    """The width of the input of the linear layer that makes the logits; the shape has it too."""
    bytes_read: int = 0
    """The size of a metric's inputs: it writes next to nothing, and has no gradient."""

    @property
    def elements(self) -> int:
        """The number of the logits."""
        return math.prod(self.shape) // self.features

    @property
    def moved(self) -> int:
        """Bytes that loss and gradient must at least move: forward reads, backward reads and writes."""
        return self.bytes_read or (3 + 2 * self.read_too) * self.elements * self.dtype.itemsize

    @property
    def label(self) -> str:
        return f"{self.family}/{self.name}/{'x'.join(map(str, self.shape))}/{DTYPES[self.dtype]}"


DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}

#: torchfast's error may be 2 x eager's own error at that dtype + this, relative to the largest truth.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
#: Peers only have to be the right formula: torch.compile adds 100k rows up with errors near 1e-4.
PEER_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


FLOORS = ("copy_", "clone", "read", "mm", "sort", "argmax")


def timings(name: str) -> tuple[str, ...]:
    return ("floor",) if name in FLOORS else ("fwd", "fwd+bwd")


def failure(problem: Exception) -> str:
    """A failing contender is a result, not the end of the run."""
    return f"failed: {type(problem).__name__}: {str(problem).partition(chr(10))[0]}"[:300]


def forget_gradients(inputs: Inputs) -> None:
    for tensor in inputs:
        if tensor is not None:
            tensor.grad = None


def private(name: str, inputs: Inputs) -> Inputs:
    """Liger-Kernel writes its gradient over the logits: it gets a copy, made outside the clock.

    From its second call on it reads what it has written, which takes it the same time: nothing it
    does depends on the values. Whoever needs the logits afterwards pays for a copy that is not
    counted here.
    """
    return (inputs[0].detach().clone().requires_grad_(), *inputs[1:]) if name == "liger" else inputs


# ---- Softmax losses --------------------------------------------------------------------------


class Loss(NamedTuple):
    name: str
    label_smoothing: float = 0.0
    gamma: float = 0.0
    alpha: float = 1.0
    weighted: bool = False


CE = Loss("CE")
CE_LS = Loss("CE+LS", label_smoothing=0.1)
FOCAL = Loss("focal", gamma=2.0, alpha=0.25)
FOCAL_LS_W = Loss("focal+LS+weights", label_smoothing=0.1, gamma=2.0, weighted=True)
LOSSES = (CE, CE_LS, FOCAL, FOCAL_LS_W)


def softmax_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, loss: Loss, device: str, channels_last: bool, ignored: float
) -> Inputs:
    """Makes logits of a half-trained model: the right class is raised by 0 to 12, so that p covers (0, 1)."""
    rows, classes = (shape[0], *shape[2:]), shape[1]
    target = torch.randint(classes, rows, device=device)
    logits = torch.randn(shape, device=device).mul_(2)
    logits.scatter_add_(1, target.unsqueeze(1), 12 * torch.rand(rows, device=device).unsqueeze(1))
    target.masked_fill_(torch.rand(rows, device=device) < ignored, -100)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    logits = logits.to(dtype).contiguous(memory_format=layout).requires_grad_()
    weight = (torch.rand(classes, device=device) + 0.5).to(dtype) if loss.weighted else None
    return logits, target, weight


def softmax_contenders(loss: Loss) -> dict[str, Step]:
    e, gamma, alpha = loss.label_smoothing, loss.gamma, loss.alpha

    def fast(logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        given = None if alpha == 1 else alpha
        return torchfast.cross_entropy(logits, target, weight, label_smoothing=e, gamma=gamma, alpha=given)

    def eager(logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        return F.cross_entropy(logits, target, weight, label_smoothing=e)

    def eager_focal(logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        log_p = F.log_softmax(logits, 1)
        at = target.unsqueeze(1)
        if e == 0 and weight is None:  # only p of the target is needed: the cheapest eager form
            log_p = log_p.gather(1, at)
            return alpha * ((-log_p.expm1()) ** gamma * -log_p).mean()
        per_class = (-log_p.expm1()) ** gamma * -log_p * weight.view(-1, *[1] * (logits.dim() - 2))
        row = (1 - e) * per_class.gather(1, at).squeeze(1) + e / logits.shape[1] * per_class.sum(1)
        return alpha * row.sum() / weight[target].sum()

    return {"torchfast": fast, "eager": eager_focal if gamma else eager}


def liger_contender(loss: Loss, shape: tuple[int, ...]) -> dict[str, Step]:
    """Liger-Kernel takes (N, C), and has no focal loss. Its forward computes the gradient."""
    if loss.gamma or len(shape) != 2 or importlib.util.find_spec("liger_kernel") is None:
        return {}

    def liger(logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        from liger_kernel.transformers.functional import liger_cross_entropy

        return liger_cross_entropy(logits, target, weight, label_smoothing=loss.label_smoothing)

    return {"liger": liger}


def softmax_truth(loss: Loss, logits: Tensor, target: Tensor, weight: Tensor | None) -> Truth:
    """Computes the loss of all rows, in fp64 chunks, and the gradient of a few: rows are independent."""
    classes = logits.shape[1]
    e = loss.label_smoothing
    w = logits.new_ones(classes, dtype=torch.float64) if weight is None else weight.double()

    def as_rows(tensor: Tensor) -> Tensor:
        return tensor.detach().movedim(1, -1).reshape(-1, classes)

    def row_losses(x: Tensor, t: Tensor) -> Tensor:
        log_p = x.log_softmax(1)
        per_class = -log_p * w
        if loss.gamma:
            per_class = per_class * (1 - log_p.exp()) ** loss.gamma
        row = (1 - e) * per_class.gather(1, t.clamp(min=0).unsqueeze(1)).squeeze(1)
        if e:
            row = row + e / classes * per_class.sum(1)
        return torch.where(t == -100, 0.0, loss.alpha * row)

    x, t = as_rows(logits), target.flatten()
    chunk = max(1, 2**20 // classes)
    total = sum(row_losses(a.double(), b).sum() for a, b in zip(x.split(chunk), t.split(chunk), strict=True))
    divisor = w[t[t != -100]].sum()
    stride = math.ceil(x.shape[0] / chunk)
    sample = x[::stride].double().requires_grad_()
    gradient = torch.autograd.grad(row_losses(sample, t[::stride]).sum() / divisor, sample)[0]
    return Truth((total / divisor).item(), gradient, lambda full: as_rows(full)[::stride])


def softmax_case(
    family: str,
    loss: Loss,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    aims: Aims = NO_AIMS,
    *,
    channels_last: bool = False,
    ignored: float = 0.0,
) -> Case:
    name = loss.name + " channels_last" * channels_last + " half ignored" * bool(ignored)
    return Case(
        family,
        name,
        shape,
        dtype,
        lambda device: softmax_inputs(shape, dtype, loss, device, channels_last, ignored),
        softmax_contenders(loss),
        lambda *inputs: softmax_truth(loss, *inputs),
        aims,
    )


# ---- Sigmoid losses --------------------------------------------------------------------------


class Sigmoid(NamedTuple):
    name: str
    alpha: float = 0.25
    gamma: float = 2.0
    gamma_neg: float = 2.0
    clip: float = 0.0
    ids: bool = False
    """The targets are class ids, of which other formulas make their one-hot form."""


SIGMOID_FOCAL = Sigmoid("focal")
SIGMOID_IDS = Sigmoid("focal class ids", ids=True)
BCE = Sigmoid("BCE", alpha=-1.0, gamma=0.0, gamma_neg=0.0)
ASYMMETRIC = Sigmoid("asymmetric", alpha=-1.0, gamma=1.0, gamma_neg=4.0, clip=0.05)


def sigmoid_inputs(shape: tuple[int, int], dtype: torch.dtype, loss: Sigmoid, device: str) -> Inputs:
    """Makes logits, targets and their float form. A label's logit is raised by 0 to 12; a tenth of rows has none."""
    rows, classes = shape
    ids = torch.randint(classes, (rows,), device=device)
    logits = torch.randn(shape, device=device).mul_(2)
    logits.scatter_add_(1, ids.unsqueeze(1), 12 * torch.rand(rows, device=device).unsqueeze(1))
    one_hot = F.one_hot(ids, classes).to(dtype)
    background = torch.rand(rows, device=device) < 0.1
    one_hot[background] = 0
    ids[background] = -1
    return logits.to(dtype).requires_grad_(), ids if loss.ids else one_hot, one_hot


def sigmoid_eager(loss: Sigmoid, logits: Tensor, y: Tensor) -> Tensor:
    """torchvision's sigmoid_focal_loss, PyTorch's own binary cross entropy, timm's asymmetric loss."""
    if loss.gamma == loss.gamma_neg == 0:
        return F.binary_cross_entropy_with_logits(logits, y)
    p = torch.sigmoid(logits)
    if loss.clip:
        q = (1 - p + loss.clip).clamp(max=1)
        log = y * torch.log(p.clamp(min=1e-8)) + (1 - y) * torch.log(q.clamp(min=1e-8))
        pt = p * y + q * (1 - y)
        return -(log * (1 - pt) ** (loss.gamma * y + loss.gamma_neg * (1 - y))).mean()
    ce = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
    pt = p * y + (1 - p) * (1 - y)
    return ((loss.alpha * y + (1 - loss.alpha) * (1 - y)) * ce * (1 - pt) ** loss.gamma).mean()


def sigmoid_contenders(loss: Sigmoid) -> dict[str, Step]:
    options = {"gamma_neg": loss.gamma_neg, "clip": loss.clip, "reduction": "mean"}

    def fast(logits: Tensor, target: Tensor, one_hot: Tensor) -> Tensor:
        return torchfast.sigmoid_focal_loss(logits, target, loss.alpha, loss.gamma, **options)

    def fast_one_hot(logits: Tensor, target: Tensor, one_hot: Tensor) -> Tensor:
        return torchfast.sigmoid_focal_loss(logits, one_hot, loss.alpha, loss.gamma, **options)

    def eager(logits: Tensor, target: Tensor, one_hot: Tensor) -> Tensor:
        if loss.ids:  # -1 becomes a class that is dropped
            target = F.one_hot(target % (logits.shape[1] + 1), logits.shape[1] + 1)[:, :-1].to(logits.dtype)
        return sigmoid_eager(loss, logits, target)

    return {"torchfast": fast, "eager": eager} | ({"torchfast one-hot": fast_one_hot} if loss.ids else {})


def sigmoid_truth(loss: Sigmoid, logits: Tensor, _: Tensor, one_hot: Tensor) -> Truth:
    """Computes the loss of all rows, in fp64 chunks, and the gradient of a few."""
    x, y = logits.detach(), one_hot
    chunk = max(1, 2**20 // x.shape[1])
    chunks = zip(x.split(chunk), y.split(chunk), strict=True)
    sums = (sigmoid_eager(loss, a.double(), b.double()) * a.numel() for a, b in chunks)
    stride = math.ceil(x.shape[0] / chunk)
    sample = x[::stride].double().requires_grad_()
    part = sigmoid_eager(loss, sample, y[::stride].double()) * sample.numel() / x.numel()
    gradient = torch.autograd.grad(part, sample)[0]
    return Truth((sum(sums) / x.numel()).item(), gradient, lambda full: full[::stride])


def sigmoid_case(
    family: str, loss: Sigmoid, shape: tuple[int, int], dtype: torch.dtype = torch.float32, aims: Aims = NO_AIMS
) -> Case:
    return Case(
        family,
        loss.name,
        shape,
        dtype,
        lambda device: sigmoid_inputs(shape, dtype, loss, device),
        sigmoid_contenders(loss),
        lambda *inputs: sigmoid_truth(loss, *inputs),
        aims,
        read_too=int(not loss.ids),
    )


LARGE = ((16384, 1000), (2048, 32000), (512, 128256))


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for shape in LARGE:
            for loss in LOSSES:
                if dtype == torch.bfloat16:
                    aims = Aims(eager=4, compile=1, copy=2.5)
                else:
                    aims = Aims(eager=6, compile=3, copy=1.3)
                yield softmax_case("large", loss, shape, dtype, aims)
    for shape in (65536, 10), (100000, 2):
        for loss in LOSSES:
            yield softmax_case("small classes", loss, shape, aims=Aims(eager=5, compile=1))
    for loss in CE, FOCAL_LS_W:
        for channels_last in False, True:
            aims = Aims(eager=5, compile=2, copy=1.5)
            yield softmax_case("segmentation", loss, (4, 19, 512, 512), aims=aims, channels_last=channels_last)
    for shape in LARGE[:2]:
        yield softmax_case("ignored rows", CE, shape, aims=Aims(eager=6, compile=3, copy=1.3), ignored=0.5)
    for dtype in DTYPES:
        for shape in (4096, 4096), (100_000, 80):
            for loss in SIGMOID_FOCAL, SIGMOID_IDS, BCE, ASYMMETRIC:
                aims = NO_AIMS if loss is BCE else Aims(eager=10, compile=2)
                yield sigmoid_case("sigmoid", loss, shape, dtype, aims)
    for shape in (128, 10), (8, 2):
        yield softmax_case("tiny", CE, shape, aims=Aims(eager=1))
        yield softmax_case("tiny", FOCAL, shape, aims=Aims(eager=2))
    for doubling in range(7):
        yield softmax_case("scaling", CE_LS, (512 * 2**doubling, 1000))
    for doubling in range(7):
        yield sigmoid_case("scaling", SIGMOID_FOCAL, (4096 * 2**doubling, 80))


def gpu_cases() -> Iterator[Case]:
    def all_losses(family: str, shape: tuple[int, ...], dtype: torch.dtype, **options: bool) -> Iterator[Case]:
        for loss in LOSSES:
            case = softmax_case(family, loss, shape, dtype, **options)
            yield dataclasses.replace(case, contenders=case.contenders | liger_contender(loss, shape))

    both = torch.bfloat16, torch.float32
    for shape, dtypes in {
        (4096, 32000): both,
        (16384, 128256): both[:1],
        (8192, 50257): both[:1],
        (16384, 1000): both,
    }.items():
        for dtype in dtypes:
            yield from all_losses("large", shape, dtype)
    for shape in (16384, 4096), (1_000_000, 80):
        for dtype in both:
            for loss in SIGMOID_FOCAL, SIGMOID_IDS, ASYMMETRIC:
                yield sigmoid_case("sigmoid", loss, shape, dtype)
    for family, shape in ("few rows", (8, 128256)), ("small classes", (1_000_000, 10)):
        for dtype in both:
            yield from all_losses(family, shape, dtype)
    for dtype in both:
        for channels_last in False, True:
            yield from all_losses("segmentation", (4, 19, 1024, 1024), dtype, channels_last=channels_last)
