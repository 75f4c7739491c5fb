"""The functions as modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchfast.losses.sigmoid_focal_loss.functional import sigmoid_focal_loss
from torchfast.losses.sigmoid_focal_loss.options import PUBLIC


class SigmoidFocalLoss(nn.Module):
    """:func:`sigmoid_focal_loss` as a module, with all of its options: shapes, dtypes and errors are the same.

    ``weight`` and ``pos_weight`` are buffers: they move with the module. ``mask`` and ``normalizer`` belong
    to the batch and are given to the call.

    Example:
        >>> import torch, torchfast
        >>> criterion = torchfast.SigmoidFocalLoss(alpha=0.25, gamma=2.0, reduction="sum")
        >>> print(f"{criterion(torch.zeros(2, 3), torch.eye(2, 3)):.4f}")
        0.6065
    """

    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self,
        alpha: float = 0.25,
        gamma: float = 2.0,
        reduction: str = "none",
        *,
        gamma_neg: float | None = None,
        clip: float = 0.0,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        ignore_index: int = -100,
        empty: str = "nan",
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)
        self.alpha = alpha
        self.gamma = gamma
        self.reduction = reduction
        self.gamma_neg = gamma_neg
        self.clip = clip
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.empty = empty

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        mask: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return sigmoid_focal_loss(
            inputs,
            targets,
            weight=self.weight,
            pos_weight=self.pos_weight,
            mask=mask,
            normalizer=normalizer,
            **{name: getattr(self, name) for name in PUBLIC},
        )

    def extra_repr(self) -> str:
        shown = ("alpha", "gamma", "gamma_neg", "clip", "label_smoothing", "reduction")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)


class AsymmetricLoss(SigmoidFocalLoss):
    """:func:`asymmetric_loss` as a module: :class:`SigmoidFocalLoss` with timm's arguments and defaults.

    Example:
        >>> import torch, torchfast
        >>> criterion = torchfast.AsymmetricLoss(gamma_neg=4, gamma_pos=1, clip=0.05)
        >>> print(f"{criterion(torch.zeros(2, 3), torch.eye(2, 3)):.4f}")
        0.7912
    """

    def __init__(
        self,
        gamma_neg: float = 4.0,
        gamma_pos: float = 1.0,
        clip: float = 0.05,
        reduction: str = "sum",
        **options: Any,
    ) -> None:
        super().__init__(
            gamma=gamma_pos, reduction=reduction, gamma_neg=gamma_neg, clip=clip, **{"alpha": -1.0, **options}
        )
