"""Every dtype and layout that torch has, in every tensor argument: a right result or an error that says what is wrong.

Of the public functions, and of the dispatcher's ops, which anyone may call. A kernel that takes a dtype for another one
reads beyond the end of its tensor, so it gives other numbers than the reference, if it does not crash.
"""

import inspect
import warnings

import pytest
import torch
from test_ops import ROUNDINGS, Recorder
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import torchfast
from torchfast import _register
from torchfast._register import Sample
from torchfast.metrics import ranking_metrics

DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
REFUSED = (TypeError, ValueError, IndexError)


# ---- Which arguments: of all samples, and of some that have what these lack ----------------------


def more_samples():
    """Tensors that the registered samples do not give."""
    x, t = torch.linspace(-2, 2, 15).reshape(5, 3), torch.arange(5) % 3
    yield torchfast.cross_entropy, Sample((x, t), {"normalizer": torch.tensor(3.0)})
    yield torchfast.linear_cross_entropy, Sample((x, x[:4], t), {"normalizer": torch.tensor(3.0)})
    y = torch.arange(15).reshape(5, 3) % 2
    yield torchfast.sigmoid_focal_loss, Sample((x, y), {"normalizer": torch.tensor(3.0), "reduction": "mean"})
    names = ("ndcg", "mrr", "recall@2")
    yield ranking_metrics, Sample((x, y, names), {"gain": torch.tensor([0.0, 1.0]), "query_weight": torch.ones(5)})
    yield ranking_metrics, Sample((x, y, names), {"unretrieved": (y.reshape(-1), torch.arange(6) * 3)})


def functions_and_samples():
    for op in _register.registry.values():
        yield from ((op.function, sample) for sample in op.sample_inputs())
    for metric in _register.metrics.values():
        yield from ((metric.function, sample) for sample in metric.sample_inputs() if metric.function)
    yield from more_samples()


def named(function, sample):
    """Argument by name."""
    return dict(inspect.signature(function).bind(*sample.args, **sample.kwargs).arguments)


def cases_of_functions():
    """One for each function, argument and kind of tensor in it."""
    found = {}
    for function, sample in functions_and_samples():
        arguments = named(function, sample)
        for name, value in arguments.items():
            for place, leaf in enumerate(tree_leaves(value)):
                if isinstance(leaf, Tensor):
                    key = (function.__name__, name, place, str(leaf.dtype).removeprefix("torch."))
                    found.setdefault(key, (function, arguments, name, place))
    return found


OF_FUNCTIONS = cases_of_functions()


def test_every_tensor_argument_is_tested():
    for function in {function for function, *_ in OF_FUNCTIONS.values()}:
        parameters = inspect.signature(function).parameters.values()
        kinds = "Tensor", "Unretrieved", "ItemIds"
        wanted = {p.name for p in parameters if any(kind in str(p.annotation) for kind in kinds)}
        assert wanted == {name for of, _, name, _ in OF_FUNCTIONS.values() if of is function}


# ---- Tensors of any dtype and layout ---------------------------------------------------------------


def of_dtype(t, dtype):
    """The values, or where torch cannot convert them, any."""
    if t.is_floating_point() and dtype in (torch.uint8, torch.uint16, torch.uint32, torch.uint64):
        t = t.abs()  # what becomes of a negative number is undefined
    try:
        return t.to(dtype)
    except (RuntimeError, NotImplementedError):
        pass
    try:
        return torch._empty_affine_quantized(t.shape, scale=1.0, zero_point=0, dtype=dtype)
    except (RuntimeError, NotImplementedError):
        return torch.zeros(*t.shape, dtype.itemsize, dtype=torch.uint8).view(dtype).reshape(t.shape)


has_mkldnn = torch.backends.mkldnn.is_available()
LAYOUTS = {
    "sparse_coo": lambda t: t.to_sparse(),
    "sparse_csr": lambda t: t.to_sparse_csr() if t.dim() == 2 else None,
    "sparse_bsr": lambda t: t.to_sparse_bsr((1, 1)) if t.dim() == 2 else None,
    "mkldnn": lambda t: t.to_mkldnn() if has_mkldnn and t.dtype == torch.float32 and t.dim() else None,
    "jagged": lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged) if t.dim() == 2 else None,
    "nested": lambda t: torch.nested.nested_tensor(list(t)) if t.dim() > 0 else None,
}
VARIANTS = [str(dtype).removeprefix("torch.") for dtype in DTYPES] + list(LAYOUTS)


def variant_of(t, name):
    """None where there is none of the tensor."""
    return LAYOUTS[name](t) if name in LAYOUTS else of_dtype(t, getattr(torch, name))


def replaced(tree, place, by):
    leaves, structure = tree_flatten(tree)
    return tree_unflatten([by if i == place else leaf for i, leaf in enumerate(leaves)], structure)


def outcome(function, *args, **kwargs):
    """A list of tensors, or an exception."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # complex numbers lose their imaginary part, areas are undefined
        try:
            return tree_leaves(function(*args, **kwargs))
        except Exception as error:
            return error


def assert_equal_but_for_rounding(actual, expected, what):
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape, what
        eps = torch.finfo(torch.float64 if a.dtype == b.dtype == torch.float64 else torch.float32).eps
        most = b.double().abs().nan_to_num(0, 0, 0).max().item() if b.numel() else 0
        rtol = torch.finfo(a.dtype).eps if a.is_floating_point() or a.is_complex() else 0
        tolerance = {"rtol": rtol, "atol": ROUNDINGS * eps * max(1.0, most)}
        torch.testing.assert_close(a.double(), b.double(), **tolerance, equal_nan=True, msg=lambda m: f"{what}: {m}")


@pytest.fixture
def by_reference(monkeypatch):
    """Has the public functions computed by plain PyTorch."""

    def of_metric(self, *inputs):
        found = self.reference(*inputs)
        return found if len(found) > 1 else found[0]

    def by_reference(function, **arguments):
        with monkeypatch.context() as patch:
            patch.setattr(_register.Op, "__call__", lambda self, *inputs: self.reference(*inputs)[0])
            patch.setattr(_register.Metric, "__call__", of_metric)
            return outcome(function, **arguments)

    return by_reference


# ---- The public functions --------------------------------------------------------------------------


@pytest.mark.parametrize("case", OF_FUNCTIONS.values(), ids=map("-".join, [map(str, key) for key in OF_FUNCTIONS]))
def test_any_dtype_and_layout_is_right_or_refused_by_the_name_of_the_argument(case, by_reference, device):
    function, arguments, name, place = case
    tested = 0
    for variant in VARIANTS:
        changed = variant_of(tree_leaves(arguments[name])[place], variant)
        if changed is None:
            continue
        given = {**arguments, name: replaced(arguments[name], place, changed)}
        actual, expected = outcome(function, **given), by_reference(function, **given)
        tested += 1
        if isinstance(expected, Exception) or isinstance(actual, Exception):
            assert type(actual) is type(expected), f"{variant}: {actual!r}, of the reference {expected!r}"
            assert isinstance(actual, REFUSED) and name.removesuffix("s") in str(actual), f"{variant}: {actual!r}"
        else:
            assert [t.dtype for t in actual] == [t.dtype for t in expected], variant
            assert_equal_but_for_rounding(actual, expected, variant)
    assert tested > len(DTYPES)


EMBEDDINGS = "input", "inputs", "preds", "queries", "items"  # what is multiplied or ranked


def test_the_values_of_float8_are_those_of_float32(device):
    """The reference might read them wrongly too."""
    for (_, name, _, dtype), (function, arguments, *_) in OF_FUNCTIONS.items():
        if dtype != "float32" or not isinstance(arguments[name], Tensor) or name in EMBEDDINGS:
            continue
        narrow = arguments[name].to(torch.float8_e4m3fn)
        actual, expected = (outcome(function, **{**arguments, name: t}) for t in (narrow, narrow.float()))
        if isinstance(actual, TypeError):  # a classifier
            assert name in ("linear_weight", "linear_bias")
        else:
            assert_equal_but_for_rounding(actual, expected, f"{function.__name__}: {name}")


def test_a_float8_target_of_many_documents_is_read_within_its_memory(device):
    """It was read as float64, eight times as long."""
    preds, target = torch.randn(1, 10**7, device=device), torch.zeros(1, 10**7, device=device).to(torch.float8_e4m3fn)
    target[0, preds.argmax()] = 1
    assert ranking_metrics(preds, target, "mrr")["mrr"].item() == 1


# ---- The dispatcher's ops ----------------------------------------------------------------------------


def calls_of_ops():
    """One for each op, argument and kind of tensor in it."""
    found = {}
    for function, sample in functions_and_samples():
        first, *rest = sample.args
        differentiable = function.__module__.startswith("torchfast.losses")
        with Recorder() as recorder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = function(first.detach().clone().requires_grad_(differentiable), *rest, **sample.kwargs)
            if differentiable:
                result.sum().backward()
        for op, args in recorder.calls.items():
            if op.namespace != "torchfast":
                continue
            for place, (argument, value) in enumerate(zip(op._schema.arguments, args, strict=True)):
                if isinstance(value, Tensor):
                    key = (op._opname, argument.name, str(value.dtype).removeprefix("torch."))
                    found.setdefault(key, (op, args, place))
    return found


def in_a_dtype_that_kernels_read(t):
    """The same values."""
    if t.dtype == torch.bool:
        return t
    if t.is_floating_point() or t.is_complex():
        return t.double() if t.dtype in (torch.float64, torch.complex128) else t.float()
    return t.long()


def outputs_of(op, args):
    """And of an op that writes over an argument, this one."""
    args = [t.clone() if of.is_write else t for t, of in zip(args, op._schema.arguments, strict=True)]
    found = outcome(op, *args)
    if isinstance(found, Exception):
        return found
    return found + [t for t, of in zip(args, op._schema.arguments, strict=True) if of.is_write]


def test_ops_called_directly_read_any_dtype_as_its_values_or_raise(device):
    cases = calls_of_ops()
    assert {op for op, *_ in cases} >= set(_register.registry) | set(_register.metrics)
    right = 0
    for (name, argument, _), (op, args, place) in cases.items():
        for dtype in DTYPES:
            changed = of_dtype(args[place], dtype)
            actual = outputs_of(op, [changed if i == place else t for i, t in enumerate(args)])
            if isinstance(actual, Exception) or changed.is_quantized:  # these never come to the kernels of the CPU
                continue
            try:
                changed = in_a_dtype_that_kernels_read(changed)
            except NotImplementedError:  # of bits, which torch does not read either: the op has not looked
                changed = args[place]
            expected = outputs_of(op, [changed if i == place else t for i, t in enumerate(args)])
            what = f"{name}: {argument} in {dtype}"
            assert not isinstance(expected, Exception), f"{what}: {expected!r}"
            assert_equal_but_for_rounding(actual, expected, what)
            right += 1
    assert right > 3 * len(cases)
