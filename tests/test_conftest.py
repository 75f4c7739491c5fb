"""What a run of the tests says at its head."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torchfast.info import report

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("quiet", [[], ["-q"]], ids=["", "quiet"])
def test_a_run_says_what_cpu_it_used(quiet):
    """Of another process, whose oneDNN may do less."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        *quiet,
        "tests/test_conftest.py",
        "-p",
        "no:cacheprovider",
    ]
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "SSE41"}
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stdout
    head = next(line for line in said.splitlines() if line.startswith("CPU: "))
    assert said.index("kernels: cpu ") < said.index(head)
    build = report()["build"]
    simd = build["simd"] if build else "no native kernels"
    assert f"torchfast: {simd}; torch: {torch.backends.cpu.get_cpu_capability()}; oneDNN at most: SSE41" in head
    assert re.search("native products: (none in half precision|bf16|fp16|bf16 and fp16)$", head)
