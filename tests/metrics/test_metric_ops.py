"""What every metric must do: each registered one, with each of its sample inputs. Values are in other files."""

import pytest
import torch
from contract import DTYPES
from test_ops import LAYOUTS, assert_same, map_tensors, tensors_of
from torch.utils._pytree import tree_leaves, tree_map_only

import torchfast  # noqa: F401  (registers the ops)
from torchfast import selftest
from torchfast._register import metrics

SAMPLED = {name: metric for name, metric in metrics.items() if metric.function}
every_sample = pytest.mark.parametrize(
    "metric, number",
    [
        pytest.param(metric, number, id=f"{name}-{number}")
        for name, metric in SAMPLED.items()
        for number, _ in enumerate(metric.sample_inputs())
    ],
)


def take(metric, number, device, dtype=torch.float32):
    return list(metric.sample_inputs(device, dtype))[number]


def values(metric, sample):
    return tree_leaves(metric.function(*sample.args, **sample.kwargs))


def calls_of(metric, sample):
    with selftest.Recorder() as recorder:
        values(metric, sample)
    assert recorder.calls
    return recorder.calls


def test_the_samples_reach_every_op(device):
    reached = {
        op.name for metric in SAMPLED.values() for s in metric.sample_inputs(device) for op, *_ in calls_of(metric, s)
    }
    assert reached == set(metrics)


@every_sample
@pytest.mark.once
def test_opcheck(metric, number, device):
    for op, inputs, _ in calls_of(metric, take(metric, number, device)):
        requiring = tree_map_only(
            torch.Tensor, lambda t: t.detach().requires_grad_() if t.is_floating_point() else t, inputs
        )
        torch.library.opcheck(op.op, tuple(requiring))


@every_sample
def test_the_fake_kernel_describes_outputs_exactly(metric, number, device):
    """And the reference gives the same on meta tensors, so it reads no data where that would make a GPU wait."""
    for op, inputs, outputs in calls_of(metric, take(metric, number, device)):
        if op.name == "group_by_query":  # how many queries there are is data
            continue
        on_meta = tree_map_only(torch.Tensor, lambda t: t.to("meta"), inputs)
        described_by = [op.op] if op.name == "metrics_of_ranks" else [op.op, op.reference]  # how many are tied is data
        for described in (of(*on_meta) for of in described_by):
            for real, meta in zip(outputs, tree_leaves(described), strict=True):
                assert (meta.device.type, meta.shape, meta.dtype, meta.stride()) == (
                    "meta",
                    real.shape,
                    real.dtype,
                    real.stride(),
                )


@every_sample
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.once("reference")
def test_the_kernel_is_the_reference_in_every_dtype(metric, number, dtype, device):
    for largest, failure in selftest._comparisons(metric, take(metric, number, device, dtype)):
        assert not failure and largest < 1, failure


@every_sample
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_any_strides_give_the_same_values(metric, number, layout, device):
    sample = take(metric, number, device)
    moved = {"transposed", "sliced", "offset"} & {layout.__name__}  # the others change the values
    sample = map_tensors(lambda t: layout(t) if moved or t.dim() == 2 else t, sample)
    contiguous = map_tensors(lambda t: t.contiguous().clone(), sample)
    assert_same(values(metric, sample), values(metric, contiguous))


@every_sample
def test_inputs_are_never_written_to(metric, number, device):
    sample = take(metric, number, device)
    before = [(t, t.clone(), t._version) for t in tensors_of(sample)]
    values(metric, sample)
    for t, copy, version in before:
        assert_same([t], [copy])
        assert t._version == version


@every_sample
def test_outputs_do_not_depend_on_what_memory_held_before(metric, number, device):
    sample = take(metric, number, device)
    expected = values(metric, sample)
    torch.use_deterministic_algorithms(True)  # torch.empty then fills with NaN
    try:
        assert_same(values(metric, sample), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@every_sample
def test_bitwise_deterministic_over_runs_and_threads(metric, number, device):
    sample = take(metric, number, device)
    expected = values(metric, sample)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2, 1):
            torch.set_num_threads(count)
            assert_same(values(metric, sample), expected)
    finally:
        torch.set_num_threads(threads)
