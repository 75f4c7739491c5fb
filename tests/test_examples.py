"""The examples run to their end, as `make demo` runs them but shorter."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="the examples' data is scikit-learn's, which is not installed")

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_runs(name, tmp_path, request):
    if request.config.getoption("--kernel"):
        pytest.skip("the examples run on the kernels that are installed; the default run does that")
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, "--quick"], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
