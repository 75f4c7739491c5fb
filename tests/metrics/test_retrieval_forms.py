"""What retrieval metrics have beside ranking metrics: PyKEEN's definitions, lists of retrieved items, streams."""

from __future__ import annotations

import copy
import math
import pickle

import numpy
import pytest
import torch
from torchmetrics import MetricCollection

from torchfast.metrics import (
    RetrievalMetrics,
    RetrievedMetrics,
    ranking_metrics,
    retrieval_metrics,
    retrieval_ranks,
    retrieved_metrics,
)

NAMES = ["ndcg@3", "mrr@5", "map@5", "recall@2", "precision@4", "hit_rate@1"]
close = {"rtol": 1e-12, "atol": 1e-13, "equal_nan": True}


def values(found):
    return {name: value.item() for name, value in found.items()}


@pytest.fixture
def graph(device):
    """Heads with relations, entities, and the true tails of each."""
    g = torch.Generator().manual_seed(3)
    queries, items = (torch.randint(-2, 3, (size, 2), generator=g).float().to(device) for size in (8, 40))
    relevant = torch.rand(8, 40, generator=g).argsort(1)[:, :3].contiguous()
    relevant[5, 1:], relevant[6] = -1, -1
    return queries, items, relevant.to(device)


# ---- PyKEEN --------------------------------------------------------------------------------------

PYKEEN = ["mean_rank", "mrr", "hit_rate@1", "hit_rate@10", "adjusted_mean_rank_index"]


def by_pykeen(scores, relevant, ties, weight):
    """PyKEEN's own steps, in NumPy: filter_scores_ makes the other true tails NaN, RankBuilder counts, and its metrics
    (inverse_harmonic_mean_rank, hits_at_k, adjusted_arithmetic_mean_rank_index) average."""
    rank_of, candidates, weights = [], [], []
    for row, tails, of_query in zip(scores, relevant, weight, strict=True):
        for tail in tails[tails >= 0]:
            kept = row.copy()
            kept[[other for other in tails if other >= 0 and other != tail]] = numpy.nan
            optimistic, pessimistic = (kept > row[tail]).sum() + 1, (kept >= row[tail]).sum()
            rank = {"optimistic": optimistic, "pessimistic": pessimistic, "realistic": (optimistic + pessimistic) / 2}
            rank_of.append(float(rank[ties]))
            candidates.append(numpy.isfinite(kept).sum())
            weights.append(of_query)
    ranks, mean = numpy.asarray(rank_of), lambda x: float(numpy.average(x, weights=weights))
    expectation = mean(0.5 * (numpy.asarray(candidates) + 1))
    return {
        "mean_rank": mean(ranks),
        "mrr": mean(numpy.reciprocal(ranks)),
        "hit_rate@1": mean(ranks <= 1),
        "hit_rate@10": mean(ranks <= 10),
        "adjusted_mean_rank_index": 1 - (mean(ranks) - 1) / (expectation - 1),
    }


@pytest.mark.parametrize("ties", ["realistic", "optimistic", "pessimistic"])
@pytest.mark.parametrize("weighted", [False, True])
def test_pykeens_metrics_are_those_of_its_own_steps(ties, weighted, graph, device):
    queries, items, relevant = graph
    weight = torch.arange(1.0, 9.0, device=device) if weighted else None
    given = {"filtered": True, "preset": "pykeen", "ties": ties, "query_weight": weight}
    found = retrieval_metrics(queries, items, relevant, PYKEEN, **given)
    scores = (queries @ items.T).cpu().double().numpy()
    of_queries = [1.0] * 8 if weight is None else weight.tolist()
    assert values(found) == pytest.approx(by_pykeen(scores, relevant.cpu().numpy(), ties, of_queries), rel=1e-12)
    streamed = RetrievalMetrics(PYKEEN, filtered=True, preset="pykeen", ties=ties).to(device)
    for part in (slice(0, 3), slice(3, 7), slice(7, 8)):
        some = None if weight is None else weight[part]
        streamed.update(queries[part], items, relevant[part], query_weight=some)
    assert values(streamed.compute()) == pytest.approx(values(found), rel=1e-12)


def test_pykeens_realistic_mrr_is_no_expectation_of_the_reciprocal_rank(device):
    """Two tied candidates have ranks 1 and 2: PyKEEN takes 1 / 1.5, the expectation is (1 + 1 / 2) / 2."""
    queries, items, relevant = (
        torch.ones(1, 1, device=device),
        torch.ones(2, 1, device=device),
        torch.tensor([0]).to(device),
    )
    assert retrieval_metrics(queries, items, relevant, "mrr", preset="pykeen")["mrr"].item() == pytest.approx(2 / 3)
    assert retrieval_metrics(queries, items, relevant, "mrr")["mrr"] == 0.75


def test_pykeen_does_not_count_candidates_with_infinite_scores(device):
    """Its number of options is torch.isfinite(all_scores).sum(); here an item with a score of -inf is a candidate."""
    queries, relevant = torch.ones(1, 1, device=device), torch.tensor([0], device=device)
    items = torch.tensor([[2.0], [3.0], [1.0], [-math.inf]], device=device)
    found = retrieval_metrics(queries, items, relevant, "adjusted_mean_rank_index", preset="pykeen", filtered=True)
    peer = by_pykeen((queries @ items.T).cpu().numpy(), relevant[None].cpu().numpy(), "realistic", [1.0])
    assert peer["adjusted_mean_rank_index"] == 0  # the second of three
    assert found["adjusted_mean_rank_index"].item() == pytest.approx(1 / 3)  # the second of four


def test_pykeens_values_have_the_shape_of_the_relevant_items(graph):
    queries, items, relevant = graph
    found = retrieval_metrics(queries, items, relevant, ["mean_rank"], preset="pykeen", filtered=True, reduction="none")
    larger, equal, _ = retrieval_ranks(queries, items, relevant, filtered=True)
    expected = torch.where(relevant >= 0, larger + (equal + 1) / 2, torch.nan).double()
    torch.testing.assert_close(found["mean_rank"], expected, **close)


def test_a_nan_among_the_candidates_makes_pykeens_values_nan_or_an_error_or_comes_last(graph):
    queries, items, relevant = graph
    items = items.clone()
    items[int(relevant[0, 0])] = math.nan  # it is no candidate of the others that are relevant with it
    given = {"preset": "pykeen", "filtered": True, "reduction": "none"}
    found = retrieval_metrics(queries, items, relevant, PYKEEN, **given)
    for value in found.values():
        assert value[0, 0].isnan() and value[0, 1:].isfinite().all() and value[1].isnan().all()
    last = retrieval_metrics(queries, items, relevant, ["mean_rank"], nan="last", **given)["mean_rank"]
    assert last[0, 0] == 38  # of 40 without two others
    with pytest.raises(ValueError, match="scores must not be NaN with nan='error', got one in query 0"):
        retrieval_metrics(queries, items, relevant, PYKEEN, nan="error", **given)


def test_an_item_without_other_candidates_has_no_part_in_the_adjusted_index(device):
    queries, items = torch.ones(2, 1, device=device), torch.ones(2, 1, device=device)
    relevant = torch.tensor([[0, 1], [1, -1]], device=device)
    given = {"preset": "pykeen", "filtered": True}
    found = retrieval_metrics(queries, items, relevant, "adjusted_mean_rank_index", **given)
    assert found["adjusted_mean_rank_index"] == 0  # the second query's tie is as good as chance
    alone = retrieval_metrics(queries[:1], items, relevant[:1], "adjusted_mean_rank_index", **given)
    assert alone["adjusted_mean_rank_index"].isnan()


# ---- Lists of retrieved items --------------------------------------------------------------------


@pytest.mark.parametrize("gain", ["linear", "exp"])
@pytest.mark.parametrize("map_denominator", ["n_rel", "min(k,n_rel)", "hits"])
def test_lists_of_an_index_give_the_metrics_of_the_whole_catalogue(gain, map_denominator, device):
    queries, items = torch.randn(9, 4, device=device), torch.randn(30, 4, device=device)
    relevant = torch.rand(9, 30, device=device).argsort(1)[:, :5].contiguous()
    relevant[3], relevant[4, 2:] = -1, -1
    grades = torch.randint(4, relevant.shape, device=device)
    retrieved = (queries @ items.T).topk(5).indices
    given = {"relevance": grades, "gain": gain, "map_denominator": map_denominator, "empty": "one", "reduction": "none"}
    expected = retrieval_metrics(queries, items, relevant, NAMES, **given)
    found = retrieved_metrics(retrieved, relevant, NAMES, **given)
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], **close)


@pytest.mark.parametrize("large", [2**40, 2**63 - 2])
def test_places_without_an_item_and_ids_of_any_size(large, device):
    retrieved = torch.tensor([[large, -1, 7], [-1, -1, -1]], device=device)
    relevant = torch.tensor([[7, large + 1], [3, -1]], device=device)
    found = retrieved_metrics(retrieved, relevant, ["mrr@3", "recall@3", "r_precision"], reduction="none")
    # What is not there takes no place, so that 7 is the second.
    assert {name: value.tolist() for name, value in found.items()} == {
        "mrr@3": [0.5, 0],
        "recall@3": [0.5, 0],
        "r_precision": [0.5, 0],
    }
    capped = retrieved_metrics(
        retrieved, relevant, "precision@3", precision_denominator="min(k,docs)", reduction="none"
    )
    assert capped["precision@3"].tolist() == [0.5, 0]


def test_lists_of_relevant_items_in_any_form(device):
    retrieved = torch.tensor([[4, 7, 1], [2, 0, -1]], device=device)
    ids, offsets = torch.tensor([9, 7, 2], device=device), torch.tensor([0, 2, 3], device=device)
    expected = values(retrieved_metrics(retrieved, torch.tensor([[9, 7], [2, -1]], device=device), NAMES[:1]))
    for form in (ids, offsets), torch.nested.nested_tensor_from_jagged(ids, offsets):
        assert values(retrieved_metrics(retrieved.int(), form, NAMES[:1])) == expected


@pytest.mark.parametrize(
    "retrieved, relevant, metrics, message",
    [
        ([[4, 4]], [[1]], "mrr@2", "retrieved must have an item once in a query, got item 4 twice in query 0"),
        ([[4, 3], [2**62] * 2], [[1], [1]], "mrr@2", "retrieved must .* item 4611686018427387904 twice in query 1"),
        ([[4, 3]], [[1, 1]], "mrr@2", "relevant must have an item once in a query, got item 1 twice in query 0"),
        (
            [[4, 3]],
            [[1]],
            "mrr@3",
            "metrics must be cut off at most at 2, the length of the retrieved lists, got 'mrr@3'",
        ),
        ([[4, 3]], [[1]], "mrr", "metrics must be cut off at most at 2"),
        ([[4, 3]], [[1, 2, 5]], "r_precision", "cut off at most at 2, but a query has 3 relevant items"),
        ([[4, -3]], [[1]], "mrr@2", "retrieved must be item ids >= 0, or -1 for none, got"),
        ([4, 3], [[1]], "mrr@2", r"retrieved's shape must be \(queries, k\), got \(2,\)"),
        ([[4.0]], [[1]], "mrr@1", "retrieved must be a tensor of integers, got torch.float32"),
        ([[4, 3]], [[1], [2]], "mrr@2", r"relevant's shape must be \(1,\) or \(1, items of each query\)"),
    ],
)
def test_wrong_lists_are_refused_by_name(retrieved, relevant, metrics, message):
    with pytest.raises((ValueError, TypeError), match=message):
        retrieved_metrics(torch.tensor(retrieved), torch.tensor(relevant), metrics)


def test_lists_have_no_ranks_for_pykeen():
    with pytest.raises(ValueError, match="preset must not be 'pykeen' for retrieved lists"):
        retrieved_metrics(torch.tensor([[1]]), torch.tensor([1]), "hit_rate@1", preset="pykeen")


# ---- Streams -------------------------------------------------------------------------------------


def batches(queries, relevant):
    for part in (slice(0, 3), slice(3, 3), slice(3, 8)):
        yield queries[part], relevant[part], part


@pytest.mark.parametrize("options", [{}, {"empty": "skip"}, {"preset": "xgboost"}, {"filtered": True}], ids=str)
def test_many_batches_are_one(options, graph, device):
    queries, items, relevant = graph
    weight = torch.rand(8, device=device)
    expected = retrieval_metrics(queries, items, relevant, NAMES, query_weight=weight, **options)
    each = retrieval_metrics(queries, items, relevant, NAMES, reduction="none", **options)
    metric, kept = RetrievalMetrics(NAMES, **options).to(device), RetrievalMetrics(NAMES, per_query=True, **options)
    kept = kept.to(device)
    for some, lists, part in batches(queries, relevant):
        metric.update(some, items, lists, query_weight=weight[part])
        kept.update(some, items, lists)
    assert values(metric.compute()) == pytest.approx(values(expected), rel=1e-12)
    for name, value in kept.compute().items():
        wanted = each[name][relevant >= 0] if options.get("filtered") else each[name]
        torch.testing.assert_close(value, wanted, **close)


def test_streams_of_lists(graph, device):
    queries, items, relevant = graph
    retrieved = (queries @ items.T).topk(5).indices
    metric = RetrievedMetrics(NAMES, empty="skip").to(device)
    for some, lists, _ in batches(retrieved, relevant):
        metric.update(some, lists)
    expected = retrieved_metrics(retrieved, relevant, NAMES, empty="skip")
    assert values(metric.compute()) == pytest.approx(values(expected), rel=1e-12)


def test_copies_pickles_reset_and_collections(graph, device):
    queries, items, relevant = graph
    collection = MetricCollection({"a": RetrievalMetrics("recall@1"), "b": RetrievalMetrics("hit_rate@1")}).to(device)
    collection.update(queries, items, relevant)
    expected = retrieval_metrics(queries, items, relevant, ["recall@1", "hit_rate@1"])
    assert values(collection.compute()) == values(expected)
    metric = collection["a"]
    for copied in copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)):
        copied.update(queries[:2], items, relevant[:2])
        copied.reset()
        assert values(copied(queries, items, relevant)) == {"recall@1": values(expected)["recall@1"]}


def test_a_refused_batch_changes_nothing(graph, device):
    queries, items, relevant = graph
    metric = RetrievalMetrics(NAMES).to(device)
    metric.update(queries, items, relevant)
    before = values(metric.compute())
    with pytest.raises(ValueError, match="relevant must be item ids from 0 to 39"):
        metric.update(queries, items, relevant + 40)
    assert values(metric.compute()) == before
    with pytest.raises(ValueError, match="query_weight must be None for per_query=True"):
        RetrievalMetrics("mrr", per_query=True).to(device).update(
            queries, items, relevant, query_weight=torch.ones(8, device=device)
        )


def test_the_matrix_of_scores_gives_the_same(graph):
    queries, items, relevant = graph
    target = torch.zeros(8, 41, device=items.device).scatter_(1, relevant % 41, 1)[:, :40]
    expected = ranking_metrics(queries @ items.T, target, NAMES)
    assert values(retrieval_metrics(queries, items, relevant, NAMES)) == pytest.approx(values(expected))
