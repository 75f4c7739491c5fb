"""The contract of the softmax loss family, property by property.

Truth is `oracle`, written from the formula for one row at a time in Python's fp64. A bound on a
difference is either derived from the number of roundings (`Truth.bound`) or is eager PyTorch's own
error at that dtype.
"""

import math
import sys
import types
import unittest

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract import DTYPES, HALF, INTEGERS, Truth, assert_near, by_dtype, gradient_of, refuses, same, survives_copies
from hypothesis import given
from hypothesis import strategies as st
from memory import peak_memory
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import torchfast
from torchfast import CrossEntropyLoss, FocalLoss, LabelSmoothingCrossEntropy, cross_entropy, focal_loss
from torchfast._native import unavailable_reason

INF, NAN = math.inf, math.nan
LOW = (*HALF, torch.float32)


# ---- The oracle: the formula, row by row -----------------------------------------------------


def oracle_row(x, u, gamma=0.0, z_loss=0.0, softcap=None, logit_scale=1.0):
    """Loss, gradient and size (of the terms that are rounded) of one row; u_c = w_c a_c q_c."""
    with np.errstate(all="ignore"):
        z = logit_scale * x
        if softcap:
            z = softcap * np.tanh(z / softcap)
        if np.isnan(z).any() or not np.isfinite(z.max()):
            return NAN, np.full(len(z), NAN), NAN
        top = z.argmax()
        e = np.exp(z - z[top])
        rest = math.fsum(np.delete(e, top))  # the sum that leaves the largest term, 1, out
        p, one_minus_p = e / (1 + rest), (1 + rest - e) / (1 + rest)
        one_minus_p[top] = rest / (1 + rest)
        minus_log_p = z[top] - z + math.log1p(rest)
        lse = z[top] + math.log1p(rest)
        loss = math.fsum(np.where(u == 0, 0, u * one_minus_p**gamma * minus_log_p)) + z_loss * lse**2
        p_r = np.where(p == 0, 0, np.where(one_minus_p == 0, p, p * minus_log_p / one_minus_p))
        u_psi = u * -(one_minus_p**gamma) * (1 + gamma * p_r)
        # u_j psi_j - p_j sum_c u_c psi_c, with the term c = j taken together: u_j psi_j (1 - p_j).
        others = math.fsum(u_psi) - u_psi
        gradient = u_psi * one_minus_p - p * others + 2 * z_loss * lse * p
        gradient *= logit_scale * (1 - (z / softcap) ** 2 if softcap else 1)
        terms = np.abs(u) * (1 + np.where((u == 0) | np.isinf(minus_log_p), 0, minus_log_p))
        size = (1 + np.abs(z[np.isfinite(z)]).max()) * (1 + gamma) ** 2
        return loss, gradient, size * (math.fsum(terms) + abs(z_loss) * (1 + abs(lse)) ** 2)


def oracle(
    x,
    target,
    weight=None,
    *,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    alpha=None,
    sample_weight=None,
    normalizer=None,
    empty="nan",
    upstream=None,
    **options,
):
    """The formula of docs and SEMANTICS over a batch, and what rounding may change.

    A value may be off by (16 + sqrt(classes) + sqrt(rows)) roundings of the dtype that sums are
    computed in, times the size of its terms: 16 for the functions, the rest because the roundings
    of a sum add up like a random walk. A half-precision gradient is rounded once more.
    """
    classes = x.shape[min(1, x.dim() - 1)]
    rows_shape = x.shape[:1] * (x.dim() > 1) + x.shape[2:]
    rows = x.detach().movedim(min(1, x.dim() - 1), -1).reshape(-1, classes).cpu().double().numpy()
    count, e = len(rows), label_smoothing

    def per_class(t):
        return np.ones(classes) if t is None else torch.as_tensor(t).cpu().double().expand(classes).numpy()

    w, a = per_class(weight), per_class(alpha)
    s = np.ones(count) if sample_weight is None else sample_weight.detach().cpu().double().flatten().numpy()
    g = np.ones(count) if upstream is None else upstream.cpu().double().expand(rows_shape).flatten().numpy()
    if target.is_floating_point():
        y = target.detach().movedim(min(1, x.dim() - 1), -1).reshape(-1, classes).cpu().double().numpy()
        valid, w_t = np.ones(count, bool), np.ones(count)
    else:
        t = target.cpu().long().flatten().numpy()
        valid = t != ignore_index
        y = np.zeros((count, classes))
        y[np.arange(count), np.where(valid, t, 0)] = 1
        w_t = np.where(valid, w[np.where(valid, t, 0)], 0)
    counts = valid & (s != 0)
    w_t = np.where(counts, w_t * s, 0)
    q = (1 - e) * y + e / classes

    loss, size, gradient = np.zeros(count), np.zeros(count), np.zeros((count, classes))
    for i in np.flatnonzero(counts):
        loss[i], gradient[i], size[i] = oracle_row(rows[i], w * a * q[i], **options)
    loss, size, gradient = loss * s, size * np.abs(s), gradient * s[:, None]
    divisor = 1.0
    if normalizer is not None:
        divisor = float(normalizer)
    elif reduction == "mean":
        divisor = math.fsum(w_t)
        size *= math.fsum(np.abs(w_t)) / abs(divisor) if divisor else 1  # weights of both signs cancel
    gradient = gradient * g[:, None] / divisor if divisor else np.zeros_like(gradient)
    gradient_size = np.abs(g) * size / abs(divisor) if divisor else size

    eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    eps *= 16 + math.sqrt(classes) + (0 if reduction == "none" else math.sqrt(count))
    gradient_bound = eps * gradient_size[:, None] * max(1, abs(options.get("logit_scale", 1.0)))
    gradient_bound = np.broadcast_to(gradient_bound, gradient.shape)
    if x.dtype in HALF:
        info = torch.finfo(x.dtype)
        gradient_bound = gradient_bound + info.eps * np.abs(gradient) + info.smallest_normal * info.eps

    def total(values):
        if reduction == "none":
            return torch.tensor(values, dtype=torch.float64).reshape(rows_shape)
        if divisor == 0:
            return torch.tensor(NAN if empty == "nan" else 0.0, dtype=torch.float64)
        return torch.tensor(values.sum() / divisor, dtype=torch.float64)

    def as_logits(values):
        return torch.tensor(values, dtype=torch.float64).reshape(*rows_shape, classes).movedim(-1, min(1, x.dim() - 1))

    with np.errstate(all="ignore"):
        loss_bound = eps * (total(size) if divisor else torch.tensor(0.0)).abs()
        return Truth(total(loss), as_logits(gradient), loss_bound, as_logits(gradient_bound))


def loss_and_gradient(x, target, weight=None, upstream=None, function=cross_entropy, **options):
    x = x.detach().requires_grad_()
    loss = function(x, target, weight, **options)
    return loss.detach(), gradient_of(loss, x, upstream)


def assert_follows_oracle(x, target, weight=None, **options):
    upstream = options.pop("upstream", None)
    truth = oracle(x, target, weight, upstream=upstream, **options)
    truth.assert_met(x, *loss_and_gradient(x, target, weight, upstream, **options))


def ulp(value, dtype):
    """Distance of neighbours of `dtype` at `value`."""
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(value)) if value else 0.0


# ---- The formula -----------------------------------------------------------------------------


@st.composite
def calls(draw, device):
    """Any combination of options, shapes, dtypes and layouts, with masked, ignored and NaN rows."""
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(DTYPES))
    classes = draw(st.one_of(st.sampled_from([1, 2, 63, 64, 65]), st.integers(1, 200)))
    space = draw(st.sampled_from([None, (), (), (3,), (2, 2)]))
    batch = () if space is None else (draw(st.integers(1, 5)),)
    rows = (*batch, *(space or ()))

    def rand(*shape):
        return torch.rand(shape, generator=seed, dtype=torch.float64)

    spread, shift = draw(st.sampled_from([0.1, 3.0, 30.0])), draw(st.sampled_from([0.0, 0.0, -50.0, 500.0]))
    x = spread * torch.randn(*rows, classes, generator=seed, dtype=torch.float64) + shift  # classes last
    options = {
        "gamma": draw(st.sampled_from([0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 5.0])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
        "z_loss": draw(st.sampled_from([0.0, 0.0, 1e-2])),
        "logit_scale": draw(st.sampled_from([1.0, 1.0, 0.3, 4.0, -1.5])),
        "softcap": draw(st.sampled_from([None, None, 15.0])),
        "reduction": draw(st.sampled_from(["none", "sum", "mean", "mean"])),
        "empty": draw(st.sampled_from(["nan", "zero"])),
    }
    if options["reduction"] == "mean" and draw(st.booleans()):
        options["normalizer"] = draw(st.sampled_from([2.5, torch.tensor(7.0, device=device)]))
    wide = draw(st.sampled_from([dtype, torch.float32]))
    weight = (rand(classes) + 0.5).to(wide) if draw(st.booleans()) else None
    options["alpha"] = draw(st.sampled_from([None, 0.25, (2 * rand(classes)).to(device, wide)]))
    probabilities = draw(st.booleans())
    # Masked classes: a leading block or any, logits -inf and no weight.
    masked = torch.zeros(classes, dtype=torch.bool)
    if classes > 1 and options["softcap"] is None and options["logit_scale"] > 0 and draw(st.booleans()):
        masked = torch.arange(classes) < classes // 2 if draw(st.booleans()) else rand(classes) < 0.4
        masked[-1] = False
        x[..., masked] = -INF
        weight = torch.where(masked, 0, torch.ones(classes) if weight is None else weight)
    sample_weight = (rand(*rows) + 0.5).to(torch.float32) if draw(st.booleans()) else None
    if probabilities:
        target = rand(*rows, classes).softmax(-1).movedim(-1, min(1, len(rows))).to(wide)
    else:
        index_dtype = draw(st.sampled_from([torch.int64, torch.int32, torch.uint8]))
        unmasked = (~masked).nonzero().flatten()
        target = unmasked[(rand(*rows) * len(unmasked)).long()].to(index_dtype)
        options["ignore_index"] = draw(st.sampled_from([-100, 255, 0] if index_dtype != torch.uint8 else [255, 0]))
        ignored = rand(*rows) < draw(st.sampled_from([0.0, 0.3, 1.0]))
        target = torch.where(ignored, torch.tensor(options["ignore_index"], dtype=index_dtype), target)
        x[target == options["ignore_index"]] = draw(st.sampled_from([NAN, INF, -INF]))
    if sample_weight is not None and draw(st.booleans()):
        sample_weight = torch.where(rand(*rows) < 0.4, 0.0, sample_weight)
        x[sample_weight == 0] = NAN
    x = x.to(device, dtype)
    layout = draw(st.sampled_from(["contiguous", "classes last", "sliced"]))
    if layout == "sliced":
        x = x.repeat_interleave(2, -1)[..., ::2]
    x = x.movedim(-1, min(1, len(rows)))
    if layout == "contiguous":
        x = x.contiguous()
    if options["reduction"] == "none":
        options["upstream"] = torch.randn(rows, generator=seed).to(device)
    else:
        options["upstream"] = torch.tensor(draw(st.sampled_from([1.0, -3.0]))).to(device)
    if sample_weight is not None:
        options["sample_weight"] = sample_weight.to(device)
    return x, target.to(device), None if weight is None else weight.to(device), options


@given(data=st.data())
def test_loss_and_gradient_follow_the_formula_for_any_options(data, device):
    x, target, weight, options = data.draw(calls(device))
    assert_follows_oracle(x, target, weight, **options)


@given(data=st.data())
@pytest.mark.once("native", "triton")
def test_both_derivatives_match_finite_differences_for_any_options(data, device):
    """The options of the test above on logits that finite differences can follow."""
    x, target, weight, options = data.draw(calls(device))
    del options["upstream"]
    options["empty"] = "zero"  # finite where every row is ignored
    x = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(x.numel()))
    x = x.to(device).requires_grad_()

    def loss(x):
        return cross_entropy(x, target, weight, **options)

    assert torch.autograd.gradcheck(loss, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, x, fast_mode=True)


@pytest.mark.parametrize("classes", [4095, 4096, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1, "reduction": "none"},
        {"gamma": 1.5, "alpha": 0.3, "z_loss": 1e-2, "reduction": "sum"},
        {"gamma": 2.0, "label_smoothing": 0.1, "softcap": 10.0, "logit_scale": -0.5},
    ],
    ids=lambda o: "+".join(o) or "plain",
)
def test_long_rows_follow_the_formula(classes, dtype, probabilities, options, device):
    x = (3 * torch.randn(3, classes)).to(device, dtype)
    weight = torch.rand(classes).to(device) + 0.5
    target = (torch.randn(3, classes) * 4).softmax(1) if probabilities else torch.tensor([0, classes - 1, 77])
    assert_follows_oracle(x, target.to(device), weight, **options)


def in_layout(x, layout):
    return {
        "contiguous": x.contiguous,
        "classes last": lambda: x.movedim(1, -1).contiguous().movedim(-1, 1),
        "rows fastest": lambda: x.movedim(0, -1).contiguous().movedim(-1, 0),
        "sliced": lambda: x.repeat_interleave(2, -1)[..., ::2],
        "padded rows": lambda: torch.cat([x, torch.full_like(x[:, :3], NAN)], 1)[:, : x.shape[1]],
    }[layout]()


@pytest.mark.parametrize("layout", ["contiguous", "classes last", "rows fastest", "sliced", "padded rows"])
@pytest.mark.parametrize("shape", [(20000, 2), (3000, 10), (300, 1000), (2, 19, 64, 40), (3, 130, 77)], ids=str)
@pytest.mark.parametrize(
    "options", [{"ignore_index": 1}, {"label_smoothing": 0.1}, {"gamma": 2.0, "reduction": "none"}], ids=str
)
def test_many_rows_of_any_layout_follow_the_formula(layout, shape, options, device, kernel):
    """Large enough that kernels split the rows over threads; every element is compared."""
    if kernel == "triton" and len(shape) == 2:  # which has no threads here
        shape = (shape[0] // 8, shape[1])
    x = in_layout(2 * torch.randn(shape, device=device), layout)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
    weight = torch.rand(shape[1], device=device) + 0.5
    loss, gradient = loss_and_gradient(x, target, weight, **options)
    assert gradient.stride() == torch.empty_like(x).stride()
    # The rows of a plain contiguous fp64 copy through torch; the sizes are those of Truth.bound.
    wide = x.detach().double().movedim(1, -1).reshape(-1, shape[1]).requires_grad_()
    flat, w = target.flatten(), weight.double()
    gamma = options.get("gamma", 0.0)
    if gamma:
        log_p = wide.log_softmax(1).gather(1, flat[:, None])[:, 0]
        expected = (w[flat] * (1 - log_p.exp()) ** gamma * -log_p).reshape(target.shape)
    else:
        expected = F.cross_entropy(wide, flat, w, **options)
    expected_gradient = gradient_of(expected, wide).reshape(*target.shape, shape[1]).movedim(-1, 1)
    eps = torch.finfo(torch.float32).eps * (16 + math.sqrt(shape[1]) + math.sqrt(len(flat)))
    size = (1 + x.abs().max().item()) * (1 + gamma) ** 2 * weight.max().item()
    assert_near(loss, expected.detach().cpu(), torch.tensor(eps * size * (1 + expected.max().item())))
    bound = eps * size * expected_gradient.abs().max().item()
    assert_near(gradient, expected_gradient.cpu(), torch.tensor(bound))


def example(device, dtype=torch.float32, rows=9, classes=70):
    return 3 * torch.randn(rows, classes, device=device, dtype=dtype), torch.randint(classes, (rows,), device=device)


def test_gamma_0_is_cross_entropy_and_focal_is_cross_entropy_with_gamma(device):
    x, t = example(device)
    for a, b in [
        (loss_and_gradient(x, t, function=focal_loss, gamma=0.0), loss_and_gradient(x, t)),
        (loss_and_gradient(x, t, function=focal_loss), loss_and_gradient(x, t, gamma=2.0)),
        (loss_and_gradient(x, t, gamma=1.5, label_smoothing=0.0), loss_and_gradient(x, t, gamma=1.5)),
    ]:
        same(a[0], b[0])
        same(a[1], b[1])


@pytest.mark.parametrize("options", [{}, {"gamma": 2.0}, {"gamma": 0.5, "label_smoothing": 0.1}], ids=str)
def test_one_definition_for_indices_and_one_hot_probabilities(options, device):
    """Peers apply the focal factor to soft targets differently from hard ones."""
    x, t = example(device, torch.float64)
    truth = oracle(x, t, reduction="none", **options)
    loss, gradient = loss_and_gradient(x, F.one_hot(t, 70).double(), reduction="none", **options)
    assert_near(loss, truth.loss, truth.loss_bound)
    assert_near(gradient, truth.gradient, truth.gradient_bound)


def test_alpha_and_z_loss_do_not_enter_the_divisor_of_the_mean(device):
    x, t = example(device, torch.float64)
    alpha = torch.rand(70, device=device, dtype=torch.float64)
    rows = cross_entropy(x, t, alpha=alpha, z_loss=0.1, reduction="none")
    torch.testing.assert_close(cross_entropy(x, t, alpha=alpha, z_loss=0.1), rows.mean())


def test_mean_divides_by_the_weights_of_the_rows_that_count(device):
    x, t = example(device, torch.float64)
    t[2] = -100
    w = torch.rand(70, device=device, dtype=torch.float64) + 0.5
    s = torch.rand(9, device=device, dtype=torch.float64) + 0.5
    rows = cross_entropy(x, t, w, sample_weight=s, reduction="none")
    valid = t != -100
    expected = rows.sum() / (s[valid] * w[t[valid]]).sum()
    torch.testing.assert_close(cross_entropy(x, t, w, sample_weight=s), expected)
    y = x.softmax(1)
    soft = cross_entropy(x, y, w, sample_weight=s, reduction="none")
    torch.testing.assert_close(cross_entropy(x, y, w, sample_weight=s), soft.sum() / s.sum())
    torch.testing.assert_close(cross_entropy(x, y, w), cross_entropy(x, y, w, reduction="none").sum() / 9)


@pytest.mark.parametrize("number", [3, 2.5, torch.tensor(4.0), torch.tensor(4)], ids=str)
def test_normalizer_overrides_the_divisor(number, device):
    x, t = example(device, torch.float64)
    normalizer = number.to(device) if isinstance(number, Tensor) else number
    loss, gradient = loss_and_gradient(x, t, torch.rand(70, device=device), normalizer=normalizer)
    torch.manual_seed(0)
    x, t = example(device, torch.float64)
    total, total_gradient = loss_and_gradient(x, t, torch.rand(70, device=device), reduction="sum")
    torch.testing.assert_close(loss, total / normalizer)
    torch.testing.assert_close(gradient, total_gradient / normalizer)


# ---- Rows that do not count ------------------------------------------------------------------

OPTION_SETS = [
    {},
    {"label_smoothing": 0.1},
    {"gamma": 2.0, "alpha": 0.25},
    {"gamma": 0.5, "label_smoothing": 0.1, "z_loss": 1e-2},
    {"softcap": 20.0, "logit_scale": -0.7, "z_loss": 1e-2},
]
option_sets = pytest.mark.parametrize("options", OPTION_SETS, ids=lambda o: "+".join(o) or "plain")


@option_sets
@by_dtype
@pytest.mark.parametrize("classes", [1, 5, 64, 1000])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("how", ["ignore_index", "sample_weight"])
def test_rows_that_do_not_count_are_exactly_zero_whatever_they_hold(how, reduction, classes, dtype, options, device):
    """torch and flash-attn give NaN gradients where an ignored row holds NaN or inf."""
    x, t = torch.randn(6, classes, device=device).to(dtype), torch.randint(classes, (6,), device=device)
    s = torch.rand(6, device=device) + 0.5
    (t if how == "ignore_index" else s)[[1, 3, 4]] = -100 if how == "ignore_index" else 0
    options = {**options, "sample_weight": s, "reduction": reduction}
    expected, expected_gradient = loss_and_gradient(x, t, **options)
    x[1], x[3], x[4] = NAN, INF, -INF
    loss, gradient = loss_and_gradient(x, t, **options)
    same(loss, expected)
    same(gradient, expected_gradient)
    assert (gradient[[1, 3, 4]] == 0).all()
    if reduction == "none":
        assert (loss[[1, 3, 4]] == 0).all()
    assert_follows_oracle(x, t, **options)


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("empty", ["nan", "zero"])
@pytest.mark.parametrize("rows", [0, 4])
@by_dtype
def test_no_row_counts(rows, empty, probabilities, dtype, device):
    """pytorch#70348: the mean of nothing is NaN; "zero" makes it 0. The gradient is 0 in any case."""
    x = torch.randn(rows, 5, device=device).to(dtype)
    s = torch.zeros(rows, device=device)
    if probabilities:
        t, options = torch.full((rows, 5), 0.2, device=device), {"sample_weight": s}
    else:
        t, options = torch.full((rows,), -100, device=device), {}
    for reduction, expected in [("mean", NAN if empty == "nan" else 0.0), ("sum", 0.0), ("none", None)]:
        loss, gradient = loss_and_gradient(x, t, reduction=reduction, empty=empty, **options)
        if reduction == "none":
            assert loss.shape == (rows,) and (loss == 0).all()
        else:
            same(loss, torch.tensor(expected, dtype=loss.dtype, device=device))
        assert gradient.shape == x.shape and (gradient == 0).all()
    loss, gradient = loss_and_gradient(x, t, normalizer=3.0, **options)
    assert loss == 0 and (gradient == 0).all()


def test_one_class_has_no_loss_and_no_gradient(device):
    x = torch.randn(4, 1, device=device) * 100
    t = torch.zeros(4, dtype=torch.long, device=device)
    for gamma in (0.0, 0.5, 1.0, 2.0):
        loss, gradient = loss_and_gradient(x, t, gamma=gamma, label_smoothing=0.1, reduction="none")
        assert (loss == 0).all() and (gradient == 0).all()
    assert_follows_oracle(x, t, z_loss=0.1, gamma=0.5)


# ---- Infinities and NaN ----------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("classes", [3, 40, 300])
def test_masked_classes_without_weight_contribute_zero(classes, gamma, dtype, device):
    """0 * inf = 0; torch gives NaN for label smoothing over a masked class of weight zero."""
    x, t = torch.randn(7, classes, device=device).to(dtype), torch.full((7,), classes - 1, device=device)
    weight = torch.ones(classes, device=device)
    weight[: classes // 2] = 0
    x[:, : classes // 2] = -INF
    assert_follows_oracle(x, t, weight, label_smoothing=0.1, gamma=gamma)
    loss, gradient = loss_and_gradient(x, t, weight, label_smoothing=0.1, gamma=gamma, reduction="none")
    assert loss.isfinite().all() and (gradient[:, : classes // 2] == 0).all()


@pytest.mark.parametrize("dtype", LOW, ids=str)
@option_sets
def test_a_leading_block_of_masked_classes_does_not_poison_the_row(dtype, options, device):
    """flash-attn#1930: -inf - -inf in the running rescaling."""
    x = torch.full((2, 40_010), -INF, device=device, dtype=dtype)
    x[:, 40_000:] = torch.randn(2, 10, device=device)
    weight = torch.zeros(40_010, device=device)
    weight[40_000:] = 1
    if "softcap" in options:  # caps -inf to a finite logit, so the scale must not turn it round
        options = {**options, "softcap": None, "logit_scale": 0.7}
    assert_follows_oracle(x, torch.tensor([40_003, 40_009], device=device), weight, **options)


@by_dtype
def test_maximum_is_not_assumed_to_be_at_least_zero(dtype, device):
    """A running max that starts at 0 loses rows of very negative logits."""
    x = torch.randn(5, 70, device=device).to(dtype) - 20_000
    assert_follows_oracle(x, torch.arange(5, device=device), reduction="none")


@by_dtype
def test_a_row_of_minus_infinity_is_nan(dtype, device):
    x, t = torch.randn(3, 9, device=device).to(dtype), torch.tensor([0, 1, 2], device=device)
    x[1] = -INF
    loss, gradient = loss_and_gradient(x, t, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(1).tolist() == [False, True, False]


@by_dtype
@option_sets
def test_a_target_at_minus_infinity_is_infinite_with_a_finite_gradient(options, dtype, device):
    if "softcap" in options:  # has a finite logit in place of -inf
        options = {"z_loss": 1e-2, "logit_scale": 0.7}
    x, t = torch.randn(3, 9, device=device).to(dtype), torch.tensor([0, 1, 2], device=device)
    x[1, 1] = -INF
    loss, gradient = loss_and_gradient(x, t, reduction="none", **options)
    assert loss[1] == INF and loss[[0, 2]].isfinite().all()
    assert gradient.isfinite().all()
    assert_follows_oracle(x, t, reduction="none", **options)


NAN_PAYLOADS = {
    torch.float64: (torch.int64, [0x7FF0000000000001, -1, 0x7FF8000000012345]),
    torch.float32: (torch.int32, [0x7F800001, -1, 0x7FC12345, -0x00400000]),
    torch.bfloat16: (torch.int16, [0x7F81, -1, 0x7FC1, -0x0040]),
    torch.float16: (torch.int16, [0x7C01, -1, 0x7E01, -0x0200]),
}


@by_dtype
@pytest.mark.parametrize("classes", [1, 2, 67])
@option_sets
def test_a_nan_logit_makes_its_row_nan_and_no_other(options, classes, dtype, device):
    """At every position, with quiet and signalling payloads of both signs."""
    clean = torch.randn(2 * classes, classes, device=device).to(dtype)
    t = torch.arange(2 * classes, device=device) % classes
    expected, expected_gradient = loss_and_gradient(clean, t, reduction="none", **options)
    integer, payloads = NAN_PAYLOADS[dtype]
    for payload in payloads:
        x = clean.clone()
        # Row i holds a NaN at class i; the target is there or elsewhere. The other rows are clean.
        x.view(integer)[:classes].fill_diagonal_(payload)
        for shift in (0, 1):
            rolled = torch.cat([t[:classes].roll(shift), t[classes:]])
            loss, gradient = loss_and_gradient(x, rolled, reduction="none", **options)
            assert loss[:classes].isnan().all() and gradient[:classes].isnan().all()
            same(loss[classes:], expected[classes:])
            same(gradient[classes:], expected_gradient[classes:])
        assert cross_entropy(x, t, **options).isnan()


@by_dtype
@pytest.mark.parametrize("classes", [2, 67])
def test_plus_infinity_makes_its_row_nan_as_in_torch(classes, dtype, device):
    x = torch.randn(classes + 1, classes, device=device).to(dtype)
    x[:classes].fill_diagonal_(INF)
    for t in (torch.arange(classes + 1) % classes, torch.zeros(classes + 1, dtype=torch.long)):
        loss, gradient = loss_and_gradient(x, t.to(device), reduction="none")
        assert loss[:classes].isnan().all() and loss[classes].isfinite()
        assert gradient[classes].isfinite().all()


# ---- Cancellation ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("classes", [2, 5, 100])
@pytest.mark.parametrize("margin", [17, 60])
class TestOneMinusPKeepsItsDigits:
    """1 - p is the sum that leaves the largest term out: 4e-8 at a margin of 17, where 1.0 - p is 0.

    Relative bounds: 16 roundings, and sqrt(classes) for the sum, each once per power of 1 - p. What
    is below the smallest normal number may be flushed to zero.
    """

    def check(self, quantity, margin, classes, gamma, dtype, device):
        x = torch.zeros(2, classes, device=device, dtype=dtype)
        x[0, 0] = x[1, -1] = margin
        t = torch.tensor([0, classes - 1], device=device)
        truth = getattr(oracle(x, t, gamma=gamma, reduction="none"), quantity)
        loss, gradient = loss_and_gradient(x, t, gamma=gamma, reduction="none")
        info = torch.finfo(dtype)
        relative = info.eps * (16 + math.sqrt(classes)) * (1 + gamma)
        assert_near(loss if quantity == "loss" else gradient, truth, relative * truth.abs() + info.tiny)

    def test_in_the_loss(self, margin, classes, gamma, dtype, device):
        self.check("loss", margin, classes, gamma, dtype, device)

    def test_in_the_gradient(self, margin, classes, gamma, dtype, device):
        self.check("gradient", margin, classes, gamma, dtype, device)


@by_dtype
@pytest.mark.parametrize("gamma", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("e", [0.0, 0.1])
def test_certain_rows_have_no_nan(gamma, e, dtype, device):
    """d/dp (1-p)^gamma is infinite at p = 1 for gamma < 1; times 1-p it is 0."""
    x = torch.zeros(4, 9, device=device, dtype=dtype)
    x[:, 2] = 20_000
    t = torch.full((4,), 2, device=device)
    loss, gradient = loss_and_gradient(x, t, gamma=gamma, reduction="none", label_smoothing=e)
    assert loss.isfinite().all() and gradient.isfinite().all()
    if e == 0:
        assert (loss == 0).all() and (gradient == 0).all()
    assert_follows_oracle(x, t, gamma=gamma, label_smoothing=e)


@pytest.mark.parametrize("e", [0.0, 0.1])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("offset", [1e4, -1e4, 1e6])
def test_a_common_offset_changes_nothing(offset, gamma, e, device):
    """lse - x_t, or the sum of the logits for smoothing, would lose four digits at 1e4 in fp32."""
    x = torch.randint(-40, 40, (6, 300), device=device) / 16  # multiples of 1/16: the shift is exact
    t = torch.arange(6, device=device)
    truth = oracle(x, t, gamma=gamma, label_smoothing=e, reduction="none")
    loss, gradient = loss_and_gradient(x + offset, t, gamma=gamma, label_smoothing=e, reduction="none")
    assert_near(loss, truth.loss, truth.loss_bound)
    assert_near(gradient, truth.gradient, truth.gradient_bound)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_p_is_not_rounded_to_half_before_the_target_is_subtracted(dtype, device):
    """Liger#1329: p - 1 of a rounded p has a relative error of 1/2 at p = 0.998."""
    x = torch.zeros(17, 3, device=device, dtype=dtype)
    x[:, 1] = torch.linspace(2, 10, 17)
    t = torch.ones(17, dtype=torch.long, device=device)
    _, gradient = loss_and_gradient(x, t, reduction="sum")
    truth = oracle(x, t, reduction="sum").gradient
    info, fp32 = torch.finfo(dtype), torch.finfo(torch.float32)
    bound = truth.abs() * info.eps / 2 + 16 * fp32.eps + info.smallest_normal * info.eps / 2
    assert_near(gradient, truth, bound)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_sums_are_in_fp32(dtype, device):
    """A sum of ones stops growing at 256 in bf16 and at 2048 in fp16; so does a sum of losses."""
    x = torch.zeros(3, 50_000, device=device, dtype=dtype)
    t = torch.arange(3, device=device)
    loss = cross_entropy(x, t, reduction="none")
    eps = torch.finfo(torch.float32).eps
    assert_near(loss, torch.full((3,), math.log(50_000)).double(), torch.tensor(64 * eps))
    x = torch.zeros(50_000, 2, device=device, dtype=dtype)
    total = cross_entropy(x, torch.ones(50_000, dtype=torch.long, device=device), reduction="sum")
    # A pairwise or blocked sum of n equal terms; sqrt(n) roundings is generous for it.
    expected = torch.tensor(50_000 * math.log(2), dtype=torch.float64)
    assert_near(total, expected, math.sqrt(50_000) * eps * expected)


# ---- Accuracy: no worse than eager PyTorch ---------------------------------------------------


def difficult_logits(kind, rows, classes, target):
    x = torch.randn(rows, classes)
    if kind == "random":
        return 3 * x
    if kind == "confident":
        x[torch.arange(rows), target] += torch.linspace(0, 100, rows)
        return x
    if kind == "offset":
        return 3 * x + 1e4
    patterns = [
        torch.zeros(classes),
        torch.linspace(-50, 50, classes),
        50 * (-1.0) ** torch.arange(classes),
        1e-3 * torch.randn(classes),
        torch.where(torch.arange(classes) == classes // 2, 80.0, 0.0),  # most targets are all but impossible
    ]
    return torch.stack([patterns[row % len(patterns)] for row in range(rows)])


@pytest.mark.parametrize("kind", ["random", "confident", "offset", "adversarial"])
@pytest.mark.parametrize("classes", [2, 10, 1000, 50257])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"gamma": 2.0}], ids=["ce", "smoothed", "focal"])
def test_errors_are_no_larger_than_those_of_eager_pytorch(kind, classes, dtype, options, device, kernel):
    """The rule of apple/ml-cross-entropy: eager's own maximal error, plus one ulp."""
    rows = {2: 512, 10: 512, 1000: 64, 50257: 4 if kernel == "triton" else 16}[classes]  # no maximum is luck
    t = torch.randint(classes, (rows,))
    x = difficult_logits(kind, rows, classes, t).to(device, dtype)
    t = t.to(device)
    truth = oracle(x, t, reduction="none", **options)
    loss, gradient = loss_and_gradient(x, t, reduction="none", **options)

    leaf = x.detach().requires_grad_()
    if "gamma" in options:
        log_p = leaf.log_softmax(1).gather(1, t[:, None])[:, 0]
        eager = (1 - log_p.exp()) ** options["gamma"] * -log_p
    else:
        eager = F.cross_entropy(leaf, t, reduction="none", **options)
    eager_gradient = gradient_of(eager, leaf)

    def check(actual, eager, truth):
        error = (eager.detach().cpu().double() - truth).abs().nan_to_num(INF).max()
        assert_near(actual, truth, error + ulp(truth.abs().max().item(), actual.dtype))

    check(loss, eager, truth.loss)
    check(gradient, eager_gradient, truth.gradient)


# ---- Targets ---------------------------------------------------------------------------------


@pytest.mark.parametrize("integer", INTEGERS, ids=str)
def test_targets_of_any_integer_dtype(integer, device):
    x, t = example(device)
    expected, expected_gradient = loss_and_gradient(x, t, label_smoothing=0.1)
    loss, gradient = loss_and_gradient(x, t.to(integer), label_smoothing=0.1)
    same(loss, expected)
    same(gradient, expected_gradient)


@pytest.mark.parametrize("integer", INTEGERS, ids=str)
@pytest.mark.parametrize("ignore_index", [-100, 100, 255])
def test_ignore_index_is_compared_as_a_number(integer, ignore_index, device):
    """156 of uint8 is not -100, and 255 of uint8 (segmentation's void) is not -1."""
    info = torch.iinfo(integer)
    classes = [value for value in (0, 100, 127, 156, 255) if value <= info.max]
    values = [*classes, *([ignore_index] if info.min <= ignore_index <= info.max else [])]
    x = torch.randn(len(values), 256, device=device)
    t = torch.tensor(values, device=device)
    expected, expected_gradient = loss_and_gradient(x, t, ignore_index=ignore_index, reduction="none")
    loss, gradient = loss_and_gradient(x, t.to(integer), ignore_index=ignore_index, reduction="none")
    assert (expected != 0).tolist() == [value != ignore_index for value in values]
    same(loss, expected)
    same(gradient, expected_gradient)


def raises_by_itself(device, kernel):
    """A GPU is never made to wait, nor is the interpreter of its kernels: there NaN says it, unless asked to check."""
    return torch.device(device).type == "cpu" and kernel != "triton"


@pytest.mark.parametrize(
    "value, integer",
    [
        (-1, torch.int64),
        (-1, torch.int8),
        (-99, torch.int32),
        (70, torch.int64),
        (70, torch.uint8),
        (156, torch.uint8),
        (2**32 + 1, torch.int64),
        (2**62, torch.int64),
        (-(2**63), torch.int64),
    ],
    ids=str,
)
@option_sets
def test_a_target_out_of_range_is_an_error_and_never_a_silent_zero(
    value, integer, options, device, kernel, monkeypatch
):
    x, t = torch.randn(9, 70, device=device), torch.arange(9, device=device, dtype=integer)
    expected, expected_gradient = loss_and_gradient(x, t, reduction="none", **options)
    wrong = t.clone()
    wrong[4] = value
    if raises_by_itself(device, kernel):
        for reduction in ("none", "sum", "mean"):
            with pytest.raises(IndexError, match=rf"{value}\b.*0 to 69"):
                cross_entropy(x, wrong, reduction=reduction, **options)
    else:  # a device is never made to wait: NaN says it
        loss, gradient = loss_and_gradient(x, wrong, reduction="none", **options)
        assert loss.isnan().tolist() == [row == 4 for row in range(9)]
        assert (gradient[4] == 0).all()
        monkeypatch.setenv("TORCHFAST_CHECK", "1")
        with pytest.raises(IndexError, match=rf"{value}\b.*0 to 69"):
            cross_entropy(x, wrong, **options)
    again, again_gradient = loss_and_gradient(x, t, reduction="none", **options)
    same(again, expected)
    same(again_gradient, expected_gradient)


def test_a_target_out_of_range_far_into_the_batch_raises(device, kernel, monkeypatch):
    """Found by whichever thread has the row, and raised by the caller's."""
    if not raises_by_itself(device, kernel):
        monkeypatch.setenv("TORCHFAST_CHECK", "1")
    x, t = torch.randn(50_000, 3, device=device), torch.zeros(50_000, dtype=torch.long, device=device)
    for row in (0, 25_001, 49_999):
        wrong = t.clone()
        wrong[row] = 3
        with pytest.raises(IndexError, match=r"3\b.*0 to 2"):
            cross_entropy(x, wrong)
    assert cross_entropy(x, t).isfinite()


@pytest.mark.once
def test_out_of_range_under_vmap_is_nan_with_gradient_zero(device):
    """vmap cannot raise for what the data says; it must not be a silent 0 either."""
    x = torch.randn(2, 3, 5, device=device)
    t = torch.tensor([[0, 1, 2], [0, 7, 4]], device=device)
    losses = torch.func.vmap(lambda x, t: cross_entropy(x, t, reduction="none"))(x, t)
    assert losses.isnan().tolist() == [[False] * 3, [False, True, False]]
    gradient = torch.func.grad(
        lambda x: torch.func.vmap(lambda x, t: cross_entropy(x, t, reduction="none"))(x, t).nansum()
    )(x)
    assert (gradient[1, 1] == 0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("shape", [(6, 7), (2, 7, 5), (2, 7, 3, 4), (2, 7, 3, 4, 2), (7,)], ids=str)
@pytest.mark.parametrize("probabilities", [False, True])
def test_shapes_as_in_torch(shape, probabilities, device):
    x = torch.randn(shape, device=device, dtype=torch.float64)
    dim = min(1, len(shape) - 1)
    rows = shape[:dim] + shape[dim + 1 :]
    t = torch.randint(7, rows, device=device)
    if probabilities:
        t = torch.randn(shape, device=device).softmax(dim)
    assert cross_entropy(x, t, reduction="none").shape == rows
    assert_follows_oracle(x, t, reduction="none", label_smoothing=0.1, sample_weight=torch.rand(rows, device=device))


# ---- dtypes ----------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("other", DTYPES, ids=str)
@pytest.mark.parametrize("probabilities", [False, True])
def test_weights_alpha_and_probabilities_of_any_floating_dtype(probabilities, other, dtype, device):
    """The loss's dtype follows the logits alone: fp32 for half, whatever the others are."""
    x, t = example(device)
    t = x.softmax(1).to(other) if probabilities else t
    weight, alpha = torch.rand(70, device=device).to(other), torch.rand(70, device=device).to(other)
    s = torch.rand(9, device=device).to(other)
    assert_follows_oracle(x.to(dtype), t, weight, alpha=alpha, sample_weight=s, gamma=1.5, label_smoothing=0.1)


@by_dtype
@pytest.mark.parametrize("other", DTYPES, ids=str)
def test_a_tensor_normalizer_does_not_change_the_dtype_of_the_loss(other, dtype, device):
    x, t = example(device)
    loss = cross_entropy(x.to(dtype), t, normalizer=torch.tensor(3.0, dtype=other, device=device))
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.once
def test_autocast_keeps_half_logits_half(device):
    """A linear layer's bf16 logits go in as they are: nothing of fp32 of their size is saved."""
    layer = nn.Linear(8, 70).to(device)
    t = torch.randint(70, (9,), device=device)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        logits = layer(torch.randn(9, 8, device=device))
        with hooks:
            loss = cross_entropy(logits, t, label_smoothing=0.1)
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    assert any(s.data_ptr() == logits.data_ptr() for s in saved)
    assert not [s for s in saved if s.numel() >= logits.numel() and s.element_size() > 2]
    loss.backward()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.skipif(unavailable_reason is not None or not sys.platform.startswith("linux"), reason="native, /proc")
@pytest.mark.once
def test_peak_memory_is_the_gradient_alone(device):
    """A 128 MB bf16 input: not even for a moment is there an fp32 copy of it."""
    x = torch.randn(64, 1_000_000, device=device).bfloat16().requires_grad_()
    t = torch.zeros(64, dtype=torch.long, device=device)
    cross_entropy(x[:1], t[:1]).backward()
    x.grad = None

    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        loss, forward = peak_memory(lambda: cross_entropy(x.detach(), t, label_smoothing=0.1))
        loss, both = peak_memory(lambda: cross_entropy(x, t, label_smoothing=0.1))
    _, backward = peak_memory(loss.backward)
    assert forward < 0.25 * x.nbytes and max(both, backward) < 1.25 * x.nbytes


# ---- Memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "classes last", "rows fastest", "sliced", "padded rows"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shape", [(7, 130), (2, 19, 5, 4)], ids=str)
def test_the_gradient_keeps_the_layout_of_the_input(shape, layout, dtype, device):
    x = in_layout(torch.randn(shape, device=device).to(dtype), layout)
    t = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
    _, gradient = loss_and_gradient(x, t, label_smoothing=0.1)
    assert gradient.stride() == torch.empty_like(x).stride()
    assert_follows_oracle(x, t, label_smoothing=0.1)


def test_channels_last_in_channels_last_out(device):
    x = torch.randn(2, 19, 5, 4, device=device).contiguous(memory_format=torch.channels_last)
    _, gradient = loss_and_gradient(x, torch.randint(19, (2, 5, 4), device=device))
    assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("over", ["rows", "classes"])
def test_expanded_logits(over, device):
    x = torch.randn(*((1, 130) if over == "rows" else (7, 1)), device=device).expand(7, 130)
    assert 0 in x.stride()
    assert_follows_oracle(x, torch.arange(7, device=device), gamma=1.0)


def test_expanded_weights_and_targets(device):
    x = torch.randn(7, 130, device=device)
    target = torch.tensor(3, device=device).expand(7)
    weight = torch.tensor(0.5, device=device).expand(130)
    s = torch.tensor(2.0, device=device).expand(7)
    assert_follows_oracle(x, target, weight, alpha=weight, sample_weight=s, reduction="sum")
    assert_follows_oracle(x, torch.full((1, 1), 1 / 130, device=device).expand(7, 130), weight, gamma=1.0)


@pytest.mark.parametrize("shape", [(9, 70), (2, 7, 5, 4)], ids=str)
def test_expanded_and_strided_upstream(shape, device):
    """loss.sum().backward() sends a stride-0 gradient."""
    x, t = torch.randn(shape, device=device), torch.randint(7, (shape[0], *shape[2:]), device=device)
    dense = torch.randn(*t.shape, 2, device=device)[..., 0]
    for upstream in (torch.tensor(-2.0, device=device).expand(t.shape), dense):
        assert_follows_oracle(x, t, reduction="none", upstream=upstream)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(40_000, 5), (70, 9_000), (2, 19, 64, 64)], ids=str)
def test_bitwise_deterministic_where_threads_share_the_work(shape, reduction, device, kernel):
    """Run to run; also for any number of threads, but for the reference's torch.sum, which splits by it."""
    if kernel == "triton":  # which has no threads here
        shape = (shape[0] // 8 or 1, *shape[1:])
    x, t = torch.randn(shape, device=device), torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
    expected = loss_and_gradient(x, t, reduction=reduction, label_smoothing=0.1)
    threads = torch.get_num_threads()
    try:
        share = kernel == "native" or (kernel == "reference" and reduction == "none")
        for count in (threads, threads, 1, 2) if share else [threads]:
            torch.set_num_threads(count)
            actual = loss_and_gradient(x, t, reduction=reduction, label_smoothing=0.1)
            same(actual[0], expected[0])
            same(actual[1], expected[1])
    finally:
        torch.set_num_threads(threads)


def test_inputs_of_every_kind_are_left_alone(device):
    x, t = torch.randn(2, 7, 5, device=device), torch.randint(7, (2, 5), device=device)
    t[0, 0] = -100
    inputs = [x, t, torch.rand(7, device=device), torch.rand(7, device=device), torch.rand(2, 5, device=device)]
    before = [i.clone() for i in inputs]
    for inplace in (False, True):  # inplace_backward without a backward writes nothing
        cross_entropy(x, t, inputs[2], alpha=inputs[3], sample_weight=inputs[4], gamma=1.0, inplace_backward=inplace)
        loss_and_gradient(x, t, inputs[2], alpha=inputs[3], sample_weight=inputs[4], softcap=3.0, logit_scale=2.0)
    for i, copied in zip(inputs, before, strict=True):
        same(i, copied)


def available_memory():
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:")) * 1024


@pytest.mark.parametrize("shape", [(70_000, 32_000), (2**25 + 7, 65), (1, 65, 2**25 + 7)], ids=str)
@pytest.mark.once
@pytest.mark.usefixtures("memory_of_one")
def test_more_than_2_to_the_31_elements(shape, device, kernel):
    """Row offsets are 64-bit: rows past element 2^31 are as right as the first ones."""
    if kernel == "reference" or (device, kernel) == ("cpu", "triton"):
        pytest.skip("the reference needs ten times the memory; interpreted: test_triton_cross_entropy.py")
    if available_memory() < 12 * 2**30:
        pytest.skip("needs 12 GiB of free memory")
    x = torch.empty(shape, dtype=torch.bfloat16, device=device)
    assert x.numel() > 2**31
    x.view(-1)[: x.numel() // 64 * 64].view(-1, 64).copy_(torch.randn(64, device=device))
    by_row = x if x.dim() == 2 else x[0].t()  # (rows, classes)
    rows, classes = by_row.shape
    middle = 2**31 // classes
    looked_at = torch.tensor([0, 1, middle - 1, middle, middle + 1, rows - 2, rows - 1], device=device)
    by_row[looked_at] = (3 * torch.randn(7, classes, device=device)).to(x.dtype)
    target = torch.randint(classes, (rows,), device=device)
    few = by_row[looked_at].clone()
    truth = oracle(few, target[looked_at], label_smoothing=0.1, reduction="none")
    loss, gradient = loss_and_gradient(
        x, target if x.dim() == 2 else target[None], label_smoothing=0.1, reduction="none"
    )
    gradient = gradient if x.dim() == 2 else gradient[0].t()
    assert_near(loss.flatten()[looked_at], truth.loss, truth.loss_bound)
    assert_near(gradient[looked_at], truth.gradient, truth.gradient_bound)


# ---- inplace_backward ------------------------------------------------------------------------


def produced(x, layout=None):
    """A leaf, and logits of x's layout made from it by an op that does not need its result again."""
    leaf = x.detach().clone().requires_grad_()
    logits = torch.stack([leaf, leaf], -1)[..., 0] if layout == "sliced" else leaf.mul(1.0)
    assert logits.stride() == x.stride()
    return leaf, logits


@by_dtype
@pytest.mark.parametrize("layout", ["contiguous", "classes last", "rows fastest", "sliced"])
@pytest.mark.parametrize("shape", [(9, 70), (2, 19, 5, 4)], ids=str)
@option_sets
def test_inplace_backward_writes_the_same_gradient_over_the_logits(options, shape, layout, dtype, device):
    x = in_layout(torch.randn(shape, device=device).to(dtype), layout)
    t = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
    t.view(-1)[1] = -100
    leaf, logits = produced(x, layout)
    cross_entropy(logits, t, **options).backward()
    expected, kept = leaf.grad, logits.detach().clone()
    same(logits.detach(), kept)

    leaf, logits = produced(x, layout)
    loss = cross_entropy(logits, t, inplace_backward=True, **options)
    same(logits.detach(), kept)  # the forward writes nothing
    gradient = gradient_of(loss, logits)
    assert gradient.data_ptr() == logits.data_ptr() and gradient.stride() == logits.stride()
    same(gradient, expected)
    same(logits.detach(), expected)

    leaf, logits = produced(x, layout)
    cross_entropy(logits, t, inplace_backward=True, **options).backward()
    same(leaf.grad, expected)


def test_inplace_backward_through_a_linear_layer(device):
    """A producer that does not need its result (addmm) is what the option is for."""
    layer, features = nn.Linear(8, 70).to(device), torch.randn(9, 8, device=device)
    t = torch.randint(70, (9,), device=device)
    cross_entropy(layer(features), t).backward()
    expected, layer.weight.grad = layer.weight.grad, None
    cross_entropy(layer(features), t, inplace_backward=True).backward()
    same(layer.weight.grad, expected)


def test_inplace_backward_refuses_a_second_backward(device):
    x, t = example(device)
    _, logits = produced(x)
    loss = cross_entropy(logits, t, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("producer", [torch.tanh, torch.sigmoid, torch.exp, torch.relu], ids=lambda f: f.__name__)
def test_inplace_backward_refuses_a_producer_that_saved_the_logits(producer, device):
    x, t = example(device)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cross_entropy(producer(x.requires_grad_()), t, inplace_backward=True).backward()


@pytest.mark.parametrize("other_first", [False, True])
def test_inplace_backward_is_right_or_refuses_where_another_loss_needs_the_logits(other_first, device):
    """Autograd runs the later node first: it may have read the logits before they are overwritten."""
    x, t = example(device)
    leaf, logits = produced(x)
    (expected,) = torch.autograd.grad(cross_entropy(leaf, t) + (leaf**2).sum(), leaf)
    losses = [lambda: (logits**2).sum(), lambda: cross_entropy(logits, t, inplace_backward=True)]
    both = sum(loss() for loss in (losses if other_first else losses[::-1]))
    if other_first:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            both.backward()
    else:
        both.backward()
        torch.testing.assert_close(leaf.grad, expected)


def test_inplace_backward_refuses_leaves_and_expanded_logits(device):
    x, t = example(device)
    with pytest.raises(ValueError, match="inplace_backward.*leaf"):
        cross_entropy(x.requires_grad_(), t, inplace_backward=True)
    expanded = x[:1].mul(1.0).expand(9, 70)
    with pytest.raises(ValueError, match="inplace_backward.*expanded"):
        cross_entropy(expanded, t, inplace_backward=True)


@pytest.mark.parametrize(
    "view", [lambda p: p.view(9, 70), lambda p: p[0], lambda p: p.view(9, 70)[:5]], ids=["view", "select", "slice"]
)
def test_inplace_backward_refuses_views_of_a_leaf(view, device):
    """p.grad would be p's own memory, and the optimizer would zero the parameter."""
    parameter = torch.randn(1, 9, 70, device=device, requires_grad=True)
    logits = view(parameter)
    with pytest.raises(ValueError, match="inplace_backward.*leaf"):
        cross_entropy(logits, torch.arange(len(logits), device=device), inplace_backward=True)


def test_inplace_backward_under_checkpointing_is_right(device):
    """There the logits are saved through hooks, and autograd does not check their version."""
    x, t = example(device)

    def loss(x, inplace):
        return cross_entropy(x.exp(), t, inplace_backward=inplace)

    expected = gradient_of(loss(x.requires_grad_(), False), x)
    actual = torch.autograd.grad(torch.utils.checkpoint.checkpoint(loss, x, True, use_reentrant=False), x)[0]
    same(actual, expected)


def test_inplace_backward_refuses_overlapping_logits(device):
    """Windows that share memory cannot all hold their own gradient."""
    windows = torch.randn(20, device=device, requires_grad=True).mul(1.0).unfold(0, 8, 2)
    with pytest.raises((ValueError, RuntimeError)):
        cross_entropy(windows, torch.arange(7, device=device), inplace_backward=True).backward()


def test_inplace_backward_refuses_create_graph(device):
    x, t = example(device)
    leaf, logits = produced(x)
    loss = cross_entropy(logits, t, inplace_backward=True)
    with pytest.raises(RuntimeError, match="inplace_backward"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@pytest.mark.once
def test_inplace_backward_under_compile_is_right(device):
    x, t = example(device)
    _, expected = loss_and_gradient(x, t)
    compiled = torch.compile(
        lambda x: cross_entropy(x * 1.0, t, inplace_backward=True), fullgraph=True, backend="aot_eager"
    )
    leaf = x.requires_grad_()
    compiled(leaf).backward()
    same(leaf.grad, expected)


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.recorded = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.recorded[func] = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", ["contiguous", "rows fastest"])
@pytest.mark.once
def test_opcheck_of_the_inplace_backward_op(layout, device):
    x, t = example(device)
    with Calls() as calls:
        cross_entropy(produced(in_layout(x, layout))[1], t, gamma=1.0, inplace_backward=True).backward()
    op = torch.ops.torchfast.cross_entropy_backward_.default
    torch.library.opcheck(op, calls.recorded[op])


# ---- Gradients of the other arguments --------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("e", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.once
def test_gradient_of_weights_alpha_probabilities_and_sample_weight(reduction, e, gamma, device):
    x = torch.randn(4, 5, device=device, dtype=torch.float64, requires_grad=True)
    y = torch.randn_like(x).softmax(1).requires_grad_()
    t = torch.tensor([0, 2, 4, -100], device=device)
    weight, alpha = (torch.rand(5, device=device, dtype=torch.float64) + 0.5 for _ in range(2))
    s = torch.rand(4, device=device, dtype=torch.float64) + 0.5
    others = [v.requires_grad_() for v in (weight, alpha, s)]
    options = {"gamma": gamma, "label_smoothing": e, "reduction": reduction, "z_loss": 0.1}

    def loss(x, target, weight, alpha, s):
        return cross_entropy(x, target, weight, alpha=alpha, sample_weight=s, **options)

    assert torch.autograd.gradcheck(loss, (x, y, *others), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x, *others: loss(x, t, *others), (x, *others), fast_mode=True)
    scalar = torch.tensor(0.3, device=device, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a: cross_entropy(x, t, alpha=a, **options), (x, scalar), fast_mode=True)


@pytest.mark.once
def test_gradient_of_a_tensor_normalizer(device):
    x = torch.randn(4, 5, device=device, dtype=torch.float64, requires_grad=True)
    n = torch.tensor(3.0, device=device, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0, 2, 4, -100], device=device)
    assert torch.autograd.gradcheck(lambda x, n: cross_entropy(x, t, gamma=1.0, normalizer=n), (x, n))


@pytest.mark.once
def test_gradient_of_weights_compiles_as_one_graph(device):
    x, t = example(device)
    weight = torch.rand(70, device=device, requires_grad=True)
    expected = gradient_of(cross_entropy(x, t, weight), weight)
    compiled = torch.compile(lambda w: cross_entropy(x, t, w), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradient_of(compiled(weight), weight), expected)


def test_probabilities_in_float8(device):
    x = torch.randn(3, 2, device=device)
    y = torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]], device=device)
    same(cross_entropy(x, y.to(torch.float8_e4m3fn)), cross_entropy(x, y))


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.once
def test_gradient_of_probabilities_that_are_zero(gamma, device):
    """One-hot probabilities: d loss / d q_c is w_c (1-p_c)^g (-log p_c) also where q_c = 0."""
    x = torch.randn(3, 4, device=device, dtype=torch.float64)
    y = F.one_hot(torch.tensor([0, 1, 3], device=device), 4).double().requires_grad_()
    gradient = gradient_of(cross_entropy(x, y, gamma=gamma, reduction="sum"), y)
    p = x.softmax(1)
    torch.testing.assert_close(gradient, (1 - p) ** gamma * -p.log())


@pytest.mark.parametrize("name", ["weight", "alpha"])
@pytest.mark.once
def test_gradient_of_weights_that_are_zero(name, device):
    x = torch.randn(3, 4, device=device, dtype=torch.float64)
    t = torch.tensor([0, 1, 3], device=device)
    zero_one = torch.tensor([0.0, 1.0, 1.0, 1.0], device=device, dtype=torch.float64, requires_grad=True)
    gradient = gradient_of(cross_entropy(x, t, **{name: zero_one}, reduction="sum"), zero_one)
    expected = x.new_zeros(4).index_add(0, t, F.cross_entropy(x, t, reduction="none"))
    torch.testing.assert_close(gradient, expected)


@pytest.mark.once
def test_gradient_of_sample_weights_that_are_zero(device):
    """Learning to reweight (Ren et al. 2018) starts from zero weights: the gradient is the row's loss."""
    x, t = torch.randn(3, 4, device=device, dtype=torch.float64), torch.tensor([0, 1, 3], device=device)
    s = torch.zeros(3, device=device, dtype=torch.float64, requires_grad=True)
    gradient = gradient_of(cross_entropy(x, t, sample_weight=s, reduction="sum"), s)
    torch.testing.assert_close(gradient, F.cross_entropy(x, t, reduction="none"))


@option_sets
@pytest.mark.parametrize("route", ["kernel", "weight", "alpha", "sample_weight", "create_graph", "func.grad"])
@pytest.mark.parametrize("special", ["ignored", "sample weight 0", "masked", "certain"])
@pytest.mark.once("native", "triton")
def test_special_rows_are_right_on_every_route_to_the_gradient(special, route, options, device):
    """All but the first differentiate plain PyTorch, where 0 * NaN in a masked branch is a trap."""
    x, t = example(device)
    weight, alpha = torch.rand(2, 70, device=device) + 0.5
    s = torch.rand(9, device=device) + 0.5
    if special == "ignored":
        t[1], x[1] = -100, NAN
    elif special == "sample weight 0":
        s[2], x[2] = 0, NAN
    elif special == "masked":
        weight[:30], x[3, :30], t = 0, -INF, t.clamp(min=30)
    else:  # as certain as can be: right, and wrong
        x[4, 65] = x[5, 66] = 20_000
        t[4], t[5] = 65, 3
    options = {**options, "softcap": None, "logit_scale": 0.7, "weight": weight, "alpha": alpha, "sample_weight": s}
    truth = oracle(x, t, **options)
    if route in options:
        options[route] = options[route].clone().requires_grad_()
    if route == "func.grad":
        loss, gradient = cross_entropy(x, t, **options), torch.func.grad(lambda x: cross_entropy(x, t, **options))(x)
    else:
        leaf = x.requires_grad_()
        loss = cross_entropy(leaf, t, **options)
        gradient = gradient_of(loss, leaf, create_graph=route == "create_graph")
    assert_near(loss, truth.loss, truth.loss_bound)
    assert_near(gradient, truth.gradient, truth.gradient_bound)


# ---- Validation ------------------------------------------------------------------------------

X, T = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)
BAD_CALLS = {
    "gamma negative": ((X, T), {"gamma": -0.5}, ValueError, ["gamma", "-0.5", ">= 0"]),
    "gamma nan": ((X, T), {"gamma": NAN}, ValueError, ["gamma", "nan"]),
    "gamma infinite": ((X, T), {"gamma": INF}, ValueError, ["gamma", "inf"]),
    "smoothing negative": ((X, T), {"label_smoothing": -0.1}, ValueError, ["label_smoothing", "-0.1", "[0, 1]"]),
    "smoothing above 1": ((X, T), {"label_smoothing": 1.5}, ValueError, ["label_smoothing", "1.5", "[0, 1]"]),
    "smoothing nan": ((X, T), {"label_smoothing": NAN}, ValueError, ["label_smoothing", "nan"]),
    "softcap zero": ((X, T), {"softcap": 0.0}, ValueError, ["softcap", "0.0", "> 0"]),
    "softcap negative": ((X, T), {"softcap": -2.0}, ValueError, ["softcap", "-2.0", "> 0"]),
    "reduction": ((X, T), {"reduction": "avg"}, ValueError, ["reduction", "avg", "mean"]),
    "empty": ((X, T), {"empty": "one"}, ValueError, ["empty", "one", "zero"]),
    "normalizer of a sum": ((X, T), {"normalizer": 2.0, "reduction": "sum"}, ValueError, ["normalizer", "2.0", "sum"]),
    "normalizer shape": ((X, T), {"normalizer": torch.ones(3)}, ValueError, ["normalizer", "3"]),
    "scalar input": ((torch.tensor(1.0), torch.tensor(0)), {}, ValueError, ["input", "(N, C)"]),
    "no classes": ((torch.zeros(4, 0), T), {}, ValueError, ["input", "(4, 0)"]),
    "integer input": ((X.long(), T), {}, TypeError, ["input", "int64", "float32"]),
    "complex input": ((X.to(torch.complex64), T), {}, TypeError, ["input", "complex64", "float32"]),
    "bool target": ((X, T.bool()), {}, TypeError, ["target", "bool", "integer"]),
    "complex target": ((X, X.to(torch.complex64)), {}, TypeError, ["target", "complex64"]),
    "target batch": ((X, T[:3]), {}, ValueError, ["target", "(3,)", "(4,)"]),
    "target spatial": ((X.view(2, 3, 2), T.view(4, 1)), {}, ValueError, ["target", "(4, 1)", "(2, 2)"]),
    "target one-hot integers": ((X, X.long()), {}, ValueError, ["target", "(4, 3)", "(4,)", "floating"]),
    "probabilities shape": ((X, X[:, :2]), {}, ValueError, ["target", "(4, 2)", "(4, 3)"]),
    "float indices": ((X, T.float()), {}, ValueError, ["target", "(4,)", "(4, 3)", "integer"]),
    "ignore_index with probabilities": ((X, X), {"ignore_index": 1}, ValueError, ["ignore_index", "1", "negative"]),
    "weight shape": ((X, T, torch.ones(2)), {}, ValueError, ["weight", "(2,)", "(3,)"]),
    "weight dtype": ((X, T, torch.ones(3).long()), {}, TypeError, ["weight", "int64", "floating"]),
    "weight device": ((X, T, torch.ones(3, device="meta")), {}, ValueError, ["weight", "meta", "cpu"]),
    "target device": ((X, T.to("meta")), {}, ValueError, ["target", "meta", "cpu"]),
    "alpha shape": ((X, T), {"alpha": torch.ones(4)}, ValueError, ["alpha", "(4,)", "(3,)"]),
    "alpha dtype": ((X, T), {"alpha": torch.ones(3).int()}, TypeError, ["alpha", "int32", "floating"]),
    "alpha list": ((X, T), {"alpha": [0.25, 0.5, 0.25]}, TypeError, ["alpha", "list"]),
    "alpha device": ((X, T), {"alpha": torch.ones(3, device="meta")}, ValueError, ["alpha", "meta", "cpu"]),
    "sample_weight shape": ((X, T), {"sample_weight": torch.ones(3)}, ValueError, ["sample_weight", "(3,)", "(4,)"]),
    "sample_weight classes": ((X, X), {"sample_weight": X}, ValueError, ["sample_weight", "(4, 3)", "(4,)"]),
    "sample_weight dtype": ((X, T), {"sample_weight": T}, TypeError, ["sample_weight", "int64", "floating"]),
}


test_errors_name_the_argument_what_was_given_and_what_is_allowed = refuses(cross_entropy, BAD_CALLS)


# ---- Modules ---------------------------------------------------------------------------------


@pytest.mark.once
def test_modules_are_the_function(device):
    x, t = example(device)
    weight, alpha, s = (torch.rand(n, device=device) for n in (70, 70, 9))
    options = {"gamma": 1.5, "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 9.0, "logit_scale": 0.5}
    options["ignore_index"] = 3
    module = CrossEntropyLoss(weight, alpha=alpha, reduction="sum", **options)
    expected = cross_entropy(x, t, weight, alpha=alpha, sample_weight=s, reduction="sum", **options)
    same(module(x, t, sample_weight=s), expected)
    same(CrossEntropyLoss(empty="zero")(x, t - t - 100), torch.zeros((), device=device))
    same(CrossEntropyLoss()(x, t, normalizer=2.0), cross_entropy(x, t, normalizer=2.0))
    same(FocalLoss(1.5, 0.25, weight)(x, t), focal_loss(x, t, weight, gamma=1.5, alpha=0.25))
    same(FocalLoss()(x, t), focal_loss(x, t))
    same(LabelSmoothingCrossEntropy(0.2)(x, t), cross_entropy(x, t, label_smoothing=0.2))
    same(LabelSmoothingCrossEntropy()(x, t), cross_entropy(x, t, label_smoothing=0.1))
    inplace = CrossEntropyLoss(inplace_backward=True)
    _, logits = produced(x)
    assert gradient_of(inplace(logits, t), logits).data_ptr() == logits.data_ptr()


test_modules_survive_copies = survives_copies(
    [CrossEntropyLoss, FocalLoss, LabelSmoothingCrossEntropy], ["weight", "alpha"], example
)


@pytest.mark.once
def test_a_checkpoint_of_torch_loads_into_the_drop_in(device):
    theirs, ours = nn.CrossEntropyLoss(torch.rand(70)), CrossEntropyLoss(torch.ones(70))
    ours.load_state_dict(theirs.state_dict())
    same(ours.weight, theirs.weight)
    assert set(CrossEntropyLoss().state_dict()) == set(nn.CrossEntropyLoss().state_dict()) == set()
    assert ours.double().weight.dtype == torch.float64


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
@pytest.mark.parametrize("legacy", [(None, None), (True, True), (False, True), (None, False), (False, None)], ids=str)
@pytest.mark.once
def test_positional_arguments_are_those_of_torch(legacy, device):
    size_average, reduce = legacy
    x, t = example(device, torch.float64)
    arguments = (torch.rand(70, device=device, dtype=torch.float64), size_average, 3, reduce, "mean", 0.1)
    torch.testing.assert_close(CrossEntropyLoss(*arguments)(x, t), nn.CrossEntropyLoss(*arguments)(x, t))


# ---- torch's own cases -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch_cases():
    """torch.testing._internal's module and op databases."""
    if "expecttest" not in sys.modules:
        try:
            import expecttest  # noqa: F401
        except ModuleNotFoundError:  # only the base class of torch's own test cases
            stub = types.ModuleType("expecttest")
            stub.TestCase, stub.ACCEPT = unittest.TestCase, False
            sys.modules["expecttest"] = stub
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    module = next(m for m in module_db if m.module_cls is nn.CrossEntropyLoss)
    op = next(o for o in op_db if o.name == "nn.functional.cross_entropy")
    return module, op


def widen(value):
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def assert_agrees_with_torch(ours, theirs, x, target, weight=None, **options):
    """The loss and every gradient that the case asks for, against torch in fp64 on the same inputs.

    Deviation: torch's loss has the dtype of half-precision logits, ours is fp32.
    """
    results = []
    for function, cast in ((ours, lambda v: v), (theirs, widen)):
        call = [cast(x), cast(target)]
        loss = function(*call, cast(weight))
        upstream = torch.linspace(0.5, 1.5, loss.numel(), device=loss.device).reshape(loss.shape)
        inputs = [v for v in call if v.requires_grad]
        assert inputs
        results.append([loss, *torch.autograd.grad(loss, inputs, upstream.to(loss))])
    (loss, *gradients), (true_loss, *true_gradients) = results
    assert loss.dtype == (torch.float32 if x.dtype in HALF else x.dtype)
    assert all(gradient.dtype == x.dtype for gradient in gradients)
    bounds = oracle(x, target, weight, upstream=upstream, **options)
    assert_near(loss, true_loss.detach().cpu(), bounds.loss_bound)
    assert_near(gradients[0], true_gradients[0].cpu(), bounds.gradient_bound)
    if target.requires_grad:  # -w_c log p_c, computed as the loss is, and rounded to the target's dtype
        truth = true_gradients[1].cpu()
        info, wide = torch.finfo(x.dtype), torch.float64 if x.dtype == torch.float64 else torch.float32
        size = (1 + x.abs().max().item()) * truth.abs().max()
        assert_near(gradients[1], truth, info.eps * truth.abs() + 20 * torch.finfo(wide).eps * size + info.tiny)


@by_dtype
@pytest.mark.once("native", "triton")
def test_module_inputs_of_torch(dtype, torch_cases, device):
    """All inputs that torch tests nn.CrossEntropyLoss with: forward and gradient."""
    info, _ = torch_cases
    cases = info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=True, training=True)
    count = 0
    for case in cases:
        make, call = case.constructor_input, case.forward_input
        assert not make.args and not call.kwargs
        weight = make.kwargs.get("weight")
        options = {name: value for name, value in make.kwargs.items() if name != "weight"}
        assert_agrees_with_torch(
            lambda x, t, w, options=options: CrossEntropyLoss(w, **options)(x, t),
            lambda x, t, w, options=options: nn.CrossEntropyLoss(w, **options)(x, t),
            *call.args,
            weight,
            **options,
        )
        count += 1
    assert count > 0


@pytest.mark.once("native", "triton")
def test_error_inputs_of_torch(torch_cases, device):
    """torch raises RuntimeError for most of these; a wrong argument is a ValueError or TypeError here."""
    info, _ = torch_cases
    errors = info.module_error_inputs_func(info, device=device, dtype=torch.float32, requires_grad=True, training=True)
    assert errors
    for case in errors:
        make, call = case.module_error_input.constructor_input, case.module_error_input.forward_input
        with pytest.raises((ValueError, TypeError, IndexError)):
            CrossEntropyLoss(*make.args, **make.kwargs)(*call.args, **call.kwargs)


@by_dtype
@pytest.mark.once("native", "triton")
def test_op_samples_of_torch(dtype, torch_cases, device):
    """All samples of torch's OpInfo of cross_entropy, also with gradients of the probabilities."""
    _, info = torch_cases
    count = gradients_of_targets = 0
    for sample in info.sample_inputs(device, dtype, requires_grad=True):
        (target,), options = sample.args, dict(sample.kwargs)
        weight = options.pop("weight", None)
        assert_agrees_with_torch(
            lambda x, t, w, options=options: cross_entropy(x, t, w, **options),
            lambda x, t, w, options=options: F.cross_entropy(x, t, w, **options),
            sample.input,
            target,
            weight,
            **options,
        )
        count += 1
        gradients_of_targets += target.requires_grad
    assert count > 0 and gradients_of_targets > 0


def test_public_names_are_exported():
    for name in ("CrossEntropyLoss", "FocalLoss", "LabelSmoothingCrossEntropy", "cross_entropy", "focal_loss"):
        assert name in torchfast.__all__
