"""What gpu_proof.py runs in processes of their own, because a GPU's error ends the process.

gpu_worker.py probe                  what is here: as JSON
gpu_worker.py info                   torchfast.info's report, and the bandwidth of copy_: as JSON
gpu_worker.py selftest [--most N]    the share GPU_WORKER of selftest's samples, one result a line in GPU_LINES
gpu_worker.py streams                its share of the kernels on side streams and in CUDA graphs, likewise
gpu_worker.py kernels                the most important kernels, once each, for a profiler
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_report import Lines
from torch import Tensor
from torch.utils._pytree import tree_leaves

LOST = 70  # exit code, the same as gpu_pytest.py's
OPTIONAL = ("triton", "pytest", "hypothesis", "numpy", "sklearn", "torchmetrics", "rich", "liger_kernel")

Tensors = tuple[Tensor, ...]


# ---- What is here ----------------------------------------------------------------------------


def probe() -> dict[str, Any]:
    versions = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    runtime = next((f"{name} {version}" for name, version in versions.items() if version), "CPU")
    found: dict[str, Any] = {
        "torch": f"{torch.__version__} ({runtime})",
        "modules": [name for name in OPTIONAL if importlib.util.find_spec(name)],
        "gpu": None,
        "capability": None,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        if torch.version.cuda:  # on ROCm the capability means nothing to a compiler
            found["capability"] = "{}.{}".format(*torch.cuda.get_device_capability())
    return found


def info(device: str) -> dict[str, Any]:
    """Takes the best of some calls of copy_, which reads and writes, over more memory than any cache holds."""
    from torchfast.info import report

    nbytes = 1 << 30 if device == "cuda" else 1 << 26
    source, target = torch.ones(2, nbytes, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(5):
            target.copy_(source)
        synchronize(device)
        seconds.append((time.perf_counter() - start) / 5)
    return {**report(), "copy_gb_per_s": 2 * nbytes / min(seconds) / 1e9}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ---- One thing at a time, each with a line ---------------------------------------------------


def share() -> tuple[int, int]:
    """Returns the number of this process, and how many there are."""
    worker, workers = map(int, os.environ.get("GPU_WORKER", "0/1").split("/"))
    return worker, workers


def attempt(lines: Lines, name: str, device: str, check: Callable[[], list[str]], taints: bool = False) -> None:
    """Runs one check. With ``taints``, failures after its own may mean nothing, as behind a capture that broke off."""
    if not lines.begin(name):
        return
    start = time.perf_counter()
    try:
        failures = check()
    except Exception as error:
        failures = [f"{type(error).__name__}: {error}"]
    lines.end(name, failures, seconds=time.perf_counter() - start)
    if failures and (taints or is_lost(device)):
        os._exit(LOST)  # the next check gets a process of its own


def is_lost(device: str) -> bool:
    """After an illegal access, say, every further call of this process fails."""
    try:
        synchronize(device)
    except RuntimeError:
        return True
    return False


# ---- selftest --------------------------------------------------------------------------------


def selftest(lines: Lines, device: str, dtypes: list[str], most: int | None, native_only: bool) -> None:
    """Checks every WORKERS-th sample, those of all ops in fp32 first: most of what can be wrong is wrong there."""
    from torchfast import _triton
    from torchfast.info import report
    from torchfast.selftest import check, checked

    worker, workers = share()
    kernels = report()["kernels"]
    for dtype in dtypes:
        for op in checked().values():
            if native_only and kernels[op.name][device] == "reference":
                continue
            samples = list(enumerate(op.sample_inputs(device, getattr(torch, dtype), large=not _triton.interpreted())))
            if most is not None:
                samples = sorted(samples, key=lambda pair: size(pair[1]))[:most]
            for number, sample in samples[worker::workers]:
                alone = dataclasses.replace(op, sample_inputs=lambda *_, sample=sample, **__: [sample])

                def failures(alone: Any = alone, dtype: str = dtype) -> list[str]:
                    failed = check(alone, device, getattr(torch, dtype)).failures
                    return [failure.removeprefix("sample 0: ") for failure in failed]

                attempt(lines, f"{op.name} {dtype}, sample {number}", device, failures)


def size(sample: Any) -> int:
    return sum(leaf.numel() for leaf in tree_leaves((sample.args, sample.kwargs)) if isinstance(leaf, Tensor))


# ---- Side streams and CUDA graphs ------------------------------------------------------------


def softmax_inputs(device: str, rows: int, classes: int, dtype: torch.dtype) -> Tensors:
    logits = torch.randn(rows, classes, device=device).mul_(3).to(dtype)
    return logits, torch.randint(classes, (rows,), device=device)


def ranking_inputs(device: str, queries: int, documents: int) -> Tensors:
    scores = torch.randn(queries, documents, device=device).mul_(100).round_()  # some are tied
    return scores, torch.rand(queries, documents, device=device) < 0.2


def embeddings(device: str, queries: int, items: int, dtype: torch.dtype) -> Tensors:
    return tuple(torch.randn(n, 64, device=device).to(dtype) for n in (queries, items))


def calls(device: str) -> dict[str, tuple[Callable[[], Tensors], Callable[..., Tensors]]]:
    """Returns by name what makes inputs, and what makes outputs of them. Shapes reach each way to share out work."""
    import torchfast
    from torchfast.metrics import ranking_metrics, retrieval_ranks

    def differentiated(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensors]:
        def step(logits: Tensor, target: Tensor) -> Tensors:
            leaf = logits.detach().requires_grad_()
            value = loss(leaf, target)
            return value.detach(), *torch.autograd.grad(value, leaf)

        return step

    def ranked(scores: Tensor, target: Tensor) -> Tensors:
        return tuple(ranking_metrics(scores, target, ("ndcg@10", "mrr", "map"), reduction="none").values())

    def retrieved(queries: Tensor, items: Tensor) -> Tensors:
        numbers = torch.arange(len(queries) + 1, device=queries.device)
        return retrieval_ranks(queries, items, (numbers[:-1], numbers))

    def smoothed_focal(x: Tensor, t: Tensor) -> Tensor:
        return torchfast.cross_entropy(x, t, label_smoothing=0.1, gamma=2.0)

    def sigmoid(x: Tensor, t: Tensor) -> Tensor:
        return torchfast.sigmoid_focal_loss(x, t, reduction="mean")

    def linear(hidden: Tensor, t: Tensor) -> Tensor:
        return torchfast.linear_cross_entropy(hidden, head, t, chunk_size=96)

    generator = torch.Generator(device).manual_seed(0)
    head = torch.randn(500, 64, device=device, generator=generator)
    small = torch.device(device).type != "cuda"  # the rehearsal
    found: dict[str, tuple[Callable[[], Tensors], Callable[..., Tensors]]] = {}
    for dtype in torch.float32, torch.bfloat16:
        of_dtype = str(dtype).removeprefix("torch.")
        for rows, classes in ((16, 100), (2, 9000)) if small else ((4096, 1000), (8, 128256)):
            make = partial(softmax_inputs, device, rows, classes, dtype)
            for kind, loss in ("cross entropy", torchfast.cross_entropy), ("smoothed focal", smoothed_focal):
                found[f"{kind} {rows}x{classes} {of_dtype}"] = make, differentiated(loss)
        make = partial(softmax_inputs, device, 16 if small else 4096, 1000, dtype)
        found[f"sigmoid focal {of_dtype}"] = make, differentiated(sigmoid)
    make = partial(softmax_inputs, device, 200, 64, torch.float32)
    found["linear cross entropy"] = make, differentiated(linear)
    for shape in ((10, 50),) if small else ((5000, 100), (200, 5000), (3, 400_000)):
        found["ranking {}x{}".format(*shape)] = partial(ranking_inputs, device, *shape), ranked
    for dtype in torch.float32, torch.bfloat16:
        make = partial(embeddings, device, 20 if small else 500, 300 if small else 50_000, dtype)
        found[f"retrieval {str(dtype).removeprefix('torch.')}"] = make, retrieved
    return found


class Cuda:
    """The checks below run here. ``Rehearsal`` has the same methods, without streams."""

    device = "cuda"

    def late(self, fill: Callable[[], None], run: Callable[[], Tensors], streams: int = 1) -> list[Tensors]:
        """Runs on side streams at once, behind inputs that come late: a kernel that does not wait for its own stream,
        or shares memory with the other one, reads what is not there yet."""
        each = [torch.cuda.Stream() for _ in range(streams)]
        results = []
        torch.cuda.synchronize()
        for stream in each:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(20_000_000)  # clocks: 10 ms
                fill()
                results.append(run())
        torch.cuda.synchronize()
        return results

    def capture(self, run: Callable[[], Tensors]) -> tuple[Callable[[], Any], Tensors]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            run()
            with torch.cuda.graph(graph, stream=stream):
                written = run()
        torch.cuda.synchronize()
        return graph.replay, written


class Rehearsal:
    device = "cpu"

    def late(self, fill: Callable[[], None], run: Callable[[], Tensors], streams: int = 1) -> list[Tensors]:
        fill()
        return [run() for _ in range(streams)]

    def capture(self, run: Callable[[], Tensors]) -> tuple[Callable[[], Any], Tensors]:
        written = run()

        def replay() -> None:
            for old, new in zip(written, run(), strict=True):
                old.copy_(new)

        return replay, written


def checks(
    machine: Cuda | Rehearsal, make: Callable[[], Tensors], step: Callable[..., Tensors], exact: bool
) -> dict[str, Callable[[], list[str]]]:
    """Returns checks, each of which returns what differs from plain calls."""
    buffers, others, inputs = make(), make(), make()

    def fill(values: Tensors) -> None:
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)

    def different(got: Tensors, values: Tensors) -> list[str]:
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-5}
        try:
            torch.testing.assert_close(got, step(*values), equal_nan=True, **tolerance)
        except AssertionError as error:
            return [" ".join(str(error).split())]
        return []

    def on_a_side_stream() -> list[str]:
        fill(others)
        (got,) = machine.late(lambda: fill(inputs), lambda: step(*buffers))
        return different(got, inputs)

    def on_four_streams() -> list[str]:
        results = machine.late(lambda: None, lambda: step(*inputs), streams=4)
        return [failure for got in results for failure in different(got, inputs)]

    def in_a_graph() -> list[str]:
        fill(others)
        replay, written = machine.capture(lambda: step(*buffers))
        found = []
        for values in inputs, others, inputs:
            fill(values)
            replay()
            synchronize(machine.device)
            found += different(written, values)
        return found

    return {
        "on a side stream": on_a_side_stream,
        "on four streams at once": on_four_streams,
        "in a CUDA graph": in_a_graph,
    }


def streams(lines: Lines, machine: Cuda | Rehearsal) -> None:
    torch.manual_seed(0)
    worker, workers = share()
    for name, (make, step) in list(calls(machine.device).items())[worker::workers]:
        exact = not name.startswith("linear")  # another stream may add up its products in another order
        for what, check in checks(machine, make, step, exact).items():
            attempt(lines, f"{name}, {what}", machine.device, check, taints=True)


# ---- For a profiler --------------------------------------------------------------------------


def kernels(device: str) -> None:
    """Runs forward and backward of both losses, and the ranking of short and of long queries."""
    found = calls(device)
    scale = 1 if device == "cuda" else 64
    _, cross_entropy = next(step for name, step in found.items() if name.startswith("cross entropy"))
    _, sigmoid = found["sigmoid focal bfloat16"]
    cross_entropy(*softmax_inputs(device, 4096 // scale, 32000 // scale, torch.bfloat16))
    sigmoid(*softmax_inputs(device, 16384 // scale, 4096 // scale, torch.bfloat16))
    _, ranking = next(step for name, step in found.items() if name.startswith("ranking"))
    for shape in (100_000, 100), (10_000, 1000):
        ranking(*ranking_inputs(device, *(math.ceil(n / scale) for n in shape)))
    synchronize(device)


# ---- Command line ----------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("probe", "info", "selftest", "streams", "kernels"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16", "float64"])
    parser.add_argument("--most", type=int, help="samples of each op and dtype, the smallest ones; default all")
    parser.add_argument("--native-only", action="store_true", help="no op that runs on its plain PyTorch reference")
    args = parser.parse_args()
    lines = Lines(Path(os.environ.get("GPU_LINES", os.devnull)))
    if args.what == "probe":
        print(json.dumps(probe()))
    elif args.what == "info":
        print(json.dumps(info(args.device)))
    elif args.what == "selftest":
        selftest(lines, args.device, args.dtypes, args.most, args.native_only)
    elif args.what == "streams":
        streams(lines, Cuda() if args.device == "cuda" else Rehearsal())
    else:
        kernels(args.device)


if __name__ == "__main__":
    main()
