"""What the steps of gpu_proof.py find, from the lines that child processes write to the summary of one screen.

A child process (gpu_worker.py, gpu_pytest.py) appends lines of JSON to a file: what it begins, and what became of it.
So whatever kills it, everything before is known, and what killed it has a name.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

WIDTH = 80
HEIGHT = 40
LOW = 0.8  # a row below this part of the copy bandwidth is named
LOST = 0.95  # a peer that takes less of our time wins: 5 % is noise
FULL_TEXTS = 300  # failures whose traceback is kept whole


class Lines:
    """The file of one child process, and of those that take its place when it dies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.begun = {line["begin"] for line in self.read() if "begin" in line}

    def read(self) -> list[dict[str, Any]]:
        found = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:  # the process died while it wrote this one
                continue
        return found

    def size(self) -> int:
        """The size grows with every piece of news."""
        return self.path.stat().st_size if self.path.exists() else 0

    def write(self, **line: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def begin(self, name: str) -> bool:
        """Returns False if the check was begun before: by a process that it killed, say."""
        if name in self.begun:
            return False
        self.begun.add(name)
        self.write(begin=name)
        return True

    def end(self, name: str, failures: Iterable[str] = (), **more: Any) -> None:
        """Writes the end of a check. A failure's first line says it all; what that rests on follows."""
        self.write(end=name, failures=[failure[:8000] for failure in failures], **more)


def results(files: Iterable[Lines]) -> list[dict[str, Any]]:
    """Lists what has ended."""
    return [line for lines in files for line in lines.read() if "end" in line]


def unfinished(lines: Lines) -> str | None:
    """Returns what was begun last and has not ended: a process does one thing at a time."""
    found = lines.read()
    begun = [line["begin"] for line in found if "begin" in line]
    ended = {line["end"] for line in found if "end" in line}
    return begun[-1] if begun and begun[-1] not in ended else None


# ---- What a step found -----------------------------------------------------------------------


@dataclass
class Outcome:
    """What one step found, for the summary."""

    step: str
    said: str = ""
    wrong: list[str] = field(default_factory=list)
    low: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    skipped: bool = False
    seconds: float = 0.0


def of_results(step: str, what: str, ended: list[dict[str, Any]], cut: bool) -> Outcome:
    """Sums up samples, tests or checks, each of which has a list of failures."""
    failed = [line for line in ended if line["failures"]]
    skipped = sum("skipped" in line for line in ended)
    said = f"{len(ended)} {what}, {len(failed)} failed" + f", {skipped} skipped" * bool(skipped)
    wrong = [f"{line['end']}: {first_line(line['failures'][0])}" for line in failed]
    if not ended:
        wrong.append(f"nothing was checked: no {what} ended")
    return Outcome(step, said + ", cut at its limit" * cut, wrong)


def of_benchmark(rows: list[dict[str, Any]], cut: bool) -> Outcome:
    """Sums up ``rows``, which ``benchmarks/run.py --figures`` has written."""
    found = Outcome("benchmark", f"{len(rows)} cases" + ", cut at its limit" * cut)
    for row in rows:
        found.wrong += [f"{row['case']}: {note}" for note in row["notes"] if note.startswith("torchfast")]
        if row["of_copy"] is not None and row["of_copy"] < LOW:
            found.low.append(f"{row['of_copy']:.2f} of copy: {row['case']}, {row['gb_per_s']:.0f} GB/s")
        for where, suffix in ("", ""), (" in a graph", "_in_graph"):
            found.lost += [
                f"{peer} takes {ratio:.2f} of our time{where}: {row['case']}"
                for peer, ratio in row[f"times_slower{suffix}"].items()
                if ratio < LOST
            ]
    if not rows:
        found.wrong.append("no case was measured")
    found.low.sort()
    return found


def first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def last_line(text: str) -> str:
    """Returns what a traceback says in the end."""
    return first_line("\n".join(reversed(text.splitlines())))


# ---- The files -------------------------------------------------------------------------------


def junit(ended: list[dict[str, Any]], cut: bool) -> bytes:
    """Writes JUnit's XML of the tests that ended."""
    failed = sum(bool(line["failures"]) for line in ended)
    skipped = sum("skipped" in line for line in ended)
    counts = {"tests": len(ended), "failures": failed, "errors": 0, "skipped": skipped}
    suite = ElementTree.Element("testsuite", {name: str(count) for name, count in counts.items()}, name="gpu")
    if cut:
        properties = ElementTree.SubElement(suite, "properties")
        ElementTree.SubElement(properties, "property", name="cut", value="at its time limit")
    texts = 0
    for line in ended:
        file, _, name = line["end"].partition("::")
        seconds = f"{line.get('seconds', 0):.3f}"
        case = ElementTree.SubElement(suite, "testcase", classname=file, name=printable(name), time=seconds)
        for failure in line["failures"]:
            texts += 1
            element = ElementTree.SubElement(case, "failure", message=printable(first_line(failure))[:300])
            element.text = printable(failure) if texts <= FULL_TEXTS else None
        if "skipped" in line:
            ElementTree.SubElement(case, "skipped", message=printable(line["skipped"])[:300])
    return ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)


def printable(text: str) -> str:
    """Drops control characters, which XML has not."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


# ---- The summary -----------------------------------------------------------------------------


def summary(machine: str, missing: dict[str, str], outcomes: list[Outcome]) -> str:
    """Fills one screen: what ran, and the first ones of what is wrong, what is slow, what loses; then how many more."""
    lines = textwrap.wrap(machine, WIDTH)
    if missing:
        text = "; ".join(f"{name} ({why})" for name, why in missing.items())
        lines += textwrap.wrap(f"missing: {text}", WIDTH, subsequent_indent="  ")
    for outcome in outcomes:
        took = "   skipped" if outcome.skipped else f"{outcome.seconds:8.0f} s"
        lines.append(f"{outcome.step:10}{took}  {outcome.said}")
    lists = {
        "wrong": [f"{o.step}: {line}" for o in outcomes for line in o.wrong],
        f"below {LOW:.0%} of the copy bandwidth": [line for o in outcomes for line in o.low],
        "slower than a peer": [line for o in outcomes for line in o.lost],
    }
    left = HEIGHT - len(lines) - 2 * len(lists)
    for number, (title, found) in enumerate(lists.items()):
        shown = min(len(found), max(3, left // (len(lists) - number)))
        left -= shown
        lines.append(f"{title}: {len(found) or 'nothing'}")
        lines += [f"  {line}" for line in found[:shown]]
        if len(found) > shown:
            lines.append(f"  and {len(found) - shown} more: see the files")
    return "\n".join(shorten(line) for line in lines) + "\n"


def shorten(line: str) -> str:
    line = " ".join(line.split("\n"))
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."
