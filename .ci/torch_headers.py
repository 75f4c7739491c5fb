"""Compiles csrc against the headers of other torches: `python .ci/torch_headers.py 2.10.0 2.14.1`.

The files called kernels.cpp are left out: they know no torch, and setup.py compiles them without its headers.

Of each release only `torch/include` is fetched: 14 MB out of a wheel of some hundred, by HTTP ranges, or from the file
where the index is a folder. Nothing is linked, and the compiler only checks: half a minute a release. Exits 1 if a file
does not compile, or if a release cannot be had.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).parent.parent / "csrc"
FLAGS = [
    "-std=c++20",
    "-fsyntax-only",
    "-fvisibility=hidden",
    "-Wall",
    "-Werror",
    "-Wno-psabi",
    "-DTORCHFAST_WITH_CUDA=1",
]
BUILD = [f'-DTORCHFAST_{name}=""' for name in ("COMPILER", "BUILT_WITH_TORCH", "CUDA_ARCHS")]


class Ranges(io.RawIOBase):
    """A file on a server that sends parts of it."""

    def __init__(self, url: str) -> None:
        self.url, self.position = url, 0
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD")) as answer:
            self.size = int(answer.headers["Content-Length"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def readinto(self, buffer: memoryview) -> int:
        end = min(self.position + len(buffer), self.size) - 1
        if end < self.position:
            return 0
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={self.position}-{end}"})
        with urllib.request.urlopen(request) as answer:
            if answer.status != 206:
                raise RuntimeError("the package index does not send parts of a file")
            data = answer.read()
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def fetch_headers(torch: str, folder: Path) -> None:
    """Puts torch/include of a release into the folder."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed"]
    asked = subprocess.run([*pip, "--report", "-", f"torch=={torch}"], capture_output=True, text=True)
    if asked.returncode:
        raise RuntimeError(asked.stderr.strip())
    url = json.loads(asked.stdout)["install"][0]["download_info"]["url"]
    local = urllib.parse.urlparse(url)
    path = urllib.request.url2pathname(local.path)
    file = open(path, "rb") if local.scheme == "file" else io.BufferedReader(Ranges(url), 4 << 20)  # noqa: SIM115
    with file, zipfile.ZipFile(file) as wheel:
        headers = [entry for entry in wheel.infolist() if entry.filename.startswith("torch/include/")]
        for entry in sorted(headers, key=lambda entry: entry.header_offset):  # a range holds many neighbours
            wheel.extract(entry, folder)


def compile_all(include: Path) -> list[str]:
    """Returns what the compiler says of each file that does not compile."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    stable = [f"-I{CSRC}", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    module = [*BUILD, f"-I{CSRC}", f"-isystem{sysconfig.get_path('include')}"]

    def check(source: Path) -> str:
        flags = module if source.name == "module.cpp" else stable
        command = [*compiler, *FLAGS, *flags, f"-isystem{include}", source]
        return subprocess.run(command, capture_output=True, text=True).stderr

    sources = sorted(source for source in CSRC.rglob("*.cpp") if source.name != "kernels.cpp")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [said for said in pool.map(check, sources) if said]


def main(torches: list[str]) -> int:
    failed = 0
    for torch in torches:
        with tempfile.TemporaryDirectory() as folder:
            try:
                fetch_headers(torch, Path(folder))
                problems = compile_all(Path(folder) / "torch" / "include")
            except (RuntimeError, urllib.error.URLError) as error:
                problems = [f"its headers cannot be had: {error}"]
        failed += bool(problems)
        print(f"torch {torch}: " + ("\n".join(problems) or "all of csrc compiles"), flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
