"""Users trust a GPU that we never saw because of selftest: it must pass right kernels and fail wrong ones."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torchfast import selftest
from torchfast._options import as_object
from torchfast._register import Sample, metrics, registry
from torchfast.losses.cross_entropy import reference as plain
from torchfast.losses.linear_cross_entropy.chunks import forward

reference = registry["cross_entropy"].reference
reference_backward = as_object(plain.reference_backward, registry["cross_entropy"].options, 6)
linear_forward = as_object(forward, registry["cross_entropy"].options, 7)
COUNTS = ("class_counts", "label_counts")  # of which every digit is right
DTYPES = ("float16", "bfloat16", "float32", "float64")
pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")  # of planted kernels


def run(*options: str) -> subprocess.CompletedProcess[str]:
    """As a user runs it, with the kernels under test: their environment variables are inherited."""
    command = [sys.executable, "-m", "torchfast.selftest", *options]
    return subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=600)


def checks_only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Leaves selftest these ops: all of them, with their large samples, take a minute."""
    monkeypatch.setattr(selftest, "checked", lambda: {name: {**registry, **metrics}[name] for name in names})
    sample_inputs = registry["cross_entropy"].sample_inputs
    sampled(monkeypatch, lambda device, dtype, large: sample_inputs(device, dtype))


@pytest.fixture
def report(
    capsys: pytest.CaptureFixture[str], device: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], tuple[int, dict[str, Any]]]:
    """Runs it in this process, on the small samples of cross_entropy alone: exit code, and row by dtype."""
    checks_only(monkeypatch, "cross_entropy")

    def run_here() -> tuple[int, dict[str, Any]]:
        code = selftest.main(["--json", "--device", device])
        rows = json.loads(capsys.readouterr().out)["rows"]
        return code, {row["dtype"]: row for row in rows}

    return run_here


@contextlib.contextmanager
def planted(
    device: str,
    forward: Callable[..., Any] = reference,
    backward: Callable[..., Any] = reference_backward,
    backward_: Callable[..., Any] = lambda grad, x, *rest: x.copy_(reference_backward(grad, x, *rest)),
    with_gradient: Callable[..., Any] | None = None,
) -> Iterator[None]:
    """These kernels in place of those of cross_entropy. The defaults are right."""

    def without_output(*args: Any) -> None:
        backward_(*args)

    def one_after_the_other(*inputs_and_upstream: Any) -> tuple[Tensor, ...]:
        *inputs, upstream = inputs_and_upstream
        loss, *residuals = forward(*inputs)
        return loss, *residuals, backward(torch.full_like(loss, upstream), *inputs, *residuals)

    kernels = {"": forward, "_backward": backward, "_backward_": without_output}
    kernels["_with_gradient"] = with_gradient or one_after_the_other
    with torch.library._scoped_library("torchfast", "IMPL") as library:
        for suffix, kernel in kernels.items():
            library.impl(f"cross_entropy{suffix}", kernel, torch.device(device).type.upper(), allow_override=True)
        yield


def with_loss(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A forward kernel that is wrong about the loss alone."""

    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        loss, *residuals = reference(*inputs)
        return change(loss), *residuals

    return forward


def with_gradient(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda *inputs: change(reference_backward(*inputs))


def both(*inputs: Any) -> tuple[Tensor, ...]:
    *others, upstream = inputs
    loss, *residuals = reference(*others)
    return loss, *residuals, reference_backward(torch.full_like(loss, upstream), *others, *residuals)


def without_last_class(gradient: Tensor) -> Tensor:
    """What a mask that is one short leaves behind."""
    gradient = gradient.clone()
    gradient.select(min(1, gradient.dim() - 1), -1).zero_()
    return gradient


def serving(op: str, kernel: str, metrics_kernel: str | set[str]) -> str:
    if op in registry:
        return kernel
    if isinstance(metrics_kernel, str):
        return metrics_kernel
    return "native" if op == "ranking_metrics" and "native" in metrics_kernel else "reference"  # on CUDA GPUs


# ---- Right kernels ---------------------------------------------------------------------------


def test_the_kernels_of_this_machine_pass_for_every_op_device_and_dtype(
    kernel: str, metrics_kernel: str, device: str
) -> None:
    result = run()
    assert result.returncode == 0, result.stdout + result.stderr
    *_, header, rows = result.stdout.partition("verdict\n")
    assert header
    found = {(op, on, dtype): (of, verdict) for op, on, of, dtype, *_, verdict in map(str.split, rows.splitlines())}
    assert found.keys() == {
        (op, on, dtype) for op in selftest.checked() for on in selftest.available_devices() for dtype in DTYPES
    }
    assert {verdict for _, verdict in found.values()} == {"ok"}
    served = {op: of for (op, on, _), (of, _) in found.items() if on == device}
    assert served == {op: serving(op, kernel, metrics_kernel) for op in selftest.checked()}


@pytest.mark.once
def test_json_holds_every_row_of_the_wanted_device(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kernel: str, metrics_kernel: str, device: str
) -> None:
    checks_only(monkeypatch, "cross_entropy", "linear_cross_entropy", "class_counts", "regression_moments")
    assert selftest.main(["--json", "--device", device]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["passed"] is True
    assert [(row["op"], row["dtype"]) for row in content["rows"]] == [
        (op, dtype) for op in selftest.checked() for dtype in DTYPES
    ]
    for row in content["rows"]:
        served = serving(row["op"], kernel, metrics_kernel)
        assert (row["device"], row["kernel"], row["failures"]) == (device, served, [])
        samples = selftest.checked()[row["op"]].sample_inputs(device, torch.float32, large=kernel != "triton")
        assert row["samples"] == len(list(samples)) and row["max_error"] < 1
        # A metric's truth is its reference, in float64 as its values are.
        exact = row["op"] in COUNTS or (row["op"] not in registry and served == "reference")
        assert row["max_error"] > 0 or exact


@pytest.mark.once
def test_planted_kernels_that_are_right_pass(report: Any, device: str) -> None:
    """So what the tests below fail for is what is wrong with their kernels."""
    with planted(device):
        code, rows = report()
    assert code == 0 and rows.keys() == set(DTYPES)


@pytest.mark.once
def test_no_kernel_of_the_device_enters_the_truth(device: str) -> None:
    def unreachable(*_: Any) -> Any:
        raise AssertionError("a kernel under test was asked for the truth")

    op = registry["cross_entropy"]
    for sample in op.sample_inputs(device, torch.bfloat16):
        with planted("cpu", unreachable, unreachable, unreachable):
            for tensor in selftest._truth(op, sample):
                assert (tensor.device.type, tensor.dtype) == ("cpu", torch.float64)


# ---- Wrong kernels ---------------------------------------------------------------------------

WRONG = {
    "loss of the wrong sign": ("loss", {"forward": with_loss(torch.neg)}),
    "loss off by 1e-4": ("loss", {"forward": with_loss(lambda loss: loss * 1.0001)}),
    "NaN loss": ("loss", {"forward": with_loss(lambda loss: loss * torch.nan)}),
    "infinite loss": ("loss", {"forward": with_loss(lambda loss: loss + torch.inf)}),
    "loss in half precision": ("loss", {"forward": with_loss(lambda loss: loss.to(torch.bfloat16))}),
    "loss of the wrong shape": ("loss", {"forward": with_loss(lambda loss: loss[None])}),
    "gradient of the wrong sign": ("gradient", {"backward": with_gradient(torch.neg)}),
    "gradient off by 2%": ("gradient", {"backward": with_gradient(lambda gradient: gradient * 1.02)}),
    "NaN gradient": ("gradient", {"backward": with_gradient(lambda gradient: gradient * torch.nan)}),
    "gradient of one class missing": ("gradient", {"backward": with_gradient(without_last_class)}),
    "gradient of an even upstream": (
        "gradient",
        {"backward": lambda grad, *rest: reference_backward(grad.mean().expand_as(grad), *rest)},
    ),
    "gradient with the loss of another upstream": (
        "gradient( with the loss)?",
        {"with_gradient": lambda *inputs: both(*inputs[:-1], 1.0)},
    ),
    "gradient in place not written": ("gradient in place", {"backward_": lambda *_: None}),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.once
def test_a_wrong_kernel_fails_in_every_dtype_and_is_named(wrong: str, report: Any, device: str) -> None:
    output, kernels = WRONG[wrong]
    with planted(device, **kernels):
        code, rows = report()
    assert code == 1
    for dtype in DTYPES:
        assert rows[dtype]["failures"], f"{dtype} passed"
        assert re.match(rf"sample \d+: {output}(\[.*\])? is ", rows[dtype]["failures"][0])
        assert rows[dtype]["max_error"] is None or rows[dtype]["max_error"] > 1


@pytest.mark.parametrize("wrong", [torch.zeros_like, lambda gradient: gradient * 1.5], ids=["zero", "off by half"])
@pytest.mark.once
def test_a_wrong_small_gradient_fails_in_every_dtype(
    wrong: Any, report: Any, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Only those below 2e-6 are wrong, where the largest is nearly 1."""

    def spread(device: str, dtype: torch.dtype, large: bool) -> Iterator[Sample]:
        x = torch.linspace(0, -14, 70).to(device, dtype)
        yield Sample((x[None], torch.tensor([9], device=device)), {"reduction": "sum"})

    def small(gradient: Tensor) -> Tensor:
        return torch.where(gradient.abs() < 2e-6, wrong(gradient), gradient)

    sampled(monkeypatch, spread)
    with planted(device):
        assert report()[0] == 0
    with planted(device, backward=with_gradient(small)):
        code, rows = report()
    assert code == 1
    for dtype in DTYPES:
        names = [failure.partition("[")[0] for failure in rows[dtype]["failures"]]
        assert names == ["sample 0: gradient", "sample 0: gradient with the loss"]


@pytest.mark.once
def test_the_table_says_which_row_failed_and_how(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    checks_only(monkeypatch, "cross_entropy", "linear_cross_entropy", "class_counts")
    with planted(device, forward=with_loss(torch.neg)):
        assert selftest.main(["--device", device]) == 1
    table, *details = capsys.readouterr().out.split("\n\n")
    rows = [line.split() for line in table.splitlines() if line.startswith("cross_entropy")]
    assert [(row[3], row[-1]) for row in rows] == [(dtype, "FAIL") for dtype in DTYPES]
    assert details[0].startswith(f"cross_entropy, {device}, float16: ")
    assert "sample 0: loss is -" in details[0] and "--json shows all" in details[0]
    assert len(details[0].splitlines()) == 1 + selftest.SHOWN + 1
    assert details[-1].startswith("8 of ")  # linear_cross_entropy is served by the same kernels


@pytest.mark.once
def test_an_exception_fails_its_row_and_the_others_still_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    checks_only(monkeypatch, "cross_entropy", "regression_moments")

    def forward(logits: Tensor, *rest: Any) -> Any:
        if logits.dtype == torch.bfloat16:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return reference(logits, *rest)

    with planted(device, forward=forward):
        assert selftest.main(["--device", device]) == 1
    output = capsys.readouterr().out
    rows = [line.split() for line in output.splitlines() if line.startswith("cross_entropy ")]
    assert {row[3]: row[-1] for row in rows} == {dtype: "FAIL" if dtype == "bfloat16" else "ok" for dtype in DTYPES}
    assert {row[3] for row in rows if row[-2] == "inf"} == {"bfloat16"}
    assert "sample 0: RuntimeError: CUDA error: an illegal memory access was encountered" in output


@pytest.mark.parametrize(
    "wrong",
    [
        lambda values, empty: (values + 1e-6, empty),
        lambda values, empty: (values * torch.nan, empty),
        lambda values, empty: (values, ~empty),
        lambda values, empty: (values[:-1], empty),
    ],
    ids=["values off by 1e-6", "NaN", "empty queries", "shape"],
)
@pytest.mark.once
def test_a_wrong_kernel_of_a_metric_fails_in_every_dtype(wrong: Any, device: str) -> None:
    metric = metrics["ranking_metrics"]
    small = dataclasses.replace(metric, sample_inputs=lambda device, dtype, large: metric.sample_inputs(device, dtype))

    def rows() -> list[selftest.Row]:
        return [selftest.check(small, device, dtype) for dtype in selftest.DTYPES]

    with torch.library._scoped_library("torchfast", "IMPL") as library:
        planted = lambda *inputs: wrong(*metric.reference(*inputs))  # noqa: E731
        library.impl("ranking_metrics", planted, torch.device(device).type.upper(), allow_override=True)
        for row in rows():
            assert row.failures and "ranking_metrics's " in row.failures[0]
    assert not any(row.failures for row in rows())


@pytest.mark.once
def test_a_wrong_gradient_of_a_further_input_is_named(device: str) -> None:
    op = registry["linear_cross_entropy"]
    small = dataclasses.replace(op, sample_inputs=lambda device, dtype, large: op.sample_inputs(device, dtype))

    def wrong(*inputs: Any) -> tuple[Tensor, ...]:
        loss, scale, grad_input, grad_weight, grad_bias = linear_forward(*inputs)
        return loss, scale, grad_input, -grad_weight, grad_bias

    with torch.library._scoped_library("torchfast", "IMPL") as library:
        library.impl("linear_cross_entropy", wrong, torch.device(device).type.upper(), allow_override=True)
        for dtype in selftest.DTYPES:
            assert selftest.check(small, device, dtype).failures[0].startswith("sample 0: gradient of linear_weight[")


# ---- Samples ---------------------------------------------------------------------------------


def sampled(monkeypatch: pytest.MonkeyPatch, sample_inputs: Callable[..., Any]) -> None:
    op = dataclasses.replace(registry["cross_entropy"], sample_inputs=sample_inputs)
    monkeypatch.setitem(registry, "cross_entropy", op)


def one_bad_row(device: str, dtype: torch.dtype, large: bool) -> Iterator[Sample]:
    """A row whose loss is NaN."""
    x = torch.tensor([[1.0, 2.0], [torch.nan, 0.0], [0.0, -1.0]], dtype=dtype, device=device)
    yield Sample((x, torch.tensor([0, 1, 1], device=device)), {"reduction": "none"})


@pytest.mark.parametrize(
    "forward, verdict",
    [
        (reference, []),
        (with_loss(torch.nan_to_num), ["sample 0: loss[1] is 0, should be nan; 1 of 3 wrong"]),
        (with_loss(lambda loss: loss * torch.nan), ["sample 0: loss[0] is nan, should be 1.313262; 2 of 3 wrong"]),
    ],
    ids=["where the truth has it", "missing", "spread"],
)
@pytest.mark.once
def test_nan_must_be_where_the_truth_has_it(
    forward: Any, verdict: list[str], report: Any, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    sampled(monkeypatch, one_bad_row)
    with planted(device, forward=forward):
        code, rows = report()
    assert code == bool(verdict) and rows["float64"]["failures"] == verdict


@pytest.mark.parametrize("error, message", [(None, "nothing was checked"), (MemoryError("no memory"), "MemoryError")])
@pytest.mark.once
def test_samples_that_cannot_be_made_are_a_failure(
    error: Any, message: str, report: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: Any, large: bool) -> Iterator[Sample]:
        if error:
            raise error
        yield from ()

    sampled(monkeypatch, nothing)
    code, rows = report()
    assert code == 1 and all(message in rows[dtype]["failures"][0] for dtype in DTYPES)


def test_huge_queries_are_sampled_with_few_and_with_many_relevant_documents() -> None:
    """Both are sorted, on CUDA in slices: few by themselves, many as they are."""
    samples = metrics["ranking_metrics"].sample_inputs(large=True)
    targets = [sample.args[1] for sample in samples if sample.args[1].shape[-1] == 300_000]
    shares = sorted((target > 0).double().mean().item() for target in targets)
    assert 0 < shares[0] < 1e-3 and shares[-1] > 0.4


# ---- Roundings -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", selftest.DTYPES, ids=str)
def test_one_rounding_passes_and_many_do_not(dtype: torch.dtype) -> None:
    truth = torch.linspace(-8, 8, 1000, dtype=torch.float64)
    many = (2 if dtype in selftest.HALF else 100) * torch.finfo(dtype).eps
    assert selftest.errors(truth.to(dtype), truth).max() <= 0.5
    assert selftest.errors((truth * (1 + many)).to(dtype), truth).max() > 1


@pytest.mark.parametrize("dtype", selftest.DTYPES, ids=str)
def test_zeros_do_not_pass_for_small_elements_but_for_what_cancels(dtype: torch.dtype) -> None:
    truth = torch.full((100, 100), 1e-6, dtype=torch.float64)
    truth[0] = 1.0
    assert selftest.errors(truth.to(dtype), truth).max() <= 0.5
    zeros = truth.clone().to(dtype)
    zeros[1:] = 0
    assert selftest.errors(zeros, truth)[1:].min() > 1
    cancelled = torch.full((100, 100), 1e-20, dtype=torch.float64)
    assert selftest.errors(torch.zeros(100, 100, dtype=dtype), cancelled, torch.ones_like(cancelled)).max() < 1


def test_sizes_are_those_of_the_terms_where_they_cancel() -> None:
    """The gradient of the first row is p - y = 0, from terms of 1/4; that of the second is p alone in two classes."""
    x = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -20.0, -40.0]], dtype=torch.float64)
    y = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0]])
    op, sample = registry["cross_entropy"], Sample((x, y), {"reduction": "sum"})
    truth = selftest._truth(op, sample)
    _, size = selftest._sizes(op, sample, truth)
    assert truth[1][0].abs().max() < 1e-16 and (size[0] > 0.01).all() and (size[0] < 1).all()
    assert (size[1, 2:] > truth[1][1, 2:]).all() and (size[1, 2:] < 100 * truth[1][1, 2:]).all()


def test_a_device_that_torch_does_not_see_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("meta", "nonsense"):
        with pytest.raises(SystemExit) as exit:
            selftest.main(["--device", name])
        assert exit.value.code == 2
        assert f"here, not '{name}'" in capsys.readouterr().err
