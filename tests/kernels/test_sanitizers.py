"""What `make sanitize` is there to catch is caught: mistakes planted in a kernel, in a build of that kernel alone."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sanitizers

HEADERS = "#include <cstdlib>\n#include <limits>\n#include <string>\n"
BEFORE = "  int64_t n = p.size(0), outputs"
PLANTED = """
  const char* name = std::getenv("PLANTED");
  std::string planted = name ? name : "";
  volatile float first_after = 0;
  volatile int64_t most = std::numeric_limits<int64_t>::max();
  if (planted == "read") first_after = static_cast<const float*>(preds.const_data_ptr())[preds.numel()];
  if (planted == "overflow") most = most + preds.size(0);
  int64_t parts_done = 0;
"""
IN_THREADS = "      int64_t output = part % outputs"
PLANTED_IN_THREADS = """
      if (planted == "race") ++parts_done;
"""
CALL = """
import torch, torchfast
from torchfast.metrics import regression_metrics
torch.set_num_threads(4)
assert torchfast._native.unavailable_reason is None, torchfast._native.unavailable_reason
print(regression_metrics(torch.rand(200_000), torch.rand(200_000), "rmse"))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not all(Path(path).is_absolute() for path in sanitizers.environment(Path("absent"))["LD_PRELOAD"].split()):
        pytest.skip("the compiler has no sanitizers")
    source = tmp_path_factory.mktemp("source")
    for name in ("csrc", "torchfast"):
        shutil.copytree(sanitizers.ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(sanitizers.ROOT / name, source)
    kernel = source / "csrc" / "regression" / "op.cpp"
    for other in (source / "csrc").rglob("*.cpp"):
        if other.name != "module.cpp" and other.parent.name not in ("memory", "regression", "torch"):
            other.unlink()
    text = HEADERS + kernel.read_text()
    for where, planted in ((BEFORE, PLANTED), (IN_THREADS, PLANTED_IN_THREADS)):
        assert text.count(where) == 1
        text = text.replace(where, planted + where)
    kernel.write_text(text)
    return source


@pytest.mark.parametrize(
    "kind, caught",
    [
        ("address,undefined", {"read": "heap-buffer-overflow", "overflow": "signed integer overflow"}),
        ("thread", {"race": "data race"}),
    ],
)
def test_a_planted_mistake_ends_the_process_and_a_right_kernel_does_not(
    kind: str, caught: dict[str, str], source: Path
) -> None:
    environment = sanitizers.environment(sanitizers.build(source, kind), kind) | {"TORCHFAST_DISABLE_NATIVE": "0"}
    for planted, said in (("nothing", ""), *caught.items()):
        result = subprocess.run(
            [sys.executable, "-c", CALL], env=environment | {"PLANTED": planted}, capture_output=True, text=True
        )
        assert (result.returncode == 0) == (planted == "nothing"), result.stderr
        assert said in result.stderr
