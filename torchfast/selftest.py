"""Checks the kernels that are active on this machine: ``python -m torchfast.selftest [--device cuda] [--json]``.

Every op runs on each of its sample inputs, on every device that torch sees and in every dtype: the loss, its
gradients, and the gradient written over the input; of a metric, what its kernels return. The truth is the op's plain
PyTorch reference, differentiated by autograd, in fp64 on the CPU, from the same inputs.

An error is given as a multiple of what rounding explains, element by element: 64 roundings of the element's size, in
the dtype that sums are computed in, and for a half-precision value one rounding of its own; where products of matrices
are rounded to half precision on the way, 8 roundings of the size to it. So above 1 a kernel is wrong. The size of a
loss or a gradient is its absolute value, and how much it moves where each input x moves by 1 + |x|: where large terms
cancel, as in p - q, the result has their roundings, and its value alone says nothing of these.
NaN or inf where the truth has none, the converse, a wrong shape or dtype, and an exception are failures too.

Exits 1 if anything failed. On a GPU the first run compiles the kernels, which takes most of its time.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from torchfast import _triton
from torchfast._register import Metric, Op, Sample, metrics, registry
from torchfast.info import _guard, _kernel, report

__all__ = ["Row", "available_devices", "check", "checked", "errors"]

ROUNDINGS = 64
ROUNDINGS_OF_PRODUCTS = 8
STEP = 2.0**-20
"""Inputs move by so much of 1 + |x|: less, and fp64's roundings of the truth would count; more, and its curvature."""
MOVES = 4
HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32, torch.float64)
SHOWN = 5  # failures of a row that the table shows


# ---- One sample: its loss and gradients, by the kernels and by the reference -----------------


def _upstream(loss: Tensor) -> Tensor:
    """Makes uneven upstream gradients, so that a gradient of another row shows."""
    return torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device).reshape(loss.shape)


def _active(op: Op, sample: Sample, *, inplace: bool = False) -> list[Tensor]:
    """Gives the loss and the gradients by the kernels that the dispatcher holds for the sample's device."""
    inputs, function = op.partial(sample)
    leaves = [x.detach().requires_grad_() for x in inputs]
    loss = function(leaves[0].clone(), *leaves[1:], inplace_backward=True) if inplace else function(*leaves)
    return [t.detach().cpu() for t in (loss, *torch.autograd.grad(loss, leaves, _upstream(loss)))]


def _wide(inputs: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.cpu().double() if t.is_floating_point() else t.cpu(), inputs)


def _truth(op: Op, sample: Sample, move: Callable[[Tensor], Tensor] = lambda x: x) -> list[Tensor]:
    """Gives the loss and the gradients by the reference, which serves the public function inside of ``torch.func``."""
    inputs, function = op.partial(Sample(*_wide((sample.args, sample.kwargs))))

    def total(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        loss = function(*inputs)
        return (loss * _upstream(loss)).sum(), loss

    gradients, loss = torch.func.grad(total, tuple(range(len(inputs))), has_aux=True)(*map(move, inputs))
    return [loss, *gradients]


def _sizes(op: Op, sample: Sample, truth: list[Tensor]) -> list[Tensor]:
    """How large the numbers are that each value is made of. Rounding x moves it by a part of |x|, and rounding exp(x)
    moves x by a part of 1. In one move up and down at random effects may cancel; the largest of several counts."""
    generator = torch.Generator().manual_seed(0)

    def move(x: Tensor) -> Tensor:
        sign = 2.0 * torch.randint(2, x.shape, generator=generator) - 1
        return torch.where(x.isfinite(), x + STEP * sign * (1 + x.abs()), x)

    moves = [_truth(op, sample, move) for _ in range(MOVES)]
    each = ((true, [(moved - true).abs() for moved in of]) for true, *of in zip(truth, *moves, strict=True))
    return [true.abs() + torch.stack(of).amax(0).nan_to_num(0, 0, 0) / STEP for true, of in each]


class Recorder(TorchDispatchMode):
    """Records the kernels that are called, of metrics and of losses' forwards, with their inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Op | Metric, Sequence[Any], Sequence[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple) else (result,)
        self.calls += [(metric, args, outputs) for metric in metrics.values() if metric.op is func]
        self.calls += [(op, args, result) for op in registry.values() if op.forward is func]
        return result


def _with_loss(op: Op, sample: Sample) -> Tensor | None:
    """Gives the gradient that is computed with the loss, as on the CPU; None where it is not, or where the loss is
    divided later."""
    if op.with_gradient is None or not sample.args[0].is_cpu:
        return None
    with Recorder() as recorder, torch.no_grad():
        divided = op.function(*sample.args, **sample.kwargs)
    _, inputs, (loss, *_) = recorder.calls[-1]
    if loss.dim() or divided.data_ptr() != loss.data_ptr():
        return None
    return op.with_gradient(*inputs, _upstream(loss).item())[-1].cpu()


# ---- Their difference ------------------------------------------------------------------------


def errors(actual: Tensor, truth: Tensor, size: Tensor | None = None, products: torch.dtype | None = None) -> Tensor:
    """The error of each element, as a multiple of what rounding explains: above 1 is wrong.

    Args:
        actual: values in the dtype that they were computed in, any shape.
        truth: float64, the shape of ``actual``.
        size: float64, that shape: how large the numbers are that each element is computed from. Default: as the truth,
            as if nothing cancelled.
        products: the dtype of products of matrices that the values are computed from, if there are any.

    Raises:
        RuntimeError: the shapes differ and cannot be broadcast.

    Example:
        >>> import torch
        >>> from torchfast.selftest import errors
        >>> truth = torch.tensor([1.0, 1e-6, torch.nan], dtype=torch.float64)
        >>> errors(torch.tensor([1.0, 1.000001e-6, torch.nan]), truth) < 1
        tensor([True, True, True])
        >>> errors(torch.tensor([1.0, 1.1e-6, 0.0]), truth) > 1
        tensor([False,  True,  True])
    """
    size = truth.abs() if size is None else size
    accumulated = torch.float64 if actual.dtype == torch.float64 else torch.float32
    allowed = ROUNDINGS * torch.finfo(accumulated).eps * size
    if products in HALF:
        allowed = allowed + ROUNDINGS_OF_PRODUCTS * torch.finfo(products).eps * size
    if actual.dtype in HALF:
        own = torch.finfo(actual.dtype)
        allowed = allowed + own.eps * (truth.abs() + own.smallest_normal)
    same = (actual == truth) | (actual.isnan() & truth.isnan())
    return torch.where(same, 0.0, (actual - truth).abs() / allowed).nan_to_num(nan=torch.inf, posinf=torch.inf)


def _compare(
    name: str, actual: Tensor, truth: Tensor, size: Tensor, dtype: torch.dtype, products: torch.dtype | None = None
) -> tuple[float, str | None]:
    """The largest error, and what is wrong."""
    if (actual.shape, actual.dtype) != (truth.shape, dtype):
        given = f"{name} is {actual.dtype} of shape {tuple(actual.shape)}"
        return torch.inf, f"{given}, should be {dtype} of shape {tuple(truth.shape)}"
    if not truth.numel():
        return 0.0, None
    error = errors(actual, truth, size, products)
    wrong, largest = int((error > 1).sum()), error.max().item()
    if not wrong:
        return largest, None
    worst = tuple((error == largest).nonzero()[0].tolist())
    values = f"{actual[worst].item():.7g}, should be {truth[worst].item():.7g}"
    return largest, f"{name}{[*worst] or ''} is {values}; {wrong} of {error.numel()} wrong"


def _size_of_sums(truth: Tensor, terms: int) -> Tensor:
    """The truth of a metric is rounded in fp64 itself: in sums of so many terms, whose roundings grow with the root of
    their number, and in the rest of a mean, which is but one rounding of the largest value."""
    if not truth.numel():
        return truth
    return truth.abs() * math.sqrt(terms) + truth.nan_to_num(0, 0, 0).abs().max() / ROUNDINGS


def _metric_comparisons(metric: Metric, sample: Sample) -> Iterator[tuple[float, str | None]]:
    assert metric.function is not None
    problem: Exception | None = None
    with Recorder() as recorder:
        try:
            metric.function(*sample.args, **sample.kwargs)
        except Exception as error:  # it may come from a kernel's wrong output, which is then the thing to report
            problem = error
    for called, inputs, outputs in recorder.calls:
        names = [output.name for output in called.op._schema.returns]
        terms = max(x.numel() for x in inputs if isinstance(x, Tensor))
        for name, output, truth in zip(names, outputs, called.reference(*_wide(inputs)), strict=True):
            truth = truth.double()
            yield _compare(
                f"{called.name}'s {name}", output.cpu().double(), truth, _size_of_sums(truth, terms), torch.float64
            )
    if problem:
        raise problem


def _comparisons(op: Op | Metric, sample: Sample) -> Iterator[tuple[float, str | None]]:
    if isinstance(op, Metric):
        yield from _metric_comparisons(op, sample)
        return
    dtype = sample.args[0].dtype
    dtypes = (torch.float32 if dtype in HALF else dtype, *[dtype] * op.differentiable)
    others = [argument.name for argument in op.forward._schema.arguments[1 : op.differentiable]]
    names = ["loss", "gradient", *(f"gradient of {name}" for name in others)]
    truth, products = _truth(op, sample), dtype if op.around else None
    sizes = _sizes(op, sample, truth)
    for each in zip(names, _active(op, sample), truth, sizes, dtypes, strict=False):
        yield _compare(*each, products)
    if (gradient := _with_loss(op, sample)) is not None:
        yield _compare("gradient with the loss", gradient, truth[1], sizes[1], dtype)
    if op.inplace:
        yield _compare("gradient in place", _active(op, sample, inplace=True)[1], truth[1], sizes[1], dtype)


# ---- One row of the table: all samples of an op ----------------------------------------------


@dataclass
class Row:
    """What one op gave on one device in one dtype.

    Args:
        op, device, kernel, dtype: what was checked; ``kernel`` is ``"native"``, ``"triton"`` or ``"reference"``.
        samples: the number of calls.
        max_error: the largest error, as of :func:`errors`: above 1 is wrong, inf where a sample raised.
        failures: what is wrong, one line each.
    """

    op: str
    device: str
    kernel: str
    dtype: str
    samples: int = 0
    max_error: float = 0.0
    failures: list[str] = field(default_factory=list)

    def fail(self, what: str, error: Exception) -> None:
        """Adds an exception."""
        self.max_error = math.inf
        self.failures.append(f"{what}: {type(error).__name__}: {error}")


def check(op: Op | Metric, device: str, dtype: torch.dtype) -> Row:
    """Compares every sample of an op with the truth. What a sample raises is a failure of that sample.

    Args:
        op: one of :func:`checked`.
        device: ``"cpu"``, or another of :func:`available_devices`.
        dtype: of the samples' logits or scores: float16, bfloat16, float32 or float64. Other shapes and dtypes are the
            samples' own.

    Raises:
        RuntimeError: ``device`` names no kind of device that torch knows.

    Example:
        >>> import torch
        >>> from torchfast.selftest import check, registry
        >>> row = check(registry["cross_entropy"], "cpu", torch.float32)
        >>> row.max_error < 1, row.failures
        (True, [])
    """
    key = torch.device(device).type.upper()
    row = Row(op.name, device, _kernel(op.name, key), str(dtype).removeprefix("torch."))
    try:
        large = not _triton.interpreted()  # Triton's interpreter takes minutes for these
        samples = list(op.sample_inputs(device, dtype, large=large))
        if not samples:
            raise ValueError("there are none, so nothing was checked")
    except Exception as error:
        row.fail("sample inputs", error)
        return row
    for sample in samples:
        try:
            for largest, failure in _comparisons(op, sample):
                row.max_error = max(row.max_error, largest)
                if failure:
                    row.failures.append(f"sample {row.samples}: {failure}")
        except Exception as error:
            row.fail(f"sample {row.samples}", error)
        row.samples += 1
    return row


# ---- The table -------------------------------------------------------------------------------


def checked() -> dict[str, Op | Metric]:
    """The losses, and the metrics that are no part of others, by name.

    Example:
        >>> from torchfast.selftest import checked
        >>> "cross_entropy" in checked(), "ranking_metrics" in checked()
        (True, True)
    """
    return {**registry, **{name: metric for name, metric in metrics.items() if metric.function}}


def available_devices() -> list[str]:
    """What torch sees here.

    Example:
        >>> from torchfast.selftest import available_devices
        >>> available_devices()[0]
        'cpu'
    """
    return ["cpu", *(name for name in ("cuda", "xpu") if _guard(getattr(torch, name).is_available) is True)]


def _device(name: str) -> str:
    try:
        known = torch.device(name).type in available_devices()
    except RuntimeError:
        known = False
    if not known:
        raise argparse.ArgumentTypeError(f"torch sees {', '.join(available_devices())} here, not {name!r}")
    return name


def _dtypes(device: str) -> tuple[torch.dtype, ...]:
    """Some of Intel's GPUs have no fp64."""
    if torch.device(device).type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        return DTYPES[:-1]
    return DTYPES


def _print_table(rows: Iterator[Row]) -> Iterator[Row]:
    """Passes the rows on, each printed as soon as it is there: compiling for a GPU takes a while."""
    width = max(map(len, ("op", *checked())))
    here = report()
    print(", ".join(f"{name} {version}" for name, version in here["versions"].items()))
    print("; ".join(f"{name}: {what}" for name, what in here["devices"].items()))
    print("max error: the largest difference from fp64, as a multiple of what rounding explains; above 1 fails")
    print(f"{'op':{width}}  device  kernel     dtype     samples  max error  verdict")
    for row in rows:
        verdict = "FAIL" if row.failures else "ok"
        print(
            f"{row.op:{width}}  {row.device:6}  {row.kernel:9}  {row.dtype:8}  {row.samples:7}  "
            f"{row.max_error:9.3g}  {verdict}",
            flush=True,
        )
        yield row


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m torchfast.selftest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=_device, action="append", help="check only this one; may be repeated")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    devices = options.device or available_devices()
    ops = checked().values()
    found = (check(op, device, dtype) for device in devices for op in ops for dtype in _dtypes(device))
    rows = list(found if options.json else _print_table(found))
    failed = [row for row in rows if row.failures]
    if options.json:
        finite = [asdict(row) | {"max_error": row.max_error if math.isfinite(row.max_error) else None} for row in rows]
        print(json.dumps({"passed": not failed, "rows": finite}, indent=2))
        return bool(failed)
    for row in failed:
        print(f"\n{row.op}, {row.device}, {row.dtype}: {len(row.failures)} failures")
        print(*(f"  {failure}" for failure in row.failures[:SHOWN]), sep="\n")
        if len(row.failures) > SHOWN:
            print(f"  and {len(row.failures) - SHOWN} more: --json shows all")
    if failed:
        print(f"\n{len(failed)} of {len(rows)} rows failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
