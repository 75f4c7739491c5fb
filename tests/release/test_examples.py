"""The examples run as they are, but shorter, and what they train has learned."""

import itertools
import runpy
from pathlib import Path

import pytest
import torch
from rich.console import Console

EXAMPLES = Path(__file__).parents[2] / "examples"
SCORES = ("accuracy", "macro-F1", "tail's F1")


@pytest.fixture
def main(name, request):
    """The function of an example."""
    if request.config.getoption("--kernel"):
        pytest.skip("the examples run on the kernels that are installed; the default run does that")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are small
    yield runpy.run_path(str(EXAMPLES / name))["main"]
    torch.set_num_threads(threads)


def train_digits(main, tmp_path):
    picture = tmp_path / "curves.png"
    runs = main(["--quick", "--device", "cpu", "--out", str(picture)])
    assert len(runs) == 3 * 4  # schedules, losses
    assert picture.stat().st_size > 10_000
    for run in runs:
        losses, _, rates = zip(*(epoch.values() for epoch in run.history), strict=True)
        assert losses[-1] < losses[0]
        assert all(later <= earlier for earlier, later in itertools.pairwise(rates))
        assert rates[-1] < rates[0] or "Plateau" in run.recipe
        if "Plateau" in run.recipe:  # the others stop early
            assert run.scores["accuracy"] > 40


def train_language_model(main, tmp_path):
    found = main(["--quick"])
    assert found["perplexity"] < 0.6 * found["of counting"]
    if found["one step"] is not None:
        assert found["one step"] < 0.5 * found["two steps"]


def segment_digits(main, tmp_path):
    found = main(["--quick"])
    assert all(scores["background"] > 0.9 for scores in found.values())
    assert found["weighted"]["digits"] > max(0.25, 1.5 * found["cross entropy"]["digits"])


def detect_digits(main, tmp_path):
    found = main(["--quick"])
    assert all(precision > 0.3 for precisions in found.values() for precision in precisions)  # of chance: 0.005


def retrieve_digits(main, tmp_path):
    found = main(["--quick"])
    assert found["trained network"]["map"] > found["pixels"]["map"] + 0.1
    assert found["trained network"]["mrr"] > 0.9


def match_halves(main, tmp_path):
    found = main(["--quick"])
    trained = found["trained"]
    assert trained["mrr"] > 5 * found["untrained"]["mrr"] and trained["hit_rate@100"] > 0.8
    for name, value in found["from the matrix"].items():
        assert abs(value - trained[name]) < 0.005  # a product of matrices rounds in another order
    assert found["lists of 100"]["hit_rate@10"] == found["from the matrix"]["hit_rate@10"]
    assert found["lists of 100"]["ndcg"] < trained["ndcg"] and found["among all items"]["mrr"] < trained["mrr"]


def with_lightning(main, tmp_path):
    found = main()
    assert found["accuracy"] > 0.9 and found["f1@macro"] > 0.9
    assert found["accuracy"] < found["mrr"] < found["accuracy@3"]


def with_ignite(main, tmp_path):
    found = main()
    assert set(found) == {"accuracy", "accuracy@3", "f1@macro"}
    assert found["accuracy"] > 0.9 and found["f1@macro"] > 0.9


def with_transformers(main, tmp_path):
    found = main()
    assert found["eval_loss"] < 2.9  # of the frequencies of bytes: 3.26
    assert found["eval_accuracy"] > 0.2 and found["eval_accuracy@5"] > 0.5


@pytest.mark.parametrize("name", sorted(str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.py")))
def test_what_an_example_trains_has_learned(name, main, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    globals()[Path(name).stem](main, tmp_path)
    if not name.startswith("recipes"):  # whose frameworks print as they like
        assert "…" not in capsys.readouterr().out, "something is cut off in 80 columns"


@pytest.mark.parametrize("name", ["train_digits.py"])
def test_no_score_of_several_seeds_is_cut_off_in_80_columns(name, main):
    of = main.__globals__
    score = {"cross entropy": (79.9, 100.0)}  # +-14.2; the others', and their gains, have as many digits
    runs = [
        of["Run"](recipe, loss, seed, [], dict.fromkeys(SCORES, score.get(loss, (90.1, 70.0))[seed]))
        for recipe, loss, seed in itertools.product(of["RECIPES"], of["LOSSES"], (0, 1))
    ]
    console = Console(width=80)
    with console.capture() as captured:
        console.print(of["score_table"](runs))
    printed = captured.get()
    assert "…" not in printed
    assert printed.count("90.0 ± 14.2") == 3 * len(SCORES) and printed.count("-9.9 ± 28.4") == 3 * 3


@pytest.mark.parametrize("name", ["recipes/with_transformers.py"])
def test_accumulated_gradients_are_those_of_one_batch(name, main):
    one, four = main(steps=8, batch=16, accumulate=1), main(steps=8, batch=4, accumulate=4)
    assert abs(one["eval_loss"] - four["eval_loss"]) < 1e-4
