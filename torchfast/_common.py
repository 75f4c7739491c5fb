"""What losses and metrics share: dtypes, reductions, checks of arguments."""

from __future__ import annotations

import os

import torch
from torch import Tensor

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def accumulate_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of sums and of the loss."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def check(name: str, ok: bool, given: object, allowed: object) -> None:
    if not ok:
        raise ValueError(f"{name} must be {allowed}, got {given!r}")


def check_logits_dtype(name: str, logits: Tensor) -> None:
    if logits.dtype not in LOGITS_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {logits.dtype}")


def check_factor(name: str, factor: Tensor) -> None:
    if not isinstance(factor, Tensor) or not factor.is_floating_point():
        given = factor.dtype if isinstance(factor, Tensor) else type(factor).__name__
        raise TypeError(f"{name} must be a tensor of a floating dtype, got {given}")


def check_device(name: str, tensor: Tensor, first: str, input: Tensor) -> None:
    if tensor.device != input.device:
        raise ValueError(f"{name} must be on {first}'s device {input.device}, got {tensor.device}")


def check_normalizer(normalizer: float | Tensor, reduction: str) -> None:
    check("normalizer", reduction == "mean", normalizer, f"None for reduction={reduction!r}")
    shape = tuple(normalizer.shape) if isinstance(normalizer, Tensor) else ()
    check("normalizer's shape", shape == (), shape, "()")


def normalized(loss: Tensor, normalizer: float | Tensor | None) -> Tensor:
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(loss.dtype)
    return loss if normalizer is None else loss / normalizer


def readable(x: Tensor) -> bool:
    """Whether there are values to look at, and reading them is free (CPU) or asked for (TORCHFAST_CHECK=1)."""
    wanted = x.device.type == "cpu" or os.environ.get("TORCHFAST_CHECK") == "1"
    traced = torch.compiler.is_compiling() or type(x) is not Tensor or torch._C._are_functorch_transforms_active()
    return wanted and not traced


def check_range(target: Tensor, out_of_range: Tensor, allowed: str) -> None:
    if not readable(out_of_range) or not out_of_range.any():
        return
    value = int(target[out_of_range].flatten()[0])
    raise IndexError(f"target {value} is out of range: allowed are {allowed} and ignore_index")


def mean(loss_sum: Tensor, divisor: Tensor, empty_zero: bool) -> Tensor:
    """Over a divisor of 0 the gradient is 0: the division that fails must not be differentiated."""
    empty = torch.zeros_like(loss_sum) if empty_zero else (loss_sum / divisor).detach()
    return torch.where(divisor == 0, empty, loss_sum / torch.where(divisor == 0, 1.0, divisor))
