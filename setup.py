"""Builds torchfast._C where it can: g++ gives the CPU kernels, nvcc beside it the CUDA ones.

Without torch or a compiler the package is pure Python, and says so. Environment:
  TORCHFAST_BUILD = auto | require | 0    the extension
  TORCHFAST_CUDA  = auto | require | 0    its CUDA code
  TORCH_CUDA_ARCH_LIST (default "8.0;9.0;10.0+PTX"), MAX_JOBS, CXX, CUDA_HOME
  TORCHFAST_SANITIZE = address,undefined | thread    for `make sanitize`: not a build to keep
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
HOW_TO_BUILD = "For the native kernels: install torch and g++, then pip install --no-build-isolation ."


def mode(variable: str) -> str:
    value = os.environ.get(variable, "auto")
    if value not in ("auto", "require", "0"):
        raise SystemExit(f"{variable} must be auto, require or 0, got {value!r}")
    return value


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def cuda_archs() -> list[tuple[str, bool]]:
    """[("80", False), ("100", True)]: compute capability, and whether PTX is kept too."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX").replace(" ", ";")
    return [(a.removesuffix("+PTX").replace(".", ""), a.endswith("+PTX")) for a in listed.split(";") if a]


def cuda_library_dir(nvcc: str) -> str:
    """Where libcudart_static.a is: nvcc itself says, also when it is a wrapper script."""
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True)
    for line in dry.stderr.splitlines():
        if line.startswith("#$ LIBRARIES="):
            for flag in shlex.split(line.split("=", 1)[1]):
                folder = Path(flag.removeprefix("-L").strip('"'))
                # The nvcc of the package nvidia-cuda-nvcc names lib64, but that package has lib.
                for candidate in (folder, folder.parent / "lib"):
                    if (candidate / "libcudart_static.a").exists():
                        return str(candidate)
    raise RuntimeError(f"libcudart_static.a not found beside {nvcc}")


def compile_cuda(nvcc: str, folder: Path) -> list[str]:
    """Compiles csrc/cuda/*.cu; torch's own CUDA path would ask for a CUDA build of torch."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = []
    for arch, ptx in cuda_archs():
        targets += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        if ptx:
            targets += ["-gencode", f"arch=compute_{arch},code=compute_{arch}"]
    objects = []
    for source in sorted((HERE / "csrc" / "cuda").glob("*.cu")):
        target = folder / f"{source.stem}.o"
        threads = os.environ.get("MAX_JOBS", "0")  # 0: as many as there are cores
        command = [nvcc, "-O3", "-std=c++17", "--threads", threads, "-Xcompiler", "-fPIC,-fvisibility=hidden", *targets]
        subprocess.check_call([*command, "-c", str(source), "-o", str(target)])
        objects.append(str(target))
    return objects


def native_build() -> dict:
    wanted = mode("TORCHFAST_BUILD")
    if wanted == "0":
        return {}
    problem = None
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        problem = f"torch cannot be imported here ({error})"
    compiler = os.environ.get("CXX", "c++")
    if problem is None and shutil.which(shlex.split(compiler)[0]) is None:
        problem = f"there is no C++ compiler ({compiler})"
    if problem is not None:
        if wanted == "require":
            raise SystemExit(f"torchfast: TORCHFAST_BUILD=require, but {problem}")
        print(f"torchfast: building pure Python, because {problem}. {HOW_TO_BUILD}")
        return {}

    cuda = mode("TORCHFAST_CUDA")
    nvcc = find_nvcc() if cuda != "0" else None
    if cuda == "require" and nvcc is None:
        raise SystemExit("torchfast: TORCHFAST_CUDA=require, but nvcc is not on the PATH or in CUDA_HOME")
    version = subprocess.run([*shlex.split(compiler), "--version"], capture_output=True, text=True)
    archs = " ".join(f"sm_{a}" + (f" compute_{a}" if ptx else "") for a, ptx in cuda_archs()) if nvcc else ""
    macros = {
        "TORCH_TARGET_VERSION": "0x020a000000000000",  # the stable ABI of torch 2.10: one build for all since
        "TORCHFAST_COMPILER": f'"{version.stdout.splitlines()[0] if version.stdout else compiler}"',
        "TORCHFAST_BUILT_WITH_TORCH": f'"{torch.__version__}"',
        "TORCHFAST_CUDA_ARCHS": f'"{archs}"',
    }
    if nvcc:
        macros["TORCHFAST_WITH_CUDA"] = "1"
    flags = "-O3 -std=c++20 -ffp-contract=fast -fvisibility=hidden -g0 -Wall -Wno-psabi -Wno-unused-parameter"
    flags += " -Wno-maybe-uninitialized"  # of which GCC's own intrinsics are full
    # The checks' messages name their file: by its path in the sources, not on this machine.
    flags += f" -ffile-prefix-map={HERE}/= -ffile-prefix-map={Path(torch.__file__).parent}/include/="
    link_flags = "-Wl,-s"
    if sanitizers := os.environ.get("TORCHFAST_SANITIZE"):
        # Python's own flags have -fwrapv, which makes signed overflow defined, so not a finding.
        link_flags = f"-fsanitize={sanitizers} -fno-sanitize-recover=all"
        flags += f" -O1 -g1 -fno-omit-frame-pointer -fno-wrapv {link_flags}"
    extension = CppExtension(
        "torchfast._C",
        sorted(str(p.relative_to(HERE)) for p in (HERE / "csrc").rglob("*.cpp")),
        depends=sorted(str(p.relative_to(HERE)) for s in ("*.h", "*.cu") for p in (HERE / "csrc").rglob(s)),
        define_macros=list(macros.items()),
        include_dirs=[str(HERE / "csrc")],
        extra_compile_args=flags.split(),
        extra_link_args=link_flags.split(),
    )

    class Build(BuildExtension):
        def run(self) -> None:
            # A library left from an earlier build must not outlive a failed one.
            package = [HERE] if self.inplace else []
            for folder in (*package, Path(self.build_lib)):
                for stale in (folder / "torchfast").glob("_C.*"):
                    if stale.suffix != ".pyi":
                        stale.unlink()
            super().run()

        def build_extensions(self) -> None:
            try:
                if nvcc:
                    extension.extra_objects = compile_cuda(nvcc, Path(self.build_temp) / "cuda")
                    extension.extra_link_args += [f"-L{cuda_library_dir(nvcc)}", "-lcudart_static", "-lrt", "-ldl"]
                super().build_extensions()
            except Exception as error:
                if wanted == "require":
                    raise SystemExit(f"torchfast: TORCHFAST_BUILD=require, but the build failed: {error}") from error
                print(f"torchfast: the native build failed, so this build is pure Python: {error}")
                extension.optional = True  # nothing to copy into the package

    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(**native_build())
