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
    processors_of,
    sum_launches,
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


def readable(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    alpha: Tensor | None,
    sample_weight: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gives target, weight, weight * alpha and sample_weight as the kernels read them."""
    acc, classes = accumulate_dtype(logits), logits.shape[class_dim(logits)]
    if target.is_floating_point():
        target = widened(target, acc)
    else:
        if target.dtype in (torch.uint16, torch.uint32, torch.uint64):
            target = target.long()
        target = target.contiguous()
        if flag("TORCHFAST_CHECK"):
            wide = target.long()  # 156 as uint8 must not be taken for -100
            given = wide != options.ignore_index
            check_range(wide, given & ((wide < 0) | (wide >= classes)), f"0 to {classes - 1}")
    if alpha is not None and alpha.numel() == 1:
        alpha = alpha.reshape(1).expand(classes)
    either = weight if alpha is None else alpha
    wa = None if either is None else widened(either, acc)
    if weight is not None and alpha is not None:
        wa = weight.to(acc) * alpha.to(acc)
    weight = None if weight is None else widened(weight, acc).contiguous()
    return target, weight, wa, None if sample_weight is None else widened(sample_weight, acc).contiguous()


def large(gradient: Tensor | None, logits: Tensor, target: Tensor) -> list[Tensor]:
    """Lists logits, probabilities and gradient; what is not there, the logits stand for."""
    return [logits, target if target.is_floating_point() else logits, logits if gradient is None else gradient]


def dimensions_of(tensors: list[Tensor]) -> list[Dimension] | None:
    """Gives two dimensions of rows, or None if there are more, which do not merge."""
    first, dim = tensors[0], class_dim(tensors[0])
    rows = [d for d in range(first.dim()) if d != dim]
    if not rows:
        return [(1, (0,) * len(tensors))] * 2
    return merged([first.shape[d] for d in rows], [tuple(t.stride(d) for t in tensors) for d in rows], 2)


class Call:
    """What the plans of forward and backward have in common: the arguments as the kernels want them."""

    def __init__(
        self,
        tensors: list[Tensor],
        dimensions: list[Dimension],
        target: Tensor,
        wa: Tensor | None,
        options: Options,
    ) -> None:
        logits = tensors[0]
        dim = class_dim(logits)
        self.classes = classes = logits.shape[dim]
        self.rows = logits.numel() // classes
        self.processors = processors_of(logits.device)
        (self.outer, outer_strides), (self.inner, inner_strides) = dimensions
        class_strides = [t.stride(dim) for t in tensors]
        self.strides = list(zip(outer_strides, inner_strides, class_strides, strict=True))

        row, cls = inner_strides[0], class_strides[0]
        self.classes_minor = self.inner == 1 or not 0 < row < cls
        minor = [c if self.classes_minor else r for _, r, c in self.strides]
        major = [s for o, r, c in self.strides for s in (o, r if self.classes_minor else c)]
        length = classes if self.classes_minor else self.inner
        vec = 16 // logits.element_size()
        aligned = all(t.data_ptr() % 16 == 0 for t in tensors)
        aligned = aligned and all(s == 1 for s in minor) and all(n % vec == 0 for n in (*major, length))
        self.vec = vec if aligned else 1

        self.wa_stride = 0 if wa is None else wa.stride(0)
        keep, uniform = 1.0 - options.label_smoothing, options.label_smoothing / classes
        prob = target.is_floating_point()
        self.dense, self.focal = prob or uniform != 0, options.gamma != 0
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
                "PROB": prob,
                "DENSE": self.dense,
                "FOCAL": 2 if options.gamma == 2 else int(self.focal),
                "Z": options.z_loss != 0,
                "CAPPED": options.softcap != 0,
                "SCALED": options.logit_scale != 1,
            },
            accumulate_dtype(logits),
        )
        self.flags = {"VEC": self.vec, "CLASSES_MINOR": self.classes_minor}
        many_temporaries = options.softcap != 0 or (self.dense and self.focal)
        itemsize = logits.element_size()
        # Few rows share a kernel with many, where they fill but one program.
        inner = MANY if self.outer == 1 and self.classes_minor else self.inner
        self.shape = Shape(classes, inner, self.classes_minor, itemsize, self.vec, many_temporaries)

    def row_blocks(self, rows: int) -> int:
        """Programs of so many rows each."""
        return self.outer * -(-self.inner // rows)


class ForwardPlan(NamedTuple):
    stages: list[Launch]
    partials: int
    """So many numbers are kept between the stages."""
    sums: int
    """So many numbers are added up to the loss."""
    totals: list[Launch]


@kept
def forward_plan(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    wa: Tensor | None,
    sample_weight: Tensor | None,
    options: Options,
) -> ForwardPlan | None:
    tensors = large(None, logits, target)
    dimensions = dimensions_of(tensors)
    if dimensions is None:
        return None
    call, reduce = Call(tensors, dimensions, target, wa, options), options.reduction != NONE
    tile = forward_tile(call.shape)
    blocks = -(-call.classes // tile.BLOCK)
    row_blocks = call.row_blocks(tile.M)
    splits = splits_of(row_blocks, blocks, call.processors) if call.rows else 1
    # Split rows are finished a few at a time, with the results of all their splits.
    together = max(64, power_of_2(splits)) if splits > 1 else 1
    last = tile if splits == 1 else tile_of(min(tile.M, max(1, 512 // together)), tile.BLOCK, 128)
    programs = call.row_blocks(last.M)

    def launch(stage: tl.constexpr, tile: Tile, programs: int, together: int) -> Launch:
        arguments = (call.rows, call.inner, call.classes, splits, *call.strides[:2], call.wa_stride, call.options)
        of_tile = {"M": tile.M, "BLOCK": tile.BLOCK, "SPLITS": together, "ONE_BLOCK": blocks == 1}
        constants = {**call.flags, "REDUCE": reduce, "STAGE": stage.value, **of_tile}
        return Launch(forward_kernel, programs, arguments, constants, tile.warps)

    if splits > 1:
        stages = [launch(SCAN, tile, row_blocks * splits, 1)]
        if call.dense and call.focal:  # a whole tile's rows: more splits than there are would spill
            stages.append(launch(SUM, tile, row_blocks * splits, power_of_2(splits)))
        stages.append(launch(FINISH, last, programs, together))
    else:
        stages = [launch(WHOLE, tile, programs, 1)] if call.rows else []
    partials = 5 * splits * call.rows if splits > 1 else 0
    mean, empty_zero = options.reduction == MEAN, options.empty_zero
    totals = sum_launches(programs, 3 * call.rows, mean=mean, empty_zero=empty_zero) if reduce else []
    return ForwardPlan(stages, partials, 2 * programs, totals)


def cross_entropy(logits: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    loss, residuals = fake(logits, *inputs)
    options: Options = inputs[-1]
    target, *factors = readable(logits, *inputs)
    plan = forward_plan(logits, target, *factors, options)
    if plan is None:
        logits, target = logits.contiguous(), target.contiguous()
        plan = forward_plan(logits, target, *factors, options)
    assert plan is not None
    if not plan.stages and not plan.totals:
        residuals.fill_(1.0)
    with on_device(logits.device):
        sums = residuals.new_empty(plan.sums) if plan.totals else loss
        partials = residuals.new_empty(plan.partials) if plan.partials else None
        for launch in plan.stages:
            launch(logits, target, *factors, sums, residuals, partials)
        add_up(plan.totals, sums, loss, residuals)
    return loss, residuals


@kept
def backward_plan(
    gradient: Tensor,
    grad_loss: Tensor,
    residuals: Tensor,
    logits: Tensor,
    target: Tensor,
    wa: Tensor | None,
    sample_weight: Tensor | None,
    options: Options,
) -> Launch | None:
    tensors = large(gradient, logits, target)
    dimensions = dimensions_of(tensors)
    if dimensions is None:
        return None
    call = Call(tensors, dimensions, target, wa, options)
    tile = backward_tile(call.shape)
    row_blocks = call.row_blocks(tile.M)
    blocks = -(-call.classes // tile.BLOCK)
    steps = steps_of(call.classes_minor, row_blocks, blocks, call.processors)
    sizes = (call.rows, call.inner, call.classes, steps, int(any(grad_loss.stride())))
    return Launch(
        backward_kernel,
        row_blocks * -(-blocks // steps),
        (*sizes, *call.strides, call.wa_stride, call.options),
        {**call.flags, "M": tile.M, "BLOCK": tile.BLOCK},
        tile.warps,
    )


def _backward(grad_loss: Tensor, logits: Tensor, *inputs: Any, residuals: Tensor, out: Tensor) -> None:
    if not out.numel():
        return
    options: Options = inputs[-1]
    target, _, *factors = readable(logits, *inputs)
    if any(grad_loss.stride()):
        grad_loss = grad_loss.contiguous()
    gradient = out
    launch = backward_plan(gradient, grad_loss, residuals, logits, target, *factors, options)
    if launch is None:
        gradient, logits, target = out.contiguous(), logits.contiguous(), target.contiguous()
        launch = backward_plan(gradient, grad_loss, residuals, logits, target, *factors, options)
    assert launch is not None
    with on_device(logits.device):
        launch(grad_loss, logits, target, *factors, residuals, gradient)
    if gradient is not out:
        out.copy_(gradient)


def cross_entropy_backward(grad_loss: Tensor, logits: Tensor, *inputs: Any) -> Tensor:
    gradient = torch.empty_like(logits)
    _backward(grad_loss, logits, *inputs[:-1], residuals=inputs[-1], out=gradient)
    return gradient


def cross_entropy_backward_(grad_loss: Tensor, logits: Tensor, *inputs: Any) -> None:
    _backward(grad_loss, logits, *inputs[:-1], residuals=inputs[-1], out=logits)
