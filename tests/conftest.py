"""Shared by all tests: the kernels and device under test, a fixed seed, hypothesis without deadlines or luck."""

import os

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # its cache does not see a changed op schema

import pytest
import torch
from hypothesis import settings

settings.register_profile("torchfast", deadline=None, derandomize=True)
settings.load_profile("torchfast")


def pytest_addoption(parser):
    default = os.environ.get("TORCHFAST_TEST_DEVICE", "cpu")
    parser.addoption("--device", default=default, help="device whose kernels are tested (cpu, cuda, xpu)")
    parser.addoption(
        "--kernel",
        choices=("native", "triton", "reference"),
        help="which kernels must serve that device; triton on the CPU is its interpreter",
    )


def pytest_configure(config):
    wanted, device = config.getoption("--kernel"), config.getoption("--device")
    if wanted in ("triton", "reference") and device == "cpu":  # before torchfast is imported
        os.environ["TORCHFAST_DISABLE_NATIVE"] = "1"
        os.environ["TRITON_INTERPRET"] = "1" if wanted == "triton" else "0"
    if wanted == "triton" and device == "cpu":
        import interpreter

        interpreter.install()


@pytest.fixture(scope="session")
def kernel(request, device):
    """Which kernels serve the device: a test must not believe that it tests others."""
    from torchfast.info import report

    wanted = request.config.getoption("--kernel")
    kernels = {of[device] for of in report()["kernels"].values()}
    assert wanted is None or kernels == {wanted}, f"--kernel {wanted}, but {device} is served by {kernels}"
    return kernels.pop()


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


@pytest.fixture(autouse=True)
def seed(kernel):
    torch.manual_seed(0)
