"""The CUDA kernels' machine code in the built extension, without a GPU: registers, spills, widths of loads.

The plan for an H100 (64K registers, 228 KB of shared memory a multiprocessor): kernels that only read and count take at
most 64 registers, for four blocks of 256 threads; those that also compute the metrics at most 128, for two.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from torchfast import _native
from torchfast.info import report

BUILD = report()["build"]
ARCHS = re.findall(r"\bsm_\d+", BUILD["cuda_archs"]) if isinstance(BUILD, dict) else []
if not ARCHS:
    pytest.skip("this build has no CUDA code", allow_module_level=True)

READING = ("find_in_slice", "locate_in_slice")
PLAN = {"rank_short": 128, "rank_long": 128, "evaluate_slot": 128, "sort_slot": 64} | dict.fromkeys(READING, 64)
KERNELS = {"check_boundaries", *PLAN}


def tool(name: str) -> str:
    """Finds CUDA's tool, or the one that comes with Triton."""
    if found := shutil.which(name):
        return found
    triton = pytest.importorskip("triton")
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


class Kernel(NamedTuple):
    name: str
    registers: int
    stack: int
    local: int
    code: str

    @property
    def loads(self) -> list[str]:
        """Widths of its loads of scores and targets, which are those through the read-only cache."""
        return re.findall(r"LDG\.E(?:\.U8|\.U16|\.S8|\.S16)?(\.64|\.128|)\.CONSTANT", self.code)


def check_memory(kernel: Kernel) -> None:
    assert kernel.stack == kernel.local == 0, f"{kernel.name} uses local memory"
    assert not re.search(r"\b(LDL|STL)\b", kernel.code), f"{kernel.name} spills"


def check_registers(kernel: Kernel) -> None:
    allowed = next((n for name, n in PLAN.items() if name in kernel.name), 64)
    assert kernel.registers <= allowed, f"{kernel.name} takes {kernel.registers} registers of {allowed}"


def kernels_of(binary: str | Path, arch: str) -> list[Kernel]:
    def dump(*options: str) -> str:
        done = subprocess.run([tool("cuobjdump"), "-arch", arch, *options, binary], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    code = dict(re.findall(r"Function : (\w+)\n(.*?)(?=Function : |\Z)", dump("-sass"), re.DOTALL))
    usage = r"Function (\w+):\n\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    found = re.findall(usage, dump("--dump-resource-usage"))
    assert len(found) == len(code) > 0
    return [Kernel(name, *map(int, numbers), code[name]) for name, *numbers in found]


@pytest.fixture(scope="module", params=ARCHS)
def kernels(request: pytest.FixtureRequest) -> list[Kernel]:
    found = [k for k in kernels_of(str(_native.LIBRARY), request.param) if "ranking" in k.name]
    for name in KERNELS:
        types = 1 if name in ("find_in_slice", "check_boundaries") else 3  # scores of 2, 4 and 8 bytes
        assert sum(name in k.name for k in found) == types, name
    assert len(found) == 17
    return found


def test_no_kernel_spills_or_uses_local_memory(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        check_memory(kernel)


def test_registers_are_within_the_plan(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        check_registers(kernel)


def test_scores_and_targets_are_read_128_bits_at_a_time(kernels: list[Kernel]) -> None:
    """Each loop over scores or targets has two such loads, its first and its next."""
    for kernel in kernels:
        if any(name in kernel.name for name in ("rank_short", "rank_long", *READING)):
            assert kernel.loads.count(".128") >= (8 if "find" in kernel.name else 4), kernel.name


def test_nothing_depends_on_the_order_of_threads(kernels: list[Kernel]) -> None:
    """All atomic additions add integers."""
    for kernel in kernels:
        assert not re.search(r"\b(ATOM|ATOMS|ATOMG|RED)\.\S*F(16|32|64)", kernel.code), kernel.name


def test_the_audit_sees_local_memory_and_too_many_registers(tmp_path: Path) -> None:
    if not shutil.which("nvcc"):
        pytest.skip("the binary was built elsewhere: there is no nvcc here")
    source, binary = tmp_path / "bad.cu", tmp_path / "bad.o"
    source.write_text(
        """__global__ void bad(const int* x, int* y, int n) {
             int a[64];
             for (int i = 0; i < 64; ++i) a[i] = x[i * n];
             for (int i = 0; i < n; ++i) a[x[i] & 63] += i;
             for (int i = 0; i < 64; ++i) y[i] = a[i];
           }"""
    )
    subprocess.check_call(["nvcc", "-arch=sm_90", "-c", source, "-o", binary])
    (kernel,) = kernels_of(binary, "sm_90")
    with pytest.raises(AssertionError, match="uses local memory"):
        check_memory(kernel)
    with pytest.raises(AssertionError, match="200 registers of 64"):
        check_registers(kernel._replace(registers=200))
