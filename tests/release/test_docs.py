"""Every public symbol is documented and on an API page; every example of the documentation runs; its links resolve.

The site that is made of it is looked at in test_site.py.
"""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import os
import pkgutil
import pydoc
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

import torchfast
from torchfast import _register, info, losses, metrics, selftest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


@pytest.fixture(autouse=True)
def once(request):
    """Documentation does not depend on what serves the CPU, and Triton's interpreter is slow."""
    if request.config.getoption("--kernel"):
        pytest.skip("checked in the default run")


# ---- Docstrings ------------------------------------------------------------------------------


def rooms(package):
    found = (f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__))
    return [importlib.import_module(name) for name in found if not re.search(r"\.(_|triton_)", name)]


MODULES = [torchfast, losses, *rooms(losses), metrics, *rooms(metrics), info, selftest]
EXPORTED = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in MODULES
    for name in getattr(module, "__all__", ())
    if name != "__version__"
}
SYMBOLS = {path: x for path, x in EXPORTED.items() if not isinstance(x, ModuleType)}
every_symbol = pytest.mark.parametrize("path", SYMBOLS)


def test_every_public_module_says_what_it_exports():
    assert [module.__name__ for module in MODULES if not hasattr(module, "__all__")] == ["torchfast.losses"]
    assert len(SYMBOLS) > 40


def named(name, of):
    """The function or class that a docstring names: in the symbol's module, or in the nearest package of that."""
    places = (of.__name__ if isinstance(of, ModuleType) else of.__module__).split(".")
    for path in (name, *(".".join([*places[:n], name]) for n in range(len(places), 0, -1))):
        found = pydoc.locate(path)
        if found is not None and not isinstance(found, ModuleType):
            return found
    return None


def described(symbol, seen=()):
    """Its docstring, and those of the symbols of torchfast that it refers to."""
    text = inspect.getdoc(symbol) or ""
    for _, name in re.findall(r":(func|class):`([\w.]+)`", text):
        other = None if torchs(name) else named(name, symbol)
        if other is not None and other.__module__.startswith("torchfast") and other not in seen:
            text += "\n" + described(other, (*seen, symbol))
    return text


def torchs(name):
    return re.match(r"torch(metrics)?\.", name)


@pytest.mark.parametrize("path", EXPORTED)
def test_docstrings_refer_to_what_there_is(path):
    symbol = EXPORTED[path]
    members = vars(symbol).values() if inspect.isclass(symbol) else ()
    for member in (symbol, *members):
        text = getattr(member, "__doc__", None) or ""
        for role, name in re.findall(r":(func|class|mod):`([\w.]+)`", text):
            if not torchs(name):
                found = importlib.import_module(name) if role == "mod" else named(name, symbol)
                assert found is not None, f"{role} {name}"


def takes_tensors(symbol):
    called = [symbol, *(getattr(symbol, name, None) for name in ("forward", "update"))]
    return any("Tensor" in str(p.annotation) for f in called if f for p in inspect.signature(f).parameters.values())


@every_symbol
def test_a_docstring_tells_arguments_shapes_and_errors_and_has_an_example(path):
    symbol = SYMBOLS[path]
    own, whole = symbol.__doc__, described(symbol)
    assert own and len(own.split("\n")[0]) > 20, "no docstring"
    for name, parameter in inspect.signature(symbol).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            # As ``name``, or as an item of Args: "name: ..." or "other, name: ...".
            item = rf"``{name}\b|^ *(?:\w+,\s+)*{name}(?:,\s+\w+)*: "
            assert re.search(item, whole, re.M), f"{name} is not described"
    if takes_tensors(symbol):
        assert "shape" in whole.lower(), "no shapes"
        assert "Raises:" in whole, "no errors"
    if not dataclasses.is_dataclass(symbol):
        assert ">>>" in own.partition("Example:")[2], "no example"


@pytest.mark.parametrize("path", [path for path, x in SYMBOLS.items() if inspect.isclass(x)])
def test_public_methods_have_docstrings(path):
    torchs = ("forward", "extra_repr")  # what they do is torch.nn.Module's to say
    for name, member in vars(SYMBOLS[path]).items():
        if inspect.isfunction(member) and not name.startswith("_") and name not in torchs:
            assert member.__doc__, f"{name} has no docstring"


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_public_modules_have_docstrings(module):
    assert module.__doc__


# ---- API pages -------------------------------------------------------------------------------


def api_pages():
    return {path for page in DOCS.glob("api/*.md") for path in re.findall(r"^::: (\S+)$", page.read_text(), re.M)}


def test_every_public_symbol_is_on_an_api_page():
    shown = [pydoc.locate(path) for path in api_pages()]
    missing = [path for path, x in EXPORTED.items() if not any(x is other for other in shown)]
    missing += [module.__name__ for module in MODULES if module not in shown]
    assert not missing


def test_api_pages_show_what_there_is():
    assert not [path for path in api_pages() if pydoc.locate(path) is None]


# ---- Examples --------------------------------------------------------------------------------


def blocks(page):
    """Language, line number and text of each fenced block."""
    text = page.read_text()
    for match in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.M | re.S):
        yield match[1], text[: match.start()].count("\n") + 1, match[2]


@pytest.fixture
def registries():
    """A page may register an op, which other tests must not see."""
    before = dict(_register.registry), dict(_register.metrics)
    yield
    for registry, was in zip((_register.registry, _register.metrics), before, strict=True):
        registry.clear()
        registry.update(was)


WITH_EXAMPLES = [page for page in PAGES if any(language in ("python", "pycon") for language, *_ in blocks(page))]


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_examples_of_a_page_run(page, registries):
    """In order, in one namespace; of ``>>>`` also the output is compared."""
    namespace = {"__name__": page.stem}
    for language, line, text in blocks(page):
        torch.manual_seed(0)
        if language == "python":
            exec(compile("\n" * line + text, str(page), "exec"), namespace)
        elif language == "pycon":
            test = doctest.DocTestParser().get_doctest(text, namespace, page.name, str(page), line)
            report = []
            doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append, clear_globs=False)
            assert not report, "".join(report)
            namespace = test.globs


NATIVE = """
import pathlib, sys, torch
exec(pathlib.Path(sys.argv[1]).read_text())
torch.ops.load_library(sys.argv[2])
assert torch._C._dispatch_has_kernel_for_dispatch_key("torchfast::log_cosh_backward", "CPU")
from torchfast import selftest
for dtype in selftest.DTYPES:
    row = selftest.check(_op, "cpu", dtype)
    assert row.samples and not row.failures, row
"""


def test_the_native_kernel_of_the_page_for_contributors_builds_and_is_right(tmp_path):
    compiler = os.environ.get("CXX", "c++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip("there is no C++ compiler")
    found = list(blocks(DOCS / "contributing.md"))
    op, library = tmp_path / "log_cosh.py", tmp_path / "log_cosh.so"
    op.write_text(next(text for language, _, text in found if language == "python"))
    (tmp_path / "log_cosh").mkdir()
    for text in (text for language, _, text in found if language == "cpp"):
        (tmp_path / re.match(r"// csrc/([\w/.]+): ", text)[1]).write_text(text)
    sources = [*sorted(tmp_path.glob("log_cosh/*.cpp")), ROOT / "csrc" / "torch" / "parallel.cpp"]
    assert len(sources) == 3
    flags = "-shared -fPIC -O1 -std=c++20 -Wall -Werror -Wno-psabi -DTORCH_TARGET_VERSION=0x020a000000000000".split()
    flags += [f"-I{path}" for path in (tmp_path, ROOT / "csrc", *include_paths())]
    linked = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-ltorch", "-lc10"]
    done = subprocess.run([*compiler, *flags, *sources, *linked, "-o", library], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([sys.executable, "-c", NATIVE, op, library], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_guides_have_examples():
    with_none = {"index.md", "gpu-audit.md", "builds.md"}
    guides = [page for page in DOCS.glob("*.md") if page.name not in with_none]
    assert len(guides) >= 8 and set(guides) <= set(WITH_EXAMPLES)


# ---- Links -----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md"])
def test_files_that_are_linked_to_exist(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text())
    assert not [link for link in links if not (ROOT / link).exists()]
