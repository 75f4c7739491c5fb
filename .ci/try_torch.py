"""Installs one wheel beside several versions of torch: `python .ci/try_torch.py WHEEL 2.10.0 2.13.0 newest`.

Each gets an environment of its own, where `torchfast.info` and `torchfast.selftest` run; then it is deleted. A CUDA
build of torch takes about 6 GB while it is there. Exits 1 if the kernels of any were wrong, or not native.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path


def run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if result.returncode:  # a failed check prints its report, anything else its error
        raise RuntimeError((result.stdout + result.stderr).strip()[-2000:])
    return result.stdout


def attempt(wheel: Path, torch: str) -> str:
    """Returns a line for the table; raises where something fails."""
    wanted = "torch" if torch == "newest" else f"torch=={torch}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", "--no-cache-dir", wheel, wanted, cwd=folder)
        info = json.loads(run(python, "-m", "torchfast.info", "--json", cwd=folder))
        kernels = {of["cpu"] for of in info["kernels"].values()}
        if "native" not in kernels:
            raise RuntimeError(info["missing"]["native"])
        start = time.monotonic()
        rows = json.loads(run(python, "-m", "torchfast.selftest", "--json", cwd=folder))["rows"]
        seconds = time.monotonic() - start
    samples = sum(row["samples"] for row in rows)
    error = max(row["max_error"] for row in rows)
    return f"{info['versions']['torch']:14} ok, {samples} samples, max error {error:.2g} of 1, {seconds:.0f} s"


def main(wheel: str, *torches: str) -> int:
    failed = 0
    print(f"{Path(wheel).name}\n{'asked':9} {'torch':14} selftest")
    for torch in torches:
        try:
            line = attempt(Path(wheel).resolve(), torch)
        except RuntimeError as error:
            failed += 1
            line = f"{'-':14} FAILED\n{error}"
        print(f"{torch:9} {line}", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
