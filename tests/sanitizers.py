"""Runs tests on a build of the C++ kernels that checks every memory access and every integer operation.

python tests/sanitizers.py tests/test_ops.py    # pytest, with such a build of csrc, in build/sanitize

AddressSanitizer and UndefinedBehaviorSanitizer end the process at their first finding, and say where.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SANITIZERS = "address,undefined"


def build(source: Path = ROOT, sanitizers: str = SANITIZERS) -> Path:
    """Of setup.py's CPU part, beside the normal one; gives the folder to import it from."""
    folder = source / "build" / sanitizers.replace(",", "_")
    command = ["setup.py", "--quiet", "build", "--build-base", folder, "--build-lib", folder / "lib"]
    asked = {"TORCHFAST_SANITIZE": sanitizers, "TORCHFAST_BUILD": "require", "TORCHFAST_CUDA": "0"}
    subprocess.run([sys.executable, *command], cwd=source, env=os.environ | asked, check=True)
    return folder / "lib"


def environment(folder: Path, sanitizers: str = SANITIZERS) -> dict[str, str]:
    """Of a Python that imports torchfast from the folder. The sanitizers must be loaded before it starts."""
    names = {"address": "libasan", "undefined": "libubsan", "thread": "libtsan"}
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    libraries = (
        subprocess.run(
            [*compiler, f"-print-file-name={names[name]}.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in sanitizers.split(",")
    )
    return os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python frees little at its end, and a container may forbid ptrace
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(folder),
        "PYTHONSAFEPATH": "1",  # not the sources' own torchfast, with the normal build
    }


def main(arguments: list[str]) -> int:
    # Captured at the level of Python alone, or a finding's report ends with the process that made it.
    command = [sys.executable, "-m", "pytest", "--kernel", "native", "--capture=sys", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(build())).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
