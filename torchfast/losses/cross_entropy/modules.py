"""The functions as modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchfast.losses.cross_entropy.functional import cross_entropy
from torchfast.losses.cross_entropy.options import PUBLIC


class CrossEntropyLoss(nn.Module):
    """Drop-in for :class:`torch.nn.CrossEntropyLoss` with every option of :func:`cross_entropy`.

    The arguments are torch's in torch's order, its deprecated ``size_average`` and ``reduce`` included, and then those
    of :func:`cross_entropy`, which has their shapes, dtypes and errors. ``weight`` and a tensor ``alpha`` are buffers:
    they move with the module. ``sample_weight`` and ``normalizer`` belong to the batch and are given to the call.

    Example:
        >>> import torch, torchfast
        >>> criterion = torchfast.CrossEntropyLoss(label_smoothing=0.1, weight=torch.tensor([1.0, 2.0]))
        >>> logits = torch.zeros(4, 2, 8, 8, requires_grad=True)
        >>> loss = criterion(logits, torch.ones(4, 8, 8, dtype=torch.long))
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}")
        0.6758
    """

    weight: Tensor | None
    alpha: float | Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        gamma: float = 0.0,
        alpha: float | Tensor | None = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        empty: str = "nan",
        inplace_backward: bool = False,
    ) -> None:
        super().__init__()
        if size_average is not None or reduce is not None:  # torch's deprecated spelling
            reduction = nn._reduction.legacy_get_string(size_average, reduce)
        self.register_buffer("weight", weight)
        if isinstance(alpha, Tensor):
            self.register_buffer("alpha", alpha)
        else:
            self.alpha = alpha
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.gamma = gamma
        self.z_loss = z_loss
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.empty = empty
        self.inplace_backward = inplace_backward

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return cross_entropy(
            input,
            target,
            self.weight,
            alpha=self.alpha,
            sample_weight=sample_weight,
            normalizer=normalizer,
            **{name: getattr(self, name) for name in PUBLIC},
        )

    def extra_repr(self) -> str:
        shown = ("gamma", "alpha", "label_smoothing", "z_loss", "softcap", "logit_scale", "reduction")
        return ", ".join(
            f"{name}={getattr(self, name)!r}" for name in shown if not isinstance(getattr(self, name), Tensor)
        )


class FocalLoss(CrossEntropyLoss):
    """Softmax focal loss (Lin et al. 2017): :class:`CrossEntropyLoss` whose first argument is ``gamma``.

    ``gamma`` and ``alpha``, then ``weight``, then by name all ``options`` of :class:`CrossEntropyLoss`.

    Example:
        >>> import torch, torchfast
        >>> criterion = torchfast.FocalLoss(gamma=2.0, alpha=0.25)
        >>> print(f"{criterion(torch.zeros(4, 10), torch.arange(4)):.4f}")
        0.4663
    """

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: float | Tensor | None = None,
        weight: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(weight, gamma=gamma, alpha=alpha, **options)


class LabelSmoothingCrossEntropy(CrossEntropyLoss):
    """Cross entropy with label smoothing (Szegedy et al. 2016): :class:`CrossEntropyLoss` whose first argument is it.

    ``smoothing`` is the ``label_smoothing`` of :func:`cross_entropy`; ``options`` are those of
    :class:`CrossEntropyLoss`.

    Example:
        >>> import torch, torchfast
        >>> criterion = torchfast.LabelSmoothingCrossEntropy(0.1)
        >>> print(f"{criterion(torch.eye(3), torch.arange(3)):.4f}")
        0.6181
    """

    def __init__(self, smoothing: float = 0.1, weight: Tensor | None = None, **options: Any) -> None:
        super().__init__(weight, label_smoothing=smoothing, **options)
