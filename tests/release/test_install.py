"""What a user gets: pure Python without a compiler, native with one, CUDA code with nvcc."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from torchfast import _native
from torchfast.info import report

ROOT = Path(__file__).parents[2]
# An editable install's import hook would find this checkout's extension for the package under test.
NO_EDITABLE = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in repr(f)];"
LOSS = "import torch, torchfast; print(torchfast.cross_entropy(torch.eye(3), torch.arange(3)).item())"
BUILD = report()["build"]  # None: this checkout is pure Python; a sentence: torchfast._C is of another Python
CUDA_ARCHS = BUILD["cuda_archs"].split() if isinstance(BUILD, dict) else []
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
            shutil.copy2(ROOT / name, target / name)  # with its time, by which a build tells what is up to date
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
    assert "no compiled kernels" in info["missing"]["native"]


def test_without_a_compiler_the_wheel_is_pure_python_and_works(source: Path, tmp_path: Path) -> None:
    wheel, log = build_wheel(source, tmp_path, CXX="/nonexistent/c++")
    assert wheel is not None and wheel.name.endswith("py3-none-any.whl"), log
    assert "building pure Python, because there is no C++ compiler" in log
    names = unpack(wheel, tmp_path / "site")
    assert "torchfast/py.typed" in names and not [n for n in names if n.endswith((".so", ".cpp", ".cu"))]
    code, output = audit(wheel)
    assert code == 0 and "pure Python" in output, output
    assert_works_as_reference(tmp_path / "site")


def test_an_old_compiler_is_named_with_what_mends_it(source: Path, tmp_path: Path) -> None:
    wheel, log = build_wheel(source, tmp_path, CXX="/bin/false", TORCHFAST_CUDA="0")
    assert wheel is not None and wheel.name.endswith("py3-none-any.whl"), log
    assert "does not compile C++20, GCC 11, clang 14 or newer is needed: apt-get install g++-12" in log


def path_without_ninja(folder: Path) -> str:
    """A PATH of links to all programs but ninja."""
    folder.mkdir()
    for entry in reversed(os.environ["PATH"].split(os.pathsep)):
        for program in Path(entry).glob("*"):
            if program.name != "ninja":
                (folder / program.name).unlink(missing_ok=True)
                (folder / program.name).symlink_to(program)
    return str(folder)


@pytest.fixture(scope="module")
def failing_compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """It knows C++20, but compiles nothing of ours."""
    script = tmp_path_factory.mktemp("compiler") / "c++"
    script.write_text('#!/bin/sh\ncase "$*" in *.cpp*) echo "no more memory"; exit 1;; esac\nexec c++ "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize("ninja", [True, False])
def test_a_failing_compiler_leaves_a_working_package_and_no_stale_library(
    source: Path, tmp_path: Path, failing_compiler: str, ninja: bool
) -> None:
    path = os.environ["PATH"] if ninja else path_without_ninja(tmp_path / "bin")
    wheel, log = build_wheel(source, tmp_path, CXX=failing_compiler, TORCHFAST_CUDA="0", PATH=path)
    assert wheel is not None, log
    assert "is left out, so this build is pure Python" in log and "no more memory" in log
    assert not [n for n in unpack(wheel, tmp_path / "site") if n.endswith(".so")]
    assert_works_as_reference(tmp_path / "site")


@pytest.mark.parametrize("compiler", ["/nonexistent/c++", "/bin/false", "failing"])
def test_require_turns_a_missing_or_failing_compiler_into_an_error(
    source: Path, tmp_path: Path, failing_compiler: str, compiler: str
) -> None:
    compiler = failing_compiler if compiler == "failing" else compiler
    wheel, log = build_wheel(source, tmp_path, CXX=compiler, TORCHFAST_BUILD="require", TORCHFAST_CUDA="0")
    assert wheel is None and "TORCHFAST_BUILD=require, but" in log


def test_a_failed_build_in_place_leaves_no_stale_library(source: Path, failing_compiler: str) -> None:
    stale = [source / "torchfast" / name for name in ("_kernels.so", "_C.cpython-311-x86_64-linux-gnu.so")]
    for library in stale:
        library.write_bytes(b"from an earlier build")
    result = run("setup.py", "build_ext", "--inplace", cwd=source, CXX=failing_compiler, TORCHFAST_CUDA="0")
    assert "this build is pure Python" in result.stdout, result.stderr
    assert not any(library.exists() for library in stale) and (source / "torchfast" / "_C.pyi").exists()


@pytest.mark.parametrize(
    "module, version, command, said",
    [
        ("setuptools", "59.6.0", "build_ext", "setuptools 59.6.0 is too old, 65.5 or newer is needed: pip install"),
        ("setuptools", "65.5.0", "bdist_wheel", "setuptools 65.5.0 needs the package wheel to make a wheel: pip"),
        ("setuptools", "65.5.0", "dist_info", "setuptools 65.5.0 needs the package wheel to make a wheel: pip"),
        ("torch", "2.9.1", "build_ext", "torch 2.9.1 is too old, 2.10 or newer is needed: pip install 'torch>=2.10'"),
    ],
)
def test_a_tool_that_is_too_old_is_named_with_what_mends_it(
    source: Path, module: str, version: str, command: str, said: str
) -> None:
    """In one sentence, and without a traceback."""
    code = f"import sys, runpy, {module}; {module}.__version__ = {version!r}; sys.modules['wheel'] = None;"
    code += f"sys.argv = ['setup.py', {command!r}]; runpy.run_path('setup.py')"
    result = run("-c", code, cwd=source, TORCHFAST_BUILD="require", TORCHFAST_CUDA="0")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert said in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_a_source_distribution_made_without_torch_can_be_built_natively(source: Path) -> None:
    result = run("setup.py", "sdist", cwd=source, TORCHFAST_BUILD="0")
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as content:
        names = {name.split("/", 1)[-1] for name in content.getnames()}
    sources = {str(path.relative_to(source)) for path in (source / "csrc").rglob("*.*")}
    assert len(sources) > 5 and sources <= names, result.stderr


@pytest.fixture(scope="module")
def native_wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of what the checkout's own build left, where that is up to date: compiling it again would take minutes."""
    if _native.unavailable_reason is not None:
        pytest.skip("this build is pure Python")
    if (ROOT / "build").exists():
        kept = shutil.ignore_patterns("lib*", "sanitize*")
        shutil.copytree(ROOT / "build", source / "build", ignore=kept, dirs_exist_ok=True)
    wheel, log = build_wheel(source, tmp_path_factory.mktemp("native"), TORCHFAST_BUILD="require")
    assert wheel is not None, log
    return wheel


def audit(wheel: Path) -> tuple[int, str]:
    result = run(".ci/audit_wheel.py", str(wheel), cwd=ROOT)
    return result.returncode, result.stdout + result.stderr


def test_the_native_wheel_passes_the_audit_of_its_content(native_wheel: Path) -> None:
    code, output = audit(native_wheel)
    assert "native" in output and code == 0, output


def test_the_audit_says_what_is_wrong_with_a_wheel(native_wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(native_wheel) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    binary, module = "torchfast/_kernels.so", next(name for name in content if "/_C.cpython" in name)
    one_python = native_wheel.name.replace("py3-none", "cp311-cp311")
    path = b"/home/someone/csrc/walk.h"
    for name, changes, said in (
        (native_wheel.name, {"torchfast/py.typed": None}, "torchfast/py.typed is missing"),
        (native_wheel.name, {"tests/losses/test_ops.py": b""}, "tests/losses/test_ops.py does not belong in it"),
        (native_wheel.name, {"torchfast/_C.other.so": b""}, "torchfast/_C.other.so does not belong in it"),
        (native_wheel.name, {binary: content[binary] + b"\0" + path + b"\0"}, "names /home/someone/csrc/walk.h"),
        (native_wheel.name, {binary: None, module: None}, "its tags are those of a binary, but it has none"),
        (native_wheel.name, {binary: content[module]}, "torchfast/_kernels.so needs Python's Py"),
        (one_python, {}, "its kernels serve every Python, but its tags name one"),
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


def test_without_a_module_for_this_python_the_kernels_serve_all_the_same(native_wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    (module,) = (name for name in unpack(native_wheel, site) if "/_C.cpython" in name)
    (site / module).rename(site / "torchfast" / "_C.cpython-39-x86_64-linux-gnu.so")
    assert float(run_installed(LOSS, site)) == pytest.approx(0.5514447)
    info = json.loads(run_installed(INFO, site))
    assert info["kernels"]["cross_entropy"]["cpu"] == "native"
    assert "is not built for Python" in info["build"] and "no kernel needs it" in info["build"]


@pytest.mark.skipif(not CUDA_ARCHS, reason="built without nvcc")
def test_the_binary_contains_code_for_every_gpu_architecture_it_names() -> None:
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listed = subprocess.run([tool, "--list-elf", _native.LIBRARY], capture_output=True, text=True).stdout
    for arch in ("sm_80", "sm_90", "sm_100"):
        assert f".{arch}." in listed, listed
        assert arch in CUDA_ARCHS
    if not torch.cuda.is_available():  # and without a driver it says so instead of crashing
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.ops.torchfast.cuda_probe(0)


@pytest.mark.skipif(not isinstance(BUILD, dict), reason="there is no torchfast._C")
def test_native_code_finds_functions_of_libraries_that_it_does_not_link_with() -> None:
    """As it must torch's current CUDA stream. torch loads its libraries such that no symbol is global."""
    from torchfast import _C

    assert _C.has_symbol("libtorch_python.so", "THPPyInterpreterFrame_New")
    assert not _C.has_symbol("libtorch_python.so", "aoti_torch_get_current_cuda_stream")
    cuda = _C.has_symbol("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream")
    assert cuda == (torch.version.cuda is not None)


@pytest.mark.skipif(not isinstance(BUILD, dict), reason="there is no torchfast._C")
def test_the_stub_of_the_extension_names_what_it_has() -> None:
    from torchfast import _C

    stub = ast.parse((ROOT / "torchfast" / "_C.pyi").read_text()).body
    (keys,) = ({line.target.id for line in node.body} for node in stub if isinstance(node, ast.ClassDef))
    assert keys == BUILD.keys() and all(type(value) is str for value in BUILD.values())
    functions = {node.name: [a.arg for a in node.args.args] for node in stub if isinstance(node, ast.FunctionDef)}
    assert functions.keys() == {name for name in dir(_C) if not name.startswith("_")}
    for name, arguments in functions.items():
        assert re.findall(r"(\w+): ", getattr(_C, name).__doc__.split(" -> ")[0]) == arguments


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
