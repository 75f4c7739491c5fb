"""Compiles the Triton kernels without a GPU, exactly as the launcher would launch them, and reads the code.

    python tests/kernels/triton_audit.py           writes docs/gpu-audit.md
    python tests/kernels/triton_audit.py --all     all options, tiles and targets (half an hour); prints offenders

The launcher runs on meta tensors, which have shapes and strides but no data: a launcher that looked at
data would raise here. Triton's driver is replaced by one that names the target and launches nothing, so
types, alignment and constants are specialised by Triton's own rules.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import itertools
import multiprocessing
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from torchfast._common import MEAN, NONE, SUM
from torchfast.losses import triton_kernels as shared_kernels
from torchfast.losses import triton_launch as shared
from torchfast.losses.cross_entropy import options as cross_entropy
from torchfast.losses.cross_entropy import triton_kernels, triton_launch
from torchfast.losses.sigmoid_focal_loss import options as sigmoid_focal_loss
from torchfast.losses.sigmoid_focal_loss import triton_kernels as sigmoid_kernels
from torchfast.losses.sigmoid_focal_loss import triton_launch as sigmoid_launch
from torchfast.metrics.retrieval import triton_kernels as retrieval_kernels
from torchfast.metrics.retrieval import triton_launch as retrieval_launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = (shared_kernels, triton_kernels, sigmoid_kernels, retrieval_kernels)
REGISTERS = {"cuda": 65536, "hip": 131072}  # 32-bit registers of a multiprocessor or compute unit
THREADS = {80: 2048, 90: 2048, 100: 2048, "gfx942": 2048}


class SoftmaxOptions(NamedTuple):
    label_smoothing: float = 0.0
    gamma: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    logit_scale: float = 1.0
    weighted: bool = False
    probabilities: bool = False
    reduction: int = MEAN


OPTIONS = {
    "CE": SoftmaxOptions(),
    "CE, sum": SoftmaxOptions(reduction=SUM),
    "CE, none": SoftmaxOptions(reduction=NONE),
    "CE+LS": SoftmaxOptions(label_smoothing=0.1),
    "focal": SoftmaxOptions(gamma=2.0),
    "focal+LS+weights": SoftmaxOptions(label_smoothing=0.1, gamma=2.0, weighted=True),
    "z-loss, softcap, scale": SoftmaxOptions(z_loss=1e-4, softcap=30.0, logit_scale=0.5),
    "probabilities": SoftmaxOptions(probabilities=True),
    "everything": SoftmaxOptions(0.1, 1.5, 1e-4, 30.0, 0.5, True, True),
}


class SigmoidOptions(NamedTuple):
    target: torch.dtype | None = None
    """None means the logits' dtype."""
    index: bool = False
    gamma: float = 2.0
    gamma_neg: float = 2.0
    clip: float = 0.0
    label_smoothing: float = 0.0
    weighted: bool = False
    """If so, there are a weight and a pos_weight a class, and a mask a row."""
    reduction: int = MEAN


SIGMOID_OPTIONS = {
    "sigmoid focal": SigmoidOptions(),
    "sigmoid focal, none": SigmoidOptions(reduction=NONE),
    "sigmoid focal, class ids": SigmoidOptions(torch.int64, index=True),
    "sigmoid focal, bool": SigmoidOptions(torch.bool),
    "asymmetric": SigmoidOptions(gamma=1.0, gamma_neg=4.0, clip=0.05),
    "sigmoid everything": SigmoidOptions(None, False, 1.5, 3.5, 0.05, 0.1, True),
    "sigmoid everything, class ids": SigmoidOptions(torch.int64, True, 1.5, 3.5, 0.05, 0.1, True, NONE),
}

#: The shape is queries, items and dimensions; torch.set_float32_matmul_precision says if products may be in TF32.
RETRIEVAL_OPTIONS = {"retrieval": "highest", "retrieval, TF32": "high"}


class Config(NamedTuple):
    target: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    options: str
    channels_last: bool = False


@dataclass(frozen=True)
class Kernel:
    """One compiled launch, and what its machine code does."""

    config: Config
    name: str
    constants: dict[str, Any]
    programs: int
    threads: int
    registers: int
    spilled: int
    """Spilled registers, and bytes of local memory (stack, private segment)."""
    shared: int
    signature: dict[str, Any]
    """The type of each argument."""
    loop: int
    """Instructions of the longest loop; 0 without one, or not known (AMD)."""
    loads: dict[int, int]
    """Global load instructions by width in bits."""
    stores: dict[int, int]
    products: dict[str, int]
    """Instructions that multiply and add, by name: of matrices (HMMA, HGMMA, UTCHMMA, v_mfma) or of numbers."""

    @property
    def stage(self) -> str:
        stages = ("", " scan", " sum", " finish")
        return self.name.removesuffix("_kernel") + stages[self.constants.get("STAGE", 0)]

    @property
    def occupancy(self) -> float:
        """Returns the part of the resident threads that registers allow."""
        target = TARGETS[self.config.target]
        each = -(-self.registers // 8) * 8 * self.threads
        blocks = REGISTERS[target.backend] // each
        return min(1.0, blocks * self.threads / THREADS[target.arch])


class _Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def record(target: str, function: Any) -> list[tuple[Any, dict[str, Any], tuple[int, ...], Any]]:
    """Runs ``function``; its launches compile instead: (kernel, constants, grid, compiled)."""
    launches = []
    run = triton.runtime.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **constants)
        launches.append((self, constants, grid, compiled))
        return compiled

    driver = triton.runtime.driver
    before, warp = driver._active, shared.WARP
    values = [value for module in KERNELS for value in vars(module).values()]
    jits = [value for value in values if isinstance(value, triton.runtime.JITFunction)]
    try:
        driver.set_active(_Driver(TARGETS[target]))
        shared.WARP = TARGETS[target].warp_size
        triton.runtime.JITFunction.run = compile_only
        for jit in jits:
            jit.device_caches.clear()  # Triton caches by device, and every target is device 0
        shared.forget_plans()  # so do plans, and with them the kernels
        function()
    finally:
        triton.runtime.JITFunction.run = run
        driver._active, shared.WARP = before, warp
        shared.forget_plans()
    return launches


def call(config: Config) -> None:
    """Runs forward and backward of the config, on meta tensors."""
    if config.options in SIGMOID_OPTIONS:
        return call_sigmoid(config)
    if config.options in RETRIEVAL_OPTIONS:
        return call_retrieval(config)
    o, shape = OPTIONS[config.options], config.shape
    logits = torch.empty(shape, dtype=config.dtype, device="meta")
    if config.channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last)
    rows = (shape[0], *shape[2:])
    target = torch.empty_like(logits) if o.probabilities else torch.empty(rows, dtype=torch.int64, device="meta")
    weight = torch.empty(shape[1], device="meta") if o.weighted else None
    sample_weight = torch.empty(rows, device="meta") if o.weighted else None
    numbers = (o.label_smoothing, o.gamma, o.z_loss, o.softcap, o.logit_scale)
    options = cross_entropy.Options(-100, o.reduction, *numbers, False, False)
    arguments = (logits, target, weight, weight, sample_weight, options)
    loss, residuals = triton_launch.cross_entropy(*arguments)
    triton_launch.cross_entropy_backward(torch.empty_like(loss), *arguments, residuals)


def call_sigmoid(config: Config) -> None:
    o, shape = SIGMOID_OPTIONS[config.options], config.shape
    logits = torch.empty(shape, dtype=config.dtype, device="meta")
    target = torch.empty(shape[:-1] if o.index else shape, dtype=o.target or config.dtype, device="meta")
    weight = torch.empty(shape[-1], device="meta").expand(shape) if o.weighted else None
    mask = torch.empty((*shape[:-1], 1), dtype=torch.bool, device="meta").expand(shape) if o.weighted else None
    numbers = (0.25, o.gamma, o.gamma_neg, o.clip, o.label_smoothing)
    options = sigmoid_focal_loss.Options(-100, o.reduction, *numbers, False)
    arguments = (logits, target, weight, weight, mask, options)
    loss, divisor = sigmoid_launch.sigmoid_focal_loss(*arguments)
    sigmoid_launch.sigmoid_focal_loss_backward(torch.empty_like(loss), *arguments, divisor)


def call_retrieval(config: Config) -> None:
    """Ten listed items a query."""
    n, m, d = config.shape
    queries, items = (torch.empty(rows, d, dtype=config.dtype, device="meta") for rows in (n, m))
    ids, offsets = (torch.empty(length, dtype=torch.int64, device="meta") for length in (10 * n, n + 1))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(RETRIEVAL_OPTIONS[config.options])
    try:
        scores = retrieval_launch.retrieval_scores(queries, items, None, ids, offsets)
        retrieval_launch.retrieval_counts(queries, items, None, scores, offsets)
    finally:
        torch.set_float32_matmul_precision(before)


def compiled(config: Config) -> list[Kernel]:
    found = []
    for jit, constants, grid, binary in record(config.target, lambda: call(config)):
        code = _amd(binary.asm["amdgcn"]) if "amdgcn" in binary.asm else _nvidia(binary.asm["cubin"])
        threads = constants["num_warps"] * TARGETS[config.target].warp_size
        # Named tuples as dicts: their classes are made at run time, and have no place where pickle would find them.
        named = binary.src.signature.items()
        signature = {name: of._asdict() if hasattr(of, "_asdict") else of for name, of in named}
        of = {"shared": binary.metadata.shared, "signature": signature}
        found.append(Kernel(config, jit.fn.__name__, constants, grid[0], threads, **of, **code))
    return found


def _nvidia(cubin: bytes) -> dict[str, Any]:
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    assert usage, text[:500]
    local = re.findall(r"\b(?:LDL|STL)\b", text)
    widths = {kind: collections.Counter() for kind in ("LDG", "STG")}
    for kind, suffixes in re.findall(r"\b(LDG|STG)(?:STS)?\.E((?:\.\w+)*) ", text):  # LDGSTS loads to shared memory
        widths[kind][_bits(suffixes)] += 1
    assert widths["LDG"], "no loads: is the disassembly read rightly?"
    return {
        "registers": int(usage[1]),
        "spilled": int(usage[2]) + int(usage[3]) + len(local),
        "loop": _longest_loop(text),
        "loads": dict(widths["LDG"]),
        "stores": dict(widths["STG"]),
        "products": dict(collections.Counter(re.findall(r"\b((?:HMMA|HGMMA|UTC\w*MMA|FFMA2?)[.\w]*)", text))),
    }


def _longest_loop(text: str) -> int:
    """Counts the instructions between a branch backwards and its target."""
    code = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*);", text)]
    jumps = [(at, int(m[1], 16)) for at, what in code if (m := re.search(r"\bBRA\b.*(0x[0-9a-f]+)", what))]
    loops = [sum(target <= at <= end for at, _ in code) for end, target in jumps if target < end]
    return max(loops, default=0)


def _bits(suffixes: str) -> int:
    for bits in (128, 64):
        if f".{bits}" in suffixes:
            return bits
    match = re.search(r"\.[US](8|16)\b", suffixes)
    return int(match[1]) if match else 32


def _amd(assembly: str) -> dict[str, Any]:
    fields = dict(re.findall(r"\.(\w+): +(\d+)\n", assembly))
    names = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}
    widths = {kind: collections.Counter() for kind in ("load", "store")}
    for kind, what in re.findall(r"\b(?:global|buffer|flat)_(load|store)_(\w+)", assembly):
        widths[kind][names.get(what, 8 if "byte" in what else 16)] += 1
    assert widths["load"], "no loads: is the assembly read rightly?"
    spilled = ("vgpr_spill_count", "private_segment_fixed_size")  # scalars are spilled to vector registers
    return {
        "registers": int(fields["vgpr_count"]),
        "spilled": sum(int(fields[name]) for name in spilled),
        "loop": 0,
        "loads": dict(widths["load"]),
        "stores": dict(widths["store"]),
        "products": dict(collections.Counter(re.findall(r"\bv_(?:mfma|fma|pk_fma|fmac)_\w+", assembly))),
    }


# ---- What must hold ----------------------------------------------------------------------------

H100_BANDWIDTH, EFFICIENCY = 3.35e12, 0.9
#: Bytes that must be in flight in a multiprocessor to draw 3.35 TB/s (H100, 132 of them) at 600 ns latency.
IN_FLIGHT = int(H100_BANDWIDTH / 132 * 600e-9)
#: Loads of a row's numbers (target, sample weight, residuals, own logit), in 32-bit words.
ROW_WORDS = 12


def check_spills(kernel: Kernel) -> None:
    assert kernel.spilled == 0, f"spills: {kernel}"


def check_vectors(kernel: Kernel) -> None:
    """All of a tile of aligned logits moves in 128-bit accesses; what is narrower belongs to the rows."""
    vector = 16 // kernel.config.dtype.itemsize
    assert kernel.constants["VEC"] == vector, f"{kernel.config} is not aligned"
    elements = kernel.constants["M"] * kernel.constants["BLOCK"] // kernel.threads
    tile = elements // vector  # vectors of a thread
    one_block = kernel.constants.get("ONE_BLOCK", True)
    passes = 1 if kernel.name == "backward_kernel" or one_block else 2  # first block, and loop
    assert kernel.loads.get(128, 0) >= tile * passes, f"logits are not read in 128 bits: {kernel}"
    if kernel.name == "backward_kernel":
        assert kernel.stores.get(128, 0) == tile, f"the gradient is not written in 128 bits: {kernel}"
        assert set(kernel.stores) == {128}, f"narrow stores: {kernel}"
    rows = kernel.constants["M"] if kernel.constants.get("CLASSES_MINOR", True) else vector
    words = sum(bits / 32 * n for bits, n in kernel.loads.items() if bits in (32, 64))
    assert words <= ROW_WORDS * rows, f"narrow loads: {kernel}"
    half = sum(n for bits, n in kernel.loads.items() if bits < 32)
    assert half <= rows, f"loads of single half-precision elements: {kernel}"  # the target's own logit is one


def check_in_flight(kernel: Kernel) -> None:
    """Resident programs load enough at a time to keep the memory busy."""
    tile = kernel.constants["M"] * kernel.constants["BLOCK"] * kernel.config.dtype.itemsize
    resident = kernel.occupancy * THREADS[TARGETS[kernel.config.target].arch] / kernel.threads
    assert tile * resident >= IN_FLIGHT, f"{tile * resident:.0f} bytes in flight, {IN_FLIGHT} needed: {kernel}"


#: An H100 issues so many instructions of a thread a second: 132 processors, 128 lanes, 1.7 GHz.
INSTRUCTIONS = 132 * 128 * 1.7e9


def issue(kernel: Kernel) -> float:
    """Returns the part of INSTRUCTIONS that the loop over classes takes at 90 % of an H100's bandwidth."""
    elements = kernel.constants["M"] * kernel.constants["BLOCK"] / kernel.threads
    moved = kernel.config.dtype.itemsize * (2 if kernel.name == "backward_kernel" else 1)
    return kernel.loop / elements * (H100_BANDWIDTH * EFFICIENCY / moved) / INSTRUCTIONS


def check_issue(kernel: Kernel) -> None:
    """Memory is the limit, not arithmetic."""
    assert 0 < issue(kernel) < 0.7, f"issues {issue(kernel):.0%} of an H100's instructions: {kernel}"


# ---- What is audited ---------------------------------------------------------------------------

#: One shape for each tile that the launcher chooses: rows of 1, 2, 4, ... classes, in registers; loops;
#: splits; ragged rows; positions; positions of a small or ragged image.
ROWS = [(2**18 // classes + 1, classes) for classes in (1, 2, 3, 8, 10, 24, 64, 96, 152, 504, 1000, 2048, 4000, 8192)]
ALIGNED = [(4096, 32000), (16384, 128256), (16384, 1000), (4, 19, 1024, 1024)]
LONG = [*ALIGNED[:2], (8, 128256), (4096, 50257), (8, 50257)]
POSITIONS = [ALIGNED[3], (2, 2, 512, 512), (2, 150, 128, 128), (8, 1000, 7, 7), (64, 19, 4, 4), (1, 3, 1, 2**15)]
SHAPES = [*ROWS, *LONG, *POSITIONS]
SIGMOID_SHAPES = [(100000, 80), (4096, 4096)]
DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)


def suite(target: str) -> list[Config]:
    """Lists what the tests compile: on sm_90 all tiles, all options and all dtypes, elsewhere what needs most
    registers, and the aligned."""
    heavy = [(4096, 32000), (8, 128256), (257, 8192), (4, 19, 1024, 1024)]
    main = DTYPES[:2]
    configs = [Config(target, s, d, "CE") for s in ALIGNED for d in main]
    configs += [Config(target, s, d, "everything") for s in heavy for d in main]
    sigmoid = ["sigmoid focal", "sigmoid focal, class ids", "sigmoid everything, class ids"]
    configs += [Config(target, s, d, o) for s in SIGMOID_SHAPES[:1] for d in main for o in sigmoid]
    if target == "sm_90":
        configs += [Config(target, s, main[0], o) for s in SHAPES for o in ("CE", "everything")]
        configs += [Config(target, s, main[0], o) for s in (heavy[0], heavy[3]) for o in OPTIONS]
        configs += [Config(target, s, d, "everything") for s in heavy for d in DTYPES]
        configs += [Config(target, s, d, "CE") for s in ALIGNED for d in DTYPES]
        configs += [Config(target, SIGMOID_SHAPES[1], main[0], o) for o in SIGMOID_OPTIONS]
        configs += [Config(target, SIGMOID_SHAPES[1], d, "sigmoid everything, class ids") for d in DTYPES]
        configs += [Config(target, s, main[0], "sigmoid focal") for s in [(33333, 7), (4096, 1), (5, 1001)]]
        configs += [Config(target, (4, 19, 1024, 1024), main[0], "CE", channels_last=True)]
    return list(dict.fromkeys(configs))


def everything() -> list[Config]:
    softmax = itertools.product(TARGETS, SHAPES, DTYPES, OPTIONS)
    sigmoid = itertools.product(TARGETS, SIGMOID_SHAPES, DTYPES, SIGMOID_OPTIONS)
    return [Config(*of) for of in itertools.chain(softmax, sigmoid)]


def compile_all(configs: list[Config]) -> list[Kernel]:
    """Compiles in as many processes as there are cores."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(mp_context=context) as pool:
        return list(itertools.chain.from_iterable(pool.map(compiled, configs, chunksize=4)))


# ---- The document -------------------------------------------------------------------------------

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "gpu-audit.md"


def table(kernels: list[Kernel]) -> str:
    columns = "logits, dtype, loss, kernel, tile, threads, registers, resident, in flight, issue, loads, stores"
    lines = [f"| {' | '.join(columns.split(', '))} |", "|---|---|---|---|---|---:|---:|---:|---:|---:|---|---|"]
    for k in kernels:
        if k.name == "sum_kernel":
            continue
        tile = k.constants["M"] * k.constants["BLOCK"]
        resident = int(k.occupancy * THREADS[TARGETS[k.config.target].arch])
        in_flight = tile * k.config.dtype.itemsize * resident // k.threads
        shape = "x".join(map(str, k.config.shape))
        cells = (
            shape,
            str(k.config.dtype).removeprefix("torch."),
            k.config.options,
            k.stage,
            f"{k.constants['M']} x {k.constants['BLOCK']}",
            k.threads,
            k.registers,
            resident,
            f"{in_flight / 1024:.0f} KiB",
            f"{issue(k):.0%}" if k.loop else "-",
            _widths(k.loads),
            _widths(k.stores),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _widths(counts: dict[int, int]) -> str:
    return ", ".join(f"{n} x {bits}" for bits, n in sorted(counts.items(), reverse=True))


def documented(target: str) -> list[Config]:
    of = [(s, d, o) for s in [*ALIGNED, (8, 128256), (4096, 50257)] for d in DTYPES[:2] for o in ("CE", "everything")]
    sigmoid = ("sigmoid focal", "sigmoid focal, class ids", "sigmoid everything, class ids")
    of += [(s, d, o) for s in SIGMOID_SHAPES for d in DTYPES[:1] for o in sigmoid]
    return [Config(target, *config) for config in of]


def projection() -> str:
    lines = ["| logits | dtype | forward | forward + backward |", "|---|---|---:|---:|"]
    for shape, dtype in ((ALIGNED[0], DTYPES[0]), (ALIGNED[1], DTYPES[0]), (ALIGNED[3], DTYPES[1])):
        once = torch.Size(shape).numel() * dtype.itemsize / (H100_BANDWIDTH * EFFICIENCY)
        name = str(dtype).removeprefix("torch.")
        lines.append(f"| {'x'.join(map(str, shape))} | {name} | {once * 1e3:.2f} ms | {3 * once * 1e3:.2f} ms |")
    return "\n".join(lines)


def document() -> str:
    """Returns the document with its generated parts made anew; its prose stands in the file."""
    tables = [f"### {target}\n\n{table(compile_all(documented(target)))}" for target in TARGETS]
    text = DOCUMENT.read_text()
    for part, content in (("projection", projection()), ("tables", "\n\n".join(tables))):
        text = re.sub(rf"(<!-- {part} -->).*(<!-- /{part} -->)", rf"\1\n\n{content}\n\n\2", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true")
    if not parser.parse_args().all:
        DOCUMENT.write_text(document())
    else:
        kernels = compile_all(everything())
        print(f"{len(kernels)} kernels, most registers {max(k.registers for k in kernels)}")
        for kernel in kernels:
            if kernel.spilled:
                print("spills:", kernel)
