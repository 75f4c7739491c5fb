"""What a user gets: pure Python without a compiler, native with one, CUDA code with nvcc."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import torchfast
from torchfast import _native

ROOT = Path(__file__).parent.parent
# An editable install's import hook would find this checkout's extension for the package under test.
NO_EDITABLE = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in repr(f)];"
LOSS = "import torch, torchfast; print(torchfast.cross_entropy(torch.eye(3), torch.arange(3)).item())"
INFO = "import json, torchfast.info; print(json.dumps(torchfast.info.report()))"


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TORCHFAST_")}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env={**clean, **environment}, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources: a build leaves files behind, and must not find any."""
    target = tmp_path_factory.mktemp("source")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.split("\0"):
        if name.startswith(("csrc/", "torchfast/")) or name in (
            "setup.py",
            "pyproject.toml",
            "README.md",
            "LICENSE",
            "MANIFEST.in",
        ):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())
    return target


def build_wheel(source: Path, out: Path, **environment: str) -> tuple[Path | None, str]:
    command = ("-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), ".")
    result = run(*command, cwd=source, **environment)
    wheels = sorted(out.glob("*.whl")) if result.returncode == 0 else [None]
    return wheels[0], result.stdout + result.stderr


def unpack(wheel: Path, target: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
        return archive.namelist()


def run_installed(code: str, site: Path) -> str:
    result = run("-c", NO_EDITABLE + code, cwd=site, PYTHONPATH=str(site))
    assert result.returncode == 0, result.stderr
    return result.stdout


def assert_works_as_reference(site: Path) -> None:
    assert float(run_installed(LOSS, site)) == pytest.approx(0.5514447)
    info = json.loads(run_installed(INFO, site))
    assert info["kernels"]["cross_entropy"]["cpu"] == "reference"
    assert "no compiled extension" in info["missing"]["native"]


def test_without_a_compiler_the_wheel_is_pure_python_and_works(source: Path, tmp_path: Path) -> None:
    wheel, log = build_wheel(source, tmp_path, CXX="/nonexistent/c++")
    assert wheel is not None and wheel.name.endswith("py3-none-any.whl"), log
    assert "building pure Python, because there is no C++ compiler" in log
    names = unpack(wheel, tmp_path / "site")
    assert "torchfast/py.typed" in names and not [n for n in names if n.endswith((".so", ".cpp", ".cu"))]
    code, output = audit(wheel)
    assert code == 0 and "pure Python" in output, output
    assert_works_as_reference(tmp_path / "site")


def test_a_failing_compiler_leaves_a_working_package_and_no_stale_library(source: Path, tmp_path: Path) -> None:
    wheel, log = build_wheel(source, tmp_path, CXX="/bin/false", TORCHFAST_CUDA="0")
    assert wheel is not None, log
    assert "the native build failed, so this build is pure Python" in log
    assert not [n for n in unpack(wheel, tmp_path / "site") if n.endswith(".so")]
    assert_works_as_reference(tmp_path / "site")


@pytest.mark.parametrize("compiler", ["/nonexistent/c++", "/bin/false"])
def test_require_turns_a_missing_or_failing_compiler_into_an_error(source: Path, tmp_path: Path, compiler: str) -> None:
    wheel, log = build_wheel(source, tmp_path, CXX=compiler, TORCHFAST_BUILD="require", TORCHFAST_CUDA="0")
    assert wheel is None and "TORCHFAST_BUILD=require, but" in log


def test_a_failed_build_in_place_leaves_no_stale_library(source: Path) -> None:
    stale = source / "torchfast" / "_C.cpython-311-x86_64-linux-gnu.so"
    stale.write_bytes(b"from an earlier build")
    result = run("setup.py", "build_ext", "--inplace", cwd=source, CXX="/bin/false", TORCHFAST_CUDA="0")
    assert "this build is pure Python" in result.stdout, result.stderr
    assert not stale.exists() and (source / "torchfast" / "_C.pyi").exists()


def test_a_source_distribution_made_without_torch_can_be_built_natively(source: Path) -> None:
    result = run("setup.py", "sdist", cwd=source, TORCHFAST_BUILD="0")
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as content:
        names = {name.split("/", 1)[-1] for name in content.getnames()}
    sources = {str(path.relative_to(source)) for path in (source / "csrc").rglob("*.*")}
    assert len(sources) > 5 and sources <= names, result.stderr


@pytest.fixture(scope="module")
def native_wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if _native.unavailable_reason is not None:
        pytest.skip("this build is pure Python")
    one = {"TORCH_CUDA_ARCH_LIST": "9.0"}  # the code for all GPUs is that of the checkout, below
    wheel, log = build_wheel(source, tmp_path_factory.mktemp("native"), TORCHFAST_BUILD="require", **one)
    assert wheel is not None, log
    return wheel


def audit(wheel: Path) -> tuple[int, str]:
    result = run(".ci/audit_wheel.py", str(wheel), cwd=ROOT)
    return result.returncode, result.stdout + result.stderr


def test_the_native_wheel_passes_the_audit_of_its_content(native_wheel: Path) -> None:
    _, output = audit(native_wheel)
    found = [line for line in output.splitlines() if line and not line.startswith(("CUDA code for", "torchfast-"))]
    missing = ["the binary has no code for sm_100", "the binary has no code for sm_80"]  # it was made for one GPU
    assert "native" in output and found == (missing if "CUDA code for sm_90" in output else []), output


def test_the_audit_says_what_is_wrong_with_a_wheel(native_wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(native_wheel) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    (binary,) = (name for name in content if name.endswith(".so"))
    other_python = re.sub(r"cp\d+-cp\d+", "cp39-cp39", native_wheel.name)
    path = b"/home/someone/csrc/walk.h"
    for name, changes, said in (
        (native_wheel.name, {"torchfast/py.typed": None}, "torchfast/py.typed is missing"),
        (native_wheel.name, {"tests/test_ops.py": b""}, "tests/test_ops.py does not belong in it"),
        (native_wheel.name, {"torchfast/_C.other.so": b""}, "torchfast/_C.other.so does not belong in it"),
        (native_wheel.name, {binary: content[binary] + b"\0" + path + b"\0"}, "names /home/someone/csrc/walk.h"),
        (native_wheel.name, {binary: None}, "its tags are those of a binary, but it has none"),
        (other_python, {}, f"but the binary is {binary}"),
    ):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for entry, data in (content | changes).items():
                if data is not None:
                    archive.writestr(entry, data)
        code, output = audit(tmp_path / name)
        assert code == 1 and said in output, output


def test_the_native_wheel_serves_the_op(native_wheel: Path, tmp_path: Path) -> None:
    unpack(native_wheel, tmp_path / "site")
    site = tmp_path / "site"
    assert float(run_installed(LOSS, site)) == pytest.approx(0.5514447)
    info = json.loads(run_installed(INFO, site))
    assert info["kernels"]["cross_entropy"]["cpu"] == "native"
    assert info["build"]["built_with_torch"] == torch.__version__


@pytest.mark.skipif(
    _native.unavailable_reason is not None or not torchfast._C.build_info()["cuda_archs"],
    reason="built without nvcc",
)
def test_the_binary_contains_code_for_every_gpu_architecture_it_names() -> None:
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listed = subprocess.run([tool, "--list-elf", torchfast._C.__file__], capture_output=True, text=True).stdout
    for arch in ("sm_80", "sm_90", "sm_100"):
        assert f".{arch}." in listed, listed
        assert arch in torchfast._C.build_info()["cuda_archs"].split()
    if not torch.cuda.is_available():  # and without a driver it says so instead of crashing
        with pytest.raises(RuntimeError, match="CUDA"):
            torchfast._C.cuda_probe(0)


@pytest.mark.skipif(
    _native.unavailable_reason is not None or not torchfast._C.build_info()["cuda_archs"],
    reason="built without nvcc",
)
def test_the_binary_finds_functions_of_libraries_that_it_does_not_link_with() -> None:
    """As it must torch's current CUDA stream. torch loads its libraries such that no symbol is global."""
    assert torchfast._C.has_symbol("libtorch_python.so", "THPPyInterpreterFrame_New")
    assert not torchfast._C.has_symbol("libtorch_python.so", "aoti_torch_get_current_cuda_stream")
    cuda = torchfast._C.has_symbol("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream")
    assert cuda == (torch.version.cuda is not None)


@pytest.mark.skipif(_native.unavailable_reason is not None, reason="this build is pure Python")
def test_the_stub_of_the_extension_names_what_it_has() -> None:
    stub = ast.parse((ROOT / "torchfast" / "_C.pyi").read_text()).body
    info = torchfast._C.build_info()
    (keys,) = ({line.target.id for line in node.body} for node in stub if isinstance(node, ast.ClassDef))
    assert keys == info.keys() and all(type(value) is str for value in info.values())
    functions = {node.name: [a.arg for a in node.args.args] for node in stub if isinstance(node, ast.FunctionDef)}
    signatures = {n: getattr(torchfast._C, n).__doc__.split(" -> ")[0] for n in functions if hasattr(torchfast._C, n)}
    assert signatures.keys() == {name for name in dir(torchfast._C) if not name.startswith("_")}
    assert functions.keys() - signatures.keys() == (set() if info["cuda_archs"] else {"cuda_probe", "has_symbol"})
    for name, signature in signatures.items():
        assert re.findall(r"(\w+): ", signature) == functions[name]


def test_importing_is_light() -> None:
    code = "import sys, torch; before = set(sys.modules); import torchfast; print(*(set(sys.modules) - before))"
    new = run("-c", code, cwd=ROOT).stdout.split()
    assert "torchfast" in new
    assert not {"torchmetrics", "triton", "matplotlib", "numpy"} & {name.split(".")[0] for name in new}


def test_native_kernels_can_be_switched_off() -> None:
    info = json.loads(run("-m", "torchfast.info", "--json", cwd=ROOT, TORCHFAST_DISABLE_NATIVE="1").stdout)
    assert info["missing"]["native"] == "disabled by TORCHFAST_DISABLE_NATIVE"
    assert info["kernels"]["cross_entropy"]["cpu"] == "reference"


def test_info_prints_a_table_and_exits_0() -> None:
    result = run("-m", "torchfast.info", cwd=ROOT)
    assert result.returncode == 0 and "cross_entropy" in result.stdout
