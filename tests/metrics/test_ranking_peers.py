"""Each preset gives its peer's numbers, with and without ties; where a peer deviates from its own definition, or leaves
one open, a test says so. The peers that are not installed are skipped (they are in torchfast[dev])."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path

import pytest
import torch

from torchfast.metrics import average_precision_score, ranking_metrics

TOLERANCE = 1e-6
KS = (1, 3, 5, 10, 40)


def data(ties, *, graded=True, queries=40, documents=25, relevant=0.3, seed=0):
    """Scores of few (and for fp32 exact) values, or all different; some queries without a relevant document."""
    g = torch.Generator().manual_seed(seed)
    shape = (queries, documents)
    preds = torch.rand(shape, generator=g).argsort(1).double() + 1
    if ties:
        preds = torch.randint(1, 8, shape, generator=g).double()
    target = torch.randint(1, 5 if graded else 2, shape, generator=g) * (torch.rand(shape, generator=g) < relevant)
    target[::7] = 0
    return preds, target


def per_query(preds, target, names, **options):
    return ranking_metrics(preds, target, names, reduction="none", **options)


def assert_peer(found, expected, what=""):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    difference = (found - expected).abs().max().item()
    assert difference <= TOLERANCE, (what, difference)


both_ties = pytest.mark.parametrize("ties", (False, True), ids=("no ties", "ties"))


# ---- scikit-learn ----------------------------------------------------------------------------------


@both_ties
@pytest.mark.parametrize("k", (None, *KS))
def test_sklearn_ndcg_and_dcg(ties, k):
    sklearn = pytest.importorskip("sklearn.metrics")
    preds, target = data(ties)
    name = "" if k is None else f"@{k}"
    found = per_query(preds, target, ["ndcg" + name, "dcg" + name], preset="sklearn")
    for q, (p, y) in enumerate(zip(preds.numpy(), target.numpy(), strict=True)):
        assert_peer(found["ndcg" + name][q], sklearn.ndcg_score([y], [p], k=k))
        assert_peer(found["dcg" + name][q], sklearn.dcg_score([y], [p], k=k))


def test_sklearn_with_ignore_ties_takes_the_order_of_an_unstable_sort():
    """So with ties it gives what one of their orders gives."""
    sklearn = pytest.importorskip("sklearn.metrics")
    preds, target = data(True)
    theirs = [sklearn.ndcg_score(y[None], p[None], k=5, ignore_ties=True) for p, y in zip(preds, target, strict=True)]
    worst, best = (per_query(preds, target, "ndcg@5", ties=t)["ndcg@5"] for t in ("pessimistic", "optimistic"))
    theirs = torch.tensor(theirs, dtype=torch.float64)
    assert (worst <= theirs + TOLERANCE).all() and (theirs <= best + TOLERANCE).all()
    assert (per_query(preds, target, "ndcg@5", preset="sklearn")["ndcg@5"] - theirs).abs().max() > 0.01


@pytest.mark.parametrize("k", (None, *KS))
def test_sklearn_with_ignore_ties_without_ties(k):
    sklearn = pytest.importorskip("sklearn.metrics")
    preds, target = data(False)
    name = "ndcg" if k is None else f"ndcg@{k}"
    expected = [
        sklearn.ndcg_score([y], [p], k=k, ignore_ties=True) for p, y in zip(preds.numpy(), target.numpy(), strict=True)
    ]
    assert_peer(per_query(preds, target, name, preset="sklearn")[name], expected)


def test_sklearn_label_ranking_average_precision_is_map_without_ties():
    sklearn = pytest.importorskip("sklearn.metrics")
    preds, target = data(False, graded=False)
    some = target.any(1)
    expected = sklearn.label_ranking_average_precision_score(target[some].numpy(), preds[some].numpy())
    assert_peer(ranking_metrics(preds[some], target[some], "map", preset="sklearn")["map"], expected)


def test_sklearn_label_ranking_average_precision_counts_all_tied_documents():
    """With ties it is no order's average precision, not even the worst one's: a document's rank is that of the last one
    tied with it, but all relevant ones tied with it count as found. And a query without relevant labels scores 1."""
    sklearn = pytest.importorskip("sklearn.metrics")
    preds, target = torch.zeros(1, 3), torch.tensor([[1, 1, 0]])
    assert sklearn.label_ranking_average_precision_score(target.numpy(), preds.numpy()) == pytest.approx(2 / 3)
    assert ranking_metrics(preds, target, "map", ties="pessimistic")["map"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert ranking_metrics(preds, target, "map")["map"] == pytest.approx(
        (1 + (1 + 2 / 3) / 2 + (1 / 2 + 2 / 3) / 2) / 3
    )
    assert sklearn.label_ranking_average_precision_score([[0, 0, 0]], preds.numpy()) == 1
    assert ranking_metrics(preds, target * 0, "map", preset="sklearn")["map"] == 0


def test_sklearn_average_precision_of_tied_scores_is_not_map():
    """It takes all documents of a score at once; that is our average_precision_score, not an order's map."""
    sklearn = pytest.importorskip("sklearn.metrics")
    preds, target = torch.tensor([0.5, 0.5, 0.1]), torch.tensor([0, 1, 1])
    assert sklearn.average_precision_score(target, preds) == pytest.approx(1 / 4 + 1 / 3)
    assert average_precision_score(preds, target) == pytest.approx(1 / 4 + 1 / 3)
    of_map = ranking_metrics(preds[None], target[None], "map", preset="sklearn")["map"]
    assert of_map == pytest.approx(((1 + 2 / 3) / 2 + (1 / 2 + 2 / 3) / 2) / 2)


# ---- torchmetrics ----------------------------------------------------------------------------------

TORCHMETRICS = {
    "mrr": "RetrievalMRR",
    "map": "RetrievalMAP",
    "precision": "RetrievalPrecision",
    "recall": "RetrievalRecall",
    "hit_rate": "RetrievalHitRate",
}


def by_torchmetrics(metric, preds, target, **options):
    metric = getattr(pytest.importorskip("torchmetrics.retrieval"), metric)(**options)
    indexes = torch.arange(len(preds))[:, None].expand(preds.shape)
    metric.update(preds, target, indexes=indexes)
    return metric.compute().double()


@both_ties
@pytest.mark.parametrize("k", (None, *KS))
def test_torchmetrics_ndcg(ties, k):
    preds, target = data(ties)
    name = "ndcg" if k is None else f"ndcg@{k}"
    expected = by_torchmetrics("RetrievalNormalizedDCG", preds, target, top_k=k)
    assert_peer(ranking_metrics(preds, target, name, preset="torchmetrics")[name], expected)


@pytest.mark.parametrize("kind", TORCHMETRICS)
@pytest.mark.parametrize("k", (None, *KS))
def test_torchmetrics_of_binary_targets_without_ties(kind, k):
    preds, target = data(False, graded=False)
    name = kind if k is None else f"{kind}@{k}"
    expected = by_torchmetrics(TORCHMETRICS[kind], preds, target, top_k=k)
    assert_peer(ranking_metrics(preds, target, name, preset="torchmetrics")[name], expected, name)


@pytest.mark.parametrize("k", (3, 40))
def test_torchmetrics_precision_with_adaptive_k_divides_by_the_documents(k):
    preds, target = data(False, graded=False)
    expected = by_torchmetrics("RetrievalPrecision", preds, target, top_k=k, adaptive_k=True)
    (found,) = ranking_metrics(preds, target, f"precision@{k}", precision_denominator="min(k,docs)").values()
    assert_peer(found, expected)


def test_torchmetrics_r_precision_without_ties():
    preds, target = data(False, graded=False)
    expected = by_torchmetrics("RetrievalRPrecision", preds, target)
    assert_peer(ranking_metrics(preds, target, "r_precision", preset="torchmetrics")["r_precision"], expected)


@pytest.mark.parametrize("name", ("mrr", "map", "mrr@3", "precision@3", "recall@3", "hit_rate@1"))
def test_torchmetrics_breaks_ties_in_whatever_order_it_meets(name):
    """All but its ndcg follow the order of topk or of an unstable argsort: what they give lies between our extremes,
    and changes with the order in which tied documents are given."""
    preds, target = data(True, graded=False)
    kind, _, k = name.partition("@")

    def theirs(preds, target):
        return by_torchmetrics(TORCHMETRICS[kind], preds, target, top_k=int(k) if k else None)

    worst, best = (ranking_metrics(preds, target, name, ties=t)[name] for t in ("pessimistic", "optimistic"))
    assert worst - TOLERANCE <= theirs(preds, target) <= best + TOLERANCE
    tied, first = torch.ones(1, 5), torch.tensor([[1, 0, 0, 0, 0]])
    assert theirs(tied, first) != theirs(tied, first.flip(1))


def test_torchmetrics_drops_relevant_documents_with_negative_scores():
    """A score is a score: here mrr is 1/2 whatever the sign."""
    preds, target = torch.tensor([[-0.1, -0.2, -0.3]]), torch.tensor([[0, 1, 0]])
    assert by_torchmetrics("RetrievalMRR", preds, target) == 0
    assert by_torchmetrics("RetrievalMRR", preds + 1, target) == 0.5
    assert ranking_metrics(preds, target, "mrr", preset="torchmetrics")["mrr"] == 0.5


def test_torchmetrics_gives_a_number_for_nan_scores():
    preds, target = torch.tensor([[math.nan, 0.2, 0.1]]), torch.tensor([[1, 0, 0]])
    assert not by_torchmetrics("RetrievalHitRate", preds, target, top_k=1).isnan()
    assert ranking_metrics(preds, target, "hit_rate@1", preset="torchmetrics")["hit_rate@1"].isnan()


def test_torchmetrics_skipping_all_queries_gives_0():
    """The mean over nothing is NaN here."""
    preds, target = data(False)
    skipped = by_torchmetrics("RetrievalMRR", preds, target * 0, empty_target_action="skip")
    assert skipped == 0
    assert ranking_metrics(preds, target * 0, "mrr", empty="skip")["mrr"].isnan()


# ---- trec_eval -------------------------------------------------------------------------------------

TREC_EVAL = {
    "ndcg": "ndcg",
    "map": "map",
    "mrr": "recip_rank",
    "r_precision": "Rprec",
    **{f"ndcg@{k}": f"ndcg_cut_{k}" for k in (5, 10, 15, 20, 30)},
    **{f"map@{k}": f"map_cut_{k}" for k in (5, 10, 15, 20, 30)},
    **{f"precision@{k}": f"P_{k}" for k in (5, 10, 15, 20, 30)},
    **{f"recall@{k}": f"recall_{k}" for k in (5, 10, 15, 20, 30)},
    **{f"hit_rate@{k}": f"success_{k}" for k in (1, 5, 10)},
}


def name_of(d):
    """trec_eval takes tied documents by descending name, we by ascending position."""
    return f"d{999 - d}"


def by_trec_eval(preds, target, retrieved):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    qrels = {f"q{q}": {name_of(d): int(t) for d, t in enumerate(row)} for q, row in enumerate(target)}
    run = {f"q{q}": {name_of(d): float(s) for d, s in enumerate(row) if retrieved[q, d]} for q, row in enumerate(preds)}
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, pytrec_eval.supported_measures)
    found = evaluator.evaluate(run)
    return {name: [found[f"q{q}"][theirs] for q in range(len(preds))] for name, theirs in TREC_EVAL.items()}


@both_ties
def test_trec_eval_of_all_judged_documents(ties):
    preds, target = data(ties)
    expected = by_trec_eval(preds, target, torch.ones_like(target))
    found = per_query(preds, target, list(TREC_EVAL), preset="trec_eval")
    for name in TREC_EVAL:
        assert_peer(found[name], expected[name], name)


@both_ties
def test_trec_eval_counts_judged_documents_that_were_not_retrieved(ties):
    preds, target = data(ties)
    retrieved = torch.rand(preds.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    retrieved[:, 0] = True
    expected = by_trec_eval(preds, target, retrieved)
    unretrieved = torch.where(retrieved, 0, target)
    found = per_query(preds, target, list(TREC_EVAL), preset="trec_eval", mask=retrieved, unretrieved=unretrieved)
    for name in TREC_EVAL:
        assert_peer(found[name], expected[name], name)


def test_trec_eval_reads_scores_in_single_precision():
    """So scores that differ in double precision may be tied there; here they are not."""
    preds, target = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64), torch.tensor([[1, 0]])
    assert by_trec_eval(preds, target, target + 1)["mrr"] == [1.0]
    assert ranking_metrics(preds, target, "mrr", preset="trec_eval")["mrr"] == 0.5
    assert ranking_metrics(preds.float(), target, "mrr", preset="trec_eval")["mrr"] == 1.0


# ---- The recipe of the docs for qrels and runs -------------------------------------------------------


@pytest.fixture
def collection():
    """Its tensors_of; judgements of which some are negative or not retrieved; results of which some are not judged or
    tied, and queries without results or without judgements."""
    page = Path(__file__).parents[2] / "docs" / "ranking-metrics.md"
    (recipe,) = re.findall(r"^def tensors_of.*?\n\n", page.read_text(), re.M | re.S)
    namespace = {"torch": torch}
    exec(recipe, namespace)
    rng = random.Random(0)
    names = [f"d{i}" for i in range(60)]
    qrels = {f"q{q}": {d: rng.choice((-1, 0, 0, 1, 2)) for d in rng.sample(names, 15)} for q in range(20)}
    run = {f"q{q}": {d: float(rng.randrange(12)) for d in rng.sample(names, 40)} for q in range(5, 25)}
    return namespace["tensors_of"], qrels, run


def test_the_recipe_gives_trec_evals_means(collection):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    tensors_of, qrels, run = collection
    expected = pytrec_eval.RelevanceEvaluator(qrels, pytrec_eval.supported_measures).evaluate(run)
    queries = sorted(qrels.keys() & run.keys())
    assert sorted(expected) == queries
    for counted in queries, sorted(qrels):  # without and with -c
        found = ranking_metrics(**tensors_of(qrels, run, counted), metrics=list(TREC_EVAL), preset="trec_eval")
        for name, theirs in TREC_EVAL.items():
            assert_peer(found[name], math.fsum(of[theirs] for of in expected.values()) / len(counted), name)


def test_the_recipe_gives_ranxs_means(collection):
    """Whose order of tied documents, and whose dcg of negative judgements, are its own."""
    ranx = pytest.importorskip("ranx", reason="ranx is not installed")
    tensors_of, qrels, run = collection
    qrels = {q: {d: max(grade, 0) for d, grade in judged.items()} for q, judged in qrels.items()}
    run = {q: {d: s + i / 100 for i, (d, s) in enumerate(found.items())} for q, found in run.items()}
    names = ["map", "mrr", "precision@10", "ndcg@10", "recall@20"]
    expected = ranx.evaluate(ranx.Qrels(qrels), ranx.Run(run), names, make_comparable=True)
    found = ranking_metrics(**tensors_of(qrels, run, sorted(qrels)), metrics=names, preset="ranx")
    for name in names:
        assert_peer(found[name], expected[name], name)


# ---- ranx ------------------------------------------------------------------------------------------

RANX = ("ndcg", "map", "mrr", "precision", "recall", "hit_rate", "r_precision")


def by_ranx(preds, target, name):
    ranx = pytest.importorskip("ranx", reason="ranx is not installed")
    theirs = "r-precision" if name == "r_precision" else name
    documents = [f"d{d}" for d in range(preds.shape[1])]
    qrels = {f"q{q:03}": {d: int(t) for d, t in zip(documents, row, strict=True)} for q, row in enumerate(target)}
    run = {f"q{q:03}": {d: float(s) for d, s in zip(documents, row, strict=True)} for q, row in enumerate(preds)}
    return ranx.evaluate(ranx.Qrels(qrels), ranx.Run(run), theirs, return_mean=False)


@pytest.mark.parametrize("documents", (12, 40))
@pytest.mark.parametrize("kind", RANX)
def test_ranx_without_ties(kind, documents):
    preds, target = data(False, documents=documents)
    for name in [kind] if kind == "r_precision" else [kind, f"{kind}@3", f"{kind}@10"]:
        assert_peer(per_query(preds, target, name, preset="ranx")[name], by_ranx(preds, target, name), name)


@pytest.mark.parametrize("kind", RANX)
def test_ranx_with_ties_keeps_their_order_in_short_lists(kind):
    """Up to 15 documents its sort is by insertion, which is stable."""
    preds, target = data(True, documents=12)
    for name in [kind] if kind == "r_precision" else [kind, f"{kind}@3"]:
        assert_peer(per_query(preds, target, name, preset="ranx")[name], by_ranx(preds, target, name), name)


def test_ranx_shuffles_ties_in_long_lists():
    """There its quicksort is not stable, so what tied documents give is one of their orders."""
    preds, target = data(True, documents=60)
    theirs = torch.as_tensor(by_ranx(preds, target, "ndcg@10"))
    ours = per_query(preds, target, "ndcg@10", preset="ranx")["ndcg@10"]
    assert (ours - theirs).abs().max() > 0.01
    worst, best = (per_query(preds, target, "ndcg@10", ties=t)["ndcg@10"] for t in ("pessimistic", "optimistic"))
    assert (worst <= theirs + TOLERANCE).all() and (theirs <= best + TOLERANCE).all()


def test_ranx_burges_ndcg_is_the_exponential_gain():
    preds, target = data(False, documents=12)
    expected = by_ranx(preds, target, "ndcg_burges@5")
    assert_peer(per_query(preds, target, "ndcg@5", gain="exp", ties="stable")["ndcg@5"], expected)


def test_ranx_gives_a_number_for_nan_scores():
    preds, target = torch.tensor([[math.nan, 0.2, 0.1]]), torch.tensor([[1, 0, 0]])
    assert not math.isnan(by_ranx(preds, target, "mrr")[0])
    assert ranking_metrics(preds, target, "mrr", preset="ranx")["mrr"].isnan()


# ---- XGBoost and LightGBM --------------------------------------------------------------------------


def by_xgboost(preds, target, names, weight=None, sizes=None):
    """The metrics of scores that are given: a booster without trees, and the scores as its margin."""
    xgboost = pytest.importorskip("xgboost")
    matrix = xgboost.DMatrix(torch.zeros(preds.numel(), 1).numpy(), label=target.flatten().numpy())
    matrix.set_group([preds.shape[1]] * len(preds) if sizes is None else sizes)
    matrix.set_base_margin(preds.float().flatten().numpy())
    if weight is not None:
        matrix.set_weight(weight.numpy())
    binary = {"lambdarank_pair_method": "topk", "objective": "rank:ndcg" if target.max() > 1 else "rank:map"}
    theirs = [name.replace("precision", "pre") for name in names]
    booster = xgboost.Booster({**binary, "eval_metric": theirs, "disable_default_eval_metric": True}, [matrix])
    values = [float(part.split(":")[1]) for part in booster.eval(matrix).split()[1:]]
    return dict(zip(names, values, strict=True))


@both_ties
def test_xgboost_ndcg(ties):
    preds, target = data(ties)
    names = ["ndcg", *(f"ndcg@{k}" for k in KS)]
    expected = by_xgboost(preds, target, names)
    for name, value in ranking_metrics(preds, target, names, preset="xgboost").items():
        assert_peer(value, expected[name], name)


@both_ties
def test_xgboost_map(ties):
    preds, target = data(ties, graded=False)
    names = ["map", *(f"map@{k}" for k in KS)]
    expected = by_xgboost(preds, target, names)
    for name, value in ranking_metrics(preds, target, names, preset="xgboost").items():
        assert_peer(value, expected[name], name)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ("ndcg", "map", "precision"))
def test_xgboost_of_groups_of_any_size(kind, seed):
    """Also of groups shorter than k, and without a relevant document: there ndcg and map are 1, precision 0."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 12, (30,), generator=g)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
    total = int(offsets[-1])
    preds = torch.randint(1, (5, 10**6)[seed % 2], (total,), generator=g).float()
    grades = torch.randint(1, 5 if kind == "ndcg" else 2, (total,), generator=g)
    target = grades * (torch.rand(total, generator=g) < torch.rand(30, generator=g).repeat_interleave(sizes))
    target[: offsets[3]] = 0
    names = [kind, *(f"{kind}@{k}" for k in (1, 2, 3, 5, 8, 100))]
    weight = torch.rand(30, generator=g) if kind == "precision" else None  # the others forget some weights: see below
    expected = by_xgboost(preds, target, names, weight, sizes.tolist())
    found = ranking_metrics(preds, target, names, preset="xgboost", offsets=offsets, query_weight=weight)
    for name in names:
        assert_peer(found[name], expected[name], name)


def by_lightgbm(preds, target, metric, weight=None):
    """Means at each of KS: of a booster that has learned nothing, and the scores as its start."""
    lightgbm = pytest.importorskip("lightgbm")
    rows = preds.numel()
    data = lightgbm.Dataset(
        torch.arange(rows).double()[:, None].numpy(),
        label=target.flatten().numpy(),
        group=[preds.shape[1]] * len(preds),
        init_score=preds.flatten().numpy(),
        weight=None if weight is None else weight.repeat_interleave(preds.shape[1]).numpy(),
    )
    options = {"objective": "lambdarank", "metric": metric, "eval_at": list(KS), "verbose": -1}
    booster = lightgbm.Booster({**options, "min_data_in_leaf": rows}, data)
    return {name: value for _, name, value, _ in booster.eval_train()}


@both_ties
def test_lightgbm_ndcg(ties):
    preds, target = data(ties)
    names = [f"ndcg@{k}" for k in KS]
    expected = by_lightgbm(preds, target, "ndcg")
    for name, value in ranking_metrics(preds, target, names, preset="lightgbm").items():
        assert_peer(value, expected[name], name)


@both_ties
def test_lightgbm_map(ties):
    preds, target = data(ties, graded=False)
    names = [f"map@{k}" for k in KS]
    expected = by_lightgbm(preds, target, "map")
    for name, value in ranking_metrics(preds, target, names, preset="lightgbm").items():
        assert_peer(value, expected[name], name)


@pytest.mark.parametrize("peer", ("xgboost", "lightgbm"))
def test_xgboost_and_lightgbm_forget_the_weight_of_empty_queries(peer):
    preds, target = torch.tensor([[2.0, 1.0], [2.0, 1.0]]), torch.tensor([[0, 1], [0, 0]])
    weight = torch.tensor([1.0, 4.0])
    theirs = (
        by_xgboost(preds, target, ["ndcg@3"], weight)
        if peer == "xgboost"
        else by_lightgbm(preds, target, "ndcg", weight)
    )
    of_first = 1 / math.log2(3)
    ours = ranking_metrics(preds, target, "ndcg@3", preset=peer, query_weight=weight)["ndcg@3"].item()
    assert ours == pytest.approx((1 * of_first + 4 * 1) / 5)
    assert theirs["ndcg@3"] == pytest.approx((1 * of_first + 1) / 5, abs=TOLERANCE)
