"""What the metrics share: the dtype of values, names and choices, what is refused."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchfast._common import check


def value_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def names_of(metrics: str | Sequence[str], example: str) -> tuple[str, ...]:
    """Lists each name once, in the order given."""
    names = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    check("metrics", len(names) > 0, metrics, "at least one name")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"metrics must be strings such as {example!r}, got {name!r}")
    return tuple(dict.fromkeys(names))


def check_kind(kind: str, name: str, kinds: Sequence[str], more: str = "") -> None:
    """``name`` is what was given, ``kind`` its part that must be one of the kinds, ``more`` what may follow that."""
    if kind in kinds:
        return
    close = difflib.get_close_matches(kind.strip().lower(), kinds, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0] + name[len(kind) :]!r}?" if close else ""
    raise ValueError(f"metrics must be of {listed(kinds)}{more}, got {name!r}{hint}")


def listed(allowed: Iterable[str]) -> str:
    *others, last = map(repr, allowed)
    return f"{', '.join(others)} or {last}"


def check_choice(name: str, given: object, allowed: Collection[str]) -> None:
    check(name, given in tuple(allowed), given, listed(allowed))  # a tuple, since what was given need not be hashable


def check_shape(name: str, x: Tensor, preds: Tensor) -> None:
    if x.shape != preds.shape:  # the texts take longer than the comparison
        check(f"{name}'s shape", False, tuple(x.shape), f"preds' shape {tuple(preds.shape)}")


def check_no_gradient(what: str, x: Tensor) -> None:
    """Raises where transforms would get zeros, or lose tangents without a word."""
    dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None
    if dual or torch._C._are_functorch_transforms_active():
        raise RuntimeError(f"{what} are not differentiable: torch.func and forward-mode AD cannot trace them")


def digest(options: object) -> str:
    """Returns the same text for the same options."""
    return hashlib.sha256(repr(options).encode()).hexdigest()[:16]
