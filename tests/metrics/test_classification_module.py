"""ClassificationMetrics and RegressionMetrics: batches and processes, as torchmetrics metrics."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from classification_process import BINARY, NAMES, OPTIONS, VALUES, batch
from processes import run_together
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy

from torchfast.metrics import (
    ClassificationMetrics,
    RegressionMetrics,
    average_precision_score,
    classification_metrics,
    regression_metrics,
    roc_auc_score,
)

TASKS = ("binary", "multiclass", "multilabel")
every_task = pytest.mark.parametrize("task", TASKS)
either = pytest.mark.parametrize("weighted", (False, True), ids=("plain", "weighted"))


def batches_of(task, device, numbers=range(5)):
    return [[x.to(device) for x in batch(n)[task]] for n in numbers]


def all_of(batches):
    return [torch.cat(column) for column in zip(*batches, strict=True)]


def made(task, device, names=None, **options):
    if task == "regression":
        return RegressionMetrics(names or VALUES, num_outputs=2, **options).to(device)
    return ClassificationMetrics(names or NAMES[task], **OPTIONS[task], **options).to(device)


def updated(metric, batches, weighted=False):
    for preds, target, weight in batches:
        metric.update(preds, target, **({"sample_weight": weight} if weighted else {}))
    return metric


def at_once(task, batches, weighted=False, names=None):
    preds, target, weight = all_of(batches)
    given = {"sample_weight": weight} if weighted else {}
    if task == "regression":
        return regression_metrics(preds, target, names or VALUES, **given)
    return classification_metrics(preds, target, names or NAMES[task], **OPTIONS[task], **given)


def assert_same(found, expected, rtol=1e-13):
    """Counts and areas of integers to the last digit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=0, equal_nan=True)


@every_task
@either
def test_many_batches_are_one(task, weighted, device):
    batches = batches_of(task, device)
    found = updated(made(task, device, weighted=weighted), batches, weighted).compute()
    assert_same(found, at_once(task, batches, weighted), rtol=1e-13 if weighted else 0)


@either
def test_many_batches_of_regression_are_one(weighted, device):
    """Also where the mean, 1e6, is far from 0."""
    batches = batches_of("regression", device)
    found = updated(made("regression", device), batches, weighted).compute()
    assert_same(found, at_once("regression", batches, weighted), rtol=1e-12)


def test_weighted_takes_batches_without_weights(device):
    for task in TASKS:
        batches = batches_of(task, device)
        found = updated(made(task, device, weighted=True), batches).compute()
        for name, value in at_once(task, batches).items():
            torch.testing.assert_close(found[name], value.double(), rtol=1e-13, atol=0)


@every_task
@either
def test_in_bins_it_is_wrong_by_no_more_than_the_bound(task, weighted, device):
    batches = batches_of(task, device, range(12))
    averages = ("",) if task == "binary" else ("@macro", "@micro", "@weighted", "@none")
    names = [f"{kind}{average}" for kind in ("roc_auc", "average_precision") for average in averages]
    exact = at_once(task, batches, weighted, names)
    errors = []
    for bins in 2, 5, 40, 10**5:
        metric = updated(made(task, device, names, bins=bins, weighted=weighted), batches, weighted)
        found, bounds = metric.compute(), metric.error_bounds()
        for name in names:
            error = (found[name] - exact[name]).abs()
            assert (error <= bounds[name] + 1e-12).all(), (bins, name, error, bounds[name])
        errors.append(max(b.max().item() for name, b in bounds.items() if name.startswith("roc_auc")))
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.05 and errors[-1] < 1e-3
    assert all(v == 0 for v in made(task, device, names).error_bounds().values())


def test_scores_at_the_bins_own_values_are_exact(device):
    """Scores of one bin count as tied."""
    preds = torch.randint(8, (500,), device=device) / 8 + 1 / 16
    target = torch.randint(2, (500,), device=device)
    metric = ClassificationMetrics(["roc_auc", "average_precision"], bins=8).to(device)
    metric.update(preds, target)
    found = metric.compute()
    assert found["roc_auc"].item() == pytest.approx(roc_auc_score(preds, target).item(), rel=1e-14)
    assert found["average_precision"].item() == pytest.approx(average_precision_score(preds, target).item(), rel=1e-14)


def test_the_state_of_bins_and_counts_is_of_a_fixed_size(device):
    batches = batches_of("binary", device)
    few, many = (updated(made("binary", device, bins=16), batches * n) for n in (1, 20))
    for name in few._defaults:
        assert getattr(few, name).shape == getattr(many, name).shape
        assert getattr(few, name).dtype == torch.int64


def test_scores_are_kept_compactly(device):
    for task, size in ("binary", 4 + 1), ("multiclass", 3 * 4 + 1), ("multilabel", 3 * 4 + 3):
        batches = batches_of(task, device)
        metric = updated(made(task, device, ["roc_auc"]), batches)
        samples = len(all_of(batches)[0])
        kept = [
            t for name in metric._defaults for t in getattr(metric, name) if isinstance(getattr(metric, name), list)
        ]
        assert sum(t.nbytes for t in kept) == size * samples


def test_float64_scores_are_refused_rather_than_rounded(device):
    preds = torch.tensor([0.5, 0.5 + 1e-12], dtype=torch.float64, device=device)
    target = torch.tensor([0, 1], device=device)
    with pytest.raises(TypeError, match="preds must be float32 or half precision, or score_dtype=torch.float64"):
        ClassificationMetrics("roc_auc").to(device).update(preds, target)
    metric = ClassificationMetrics("roc_auc", score_dtype=torch.float64).to(device)
    metric.update(preds, target)
    assert metric.compute()["roc_auc"] == 1


@pytest.mark.parametrize("task", (*TASKS, "regression"))
def test_reset(task, device):
    batches = batches_of(task, device)
    metric = updated(made(task, device), batches)
    metric.reset()
    updated(metric, batches[1:2])
    assert_same(metric.compute(), at_once(task, batches[1:2]))


@pytest.mark.parametrize("task", (*TASKS, "regression"))
def test_forward_gives_the_batch_and_adds_it(task, device):
    batches = batches_of(task, device)
    metric = made(task, device)
    for one in batches:
        assert_same(metric(*one[:2]), at_once(task, [one]))
    assert_same(metric.compute(), at_once(task, batches), rtol=1e-12)


@pytest.mark.parametrize("task", (*TASKS, "regression"))
def test_state_dict_round_trip(task, device):
    batches = batches_of(task, device)
    metric = updated(made(task, device), batches)
    metric.persistent(True)
    saved = pickle.loads(pickle.dumps(metric.state_dict()))
    other = made(task, device)
    other.persistent(True)
    other.load_state_dict(saved)
    other._update_count = 1
    assert_same(other.compute(), metric.compute(), rtol=0)
    updated(other, batches[:1])
    assert_same(other.compute(), at_once(task, [*batches, batches[0]]), rtol=1e-12)


@pytest.mark.parametrize("task", (*TASKS, "regression"))
def test_copies_and_pickles(task, device):
    batches = batches_of(task, device)
    metric = updated(made(task, device), batches)
    for copied in copy.deepcopy, lambda m: m.clone(), lambda m: pickle.loads(pickle.dumps(m)):
        assert_same(updated(copied(metric), batches[:1]).compute(), at_once(task, [*batches, batches[0]]), rtol=1e-12)
    assert_same(metric.compute(), at_once(task, batches), rtol=1e-12)


def test_other_options_have_another_state(device):
    metric = ClassificationMetrics("accuracy", num_classes=3)
    metric.persistent(True)
    other = ClassificationMetrics("accuracy", num_classes=3, ignore_index=0)
    other.persistent(True)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict(metric.state_dict())


def test_a_refused_batch_changes_nothing(device, monkeypatch):
    monkeypatch.setenv("TORCHFAST_CHECK", "1")
    (preds, target, _), *_ = batches_of("binary", device)
    metric = made("binary", device)
    metric.update(preds, target)
    before = metric.compute()
    metric._computed = None
    for wrong in (preds * math.nan, target), (preds, target + 1), (preds * 9, target):
        with pytest.raises((ValueError, IndexError)):
            metric.update(*wrong)
    assert_same(metric.compute(), before, rtol=0)


def test_nan_propagates_into_every_value(device):
    (preds, target, _), *_ = batches_of("binary", device)
    metric = ClassificationMetrics(BINARY, nan="propagate").to(device)
    metric.update(preds, target)
    metric.update(preds.masked_fill(preds == preds.max(), math.nan), target)
    assert all(v.isnan() for v in metric.compute().values())
    bins = ClassificationMetrics("roc_auc", nan="propagate", bins=4).to(device)
    bins.update(preds * math.nan, target)
    assert bins.compute()["roc_auc"].isnan()


def test_wrong_arguments_are_named(device):
    with pytest.raises(ValueError, match=r"did you mean 'recall@macro'\?"):
        ClassificationMetrics(["recal@macro"], num_classes=3)
    with pytest.raises(ValueError, match="bins must be None or an integer >= 2, got 1"):
        ClassificationMetrics("roc_auc", bins=1)
    with pytest.raises(ValueError, match="bins must be None where neither roc_auc nor average_precision is asked"):
        ClassificationMetrics("accuracy", bins=10)
    with pytest.raises(ValueError, match="score_dtype must be torch.float32 or torch.float64"):
        ClassificationMetrics("roc_auc", score_dtype=torch.float16)
    with pytest.raises(ValueError, match="num_classes must be given for task='multilabel'"):
        ClassificationMetrics("roc_auc", task="multilabel")
    preds, target, weight = batches_of("binary", device)[0]
    with pytest.raises(ValueError, match="sample_weight must be None unless the metric was made with weighted=True"):
        ClassificationMetrics("accuracy").to(device).update(preds, target, sample_weight=weight)
    with pytest.raises(ValueError, match="outputs of preds must be 2, as num_outputs says, got 1"):
        RegressionMetrics("mae", num_outputs=2).to(device).update(preds, preds)
    with pytest.raises(ValueError, match=r"metrics must be of 'mae', .*did you mean 'rmse'\?"):
        RegressionMetrics("rsme")


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
@pytest.mark.filterwarnings("ignore:there are no positive samples:UserWarning")
def test_before_the_first_sample_it_is_nan_or_zero_division(device):
    for task in TASKS:
        found = made(task, device).compute()
        assert not found.get("confusion_matrix", torch.zeros(1)).any()
        for name in "accuracy", "roc_auc", "average_precision":
            assert found[name].isnan().all()
    assert all(v.isnan() for v in made("regression", device).compute().values())


def test_in_a_collection_beside_torchmetrics(device):
    (preds, target, _), *_ = batches_of("binary", device)
    metrics = {"fast": ClassificationMetrics(["accuracy", "f1"]), "slow": BinaryAccuracy()}
    collection = MetricCollection(metrics).to(device)
    collection.update(preds, target)
    found = collection.compute()
    assert set(found) == {"accuracy", "f1", "slow"}
    assert found["accuracy"].item() == pytest.approx(found["slow"].item(), abs=1e-6)


def test_a_collection_does_not_merge_metrics_that_agree_on_the_first_batch(device):
    """torchmetrics lets metrics of the same states share them."""
    a, b = ClassificationMetrics("precision", threshold=0.5), ClassificationMetrics("precision", threshold=0.7)
    collection = MetricCollection({"a": a, "b": b}, compute_groups=True).to(device)
    target = torch.tensor([1, 0], device=device)
    for preds in torch.tensor([0.9, 0.1], device=device), torch.tensor([0.6, 0.6], device=device):
        collection.update(preds, target)
    found = {name: metric.compute()["precision"].item() for name, metric in collection.items(keep_base=True)}
    assert found == {"a": 2 / 3, "b": 1.0}


@pytest.mark.parametrize("runs", [((2, 3), (3, 0)), ((2, 3, 1), (3, 1, 0), (1, 0, 2))], ids=["two", "three"])
def test_processes_with_different_numbers_of_batches(runs, tmp_path):
    for counts, found in zip(runs, run_together("metrics/classification_process.py", runs, tmp_path), strict=True):
        for weighted, task in itertools.product((False, True), (*TASKS, "regression")):
            batches = batches_of(task, "cpu", range(sum(counts)))
            for name, value in at_once(task, batches, weighted).items():
                here = torch.tensor(found[f"{task} exact {name} {weighted}"], dtype=value.dtype)
                torch.testing.assert_close(here, value, rtol=1e-12, atol=0)
            if task != "regression":
                binned = updated(made(task, "cpu", ["roc_auc"], bins=8, weighted=weighted), batches, weighted)
                here = found[f"{task} binned roc_auc {weighted}"]
                assert here == pytest.approx(binned.compute()["roc_auc"].item(), rel=1e-12)
