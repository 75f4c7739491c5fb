"""Loads the compiled kernels ``torchfast/_kernels.so`` and keeps the reason when it cannot."""

from __future__ import annotations

from pathlib import Path

import torch

from torchfast._env import flag

_HOW_TO_BUILD = (
    "in torchfast's sources, with torch and a C++ compiler: pip install --no-build-isolation --no-cache-dir ."
)

#: The kernels are here; they know no Python, so that the name has none in it.
LIBRARY = Path(__file__).with_name("_kernels.so")


def _load() -> str | None:
    if flag("TORCHFAST_DISABLE_NATIVE"):
        return "disabled by TORCHFAST_DISABLE_NATIVE"
    if not LIBRARY.exists():
        return f"this installation has no compiled kernels; {_HOW_TO_BUILD}"
    try:
        torch.ops.load_library(LIBRARY)  # it registers the kernels
    except OSError as error:
        return f"the compiled kernels cannot be loaded: {error}"
    return None


#: None when the native kernels are registered, else why they are not.
unavailable_reason: str | None = _load()
