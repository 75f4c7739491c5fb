"""The benchmark of the GPU kernels, as far as it goes without a GPU. Nothing here is timed."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the GPU's benchmark needs triton, which is not installed"
)

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
BYTES = {"fp32": 4, "bf16": 2}


def run(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """The benchmark as its user runs it: without the tests' choice of kernels; and without a GPU."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHFAST_", "TRITON_"))}
    clean |= {"PYTHONPATH": f"{BENCHMARKS}{os.pathsep}{ROOT}", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    command = ["-c", code] if code else [str(BENCHMARKS / "run.py")]
    return subprocess.run([sys.executable, *command, *arguments], env=clean, capture_output=True, text=True)


def lines(*arguments: str) -> list[str]:
    done = run(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def gpu_cases() -> list[str]:
    return lines("--device", "cuda", "--list")


@pytest.fixture(scope="module")
def csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results") / "cuda.csv"


@pytest.fixture(scope="module")
def dry_run(csv: Path) -> list[str]:
    return lines("--device", "cuda", "--dry-run", "--csv", str(csv))


@pytest.fixture(scope="module")
def launches(dry_run: list[str]) -> dict[str, list[str]]:
    """What the dry run prints of each case: what it moves, and each launch."""
    printed: dict[str, list[str]] = {}
    of_case: list[str] = []
    for line in dry_run:
        if found := re.match(r"\d+/\d+ (.*): (moves .*)", line):
            of_case = printed[found[1]] = [found[2]]
        elif line.startswith("Medians"):  # of the table at the end
            return printed
        elif line.startswith("    "):
            of_case.append(line.strip())
    raise AssertionError("there is no table")


def test_both_devices_list_their_cases(gpu_cases):
    assert "tiny/CE/8x2/fp32" in lines("--list")
    shapes = {label.split("/")[2] for label in gpu_cases if not label.startswith(("ranking", "retrieval"))}
    assert shapes == {
        "4096x32000",
        "16384x128256",
        "8192x50257",
        "16384x1000",
        "4x19x1024x1024",
        "8x128256",
        "1000000x10",
        "16384x4096",
        "1000000x80",
    }
    documents = {label.split("/")[2].partition("x")[2] for label in gpu_cases if label.startswith("ranking/")}
    assert documents == {"100", "1000", "50000", "1000000"}  # each kernel
    assert len(set(gpu_cases)) == len(gpu_cases)


def test_without_a_gpu_it_says_what_is_missing(tmp_path):
    done = run("--device", "cuda", "--csv", str(tmp_path / "cuda.csv"))
    assert done.returncode == 1
    assert re.match(r"--device cuda needs a .*; torch \S+ sees no GPU here", done.stderr), done.stderr
    assert not list(tmp_path.iterdir())


def test_every_figure_of_the_readme_is_a_row_of_the_results():
    code = "import readme; now = readme.README.read_text(); print(readme.written(now, readme.newest_run(CSV)) == now)"
    done = run(code=code.replace("CSV", f"readme.HERE / {'results/cpu.csv'!r}"))
    assert done.stdout == "True\n", done.stdout + done.stderr


EIGHTY = """
import run
from rich.console import Console
def rows(case):
    for name in (*case.contenders, "torch.compile", "copy_", "read"):
        for what in run.timings(name):
            yield {"contender": name, "what": what, "p50_ms": 1234.5678, "peak_bytes": 12 * case.elements, "note": ""}
console = Console(width=80, soft_wrap=True)
run.report(console, [(case, list(rows(case))) for case in run.cpu_cases()])
"""


def test_no_figure_of_the_report_is_cut_off_in_80_columns():
    done = run(code=EIGHTY)
    assert done.returncode == 0, done.stderr
    table = done.stdout[: done.stdout.index("aims: at least")]
    assert max(map(len, table.splitlines()[1:])) <= 80 and "…" not in table
    assert table.count("1235") == 2 * int(run(code="import run; print(len(run.cpu_cases()))").stdout)


@needs_triton
def test_a_dry_run_knows_every_case_and_what_it_moves(gpu_cases, launches, csv):
    assert list(launches) == gpu_cases
    for label, (moves, *_) in launches.items():
        family, name, shape, dtype = label.split("/")
        elements = math.prod(map(int, shape.split("x")))
        if family == "retrieval":  # embeddings are read once
            queries, items, d = map(int, shape.split("x"))
            assert moves.startswith(f"moves {(queries + items) * d * BYTES[dtype]:,} bytes, "), label
            continue
        if family.startswith("ranking"):  # scores and targets are read once
            assert moves.startswith(f"moves {elements * (4 + (8 if 'graded' in name else 1)):,} bytes, "), label
            continue
        nbytes = elements * BYTES[dtype]
        times = 5 if family == "sigmoid" and "class ids" not in name else 3  # float targets are read twice
        assert moves.startswith(f"moves {times * nbytes:,} bytes, "), label
    assert launches["large/CE/16384x128256/bf16"][0] == "moves 12,608,077,824 bytes, 3.764 ms at 3350 GB/s"
    assert not csv.exists()


@needs_triton
def test_a_dry_run_shows_the_launches_of_forward_and_backward(launches):
    for label, (_, *found) in launches.items():
        if label.startswith("ranking"):
            assert not found, label  # CUDA launches its kernels, not Triton
            continue
        names = [launch.partition(":")[0] for launch in found]
        if label.startswith("retrieval"):
            assert names == ["scores_kernel", "counts_kernel"], label
            continue
        assert names[0] == "forward_kernel" and names[-1] == "backward_kernel" and "sum_kernel" in names, label
        assert all(re.search(r": grid [1-9]\d*, tile \d+ x \d+, \d+ warps", launch) for launch in found), label
    split = [launch for launch in launches["few rows/CE/8x128256/bf16"] if launch.startswith("forward_kernel")]
    assert len(split) == 2  # long rows are split over programs, and then added up


@needs_triton
def test_a_dry_run_ends_with_the_hosts_time(dry_run):
    """Nothing is said of how long it takes: that Triton's own launcher ran, what it launched, and what it compiled."""
    figures = (
        r"    (.*): forward \d+, loss and gradient \d+ us, (\d) launches; first step .* s, (\d) kernels; unit \d+ us"
    )
    found = [step for step in (re.fullmatch(figures, line) for line in dry_run) if step]
    assert [(int(step[2]), int(step[3])) for step in found] == [
        (0, 0),
        (3, 3),
        (4, 3),
        (3, 2),
        (3, 2),
    ]  # the sum's is one
    assert len([line for line in dry_run if "the launchers alone" in line]) == 2


@needs_triton
def test_a_dry_run_takes_a_bandwidth_and_tries_other_tiles():
    case = ("--dry-run", "--only", "large/CE/4096x32000/bf16")
    moves = "moves 786,432,000 bytes, 0.7864 ms at 1000 GB/s"
    assert any(line.endswith(moves) for line in lines(*case, "--bandwidth", "1000"))
    tried = [line.strip() for line in lines(*case, "--autotune")]
    for line, name in zip(tried[1:], ("forward_tile", "backward_tile"), strict=True):
        found = re.fullmatch(rf"{name}: (Tile\(.*?\)) .* ms; best of (\d+): (Tile\(.*?\)) .* ms, 1.00x", line)
        assert found and found[1] == found[3] and int(found[2]) > 10, line


@needs_triton
def test_without_rich_the_same_table_is_plain(tmp_path):
    (tmp_path / "rich.py").write_text("raise ImportError('as if it were not installed')")
    only = ("--dry-run", "--only", "large/CE/4096x32000|ranking/.*/10000x1000", "--figures", str(tmp_path / "figures"))
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import run; run.main()"
    done = run(*only, code=code)
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout.partition("Medians")[2]
    assert "[" not in table and table.split().count("1.00") == 4  # of the bandwidth of copy_
    assert re.search(r"^case +fwd ms +GB/s +eager +verdict$", table, re.M)

    figures = [json.loads(line) for line in (tmp_path / "figures").read_text().splitlines()]
    assert len(figures) == 4 and all(row["of_copy"] == pytest.approx(1, rel=1e-3) for row in figures)
    for row in figures:
        assert re.search(rf"^{row['case'].partition('/')[2].replace('/', ' ')}  ", table, re.M)


@needs_triton
def test_a_dry_run_fails_where_a_launch_does():
    broken = "from torchfast.losses.cross_entropy import triton_launch as t; t.backward_tile = None"
    done = run("--dry-run", "--only", "large/CE/4096x32000/bf16", code=f"import run; {broken}; run.main()")
    assert done.returncode == 1
    assert "torchfast: failed: TypeError" in done.stdout


VERDICTS = """
import gpu, json, run, sys
case = next(case for case in run.gpu_cases() if case.label == "large/CE/4096x32000/bf16")
for eager, graph, peer, peers_graph in json.loads(sys.argv[1]):
    times = {("copy_", "floor"): 1, ("torchfast", "fwd+bwd"): eager, ("torchfast", "graph"): graph}
    times |= {("eager", "fwd+bwd"): peer, ("eager", "graph"): peers_graph}
    rows = [{"contender": who, "what": what, "note": "", "p50_ms": t} for (who, what), t in times.items() if t]
    print(gpu.verdict(case, gpu.figures(case, rows)))
"""


@needs_triton
def test_the_verdict_needs_the_time_in_a_graph_and_the_eager_one():
    """Times are multiples of copy_, of which loss and gradient need 1.5."""
    cases = {
        (1.6, 1.6, 5, 5): "[green]met",
        (3.0, 1.6, 5, 5): "[yellow]met in a graph",
        (3.0, 3.0, 5, 5): "[yellow]below 0.9",
        (1.6, 1.6, 5, 1): "[red]slower: eager in a graph",
        (1.6, 1.6, 1, 5): "[red]slower: eager",
        (1.6, 1.6, 1, 1): "[red]slower: eager, eager in a graph",
        (1.6, None, 5, 5): "[red]no graph",
        (None, 1.6, 5, 5): "[red]not timed",
    }
    done = run(json.dumps(list(cases)), code=VERDICTS)
    assert done.stdout.splitlines() == list(cases.values()), done.stderr
