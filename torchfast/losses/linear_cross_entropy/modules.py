"""The function as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchfast.losses.cross_entropy.modules import CrossEntropyLoss
from torchfast.losses.linear_cross_entropy.functional import linear_cross_entropy


class LinearCrossEntropyLoss(CrossEntropyLoss):
    """The last linear layer and its loss: drop-in for :class:`torch.nn.LinearCrossEntropyLoss` (of one output per
    class) with every option of :func:`linear_cross_entropy`.

    ``linear`` is the classifier, a :class:`torch.nn.Linear`; to tie it to an embedding, assign
    ``criterion.linear.weight = embedding.weight``.

    Args:
        in_features: D, the features of a hidden state.
        num_classes: V, the rows of the classifier.
        bias, device, dtype: as of :class:`torch.nn.Linear`, but without a bias by default.
        chunk_size: as of :func:`linear_cross_entropy`.
        options: those of :class:`torchfast.CrossEntropyLoss`, but for ``inplace_backward``: there are no logits to
            write over.

    Example:
        >>> import torch, torchfast
        >>> criterion = torchfast.LinearCrossEntropyLoss(8, 1000, gamma=2.0)
        >>> hidden = torch.randn(4, 16, 8, requires_grad=True)
        >>> loss = criterion(hidden, torch.randint(1000, (4, 16)))
        >>> loss.backward()
        >>> tuple(criterion.linear.weight.grad.shape)
        (1000, 8)
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        chunk_size: int | None = None,
        **options: Any,
    ) -> None:
        if "inplace_backward" in options:
            raise TypeError("inplace_backward must be left out: there are no logits to write over")
        super().__init__(**options)
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.chunk_size = chunk_size

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            gamma=self.gamma,
            alpha=self.alpha,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            sample_weight=sample_weight,
            normalizer=normalizer,
            empty=self.empty,
            chunk_size=self.chunk_size,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, chunk_size={self.chunk_size}"
