"""The options of this package's op, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchfast import _options
from torchfast._common import check, reduction_of


@dataclass(unsafe_hash=True)
class Options(_options.Options):
    """The options as the op takes them, in its order."""

    ignore_index: int
    reduction: int
    label_smoothing: float
    gamma: float
    z_loss: float
    softcap: float
    """0 means none."""
    logit_scale: float
    empty_zero: bool
    inplace_backward: bool

    @classmethod
    def of(
        cls,
        target: Tensor,
        *,
        reduction: str,
        normalizer: float | Tensor | None,
        empty: str,
        softcap: float | None,
        **others: Any,
    ) -> Options:
        """Makes the options from what the public functions take."""
        reduced = reduction_of(reduction, empty, normalizer)
        options = cls(reduction=reduced, empty_zero=empty == "zero", softcap=softcap or 0.0, **others)
        check("label_smoothing", 0 <= options.label_smoothing <= 1, options.label_smoothing, "in [0, 1]")
        check("gamma", 0 <= options.gamma < float("inf"), options.gamma, "finite and >= 0")
        check("softcap", softcap is None or 0 < softcap < float("inf"), softcap, "None or finite and > 0")
        if target.is_floating_point():
            allowed = "negative for a target of class probabilities"
            check("ignore_index", options.ignore_index < 0, options.ignore_index, allowed)
        return options


#: The public functions call the options by these names.
PUBLIC = tuple("empty" if name == "empty_zero" else name for name in Options.__match_args__)
