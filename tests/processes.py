"""Runs a script as the processes of one distributed run."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_together(script, runs, folder):
    """``script RANK RUNS INIT_FILE``, once as each of the processes: counts[RANK] is how many batches it has in a run.
    What all of them print."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    processes = [
        subprocess.Popen(
            [sys.executable, ROOT / "tests" / script, str(rank), json.dumps(runs), folder / "init"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(len(runs[0]))
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    found = [json.loads(output) for output, _ in outputs]
    assert all(str(f) == str(found[0]) for f in found)
    return found[0]
