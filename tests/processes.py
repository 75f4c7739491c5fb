"""Runs a script as the processes of one distributed run."""

import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def run_together(script, counts, folder):
    """``script RANK BATCHES INIT_FILE`` for each of the processes, which have counts[RANK] batches; what all print."""
    given = ",".join(map(str, counts))
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    processes = [
        subprocess.Popen(
            [sys.executable, TESTS / script, str(rank), given, folder / "init"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(len(counts))
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(counts), outputs
    found = [json.loads(output) for output, _ in outputs]
    assert all(str(f) == str(found[0]) for f in found)
    return found[0]
