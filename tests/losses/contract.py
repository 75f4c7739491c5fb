"""What the tests of every loss family share: dtypes, the bound of a truth, bad calls, copies of a module.

What every loss must do, whichever its formula, is in test_ops.py.
"""

import copy
import io
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32, torch.float64)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_integer = pytest.mark.parametrize("integer", INTEGERS, ids=str)


@dataclass
class Truth:
    """A loss and its gradient in fp64, and by how much the dtype under test may miss each element."""

    loss: Tensor
    gradient: Tensor
    loss_bound: Tensor
    gradient_bound: Tensor

    def assert_met(self, x, loss, gradient):
        """`loss` and `gradient` are those of logits x."""
        assert loss.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
        assert gradient.dtype == x.dtype
        assert_near(loss, self.loss, self.loss_bound)
        assert_near(gradient, self.gradient, self.gradient_bound)


def assert_near(actual, truth, bound):
    """|actual - truth| <= bound, elementwise; NaN and infinities must be where the truth has them."""
    actual = actual.detach().cpu().double()
    assert actual.shape == truth.shape
    same = (actual == truth) | (actual.isnan() & truth.isnan())
    wrong = ~(same | ((actual - truth).abs() <= bound))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        allowed = bound[at] if bound.dim() else bound
        pytest.fail(f"{int(wrong.sum())} wrong; at {at}: {actual[at]:.17g}, not {truth[at]:.17g} +- {allowed:.3g}")


def same(a, b):
    """Bitwise equal; NaN is equal to NaN."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def gradient_of(loss, x, upstream=None, **options):
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss)
    return torch.autograd.grad(loss, x, upstream, **options)[0]


def upstream_of(loss):
    """An uneven upstream gradient."""
    return torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device).reshape(loss.shape)


def refuses(function, calls):
    """Makes the test that each call raises its error, whose text has all of its words."""

    @pytest.mark.parametrize("args, options, error, words", calls.values(), ids=calls)
    def test(args, options, error, words):
        with pytest.raises(error) as caught:
            function(*args, **options)
        missing = [word for word in words if word not in str(caught.value)]
        assert not missing, f"{missing} not in: {caught.value}"

    return test


def survives_copies(modules, factors, example):
    """Makes the test that a copy of a module, however it was made, has the same buffers, options and results.

    `factors` are the tensors that a module keeps, of the classes of `example(device)`, which gives input and target.
    """

    @pytest.mark.parametrize("module", modules)
    @pytest.mark.parametrize("through", ["pickle", "deepcopy", "torch.save", "state_dict"])
    @pytest.mark.once
    def test(module, through, device):
        x, target = example(device)
        made = [
            module(**{name: make(x.shape[1]) for name in factors}, reduction="sum").to(device)
            for make in (torch.rand, torch.ones)
        ]
        original, other = made
        if through == "pickle":
            other = pickle.loads(pickle.dumps(original))
        elif through == "deepcopy":
            other = copy.deepcopy(original)
        elif through == "torch.save":
            buffer = io.BytesIO()
            torch.save(original, buffer)
            buffer.seek(0)
            other = torch.load(buffer, weights_only=False)
        else:
            other.load_state_dict(original.state_dict())
        assert set(original.state_dict()) == set(factors) and not module().state_dict()
        assert original.double().weight.dtype == torch.float64
        same(other(x, target), original.float()(x, target))
        assert repr(other) == repr(original)

    return test
