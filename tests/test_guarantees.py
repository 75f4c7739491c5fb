"""The README's tables: what others do where torchfast does what it says, a test a row; and what to switch from."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torchfast
from torchfast.metrics import classification_metrics

nan, inf = math.nan, math.inf


def gradient(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


def focal_of_torchvision(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """torchvision.ops.sigmoid_focal_loss, its formula."""
    p = torch.sigmoid(logits)
    ce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    return (alpha * targets + (1 - alpha) * (1 - targets)) * ce * (1 - p_t) ** gamma


def test_an_ignored_row_of_nan():
    logits = torch.tensor([[1.0, 2.0], [nan, nan]], requires_grad=True)
    target = torch.tensor([0, -100])
    (theirs,) = gradient(F.cross_entropy(logits, target), logits)
    (ours,) = gradient(torchfast.cross_entropy(logits, target), logits)
    assert theirs[1].isnan().all()
    assert ours[1].tolist() == [0, 0] and ours[0].isfinite().all()


def test_a_masked_class_of_weight_0():
    logits, weight = torch.tensor([[1.0, 2.0, -inf]], requires_grad=True), torch.tensor([1.0, 1.0, 0.0])
    options = {"weight": weight, "label_smoothing": 0.1}
    assert F.cross_entropy(logits, torch.tensor([0]), **options).isnan()
    loss = torchfast.cross_entropy(logits, torch.tensor([0]), **options)
    assert loss.isfinite() and gradient(loss, logits)[0].isfinite().all()


def test_focal_loss_of_a_certain_row():
    logits, target = torch.tensor([[20.0, 0.0]]), torch.tensor([0])
    p = logits.softmax(1)[0, 0]
    assert (1 - p) ** 2 * -p.log() == 0
    exact = math.exp(-20) ** 3  # (1 - p)^2 and -log p are e^-20 and its square, to 1e-9
    assert math.isclose(torchfast.focal_loss(logits, target, gamma=2.0, alpha=None).item(), exact, rel_tol=1e-5)


def test_the_loss_of_half_precision_logits():
    logits, target = torch.randn(64, 10, dtype=torch.bfloat16), torch.randint(10, (64,))
    assert F.cross_entropy(logits, target).dtype == torch.bfloat16
    ours = torchfast.cross_entropy(logits, target)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), F.cross_entropy(logits.double(), target), rtol=1e-6, atol=0)


def test_targets_of_any_integer_dtype():
    logits, target = torch.randn(4, 10), torch.randint(10, (4,), dtype=torch.int32)
    with pytest.raises(RuntimeError):
        F.cross_entropy(logits, target)
    assert torchfast.cross_entropy(logits, target) == torchfast.cross_entropy(logits, target.long())


def test_a_batch_without_a_row_that_counts():
    logits, target = torch.randn(4, 10), torch.full((4,), -100)
    assert F.cross_entropy(logits, target).isnan() and torchfast.cross_entropy(logits, target).isnan()
    assert torchfast.cross_entropy(logits, target, empty="zero") == 0


def test_sigmoid_focal_loss_of_gamma_below_1():
    logits, target = torch.tensor([40.0], requires_grad=True), torch.ones(1)
    (theirs,) = gradient(focal_of_torchvision(logits, target, gamma=0.5).sum(), logits)
    (ours,) = gradient(torchfast.sigmoid_focal_loss(logits, target, gamma=0.5, reduction="sum"), logits)
    assert theirs.isnan().all() and ours.isfinite().all()


def test_a_masked_element_of_nan():
    logits, mask = torch.tensor([1.0, nan], requires_grad=True), torch.tensor([True, False])
    theirs = (focal_of_torchvision(logits, torch.zeros(2)) * mask).sum()
    ours = torchfast.sigmoid_focal_loss(logits, torch.zeros(2), mask=mask, reduction="sum")
    assert theirs.isnan()
    assert ours.isfinite() and gradient(ours, logits)[0].tolist()[1] == 0


def head(rows: int = 32, features: int = 8, classes: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    leaf = {"requires_grad": True}
    return torch.randn(rows, features, **leaf), torch.randn(classes, features, **leaf), torch.randint(classes, (rows,))


def chunked(hidden: Tensor, weight: Tensor, target: Tensor, **options: object) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, target, options=torch.nn.LinearCrossEntropyOptions(), **options)


def test_a_second_backward_through_the_chunked_head():
    *leaves, target = head()
    theirs = chunked(*leaves, target)
    with pytest.raises(RuntimeError):
        theirs.backward(retain_graph=True)
        theirs.backward()
    ours = torchfast.linear_cross_entropy(*leaves, target)
    once = torch.autograd.grad(ours, leaves, retain_graph=True)
    torch.testing.assert_close(once, torch.autograd.grad(ours, leaves))


def test_label_smoothing_in_the_chunked_head():
    *leaves, target = head()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chunked(*leaves, target, label_smoothing=0.1)
        theirs = [str(warning.message) for warning in caught]
        caught.clear()
        ours = torchfast.linear_cross_entropy(*leaves, target, label_smoothing=0.1, chunk_size=8)
        assert not caught
    assert theirs, "torch does it in chunks now: take the row out of the README"
    two_steps = F.cross_entropy(F.linear(*leaves), target, label_smoothing=0.1)
    torch.testing.assert_close(ours, two_steps, rtol=1e-5, atol=1e-6)


def test_hidden_states_of_a_nan_row_that_is_ignored():
    hidden, weight, target = head()
    target[3] = -100
    with torch.no_grad():
        hidden[3] = nan
    (theirs,) = gradient(chunked(hidden, weight, target), weight)
    (ours,) = gradient(torchfast.linear_cross_entropy(hidden, weight, target), weight)
    assert theirs.isnan().any() and ours.isfinite().all()


def test_logits_taken_for_probabilities():
    """torchmetrics takes a sigmoid of whatever has a value outside of [0, 1], batch by batch."""
    from torchmetrics.functional.classification import binary_accuracy

    scores, target = torch.tensor([0.2, 0.4, 0.9]), torch.tensor([0, 0, 1])
    assert binary_accuracy(scores, target) == 1
    assert binary_accuracy(torch.cat([scores, torch.tensor([1.5])]), torch.tensor([0, 0, 1, 1])) == 0.5
    with pytest.raises(ValueError, match="from_logits"):
        classification_metrics(torch.cat([scores, torch.tensor([1.5])]), torch.tensor([0, 0, 1, 1]), "accuracy")


def test_nan_predictions_of_a_classifier():
    from torchmetrics.functional.classification import multiclass_accuracy

    probabilities, target = torch.tensor([[nan, nan], [0.4, 0.6]]), torch.tensor([0, 1])
    assert multiclass_accuracy(probabilities, target, num_classes=2, average="micro") == 1
    with pytest.raises(ValueError, match="NaN"):
        classification_metrics(probabilities, target, "accuracy")
    assert classification_metrics(probabilities, target, "accuracy", nan="propagate")["accuracy"].isnan()


# ---- Switching: the formulas of libraries that are not installed here, as they are in their sources ----------


def test_switching_from_kornia():
    logits, target, a, gamma = torch.randn(6, 4, 5), torch.randint(4, (6, 5)), 0.3, 2.0
    log_p = logits.log_softmax(1)
    focal = -((1 - log_p.exp()) ** gamma) * log_p * F.one_hot(target, 4).movedim(-1, 1)
    theirs = (torch.tensor([1 - a] + [a] * 3).view(-1, 1) * focal).sum(1)
    ours = torchfast.FocalLoss(gamma, alpha=torch.tensor([1 - a] + [a] * 3), reduction="none")(logits, target)
    torch.testing.assert_close(ours, theirs)


def test_switching_from_timm():
    logits, target = torch.randn(6, 10), torch.randint(10, (6,))
    log_p = logits.log_softmax(1)
    smoothed = (0.9 * -log_p.gather(1, target[:, None]).squeeze(1) + 0.1 * -log_p.mean(1)).mean()
    torch.testing.assert_close(torchfast.LabelSmoothingCrossEntropy(0.1)(logits, target), smoothed)
    soft = torch.rand(6, 10).softmax(1)
    torch.testing.assert_close(torchfast.CrossEntropyLoss()(logits, soft), -(soft * log_p).sum(1).mean())


def test_switching_from_binary_cross_entropy_with_logits():
    logits, target, pos_weight = torch.randn(6, 10), torch.rand(6, 10), torch.rand(10) + 0.5
    ours = torchfast.SigmoidFocalLoss(alpha=-1, gamma=0, reduction="mean", pos_weight=pos_weight)(logits, target)
    torch.testing.assert_close(ours, torch.nn.BCEWithLogitsLoss(pos_weight=pos_weight)(logits, target))


def test_switching_from_liger():
    """Their z-loss is lse_square_scale * logsumexp^2, of the mean over the rows that count."""
    logits, target = torch.randn(6, 10), torch.tensor([0, 3, -100, 5, 9, 1])
    counts = target != -100
    z = 1e-2 * logits.logsumexp(1).square()[counts].mean()
    theirs = F.cross_entropy(logits, target, label_smoothing=0.1) + z
    torch.testing.assert_close(torchfast.CrossEntropyLoss(label_smoothing=0.1, z_loss=1e-2)(logits, target), theirs)
