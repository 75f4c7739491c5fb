"""What the launchers of all losses share: tiles, dimensions, the device."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from torchfast.losses.triton_kernels import sum_kernel

#: Threads of a warp. AMD's RDNA has 32, which makes its programs smaller, not wrong.
WARP = 64 if torch.version.hip else 32


class Tile(NamedTuple):
    M: int
    BLOCK: int
    warps: int


def tile_of(rows: int, block: int, threads: int) -> Tile:
    return Tile(rows, block, max(1, threads // WARP))


def power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def processors_of(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132  # an H100's


#: A size, and each tensor's stride.
Dimension = tuple[int, tuple[int, ...]]


def merged(shape: Sequence[int], strides: Sequence[tuple[int, ...]], most: int) -> list[Dimension] | None:
    """Merges neighbouring dimensions that all tensors can walk as one. Returns ``most``, or None if more remain."""
    if 0 in shape:  # no rows; the strides mean nothing
        strides = [(0,) * len(of) for of in strides]
    dimensions: list[Dimension] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if dimensions and all(a == b * size for a, b in zip(dimensions[-1][1], stride, strict=True)):
            dimensions[-1] = (dimensions[-1][0] * size, stride)
        else:
            dimensions.append((size, stride))
    none = (1, (0,) * len(strides[0])) if strides else (1, ())
    return [none] * (most - len(dimensions)) + dimensions if len(dimensions) <= most else None


def widened(t: Tensor, dtype: torch.dtype) -> Tensor:
    """fp8 becomes what the kernels compute in; other dtypes are read as they are."""
    return t if t.element_size() > 1 else t.to(dtype)


def parts_of(x: float, dtype: torch.dtype) -> tuple[float, ...]:
    """Splits an option into fp32 numbers whose sum it is: Triton takes what is in a tuple in fp32."""
    if dtype != torch.float64:
        return (float(x),)
    first = ctypes.c_float(x).value
    second = ctypes.c_float(x - first).value
    return first, second, x - first - second


def kernel_options(
    ignore_index: int, numbers: dict[str, float], constants: dict[str, int], dtype: torch.dtype
) -> tuple[Any, ...]:
    """Makes the options one argument of a kernel, in which they have these names. The compiler knows ``constants``:
    what is off costs nothing."""
    named = {name: parts_of(x, dtype) for name, x in numbers.items()}
    named |= {name: tl.constexpr(x) for name, x in constants.items()}
    return _named(("ignore_index", *named))(ignore_index, *named.values())


@functools.cache
def _named(names: tuple[str, ...]) -> Any:
    return collections.namedtuple("Options", names)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    module = {"cuda": torch.cuda, "xpu": torch.xpu}.get(device.type)
    return contextlib.nullcontext() if module is None else module.device(device)


def add_up(sums: Tensor, n: int, loss: Tensor, divisor: Tensor, *, mean: bool, empty_zero: bool) -> None:
    """Adds up n programs' losses and, after them, weights: writes the loss and what it was divided by."""
    block = 1024
    while True:
        programs = max(1, -(-n // (8 * block)))
        last = programs == 1
        out = loss if last else sums.new_empty(2 * programs)
        flags = {"MEAN": mean, "EMPTY_ZERO": empty_zero, "LAST": last}
        sum_kernel[(programs,)](sums, out, divisor, n, **flags, BLOCK=block, num_warps=4)
        if last:
            return
        sums, n = out, programs
