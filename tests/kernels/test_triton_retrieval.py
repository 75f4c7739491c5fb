"""The machine code of the retrieval kernels, compiled without a GPU as test_triton_compile.py does it for the losses.

That copies of an item tie rests on one instruction, which makes every score: see retrieval/triton_kernels.py.
"""

import os

import pytest
import torch

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing; the default run does", allow_module_level=True)

import triton_audit
from triton_audit import Config, check_spills

TARGETS = ("sm_80", "sm_90", "sm_100")
ALIGNED, UNALIGNED = (2048, 100_000, 128), (2048, 100_001, 100)
#: What multiplies matrices, on each target.
TENSOR_CORES = {"sm_80": "HMMA.16816.F32.BF16", "sm_90": "HGMMA.64x64x16.F32.BF16", "sm_100": "UTCHMMA"}


@pytest.fixture(scope="module")
def kernels():
    configs = [Config(target, ALIGNED, torch.bfloat16, "retrieval") for target in TARGETS]
    configs += [Config(target, ALIGNED, torch.float32, "retrieval") for target in ("sm_90", "sm_100")]
    configs += [Config("sm_90", ALIGNED, torch.float32, "retrieval, TF32")]
    configs += [Config("sm_90", UNALIGNED, torch.bfloat16, "retrieval")]
    found = triton_audit.compile_all(configs)
    assert len(found) == 2 * len(configs)
    return found


def products(kernels, *of):
    """The instructions of all kernels of a target, dtype and precision."""
    mine = [k for k in kernels if (k.config.target, k.config.dtype, k.config.options) == of]
    assert {k.name for k in mine} == {"scores_kernel", "counts_kernel"}
    return [{name for name in k.products if "FFMA" not in name} or {"FFMA"} & k.products.keys() for k in mine]


def test_no_kernel_spills(kernels):
    for kernel in kernels:
        check_spills(kernel)


@pytest.mark.parametrize("target", TARGETS)
def test_bfloat16_runs_on_tensor_cores_by_one_instruction_in_all_kernels(target, kernels):
    assert all(found == {TENSOR_CORES[target]} for found in products(kernels, target, torch.bfloat16, "retrieval"))


def test_float32_runs_on_tensor_cores_where_tf32_is_allowed(kernels):
    found = products(kernels, "sm_90", torch.float32, "retrieval, TF32")
    assert found == [{"HGMMA.64x64x8.F32.TF32"}] * 2
    assert products(kernels, "sm_90", torch.float32, "retrieval") == [{"FFMA"}] * 2


def test_aligned_embeddings_are_read_in_128_bit_accesses(kernels):
    """By instructions that go through registers or past them; bf16 rows of 200 bytes cannot be."""
    for kernel in kernels:
        assert (kernel.loads.get(128, 0) > 0) == (kernel.config.shape == ALIGNED), kernel
