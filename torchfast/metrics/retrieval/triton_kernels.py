"""Triton kernels of the retrieval metrics: a tile of scores in registers, stored or compared. See ops.py for the idea.

Both kernels call ``tile_scores`` with the same block sizes, so with the same instructions on matrices in the same order
of the dimensions. What is assumed of these instructions: an element of their result depends on its row of the one
matrix and its column of the other alone, and on both in the same way wherever in the tile they are. Then a score has
the same bits in every tile. tests/metrics/test_retrieval_ops.py asks a GPU.
"""

import triton
import triton.language as tl


@triton.jit
def tile_scores(
    queries,
    items,
    bias,
    q,
    item,
    n,
    m,
    d,
    query_strides,
    item_strides,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    ITEMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scores of some queries and items, both given by number; what is out of range scores anything."""
    scores = tl.zeros([QUERIES, ITEMS], tl.float32)
    has_query, has_item = q < n, (item >= 0) & (item < m)
    x, y = queries + q * query_strides[0], items + item * item_strides[0]
    for begin in range(0, d, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        left = at < d
        of_x, of_y = at.to(tl.int64) * query_strides[1], at.to(tl.int64) * item_strides[1]
        a = tl.load(x[:, None] + of_x[None, :], mask=has_query[:, None] & left[None, :], other=0.0)
        b = tl.load(y[None, :] + of_y[:, None], mask=has_item[None, :] & left[:, None], other=0.0)
        scores = tl.dot(a.to(TYPE), b.to(TYPE), scores, input_precision=PRECISION)
    if bias is not None:
        scores += tl.load(bias + item, mask=has_item, other=0.0).to(tl.float32)[None, :]
    return scores


@triton.jit(do_not_specialize=["n", "m", "total", "blocks", "splits"])
def scores_kernel(
    queries,
    items,
    bias,
    ids,
    offsets,
    out,
    n,
    m,
    d,
    total,
    blocks,
    splits,
    query_strides,
    item_strides,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    ITEMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The lists of a block of queries are neighbours: whole tiles of queries and listed items are computed, of which
    each item's own query is taken."""
    program = tl.program_id(0)
    first = (program % blocks).to(tl.int64) * QUERIES
    q = first + tl.arange(0, QUERIES)
    begin = tl.load(offsets + q, mask=q < n, other=0)
    end = tl.load(offsets + q + 1, mask=q < n, other=0)
    last = tl.minimum(tl.load(offsets + tl.minimum(first + QUERIES, n)), total)
    start = tl.maximum(tl.load(offsets + first), 0) + (program // blocks) * ITEMS
    for some in range(start, last, splits * ITEMS):
        at = some + tl.arange(0, ITEMS)
        item = tl.load(ids + at, mask=at < last, other=-1)
        scores = tile_scores(
            queries, items, bias, q, item, n, m, d, query_strides, item_strides, TYPE, PRECISION, QUERIES, ITEMS, BLOCK
        )
        scores = tl.where(((item >= 0) & (item < m))[None, :], scores, float("nan"))
        place = tl.arange(0, ITEMS)[None, :]
        own = (place >= (begin - some)[:, None]) & (place < (end - some)[:, None])
        tl.store(out + at, tl.sum(tl.where(own, scores, 0.0), 0), mask=at < last)


@triton.jit(do_not_specialize=["n", "m", "total", "blocks", "tiles"])
def counts_kernel(
    queries,
    items,
    bias,
    listed,
    offsets,
    larger,
    equal,
    n,
    m,
    d,
    total,
    blocks,
    tiles,
    query_strides,
    item_strides,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    ITEMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compares a block of queries' scores with their listed ones, tile by tile. The blocks of queries that run at a
    time read the same items, from the cache."""
    program = tl.program_id(0)
    q = (program % blocks).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    begin = tl.maximum(tl.load(offsets + q, mask=q < n, other=0), 0)
    end = tl.minimum(tl.load(offsets + q + 1, mask=q < n, other=0), total)
    longest = tl.max(end - begin)
    length = tiles.to(tl.int64) * ITEMS
    first = (program // blocks) * length
    for some in range(first, tl.minimum(first + length, m), ITEMS):
        item = some + tl.arange(0, ITEMS)
        scores = tile_scores(
            queries, items, bias, q, item, n, m, d, query_strides, item_strides, TYPE, PRECISION, QUERIES, ITEMS, BLOCK
        )
        # What is behind the last item counts as NaN does, and is taken off.
        scores = tl.where((item < m)[None, :], scores, float("nan"))
        there = tl.minimum(m - some, ITEMS).to(tl.int32)
        for k in range(0, longest):
            at = begin + k
            score = tl.load(listed + at, mask=at < end, other=0.0)
            missing = score != score
            bound = tl.where(missing, float("inf"), score)[:, None]  # NaN alone is not up to it
            both = tl.sum(tl.where(scores <= bound, tl.where(scores == bound, 65536, 0), 1), 1)
            more = (both & 65535) - (ITEMS - there)
            same = tl.where(missing, more, both >> 16)
            more = tl.where(missing, there - more, more)
            tl.atomic_add(larger + at, more.to(tl.int64), mask=(at < end) & (more > 0), sem="relaxed")
            tl.atomic_add(equal + at, same.to(tl.int64), mask=(at < end) & (same > 0), sem="relaxed")
