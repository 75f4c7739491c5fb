"""The forward that computes the gradient in the same walk: it gives the bits of the two ops, whatever was guessed."""

import inspect
import itertools

import pytest
import torch
from contract import DTYPES, HALF, same
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from torchfast import cross_entropy, sigmoid_focal_loss
from torchfast._native import unavailable_reason
from torchfast._register import registry

OPS = {name: op for name, op in registry.items() if op.with_gradient}


def reduced(op, sample):
    """True if the loss is one number: those of each row or element have upstream gradients of their own."""
    call = inspect.signature(op.function).bind(*sample.args, **sample.kwargs)
    call.apply_defaults()
    return call.arguments["reduction"] != "none"


CASES = [
    pytest.param(op, number, id=f"{name}-{number}")
    for name, op in OPS.items()
    for number, sample in enumerate(op.sample_inputs(large=True))
    if reduced(op, sample)
]
needs_native = pytest.mark.skipif(unavailable_reason is not None, reason="plain PyTorch computes it in the backward")


class Calls(TorchDispatchMode):
    """Records which ops of torchfast were called, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "torchfast":
            self.calls.append((func._opname, args))
        return func(*args, **(kwargs or {}))

    def names(self):
        return [name for name, _ in self.calls]


def calls_of(function):
    with Calls() as calls:
        function()
    return calls


@pytest.mark.once("reference", "triton")  # These have no kernel for both, so the op calls the two ops itself.
@pytest.mark.parametrize("op, number", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("upstream", [1.0, 0.37, 0.0])
def test_loss_and_gradient_are_those_of_the_two_ops(op, number, dtype, upstream, device):
    sample = next(itertools.islice(op.sample_inputs(device, dtype, large=True), number, None))
    with torch.no_grad():
        [(_, inputs)] = calls_of(lambda: op.function(*sample.args, **sample.kwargs)).calls
    loss, *residuals, gradient = op.with_gradient(*inputs, upstream)
    expected = op.forward(*inputs)
    for actual, truth in zip((loss, *residuals), expected, strict=True):
        same(actual, truth)
    truth = op.backward(torch.full_like(loss, upstream), *inputs, *expected[1:])
    same(gradient, truth)
    assert gradient.stride() == truth.stride()


FRESH = itertools.count(1 / 1024, 1 / 1024)
by_loss = pytest.mark.parametrize("name", OPS)


def fresh(name, **options):
    """A loss with an option that no call has had, so that nothing is known of its upstream gradients."""
    option = next(FRESH)
    if name == "cross_entropy":
        return lambda x, t: cross_entropy(x, t, z_loss=option, **options)
    return lambda x, t: sigmoid_focal_loss(x, t, gamma=option, **{"reduction": "mean", **options})


def example(device, dtype=torch.float32):
    x = torch.randn(6, 70, device=device).to(dtype).requires_grad_()
    return x, torch.randint(70, (6,), device=device)


def step(loss, x, factor=1.0):
    x.grad = None
    (loss * factor).backward()
    return x.grad


BOTH, FORWARD, BACKWARD = "_with_gradient", "", "_backward"
STEPS = {
    "of the loss itself": ([1.0] * 2, [[BOTH]] * 2),
    "constant": ([0.25] * 4, [[BOTH, BACKWARD], [FORWARD, BACKWARD], [BOTH], [BOTH]]),
    "changing": ([0.5, 0.25, 3.0, 7.0], [[BOTH, BACKWARD], *[[FORWARD, BACKWARD]] * 3]),
}


@needs_native
@by_loss
@pytest.mark.parametrize("factors, expected", STEPS.values(), ids=STEPS)
@pytest.mark.once
def test_a_constant_upstream_gradient_costs_one_walk_and_a_changing_one_no_more_than_two(name, factors, expected):
    x, t = example("cpu")
    loss = fresh(name)
    for factor, suffixes in zip(factors, expected, strict=True):
        called = calls_of(lambda: step(loss(x, t), x, factor)).names()  # noqa: B023
        assert called == [name + suffix for suffix in suffixes]


@by_loss
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_do_not_depend_on_what_was_guessed(name, dtype, device):
    x, t = example(device, dtype)
    loss = fresh(name)
    factors = [1.0, 0.3, 0.3, 0.3, 1.0, 65536.0, 65536.0, 65536.0, 0.3]
    seen = {}
    for factor in factors:
        gradient = step(loss(x, t), x, factor)
        same(gradient, seen.setdefault(factor, gradient))
    if dtype not in HALF:
        torch.testing.assert_close(seen[0.3], 0.3 * seen[1.0])


@by_loss
def test_a_retained_graph_gives_gradients_of_their_own(name, device):
    x, t = example(device)
    loss = fresh(name)(x, t)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    (last,) = torch.autograd.grad(loss, x)
    same(first, second)
    same(first, last)
    assert len({gradient.data_ptr() for gradient in (first, second, last)}) == 3


@needs_native
@by_loss
@pytest.mark.once
def test_graphs_that_are_kept_cost_no_second_gradient(name):
    x, t = example("cpu")
    two = [name, f"{name}_backward"]
    loss = fresh(name)
    steps = [calls_of(lambda: loss(x, t).backward(retain_graph=True)).names() for _ in range(3)]
    assert steps[1:] == [two] * 2
    loss = fresh(name)
    for _ in range(2):
        calls = calls_of(lambda: torch.autograd.grad(loss(x, t), x, create_graph=True))
    assert calls.names() == [name]


@by_loss
@pytest.mark.once
def test_what_is_traced_does_not_depend_on_what_was_guessed(name):
    x, t = example("cpu")
    loss = fresh(name)

    def gradient(x, t):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(2 * loss(x, t), x)[0]

    for mode in "real", "fake":
        traced = make_fx(gradient, tracing_mode=mode)(x, t)
        called = [node.target._opname for node in traced.graph.nodes if "torchfast" in str(node.target)]
        assert called == [name, f"{name}_backward"]
        same(traced(x, t), gradient(x, t))


@by_loss
def test_two_losses_of_one_tensor_have_a_gradient_each(name, device):
    x, t = example(device)
    loss = fresh(name)
    separate = step(loss(x, t), x) + step(loss(x, t), x, 0.5)
    x.grad = None
    (loss(x, t) + 0.5 * loss(x, t)).backward()
    torch.testing.assert_close(x.grad, separate)


@by_loss
def test_logits_that_change_before_the_backward_are_refused(name, device):
    x, t = example(device)
    logits = x * 1
    loss = fresh(name)(logits, t)
    logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@by_loss
def test_second_derivatives_after_a_gradient_that_was_done(name, device):
    x, t = example(device, torch.float64)
    loss = fresh(name)
    (gradient,) = torch.autograd.grad(loss(x, t), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, t), x)
    assert second.abs().max() > 0


@needs_native
@by_loss
@pytest.mark.once
def test_hooks_of_checkpointing_and_no_grad_leave_the_gradient_to_the_backward(name):
    x, t = example("cpu")
    loss = fresh(name)
    expected = step(loss(x, t), x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert calls_of(lambda: loss(x, t)).names() == [name]
    with torch.no_grad():
        assert calls_of(lambda: loss(x, t)).names() == [name]
    same(step(checkpoint(loss, x, t, use_reentrant=False), x), expected)
    same(step(checkpoint(loss, x, t, use_reentrant=True), x), expected)
