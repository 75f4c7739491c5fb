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
    alpha: float
    """A negative value means none."""
    gamma: float
    gamma_neg: float
    clip: float
    label_smoothing: float
    empty_zero: bool

    @classmethod
    def of(
        cls,
        *,
        reduction: str,
        normalizer: float | Tensor | None,
        empty: str,
        gamma: float,
        gamma_neg: float | None,
        **others: Any,
    ) -> Options:
        """Makes the options from what the public functions take."""
        others["gamma_neg"] = gamma if gamma_neg is None else gamma_neg
        reduced = reduction_of(reduction, empty, normalizer)
        options = cls(reduction=reduced, empty_zero=empty == "zero", gamma=gamma, **others)
        check("alpha", -float("inf") < options.alpha <= 1, options.alpha, "in [0, 1], or negative for none")
        check("gamma", 0 <= options.gamma < float("inf"), options.gamma, "finite and >= 0")
        check("gamma_neg", 0 <= options.gamma_neg < float("inf"), options.gamma_neg, "None or finite and >= 0")
        check("clip", 0 <= options.clip < 1, options.clip, "in [0, 1)")
        check("label_smoothing", 0 <= options.label_smoothing <= 1, options.label_smoothing, "in [0, 1]")
        return options


#: The public functions call the options by these names.
PUBLIC = tuple("empty" if name == "empty_zero" else name for name in Options.__match_args__)
