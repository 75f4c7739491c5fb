"""Runs CUDA sources on the CPU: see cuda_runtime.h, which takes the place of CUDA's own.

python tests/kernels/cuda_emulator tests/metrics/test_ranking.py    # pytest, with the CUDA kernels as those of the CPU
"""

import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
CXX = shlex.split(os.environ.get("CXX", "g++"))
SANITIZERS = ["-fsanitize=address,alignment", "-fno-sanitize-recover=all", "-fsanitize-sections=cuda_shared"]
FLAGS = ["-g", "-Wall", "-Werror", "-Wno-unknown-pragmas", f"-I{HERE}", *SANITIZERS]


class Unavailable(Exception):
    """Says why there is no emulator here."""


def compile(*arguments: str | Path) -> None:
    if platform.machine() != "x86_64" or shutil.which(CXX[0]) is None:
        raise Unavailable("the CUDA emulator needs g++ on x86-64")
    result = subprocess.run([*CXX, *FLAGS, *arguments], capture_output=True, text=True)
    if "libasan" in result.stderr or "fsanitize-sections" in result.stderr:
        raise Unavailable("the CUDA emulator needs g++ with its sanitizers")
    if result.returncode:
        raise RuntimeError(f"{shlex.join(map(str, arguments))}: {result.stderr}")


def program(source: Path, target: Path) -> Path:
    """Compiles a .cu that has a main of its own."""
    compile("-O1", "-std=c++17", "-x", "c++", source, "-o", target)
    return target


def library(folder: Path, op: str = "ranking", planted: Path | None = None) -> Path:
    """Compiles an op's CUDA kernels with their binding, which serves the CPU with them. Files of csrc/ that lie in
    ``planted``, too, are taken from there."""
    from torch.utils.cpp_extension import include_paths, library_paths

    kernels, binding, target = (folder / name for name in (f"{op}.o", f"{op}_binding.o", f"{op}.so"))
    level = "-O0" if planted else "-O1"  # -O0 compiles in 8 s, for a test or two, -O1 in 32, -O2 in 60
    shared = [level, "-fPIC", "-fvisibility=hidden", *([f"-I{planted}"] if planted else []), f"-I{CSRC}", "-c"]
    compile("-std=c++17", *shared, "-x", "c++", CSRC / op / "cuda" / f"{op}.cu", "-o", kernels)
    if not binding.exists():
        torch = ["-DTORCHFAST_EMULATED", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Wno-psabi"]
        torch += [f"-I{path}" for path in include_paths()]
        compile("-std=c++20", *shared, *torch, CSRC / op / "cuda" / "binding.cpp", "-o", binding)
    linked = [f"-L{path}" for path in library_paths()]
    compile("-shared", kernels, binding, *linked, "-ltorch_cpu", "-ltorch", "-lc10", "-o", target)
    return target


def environment(seed: int = 1) -> dict[str, str]:
    # Leaks are looked for by ptrace, which a container may forbid.
    return {**os.environ, "CUDA_EMULATOR_SEED": str(seed), "ASAN_OPTIONS": "detect_leaks=0"}


def preloading(library: Path, seed: int = 1) -> dict[str, str]:
    """Returns the environment of a Python that loads the library: the sanitizers come first, or not at all."""
    found = (
        subprocess.run([*CXX, f"-print-file-name={name}.so"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan", "libubsan")
    )
    return environment(seed) | {"LD_PRELOAD": " ".join(found), "CUDA_EMULATOR_LIBRARY": str(library)}


def pytest(arguments: Sequence[str]) -> int:
    import sys
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        environment = preloading(library(Path(folder)))
        return subprocess.run(
            [sys.executable, "-m", "pytest", "--kernel", "emulator", *arguments], env=environment
        ).returncode
