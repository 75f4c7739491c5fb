"""Shared by all tests: the device under test, a fixed seed, hypothesis without deadlines or luck."""

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


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
