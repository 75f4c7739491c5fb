"""The public functions, and the sums that they and the streaming metric are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchfast._common import (
    FLOATS,
    INTEGERS,
    LOGITS_DTYPES,
    check,
    check_device,
    check_factor,
    check_tensor,
    readable,
    widened,
)
from torchfast._register import Sample, register_metric
from torchfast.metrics._common import (
    check_choice,
    check_kind,
    check_no_gradient,
    check_shape,
    digest,
    names_of,
    value_dtype,
)

KINDS = ("mae", "mse", "rmse", "r2")
_NUMBERS = FLOATS | INTEGERS
MULTIOUTPUTS = ("uniform_average", "raw_values", "variance_weighted")
NANS = ("error", "propagate")

# ---- Sums ------------------------------------------------------------------------------------

#: The moments of an output: samples, their weight, weighted sums of |y - preds| and (y - preds)^2, the weighted mean of
#: y as a number and the rest that rounding it left, and the weighted sum of (y - mean)^2. A mean far from 0 would take
#: all digits of a sum of y^2; without the rest, batches with means near 1e6 would lose four.
SAMPLES, WEIGHT, ABSOLUTE, SQUARED, MEAN, REST, SCATTER = range(7)


def reference(preds: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """The moments of a batch ``[N, outputs]``: the first four ``[4, outputs]``, and the others."""
    dtype = value_dtype(preds.device)
    # They become contiguous because strides decide in which order torch adds up.
    preds, target = preds.to(dtype).contiguous(), target.to(dtype).contiguous()
    if weight is None:
        w = preds.new_ones(()).expand(len(preds), 1)
    else:
        w = weight.to(dtype)[:, None]
        w = torch.where(w >= 0, w, torch.nan)
        preds, target = (torch.where(w == 0, 0.0, x) for x in (preds, target))  # weight 0: even NaN does not count
    difference = target - preds
    total = w.expand(preds.shape).sum(0)
    mean = torch.where(total == 0, 0.0, (w * target).sum(0) / total)
    rows = (w.expand(preds.shape) != 0).sum(0).to(dtype)
    absolute, squared = (w * difference.abs()).sum(0), (w * difference.square()).sum(0)
    deviation = target - mean
    rest = torch.where(total == 0, 0.0, (w * deviation).sum(0) / total)
    scatter = (w * (deviation - rest).square()).sum(0)
    return torch.stack([rows, total, absolute, squared]), torch.stack([mean, rest, scatter])


def fake(preds: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    sums, spread = (preds.new_empty((rows, preds.shape[1]), dtype=value_dtype(preds.device)) for rows in (4, 3))
    return sums, spread


def merged(states: Tensor) -> Tensor:
    """The moments of all batches from those of each, ``[batches, 7, outputs]`` (Chan, Golub & LeVeque 1979)."""
    sums = states.sum(0)
    total = sums[WEIGHT]
    share = torch.where(total == 0, 0.0, states[:, WEIGHT] / total)
    mean = (share * states[:, MEAN]).sum(0)
    deviation = states[:, MEAN] - mean + states[:, REST]
    rest = (share * deviation).sum(0)
    between = (states[:, WEIGHT] * (deviation - rest).square()).sum(0)
    return torch.stack([*sums[:MEAN], mean, rest, sums[SCATTER] + between])


# ---- Values ----------------------------------------------------------------------------------


def _r2(state: Tensor) -> Tensor:
    residual, scatter = state[SQUARED], state[SCATTER]
    constant = torch.where(residual == 0, 1.0, torch.where(residual.isnan(), torch.nan, 0.0))
    value = torch.where(scatter == 0, constant, 1 - residual / scatter)
    return torch.where(state[SAMPLES] < 2, torch.nan, value)


def values_of(names: Sequence[str], multioutput: str, state: Tensor) -> dict[str, Tensor]:
    """The values of the metrics, by name."""

    def value(name: str) -> Tensor:
        if name == "r2":
            values = _r2(state)
        else:
            values = state[ABSOLUTE if name == "mae" else SQUARED] / state[WEIGHT]
            values = values.sqrt() if name == "rmse" else values
        if multioutput == "raw_values":
            return values
        if multioutput == "variance_weighted" and name == "r2":
            scatter = torch.where((state[SCATTER] == 0).all(), 1.0, state[SCATTER])
            return (values * scatter).sum() / scatter.sum()
        return values.mean()

    return {name: value(name) for name in names}


# ---- Options and inputs ------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What to compute, checked."""

    names: tuple[str, ...]
    multioutput: str
    nan: str

    @property
    def digest(self) -> str:
        return digest(self)


def resolve(metrics: str | Sequence[str], *, multioutput: str = "uniform_average", nan: str = "error") -> Options:
    names = names_of(metrics, "rmse")
    for name in names:
        check_kind(name, name, KINDS)
    check_choice("multioutput", multioutput, MULTIOUTPUTS)
    check_choice("nan", nan, NANS)
    return Options(names, multioutput, nan)


def batch_moments(options: Options, preds: Tensor, target: Tensor, sample_weight: Tensor | None) -> Tensor:
    """Checks what a caller gives, and returns its moments ``[7, outputs]``."""
    for name, x in (("preds", preds), ("target", target)):
        check_tensor(name, x, _NUMBERS, "a tensor of floats or integers")
        check_no_gradient("metrics", x)
    check("preds' shape", preds.dim() in (1, 2), tuple(preds.shape), "(N,) or (N, outputs)")
    check_shape("target", target, preds)
    check_device("target", target, "preds", preds)
    preds, target = preds.detach(), target.detach()
    if sample_weight is not None:
        check_factor("sample_weight", sample_weight)
        shape = preds.shape[:1]
        check("sample_weight's shape", sample_weight.shape == shape, tuple(sample_weight.shape), tuple(shape))
        check_device("sample_weight", sample_weight, "preds", preds)
        sample_weight = widened(sample_weight.detach())
    if preds.dim() == 1:
        preds, target = preds[:, None], target[:, None]
    floats = (x if x.dtype in LOGITS_DTYPES else x.to(value_dtype(x.device)) for x in (preds, target))
    state = torch.cat(_moments(*floats, sample_weight))
    if readable(state) and state.isnan().any():
        _refuse(options, preds, target, sample_weight)
    return state


def _refuse(options: Options, preds: Tensor, target: Tensor, weight: Tensor | None) -> None:
    """Looks for what is wrong where a sum came out as NaN."""
    if weight is not None:
        bad = weight[~((weight >= 0) & (weight < torch.inf))]
        check("sample_weight", len(bad) == 0, bad[:1].tolist(), "finite and >= 0")
    if options.nan == "propagate":
        return
    for name, x in (("preds", preds), ("target", target)):
        missing = x.isnan() if weight is None else x.isnan() & (weight != 0)[:, None]
        if missing.any():
            row = int(missing.any(1).nonzero()[0])
            raise ValueError(f"{name} must not hold NaN with nan='error', got one in sample {row}")


# ---- Public functions ------------------------------------------------------------------------


def regression_metrics(
    preds: Tensor,
    target: Tensor,
    metrics: str | Sequence[str],
    *,
    sample_weight: Tensor | None = None,
    multioutput: str = "uniform_average",
    nan: str = "error",
) -> dict[str, Tensor]:
    r"""Regression metrics, all of one pass. They are scikit-learn's, on tensors.

    With weights w (1 without ``sample_weight``) and the weighted mean m of the target y, of each output::

        mae  = sum w |y - preds| / sum w          rmse = sqrt(mse)
        mse  = sum w (y - preds)^2 / sum w        r2   = 1 - sum w (y - preds)^2 / sum w (y - m)^2

    Where y is constant, r2 is 1 if the predictions are exact, else 0; of fewer than two samples it is NaN.

    Args:
        preds: predictions, any floating or integer dtype, any strides; shape ``(N,)`` or ``(N, outputs)``.
        target: shape as ``preds``.
        metrics: of ``"mae"``, ``"mse"``, ``"rmse"`` and ``"r2"``.
        sample_weight: finite weight >= 0 of each sample, of a floating dtype, shape ``(N,)``. A sample of weight 0 is
            as if it were not there.
        multioutput: ``"uniform_average"`` (default), the mean over the outputs; ``"variance_weighted"``, of r2
            weighted by the variances of y; ``"raw_values"``, shape ``(outputs,)``.
        nan: NaN in ``preds`` or ``target``: ``"error"`` (default), or ``"propagate"``: the values are NaN.

    Returns:
        The value of each metric by its name, in float64. The mean over nothing is NaN. Metrics have no gradient.

    Raises:
        ValueError, TypeError: an argument has a wrong value, shape, device or dtype. On GPUs, which are not made to
            wait, the values of tensors are not checked unless ``TORCHFAST_CHECK=1`` is set in the environment: NaN
            and negative weights make the values NaN.
        RuntimeError: under ``torch.func`` transforms and forward-mode AD.

    Example:
        >>> import torch
        >>> from torchfast.metrics import regression_metrics
        >>> preds, target = torch.tensor([2.5, 0.0, 2.0, 8.0]), torch.tensor([3.0, -0.5, 2.0, 7.0])
        >>> found = regression_metrics(preds, target, ["mae", "r2"])
        >>> {name: round(value.item(), 4) for name, value in found.items()}
        {'mae': 0.5, 'r2': 0.9486}
    """
    options = resolve(metrics, multioutput=multioutput, nan=nan)
    return values_of(options.names, options.multioutput, batch_moments(options, preds, target, sample_weight))


def _one(preds: Tensor, target: Tensor, name: str, options: dict[str, Any]) -> Tensor:
    return regression_metrics(preds, target, name, **options)[name]


def mean_absolute_error(preds: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The mean of abs(target - preds); ``options`` are those of :func:`regression_metrics`.

    Example:
        >>> import torch
        >>> from torchfast.metrics import mean_absolute_error
        >>> mean_absolute_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])).item()
        1.0
    """
    return _one(preds, target, "mae", options)


def mean_squared_error(preds: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The mean of (target - preds)^2; ``options`` are those of :func:`regression_metrics`.

    Example:
        >>> import torch
        >>> from torchfast.metrics import mean_squared_error
        >>> mean_squared_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])).item()
        2.0
    """
    return _one(preds, target, "mse", options)


def root_mean_squared_error(preds: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The root of the mean of (target - preds)^2; ``options`` are those of :func:`regression_metrics`.

    Example:
        >>> import torch
        >>> from torchfast.metrics import root_mean_squared_error
        >>> root_mean_squared_error(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])).item()
        2.0
    """
    return _one(preds, target, "rmse", options)


def r2_score(preds: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The share of the target's variance that the predictions explain; ``options``: :func:`regression_metrics`.

    Example:
        >>> import torch
        >>> from torchfast.metrics import r2_score
        >>> r2_score(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 2.0, 3.0])).item()
        0.5
    """
    return _one(preds, target, "r2", options)


# ---- Sample inputs: what the generic tests and selftest run ----------------------------------


def sample_inputs(device: str = "cpu", dtype: torch.dtype = torch.float32, *, large: bool = False) -> Iterator[Sample]:
    """Makes inputs with and without weights and outputs; with ``large`` also more than a kernel takes at once."""
    g = torch.Generator(device="cpu").manual_seed(0)

    def values(*shape: int) -> Tensor:
        return (torch.randint(9, shape, generator=g) / 4).to(device, dtype)

    def weights(n: int) -> Tensor:
        return (torch.randint(4, (n,), generator=g) / 4).to(device)

    for n in (1, 40, *((70_000,) if large else ())):
        yield Sample((values(n), values(n), KINDS), {})
        yield Sample((values(n, 3), values(n, 3), KINDS), {"sample_weight": weights(n) + (n == 1)})


# ---- Registration: csrc/regression serves the CPU ------------------------------------------

_moments = register_metric(
    "regression_moments",
    "(Tensor preds, Tensor target, Tensor? weight) -> (Tensor sums, Tensor spread)",
    reference=reference,
    fake=fake,
    function=regression_metrics,
    sample_inputs=sample_inputs,
)
