"""The foundation of the CPU's kernels by itself: small programs that know no torch, in each instruction set of this
machine; headers that stand alone; and no function that the linker could take from a wider instruction set."""

import os
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
# GCC makes a multiplication and an addition one instruction, as in the library, among its expensive optimisations.
FLAGS = ["-O1", "-fexpensive-optimizations", "-ffp-contract=fast", "-std=c++20", "-Wno-psabi", f"-I{CSRC}", f"-I{HERE}"]
# The first two need torch's headers; the last one includes the file which includes it.
NOT_ALONE = ("torch/", "ranking/op.h", "simd/foreach_isa.h")
# Each instruction of AVX and later is named v..., those of BMI are named here.
WIDE = re.compile(r"\t(v[a-z0-9]+|andn|bextr|bls[a-z]+|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx|lzcnt|popcnt|movbe)\s")
PLANTED = """
#define TORCHFAST_FILE "planted.cpp"
#include "simd/foreach_isa.h"

#ifndef PLANTED_ONCE
#define PLANTED_ONCE
#include "simd/isa.h"
#ifdef EVERYWHERE
TORCHFAST_BEGIN_ISA
__attribute__((noinline)) inline float twice(const float* x) { return x[0] + x[1]; }
TORCHFAST_END_ISA
#endif
#endif

TORCHFAST_KERNELS
#ifndef EVERYWHERE
__attribute__((noinline)) float twice(const float* x) { return x[0] + x[1]; }
#endif
float planted(const float* x) { return twice(x); }
TORCHFAST_END_KERNELS

#ifdef TORCHFAST_LAST_ISA
float planted(const float* x) { using namespace torchfast; return TORCHFAST_DISPATCH(planted)(x); }
#endif
"""

pytestmark = pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason=f"there is no compiler {COMPILER[0]}")


def compiled(*arguments: str | Path, **options) -> None:
    result = subprocess.run([*COMPILER, *FLAGS, *arguments], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("program", ["vec", "math", "walk", "sort", "retrieval"])
def test_a_unit_is_what_plain_loops_say_in_every_instruction_set(program: str, tmp_path: Path) -> None:
    compiled(HERE / f"{program}.cpp", CSRC / "memory" / "regions.cpp", "-o", tmp_path / program)
    result = subprocess.run([tmp_path / program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "baseline" in result.stdout.split("\n")


@pytest.mark.parametrize(
    "header",
    [
        name
        for name in sorted(str(path.relative_to(CSRC)) for path in CSRC.rglob("*.h"))
        if not name.startswith(NOT_ALONE)
    ],
)
def test_a_header_compiles_alone_and_without_torch(header: str) -> None:
    compiled("-fsyntax-only", "-x", "c++", "-", input=f'#include "{header}"\n')


def wide_weak_functions(binary: Path) -> set[str]:
    """Lists the functions of which the linker keeps any one copy, and which are compiled here for wider machines."""
    symbols = subprocess.run(["nm", binary], capture_output=True, text=True, check=True).stdout
    weak = {line.split()[-1] for line in symbols.splitlines() if re.search(r" [WVu] ", line)}
    code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", binary], capture_output=True, text=True, check=True)
    functions = re.split(r"^[0-9a-f]+ <(.+)>:$", code.stdout, flags=re.MULTILINE)[1:]
    assert functions
    return {
        name for name, body in zip(functions[::2], functions[1::2], strict=True) if name in weak and WIDE.search(body)
    }


needs_x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not (shutil.which("nm") and shutil.which("objdump")),
    reason="one instruction set is compiled for here, or there are no binutils",
)


@needs_x86
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_planted_weak_function_is_found(everywhere: bool, tmp_path: Path) -> None:
    (tmp_path / "planted.cpp").write_text(PLANTED)
    macros = ["-DEVERYWHERE"] if everywhere else []
    compiled(*macros, f"-I{tmp_path}", "-c", tmp_path / "planted.cpp", "-o", tmp_path / "planted.o")
    found = wide_weak_functions(tmp_path / "planted.o")
    assert [name for name in found if "twice" in name] == list(found) and bool(found) == everywhere


@needs_x86
def test_no_weak_function_of_the_kernels_is_of_a_wider_instruction_set(tmp_path: Path) -> None:
    """Looks into the objects that the build left here, or else into one that is compiled for this."""
    built = sorted((ROOT / "build").glob("temp*/csrc/*/kernels.o"))
    if not built:
        built = [tmp_path / "kernels.o"]
        compiled("-O2", "-c", CSRC / "regression" / "kernels.cpp", "-o", built[0])
    for binary in built:
        assert wide_weak_functions(binary) == set(), binary
