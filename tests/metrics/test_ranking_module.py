"""RankingMetrics: sums over batches and processes, as a torchmetrics metric."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from processes import run_together
from ranking_process import NAMES, batch
from torchmetrics import MetricCollection
from torchmetrics.retrieval import RetrievalMRR

from torchfast.metrics import RankingMetrics, ranking_metrics


def states_of(metric):
    return {name: getattr(metric, name) for name in metric._defaults}


def values(found):
    return {name: value.item() for name, value in found.items()}


@pytest.fixture
def batches(device):
    return [[x.to(device) for x in batch(n)] for n in range(5)]


def all_of(batches):
    return [torch.cat(column) for column in zip(*batches, strict=True)]


def updated(batches, device, *args, **kwargs):
    metric = RankingMetrics(*args, **kwargs).to(device)
    for preds, target, _ in batches:
        metric.update(preds, target)
    return metric


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"empty": "skip"},
        {"empty": "one", "ties": "stable", "gain": "exp"},
        {"preset": "xgboost"},
        {"gain": (0, 1, 5)},
    ],
    ids=str,
)
def test_many_batches_are_one(options, batches, device):
    preds, target, _ = all_of(batches)
    expected = ranking_metrics(preds, target, NAMES, **options)
    assert values(updated(batches, device, NAMES, **options).compute()) == pytest.approx(values(expected), rel=1e-14)


def test_weights(batches, device):
    metric = RankingMetrics(NAMES, empty="skip").to(device)
    for preds, target, weight in batches:
        metric.update(preds, target, query_weight=weight)
    preds, target, weight = all_of(batches)
    expected = ranking_metrics(preds, target, NAMES, query_weight=weight, empty="skip")
    assert values(metric.compute()) == pytest.approx(values(expected), rel=1e-14)


def test_every_form_of_input(device):
    preds, target = torch.randn(4, 6, device=device), torch.randint(2, (4, 6), device=device)
    lengths = torch.tensor([6, 0, 3, 5], device=device)
    mask = torch.arange(6, device=device) < lengths[:, None]
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    counts = (target * mask).sum(1) + 1
    flat = preds[mask], target[mask]
    metric = RankingMetrics(NAMES).to(device)
    metric.update(preds, target, mask=mask, num_relevant=counts)
    metric.update(preds, target, lengths=lengths, unretrieved=torch.ones(4, 1, device=device))
    metric.update(*flat, offsets=offsets)
    metric.update(*flat, indexes=mask.nonzero()[:, 0])
    parts = [
        ranking_metrics(preds, target, NAMES, lengths=lengths, num_relevant=counts, reduction="none"),
        ranking_metrics(preds, target, NAMES, mask=mask, unretrieved=torch.ones(4, 1, device=device), reduction="none"),
        ranking_metrics(*flat, NAMES, offsets=offsets, reduction="none"),
        ranking_metrics(*flat, NAMES, indexes=mask.nonzero()[:, 0], reduction="none"),
    ]
    expected = {name: torch.cat([part[name] for part in parts]).mean().item() for name in NAMES}
    assert values(metric.compute()) == pytest.approx(expected, rel=1e-14)


def test_the_state_is_two_float64_numbers_a_metric_whatever_was_seen(batches, device):
    empty, full = RankingMetrics(NAMES).to(device), updated(batches * 20, device, NAMES)
    for metric in empty, full:
        (state,) = states_of(metric).values()
        assert state.shape == (2, 3) and state.dtype == torch.float64
    assert full.half().compute()["mrr"].dtype == torch.float64


def test_before_the_first_query_it_is_nan(device):
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert all(math.isnan(v) for v in values(RankingMetrics(NAMES).to(device).compute()).values())


def test_reset(batches, device):
    for per_query in False, True:
        metric = updated(batches, device, NAMES, per_query=per_query)
        metric.reset()
        metric.update(*batches[1][:2])
        expected = ranking_metrics(*batches[1][:2], NAMES, reduction="none" if per_query else "mean")
        assert {n: v.tolist() for n, v in metric.compute().items()} == {n: v.tolist() for n, v in expected.items()}


def test_forward_gives_the_batch_and_adds_it(batches, device):
    metric = RankingMetrics(NAMES).to(device)
    for preds, target, _ in batches:
        assert values(metric(preds, target)) == values(ranking_metrics(preds, target, NAMES))
    expected = updated(batches, device, NAMES).compute()
    assert values(metric.compute()) == pytest.approx(values(expected), rel=1e-14)


def test_per_query_keeps_the_values_of_all_queries(batches, device):
    preds, target, _ = all_of(batches)
    found = updated(batches, device, NAMES, per_query=True, empty="skip").compute()
    expected = ranking_metrics(preds, target, NAMES, reduction="none", empty="skip")
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, equal_nan=True)
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        nothing = RankingMetrics(NAMES, per_query=True).to(device).compute()
    assert all(v.shape == (0,) for v in nothing.values())


def test_per_query_refuses_weights(batches, device):
    preds, target, weight = batches[0]
    with pytest.raises(ValueError, match="query_weight must be None for per_query=True"):
        RankingMetrics("mrr", per_query=True).to(device).update(preds, target, query_weight=weight)


def test_wrong_options_are_refused_at_once():
    with pytest.raises(ValueError, match=r"did you mean 'ndcg@10'\?"):
        RankingMetrics(["ndgc@10"])
    with pytest.raises(ValueError, match="ties must be left out with preset='ranx'"):
        RankingMetrics("mrr", preset="ranx", ties="average")


def test_a_refused_batch_changes_nothing(batches, device):
    metric = updated(batches, device, NAMES)
    before = copy.deepcopy(states_of(metric))
    with pytest.raises(ValueError, match="target must be finite and >= 0"):
        metric.update(batches[0][0], batches[0][1] - 9)
    for name, state in states_of(metric).items():
        assert torch.equal(state, before[name])


def test_copies_and_pickles(batches, device):
    for per_query in False, True:
        metric = updated(batches, device, NAMES, per_query=per_query)
        for copied in copy.deepcopy, RankingMetrics.clone, lambda m: pickle.loads(pickle.dumps(m)):
            other = copied(metric)
            for m in metric, other:
                m.update(*batches[0][:2])
            found, expected = other.compute(), metric.compute()
            assert {n: v.tolist() for n, v in found.items()} == {n: v.tolist() for n, v in expected.items()}


def test_state_dict_is_of_these_options(batches, device):
    metric = updated(batches, device, NAMES, ties="stable")
    metric.persistent(True)
    other = RankingMetrics(NAMES, ties="stable").to(device)
    other.load_state_dict(metric.state_dict())
    other._update_count = 1
    assert values(other.compute()) == values(metric.compute())
    third = RankingMetrics(NAMES, ties="average").to(device)
    third.persistent(True)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        third.load_state_dict(metric.state_dict())


def test_in_a_collection_beside_torchmetrics(device):
    preds, target = torch.rand(6, 5, device=device), torch.randint(2, (6, 5), device=device)
    indexes = torch.arange(6, device=device)[:, None].expand(6, 5)
    collection = MetricCollection({"fast": RankingMetrics(["mrr", "ndcg@3"]), "slow": RetrievalMRR()}).to(device)
    collection.update(preds, target, indexes=indexes)
    found = collection.compute()
    assert set(found) == {"mrr", "ndcg@3", "slow"}
    assert found["mrr"].item() == pytest.approx(found["slow"].item(), abs=1e-6)


def test_a_collection_does_not_merge_metrics_that_agree_on_the_first_batch(device):
    """torchmetrics lets metrics of the same states share them."""
    collection = MetricCollection({"a": RankingMetrics("recall@1"), "b": RankingMetrics("hit_rate@1")}).to(device)
    preds = torch.tensor([[2.0, 1.0]], device=device)
    for target in torch.tensor([[1, 0]], device=device), torch.tensor([[1, 1]], device=device):
        collection.update(preds, target)
    assert values(collection.compute()) == {"recall@1": 0.75, "hit_rate@1": 1.0}


@pytest.mark.parametrize(
    "runs", [((2, 3), (3, 0)), ((2, 3, 1), (3, 1, 0), (0, 0, 0), (1, 0, 4), (0, 2, 1))], ids=["two", "three"]
)
def test_processes_with_different_numbers_of_batches(runs, tmp_path):
    for counts, found in zip(runs, run_together("metrics/ranking_process.py", runs, tmp_path), strict=True):
        batches = [batch(n) for n in range(sum(counts))] or [[x[:0] for x in batch(0)]]
        preds, target, weight = all_of(batches)
        expected = {f"mean_{n}": v for n, v in ranking_metrics(preds, target, NAMES).items()}
        expected |= {f"skip_{n}": v for n, v in ranking_metrics(preds, target, NAMES, empty="skip").items()}
        expected |= {f"each_{n}": v for n, v in ranking_metrics(preds, target, NAMES, reduction="none").items()}
        expected |= {f"weighted_{n}": v for n, v in ranking_metrics(preds, target, NAMES, query_weight=weight).items()}
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value.tolist(), rel=1e-14, nan_ok=True), (counts, name)


def test_a_query_in_two_batches_counts_as_two():
    """As the docstring says: indexes are compared within a batch."""
    preds, target, query = torch.tensor([0.2, 0.9, 0.1]), torch.tensor([1, 0, 1]), torch.tensor([7, 7, 7])
    whole, parted = RankingMetrics("mrr"), RankingMetrics("mrr")
    whole.update(preds, target, indexes=query)
    for part in slice(0, 2), slice(2, 3):
        parted.update(preds[part], target[part], indexes=query[part])
    assert whole.compute()["mrr"] == 1 / 2 and parted.compute()["mrr"] == (1 / 2 + 1) / 2
