"""Ranking metrics: their definition under ties, every form of input, what is refused.

The served kernel and the reference are compared with ``ranking_oracle``, which averages over all orders of the tied
documents, or walks through their distribution in exact fractions.
"""

from __future__ import annotations

import itertools
import math
import random
import sys

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from memory import peak_memory
from ranking_oracle import KINDS, brute_force, of_order, oracle, orders
from torch.autograd import forward_ad

from torchfast._register import metrics as registry
from torchfast.metrics import ranking, ranking_metrics
from torchfast.metrics.ranking.group import group_by_query
from torchfast.metrics.ranking.options import resolve

NAN, INF = math.nan, math.inf
DENOMINATORS = ("n_rel", "min(k,n_rel)", "hits")
TIES = ("average", "stable", "optimistic", "pessimistic")
EVERY_K = tuple(f"{kind}@{k}" for kind in KINDS[:-1] for k in (1, 2, 3, 4, 5, 6, 7, 8, 10**12))
EVERYTHING = (*KINDS, *EVERY_K)
close = dict(rel=1e-12, abs=1e-13)


def values_of(preds, target, names=EVERYTHING, **options):
    """By name, of each query, as lists."""
    found = ranking_metrics(preds, target, names, reduction="none", **options)
    assert all(v.dtype == torch.float64 and not v.requires_grad for v in found.values())
    return {name: v.tolist() for name, v in found.items()}


def one_query(scores, y, device, names=EVERYTHING, dtype=torch.float64, **options):
    preds = torch.tensor([scores], dtype=dtype, device=device)
    return {n: v[0] for n, v in values_of(preds, torch.tensor([y], device=device), names, **options).items()}


# ---- Ties: the expectation over all orders of tied documents ------------------------------------


def tied_rankings():
    """All ways to tie up to 4 documents, with all binary labels; samples of more, graded."""
    for n in range(1, 5):
        for steps in itertools.product((0, 1), repeat=n - 1):
            for y in itertools.product((0, 1), repeat=n):
                yield [0.0, *map(float, itertools.accumulate(steps))], list(y)
    rng = random.Random(0)
    for n, count in (5, 40), (6, 20), (7, 6):
        for _ in range(count):
            yield [float(rng.randrange(n // 2)) for _ in range(n)], [rng.choice((0, 0, 1, 3)) for _ in range(n)]
    yield [1.0] * 7, [0, 1, 0, 2, 0, 0, 1]


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_average_ties_are_the_mean_over_all_permutations(denominator, device):
    cases = list(tied_rankings())
    lengths = [len(y) for _, y in cases]
    preds = torch.tensor([x for scores, _ in cases for x in scores], device=device)
    target = torch.tensor([t for _, y in cases for t in y], device=device)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], device=device)
    names = EVERYTHING if denominator == "n_rel" else [n for n in EVERYTHING if n.startswith("map")]
    found = values_of(preds, target, names, offsets=offsets, map_denominator=denominator)
    for q, (scores, y) in enumerate(cases):
        for name in names:
            expected = brute_force(name, scores, y, denominator)
            assert found[name][q] == pytest.approx(expected, **close), (name, scores, y)


def test_the_oracle_is_the_mean_over_all_permutations():
    """The oracle judges what brute force cannot reach, so it is judged itself."""
    for scores, y in tied_rankings():
        for name in (
            "ndcg@2",
            "dcg@3",
            "mrr@3",
            "map",
            "precision@3",
            "recall@2",
            "hit_rate@2",
            "r_precision",
        ):
            for denominator in DENOMINATORS:
                expected = brute_force(name, scores, y, denominator)
                assert (oracle(name, scores, y, map_denominator=denominator) or 0.0) == pytest.approx(expected, **close)


@pytest.mark.parametrize("ties, best", [("optimistic", max), ("pessimistic", min)])
def test_optimistic_and_pessimistic_ties_are_the_best_and_the_worst_order(ties, best, device):
    for scores, y in tied_rankings():
        found = one_query(scores, y, device, ties=ties)
        for name in ("ndcg", "ndcg@2", "dcg@3", "mrr", "map@3", "precision@2", "recall@3", "hit_rate@1", "r_precision"):
            assert found[name] == pytest.approx(best(of_order(name, order) for order in orders(scores, y)), **close)


def test_stable_ties_keep_the_order_of_the_documents(device):
    for scores, y in tied_rankings():
        order = [t for _, t in sorted(zip(scores, y, strict=True), key=lambda pair: -pair[0])]
        found = one_query(scores, y, device, ties="stable")
        assert found == pytest.approx({name: of_order(name, order) for name in EVERYTHING}, **close)


@pytest.mark.parametrize("relevant", [1, 2, 300, 4999, 5000])
def test_thousands_of_tied_documents_underflow_nowhere(relevant, device):
    """C(5000, 2500) has 1500 digits."""
    n, k = 5000, 2000
    y = torch.zeros(1, n, dtype=torch.long, device=device)
    y[0, -relevant:] = 1
    found = values_of(torch.zeros(1, n, device=device), y, [f"map@{k}", f"mrr@{k}", f"hit_rate@{k}", "mrr", "hit_rate"])
    assert found["hit_rate"] == [1.0]
    none = math.lgamma(n - relevant + 1) - math.lgamma(n - relevant - k + 1) if n - relevant >= k else -INF
    none = math.exp(none + math.lgamma(n - k + 1) - math.lgamma(n + 1)) if none > -INF else 0.0
    assert found[f"hit_rate@{k}"] == pytest.approx([1 - none], rel=1e-9)
    first, left = 0.0, 1.0
    for i in range(1, n - relevant + 2):
        chance = relevant / (n - i + 1)
        first, left = first + left * chance / i, left * (1 - chance)
        if i == k:
            assert found[f"mrr@{k}"] == pytest.approx([first], rel=1e-12)
    assert found["mrr"] == pytest.approx([first], rel=1e-12)
    # E[precisions / hits]: over the hits among the first k, in exact integers
    over_hits = values_of(torch.zeros(1, n, device=device), y, f"map@{k}", map_denominator="hits")[f"map@{k}"]
    c0 = math.fsum(1 / i for i in range(1, k + 1))
    c1 = math.fsum((i - 1) / i for i in range(1, k + 1))
    expected = 0.0
    whole = math.comb(n, k)
    for h in range(max(1, k - (n - relevant)), min(k, relevant) + 1):
        probability = math.comb(relevant, h) * math.comb(n - relevant, k - h) / whole
        expected += probability * (c0 + (h - 1) / (k - 1) * c1) / k
    assert over_hits == pytest.approx([expected], rel=1e-11)


# ---- Agreement of the kernel, the reference and the oracle on anything ---------------------------

SCORES = (0.0, -0.0, 1.0, -1.0, 0.5, INF, -INF, NAN, 1e-45, -1e-45, 2e-45, 1e-40, 3e38)
document = st.tuples(st.sampled_from(SCORES), st.sampled_from((0, 0, 0, 1, 2, 3)), st.booleans())
queries = st.lists(st.lists(document, max_size=9), min_size=1, max_size=6)
names = st.lists(st.sampled_from(EVERYTHING), min_size=1, max_size=6, unique=True)
options = st.fixed_dictionaries(
    {
        "ties": st.sampled_from(TIES),
        "gain": st.sampled_from(("linear", "exp", (0.0, 1.0, 1.5, 4.0), (0.5, 0.5, 2.0, 7.0))),
        "relevance_threshold": st.sampled_from((None, 1.0, 2.0)),
        "map_denominator": st.sampled_from(DENOMINATORS),
        "precision_denominator": st.sampled_from(("k", "min(k,docs)")),
        "nan": st.sampled_from(("propagate", "last")),
    }
)
extras = st.tuples(st.lists(st.sampled_from((0, 1, 3)), max_size=4), st.integers(0, 3), st.booleans())


def assert_values(found, expected):
    assert found == pytest.approx(expected, nan_ok=True, **close)


@given(queries, names, options, extras, st.sampled_from(("dense", "lengths", "offsets", "indexes", "nested")))
@example([[], [(0.0, 1, True)]], ["map"], {}, ([], 0, False), "offsets")
@example([[]], ["map", "precision", "ndcg"], {}, ([], 2, True), "offsets")
@example([[]], ["map", "precision", "mrr"], {}, ([1, 3], 0, False), "lengths")
def test_kernel_and_reference_are_the_oracle_for_any_input(device, queries, names, options, extras, form):
    judged, more, counted = extras
    float_type = torch.float32
    kept = [[d for d in q if d[2]] for q in queries] if form == "dense" else queries
    y = [[t for _, t, _ in q] for q in kept]
    s = [[x for x, _, _ in q] for q in kept]
    width = max(map(len, queries))
    arguments = {}
    if form in ("dense", "lengths"):
        padding = (NAN, -7, False)  # must not be looked at
        rows = [q + [padding] * (width - len(q)) for q in queries]
        preds = torch.tensor([[d[0] for d in row] for row in rows], dtype=float_type).reshape(len(rows), width)
        target = torch.tensor([[d[1] for d in row] for row in rows], dtype=torch.long).reshape(len(rows), width)
        if form == "dense":
            mask = torch.tensor([[d[2] for d in row] for row in rows], dtype=torch.bool).reshape(len(rows), width)
            arguments["mask"] = mask
        else:
            arguments["lengths"] = torch.tensor([len(q) for q in queries])
    else:
        preds = torch.tensor([d[0] for q in queries for d in q], dtype=float_type)
        target = torch.tensor([d[1] for q in queries for d in q], dtype=torch.long)
        offsets = torch.tensor([0, *itertools.accumulate(map(len, queries))])
        if form == "offsets":
            arguments["offsets"] = offsets
        elif form == "nested":
            preds = torch.nested.nested_tensor_from_jagged(preds, offsets)
            target = torch.nested.nested_tensor_from_jagged(target, offsets)
        else:  # ids that are as far apart as they can be; queries without documents are not there
            ids = torch.arange(len(queries)) * (2**60) - 2**62
            shuffled = torch.randperm(len(preds))
            order = torch.argsort(shuffled, stable=True) if options.get("ties") != "stable" else slice(None)
            preds, target = preds[order], target[order]
            arguments["indexes"] = ids.repeat_interleave(offsets.diff())[order]
            present = [i for i, q in enumerate(queries) if q]
            s, y = [s[i] for i in present], [y[i] for i in present]
    arguments["unretrieved"] = torch.tensor([judged] * len(s), dtype=torch.float32).reshape(len(s), len(judged))
    if options.get("gain", "linear") not in ("linear", "exp"):
        arguments["unretrieved"] = arguments["unretrieved"].to(torch.uint8)
    threshold = options.get("relevance_threshold") or 1e-9
    n_rel = [sum(t >= threshold for t in [*targets, *judged]) + more for targets in y]
    if counted:
        arguments["num_relevant"] = torch.tensor(n_rel, dtype=torch.int32)
    arguments = {name: x.to(device) for name, x in arguments.items()}

    found = values_of(preds.to(device), target.to(device), names, **options, **arguments)
    for name in names:
        expected = []
        for q, (scores, targets) in enumerate(zip(s, y, strict=True)):
            given = {**options, "threshold": options.get("relevance_threshold")}
            given.pop("relevance_threshold", None)
            scores = torch.tensor(scores, dtype=float_type).tolist()
            value = oracle(
                name, scores, targets, unretrieved=judged, num_relevant=n_rel[q] if counted else None, **given
            )
            expected.append(0.0 if value is None else value)
        assert_values(found[name], expected)


@pytest.fixture
def recorded(monkeypatch):
    """The arguments of the op in each call of the public function."""
    calls = []
    metric = registry["ranking_metrics"]

    def record(*inputs):
        calls.append(inputs)
        return metric(*inputs)

    monkeypatch.setattr(ranking.functional, "_op", record)
    return calls


def random_scores(g, shape, values, dtype):
    return (torch.randint(values, shape, generator=g) - values // 2).to(torch.float64).div(8).to(dtype)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize(
    "shape, values, relevant",
    [
        ((50, 33), 30, 0.1),
        ((50, 33), 6, 0.6),
        ((7, 1000), 3000, 0.02),
        ((7, 1000), 50, 0.5),
        ((3, 9000), 10**6, 0.002),
        ((3, 9000), 50, 0.0013),
        ((3, 9000), 5000, 0.003),
    ],
    ids=str,
)
@pytest.mark.once("reference")
def test_kernel_is_the_reference_on_rows_too_long_for_an_oracle(shape, values, relevant, dtype, ties, device, recorded):
    g = torch.Generator().manual_seed(1)
    preds = random_scores(g, shape, values, dtype).to(device)
    target = (torch.randint(1, 5, shape, generator=g) * (torch.rand(shape, generator=g) < relevant)).to(device)
    many = (*KINDS, "ndcg@10", "map@10", "recall@100", "mrr@3", "hit_rate@7", "precision@64", "map@500")
    for denominator in DENOMINATORS if ties == "average" else DENOMINATORS[:1]:
        values_of(preds, target, many, ties=ties, map_denominator=denominator)
        found, empty = registry["ranking_metrics"](*recorded[-1])
        truth, truly_empty = registry["ranking_metrics"].reference(*recorded[-1])
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-13)
        assert torch.equal(empty, truly_empty)


def uneven_queries(g, dtype):
    """One of every size that a kernel treats in its own way, some with more relevant documents than fit anywhere."""
    sizes = (0, 1, 7, 255, 256, 257, 600, 0, 2048, 2049, 5000, 3, 140_000, 40, 0, 262_144, 11, 131_073, 131_072, 2)
    shares = (0.5, 1, 0.5, 0.1, 0.9, 0.5, 0.01, 1, 1, 1, 0.6, 0.5, 1e-4, 0.5, 1, 1e-5, 0.5, 0.3, 0.02, 1)
    preds = torch.cat([random_scores(g, (n,), max(2, n // 3), dtype) for n in sizes])
    hits = torch.cat([torch.rand(n, generator=g) < share for n, share in zip(sizes, shares, strict=True)])
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    return preds, torch.randint(1, 4, preds.shape, generator=g) * hits, offsets


@pytest.mark.parametrize(
    "dtype, ties",
    [*((torch.float32, ties) for ties in TIES), (torch.bfloat16, "average"), (torch.float64, "pessimistic")],
    ids=str,
)
@pytest.mark.once("reference")
def test_queries_of_all_sizes_side_by_side(dtype, ties, device, recorded):
    """Gains that are no integers, and judged documents that were not retrieved, more than all of a short query."""
    g = torch.Generator().manual_seed(3)
    preds, target, offsets = uneven_queries(g, dtype)
    queries = len(offsets) - 1
    counts = torch.randint(9, (queries,), generator=g)
    counts[[5, 9]] = 3000
    others = torch.randint(4, (int(counts.sum()),), generator=g)
    unretrieved = (others.to(device), torch.cat([torch.zeros(1).long(), counts.cumsum(0)]).to(device))
    many = (*KINDS, "ndcg@10", "ndcg@5000", "map@10", "recall@100", "mrr@3", "hit_rate@7", "precision@64", "map@500")
    options = {"gain": (0.0, 0.7, 1.3, 2.9), "map_denominator": "hits" if ties == "average" else "min(k,n_rel)"}
    values_of(
        preds.to(device),
        target.to(device),
        many,
        offsets=offsets.to(device),
        ties=ties,
        unretrieved=unretrieved,
        **options,
    )
    found, empty = registry["ranking_metrics"](*recorded[-1])
    truth, truly_empty = registry["ranking_metrics"].reference(*recorded[-1])
    torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-13)
    assert torch.equal(empty, truly_empty)
    assert torch.equal(found, registry["ranking_metrics"](*recorded[-1])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("documents", [100, 512, 2048])
@pytest.mark.parametrize("threshold", [None, 2.0])
def test_distinct_scores_with_any_number_of_judged_documents(threshold, documents, dtype, device):
    """As long rows of scores are: no ties. Kernels go about few judged documents and many in different ways."""
    rng = random.Random(documents)
    names = (*KINDS, "ndcg@10", "map@10", "recall@50", "mrr@1")
    counts = (1, 4, 5, 8, 9, 16, 17, 31, 33, 50, 64, 65, 99)
    scores = [rng.sample(range(-documents, documents), documents) for _ in counts]
    judged = [[rng.choice((1, 1, 2, 3)) for _ in range(count)] + [0] * (documents - count) for count in counts]
    for x, y, extreme in zip(scores, judged, itertools.cycle((min, max))):  # is judged
        rng.shuffle(y)
        last, some = x.index(extreme(x)), y.index(max(y))
        y[last], y[some] = y[some], y[last]
    preds = torch.tensor(scores, dtype=dtype, device=device)
    found = values_of(preds, torch.tensor(judged, device=device), names, relevance_threshold=threshold)
    for name in names:
        right = [oracle(name, x, y, threshold=threshold) for x, y in zip(scores, judged, strict=True)]
        assert found[name] == pytest.approx([value or 0.0 for value in right], **close)


def scores_of_any_spread(g, documents):
    """Rows beside each other that no one mapping to few numbers tells apart, and some that any does."""
    shape = (3, documents)
    normal = torch.randn(shape, generator=g)
    uniform = torch.rand(shape, generator=g)
    places = uniform.argsort(1)
    one = places == 0
    steps = (1 + places * 2.0**-23).float()  # neighbours among the floats
    spreads = {
        "normal": normal,
        "uniform": uniform,
        "far from zero": 1000 + uniform,
        "two clusters": normal * 1e-3 + (places % 2),
        "one outlier": torch.where(one, 1e30, normal),
        "the largest": torch.where(one, torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max * uniform),
        "neighbours": steps,
        "neighbours and infinities": torch.where(one, INF, torch.where(places == 1, -INF, steps)),
        "denormal": places * 1e-42,
        "many magnitudes": torch.exp(40 * normal) * normal.sign(),
        "half infinite": torch.where(uniform < 0.3, -INF, torch.where(uniform > 0.8, INF, normal)),
        "tied": (normal * 2).round(),
        "all tied": torch.full(shape, 0.25),
        "zeros": torch.where(uniform < 0.5, -0.0, 0.0),
        "all but one infinite": torch.where(one, 1.0, -INF),
        "one NaN": torch.where(one, NAN, normal),
        "many NaN": torch.where(uniform < 0.4, NAN, normal),
        "normal again": normal * 100,
    }
    return torch.cat([x.float() for x in spreads.values()])


@pytest.mark.parametrize("documents", [9, 15, 16, 17, 100, 255, 2032, 2033])
@pytest.mark.parametrize("ties, nan", [("average", "propagate"), ("average", "last"), ("stable", "last")])
@pytest.mark.once("reference")
def test_scores_of_any_spread(ties, nan, documents, device, recorded):
    g = torch.Generator().manual_seed(documents)
    preds = torch.cat([scores_of_any_spread(g, documents) for _ in range(4)])
    preds = preds[torch.rand(len(preds), generator=g).argsort()]
    judged = torch.tensor([4, 7, 8, 10, 15, 33, 60])[torch.arange(len(preds)) % 7]
    ranks = torch.rand(preds.shape, generator=g).argsort(1)
    target = torch.where(ranks < judged[:, None], ranks % 3 + 1, 0)
    values_of(preds.to(device), target.to(device), (*KINDS, "ndcg@10", "map@10", "mrr@3"), ties=ties, nan=nan)
    found, empty = registry["ranking_metrics"](*recorded[-1])
    truth, truly_empty = registry["ranking_metrics"].reference(*recorded[-1])
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-13, equal_nan=True)
    assert torch.equal(empty, truly_empty)
    assert found.isnan().any(0).sum() == (preds.isnan().any(1).sum() if nan == "propagate" else 0)
    if documents < 16:  # the reference's order, too, is not taken for granted
        for name, values in zip(("ndcg", "dcg", "mrr", "map"), found[:4].tolist(), strict=True):
            rows = zip(preds.tolist(), target.tolist(), strict=True)
            assert_values(values, [oracle(name, x, y, ties=ties, nan=nan) for x, y in rows])


@pytest.mark.parametrize(
    "form, target_dtype",
    [
        ("as it is", torch.bool),
        ("mask", torch.int16),
        ("lengths", torch.float32),
        ("misaligned", torch.int64),
        ("misaligned", torch.bool),
    ],
    ids=str,
)
@pytest.mark.once("reference")
def test_huge_rows(form, target_dtype, device, recorded):
    g = torch.Generator().manual_seed(4)
    shape, extra = (3, 135_001), {}
    preds = random_scores(g, shape, 10**6, torch.float32).to(device)
    relevant = torch.tensor([[1e-4], [0.4], [0.0]])
    target = (torch.rand(shape, generator=g) < relevant).to(device, target_dtype)
    if form == "mask":
        extra["mask"] = (torch.rand(shape, generator=g) < 0.8).to(device)
    elif form == "lengths":
        extra["lengths"] = torch.tensor([100, 135_001, 134_000], device=device)
    elif form == "misaligned":
        preds, target = preds[:, 1:], target[:, 3:-1]
        preds = preds[:, : target.shape[1]]
    values_of(preds, target, ("ndcg", "ndcg@10", "mrr", "map", "recall@1000"), **extra)
    found, _ = registry["ranking_metrics"](*recorded[-1])
    truth, _ = registry["ranking_metrics"].reference(*recorded[-1])
    torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-13)


def test_r_precision_alone_where_its_cut_off_is_0(device):
    """No other metric has one: there is nothing to select, though many documents are judged."""
    g = torch.Generator().manual_seed(5)
    preds = torch.randn(3, 3000, generator=g).to(device)
    target = (torch.rand(3, 3000, generator=g) < 0.1).to(device)
    found = values_of(preds, target, ["r_precision"], relevance_threshold=2.0)
    assert found == {"r_precision": [0.0, 0.0, 0.0]}


def test_each_metric_is_the_same_alone_and_among_others(device):
    g = torch.Generator().manual_seed(2)
    preds, target = random_scores(g, (40, 60), 20, torch.float32).to(device), torch.randint(3, (40, 60), generator=g)
    together = values_of(preds, target.to(device), EVERYTHING)
    for name in EVERYTHING:
        assert values_of(preds, target.to(device), name)[name] == pytest.approx(together[name], rel=1e-14, abs=0)


# ---- Scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64), ids=str)
def test_negative_zero_is_tied_with_zero_and_denormals_are_not(dtype, device):
    tiny = torch.tensor(torch.finfo(dtype).smallest_normal, dtype=dtype) * torch.finfo(dtype).eps
    assert tiny > 0
    preds = torch.stack([-tiny, torch.zeros_like(tiny), -torch.zeros_like(tiny), tiny])[None].to(device)
    for relevant, expected in ((0, 1 / 4), (1, (1 / 2 + 1 / 3) / 2), (2, (1 / 2 + 1 / 3) / 2), (3, 1.0)):
        y = torch.zeros(1, 4, dtype=torch.long, device=device)
        y[0, relevant] = 1
        assert values_of(preds, y, "mrr")["mrr"] == pytest.approx([expected], **close)


def test_infinite_scores_are_the_first_and_the_last(device):
    assert one_query([INF, 1e300, -INF, INF], [0, 0, 1, 1], device)["map"] == pytest.approx((1 + 1 / 2) / 2 / 2 + 1 / 4)


def test_nan_propagates_to_its_query_alone(device):
    preds = torch.tensor([[1.0, NAN, 0.0], [1.0, 0.5, 0.0]], device=device)
    target = torch.tensor([[1, 0, 0], [1, 0, 0]], device=device)
    for empty in ("zero", "one", "skip"):
        found = values_of(preds, target, EVERYTHING, empty=empty)
        assert all(math.isnan(v[0]) and not math.isnan(v[1]) for v in found.values())
        nothing = values_of(preds, target * 0, EVERYTHING, empty=empty)
        assert all(math.isnan(v[0]) for v in nothing.values())


def test_nan_last_ties_all_nan_behind_minus_infinity(device):
    found = one_query([NAN, -INF, -NAN, 2.0], [1, 0, 0, 0], device, nan="last")
    assert found["mrr"] == pytest.approx((1 / 3 + 1 / 4) / 2)


def test_nan_error_names_the_query(device):
    preds = torch.tensor([[1.0, 0.0], [1.0, NAN]], device=device)
    with pytest.raises(ValueError, match="preds must not hold NaN with nan='error', got one in query 1"):
        ranking_metrics(preds, torch.ones(2, 2, device=device), "mrr", nan="error")
    assert ranking_metrics(preds[:1], torch.ones(1, 2, device=device), "mrr", nan="error")["mrr"] == 1


def test_the_sign_of_scores_does_not_matter(device):
    preds = torch.rand(5, 9, device=device)
    target = torch.randint(2, (5, 9), device=device)
    assert values_of(preds - 2, target) == values_of((preds - 2) / 8 + 1, target)


# ---- Targets, strides, boundaries -----------------------------------------------------------------

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64, *INTEGERS), ids=str)
@pytest.mark.parametrize("gain", ("linear", "exp"))
def test_targets_of_any_dtype(dtype, gain, device):
    preds, target = torch.randn(6, 20, device=device), torch.randint(5, (6, 20))
    expected = values_of(preds, target.to(device), gain=gain)
    assert values_of(preds, target.to(dtype).to(device), gain=gain) == expected


def test_bool_targets(device):
    preds, target = torch.randn(6, 20, device=device), torch.randint(2, (6, 20), device=device)
    assert values_of(preds, target.bool()) == values_of(preds, target)


def test_fractional_gains_and_threshold(device):
    found = one_query([3.0, 2.0, 1.0], [0.25, 0.5, 1.0], device, relevance_threshold=0.5)
    assert found["mrr"] == 0.5 and found["recall@2"] == 0.5
    assert found["dcg"] == pytest.approx(0.25 + 0.5 / math.log2(3) + 1 / 2)


def test_threshold_does_not_change_gains(device):
    y = [1, 0, 3, 2]
    scores = [3.0, 2.0, 1.0, 0.0]
    assert one_query(scores, y, device, "ndcg", relevance_threshold=3.0) == one_query(scores, y, device, "ndcg")


def test_ndcg_is_defined_by_gains_where_no_document_is_relevant(device):
    found = one_query([3.0, 2.0], [1, 0], device, ("ndcg", "mrr"), relevance_threshold=2.0, empty="one")
    assert found == {"ndcg": 1.0, "mrr": 1.0}
    found = one_query([2.0, 3.0], [1, 0], device, ("ndcg", "mrr"), relevance_threshold=2.0, empty="one")
    assert found == pytest.approx({"ndcg": 1 / math.log2(3), "mrr": 1.0})
    found = one_query([2.0, 3.0], [0, 0], device, ("ndcg", "mrr"), gain=(1.0, 2.0), empty="skip")
    assert found["ndcg"] == 1.0 and math.isnan(found["mrr"])


def test_gains_that_overflow_are_an_error(device, monkeypatch):
    """Also where the cut-off leaves those documents out: the best order has them."""
    monkeypatch.setenv("TORCHFAST_CHECK", "1")
    preds, y = torch.tensor([[1.0, 0.0]] * 2, device=device), torch.tensor([[0, 1], [1, 2000]], device=device)
    too_much = r"target must have gains whose sum in a query is at most 1.8e\+308"
    below = r" \(with gain='exp' they are 2\^target - 1, so targets below 1024\), got 2000 in query 1"
    for name in "ndcg", "ndcg@1", "dcg", "ndcg@2":
        with pytest.raises(ValueError, match=too_much + below):
            ranking_metrics(preds, y, ["mrr", name], gain="exp")
    with pytest.raises(ValueError, match=too_much + ", got 1.5e\\+308 in query 1"):
        ranking_metrics(preds, torch.tensor([[0, 1], [1.5e308, 1.5e308]], dtype=torch.float64, device=device), "ndcg")
    with pytest.raises(ValueError, match="unretrieved must have gains .* got 1500 in query 0"):
        ranking_metrics(preds[:1], y[:1], "ndcg", gain="exp", unretrieved=y[:1] * 1500)
    assert ranking_metrics(preds, y, ["mrr", "recall@1"], gain="exp")  # which do not look at gains
    most = torch.tensor([[0, 1023]], device=device)
    assert ranking_metrics(preds[:1], most, "ndcg", gain="exp")["ndcg"] == pytest.approx(1 / math.log2(3))


@pytest.mark.parametrize("documents", (2, 40, 3000))
@pytest.mark.parametrize("ties", TIES)
def test_ndcg_is_nan_where_gains_overflow(ties, documents, device):
    """On GPUs, whose targets are not checked; the other queries are as they were."""
    preds = torch.randint(3, (3, documents), generator=torch.Generator().manual_seed(0)).float().to(device)
    y = torch.ones(3, documents, dtype=torch.long, device=device)
    y[1, 0] = 2000
    options = resolve(("ndcg@1", "ndcg", "recall"), gain="exp", ties=ties)
    values, _ = registry["ranking_metrics"](preds, y, *[None] * 7, *options.numbers)
    assert values[:2, 1].isnan().all() and values[2, 1] == 1
    assert values[:, ::2].flatten().tolist() == pytest.approx([1.0] * 6, **close)


def test_documents_that_were_not_retrieved_count_in_the_ideal_and_in_recall(device):
    preds, y = torch.tensor([[2.0, 1.0]], device=device), torch.tensor([[1, 0]], device=device)
    others = torch.tensor([[3, 0, 1]], device=device)
    found = values_of(preds, y, unretrieved=others)
    assert found["ndcg"] == pytest.approx([1 / (3 + 1 / math.log2(3) + 1 / 2)])
    assert found["ndcg@2"] == pytest.approx([1 / (3 + 1 / math.log2(3))])
    assert found["recall"] == found["map"] == found["r_precision"] == pytest.approx([1 / 3])
    flat = (others.flatten(), torch.tensor([0, 3], device=device))
    assert values_of(preds, y, unretrieved=flat) == found
    nested = torch.nested.nested_tensor([others[0]], layout=torch.jagged)
    assert values_of(preds, y, unretrieved=nested) == found
    counted = values_of(preds, y, num_relevant=torch.tensor([3], device=device))
    assert counted["recall"] == found["recall"] and counted["ndcg"] == [1.0]


def strided(x, layout):
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "expanded":
        return x[:1].expand(x.shape)
    wide = torch.empty(*x.shape, 3, dtype=x.dtype, device=x.device)
    wide[..., 1] = x
    return wide[..., 1]


@pytest.mark.parametrize("layout", ("transposed", "expanded", "sliced"))
def test_any_strides(layout, device):
    preds, target = torch.randn(5, 40, device=device), torch.randint(3, (5, 40), device=device)
    mask, lengths = torch.rand(5, 40, device=device) < 0.7, torch.tensor([3, 40, 0, 17, 39], device=device)
    for extra in {"mask": mask}, {"lengths": lengths}, {}:
        views = [strided(x, layout) if x.dim() == 2 else x for x in (preds, target, *extra.values())]
        copies = [x.clone(memory_format=torch.contiguous_format) for x in views]
        found, expected = (values_of(x, y, **dict(zip(extra, z, strict=True))) for x, y, *z in (views, copies))
        assert_nested_equal(found, expected)
    flat = strided(torch.stack([preds.flatten(), preds.flatten()]), "transposed")[0]
    offsets = torch.tensor([0, 0, 50, 0, 51, 0, 200], device=device)[::2]
    offsets = torch.stack([torch.tensor([0, 50, 51, 200], device=device)] * 2, 1)[:, 0]
    assert values_of(flat, target.flatten(), offsets=offsets) == values_of(
        preds.flatten(), target.flatten(), offsets=offsets.contiguous()
    )


def assert_nested_equal(found, expected):
    assert {k: str(v) for k, v in found.items()} == {k: str(v) for k, v in expected.items()}


def test_nested_tensors_with_holes(device):
    padded, y = torch.randn(3, 5, device=device), torch.randint(2, (3, 5), device=device)
    lengths = torch.tensor([2, 5, 0], device=device)
    jagged = [torch.nested.narrow(x, 1, 0, lengths, layout=torch.jagged) for x in (padded, y)]
    assert jagged[0].lengths() is not None
    assert values_of(*jagged) == values_of(padded, y, lengths=lengths)


def test_indexes_of_any_shape_are_grouped_by_ascending_number(device):
    preds = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], device=device)
    target = torch.tensor([[1, 0, 1], [0, 0, 0]], device=device)
    indexes = torch.tensor([[9, -5, 9], [9, -5, 9]], device=device, dtype=torch.int16)
    assert values_of(preds, target, "mrr", indexes=indexes) == {"mrr": [0.0, 1 / 3]}


def test_stable_ties_of_unsorted_indexes_keep_the_order_in_the_batch(device):
    indexes = torch.tensor([1, 0, 1, 0, 1], device=device)
    target = torch.tensor([0, 0, 1, 1, 1], device=device)
    found = values_of(torch.zeros(5, device=device), target, "mrr", indexes=indexes, ties="stable")
    assert found == {"mrr": [0.5, 0.5]}


@given(st.lists(st.sampled_from((0, 1, -1, 5, 2**62, -(2**62), 2**63 - 1, -(2**63))), max_size=40))
@pytest.mark.once
def test_grouping_is_a_stable_sort(device, ids):
    indexes = torch.tensor(ids, dtype=torch.long, device=device)
    order, offsets, found = (x.tolist() for x in group_by_query(indexes, skip_sorted=True))
    expected = sorted(range(len(ids)), key=ids.__getitem__)
    assert order == ([] if ids == sorted(ids) else expected)
    assert group_by_query(indexes)[0].tolist() == expected
    assert found == sorted(set(ids))
    assert offsets == [0, *itertools.accumulate(ids.count(i) for i in found)]


@pytest.mark.parametrize("count", (100_000, 5))
@pytest.mark.once
def test_grouping_many(count, device):
    indexes = torch.randint(count // 4 + 1, (count,), device=device) * 2**40
    order, offsets, ids = group_by_query(indexes)
    expected = indexes.sort(stable=True)
    assert torch.equal(order, expected.indices)
    assert torch.equal(ids, expected.values.unique_consecutive())
    assert torch.equal(offsets.diff(), expected.values.unique_consecutive(return_counts=True)[1])


def test_no_queries_and_no_documents(device):
    nothing = torch.zeros(0, 4, device=device)
    assert all(len(v) == 0 for v in values_of(nothing, nothing).values())
    assert all(v.isnan() for v in ranking_metrics(nothing, nothing, EVERYTHING).values())
    assert set(map(tuple, values_of(torch.zeros(2, 0, device=device), nothing[:0].reshape(2, 0)).values())) == {(0, 0)}
    flat, offsets = torch.zeros(0, device=device), torch.tensor([0], device=device)
    assert values_of(flat, flat, "map", offsets=offsets) == {"map": []}
    assert values_of(flat, flat, "map", indexes=flat.long()) == {"map": []}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32, torch.float64), ids=str)
def test_queries_of_one_document_or_none(dtype, device):
    preds, target = torch.zeros(9, 1, dtype=dtype, device=device), torch.arange(9, device=device)[:, None] % 2
    assert values_of(preds, target, ("mrr", "map")) == {"mrr": [0, 1] * 4 + [0], "map": [0, 1] * 4 + [0]}
    assert values_of(preds[:, :0], target[:, :0], "ndcg") == {"ndcg": [0.0] * 9}
    offsets = torch.tensor([0, 0, 1, 1], device=device)
    assert values_of(preds[0], target[1], "mrr", offsets=offsets) == {"mrr": [0, 1, 0]}


def test_a_gain_of_negative_zero_is_no_gain(device):
    y = [1, 1, 1, 2, 3, 3]
    for gain in (0.0, -0.0, 1.0, 3.0), (-0.0, 0.0, 0.5, 2.5):
        found = one_query([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], y, device, ("ndcg",), gain=gain)
        assert found["ndcg"] == 1.0
    y = torch.tensor([[1] * 3000 + [2, 3, 3]], device=device)
    found = values_of(torch.arange(3003.0, device=device)[None], y, "ndcg", gain=(0.0, -0.0, 1.0, 3.0))
    assert found["ndcg"] == [1.0]


# ---- Queries: empty ones, weights, means -----------------------------------------------------------


def test_queries_without_a_relevant_document(device):
    preds, target = torch.tensor([[2.0, 1.0]] * 3, device=device), torch.tensor([[0, 1], [0, 0], [1, 0]], device=device)
    means = {e: ranking_metrics(preds, target, "mrr", empty=e)["mrr"].item() for e in ("zero", "one", "skip")}
    assert means == pytest.approx({"zero": 1.5 / 3, "one": 2.5 / 3, "skip": 1.5 / 2})
    found = values_of(preds, target, "mrr", empty="skip")["mrr"]
    assert found[::2] == [0.5, 1.0] and math.isnan(found[1])
    with pytest.raises(ValueError, match="query 1 has no relevant document, so mrr is undefined"):
        ranking_metrics(preds, target, ["dcg", "mrr"][1:], empty="error")
    with pytest.raises(ValueError, match="query 1 has no positive gain, so ndcg is undefined"):
        ranking_metrics(preds, target, ["ndcg"], empty="error")
    assert ranking_metrics(preds[:1], target[:1], EVERYTHING, empty="error")


def test_query_weights_apply_to_empty_queries_too(device):
    """XGBoost and LightGBM forget the weight of a query without relevant documents."""
    preds, target = torch.tensor([[2.0, 1.0]] * 3, device=device), torch.tensor([[0, 1], [0, 0], [1, 0]], device=device)
    weight = torch.tensor([1.0, 4.0, 2.0], device=device)
    means = {
        e: ranking_metrics(preds, target, "mrr", empty=e, query_weight=weight)["mrr"].item()
        for e in ("zero", "one", "skip")
    }
    assert means == pytest.approx({"zero": 2.5 / 7, "one": 6.5 / 7, "skip": 2.5 / 3})


def test_a_query_of_weight_0_does_not_count_even_with_nan_scores(device):
    preds, target = torch.tensor([[2.0, 1.0], [NAN, 1.0]], device=device), torch.ones(2, 2, device=device)
    weight = torch.tensor([3.0, 0.0], device=device)
    assert ranking_metrics(preds, target, "mrr", query_weight=weight)["mrr"] == 1


def test_mean_is_the_mean_of_the_values(device):
    preds, target = torch.randn(30, 9, device=device), torch.randint(2, (30, 9), device=device)
    means = ranking_metrics(preds, target, EVERYTHING)
    for name, values in values_of(preds, target).items():
        assert means[name].item() == pytest.approx(math.fsum(values) / 30, rel=1e-14)


def test_shorthands_are_the_metrics(device):
    preds, target = torch.randn(5, 9, device=device), torch.randint(2, (5, 9), device=device)
    found = ranking_metrics(preds, target, EVERYTHING, ties="stable")
    for kind in KINDS:
        if kind == "dcg":
            continue
        shorthand = getattr(ranking, {"map": "mean_average_precision"}.get(kind, kind))
        assert shorthand(preds, target, ties="stable") == found[kind]
        if kind != "r_precision":
            assert shorthand(preds, target, k=3, ties="stable") == found[f"{kind}@3"]


# ---- What is refused -------------------------------------------------------------------------------

P, Y = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[0, 1, 0]])
FLAT, LABELS = torch.arange(4.0), torch.tensor([0, 1, 0, 1])


def offsets_of(*values):
    return {"offsets": torch.tensor(values, dtype=torch.long)}


@pytest.mark.parametrize(
    "name, message",
    [
        ("ndgc@10", r"got 'ndgc@10'; did you mean 'ndcg@10'\?"),
        ("NDCG", r"got 'NDCG'; did you mean 'ndcg'\?"),
        ("hitrate@5", r"did you mean 'hit_rate@5'\?"),
        ("bleu", r"metrics must be of 'ndcg', .* or 'r_precision', alone or .* 'ndcg@10', got 'bleu'$"),
        ("ndcg@0", "metrics: the cut-off of 'ndcg' must be an integer >= 1, got 'ndcg@0'"),
        ("map@-3", "cut-off of 'map' must be an integer >= 1, got 'map@-3'"),
        ("map@", "cut-off of 'map' must be an integer >= 1, got 'map@'"),
        ("map@2.5", "cut-off of 'map' must be an integer >= 1, got 'map@2.5'"),
        ("map@99999999999999999999", "cut-off of 'map' must be an integer >= 1"),
        ("map@9223372036854775808", "cut-off of 'map' must be an integer >= 1"),
        ("r_precision@5", "metrics must be 'r_precision', which cuts off at n_rel, without a number"),
    ],
)
def test_wrong_metric_names(name, message):
    with pytest.raises(ValueError, match=message):
        ranking_metrics(P, Y, ["mrr", name])


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"metrics": []}, ValueError, "metrics must be at least one name"),
        ({"metrics": [3]}, TypeError, "metrics must be strings such as 'ndcg@10', got 3"),
        ({"metrics": [["mrr"]]}, TypeError, r"metrics must be strings such as 'ndcg@10', got \['mrr'\]"),
        ({"ties": ["average"]}, ValueError, "ties must be 'average', 'stable', 'optimistic' or 'pessimistic'"),
        ({"preds": [1.0]}, TypeError, "preds must be a tensor of float32, .* got list"),
        ({"preds": P.long()}, TypeError, "preds must be a tensor of float32, .* got torch.int64"),
        ({"preds": P[0], "target": Y[0]}, ValueError, r"flat preds need offsets or indexes, a single query is preds\["),
        ({"preds": P[None], "target": Y[None]}, ValueError, r"preds' shape must be \(queries, documents\), got \(1, 1"),
        ({"target": [[0, 1, 0]]}, TypeError, "target must be a tensor of bool, integers or floats, got list"),
        ({"target": Y * 1j}, TypeError, "target must be a tensor of bool, integers or floats, got torch.complex64"),
        ({"target": Y[:, :2]}, ValueError, r"target's shape must be preds' shape \(1, 3\), got \(1, 2\)"),
        ({"target": Y.to("meta")}, ValueError, "target must be on preds's device cpu, got meta"),
        ({"target": -Y}, ValueError, r"target must be finite and >= 0 \(.*mask.*\), got -1 in query 0"),
        ({"target": -Y, "metrics": "mrr@1"}, ValueError, "target must be finite and >= 0"),
        ({"target": Y * NAN}, ValueError, "target must be finite and >= 0 .* got nan in query 0"),
        ({"target": Y / 0}, ValueError, "target must be finite and >= 0"),
        ({"gain": "ndcg"}, ValueError, "gain must be 'linear' or 'exp', got 'ndcg'"),
        ({"gain": (0.0, 2.0, 1.0)}, ValueError, "gain must be finite, >= 0 and nowhere decreasing, got"),
        ({"gain": (-1.0, 2.0)}, ValueError, "gain must be finite, >= 0"),
        ({"gain": (0.0, INF)}, ValueError, "gain must be finite, >= 0"),
        ({"gain": (0.0, NAN)}, ValueError, "gain must be finite, >= 0"),
        ({"gain": ()}, ValueError, r"gain's shape must be \(number of targets,\), got \(0,\)"),
        ({"gain": object()}, TypeError, "gain must be 'linear', 'exp' or one number for each target, got <object"),
        ({"gain": (1.0,)}, ValueError, "target must be below 1, the length of the gain table, got 1 in query 0"),
        ({"gain": (0.0, 1.0), "target": Y * 10**15}, ValueError, "target must be below 2, .* got 1000000000000000 in"),
        ({"gain": (0.0, 1.0), "target": Y - 10**15}, ValueError, "target must be finite and >= 0"),
        ({"gain": (0.0, 1.0), "target": Y.float()}, TypeError, "target must be bool or integers, places in the gain"),
        ({"relevance_threshold": 0}, ValueError, r"relevance_threshold must be None \(target > 0\) or finite and > 0"),
        ({"relevance_threshold": NAN}, ValueError, "relevance_threshold must be None"),
        (
            {"ties": "random"},
            ValueError,
            "ties must be 'average', 'stable', 'optimistic' or 'pessimistic', got 'random'",
        ),
        ({"nan": "first"}, ValueError, "nan must be 'propagate', 'last' or 'error', got 'first'"),
        ({"empty": "nan"}, ValueError, "empty must be 'zero', 'one', 'skip' or 'error', got 'nan'"),
        ({"map_denominator": "k"}, ValueError, r"map_denominator must be 'n_rel', 'min\(k,n_rel\)' or 'hits', got 'k'"),
        ({"precision_denominator": "docs"}, ValueError, r"precision_denominator must be 'k' or 'min\(k,docs\)', got"),
        ({"reduction": "sum"}, ValueError, "reduction must be 'mean' or 'none', got 'sum'"),
        ({"preset": "trec"}, ValueError, "preset must be 'trec_eval', 'sklearn', .* got 'trec'"),
        ({"preset": {}}, ValueError, "preset must be 'trec_eval', 'sklearn', .* got {}"),
        (
            {"preset": "xgboost", "ties": "average"},
            ValueError,
            "ties must be left out with preset='xgboost', which sets it to 'stable', got 'average'",
        ),
        ({"preset": "sklearn", "gain": (0.0, 1.0)}, ValueError, "gain must be left out with preset='sklearn'"),
        (
            {"mask": Y},
            TypeError,
            "mask must be a bool tensor, True for documents and False for padding, got torch.int64",
        ),
        ({"mask": Y[:, :2] > 0}, ValueError, r"mask's shape must be preds' shape \(1, 3\), got \(1, 2\)"),
        ({"mask": Y > 0, "lengths": Y[:, 0]}, ValueError, "mask must be left out where lengths are given"),
        ({"lengths": torch.tensor([4])}, ValueError, "lengths must be from 0 to 3, the documents of a row, got 4"),
        ({"lengths": torch.tensor([-1])}, ValueError, "lengths must be from 0 to 3, .* got -1"),
        ({"lengths": torch.tensor([1, 1])}, ValueError, r"lengths' shape must be \(1,\), got \(2,\)"),
        (
            {"lengths": torch.tensor([1.0])},
            TypeError,
            "lengths must be a tensor of an integer dtype, got torch.float32",
        ),
        ({"lengths": [1]}, TypeError, r"lengths must be a tensor of an integer dtype, got list"),
        (
            {"num_relevant": torch.tensor([0])},
            ValueError,
            "num_relevant must count all .* got 0 in query 0, where 1 are",
        ),
        ({"num_relevant": torch.tensor([True])}, TypeError, "num_relevant must be a tensor of an integer dtype"),
        ({"unretrieved": torch.tensor([[-2]])}, ValueError, "unretrieved must be finite and >= 0 .* got -2 in query 0"),
        ({"unretrieved": torch.tensor([2])}, ValueError, r"unretrieved's shape must be \(1, targets of each query\)"),
        ({"unretrieved": (Y[0],)}, ValueError, "unretrieved's length must be 2: values and offsets, got 1"),
        (
            {"unretrieved": (Y[0], torch.tensor([0, 4]))},
            ValueError,
            "unretrieved's offsets must not decrease and stay within 0 and 3, got 0 and then 4 for query 0",
        ),
        ({"unretrieved": (Y[0], torch.tensor([0]))}, ValueError, r"unretrieved's offsets' shape must be \(2,\), got"),
        (
            {"query_weight": torch.tensor([1])},
            TypeError,
            "query_weight must be a tensor of a floating dtype, got torch.int",
        ),
        ({"query_weight": torch.ones(2)}, ValueError, r"query_weight's shape must be \(1,\), got \(2,\)"),
        ({"query_weight": -torch.ones(1)}, ValueError, r"query_weight must be finite and >= 0, got \[-1.0\]"),
        ({"query_weight": torch.ones(1) * NAN}, ValueError, r"query_weight must be finite and >= 0, got \[nan\]"),
        ({"query_weight": torch.ones(1) * INF}, ValueError, r"query_weight must be finite and >= 0, got \[inf\]"),
        (
            {"query_weight": torch.ones(1), "reduction": "none"},
            ValueError,
            "query_weight must be None for reduction='none'",
        ),
        (
            offsets_of(0, 3),
            ValueError,
            r"preds' shape must be \(documents of all queries,\) with offsets, got \(1, 3\)",
        ),
    ],
)
def test_wrong_arguments(changed, error, message):
    with pytest.raises(error, match=message):
        ranking_metrics(**{"preds": P, "target": Y, "metrics": "ndcg", **changed})


@pytest.mark.parametrize(
    "changed, error, message",
    [
        (
            offsets_of(0, 3, 2, 4),
            ValueError,
            "offsets must not decrease and stay within 0 and 4, got 3 and then 2 for q",
        ),
        (
            offsets_of(0, 5, 4),
            ValueError,
            "offsets must not decrease and stay within 0 and 4, got 0 and then 5 for query 0",
        ),
        (offsets_of(0, -1, 4), ValueError, "offsets must not decrease .* got 0 and then -1 for query 0"),
        (
            offsets_of(0, 3),
            ValueError,
            r"first and last of offsets must be 0 and 4, .* documents, got \(0, 3\)",
        ),
        (
            offsets_of(1, 4),
            ValueError,
            r"first and last of offsets must be 0 and 4, .* documents, got \(1, 4\)",
        ),
        (offsets_of(0, 2**62, 4), ValueError, "offsets must not decrease"),
        (offsets_of(), ValueError, r"offsets' shape must be \(queries \+ 1,\), got \(0,\)"),
        (
            {"offsets": torch.tensor([0.0, 4.0])},
            TypeError,
            "offsets must be a tensor of an integer dtype, got torch.float32",
        ),
        ({"offsets": [0, 4]}, TypeError, "offsets must be a tensor of an integer dtype, got list"),
        ({"indexes": torch.tensor([0, 1])}, ValueError, r"indexes' shape must be \(4,\), got \(2,\)"),
        ({"indexes": FLAT}, TypeError, "indexes must be a tensor of an integer dtype, got torch.float32"),
        (
            {"indexes": LABELS, **offsets_of(0, 4)},
            ValueError,
            "query boundaries must be said one way: by offsets, indexes or lengths, got 'offsets and indexes'",
        ),
    ],
)
def test_wrong_query_boundaries(changed, error, message):
    with pytest.raises(error, match=message):
        ranking_metrics(FLAT, LABELS, "ndcg", **changed)


def test_wrong_nested_tensors():
    preds = torch.nested.nested_tensor([FLAT[:1], FLAT[1:]], layout=torch.jagged)
    target = torch.nested.nested_tensor([LABELS[:2], LABELS[2:]], layout=torch.jagged)
    with pytest.raises(ValueError, match="target must be nested with the lengths of preds, got others"):
        ranking_metrics(preds, target, "ndcg")
    with pytest.raises(ValueError, match="preds and target must be nested both or neither"):
        ranking_metrics(preds, LABELS, "ndcg")
    with pytest.raises(ValueError, match=r"query boundaries must be left out for nested tensors"):
        ranking_metrics(preds, preds, "ndcg", **offsets_of(0, 4))
    strided = torch.nested.nested_tensor([FLAT[:1], FLAT[1:]], layout=torch.strided)
    with pytest.raises(TypeError, match=r"preds must be .* nested tensor of layout=torch.jagged, got .* torch.strided"):
        ranking_metrics(strided, strided, "ndcg")


def test_bad_offsets_are_never_read_through(device):
    """On GPUs offsets are not checked: the op itself must survive any, with NaN for those queries."""
    op = registry["ranking_metrics"]
    preds, target = torch.randn(50, device=device), torch.ones(50, dtype=torch.long, device=device)
    numbers = None, *resolve("ndcg").numbers
    for bad in ((-(2**62), 50), (0, 2**62), (60, 70), (0, 50, 10, 50), (40, 10), (2**63 - 1, -(2**63), 2**63 - 1)):
        offsets = torch.tensor(bad, device=device)
        values, empty = op(preds, target, offsets, *[None] * 5, *numbers)
        wrong = (offsets[:-1] < 0) | (offsets[1:] < offsets[:-1]) | (offsets[1:] > 50)
        assert values[0, wrong].isnan().all() and not empty[:, wrong].any()
        values, empty = op(preds, target, torch.tensor([0, 50], device=device)[: len(bad)], *[None] * 3,
                           target, offsets[:2], *numbers)  # fmt: skip
        wrong = bool(wrong[0])
        assert not wrong or values.isnan().all()


def test_wrong_values_make_only_their_own_query_nan(device):
    op = registry["ranking_metrics"]
    preds = torch.randn(4, 6, device=device)
    target = torch.ones(4, 6, device=device)
    numbers = None, *resolve(EVERYTHING).numbers
    bad_target = target.clone()
    bad_target[1, 5], bad_target[2, 0] = -1, NAN
    lengths = torch.tensor([6, 7, -1, 3], device=device)
    counts = torch.tensor([6, 5, 0, 9], device=device)
    for arguments in (
        (preds, bad_target, *[None] * 6),
        (preds, target, None, None, lengths, *[None] * 3),
        (preds, target, None, None, None, counts, *[None] * 2),
        (preds, target, *[None] * 4, bad_target.flatten(), torch.arange(5, device=device) * 6),
    ):
        values, empty = op(*arguments, *numbers)
        assert values[:, 1:3].isnan().all() and not values[:, ::3].isnan().any() and not empty.any()


# ---- GPUs are not made to wait -----------------------------------------------------------------------


def test_a_gain_table_is_copied_to_another_device_once():
    """The host waits for a copy from its memory to a GPU's; meta stands in for that."""
    preds, target = torch.empty(4, 5, device="meta"), torch.empty(4, 5, dtype=torch.long, device="meta")
    gains = (0.0, 1.0, 2.5)
    first, second = (resolve("ndcg", gain=gains).table_for(preds) for _ in range(2))
    assert first is second and first.device.type == "meta"
    assert ranking_metrics(preds, target, "ndcg", gain=gains)["ndcg"].device.type == "meta"
    here = torch.tensor(gains, dtype=torch.float64)
    assert resolve("ndcg", gain=here).table_for(torch.empty(4, 5)).data_ptr() == here.data_ptr()


def test_a_gpu_is_not_asked_whether_documents_are_sorted(monkeypatch):
    asked = []

    def group(indexes, *, skip_sorted):
        asked.append(skip_sorted)
        raise NotImplementedError

    monkeypatch.setattr("torchfast.metrics.ranking.inputs.group_by_query", group)
    for device in ("cpu", "meta"):
        preds, y = torch.empty(3, device=device), torch.ones(3, dtype=torch.long, device=device)
        with pytest.raises(NotImplementedError):
            ranking_metrics(preds, y, "ndcg", indexes=y)
    assert asked == [True, False]


# ---- Autograd, compilation ---------------------------------------------------------------------------


@pytest.mark.once
def test_values_carry_no_graph(device):
    preds = torch.randn(3, 5, device=device, requires_grad=True)
    target = torch.rand(3, 5, device=device, requires_grad=True)
    value = ranking_metrics(preds, target, "ndcg")["ndcg"]
    assert not value.requires_grad and value.grad_fn is None
    with pytest.raises(RuntimeError, match="does not require grad"):
        value.backward()
    values, _ = registry["ranking_metrics"].op(preds, target, *[None] * 7, *resolve("ndcg").numbers)
    assert not values.requires_grad


@pytest.mark.once
def test_transforms_are_refused_rather_than_answered_with_zeros(device):
    preds, target = torch.randn(3, 5, device=device), torch.ones(3, 5, device=device)
    for transform in (torch.func.grad, torch.func.vmap, torch.func.jacrev):
        with pytest.raises(RuntimeError, match="ranking metrics are not differentiable"):
            transform(lambda x: ranking_metrics(x, target, "ndcg")["ndcg"])(preds)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="ranking metrics are not differentiable"):
        ranking_metrics(forward_ad.make_dual(preds, preds), target, "ndcg")


@pytest.mark.parametrize("form", ("dense", "offsets", "indexes"))
@pytest.mark.once
def test_compiles_as_one_graph_for_all_shapes(form, device):
    def means(preds, target, boundaries):
        given = {} if form == "dense" else {form: boundaries}
        return ranking_metrics(preds, target, ["ndcg@3", "mrr"], **given)

    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(means, fullgraph=True, dynamic=True)
        for queries, width in (3, 5), (7, 9):
            preds = torch.randn(queries, width, device=device)
            target = (preds > 0).long()
            boundaries = torch.arange(queries + 1, device=device) * width
            if form == "indexes":
                boundaries = torch.arange(queries * width, device=device) % queries
            if form != "dense":
                preds, target = preds.flatten(), target.flatten()
            found, expected = compiled(preds, target, boundaries), means(preds, target, boundaries)
            assert found.keys() == expected.keys()
            for name in found:
                torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=0)


# ---- Memory ----------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "shape, relevant",
    [((10_000_000, 20), 0.1), ((4, 10_000_000), 1e-6), ((4, 10_000_000), 0.5)],
    ids=["ten million queries", "ten million documents", "ten million documents, half of them relevant"],
)
@pytest.mark.once
@pytest.mark.usefixtures("memory_of_one")
def test_ten_million_of_either_take_memory_of_the_order_of_the_input(shape, relevant, device, metrics_kernel):
    """Of one value for each query, and a sort of the documents of one query where many are relevant."""
    if (device, metrics_kernel) != ("cpu", "native"):
        pytest.skip("about resident memory; of the native kernels")
    preds, target = torch.rand(shape), torch.rand(shape) < relevant
    values_of(preds[:100, :1000], target[:100, :1000], ("ndcg@10", "mrr", "map"))
    found, used = peak_memory(lambda: ranking_metrics(preds, target, ("ndcg@10", "mrr", "map")))
    assert used / (preds.nbytes + target.nbytes) < (0.5 if shape[0] > 4 else 4)
    if len(preds) == 4:
        for name, value in found.items():
            each = [ranking_metrics(preds[q : q + 1], target[q : q + 1], name)[name].item() for q in range(4)]
            assert value.item() == pytest.approx(sum(each) / 4, rel=1e-12)
    else:
        some = ranking_metrics(preds[::100], target[::100], tuple(found))
        assert all(abs(found[name] - some[name]) < 0.01 for name in found)
