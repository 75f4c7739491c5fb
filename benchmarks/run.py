"""Measures torchfast against eager torch, torch.compile and the memory system, in one run.

    python benchmarks/run.py                 everything, about ten minutes
    python benchmarks/run.py --quick         the small shapes, about a minute
    python benchmarks/run.py --only 'large/CE/.*bf16'
    python benchmarks/run.py --only linear   with the head of a language model, half an hour more
    python benchmarks/run.py --kept-memory   the same with memory that malloc keeps, as a user could have it
    python benchmarks/run.py --device cuda   the GPU's cases, about half an hour; see gpu.py
    python benchmarks/run.py --dry-run       the same without a GPU: launches, bytes, floors; no clock but the host's

How: every contender's loss and gradient are compared with an fp64 truth before it is timed; the
contenders take turns (A B C A B C ...), so that a noisy neighbour slows all of them; the figure is
the median. Inputs larger than the L2 caches are read from memory anyway, smaller ones are rotated.
Freeing memory is outside the clock, for the floors as for everyone; allocating it is inside. The floor of a loss is
copying the logits into memory that is there: one read, one write.
Only ratios within one run mean anything. Every row is appended to a CSV; ``plot.py`` draws it.
The cases are in ``cases.py``, ``linear.py``, ``ranking.py``, ``classification.py`` and ``retrieval.py``. A metric has
no gradient: both its times are of the call.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import datetime
import gc
import itertools
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from cases import (
    DTYPES,
    FLOORS,
    PEER_TOLERANCE,
    TOLERANCE,
    Aims,
    Case,
    Inputs,
    Step,
    Truth,
    cases,
    failure,
    forget_gradients,
    gpu_cases,
    private,
    timings,
)
from classification import classification_cases
from linear import linear_cases
from overview import overview
from ranking import gpu_ranking_cases, ranking_cases
from retrieval import gpu_retrieval_cases, retrieval_cases

import torchfast
from torchfast import _native, _triton
from torchfast._env import flag

try:
    from rich.console import Console
except ImportError:
    from plain import Console

if TYPE_CHECKING:
    from gpu import Gpu

HERE = Path(__file__).resolve().parent
CONTENDERS = ("torchfast", "eager", "torch.compile")
COLUMNS = """
    date torchfast commit dirty native torch device cpu threads memory load family case dtype shape contender
    what calls p20_ms p50_ms p80_ms peak_bytes ratio_to_copy loss_error grad_error note
""".split()

SLOT_SECONDS = 1e-3  # a contender's turn has as many calls as fit, at least one
#: With these glibc's malloc keeps what is freed, so that no output has page faults from its second time on.
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}

MAX_ROUNDS = 200
ENOUGH_SECONDS = 300  # a case has no further round after them
LARGE_ENOUGH_TO_WEIGH = 8 << 20  # in bytes; the kernel counts resident pages in batches of 100s of KB
QUICK_ELEMENTS = {"cpu": 3 << 20, "cuda": 20_000_000}

Row = dict[str, Any]
Samples = dict[str, dict[str, list[float] | str]]
"""The seconds, or why there are none, by contender and by what was timed."""


# ---- The CPU: its clock and its memory. The GPU's are in gpu.py, and have the same methods --------


class Cpu:
    device = name = "cpu"
    rotated_bytes = 32 << 20  # several times the L2 caches
    max_rotated = 16  # tiny inputs stay in the cache, as those a model has just written
    unable: tuple[str, ...] = ()
    """Contenders that cannot run here."""

    def truth(self, case: Case, inputs: Inputs) -> Truth:
        return case.truth(*inputs)

    def remark(self, case: Case) -> str:
        return ""

    def peak_memory(self, step: Step, inputs: Inputs) -> tuple[int, int] | tuple[None, None]:
        """Extra bytes at the worst moment until the loss, and until the gradient (which counts).

        The kernel's own high-water mark of resident memory (VmHWM), which counts every allocator and
        every thread. Writing 5 to clear_refs resets it (Linux), so no process has to be forked:
        forking a process whose OpenMP threads have started is not safe. Free memory the C library
        holds is returned first, otherwise it would be reused without being seen.
        """
        if inputs[0].nbytes < LARGE_ENOUGH_TO_WEIGH:
            return None, None
        gc.collect()
        torchfast.empty_cache()
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        except (OSError, AttributeError):  # not Linux, not glibc, or not allowed
            return None, None
        before = _resident("VmRSS")
        result = step(*inputs)
        until_loss = _resident("VmHWM") - before
        if result.requires_grad:
            result.backward()
        until_gradient = _resident("VmHWM") - before
        forget_gradients(inputs)
        return max(0, until_loss), max(0, until_gradient)

    def take_turns(self, steps: dict[str, Step], inputs: list[Inputs], _: Truth, args: argparse.Namespace) -> Samples:
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        calls = {}
        for name, step in steps.items():  # warm-up, which also says how many calls fill a turn
            first = call(step, inputs[-1])[1]
            one = first if first > 1 else min(call(step, inputs[0])[1] for _ in range(5 if first < 0.1 else 1))
            calls[name] = max(1, min(200, int(SLOT_SECONDS / one)))
        gc.collect()
        gc.disable()
        began, rounds = time.perf_counter(), 0
        while (past := time.perf_counter() - began) < args.budget or rounds < args.rounds:
            if rounds == MAX_ROUNDS or (rounds and past > ENOUGH_SECONDS):
                break
            for name, step in steps.items():
                for i in range(calls[name]):
                    samples[name].append(call(step, inputs[(rounds + i) % len(inputs)]))
            rounds += 1
        gc.enable()
        return {name: {what: [t[i] for t in samples[name]] for i, what in enumerate(timings(name))} for name in steps}


def call(step: Step, inputs: Inputs) -> tuple[float, float]:
    """Seconds until the loss, and until the gradient."""
    start = time.perf_counter()
    result = step(*inputs)
    middle = time.perf_counter()
    if result.requires_grad:
        result.backward()
    end = time.perf_counter()
    forget_gradients(inputs)
    return middle - start, end - start


def _resident(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def check_gpu(dry_run: bool) -> None:
    if not dry_run and not torch.cuda.is_available():
        missing = "a GPU and its driver" if torch.version.cuda or torch.version.hip else "a torch built with CUDA"
        sees = f"torch {torch.__version__} sees no GPU here"
        raise SystemExit(f"--device cuda needs {missing}; {sees} (--dry-run needs none)")
    if reason := _triton.unavailable_reason():
        raise SystemExit(f"the GPU's benchmark needs Triton: {reason}")
    if flag("TRITON_INTERPRET"):
        raise SystemExit("the GPU's benchmark needs Triton's compiler; unset TRITON_INTERPRET")


# ---- One case ---------------------------------------------------------------------------------


def errors(name: str, step: Step, inputs: Inputs, truth: Truth) -> tuple[float, float]:
    inputs = private(name, inputs)
    loss = step(*inputs)
    if loss.requires_grad:
        loss.backward()
    gradient = inputs[0].grad
    forget_gradients(inputs)
    return truth.errors(loss, gradient)


def verify(case: Case, steps: dict[str, Step], inputs: Inputs, truth: Truth) -> dict[str, Row]:
    """Returns for each contender its errors, and in "note" why it is not to be timed."""
    found: dict[str, Row] = {}
    eager = (0.0, 0.0)
    for name in sorted(steps, key=lambda name: name != "eager"):  # eager comes first, since it sets our tolerance
        note, error = "", (math.nan, math.nan)
        peer = PEER_TOLERANCE[case.dtype]
        allowed = tuple(2 * e + TOLERANCE[case.dtype] for e in eager) if name == "torchfast" else (peer, peer)
        try:
            error = errors(name, steps[name], inputs, truth)
            if not all(e <= a for e, a in zip(error, allowed, strict=True)):
                got, limit = ("{:.1e}, {:.1e}".format(*pair) for pair in (error, allowed))
                note = f"wrong: loss and gradient errors {got}, allowed {limit}"
            elif name == "eager":
                eager = error
        except Exception as problem:
            note = failure(problem)
        found[name] = {"loss_error": f"{error[0]:.2e}", "grad_error": f"{error[1]:.2e}", "note": note}
    return found


def set_up(case: Case, machine: Cpu | Gpu) -> list[Inputs]:
    torch.manual_seed(0)
    first = case.setup(machine.device)
    copies = min(math.ceil(machine.rotated_bytes / first[0].nbytes), machine.max_rotated)
    return [first, *(case.setup(machine.device) for _ in range(copies - 1))]


def measure(case: Case, args: argparse.Namespace, machine: Cpu | Gpu) -> list[Row]:
    inputs = set_up(case, machine)
    first = inputs[0]
    steps = {name: step for name, step in case.contenders.items() if name not in machine.unable}
    if args.compile and "eager" in steps:
        torch._dynamo.reset()
        steps["torch.compile"] = torch.compile(steps["eager"], dynamic=False, fullgraph=True)
    truth = machine.truth(case, first)
    found = verify(case, steps, first, truth)
    into = first[0].detach().clone()
    floors = {"copy_": lambda x, *_: into.copy_(x.detach()), "clone": lambda x, *_: x.detach().clone()}
    floors |= case.floors
    timed = {name: step for name, step in (steps | floors).items() if not found.get(name, {}).get("note")}

    peaks = {name: machine.peak_memory(step, private(name, first)) for name, step in timed.items()}
    samples = machine.take_turns(timed, inputs, truth, args)

    copy = percentiles(samples["copy_"]["floor"])[1]
    rows = []
    for name in steps | floors:
        base = {"contender": name, **found.get(name, {"loss_error": "", "grad_error": "", "note": ""})}
        if name not in timed:
            rows.append({**base, "what": "fwd+bwd"})  # the row has no figures, but the reason
            continue
        peak = dict(zip(timings(name), peaks[name], strict=False))
        for what, times in samples.get(name, {}).items():
            if isinstance(times, str):
                rows.append({**base, "what": what, "note": times})
                continue
            p20, p50, p80 = percentiles(times)
            figures = {f"p{p}_ms": f"{1e3 * t:.5g}" for p, t in ((20, p20), (50, p50), (80, p80))}
            figures |= {"calls": len(times), "ratio_to_copy": f"{p50 / copy:.4g}"}
            rows.append({**base, "what": what, "peak_bytes": peak.get(what), **figures})
    shape = "x".join(map(str, case.shape))
    return [{"family": case.family, "case": case.name, "dtype": DTYPES[case.dtype], "shape": shape, **r} for r in rows]


def percentiles(values: list[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered[round(p * (len(ordered) - 1))] for p in (0.2, 0.5, 0.8)]


# ---- Where a figure comes from ----------------------------------------------------------------


def provenance(machine: Cpu | Gpu) -> Row:
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
        "native": machine.device != "cpu" or _native.unavailable_reason is None,  # a GPU's are Triton's
        "torch": torch.__version__,
        "device": machine.name,
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "memory": "kept" if KEPT_MEMORY.items() <= os.environ.items() else "system",
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
        far = got > 2 * aim if peer in FLOORS else got < max(aim / 2, min(aim, 0.95))  # 5% is noise
        if far:
            missed.append(peer)
        elif got > aim if peer in FLOORS else got < aim:
            below.append(peer)
    if missed:
        return f"[red]missed: {', '.join(missed)}"
    return f"[yellow]half: {', '.join(below)}" if below else "[green]met" if any(aims) else "-"


def report(console: Console, results: list[tuple[Case, list[Row]]]) -> None:
    shown: list[tuple[Case, list[str]]] = []
    notes, others = [], []
    curves: dict[str, list[tuple[int, float]]] = {}
    for case, rows in results:
        times = {name: median(rows, name) for name in CONTENDERS}
        ours = times["torchfast"]
        floors = [median(rows, name, "floor") for name in ("copy_", "read", "mm")]
        ratios = Aims()
        if ours:
            peers = (times["eager"], times["torch.compile"])
            ratios = Aims(*(peer and peer / ours for peer in peers), *(floor and ours / floor for floor in floors))
            others += [
                f"{case.label}: {name} {t:.4g} ms, {t / ours:.3g} times ours"
                for name in (*case.contenders, "sort", "argmax")
                if name not in CONTENDERS and (t := median(rows, name, timings(name)[-1]))
            ]
        if ours and case.family == "scaling":
            curves.setdefault(case.name, []).append((math.prod(case.shape), ours))
        compared = [f"{r:.3g}x" if r else "-" for r in ratios]
        aims = [f"{aim:g}" if aim else "-" for aim in case.aims]
        cells = (
            [f"{t:.4g}" if t else "-" for t in (ours, median(rows, "torchfast", "fwd"))],
            compared[:2],
            compared[2:],
            [memory(rows, name, case) for name in ("torchfast", "eager")],
            [" / ".join(aims[:2]), " / ".join(aims[2:])],
        )
        shown.append((case, [*map("\n".join, cells), verdict(case.aims, ratios) if ours else "[red]not timed"]))
        notes += [f"{case.label}, {r['contender']}: {r['note']}" for r in rows if r["note"]]
    console.print(
        "Forward + backward: medians. eager, compile: how many times slower; copy, read, mm: our time / theirs"
    )
    headings = ("ms\nfwd ms", "eager\ncompile", "copy\nread\nmm", "memory\neager's", "aims")
    console.print(overview(headings, shown), soft_wrap=False)
    console.print("aims: at least of eager / compile; at most of copy / read / mm; half: half of the aim is reached")
    console.print("memory: extra at the peak until the loss > until the gradient, in sizes of the logits")
    for name, curve in curves.items():
        steps = (f"{n:,}: x{after / before:.2f}" for (n, before), (_, after) in itertools.pairwise(curve))
        console.print(f"{name}: time after doubling so many elements: {', '.join(steps)}", highlight=False)
    for line in others:
        console.print(line, highlight=False, markup=False)
    for note in notes:
        console.print(note, style="red", markup=False)


def memory(rows: list[Row], contender: str, case: Case) -> str:
    peaks = [r.get("peak_bytes") for r in rows if r["contender"] == contender]
    size = case.elements * case.dtype.itemsize
    return "-" if None in peaks else " > ".join(f"{p / size:.2f}" for p in peaks)


# ---- Command line -----------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the smaller shapes, fewer repetitions")
    parser.add_argument("--only", metavar="REGEX", default="", help="cases whose family/case/shape/dtype matches")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--csv", type=Path, help="default: benchmarks/results/<device>.csv")
    parser.add_argument("--kept-memory", action="store_true", help="malloc keeps the memory that is freed (glibc)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile")
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--budget", type=float, help="seconds of timing per case; default 3, quick 1")
    parser.add_argument("--rounds", type=int, help="turns of each contender, at least; default 5, quick 3")
    gpu = parser.add_argument_group("of the GPU's benchmark")
    gpu.add_argument("--dry-run", action="store_true", help="all but the GPU: what would run, on tensors without data")
    gpu.add_argument("--bandwidth", type=float, default=3350, help="GB/s that a dry run assumes; default an H100's")
    gpu.add_argument("--figures", type=Path, help="append each case's line of the table to this file, as JSON")
    gpu.add_argument("--autotune", action="store_true", help="other tiles against the launcher's; changes nothing")
    args = parser.parse_args()
    if args.dry_run:
        args.device, args.compile = "cuda", False
    if (args.autotune or args.figures) and args.device == "cpu":
        parser.error("--autotune and --figures need --device cuda or --dry-run")
    args.csv = args.csv or HERE / "results" / f"{args.device}.csv"
    args.budget = args.budget or (1.0 if args.quick else 3.0)
    args.rounds = 1 if args.dry_run else args.rounds or (3 if args.quick else 5)
    return args


def cpu_cases() -> tuple[Case, ...]:
    return (*cases(), *linear_cases(), *ranking_cases(), *classification_cases(), *retrieval_cases())


def main() -> None:
    args = parse()
    if args.kept_memory and not KEPT_MEMORY.items() <= os.environ.items():  # malloc reads them when it starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEPT_MEMORY)
    of_device = (*gpu_cases(), *gpu_ranking_cases(), *gpu_retrieval_cases()) if args.device == "cuda" else cpu_cases()
    chosen = [c for c in of_device if re.search(args.only, c.label)]
    if args.quick:
        chosen = [c for c in chosen if c.elements <= QUICK_ELEMENTS[args.device] and not c.slow]
    if not chosen:
        raise SystemExit(f"no case matches --only {args.only!r}; see --list")
    if args.list:
        return print("\n".join(c.label for c in chosen))
    if not args.only:
        chosen = [c for c in chosen if not c.if_asked]
    if args.device == "cpu":
        return run(chosen, args, Cpu(), report)
    check_gpu(args.dry_run)
    import gpu  # this imports Triton, too, which takes a second

    with gpu.machine(args) as machine:
        if args.autotune:
            return gpu.autotune(chosen, args, machine, set_up)
        run(chosen, args, machine, gpu.report)
    if args.dry_run and not args.only:
        subprocess.run([sys.executable, str(HERE / "host.py")], check=True)


def run(chosen: list[Case], args: argparse.Namespace, machine: Cpu | Gpu, show: Any) -> None:
    if not args.dry_run:
        check_csv(args.csv)
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console(soft_wrap=True)
    origin = provenance(machine)
    console.print(", ".join(f"{key} {value}" for key, value in origin.items()), highlight=False)
    if args.device == "cpu" and float(origin["load"] or 0) > 0.5:
        console.print("the machine is busy: each parallel region waits for a free core, even ratios are unreliable")
    if args.device == "cpu" and _native.unavailable_reason:
        console.print(f"torchfast runs on its slow reference: {_native.unavailable_reason}", style="yellow")
    results: list[tuple[Case, list[Row]]] = []
    try:
        for number, case in enumerate(chosen, 1):
            began = time.perf_counter()
            try:
                rows = measure(case, args, machine)
            except torch.OutOfMemoryError as problem:
                console.print(f"{number}/{len(chosen)} {case.label}: {failure(problem)}", style="red", markup=False)
                continue
            if not args.dry_run:
                append(args.csv, [origin | row for row in rows])
            if args.figures:
                with args.figures.open("a") as file:
                    print(json.dumps(machine.figures(case, rows)), file=file)
            results.append((case, rows))
            said = machine.remark(case) or f"{time.perf_counter() - began:.1f} s"
            console.print(f"{number}/{len(chosen)} {case.label}: {said}", highlight=False, markup=False)
    except KeyboardInterrupt:
        console.print("interrupted: what was measured so far")
    finally:
        show(console, results)
    console.print("dry run: no CSV written" if args.dry_run else f"appended to {args.csv}", highlight=False)
    if args.dry_run and any(row["note"] for _, rows in results for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
