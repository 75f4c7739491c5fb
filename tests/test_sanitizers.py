"""What `make sanitize` is there to catch is caught: mistakes planted in a kernel, in a build of that kernel alone."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sanitizers

WHERE = "  int64_t n = preds.size(0), outputs"
PLANTED = """
  const char* name = std::getenv("PLANTED");
  std::string planted = name ? name : "";
  volatile float first_after = 0;
  volatile int64_t most = std::numeric_limits<int64_t>::max();
  if (planted == "read") first_after = static_cast<const float*>(preds.const_data_ptr())[preds.numel()];
  if (planted == "overflow") most = most + preds.size(0);
"""
CALL = """
import torch, torchfast
from torchfast.metrics import regression_metrics
assert torchfast._native.unavailable_reason is None, torchfast._native.unavailable_reason
print(regression_metrics(torch.rand(100), torch.rand(100), "rmse"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not all(Path(library).is_absolute() for library in sanitizers.environment(Path())["LD_PRELOAD"].split()):
        pytest.skip("the compiler has no sanitizers")
    source = tmp_path_factory.mktemp("source")
    for name in ("csrc", "torchfast"):
        shutil.copytree(sanitizers.ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(sanitizers.ROOT / name, source)
    kernel = source / "csrc" / "cpu" / "regression.cpp"
    for other in (source / "csrc").rglob("*.cpp"):
        if other.name not in ("module.cpp", kernel.name):
            other.unlink()
    text = kernel.read_text()
    assert text.count(WHERE) == 1
    kernel.write_text(text.replace(WHERE, PLANTED + WHERE))
    return sanitizers.build(source)


@pytest.mark.parametrize(
    "planted, said", [("", ""), ("read", "heap-buffer-overflow"), ("overflow", "signed integer overflow")]
)
def test_a_planted_mistake_ends_the_process_and_a_right_kernel_does_not(planted: str, said: str, folder: Path) -> None:
    environment = sanitizers.environment(folder) | {"PLANTED": planted, "TORCHFAST_DISABLE_NATIVE": "0"}
    result = subprocess.run([sys.executable, "-c", CALL], env=environment, capture_output=True, text=True)
    assert (result.returncode == 0) == (not planted), result.stderr
    assert said in result.stderr
