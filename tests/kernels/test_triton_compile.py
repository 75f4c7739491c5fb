"""The Triton kernels' machine code, compiled without a GPU for those of NVIDIA and AMD: see triton_audit.py."""

import os

import pytest
import torch

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing; the default run does", allow_module_level=True)

import triton_audit
from triton_audit import (
    ALIGNED,
    SIGMOID_SHAPES,
    TARGETS,
    Config,
    check_in_flight,
    check_issue,
    check_spills,
    check_vectors,
)

from torchfast.losses.cross_entropy import triton_kernels, triton_launch


@pytest.fixture(scope="session")
def kernels():
    configs = [config for target in TARGETS for config in triton_audit.suite(target)]
    compiled = triton_audit.compile_all(configs)
    assert {kernel.config for kernel in compiled} == set(configs)
    return compiled


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_spills(target, kernels):
    mine = [kernel for kernel in kernels if kernel.config.target == target]
    assert len(mine) > 30
    for kernel in mine:
        check_spills(kernel)


def plain_and_aligned(kernels, target, options="CE", shapes=ALIGNED):
    found = [k for k in kernels if k.config.target == target and k.config.options == options and k.name != "sum_kernel"]
    found = [k for k in found if k.config.shape in shapes and not k.config.channels_last]
    assert len({k.config for k in found}) >= 2 * len(shapes)
    return found


def elementwise(kernels, target):
    for options in ("sigmoid focal", "sigmoid focal, class ids"):
        yield from plain_and_aligned(kernels, target, options, SIGMOID_SHAPES[:1])


@pytest.mark.parametrize("target", TARGETS)
def test_aligned_logits_move_in_128_bit_accesses_once_a_pass(target, kernels):
    for kernel in (*plain_and_aligned(kernels, target), *elementwise(kernels, target)):
        check_vectors(kernel)


@pytest.mark.parametrize("target", TARGETS)
def test_registers_leave_enough_bytes_in_flight(target, kernels):
    for kernel in (*plain_and_aligned(kernels, target), *elementwise(kernels, target)):
        check_in_flight(kernel)


def test_arithmetic_leaves_the_memory_busy(kernels):
    """This holds for 16 and 32 bits a logit. In fp64 an H100 has half of the lanes: it computes as long as it reads."""
    checked = 0
    for kernel in plain_and_aligned(kernels, "sm_90"):
        if kernel.config.dtype != torch.float64 and kernel.loop:
            check_issue(kernel)
            checked += 1
    assert checked > 2 * len(ALIGNED)


def test_every_tile_and_stage_was_compiled(kernels):
    """The suite must not lose what it is for."""
    here = [kernel for kernel in kernels if kernel.config.target == "sm_90"]
    assert {kernel.stage for kernel in here} == {
        "forward",
        "forward scan",
        "forward sum",
        "forward finish",
        "sum",
        "backward",
    }
    blocks = {kernel.constants["BLOCK"] for kernel in here if kernel.name == "forward_kernel"}
    assert blocks >= {2**n for n in range(1, 14)}
    assert {kernel.constants.get("VEC") for kernel in here} >= {1, 2, 4, 8}


FLOATS = {"fp16", "bf16", "fp32", "fp64"}


def check_scalars(kernel):
    """Options arrive in parts that a kernel adds up: no digit of gamma or label_smoothing is lost. Triton would take a
    float that is an argument by itself in fp32."""
    parts = ("fp32",) * (3 if kernel.config.dtype == torch.float64 else 1)
    for name, of in kernel.signature.items():
        options = of.values() if isinstance(of, dict) else of if isinstance(of, tuple) else (of,)
        allowed = {parts} if name == "choices" else set()
        for option in options:
            is_float = bool(FLOATS & {option, *(option if isinstance(option, tuple) else ())})
            assert not is_float or option in allowed, f"{name} is {of}: {kernel.name} of {kernel.config}"


@pytest.mark.parametrize("target", TARGETS)
def test_options_reach_the_kernels_of_float64_losses_in_fp64(target, kernels):
    mine = [kernel for kernel in kernels if kernel.config.target == target]
    for kernel in mine:
        check_scalars(kernel)
    assert {kernel.name for kernel in mine} == {"forward_kernel", "backward_kernel", "sum_kernel"}
    with_options = [kernel.signature["choices"] for kernel in mine if "choices" in kernel.signature]
    names = {name for options in with_options for name, of in options.items() if isinstance(of, tuple)}
    softmax = {"keep", "uniform", "gamma", "z_loss", "softcap", "logit_scale"}
    assert names == softmax | {"half", "positive", "negative", "gamma_neg", "clip"}


# ---- Planted regressions: the audit must see them -------------------------------------------------


def test_the_audit_sees_masked_16_bit_accesses(monkeypatch):
    def unaligned(*args, **kwargs):
        before(*args, **kwargs)
        call = args[0]
        call.vec = call.flags["VEC"] = 1

    before = triton_launch.Call.__init__
    monkeypatch.setattr(triton_launch.Call, "__init__", unaligned)
    forward, _, backward = triton_audit.compiled(Config("sm_90", (4096, 32000), torch.bfloat16, "CE"))
    assert forward.loads[16] > 16 and backward.stores[16] > 8
    for kernel in (forward, backward):
        kernel.constants["VEC"] = 8  # the launcher's plan
        with pytest.raises(AssertionError, match="128 bits"):
            check_vectors(kernel)


def test_the_audit_sees_a_block_that_spills(monkeypatch):
    monkeypatch.setattr(triton_launch, "forward_tile", lambda *_: triton_launch.Tile(1, 32768, 4))
    forward, *_ = triton_audit.compiled(Config("sm_90", (4096, 32000), torch.bfloat16, "CE"))
    with pytest.raises(AssertionError, match="spills"):
        check_spills(forward)


def test_the_audit_sees_too_few_bytes_in_flight(monkeypatch):
    monkeypatch.setattr(triton_launch, "forward_tile", lambda *_: triton_launch.Tile(1, 64, 1))
    forward, *_ = triton_audit.compiled(Config("sm_90", (4096, 32000), torch.bfloat16, "CE"))
    with pytest.raises(AssertionError, match="in flight"):
        check_in_flight(forward)


@pytest.mark.parametrize("of", [("fp32",), "fp32", ("fp32", "fp32", "i32")], ids=str)
@pytest.mark.parametrize("options", ["everything", "sigmoid everything, class ids"])
def test_the_audit_sees_an_option_that_lost_its_fp64(options, of):
    forward, *_ = triton_audit.compiled(Config("sm_90", (8, 96), torch.float64, options))
    check_scalars(forward)
    for signature, name in ((forward.signature["choices"], "gamma"), (forward.signature, "classes")):
        before, signature[name] = signature[name], of
        with pytest.raises(AssertionError, match=r"forward_kernel of Config"):
            check_scalars(forward)
        signature[name] = before


# ---- The launcher waits for nothing ----------------------------------------------------------------


@pytest.mark.parametrize("options", [*triton_audit.OPTIONS, *triton_audit.SIGMOID_OPTIONS])
@pytest.mark.parametrize("shape", [(4096, 1000), (8, 128256), (2, 19, 64, 64), (0, 7), (3, 5, 2, 0)], ids=str)
def test_the_launcher_looks_at_no_data(shape, options, monkeypatch):
    """It runs on meta tensors, where .item(), .cpu() and bool() raise: nothing on the path to the launch can wait
    for a GPU, and all of it can be captured in a CUDA graph."""
    launched = []
    monkeypatch.setattr(triton_kernels.triton.runtime.JITFunction, "run", lambda self, *a, **k: launched.append(self))
    triton_audit.call(Config("sm_90", shape, torch.bfloat16, options))
    assert launched or 0 in shape


def test_looking_at_data_would_be_seen():
    t = torch.zeros(3, device="meta")
    for look in (lambda: t[0].item(), lambda: bool(t.any()), lambda: t.cpu(), lambda: t.tolist()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            look()


# ---- The document ----------------------------------------------------------------------------------


def test_the_document_says_what_is_compiled(kernels):
    text = triton_audit.DOCUMENT.read_text()
    audited = {kernel.config for kernel in kernels}
    rows = [k for k in kernels if k.config in set(triton_audit.documented("sm_90")) & audited]
    assert rows
    for line in triton_audit.table(rows).splitlines()[2:]:
        assert line in text, f"docs/gpu-audit.md is stale: python tests/kernels/triton_audit.py; {line}"
    assert triton_audit.projection() in text
