"""What is active here, and why not more: ``python -m torchfast.info [--json]``.

Always exits 0: every probe is guarded, and its error becomes part of the report.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from typing import Any

import torch

import torchfast
from torchfast import _native, _triton
from torchfast._register import metrics, registry

__all__ = ["report"]


def _guard(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _kernel(op: str, key: str) -> str:
    """Names the kernel that the dispatcher holds for one op and backend: losses and the retrieval metrics have Triton's
    for GPUs, other metrics CUDA's.
    An op that adds products of matrices around another op is served by that op's kernel."""
    if op in registry:
        op = registry[op].around or op
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"torchfast::{op}", key):
        return "reference"
    return "triton" if op in _triton.served and (key != "CPU" or _triton.interpreted()) else "native"


def _build() -> Any:
    """Says what was built, or why that cannot be said of the kernels that serve here."""
    try:
        from torchfast import _C
    except ImportError:
        return f"torchfast._C, which says it, is not built for Python {platform.python_version()}; no kernel needs it"
    return _C.build_info()


def report() -> dict[str, Any]:
    """The report as a dictionary of plain values.

    Example:
        >>> from torchfast.info import report
        >>> sorted(report())
        ['build', 'devices', 'kernels', 'missing', 'versions']
    """
    native = _native.unavailable_reason is None
    missing = {"native": _native.unavailable_reason, "triton": _guard(_triton.unavailable_reason)}
    devices = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    if _guard(torch.cuda.is_available) is True:
        devices["cuda"] = _guard(torch.cuda.get_device_name)
        if native and hasattr(torch.ops.torchfast, "cuda_probe"):
            devices["cuda code"] = _guard(lambda: f"sm_{torch.ops.torchfast.cuda_probe(0)} runs")
    else:
        missing["cuda"] = "torch sees no CUDA device"
    return {
        "versions": {
            "torchfast": torchfast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "build": _guard(_build) if native else None,
        "devices": devices,
        "kernels": {
            op: {key.lower(): _kernel(op, key) for key in ("CPU", "CUDA", "XPU")} for op in (*registry, *metrics)
        },
        "missing": {name: reason for name, reason in missing.items() if reason},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m torchfast.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    result = report()
    if parser.parse_args().json:
        print(json.dumps(result, indent=2))
        return
    for section, content in result.items():
        print(section)
        for name, value in (content if isinstance(content, dict) else {"-": content}).items():
            if isinstance(value, dict):
                value = ", ".join(f"{k}: {v}" for k, v in value.items())
            print(f"  {name:18} {value}")


if __name__ == "__main__":
    main()
