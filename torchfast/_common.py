"""What losses and metrics share: dtypes, reductions, checks of arguments."""

from __future__ import annotations

import os
from collections.abc import Collection

import torch
from torch import Tensor

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: float8_e8m0fnu is left out: it has exponents alone and no 0, and torch's stable ABI does not know it.
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
#: The dtypes of real numbers that torch computes with or converts. It has others, packed, quantised or bits, of
#: which is_floating_point() and is_complex() say nothing: so what is taken is listed.
FLOATS = frozenset((*LOGITS_DTYPES, *FLOAT8))
INTEGERS = frozenset(
    (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
)
REALS = FLOATS | INTEGERS | {torch.bool}
BOOL = frozenset((torch.bool,))
NONE, MEAN, SUM = range(3)
REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}


def accumulate_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of sums and of the loss."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def check(name: str, ok: bool, given: object, allowed: object) -> None:
    if not ok:
        raise ValueError(f"{name} must be {allowed}, got {given!r}")


def check_tensor(name: str, x: object, dtypes: Collection[torch.dtype], allowed: str, *, jagged: bool = False) -> None:
    """Checks that a tensor has one of the dtypes, which ``allowed`` says in words, and is dense. Sparse tensors have no
    kernels, and torch's own errors do not name the argument."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be {allowed}, got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {allowed}, got {x.dtype}")
    if (x.layout is not torch.strided or x.is_nested) and not (jagged and x.layout is torch.jagged):
        nested = " or a nested tensor of layout=torch.jagged" if jagged else ""
        given = f"a nested tensor of {x.layout}" if x.is_nested else x.layout
        raise TypeError(f"{name} must be a dense tensor{nested}, got {given}")


def check_logits(name: str, logits: object, *, jagged: bool = False) -> None:
    check_tensor(name, logits, LOGITS_DTYPES, "a tensor of float32, bfloat16, float16 or float64", jagged=jagged)


def check_factor(name: str, factor: object) -> None:
    check_tensor(name, factor, FLOATS, "a tensor of a floating dtype")


def check_mask(name: str, mask: object) -> None:
    check_tensor(name, mask, BOOL, "a tensor of dtype bool")


def widened(x: Tensor) -> Tensor:
    """Makes float8 float32, which torch can compare, and leaves other dtypes as they are."""
    return x.float() if x.dtype in FLOAT8 else x


def check_device(name: str, tensor: Tensor, first: str, input: Tensor) -> None:
    if tensor.device != input.device:
        raise ValueError(f"{name} must be on {first}'s device {input.device}, got {tensor.device}")


def check_normalizer(normalizer: float | Tensor, reduction: str) -> None:
    check("normalizer", reduction == "mean", normalizer, f"None for reduction={reduction!r}")
    if isinstance(normalizer, Tensor):
        check_tensor("normalizer", normalizer, REALS, "a number or a tensor of integers or floats")
    shape = tuple(normalizer.shape) if isinstance(normalizer, Tensor) else ()
    check("normalizer's shape", shape == (), shape, "()")


def reduction_of(reduction: str, empty: str, normalizer: float | Tensor | None) -> int:
    """The number of the op's reduction. A normalizer divides the sum."""
    check("reduction", reduction in REDUCTIONS, reduction, "'none', 'mean' or 'sum'")
    check("empty", empty in ("nan", "zero"), empty, "'nan' or 'zero'")
    if normalizer is None:
        return REDUCTIONS[reduction]
    check_normalizer(normalizer, reduction)
    return SUM


def normalized(loss: Tensor, normalizer: float | Tensor | None) -> Tensor:
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(loss.dtype)
    return loss if normalizer is None else loss / normalizer


def readable(x: Tensor) -> bool:
    """True if there are values to look at, and reading them is free (CPU) or asked for (TORCHFAST_CHECK=1)."""
    wanted = x.device.type == "cpu" or os.environ.get("TORCHFAST_CHECK") == "1"
    traced = torch.compiler.is_compiling() or type(x) is not Tensor or torch._C._are_functorch_transforms_active()
    return wanted and not traced


def check_range(target: Tensor, out_of_range: Tensor, allowed: str) -> None:
    if not readable(out_of_range) or not out_of_range.any():
        return
    value = int(target[out_of_range].flatten()[0])
    raise IndexError(f"target {value} is out of range: allowed are {allowed} and ignore_index")


def mean(loss_sum: Tensor, divisor: Tensor, empty_zero: bool) -> Tensor:
    """Divides so that a divisor of 0 gives a gradient of 0: the division that fails must not be differentiated."""
    empty = torch.zeros_like(loss_sum) if empty_zero else (loss_sum / divisor).detach()
    return torch.where(divisor == 0, empty, loss_sum / torch.where(divisor == 0, 1.0, divisor))
