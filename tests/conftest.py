"""Shared by all tests: the kernels and devices under test, a fixed seed, hypothesis without deadlines or luck.

pytest                     the kernels that serve the CPU here, and those of each GPU here
pytest --full              every combination of parameters, and many more of hypothesis's examples
pytest -m gpu              the GPUs alone
pytest --kernel triton     Triton's kernels on CPU tensors, in its interpreter
pytest --kernel reference  plain PyTorch
python tests/kernels/cuda_emulator the CUDA kernels of the metrics on CPU tensors, in an emulator
TORCHFAST_ISA=avx2 pytest  the CPU's kernels in narrower vectors (baseline: in those of every x86-64)

Where a test has three parameters or more, a run takes of their combinations only so many that any values of any two
parameters meet; --full takes all.

The first of these, and GPUs, run every test. The others test the same code with other kernels in it. They leave out
what kernels have no part in: the tests that take no ``device``, and those marked ``once``. ``once("reference")`` leaves
out of that run alone what compares with the reference; ``once("native", "triton")`` keeps in it what checks the
reference, which is also the fallback, against torch and finite differences.
"""

import itertools
import os
import platform
import sys
from pathlib import Path

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # its cache does not see a changed op schema
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that waits leaves its core to the other test processes

import pytest
import torch
from hypothesis import settings

settings.register_profile("torchfast", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("full", deadline=None, derandomize=True, max_examples=500)
settings.load_profile("torchfast")


def pytest_addoption(parser):
    parser.addoption("--device", help="test only this device (cpu, cuda, xpu); TORCHFAST_TEST_DEVICE says it too")
    parser.addoption("--full", action="store_true", help="every combination of parameters; ten times the examples")
    parser.addoption(
        "--kernel",
        choices=("native", "triton", "reference", "emulator"),
        help="which kernels must serve the CPU; sees to it",
    )


def devices(config):
    only = config.getoption("--device") or os.environ.get("TORCHFAST_TEST_DEVICE")
    if only or config.getoption("--kernel"):
        return [only or "cpu"]
    return ["cpu", *(gpu for gpu in ("cuda", "xpu") if getattr(torch, gpu).is_available())]


def pytest_configure(config):
    config.addinivalue_line("markers", "once(*kernels): says nothing new of other kernels, or of these")
    if config.getoption("--full"):
        settings.load_profile("full")
    wanted = config.getoption("--kernel")
    if wanted in ("triton", "reference", "emulator"):  # this must be set before torchfast is imported
        os.environ["TORCHFAST_DISABLE_NATIVE"] = "1"
        os.environ["TRITON_INTERPRET"] = "1" if wanted == "triton" else "0"
    if wanted == "triton":
        import interpreter

        interpreter.install()
    if wanted == "emulator":
        import torchfast  # noqa: F401  (defines the ops)

        torch.ops.load_library(os.environ["CUDA_EMULATOR_LIBRARY"])


def served_by(device, metrics=False):
    """Names the kernels that serve the losses, or the metrics, on the device."""
    from torchfast import _register
    from torchfast.info import report

    ops = _register.metrics if metrics else _register.registry
    kernels = {of[device] for op, of in report()["kernels"].items() if op in ops}
    return kernels.pop() if len(kernels) == 1 else kernels


def pytest_sessionstart(session):
    """A run must not believe that it tests kernels other than those that it tests."""
    wanted = session.config.getoption("--kernel")
    of_losses = "reference" if wanted == "emulator" else wanted
    of_metrics = {"triton": {"triton", "reference"}, "emulator": {"native", "reference"}}.get(wanted, wanted)
    for metrics, expected in (False, of_losses), (True, of_metrics):
        if wanted and served_by("cpu", metrics) != expected:
            what = "metrics" if metrics else "losses"
            raise pytest.UsageError(
                f"--kernel {wanted}, but the CPU's {what} are served by {served_by('cpu', metrics)}"
            )
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")  # xdist's workers have none
    if terminal and not terminal.showheader:  # with -q, as in the Makefile, pytest has none
        for line in pytest_report_header(session.config):
            terminal.write_line(line)


def processor():
    """Names the CPU, and what of it the environment leaves to torchfast, torch and oneDNN: roundings depend on it."""
    from torchfast.info import report

    build = report()["build"]
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), name)
    half = [dtype for dtype in ("bf16", "fp16") if getattr(torch.ops.mkldnn, f"_is_mkldnn_{dtype}_supported")()]
    return {
        "CPU": name,
        "threads": torch.get_num_threads(),
        "torchfast": build["simd"] if isinstance(build, dict) else build or "no native kernels",
        "torch": torch.backends.cpu.get_cpu_capability(),
        "oneDNN at most": os.environ.get("ONEDNN_MAX_CPU_ISA", "what there is"),
        "native products": " and ".join(half) or "none in half precision",
    }


def pytest_report_header(config):
    kernels = (f"{device} {served_by(device)}, metrics {served_by(device, True)}" for device in devices(config))
    features = (f"{what}: {value}" for what, value in processor().items())
    return [f"kernels: {'; '.join(kernels)}", "; ".join(features)]


def pytest_collection_modifyitems(config, items):
    """Deselects what a run leaves out: see the module's docstring."""
    kernel = config.getoption("--kernel") or "native"
    everything = kernel == "native" and not os.environ.get("TORCHFAST_ISA")
    tests = {}
    for item in items:
        marked = any(kernel in (mark.args or (kernel,)) for mark in item.iter_markers("once"))
        if everything or ("device" in getattr(item, "fixturenames", ()) and not marked):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    pick = list if config.getoption("--full") else every_pair
    chosen = {item for combinations in tests.values() for item in pick(combinations)}
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


def every_pair(items):
    """Chooses combinations of a test's parameters, greedily the one with the most pairs that no other has yet."""
    given = getattr(items[0], "callspec", None)
    axes = [mark.args[0].replace(",", " ").split() for mark in items[0].iter_markers("parametrize")]
    axes += [[name] for name in (given.params if given else ()) if name not in itertools.chain(*axes)]
    if len(axes) <= 2:
        return items

    def pairs_of(item):
        values = [tuple(id(item.callspec.params[name]) for name in axis) for axis in axes]
        return set(itertools.combinations(enumerate(values), 2))

    pairs = {item: pairs_of(item) for item in items}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        chosen.append(max(items, key=lambda item: len(pairs[item] & missing)))
        missing -= pairs[chosen[-1]]
    return chosen


def pytest_generate_tests(metafunc):
    """Each test that takes a device runs on all of them; those of GPUs are marked gpu."""
    tested = devices(metafunc.config)
    if "device" in metafunc.fixturenames and tested != ["cpu"]:
        marked = [pytest.param(device, marks=[pytest.mark.gpu] * (device != "cpu")) for device in tested]
        metafunc.parametrize("device", marked, scope="session")


@pytest.fixture(scope="session")
def device():
    return "cpu"


@pytest.fixture(scope="session")
def kernel(device):
    return served_by(device)


@pytest.fixture(scope="session")
def metrics_kernel(device):
    return served_by(device, metrics=True)


@pytest.fixture
def memory_of_one(tmp_path_factory):
    """Lets the tests that take 10 GB run one at a time, however many processes pytest is run in."""
    import fcntl

    with open(tmp_path_factory.getbasetemp().parent / "memory_of_one", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
