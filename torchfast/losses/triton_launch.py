"""What the launchers of all losses share: plans of calls, launches, tiles, dimensions, the device.

A launcher's Python, and Triton's search for the compiled kernel among its arguments, take longer than a small kernel.
So what they find is kept, as a plan, for the next call that is like this one.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

from torchfast.losses.triton_kernels import sum_kernel

#: Threads of a warp. AMD's RDNA has 32, which makes its programs smaller, not wrong.
WARP = 64 if torch.version.hip else 32


Found = TypeVar("Found")

#: Plans that are kept at most; each takes some kilobytes.
MOST_PLANS = 1024
_plans: dict[Hashable, Any] = {}


def kept(make: Callable[..., Found]) -> Callable[..., Found]:
    """Keeps what ``make`` returns for calls that are alike: equal options, and tensors of equal dtypes, shapes, strides
    and alignment, on one device. ``make`` must depend on nothing else of them, and what it returns must hold no
    tensor."""

    @functools.wraps(make)
    def find(*arguments: Any) -> Found:
        likeness = [
            (x.dtype, x.shape, x.stride(), x.data_ptr() % 16) if isinstance(x, Tensor) else x for x in arguments
        ]
        key = (make, arguments[0].device, *likeness)
        found = _plans.get(key)
        if found is None:
            if len(_plans) >= MOST_PLANS:
                _plans.clear()
            found = _plans[key] = make(*arguments)
        return found

    return find


def forget_plans() -> None:
    """Makes the next calls plan anew: for whoever has replaced a part of the launchers."""
    _plans.clear()


class Launch:
    """A launch of a kernel with all of its arguments but the tensors, which come first.

    The first one is an ordinary launch, of which Triton returns the compiled kernel. Further ones launch that kernel,
    on the stream that is then the current one. So all must be of tensors that Triton specialises alike, as those of a
    kept plan are; outputs are, since fresh memory is aligned. Where Triton returns nothing of the kind (its
    interpreter, a hook that compiles later), all are ordinary launches.
    """

    def __init__(
        self, kernel: Any, programs: int, arguments: Sequence[Any], constants: dict[str, Any], warps: int
    ) -> None:
        self.kernel, self.grid, self.warps = kernel, (programs, 1, 1), warps
        self.arguments, self.constants = tuple(arguments), constants
        names = kernel.arg_names[-len(constants) :]
        assert set(names) == constants.keys(), f"the last arguments are {names}, given {list(constants)}"
        self.further = (*self.arguments, *(constants[name] for name in names))
        self.compiled: Any = None

    def __call__(self, *tensors: Tensor | None) -> None:
        if self.compiled is not None:
            self.compiled[self.grid](*tensors, *self.further)
            return
        launched = self.kernel[self.grid](*tensors, *self.arguments, **self.constants, num_warps=self.warps)
        if isinstance(launched, CompiledKernel):
            self.compiled = launched


#: Rows that fill every tile.
MANY = 2**20


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
    kind = device.type
    return getattr(torch, kind).device(device) if kind in ("cuda", "xpu") else contextlib.nullcontext()


def sum_launches(n: int, at: int, *, mean: bool, empty_zero: bool) -> list[Launch]:
    """Adds up n programs' losses and, after them, weights, a level at a time; the last writes the loss, and what it was
    divided by as element ``at`` of the residuals."""
    block = 1024
    launches: list[Launch] = []
    while not launches or n > 1:
        programs = max(1, -(-n // (8 * block)))
        constants = {"LAST": programs == 1, "BLOCK": block}
        launches.append(Launch(sum_kernel, programs, (n, at, int(mean), int(empty_zero)), constants, 4))
        n = programs
    return launches


def add_up(launches: list[Launch], sums: Tensor, loss: Tensor, residuals: Tensor) -> None:
    for launch in launches:
        programs = launch.grid[0]
        out = loss if programs == 1 else sums.new_empty(2 * programs)
        launch(sums, out, residuals)
        sums = out
