"""A pytest plugin: this process's share of the tests, most valuable first, each result written as soon as it is there.

    GPU_LINES=FILE GPU_WORKER=3/12 python -m pytest -p gpu_pytest -m gpu tests/losses/test_ops.py

One of every test comes before a second one of any, and what compiles with inductor, which takes seconds, comes last.
A process that takes the place of a dead one goes on after the test that killed it.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
from pathlib import Path

import pytest
from gpu_report import Lines, last_line

LINES = Lines(Path(os.environ["GPU_LINES"]))
WORKER, WORKERS = map(int, os.environ["GPU_WORKER"].split("/"))
LOST = 70  # exit code: the GPU is unusable for this process, and for it alone
found: dict[str, dict] = {}  # what the tests under way have found


def by_value(names: list[str]) -> list[str]:
    """Sorts breadth first: a test's further parameters, in random order, each come behind those of all other tests."""
    generator = random.Random(0)
    places = {}
    for _, group in itertools.groupby(names, key=lambda name: name.partition("[")[0]):
        group = list(group)
        places |= dict(zip(group, generator.sample(range(len(group)), len(group)), strict=True))
    return sorted(names, key=lambda name: ("compile" in name, places[name]))  # stable: files stay in the order given


@pytest.hookimpl(trylast=True)  # other plugins have deselected before
def pytest_collection_modifyitems(config, items):
    of_name = {item.nodeid: item for item in items}
    share = by_value(list(of_name))[WORKER::WORKERS]
    kept = [of_name[name] for name in share if name not in LINES.begun]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def failure(report):
    """Says what is wrong, and then gives pytest's traceback."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return f"{crash.message.splitlines()[0] if crash else last_line(report.longreprtext)}\n{report.longreprtext}"


def pytest_collectreport(report):
    if report.failed and WORKER == 0 and LINES.begin(report.nodeid):
        LINES.end(report.nodeid, [failure(report)])


def pytest_runtest_logstart(nodeid):
    LINES.begin(nodeid)
    found[nodeid] = {"failures": [], "seconds": 0.0}


def pytest_runtest_logreport(report):
    line = found[report.nodeid]
    line["seconds"] += report.duration
    if report.failed:
        line["failures"].append(failure(report))
    elif report.skipped:
        line["skipped"] = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longreprtext


def pytest_runtest_logfinish(nodeid):
    line = found.pop(nodeid)
    LINES.end(nodeid, **line)
    if line["failures"] and gpu_is_lost():
        os._exit(LOST)  # every further test would fail


def pytest_sessionfinish(session, exitstatus):
    if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = 0  # the session came to its end, and what failed is in the lines


def gpu_is_lost() -> bool:
    """After an illegal access, say, no call of this process succeeds any more."""
    torch = sys.modules.get("torch")
    try:
        if torch and torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
