"""The retrieval metrics' cases: embeddings of queries and of a catalogue, against what people write.

That is chunks of the product, of which the items seen in training are masked, and the best 100. So the metrics are cut
at 100: the others' numbers would not be known. The floor is the product alone, in the same chunks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from cases import NO_AIMS, Aims, Case, Inputs
from ranking import RankingTruth
from torch import Tensor

from torchfast.metrics import retrieval_metrics, retrieval_ranks

METRICS = ("ndcg@10", "recall@100", "mrr@100")
RELEVANT, EXCLUDED, BEST, CHUNK = 10, 100, 100, 8192


def retrieval_inputs(queries: int, items: int, d: int, device: str) -> Inputs:
    """Makes items first, which are most of the memory, then queries that lean towards their relevant items; the ids of
    a query are different ones: it takes steps through the catalogue, in random order."""
    x = torch.randn(items, d, device=device)
    listed = RELEVANT + EXCLUDED
    begin = torch.randint(items, (queries, 1), device=device)
    step = torch.randint(1, items // listed, (queries, 1), device=device)
    order = torch.rand(queries, listed, device=device).argsort(1)
    ids = (begin + step * order) % items
    relevant, excluded = ids[:, :RELEVANT], ids[:, RELEVANT:]
    return x, torch.randn(queries, d, device=device) + x[relevant].mean(1), relevant, excluded


def fast(items: Tensor, queries: Tensor, relevant: Tensor, excluded: Tensor) -> Tensor:
    return torch.stack([*retrieval_metrics(queries, items, relevant, METRICS, exclude=excluded).values()])


def best(items: Tensor, queries: Tensor, relevant: Tensor, excluded: Tensor) -> Tensor:
    """The best of each chunk of items compete with those found so far."""
    scores = queries.new_full((len(queries), 1), -torch.inf)
    found = torch.full_like(relevant[:, :1], -1)
    for begin in range(0, len(items), CHUNK):
        product = queries @ items[begin : begin + CHUNK].T
        here = (excluded >= begin) & (excluded < begin + CHUNK)
        row, column = here.nonzero(as_tuple=True)
        product[row, excluded[row, column] - begin] = -torch.inf
        of_chunk = product.topk(min(BEST, product.shape[1]), 1)
        scores, found = torch.cat([scores, of_chunk.values], 1), torch.cat([found, of_chunk.indices + begin], 1)
        kept = scores.topk(min(BEST, scores.shape[1]), 1)
        scores, found = kept.values, found.gather(1, kept.indices)
    return found


def top_k(items: Tensor, queries: Tensor, relevant: Tensor, excluded: Tensor) -> Tensor:
    hit = (best(items, queries, relevant, excluded)[:, :, None] == relevant[:, None]).any(2).to(queries.dtype)
    rank = torch.arange(1, hit.shape[1] + 1, device=hit.device, dtype=hit.dtype)
    discount = 1 / (rank[:10] + 1).log2()
    ndcg = hit[:, :10] @ discount / discount[:RELEVANT].sum()
    return torch.stack([ndcg.mean(), (hit.sum(1) / RELEVANT).mean(), (hit / rank).amax(1).mean()])


def product(items: Tensor, queries: Tensor, *_: Tensor) -> Tensor:
    """The floor: the scores are computed and forgotten. Fresh memory for each chunk would take twice the time."""
    memory = queries.new_empty(len(queries) * min(CHUNK, len(items)))
    for chunk in items.split(CHUNK):
        scores = memory[: len(queries) * len(chunk)].view(len(queries), len(chunk))
        torch.mm(queries, chunk.T, out=scores)
    return scores[0, 0]


def truth(items: Tensor, queries: Tensor, relevant: Tensor, excluded: Tensor) -> RankingTruth:
    parts = zip(*(x.split(1024) for x in (queries, relevant, excluded)), strict=True)
    sums = sum(top_k(items.double(), q.double(), r, e) * len(q) for q, r, e in parts)
    return RankingTruth(sums / len(queries))


def retrieval_case(queries: int, items: int, d: int, aims: Aims = NO_AIMS, family: str = "retrieval") -> Case:
    return Case(
        family,
        "retrieval, " * (family == "scaling") + f"{RELEVANT} relevant, {EXCLUDED} excluded",
        (queries, items, d),
        torch.float32,
        lambda device: retrieval_inputs(queries, items, d, device),
        {"torchfast": fast, "eager": top_k},
        truth,
        aims,
        floors={"mm": product},
        slow=True,
        if_asked=queries * items > 2**30,
        features=d,
        bytes_read=(queries + items) * d * 4,
    )


def retrieval_cases() -> Iterator[Case]:
    for d in 64, 128:
        yield retrieval_case(2048, 100_000, d, Aims(eager=4, mm=1.25))
    for d in 64, 128:
        yield retrieval_case(10_000, 1_000_000, d, Aims(eager=4, mm=1.25))
    for doubling in range(4):
        yield retrieval_case(512, 25_000 * 2**doubling, 64, family="scaling")


# ---- GPUs: how the ranks are found, and nothing that waits for the device ----------------------


def of_ranks(rank: Tensor) -> Tensor:
    """The recall and the reciprocal rank, of ranks that may be cut off at BEST."""
    found = torch.where(rank <= BEST, 1.0 / rank, 0.0)
    return torch.stack([(found > 0).double().mean(), found.amax(1).double().mean()])


def fast_ranks(items: Tensor, queries: Tensor, relevant: Tensor, _: Tensor) -> Tensor:
    offsets = torch.arange(len(relevant) + 1, device=items.device) * RELEVANT
    return of_ranks(1 + retrieval_ranks(queries, items, (relevant.reshape(-1), offsets)).larger.view(-1, RELEVANT))


def top_k_ranks(items: Tensor, queries: Tensor, relevant: Tensor, _: Tensor) -> Tensor:
    """The best of each chunk are kept beside those found so far."""
    scores, found = queries.new_empty(len(queries), 0), relevant[:, :0]
    for begin in range(0, len(items), CHUNK):
        of_chunk = (queries @ items[begin : begin + CHUNK].T).topk(min(BEST, len(items) - begin), 1)
        scores, found = torch.cat([scores, of_chunk.values], 1), torch.cat([found, of_chunk.indices + begin], 1)
        kept = scores.topk(min(BEST, scores.shape[1]), 1)
        scores, found = kept.values, found.gather(1, kept.indices)
    hit = found[:, None] == relevant[:, :, None]
    return of_ranks(torch.where(hit.any(2), 1 + hit.to(torch.uint8).argmax(2), BEST + 1))


def truth_of_ranks(items: Tensor, queries: Tensor, *lists: Tensor) -> RankingTruth:
    parts = zip(*(x.split(1024) for x in (queries, *lists)), strict=True)
    sums = sum(top_k_ranks(items.double(), q.double(), *ids) * len(q) for q, *ids in parts)
    return RankingTruth(sums / len(queries))


def gpu_retrieval_cases() -> Iterator[Case]:
    for (queries, items, d), dtype in (
        ((2048, 100_000, 128), torch.float32),
        ((2048, 100_000, 128), torch.bfloat16),
        ((10_000, 1_000_000, 64), torch.bfloat16),
    ):

        def setup(device: str, of: tuple[int, int, int] = (queries, items, d), dtype: torch.dtype = dtype) -> Inputs:
            x, q, *ids = retrieval_inputs(*of, device)
            return x.to(dtype), q.to(dtype), *ids

        yield Case(
            "retrieval",
            f"ranks, {RELEVANT} relevant",
            (queries, items, d),
            dtype,
            setup,
            {"torchfast": fast_ranks, "eager": top_k_ranks},
            truth_of_ranks,
            NO_AIMS,
            floors={"mm": product},
            features=queries,  # what copy_ copies are the items
            bytes_read=(queries + items) * d * dtype.itemsize,
        )
