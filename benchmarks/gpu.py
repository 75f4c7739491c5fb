"""The GPU's part of ``run.py --device cuda``: its clock, its memory, its table; and the dry run without one.

- Times are those of ``triton.testing.do_bench``: the L2 cache is overwritten before every call, and the
  inputs rotate through more memory than any L2 holds. Contenders take turns, as on the CPU.
- "graph" is a CUDA graph of loss and gradient, over all the rotated inputs, replayed: the time without
  Python and launches, and the proof that nothing in them waits for the device. What a replay computed
  is compared with the truth before it is timed.
- The floor is ``copy_`` in the same run, which moves 2 x the logits. The loss reads them once; with the
  gradient they are read twice and written once: 3 x, though a kernel that does all at once needs 2.
- The CSV has the columns of the CPU's; bandwidths follow from the copy_ rows. Liger-Kernel: cases.py.
- The dry run takes the same path on meta tensors, which have shapes and strides but no data. Triton's
  launches are recorded, and the clock knows only bytes / bandwidth.
- Autotuning replaces the launcher's choice of a tile by each of a small grid, checks the result, and
  says what was fastest. Changing the launcher is left to the reader.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton
import triton.testing
from cases import FLOORS, PEER_TOLERANCE, TOLERANCE, Case, Inputs, Step, Truth, failure, private, timings
from overview import overview
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchfast._options import as_object
from torchfast._register import registry
from torchfast.losses.cross_entropy import triton_launch
from torchfast.losses.sigmoid_focal_loss import triton_launch as sigmoid_launch
from torchfast.losses.triton_launch import forget_plans
from torchfast.metrics.retrieval import triton_launch as retrieval_launch

try:
    from rich.console import Console
except ImportError:
    from plain import Console

MOVED = {"fwd": 1, "fwd+bwd": 3, "graph": 3, "floor": 2}  # so many times the logits' size moves at least
PEERS = ("eager", "torch.compile", "liger", "torchmetrics")
#: These say why a capture is not even tried: one that fails may leave the allocator in capture, for all that follow.
WAITS = {
    "liger": "no graph: it reads counts back to the host (.item())",
    "torchmetrics": "no graph: it takes each query in turn, on the host",
}
AIM = 0.9  # the part of the copy bandwidth that rows of at least 4k classes aim at

Run = Callable[[], Any]
Written = tuple[Tensor, Tensor | None]
"""The loss and its gradient; or a metric's values, without one."""


# ---- The GPU ----------------------------------------------------------------------------------


class Gpu:
    device = "cuda"
    rotated_bytes = 256 << 20  # H100: 50 MB of L2, B200: 126
    max_rotated = 256
    unable: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        return f"{torch.cuda.get_device_name()}, driver {_driver()}, {runtime}, Triton {triton.__version__}"

    def truth(self, case: Case, inputs: Inputs) -> Truth:
        return case.truth(*inputs)

    def remark(self, case: Case) -> str:
        return ""

    def figures(self, case: Case, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return figures(case, rows)

    def peak_memory(self, step: Step, inputs: Inputs) -> tuple[int, int] | tuple[None, None]:
        """Extra bytes at the worst moment until the loss, and until the gradient (which counts)."""
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = step(*inputs)
        until_loss = torch.cuda.max_memory_allocated() - before
        if result.requires_grad:
            result.backward()
        inputs[0].grad = None
        return until_loss, torch.cuda.max_memory_allocated() - before

    def time(self, run: Run, moved: int, milliseconds: float) -> list[float]:
        """Returns the seconds of each call. A clock without a GPU has only ``moved``, the bytes, to go by."""
        return [ms / 1e3 for ms in triton.testing.do_bench(run, milliseconds / 4, milliseconds, return_mode="all")]

    def capture(self, run: Callable[[], Written]) -> tuple[Run, Written]:
        """Returns the replay of a run, and the tensors that it writes."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        gc.collect()  # a graph has memory of its own, and a capture frees nobody else's
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):  # a capture that fails does not leave its own stream
            run()
            with torch.cuda.graph(graph, stream=stream):
                written = run()
        torch.cuda.synchronize()
        return graph.replay, written

    def take_turns(
        self, steps: dict[str, Step], inputs: list[Inputs], truth: Truth, args: argparse.Namespace
    ) -> dict[str, dict[str, list[float] | str]]:
        """Returns the seconds, or why there are none, by contender and by what was timed."""
        samples: dict[str, dict[str, list[float] | str]] = {name: {} for name in steps}
        runs = {}
        for name, step in steps.items():
            own = [private(name, each) for each in inputs]
            for what in timings(name):
                samples[name][what] = []
                runs[name, what] = rotating(step if what != "fwd+bwd" else with_gradient(step), own)
        milliseconds = 1e3 * args.budget / (args.rounds * len(runs))
        for _, ((name, what), run) in itertools.product(range(args.rounds), runs.items()):
            if isinstance(samples[name][what], list):
                try:
                    samples[name][what] += self.time(run, moved(what, inputs[0]), milliseconds)
                except Exception as problem:
                    if name in FLOORS:  # nothing to compare with
                        raise
                    samples[name][what] = failure(problem)
        for name in steps:
            if name not in FLOORS:
                samples[name]["graph"] = WAITS.get(name) or self.replay(steps[name], inputs, truth, args)
        return samples

    def replay(self, step: Step, inputs: list[Inputs], truth: Truth, args: argparse.Namespace) -> list[float] | str:
        def run() -> Written:
            for each in reversed(inputs):
                written = with_gradient(step)(*each)
            return written  # what the first inputs gave, whose truth is known

        try:
            replay, written = self.capture(run)
            for tensor in written:
                if tensor is not None:
                    tensor.zero_()
            replay()
            errors, allowed = truth.errors(*written), PEER_TOLERANCE[inputs[0][0].dtype]
            if not all(e <= allowed for e in errors):
                return f"wrong in a graph: errors {errors[0]:.1e}, {errors[1]:.1e}, allowed {allowed}"
            times = self.time(replay, len(inputs) * moved("graph", inputs[0]), 1e3 * args.budget / 10)
            return [t / len(inputs) for t in times]
        except Exception as problem:
            return "no graph: " + failure(problem)


def rotating(step: Step, inputs: list[Inputs]) -> Run:
    turn = itertools.cycle(inputs)
    return lambda: step(*next(turn))


def moved(what: str, inputs: Inputs) -> int:
    """Returns how many bytes move at least. A metric reads its inputs."""
    if inputs[0].requires_grad or what == "floor":
        return MOVED[what] * inputs[0].nbytes
    return sum(tensor.nbytes for tensor in inputs)


def with_gradient(step: Step) -> Callable[..., Written]:
    """Makes a step return its gradient, too; a metric has none."""

    def loss_and_gradient(*inputs: Any) -> Written:
        loss = step(*inputs)
        if not loss.requires_grad:
            return loss, None
        loss.backward()
        gradient, inputs[0].grad = inputs[0].grad, None
        return loss.detach(), gradient

    return loss_and_gradient


def _driver() -> str:
    if not shutil.which("nvidia-smi"):
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0] or "unknown"


# ---- No GPU -----------------------------------------------------------------------------------


class ShapeTruth:
    """Checks all that can be right or wrong about tensors without data."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def errors(self, loss: Tensor, gradient: Tensor | None) -> tuple[float, float]:
        if not self.logits.requires_grad:
            if loss.dim() != 1 or gradient is not None:
                raise ValueError(f"values of shape {tuple(loss.shape)}, gradient {gradient}, expected a value a metric")
            return 0.0, 0.0
        got, expected = ((t.shape, t.dtype, t.stride()) for t in (gradient, self.logits))
        if loss.shape != () or got != expected:
            raise ValueError(f"loss of shape {tuple(loss.shape)}, gradient {got}, expected a scalar and {expected}")
        return 0.0, 0.0


class DryRun(Gpu):
    device = "meta"
    max_rotated = 2
    unable = ("liger", "torchmetrics")  # these contenders read data back

    def __init__(self, bandwidth: float) -> None:
        self.bandwidth = bandwidth
        self.launches: dict[str, None] = {}  # each one once, in order

    @property
    def name(self) -> str:
        return f"none: a dry run, where a time is bytes / {self.bandwidth:g} GB/s"

    def truth(self, case: Case, inputs: Inputs) -> Any:
        self.launches.clear()
        return ShapeTruth(inputs[0])

    def remark(self, case: Case) -> str:
        floor = f"moves {case.moved:,} bytes, {case.moved / self.bandwidth / 1e6:.4g} ms at {self.bandwidth:g} GB/s"
        return "\n    ".join([floor, *self.launches])

    def peak_memory(self, step: Step, inputs: Inputs) -> tuple[None, None]:
        return None, None

    def time(self, run: Run, moved: int, milliseconds: float) -> list[float]:
        run()
        return [moved / self.bandwidth / 1e9]

    def capture(self, run: Callable[[], Written]) -> tuple[Run, Written]:
        return run, run()

    def take_turns(self, *args: Any) -> dict[str, dict[str, list[float] | str]]:
        """Peers ran too, but how many bytes they move is not known."""
        samples = super().take_turns(*args)
        return {name: timed for name, timed in samples.items() if name not in PEERS}

    def record(self, kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **constants: Any) -> None:
        known = kernel.signature.parameters
        kernel.signature.bind(*args, **{name: value for name, value in constants.items() if name in known})
        rows, block, warps = (constants.pop(name, 1) for name in ("M", "BLOCK", "num_warps"))
        flags = (name if value is True else f"{name}={value}" for name, value in constants.items() if value)
        tile = f"tile {rows} x {block}, {warps} warps"
        self.launches[f"{kernel.fn.__name__}: grid {grid[0]}, {tile}, {' '.join(flags)}"] = None


class ToTheLaunchers(TorchDispatchMode):
    """The dispatcher gives only a GPU's tensors to the Triton launchers; here it gives them meta tensors."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.name().partition("::")[2] if op.namespace == "torchfast" else ""
        if name in ("retrieval_scores", "retrieval_counts"):
            op = getattr(retrieval_launch, name)
        elif name.startswith(("cross_entropy", "sigmoid")):  # the ranking metrics' kernels are CUDA's
            of = registry["sigmoid_focal_loss" if name.startswith("sigmoid") else "cross_entropy"]
            launcher = getattr(sigmoid_launch if name.startswith("sigmoid") else triton_launch, name)
            op = as_object(launcher, of.options, of.tensors + (name != of.name))
        return op(*args, **(kwargs or {}))


@contextlib.contextmanager
def machine(args: argparse.Namespace) -> Iterator[Gpu]:
    if not args.dry_run:
        yield Gpu()
        return
    dry = DryRun(args.bandwidth)

    def run(kernel: Any, *args: Any, **options: Any) -> None:
        dry.record(kernel, *args, **options)

    with mock.patch.object(triton.runtime.JITFunction, "run", run), ToTheLaunchers():
        yield dry


# ---- The table --------------------------------------------------------------------------------


def figures(case: Case, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Makes a line of the table, with None for what was not measured, and for each peer how many times slower it is."""
    times = {(r["contender"], r["what"]): float(r["p50_ms"]) for r in rows if "p50_ms" in r}
    copied = MOVED["floor"] * case.elements * case.dtype.itemsize / times["copy_", "floor"] / 1e6
    found = {"case": case.label, "fwd_ms": times.get(("torchfast", "fwd")), "copy_gb_per_s": copied}
    for what, suffix in ("fwd+bwd", ""), ("graph", "_in_graph"):
        ours = times.get(("torchfast", what))
        achieved = case.moved / ours / 1e6 if ours else None
        found |= {
            f"ms{suffix}": ours,
            f"gb_per_s{suffix}": achieved,
            f"of_copy{suffix}": achieved and achieved / copied,
            f"times_slower{suffix}": {p: times[p, what] / ours for p in PEERS if ours and (p, what) in times},
        }
    return found | {"notes": [f"{r['contender']}: {r['note']}" for r in rows if r["note"]]}


def report(console: Console, results: list[tuple[Case, list[dict[str, Any]]]]) -> None:
    shown, notes = [], []
    for case, rows in results:
        found = figures(case, rows)
        shown.append((case, cells(case, found)))
        notes += [f"{case.label}, {note}" for note in found["notes"]]
    console.print("Medians. Peers: how many times slower than torchfast, forward + backward")
    headings = ("fwd ms\nfwd+bwd ms\ngraph ms", "GB/s\ncopy_ GB/s\nof copy_", "\n".join(PEERS))
    console.print(overview(headings, shown), soft_wrap=False)
    console.print(
        f"aim: {AIM:g} of the copy bandwidth for rows of 4k classes and more; must: none is faster, in a graph or not"
    )
    for note in dict.fromkeys(notes):
        console.print(note, style="red", markup=False)


def cells(case: Case, found: dict[str, Any]) -> list[str]:
    def text(value: float | None, unit: str = "") -> str:
        return f"{value:.4g}{unit}" if value else "-"

    of_copy, slower = found["of_copy"], found["times_slower"]
    columns = (
        [text(found[name]) for name in ("fwd_ms", "ms", "ms_in_graph")],
        [text(found["gb_per_s"]), text(found["copy_gb_per_s"]), f"{of_copy:.2f}" if of_copy else "-"],
        [text(slower.get(peer), "x") for peer in PEERS],
    )
    return [*map("\n".join, columns), verdict(case, found)]


def verdict(case: Case, found: dict[str, Any]) -> str:
    """Judges what a loop in Python sees, where the host's time counts, and what a graph does, the kernels alone."""
    if found["of_copy"] is None:
        return "[red]not timed"
    if found["of_copy_in_graph"] is None:
        return "[red]no graph"
    each = [("", found["times_slower"]), (" in a graph", found["times_slower_in_graph"])]
    if not each[0][1]:
        return "-"
    if slower := [peer + where for where, of in each for peer, ratio in of.items() if ratio < 0.95]:  # 5% is noise
        return f"[red]slower: {', '.join(slower)}"
    if case.shape[1] < 4096 or case.bytes_read:  # a metric sorts, and has no aim yet
        return "-"
    if found["of_copy"] >= AIM:
        return "[green]met"
    return f"[yellow]{'met in a graph' if found['of_copy_in_graph'] >= AIM else f'below {AIM:g}'}"


# ---- Other tiles ------------------------------------------------------------------------------


def autotune(chosen: list[Case], args: argparse.Namespace, machine: Gpu, set_up: Callable[..., list[Inputs]]) -> None:
    """Prints for each case and direction the launcher's tile and the fastest of the others."""
    console = Console(width=160, highlight=False)
    for case in chosen:
        if case.family == "sigmoid" or case.bytes_read:  # elementwise: one tile for all; a metric: one, or CUDA
            continue
        inputs = set_up(case, machine)
        truth = machine.truth(case, inputs[0])
        console.print(f"{case.label}: ms of the forward, of forward + backward")
        for name, what in ("forward_tile", "fwd"), ("backward_tile", "fwd+bwd"):
            console.print(f"    {name}: {best_tile(name, what, case, inputs, truth, machine, 1e3 * args.budget / 40)}")


def best_tile(
    name: str, what: str, case: Case, inputs: list[Inputs], truth: Truth, machine: Gpu, milliseconds: float
) -> str:
    forget_plans()  # of the last case's tiles
    step = case.contenders["torchfast"]
    run = rotating(step if what == "fwd" else with_gradient(step), inputs)
    limits = [2 * error + TOLERANCE[case.dtype] for error in truth.errors(*with_gradient(step)(*inputs[0]))]

    def median(tile: Any) -> float:
        with mock.patch.object(triton_launch, name, lambda *_: tile):
            forget_plans()
            errors = truth.errors(*with_gradient(step)(*inputs[0]))
            if not all(e <= limit for e, limit in zip(errors, limits, strict=True)):
                raise ValueError(f"wrong: errors {errors[0]:.1e}, {errors[1]:.1e}")
            return 1e3 * statistics.median(machine.time(run, moved(what, inputs[0]), milliseconds))

    own = launchers_tile(name, step, inputs[0])
    medians, failures = {}, []
    for tile in [own, *candidates(own, case.shape[1])]:
        try:
            medians[tile] = median(tile)
        except Exception as problem:
            failures.append(f"{tile} {failure(problem)}")
    best = min(medians, key=medians.__getitem__)
    ours, theirs = median(own), median(best)  # again: the fastest of many was lucky too
    line = f"{own} {ours:.4g} ms; best of {len(medians)}: {best} {theirs:.4g} ms, {ours / theirs:.2f}x"
    return "\n        ".join([line, *failures])


def launchers_tile(name: str, step: Step, inputs: Inputs) -> Any:
    seen: list[Any] = []
    choose = getattr(triton_launch, name)
    forget_plans()
    with mock.patch.object(triton_launch, name, lambda *sizes: seen.append(choose(*sizes)) or seen[-1]):
        with_gradient(step)(*inputs)
    return seen[0]


def candidates(own: Any, classes: int) -> list[Any]:
    """Other elements a thread, warps, and rows; blocks at most 4 times as long or short, or as the row."""
    found = {}
    for each, warps, rows in itertools.product((4, 8, 16, 32), (1, 2, 4, 8, 16), (own.M // 2, own.M, own.M * 2)):
        block = each * 32 * warps // rows if rows else 0
        if own.BLOCK // 4 <= block <= own.BLOCK * 4 and 0 < block < 2 * classes:
            found[own._replace(M=rows, BLOCK=block, warps=warps)] = None
    found.pop(own, None)
    return list(found)
