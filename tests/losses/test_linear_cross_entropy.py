"""linear_cross_entropy is F.linear, then cross_entropy; the formula of the latter is tested in test_cross_entropy.py.

Errors are differences from fp64 of the same inputs. Products in fp32 or fp64 are judged by single samples: the largest
error, relative to the largest element of the truth, may be that of the two steps in that dtype and `ROUNDINGS` of it,
and each element of a gradient in half precision has one rounding of its own.

Products in half precision round the logits and their gradient, and so do those of the two steps; but where these have
divided by the number of rows before, they round other numbers, and whose error is larger in one sample is luck. So that
error is a root mean square over many, of which ours may be `LUCK` times as large. Which products a CPU is better at
is its own affair: both are tested on each.
"""

import copy
import ctypes
import functools
import gc
import itertools
import math
import re
import sys
import types
import unittest
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import HALF, refuses, same, upstream_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.gradcheck import gradcheck, gradgradcheck
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import torchfast
from torchfast import LinearCrossEntropyLoss, cross_entropy, linear_cross_entropy
from torchfast.losses.linear_cross_entropy import chunks

ROUNDINGS = 32
LUCK = 1.1
"""Two root mean squares of n roundings each differ by a factor of 1 +- 1 / sqrt(n): 0.02 and less in these tests."""
NAN, INF = float("nan"), float("inf")
NAMES = ("loss", "input", "weight", "bias")
MODULE = sys.modules[linear_cross_entropy.__module__]
IN_HALF, WIDENED = ([pytest.param(dtype, how, id=f"{dtype}-{how}") for dtype in HALF] for how in ("in half", "widened"))
WIDE = [pytest.param(dtype, "as ever", id=str(dtype)) for dtype in (torch.float32, torch.float64)]


def by_dtype_and_products(cases):
    by_case = pytest.mark.parametrize("dtype, products", cases, indirect=["products"])
    return lambda test: pytest.mark.usefixtures("products")(by_case(test))


by_dtype = by_dtype_and_products(IN_HALF + WIDENED + WIDE)
by_dtype_of_precise_products = by_dtype_and_products(WIDENED + WIDE)
by_dtype_of_half_products = by_dtype_and_products(IN_HALF)
by_reduction = pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "focal": {"gamma": 2.0, "alpha": 0.25},
    "focal, smoothed": {"gamma": 1.5, "label_smoothing": 0.2},
    "z-loss": {"z_loss": 1e-2},
    "capped": {"softcap": 5.0, "logit_scale": 0.7},
    "normalized": {"normalizer": 3.0},
}
option_sets = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture
def products(request, device, monkeypatch):
    """Has the CPU multiply half precision as it is, or widened to fp32, whichever this one would do."""
    if request.param == "widened" and torch.device(device).type != "cpu":
        pytest.skip("a GPU widens nothing")
    monkeypatch.setattr(MODULE, "_WIDENED_ON_CPU", HALF if request.param == "widened" else ())
    return request.param


def two_steps(input, linear_weight, target, *, linear_bias=None, chunk_size=None, **options):
    """On rows: cross_entropy's class dimension is the second, a linear layer's the last."""
    shape, classes = input.shape[:-1], len(linear_weight)
    logits = F.linear(input, linear_weight, linear_bias).reshape(-1, classes)
    target = target.reshape(-1, classes) if target.is_floating_point() else target.reshape(-1)
    if options.get("sample_weight") is not None:
        options["sample_weight"] = options["sample_weight"].reshape(-1)
    loss = cross_entropy(logits, target, **options)
    return loss if loss.dim() == 0 else loss.reshape(shape)


def example(device, dtype=torch.float32, rows=(13,), features=6, classes=70, bias=True):
    """Hidden states, classifier, bias and targets, two of which are ignored."""
    x = torch.randn(*rows, features).to(device, dtype)
    w = (2 * torch.randn(classes, features)).to(device, dtype)
    b = torch.randn(classes).to(device, dtype) if bias else None
    target = torch.randint(classes, rows, device=device)
    if target.numel() > 4:
        target.view(-1)[1::7] = -100
    return x, w, b, target


def example_with(device, dtype, factors, probabilities, options, **sizes):
    """The inputs, and the options with weights of classes and rows."""
    x, w, b, target = example(device, dtype, **sizes)
    rows, classes = len(x), len(w)
    if probabilities:
        target = (3 * torch.randn(rows, classes)).softmax(1).to(device, dtype)
    if factors:
        weight, alpha = (torch.rand(2, classes) + 0.5).to(device, dtype)
        options = {"weight": weight, "alpha": alpha, "sample_weight": (torch.rand(rows) + 0.5).to(device)} | options
    return (x, w, b, target), options


def results(function, x, w, b, target, upstream=None, **options):
    """The loss, and the gradients of hidden states, classifier and bias, with an uneven upstream gradient."""
    leaves = [t.detach().requires_grad_() for t in (x, w, b) if t is not None]
    bias = leaves[2] if b is not None else None
    loss = function(leaves[0], leaves[1], target, linear_bias=bias, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream_of(loss) if upstream is None else upstream)]


def to(dtype, values):
    """Of a tuple or dictionary, what floats."""
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, values)


def difference(actual, truth):
    """And the truth, where both are finite."""
    assert actual.shape == truth.shape
    assert torch.equal(actual.isnan(), truth.isnan()) and torch.equal(actual.isinf(), truth.isinf())
    truth = truth.nan_to_num(0, 0, 0)
    return actual.double().nan_to_num(0, 0, 0) - truth, truth


def error(actual, truth, rounded=False):
    """The largest, relative to the largest element. If the result was rounded, beyond what that explains of each."""
    wrong, truth = difference(actual, truth)
    wrong, size = wrong.abs(), truth.abs()
    if rounded:
        info = torch.finfo(actual.dtype)
        wrong = (wrong - info.eps / 2 * size.clamp(min=info.smallest_normal)).clamp(min=0)
    return wrong.max().item() / max(size.max().item(), 1e-30) if size.numel() else 0.0


def square_error(actual, truth):
    """The mean, relative to the mean square."""
    wrong, truth = difference(actual, truth)
    return wrong.square().mean().item() / max(truth.square().mean().item(), 1e-30) if truth.numel() else 0.0


def assert_as_two_steps(x, w, b, target, ours=linear_cross_entropy, truth=two_steps, **options):
    """The loss and all gradients, of products in fp32 or fp64."""
    dtype = torch.float32 if x.dtype in HALF else x.dtype
    actual = results(ours, x, w, b, target, **options)
    eager = results(two_steps, *to(dtype, (x, w, b, target)), **to(dtype, options))
    exact = results(truth, *to(torch.float64, (x, w, b, target)), **to(torch.float64, options))
    for name, a, e, true in zip(NAMES, actual, eager, exact, strict=False):
        assert a.dtype == (dtype if name == "loss" else x.dtype)
        got, allowed = error(a, true, a.dtype in HALF), error(e, true) + ROUNDINGS * torch.finfo(dtype).eps
        assert got <= allowed, f"{name}: {got:.3g}, allowed are {allowed:.3g}"


def assert_errors_are_those_of_two_steps(samples, dtype, ours=linear_cross_entropy, theirs=two_steps, truth=two_steps):
    """Over all samples of inputs and options, of products in half precision."""
    squares = {}
    for inputs, options in samples:
        actual, eager = (results(function, *inputs, **options) for function in (ours, theirs))
        exact = results(truth, *to(torch.float64, inputs), **to(torch.float64, options))
        for name, a, e, true in zip(NAMES, actual, eager, exact, strict=False):
            assert a.dtype == e.dtype
            squares.setdefault(name, []).append((square_error(a, true), square_error(e, true)))
    for name, of_samples in squares.items():
        got, eager = (math.sqrt(sum(each) / len(each)) for each in zip(*of_samples, strict=True))
        # Ours is multiplied by the upstream gradient after it was rounded, and rounded again: one more error, which
        # is uniform in half an eps to both sides at most.
        again = torch.finfo(dtype).eps / math.sqrt(12) if name == "input" else 0
        allowed = LUCK * math.hypot(eager, again) + ROUNDINGS * torch.finfo(torch.float32).eps
        assert got <= allowed, f"{name}: {got:.3g}, allowed are {allowed:.3g}, the two steps have {eager:.3g}"


# ---- Equal to the two steps ------------------------------------------------------------------


@option_sets
@by_reduction
@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("factors", [False, True], ids=["", "factors"])
@by_dtype_of_precise_products
def test_loss_and_gradients_are_those_of_the_two_steps(dtype, factors, probabilities, reduction, options, device):
    if "normalizer" in options and reduction != "mean":
        options = {}
    inputs, options = example_with(device, dtype, factors, probabilities, options)
    for chunk_size in (4, None):
        assert_as_two_steps(*inputs, reduction=reduction, chunk_size=chunk_size, **options)


@by_reduction
@by_dtype_of_half_products
@pytest.mark.once
def test_loss_and_gradients_of_half_products_are_those_of_the_two_steps(dtype, reduction, device):
    def samples():
        for options, factors, probabilities in itertools.product(OPTIONS.values(), (False, True), (False, True)):
            if "normalizer" in options and reduction != "mean":
                continue
            options = {"reduction": reduction, "chunk_size": 25} | options
            yield example_with(device, dtype, factors, probabilities, options, rows=(60,), classes=1000)

    assert_errors_are_those_of_two_steps(samples(), dtype)


@st.composite
def calls(draw, device):
    """Any combination of options, shapes and layouts; half precision is above."""
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    rows = draw(st.sampled_from([(), (1,), (7,), (2, 5), (2, 1, 3), (0,), (3, 0)]))
    features, classes = draw(st.integers(1, 9)), draw(st.sampled_from([1, 2, 65, 130]))

    def rand(*shape):
        return torch.rand(shape, generator=seed, dtype=torch.float64)

    def normal(*shape):
        return torch.randn(shape, generator=seed, dtype=torch.float64).to(device, dtype)

    x, w = normal(*rows, features), normal(classes, features)
    layout = draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]))
    if layout == "transposed":
        x = x.movedim(-1, 0).contiguous().movedim(0, -1)
        w = w.t().contiguous().t()
    elif layout == "sliced":
        x, w = x.repeat_interleave(2, -1)[..., ::2], w.repeat_interleave(2, -1)[..., ::2]
    elif layout == "expanded":
        x = x[:1].expand(x.shape) if rows else x
    options = {
        "gamma": draw(st.sampled_from([0.0, 0.5, 2.0])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "z_loss": draw(st.sampled_from([0.0, 1e-2])),
        "logit_scale": draw(st.sampled_from([1.0, -1.5])),
        "softcap": draw(st.sampled_from([None, 15.0])),
        "reduction": draw(st.sampled_from(["none", "sum", "mean"])),
        "empty": draw(st.sampled_from(["nan", "zero"])),
        "chunk_size": draw(st.sampled_from([None, 1, 3, 100])),
        "weight": (rand(classes) + 0.5).to(device, dtype) if draw(st.booleans()) else None,
        "alpha": draw(st.sampled_from([None, 0.25, (2 * rand(classes)).to(device, dtype)])),
    }
    if draw(st.booleans()):
        options["sample_weight"] = torch.where(rand(*rows) < 0.3, 0.0, rand(*rows) + 0.5).to(device, torch.float32)
    if draw(st.booleans()):
        target = rand(*rows, classes).softmax(-1).to(device, dtype)
    else:
        options["ignore_index"] = draw(st.sampled_from([-100, 0]))
        ignored = rand(*rows) < draw(st.sampled_from([0.0, 0.3, 1.0]))
        target = torch.where(ignored, options["ignore_index"], (rand(*rows) * classes).long())
        target = target.to(device, draw(st.sampled_from([torch.int64, torch.int32, torch.int16])))
    return x, w, normal(classes) if draw(st.booleans()) else None, target, options


@given(data=st.data())
@pytest.mark.once("native", "triton")
def test_any_options_shapes_and_layouts_give_the_two_steps(data, device):
    x, w, b, target, options = data.draw(calls(device))
    assert_as_two_steps(x, w, b, target, **options)


@pytest.mark.parametrize("rows, chunk_size", [(13, 5), (13, 13), (13, 1), (13, 100), (12, 4), (1, 3)])
@by_reduction
def test_rows_need_not_be_a_multiple_of_the_chunk(rows, chunk_size, reduction, device):
    x, w, b, target = example(device, rows=(rows,))
    assert_as_two_steps(x, w, b, target, reduction=reduction, chunk_size=chunk_size)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64], ids=str
)
def test_any_integer_dtype_of_targets(dtype, device):
    x, w, b, target = example(device)
    target = torch.where(target < 0, 7, target)
    expected = results(linear_cross_entropy, x, w, b, target, ignore_index=7, chunk_size=4)
    actual = results(linear_cross_entropy, x, w, b, target.to(dtype), ignore_index=7, chunk_size=4)
    for a, e in zip(actual, expected, strict=True):
        same(a, e)


@by_dtype
@pytest.mark.once
def test_default_chunks_of_many_rows_and_long_rows(dtype, products, kernel, device):
    rows, classes = (1500, 30000) if kernel == "native" else (40, 300)
    inputs = example(device, dtype, rows=(rows,), features=8, classes=classes)
    if products == "in half":
        assert_errors_are_those_of_two_steps([(inputs, {"label_smoothing": 0.1})], dtype)
    else:
        assert_as_two_steps(*inputs, label_smoothing=0.1)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@by_dtype
@pytest.mark.once
def test_gradients_of_parameters_are_added_up_in_fp32(dtype, reduction, device):
    """Each chunk adds the same to the gradient: in bf16 a sum of more than 256 of them stays where it is."""
    x, w, b, target = example(device, dtype, rows=(3,))
    parameters = w.requires_grad_(), b.requires_grad_()

    def gradients(x, target):
        loss = linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction, chunk_size=3)
        return torch.autograd.grad(loss.sum(), parameters)

    # Each gradient is rounded when it is returned; each addition by half an eps, but always the same way.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    allowed = torch.finfo(dtype).eps + 233 * torch.finfo(wide).eps / 2
    for many, once in zip(gradients(x.repeat(233, 1), target.repeat(233)), gradients(x, target), strict=True):
        assert error(many, 233 * once.double()) <= allowed


@pytest.mark.parametrize("products", ["in half", "widened"], indirect=True)
@pytest.mark.once
def test_a_loss_scale_protects_small_fp16_gradients(products, device):
    """p / rows of the mean is 0 in fp16, but not 65536 times that."""
    x, w, b, _ = example(device, torch.float16, rows=(4096,), features=2, classes=300)
    inputs = x, 0.01 * w, b, torch.zeros(4096, dtype=torch.long, device=device)
    options = {"upstream": torch.tensor(65536.0, device=device), "chunk_size": 512}
    if products == "in half":
        assert_errors_are_those_of_two_steps([(inputs, options)], torch.float16)
    else:
        assert_as_two_steps(*inputs, **options)


# ---- Special rows ----------------------------------------------------------------------------


@pytest.mark.parametrize("special", ["ignored", "weight 0"])
@pytest.mark.parametrize("bad", [NAN, INF])
@by_reduction
def test_nothing_of_an_ignored_row_reaches_loss_or_gradients(reduction, bad, special, device):
    """Attention over nothing but padding gives NaN; 0 * NaN would poison the whole gradient of the classifier."""
    x, w, b, target = example(device)
    sample_weight = torch.rand(13, device=device) + 0.5
    row = 3
    if special == "ignored":
        target[row] = -100
    else:
        sample_weight[row] = 0
    options = {"reduction": reduction, "sample_weight": sample_weight, "chunk_size": 4, "z_loss": 0.1}
    expected = results(linear_cross_entropy, x, w, b, target, **options)
    poisoned = x.clone()
    poisoned[row] = bad
    actual = results(linear_cross_entropy, poisoned, w, b, target, **options)
    assert all(t.isfinite().all() for t in actual) and not actual[1][row].any()
    for a, e in zip(actual, expected, strict=True):
        same(a, e)


@by_reduction
@pytest.mark.parametrize("empty", ["nan", "zero"])
@pytest.mark.parametrize("rows", [0, 13])
def test_no_rows_and_all_rows_ignored(rows, empty, reduction, device):
    x, w, b, _ = example(device, rows=(rows,))
    target = torch.full((rows,), -100, device=device)
    options = {"reduction": reduction, "empty": empty}
    loss, *gradients = results(linear_cross_entropy, x, w, b, target, **options)
    same(loss, two_steps(x, w, target, linear_bias=b, **options))
    assert [g.shape for g in gradients] == [t.shape for t in (x, w, b)]
    assert not any(g.any() for g in gradients)


def test_weights_that_cancel_have_no_mean_and_no_gradient(device):
    x, w, b, target = example(device, rows=(4,))
    sample_weight = torch.tensor([1.0, -1.0, 2.0, -2.0], device=device)
    loss, *gradients = results(linear_cross_entropy, x, w, b, target, sample_weight=sample_weight, empty="zero")
    assert loss == 0 and not any(g.any() for g in gradients)


def test_a_class_out_of_range(device, kernel):
    x, w, b, target = example(device)
    target[5] = 70
    if torch.device(device).type == "cpu" and kernel != "triton":  # neither a GPU nor the interpreter is made to wait
        with pytest.raises(IndexError, match="70"):
            linear_cross_entropy(x, w, target)
        return
    loss, *gradients = results(linear_cross_entropy, x, w, b, target, reduction="none")
    assert loss.isnan().nonzero().flatten().tolist() == [5]
    assert all(g.isfinite().all() for g in gradients) and not gradients[0][5].any()


# ---- Autograd --------------------------------------------------------------------------------


@by_reduction
@pytest.mark.once
def test_derivatives_of_a_tied_embedding(reduction, device):
    """The same tensor made the hidden states: its second derivative has no term twice."""
    w = example(device, torch.float64, features=3, classes=4)[1].requires_grad_()
    target = torch.tensor([0, 3, -100, 2], device=device)
    ids = torch.tensor([1, 1, 2, 0], device=device)

    def tied(w):
        return linear_cross_entropy(w[ids].tanh(), w, target, chunk_size=3, reduction=reduction)

    def itself(w):
        return linear_cross_entropy(w, w, target, chunk_size=3, reduction=reduction)

    for function in tied, itself:
        upstream = upstream_of(function(w))
        plain, graphed = (
            torch.autograd.grad(function(w), w, upstream, create_graph=create)[0] for create in (False, True)
        )
        torch.testing.assert_close(graphed, plain)
        assert gradcheck(function, w)
        assert gradgradcheck(function, w)


@pytest.mark.once
def test_a_tied_embedding_trains_as_with_the_two_steps(device):
    losses = []
    for function in linear_cross_entropy, two_steps:
        torch.manual_seed(0)
        embedding = nn.Embedding(50, 8).to(device)
        optimizer = torch.optim.SGD(embedding.parameters(), lr=0.5)
        ids = torch.randint(50, (4, 9), device=device)
        of_this = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = function(embedding(ids[:, :-1]), embedding.weight, ids[:, 1:], chunk_size=5)
            loss.backward()
            optimizer.step()
            of_this.append(loss.detach())
        losses.append(torch.stack(of_this))
    torch.testing.assert_close(*losses)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.once
def test_backward_twice_accumulates(device):
    x, w, b, target = example(device)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    loss = linear_cross_entropy(x, w, target, linear_bias=b)
    loss.backward(retain_graph=True)
    once = [t.grad.clone() for t in leaves]
    loss.backward()
    for t, g in zip(leaves, once, strict=True):
        same(t.grad, 2 * g)


@pytest.mark.parametrize("layout", ["expanded", "sliced", "negative"])
def test_upstream_gradients_of_any_layout_and_sign(layout, device):
    x, w, b, target = example(device)
    upstream = {
        "expanded": torch.tensor(0.7, device=device).expand(13),
        "sliced": torch.rand(26, device=device)[::2],
        "negative": -torch.rand(13, device=device),
    }[layout]
    assert_as_two_steps(x, w, b, target, reduction="none", upstream=upstream, chunk_size=4)


@pytest.mark.once
def test_hooks_keep_what_they_were_given(device):
    """The backward may use up a gradient that it saved; not where a hook holds it."""
    x, w, _, target = example(device)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        loss = linear_cross_entropy(x, w.requires_grad_(), target)
    before = [t.clone() for t in packed]
    (7 * loss).backward()
    for t, kept in zip(packed, before, strict=True):
        same(t, kept)


@pytest.mark.once
def test_gradients_are_not_shared_with_the_graph(device):
    x, w, _, target = example(device)
    loss = linear_cross_entropy(x.requires_grad_(), w.requires_grad_(), target)
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    expected = [g.clone() for g in first]
    for g in first:
        g.zero_()
    for g, e in zip(torch.autograd.grad(loss, (x, w)), expected, strict=True):
        same(g, e)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
@by_reduction
@pytest.mark.once
def test_a_frozen_parameter_costs_nothing(reduction, needs, device):
    """Products of matrices: one for the logits, and one for each of the gradients of input and classifier."""
    x, w, b, target = example(device, rows=(8,))
    target.fill_(3)
    full = results(linear_cross_entropy, x, w, b, target, reduction=reduction)
    leaves = [t.requires_grad_(need) for t, need in zip((x, w, b), needs, strict=True)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss = linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction, chunk_size=4)
        if any(needs):
            wanted = [t for t in leaves if t.requires_grad]
            gradients = iter(torch.autograd.grad(loss, wanted, upstream_of(loss)))
    assert loss.requires_grad == any(needs)
    products = sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm", "aten::addmm_"))
    again = reduction == "none" and any(needs)
    assert products == 2 * (1 + again + needs[0] + needs[1])
    for need, gradient in zip(needs, full[1:], strict=True):
        if need:
            torch.testing.assert_close(next(gradients), gradient)


@pytest.mark.once
def test_no_grad_and_detached_inputs_compute_no_gradient(device):
    x, w, _, target = example(device)
    w.requires_grad_()
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert not linear_cross_entropy(x, w, target, chunk_size=13).requires_grad
    assert sum(e.count for e in profile.key_averages() if e.key == "aten::mm") == 1


@pytest.mark.parametrize("name", ["target", "weight", "alpha", "sample_weight"])
@pytest.mark.once
def test_gradients_of_the_other_tensors(name, device):
    x, w, b, target = example(device, torch.float64)
    others = {
        "weight": torch.rand(70, dtype=torch.float64),
        "alpha": torch.rand(70, dtype=torch.float64),
        "sample_weight": torch.rand(13, dtype=torch.float64),
        "target": torch.rand(13, 70, dtype=torch.float64).softmax(1),
    }
    if name != "target":
        others["target"] = target
    others = {k: v.to(device) for k, v in others.items()}
    others[name].requires_grad_()
    x.requires_grad_()
    found = []
    for function in linear_cross_entropy, two_steps:
        loss = function(x, w, linear_bias=b, gamma=2.0, **others)
        found.append(torch.autograd.grad(loss, (x, others[name])))
    for a, e in zip(*found, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("use_reentrant", [False, True])
@by_reduction
@pytest.mark.once
def test_activation_checkpointing(reduction, use_reentrant, device):
    x, w, b, target = example(device)
    expected = results(linear_cross_entropy, x, w, b, target, reduction=reduction)
    leaves = [t.requires_grad_() for t in (x, w, b)]

    def loss_of(x, w, b):
        return linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction)

    loss = checkpoint(loss_of, *leaves, use_reentrant=use_reentrant)
    loss.backward(upstream_of(loss))
    for a, e in zip([loss.detach(), *(t.grad for t in leaves)], expected, strict=True):
        same(a, e)


# ---- Transforms ------------------------------------------------------------------------------


@by_reduction
@pytest.mark.once
def test_batched_upstream_gradients(reduction, device):
    x, w, b, target = example(device)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    loss = linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction)
    upstream = torch.randn(3, *loss.shape, device=device)
    alone = [torch.autograd.grad(loss, leaves, g, retain_graph=True) for g in upstream]
    batched = torch.autograd.grad(loss, leaves, upstream, is_grads_batched=True)
    for a, each in zip(batched, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(each))


@pytest.mark.parametrize("reduction", ["none", "mean"])
@by_dtype_and_products(IN_HALF[1:])
@pytest.mark.once
def test_compiles_as_one_graph_for_all_shapes_in_half_precision(dtype, reduction, device):
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, dynamic=True)
    for rows in (13, 21):
        inputs = example(device, dtype, rows=(2, rows))
        options = {"reduction": reduction, "label_smoothing": 0.1, "gamma": 2.0, "chunk_size": 8}
        actual, expected = (results(f, *inputs, **options) for f in (compiled, linear_cross_entropy))
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.once
def test_compiled_with_a_frozen_classifier_and_autocast(device):
    torch._dynamo.reset()
    x, w, _, target = example(device)

    def step(x, w, target):
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            return linear_cross_entropy(x, w, target, chunk_size=4)

    found = []
    for function in step, torch.compile(step, fullgraph=True):
        leaf = x.clone().requires_grad_()
        loss = function(leaf, w, target)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for a, e in zip(*found, strict=True):
        torch.testing.assert_close(a, e)


# ---- dtypes, autocast ------------------------------------------------------------------------


def under_autocast(function, dtype):
    def call(x, *others, **options):
        with torch.autocast(x.device.type, dtype=dtype):
            return function(x, *others, **options)

    return call


@by_dtype_of_half_products
@by_reduction
@pytest.mark.once
def test_autocast_is_as_good_as_that_of_the_two_steps(reduction, dtype, device):
    samples = [
        (example(device, rows=(60,), classes=1000), {"reduction": reduction, "chunk_size": 25}) for _ in range(8)
    ]
    ours, theirs = (under_autocast(function, dtype) for function in (linear_cross_entropy, two_steps))
    assert_errors_are_those_of_two_steps(samples, dtype, ours, theirs)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("products", ["widened"], indirect=True)
@by_reduction
@pytest.mark.once
def test_autocast_on_a_cpu_that_widens_rounds_nothing(reduction, products, dtype, device):
    assert_as_two_steps(*example(device), ours=under_autocast(linear_cross_entropy, dtype), reduction=reduction)


@pytest.mark.once
def test_autocast_takes_mixed_dtypes_and_leaves_fp64(device):
    x, w, b, target = example(device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        loss, *gradients = results(linear_cross_entropy, x.bfloat16(), w, b.bfloat16(), target)
        wide = linear_cross_entropy(x.double(), w.double(), target)
    assert [t.dtype for t in gradients] == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert (loss.dtype, wide.dtype) == (torch.float32, torch.float64)
    same(wide, linear_cross_entropy(x.double(), w.double(), target))


# ---- Memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("takes_fp32", [True, False])
def test_half_precision_products_are_added_in_one_step_where_torch_does_that(takes_fp32, monkeypatch):
    """These stand in for CUDA's functions, which alone have `out_dtype`: addmm of any torch from 2.8 on has it, but the
    older ones refuse a matrix in fp32."""
    steps = []

    def addmm(total, x, y, *, out_dtype, out):
        if total.dtype != y.dtype and not takes_fp32:
            steps.append("refused")
            raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")
        steps.append(f"addmm {len(x)}")
        return out.copy_(total + x.to(out_dtype) @ y.to(out_dtype))

    def mm(x, y, *, out_dtype):
        steps.append(f"mm {len(x)}")
        return x.to(out_dtype) @ y.to(out_dtype)

    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(chunks, "_adds_in_place", functools.cache(chunks._adds_in_place.__wrapped__))
    x, y = torch.randn(9000, 3).bfloat16(), torch.randn(3, 2).bfloat16()
    total = torch.ones(9000, 2)
    for _ in range(2):
        chunks._add_product(total, x, y, widens=True)
    torch.testing.assert_close(total, 1 + 2 * (x.float() @ y.float()))
    if takes_fp32:
        assert steps == ["addmm 0", "addmm 9000", "addmm 9000"]
    else:
        assert steps == ["refused", *["mm 8192", "mm 808"] * 2]


def resident(field):
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def peak_of(function, x, w, target, **options):
    """Extra resident bytes at the worst moment of a forward and backward, as the kernel (of Linux) counts them."""
    for leaf in (x, w):
        leaf.grad = None
    gc.collect()
    torchfast.empty_cache()  # memory that is used again would not be seen
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    loss = function(x, w, target, **options)
    (loss if loss.dim() == 0 else loss.sum()).backward()
    return resident("VmHWM") - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of the process from /proc")
@by_reduction
@pytest.mark.once
def test_peak_memory_is_a_tenth_of_that_of_the_two_steps(reduction, kernel, device):
    if kernel == "triton" or torch.device(device).type != "cpu":
        pytest.skip("the resident memory of this process tells nothing about Triton's interpreter or a GPU")
    rows, classes = 4096, 8192
    x, w, _, target = example(device, rows=(rows,), features=16, classes=classes)
    leaves = x.requires_grad_(), w.requires_grad_()
    options = {"reduction": reduction, "chunk_size": 64}
    peak_of(linear_cross_entropy, *leaves, target, **options)  # threads, and the libraries' own buffers
    ours = peak_of(linear_cross_entropy, *leaves, target, **options)
    theirs = peak_of(two_steps, *leaves, target, reduction=reduction)
    assert theirs > 1.5 * rows * classes * 4  # the logits and their gradient
    assert ours < 0.1 * theirs


# ---- Validation ------------------------------------------------------------------------------

X, W, T = torch.zeros(4, 2), torch.zeros(3, 2), torch.zeros(4, dtype=torch.long)
BAD_CALLS = {
    "input scalar": ((torch.tensor(1.0), W, T), {}, ValueError, ["input", "(..., D)", "scalar"]),
    "input integer": ((X.long(), W, T), {}, TypeError, ["input", "int64", "float32"]),
    "classifier vector": ((X, W[0], T), {}, ValueError, ["linear_weight's shape", "(2,)", "(V, 2)"]),
    "classifier of several outputs": ((X, W[:, None], T), {}, ValueError, ["linear_weight's shape", "(3, 1, 2)"]),
    "classifier features": ((X, W.t(), T), {}, ValueError, ["linear_weight's shape", "(2, 3)", "(V, 2)"]),
    "no classes": ((X, W[:0], T), {}, ValueError, ["linear_weight's shape", "(0, 2)", "V > 0"]),
    "classifier dtype": ((X, W.bfloat16(), T), {}, TypeError, ["linear_weight", "bfloat16", "float32", "autocast"]),
    "classifier integer": ((X, W.long(), T), {}, TypeError, ["linear_weight", "int64"]),
    "classifier device": ((X, W.to("meta"), T), {}, ValueError, ["linear_weight", "meta", "cpu"]),
    "bias shape": ((X, W, T), {"linear_bias": torch.ones(2)}, ValueError, ["linear_bias's shape", "(2,)", "(3,)"]),
    "bias dtype": ((X, W, T), {"linear_bias": torch.ones(3).double()}, TypeError, ["linear_bias", "float64"]),
    "bias device": ((X, W, T), {"linear_bias": torch.ones(3, device="meta")}, ValueError, ["linear_bias", "meta"]),
    "target rows": ((X, W, T[:3]), {}, ValueError, ["target", "(3,)", "(4,)", "logits of shape (4, 3)"]),
    "target of the wrong rank": ((X.view(2, 2, 2), W, T), {}, ValueError, ["target", "(4,)", "(2, 2)"]),
    "target bool": ((X, W, T.bool()), {}, TypeError, ["target", "bool", "integer"]),
    "probabilities": ((X, W, torch.ones(4, 2)), {}, ValueError, ["target", "(4, 2)", "(4, 3)", "logits"]),
    "target device": ((X, W, T.to("meta")), {}, ValueError, ["target", "meta", "cpu"]),
    "chunk_size 0": ((X, W, T), {"chunk_size": 0}, ValueError, ["chunk_size", "0", "> 0"]),
    "chunk_size float": ((X, W, T), {"chunk_size": 2.0}, ValueError, ["chunk_size", "2.0", "integer"]),
    "gamma": ((X, W, T), {"gamma": -1.0}, ValueError, ["gamma", "-1.0", ">= 0"]),
    "reduction": ((X, W, T), {"reduction": "avg"}, ValueError, ["reduction", "avg", "mean"]),
    "empty": ((X, W, T), {"empty": "one"}, ValueError, ["empty", "one", "zero"]),
    "smoothing": ((X, W, T), {"label_smoothing": 2.0}, ValueError, ["label_smoothing", "2.0", "[0, 1]"]),
    "softcap": ((X, W, T), {"softcap": 0.0}, ValueError, ["softcap", "0.0"]),
    "normalizer": ((X, W, T), {"normalizer": 2.0, "reduction": "sum"}, ValueError, ["normalizer", "sum"]),
    "weight shape": ((X, W, T), {"weight": torch.ones(2)}, ValueError, ["weight's shape", "(2,)", "(3,)"]),
    "alpha list": ((X, W, T), {"alpha": [0.25]}, TypeError, ["alpha", "list"]),
    "sample_weight": ((X, W, T), {"sample_weight": torch.ones(3)}, ValueError, ["sample_weight", "(3,)", "(4,)"]),
}


test_errors_name_the_argument_what_was_given_and_what_is_allowed = refuses(linear_cross_entropy, BAD_CALLS)


# ---- The module ------------------------------------------------------------------------------


@pytest.mark.once
def test_module_is_the_function(device):
    x, _, _, target = example(device)
    target.clamp_(min=0)
    weight, alpha, s = (torch.rand(n, device=device) for n in (70, 70, 13))
    options = {"gamma": 1.5, "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 9.0, "logit_scale": 0.5}
    options |= {"ignore_index": 3, "reduction": "sum", "chunk_size": 4}
    module = LinearCrossEntropyLoss(6, 70, bias=True, weight=weight, alpha=alpha, device=device, **options)
    given = (module.linear.weight, target)
    expected = linear_cross_entropy(
        x, *given, linear_bias=module.linear.bias, weight=weight, alpha=alpha, sample_weight=s, **options
    )
    same(module(x, target, sample_weight=s), expected)
    plain = LinearCrossEntropyLoss(6, 70, device=device, empty="zero", alpha=0.5)
    same(plain(x, target - target - 100), torch.zeros((), device=device))
    expected = linear_cross_entropy(x, plain.linear.weight, target, normalizer=2.0, alpha=0.5)
    same(plain(x, target, normalizer=2.0), expected)
    assert "gamma=1.5" in repr(module) and "chunk_size=4" in repr(module)
    same(copy.deepcopy(module)(x, target), module(x, target))
    with pytest.raises(TypeError, match="inplace_backward must be left out: there are no logits"):
        LinearCrossEntropyLoss(6, 70, inplace_backward=True)


@pytest.mark.once
def test_module_takes_the_state_of_torch_and_a_tied_embedding(device):
    theirs = nn.LinearCrossEntropyLoss(6, 70, bias=True, weight=torch.rand(70))
    ours = LinearCrossEntropyLoss(6, 70, bias=True, weight=torch.ones(70))
    ours.load_state_dict(theirs.state_dict())
    x, _, _, target = example("cpu")
    torch.testing.assert_close(ours(x, target), theirs(x, target))
    embedding = nn.Embedding(70, 6)
    tied = LinearCrossEntropyLoss(6, 70)
    tied.linear.weight = embedding.weight
    tied(embedding(target.clamp(min=0)), target).backward()
    assert embedding.weight.grad.any() and len(list(nn.ModuleList([tied, embedding]).parameters())) == 1


def test_public_names_are_exported():
    assert {"LinearCrossEntropyLoss", "linear_cross_entropy"} <= set(torchfast.__all__)


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

    module = next((m for m in module_db if m.module_cls.__name__ == "LinearCrossEntropyLoss"), None)
    ops = [o for o in op_db if o.name == "nn.functional.linear_cross_entropy"]
    if module is None or not ops:
        pytest.skip("this torch has no linear cross entropy")
    return module, ops


def steps_of_torch(x, w, target, *, linear_bias=None, chunk_size=None, **options):
    return F.cross_entropy(F.linear(x, w, linear_bias), target, **options)


def assert_agrees_with_torch(samples, dtype, products):
    """In fp64, on the same inputs."""
    detached = []
    for inputs, options in samples:
        if options.get("ignore_index", 0) is None:
            del options["ignore_index"]
        inputs = tuple(t if t is None else t.detach() for t in inputs)
        detached.append((inputs, {"chunk_size": 2} | options))
    assert len(detached) > 50
    if products == "in half":
        assert_errors_are_those_of_two_steps(detached, dtype, truth=steps_of_torch)
        return
    for inputs, options in detached:
        assert_as_two_steps(*inputs, truth=steps_of_torch, **options)


@by_dtype
@pytest.mark.once("native", "triton")
def test_op_samples_of_torch(dtype, products, torch_cases, device):
    """Of classifiers of one output a class: ours has no other."""

    def samples():
        for info in torch_cases[1]:
            for sample in info.sample_inputs(device, dtype, requires_grad=True):
                options = dict(sample.kwargs)
                options.pop("options", None)
                (w, target), b = sample.args, options.pop("linear_bias", None)
                if w.dim() == 2:
                    yield (sample.input, w, b, target), options

    assert_agrees_with_torch(samples(), dtype, products)


@by_dtype
@pytest.mark.once("native", "triton")
def test_module_inputs_of_torch(dtype, products, torch_cases, device):
    info, _ = torch_cases

    def samples():
        for case in info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=True, training=True):
            (features, classes), options = case.constructor_input.args, dict(case.constructor_input.kwargs)
            if options.pop("out_features") or options.pop("options"):  # the same with torch's chunks
                continue
            for name in ("device", "dtype"):
                options.pop(name)
            w = torch.randn(classes, features, device=device, dtype=dtype)
            b = torch.randn(classes, device=device, dtype=dtype) if options.pop("bias", False) else None
            x, target = case.forward_input.args
            yield (x, w, b, target), options

    assert_agrees_with_torch(samples(), dtype, products)


@pytest.mark.once
def test_error_inputs_of_torch(torch_cases, device):
    """torch raises RuntimeError for most of these, and takes rows in several dimensions for an error."""
    count = 0
    for case in torch_cases[1][0].error_inputs(device):
        sample = case.sample_input
        if sample.input.dim() > 2:
            continue
        with pytest.raises((ValueError, TypeError)):
            linear_cross_entropy(sample.input, *sample.args, **sample.kwargs)
        count += 1
    assert count >= 4
