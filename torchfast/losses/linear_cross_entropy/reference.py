"""The two steps, a linear layer and cross_entropy, in differentiable PyTorch: what the chunks must equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchfast._register import registry
from torchfast.losses.cross_entropy.options import Options

row_losses = registry["cross_entropy"]


class Arguments(NamedTuple):
    """The dispatcher op's arguments, with its options as one object. Dimensions but a tensor's last are merged."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    weight: Tensor | None
    alpha: Tensor | None
    sample_weight: Tensor | None
    options: Options
    """The options of cross_entropy, whose gradient is always written over the logits of a chunk."""
    chunk_size: int
    """0 means the default."""
    dtype: torch.dtype
    """The dtype of the matrix products, and so of the logits."""
    gradients: Sequence[bool]
    """True for each of input, linear_weight and linear_bias whose gradient is computed."""

    @property
    def wide(self) -> torch.dtype:
        """The dtype of the loss and of sums over rows."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def widens(self) -> bool:
        """True if the device multiplies half precision into fp32."""
        return self.dtype != self.wide and self.input.device.type == "cuda" and torch.version.hip is None


def reference(*arguments: Any) -> tuple[Tensor]:
    """Computes what is differentiable in every way and by every tensor, and holds the logits."""
    a = Arguments(*arguments)
    bias = None if a.linear_bias is None else a.linear_bias.to(a.dtype)
    logits = nn.functional.linear(a.input.to(a.dtype), a.linear_weight.to(a.dtype), bias)
    options = replace(a.options, inplace_backward=False)
    return (row_losses(logits, a.target, a.weight, a.alpha, a.sample_weight, *options.flat),)
