"""Loads the compiled extension ``torchfast._C`` and keeps the reason when it cannot."""

from __future__ import annotations

from torchfast._env import flag

_HOW_TO_BUILD = (
    "in torchfast's sources, with torch and a C++ compiler: pip install --no-build-isolation --no-cache-dir ."
)


def _load() -> str | None:
    if flag("TORCHFAST_DISABLE_NATIVE"):
        return "disabled by TORCHFAST_DISABLE_NATIVE"
    try:
        import torchfast._C  # noqa: F401  (importing registers the native kernels)
    except ModuleNotFoundError as error:
        if error.name != "torchfast._C":
            raise
        return f"this installation has no compiled extension; {_HOW_TO_BUILD}"
    except ImportError as error:
        return f"the compiled extension cannot be loaded: {error}"
    return None


#: None when the native kernels are registered, else why they are not.
unavailable_reason: str | None = _load()
