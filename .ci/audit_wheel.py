"""Checks a wheel's content: `python .ci/audit_wheel.py dist/*.whl` prints what is wrong with it and exits 1, or 0.

It must hold the package's Python files, its stubs, the kernels' library and the pybind11 module of one Python, and
nothing else. The kernels must serve every Python, as the wheel's tags say: they ask nothing of Python, of torch its
stable C functions alone, name no path of the machine that built them, and where they have CUDA code, have it for every
architecture that the README promises.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from elftools.elf.elffile import ELFFile
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).parent.parent
CUDA_ARCHS = {"sm_80", "sm_90", "sm_100"}
# libtorch_python and libcudart would tie the binary to one torch; the CUDA runtime is linked statically.
LIBRARIES = r"lib(c10|torch|torch_cpu|stdc\+\+|gcc_s|c|m|dl|rt|pthread)\.so(\.\d+)?|ld-linux-.*"
UNSTABLE = r"_ZNK?(2at|3c10|5torch)"  # C++ functions of torch: they change with every release
KERNELS = "torchfast/_kernels.so"
MODULE = r"torchfast/_C\.cpython-[\w\-]+\.so"
METADATA = {"METADATA", "WHEEL", "RECORD", "top_level.txt", "licenses/LICENSE"}
ABSOLUTE_PATH = rb"(?<=\0)/[\w.+\-/]+/[\w.+\-]+\.(?:h|hpp|c|cc|cpp|cu|cuh)(?=\0)"


def cuobjdump() -> str | None:
    """Finds cuobjdump: CUDA's own, or that of the package triton or nvidia-cuda-cuobjdump."""
    packages = Path(sysconfig.get_path("purelib"))
    found = [*packages.glob("triton/backends/nvidia/bin/cuobjdump"), *packages.glob("nvidia/cu*/bin/cuobjdump")]
    return shutil.which("cuobjdump") or (str(found[0]) if found else None)


def package_files() -> set[str]:
    files = (path for path in (ROOT / "torchfast").rglob("*") if path.suffix in (".py", ".pyi") or path.stem == "py")
    return {str(path.relative_to(ROOT)) for path in files}


def findings_of_names(wheel: Path, names: set[str], binaries: set[str]) -> Iterator[str]:
    name, version, _, tags = parse_wheel_filename(wheel.name)
    metadata = {n for n in names if n.startswith(f"{name}-{version}.dist-info/")}
    expected = package_files() | binaries
    yield from (f"{n} is missing" for n in sorted(expected - names))
    yield from (f"{n} does not belong in it" for n in sorted(names - metadata - expected))
    for n in sorted(n for n in metadata if n.split("/", 1)[1] not in METADATA):
        yield f"{n} does not belong in it"
    if not binaries and {str(tag) for tag in tags} != {"py3-none-any"}:
        yield "its tags are those of a binary, but it has none"
    if binaries:
        if KERNELS not in binaries:
            yield f"{KERNELS} is missing"
        for tag in tags:
            if (tag.interpreter, tag.abi) != ("py3", "none"):
                yield f"its kernels serve every Python, but its tags name one: {tag}"
            if tag.platform == "any":
                yield f"tag {tag}, but the binary is of one platform"


def findings_of_elf(path: Path, name: str) -> Iterator[str]:
    data = path.read_bytes()
    for found in sorted(set(re.findall(ABSOLUTE_PATH, data))):
        yield f"{name} names {found.decode()}"
    with path.open("rb") as file:
        elf = ELFFile(file)
        for tag in elf.get_section_by_name(".dynamic").iter_tags():
            if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH"):
                yield f"{name} looks for libraries in {getattr(tag, 'runpath', None) or tag.rpath}"
            if tag.entry.d_tag == "DT_NEEDED" and not re.fullmatch(LIBRARIES, tag.needed):
                yield f"{name} needs {tag.needed}"
        for symbol in elf.get_section_by_name(".dynsym").iter_symbols():
            if symbol["st_shndx"] != "SHN_UNDEF":
                continue
            if re.match(UNSTABLE, symbol.name):
                yield f"{name} needs torch's {symbol.name}, which is not of its stable ABI"
            if name == KERNELS and re.match(r"_?Py", symbol.name):
                yield f"{name} needs Python's {symbol.name}, so that it serves one Python alone"
        if elf.get_section_by_name(".symtab") or elf.get_section_by_name(".debug_info"):
            yield f"{name} is not stripped"
        cuda = elf.get_section_by_name(".nv_fatbin") is not None
    if cuda and (tool := cuobjdump()) is None:
        yield "what the binary's CUDA code is for needs cuobjdump, as of the package nvidia-cuda-cuobjdump"
    elif cuda:
        listed = subprocess.run([tool, "--list-elf", path], capture_output=True, text=True).stdout
        archs = set(re.findall(r"sm_\d+", listed))
        print(f"CUDA code for {', '.join(sorted(archs, key=lambda arch: int(arch[3:])))}")
        yield from (f"the binary has no code for {arch}" for arch in sorted(CUDA_ARCHS - archs))


def audit(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = [n for n in archive.namelist() if not n.endswith("/")]
        binaries = {n for n in names if n == KERNELS or re.fullmatch(MODULE, n)}
        found = [*findings_of_names(wheel, set(names), binaries)]
        for name in sorted(binaries):
            if archive.read(name)[:4] == b"\x7fELF":  # macOS has another format
                found += findings_of_elf(Path(archive.extract(name, folder)), name)
    size = wheel.stat().st_size / 2**20
    print(f"{wheel.name}: {len(names)} files, {size:.1f} MiB, {'native' if binaries else 'pure Python'}")
    return found


if __name__ == "__main__":
    wrong = [finding for wheel in sys.argv[1:] for finding in audit(Path(wheel))]
    print(*wrong, sep="\n")
    sys.exit(bool(wrong) or len(sys.argv) < 2)
