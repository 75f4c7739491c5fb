"""Runs CUDA sources on the CPU: see cuda_runtime.h, which takes the place of CUDA's own."""

import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CXX = shlex.split(os.environ.get("CXX", "g++"))
SANITIZERS = ["-fsanitize=address,alignment", "-fno-sanitize-recover=all", "-fsanitize-sections=cuda_shared"]
FLAGS = ["-std=c++17", "-O2", "-g", "-Wall", "-Werror", f"-I{HERE}", *SANITIZERS]


def build(source: Path, program: Path) -> Path:
    """Compiles a .cu, or a .cpp that includes one, into a program."""
    if platform.machine() != "x86_64" or shutil.which(CXX[0]) is None:
        pytest.skip("the CUDA emulator needs g++ on x86-64")
    result = subprocess.run([*CXX, *FLAGS, "-x", "c++", source, "-o", program], capture_output=True, text=True)
    if "libasan" in result.stderr or "fsanitize-sections" in result.stderr:
        pytest.skip("the CUDA emulator needs g++ with its sanitizers")
    assert result.returncode == 0, result.stderr
    return program


def environment(seed: int = 1) -> dict[str, str]:
    # Leaks are looked for by ptrace, which a container may forbid.
    return {**os.environ, "CUDA_EMULATOR_SEED": str(seed), "ASAN_OPTIONS": "detect_leaks=0"}
