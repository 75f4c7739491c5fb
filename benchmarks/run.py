"""Measures torchfast against eager torch, torch.compile and the memory system, in one run.

    python benchmarks/run.py                 everything, about ten minutes
    python benchmarks/run.py --quick         the small shapes, about a minute
    python benchmarks/run.py --only 'large/CE/.*bf16'

How: every contender's loss and gradient are compared with an fp64 truth before it is timed; the
contenders take turns (A B C A B C ...), so that a noisy neighbour slows all of them; the figure is
the median. Inputs larger than the L2 caches are read from memory anyway, smaller ones are rotated.
Freeing memory is outside the clock, for the floors as for everyone; allocating it is inside.
Only ratios within one run mean anything. Every row is appended to a CSV; ``plot.py`` draws it.
The cases are in ``cases.py``.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import datetime
import gc
import itertools
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import DTYPES, Aims, Case, Inputs, Truth, cases
from rich.console import Console
from rich.table import Table
from torch import Tensor

import torchfast
from torchfast import _native

HERE = Path(__file__).resolve().parent
CONTENDERS = ("torchfast", "eager", "torch.compile")
COLUMNS = """
    date torchfast commit dirty native torch device cpu threads load family case dtype shape contender
    what calls p20_ms p50_ms p80_ms peak_bytes ratio_to_clone loss_error grad_error note
""".split()

#: torchfast's error <= 2 x eager's own error at that dtype + this; relative to the largest truth.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
#: Peers only have to be the right formula: torch.compile adds 100k rows up with errors near 1e-4.
PEER_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}

ROTATED_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}  # several times the L2 caches
MAX_ROTATED = 16  # tiny inputs stay in the cache, as those a model has just written
SLOT_SECONDS = 1e-3  # a contender's turn: so many calls as fit, at least one
MAX_ROUNDS = 200
LARGE_ENOUGH_TO_WEIGH = 8 << 20  # bytes; the kernel counts resident pages in batches of 100s of KB
QUICK_ELEMENTS = 3 << 20

Row = dict[str, Any]
Step = Callable[..., Tensor]


# ---- One call: the clock and the memory. Everything that depends on the device is here --------


def mark(device: str) -> Any:
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def call(step: Step, inputs: Inputs, device: str) -> tuple[float, float]:
    """Seconds until the loss, and until the gradient."""
    start = mark(device)
    result = step(*inputs)
    middle = mark(device)
    if result.requires_grad:
        result.backward()
    end = mark(device)
    inputs[0].grad = None
    return seconds(start, middle), seconds(start, end)


def peak_memory(step: Step, inputs: Inputs, device: str) -> tuple[int, int] | tuple[None, None]:
    """Extra bytes at the worst moment until the loss, and until the gradient (which counts).

    On the CPU the kernel's own high-water mark of resident memory (VmHWM), which counts every
    allocator and every thread. Writing 5 to clear_refs resets it (Linux), so no process has to be
    forked: forking a process whose OpenMP threads have started is not safe. Free memory the C
    library holds is returned first, otherwise it would be reused without being seen.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    else:
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        except (OSError, AttributeError):  # not Linux, not glibc, or not allowed
            return None, None
        before, peak = _resident("VmRSS"), lambda: _resident("VmHWM")
    result = step(*inputs)
    until_loss = peak() - before
    if result.requires_grad:
        result.backward()
    until_gradient = peak() - before
    inputs[0].grad = None
    return max(0, until_loss), max(0, until_gradient)


def _resident(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def check_device(device: str) -> None:
    """The GPU kernels' place in the benchmark; the clock and the memory above know both devices."""
    if device == "cuda" and not torch.cuda.is_available():
        missing = "a GPU and its driver" if torch.version.cuda else "a torch built with CUDA"
        raise SystemExit(f"--device cuda needs {missing}; torch {torch.__version__} sees no GPU here")


# ---- One case ---------------------------------------------------------------------------------


def errors(step: Step, inputs: Inputs, truth: Truth) -> tuple[float, float]:
    loss = step(*inputs)
    loss.backward()
    gradient = truth.pick(inputs[0].grad).double()
    inputs[0].grad = None
    largest = truth.gradient.abs().max().item()
    # abs() of a NaN is not <= any tolerance, so NaN and inf fail as they should.
    return abs(loss.item() / truth.loss - 1), (gradient - truth.gradient).abs().max().item() / largest


def verify(case: Case, steps: dict[str, Step], inputs: Inputs) -> dict[str, Row]:
    """Per contender its errors, and in "note" why it is not to be timed."""
    truth = case.truth(*inputs)
    found: dict[str, Row] = {}
    eager = (0.0, 0.0)
    for name in sorted(steps, key=lambda name: name != "eager"):  # eager first, it sets our tolerance
        note, error = "", (math.nan, math.nan)
        peer = PEER_TOLERANCE[case.dtype]
        allowed = tuple(2 * e + TOLERANCE[case.dtype] for e in eager) if name == "torchfast" else (peer, peer)
        try:
            error = errors(steps[name], inputs, truth)
            if not all(e <= a for e, a in zip(error, allowed, strict=True)):
                got, limit = ("{:.1e}, {:.1e}".format(*pair) for pair in (error, allowed))
                note = f"wrong: loss and gradient errors {got}, allowed {limit}"
            elif name == "eager":
                eager = error
        except Exception as problem:  # a failing contender is a result, not the end of the run
            note = f"failed: {type(problem).__name__}: {str(problem).partition(chr(10))[0]}"[:300]
        found[name] = {"loss_error": f"{error[0]:.2e}", "grad_error": f"{error[1]:.2e}", "note": note}
    return found


def measure(case: Case, args: argparse.Namespace) -> list[Row]:
    torch.manual_seed(0)
    first = case.setup(args.device)
    copies = math.ceil(ROTATED_BYTES[args.device] / first[0].nbytes)
    inputs = [first, *(case.setup(args.device) for _ in range(min(copies, MAX_ROTATED) - 1))]

    steps = dict(case.contenders)
    if args.compile and "eager" in steps:
        torch._dynamo.reset()
        steps["torch.compile"] = torch.compile(steps["eager"], dynamic=False, fullgraph=True)
    found = verify(case, steps, first)
    into = first[0].detach().clone()
    floors = {"copy_": lambda x, *_: into.copy_(x.detach()), "clone": lambda x, *_: x.detach().clone()}
    timed = {name: step for name, step in (steps | floors).items() if not found.get(name, {}).get("note")}

    peaks = dict.fromkeys(timed, (None, None))
    if first[0].nbytes >= LARGE_ENOUGH_TO_WEIGH:
        peaks = {name: peak_memory(step, first, args.device) for name, step in timed.items()}
    samples = take_turns(timed, inputs, args)

    clone = percentiles([until_result for until_result, _ in samples["clone"]])[1]
    rows = []
    for name in steps | floors:
        base = {"contender": name, **found.get(name, {"loss_error": "", "grad_error": "", "note": ""})}
        if name not in timed:
            rows.append({**base, "what": "fwd+bwd"})  # without figures, with the reason
            continue
        for i, what in enumerate(("floor",) if name in floors else ("fwd", "fwd+bwd")):
            p20, p50, p80 = percentiles([sample[i] for sample in samples[name]])
            figures = {f"p{p}_ms": f"{1e3 * t:.5g}" for p, t in ((20, p20), (50, p50), (80, p80))}
            figures |= {"calls": len(samples[name]), "ratio_to_clone": f"{p50 / clone:.4g}"}
            rows.append({**base, "what": what, "peak_bytes": peaks[name][i], **figures})
    shape = "x".join(map(str, case.shape))
    return [{"family": case.family, "case": case.name, "dtype": DTYPES[case.dtype], "shape": shape, **r} for r in rows]


def take_turns(
    steps: dict[str, Step], inputs: list[Inputs], args: argparse.Namespace
) -> dict[str, list[tuple[float, float]]]:
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    calls = {}
    for name, step in steps.items():  # warm-up, which also says how many calls fill a turn
        first = call(step, inputs[-1], args.device)[1]
        one = min(call(step, inputs[0], args.device)[1] for _ in range(5 if first < 0.1 else 1))
        calls[name] = max(1, min(200, int(SLOT_SECONDS / one)))
    gc.collect()
    gc.disable()
    began, rounds = time.perf_counter(), 0
    while rounds < args.rounds or (rounds < MAX_ROUNDS and time.perf_counter() - began < args.budget):
        for name, step in steps.items():
            for i in range(calls[name]):
                samples[name].append(call(step, inputs[(rounds + i) % len(inputs)], args.device))
        rounds += 1
    gc.enable()
    return samples


def percentiles(values: list[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered[round(p * (len(ordered) - 1))] for p in (0.2, 0.5, 0.8)]


# ---- Where a figure comes from ----------------------------------------------------------------


def provenance(args: argparse.Namespace) -> Row:
    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", str(HERE.parent), *command], capture_output=True, text=True)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        # The results themselves do not make the measured code another one.
        dirty = bool(git("status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results"))
    except FileNotFoundError:
        commit, dirty = "", ""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "torchfast": torchfast.__version__,
        "commit": commit,
        "dirty": dirty,
        "native": _native.unavailable_reason is None,
        "torch": torch.__version__,
        "device": args.device if args.device == "cpu" else torch.cuda.get_device_name(),
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "load": f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "",
    }


def append(path: Path, rows: list[Row]) -> None:
    new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def check_csv(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size and path.open().readline().strip() != ",".join(COLUMNS):
        raise SystemExit(f"{path} has other columns than this version writes; give another file with --csv")


# ---- The table --------------------------------------------------------------------------------


def median(rows: list[Row], contender: str, what: str = "fwd+bwd") -> float | None:
    values = [float(r["p50_ms"]) for r in rows if (r["contender"], r["what"]) == (contender, what) and "p50_ms" in r]
    return values[0] if values else None


def verdict(aims: Aims, ratios: Aims) -> str:
    """Aim met; else the must of PERFORMANCE.md (half of the aim, slower than no peer); else missed."""
    below, missed = [], []
    for peer, aim, got in zip(Aims._fields, aims, ratios, strict=True):
        if aim is None or got is None:
            continue
        far = got > 2 * aim if peer == "clone" else got < max(aim / 2, 0.95)  # 5% is noise
        if far:
            missed.append(peer)
        elif got > aim if peer == "clone" else got < aim:
            below.append(peer)
    if missed:
        return f"[red]missed: {', '.join(missed)}"
    return f"[yellow]half: {', '.join(below)}" if below else "[green]met" if any(aims) else "-"


def report(console: Console, results: list[tuple[Case, list[Row]]]) -> None:
    title = "forward + backward; medians; eager and compile: how many times slower; clone: our time / clone"
    table = Table(title=title, title_justify="left")
    table.add_column("case", no_wrap=True)
    for heading in "ms", "fwd ms", "eager", "compile", "clone", "memory", "eager's", "aims":
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", min_width=14)
    notes, curve, family = [], [], None
    for case, rows in results:
        times = {name: median(rows, name) for name in CONTENDERS}
        ours, clone = times["torchfast"], median(rows, "clone", "floor")
        ratios = Aims()
        if ours:
            peers = (times["eager"], times["torch.compile"])
            ratios = Aims(*(peer and peer / ours for peer in peers), ours / clone)
        if ours and case.family == "scaling":
            curve.append((math.prod(case.shape), ours))
        if case.family != family:
            table.add_section()
        family = case.family
        table.add_row(
            case.label,
            *(f"{t:.4g}" if t else "-" for t in (ours, median(rows, "torchfast", "fwd"))),
            *(f"{r:.3g}x" if r else "-" for r in ratios),
            *(memory(rows, name, case) for name in ("torchfast", "eager")),
            " / ".join(f"{aim:g}" if aim else "-" for aim in case.aims),
            verdict(case.aims, ratios) if ours else "[red]not timed",
        )
        notes += [f"{case.label}, {r['contender']}: {r['note']}" for r in rows if r["note"]]
    console.print(table)
    console.print("aims: at least / at least / at most, of the three ratios; half: half of the aim is reached")
    console.print("memory: extra at the peak until the loss > until the gradient, in sizes of the logits")
    for (elements, before), (_, after) in itertools.pairwise(curve):
        console.print(f"{elements:>11,} elements doubled: time x {after / before:.2f}", highlight=False)
    for note in notes:
        console.print(note, style="red", markup=False)


def memory(rows: list[Row], contender: str, case: Case) -> str:
    peaks = [r.get("peak_bytes") for r in rows if r["contender"] == contender]
    size = math.prod(case.shape) * case.dtype.itemsize
    return "-" if None in peaks else " > ".join(f"{p / size:.2f}" for p in peaks)


# ---- Command line -----------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the smaller shapes, fewer repetitions")
    parser.add_argument("--only", metavar="REGEX", default="", help="cases whose family/case/shape/dtype matches")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--csv", type=Path, help="default: benchmarks/results/<device>.csv")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile")
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--budget", type=float, help="seconds of timing per case; default 5, quick 1")
    args = parser.parse_args()
    args.csv = args.csv or HERE / "results" / f"{args.device}.csv"
    args.budget = args.budget or (1.0 if args.quick else 5.0)
    args.rounds = 3 if args.quick else 5
    return args


def main() -> None:
    args = parse()
    chosen = [c for c in cases() if re.search(args.only, c.label)]
    if args.quick:
        chosen = [c for c in chosen if math.prod(c.shape) <= QUICK_ELEMENTS]
    if not chosen:
        raise SystemExit(f"no case matches --only {args.only!r}; see --list")
    if args.list:
        return print("\n".join(c.label for c in chosen))
    check_device(args.device)
    check_csv(args.csv)
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console() if os.isatty(1) else Console(width=190)
    origin = provenance(args)
    console.print(", ".join(f"{key} {value}" for key, value in origin.items()), highlight=False)
    if float(origin["load"] or 0) > 0.5:
        console.print("the machine is busy: each parallel region waits for a free core, even ratios are unreliable")
    if _native.unavailable_reason:
        console.print(f"torchfast runs on its slow reference: {_native.unavailable_reason}", style="yellow")
    results: list[tuple[Case, list[Row]]] = []
    try:
        for number, case in enumerate(chosen, 1):
            began = time.perf_counter()
            rows = measure(case, args)
            append(args.csv, [origin | row for row in rows])
            results.append((case, rows))
            took = time.perf_counter() - began
            console.print(f"{number}/{len(chosen)} {case.label}: {took:.1f} s", highlight=False)
    except KeyboardInterrupt:
        console.print("interrupted: what was measured so far")
    report(console, results)
    console.print(f"appended to {args.csv}", highlight=False)


if __name__ == "__main__":
    main()
