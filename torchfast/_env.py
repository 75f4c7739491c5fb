"""Environment variables that are on or off."""

from __future__ import annotations

import os


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")
