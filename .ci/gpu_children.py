"""Child processes for gpu_proof.py: one with a limit, or a crew that shares checks and survives what they do."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_report import Lines, results, unfinished

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
GRACE = 5  # seconds between the request to stop and the end
STALL = 90  # seconds without news, after which a check counts as hung
SAVE = 10  # seconds between savings of what a crew has found
LOG_BYTES = 500_000  # log.txt has so many of each child

Result = dict[str, Any]
alive: set[subprocess.Popen[bytes]] = set()


@dataclass
class Proof:
    """What all steps share."""

    out: Path
    work: Path
    dry: bool
    cores: int
    have: set[str] = field(default_factory=set)
    """The modules and tools that are here."""
    tested: list[Result] = field(default_factory=list)
    """What pytest has tested in all steps."""

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def processes(self) -> int:
        """A step that compiles has so many: Triton takes one core each."""
        return max(1, min(12, self.cores - 1))

    @property
    def interpreted(self) -> dict[str, str]:
        """A rehearsal's environment, in which the Triton kernels serve the CPU."""
        return {"TRITON_INTERPRET": "1", "TORCHFAST_DISABLE_NATIVE": "1"} if self.dry else {}

    def log(self, title: str, text: str) -> None:
        with (self.out / "log.txt").open("a") as file:
            file.write(f"\n==== {title}\n{text[-LOG_BYTES:]}\n")


def start(command: list[Any], log: Path, variables: dict[str, str]) -> subprocess.Popen[bytes]:
    paths = [str(ROOT), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    with log.open("ab") as file:
        child = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | variables,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its own children end with it
        )
    alive.add(child)
    return child


def stop(child: subprocess.Popen[bytes], patience: float) -> None:
    """Asks a process to stop as Ctrl-C does, and after some seconds kills what is left, its children too."""
    for number, seconds in (signal.SIGINT, patience), (signal.SIGKILL, 30):
        try:
            os.killpg(child.pid, number)
            child.wait(seconds)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    alive.discard(child)


def bounded(proof: Proof, title: str, command: list[Any], seconds: float, **variables: str) -> tuple[int | None, str]:
    """Returns the exit code, None if it was stopped at its limit, and what it printed, which also goes into the log."""
    log = proof.work / "bounded.log"
    log.unlink(missing_ok=True)
    grace = min(GRACE, seconds / 4)
    child = start(command, log, variables)
    code: int | None = None
    with contextlib.suppress(subprocess.TimeoutExpired):
        code = child.wait(max(0, seconds - grace))
    stop(child, grace)
    text = log.read_text(errors="replace")
    proof.log(f"{title}: {'stopped at its limit' if code is None else f'exit code {code}'}", text)
    return code, text


class Member:
    """One process of a crew, and those that take its place."""

    def __init__(self, command: list[Any], folder: Path, number: int, count: int, variables: dict[str, str]) -> None:
        self.lines = Lines(folder / f"{number}.jsonl")
        self.log = folder / f"{number}.log"
        self.share = f"{number}/{count}"
        self.command = command
        self.variables = variables | {"GPU_LINES": str(self.lines.path), "GPU_WORKER": self.share}
        self.done = False
        self.begin()

    def begin(self) -> None:
        self.at_begin = self.size = self.lines.size()
        self.since = time.monotonic()
        self.child = start(self.command, self.log, self.variables)

    def tend(self, stall: float) -> None:
        """A check that ended the process, or hangs, has failed; those behind it get a new process."""
        size = self.lines.size()
        if size != self.size:
            self.size, self.since = size, time.monotonic()
        code = self.child.poll()
        if code is None and time.monotonic() - self.since < stall:
            return
        why = f"hung: no news for {stall:g} s" if code is None else f"the process ended with exit code {code}"
        stop(self.child, 0)
        culprit = unfinished(self.lines)
        if culprit is not None:
            self.lines.end(culprit, [f"{why}\n{self.tail()}"])
        elif code == 0:
            self.done = True
        elif self.lines.size() == self.at_begin:  # the process began nothing, and a new one would not either
            self.lines.end(f"process {self.share}", [f"{why}\n{self.tail()}"])
            self.done = True
        if not self.done:
            self.begin()

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


def crew(
    proof: Proof,
    name: str,
    command: list[Any],
    count: int,
    seconds: float,
    save: Callable[[list[Result], bool], None],
    variables: dict[str, str] | None = None,
    stall: float = STALL,
) -> tuple[list[Result], bool]:
    """Returns what the processes found that share the checks, and if time ended before them. Saves it on the way."""
    ends = time.monotonic() + seconds
    folder = proof.work / name
    folder.mkdir()
    threads = {"OMP_NUM_THREADS": str(max(1, proof.cores // count))}
    members = [Member(command, folder, n, count, threads | (variables or {})) for n in range(count)]
    saved = time.monotonic()
    while time.monotonic() < ends and not all(member.done for member in members):
        for member in members:
            if not member.done:
                member.tend(stall)
        if time.monotonic() - saved > SAVE:
            save(results(member.lines for member in members), True)
            saved = time.monotonic()
        time.sleep(0.1)
    cut = [member for member in members if not member.done]
    for member in cut:
        stop(member.child, 0)
    proof.log(f"{name}, its first process", members[0].tail())
    found = results(member.lines for member in members)
    save(found, bool(cut))
    return found, bool(cut)
