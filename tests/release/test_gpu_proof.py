"""The GPU proof (.ci/gpu), where there is no GPU: its rehearsal, its limits, what it does with children that die."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / ".ci"))

import gpu_children  # noqa: E402
import gpu_proof  # noqa: E402
import gpu_report  # noqa: E402
from gpu_report import Outcome  # noqa: E402

# As compute-sanitizer and ncu print: what the proof reads of it.
SANITIZER = """
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at rank_short+0x3a0
=========     by thread (96,0,0) in block (0,0,0)
=========
========= Invalid __global__ read of size 16 bytes
=========     at rank_short+0x3a0
========= Target application returned an error
========= ERROR SUMMARY: 2 errors
"""
NCU = """
  forward_kernel (4096, 1, 1)x(256, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Section: GPU Speed Of Light Throughput
    ----------------------- ----------- ------------
    Metric Name             Metric Unit Metric Value
    ----------------------- ----------- ------------
    DRAM Frequency                  Ghz         3.20
    DRAM Throughput                   %        91.36
    ----------------------- ----------- ------------
  void rank_short<float>(Arguments<float>) (12500, 1, 1)x(256, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    DRAM Throughput                   %        40.10
"""


@pytest.fixture
def proof(tmp_path: Path) -> gpu_proof.Proof:
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
    return gpu_proof.Proof(tmp_path / "out", tmp_path / "work", dry=True, cores=2)


def clean(**variables: str) -> dict[str, str]:
    """Without the tests' choice of kernels, and without a GPU."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHFAST_", "TRITON_", "PYTEST_"))}
    return kept | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "PYTHON": sys.executable} | variables


# ---- The rehearsal ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Its folder, and what it printed. The tools run what they are given, and print the above."""
    pytest.importorskip("triton", reason="the rehearsal runs Triton's interpreter, and triton is not installed")
    tools, out = tmp_path_factory.mktemp("tools"), tmp_path_factory.mktemp("out")
    run_it = 'while [ "$1" != "$PYTHON" ]; do shift; done; "$@" || exit\n'
    for name, printed in ("compute-sanitizer", SANITIZER), ("ncu", NCU):
        tool = tools / name
        tool.write_text(f"#!/bin/sh\n{run_it}cat << 'END'\n{printed}END\n")
        tool.chmod(0o755)
    command = [str(ROOT / ".ci" / "gpu"), "--dry-run", "--out", str(out), "--seconds", "4800"]
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, env=clean(PATH=path), capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr  # for the sanitizer's findings
    return out, done.stdout


def step(rehearsal: tuple[Path, str], name: str) -> str:
    """What the summary says of it."""
    (found,) = re.findall(rf"^{name} +\d+ s  (.*)$", (rehearsal[0] / "summary.txt").read_text(), re.MULTILINE)
    return found


def test_the_rehearsal_leaves_its_summary_and_few_files(rehearsal):
    out, printed = rehearsal
    text = (out / "summary.txt").read_text()
    assert text in printed
    names = {"info.json", "selftest.json", "streams.json", "tests.xml", "benchmark.jsonl", "log.txt", "summary.txt"}
    assert {path.name for path in out.iterdir()} == names  # on a GPU also benchmark.csv
    wrong = re.search(r"^wrong: 2\n  (.*)\n  (.*)\n", text, re.MULTILINE)
    finding = "2 x Invalid __global__ read of size 16 bytes"
    assert wrong and wrong.groups() == (f"memcheck: {finding}", f"racecheck: {finding}"), text


def test_the_rehearsal_measures_copy(rehearsal):
    assert re.fullmatch(r"copy_ moves \d+ GB/s", step(rehearsal, "info"))
    assert json.loads((rehearsal[0] / "info.json").read_text())["copy_gb_per_s"] > 0


def test_the_rehearsal_runs_samples_of_every_op(rehearsal):
    from torchfast.selftest import checked

    found = json.loads((rehearsal[0] / "selftest.json").read_text())
    named = {line["end"] for line in found["results"]}
    assert not found["cut"]
    for op in checked():
        for dtype in "float32", "bfloat16":
            assert sum(name.startswith(f"{op} {dtype}, sample ") for name in named) == 1
    assert step(rehearsal, "selftest") == f"{2 * len(checked())} samples, 0 failed"


def test_the_rehearsal_runs_tests_of_ranking_and_of_the_losses(rehearsal):
    suite = ElementTree.parse(rehearsal[0] / "tests.xml").getroot()
    files = {case.get("classname") for case in suite.iter("testcase")}
    assert files == {"tests/metrics/test_ranking.py", "tests/losses/test_ops.py"}
    assert suite.get("failures") == "0" and int(suite.get("tests")) > 5
    for name in "ranking", "contract":
        assert re.fullmatch(r"\d+ tests, 0 failed", step(rehearsal, name))


def test_the_rehearsal_runs_losses_and_ranking_on_streams_and_in_graphs(rehearsal):
    found = {line["end"] for line in json.loads((rehearsal[0] / "streams.json").read_text())["results"]}
    for what in "on a side stream", "on four streams at once", "in a CUDA graph":
        for op in "cross entropy", "smoothed focal", "sigmoid focal", "linear cross entropy", "ranking":
            assert any(name.startswith(op) and name.endswith(what) for name in found), (op, what)
    assert step(rehearsal, "streams") == f"{len(found)} checks, 0 failed"


def test_the_rehearsal_benchmarks_losses_and_ranking(rehearsal):
    rows = [json.loads(line) for line in (rehearsal[0] / "benchmark.jsonl").read_text().splitlines()]
    assert {row["case"].split("/")[0] for row in rows} == {"few rows", "ranking", "small classes"}
    assert all(row["of_copy"] == pytest.approx(1, rel=1e-3) and row["ms_in_graph"] and not row["notes"] for row in rows)
    assert step(rehearsal, "benchmark") == f"{len(rows)} cases"


def test_the_rehearsal_runs_the_tools_on_samples_and_kernels(rehearsal):
    for tool in "memcheck", "racecheck":
        assert re.fullmatch(r"\d+ samples, 0 failed", step(rehearsal, tool))
    assert step(rehearsal, "ncu") == "of DRAM's speed: forward_kernel 91 %, rank_short 40 %"


# ---- The budget ------------------------------------------------------------------------------


def test_steps_have_their_limits_and_the_contract_what_they_leave():
    steps = {step.name: step for step in gpu_proof.STEPS}
    assert [name for name, step in steps.items() if step.seconds is None] == ["contract"]
    later = list(gpu_proof.STEPS)[list(steps).index("contract") + 1 :]
    reserved = sum(step.seconds for step in later)
    total = gpu_proof.SECONDS
    assert gpu_proof.limit_of(steps["selftest"], (), total, total) == 60
    assert gpu_proof.limit_of(steps["selftest"], (), total, total / 2) == 30
    assert gpu_proof.limit_of(steps["selftest"], (), 7, total) == 7
    assert gpu_proof.limit_of(steps["contract"], later, 300, total) == 300 - reserved
    assert gpu_proof.limit_of(steps["contract"], later, 10, total) == 0
    assert sum(step.seconds or 0 for step in gpu_proof.STEPS) + 100 < total  # the contract's, at least


def test_a_step_that_hangs_or_breaks_costs_no_other(proof):
    """Its child, and that one's own, end at the limit; what it had written stays."""
    hangs = "import subprocess, sys; print('so far', flush=True); subprocess.run(['sleep', '600'])"

    def hang(proof: gpu_proof.Proof, seconds: float) -> Outcome:
        code, text = gpu_children.bounded(proof, "hang", [sys.executable, "-c", hangs], seconds)
        return Outcome("hang", f"{code}, {text.splitlines()[0]}")

    def breaks(proof: gpu_proof.Proof, seconds: float) -> Outcome:
        raise ValueError("no such thing")

    def after(proof: gpu_proof.Proof, seconds: float) -> Outcome:
        return Outcome("after", "ran")

    steps = [
        gpu_proof.Step("hang", hang, 6),
        gpu_proof.Step("breaks", breaks, 6),
        gpu_proof.Step("lacks", after, 6, ("a tool",)),
        gpu_proof.Step("after", after, None),
    ]
    outcomes: list[Outcome] = []
    began = time.monotonic()
    gpu_proof.spend(proof, steps, gpu_proof.SECONDS, outcomes.append)
    assert 4 <= outcomes[0].seconds < 60 and time.monotonic() - began < 90
    assert [(o.step, o.said, o.skipped) for o in outcomes] == [
        ("hang", "None, so far", False),
        ("breaks", "broke", False),
        ("lacks", "without a tool", True),
        ("after", "ran", False),
    ]
    assert outcomes[1].wrong == ["ValueError: no such thing"]
    assert "so far" in (proof.out / "log.txt").read_text()
    assert not gpu_children.alive


# ---- Children that die -----------------------------------------------------------------------

CHILD = """
import os, pathlib, signal, sys, time
from gpu_report import Lines
lines = Lines(pathlib.Path(os.environ["GPU_LINES"]))
worker, workers = map(int, os.environ["GPU_WORKER"].split("/"))
for name in sys.argv[1:][worker::workers]:
    if not lines.begin(name):
        continue
    if name == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "hangs":
        time.sleep(600)
    lines.end(name, ["it was wrong"] if name == "fails" else [])
"""


def run_crew(proof, names, count=1, seconds=120.0, stall=15.0, code=CHILD):
    saved = []
    command = [sys.executable, "-c", code, *names]
    ended, cut = gpu_children.crew(proof, "crew", command, count, seconds, lambda *now: saved.append(now), stall=stall)
    assert saved[-1] == (ended, cut) and not gpu_children.alive
    return {line["end"]: "\n".join(line["failures"]) for line in ended}, cut


@pytest.mark.parametrize("count", [1, 2])
def test_a_check_that_crashes_or_hangs_fails_alone(proof, count):
    found, cut = run_crew(proof, ["right", "crashes", "fails", "hangs", "right again", "and again"], count)
    assert not cut
    assert {name for name, why in found.items() if not why} == {"right", "right again", "and again"}
    assert found["fails"] == "it was wrong"
    assert found["crashes"].startswith(f"the process ended with exit code {-signal.SIGSEGV}")
    assert found["hangs"].startswith("hung: no news for 15 s")


def test_a_crew_is_cut_at_its_limit_and_keeps_what_it_found(proof):
    found, cut = run_crew(proof, ["hangs", *map(str, range(9))], count=2, seconds=15, stall=600)
    assert cut and found.keys() == {"0", "2", "4", "6", "8"}  # the share of the one that does not hang


def test_a_process_that_does_not_come_as_far_as_a_check_is_a_failure(proof):
    found, cut = run_crew(proof, [], code="raise RuntimeError('no driver')")
    ((name, why),) = found.items()
    assert not cut and name == "process 0/1" and "RuntimeError: no driver" in why


TESTS = """
import os, pytest, sys, types
@pytest.mark.parametrize("x", range(5))
def test_many(x): pass
def test_wrong():
    def synchronize(): raise RuntimeError("an illegal memory access was encountered")
    sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(
        is_initialized=lambda: True, synchronize=synchronize))
    assert 1 == 2, "not the same"
def test_left_out(): pytest.skip("a reason")
def test_under_compile(): pass
def test_crashes(): os.kill(os.getpid(), 11)
def test_last(): assert "torch" not in sys.modules
"""


def test_pytest_goes_on_behind_a_crash_or_a_lost_gpu_and_writes_junit(proof, tmp_path):
    (tmp_path / "test_here.py").write_text(TESTS)
    (tmp_path / "test_broken.py").write_text("import a_module_that_is_not_there")
    options = ["-q", "-p", "gpu_pytest", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    command = [sys.executable, "-m", "pytest", *options, "--rootdir", tmp_path, tmp_path]
    ended, cut = gpu_children.crew(proof, "tests", command, 1, 300, lambda *_: None)
    assert not cut
    names = [line["end"].partition("::")[2].partition("[")[0] for line in ended]
    assert names[0] == ""  # the file that cannot be imported
    assert names.index("test_last") < names.index("test_many", names.index("test_many") + 1)  # breadth first
    assert names[-1] == "test_under_compile" and names.count("test_many") == 5

    suite = ElementTree.fromstring(gpu_report.junit(ended, cut))
    assert {key: suite.get(key) for key in ("tests", "failures", "skipped")} == {
        "tests": "11",
        "failures": "3",
        "skipped": "1",
    }
    failures = {case.get("name"): case.find("failure") for case in suite.iter("testcase")}
    assert failures["test_wrong"].get("message") == "AssertionError: not the same"
    assert "assert 1 == 2" in failures["test_wrong"].text
    assert failures["test_crashes"].get("message") == "the process ended with exit code -11"
    assert "a_module_that_is_not_there" in failures[""].get("message")
    assert failures["test_last"] is None


def test_results_are_read_up_to_a_line_that_was_cut_short(tmp_path):
    lines = gpu_report.Lines(tmp_path / "lines")
    assert lines.begin("a") and not lines.begin("a")
    lines.end("a")
    lines.begin("b")
    lines.path.write_text(lines.path.read_text() + '{"end": "b", "fail')
    again = gpu_report.Lines(lines.path)
    assert [line["end"] for line in gpu_report.results([again])] == ["a"]
    assert gpu_report.unfinished(again) == "b" and not again.begin("b")


# ---- What only a GPU would show ----------------------------------------------------------------

STREAMS = """
import contextlib, os, pathlib, torch, gpu_worker
class Stream:
    def __init__(self, *_): pass
class CUDAGraph:
    def replay(self): pass
cuda = dict(Stream=Stream, CUDAGraph=CUDAGraph, synchronize=lambda: None, _sleep=lambda clocks: None)
cuda |= dict.fromkeys(("stream", "graph"), lambda *_, **__: contextlib.nullcontext())
for name, stub in cuda.items():
    setattr(torch.cuda, name, stub)
every = gpu_worker.calls("cpu")
gpu_worker.calls = lambda device: {"ranking": every["ranking 10x50"]}
machine = gpu_worker.Cuda()
machine.device = "cpu"
gpu_worker.streams(gpu_worker.Lines(pathlib.Path(os.environ["GPU_LINES"])), machine)
"""


def test_a_graph_that_does_not_replay_is_noticed(proof):
    """On stubs of torch's streams, which are none, and of its graphs, which compute nothing."""
    found, cut = run_crew(proof, [], code=STREAMS, seconds=600, stall=300)
    assert not cut and found["ranking, on a side stream"] == found["ranking, on four streams at once"] == ""
    assert "Tensor-likes are not equal" in found["ranking, in a CUDA graph"]


def test_every_test_that_takes_a_device_is_in_the_contract():
    takes_one = {
        str(path.relative_to(ROOT / "tests").with_suffix(""))
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"def test_\w+\([^)]*\bdevice\b", path.read_text())
    }
    ours = {*gpu_proof.RANKING, *gpu_proof.CONTRACT}
    assert takes_one <= ours
    assert all((ROOT / "tests" / f"{name}.py").exists() for name in ours)


def test_the_benchmarks_parts_are_all_cases_and_each_once():
    pytest.importorskip("triton", reason="the GPU's benchmark needs triton, which is not installed")
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--device", "cuda", "--list"]
    environment = clean(PYTHONPATH=str(ROOT))
    labels = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    parts = [{label for label in labels if re.search(only, label)} for only in gpu_proof.BENCHMARKED.values()]
    assert sorted(label for part in parts for label in part) == sorted(labels) and all(parts)


# ---- The summary -----------------------------------------------------------------------------


def row(case: str, of_copy: float, notes: tuple[str, ...] = (), **times_slower: float) -> dict:
    return {
        "case": case,
        "gb_per_s": 4000 * of_copy,
        "of_copy": of_copy,
        "times_slower": times_slower,
        "times_slower_in_graph": {peer: 0.5 * ratio for peer, ratio in times_slower.items()},
        "notes": [*notes],
    }


def test_the_summary_names_what_is_wrong_slow_and_lost():
    rows = [
        row("large/CE/4096x32000/bf16", 0.93, eager=4.2, liger=1.4),
        row("ranking/5 relevant/100000x100/fp32", 0.41, eager=12.0),
        row("sigmoid/focal/16384x4096/bf16", 0.79, ("torchfast: wrong: loss and gradient errors",), eager=0.9),
    ]
    tests = [
        {"end": "tests/losses/test_ops.py::test_a", "failures": []},
        {"end": "tests/losses/test_ops.py::test_b", "failures": ["AssertionError: 1 of 8 wrong\n  a traceback"]},
        {"end": "tests/losses/test_ops.py::test_c", "failures": [], "skipped": "a reason"},
    ]
    outcomes = [
        gpu_report.of_results("contract", "tests", tests, cut=True),
        gpu_report.of_benchmark(rows, cut=False),
        Outcome("ncu", "without ncu", skipped=True),
    ]
    outcomes[0].seconds = 123.4
    assert gpu_report.summary("one GPU", {"ncu": "no speed of light"}, outcomes) == textwrap.dedent("""\
        one GPU
        missing: ncu (no speed of light)
        contract       123 s  3 tests, 1 failed, 1 skipped, cut at its limit
        benchmark        0 s  3 cases
        ncu          skipped  without ncu
        wrong: 2
          contract: tests/losses/test_ops.py::test_b: AssertionError: 1 of 8 wrong
          benchmark: sigmoid/focal/16384x4096/bf16: torchfast: wrong: loss and gradie...
        below 80% of the copy bandwidth: 2
          0.41 of copy: ranking/5 relevant/100000x100/fp32, 1640 GB/s
          0.79 of copy: sigmoid/focal/16384x4096/bf16, 3160 GB/s
        slower than a peer: 3
          liger takes 0.70 of our time in a graph: large/CE/4096x32000/bf16
          eager takes 0.90 of our time: sigmoid/focal/16384x4096/bf16
          eager takes 0.45 of our time in a graph: sigmoid/focal/16384x4096/bf16
        """)


def test_the_summary_is_one_screen_however_much_is_wrong():
    outcomes = [Outcome(f"step {n}", wrong=["x" * 200] * 50, low=["y"] * 50, lost=["z"] * 50) for n in range(9)]
    lines = gpu_report.summary("one GPU " * 20, {}, outcomes).splitlines()
    assert len(lines) <= gpu_report.HEIGHT and max(map(len, lines)) <= gpu_report.WIDTH
    assert sum(bool(re.match(r"  and 4\d\d more", line)) for line in lines) == 3


def test_a_step_that_checked_nothing_is_wrong():
    assert gpu_report.of_results("selftest", "samples", [], cut=True).wrong
    assert gpu_report.of_benchmark([], cut=True).wrong


# ---- What is here, and the build -------------------------------------------------------------


def test_missing_tools_are_named(monkeypatch, tmp_path):
    (tmp_path / "nvcc").write_text("")
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    here = gpu_proof.tools()
    assert "nvcc" in here and not here & {"gcc", "c++", "ncu", "compute-sanitizer"}
    monkeypatch.setenv("CC", "clang-19")
    assert "gcc" in gpu_proof.tools()
    monkeypatch.setattr(gpu_proof.sysconfig, "get_path", lambda _: str(tmp_path))
    assert "Python.h" not in gpu_proof.tools()


def test_without_a_gpu_it_says_so(tmp_path):
    command = [str(ROOT / ".ci" / "gpu"), "--out", str(tmp_path)]
    done = subprocess.run(command, env=clean(), capture_output=True, text=True)
    assert done.returncode == 1
    assert re.match(r"torch \S+ \(.*\) sees no GPU here; --dry-run needs none\n", done.stderr), done.stderr


SETUP = "import os, sys; print(sys.argv[1:], os.environ['TORCH_CUDA_ARCH_LIST'], os.environ['MAX_JOBS']); "


@pytest.mark.parametrize(
    "then, said, wrong",
    [
        ("", "done", []),
        ("sys.exit('no compiler')", "failed", ["no compiler"]),
        ("print('torchfast: pure Python')", "failed", ["torchfast: pure Python"]),
        ("import time; time.sleep(600)", "failed", ["stopped after 10 s"]),
    ],
)
def test_the_build_is_for_this_gpu_and_says_what_failed(proof, monkeypatch, tmp_path, then, said, wrong):
    (tmp_path / "setup.py").write_text(SETUP + then)
    monkeypatch.setattr(gpu_children, "ROOT", tmp_path)
    outcome = gpu_proof.build(proof, 10, "9.0")
    assert (outcome.said, outcome.wrong) == (said, wrong)
    assert "['build_ext', '--inplace'] 9.0 2" in (proof.out / "log.txt").read_text()
