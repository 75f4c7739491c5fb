"""What every op must do: each registered op, with each of its sample inputs.

Tolerances: the sample logits stay below 10, so a value computed in fp32 carries at most a few dozen
roundings of its largest term (`ROUNDINGS`), and a half-precision gradient one rounding of its own. Where products of
matrices are rounded to half precision on the way, `torchfast.selftest` has the tolerance.
"""

import itertools

import pytest
import torch
from contract import DTYPES, HALF, upstream_of
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from torchfast import selftest
from torchfast._register import Sample, registry

ROUNDINGS = 64
CASES = [
    pytest.param(op, number, id=f"{name}-{number}")
    for name, op in registry.items()
    for number, _ in enumerate(op.sample_inputs())
]
every_sample = pytest.mark.parametrize("op, number", CASES)
every_op = pytest.mark.parametrize("op", registry.values(), ids=registry)


def take(op, number, device, dtype=torch.float32):
    return list(op.sample_inputs(device, dtype))[number]


def map_tensors(function, sample):
    return Sample(*tree_map_only(Tensor, function, (sample.args, sample.kwargs)))


def tensors_of(sample):
    return [leaf for leaf in tree_flatten((sample.args, sample.kwargs))[0] if isinstance(leaf, Tensor)]


def differentiable(op, sample):
    """The leaves that a sample's loss is differentiated by, and the loss as a function of these."""
    inputs, function = op.partial(sample)
    return [x.detach().requires_grad_() for x in inputs], function


def loss_and_gradients(op, sample, function=None):
    """The loss, and its gradients with an uneven upstream gradient."""
    leaves, call = differentiable(op, sample)
    loss = call(*leaves, function=function or op.function)
    return loss.detach(), *torch.autograd.grad(loss, leaves, upstream_of(loss))


def assert_same(actual, expected):
    """Bitwise, NaN included."""
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_rounded(actual, expected):
    """Equal but for the roundings of the dtype that sums are computed in."""
    for a, b in zip(actual, expected, strict=True):
        eps = torch.finfo(torch.float64 if a.dtype == torch.float64 else torch.float32).eps
        atol = ROUNDINGS * eps * max(1.0, b.abs().max().item())
        rtol = torch.finfo(a.dtype).eps if a.dtype in HALF else 0
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol)


# ---- The dispatcher's rules ------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Records the arguments with which ops are called, below autograd."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] = tree_map_only(Tensor, Tensor.detach, args)
        return func(*args, **(kwargs or {}))


@every_sample
@pytest.mark.once
def test_opcheck_of_forward_and_backward(op, number, device):
    sample = take(op, number, device)
    with Recorder() as recorder, torch.no_grad():
        op.function(*sample.args, **sample.kwargs)
    inputs = list(recorder.calls[op.forward])
    given = [x is not None for x in inputs[: op.differentiable]]
    if op.differentiable > 1:
        inputs[-1] = given  # all gradients
    loss, *residuals = op.forward(*inputs)
    call = (upstream_of(loss), *inputs, *residuals)
    found = op.backward(*call)
    torch.library.opcheck(op.backward, call)
    leaves = [x.requires_grad_() for x in inputs[: op.differentiable] if x is not None]
    gradients = torch.autograd.grad(op(*inputs), leaves, upstream_of(loss))  # which the forward may have computed
    assert_rounded([found] if op.differentiable == 1 else itertools.compress(found, given), gradients)
    torch.library.opcheck(op.forward, tuple(inputs))
    if op.with_gradient and not loss.dim():
        checks = ("test_schema", "test_faketensor")  # autograd does not pass through it
        torch.library.opcheck(
            op.with_gradient, (*(x.detach() if x is leaves[0] else x for x in inputs), 1.0), test_utils=checks
        )


@every_sample
def test_meta_tensors_give_shapes_and_dtypes_and_read_no_data(op, number, device):
    """A data-dependent branch (.item(), bool(tensor)) would raise here, and synchronise a GPU."""
    sample = take(op, number, device, torch.bfloat16)
    on_meta = map_tensors(lambda t: t.to("meta"), sample)
    for real, meta in zip(loss_and_gradients(op, sample), loss_and_gradients(op, on_meta), strict=True):
        assert (meta.device.type, meta.shape, meta.dtype, meta.stride()) == (
            "meta",
            real.shape,
            real.dtype,
            real.stride(),
        )
    with Recorder() as recorder, torch.no_grad():
        op.function(*sample.args, **sample.kwargs)
    arguments = tree_map_only(Tensor, lambda t: t.to("meta"), recorder.calls[op.forward])
    assert op.reference(*arguments)[0].device.type == "meta"


# ---- Derivatives -----------------------------------------------------------------------------


@every_sample
@pytest.mark.once("native", "triton")
def test_gradients_and_forward_mode_match_finite_differences(op, number, device):
    leaves, function = differentiable(op, take(op, number, device, torch.float64))
    # fast_mode checks random projections instead of every element.
    fast = leaves[0].numel() > 100
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, fast_mode=fast)


@every_sample
@pytest.mark.once("native", "triton")
def test_second_derivative_matches_finite_differences(op, number, device):
    """opcheck passes with a wrong double backward; this does not."""
    leaves, function = differentiable(op, take(op, number, device, torch.float64))
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=leaves[0].numel() > 100)


@every_sample
@pytest.mark.once
def test_func_grad_and_vmap_of_grad(op, number, device):
    sample = take(op, number, device)
    inputs, function = op.partial(sample)
    places = tuple(range(len(inputs)))

    def total(*inputs):
        loss = function(*inputs)
        return (loss * upstream_of(loss)).sum()

    x, *others = inputs
    _, *expected = loss_and_gradients(op, sample)
    assert_rounded(torch.func.grad(total, places)(*inputs), expected)
    batch = torch.stack([x, -0.5 * x])
    alone = [torch.func.grad(total, places)(one, *others) for one in batch]
    batched = torch.func.vmap(torch.func.grad(total, places), (0, *[None] * len(others)))(batch, *others)
    assert_rounded(batched, map(torch.stack, zip(*alone, strict=True)))


@every_sample
@pytest.mark.once
def test_jvp_and_dual_numbers_are_adjoint_to_the_gradient(op, number, device):
    sample = take(op, number, device, torch.float64)
    inputs, function = op.partial(sample)
    tangents = tuple(map(torch.randn_like, inputs))
    _, *gradients = loss_and_gradients(op, sample)
    expected = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    loss, pushed = torch.func.jvp(function, tuple(inputs), tangents)
    assert_rounded([(pushed * upstream_of(loss)).sum()], [expected])
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(function(*map(forward_ad.make_dual, inputs, tangents)))
        assert dual.tangent is not None
        assert_rounded([(dual.tangent * upstream_of(loss)).sum()], [expected])


@every_sample
def test_retained_graph_gives_the_same_gradients_twice(op, number, device):
    leaves, function = differentiable(op, take(op, number, device))
    loss = function(*leaves)
    once = torch.autograd.grad(loss, leaves, upstream_of(loss), retain_graph=True)
    kept = [g.clone() for g in once]
    twice = torch.autograd.grad(loss, leaves, upstream_of(loss))
    assert_same([*twice, *once], [*kept, *kept])


@every_sample
@pytest.mark.parametrize("layout", ["expanded", "sliced", "transposed"])
def test_upstream_gradient_of_any_layout(op, number, layout, device):
    leaves, function = differentiable(op, take(op, number, device))
    loss = function(*leaves)
    upstream = {
        "expanded": lambda: torch.full((), 0.75, device=device).expand(loss.shape),
        "sliced": lambda: sliced(upstream_of(loss)),
        "transposed": lambda: transposed(upstream_of(loss)),
    }[layout]()
    expected = torch.autograd.grad(loss, leaves, upstream.contiguous().clone(), retain_graph=True)
    actual = torch.autograd.grad(loss, leaves, upstream)
    assert_same(actual, expected)


# ---- dtypes ----------------------------------------------------------------------------------


@every_sample
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_is_at_least_fp32_and_gradients_have_the_dtype_of_the_input(op, number, dtype, device):
    loss, *gradients = loss_and_gradients(op, take(op, number, device, dtype))
    assert loss.dtype == (torch.float32 if dtype in HALF else dtype)
    assert {gradient.dtype for gradient in gradients} == {dtype}


@every_sample
@pytest.mark.parametrize("dtype", (*HALF, torch.float32), ids=str)
def test_low_precision_is_near_fp64_of_the_same_inputs(op, number, dtype, device):
    sample = take(op, number, device, dtype)
    wide = map_tensors(lambda t: t.double() if t.is_floating_point() else t, sample)
    found, truth = ([t.cpu() for t in loss_and_gradients(op, of)] for of in (sample, wide))
    if op.around:  # products of matrices may be rounded to half precision
        each = zip(found, truth, selftest._sizes(op, sample, truth), strict=True)
        assert all(selftest.errors(*of, dtype).max() <= 1 for of in each)
        return
    assert_rounded(found, truth)


@every_sample
@pytest.mark.once
def test_autocast_saves_no_fp32_copy_of_the_input(op, number, device):
    sample = take(op, number, device, torch.bfloat16)
    x = sample.args[0]
    expected = loss_and_gradients(op, sample)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks, torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        actual = loss_and_gradients(op, sample)
    assert_same(actual, expected)
    assert saved
    if x.numel() > 200:  # of a tiny input, what is kept per row may be as large
        assert not [t for t in saved if t.is_floating_point() and t.element_size() > 2 and t.numel() >= x.numel()]


# ---- Memory: layouts, what is read and what is written ---------------------------------------


def poison(t):
    if t.dtype == torch.bool:
        return True
    return float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max


def transposed(t):
    return t.movedim(0, -1).contiguous().movedim(-1, 0) if t.dim() > 1 else t


def sliced(t):
    """Every second element of storage whose other elements must not be read."""
    storage = t.new_full((*t.shape, 2), poison(t))
    storage[..., 1] = t
    return storage[..., 1]


def offset(t):
    """Storage that starts at an odd element: no vector load is aligned."""
    storage = t.new_full((t.numel() + 2,), poison(t))
    storage[1:-1] = t.flatten()
    return storage[1:-1].view(t.shape)


def expanded_rows(t):
    return t[:1].expand(t.shape) if t.dim() else t


def expanded_last(t):
    return t[..., :1].expand(t.shape) if t.dim() else t


LAYOUTS = (transposed, sliced, offset, expanded_rows, expanded_last)


@every_sample
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_any_strides_give_the_same_values(op, number, layout, device):
    sample = map_tensors(layout, take(op, number, device))
    contiguous = map_tensors(lambda t: t.contiguous().clone(), sample)
    actual = loss_and_gradients(op, sample)
    assert_rounded(actual, loss_and_gradients(op, contiguous))
    for gradient, x in zip(actual[1:], op.partial(sample)[0], strict=True):
        if not op.around or x.dim() < 3:  # where dimensions are merged into rows, the gradient's are those of the copy
            assert gradient.stride() == torch.empty_like(x).stride()


@every_sample
def test_inputs_are_never_written_to(op, number, device):
    sample = take(op, number, device)
    before = [(t, t.clone(), t._version) for t in tensors_of(sample)]
    loss_and_gradients(op, sample)
    for t, copy, version in before:
        assert torch.equal(t, copy) and t._version == version


@every_sample
def test_outputs_do_not_depend_on_what_memory_held_before(op, number, device):
    """Twice: fresh tensors filled with NaN by torch itself, and freed memory full of NaN."""
    sample = take(op, number, device)
    expected = loss_and_gradients(op, sample)
    torch.use_deterministic_algorithms(True)  # torch.empty then fills with NaN
    try:
        assert_same(loss_and_gradients(op, sample), expected)
    finally:
        torch.use_deterministic_algorithms(False)
    for _ in range(3):
        litter = [torch.full_like(t, torch.nan) for t in (*expected, *tensors_of(sample)[:1]) for _ in range(8)]
        del litter
        assert_same(loss_and_gradients(op, sample), expected)


@every_sample
def test_bitwise_deterministic_over_runs_and_threads(op, number, device):
    sample = take(op, number, device)
    expected = loss_and_gradients(op, sample)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2, 1):
            torch.set_num_threads(count)
            assert_same(loss_and_gradients(op, sample), expected)
    finally:
        torch.set_num_threads(threads)


@every_sample
def test_empty_batch(op, number, device):
    """No rows: a loss without elements, or the empty sum 0, or the empty mean NaN; an empty gradient, others of 0."""
    sample = take(op, number, device)
    if sample.args[0].dim() == 1:  # one row without a batch dimension: nothing can be empty
        return
    rows = len(sample.args[0])
    empty = map_tensors(lambda t: t[:0] if t.dim() and len(t) == rows else t, sample)
    loss, gradient, *others = loss_and_gradients(op, empty)
    assert loss.dim() == loss_and_gradients(op, sample)[0].dim()
    assert loss.numel() == 0 or loss == 0 or loss.isnan()
    assert gradient.shape == empty.args[0].shape and gradient.numel() == 0
    assert not any(other.any() for other in others)


# ---- torch.compile ---------------------------------------------------------------------------


def compile_groups(op):
    """Samples that differ in nothing but the sizes: one compiled function must serve them all."""
    groups = {}
    for sample in op.sample_inputs():
        leaves, structure = tree_flatten((sample.args, sample.kwargs))
        key = (str(structure), *((leaf.dim(), leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves))
        groups.setdefault(key, []).append(sample)
    return [group for group in groups.values() if len(group) > 1]


@every_op
@pytest.mark.once
def test_compiles_as_one_graph_for_all_shapes(op, device):
    groups = compile_groups(op)
    assert groups
    for group in groups[:3]:
        torch._dynamo.reset()
        compiled = torch.compile(op.function, fullgraph=True, dynamic=True)
        for sample in group:
            sample = map_tensors(lambda t: t.to(device), sample)
            actual, expected = loss_and_gradients(op, sample, compiled), loss_and_gradients(op, sample)
            assert_rounded(actual, expected)
