"""Tensors without data, those of the meta device and fake ones: every public function says what it would return, as
shape inference, deferred initialisation and planners of memory ask."""

import contextlib

import pytest
import torch
from test_dtypes import functions_and_samples
from test_ops import loss_and_gradients, map_tensors
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

from torchfast._register import registry
from torchfast.metrics import ranking_metrics

CASES = [
    pytest.param(function, sample, id=f"{function.__name__}-{number}")
    for number, (function, sample) in enumerate(functions_and_samples())
]


@contextlib.contextmanager
def without_data(kind):
    """Takes the data out of a tensor."""
    if kind == "meta":
        yield lambda t: t.to("meta")
    else:
        with FakeTensorMode() as mode:
            yield mode.from_tensor


def results(function, sample):
    """The values; of a loss also its gradients."""
    op = registry.get(function.__name__)
    if op is None:
        return tree_leaves(function(*sample.args, **sample.kwargs))
    loss, *gradients = loss_and_gradients(op, sample)
    return [loss, *gradients]


def described(tensors):
    return [(t.shape, t.dtype, t.stride()) for t in tensors]


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("function, sample", CASES)
@pytest.mark.filterwarnings("ignore:there are no:UserWarning")
def test_shapes_dtypes_and_strides_are_those_of_tensors_with_data(function, sample, kind):
    if "indexes" in sample.kwargs:  # their values say how many queries there are
        with without_data(kind) as take, pytest.raises(NotImplementedError, match="indexes must have values"):
            results(function, map_tensors(take, sample))
        return
    expected = described(results(function, sample))
    with without_data(kind) as take:
        found = results(function, map_tensors(take, sample))
    assert described(found) == expected
    assert all(t.is_meta if kind == "meta" else type(t) is not torch.Tensor for t in found)


def test_nested_queries_say_how_many_they_are(device):
    x = torch.nested.nested_tensor([torch.rand(2), torch.rand(3)], layout=torch.jagged).to("meta")
    found = ranking_metrics(x, x, "mrr", reduction="none")["mrr"]
    assert found.is_meta and found.shape == (2,)
    holes = torch.nested.narrow(torch.rand(2, 4), 1, 0, torch.tensor([2, 3]), layout=torch.jagged).to("meta")
    with pytest.raises(NotImplementedError, match="preds must have values"):
        ranking_metrics(holes, holes, "mrr")
