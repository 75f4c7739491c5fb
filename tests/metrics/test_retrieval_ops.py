"""The ops below the retrieval metrics: exact ranks, whatever tile, thread, chunk or shard computes a score.

Small integers as embeddings make every order of sums exact, so that all kernels must give the oracle's very numbers.
Where embeddings are random, scores must have the same bits wherever they are computed, on one kernel.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import peak_memory

from torchfast import _triton
from torchfast.info import report
from torchfast.metrics.retrieval.ops import retrieval_corrections, retrieval_counts, retrieval_scores

#: Tiles are 6 or 8 queries of 8, 16, 24 or 48 items, blocks 1024 items or fewer, and 256 listed scores are many.
QUERIES, ITEMS = (0, 1, 2, 5, 6, 7, 8, 9, 17), (0, 1, 7, 8, 9, 16, 17, 24, 25, 48, 49, 500, 1023, 1025, 2100)
DIMENSIONS, LISTED = (0, 1, 2, 3, 17, 64), (0, 1, 3, 4, 5, 9, 70, 255, 256, 257, 600)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Triton's interpreter takes long for each score of a list.
LONG = 30 if _triton.interpreted() else 300


@pytest.fixture(autouse=True, scope="module")
def few_tiles():
    """Triton's interpreter takes as long for a large tile as for a small one. GPUs have those of the launcher."""
    with pytest.MonkeyPatch.context() as patch:
        if _triton.interpreted():
            from torchfast.metrics.retrieval import triton_launch

            patch.setattr(triton_launch, "PRODUCTS", (16, 256, 8))
            patch.setattr(triton_launch, "NUMBERS", (8, 256, 8))
        yield


def integers(g, *shape, dtype=torch.float32):
    return (torch.randint(7, shape, generator=g) - 3).to(dtype)


def normal(g, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=g).to(dtype)


def csr(g, lengths, m):
    """Draws ids of items, repeated ones too."""
    lengths = torch.as_tensor(lengths, dtype=torch.long).reshape(-1)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return torch.randint(max(m, 1), (int(offsets[-1]),), generator=g), offsets


def owners(offsets):
    return torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())


def all_scores(queries, items, bias=None):
    scores = queries.double() @ items.double().T
    return scores if bias is None else scores + bias.double()


def compared(rows, scores, valid=True):
    """What the ops are to count among the rows' valid scores, one row a listed score."""
    s, missing = scores[:, None], scores.isnan()[:, None]
    larger = torch.where(missing, ~rows.isnan(), ~(rows <= s)) & valid
    equal = torch.where(missing, rows.isnan(), rows == s) & valid
    return larger.sum(1), equal.sum(1)


def assert_all_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.long
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0)


def moved(device, *tensors):
    return [t if t is None else t.to(device) for t in tensors]


def ranked(device, queries, items, bias, ids, offsets):
    """The listed scores, and both counts."""
    queries, items, bias, ids, offsets = moved(device, queries, items, bias, ids, offsets)
    scores = retrieval_scores(queries, items, bias, ids, offsets)
    return scores.cpu(), *(t.cpu() for t in retrieval_counts(queries, items, bias, scores, offsets))


# ---- Counts are exact ------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    n=st.sampled_from(QUERIES),
    m=st.sampled_from(ITEMS),
    d=st.sampled_from(DIMENSIONS),
    lengths=st.lists(st.sampled_from(LISTED), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_scores_and_counts_are_those_of_the_whole_matrix(n, m, d, lengths, dtype, biased, seed, device):
    g = torch.Generator().manual_seed(seed)
    queries, items = integers(g, n, d, dtype=dtype), integers(g, m, d, dtype=dtype)
    bias = integers(g, m, dtype=dtype) if biased else None
    ids, offsets = csr(g, [lengths[i % len(lengths)] * (m > 0) for i in range(n)], m)
    rows = all_scores(queries, items, bias)[owners(offsets)]
    scores, *found = ranked(device, queries, items, bias, ids, offsets)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(scores.double(), rows.gather(1, ids[:, None])[:, 0])
    assert_all_equal(found, compared(rows, scores.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, m, d", [(3, 50, 300), (70, 2100, 64), (9, 5000, 33)])
def test_counts_of_random_embeddings_differ_from_the_truth_by_close_scores_alone(n, m, d, dtype, device):
    g = torch.Generator().manual_seed(n)
    queries, items, bias = normal(g, n, d, dtype=dtype), normal(g, m, d, dtype=dtype), normal(g, m)
    ids, offsets = csr(g, torch.randint(12, (n,), generator=g), m)
    scores, larger, equal = ranked(device, queries, items, bias, ids, offsets)
    eps = torch.finfo(scores.dtype).eps
    close = (d * eps) * (all_scores(queries.abs(), items.abs(), bias.abs()))[owners(offsets)]  # Higham's bound, twice
    rows = all_scores(queries, items, bias)[owners(offsets)]
    truth = rows.gather(1, ids[:, None])
    assert ((scores.double() - truth[:, 0]).abs() <= close.gather(1, ids[:, None])[:, 0]).all()
    margin = close + close.gather(1, ids[:, None])
    surely, maybe = (rows > truth + margin).sum(1), (rows >= truth - margin).sum(1)
    assert (maybe - surely).double().mean() < 1 + m / 20  # so that the bounds say something
    assert ((surely <= larger) & (larger + equal <= maybe) & (equal >= 1)).all()


def test_lists_of_thousands_are_compared_as_short_ones_are(device):
    g = torch.Generator().manual_seed(0)
    queries, items = integers(g, 3, 3), integers(g, 5000, 3)
    queries[1] = torch.nan
    ids, offsets = csr(g, [4000, 300, 2], 5000)
    rows = all_scores(queries, items)[owners(offsets)]
    scores, *found = ranked(device, queries, items, None, ids, offsets)
    assert_all_equal(found, compared(rows, scores.double()))
    for i, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        for some in range(begin, end, 100):  # each hundred alone
            part = slice(some, min(some + 100, end))
            few, query = torch.tensor([0, part.stop - part.start]), queries[i : i + 1]
            alone = retrieval_counts(*moved(device, query, items, None, scores[part], few))
            assert_all_equal(alone, [t[part] for t in found])


# ---- Scores have the same bits everywhere ------------------------------------------------------------


@pytest.fixture(params=DTYPES, ids=str)
def catalogue(request):
    """Random embeddings, with copies of some items among the others."""
    g = torch.Generator().manual_seed(1)
    queries, items = normal(g, 13, 37, dtype=request.param), normal(g, 1500, 37, dtype=request.param)
    bias = normal(g, 1500)
    copies = torch.randperm(1500, generator=g)[:400].reshape(4, 100)
    items[copies[1:]], bias[copies[1:]] = items[copies[0]], bias[copies[0]]
    ids, offsets = csr(g, [0, 1, 2, 5, 17, LONG, 6, 7, 8, 3, 0, 0, 9], 1500)
    return queries, items, bias, ids, offsets


def test_copies_of_an_item_tie(catalogue, device):
    _, items, bias, ids, _ = catalogue
    _, _, equal = ranked(device, *catalogue)
    same = (items[ids][:, None] == items).all(2) & (bias[ids][:, None] == bias)
    assert (equal >= same.sum(1)).all()
    assert (same.sum(1) == 4).any()
    if items.dtype == torch.float64:  # other items do not tie by chance there
        assert torch.equal(equal, same.sum(1))


def test_the_order_of_items_does_not_matter(catalogue, device):
    queries, items, bias, ids, offsets = catalogue
    expected = ranked(device, *catalogue)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(2))
    found = ranked(device, queries, items[order], bias[order], order.argsort()[ids], offsets)
    assert all(map(torch.equal, found, expected))


def test_the_order_of_items_does_not_matter_in_tf32(device):
    """Nor in which of several blocks of queries one is."""
    g = torch.Generator().manual_seed(7)
    queries, items = normal(g, 300, 80), normal(g, 900, 80)
    ids, offsets = csr(g, torch.randint(6, (300,), generator=g), 900)
    order = torch.randperm(900, generator=g)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        expected = ranked(device, queries, items, None, ids, offsets)
        found = ranked(device, queries, items[order], None, order.argsort()[ids], offsets)
        part = slice(int(offsets[77]), int(offsets[211]))
        some = ranked(device, queries[77:211], items, None, ids[part], offsets[77:212] - offsets[77])
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(map(torch.equal, found, expected))
    assert all(torch.equal(a, b[part]) for a, b in zip(some, expected, strict=True))
    assert (expected[2] >= 1).all()


@pytest.mark.parametrize("shards", [2, 3, 8 if _triton.interpreted() else 100])
def test_counts_of_shards_add_up(shards, catalogue, device):
    queries, items, bias, ids, offsets = catalogue
    scores, *expected = ranked(device, *catalogue)
    total, begin = [torch.zeros_like(t) for t in expected], 0
    for part, weight in zip(items.tensor_split(shards), bias.tensor_split(shards), strict=True):
        inside = (ids >= begin) & (ids < begin + len(part))
        arguments = moved(device, queries, part, weight, ids - begin, offsets)
        own = retrieval_scores(*arguments).cpu()
        assert torch.equal(own[inside], scores[inside])
        assert own[~inside].isnan().all()
        arguments[3] = scores.to(device)
        total = [a + b.cpu() for a, b in zip(total, retrieval_counts(*arguments), strict=True)]
        begin += len(part)
    assert_all_equal(total, expected)


def test_each_query_alone_has_the_same_ranks(catalogue, device):
    queries, items, bias, ids, offsets = catalogue
    expected = ranked(device, *catalogue)
    for i in range(len(queries)):
        part = slice(int(offsets[i]), int(offsets[i + 1]))
        alone = torch.tensor([0, part.stop - part.start])
        found = ranked(device, queries[i : i + 1], items, bias, ids[part], alone)
        assert all(torch.equal(a, b[part]) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("m", [1500, 20_000])
def test_threads_do_not_matter(m, device):
    g = torch.Generator().manual_seed(3)
    queries, items = normal(g, 30, 20), normal(g, m, 20)
    ids, offsets = csr(g, torch.randint(12, (30,), generator=g), m)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found.append(ranked(device, queries, items, None, ids, offsets))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


def test_strides_and_widening_do_not_matter(catalogue, device):
    queries, items, bias, ids, offsets = catalogue
    expected = ranked(device, *catalogue)
    wide = queries.double() if queries.dtype == torch.float64 else queries.float()
    pairs = [
        (queries.T.contiguous().T, items.T.contiguous().T),
        (queries.repeat_interleave(2, 1)[:, ::2], items.repeat_interleave(3, 0)[::3]),
    ]
    if device == "cpu":  # GPUs have other instructions for products in half precision
        pairs += [(wide, items), (queries, items.to(wide.dtype))]
    for q, x in pairs:
        found = ranked(device, q, x, bias, ids, offsets)
        assert all(map(torch.equal, found, expected))


# ---- NaN, infinities, zeros --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("listed", [4, 300])
def test_nan_and_infinite_embeddings(listed, dtype, device):
    """NaN never helps: an item of that score counts as larger than every number, and is below all of them itself."""
    g = torch.Generator().manual_seed(4)
    queries, items = integers(g, 9, 4, dtype=dtype), integers(g, 200, 4, dtype=dtype)
    items[::7, 0], items[3::11, 1], items[5::13, 2] = torch.nan, torch.inf, -torch.inf
    queries[4, 1], queries[7, 3] = torch.inf, torch.nan
    bias = integers(g, 200, dtype=dtype)
    bias[10], bias[20], bias[30] = torch.nan, torch.inf, -torch.inf
    ids, offsets = csr(g, [listed] * 9, 200)
    rows = (queries[:, None] * items).sum(2) + bias
    scores, *found = ranked(device, queries, items, bias, ids, offsets)
    rows = rows[owners(offsets)]
    torch.testing.assert_close(scores, rows.gather(1, ids[:, None])[:, 0], rtol=0, atol=0, equal_nan=True)
    assert scores.isnan().any() and (scores == torch.inf).any() and (scores == -torch.inf).any()
    assert_all_equal(found, compared(rows, scores))


def test_a_listed_nan_counts_the_nan_among_a_querys_scores(device):
    queries, items = torch.tensor([[1.0], [torch.nan], [2.0]]), torch.tensor([[1.0], [torch.nan], [3.0]])
    scores = torch.tensor([torch.nan, torch.nan, 2.0])
    found = retrieval_counts(*moved(device, queries, items, None, scores, torch.tensor([0, 1, 2, 3])))
    assert_all_equal(found, (torch.tensor([2, 0, 2]), torch.tensor([1, 3, 1])))


def test_negative_zero_equals_zero(device):
    queries, items = torch.tensor([[1.0], [-1.0]]), torch.tensor([[0.0], [-0.0], [1.0]])
    scores, larger, equal = ranked(device, queries, items, None, torch.tensor([0, 1, 0, 1]), torch.tensor([0, 2, 4]))
    assert scores.tolist() == [0, 0, 0, 0]
    assert (larger.tolist(), equal.tolist()) == ([1, 1, 0, 0], [2, 2, 2, 2])
    listed = torch.tensor([-0.0, 0.0, -0.0, 0.0])
    found = retrieval_counts(*moved(device, queries, items, None, listed, torch.tensor([0, 2, 4])))
    assert_all_equal(found, (larger, equal))


def test_ids_out_of_range_score_nan(device):
    queries, items = torch.ones(1, 2), torch.ones(3, 2)
    ids = torch.tensor([0, -1, 3, 2, 2**62, -(2**62)])
    scores, _, _ = ranked(device, queries, items, None, ids, torch.tensor([0, 6]))
    torch.testing.assert_close(scores, torch.tensor([2, *[torch.nan] * 2, 2, *[torch.nan] * 2]), equal_nan=True)


# ---- Corrections ---------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    lengths=st.lists(st.tuples(st.sampled_from(LISTED), st.sampled_from(LISTED)), max_size=7),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    special=st.booleans(),
    seed=st.integers(0, 99),
)
def test_corrections_compare_each_score_with_its_querys_others(lengths, dtype, special, seed, device):
    g = torch.Generator().manual_seed(seed)
    n, k = (torch.tensor([x[i] for x in lengths], dtype=torch.long) for i in (0, 1))
    offsets, other_offsets = (torch.cat([x.new_zeros(1), x.cumsum(0)]) for x in (n, k))
    scores, others = (integers(g, int(x[-1]), dtype=dtype) for x in (offsets, other_offsets))
    if special:
        for x in scores, others:
            x[::3], x[1::5], x[2::7], x[3::5] = torch.nan, torch.inf, -torch.inf, -0.0
    mine = owners(offsets)[:, None] == owners(other_offsets)
    expected = compared(others.expand(len(scores), -1), scores, mine)
    assert_all_equal(retrieval_corrections(*moved(device, scores, offsets, others, other_offsets)), expected)


def test_excluded_items_are_no_candidates(device):
    g = torch.Generator().manual_seed(5)
    queries, items = integers(g, 6, 3), integers(g, 90, 3)
    order = torch.stack([torch.randperm(90, generator=g) for _ in range(6)])
    ids, excluded = order[:, :4].reshape(-1), order[:, 4:30].reshape(-1)
    offsets, excluded_offsets = torch.arange(7) * 4, torch.arange(7) * 26
    left = torch.ones(6, 90, dtype=torch.bool).scatter_(1, order[:, 4:30], False)
    rows = all_scores(queries, items)
    expected = compared(
        rows[owners(offsets)], rows[owners(offsets)].gather(1, ids[:, None])[:, 0], left[owners(offsets)]
    )
    scores, larger, equal = ranked(device, queries, items, None, ids, offsets)
    others, _, _ = ranked(device, queries, items, None, excluded, excluded_offsets)
    more, same = retrieval_corrections(*moved(device, scores, offsets, others, excluded_offsets))
    assert_all_equal((larger - more.cpu(), equal - same.cpu()), expected)


# ---- Mistakes, memory ----------------------------------------------------------------------------------


@pytest.fixture
def native(device):
    if (device, report()["kernels"]["retrieval_counts"]["cpu"]) != ("cpu", "native"):
        pytest.skip("of the native kernels")


def mistakes():
    q, x, ids, offsets = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1]), torch.tensor([0, 1, 2])
    scores = torch.ones(2)
    yield "one dimension", retrieval_scores, (q[0], x, None, ids, offsets), r"queries and items must be \[n, d\]"
    yield "other d", retrieval_counts, (q, x[:, 1:], None, scores, offsets), r"queries and items must be \[n, d\]"
    yield "integers", retrieval_scores, (q.long(), x, None, ids, offsets), "must be float32, bfloat16, float16 or"
    yield "long bias", retrieval_scores, (q, x, torch.ones(5), ids, offsets), r"item_bias must be \[m\]"
    yield "int32 ids", retrieval_scores, (q, x, None, ids.int(), offsets), "ids must be one-dimensional, int64"
    yield "double scores", retrieval_counts, (q, x, None, scores.double(), offsets), "scores must be .* float64 if"
    yield "float others", retrieval_corrections, (scores.double(), offsets, scores, offsets), "both float32 or both"
    for what, bad in (
        ("too few", offsets[:-1]),
        ("from 1", torch.tensor([1, 1, 2])),
        ("to 3", torch.tensor([0, 1, 3])),
        ("descending", torch.tensor([0, 2**40, 2])),
        ("int32", offsets.int()),
    ):
        yield f"{what} of scores", retrieval_scores, (q, x, None, ids, bad), "(?<!other_)offsets must be int64"
        yield f"{what} of counts", retrieval_counts, (q, x, None, scores, bad), "(?<!other_)offsets must be int64"
        yield f"{what} of others", retrieval_corrections, (scores, offsets, scores, bad), "other_offsets must be int64"


@pytest.mark.parametrize("op, arguments, message", [pytest.param(*rest, id=what) for what, *rest in mistakes()])
@pytest.mark.usefixtures("native")
def test_what_would_read_beyond_memory_is_refused(op, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        op(*arguments)


@pytest.mark.parametrize("n, m, lengths", [(3000, 60_000, 10), (1, 400_000, 100_000)])
@pytest.mark.usefixtures("native")
def test_memory_does_not_grow_with_the_matrix(n, m, lengths):
    """The scores would take 720 MB, and their comparisons with one query's list 160 GB."""
    g = torch.Generator().manual_seed(6)
    queries, items = normal(g, n, 16), normal(g, m, 16)
    ids, offsets = csr(g, [lengths] * n, m)
    scores = retrieval_scores(queries, items, None, ids, offsets)
    _, used = peak_memory(lambda: retrieval_counts(queries, items, None, scores, offsets))
    assert used - 2 * 8 * len(ids) < 2**26
