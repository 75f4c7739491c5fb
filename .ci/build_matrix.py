"""Builds from source under many Pythons, torches and setuptools: `python .ci/build_matrix.py [ROW ...]`.

A row is PYTHON:TORCH:SETUPTOOLS, as in 3.12:2.11.0:81.0.0; without one, those below. Each gets an environment and a
copy of the sources of its own, where it builds in place, reports (`torchfast.info`), checks its kernels
(`torchfast.selftest`) and runs tests/losses/test_ops.py on the CPU; then both are deleted. The package index gives
CUDA builds of torch, about 6 GB while they are there, so rows take their turns. A Python that is not on the PATH may be
one of pyenv's. Prints a table, and exits 1 if any row failed.

The CUDA sources include no header of torch, and `.ci/torch_headers.py` compiles their bindings: they are left out here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from try_torch import run

ROOT = Path(__file__).parent.parent
NEWEST = "newest"  # the newest that torch accepts
ROWS = (
    "3.10:2.10.0:65.5.0",  # the oldest of everything
    "3.11:2.11.0:65.5.0",
    "3.12:2.12.0:newest",
    "3.13:2.13.0:newest",
    "3.13:2.14.1:newest",
    "3.12:2.11.0:newest",
)
TITLES = ("Python", "torch", "setuptools", "native ops", "selftest", "test_ops.py")
LINE = "| {:9} | {:12} | {:10} | {:10} | {:24} | {:20} |"


def find_python(version: str) -> Path:
    found = shutil.which(f"python{version}")
    if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:  # not a shim without a Python
        return Path(found)
    for folder in sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*")):
        return folder / "bin" / "python"
    raise RuntimeError(f"there is no Python {version}")


def attempt(python: str, torch: str, setuptools: str) -> tuple[str, ...]:
    """Returns a row of the table; raises where something fails."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(find_python(python), "-m", "venv", folder / "venv", cwd=folder)
        interpreter = folder / "venv" / "bin" / "python"
        wanted = ["setuptools" if setuptools == NEWEST else f"setuptools=={setuptools}", f"torch=={torch}"]
        others = ["torchmetrics", "pytest", "hypothesis"]
        run(interpreter, "-m", "pip", "install", "--quiet", "--no-cache-dir", *wanted, *others, cwd=folder)
        source = folder / "source"
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
        for file in filter(None, listed.stdout.split("\0")):
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, source / file)

        # The optimiser takes most of the time, and does not decide whether the code builds and is right.
        os.environ.update(TORCHFAST_BUILD="require", TORCHFAST_CUDA="0", CXXFLAGS="-O1")
        run(interpreter, "setup.py", "--quiet", "build_ext", "--inplace", cwd=source)
        info = json.loads(run(interpreter, "-m", "torchfast.info", "--json", cwd=source))
        native = [op for op, of in info["kernels"].items() if of["cpu"] == "native"]
        if not native or not isinstance(info["build"], dict):
            raise RuntimeError(f"{info['missing']}, {info['build']}")
        rows = json.loads(run(interpreter, "-m", "torchfast.selftest", "--json", cwd=source))["rows"]
        samples, error = sum(row["samples"] for row in rows), max(row["max_error"] for row in rows)
        tests = run(interpreter, "-m", "pytest", "-q", "--device", "cpu", "tests/losses/test_ops.py", cwd=source)
        version = "import setuptools; print(setuptools.__version__)"
        return (
            info["versions"]["python"],
            info["versions"]["torch"],
            run(interpreter, "-c", version, cwd=folder).strip(),
            f"{len(native)} of {len(info['kernels'])}",
            f"{samples} samples, {error:.2g} of 1",
            re.findall(r"^(\d+ passed.*?) in ", tests, re.M)[0],
        )


def main(rows: list[str]) -> int:
    failed = 0
    print(LINE.format(*TITLES), "|---" * len(TITLES) + "|", sep="\n", flush=True)
    for row in rows or ROWS:
        try:
            print(LINE.format(*attempt(*row.split(":"))), flush=True)
        except RuntimeError as error:
            failed += 1
            print(f"| {row} FAILED\n{error}", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
