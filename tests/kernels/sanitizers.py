"""Runs a Python command on a build of the C++ kernels whose every memory access or integer operation is checked.

python tests/kernels/sanitizers.py address,undefined -m pytest tests/losses/test_ops.py
python tests/kernels/sanitizers.py thread -m torchfast.selftest    # looks for data races

The build goes into build/sanitize-...

The first finding ends the process, and its report says where it was. pytest needs --capture=sys, or it swallows that.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SANITIZERS = "address,undefined"
LIBRARIES = {"address": "libasan.so", "undefined": "libubsan.so", "thread": "libtsan.so"}


def build(source: Path = ROOT, sanitizers: str = SANITIZERS) -> Path:
    """Builds setup.py's CPU part beside the normal build, and returns the folder to import it from."""
    folder = source / "build" / f"sanitize-{sanitizers.replace(',', '-')}"
    command = ["setup.py", "--quiet", "build", "--build-base", folder, "--build-lib", folder / "lib"]
    asked = {"TORCHFAST_SANITIZE": sanitizers, "TORCHFAST_BUILD": "require", "TORCHFAST_CUDA": "0"}
    if sanitizers == "thread":  # Threads share out their work in the same way in every instruction set.
        asked["CXXFLAGS"] = f"{os.environ.get('CXXFLAGS', '')} -DTORCHFAST_BASELINE_ONLY"
    subprocess.run([sys.executable, *command], cwd=source, env=os.environ | asked, check=True)
    return folder / "lib"


def environment(folder: Path, sanitizers: str = SANITIZERS) -> dict[str, str]:
    """Returns the environment of a Python that imports torchfast from the folder. It must start with the sanitizers."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    libraries = [
        subprocess.run(
            [*compiler, f"-print-file-name={LIBRARIES[name]}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in sanitizers.split(",")
    ]
    if sanitizers == "thread" and folder.exists():
        libraries.append(str(folder / "tsan_parallel_for.so"))
        source = HERE / "tsan_parallel_for.c"
        subprocess.run([*compiler, "-x", "c", "-fPIC", "-shared", source, "-o", libraries[-1], "-ldl"], check=True)
    return os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python frees little at its end, and a container may forbid ptrace
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # Mutex bugs would be torch's own, only some of whose libraries are suppressed.
        "TSAN_OPTIONS": f"halt_on_error=1:report_mutex_bugs=0:suppressions={HERE / 'tsan_suppressions.txt'}",
        **({"TORCHFAST_ISA": "baseline"} if sanitizers == "thread" else {}),
        "TORCHFAST_CACHE": "0",  # no sanitizer sees the ends of memory that is used again
        "PYTHONPATH": str(folder),
        "PYTHONSAFEPATH": "1",  # keeps out the sources' own torchfast, which has the normal build
    }


def main(sanitizers: str, *command: str) -> int:
    return subprocess.run([sys.executable, *command], env=environment(build(ROOT, sanitizers), sanitizers)).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
