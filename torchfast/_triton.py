"""Whether Triton can be imported. CPU builds of torch ship without it."""

from __future__ import annotations

import importlib.util


def unavailable_reason() -> str | None:
    """None when triton is installed (found, not imported: that takes a second), else why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install torchfast[triton]"
    return None
