"""The host's time of the Triton losses without a GPU: ``python benchmarks/host.py``; the end of a whole dry run.

Everything that the host does for a small loss and its gradient runs, on CPU tensors: this package, autograd, Triton
and its compiled launcher, down to the call of CUDA's driver. In the driver's place is ``stub_driver.c``, which launches
nothing. So what the real driver takes for a launch (some microseconds) is left out, and what torch's allocator does on
a GPU is the CPU's. Times are those of the process, minima of many, in microseconds, since other processes disturb
clocks; a loop of Python's (``unit``: the squares of 1000 numbers) says how fast the machine was at the time.

It also counts what one training step compiles, in an empty cache, and how long that takes.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parent / "stub_driver.c"
CALLS, ROUNDS = 30, 20


def install(folder: str) -> Callable[[], int]:
    """Makes Triton launch on the stub, and the dispatcher give CPU tensors to the Triton losses. Returns the count of
    launches. It must run before anything else imports Triton."""
    library = f"{folder}/libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", library, str(SOURCE)]
    subprocess.run(command, check=True)
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)  # whoever asks for libcuda.so.1 gets what is loaded already
    os.environ |= {"TRITON_LIBCUDA_PATH": folder, "TRITON_CACHE_DIR": f"{folder}/cache"}
    os.environ |= {"TORCHFAST_DISABLE_NATIVE": "1"}

    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver

    class Driver(driver.CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = driver.CudaUtils(), driver.CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    triton.runtime.driver.set_active(Driver())
    import torchfast  # noqa: F401
    from torchfast._options import as_object
    from torchfast._register import registry

    for op in (registry["cross_entropy"], registry["sigmoid_focal_loss"]):
        module = importlib.import_module(f"torchfast.losses.{op.name}.triton_launch")
        for name in (op.name, f"{op.name}_backward"):
            launcher = as_object(getattr(module, name), op.options, op.tensors + (name != op.name))
            torch.library.register_kernel(f"torchfast::{name}", "cpu", launcher)
    return ctypes.CDLL(library).launches


def shortest(run: Callable[[], Any]) -> float:
    """Returns the process's microseconds of a call."""
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(CALLS):
            run()
        times.append(time.process_time() - start)
    return 1e6 * min(times) / CALLS


def report(folder: str) -> None:
    launches = install(folder)
    import torch
    import torch.nn.functional as F
    import triton

    import torchfast

    compiled: list[Any] = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **of: compiled.append(of)

    def show(name: str, loss_of: Callable[[torch.Tensor], torch.Tensor], logits: torch.Tensor) -> None:
        x, before = logits.clone().requires_grad_(), launches()

        def forward() -> None:
            with torch.no_grad():
                loss_of(x)

        def step() -> None:
            loss_of(x).backward()
            x.grad = None

        compiled.clear()
        start = time.process_time()
        step()
        first, count = time.process_time() - start, launches() - before
        figures = f"forward {shortest(forward):.0f}, loss and gradient {shortest(step):.0f} us, {count} launches"
        unit = shortest(lambda: [i * i for i in range(1000)])
        print(
            f"    {name}: {figures}; first step {first:.1f} s, {len(compiled)} kernels; unit {unit:.0f} us", flush=True
        )

    print(f"host time with a stub driver, Triton {triton.__version__}, torch {torch.__version__}", flush=True)
    gc.disable()
    ids, few = torch.randint(1000, (16,)), torch.randint(1000, (2,))
    hard = torch.rand(16, 80).round()
    x, rows, small = torch.randn(16, 1000).bfloat16(), torch.randn(2, 128256).bfloat16(), torch.randn(16, 80)
    show("torch's cross entropy, for comparison", lambda x: F.cross_entropy(x, ids % 80), small)
    show("cross entropy", lambda x: torchfast.cross_entropy(x, ids), x)
    show("cross entropy of few rows", lambda x: torchfast.cross_entropy(x, few), rows)
    show("smoothed focal loss", lambda x: torchfast.focal_loss(x, ids, label_smoothing=0.1), x)
    show("sigmoid focal loss", lambda x: torchfast.sigmoid_focal_loss(x, hard, reduction="mean"), small)
    for name, target, numbers in (
        ("cross_entropy", ids % 80, (0.0, 0.0, 0.0, 0.0, 1.0)),
        ("sigmoid_focal_loss", hard, (0.25, 2.0, 2.0, 0.0, 0.0)),
    ):
        forward, backward = map(shortest, launchers(name, target, numbers))
        print(f"    {name}, the launchers alone: forward {forward:.0f}, backward {backward:.0f} us", flush=True)


def launchers(name: str, target: Any, numbers: tuple[float, ...]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Gives calls of the launchers alone, without the public function, the dispatcher and autograd."""
    import torch

    module = importlib.import_module(f"torchfast.losses.{name}.triton_launch")
    flags = [False] * (len(module.Options.__match_args__) - 2 - len(numbers))
    inputs = (torch.randn(16, 80), target, None, None, None, module.Options(-100, 1, *numbers, *flags))
    forward, backward = getattr(module, name), getattr(module, f"{name}_backward")
    loss, residuals = forward(*inputs)
    return lambda: forward(*inputs), lambda: backward(loss, *inputs, residuals)


if __name__ == "__main__":
    if not shutil.which("cc"):
        raise SystemExit("the host's time needs a C compiler (cc), as Triton itself does")
    with tempfile.TemporaryDirectory() as folder:
        report(folder)
