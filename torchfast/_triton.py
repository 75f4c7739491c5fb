"""Registers Triton kernels where Triton is installed (CPU builds of torch ship without it).

Triton takes a second to import, so it is found at import time and imported at the first call.
With TRITON_INTERPRET=1 and TORCHFAST_DISABLE_NATIVE=1 they serve CPU tensors as well: so their tests
run on a machine without a GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from torchfast._env import flag
from torchfast._options import as_object
from torchfast._register import Metric, Op


def unavailable_reason() -> str | None:
    """Returns None if triton is installed (found, not imported), else why it is not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install torchfast[triton]"
    return None


def interpreted() -> bool:
    """True if Triton kernels run on CPU tensors, in its interpreter."""
    return flag("TRITON_INTERPRET") and flag("TORCHFAST_DISABLE_NATIVE")


#: The ops that have Triton kernels here.
served: set[str] = set()


def register(module: str, op: Op | Metric) -> None:
    """Registers functions of ``module`` as kernels for GPUs: ``name``, and of a loss ``name_backward`` and
    ``name_backward_``. They take the op's options as one object, if it has options."""
    if unavailable_reason():
        return
    devices = ("cuda", "xpu", "cpu") if interpreted() else ("cuda", "xpu")
    served.add(op.name)

    @functools.cache
    def kernel(name: str) -> Callable[..., Any]:
        launcher = getattr(importlib.import_module(module), name)
        if isinstance(op, Metric):
            return launcher  # type: ignore[no-any-return]
        return as_object(launcher, op.options, op.tensors + (name != op.name))

    names = [op.name]
    if isinstance(op, Op):
        names += [f"{op.name}_backward", *([f"{op.name}_backward_"] if op.inplace else [])]
    for name in names:

        def launch(*args: Any, name: str = name) -> Any:
            return kernel(name)(*args)

        torch.library.register_kernel(f"torchfast::{name}", devices, launch)
