"""Retrieval metrics from embeddings: they are the ranking metrics of the whole matrix of scores, which never exists.

Embeddings of small integers have exact scores, which tie often.
"""

from __future__ import annotations

import math
from unittest import mock

import numpy
import pytest
import retrieval_process
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import run_together

from torchfast._register import metrics as registry
from torchfast.metrics import ranking_metrics, retrieval_metrics, retrieval_ranks
from torchfast.metrics.ranking import of_ranks
from torchfast.metrics.ranking.options import resolve
from torchfast.metrics.retrieval import ids, ranks, stable

NAN, INF = math.nan, math.inf
KINDS = ("ndcg", "dcg", "mrr", "map", "precision", "recall", "hit_rate")
NAMES = (*(f"{kind}{cut}" for kind in KINDS for cut in ("", "@1", "@2", "@5", f"@{10**12}")), "r_precision")
close = {"rtol": 1e-12, "atol": 1e-13, "equal_nan": True}


def embeddings(n, m, d, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randint(-2, 3, (size, d), generator=g).float().to(device) for size in (n, m))


def pair_of(mask):
    """The marked items of each query as values and offsets."""
    return mask.nonzero()[:, 1], torch.cat([mask.new_zeros(1, dtype=torch.long), mask.sum(1).cumsum(0)])


def padded(mask):
    """The same as rows of ids, filled up with -1 wherever an item is not marked."""
    return torch.where(mask, torch.arange(mask.shape[1], device=mask.device), -1)


def counts_of(scores, relevant, candidates):
    """Larger and equal candidates by comparing every pair; both of shape (queries, items)."""
    larger = (scores[:, None] > scores[:, :, None]) & candidates[:, None]
    equal = (scores[:, None] == scores[:, :, None]) & candidates[:, None]
    return larger.sum(2)[relevant], equal.sum(2)[relevant]


# ---- The ranking metrics of the whole matrix -----------------------------------------------------

options = st.fixed_dictionaries(
    {
        "ties": st.sampled_from(("average", "stable", "optimistic", "pessimistic")),
        "gain": st.sampled_from(("linear", "exp", (0.0, 1.0, 1.5, 4.0))),
        "relevance_threshold": st.sampled_from((None, 1.0, 2.0)),
        "map_denominator": st.sampled_from(("n_rel", "min(k,n_rel)", "hits")),
        "precision_denominator": st.sampled_from(("k", "min(k,docs)")),
        "nan": st.sampled_from(("propagate", "last")),
        "empty": st.sampled_from(("zero", "one", "skip")),
    }
)
shapes = st.tuples(st.integers(1, 6), st.integers(1, 40), st.integers(1, 3))
shares = st.tuples(st.sampled_from((0, 0.1, 0.5, 1)), st.sampled_from((0, 0.1, 0.9)))
specials = st.lists(st.tuples(st.integers(0, 39), st.sampled_from((NAN, INF, -INF, -0.0))), max_size=2)


@given(shapes, shares, specials, options, st.booleans(), st.integers(0, 99))
def test_they_are_ranking_metrics_of_the_matrix_of_scores(device, shape, shares, specials, options, biased, seed):
    n, m, d = shape
    queries, items = embeddings(n, m, d, device, seed)
    for at, value in specials:
        items[at % m, 0] = value
    bias = torch.arange(m, device=device).remainder(3).float() if biased else None
    draw = torch.rand(n, m, generator=torch.Generator().manual_seed(seed)).to(device)
    relevant, candidates = draw < shares[0] * (1 - shares[1]), draw < 1 - shares[1]
    grades = (draw * 1000).long() % 4
    scores = (queries[:, None] * items).sum(2) + (0 if bias is None else bias)
    expected = ranking_metrics(scores, grades * relevant, NAMES, mask=candidates, reduction="none", **options)
    found = retrieval_metrics(
        queries,
        items,
        padded(relevant),
        NAMES,
        relevance=grades,
        exclude=pair_of(~candidates),
        item_bias=bias,
        reduction="none",
        **options,
    )
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], **close, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("preset", ["trec_eval", "sklearn", "torchmetrics", "ranx", "xgboost", "lightgbm"])
def test_presets_weights_and_means_are_those_of_ranking_metrics(preset, device):
    queries, items = embeddings(7, 50, 2, device)
    relevant = torch.rand(7, 50, device=device) < 0.1
    relevant[3] = False
    weight = torch.rand(7, device=device)
    arguments = {"preset": preset, "query_weight": weight}
    expected = ranking_metrics(queries @ items.T, relevant, NAMES, **arguments)
    found = retrieval_metrics(queries, items, pair_of(relevant), NAMES, **arguments)
    assert {k: v.item() for k, v in found.items()} == pytest.approx({k: v.item() for k, v in expected.items()})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_any_dtype_and_strides(dtype, device):
    queries, items = embeddings(5, 30, 4, device)
    relevant = torch.arange(5, device=device)
    expected = retrieval_ranks(queries, items, relevant)
    strided = items.to(dtype).t().contiguous().t(), torch.stack([items, items], 2).to(dtype)[..., 1]
    for moved in strided:
        found = retrieval_ranks(queries.to(dtype), moved, relevant)
        assert all(map(torch.equal, found, expected))


def test_a_model_that_scores_all_items_alike_has_the_metrics_of_a_random_order(device):
    m = 3000
    queries, items = torch.zeros(3, 2, device=device), torch.ones(m, 2, device=device)
    relevant = torch.tensor([[5, 9], [1, -1], [7, 8]], device=device)
    with mock.patch.object(of_ranks, "MOST_TIED", 4000):  # the reference takes them query by query
        found = retrieval_metrics(queries, items, relevant, ["mrr", "recall@300", "hit_rate@1"], reduction="none")
    harmonic = math.fsum(1 / k for k in range(1, m + 1))
    first_of_two = math.fsum(2 * (m - k) / (m * (m - 1)) / k for k in range(1, m))
    assert found["mrr"].tolist() == pytest.approx([first_of_two, harmonic / m, first_of_two], rel=1e-12)
    assert found["recall@300"].tolist() == pytest.approx([0.1] * 3)
    assert found["hit_rate@1"].tolist() == pytest.approx([2 / m, 1 / m, 2 / m])


# ---- Ranks ---------------------------------------------------------------------------------------


def test_ranks_are_numbers_of_larger_and_of_equal_candidates(device):
    queries, items = embeddings(6, 60, 2, device)
    draw = torch.rand(6, 60, device=device)
    relevant, candidates = draw < 0.2, draw < 0.8
    larger, equal, count = retrieval_ranks(queries, items, pair_of(relevant), exclude=pair_of(~candidates))
    expected = counts_of(queries @ items.T, relevant, candidates)
    assert torch.equal(larger, expected[0]) and torch.equal(equal, expected[1])
    assert torch.equal(count, candidates.sum(1)[relevant.nonzero()[:, 0]])


def test_filtered_ranks_leave_the_other_relevant_items_out(device):
    queries, items = embeddings(6, 60, 2, device)
    draw = torch.rand(6, 60, device=device)
    relevant, candidates = draw < 0.3, draw < 0.7
    found = retrieval_ranks(queries, items, pair_of(relevant), exclude=pair_of(~candidates), filtered=True)
    scores = queries @ items.T
    for at, (query, item) in enumerate(relevant.nonzero().tolist()):
        left = candidates[query] & ~relevant[query]
        left[item] = True
        mine = scores[query, item]
        expected = (scores[query, left] > mine).sum(), (scores[query, left] == mine).sum(), left.sum()
        assert [x[at] for x in found] == list(expected)


def test_filtered_metrics_have_each_relevant_item_as_a_query_of_its_own(device):
    queries, items = embeddings(5, 30, 2, device)
    items[7] = NAN
    relevant = torch.tensor([[7, 3], [4, -1], [0, 1], [-1, -1], [2, 7]], device=device)
    weight = torch.tensor([1.0, 2.0, 0.0, 4.0, 5.0], device=device)
    for nan in "propagate", "last":
        given = {"filtered": True, "nan": nan, "ties": "stable"}
        found = retrieval_metrics(queries, items, relevant, "mrr", reduction="none", **given)["mrr"]
        assert found.shape == relevant.shape and found[relevant == -1].isnan().all()
        total, weights = 0.0, 0.0
        for query, place in (relevant >= 0).nonzero().tolist():
            others = relevant[query][relevant[query] != relevant[query, place]]
            alone = retrieval_metrics(
                queries[query, None],
                items,
                relevant[query, place, None],
                "mrr",
                exclude=others[None],
                nan=nan,
                ties="stable",
            )["mrr"]
            torch.testing.assert_close(found[query, place], alone, **close)
            if weight[query]:
                total, weights = total + (weight[query] * alone).item(), weights + weight[query].item()
        mean = retrieval_metrics(queries, items, relevant, "mrr", query_weight=weight, **given)["mrr"].item()
        assert mean == pytest.approx(total / weights, nan_ok=True)


def test_nan_scores_come_last_and_make_metrics_nan_or_an_error(device):
    queries, items = torch.ones(2, 1, device=device), torch.tensor([[2.0], [NAN], [NAN], [1.0]], device=device)
    relevant = torch.tensor([[1, 3], [0, -1]], device=device)
    larger, equal, _ = retrieval_ranks(queries, items, relevant)
    assert larger.tolist() == [[2, 1], [0, -1]] and equal.tolist() == [[2, 1], [1, -1]]
    seen = torch.tensor([[2, -1], [1, 2]], device=device)
    found = retrieval_metrics(queries, items, relevant, "mrr", exclude=seen, reduction="none")["mrr"]
    assert found[0].isnan() and found[1] == 1
    with pytest.raises(ValueError, match="scores must not be NaN with nan='error', got one in query 0"):
        retrieval_metrics(queries, items, relevant, "mrr", exclude=seen, nan="error")


def test_cosines_do_not_depend_on_lengths_and_a_vector_of_zeros_has_0(device):
    queries, items = torch.randn(4, 9, device=device), torch.randn(20, 9, device=device)
    items[1], items[2], items[3] = 8 * items[0], items[0] / 4, 0
    relevant = torch.arange(4, device=device).expand(4, 4)
    larger, equal, _ = retrieval_ranks(queries, items, relevant, similarity="cosine")
    unit = torch.nn.functional.normalize
    cosines = unit(queries.double(), dim=1) @ unit(items.double(), dim=1).T
    cosines[:, 1:3] = cosines[:, :1]
    all_are = torch.ones(4, 20, dtype=torch.bool, device=device)
    expected = counts_of(cosines, all_are & (torch.arange(20, device=device) < 4), all_are)
    assert torch.equal(larger.flatten(), expected[0]) and torch.equal(equal.flatten(), expected[1])
    tiny = retrieval_ranks(queries * 1e-30, items * 1e30, relevant, similarity="cosine")
    assert torch.equal(tiny.larger, larger) and torch.equal(tiny.equal, equal)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_chunks_and_the_bar_change_nothing(similarity, device, capsys):
    g = torch.Generator().manual_seed(1)
    queries, items = (torch.randn(size, 7, generator=g).to(device) for size in (40, 300))
    items[150:] = items[:150]
    draw = torch.rand(40, 300, generator=g).to(device)
    lists = {"relevant": pair_of(draw < 0.05), "exclude": pair_of(draw > 0.9)}
    given = {**lists, "similarity": similarity, "ties": "stable", "metrics": ("ndcg", "mrr@3"), "reduction": "none"}
    expected = retrieval_metrics(queries, items, **given)
    small = {
        (ranks, "_IDS_AT_ONCE"): 50,
        (ranks, "_ELEMENTS_AT_ONCE"): 100,
        (ids, "_CHUNK"): 10,
        (stable, "_BLOCK"): 64,
    }
    small |= {(ranks, "_PRODUCTS_SHOWN"): 1, (stable, "_PAIRS_AT_ONCE"): 200}
    patches = [mock.patch.object(*where, value) for where, value in small.items()]
    for patch in patches:
        patch.start()
    try:
        found = retrieval_metrics(queries, items, progress=True, **given)
    finally:
        mock.patch.stopall()
    assert "100%" in capsys.readouterr().out
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# ---- Forms of lists ------------------------------------------------------------------------------


def test_lists_of_ids_in_any_form_are_the_same(device):
    queries, items = embeddings(4, 9, 2, device)
    rows = [[7, 3], [], [0], [8, 1, 2]]
    values = torch.tensor([i for row in rows for i in row], device=device)
    offsets = torch.tensor([0, 2, 2, 3, 6], device=device)
    nested = torch.nested.nested_tensor([torch.tensor(r, dtype=torch.long) for r in rows], layout=torch.jagged).to(
        device
    )
    table = torch.tensor([[-1, 7, 3], [-1, -1, -1], [0, -1, -1], [8, 1, 2]], device=device)
    indptr = offsets.cpu().numpy()
    expected = retrieval_ranks(queries, items, (values, offsets))
    matrices = [
        of((numpy.ones(6), values.cpu().numpy().astype(dtype), indptr.astype(dtype)), shape=(4, 9))
        for of in (scipy.sparse.csr_matrix, scipy.sparse.csr_array)
        for dtype in (numpy.int32, numpy.int64)
    ]
    for form in *matrices, (values.int(), offsets.int()), (values.to(torch.uint8), offsets), [values, offsets]:
        assert all(map(torch.equal, retrieval_ranks(queries, items, form), expected))
    in_table = retrieval_ranks(queries, items, table)
    assert all(torch.equal(x[table >= 0], y) for x, y in zip(in_table, expected, strict=True))
    assert all((x[table < 0] == -1).all() and x.shape == table.shape for x in in_table)
    in_nested = retrieval_ranks(queries, items, nested)
    assert all(torch.equal(x.values(), y) and x.shape[0] == 4 for x, y in zip(in_nested, expected, strict=True))
    one_each = retrieval_ranks(queries, items, torch.tensor([7, -1, 0, 8], device=device))
    assert one_each.larger.tolist() == [expected.larger[0], -1, expected.larger[2], expected.larger[3]]
    as_excluded = [
        retrieval_ranks(queries, items, torch.tensor([4, 4, 4, 4], device=device), exclude=form)
        for form in ((values, offsets), nested, table, matrices[0])
    ]
    assert all(all(map(torch.equal, found, as_excluded[0])) for found in as_excluded)


def test_relevance_has_the_form_of_relevant(device):
    queries, items = embeddings(2, 9, 2, device)
    values, offsets = torch.tensor([7, 3, 5], device=device), torch.tensor([0, 2, 3], device=device)
    grades = torch.tensor([1, 3, 2], device=device)
    matrix = scipy.sparse.csr_matrix((grades.cpu().numpy(), values.cpu().numpy(), offsets.cpu().numpy()), shape=(2, 9))
    nest = lambda x: torch.nested.nested_tensor_from_jagged(x, offsets)  # noqa: E731
    table, of_table = torch.tensor([[7, 3], [5, -1]]), torch.tensor([[1, 3], [2, -9]])
    expected = retrieval_metrics(queries, items, (values, offsets), "ndcg", relevance=grades)["ndcg"]
    for relevant, relevance in (
        ((values, offsets), (grades, offsets)),
        (nest(values), nest(grades)),
        (table.to(device), of_table.to(device)),
        (matrix, grades),
    ):
        assert retrieval_metrics(queries, items, relevant, "ndcg", relevance=relevance)["ndcg"] == expected
    with pytest.raises(ValueError, match=r"relevance's shape must be \(3,\), as of relevant, got \(2,\)"):
        retrieval_metrics(queries, items, (values, offsets), "ndcg", relevance=grades[:2])
    with pytest.raises(ValueError, match="relevance must be finite and >= 0, got -1 in query 1"):
        retrieval_metrics(queries, items, (values, offsets), "ndcg", relevance=torch.tensor([1, 1, -1], device=device))


def test_no_queries_no_items_and_no_relevant_items(device):
    queries, items = embeddings(3, 5, 2, device)
    nothing = torch.full((3, 2), -1, device=device)
    found = retrieval_metrics(queries, items, nothing, ["mrr", "ndcg"], reduction="none")
    assert found["mrr"].tolist() == [0.0] * 3
    assert retrieval_metrics(queries, items[:0], nothing, "mrr", empty="one")["mrr"] == 1
    assert retrieval_metrics(queries[:0], items, nothing[:0], "mrr")["mrr"].isnan()
    assert retrieval_metrics(queries, items, nothing, "mrr", empty="skip")["mrr"].isnan()
    assert retrieval_ranks(queries[:0], items, nothing[:0, 0]).larger.shape == (0,)
    with pytest.raises(ValueError, match="query 0 has no relevant document"):
        retrieval_metrics(queries, items, nothing, "mrr", empty="error")


# ---- What is refused -----------------------------------------------------------------------------

Q, ITEMS = torch.ones(3, 2), torch.ones(5, 2)
GOOD = torch.tensor([0, 1, 2])
PAIR = torch.tensor([4, 4, 3]), torch.tensor([0, 1, 1, 3])


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"relevant": torch.tensor([0, 5, 1])}, "relevant must be item ids from 0 to 4, got 5 in query 1"),
        ({"relevant": torch.tensor([0, -2, 1])}, "relevant must be item ids from 0 to 4, got -2 in query 1"),
        ({"items": ITEMS[:0]}, "relevant must be none, as there are no items, got 0 in query 0"),
        ({"exclude": torch.tensor([[3], [9], [1]])}, "exclude must be item ids from 0 to 4, got 9 in query 1"),
        ({"relevant": torch.tensor([[1, 2], [3, 3], [0, 1]])}, "got item 3 twice in query 1"),
        ({"exclude": (torch.tensor([4, 3, 4, 4]), torch.tensor([0, 1, 1, 4]))}, "got item 4 twice in query 2"),
        ({"exclude": torch.tensor([3, 3, 2])}, "exclude must not have an item that is relevant, got item 2 in query 2"),
        (
            {"relevant": torch.tensor([0, 1])},
            r"relevant's shape must be \(3,\) or \(3, items of each query\), got \(2,\)",
        ),
        ({"relevant": (GOOD, torch.tensor([0, 1, 3]))}, r"relevant's offsets' shape must be \(4,\), got \(3,\)"),
        ({"relevant": (GOOD, torch.tensor([0, 1, 2, 2]))}, r"first and last offset must be \(0, 3\), got \(0, 2\)"),
        ({"relevant": (GOOD, torch.tensor([0, 2, 1, 3]))}, "relevant's offsets must be nowhere decreasing"),
        ({"relevant": (GOOD,)}, "relevant's length must be 2: values and offsets, got 1"),
        ({"relevant": scipy.sparse.csc_matrix((3, 5))}, r"relevant's format must be 'csr' \(scipy: .tocsr\(\)\)"),
        ({"relevant": scipy.sparse.csr_matrix((2, 5))}, "relevant's rows must be 3, the number of queries, got 2"),
        ({"relevant": GOOD.float()}, "relevant must be a tensor of integers, values and offsets, or a scipy matrix"),
        ({"queries": Q[0]}, r"queries' shape must be \(queries, dimensions\), got \(2,\)"),
        ({"items": ITEMS[:, :1]}, "items' dimensions must be 2, as of queries, got 1"),
        ({"items": ITEMS.double()}, "items must have queries' dtype torch.float32, got torch.float64"),
        ({"item_bias": torch.ones(3)}, r"item_bias' shape must be \(5,\), got \(3,\)"),
        ({"item_bias": GOOD}, "item_bias must be a tensor of a floating dtype"),
        ({"similarity": "euclid"}, "similarity must be 'dot' or 'cosine', got 'euclid'"),
        ({"gain": [1.0, 2.0]}, "gain must be 0 for target 0"),
        ({"item_offset": 3}, "item_offset must be left out without a group, got 3"),
        ({"reduction": "sum"}, "reduction must be 'mean' or 'none', got 'sum'"),
        ({"metrics": "mean_rank"}, "metrics must be of 'ndcg'"),
        ({"preset": "pykeen", "metrics": "mean_ranks"}, "did you mean 'mean_rank'?"),
        ({"preset": "pykeen", "metrics": "hit_rate"}, "the cut-off of 'hit_rate' must be an integer >= 1"),
        ({"preset": "pykeen", "metrics": "mrr@3"}, "the cut-off of 'mrr'"),
        (
            {"preset": "pykeen", "ties": "average"},
            "ties must be 'realistic', 'optimistic' or 'pessimistic', got 'average'",
        ),
        ({"preset": "pykeen", "gain": "exp"}, "gain must be left out with preset='pykeen'"),
        ({"preset": "pykeen", "relevance": GOOD}, "relevance must be None with preset='pykeen'"),
        ({"query_weight": torch.ones(2)}, r"query_weight's shape must be \(3,\), got \(2,\)"),
        ({"query_weight": torch.ones(2), "filtered": True}, r"query_weight's shape must be \(3,\), got \(2,\)"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_wrong_arguments_are_refused_by_name(changed, message):
    with pytest.raises((ValueError, TypeError), match=message):
        retrieval_metrics(**{"queries": Q, "items": ITEMS, "relevant": GOOD, "metrics": "mrr", **changed})


# ---- Values from ranks: the op -------------------------------------------------------------------


def of_ranks_by(kernel, larger, equal, target, offsets, candidates, **options):
    chosen = resolve(NAMES, **options)
    kinds, ks, ties, gain, *denominators, _, threshold = chosen.numbers
    tensors = [torch.tensor(x) for x in (larger, equal, target, offsets, candidates)]
    op = registry["metrics_of_ranks"]
    run = op if kernel == "served" else op.reference
    return run(*tensors, chosen.table, kinds, ks, ties, gain, *denominators, threshold)


@pytest.mark.parametrize("kernel", ["served", "reference"])
@pytest.mark.parametrize(
    "larger, equal, size",
    [
        ([-1, 3], [1, 1], 9),
        ([0, 3], [0, 1], 9),
        ([0, 3], [4, 1], 9),
        ([2, 2], [1, 1], 9),
        ([2, 2], [2, 3], 9),
        ([2, 8], [1, 2], 9),
        ([2, 8], [1, 1], -1),
        ([2, 2**62], [1, 2**62], 9),
    ],
)
def test_what_cannot_be_ranks_has_no_value(kernel, larger, equal, size, device):
    for ties in "average", "pessimistic":
        values, empty = of_ranks_by(kernel, [*larger, 0], [*equal, 1], [1, 2, 1], [0, 2, 3], [size, 9], ties=ties)
        assert values[:, 0].isnan().all() and values[:, 1].isfinite().all() and not empty.any()


@pytest.mark.parametrize("kernel", ["served", "reference"])
@pytest.mark.parametrize("offsets", [[0, 4], [2, 1, 3], [-1, 3], [0, 9, 3]], ids=str)
def test_offsets_that_are_no_boundaries_are_not_read_through(kernel, offsets, device):
    values, empty = of_ranks_by(kernel, [0, 1, 2], [1, 1, 1], [1, 1, 1], offsets, [9] * (len(offsets) - 1))
    assert values.isnan().all() and not empty.any()


# ---- Shards --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "runs", [((9, 14), (0, 20), (20, 1)), ((9, 5, 9), (20, 0, 1), (7, 7, 7))], ids=["two", "three"]
)
def test_shards_of_a_catalogue_give_the_bits_of_one_process(runs, tmp_path):
    for counts, found in zip(runs, run_together("metrics/retrieval_process.py", runs, tmp_path), strict=True):
        expected = retrieval_process.results(retrieval_process.data(sum(counts)))
        assert found == expected, counts
