"""Launches the Triton kernels. Nothing here looks at a tensor's data, so nothing waits for the device: how long lists
are the kernels read themselves. fp64, of which GPUs have few units, is left to the reference."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchfast import _triton
from torchfast.losses.triton_launch import on_device, processors_of
from torchfast.metrics.retrieval import reference
from torchfast.metrics.retrieval.triton_kernels import counts_kernel, scores_kernel

#: Queries, items and warps of a tile: on tensor cores; and of fp32 without them, which takes more registers.
PRODUCTS, NUMBERS = (128, 64, 8), (64, 64, 4)
#: Programs of a processor: so many that the last ones keep few processors waiting.
PROGRAMS = 8
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def constants_of(queries: Tensor, items: Tensor) -> dict[str, Any]:
    """What the bits of a score depend on besides its vectors."""
    same = queries.dtype == items.dtype and not _triton.interpreted()  # which multiplies the bits of bfloat16
    dtype = queries.dtype if same else torch.float32
    exact = torch.get_float32_matmul_precision() == "highest" or bool(torch.version.hip)
    tf32 = dtype == torch.float32 and not exact
    block_q, block_i, warps = NUMBERS if dtype == torch.float32 and exact else PRODUCTS
    return {
        "TYPE": TYPES[dtype],
        "PRECISION": "tf32" if tf32 else "ieee",
        "QUERIES": block_q,
        "ITEMS": block_i,
        "BLOCK": 64 // dtype.itemsize,
        "num_warps": warps,
    }


def served(queries: Tensor, items: Tensor) -> bool:
    return queries.dtype in TYPES and items.dtype in TYPES


def splits_of(queries: Tensor, blocks: int) -> int:
    """Blocks of queries are shared out to so many programs each."""
    return triton.cdiv(PROGRAMS * processors_of(queries.device), blocks)


def retrieval_scores(queries: Tensor, items: Tensor, item_bias: Tensor | None, ids: Tensor, offsets: Tensor) -> Tensor:
    if not served(queries, items):
        return reference.scores(queries, items, item_bias, ids, offsets)[0]
    scores = queries.new_full(ids.shape, torch.nan, dtype=torch.float32)
    (n, d), m, total = queries.shape, len(items), len(ids)
    if n and m and total:
        constants = constants_of(queries, items)
        blocks = triton.cdiv(n, constants["QUERIES"])
        splits = min(splits_of(queries, blocks), triton.cdiv(total, constants["ITEMS"]))
        bias = None if item_bias is None else item_bias.contiguous()
        with on_device(queries.device):
            scores_kernel[(blocks * splits, 1, 1)](
                *(queries, items, bias, ids.contiguous(), offsets.contiguous(), scores),
                *(n, m, d, total, blocks, splits, queries.stride(), items.stride()),
                **constants,
            )
    return scores


def retrieval_counts(
    queries: Tensor, items: Tensor, item_bias: Tensor | None, scores: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    if not served(queries, items):
        return reference.counts(queries, items, item_bias, scores, offsets)
    larger, equal = (torch.zeros(scores.shape, dtype=torch.long, device=scores.device) for _ in range(2))
    (n, d), m, total = queries.shape, len(items), len(scores)
    if n and m and total:
        constants = constants_of(queries, items)
        blocks, tiles = triton.cdiv(n, constants["QUERIES"]), triton.cdiv(m, constants["ITEMS"])
        each = triton.cdiv(tiles, min(splits_of(queries, blocks), tiles))
        bias = None if item_bias is None else item_bias.contiguous()
        with on_device(queries.device):
            counts_kernel[(blocks * triton.cdiv(tiles, each), 1, 1)](
                *(queries, items, bias, scores.contiguous(), offsets.contiguous(), larger, equal),
                *(n, m, d, total, blocks, each, queries.stride(), items.stride()),
                **constants,
            )
    return larger, equal
