"""Losses and ranking metrics at the speed of memory, on any torch, with or without a GPU."""

from torchfast.losses.cross_entropy import (
    CrossEntropyLoss,
    FocalLoss,
    LabelSmoothingCrossEntropy,
    cross_entropy,
    focal_loss,
)

__version__ = "0.1.0"

__all__ = [
    "CrossEntropyLoss",
    "FocalLoss",
    "LabelSmoothingCrossEntropy",
    "__version__",
    "cross_entropy",
    "focal_loss",
]

from torchfast import _native as _native  # after the ops are defined: it implements them
