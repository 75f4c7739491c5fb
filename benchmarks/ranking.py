"""The ranking metrics' cases: NDCG@10, MRR and MAP at once, against naive torch and the libraries of the field.

Scores are distinct, because the peers do not agree on ties; every query has the same number of relevant documents.
What a peer wants besides tensors (its own lists, dicts, objects; sorted, where it wants that) is built outside the
clock, once, of the inputs that are verified.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from cases import NO_AIMS, Aims, Case, Inputs, Step
from torch import Tensor

from torchfast.metrics import ranking_metrics

METRICS = ("ndcg@10", "mrr", "map")


class RankingTruth(NamedTuple):
    means: Tensor

    def errors(self, values: Tensor, _: Tensor | None) -> tuple[float, float]:
        """Compares the metrics that a contender has, always the first ones; there is no gradient."""
        return (values.double() - self.means[: len(values)]).abs().max().item(), 0.0


def ranking_inputs(shape: tuple[int, int], relevant: int, graded: bool, device: str) -> Inputs:
    _queries, documents = shape
    preds = (torch.rand(shape, device=device).argsort(1) + 0.5) / documents
    places = torch.rand(shape, device=device).topk(relevant, 1).indices
    if graded:
        grades = torch.randint(1, 4, places.shape, device=device)
        return preds, torch.zeros(shape, dtype=torch.long, device=device).scatter_(1, places, grades)
    return preds, torch.zeros(shape, dtype=torch.bool, device=device).scatter_(1, places, True)


def naive(preds: Tensor, target: Tensor) -> Tensor:
    """Sorts once for all metrics, and knows no ties: this is what people write."""
    y = target.gather(1, preds.argsort(1, descending=True))
    gain, hit = y.to(preds.dtype), (y > 0).to(preds.dtype)
    rank = torch.arange(1, y.shape[1] + 1, device=y.device, dtype=preds.dtype)
    discount = 1 / (rank[:10] + 1).log2()
    ideal = target.to(preds.dtype).topk(min(10, y.shape[1]), 1).values @ discount
    ndcg = (gain[:, :10] @ discount) / ideal
    mrr = (hit / rank).amax(1)
    precisions = (hit.cumsum(1) * hit / rank).sum(1) / hit.sum(1)
    return torch.stack([ndcg.mean(), mrr.mean(), precisions.mean()])


def naive_top(preds: Tensor, target: Tensor) -> Tensor:
    """Computes NDCG@10 alone, which needs no sort."""
    discount = 1 / torch.arange(2, 12, device=preds.device, dtype=preds.dtype).log2()
    gain = target.gather(1, preds.topk(10, 1).indices).to(preds.dtype)
    ideal = target.to(preds.dtype).topk(10, 1).values @ discount
    return ((gain @ discount) / ideal).mean()[None]


def truth(naive: Callable[[Tensor, Tensor], Tensor], preds: Tensor, target: Tensor) -> RankingTruth:
    chunk = max(1, 2**22 // preds.shape[1])
    parts = zip(preds.split(chunk), target.split(chunk), strict=True)
    sums = sum(naive(p.double(), y) * len(p) for p, y in parts)
    return RankingTruth(sums / len(preds))


def fast(preds: Tensor, target: Tensor) -> Tensor:
    return torch.stack([*ranking_metrics(preds, target, METRICS).values()])


def fast_top(preds: Tensor, target: Tensor) -> Tensor:
    return torch.stack([*ranking_metrics(preds, target, METRICS[:1]).values()])


# ---- Peers -----------------------------------------------------------------------------------


def prepared(prepare: Callable[..., Any], step: Callable[[Any], Tensor]) -> Step:
    """A contender that works on what ``prepare`` makes of the first inputs."""

    made: list[Any] = []

    def contender(*inputs: Tensor) -> Tensor:
        if not made:
            made.append(prepare(*inputs))
        return step(made[0])

    return contender


def documents_of(preds: Tensor, target: Tensor) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, float]]]:
    """Makes qrels of the relevant documents, and the run, as trec_eval and ranx take them."""
    names = [f"d{d}" for d in range(preds.shape[1])]
    qrels, run = {}, {}
    for q, (scores, y) in enumerate(zip(preds.tolist(), target.tolist(), strict=True)):
        qrels[f"q{q}"] = {name: int(t) for name, t in zip(names, y, strict=True) if t}
        run[f"q{q}"] = dict(zip(names, scores, strict=True))
    return qrels, run


def ranx_lists(preds: Tensor, target: Tensor) -> tuple[Any, Any]:
    """Makes ranx's innermost form: an array of (document, score) for each query, sorted already."""
    import numpy as np
    from numba.typed import List

    def listed(values: Tensor, keep: int) -> Any:
        ordered = values.double().sort(1, descending=True)
        found = torch.stack([ordered.indices.double(), ordered.values], 2)[:, :keep].numpy()
        return List([np.ascontiguousarray(query) for query in found])

    return listed(target, int((target[0] > 0).sum())), listed(preds, preds.shape[1])


def by_ranx(of: tuple[Any, Any]) -> Tensor:
    import ranx

    found = ranx.evaluate(*of, list(METRICS), save_results_in_run=False)
    return torch.tensor([found[name] for name in METRICS], dtype=torch.float64)


def ranx_objects(preds: Tensor, target: Tensor) -> tuple[Any, Any]:
    import ranx

    qrels, run = documents_of(preds, target)
    return ranx.Qrels(qrels), ranx.Run(run)


def pytrec_eval_objects(preds: Tensor, target: Tensor) -> tuple[Any, Any]:
    import pytrec_eval

    qrels, run = documents_of(preds, target)
    return pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recip_rank", "map"}), run


def by_pytrec_eval(of: tuple[Any, Any]) -> Tensor:
    evaluator, run = of
    found = evaluator.evaluate(run).values()
    sums = [sum(query[name] for query in found) for name in ("ndcg_cut_10", "recip_rank", "map")]
    return torch.tensor(sums, dtype=torch.float64) / len(found)


def by_sklearn(preds: Tensor, target: Tensor, ignore_ties: bool) -> Tensor:
    """This contender has NDCG alone."""
    from sklearn.metrics import ndcg_score

    return torch.tensor([ndcg_score(target.numpy(), preds.numpy(), k=10, ignore_ties=ignore_ties)])


def by_torchmetrics(preds: Tensor, target: Tensor) -> Tensor:
    from torchmetrics.retrieval import RetrievalMAP, RetrievalMRR, RetrievalNormalizedDCG

    indexes = torch.arange(len(preds), device=preds.device)[:, None].expand(preds.shape)
    found = []
    for metric in RetrievalNormalizedDCG(top_k=10), RetrievalMRR(), RetrievalMAP():
        metric.update(preds, target if metric.allow_non_binary_target else target > 0, indexes=indexes)
        found.append(metric.compute())
    return torch.stack(found)


PEERS: dict[str, tuple[str, Step]] = {
    "torchmetrics": ("torchmetrics", by_torchmetrics),
    "ranx, typed lists": ("ranx", prepared(ranx_lists, by_ranx)),
    "ranx, its objects": ("ranx", prepared(ranx_objects, by_ranx)),
    "pytrec_eval": ("pytrec_eval", prepared(pytrec_eval_objects, by_pytrec_eval)),
    "scikit-learn, NDCG alone": ("sklearn", functools.partial(by_sklearn, ignore_ties=False)),
    "scikit-learn, NDCG alone, no ties": ("sklearn", functools.partial(by_sklearn, ignore_ties=True)),
}


# ---- Cases -----------------------------------------------------------------------------------


def read(preds: Tensor, target: Tensor) -> Tensor:
    """The floor reads every score and every target once. Targets become int64: torch's sum of bools is slow."""
    return preds.sum() + target.flatten().view(torch.int64).sum()


def ranking_case(
    shape: tuple[int, int],
    relevant: int,
    aims: Aims,
    *,
    peers: tuple[str, ...] = (),
    family: str = "ranking",
    top: bool = False,
) -> Case:
    eager = naive_top if top else naive
    steps = {"torchfast": fast_top if top else fast, "eager": eager}
    for name in peers:
        module, step = PEERS[name]
        if importlib.util.find_spec(module):
            steps[name] = step
    graded = bool(peers)
    return Case(
        family + " peers" * graded,
        "ranking, " * (family == "scaling") + f"{relevant} relevant" + ", graded" * graded + ", NDCG@10" * top,
        shape,
        torch.float32,
        lambda device: ranking_inputs(shape, relevant, graded, device),
        steps,
        functools.partial(truth, eager),
        aims,
        floors={"read": read},
        slow=graded,
        bytes_read=math.prod(shape) * (4 + (8 if graded else 1)),  # targets are int64, or bool
    )


def ranking_cases() -> Iterator[Case]:
    few, half = Aims(eager=15), Aims(eager=6)
    yield ranking_case((10_000, 100), 5, few)
    yield ranking_case((10_000, 100), 50, half)
    yield ranking_case((10_000, 1000), 10, few._replace(read=3))
    yield ranking_case((10_000, 1000), 500, half)
    yield ranking_case((500, 50_000), 20, few._replace(read=3))
    yield ranking_case((500, 50_000), 25_000, NO_AIMS, top=True)
    yield ranking_case((10_000, 100), 10, few, peers=tuple(PEERS))
    for doubling in range(7):
        yield ranking_case((1250 * 2**doubling, 100), 10, NO_AIMS, family="scaling")


def gpu_ranking_cases() -> Iterator[Case]:
    """Reaches each kernel (a warp, a block, several blocks a query); torchmetrics, which runs on GPUs, competes."""
    yield ranking_case((100_000, 100), 5, NO_AIMS)
    yield ranking_case((10_000, 1000), 10, NO_AIMS)
    yield ranking_case((10_000, 1000), 500, NO_AIMS)
    yield ranking_case((500, 50_000), 20, NO_AIMS)
    yield ranking_case((16, 1_000_000), 50, NO_AIMS)
    yield ranking_case((1000, 100), 10, NO_AIMS, peers=("torchmetrics",))
