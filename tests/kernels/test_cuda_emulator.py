"""The CUDA emulator catches what it is there to catch, and lets right kernels pass."""

import subprocess
import sys

import cuda_emulator
import pytest

CAUGHT = {
    "barrier": "wrong result",
    "barrier_before_reuse": "wrong result",
    "barrier_of_a_warp": "wrong result",
    "barrier_in_a_branch": "a barrier that not all threads reach",
    "two_barriers_for_one": "are at different barriers",
    "uninitialised_shared": "wrong result",
    "global_read": "heap-buffer-overflow",
    "global_write": "heap-buffer-overflow",
    "shared_read": "global-buffer-overflow",
    "dynamic_shared_read": "use-after-poison",
    "misaligned_load": "misaligned address",
    "mask_without_caller": "which leaves it out",
    "mask_of_absent_lanes": "are not there",
    "masks_that_differ": "are in different calls",
    "shuffles_in_two_branches": "are in different calls",
    "shuffle_from_outside_the_mask": "and reads lane",
    "last_block": "wrong result",
    "collectives": "wrong result",
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    try:
        return cuda_emulator.program(cuda_emulator.HERE / "planted.cu", tmp_path_factory.mktemp("planted") / "planted")
    except cuda_emulator.Unavailable as reason:
        pytest.skip(str(reason))


def run(program, name, wrong, seed):
    command = [program, name, str(wrong)]
    result = subprocess.run(command, capture_output=True, text=True, env=cuda_emulator.environment(seed))
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("name", CAUGHT)
def test_a_planted_mistake_is_caught(planted, name):
    """It is caught in every schedule, or in some of them where the order alone decides if a result is wrong."""
    results = [run(planted, name, 1, seed) for seed in range(4)]
    assert all(CAUGHT[name] in output for code, output in results if code != 0), results
    assert (any if CAUGHT[name] == "wrong result" else all)(code != 0 for code, _ in results), results


@pytest.mark.parametrize("name", CAUGHT)
def test_the_same_kernel_without_the_mistake_passes(planted, name):
    for seed in range(3):
        code, output = run(planted, name, 0, seed)
        assert code == 0, output


# ---- The same in the real kernels ------------------------------------------------------------------

CHECK = """
import dataclasses, os, sys, torch, torchfast
from torchfast import selftest
from torchfast._register import metrics
torch.ops.load_library(os.environ["CUDA_EMULATOR_LIBRARY"])
metric = metrics["ranking_metrics"]
few = dataclasses.replace(metric, sample_inputs=lambda device, dtype, large: metric.sample_inputs(device, dtype))
long = dataclasses.replace(metric, sample_inputs=lambda device, dtype, large: list(metric.sample_inputs(
    device, dtype, large=True))[14:20])
ops = {"few": [few], "long": [long], "all": [few, long]}[sys.argv[1]]
failures = [f for op in ops for f in selftest.check(op, "cpu", torch.float32).failures]
sys.exit(chr(10).join(failures) or 0)
"""

MUTANTS = {
    "right": ("all", None, None, None),
    "a sync left out": (
        "long",
        "    if (lane == 0) parts[warp] = x;\n    sync();",
        "    if (lane == 0) parts[warp] = x;",
        "",  # numbers are wrong, or an index made of one leaves the memory
    ),
    "a vector too many": ("long", "i < vectors; i += threads", "i <= vectors; i += threads", "AddressSanitizer"),
    "a shuffle without its own lane": (
        "few",
        "__shfl_up_sync(kFull, inclusive",
        "__shfl_up_sync(kFull - 1, inclusive",
        "which leaves it out",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mistake_planted_in_the_ranking_kernels_is_caught(mutant, folder):
    samples, right, wrong, said = MUTANTS[mutant]
    planted = folder / mutant
    target = planted / "ranking" / "cuda" / "team.cuh"
    target.parent.mkdir(parents=True)
    text = (cuda_emulator.CSRC / target.relative_to(planted)).read_text()
    if right:
        assert text.count(right) == 1
        text = text.replace(right, wrong)
    target.write_text(text)
    try:
        library = cuda_emulator.library(folder, planted=planted)
    except cuda_emulator.Unavailable as reason:
        pytest.skip(str(reason))
    environment = cuda_emulator.preloading(library) | {"TORCHFAST_DISABLE_NATIVE": "1"}
    result = subprocess.run([sys.executable, "-c", CHECK, samples], capture_output=True, text=True, env=environment)
    output = result.stdout + result.stderr
    assert (result.returncode == 0) == (right is None), output
    assert right is None or said in output, output
