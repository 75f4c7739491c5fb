"""Classification metrics: equal to scikit-learn, and what is refused, on every input that it takes."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import torchfast
from torchfast._register import metrics as registry
from torchfast.metrics import classification, classification_metrics, ranking
from torchfast.metrics.classification import areas, values

pytestmark = [
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning"),
    pytest.mark.filterwarnings("ignore:there are no (positive|negative) samples:UserWarning"),
]
metrics = torchfast.metrics
NAN = math.nan
AVERAGES = ("micro", "macro", "weighted", "none")
FSCORES = ("precision", "recall", "f1", "fbeta")
close = dict(rel=1e-12, abs=1e-12, nan_ok=True)


def same(actual, expected):
    """Of tensors and numpy arrays or numbers."""
    assert actual.dtype in (torch.float64, torch.int64) and not actual.requires_grad
    assert np.shape(expected) == tuple(actual.shape)
    assert actual.flatten().tolist() == pytest.approx(np.ravel(expected).tolist(), **close)


def quiet(function, *args, **kwargs):
    """scikit-learn also warns of what it is asked to do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


# ---- Inputs of hypothesis ----------------------------------------------------------------------

GRID = [i / 4 for i in range(5)]
WEIGHTS = [0.0, 0.25, 1.0, 3.5]


@st.composite
def samples(draw, classes=None, least=0):
    """Scores [n, c] of few different values, ids of targets, weights or None; the number of classes."""
    n, c = draw(st.integers(least, 12)), classes or draw(st.integers(2, 5))
    scores = draw(st.lists(st.lists(st.sampled_from(GRID), min_size=c, max_size=c), min_size=n, max_size=n))
    target = draw(st.lists(st.integers(0, c - 1), min_size=n, max_size=n))
    weight = draw(st.none() | st.lists(st.sampled_from(WEIGHTS), min_size=n, max_size=n))
    return np.array(scores, dtype=np.float64).reshape(n, c), np.array(target, dtype=np.int64), weight


def tensors(device, *arrays):
    return [None if a is None else torch.as_tensor(np.asarray(a), device=device) for a in arrays]


def counted(weight, *arrays):
    """What scikit-learn is given: samples of weight 0 are as if they were not there."""
    if weight is None:
        return None, *arrays
    kept = np.asarray(weight) > 0
    return np.asarray(weight)[kept], *(a[kept] for a in arrays)


def fscores(y, predicted, weight, beta, zero_division, average, labels=None):
    average = None if average == "none" else average
    options = dict(average=average, zero_division=zero_division, sample_weight=weight, labels=labels)
    for kind, b in ("precision", 0), ("recall", math.inf), ("f1", 1.0), ("fbeta", beta):
        place = {"precision": 0, "recall": 1}.get(kind, 2)
        yield kind, quiet(sk.precision_recall_fscore_support, y, predicted, beta=b or 1.0, **options)[place]


# ---- Multiclass --------------------------------------------------------------------------------


@given(
    samples(), st.sampled_from([0.0, 1.0, NAN]), st.sampled_from([0.5, 2.0]), st.sampled_from(["skip", "zero_division"])
)
def test_multiclass_decisions_are_those_of_scikit_learn(device, sample, zero_division, beta, absent):
    scores, target, weight = sample
    c = scores.shape[1]
    names = ["accuracy", "confusion_matrix", "confusion_matrix@true", "confusion_matrix@pred", "confusion_matrix@all"]
    names += [f"{kind}@{average}" for kind in FSCORES for average in AVERAGES]
    x, y, w = tensors(device, scores, target, weight)
    options = dict(zero_division=zero_division, beta=beta, absent=absent, sample_weight=w)
    found = classification_metrics(x, y, names, **options)
    of_ids = classification_metrics(x.argmax(1), y, names, num_classes=c, **options)
    for name in names:
        torch.testing.assert_close(found[name], of_ids[name], rtol=0, atol=0, equal_nan=True)
    weight, scores, target = counted(weight, scores, target)
    predicted = scores.argmax(1) if len(scores) else target
    assert found["confusion_matrix"].dtype == (torch.int64 if w is None else torch.float64)
    if not len(target):
        assert found["accuracy"].isnan() and not found["confusion_matrix"].any()
        assert all(found[f"{kind}@micro"].tolist() == pytest.approx(zero_division, nan_ok=True) for kind in FSCORES)
        return
    same(found["accuracy"], sk.accuracy_score(target, predicted, sample_weight=weight))
    for normalize in None, "true", "pred", "all":
        name = "confusion_matrix" + (f"@{normalize}" if normalize else "")
        options = dict(labels=range(c), sample_weight=weight, normalize=normalize)
        same(found[name], quiet(sk.confusion_matrix, target, predicted, **options))
    for average in AVERAGES:
        labels = range(c) if absent == "zero_division" or average in ("none", "micro") else None
        for kind, expected in fscores(target, predicted, weight, beta, zero_division, average, labels):
            same(found[f"{kind}@{average}"], expected)


@given(samples(), st.integers(1, 6))
def test_top_k_accuracy_is_that_of_scikit_learn_ties_included(device, sample, k):
    scores, target, weight = sample
    c = scores.shape[1]
    x, y, w = tensors(device, scores, target, weight)
    found = metrics.accuracy(x, y, top_k=k, sample_weight=w)
    weight, scores, target = counted(weight, scores, target)
    if not len(target):
        assert found.isnan()
    elif c > 2:
        expected = quiet(sk.top_k_accuracy_score, target, scores, k=k, labels=range(c), sample_weight=weight)
        same(found, expected)
    else:  # which scikit-learn takes for binary, with one score
        order = np.argsort(scores, axis=1, kind="mergesort")[:, ::-1][:, :k]
        same(found, np.average((order == target[:, None]).any(1), weights=weight))


@given(samples(least=1))
def test_multiclass_areas_are_those_of_scikit_learn(device, sample):
    scores, target, weight = sample
    c = scores.shape[1]
    probabilities = (scores + 0.25) / (scores + 0.25).sum(1, keepdims=True)
    names = [f"{kind}@{average}" for kind in ("roc_auc", "average_precision") for average in AVERAGES]
    x, y, w = tensors(device, probabilities, target, weight)
    found = classification_metrics(x, y, names, sample_weight=w)
    weight, probabilities, target = counted(weight, probabilities, target)
    one_hot = target[:, None] == np.arange(c)
    compare_areas(found, one_hot, probabilities, weight)


def compare_areas(found, y, scores, weight):
    """With scikit-learn's on [n, c] of labels; undefined ones must be NaN, where it may have 0."""
    for kind, function in ("roc_auc", sk.roc_auc_score), ("average_precision", sk.average_precision_score):
        each = []
        for labels, x in zip(y.T, scores.T, strict=True):
            defined = labels.any() and (kind == "average_precision" or not labels.all())
            each.append(quiet(function, labels, x, sample_weight=weight) if defined else NAN)
        same(found[f"{kind}@none"], each)
        same(found[f"{kind}@macro"], np.mean(each))
        if not math.isnan(np.sum(each)):
            for average in "macro", "weighted":
                expected = function(y.astype(int), scores, average=average, sample_weight=weight)
                same(found[f"{kind}@{average}"], expected)
        flat, repeated = y.ravel(), None if weight is None else np.repeat(weight, y.shape[1])
        if flat.any() and not flat.all():
            same(found[f"{kind}@micro"], function(flat, scores.ravel(), sample_weight=repeated))
        else:
            assert found[f"{kind}@micro"].isnan() or kind == "average_precision"


# ---- Binary --------------------------------------------------------------------------------------


@given(samples(2), st.sampled_from([0.0, 1.0, NAN]), st.sampled_from([0.0, 0.25, 0.5, 0.6, 1.0]))
def test_binary_decisions_are_those_of_scikit_learn(device, sample, zero_division, threshold):
    scores, target, weight = sample
    scores = scores[:, 0]
    names = ["accuracy", "confusion_matrix", *FSCORES]
    names += [f"{kind}@{average}" for kind in FSCORES for average in AVERAGES]
    x, y, w = tensors(device, scores, target, weight)
    options = dict(zero_division=zero_division, beta=2.0, sample_weight=w)
    found = classification_metrics(x, y, names, threshold=threshold, **options)
    of_ids = classification_metrics(x > threshold, y == 1, names, task="binary", **options)
    as_classes = classification_metrics((x > threshold).int(), y, names[6:], num_classes=2, **options)
    for name in names:
        torch.testing.assert_close(found[name], of_ids[name], rtol=0, atol=0, equal_nan=True)
    for name in names[6:]:
        torch.testing.assert_close(found[name], as_classes[name], rtol=0, atol=0, equal_nan=True)
    weight, scores, target = counted(weight, scores, target)
    if not len(target):
        assert found["accuracy"].isnan()
        return
    predicted = (scores > threshold).astype(int)
    same(found["accuracy"], sk.accuracy_score(target, predicted, sample_weight=weight))
    same(found["confusion_matrix"], sk.confusion_matrix(target, predicted, labels=[0, 1], sample_weight=weight))
    for kind, expected in fscores(target, predicted, weight, 2.0, zero_division, "none", [0, 1]):
        same(found[kind], expected[1])  # average="binary", but of 0 alone too
    for average in AVERAGES:
        labels = [0, 1] if average in ("none", "micro") else None
        for kind, expected in fscores(target, predicted, weight, 2.0, zero_division, average, labels):
            same(found[f"{kind}@{average}"], expected)


@given(samples(2))
def test_binary_areas_are_those_of_scikit_learn(device, sample):
    scores, target, weight = sample
    x, y, w = tensors(device, scores[:, 0], target, weight)
    found = {f"{k}@none": v[None] for k, v in classification_metrics(x, y, AREAS, sample_weight=w).items()}
    weight, scores, target = counted(weight, scores[:, :1], target)
    for kind, function in ("roc_auc", sk.roc_auc_score), ("average_precision", sk.average_precision_score):
        value = found[f"{kind}@none"][0]
        if target.any() and (kind == "average_precision" or not target.all()):
            same(value, function(target, scores[:, 0], sample_weight=weight))
        else:
            assert value.isnan()


AREAS = ("roc_auc", "average_precision")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_areas_of_many_scores_of_any_size(dtype, weighted, device):
    """All exponents, both signs, infinities, zeros of both signs; more scores than one part or one digit takes."""
    n = 50_000
    scores = (torch.randn(n) * torch.exp(3 * torch.randn(n))).to(dtype)
    scores[:9] = torch.tensor([math.inf, -math.inf, 0.0, -0.0, math.inf, -0.0, 0.0, -math.inf, 1e-7], dtype=dtype)
    scores[100:200] = scores[200:300]
    y = (torch.rand(n) < 0.3).long()
    y[:9] = torch.tensor([1, 0, 1, 0, 0, 1, 1, 1, 0])
    weight = torch.rand(n, dtype=torch.float64) if weighted else None
    found = classification_metrics(
        scores.to(device), y.to(device), AREAS, sample_weight=None if weight is None else weight.to(device)
    )
    # scikit-learn refuses infinities: ranks are as good
    rank = (scores.double() + 0.0).unique(return_inverse=True)[1].numpy()
    for name, function in ("roc_auc", sk.roc_auc_score), ("average_precision", sk.average_precision_score):
        same(found[name], function(y.numpy(), rank, sample_weight=None if weight is None else weight.numpy()))


def test_constant_scores(device):
    x, y = torch.full((7,), 0.3, device=device), torch.tensor([1, 0, 0, 1, 0, 0, 0], device=device)
    assert metrics.roc_auc_score(x, y).item() == 0.5
    assert metrics.average_precision_score(x, y).item() == 2 / 7


def test_logits_are_decided_at_the_logit_of_the_threshold(device):
    x, y = torch.randn(100, device=device), torch.randint(2, (100,), device=device)
    for threshold in 0.2, 0.5, 0.9:
        of_logits = metrics.f1_score(x, y, from_logits=True, threshold=threshold)
        assert of_logits == metrics.f1_score(x.double().sigmoid(), y, threshold=threshold)


def test_one_versus_rest_of_logits_ranks_probabilities(device):
    x, y = torch.randn(60, 4, device=device, dtype=torch.float64), torch.arange(60, device=device) % 4
    of_logits = metrics.roc_auc_score(x, y, from_logits=True)
    same(of_logits, sk.roc_auc_score(y.cpu().numpy(), x.softmax(1).cpu().numpy(), multi_class="ovr"))
    expected = sk.roc_auc_score(y.cpu().numpy(), x.softmax(1).cpu().numpy(), multi_class="ovr", average="weighted")
    same(metrics.roc_auc_score(x, y, from_logits=True, average="weighted"), expected)


@pytest.mark.usefixtures("checked")
def test_areas_of_one_vs_rest_decision_values_are_those_of_multilabel(device):
    """Each class by its own scores: as the error says, not by the softmax, which is another number."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 4, generator=g, dtype=torch.float64), torch.arange(60) % 4
    one_hot = torch.nn.functional.one_hot(y, 4)
    for ours, theirs in (
        (metrics.roc_auc_score, sk.roc_auc_score),
        (metrics.average_precision_score, sk.average_precision_score),
    ):
        with pytest.raises(ValueError, match="one-vs-rest classifiers give one-hot targets and task='multilabel'"):
            ours(x.to(device), y.to(device))
        found = ours(x.to(device), one_hot.to(device), task="multilabel")
        same(found, theirs(one_hot.numpy(), x.numpy()))
        assert abs(found - ours(x.to(device), y.to(device), from_logits=True)) > 1e-3


# ---- Multilabel ----------------------------------------------------------------------------------


@st.composite
def multilabel(draw):
    n, c = draw(st.integers(1, 8)), draw(st.integers(2, 4))
    scores = draw(st.lists(st.sampled_from(GRID), min_size=n * c, max_size=n * c))
    target = draw(st.lists(st.integers(0, 1), min_size=n * c, max_size=n * c))
    weight = draw(st.none() | st.lists(st.sampled_from(WEIGHTS), min_size=n, max_size=n))
    return np.array(scores).reshape(n, c), np.array(target).reshape(n, c), weight


@given(multilabel(), st.sampled_from([0.0, 1.0, NAN]))
def test_multilabel_is_that_of_scikit_learn(device, sample, zero_division):
    scores, target, weight = sample
    names = ["accuracy", "confusion_matrix"]
    names += [f"{kind}@{average}" for kind in (*FSCORES, *AREAS) for average in AVERAGES]
    x, y, w = tensors(device, scores, target, weight)
    options = dict(task="multilabel", sample_weight=w, beta=2.0, zero_division=zero_division)
    found = classification_metrics(x, y, names, **options)
    of_floats = classification_metrics(x, y.float(), names, **options)
    for name in names:
        torch.testing.assert_close(found[name], of_floats[name], rtol=0, atol=0, equal_nan=True)
    weight, scores, target = counted(weight, scores, target)
    if not len(target):
        assert found["accuracy"].isnan()
        return
    predicted = (scores > 0.5).astype(int)
    same(found["accuracy"], sk.accuracy_score(target, predicted, sample_weight=weight))
    same(found["confusion_matrix"], sk.multilabel_confusion_matrix(target, predicted, sample_weight=weight))
    for average in AVERAGES:
        for kind, expected in fscores(target, predicted, weight, 2.0, zero_division, average):
            same(found[f"{kind}@{average}"], expected)
    compare_areas(found, target == 1, scores, weight)


# ---- Forms of input ------------------------------------------------------------------------------


def test_segmentation_maps_are_their_pixels(device):
    x, y = torch.randn(2, 5, 7, 6, device=device), torch.randint(5, (2, 7, 6), device=device)
    w = torch.rand(2, 7, 6, device=device)
    names = ["accuracy", "accuracy@2", "f1@macro", "confusion_matrix", "roc_auc", "average_precision@micro"]
    pixels = x.movedim(1, -1).reshape(-1, 5)
    for layout in torch.contiguous_format, torch.channels_last:
        for ignore_index in None, 3:
            options = dict(from_logits=True, ignore_index=ignore_index)
            if ignore_index == 3:
                names = names[:4]
            found = classification_metrics(x.contiguous(memory_format=layout), y, names, sample_weight=w, **options)
            expected = classification_metrics(pixels, y.flatten(), names, sample_weight=w.flatten(), **options)
            for name in names:
                torch.testing.assert_close(found[name], expected[name], rtol=1e-14, atol=0)


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_what_is_ignored_is_as_if_it_were_not_there(task, device):
    """Whatever is predicted: NaN too."""
    shape = {"binary": (30,), "multiclass": (30, 4), "multilabel": (30, 4)}[task]
    x = torch.rand(shape, device=device, dtype=torch.float64)
    x = x / x.sum(1, keepdim=True) if task == "multiclass" else x
    y = torch.randint(4 if task == "multiclass" else 2, shape[:1] if task == "multiclass" else shape, device=device)
    names = ["accuracy", "confusion_matrix", "f1@macro", "f1@micro", *AREAS]
    kept = torch.arange(30, device=device) % 3 > 0
    ignored, x_nan = y.clone(), x.clone()
    ignored[~kept], x_nan[~kept] = -100, NAN
    expected = classification_metrics(x[kept], y[kept], names, task=task)
    found = classification_metrics(x_nan, ignored, names, task=task, ignore_index=-100)
    weightless = classification_metrics(x_nan, y, names, task=task, sample_weight=kept.double())
    for name in names:
        same(found[name], expected[name].cpu().numpy())
        same(weightless[name].double(), expected[name].cpu().numpy())


def test_single_labels_of_a_sample_are_ignored(device):
    x, y = torch.rand(20, 3, device=device), torch.randint(2, (20, 3), device=device)
    y[::2, 1] = -1
    y[4] = -1
    names = ["f1@none", "roc_auc@none", "accuracy"]
    found = classification_metrics(x, y, names, task="multilabel", ignore_index=-1)
    for c in range(3):
        kept = y[:, c] >= 0
        assert found["f1@none"][c] == metrics.f1_score(x[kept, c], y[kept, c])
        assert found["roc_auc@none"][c] == metrics.roc_auc_score(x[kept, c], y[kept, c])
    right = ((x > 0.5) == (y == 1)) | (y < 0)
    samples = (y >= 0).any(1)
    assert found["accuracy"].item() == pytest.approx((right.all(1) & samples).sum().item() / samples.sum().item())


def test_every_integer_dtype_and_floats_that_are_integers(device):
    x = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], device=device)
    y = torch.tensor([0, 2, 1, 1], device=device)
    names = ["accuracy", "confusion_matrix", "roc_auc"]
    expected = classification_metrics(x, y, names)
    integers = (torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
    for dtype in (*integers, torch.float32, torch.float16):
        found = classification_metrics(x, y.to(dtype), names)
        assert {n: v.tolist() for n, v in found.items()} == {n: v.tolist() for n, v in expected.items()}


def test_the_first_of_tied_classes_is_predicted(device):
    for c in 3, 40, 1000:
        for first, second in itertools.combinations((0, 1, c // 2, c - 1), 2):
            x = torch.zeros(1, c, device=device)
            x[0, [first, second]] = 1
            found = metrics.confusion_matrix(x, torch.tensor([second], device=device))
            assert found.nonzero().tolist() == [[second, first]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_the_largest_is_found_in_every_place_of_a_row(dtype, device):
    for c in (*range(2, 70), 100, 257):
        x = -torch.rand(c, c, device=device).to(dtype) - 1 + 2 * torch.eye(c, device=device, dtype=dtype)
        y = torch.arange(c, device=device)
        for scores in x, x.t().contiguous().t():
            assert metrics.accuracy(scores, y) == 1
            assert torch.equal(metrics.confusion_matrix(scores, y), torch.eye(c, dtype=torch.long, device=device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_threshold_between_two_numbers_is_not_rounded_to_one(dtype, device):
    for threshold in 0.1, 0.2, 0.3, 0.6, 0.7, 0.5:
        x = torch.tensor(threshold, dtype=dtype, device=device)
        x = torch.stack([x.nextafter(x * 0), x, x.nextafter(x * 0 + 1)])
        found = metrics.confusion_matrix(x, x > 0, threshold=threshold)
        assert found[1, 1] == (x.double() > threshold).sum()


@pytest.mark.once("reference")
def test_mistakes_are_counted_as_by_the_reference(device):
    """Alone and beside others, by every op and in every layout."""
    n, nan = 90, math.nan
    y = torch.randint(3, (n,), device=device)
    x = torch.randn(n, 3, device=device)
    y[:9] = torch.tensor([3, -1, 2**40, 0, 1, 2, -100, -100, 5])
    x[[2, 4, 6, 20, 89]] = nan
    x[40, 1] = nan
    weight = torch.ones(n, device=device)
    weight[[5, 7, 8, 30, 31, 40]] = torch.tensor([-1.0, -1.0, nan, nan, 0.0, 0.0], device=device)
    wide = torch.randn(n, 50, device=device)
    wide[[3, 40]], wide[50, 49], wide[51, 0] = nan, nan, nan
    maps = x.view(2, 45, 3).movedim(-1, 1).contiguous()
    labels, two, ids = y.remainder(4)[:, None], x.sigmoid()[:, :1].contiguous(), (y * (y < 9) + 1)[:, None]
    two[10:12] = torch.tensor([[1.5], [-0.5]])
    many = y.remainder(4).view(30, 3)
    calls = [
        ("class_counts", (s, t, w, s.shape[1], -100, [1, 2], True))
        for w in (None, weight)
        for s, t in ((x, y), (wide, y), (x.t().contiguous().t(), y))
    ]
    calls += [("class_counts", (maps, y.view(2, 45), w, 3, -100, [2], False)) for w in (None, weight.view(2, 45))]
    calls += [("class_counts", (y + 1, y, w, 3, -100, [], True)) for w in (None, weight)]
    calls += [
        ("label_counts", (s, labels, w, 2, 0.5, p)) for w in (None, weight) for s in (two, ids) for p in (False, True)
    ]
    calls += [("label_counts", (x.view(30, 9)[:, :3], many, w, None, 0.5, True)) for w in (None, weight[:30])]
    calls += [
        ("ranked_areas", (s.t(), t, w, i))
        for w in (None, weight)
        for i in (None, -100)
        for s, t in ((x, y), (two, labels.t()))
    ]
    for name, inputs in calls:
        found, expected = registry[name](*inputs), registry[name].reference(*inputs)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-14, atol=0, equal_nan=True)


def test_infinite_scores_are_scores(device):
    inf = math.inf
    x = torch.tensor([[-inf, -inf, -inf], [0.0, inf, inf], [-inf, 0.0, -inf]], device=device)
    assert metrics.confusion_matrix(x, torch.tensor([0, 1, 1], device=device)).tolist() == [
        [1, 0, 0],
        [0, 2, 0],
        [0] * 3,
    ]


# ---- What is refused -----------------------------------------------------------------------------


@pytest.fixture
def checked(device, monkeypatch):
    """Values are checked on GPUs where that is asked for."""
    monkeypatch.setenv("TORCHFAST_CHECK", "1")


X = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]])


@pytest.mark.parametrize(
    "names", ["accuracy", "confusion_matrix", "f1@macro", "accuracy@2", "roc_auc", "average_precision"]
)
@pytest.mark.usefixtures("checked")
def test_wrong_values_of_multiclass(names, device):
    x, y = X.to(device), torch.tensor([0, 1], device=device)
    with pytest.raises(ValueError, match="preds must not hold NaN with nan='error'"):
        classification_metrics(x.masked_fill(x == 0.5, NAN), y, names)
    for value in 3, -1, 10**12:
        with pytest.raises(IndexError, match=f"target {value} is out of range: allowed are 0 to 2"):
            classification_metrics(x, y + (value - 1) * (y == 1), names)
    with pytest.raises(IndexError, match="target -1 is out of range: allowed are 0 to 2, and ignore_index=-100"):
        classification_metrics(x, -y, names, ignore_index=-100)
    with pytest.raises(IndexError, match="target a number that is no integer is out of range"):
        classification_metrics(x, y + 0.5, names)
    for weight in -1.0, NAN, torch.inf:
        with pytest.raises(ValueError, match="sample_weight must be finite and >= 0"):
            classification_metrics(x, y, names, sample_weight=torch.tensor([1.0, weight], device=device))


@pytest.mark.parametrize("names", ["accuracy", "confusion_matrix", "f1@macro", "roc_auc", "average_precision"])
@pytest.mark.parametrize("task", ["binary", "multilabel"])
@pytest.mark.usefixtures("checked")
def test_wrong_values_of_labels(names, task, device):
    x, y = torch.tensor([[0.2], [0.7]], device=device), torch.tensor([[0], [1]], device=device)
    with pytest.raises(ValueError, match="preds must not hold NaN with nan='error'"):
        classification_metrics(x.masked_fill(x > 0.5, NAN), y, names, task=task)
    for value in 2, -1, 10**12:
        with pytest.raises(IndexError, match=f"target {value} is out of range: allowed are 0 to 1"):
            classification_metrics(x, y * value, names, task=task)
    with pytest.raises(IndexError, match="target a number that is no integer is out of range"):
        classification_metrics(x, y * 0.5, names, task=task)


@pytest.mark.usefixtures("checked")
def test_logits_are_not_taken_for_probabilities(device):
    y = torch.tensor([0, 1], device=device)
    with pytest.raises(ValueError, match="preds must be probabilities, from 0 to 1, or logits with from_logits=True"):
        metrics.f1_score(torch.tensor([0.5, 1.5], device=device), y)
    with pytest.raises(ValueError, match="preds must be probabilities, which sum to 1 over the classes"):
        metrics.roc_auc_score(torch.randn(2, 3, device=device), y)
    metrics.accuracy(torch.randn(2, 3, device=device), y)
    assert metrics.roc_auc_score(torch.tensor([-0.5, 1.5], device=device), y).item() == 1


@pytest.mark.usefixtures("checked")
def test_class_ids_out_of_range(device):
    y = torch.tensor([0, 1], device=device)
    with pytest.raises(IndexError, match="preds 3 is out of range: class ids from 0 to 2 are allowed"):
        metrics.accuracy(y + 2, y, num_classes=3)
    with pytest.raises(IndexError, match="preds 2 is out of range: class ids from 0 to 1 are allowed"):
        metrics.accuracy(y * 2, y, task="binary")


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_nan_propagates_into_every_metric(task, device):
    x = {"binary": torch.rand(6), "multiclass": torch.rand(6, 3).softmax(1), "multilabel": torch.rand(6, 3)}[task]
    y = torch.arange(6) % 3 if task == "multiclass" else (x > x.mean()).long()
    x[1] = NAN
    names = ["accuracy", "confusion_matrix", "confusion_matrix@all", "f1@macro", "f1@none", *AREAS]
    names = [n for n in names if n != "confusion_matrix@all" or task != "multilabel"]
    found = classification_metrics(x.to(device), y.to(device), names, task=task, nan="propagate")
    assert (found.pop("confusion_matrix") == -1).all()
    assert all(value.isnan().all() for value in found.values())


def test_without_checks_what_is_wrong_makes_every_value_nan(device, monkeypatch):
    """As on GPUs: the CPU without its looking at values."""
    from torchfast.metrics.classification import functional, inputs

    monkeypatch.delenv("TORCHFAST_CHECK", raising=False)
    for module in inputs, functional:
        monkeypatch.setattr(module, "readable", lambda x: False)
    x, y = X.to(device), torch.tensor([0, 1], device=device)
    names = ["accuracy", "f1@macro", "accuracy@2", "confusion_matrix@all", "roc_auc", "average_precision@weighted"]
    wrong = [
        (x, y + 2, {}),
        (x, y - 1, {}),
        (x.masked_fill(x == 0.5, NAN), y, {}),
        (x, y, {"sample_weight": torch.tensor([1.0, -1.0], device=device)}),
        (x, y, {"sample_weight": torch.tensor([1.0, torch.inf], device=device)}),
        (3 * x, y, {}),
    ]
    for preds, target, options in wrong:
        found = classification_metrics(preds, target, names, **options)
        assert all(value.isnan().all() for value in found.values()), (preds, target, options)
        if preds is not wrong[-1][0]:
            matrix = metrics.confusion_matrix(preds, target, **options)
            assert (matrix == -1).all() or matrix.isnan().all()


def refused(error, match, *args, **kwargs):
    with pytest.raises(error, match=match):
        classification_metrics(*args, **kwargs)


@pytest.mark.once
def test_wrong_arguments_are_named(device):
    x, y = torch.rand(4, 3, device=device), torch.tensor([0, 1, 2, 0], device=device)
    refused(ValueError, r"metrics must be of 'accuracy', .*got 'acuracy'; did you mean 'accuracy'\?", x, y, "acuracy")
    refused(ValueError, "metrics must name an average for task='multiclass', of 'micro'.*'f1@macro'", x, y, "f1")
    refused(ValueError, "metrics must have 'f1' alone or with 'micro'", x, y, "f1@samples")
    refused(ValueError, "the top k of 'accuracy' must be an integer >= 1, got 'accuracy@0'", x, y, "accuracy@0")
    refused(ValueError, "metrics must be at least one name", x, y, [])
    refused(TypeError, "metrics must be strings", x, y, [3])
    refused(ValueError, "'accuracy', without a top k", x[:, 0], y, "accuracy@2")
    refused(
        ValueError, "task must be 'binary', 'multiclass' or 'multilabel', got 'multi'", x, y, "accuracy", task="multi"
    )
    refused(ValueError, "task must be given .with num_classes for class ids.", y, y, "accuracy")
    refused(ValueError, "task must be given", x, x, "accuracy")
    refused(ValueError, "num_classes must be given for task='multiclass'", y, y, "accuracy", task="multiclass")
    refused(ValueError, "num_classes must be an integer >= 2, got 1", y, y, "accuracy", num_classes=1)
    refused(ValueError, "num_classes must be 2 or left out", y, y, "accuracy", num_classes=3, task="binary")
    refused(ValueError, r"shapes of preds and target must be \(N, 4, ...\)", x, y, "accuracy", num_classes=4)
    refused(ValueError, "shapes of preds and target must be the same", x[:2, 0], y, "accuracy", task="binary")
    refused(ValueError, "threshold must be a probability", x, y, "accuracy", threshold=1.5)
    refused(ValueError, "beta must be >= 0, got -1", x, y, "fbeta@macro", beta=-1)
    refused(ValueError, "zero_division must be 0, 1 or NaN, got 0.5", x, y, "f1@macro", zero_division=0.5)
    refused(ValueError, "absent must be 'skip' or 'zero_division'", x, y, "f1@macro", absent="drop")
    refused(ValueError, "nan must be 'error' or 'propagate', got 'last'", x, y, "accuracy", nan="last")
    refused(TypeError, "ignore_index must be an integer or None", x, y, "accuracy", ignore_index=0.5)
    refused(TypeError, "preds must be scores, of a floating dtype, for 'roc_auc'", y, y, "roc_auc", num_classes=3)
    refused(TypeError, "preds must be scores, of a floating dtype, for 'accuracy@2'", y, y, "accuracy@2", num_classes=3)
    refused(TypeError, "preds must be float32.*got torch.float8_e5m2", x.to(torch.float8_e5m2), y, "accuracy")
    refused(TypeError, "preds must be a tensor of bool, integers or floats, got list", [0.5], y, "accuracy")
    refused(TypeError, "target must be a tensor of bool, integers", x, y * 1j, "accuracy")
    refused(TypeError, "sample_weight must be a tensor of a floating dtype", x, y, "accuracy", sample_weight=y)
    refused(ValueError, r"sample_weight's shape must be \(4,\)", x, y, "accuracy", sample_weight=x)
    refused(ValueError, "target must be on preds's device", x, y.to("meta"), "accuracy")


@pytest.mark.once
def test_one_class_absent_is_warned_of(device, monkeypatch):
    monkeypatch.setenv("TORCHFAST_CHECK", "1")
    x, y = torch.rand(4, device=device), torch.ones(4, dtype=torch.long, device=device)
    with pytest.warns(UserWarning, match="there are no negative samples, so roc_auc is NaN there"):
        assert metrics.roc_auc_score(x, y).isnan()
    with pytest.warns(UserWarning, match="there are no positive samples, so average_precision is NaN there"):
        assert metrics.average_precision_score(x, y * 0).isnan()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.average_precision_score(x, y) == 1
    with pytest.warns(UserWarning, match="there are no positive samples of class 1, so roc_auc is NaN there"):
        found = metrics.roc_auc_score(
            torch.full((4, 3), 1 / 3, device=device), torch.tensor([0, 2, 0, 2], device=device)
        )
    assert found.isnan()


@pytest.mark.once
def test_functions_are_those_of_one_metric(device):
    x, y = torch.rand(30, 3, device=device).softmax(1), torch.arange(30, device=device) % 3
    calls = {
        "accuracy@2": metrics.accuracy(x, y, top_k=2),
        "precision@macro": metrics.precision(x, y, average="macro"),
        "recall@weighted": metrics.recall(x, y, average="weighted"),
        "f1@none": metrics.f1_score(x, y, average="none"),
        "fbeta@micro": metrics.fbeta_score(x, y, 2.0, average="micro"),
        "confusion_matrix@true": metrics.confusion_matrix(x, y, normalize="true"),
        "roc_auc@micro": metrics.roc_auc_score(x, y, average="micro"),
        "average_precision@none": metrics.average_precision_score(x, y, average="none"),
    }
    found = classification_metrics(x, y, list(calls), beta=2.0)
    for name, value in calls.items():
        assert torch.equal(found[name], value)


def test_precision_of_rankings_is_another_function():
    assert metrics.precision is classification.precision is not ranking.precision
    assert metrics.recall is classification.recall is not ranking.recall


@pytest.mark.once
def test_no_gradient_and_no_transforms(device):
    x, y = torch.rand(6, device=device, requires_grad=True), torch.tensor([0, 1] * 3, device=device)
    assert not metrics.roc_auc_score(x, y).requires_grad
    with pytest.raises(RuntimeError, match="not differentiable"):
        torch.func.grad(lambda x: metrics.roc_auc_score(x, y))(x.detach())
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="not differentiable"):
        metrics.accuracy(forward_ad.make_dual(x.detach(), torch.ones_like(x)), y)


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
@pytest.mark.once
def test_compiles_whole(task, device):
    x = {"binary": torch.rand(20), "multiclass": torch.rand(20, 3).softmax(1), "multilabel": torch.rand(20, 3)}[task]
    y = torch.arange(20) % 3 if task == "multiclass" else (torch.arange(x.numel()) % 2).view(x.shape)
    x, y = x.to(device), y.to(device)
    names = ["accuracy", "f1@macro", "confusion_matrix", *AREAS]

    def function(x, y):
        return classification_metrics(x, y, names, task=task)

    found, expected = torch.compile(function, fullgraph=True)(x, y), function(x, y)
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-14, atol=0)


# ---- GPUs are not made to wait ---------------------------------------------------------------------


@pytest.mark.parametrize("op", ["class_counts", "label_counts", "ranked_areas", "regression_moments"])
def test_no_value_is_read_on_the_host(op):
    """Tensors of the meta device have none to read."""
    metric = registry[op]
    for sample in metric.sample_inputs("cpu"):
        expected = metric.function(*sample.args, **sample.kwargs)
        args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (sample.args, sample.kwargs))
        found = metric.function(*args, **kwargs)
        for name, value in expected.items():
            assert (found[name].device.type, found[name].shape, found[name].dtype) == ("meta", value.shape, value.dtype)


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
@pytest.mark.parametrize("bins", [None, 10])
def test_the_class_reads_no_value_on_the_host(task, bins):
    x = {"binary": torch.rand(20), "multiclass": torch.rand(20, 3).softmax(1), "multilabel": torch.rand(20, 3)}[task]
    y = torch.zeros(20 if task != "multilabel" else (20, 3), dtype=torch.long)
    options = {} if task == "binary" else {"num_classes": 3, "task": task}
    metric = metrics.ClassificationMetrics(["accuracy", "f1@macro", *AREAS], bins=bins, ignore_index=-1, **options)
    metric = metric.to("meta")
    for _ in range(2):
        metric.update(x.to("meta"), y.to("meta"))
    assert all(v.device.type == "meta" for v in metric.compute().values())


class FloatCumsums(TorchDispatchMode):
    """Records those that a GPU would add in any order."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "cumsum" in func.name() and args[0].is_floating_point():
            self.found.append(func)
        return func(*args, **(kwargs or {}))


def test_weighted_areas_add_up_in_one_order_where_cumsum_has_none(monkeypatch):
    """CUDA's cumsum of floats raises under torch.use_deterministic_algorithms; the CPU stands in for it."""
    scores, labels, weight = torch.randn(3, 1000), torch.randint(2, (3, 1000)), torch.rand(1000)
    expected = areas.reference(scores, labels, weight, None)
    monkeypatch.setattr(areas, "_UNORDERED", ("cpu",))
    with FloatCumsums() as cumsums:
        found = areas.reference(scores, labels, weight, None)
        binned = values._bin_bounds(torch.rand(3, 5), torch.rand(3, 5))
    assert not cumsums.found and all(x.isfinite().all() for x in binned)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for n in (0, 1, 2, 3, 8, 1000):
        x = torch.rand(2, n, dtype=torch.float64)
        torch.testing.assert_close(areas.running_sums(x), x.cumsum(1), rtol=1e-12, atol=0)
