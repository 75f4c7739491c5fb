"""Losses, ranking and retrieval on side streams, in CUDA graphs that are replayed with new inputs, and on a second GPU.

The checks are those of the GPU proof, .ci/gpu_worker.py. Without a GPU its rehearsal runs, whose streams and graphs are
plain calls; that a graph which does not replay is noticed, test_gpu_proof.py shows on stubs.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / ".ci"))

import gpu_worker

KINDS = ("cross entropy", "smoothed focal", "sigmoid focal", "linear cross entropy", "ranking", "retrieval")
CHECKS = ("on a side stream", "on four streams at once", "in a CUDA graph")


def calls_of(kind: str, device: str):
    """What makes inputs, and what makes outputs of them, by name: in sizes that reach each way to share out work."""
    found = {name: of for name, of in gpu_worker.calls(device).items() if name.startswith(kind)}
    assert found
    return found


def bitwise(name: str) -> bool:
    return not name.startswith("linear")  # another stream may add up its products in another order


@pytest.mark.parametrize("kind, what", itertools.product(KINDS, CHECKS))  # one parameter, so that no pair is left out
@pytest.mark.once
def test_results_are_those_of_plain_calls(kind: str, what: str, device: str) -> None:
    if torch.device(device).type == "xpu":
        pytest.skip("these streams and graphs are CUDA's")
    machine = gpu_worker.Cuda() if torch.device(device).type == "cuda" else gpu_worker.Rehearsal()
    for name, (make, step) in calls_of(kind, machine.device).items():
        assert not gpu_worker.checks(machine, make, step, bitwise(name))[what](), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.once
def test_a_second_gpu_gives_the_results_of_the_first(kind: str, device: str) -> None:
    """While the first is torch's current device, on which a launch that names none would run."""
    if torch.device(device).type == "cpu" or getattr(torch, torch.device(device).type).device_count() < 2:
        pytest.skip("needs a second GPU")
    first, second = (calls_of(kind, f"{device}:{n}") for n in (0, 1))
    for name, (make, step) in first.items():
        values = make()
        found = second[name][1](*(value.to(f"{device}:1") for value in values))
        assert {x.device.index for x in found} == {1}, name
        tolerance = {"rtol": 0, "atol": 0} if bitwise(name) else {"rtol": 1e-4, "atol": 1e-5}
        for x, expected in zip(found, step(*values), strict=True):
            torch.testing.assert_close(x.to(expected.device), expected, **tolerance)
