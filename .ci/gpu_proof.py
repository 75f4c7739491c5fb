"""The whole proof on a GPU that is borrowed for minutes: ``.ci/gpu --out FOLDER [--seconds 480]``.

It needs a checkout, a Python with torch, and a GPU: nothing is installed, nothing comes over a network. It builds in
place, for this GPU alone, and then spends the given seconds on the STEPS below, in order of value. Each has a limit of
its own, at which it is stopped; what it found until then is written, and the next one runs. What a step needs and is
not here is named, and the step left out. Children run a check at a time (gpu_report.py's Lines), so that one which
crashes or hangs costs itself alone.

In the folder: summary.txt (one screen), info.json, selftest.json, streams.json, tests.xml (JUnit), benchmark.csv,
benchmark.jsonl, and log.txt with the benchmark's table and what the tools said. A warm TRITON_CACHE_DIR is used.

``--dry-run`` takes every step without a GPU: on the CPU, in Triton's interpreter, at the smallest sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_children import HERE, STALL, Proof, Result, alive, bounded, crew, stop
from gpu_report import Lines, Outcome, junit, last_line, of_benchmark, of_results, results, summary

SECONDS = 480  # what the limits of STEPS are made for

RANKING = ("metrics/test_ranking", "metrics/test_metric_ops", "metrics/test_ranking_module")
CONTRACT = (
    *("losses/test_ops", "losses/test_cross_entropy", "losses/test_sigmoid_focal_loss"),
    *("losses/test_linear_cross_entropy", "metrics/test_classification", "metrics/test_regression"),
    *("metrics/test_classification_module", "test_selftest", "test_dtypes", "test_no_data"),
    *("losses/test_with_gradient", "test_streams"),
    *("metrics/test_retrieval_ops", "metrics/test_retrieval", "metrics/test_retrieval_forms"),
)
NEEDED = {  # tests need these beyond pytest and hypothesis
    "sklearn": ("metrics/test_classification", "metrics/test_regression"),
    "scipy": ("metrics/test_retrieval",),
    "torchmetrics": (
        "metrics/test_ranking_module",
        "metrics/test_classification_module",
        "metrics/test_retrieval_forms",
    ),
}
LOSSES = "large/(CE/4096x32000|focal/4096x32000/bf16)|sigmoid/focal/16384x4096"
REHEARSED = {"losses": "CE/8x128256/bf16", "ranking": "ranking/.*/10000x1000", "others": "CE/1000000x10/fp32"}
BENCHMARKED = {"losses": LOSSES, "ranking": "^ranking", "others": f"^(?!ranking|{LOSSES})"}


# ---- The steps -------------------------------------------------------------------------------


def python(*arguments: Any) -> list[Any]:
    return [sys.executable, *arguments]


def worker(proof: Proof, what: str, *arguments: Any) -> list[Any]:
    return python(HERE / "gpu_worker.py", what, "--device", proof.device, *arguments)


def json_in(text: str) -> Any:
    """Reads the last line that is an object: warnings may precede it."""
    return next((json.loads(line) for line in reversed(text.splitlines()) if line.startswith("{")), None)


def info(proof: Proof, seconds: float) -> Outcome:
    _, text = bounded(proof, "info", worker(proof, "info"), seconds)
    found = json_in(text)
    if found is None:
        return Outcome("info", "failed", [last_line(text)])
    (proof.out / "info.json").write_text(json.dumps(found, indent=2))
    outcome = Outcome("info", f"copy_ moves {found['copy_gb_per_s']:.0f} GB/s")
    if not proof.dry:
        outcome.wrong += [f"{name}: {why}" for name, why in found["missing"].items()]
        if not (code := found["devices"].get("cuda code", "runs")).endswith("runs"):
            outcome.wrong.append(f"cuda code: {code}")
        expected = {"cross_entropy": "triton", "sigmoid_focal_loss": "triton", "ranking_metrics": "nvcc"}
        expected |= {"retrieval_scores": "triton", "retrieval_counts": "triton"}
        for op, needed in expected.items():
            if needed in proof.have and found["kernels"][op]["cuda"] == "reference":
                outcome.wrong.append(f"{op} runs on its reference")
    return outcome


def selftest(proof: Proof, seconds: float) -> Outcome:
    few = ("--most", 1, "--dtypes", "float32", "bfloat16") if proof.dry else ()
    command = worker(proof, "selftest", *few)
    found = crew(proof, "selftest", command, proof.processes, seconds, saver(proof, "selftest"), proof.interpreted)
    return of_results("selftest", "samples", *found)


def streams(proof: Proof, seconds: float) -> Outcome:
    count, stall = min(4, proof.processes), min(STALL, 0.7 * seconds)
    found = crew(proof, "streams", worker(proof, "streams"), count, seconds, saver(proof, "streams"), stall=stall)
    return of_results("streams", "checks", *found)


def saver(proof: Proof, name: str) -> Callable[[list[Result], bool], None]:
    def save(ended: list[Result], cut: bool) -> None:
        (proof.out / f"{name}.json").write_text(json.dumps({"cut": cut, "results": ended}, indent=0))

    return save


def tests(proof: Proof, name: str, files: Sequence[str], seconds: float) -> Outcome:
    lacking = {file for module, users in NEEDED.items() if module not in proof.have for file in users}
    paths = [f"tests/{file}.py" for file in files if file not in lacking]
    # Two of selftest's tests run all of it, which took a step of its own.
    which = ["-m", "gpu", "-k", "not of_this_machine and not json_holds"]
    if proof.dry:
        which = ["--kernel", "reference", "-k", "empty_batch or (test_targets_of_any_dtype and int8)"]
    options = ["-q", "-p", "gpu_pytest", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    before = list(proof.tested)

    def save(ended: list[Result], cut: bool) -> None:
        proof.tested = before + ended
        (proof.out / "tests.xml").write_bytes(junit(proof.tested, cut))

    found = crew(proof, name, python("-m", "pytest", *options, *which, *paths), proof.processes, seconds, save)
    return of_results(name, "tests", *found)


def ranking(proof: Proof, seconds: float) -> Outcome:
    return tests(proof, "ranking", RANKING[:1] if proof.dry else RANKING, seconds)


def contract(proof: Proof, seconds: float) -> Outcome:
    return tests(proof, "contract", CONTRACT[:1] if proof.dry else CONTRACT, seconds)


def benchmark(proof: Proof, seconds: float) -> Outcome:
    """Measures some losses and the ranking metrics with torch.compile among the peers, which takes seconds a case; then
    all other losses without it."""
    ends, figures = time.monotonic() + seconds, proof.out / "benchmark.jsonl"
    options = ["--budget", 0.3, "--rounds", 1, "--csv", proof.out / "benchmark.csv", "--figures", figures]
    shares = {"losses": 0.45, "ranking": 0.6, "others": 1.0}  # parts of the time that is left at that point
    cut, problems = False, []
    for name, share in shares.items():
        chosen = ["--only", BENCHMARKED[name], *(["--no-compile"] if name == "others" else [])]
        if proof.dry:
            chosen = ["--only", REHEARSED[name], "--dry-run"]
        command = python("benchmarks/run.py", "--device", "cuda", *options, *chosen)
        code, text = bounded(proof, f"benchmark, {name}", command, share * (ends - time.monotonic()))
        cut |= code is None
        problems += [f"{name}: {last_line(text)}"] if code else []
    rows = [json.loads(line) for line in figures.read_text().splitlines()] if figures.exists() else []
    outcome = of_benchmark(rows, cut)
    outcome.wrong += problems
    return outcome


def sanitizer(tool: str) -> Callable[[Proof, float], Outcome]:
    def step(proof: Proof, seconds: float) -> Outcome:
        """Runs the smallest samples alone: everything takes a hundred times as long."""
        lines = Lines(proof.work / f"{tool}.jsonl")
        command = ["compute-sanitizer", "--tool", tool, "--target-processes", "all", "--report-api-errors", "no"]
        # Memory must not be cached: an access beyond a tensor would meet another one.
        variables = {"GPU_LINES": str(lines.path), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **proof.interpreted}
        few = ["--most", 1] if proof.dry else ["--most", 2, "--native-only"]
        command += worker(proof, "selftest", "--dtypes", "float32", *few)
        code, text = bounded(proof, tool, command, seconds, **variables)
        outcome = of_results(tool, "samples", results([lines]), code is None)
        outcome.wrong += sanitizer_findings(text)
        if code and not outcome.wrong:
            outcome.wrong.append(last_line(text))
        return outcome

    return step


def sanitizer_findings(text: str) -> list[str]:
    """Lists each kind of finding once, with its number. Its first line is not indented; remarks are left out."""
    remark = r"\s|COMPUTE-SANITIZER|[A-Z]+ SUMMARY|Target application|$"
    found = re.findall(rf"^========= (?!{remark})(.+)", text, re.MULTILINE)
    return [f"{found.count(line)} x {line}" for line in dict.fromkeys(found)]


PROFILED = "forward_kernel|backward_kernel|rank_short|rank_long"


def profiler(proof: Proof, seconds: float) -> Outcome:
    """The speed of light of the most important kernels: the log has ncu's tables."""
    command = ["ncu", "--target-processes", "all", "--section", "SpeedOfLight", "--kernel-name", f"regex:{PROFILED}"]
    command += ["--launch-count", "8", *worker(proof, "kernels")]
    code, text = bounded(proof, "ncu", command, seconds)
    figures = re.findall(rf"({PROFILED}).*?^\s*DRAM Throughput\s+%\s+([\d.]+)", text, re.MULTILINE | re.DOTALL)
    if not figures:
        return Outcome("ncu", f"no figures: {last_line(text)}")
    said = ", ".join(f"{name} {float(percent):.0f} %" for name, percent in figures)
    return Outcome("ncu", "cut at its limit; " * (code is None) + f"of DRAM's speed: {said}")


@dataclass(frozen=True)
class Step:
    name: str
    run: Callable[[Proof, float], Outcome]
    seconds: float | None
    """The step's part of a budget of SECONDS; None means all that the others leave."""
    needs: tuple[str, ...] = ()


STEPS = (
    Step("info", info, 20),
    Step("selftest", selftest, 60),
    Step("ranking", ranking, 60, ("pytest", "hypothesis")),
    Step("streams", streams, 35),
    Step("benchmark", benchmark, 115, ("triton",)),
    Step("contract", contract, None, ("pytest", "hypothesis")),
    Step("memcheck", sanitizer("memcheck"), 25, ("compute-sanitizer",)),
    Step("racecheck", sanitizer("racecheck"), 25, ("compute-sanitizer",)),
    Step("ncu", profiler, 25, ("ncu",)),
)


# ---- The budget ------------------------------------------------------------------------------


def limit_of(step: Step, later: Sequence[Step], left: float, total: float) -> float:
    """Limits are in proportion to the budget. The step without one has what the later steps do not need."""
    scale = total / SECONDS
    if step.seconds is not None:
        return max(0.0, min(step.seconds * scale, left))
    return max(0.0, left - scale * sum(other.seconds or 0 for other in later))


def spend(proof: Proof, steps: Sequence[Step], total: float, tell: Callable[[Outcome], object]) -> None:
    """Runs the steps: whatever one does, the next one runs."""
    ends = time.monotonic() + total
    possible = [step for step in steps if proof.have.issuperset(step.needs)]
    for step in steps:
        if step not in possible:
            tell(Outcome(step.name, f"without {', '.join(sorted({*step.needs} - proof.have))}", skipped=True))
            continue
        began = time.monotonic()
        limit = limit_of(step, possible[possible.index(step) + 1 :], ends - began, total)
        print(f"{step.name}: at most {limit:.0f} s", flush=True)
        try:
            outcome = step.run(proof, limit)
        except Exception as error:
            outcome = Outcome(step.name, "broke", [f"{type(error).__name__}: {error}"])
        outcome.seconds = time.monotonic() - began
        tell(outcome)


# ---- Before the budget: what is here, and the build ------------------------------------------

COSTS = {
    "gcc": "Triton cannot compile: no loss runs",
    "Python.h": "Triton cannot compile: no loss runs",
    "c++": "no native kernels",
    "nvcc": "no CUDA kernels: ranking runs on its reference",
    "triton": "the losses run on their reference, no benchmark",
    "pytest": "no contract",
    "hypothesis": "no contract",
    "sklearn": "no tests of classification and regression",
    "torchmetrics": "one peer less, no tests of its classes",
    "liger_kernel": "one peer less",
    "rich": "plain tables",
    "compute-sanitizer": "no memcheck, no racecheck",
    "ncu": "no speed of light",
}


def tools() -> set[str]:
    """Returns what of COSTS is here, modules of Python left out."""
    found = {name for name in COSTS if shutil.which(name)}
    if os.environ.get("CC") or shutil.which("clang"):  # Triton takes clang as well
        found.add("gcc")
    if Path(sysconfig.get_path("include"), "Python.h").exists():
        found.add("Python.h")
    return found


def build(proof: Proof, seconds: float, capability: str | None) -> Outcome:
    """Builds for this GPU alone."""
    archs = {"TORCH_CUDA_ARCH_LIST": capability} if capability else {}
    command = python("setup.py", "build_ext", "--inplace")
    began = time.monotonic()
    code, text = bounded(proof, "build", command, seconds, MAX_JOBS=str(proof.cores), **archs)
    outcome = Outcome("build", "done", seconds=time.monotonic() - began)
    # Such a line says that the build fell back to pure Python.
    fallback = [line for line in text.splitlines() if line.startswith("torchfast: ")]
    if code is None:
        fallback = [f"stopped after {seconds:.0f} s"]
    if code != 0 or fallback:
        outcome.said = "failed"
        outcome.wrong = fallback or [last_line(text)]
    return outcome


def driver() -> str:
    if not shutil.which("nvidia-smi"):
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0] or "unknown"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="to spend after the build; default 480")
    parser.add_argument("--build-seconds", type=float, default=100, help="limit of the build; 0: take what is here")
    parser.add_argument("--dry-run", action="store_true", help="every step without a GPU, and without a build")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would ours
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], *(f"{home}/bin" for home in homes if home)])
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu") as work:
        try:
            return prove(args, Proof(args.out.resolve(), Path(work), args.dry_run, os.cpu_count() or 1))
        finally:
            for child in list(alive):
                stop(child, 0)


def prove(args: argparse.Namespace, proof: Proof) -> int:
    # Beside a busy disk torch has taken more than a minute to import.
    _, text = bounded(proof, "probe", worker(proof, "probe"), 600 if proof.dry else 180)
    here = json_in(text)
    if here is None:
        raise SystemExit(f"{sys.executable} cannot say what it has: {last_line(text)}")
    if here["gpu"] is None and not proof.dry:
        raise SystemExit(f"torch {here['torch']} sees no GPU here; --dry-run needs none")
    proof.have = tools() | set(here["modules"])
    gpu = f"{here['gpu']}, driver {driver()}" if here["gpu"] else "a dry run, without a GPU"
    machine = f"{gpu}; torch {here['torch']}, Python {sys.version.split()[0]}, {proof.cores} cores"
    missing = {name: cost for name, cost in COSTS.items() if name not in proof.have}
    outcomes: list[Outcome] = []

    def tell(outcome: Outcome | None = None) -> str:
        """Writes the summary, so that it is up to date after each step."""
        outcomes.extend([outcome] if outcome else [])
        text = summary(machine, missing, outcomes)
        (proof.out / "summary.txt").write_text(text)
        return text

    print(tell().partition("wrong:")[0], flush=True)
    if not proof.dry and args.build_seconds:
        tell(build(proof, args.build_seconds, here["capability"]))
    spend(proof, STEPS, args.seconds, tell)
    print(tell())
    return int(any(outcome.wrong for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
