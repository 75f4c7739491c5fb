"""Regression metrics: equal to scikit-learn, and what is refused."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad

from torchfast.metrics import (
    mean_absolute_error,
    mean_squared_error,
    r2_score,
    regression_metrics,
    root_mean_squared_error,
)
from torchfast.metrics.regression.functional import batch_moments, merged, resolve

NAMES = ("mae", "mse", "rmse", "r2")
NAN = math.nan
close = dict(rel=1e-12, abs=1e-12, nan_ok=True)
PEERS = {
    "mae": sk.mean_absolute_error,
    "mse": sk.mean_squared_error,
    "rmse": sk.root_mean_squared_error,
    "r2": sk.r2_score,
}


def same(actual, expected):
    assert actual.dtype == torch.float64 and not actual.requires_grad
    assert np.shape(expected) == tuple(actual.shape)
    assert actual.flatten().tolist() == pytest.approx(np.ravel(expected).tolist(), **close)


@st.composite
def samples(draw):
    """Predictions, targets [n, outputs] of few or of any values, constant ones among them; weights or None."""
    n, outputs = draw(st.integers(0, 10)), draw(st.integers(1, 3))
    number = draw(st.sampled_from([st.sampled_from([0.0, 1.0, 2.5]), st.floats(-100, 100), st.just(3.0)]))
    preds, y = (draw(st.lists(number, min_size=n * outputs, max_size=n * outputs)) for _ in range(2))
    weight = draw(st.none() | st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.5]), min_size=n, max_size=n))
    return np.array(preds).reshape(n, outputs), np.array(y).reshape(n, outputs), weight


@given(samples(), st.sampled_from(["uniform_average", "raw_values", "variance_weighted"]))
def test_the_values_are_those_of_scikit_learn(device, sample, multioutput):
    preds, y, weight = sample
    w = None if weight is None else torch.tensor(weight, device=device, dtype=torch.float64)
    x, t = torch.tensor(preds, device=device), torch.tensor(y, device=device)
    found = regression_metrics(x, t, NAMES, sample_weight=w, multioutput=multioutput)
    if weight is not None:
        kept = np.array(weight) > 0
        preds, y, weight = preds[kept], y[kept], np.array(weight)[kept]
    if not len(y):
        assert all(v.isnan().all() for v in found.values())
        return
    for name, peer in PEERS.items():
        average = "uniform_average" if name != "r2" and multioutput == "variance_weighted" else multioutput
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = peer(y, preds, sample_weight=weight, multioutput=average)
        if name == "r2":
            scatter = ((y - np.average(y, axis=0, weights=weight)) ** 2).sum(0)
            if (scatter < 1e-12 * (1 + y**2).sum(0)).any() and not (y == y[:1]).all(0).all():
                continue  # rounding decides there whether the target is constant
            if len(y) < 2:
                expected = np.full(found[name].shape, NAN)
            elif (scatter < 1e-12 * (1 + y**2).sum(0)).any():
                of_constant(found[name], preds, y, multioutput)
                continue
        same(found[name], expected)


def of_constant(value, preds, y, multioutput):
    """Constant targets: 1 where the predictions are exact, else 0."""
    if (y == y[:1]).all():
        each = (preds == y).all(0).astype(float)
        same(value, each if multioutput == "raw_values" else each.mean())


def test_constant_targets(device):
    y = torch.full((4, 2), 0.1, device=device, dtype=torch.float64)
    preds = y.clone()
    preds[0, 1] += 1
    assert r2_score(preds, y, multioutput="raw_values").tolist() == [1.0, 0.0]
    assert r2_score(preds, y, multioutput="variance_weighted").item() == 0.5


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("far", [1e8, 1e14])
def test_targets_far_from_zero_keep_their_digits(weighted, far, device):
    """Against exact fractions: at once, and merged of batches."""
    g = torch.Generator().manual_seed(0)
    y = far + torch.randn(60, 1, generator=g, dtype=torch.float64)
    preds = y + torch.randn(60, 1, generator=g, dtype=torch.float64)
    weight = torch.randint(4, (60,), generator=g).double() / 4 if weighted else torch.ones(60, dtype=torch.float64)
    exact = [[Fraction(v) for v in x.flatten().tolist()] for x in (y, preds, weight)]
    mean = sum(w * t for t, _, w in zip(*exact, strict=True)) / sum(exact[2])
    residual = sum(w * (t - p) ** 2 for t, p, w in zip(*exact, strict=True))
    expected = float(1 - residual / sum(w * (t - mean) ** 2 for t, _, w in zip(*exact, strict=True)))
    y, preds, weight = (x.to(device) for x in (y, preds, weight))
    assert r2_score(preds, y, sample_weight=weight).item() == pytest.approx(expected, rel=1e-12)
    parts = [
        batch_moments(resolve("r2"), *(x[a:b] for x in (preds, y, weight)))
        for a, b in ((0, 0), (0, 7), (7, 8), (8, 60))
    ]
    for states in parts, parts[::-1]:
        state = states[0]
        for other in states[1:]:
            state = merged(torch.stack([state, other]))
        for whole in state, merged(torch.stack(states)):
            value = 1 - whole[3] / whole[6]
            assert value.item() == pytest.approx(expected, rel=1e-12)


def test_every_dtype_and_stride(device):
    preds, y = torch.randint(9, (20, 3), device=device), torch.randint(9, (20, 3), device=device)
    expected = regression_metrics(preds, y, NAMES)
    for dtype in torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.uint8:
        for layout in (lambda x: x), (lambda x: x.t().contiguous().t()), (lambda x: x.repeat(1, 2)[:, :3]):
            found = regression_metrics(layout(preds.to(dtype)), layout(y.float()), NAMES)
            assert {n: v.item() for n, v in found.items()} == pytest.approx({n: v.item() for n, v in expected.items()})
    same(mean_absolute_error(preds[:, 0], y[:1, 0].expand(20)), (preds[:, 0] - y[0, 0]).abs().double().mean().item())


def test_nan(device, monkeypatch):
    monkeypatch.setenv("TORCHFAST_CHECK", "1")
    x = torch.tensor([1.0, 2.0, 3.0], device=device)
    wrong = x.masked_fill(x == 2, NAN)
    with pytest.raises(ValueError, match="preds must not hold NaN with nan='error', got one in sample 1"):
        mean_absolute_error(wrong, x)
    with pytest.raises(ValueError, match="target must not hold NaN with nan='error', got one in sample 1"):
        r2_score(x, wrong)
    assert all(v.isnan() for v in regression_metrics(wrong, x, NAMES, nan="propagate").values())
    weight = torch.tensor([1.0, 0.0, 1.0], device=device)
    assert mean_absolute_error(wrong, x + 1, sample_weight=weight) == 1  # as if it were not there
    assert mean_absolute_error(x, x + torch.inf) == torch.inf
    for value in -1.0, NAN, torch.inf:
        with pytest.raises(ValueError, match="sample_weight must be finite and >= 0"):
            mean_absolute_error(x, x, sample_weight=torch.where(weight == 0, value, weight))


def test_without_checks_what_is_wrong_makes_every_value_nan(device, monkeypatch):
    from torchfast.metrics.regression import functional

    monkeypatch.setattr(functional, "readable", lambda x: False)
    x = torch.tensor([1.0, 2.0, 3.0], device=device)
    for value in -1.0, NAN:
        weight = torch.tensor([1.0, value, 1.0], device=device)
        assert all(v.isnan() for v in regression_metrics(x, x + 1, NAMES, sample_weight=weight).values())
    assert all(v.isnan() for v in regression_metrics(x * NAN, x, NAMES).values())


def refused(error, match, *args, **kwargs):
    with pytest.raises(error, match=match):
        regression_metrics(*args, **kwargs)


@pytest.mark.once
def test_wrong_arguments_are_named(device):
    x = torch.rand(4, device=device)
    refused(ValueError, r"metrics must be of 'mae', .*got 'rsme'; did you mean 'rmse'\?", x, x, "rsme")
    refused(ValueError, "metrics must be at least one name", x, x, [])
    refused(TypeError, "metrics must be strings", x, x, [1])
    refused(ValueError, "multioutput must be 'uniform_average'", x, x, "mae", multioutput="mean")
    refused(ValueError, "nan must be 'error' or 'propagate'", x, x, "mae", nan="last")
    refused(TypeError, "preds must be a tensor of floats or integers, got list", [1.0], x, "mae")
    refused(TypeError, "target must be a tensor of floats or integers, got torch.bool", x, x > 0.5, "mae")
    refused(ValueError, r"preds' shape must be \(N,\) or \(N, outputs\)", x[None, None], x[None, None], "mae")
    refused(ValueError, r"target's shape must be preds' shape \(4,\), got \(3,\)", x, x[:3], "mae")
    refused(ValueError, "target must be on preds's device", x, x.to("meta"), "mae")
    refused(TypeError, "sample_weight must be a tensor of a floating dtype", x, x, "mae", sample_weight=x > 0)
    refused(ValueError, r"sample_weight's shape must be \(4,\)", x, x, "mae", sample_weight=x[:2])


@pytest.mark.once
def test_no_gradient_and_no_transforms(device):
    x = torch.rand(6, device=device, requires_grad=True)
    for function in mean_absolute_error, mean_squared_error, root_mean_squared_error, r2_score:
        assert not function(x, x.detach() + 1).requires_grad
    with pytest.raises(RuntimeError, match="not differentiable"):
        torch.func.grad(lambda x: mean_squared_error(x, x + 1))(x.detach())
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="not differentiable"):
        mean_squared_error(forward_ad.make_dual(x.detach(), torch.ones_like(x)), x)


@pytest.mark.once
def test_compiles_whole(device):
    x, y = torch.rand(20, device=device), torch.rand(20, device=device)
    found = torch.compile(lambda x, y: regression_metrics(x, y, NAMES), fullgraph=True)(x, y)
    for name, value in regression_metrics(x, y, NAMES).items():
        torch.testing.assert_close(found[name], value, rtol=1e-14, atol=0)
