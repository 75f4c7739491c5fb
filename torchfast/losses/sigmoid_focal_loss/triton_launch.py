"""Launches the Triton kernels: how the arguments become tiles and strides. The kernels: triton_kernels.py.

Nothing here looks at a tensor's data, so nothing waits for the device and all of it can be captured in a CUDA
graph. Only TORCHFAST_CHECK=1 looks, at the targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchfast._common import MEAN, NONE, accumulate_dtype
from torchfast._env import flag
from torchfast.losses.sigmoid_focal_loss.options import Options
from torchfast.losses.sigmoid_focal_loss.reference import fake, is_index, read_integers
from torchfast.losses.sigmoid_focal_loss.triton_kernels import (
    BOOL,
    INDEX,
    INTEGER,
    SOFT,
    backward_kernel,
    forward_kernel,
)
from torchfast.losses.triton_launch import (
    MANY,
    Dimension,
    Launch,
    Tile,
    add_up,
    kept,
    kernel_options,
    merged,
    on_device,
    power_of_2,
    sum_launches,
    tile_of,
    widened,
)


def tile(rows: int, columns: int, itemsize: int, vec: int) -> Tile:
    """Gives each of 128 threads two vectors of 16 bytes, or one where each element needs an address of its own."""
    each = 32 if vec > 1 else 16
    elements = 128 * (each // itemsize)
    block = min(max(2, power_of_2(columns)), elements)
    rows = max(1, min(elements // block, power_of_2(rows)))
    return tile_of(rows, block, min(128, rows * block * itemsize // each))


def _readable(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Gives the tensor a dtype that the kernels read."""
    if t is None:
        return None
    if t.dtype == torch.bool:
        return t.view(torch.uint8)
    if t.dtype in (torch.uint16, torch.uint32, torch.uint64):
        return t.long()
    return widened(t, dtype) if t.is_floating_point() else t


def readable(logits: Tensor, target: Tensor, *factors_and_options: Any) -> tuple[int, list[Tensor | None]]:
    """Gives the kind of target; target, weight, pos_weight and mask as the kernels read them."""
    *factors, mask, options = factors_and_options
    if target.dtype == torch.bool:
        kind = BOOL
    elif target.is_floating_point():
        kind = SOFT
    else:
        kind = INDEX if is_index(logits, target) else INTEGER
        if flag("TORCHFAST_CHECK"):
            read_integers(logits, target, mask, options.ignore_index)
    return kind.value, [_readable(t, accumulate_dtype(logits)) for t in (target, *factors, mask)]


def dimensions_of(tensors: list[Tensor | None], index: bool) -> list[Dimension] | None:
    """Returns three dimensions in the order of memory, with each tensor's strides and at last that of the class; None
    if there are more, which do not merge."""
    logits, out = tensors[:2]
    assert logits is not None
    order = logits if out is None else out
    dims = sorted(range(order.dim()), key=order.stride, reverse=True)
    strides = []
    for d in dims:
        of_class = int(index and d == order.dim() - 1)
        strides.append((*(0 if t is None else t.stride(d) for t in tensors), of_class))
    if not dims:
        return [(1, (0,) * (len(tensors) + 1))] * 3
    return merged([order.shape[d] for d in dims], strides, 3)


def launch_of(
    kernel: Any,
    kind: int,
    logits: Tensor,
    out: Tensor | None,
    read: Sequence[Tensor | None],
    upstream: Tensor | None,
    options: Options,
) -> Launch | None:
    """What forward and backward have in common: the arguments as the kernels want them. None if more than three
    dimensions do not merge.

    ``out`` has the logits' shape: the loss, or the gradient; None for a reduced loss. Backward has ``upstream``, which
    is one number for a reduced loss.
    """
    each = options.reduction == NONE
    tensors = [logits, out, *read, upstream if each else None]
    if kind == INDEX.value and read[0] is not None:
        tensors[2] = read[0].unsqueeze(-1).expand(logits.shape)
    dimensions = dimensions_of(tensors, kind == INDEX.value)
    if dimensions is None:
        return None
    (outer, outer_strides), (inner, inner_strides), (columns, column_strides) = dimensions
    strides = list(zip(outer_strides, inner_strides, column_strides, strict=True))
    class_strides = [of[-1] for _, of in dimensions]
    axis = next((k for k, stride in enumerate(class_strides) if stride), 3)  # 3: a class has no neighbours

    vec = 16 // logits.element_size()
    present = [(t, of) for t, of in zip(tensors, strides, strict=False) if t is not None]
    aligned = columns % vec == 0 and strides[0][2] == 1 and all(of[2] in (0, 1) for _, of in present)
    whole = [(t, of) for t, of in present if of[2]]
    aligned = aligned and all(t.data_ptr() % 16 == 0 and of[0] % vec == of[1] % vec == 0 for t, of in whole)
    vec = vec if aligned else 1
    # What no element can equal is told apart from what an element would be rounded to.
    wide = read[0] is not None and read[0].dtype in (torch.int32, torch.int64)
    ignore_index = options.ignore_index if wide or abs(options.ignore_index) < 2**15 else -(2**31)
    gamma, gamma_neg, clip, smoothing = options.gamma, options.gamma_neg, options.clip, options.label_smoothing
    choices = kernel_options(
        ignore_index,
        {
            "keep": 1.0 - smoothing,
            "half": smoothing / 2,
            "positive": options.alpha if options.alpha >= 0 else 1.0,
            "negative": 1.0 - options.alpha if options.alpha >= 0 else 1.0,
            "gamma": gamma,
            "gamma_neg": gamma_neg,
            "clip": clip,
        },
        {
            "ONE_PART": kind != SOFT.value and smoothing == 0 and clip == 0 and gamma == gamma_neg,
            "POWER": int(gamma) if gamma in range(5) else 5,
            "POWER_NEG": int(gamma_neg) if gamma_neg in range(5) else 5,
            "CLIPPED": clip != 0,
        },
        accumulate_dtype(logits),
    )
    # Few rows, or columns of one row, share a kernel with many, where they fill but one program.
    rows, long = inner if outer > 1 else MANY, inner == 1 and kind != INDEX.value
    m, block, warps = tile(rows, MANY if long else columns, logits.element_size(), vec)
    constants = {
        "KIND": kind,
        "CLASS_AXIS": axis,
        "REDUCE": not each,
        "M": m,
        "BLOCK": block,
        "VEC": vec,
        "BY_ROW": tuple(t is not None and of[2] == 0 for t, of in zip(tensors[2:], strides[2:], strict=False)),
    }
    programs = outer * -(-inner // m) * -(-columns // block)
    classes = logits.shape[-1] if logits.dim() else 1
    return Launch(kernel, programs, (tuple(strides[:7]), inner, columns, classes, choices), constants, warps)


class ForwardPlan(NamedTuple):
    launch: Launch
    sums: int
    """So many numbers are added up to the loss."""
    totals: list[Launch]


@kept
def forward_plan(
    logits: Tensor, kind: int, out: Tensor | None, options: Options, *read: Tensor | None
) -> ForwardPlan | None:
    launch = launch_of(forward_kernel, kind, logits, out, read, None, options)
    if launch is None:
        return None
    programs = launch.grid[0] if logits.numel() else 0
    mean, empty_zero = options.reduction == MEAN, options.empty_zero
    totals = sum_launches(programs, 0, mean=mean, empty_zero=empty_zero) if out is None else []
    return ForwardPlan(launch, 2 * programs, totals)


@kept
def backward_plan(
    logits: Tensor, kind: int, gradient: Tensor, grad_loss: Tensor, options: Options, *read: Tensor | None
) -> Launch | None:
    return launch_of(backward_kernel, kind, logits, gradient, read, grad_loss, options)


def sigmoid_focal_loss(logits: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    loss, divisor = fake(logits, *inputs)
    options: Options = inputs[-1]
    kind, read = readable(logits, *inputs)
    out = loss if options.reduction == NONE else None
    plan = forward_plan(logits, kind, out, options, *read)
    if plan is None:
        logits, out, *read = contiguous(logits, out, *read)
        plan = forward_plan(logits, kind, out, options, *read)
    assert plan is not None
    with on_device(logits.device):
        sums = divisor.new_empty(plan.sums) if out is None else out
        if logits.numel():
            plan.launch(logits, *read, sums, divisor)
        elif out is not None:
            divisor.fill_(1.0)
        add_up(plan.totals, sums, loss, divisor)
    if out is not None and out is not loss:
        loss.copy_(out)
    return loss, divisor


def contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.contiguous() for t in tensors]


def sigmoid_focal_loss_backward(grad_loss: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    *inputs, divisor = rest
    gradient = out = torch.empty_like(logits)
    if not logits.numel():
        return gradient
    options: Options = inputs[-1]
    kind, read = readable(logits, *inputs)
    launch = backward_plan(logits, kind, out, grad_loss, options, *read)
    if launch is None:
        logits, out, grad_loss, *read = contiguous(logits, out, grad_loss, *read)
        launch = backward_plan(logits, kind, out, grad_loss, options, *read)
    assert launch is not None
    with on_device(logits.device):
        launch(grad_loss, logits, *read, divisor, out)
    if out is not gradient:
        gradient.copy_(out)
    return gradient
