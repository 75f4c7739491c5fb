"""Builds the native code where it can: g++ gives the CPU kernels, nvcc beside it the CUDA ones.

Two libraries come of it. ``torchfast/_kernels.so`` has every kernel and knows no Python, so that one build serves each
Python and each torch from 2.10 on; ``torchfast/_C`` is a pybind11 module for the Python at hand, which reports what was
built. Without torch or a compiler the package is pure Python, and says so. Environment:

  TORCHFAST_BUILD = auto | require | 0    the native code
  TORCHFAST_CUDA  = auto | require | 0    its CUDA part
  TORCH_CUDA_ARCH_LIST (default "8.0;9.0;10.0+PTX", of which what nvcc knows), CUDA_HOME
  MAX_JOBS, CXX, CXXFLAGS, LDFLAGS
  TORCHFAST_SANITIZE = address,undefined | thread    for `make sanitize`: not a build to keep
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
HOW_TO_BUILD = "For the native kernels: install torch and g++, then pip install --no-build-isolation ."
OLDEST_SETUPTOOLS = (65, 5)  # what the venv of Python 3.10 and 3.11 brings
OLDEST_TORCH = (2, 10)


class BuildError(Exception):
    """A sentence for the user: what is missing or failed, and what mends it."""


def mode(variable: str) -> str:
    value = os.environ.get(variable, "auto")
    if value not in ("auto", "require", "0"):
        raise SystemExit(f"{variable} must be auto, require or 0, got {value!r}")
    return value


def version_of(text: str) -> tuple[int, int]:
    major, minor = (re.match(r"\d+", part) for part in [*text.split("."), "0"][:2])
    return int(major[0]) if major else 0, int(minor[0]) if minor else 0


# ---- The tools --------------------------------------------------------------------------------


def check_packaging_tools() -> None:
    found = setuptools.__version__
    if version_of(found) < OLDEST_SETUPTOOLS:
        oldest = ".".join(map(str, OLDEST_SETUPTOOLS))
        raise SystemExit(
            f"torchfast: setuptools {found} is too old, {oldest} or newer is needed: pip install 'setuptools>={oldest}'"
        )
    # Newer versions make wheels themselves; pip asks first for a wheel's metadata.
    if version_of(found) < (70, 1) and {"bdist_wheel", "dist_info"} & set(sys.argv):
        try:
            import wheel  # noqa: F401
        except ImportError:
            raise SystemExit(
                f"torchfast: setuptools {found} needs the package wheel to make a wheel: pip install wheel"
            ) from None


def find_torch() -> Path:
    """torch's folder, which holds its headers and libraries."""
    try:
        import torch
    except ImportError as error:
        raise BuildError(f"torch cannot be imported here ({error})") from error
    if version_of(torch.__version__) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise BuildError(
            f"torch {torch.__version__} is too old, {oldest} or newer is needed: pip install 'torch>={oldest}'"
        )
    return Path(torch.__file__).resolve().parent  # resolved, as GCC names its files


def find_compiler() -> list[str]:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        raise BuildError(f"there is no C++ compiler ({compiler[0]})")
    probe = "#include <bit>\nstatic_assert(__cpp_lib_bitops >= 201907L);\n"
    command = [*compiler, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    if subprocess.run(command, input=probe, text=True, capture_output=True).returncode:
        raise BuildError(
            f"the C++ compiler ({first_line(compiler)}) does not compile C++20, GCC 11, clang 14 or newer is needed: "
            "apt-get install g++-12, then CXX=g++-12"
        )
    return compiler


def first_line(compiler: list[str]) -> str:
    said = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    return said.splitlines()[0] if said else compiler[0]


def find_nvcc() -> str | None:
    wanted = mode("TORCHFAST_CUDA")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(home) / "bin" / "nvcc") if home and (Path(home) / "bin" / "nvcc").exists() else shutil.which("nvcc")
    if wanted == "require" and nvcc is None:
        raise SystemExit("torchfast: TORCHFAST_CUDA=require, but nvcc is not on the PATH or in CUDA_HOME")
    return nvcc


def cuda_archs(nvcc: str) -> list[tuple[str, bool]]:
    """[("80", False), ("100", True)]: compute capability, and whether PTX is kept too."""
    if listed := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        archs = [a for a in listed.replace(" ", ";").split(";") if a]
        return [(a.removesuffix("+PTX").replace(".", ""), a.endswith("+PTX")) for a in archs]
    said = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = [arch for arch in ("80", "90", "100") if f"compute_{arch}\n" in said]
    return [(arch, arch == known[-1]) for arch in known]


def cuda_library_dir(nvcc: str) -> str:
    """Returns the folder of libcudart_static.a, which nvcc itself names, also when it is a wrapper script."""
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True)
    for line in dry.stderr.splitlines():
        if line.startswith("#$ LIBRARIES="):
            for flag in shlex.split(line.split("=", 1)[1]):
                folder = Path(flag.removeprefix("-L").strip('"'))
                # The nvcc of the package nvidia-cuda-nvcc names lib64, but that package has lib.
                for candidate in (folder, folder.parent / "lib"):
                    if (candidate / "libcudart_static.a").exists():
                        return str(candidate)
    raise BuildError(f"libcudart_static.a not found beside {nvcc}")


# ---- What is compiled, and how ----------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A command that makes ``target`` of ``sources``. A compiler's lists the headers in ``target``.d. All paths are
    relative to this file's folder, so that a copy of it, with what was built there, is up to date."""

    sources: tuple[Path, ...]
    target: Path
    command: tuple[str, ...]

    @property
    def compiles(self) -> bool:
        return self.target.suffix == ".o"

    @property
    def title(self) -> str:
        source = self.sources[0]
        return str(source) if self.compiles else f"link {self.target.name}"


def plan(folder: Path) -> tuple[list[Step], list[Step]]:
    """The steps to ``folder``/_kernels.so, and those to ``folder``/_C.so, the last of each being the link."""
    torch, compiler, nvcc = find_torch(), find_compiler(), find_nvcc()
    archs = cuda_archs(nvcc) if nvcc else []
    # Only the files that name a macro are given it, so that another choice compiles little again.
    macros = {
        "TORCHFAST_COMPILER": f'"{first_line(compiler)}"',
        "TORCHFAST_BUILT_WITH_TORCH": f'"{sys.modules["torch"].__version__}"',
        "TORCHFAST_CUDA_ARCHS": '"' + " ".join(f"sm_{a}" + (f" compute_{a}" if ptx else "") for a, ptx in archs) + '"',
        **({"TORCHFAST_WITH_CUDA": "1"} if nvcc else {}),
    }
    flags = "-O3 -std=c++20 -ffp-contract=fast -fPIC -fvisibility=hidden -g0 -DNDEBUG -Wall -Wno-psabi".split()
    flags.append("-Wno-maybe-uninitialized")  # GCC's own intrinsics are full of these
    flags.append(f"-ffile-prefix-map={torch}/include/=")  # the checks' messages name these paths
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    mac = sys.platform == "darwin"
    link_flags = ["-shared", *(["-undefined", "dynamic_lookup"] if mac else ["-Wl,-s"])]
    link_flags += shlex.split(os.environ.get("LDFLAGS", ""))
    if sanitizers := os.environ.get("TORCHFAST_SANITIZE"):
        link_flags += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
        flags += ["-O1", "-g1", "-fno-omit-frame-pointer", *link_flags[-2:]]

    def compiled(source: Path, *command: str) -> Step:
        target, text = folder / source.with_suffix(".o"), (HERE / source).read_text()
        named = [f"-D{name}={value}" for name, value in macros.items() if name in text]
        tail = (*named, "-MMD", "-MF", f"{target}.d", "-c", str(source), "-o", str(target))
        return Step((source,), target, (*command, *tail))

    def linked(name: str, steps: list[Step], *libraries: str) -> Step:
        target, objects = folder / name, tuple(step.target for step in steps)
        return Step(objects, target, (*compiler, *map(str, objects), *link_flags, *libraries, "-o", str(target)))

    def sources(pattern: str) -> list[Path]:
        found = sorted(path.relative_to(HERE) for path in (HERE / "csrc").rglob(pattern))
        # The longest come first, so that no core waits at the end.
        return sorted(found, key=lambda path: path.name != "kernels.cpp")

    module = Path("csrc", "module.cpp")
    steps, libraries = [], [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    if nvcc:
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a, _ in archs]
        targets += [f"-gencode=arch=compute_{a},code=compute_{a}" for a, ptx in archs if ptx]
        cuda_flags = ["-O3", "-std=c++17", f"--threads={jobs()}", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Icsrc"]
        steps += [compiled(source, nvcc, *cuda_flags, *targets) for source in sources("*.cu")]
        libraries += [f"-L{cuda_library_dir(nvcc)}", "-lcudart_static", "-lrt", "-ldl"]
    # The stable ABI of torch 2.10: one build for all since. pybind11's headers, which come with torch, refuse it.
    stable = ("-DTORCH_TARGET_VERSION=0x020a000000000000", f"-isystem{torch / 'include'}")
    for source in sources("*.cpp"):
        if source != module:  # Kernels know no torch.
            steps.append(
                compiled(source, *compiler, *flags, "-Icsrc", *(() if source.name == "kernels.cpp" else stable))
            )
    python = ("-Icsrc", f"-isystem{sysconfig.get_path('include')}", f"-isystem{torch / 'include'}")
    extension = [compiled(module, *compiler, *flags, *python)]
    return [*steps, linked("_kernels.so", steps, *libraries)], [*extension, linked("_C.so", extension)]


# ---- Running it -------------------------------------------------------------------------------


def jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def run(steps: list[Step], folder: Path) -> None:
    """Runs the steps with a line for each; with ninja, if that is there, those alone whose sources have changed."""
    for step in steps:
        (HERE / step.target).parent.mkdir(parents=True, exist_ok=True)
    ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if ninja is None:
        return run_without_ninja(steps)
    rules = [f"ninja_required_version = 1.5\nbuilddir = {folder}\nrule link\n command = $run\n description = $title"]
    rules.append("rule compile\n command = $run\n description = $title\n depfile = $out.d\n deps = gcc")
    for step in steps:
        inputs = " ".join(str(source).replace(" ", "$ ") for source in step.sources)
        command = shlex.join(step.command).replace("$", "$$")
        target = str(step.target).replace(" ", "$ ")
        rule = "compile" if step.compiles else "link"
        rules.append(f"build {target}: {rule} {inputs}\n run = {command}\n title = {step.title}")
    file = folder / f"{steps[-1].target.stem}.ninja"
    (HERE / file).write_text("\n".join(rules) + "\n")
    status = os.environ | {"NINJA_STATUS": "[%f/%t, %e s] "}
    command = [ninja, "-f", file, "-j", str(jobs()), steps[-1].target]
    if subprocess.run(command, cwd=HERE, env=status).returncode:
        raise BuildError("the native build failed; the compiler's words are above")


def run_without_ninja(steps: list[Step]) -> None:
    start = time.monotonic()

    def call(step: Step) -> tuple[Step, subprocess.CompletedProcess[str]]:
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return step, subprocess.run(step.command, cwd=HERE, **output)

    with ThreadPoolExecutor(jobs()) as pool:
        for wave in [s for s in steps if s.compiles], steps[-1:]:
            for count, done in enumerate(as_completed([pool.submit(call, step) for step in wave]), 1):
                step, result = done.result()
                before = 0 if step.compiles else len(steps) - 1
                print(f"[{before + count}/{len(steps)}, {time.monotonic() - start:.1f} s] {step.title}", flush=True)
                print(result.stdout, end="", flush=True)
                if result.returncode:
                    pool.shutdown(cancel_futures=True)
                    raise BuildError(f"the native build failed at {shlex.join(step.command)}")


# ---- What setuptools asks ---------------------------------------------------------------------


class Build(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("_kernels"):  # its name has no Python in it, as those of other extensions have
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def run(self) -> None:
        # A library left from an earlier build must not outlive a failed one.
        for package in Path(self.build_lib) / "torchfast", *([HERE / "torchfast"] if self.inplace else []):
            for stale in (*package.glob("_C.*"), *package.glob("_kernels.*")):
                if stale.suffix != ".pyi":
                    stale.unlink()
        super().run()

    def build_extensions(self) -> None:
        folder = Path(os.path.relpath(self.build_temp, HERE))
        try:
            kernels, module = plan(folder)
            run(kernels, folder)
        except BuildError as problem:
            return self.give_up(f"so this build is pure Python. {HOW_TO_BUILD}", problem, *self.extensions)
        try:
            run(module, folder)
        except BuildError as problem:
            self.give_up("which the kernels do not need: it says what was built.", problem, self.extensions[1])
        for extension, built in zip(self.extensions, (kernels[-1].target, module[-1].target), strict=True):
            if not extension.optional:
                target = Path(self.get_ext_fullpath(extension.name))
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(HERE / built, target)

    def give_up(self, consequence: str, problem: BuildError, *extensions: setuptools.Extension) -> None:
        if mode("TORCHFAST_BUILD") == "require":
            raise SystemExit(f"torchfast: TORCHFAST_BUILD=require, but {problem}")
        names = " and ".join(extension.name for extension in extensions)
        print(f"torchfast: {problem}; {names} is left out, {consequence}")
        for extension in extensions:
            extension.optional = True  # there is nothing to copy into the package


def wheel_command() -> type:
    try:
        from setuptools.command.bdist_wheel import bdist_wheel
    except ImportError:  # setuptools before 70.1
        from wheel.bdist_wheel import bdist_wheel

    class Wheel(bdist_wheel):
        def get_tag(self) -> tuple[str, str, str]:
            """The wheel serves any Python 3, since the kernels need none, on the platform they are compiled for."""
            return "py3", "none", super().get_tag()[2]

    return Wheel


def native_build() -> dict:
    check_packaging_tools()
    wanted = mode("TORCHFAST_BUILD")
    if wanted == "0":
        return {}
    find_nvcc()
    try:
        find_torch(), find_compiler()
    except BuildError as problem:
        if wanted == "require":
            raise SystemExit(f"torchfast: TORCHFAST_BUILD=require, but {problem}") from None
        print(f"torchfast: building pure Python, because {problem}. {HOW_TO_BUILD}")
        return {}
    extensions = [setuptools.Extension(f"torchfast.{name}", []) for name in ("_kernels", "_C")]
    commands: dict[str, type] = {"build_ext": Build}
    if "bdist_wheel" in sys.argv:
        commands["bdist_wheel"] = wheel_command()
    return {"ext_modules": extensions, "cmdclass": commands}


# The licence stands here because setuptools before 77 refuses the form that newer ones want in pyproject.toml.
setuptools.setup(license="BSD-3-Clause", **native_build())
