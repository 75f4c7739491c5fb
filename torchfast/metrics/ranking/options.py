"""Which metrics, under which definitions: names, options, presets."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from torchfast._common import REALS, check, check_tensor, readable
from torchfast.metrics._common import check_choice, check_kind, digest, names_of
from torchfast.metrics.ranking.values import (
    DCG,
    GAINS,
    KINDS,
    MAP_DENOMINATORS,
    NANS,
    NDCG,
    PRECISION,
    PRECISION_DENOMINATORS,
    R_PRECISION,
    TIES,
)

EMPTIES = ("zero", "one", "skip", "error")
MAX_K = 2**63 - 1

DEFAULTS = {
    "ties": "average",
    "gain": "linear",
    "empty": "zero",
    "map_denominator": "n_rel",
    "precision_denominator": "k",
}
_BOOSTING = DEFAULTS | {"ties": "stable", "gain": "exp", "empty": "one", "map_denominator": "min(k,n_rel)"}
PRESETS = {
    "trec_eval": DEFAULTS | {"ties": "stable"},
    "sklearn": DEFAULTS,
    "torchmetrics": DEFAULTS | {"map_denominator": "hits"},
    "ranx": DEFAULTS | {"ties": "stable"},
    "xgboost": _BOOSTING | {"precision_denominator": "min(k,docs)"},
    "lightgbm": _BOOSTING,
}


# ---- Names of metrics ------------------------------------------------------------------------


def _parse(name: str) -> tuple[int, int]:
    """The kind and the cut-off, 0 for none."""
    kind, at, k = name.partition("@")
    check_kind(kind, name, KINDS, ", alone or with a cut-off as in 'ndcg@10'")
    if not at:
        return KINDS.index(kind), 0
    check("metrics", KINDS.index(kind) != R_PRECISION, name, "'r_precision', which cuts off at n_rel, without a number")
    number = int(k) if k.isascii() and k.isdecimal() else 0
    check(f"metrics: the cut-off of {kind!r}", 0 < number <= MAX_K, name, "an integer >= 1")
    return KINDS.index(kind), number


def named(kind: str, k: int | None) -> str:
    return kind if k is None else f"{kind}@{k}"


# ---- Options ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What to compute, checked: the numbers are the op's, documented in ``reference``."""

    names: tuple[str, ...]
    kinds: tuple[int, ...]
    ks: tuple[int, ...]
    ties: int
    gain: int
    table: Tensor | None
    map_denominator: int
    precision_denominator: int
    nan: str
    empty: str
    threshold: float
    precision_is_defined: bool

    @property
    def undefined(self) -> tuple[int | None, ...]:
        """When each metric has no value: 0, without a relevant document; 1, without a positive gain; None, never."""
        exempt = PRECISION if self.precision_is_defined else None
        return tuple(None if kind == exempt else int(kind in (NDCG, DCG)) for kind in self.kinds)

    def table_for(self, preds: Tensor) -> Tensor | None:
        """The gain table on the device of preds. The host waits for a copy to a GPU, so there is one in all, not one a
        call; of fake tensors, and while compiling, none may be kept."""
        table = self.table
        if table is None or table.device == preds.device:
            return table
        real = type(table) is Tensor and type(preds) is Tensor and not torch.compiler.is_compiling()
        if real and table.device.type == "cpu":
            return _copy_of_table(tuple(table.tolist()), preds.device)
        return table.to(preds.device)

    @property
    def digest(self) -> str:
        table = None if self.table is None else self.table.tolist()
        return digest((dataclasses.replace(self, table=None), table))

    @property
    def numbers(self) -> tuple[object, ...]:
        """The options as the op takes them, after the tensors, the last of which is the table."""
        nan = NANS.index("last" if self.nan == "last" else "propagate")
        denominators = self.map_denominator, self.precision_denominator
        return (self.kinds, self.ks, self.ties, self.gain, *denominators, nan, self.threshold)


@functools.lru_cache(maxsize=64)
def _copy_of_table(gains: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(gains, dtype=torch.float64).to(device)


def _gain_table(gain: Any) -> Tensor:
    if isinstance(gain, Tensor):
        check_tensor("gain", gain, REALS, "'linear', 'exp' or a tensor of a number for each target")
    try:
        table = torch.as_tensor(gain, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"gain must be 'linear', 'exp' or one number for each target, got {gain!r}") from error
    check("gain's shape", table.dim() == 1 and len(table) > 0, tuple(table.shape), "(number of targets,)")
    if readable(table):
        good = bool((table >= 0).all() & (table < torch.inf).all() & (table.diff() >= 0).all())
        check("gain", good, gain, "finite, >= 0 and nowhere decreasing")
    return table.contiguous()


_NO_TABLE, _NO_TENSOR = (NoneType, str), (NoneType, float, int)


def resolve(
    metrics: str | Sequence[str], *, gain: Any = None, relevance_threshold: float | None = None, **given: Any
) -> Options:
    """Fills in what is None from the preset or the defaults. What a preset sets cannot be set otherwise."""
    metrics = metrics if isinstance(metrics, str) else tuple(metrics)
    given["gain"], given["relevance_threshold"] = gain, relevance_threshold
    mutable = not (isinstance(gain, _NO_TABLE) and isinstance(relevance_threshold, _NO_TENSOR))
    if mutable or torch.compiler.is_compiling():
        return _resolve(metrics, **given)
    try:
        options = _resolved(metrics, **given)  # it is cached: resolving takes a tenth of the time of a small call
    except TypeError:
        options = None  # what is not hashable is not allowed: the errors below say so
    return options or _resolve(metrics, **given)


def _resolve(
    metrics: str | tuple[str, ...],
    *,
    ties: str | None = None,
    gain: Any = None,
    relevance_threshold: float | None = None,
    map_denominator: str | None = None,
    precision_denominator: str | None = None,
    nan: str = "propagate",
    empty: str | None = None,
    preset: str | None = None,
) -> Options:
    names = names_of(metrics, "ndcg@10")
    kinds, ks = zip(*map(_parse, names), strict=True)
    if preset is not None:
        check_choice("preset", preset, PRESETS)
    chosen = PRESETS[preset] if preset is not None else DEFAULTS

    def option(name: str, value: Any, allowed: Collection[str]) -> Any:
        if value is None:
            return chosen[name]
        if preset is not None and not (isinstance(value, str) and value == chosen[name]):
            set_to = f"with preset={preset!r}, which sets it to {chosen[name]!r}"
            raise ValueError(f"{name} must be left out {set_to}, got {value!r}")
        if isinstance(value, str) or name != "gain":
            check_choice(name, value, allowed)
        return value

    check_choice("nan", nan, (*NANS, "error"))
    gain = option("gain", gain, GAINS[:2])
    table = None if isinstance(gain, str) else _gain_table(gain)
    if relevance_threshold is not None:
        good = 0 < relevance_threshold < math.inf
        check("relevance_threshold", good, relevance_threshold, "None (target > 0) or finite and > 0")
    return Options(
        names,
        kinds,
        ks,
        TIES.index(option("ties", ties, TIES)),
        GAINS.index(gain) if isinstance(gain, str) else GAINS.index("table"),
        table,
        MAP_DENOMINATORS.index(option("map_denominator", map_denominator, MAP_DENOMINATORS)),
        PRECISION_DENOMINATORS.index(option("precision_denominator", precision_denominator, PRECISION_DENOMINATORS)),
        nan,
        option("empty", empty, EMPTIES),
        float(relevance_threshold or 0.0),
        preset == "xgboost",  # its precision is 0 where a query has no relevant document, though its ndcg and map are 1
    )


_resolved = functools.lru_cache(maxsize=256)(_resolve)
