"""Losses and metrics at the speed of memory, on any torch, with or without a GPU."""

from torchfast import metrics
from torchfast.losses.cross_entropy import (
    CrossEntropyLoss,
    FocalLoss,
    LabelSmoothingCrossEntropy,
    cross_entropy,
    focal_loss,
)
from torchfast.losses.linear_cross_entropy import LinearCrossEntropyLoss, linear_cross_entropy
from torchfast.losses.sigmoid_focal_loss import (
    AsymmetricLoss,
    SigmoidFocalLoss,
    asymmetric_loss,
    sigmoid_focal_loss,
)

__version__ = "0.1.0"

__all__ = [
    "AsymmetricLoss",
    "CrossEntropyLoss",
    "FocalLoss",
    "LabelSmoothingCrossEntropy",
    "LinearCrossEntropyLoss",
    "SigmoidFocalLoss",
    "__version__",
    "asymmetric_loss",
    "cross_entropy",
    "empty_cache",
    "focal_loss",
    "linear_cross_entropy",
    "memory_stats",
    "metrics",
    "sigmoid_focal_loss",
]

from torchfast import _native as _native  # after the ops are defined: it implements them
from torchfast._memory import empty_cache, memory_stats
