"""Launches the Triton kernels: how the arguments become tiles and strides. The kernels: triton_kernels.py.

Nothing here looks at a tensor's data, so nothing waits for the device and all of it can be captured in a CUDA
graph. Only TORCHFAST_CHECK=1 looks, at the targets.
"""

from __future__ import annotations

from typing import Any

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
    Dimension,
    Tile,
    add_up,
    kernel_options,
    merged,
    on_device,
    power_of_2,
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


def _readable(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Gives the tensor a dtype that the kernels read."""
    if t.dtype == torch.bool:
        return t.view(torch.uint8)
    if t.dtype in (torch.uint16, torch.uint32, torch.uint64):
        return t.long()
    return widened(t, dtype) if t.is_floating_point() else t


class Call:
    """What forward and backward have in common: the arguments as the kernels want them.

    ``out`` has the logits' shape: the loss, or the gradient; None for a reduced loss. ``grad_loss`` is given backward.
    """

    def __init__(
        self,
        out: Tensor | None,
        grad_loss: Tensor | None,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        pos_weight: Tensor | None,
        mask: Tensor | None,
        options: Options,
    ) -> None:
        self.acc = acc = accumulate_dtype(logits)
        self.device, each = logits.device, options.reduction == NONE
        kind = INDEX if is_index(logits, target) else INTEGER
        if target.dtype == torch.bool:
            kind = BOOL
        elif target.is_floating_point():
            kind = SOFT
        elif flag("TORCHFAST_CHECK"):
            read_integers(logits, target, mask, options.ignore_index)
        if kind is INDEX:
            target = _readable(target, acc).unsqueeze(-1).expand(logits.shape)
        upstream = grad_loss if each else None
        read = [None if t is None else _readable(t, acc) for t in (target, weight, pos_weight, mask, upstream)]
        tensors = [logits, out, *read]
        dimensions = self._dimensions(tensors, kind is INDEX)
        if dimensions is None:  # more than three dimensions do not merge
            tensors = [t if t is None or (kind is INDEX and t is read[0]) else t.contiguous() for t in tensors]
            if kind is INDEX:
                tensors[2] = target[..., 0].contiguous().unsqueeze(-1).expand(logits.shape)
            dimensions = self._dimensions(tensors, kind is INDEX)
        assert dimensions is not None
        (self.outer, outer), (self.inner, inner), (self.columns, columns) = dimensions
        self.logits, self.out, *self.read, self.upstream = tensors
        strides = list(zip(outer, inner, columns, strict=True))
        axis = next((k for k, of in enumerate((outer, inner, columns)) if of[-1]), 3)  # 3: a class has no neighbours

        vec = 16 // logits.element_size()
        present = [(t, of) for t, of in zip(tensors, strides, strict=False) if t is not None]
        aligned = self.columns % vec == 0 and strides[0][2] == 1 and all(of[2] in (0, 1) for _, of in present)
        whole = [(t, of) for t, of in present if of[2]]
        aligned = aligned and all(t.data_ptr() % 16 == 0 and of[0] % vec == of[1] % vec == 0 for t, of in whole)
        self.strides = tuple(strides[:7])
        # What no element can equal is told apart from what an element would be rounded to.
        wide = self.read[0] is not None and self.read[0].dtype in (torch.int32, torch.int64)
        ignore_index = options.ignore_index if wide or abs(options.ignore_index) < 2**15 else -(2**31)
        gamma, gamma_neg, clip, smoothing = options.gamma, options.gamma_neg, options.clip, options.label_smoothing
        self.options = kernel_options(
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
                "ONE_PART": kind is not SOFT and smoothing == 0 and clip == 0 and gamma == gamma_neg,
                "POWER": int(gamma) if gamma in range(5) else 5,
                "POWER_NEG": int(gamma_neg) if gamma_neg in range(5) else 5,
                "CLIPPED": clip != 0,
            },
            acc,
        )
        self.classes = logits.shape[-1] if logits.dim() else 1
        self.flags = {
            "KIND": kind.value,
            "CLASS_AXIS": axis,
            "REDUCE": not each,
            "VEC": vec if aligned else 1,
            "BY_ROW": tuple(t is not None and of[2] == 0 for t, of in zip(tensors[2:], strides[2:], strict=False)),
        }
        self.tile = tile(self.inner, self.columns, logits.element_size(), self.flags["VEC"])
        self.programs = self.outer * -(-self.inner // self.tile.M) * -(-self.columns // self.tile.BLOCK)

    @staticmethod
    def _dimensions(tensors: list[Tensor | None], index: bool) -> list[Dimension] | None:
        """Returns three dimensions in the order of memory, with each tensor's strides and at last that of the class."""
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

    def arguments(self) -> tuple[Any, ...]:
        """The kernels' last positional arguments."""
        return (self.strides, self.inner, self.columns, self.classes, self.options)

    def constants(self) -> dict[str, Any]:
        return {**self.flags, "M": self.tile.M, "BLOCK": self.tile.BLOCK, "num_warps": self.tile.warps}


def sigmoid_focal_loss(logits: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    loss, divisor = fake(logits, *inputs)
    options: Options = inputs[-1]
    each = options.reduction == NONE
    call = Call(loss if each else None, None, logits, *inputs)
    programs = call.programs if logits.numel() else 0
    sums = torch.empty(2 * programs, dtype=call.acc, device=call.device) if call.out is None else call.out
    with on_device(call.device):
        if programs:
            forward_kernel[(programs,)](call.logits, *call.read, sums, divisor, *call.arguments(), **call.constants())
        elif each:
            divisor.fill_(1.0)
        if not each:
            mean = options.reduction == MEAN
            add_up(sums, programs, loss, divisor, mean=mean, empty_zero=options.empty_zero)
    if each and sums is not loss:
        loss.copy_(sums)
    return loss, divisor


def sigmoid_focal_loss_backward(grad_loss: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    *inputs, divisor = rest
    gradient = torch.empty_like(logits)
    if not logits.numel():
        return gradient
    call = Call(gradient, grad_loss, logits, *inputs)
    upstream = grad_loss if call.upstream is None else call.upstream
    with on_device(call.device):
        backward_kernel[(call.programs,)](
            upstream, call.logits, *call.read, divisor, call.out, *call.arguments(), **call.constants()
        )
    assert call.out is not None
    if call.out is not gradient:
        gradient.copy_(call.out)
    return gradient
