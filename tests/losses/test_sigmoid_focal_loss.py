"""The contract of the sigmoid loss family, property by property.

Truth is `oracle`, written from the formula in numpy's fp64, with every function taken where it keeps its
digits. Peers (torchvision, timm) are restated here and evaluated in fp64.
"""

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract import DTYPES, HALF, Truth, assert_near, by_dtype, by_integer, gradient_of, refuses, same, survives_copies
from hypothesis import given
from hypothesis import strategies as st
from memory import peak_memory
from torch import Tensor, nn

import torchfast
from torchfast import AsymmetricLoss, SigmoidFocalLoss, asymmetric_loss, sigmoid_focal_loss
from torchfast._native import unavailable_reason

INF, NAN = math.inf, math.nan

FOCAL = {}
BCE = {"alpha": -1.0, "gamma": 0.0}
FRACTIONAL = {"alpha": 0.6, "gamma": 0.5, "gamma_neg": 1.7}
ASYMMETRIC = {"alpha": -1.0, "gamma": 1.0, "gamma_neg": 4.0, "clip": 0.05}
SMOOTHED = {"gamma": 1.5, "label_smoothing": 0.1}
CLIPPED = {"gamma": 0.0, "gamma_neg": 0.5, "clip": 0.1, "label_smoothing": 0.2}
OPTION_SETS = {
    "focal": FOCAL,
    "bce": BCE,
    "fractional": FRACTIONAL,
    "asymmetric": ASYMMETRIC,
    "smoothed": SMOOTHED,
    "clipped": CLIPPED,
}
option_sets = pytest.mark.parametrize("options", OPTION_SETS.values(), ids=OPTION_SETS)


# ---- The oracle: the formula, in fp64 --------------------------------------------------------


def as_numpy(t, shape):
    return t.detach().cpu().double().expand(shape).numpy()


def sides(z, gamma, clip=0.0):
    """p_m^g (-log(1 - p_m)) of p = sigmoid(z), its derivative, by how much rounding of p is amplified, and where
    rounding decides whether p > clip."""
    e = np.exp(-np.abs(z))
    small, large = e / (1 + e), 1 / (1 + e)
    p, q = np.where(z < 0, small, large), np.where(z < 0, large, small)
    if clip == 0:
        minus_log_q, power = np.logaddexp(0, z), p**gamma
        return power * minus_log_q, power * (p + gamma * np.where(q == 0, 0, q * minus_log_q)), 1.0, False
    p_m = np.where(p > clip, p - clip, 0.25)
    minus_log = np.where(p_m < 0.5, -np.log1p(-p_m), -np.log(q + clip))
    on = np.isnan(p) | (p > clip)
    loss = np.where(on, p_m**gamma * minus_log, 0)
    slope = np.where(on, p * q * p_m**gamma * (1 / (q + clip) + gamma * minus_log / p_m), 0)
    return np.where(np.isnan(p), NAN, loss), np.where(np.isnan(p), NAN, slope), 1 + p / p_m, np.abs(p - clip) < 1e-6


def oracle(
    x,
    y,
    counts=None,
    *,
    alpha=0.25,
    gamma=2.0,
    gamma_neg=None,
    clip=0.0,
    label_smoothing=0.0,
    weight=None,
    pos_weight=None,
    reduction="none",
    normalizer=None,
    empty="nan",
    upstream=None,
    strict=False,
):
    """The formula for a value y per element, and what rounding may change.

    Each part may be off by 16 roundings, once more per power, of the dtype that the loss has; a sum by
    another sqrt(elements). A half-precision gradient is rounded once more. Unless `strict`, a power beyond
    |z| = 27 may have gone through its logarithm g |z|, and have lost the digits in front of its point.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape, e = tuple(x.shape), label_smoothing
    gamma_neg = gamma if gamma_neg is None else gamma_neg
    z = as_numpy(x, shape)
    y = as_numpy(y.to(wide), shape)
    counts = np.ones(shape, bool) if counts is None else counts.cpu().expand(shape).numpy()
    w, pw = (np.ones(shape) if t is None else as_numpy(t, shape) for t in (weight, pos_weight))
    a, b = (1, 1) if alpha < 0 else (alpha, 1 - alpha)
    with np.errstate(all="ignore"):
        factors = a * ((1 - e) * y + e / 2) * pw * w, b * ((1 - e) * (1 - y) + e / 2) * w
        parts = sides(-z, gamma), sides(z, gamma_neg, clip)
        unknown = parts[1][3]

        def times(factor, value):
            return np.where(counts & (factor != 0), factor * value, 0)

        losses = [times(f, part[0]) for f, part in zip(factors, parts, strict=True)]
        slopes = [times(f, part[1]) for f, part in zip(factors, parts, strict=True)]
        far = np.where(np.isfinite(z) & (np.abs(z) > 27) & (not strict), np.abs(z), 0)
        roundings = [(16 * (1 + g) + g * far) * part[2] for g, part in zip((gamma, gamma_neg), parts, strict=True)]
        loss, gradient = losses[0] + losses[1], slopes[1] - slopes[0]
        info = torch.finfo(wide)
        scale = np.maximum(1, np.where(np.isfinite(factors[0]), np.abs(factors[0]), 1) + np.abs(factors[1]))

        def bound(parts):
            error = sum(n * np.abs(part) for n, part in zip(roundings, parts, strict=True))
            error = np.nan_to_num(info.eps * error, nan=0.0) + info.tiny * scale * (
                (1 + gamma_neg) / clip if clip else 1
            )
            return np.where(unknown, INF, error)

        loss_bound, gradient_bound = bound(losses), bound(slopes)
        divisor = 1.0
        if reduction == "mean":
            divisor = float(counts.sum() if normalizer is None else normalizer)
        g = 1.0 if upstream is None else as_numpy(upstream.to(wide), shape if reduction == "none" else ())
        g = g / divisor if divisor else 0.0 * g
        gradient = np.where(counts & (g != 0) & ((factors[0] != 0) | (factors[1] != 0)), gradient * g, 0)
        gradient_bound = gradient_bound * np.abs(g) + info.tiny * np.maximum(1, np.abs(g))
        if reduction != "none":
            total = np.abs(loss[np.isfinite(loss)]).sum()
            loss_bound = loss_bound.sum() + info.eps * (4 + math.sqrt(loss.size)) * total
            loss = loss.sum()
            if divisor:
                loss, loss_bound = loss / divisor, loss_bound / abs(divisor)
            else:
                loss = NAN if empty == "nan" else 0.0
    if x.dtype in HALF:
        half = torch.finfo(x.dtype)
        rounded = half.eps * np.abs(gradient) + half.smallest_normal * half.eps
        gradient_bound = gradient_bound + np.nan_to_num(rounded, nan=0.0)
    return Truth(*map(torch.as_tensor, (loss, gradient, loss_bound, gradient_bound)))


def loss_and_gradient(x, targets, upstream=None, function=sigmoid_focal_loss, **options):
    x = x.detach().requires_grad_()
    loss = function(x, targets, **options)
    return loss.detach(), gradient_of(loss, x, upstream)


def values_and_counts(x, targets, mask=None, ignore_index=-100):
    """Targets of any kind as a value per element, and which elements count."""
    counts = torch.ones(x.shape, dtype=torch.bool) if mask is None else mask.cpu().expand(x.shape)
    targets = targets.cpu()
    if targets.is_floating_point() or targets.dtype == torch.bool:
        return targets, counts
    ids = targets.long()
    ignored = ids == ignore_index
    if ids.dim() < x.dim():
        values = ids.unsqueeze(-1) == torch.arange(x.shape[-1])
        return values, counts & ~ignored.unsqueeze(-1)
    return torch.where(ignored, 0, ids), counts & ~ignored


def assert_follows_oracle(x, targets, upstream=None, mask=None, ignore_index=-100, strict=False, **options):
    values, counts = values_and_counts(x, targets, mask, ignore_index)
    truth = oracle(x, values, counts, upstream=upstream, strict=strict, **options)
    options |= {"mask": mask, "ignore_index": ignore_index}
    loss, gradient = loss_and_gradient(x, targets, upstream, **options)
    assert gradient.stride() == torch.empty_like(x).stride()
    truth.assert_met(x, loss, gradient)


def example(device, shape=(9, 70), dtype=torch.float32):
    """Logits, soft targets."""
    return 3 * torch.randn(shape, device=device).to(dtype), torch.rand(shape, device=device)


def hard_targets(shape, device):
    return (torch.rand(shape, device=device) < 0.3).float()


# ---- The formula, and those of others --------------------------------------------------------


def torchvision_focal_loss(inputs, targets, alpha, gamma, reduction):
    """torchvision.ops.sigmoid_focal_loss, as of 0.24."""
    p = torch.sigmoid(inputs)
    ce_loss = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    loss = ce_loss * ((1 - p_t) ** gamma)
    if alpha >= 0:
        loss = (alpha * targets + (1 - alpha) * (1 - targets)) * loss
    return {"none": lambda x: x, "mean": torch.mean, "sum": torch.sum}[reduction](loss)


def timm_asymmetric_loss(x, y, gamma_neg, gamma_pos, clip, eps=1e-8):
    """timm.loss.AsymmetricLossMultiLabel, as of 1.0."""
    xs_pos = torch.sigmoid(x)
    xs_neg = 1 - xs_pos
    if clip > 0:
        xs_neg = (xs_neg + clip).clamp(max=1)
    loss = y * torch.log(xs_pos.clamp(min=eps)) + (1 - y) * torch.log(xs_neg.clamp(min=eps))
    if gamma_neg > 0 or gamma_pos > 0:
        pt = xs_pos * y + xs_neg * (1 - y)
        loss = loss * torch.pow(1 - pt, gamma_pos * y + gamma_neg * (1 - y))
    return -loss.sum()


def assert_agrees(ours, theirs, x, bounds):
    """Ours at the dtype of x against theirs in fp64: the loss, and the gradient of its weighted sum."""
    results = []
    for function, leaf in ((ours, x.detach().requires_grad_()), (theirs, x.detach().double().requires_grad_())):
        loss = function(leaf)
        results.append([loss, torch.autograd.grad(loss.sum(), leaf)[0]])
    (loss, gradient), (true_loss, true_gradient) = results
    assert_near(loss, true_loss.detach().cpu(), bounds.loss_bound)
    assert_near(gradient, true_gradient.cpu(), bounds.gradient_bound)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.25, 0.58, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_is_the_focal_loss_of_torchvision(alpha, gamma, reduction, device):
    x, y = torch.randn(9, 70, device=device), hard_targets((9, 70), device)
    assert_agrees(
        lambda x: sigmoid_focal_loss(x, y, alpha, gamma, reduction),
        lambda x: torchvision_focal_loss(x, y.double(), alpha, gamma, reduction),
        x,
        oracle(x, y, alpha=alpha, gamma=gamma, reduction=reduction),
    )


def test_arguments_and_defaults_are_those_of_torchvision(device):
    x, y = torch.randn(9, 70, device=device), hard_targets((9, 70), device)
    same(sigmoid_focal_loss(x, y), sigmoid_focal_loss(x, y, 0.25, 2.0, "none"))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("weights", ["none", "weight", "pos_weight", "both"])
def test_gamma_0_without_alpha_is_binary_cross_entropy_with_logits(weights, soft, reduction, device):
    x, y = example(device)
    y = y if soft else (y < 0.3).float()
    factors = {}
    if weights in ("weight", "both"):
        factors["weight"] = torch.rand(9, 70, device=device)
    if weights in ("pos_weight", "both"):
        factors["pos_weight"] = 3 * torch.rand(70, device=device)
    wide = {name: factor.double() for name, factor in factors.items()}
    assert_agrees(
        lambda x: sigmoid_focal_loss(x, y, -1, 0, reduction, **factors),
        lambda x: F.binary_cross_entropy_with_logits(x, y.double(), reduction=reduction, **wide),
        x,
        oracle(x, y, alpha=-1, gamma=0, reduction=reduction, **factors),
    )


@pytest.mark.parametrize(
    "gamma_neg, gamma_pos, clip", [(4, 1, 0.05), (4, 0, 0.05), (2, 2, 0), (0, 0, 0.2), (3, 0.5, 0)]
)
def test_asymmetric_loss_is_that_of_timm(gamma_neg, gamma_pos, clip, device):
    x, y = torch.randn(9, 70, device=device), hard_targets((9, 70), device)
    assert_agrees(
        lambda x: asymmetric_loss(x, y, gamma_neg, gamma_pos, clip),
        lambda x: timm_asymmetric_loss(x, y.double(), gamma_neg, gamma_pos, clip),
        x,
        oracle(x, y, alpha=-1, gamma=gamma_pos, gamma_neg=gamma_neg, clip=clip, reduction="sum"),
    )


def test_asymmetric_loss_is_sigmoid_focal_loss_with_other_defaults(device):
    x, y = example(device)
    for a, b in zip(
        loss_and_gradient(x, y, function=asymmetric_loss),
        loss_and_gradient(x, y, alpha=-1, gamma=1, gamma_neg=4, clip=0.05, reduction="sum"),
        strict=True,
    ):
        same(a, b)
    same(
        asymmetric_loss(x, y, alpha=0.3, reduction="mean"),
        sigmoid_focal_loss(x, y, 0.3, 1, "mean", gamma_neg=4, clip=0.05),
    )


@st.composite
def calls(draw, device):
    """Any combination of options, targets, shapes, dtypes and layouts, with masked and ignored NaN."""
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(
        st.one_of(
            st.sampled_from([(), (1,), (5, 1), (3, 2, 4, 5)]),
            st.tuples(st.integers(1, 70)),
            st.tuples(st.integers(1, 6), st.integers(1, 200)),
            st.tuples(st.integers(1, 3), st.integers(1, 8), st.integers(1, 40)),
        )
    )

    def rand(*shape):
        return torch.rand(shape, generator=seed, dtype=torch.float64)

    x = draw(st.sampled_from([0.1, 3.0, 30.0])) * torch.randn(shape, generator=seed, dtype=torch.float64)
    gammas = st.sampled_from([0.0, 0.5, 1.0, 1.7, 2.0, 3.0, 4.0, 5.0])
    options = {
        "alpha": draw(st.sampled_from([-1.0, 0.0, 0.25, 1.0])),
        "gamma": draw(gammas),
        "gamma_neg": draw(st.one_of(st.none(), gammas)),
        "clip": draw(st.sampled_from([0.0, 0.0, 0.05, 0.3])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
        "reduction": draw(st.sampled_from(["none", "sum", "mean"])),
        "empty": draw(st.sampled_from(["nan", "zero"])),
        "ignore_index": draw(st.sampled_from([-100, -1, 0, 1])),
    }
    if options["reduction"] == "mean" and draw(st.booleans()):
        options["normalizer"] = draw(st.sampled_from([2.5, torch.tensor(7.0, device=device)]))

    def part(shape):
        """A shape that broadcasts to it."""
        leading = draw(st.integers(0, len(shape)))
        return tuple(1 if draw(st.integers(0, 2)) == 0 else n for n in shape[leading:])

    wide = draw(st.sampled_from(DTYPES))
    for name in ("weight", "pos_weight"):
        if draw(st.booleans()):
            factor = (2 * rand(*part(shape))).to(wide)
            options[name] = torch.where(rand(*factor.shape) < 0.2, 0, factor).to(device)
    if draw(st.booleans()):
        options["mask"] = (rand(*part(shape)) < draw(st.sampled_from([0.0, 0.7]))).to(device)
    kind = draw(st.sampled_from(["soft", "hard", "bool", "integer", "class ids"][: 5 if shape else 4]))
    if kind == "soft":
        targets = rand(*shape).to(wide)
    elif kind in ("hard", "bool"):
        targets = (rand(*shape) < 0.3).to(torch.bool if kind == "bool" else wide)
    else:
        ids = kind == "class ids"
        low = -1 if ids else 0
        targets = low + (rand(*shape[: len(shape) - ids]) * ((shape[-1] if ids else 2) - low)).long()
        targets = torch.where(rand(*targets.shape) < 0.2, options["ignore_index"], targets)
        targets = targets.to(draw(st.sampled_from([torch.int8, torch.int32, torch.int64])))
    _, counts = values_and_counts(x, targets, options.get("mask"), options["ignore_index"])
    x = torch.where(counts, x, draw(st.sampled_from([NAN, INF, -INF]))).to(device, dtype)
    targets = targets.to(device)
    if x.dim() > 1:
        x, targets = (in_layout(t, draw(st.sampled_from(LAYOUTS))) if t.dim() > 1 else t for t in (x, targets))
    upstream = torch.randn(shape if options["reduction"] == "none" else (), generator=seed)
    return x, targets, upstream.to(device), options


LAYOUTS = ("contiguous", "first fastest", "sliced", "padded", "reversed dimensions")


def in_layout(x, layout):
    return {
        "contiguous": x.contiguous,
        "first fastest": lambda: x.movedim(0, -1).contiguous().movedim(-1, 0),
        "sliced": lambda: x.repeat_interleave(2, -1)[..., ::2],
        "padded": lambda: torch.cat([x, x], -1)[..., : x.shape[-1]],
        "reversed dimensions": lambda: (
            x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
        ),
    }[layout]()


@given(data=st.data())
def test_loss_and_gradient_follow_the_formula_for_any_options(data, device):
    x, targets, upstream, options = data.draw(calls(device))
    assert_follows_oracle(x, targets, upstream, **options)


@given(data=st.data())
@pytest.mark.once("native", "triton")
def test_both_derivatives_match_finite_differences_for_any_options(data, device):
    """The options of the test above on logits that finite differences can follow."""
    x, targets, _, options = data.draw(calls(device))
    options["empty"] = "zero"  # finite where nothing counts
    g = torch.Generator().manual_seed(x.numel())
    x = 2 * torch.randn(x.shape, dtype=torch.float64, generator=g)
    near_clip = (x.sigmoid() - options["clip"]).abs() < 0.02  # where the loss has a bend
    x = torch.where(near_clip, x + 0.5, x).to(device).requires_grad_()

    def loss(x):
        return sigmoid_focal_loss(x, targets, **options)

    assert torch.autograd.gradcheck(loss, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, x, fast_mode=True)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("gamma_neg", [None, 0.0, 1.5])
@pytest.mark.parametrize("clip", [0.0, 0.1])
@pytest.mark.parametrize("kind, label_smoothing", [("soft", 0.0), ("class ids", 0.0), ("class ids", 0.1)])
@pytest.mark.once("native", "triton")
def test_derivatives_match_finite_differences(gamma, gamma_neg, clip, kind, label_smoothing, device):
    x = torch.linspace(-3, 3, 12, dtype=torch.float64, device=device).reshape(3, 4)
    x = torch.where((x.sigmoid() - clip).abs() < 0.02, x + 0.3, x).requires_grad_()
    y = torch.rand(3, 4, device=device) if kind == "soft" else torch.tensor([1, -1, 3], device=device)
    options = {"gamma_neg": gamma_neg, "clip": clip, "label_smoothing": label_smoothing}

    def loss(x):
        return sigmoid_focal_loss(x, y, 0.25, gamma, **options)

    assert torch.autograd.gradcheck(loss, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, x, fast_mode=True)


SIZES = [*range(1, 71), 1000, 1023, 1024, 1025, 16383, 16384, 16385, 50_003]
KINDS = ("soft", "hard", "bool", "int64", "uint8", "class ids")


def targets_of(kind, shape, device):
    if kind == "class ids":
        return torch.randint(-1, shape[-1], shape[:-1], device=device)
    if kind == "soft":
        return torch.rand(shape, device=device)
    return hard_targets(shape, device).to({"hard": torch.float, "bool": torch.bool}.get(kind) or getattr(torch, kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [FOCAL, ASYMMETRIC], ids=["focal", "asymmetric"])
def test_sizes_around_those_of_vectors_tiles_and_blocks(options, kind, dtype, device, kernel):
    for n in SIZES if kernel == "native" else SIZES[::9]:
        x, reduction = (3 * torch.randn(n, device=device)).to(dtype), ("none", "sum", "mean")[n % 3]
        targets = targets_of(kind, (n,), device)
        assert_follows_oracle(x, targets, reduction=reduction, **options)


@pytest.mark.parametrize("shape", [(15_000, 3), (700, 80), (3, 20_011), (2, 33, 40, 19), (40_000, 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [FOCAL, ASYMMETRIC, SMOOTHED], ids=["focal", "asymmetric", "smoothed"])
def test_many_elements_of_any_shape_follow_the_formula(shape, kind, options, device, kernel):
    """Large enough that kernels split the work over threads, at places of their own; all elements are compared."""
    if kernel == "triton" and len(shape) == 2:  # which has no threads here
        shape = (-(-shape[0] // 8), shape[1])
    x = 3 * torch.randn(shape, device=device)
    assert_follows_oracle(x, targets_of(kind, shape, device), **options)


# ---- Accuracy --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("y", [0.0, 0.3, 1.0, "bool", "int"])
@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0])
def test_tails_keep_their_digits(gamma, y, dtype, device, kernel):
    """|x| up to 100: the bound is relative, so 1.0 - p (0 from x = 17 on, in fp32) would not pass.

    What is below the smallest normal number may be flushed to zero.
    """
    x = torch.linspace(-100, 100, 2001, dtype=dtype, device=device)
    for value in (False, True) if isinstance(y, str) else (y,):
        targets = torch.full_like(x, value)
        if isinstance(y, str):
            targets = targets.to({"bool": torch.bool, "int": torch.int64}[y])
        assert_follows_oracle(x, targets, gamma=gamma, strict=kernel == "native")


@pytest.mark.parametrize("y", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("gamma_neg", [0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("clip", [1e-3, 0.05, 0.5])
def test_clipped_tails(clip, gamma_neg, y, device):
    x = torch.linspace(-100, 100, 2001, device=device)
    assert_follows_oracle(x, torch.full_like(x, y), gamma=1.0, gamma_neg=gamma_neg, clip=clip)


@by_dtype
@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.9, 1.5])
@pytest.mark.parametrize("e", [0.0, 0.1])
def test_certain_elements_have_no_nan(e, gamma, dtype, device):
    """d/dq q^gamma is infinite at q = 0 for gamma < 1; times softplus(-z) it is 0."""
    x = torch.tensor([-2e4, -1e3, -104.0, -88.0, 88.0, 104.0, 1e3, 2e4], device=device).to(dtype)
    for y in (0, 1):
        targets = torch.full(x.shape, y, device=device)
        loss, gradient = loss_and_gradient(x, targets, gamma=gamma, label_smoothing=e)
        assert loss.isfinite().all() and gradient.isfinite().all()
        assert_follows_oracle(x, targets, gamma=gamma, label_smoothing=e)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_sums_are_in_fp32(dtype, device):
    """A sum of ones stops growing at 256 in bf16 and at 2048 in fp16."""
    x = torch.zeros(50_000, device=device, dtype=dtype)
    for reduction in ("sum", "mean"):
        assert_follows_oracle(x, x, reduction=reduction, **BCE)


# ---- Infinities, NaN, and elements that do not count -----------------------------------------


@by_dtype
@pytest.mark.parametrize("kind", ["float", "bool", "int64"])
@option_sets
def test_infinite_logits(options, kind, dtype, device):
    """An impossible element costs infinitely much and has a finite gradient; a certain one costs exactly nothing."""
    x = torch.tensor([-INF, INF, -INF, INF], device=device, dtype=dtype)
    y = torch.tensor([0, 0, 1, 1], device=device).to(getattr(torch, kind))
    assert_follows_oracle(x, y, **options)
    loss, gradient = loss_and_gradient(x, y, **options)
    assert gradient.isfinite().all()
    if options in (FOCAL, BCE):
        a, b = (1, 1) if options is BCE else (0.25, 0.75)
        assert loss.tolist() == [0, INF, INF, 0] and gradient.tolist() == [0, b, -a, 0]
    if options is ASYMMETRIC:  # the probability of a negative is clipped, and so is its loss
        assert loss[1].isfinite() and loss[2] == INF


NAN_PAYLOADS = {
    torch.float64: (torch.int64, [0x7FF0000000000001, -1, 0x7FF8000000012345]),
    torch.float32: (torch.int32, [0x7F800001, -1, 0x7FC12345, -0x00400000]),
    torch.bfloat16: (torch.int16, [0x7F81, -1, 0x7FC1, -0x0040]),
    torch.float16: (torch.int16, [0x7C01, -1, 0x7E01, -0x0200]),
}


@by_dtype
@pytest.mark.parametrize("kind", ["soft", "bool", "class ids"])
@option_sets
def test_a_nan_logit_makes_its_element_nan_and_no_other(options, kind, dtype, device):
    """At every position of a vector, with quiet and signalling payloads of both signs."""
    clean = (3 * torch.randn(37, 37, device=device)).to(dtype)
    targets = targets_of(kind, (37, 37), device)
    expected, expected_gradient = loss_and_gradient(clean, targets, **options)
    integer, payloads = NAN_PAYLOADS[dtype]
    own = torch.eye(37, dtype=torch.bool, device=device)
    for payload in payloads:
        x = clean.clone()
        x.view(integer).fill_diagonal_(payload)
        loss, gradient = loss_and_gradient(x, targets, **options)
        same(loss, expected.masked_fill(own, NAN))
        same(gradient, expected_gradient.masked_fill(own, NAN))
        assert sigmoid_focal_loss(x, targets, reduction="mean", **options).isnan()


@by_dtype
@pytest.mark.parametrize("how", ["mask", "mask and ids", "ignored", "ignored ids"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@option_sets
def test_what_does_not_count_is_exactly_zero_whatever_it_holds(options, reduction, how, dtype, device):
    x = (3 * torch.randn(6, 70, device=device)).to(dtype)
    out = torch.rand(6, 70, device=device) < 0.3
    mask, targets = None, torch.rand(6, 70, device=device)
    if how.startswith("mask"):
        mask = ~out
        if how == "mask and ids":
            targets = torch.randint(-1, 70, (6,), device=device)
    elif how == "ignored":
        targets = torch.where(out, -100, (targets < 0.3).long())
    else:
        targets = torch.randint(-1, 70, (6,), device=device)
        targets[[1, 4]] = -100
        out = (targets == -100).unsqueeze(-1).expand(x.shape)
    call = {"mask": mask, "reduction": reduction, **options}
    expected, expected_gradient = loss_and_gradient(x, targets, **call)
    for held in (NAN, INF, -INF):
        x[out] = held
        loss, gradient = loss_and_gradient(x, targets, **call)
        same(loss, expected)
        same(gradient, expected_gradient)
        assert (gradient[out] == 0).all()
        if reduction == "none":
            assert (loss[out] == 0).all()
    assert_follows_oracle(x, targets, **call)


@by_dtype
@option_sets
def test_a_factor_of_zero_contributes_zero_whatever_the_logit(options, dtype, device):
    """0 * inf = 0, and NaN of weight 0 is nothing: weights, pos_weight, alpha and the target itself can be it."""
    x = torch.tensor([NAN, INF, -INF, 1.0], device=device, dtype=dtype)
    for y in (torch.zeros_like(x), torch.ones_like(x), torch.full_like(x, 0.5), x == x):
        loss, gradient = loss_and_gradient(x, y, weight=torch.zeros((), device=device), **options)
        assert (loss == 0).all() and (gradient == 0).all()
    smoothing = options.get("label_smoothing", 0.0)
    if smoothing == 0:  # then one side is all there is
        for y, side in ((1, {"pos_weight": torch.zeros(4, device=device)}), (1, {"alpha": 0.0}), (0, {"alpha": 1.0})):
            for targets in (torch.full_like(x, y), torch.full((4,), y, device=device)):
                loss, gradient = loss_and_gradient(x, targets, **{**options, **side})
                assert (loss == 0).all() and (gradient == 0).all()
    assert_follows_oracle(x[1:], torch.tensor([0.0, 1.0, 0.5], device=device), **options)


@pytest.mark.parametrize("empty", ["nan", "zero"])
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (4, 3)], ids=str)
@by_dtype
def test_nothing_counts(shape, empty, dtype, device):
    """The mean of nothing is NaN, as torch's; "zero" makes it 0. The gradient is 0 in any case."""
    x = torch.randn(shape, device=device).to(dtype)
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    for targets, options in [
        (torch.rand(shape, device=device), {"mask": mask}),
        (torch.full(shape, -100, device=device), {}),
        (torch.full(shape[:-1], -100, device=device), {}),
    ]:
        if targets.numel() == 0 and targets.dim() < x.dim() and x.numel():
            continue
        for reduction, expected in [("mean", NAN if empty == "nan" else 0.0), ("sum", 0.0), ("none", None)]:
            loss, gradient = loss_and_gradient(x, targets, reduction=reduction, empty=empty, **options)
            if reduction == "none":
                assert loss.shape == shape and (loss == 0).all()
            else:
                same(loss, torch.tensor(expected, dtype=loss.dtype, device=device))
            assert gradient.shape == x.shape and (gradient == 0).all()
        loss, gradient = loss_and_gradient(x, targets, reduction="mean", normalizer=3.0, **options)
        assert loss == 0 and (gradient == 0).all()


@by_dtype
def test_a_scalar(dtype, device):
    x = torch.tensor(0.7, device=device).to(dtype)
    for y in (torch.tensor(1.0), torch.tensor(True), torch.tensor(1), torch.tensor(-100)):
        for reduction in ("none", "mean", "sum"):
            assert_follows_oracle(x, y.to(device), reduction=reduction, empty="zero")


def test_mean_divides_by_the_elements_that_count_and_by_no_weight(device):
    x, y = example(device, dtype=torch.float64)
    mask = torch.rand(9, 1, device=device) < 0.5
    w = torch.rand(70, device=device)
    total = sigmoid_focal_loss(x, y, mask=mask, weight=w, pos_weight=w, reduction="sum")
    mean = sigmoid_focal_loss(x, y, mask=mask, weight=w, pos_weight=w, reduction="mean")
    torch.testing.assert_close(mean, total / (70 * mask.sum()))
    zero_weights = sigmoid_focal_loss(x, y, weight=torch.zeros_like(w), reduction="mean")
    assert zero_weights == 0  # they count


@pytest.mark.parametrize("number", [3, 2.5, torch.tensor(4.0), torch.tensor(4), torch.tensor(4.0).double()], ids=str)
def test_normalizer_overrides_the_divisor(number, device):
    x, y = example(device)
    normalizer = number.to(device) if isinstance(number, Tensor) else number
    loss, gradient = loss_and_gradient(x, y, reduction="mean", normalizer=normalizer)
    total, total_gradient = loss_and_gradient(x, y, reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, total / float(number))
    torch.testing.assert_close(gradient, total_gradient / float(number))


@pytest.mark.parametrize("e", [0.1, 0.5, 1.0])
def test_label_smoothing_moves_targets_towards_one_half(e, device):
    x, y = example(device, dtype=torch.float64)
    y = y.double()
    smoothed = (1 - e) * y + e / 2
    for a, b in zip(loss_and_gradient(x, y, label_smoothing=e), loss_and_gradient(x, smoothed), strict=True):
        torch.testing.assert_close(a, b)
    assert_follows_oracle(x, y > 0.5, label_smoothing=e)


# ---- Targets ---------------------------------------------------------------------------------


def one_hot(ids, classes):
    return (ids.long().unsqueeze(-1) == torch.arange(classes, device=ids.device)).float()


@by_integer
@pytest.mark.parametrize("options", [FOCAL, ASYMMETRIC, SMOOTHED], ids=["focal", "asymmetric", "smoothed"])
def test_class_ids_are_their_one_hot_matrix(options, integer, device):
    signed = torch.iinfo(integer).min < 0
    for classes in (1, 2, 16, 70):
        ids = torch.randint(-1 if signed else 0, classes, (40,), device=device)
        x = 3 * torch.randn(40, classes, device=device)
        for targets, ignored in ((ids, None), (torch.where(ids == 0, 100, ids), 100)):
            keep = torch.ones(40, 1, dtype=torch.bool, device=device) if ignored is None else (targets != 100)[:, None]
            truth = oracle(x, one_hot(targets, classes), keep, **options)
            ignore = {} if ignored is None else {"ignore_index": ignored}
            loss, gradient = loss_and_gradient(x, targets.to(integer), **ignore, **options)
            assert_near(loss, truth.loss, truth.loss_bound)
            assert_near(gradient, truth.gradient, truth.gradient_bound)


@by_integer
@option_sets
def test_integers_bool_and_float_are_the_same_targets(options, integer, device):
    x, y = 3 * torch.randn(9, 70, device=device), hard_targets((9, 70), device)
    truth = oracle(x, y, **options)
    for targets in (y, y.bool(), y.to(integer)):
        loss, gradient = loss_and_gradient(x, targets, **options)
        assert_near(loss, truth.loss, truth.loss_bound)
        assert_near(gradient, truth.gradient, truth.gradient_bound)


@by_integer
@pytest.mark.parametrize("ignore_index", [-100, 100, 255, 0, 1])
def test_ignore_index_is_compared_as_a_number(integer, ignore_index, device):
    """156 of uint8 is not -100, and 255 of uint8 is not -1."""
    info = torch.iinfo(integer)
    values = [0, 1, *([ignore_index] if info.min <= ignore_index <= info.max else [])]
    x, t = torch.randn(len(values), device=device), torch.tensor(values, device=device)
    expected, expected_gradient = loss_and_gradient(x, t, ignore_index=ignore_index)
    loss, gradient = loss_and_gradient(x, t.to(integer), ignore_index=ignore_index)
    assert (expected != 0).tolist() == [value != ignore_index for value in values]
    same(loss, expected)
    same(gradient, expected_gradient)


def test_ignore_index_is_no_value_of_float_and_bool_targets(device):
    x, y = torch.randn(9, device=device), hard_targets((9,), device)
    for targets in (y, y.bool()):
        for ignore_index in (0, 1):
            same(sigmoid_focal_loss(x, targets, ignore_index=ignore_index), sigmoid_focal_loss(x, targets))


def test_background_has_a_loss_of_its_own(device):
    """-1 is a row without a class, not a row to ignore; unless ignore_index says so."""
    x, ids = torch.randn(3, 5, device=device), torch.tensor([2, -1, 4], device=device)
    assert (sigmoid_focal_loss(x, ids) > 0).all()
    assert (sigmoid_focal_loss(x, ids, ignore_index=-1)[1] == 0).all()


def raises_by_itself(device, kernel):
    """A GPU is never made to wait, nor is the interpreter of its kernels: there NaN says it, unless asked to check."""
    return torch.device(device).type == "cpu" and kernel != "triton"


BAD_IDS = [(-2, torch.int64), (-99, torch.int8), (70, torch.int64), (70, torch.uint8), (156, torch.uint8)]
BAD_IDS += [(2**32 + 1, torch.int64), (2**62, torch.int64), (-(2**63), torch.int64)]
BAD_VALUES = [(-1, torch.int64), (2, torch.int64), (2, torch.uint8), (3, torch.int8), (156, torch.uint8)]
BAD_VALUES += [(2**32 + 1, torch.int64), (2**62, torch.int64), (-(2**63), torch.int64), (-99, torch.int32)]


@pytest.mark.parametrize(
    "value, integer, ids", [*((*b, True) for b in BAD_IDS), *((*b, False) for b in BAD_VALUES)], ids=str
)
@option_sets
def test_a_target_out_of_range_is_an_error_and_never_a_silent_zero(
    value, integer, ids, options, device, kernel, monkeypatch
):
    x = torch.randn(9, 70, device=device)
    right = torch.arange(9, device=device) if ids else torch.zeros(9, 70, device=device)
    right = right.to(integer)
    wrong, at = right.clone(), 4 if ids else (4, 33)
    wrong[at] = value
    message = rf"target {value} is out of range: allowed are {'-1 to 69' if ids else '0, 1'} and ignore_index"
    expected, expected_gradient = loss_and_gradient(x, right, **options)
    if raises_by_itself(device, kernel):
        for reduction in ("none", "sum", "mean"):
            with pytest.raises(IndexError, match=message):
                sigmoid_focal_loss(x, wrong, reduction=reduction, **options)
    else:  # a device is never made to wait: NaN says it
        loss, gradient = loss_and_gradient(x, wrong, **options)
        bad = torch.zeros_like(x, dtype=torch.bool)
        bad[at] = True
        same(loss, expected.masked_fill(bad, NAN))
        same(gradient, expected_gradient.masked_fill(bad, 0))
        assert sigmoid_focal_loss(x, wrong, reduction="mean", **options).isnan()
        monkeypatch.setenv("TORCHFAST_CHECK", "1")
        with pytest.raises(IndexError, match=message):
            sigmoid_focal_loss(x, wrong, **options)
    again, again_gradient = loss_and_gradient(x, right, **options)
    same(again, expected)
    same(again_gradient, expected_gradient)


@pytest.mark.parametrize("layout", ["contiguous", "first fastest"])
@pytest.mark.parametrize("ids", [True, False])
def test_the_first_target_out_of_range_is_named(ids, layout, device, kernel, monkeypatch):
    """First in the order of the elements, whichever thread finds its own first."""
    if not raises_by_itself(device, kernel):
        monkeypatch.setenv("TORCHFAST_CHECK", "1")
    x = in_layout(torch.randn(20_000, 4, device=device), layout)
    targets = torch.zeros(20_000, dtype=torch.long, device=device) if ids else torch.zeros_like(x, dtype=torch.long)
    at = [3000, 9000, 15_001, 19_999]
    if ids:
        targets[at] = torch.tensor([14, 13, 12, 11], device=device)
    else:
        targets[at, [3, 2, 1, 0]] = torch.tensor([14, 13, 12, 11], device=device)
    for first in (14, 13, 12, 11):
        with pytest.raises(IndexError, match=f"target {first} "):
            sigmoid_focal_loss(x, targets)
        targets[targets == first] = 0
    assert sigmoid_focal_loss(x, targets).isfinite().all()


@pytest.mark.parametrize("ids", [True, False])
def test_a_masked_target_is_not_looked_at(ids, device, kernel, monkeypatch):
    """Padding holds anything."""
    if not raises_by_itself(device, kernel):
        monkeypatch.setenv("TORCHFAST_CHECK", "1")
    x, mask = torch.randn(6, 5, device=device), torch.ones(6, 5, dtype=torch.bool, device=device)
    mask[2] = False
    targets = torch.zeros(6, dtype=torch.long, device=device) if ids else torch.zeros_like(x, dtype=torch.long)
    expected = loss_and_gradient(x, targets, mask=mask)
    targets[2] = 77
    for a, b in zip(loss_and_gradient(x, targets, mask=mask), expected, strict=True):
        same(a, b)
    mask[2, 4] = True
    with pytest.raises(IndexError, match="target 77 "):
        sigmoid_focal_loss(x, targets, mask=mask)


@pytest.mark.once
def test_out_of_range_under_vmap_is_nan_with_gradient_zero(device):
    """vmap cannot raise for what the data says; it must not be a silent 0 either."""
    x = torch.randn(2, 3, 5, device=device)
    ids = torch.tensor([[0, 1, 2], [0, 7, 4]], device=device)
    losses = torch.func.vmap(lambda x, t: sigmoid_focal_loss(x, t))(x, ids)
    assert losses.isnan().any(-1).tolist() == [[False] * 3, [False, True, False]]
    gradient = torch.func.grad(lambda x: torch.func.vmap(lambda x, t: sigmoid_focal_loss(x, t))(x, ids).nansum())(x)
    assert (gradient[1, 1] == 0).all() and gradient.isfinite().all()


@by_dtype
@pytest.mark.parametrize("other", [*DTYPES, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_targets_and_weights_of_any_floating_dtype(other, dtype, device):
    """The loss's dtype follows the logits alone: fp32 for half, whatever the others are."""
    x, y = example(device, dtype=dtype)
    w, pw = (2 * torch.rand(2, 70, device=device)).to(other)
    assert_follows_oracle(x, y.to(other), weight=w, pos_weight=pw, gamma=1.5)


@pytest.mark.parametrize("shape", [(), (1,), (70,), (9, 1), (1, 70), (9, 70)], ids=str)
@pytest.mark.parametrize("name", ["weight", "pos_weight", "mask"])
@pytest.mark.parametrize("kind", ["soft", "bool", "class ids"])
def test_weights_and_mask_are_broadcast(kind, name, shape, device):
    x, targets = 3 * torch.randn(9, 70, device=device), targets_of(kind, (9, 70), device)
    factor = 2 * torch.rand(shape, device=device)
    factor = factor > 0.7 if name == "mask" else factor
    for reduction in ("none", "mean"):
        assert_follows_oracle(x, targets, reduction=reduction, empty="zero", **{name: factor})


# ---- Layouts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
@pytest.mark.parametrize("kind", ["soft", "int64", "class ids"])
def test_logits_and_targets_of_any_layout(kind, other, layout, device, kernel):
    shape = (3, 4, 5, 7) if kernel == "triton" else (3, 14, 25, 7)
    x = in_layout(3 * torch.randn(shape, device=device), layout)
    targets = in_layout(targets_of(kind, shape, device), other)
    factors = {
        "weight": in_layout(torch.rand(shape, device=device), other),
        "mask": in_layout(torch.rand(shape, device=device) < 0.8, other),
        "pos_weight": torch.rand(14 if shape[1] == 14 else 4, 1, 7, device=device),
    }
    for reduction, upstream in (("none", in_layout(torch.randn(shape, device=device), other)), ("mean", None)):
        assert_follows_oracle(x, targets, upstream, reduction=reduction)
        assert_follows_oracle(x, targets, upstream, reduction=reduction, **factors)


def test_channels_last_in_channels_last_out(device):
    x = torch.randn(2, 19, 5, 4, device=device).contiguous(memory_format=torch.channels_last)
    loss, gradient = loss_and_gradient(x, hard_targets(x.shape, device))
    assert loss.is_contiguous(memory_format=torch.channels_last)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dims", [(0,), (1,), (0, 2), (0, 1, 2)], ids=str)
def test_expanded_tensors(dims, device):
    shape = (4, 5, 30)

    def expanded(t):
        for dim in dims:
            t = t.narrow(dim, 0, 1)
        return t.expand(shape)

    x, y, w = (expanded(torch.randn(shape, device=device)) for _ in range(3))
    y = y.sigmoid()
    assert_follows_oracle(x, y, w, weight=w.abs(), mask=w > -1)
    assert_follows_oracle(torch.randn(shape, device=device), y, w, weight=w.abs(), mask=w > -1)
    assert_follows_oracle(x, torch.tensor(3, device=device).expand(4, 5), reduction="mean")


@pytest.mark.parametrize("shape", [(9, 70), (2, 7, 5, 4)], ids=str)
def test_expanded_and_strided_upstream(shape, device):
    """loss.sum().backward() sends a stride-0 gradient."""
    x, y = torch.randn(shape, device=device), torch.rand(shape, device=device)
    for upstream in (
        torch.tensor(-2.0, device=device).expand(shape),
        torch.randn(*shape, 2, device=device)[..., 0],
        torch.randn(*reversed(shape), device=device).permute(*reversed(range(len(shape)))),
    ):
        assert_follows_oracle(x, y, upstream)


def test_an_upstream_gradient_of_zero_gives_zero(device):
    x, y = torch.tensor([NAN, INF, 1.0, 2.0], device=device), torch.ones(4, device=device)
    for reduction, upstream in (("none", torch.zeros(4)), ("sum", torch.zeros(()))):
        _, gradient = loss_and_gradient(x, y, upstream.to(device), reduction=reduction)
        assert (gradient == 0).all()


def test_inputs_of_every_kind_are_left_alone(device):
    x, y = example(device)
    ids = torch.randint(-1, 70, (9,), device=device)
    w, pw = torch.rand(2, 9, 70, device=device)
    mask = w < 0.5
    inputs = [x, y, ids, w, pw, mask]
    before = [i.clone() for i in inputs]
    for targets in (y, ids, y > 0.5):
        loss_and_gradient(x, targets, weight=w, pos_weight=pw, mask=mask, **ASYMMETRIC)
    for i, copied in zip(inputs, before, strict=True):
        same(i, copied)


@pytest.mark.parametrize("kind", ["soft", "class ids"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(4000, 50), (7, 30_011)], ids=str)
def test_bitwise_deterministic_where_threads_share_the_work(shape, reduction, kind, device, kernel):
    """Run to run; also for any number of threads, but for those of PyTorch's own ops."""
    if kernel == "triton":  # which has no threads here
        shape = (shape[0] // 8 or 1, shape[1])
    x, targets = torch.randn(shape, device=device), targets_of(kind, shape, device)
    expected = loss_and_gradient(x, targets, reduction=reduction)
    threads = torch.get_num_threads()
    try:
        for count in (threads, threads, 1, 2, 3) if kernel == "native" else [threads]:
            torch.set_num_threads(count)
            for a, b in zip(loss_and_gradient(x, targets, reduction=reduction), expected, strict=True):
                same(a, b)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(unavailable_reason is not None or not sys.platform.startswith("linux"), reason="native, /proc")
@pytest.mark.parametrize(
    "layout, kind",
    [
        ("contiguous", "hard"),
        ("contiguous", "int64"),
        ("contiguous", "class ids"),
        ("first fastest", "class ids"),
        ("sliced", "int64"),
    ],
)
@pytest.mark.once
def test_peak_memory_is_the_gradient_alone(layout, kind, device):
    """64 MB of bf16 logits: not even for a moment is there a copy, an fp32 one, or a one-hot matrix."""
    shape = (32, 1_000_000)
    x = in_layout(torch.randn(shape, device=device).bfloat16(), layout).requires_grad_()
    targets = targets_of(kind, shape, device)
    w = torch.rand(shape[1], device=device)
    sigmoid_focal_loss(x[:1], targets[:1], weight=w, reduction="mean").backward()
    x.grad = None

    loss, forward = peak_memory(lambda: sigmoid_focal_loss(x.detach(), targets, weight=w, reduction="mean"))
    loss, both = peak_memory(lambda: sigmoid_focal_loss(x, targets, weight=w, reduction="mean"))
    _, backward = peak_memory(loss.backward)
    assert forward < 0.25 * x.nbytes and max(both, backward) < 1.25 * x.nbytes


@pytest.mark.parametrize("kind", ["soft", "class ids"])
def test_offsets_beyond_2_to_the_31_elements(kind, device, kernel):
    """A view of 9 GB of address space, of which only the pages of its elements are ever touched."""
    if (device, kernel) not in (("cpu", "native"), ("cpu", "reference")):
        pytest.skip("of the CPU's kernels; Triton's have tests of their own")
    far = 2**31 + 8
    for shape, strides in (((3, 70), (far // 2 + 4, 1)), ((4, 3), (1, far // 2 + 4)), ((2, 5, 4), (far, 4, 1))):
        x = torch.empty(far * 2, dtype=torch.bfloat16).as_strided(shape, strides)
        x.copy_(torch.randn(shape))
        assert_follows_oracle(x, targets_of(kind, shape, device))


def available_memory():
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:")) * 1024


@pytest.mark.once
@pytest.mark.usefixtures("memory_of_one")
def test_more_than_2_to_the_31_elements(device, kernel):
    """Element offsets are 64-bit: elements past 2^31 are as right as the first ones."""
    if kernel == "reference" or (device, kernel) == ("cpu", "triton"):
        pytest.skip("the reference needs ten times the memory; interpreted: test_triton_sigmoid_focal_loss.py")
    if available_memory() < 12 * 2**30:
        pytest.skip("needs 12 GiB of free memory")
    rows, classes = 2**25 + 7, 65
    x = torch.zeros(rows, classes, dtype=torch.bfloat16, device=device)
    middle = 2**31 // classes
    looked_at = torch.tensor([0, 1, middle - 1, middle, middle + 1, rows - 2, rows - 1], device=device)
    x[looked_at] = (3 * torch.randn(7, classes, device=device)).to(x.dtype)
    ids = torch.randint(-1, classes, (rows,), device=device)
    few = oracle(x[looked_at], one_hot(ids[looked_at], classes))
    loss, gradient = loss_and_gradient(x, ids, reduction="sum")
    assert_near(gradient[looked_at], few.gradient, few.gradient_bound)
    positive, negative = 0.25 * math.log(2) / 4, 0.75 * math.log(2) / 4  # of a logit of 0
    labels = (ids >= 0).sum().item()
    expected = labels * positive + (rows * classes - labels) * negative
    others = oracle(torch.zeros(7, classes), one_hot(ids[looked_at].cpu(), classes)).loss.sum()
    assert loss.item() == pytest.approx(expected + (few.loss.sum() - others).item(), rel=1e-6)


@pytest.mark.once
def test_autocast_keeps_half_logits_half(device):
    """A linear layer's bf16 logits go in as they are: nothing of fp32 of their size is saved."""
    layer = nn.Linear(8, 70).to(device)
    ids = torch.randint(70, (9,), device=device)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        logits = layer(torch.randn(9, 8, device=device))
        with hooks:
            loss = sigmoid_focal_loss(logits, ids, reduction="mean")
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    assert any(s.data_ptr() == logits.data_ptr() for s in saved)
    assert not [s for s in saved if s.numel() >= logits.numel() and s.element_size() > 2]
    loss.backward()
    assert layer.weight.grad.isfinite().all()


# ---- Gradients of the other inputs, and other routes to the gradient -------------------------


@option_sets
@pytest.mark.parametrize("name", ["targets", "weight", "pos_weight"])
@pytest.mark.once
def test_gradients_of_targets_and_weights(name, options, device):
    x = torch.linspace(-3, 3, 12, dtype=torch.float64, device=device).reshape(3, 4)
    inputs = {n: torch.rand(3, 4, dtype=torch.float64, device=device) for n in ("targets", "weight", "pos_weight")}

    def loss(value):
        return sigmoid_focal_loss(x, **{**inputs, name: value}, **options)

    assert torch.autograd.gradcheck(loss, inputs[name].requires_grad_(), fast_mode=True)
    inputs[name] = torch.zeros(3, 4, dtype=torch.float64, device=device)  # learning to weigh starts from 0
    assert torch.autograd.gradcheck(loss, inputs[name].requires_grad_(), fast_mode=True)


@option_sets
@pytest.mark.parametrize("route", ["kernel", "weight", "pos_weight", "targets", "create_graph", "func.grad"])
@pytest.mark.parametrize("special", ["masked", "ignored", "weight 0", "certain"])
@pytest.mark.once("native", "triton")
def test_special_elements_are_right_on_every_route_to_the_gradient(special, route, options, device):
    """All but the first differentiate plain PyTorch, where 0 * NaN in a masked branch is a trap."""
    x, y = example(device)
    call = {"weight": torch.rand(9, 70, device=device), "pos_weight": torch.rand(70, device=device), **options}
    targets, mask, counts = y, None, None
    if special == "masked":
        counts = mask = torch.rand(9, 70, device=device) < 0.7
        x = torch.where(mask, x, NAN)
    elif special == "ignored":
        if route == "targets":
            return  # integers have no gradient
        targets = torch.where(y < 0.2, -100, (y < 0.5).long())
        counts = targets != -100
        x = torch.where(counts, x, NAN)
    elif special == "weight 0":
        call["weight"][2] = 0
        x[2] = NAN
    else:
        x[3], x[4] = 20_000, -20_000
    values = torch.where(counts, targets, 0) if special == "ignored" else targets
    truth = oracle(x, values, counts, reduction="mean", **call)
    if route in call:
        call[route] = call[route].clone().requires_grad_()
    if route == "targets":
        targets = targets.clone().requires_grad_()

    def loss_of(x):
        return sigmoid_focal_loss(x, targets, mask=mask, reduction="mean", **call)

    if route == "func.grad":
        loss, gradient = loss_of(x), torch.func.grad(loss_of)(x)
    else:
        leaf = x.requires_grad_()
        loss = loss_of(leaf)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=route == "create_graph")
    assert_near(loss, truth.loss, truth.loss_bound)
    assert_near(gradient, truth.gradient, truth.gradient_bound)


# ---- Validation ------------------------------------------------------------------------------

X = torch.zeros(4, 3)
BAD_CALLS = {
    "gamma negative": ((X, X), {"gamma": -0.5}, ValueError, ["gamma", "-0.5", ">= 0"]),
    "gamma nan": ((X, X), {"gamma": NAN}, ValueError, ["gamma", "nan"]),
    "gamma infinite": ((X, X), {"gamma": INF}, ValueError, ["gamma", "inf"]),
    "gamma_neg negative": ((X, X), {"gamma_neg": -1.0}, ValueError, ["gamma_neg", "-1.0", ">= 0"]),
    "gamma_neg nan": ((X, X), {"gamma_neg": NAN}, ValueError, ["gamma_neg", "nan"]),
    "alpha above 1": ((X, X), {"alpha": 1.5}, ValueError, ["alpha", "1.5", "[0, 1]"]),
    "alpha nan": ((X, X), {"alpha": NAN}, ValueError, ["alpha", "nan"]),
    "clip negative": ((X, X), {"clip": -0.1}, ValueError, ["clip", "-0.1", "[0, 1)"]),
    "clip one": ((X, X), {"clip": 1.0}, ValueError, ["clip", "1.0", "[0, 1)"]),
    "smoothing above 1": ((X, X), {"label_smoothing": 1.5}, ValueError, ["label_smoothing", "1.5", "[0, 1]"]),
    "smoothing nan": ((X, X), {"label_smoothing": NAN}, ValueError, ["label_smoothing", "nan"]),
    "reduction": ((X, X), {"reduction": "avg"}, ValueError, ["reduction", "avg", "mean"]),
    "empty": ((X, X), {"empty": "one"}, ValueError, ["empty", "one", "zero"]),
    "normalizer of a sum": ((X, X), {"normalizer": 2.0, "reduction": "sum"}, ValueError, ["normalizer", "2.0", "sum"]),
    "normalizer of none": ((X, X), {"normalizer": 2.0}, ValueError, ["normalizer", "2.0", "none"]),
    "normalizer shape": (
        (X, X),
        {"normalizer": torch.ones(3), "reduction": "mean"},
        ValueError,
        ["normalizer", "(3,)"],
    ),
    "integer inputs": ((X.long(), X), {}, TypeError, ["inputs", "int64", "float32"]),
    "complex inputs": ((X.to(torch.complex64), X), {}, TypeError, ["inputs", "complex64", "float32"]),
    "complex targets": ((X, X.to(torch.complex64)), {}, TypeError, ["targets", "complex64"]),
    "targets' shape": ((X, X[:, :2]), {}, ValueError, ["targets", "(4, 2)", "(4, 3)"]),
    "soft targets of rows": ((X, X[:, 0]), {}, ValueError, ["targets", "(4,)", "(4, 3)"]),
    "bool targets of rows": ((X, X[:, 0] > 0), {}, ValueError, ["targets", "(4,)", "(4, 3)"]),
    "class ids' shape": ((X, torch.zeros(3).long()), {}, ValueError, ["targets", "(3,)", "(4, 3)", "(4,)"]),
    "targets' device": ((X, X.to("meta")), {}, ValueError, ["targets", "meta", "cpu"]),
    "weight shape": ((X, X), {"weight": torch.ones(2)}, ValueError, ["weight", "(2,)", "(4, 3)"]),
    "weight of more dimensions": ((X, X), {"weight": torch.ones(1, 4, 3)}, ValueError, ["weight", "(1, 4, 3)"]),
    "weight dtype": ((X, X), {"weight": torch.ones(3).long()}, TypeError, ["weight", "int64", "floating"]),
    "weight device": ((X, X), {"weight": torch.ones(3, device="meta")}, ValueError, ["weight", "meta", "cpu"]),
    "weight number": ((X, X), {"weight": 2.0}, TypeError, ["weight", "float"]),
    "pos_weight shape": ((X, X), {"pos_weight": torch.ones(4)}, ValueError, ["pos_weight", "(4,)", "(4, 3)"]),
    "pos_weight dtype": ((X, X), {"pos_weight": torch.ones(3).int()}, TypeError, ["pos_weight", "int32", "floating"]),
    "pos_weight list": ((X, X), {"pos_weight": [1.0]}, TypeError, ["pos_weight", "list"]),
    "mask dtype": ((X, X), {"mask": torch.ones(4, 3)}, TypeError, ["mask", "float32", "bool"]),
    "mask shape": ((X, X), {"mask": torch.ones(2) > 0}, ValueError, ["mask", "(2,)", "(4, 3)"]),
    "mask device": ((X, X), {"mask": (X > 0).to("meta")}, ValueError, ["mask", "meta", "cpu"]),
    "mask list": ((X, X), {"mask": [True]}, TypeError, ["mask", "list"]),
}


test_errors_name_the_argument_what_was_given_and_what_is_allowed = refuses(sigmoid_focal_loss, BAD_CALLS)


# ---- Modules ---------------------------------------------------------------------------------


@pytest.mark.once
def test_modules_are_the_functions(device):
    x, y = example(device)
    weight, pos_weight = torch.rand(2, 70, device=device)
    mask = torch.rand(9, 1, device=device) < 0.7
    options = {"gamma_neg": 3.0, "clip": 0.1, "label_smoothing": 0.1, "weight": weight, "pos_weight": pos_weight}
    module = SigmoidFocalLoss(0.3, 1.5, "mean", **options)
    same(module(x, y, mask=mask), sigmoid_focal_loss(x, y, 0.3, 1.5, "mean", mask=mask, **options))
    same(module(x, y, normalizer=2.0), sigmoid_focal_loss(x, y, 0.3, 1.5, "mean", normalizer=2.0, **options))
    same(SigmoidFocalLoss()(x, y), sigmoid_focal_loss(x, y))
    same(AsymmetricLoss()(x, y), asymmetric_loss(x, y))
    same(AsymmetricLoss(3, 0.5, 0.1, "mean", alpha=0.4)(x, y), asymmetric_loss(x, y, 3, 0.5, 0.1, "mean", alpha=0.4))
    ids = torch.full((9,), 3, device=device)
    same(
        SigmoidFocalLoss(reduction="mean", ignore_index=3, empty="zero")(x, ids),
        torch.zeros((), device=device),
    )


test_modules_survive_copies = survives_copies([SigmoidFocalLoss, AsymmetricLoss], ["weight", "pos_weight"], example)


def test_repr_shows_the_options():
    assert repr(SigmoidFocalLoss(0.3, 1.5, "mean", clip=0.1)) == (
        "SigmoidFocalLoss(alpha=0.3, gamma=1.5, gamma_neg=None, clip=0.1, label_smoothing=0.0, reduction='mean')"
    )
    assert repr(AsymmetricLoss()) == (
        "AsymmetricLoss(alpha=-1.0, gamma=1.0, gamma_neg=4.0, clip=0.05, label_smoothing=0.0, reduction='sum')"
    )


def test_public_names_are_exported():
    for name in ("AsymmetricLoss", "SigmoidFocalLoss", "asymmetric_loss", "sigmoid_focal_loss"):
        assert name in torchfast.__all__
