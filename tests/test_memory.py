"""Memory of outputs that is used again: what it must never do is change a number, or hold what others need."""

import copy
import itertools
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from memory import peak_memory, resident_memory

import torchfast
from torchfast._native import unavailable_reason

UNABLE = unavailable_reason is not None or sys.platform != "linux" or torch.__version__ < (2, 11)
pytestmark = [
    pytest.mark.skipif(UNABLE or os.environ.get("TORCHFAST_CACHE") == "0", reason="memory is not used again here"),
    pytest.mark.once,
]
SHAPE = (1024, 8192)  # 32 MiB
BYTES = 4 * SHAPE[0] * SHAPE[1]


@pytest.fixture(autouse=True)
def nothing_kept():
    torchfast.empty_cache()
    yield
    torchfast.empty_cache()


def example(rows=SHAPE[0]):
    x = torch.randn(rows, SHAPE[1]).requires_grad_()
    return x, torch.randint(SHAPE[1], (rows,))


def gradient_of(x, t, **options):
    return torch.autograd.grad(torchfast.cross_entropy(x, t, **options), x)[0]


def test_a_gradient_takes_the_memory_of_the_last_one():
    x, t = example()
    first = gradient_of(x, t)
    expected, where = first.clone(), first.data_ptr()
    del first
    assert torchfast.memory_stats()["kept_bytes"] == BYTES
    before = torchfast.memory_stats()["mapped"]
    for _ in range(5):
        again = gradient_of(x, t)
        assert again.data_ptr() == where and torch.equal(again, expected)
        del again
    stats = torchfast.memory_stats()
    assert stats["mapped"] == before and stats["in_use_bytes"] == 0
    assert stats["kept_bytes"] == stats["most_in_use_bytes"] == BYTES


def test_a_training_loop_needs_one_gradient_and_empty_cache_gives_it_back():
    x, t = example(8 * SHAPE[0])
    gradient_of(x[:1], t[:1])
    before = resident_memory()

    def train():
        for factor in (1, 1, 0.5, 0.5, 0.25) * 4:
            x.grad = None
            (factor * torchfast.cross_entropy(x, t)).backward()

    _, peak = peak_memory(train)
    assert peak <= 1.01 * x.nbytes
    x.grad = None
    torchfast.empty_cache()
    assert torchfast.memory_stats()["kept_bytes"] == 0
    assert resident_memory() < before + x.nbytes / 20


def test_no_more_is_kept_than_was_in_use_at_once():
    sizes = [256, 300, 400, 512, 700, 1024, 256, 1024, 300, 900]
    most = 0
    for rows in sizes * 2:
        x, t = example(rows)
        gradient = gradient_of(x, t)
        del gradient
        stats = torchfast.memory_stats()
        most = max(most, -(-4 * rows * SHAPE[1] // (2 << 20)) * (2 << 20))
        assert stats["kept_bytes"] <= stats["most_in_use_bytes"] == most


def test_outputs_that_live_at_once_share_nothing():
    x, t = example(256)
    gradients = [gradient_of(x, t, z_loss=float(i)) for i in range(5)]
    pointers = sorted(gradient.data_ptr() for gradient in gradients)
    assert all(after - before >= gradients[0].nbytes for before, after in itertools.pairwise(pointers))
    for i, gradient in enumerate(gradients):
        assert torch.equal(gradient, gradient_of(x, t, z_loss=float(i)))


def test_a_gradient_is_a_tensor_like_any_other():
    x, t = example()
    gradient = gradient_of(x, t)
    expected = gradient.clone()
    assert torch.equal(copy.deepcopy(gradient), expected)
    assert torch.equal(torch.from_numpy(gradient.numpy()), expected)
    assert torch.equal(gradient.clone().share_memory_(), expected)
    gradient.share_memory_()
    assert gradient.is_shared() and torch.equal(gradient, expected)
    small = gradient_of(x, t).resize_(4, 4)
    assert torch.equal(small, expected.flatten()[:16].view(4, 4))
    for resize in lambda: small.resize_(2 * SHAPE[0], SHAPE[1]), lambda: small.untyped_storage().resize_(0):
        with pytest.raises(RuntimeError, match="not resizable"):
            resize()


def test_losses_of_each_element_and_permuted_logits_have_it_too():
    x = torch.randn(4, 8, 512, 512).contiguous(memory_format=torch.channels_last).requires_grad_()
    before = torchfast.memory_stats()["in_use_bytes"]
    loss = torchfast.sigmoid_focal_loss(x, torch.zeros_like(x))
    assert torchfast.memory_stats()["in_use_bytes"] - before == x.nbytes and loss.stride() == x.stride()
    loss.sum().backward()
    assert x.grad.stride() == x.stride() and torchfast.memory_stats()["in_use_bytes"] - before == 2 * x.nbytes
    expanded = torch.randn(1, 8192).requires_grad_()
    gradient_of(expanded.expand(1024, 8192), torch.zeros(1024, dtype=torch.long))  # no dense one


def test_threads_use_it_at_once():
    cases = [example(200) for _ in range(4)]
    expected = [gradient_of(*case) for case in cases]
    failed = []

    def work(number):
        for _ in range(10):
            if not torch.equal(gradient_of(*cases[number]), expected[number]):
                failed.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and torchfast.memory_stats()["in_use_bytes"] == 4 * (8 << 20)  # whole huge pages


def run(script, **environment):
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})


SETUP = """
import torch, torchfast
x, t = torch.randn(1024, 2048).requires_grad_(), torch.zeros(1024, dtype=torch.long)
gradient = lambda: torch.autograd.grad(torchfast.cross_entropy(x, t), x)[0]
"""


def test_buckets_and_an_optimizer_train_as_without():
    script = """
import os, tempfile
from torch import nn
torch.distributed.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/init", rank=0, world_size=1)
logits = nn.Parameter(torch.randn(1024, 2048, generator=torch.Generator().manual_seed(0)))
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.logits = logits
    def forward(self):
        return torchfast.cross_entropy(self.logits, t)
model = nn.parallel.DistributedDataParallel(Model(), gradient_as_bucket_view=True)
optimizer = torch.optim.SGD(model.parameters(), 500.0, momentum=0.9)
for _ in range(4):
    optimizer.zero_grad()
    model().backward()
    optimizer.step()
print(torchfast.memory_stats()["mapped"] > 0, logits.double().sum().item(), logits.double().square().sum().item())
torch.distributed.destroy_process_group()
"""
    ours, without = run(SETUP + script), run(SETUP + script, TORCHFAST_CACHE="0")
    assert ours.stdout.split()[0] == "True" and without.stdout.split()[0] == "False", ours.stderr + without.stderr
    assert ours.stdout.split()[1:] == without.stdout.split()[1:]


def test_batches_of_any_size_use_one_memory():
    example_of = [example(rows) for rows in (1024, 700, 900, 513, 1000, 650)]
    before = torchfast.memory_stats()["mapped"]
    for _ in range(3):
        for x, t in example_of:
            gradient_of(x, t)
    assert torchfast.memory_stats()["mapped"] == before + 1


def test_what_a_metric_sorts_in_is_used_again_and_never_by_two_at_once():
    score, label = torch.rand(1 << 20), torch.rand(1 << 20) < 0.3
    torchfast.empty_cache()
    expected = torchfast.metrics.classification_metrics(score, label, "roc_auc")
    before = torchfast.memory_stats()
    assert before["kept_bytes"] > 0 and before["in_use_bytes"] == 0
    with ThreadPoolExecutor(2) as pool:
        each = list(pool.map(lambda _: torchfast.metrics.classification_metrics(score, label, "roc_auc"), range(8)))
    assert each == [expected] * 8
    stats = torchfast.memory_stats()
    assert stats["reused"] > before["reused"] and stats["in_use_bytes"] == 0


def test_a_forked_process_has_its_own():
    script = """
import os
torch.set_num_threads(1)
kept = gradient()
expected = kept.clone()
gradient()
if child := os.fork():
    for _ in range(5):
        assert torch.equal(gradient(), expected)
    assert os.waitpid(child, 0)[1] == 0 and torch.equal(kept, expected)
else:
    kept.zero_()
    same = all(torch.equal(gradient(), expected) for _ in range(5))
    os._exit(0 if same else 1)
"""
    result = run(SETUP + script)
    assert result.returncode == 0, result.stderr


def test_a_gradient_may_outlive_everything():
    result = run(SETUP + "import builtins\nbuiltins.kept = gradient()\nbuiltins.cycle = [builtins.kept]\n")
    assert (result.returncode, result.stderr) == (0, "")


def test_it_can_be_turned_off():
    script = "gradient(); gradient(); print(torchfast.memory_stats())"
    result = run(SETUP + script, TORCHFAST_CACHE="0")
    assert result.stdout.strip() == str(dict.fromkeys(torchfast.memory_stats(), 0)), result.stderr


def test_a_process_that_may_have_no_more_falls_back_on_what_the_system_gives():
    """A limit on addresses that leaves room for the logits and two gradients, but not for what would be kept beside."""
    script = """
import resource
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 5 * x.nbytes, used + 5 * x.nbytes))
for rows in (1024, 700, 900, 500, 1024, 600):
    logits = x[:rows].detach().requires_grad_()
    torch.autograd.grad(torchfast.cross_entropy(logits, t[:rows]), logits)
print("done")
"""
    result = run(SETUP.replace("2048", "20480") + script)
    assert result.stdout == "done\n", result.stderr
