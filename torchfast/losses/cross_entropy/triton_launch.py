"""Launches the Triton kernels: how the arguments become tiles and strides. The kernels: triton_kernels.py.

Nothing here looks at a tensor's data, so nothing waits for the device and all of it can be captured in a CUDA
graph. Only TORCHFAST_CHECK=1 looks, at the targets.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from torchfast._common import MEAN, NONE, accumulate_dtype, check_range
from torchfast._env import flag
from torchfast.losses.cross_entropy.options import Options
from torchfast.losses.cross_entropy.reference import class_dim, fake
from torchfast.losses.cross_entropy.triton_kernels import (
    FINISH,
    SCAN,
    SUM,
    WHOLE,
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
    processors_of,
    tile_of,
    widened,
)


class Shape(NamedTuple):
    """What tiles depend on."""

    classes: int
    inner: int
    classes_minor: bool
    itemsize: int
    vec: int
    many_temporaries: bool

    @property
    def each(self) -> int:
        """Elements of a thread: 16 are enough loads in flight, and do not spill with the sums of each. They are half as
        many where the formula needs many temporaries (softcap's tanh, a focal loss over all classes), a quarter in
        fp64."""
        return 16 // (2 if self.many_temporaries else 1) // (4 if self.itemsize == 8 else 1)


def forward_tile(shape: Shape) -> Tile:
    """Rows that fill up to 512 threads stay in registers; longer ones are walked in blocks of half of that.

    Along positions a thread owns vectors of positions, so that it sums over its classes alone.
    """
    if not shape.classes_minor:
        return _positions_tile(shape, at_least=2)
    in_registers = shape.classes <= 512 * shape.each
    return _rows_tile(max(2, power_of_2(shape.classes)) if in_registers else 256 * shape.each, shape)


def backward_tile(shape: Shape) -> Tile:
    """Differs from the forward's in that nothing is summed over the row, so that blocks can be shorter."""
    if not shape.classes_minor:
        return _positions_tile(shape, at_least=1)
    return _rows_tile(min(power_of_2(shape.classes), 128 * shape.each), shape)


def _rows_tile(block: int, shape: Shape) -> Tile:
    """Gives 128 threads work. A thread owns elements of at most 4 rows, because a row's numbers cost registers."""
    at_once = max(1, 128 * min(shape.vec, block) // block)  # rows that 128 threads own at a time
    rows = max(1, min(128 * shape.each // block, 4 * at_once, power_of_2(shape.inner)))
    threads = rows * block // shape.each
    return tile_of(rows, block, max(threads, 32 * rows // at_once if rows > 4 else 0))


def _positions_tile(shape: Shape, at_least: int) -> Tile:
    """Gives each of 128 threads a vector of positions, or half of one where that makes too many elements."""
    vector = max(1, min(16 // shape.itemsize, shape.each // at_least))
    positions = min(128 * vector, power_of_2(shape.inner))
    block = min(max(at_least, power_of_2(shape.classes)), max(at_least, 128 * shape.each // positions))
    return tile_of(positions, block, positions * block // shape.each)


def steps_of(classes_minor: bool, row_blocks: int, blocks: int, processors: int) -> int:
    """Blocks of a backward program: some share what is loaded for their rows, if enough programs remain."""
    steps = min(blocks, 4 if classes_minor else 16)
    return steps if row_blocks * -(-blocks // steps) >= 8 * processors else 1


def splits_of(programs: int, blocks: int, processors: int) -> int:
    """A row is split over so many programs: two a processor, and none without work."""
    splits = max(1, min(blocks, 2 * processors // programs))
    return -(-blocks // -(-blocks // splits))


class Call:
    """What forward and backward have in common: the arguments as the kernels want them."""

    def __init__(
        self,
        gradient: Tensor | None,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        alpha: Tensor | None,
        sample_weight: Tensor | None,
        options: Options,
    ) -> None:
        self.acc = accumulate_dtype(logits)
        dim = class_dim(logits)
        self.classes = classes = logits.shape[dim]
        self.rows = logits.numel() // classes
        self.prob = target.is_floating_point()
        self.device = logits.device
        if not self.prob:
            if target.dtype in (torch.uint16, torch.uint32, torch.uint64):
                target = target.long()
            target = target.contiguous()
            if flag("TORCHFAST_CHECK"):
                wide = target.long()  # 156 as uint8 must not be taken for -100
                given = wide != options.ignore_index
                check_range(wide, given & ((wide < 0) | (wide >= classes)), f"0 to {classes - 1}")
        else:
            target = widened(target, self.acc)

        large = [logits, target if self.prob else logits, logits if gradient is None else gradient]
        sizes = [size for d, size in enumerate(logits.shape) if d != dim]
        dimensions = self._layout(large, sizes, dim)
        if dimensions is None:  # more than two dimensions of rows do not merge
            large = [t.contiguous() for t in large]
            dimensions = self._layout(large, sizes, dim)
        assert dimensions is not None
        (outer, outer_strides), (self.inner, inner_strides) = dimensions
        self.outer = outer
        class_strides = [t.stride(dim) for t in large]
        self.strides = list(zip(outer_strides, inner_strides, class_strides, strict=True))
        self.logits, probabilities, self.gradient = large
        self.target = probabilities if self.prob else target

        row, cls = inner_strides[0], class_strides[0]
        self.classes_minor = self.inner == 1 or not 0 < row < cls
        minor = [c if self.classes_minor else r for _, r, c in self.strides]
        major = [s for o, r, c in self.strides for s in (o, r if self.classes_minor else c)]
        length = classes if self.classes_minor else self.inner
        vec = 16 // logits.element_size()
        aligned = all(t.data_ptr() % 16 == 0 for t in large)
        aligned = aligned and all(s == 1 for s in minor) and all(n % vec == 0 for n in (*major, length))
        self.vec = vec if aligned else 1

        if alpha is not None and alpha.numel() == 1:
            alpha = alpha.reshape(1).expand(classes)
        self.weight = None if weight is None else widened(weight, self.acc).contiguous()
        if weight is None or alpha is None:
            either = weight if alpha is None else alpha
            self.wa = None if either is None else widened(either, self.acc)
        else:
            self.wa = weight.to(self.acc) * alpha.to(self.acc)
        self.wa_stride = 0 if self.wa is None else self.wa.stride(0)
        self.sample_weight = None if sample_weight is None else widened(sample_weight, self.acc).contiguous()
        keep, uniform = 1.0 - options.label_smoothing, options.label_smoothing / classes
        self.dense, self.focal = self.prob or uniform != 0, options.gamma != 0
        self.options = kernel_options(
            options.ignore_index,
            {
                "keep": keep,
                "uniform": uniform,
                "gamma": options.gamma,
                "z_loss": options.z_loss,
                "softcap": options.softcap or 1.0,
                "logit_scale": options.logit_scale,
            },
            {
                "PROB": self.prob,
                "DENSE": self.dense,
                "FOCAL": 2 if options.gamma == 2 else int(self.focal),
                "Z": options.z_loss != 0,
                "CAPPED": options.softcap != 0,
                "SCALED": options.logit_scale != 1,
            },
            self.acc,
        )
        self.flags = {"VEC": self.vec, "CLASSES_MINOR": self.classes_minor}
        many_temporaries = options.softcap != 0 or (self.dense and self.focal)
        itemsize = logits.element_size()
        self.shape = Shape(classes, self.inner, self.classes_minor, itemsize, self.vec, many_temporaries)

    def row_blocks(self, rows: int) -> int:
        """Programs of so many rows each."""
        return self.outer * -(-self.inner // rows)

    @staticmethod
    def _layout(large: list[Tensor], sizes: list[int], dim: int) -> list[Dimension] | None:
        strides = [tuple(t.stride(d) for t in large) for d in range(large[0].dim()) if d != dim]
        if not strides:
            return [(1, (0,) * len(large))] * 2
        return merged(sizes, strides, 2)


def cross_entropy(*inputs: Any) -> tuple[Tensor, Tensor]:
    call, options = Call(None, *inputs), inputs[-1]
    loss, residuals = fake(*inputs)
    reduce = options.reduction != NONE
    if not call.rows and not reduce:
        residuals.fill_(1.0)
        return loss, residuals
    tile = forward_tile(call.shape)
    blocks = -(-call.classes // tile.BLOCK)
    row_blocks = call.row_blocks(tile.M)
    splits = splits_of(row_blocks, blocks, processors_of(call.device)) if call.rows else 1
    # Split rows are finished a few at a time, with the results of all their splits.
    last = tile if splits == 1 else tile_of(min(tile.M, max(1, 512 // power_of_2(splits))), tile.BLOCK, 128)
    programs = call.row_blocks(last.M)
    sums = torch.empty(2 * programs, dtype=call.acc, device=call.device) if reduce else loss

    def launch(stage: tl.constexpr, tile: Tile, programs: int, partials: Tensor | None) -> None:
        forward_kernel[(programs,)](
            call.logits,
            call.target,
            call.weight,
            call.wa,
            call.sample_weight,
            sums,
            residuals,
            partials,
            call.rows,
            call.inner,
            call.classes,
            splits,
            *call.strides[:2],
            call.wa_stride,
            call.options,
            **call.flags,
            REDUCE=reduce,
            STAGE=stage.value,
            M=tile.M,
            BLOCK=tile.BLOCK,
            SPLITS=power_of_2(splits),
            ONE_BLOCK=blocks == 1,
            num_warps=tile.warps,
        )

    with on_device(call.device):
        if splits > 1:
            partials = torch.empty(5 * splits * call.rows, dtype=call.acc, device=call.device)
            launch(SCAN, tile, row_blocks * splits, partials)
            if call.dense and call.focal:
                launch(SUM, tile, row_blocks * splits, partials)
            launch(FINISH, last, programs, partials)
        elif call.rows:
            launch(WHOLE, tile, programs, None)
        if reduce:
            divisor = residuals[3 * call.rows :]
            mean = options.reduction == MEAN
            add_up(sums, programs, loss, divisor, mean=mean, empty_zero=options.empty_zero)
    return loss, residuals


def _backward(grad_loss: Tensor, *inputs: Any, residuals: Tensor, out: Tensor) -> None:
    if not out.numel():
        return
    call = Call(out, *inputs)
    tile = backward_tile(call.shape)
    row_blocks = call.row_blocks(tile.M)
    blocks = -(-call.classes // tile.BLOCK)
    steps = steps_of(call.classes_minor, row_blocks, blocks, processors_of(call.device))
    if any(grad_loss.stride()):
        grad_loss = grad_loss.contiguous()
    with on_device(call.device):
        backward_kernel[(row_blocks * -(-blocks // steps),)](
            grad_loss,
            call.logits,
            call.target,
            call.wa,
            call.sample_weight,
            residuals,
            call.gradient,
            call.rows,
            call.inner,
            call.classes,
            steps,
            int(any(grad_loss.stride())),
            *call.strides,
            call.wa_stride,
            call.options,
            **call.flags,
            M=tile.M,
            BLOCK=tile.BLOCK,
            num_warps=tile.warps,
        )
    if call.gradient is not out:
        out.copy_(call.gradient)


def cross_entropy_backward(grad_loss: Tensor, logits: Tensor, *inputs: Any) -> Tensor:
    gradient = torch.empty_like(logits)
    _backward(grad_loss, logits, *inputs[:-1], residuals=inputs[-1], out=gradient)
    return gradient


def cross_entropy_backward_(grad_loss: Tensor, logits: Tensor, *inputs: Any) -> None:
    _backward(grad_loss, logits, *inputs[:-1], residuals=inputs[-1], out=logits)
