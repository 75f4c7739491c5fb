"""What the launchers keep from one call to the next, with a driver that launches nothing: see Launch and kept.

A launch of a kept plan must be the one that Triton would have made of the same arguments.
"""

import os

import pytest
import torch

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter keeps plans, but compiles nothing to launch again", allow_module_level=True)

import triton
import triton_audit

from torchfast.losses import triton_launch as shared
from torchfast.losses.cross_entropy import options as cross_entropy
from torchfast.losses.cross_entropy import triton_launch
from torchfast.losses.sigmoid_focal_loss import options as sigmoid_focal_loss
from torchfast.losses.sigmoid_focal_loss import triton_launch as sigmoid_launch


class Driver(triton_audit._Driver):
    """Names a target, as the audit's, and records what is launched."""

    def __init__(self):
        super().__init__(triton_audit.TARGETS["sm_90"])
        self.utils, self.stream, self.launches = self, 0, []

    def get_current_stream(self, device):
        return self.stream

    def get_device_properties(self, device):
        return {"max_shared_mem": 2**20}

    def load_binary(self, name, binary, shared, device):
        return None, hash(binary), 0, 0, 1024  # module, function, registers, spills, most threads

    def launcher_cls(self, src, metadata):
        def launch(x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
            self.launches.append((function, stream, (x, y, z), str([seen(argument) for argument in arguments])))

        return launch


def seen(argument):
    """Of tensors only what a kernel is compiled for: each call has memory of its own."""
    return (argument.dtype, argument.data_ptr() % 16) if isinstance(argument, torch.Tensor) else argument


@pytest.fixture
def driver(monkeypatch):
    before, driver = triton.runtime.driver._active, Driver()
    values = [value for module in triton_audit.KERNELS for value in vars(module).values()]
    jits = [value for value in values if isinstance(value, triton.runtime.JITFunction)]

    def forget():
        shared.forget_plans()
        for jit in jits:
            jit.device_caches.clear()

    triton.runtime.driver.set_active(driver)
    forget()
    yield driver
    triton.runtime.driver._active = before
    forget()


def softmax(x, **given):
    """Runs forward and backward."""
    named = {"label_smoothing": 0.0, "gamma": 0.0, "reduction": 1, "target": torch.zeros(len(x), dtype=torch.int64)}
    named |= given
    numbers = (named["label_smoothing"], named["gamma"], 0.0, 0.0, 1.0)
    options = cross_entropy.Options(-100, named["reduction"], *numbers, False, False)
    inputs = (x, named["target"], None, None, None, options)
    loss, residuals = triton_launch.cross_entropy(*inputs)
    triton_launch.cross_entropy_backward(torch.empty_like(loss), *inputs, residuals)


def sigmoid(x, target):
    options = sigmoid_focal_loss.Options(-100, 1, 0.25, 2.0, 2.0, 0.0, 0.0, False)
    inputs = (x, target, None, None, None, options)
    loss, divisor = sigmoid_launch.sigmoid_focal_loss(*inputs)
    sigmoid_launch.sigmoid_focal_loss_backward(torch.empty_like(loss), *inputs, divisor)


X = torch.zeros(17, 80)
STRIDED = torch.zeros(17, 96)
CALLS = {
    "plain": lambda: softmax(X[:16]),
    "fewer rows": lambda: softmax(X[:7]),
    "unaligned": lambda: softmax(X.view(-1)[1 : 1 + 16 * 80].view(16, 80)),
    "rows apart": lambda: softmax(STRIDED[:16, :80]),
    "classes apart": lambda: softmax(STRIDED.view(-1)[: 9 * 160].view(9, 160)[:, ::2]),
    "bfloat16": lambda: softmax(X[:16].bfloat16()),
    "int32 targets": lambda: softmax(X[:16], target=torch.zeros(16, dtype=torch.int32)),
    "smoothed": lambda: softmax(X[:16], label_smoothing=0.1),
    "smoothed more": lambda: softmax(X[:16], label_smoothing=0.2),
    "of each row": lambda: softmax(X[:16], reduction=0),
    "sigmoid": lambda: sigmoid(X[:16], X[:16]),
    "sigmoid, unaligned targets": lambda: sigmoid(X[:16], X.view(-1)[1 : 1 + 16 * 80].view(16, 80)),
}


def test_a_kept_launch_is_the_one_that_triton_makes(driver, monkeypatch):
    def launches_of(call):
        driver.launches.clear()
        call()
        return driver.launches[:]

    alone = {}
    for name, call in CALLS.items():
        shared.forget_plans()
        alone[name] = launches_of(call)
    assert all(len(launches) >= 2 for launches in alone.values())
    shared.forget_plans()
    for call in CALLS.values():
        call()

    def search(*_, **__):
        raise AssertionError("Triton was asked to find a kernel that is kept")

    monkeypatch.setattr(triton.runtime.JITFunction, "run", search)
    assert {name: launches_of(call) for name, call in CALLS.items()} == alone
    functions = {name: [function for function, *_ in launches] for name, launches in alone.items()}
    assert functions["fewer rows"] == functions["plain"]
    for name in ("unaligned", "classes apart", "bfloat16", "int32 targets", "smoothed", "of each row"):
        assert functions[name] != functions["plain"], name
    assert alone["smoothed more"] != alone["smoothed"]
    assert functions["smoothed more"] == functions["smoothed"]

    driver.stream = 5
    assert {stream for _, stream, *_ in launches_of(CALLS["plain"])} == {5}


def test_where_triton_returns_no_compiled_kernel_it_is_asked_every_time(driver, monkeypatch):
    ordinary, run = [], triton.runtime.JITFunction.run

    def compile_later(*arguments, **options):
        ordinary.append(run(*arguments, **options))
        return "a kernel to be"

    monkeypatch.setattr(triton.runtime.JITFunction, "run", compile_later)
    for _ in range(2):
        CALLS["plain"]()
    assert len(ordinary) == len(driver.launches) == 6


def test_few_plans_are_kept(monkeypatch):
    monkeypatch.setattr(shared, "MOST_PLANS", 4)
    monkeypatch.setattr(triton.runtime.JITFunction, "run", lambda *_, **__: None)
    shared.forget_plans()
    for rows in range(1, 12):
        softmax(X[:rows])
        assert len(shared._plans) <= 4
    shared.forget_plans()


# ---- How much is compiled ------------------------------------------------------------------------------

STEPS = {
    "cross entropy": lambda n: softmax(torch.zeros(n, 1000)),
    "smoothed": lambda n: softmax(torch.zeros(n, 1000), label_smoothing=0.1),
    "focal": lambda n: softmax(torch.zeros(n, 1000), gamma=2.0),
    "few classes": lambda n: softmax(torch.zeros(n, 10)),
    "sigmoid": lambda n: sigmoid(torch.zeros(n, 80), torch.zeros(n, 80)),
    "class ids": lambda n: sigmoid(torch.zeros(n, 80), torch.zeros(n, dtype=torch.int64)),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_training_step_compiles_three_kernels_and_batches_of_other_sizes_none(step, driver, monkeypatch):
    asked = set()

    def hook(**of):
        asked.add((of["fn"].name, str(of["key"])))
        return True  # compile nothing

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)
    step(512)
    assert len(asked) == 3, asked
    for rows in (2, 7, 16, 500):
        step(rows)
    assert len(asked) == 3
