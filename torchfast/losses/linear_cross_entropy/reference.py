"""The two steps, a linear layer and cross_entropy, in differentiable PyTorch: what the chunks must equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchfast._register import registry

row_losses = registry["cross_entropy"]


class Arguments(NamedTuple):
    """Those of the dispatcher op. All dimensions of the tensors but the last are merged into rows."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    weight: Tensor | None
    alpha: Tensor | None
    sample_weight: Tensor | None
    ignore_index: int
    reduction: int
    label_smoothing: float
    gamma: float
    z_loss: float
    softcap: float
    logit_scale: float
    empty_zero: bool
    chunk_size: int
    """0 is the default."""
    dtype: torch.dtype
    """The dtype of the matrix products, and so of the logits."""
    gradients: Sequence[bool]
    """Which gradients are computed: those of input, linear_weight and linear_bias."""

    @property
    def wide(self) -> torch.dtype:
        """The dtype of the loss and of sums over rows."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def widens(self) -> bool:
        """Whether the device multiplies half precision into fp32."""
        return self.dtype != self.wide and self.input.device.type == "cuda" and torch.version.hip is None

    def options(self, reduction: int, inplace_backward: bool) -> tuple[Any, ...]:
        """Those of the op cross_entropy."""
        return (
            self.ignore_index,
            reduction,
            self.label_smoothing,
            self.gamma,
            self.z_loss,
            self.softcap,
            self.logit_scale,
            self.empty_zero,
            inplace_backward,
        )


def reference(*arguments: Any) -> tuple[Tensor]:
    """Is differentiable in every way and by every tensor, and holds the logits."""
    a = Arguments(*arguments)
    bias = None if a.linear_bias is None else a.linear_bias.to(a.dtype)
    logits = nn.functional.linear(a.input.to(a.dtype), a.linear_weight.to(a.dtype), bias)
    options = a.options(a.reduction, inplace_backward=False)
    return (row_losses(logits, a.target, a.weight, a.alpha, a.sample_weight, *options),)
