"""The linear cross entropy's cases: the head and the loss, against the two steps and torch's own chunked form.

The tensor differentiated first is the classifier (the hidden states get a gradient as well), so "clone" and "copy_"
are of the classifier. Memory is what the run adds at its worst moment, the gradients included.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from cases import CE, CE_LS, FOCAL_LS_W, NO_AIMS, Aims, Case, Inputs, Loss, Step, Truth, softmax_contenders
from torch import Tensor

import torchfast


def linear_inputs(shape: tuple[int, int, int], dtype: torch.dtype, loss: Loss, device: str) -> Inputs:
    """Hidden states that lean towards the classifier of their target, as those of a half-trained model do."""
    tokens, features, classes = shape
    target = torch.randint(classes, (tokens,), device=device)
    linear_weight = torch.randn(classes, features, device=device).div_(features**0.5)
    hidden = 2 * torch.randn(tokens, features, device=device)
    hidden += 12 * torch.rand(tokens, 1, device=device) * linear_weight[target]
    weight = (torch.rand(classes, device=device) + 0.5).to(dtype) if loss.weighted else None
    return linear_weight.to(dtype).requires_grad_(), hidden.to(dtype).requires_grad_(), target, weight


def linear_contenders(loss: Loss) -> dict[str, Step]:
    given = {"label_smoothing": loss.label_smoothing, "gamma": loss.gamma}
    alpha = None if loss.alpha == 1 else loss.alpha
    eager = softmax_contenders(loss)["eager"]

    def fast(linear_weight: Tensor, hidden: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        return torchfast.linear_cross_entropy(hidden, linear_weight, target, weight=weight, alpha=alpha, **given)

    def two_steps(linear_weight: Tensor, hidden: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        return eager(F.linear(hidden, linear_weight), target, weight)

    def chunked(linear_weight: Tensor, hidden: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden, linear_weight, target, weight=weight, options=options)

    has_it = hasattr(torch.nn, "LinearCrossEntropyOptions") and not (loss.gamma or loss.label_smoothing)
    return {"torchfast": fast, "eager": two_steps} | ({"torch chunked": chunked} if has_it else {})


def linear_truth(loss: Loss, linear_weight: Tensor, hidden: Tensor, target: Tensor, weight: Tensor | None) -> Truth:
    """Computes in fp64, in chunks of tokens, the loss of all and the gradients of some rows of the classifier."""
    classes = linear_weight.shape[0]
    w, e = linear_weight.detach().double(), loss.label_smoothing
    class_weight = w.new_ones(classes) if weight is None else weight.double()
    stride = math.ceil(classes / 500)
    total, gradient = w.new_zeros(()), torch.zeros_like(w[::stride])
    chunk = max(1, 2**25 // classes)
    for h, t in zip(hidden.detach().split(chunk), target.split(chunk), strict=True):
        logits = (h.double() @ w.T).requires_grad_()
        log_p = logits.log_softmax(1)
        per_class = -log_p * class_weight * (1 - log_p.exp()) ** loss.gamma
        row = (1 - e) * per_class.gather(1, t.unsqueeze(1)).squeeze(1) + e / classes * per_class.sum(1)
        part = loss.alpha * row.sum()
        gradient += torch.autograd.grad(part, logits)[0][:, ::stride].T @ h.double()
        total += part.detach()
    divisor = class_weight[target].sum()
    return Truth((total / divisor).item(), gradient / divisor, lambda full: full[::stride])


def linear_case(
    shape: tuple[int, int, int],
    loss: Loss,
    dtype: torch.dtype = torch.float32,
    aims: Aims = NO_AIMS,
) -> Case:
    return Case(
        "linear",
        loss.name,
        shape,
        dtype,
        lambda device: linear_inputs(shape, dtype, loss, device),
        linear_contenders(loss),
        lambda *inputs: linear_truth(loss, *inputs),
        aims,
        if_asked=math.prod(shape) > 2**36,  # three products of so many multiplications
        features=shape[1],
    )


def linear_cases() -> Iterator[Case]:
    aims = Aims(eager=1 / 1.1)
    yield linear_case((512, 128, 5000), CE)
    for dtype in torch.float32, torch.bfloat16:
        for loss in CE, CE_LS, FOCAL_LS_W:
            yield linear_case((2048, 256, 32000), loss, dtype, aims)
    yield linear_case((4096, 1024, 128256), CE, aims=aims)
