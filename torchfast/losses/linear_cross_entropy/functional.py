"""The public function: what it takes, what it refuses, what it returns."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from torchfast._common import (
    accumulate_dtype,
    check,
    check_device,
    check_logits,
    normalized,
)
from torchfast._options import as_object
from torchfast._register import Sample, register
from torchfast.losses.cross_entropy.functional import check_tensors
from torchfast.losses.cross_entropy.options import Options
from torchfast.losses.linear_cross_entropy.chunks import backward, fake, forward
from torchfast.losses.linear_cross_entropy.reference import Arguments, reference

_HALF = (torch.bfloat16, torch.float16)


def _cpu_multiplies(dtype: torch.dtype) -> bool:
    """True if this CPU's products of matrices of that dtype are no slower than those of fp32 copies."""
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    return torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, name)()


_WIDENED_ON_CPU = tuple(dtype for dtype in _HALF if not _cpu_multiplies(dtype))


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
    alpha: float | Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    sample_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    empty: str = "nan",
    chunk_size: int | None = None,
) -> Tensor:
    r"""Cross entropy of ``input @ linear_weight.T + linear_bias``, without holding these logits.

    With :math:`x = W h + b` for each hidden state :math:`h`, the loss of :func:`torchfast.cross_entropy`:

    .. math:: l = \sum_c w_c\,\alpha_c\,q_c\,(1-p_c)^\gamma\,(-\log p_c) + \text{z\_loss}\cdot\operatorname{lse}(z)^2

    Computed in chunks of rows. The forward also computes the gradients (of a sum or a mean; with ``"none"`` the
    backward does, from new logits), so what is held at a time is one chunk's logits and the gradients. The idea is
    that of Liger-Kernel's and torch's fused linear cross entropy.

    Args:
        input: hidden states, float32/64, bfloat16 or float16, shape ``(..., D)``, any strides.
        linear_weight: the classifier, shape ``(V, D)``, dtype of ``input`` (any under autocast). May be the
            embedding that ``input`` was made with.
        target: class indices of any integer dtype, shape ``(...)``; or class probabilities of any floating dtype,
            shape ``(..., V)``.
        linear_bias: shape ``(V,)``, dtype as ``linear_weight``.
        weight, ignore_index, reduction, label_smoothing, gamma, alpha, z_loss, softcap, logit_scale,
            sample_weight, normalizer, empty: as of :func:`torchfast.cross_entropy`, where C is V. Also the hidden
            state of an ignored row may hold anything; on the CPU such rows cost no time.
        chunk_size: rows of a chunk. By default as many as make 20 million logits on the CPU and 128 million on
            GPUs, but at least 128 or 1024.

    Returns:
        The loss: a scalar, or shape ``(...)`` with ``"none"``. float64 for float64 inputs, otherwise float32. The
        gradients have the dtypes of their tensors, and are summed over rows in float32 where these are half
        precision. No gradient is computed for a tensor that does not require one.

    Raises:
        ValueError, TypeError: an argument has a wrong value, shape, device or dtype.
        IndexError: a class index is out of range, as in :func:`torchfast.cross_entropy`.

    Gradients with respect to probabilities, ``weight``, ``alpha`` and ``sample_weight``, double backward,
    ``torch.func`` transforms and forward-mode AD work too, but take the two steps and hold the logits.

    Example:
        >>> import torch, torchfast
        >>> hidden = torch.linspace(-1, 1, 12).view(2, 3, 2).requires_grad_()
        >>> classifier = torch.linspace(1, -1, 10).view(5, 2).requires_grad_()
        >>> target = torch.tensor([[0, 1, 2], [3, 4, -100]])
        >>> loss = torchfast.linear_cross_entropy(hidden, classifier, target, label_smoothing=0.1)
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}", tuple(hidden.grad.shape), tuple(classifier.grad.shape))
        2.4071 (2, 3, 2) (5, 2)
    """
    dtype = _check_and_choose_dtype(input, linear_weight, linear_bias)
    if isinstance(alpha, (int, float)):
        alpha = torch.full((1,), alpha, dtype=accumulate_dtype(input), device=input.device)
    shape, classes = input.shape[:-1], linear_weight.shape[0]
    factors = {"weight": weight, "alpha": alpha, "sample_weight": sample_weight}
    check_tensors(target, factors, input, "logits", (*shape, classes), len(shape))
    options = Options.of(
        target,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        gamma=gamma,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        normalizer=normalizer,
        empty=empty,
        inplace_backward=True,
    )
    whole = isinstance(chunk_size, int) and not isinstance(chunk_size, bool) and chunk_size > 0
    check("chunk_size", chunk_size is None or whole, chunk_size, "None or an integer > 0")
    rows = math.prod(shape)
    # With "none" each row has an upstream gradient of its own, so the backward computes the gradients.
    ahead = reduction != "none" and torch.is_grad_enabled()
    arguments = Arguments(
        input.reshape(rows, input.shape[-1]),
        linear_weight,
        linear_bias,
        target.reshape(rows, classes) if target.is_floating_point() else target.reshape(rows),
        weight,
        alpha,
        None if sample_weight is None else sample_weight.reshape(rows),
        options,
        chunk_size or 0,
        dtype,
        [ahead and t is not None and t.requires_grad for t in (input, linear_weight, linear_bias)],
    )
    loss = _op(*arguments[:_TENSORS], *options.flat, *arguments[_TENSORS + 1 :])
    return normalized(loss if reduction != "none" else loss.reshape(shape), normalizer)


def _check_and_choose_dtype(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> torch.dtype:
    """The dtype of the logits."""
    check_logits("input", input)
    if input.dim() == 0:
        raise ValueError("input must have shape (..., D), got a scalar")
    check_logits("linear_weight", linear_weight)
    if linear_bias is not None:
        check_logits("linear_bias", linear_bias)
    features = input.shape[-1]
    shape = tuple(linear_weight.shape)
    wanted = f"(V, {features}), V > 0, for input of shape {tuple(input.shape)}"
    check("linear_weight's shape", len(shape) == 2 and shape[0] > 0 and shape[1] == features, shape, wanted)
    kind = input.device.type
    # Meta tensors have no autocast, and asking for it raises.
    autocast = kind != "meta" and torch.is_autocast_enabled(kind) and input.dtype != torch.float64
    for name, tensor in ("linear_weight", linear_weight), ("linear_bias", linear_bias):
        if tensor is None:
            continue
        check_device(name, tensor, "input", input)
        if tensor.dtype != input.dtype and not autocast:
            raise TypeError(f"{name} must have input's dtype {input.dtype} outside of autocast, got {tensor.dtype}")
    if linear_bias is not None:
        check("linear_bias's shape", linear_bias.shape == shape[:1], tuple(linear_bias.shape), shape[:1])
    dtype = torch.get_autocast_dtype(kind) if autocast else input.dtype
    return torch.float32 if kind == "cpu" and dtype in _WIDENED_ON_CPU else dtype


# ---- Sample inputs: what the generic tests and selftest run ----------------------------------


def sample_inputs(device: str = "cpu", dtype: torch.dtype = torch.float32, *, large: bool = False) -> Iterator[Sample]:
    """One call per option and kind of target; with ``large`` also one of many rows and classes."""
    g = torch.Generator(device="cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(device, dtype)

    def indices(classes: int, *shape: int) -> Tensor:
        return torch.randint(classes, shape, generator=g).to(device)

    def positive(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=g, dtype=torch.float64) + 0.5).to(device, dtype)

    for classes in (3, 70):
        h, w, b, t = normal(5, 4), normal(classes, 4), normal(classes), indices(classes, 5)
        t[1] = -100
        soft = normal(5, classes).softmax(1)
        yield Sample((h, w, t), {"linear_bias": b, "gamma": 1.5, "label_smoothing": 0.1, "chunk_size": 2})
        yield Sample((h, w, t), {"weight": positive(classes), "sample_weight": positive(5), "reduction": "sum"})
        yield Sample((h, w, t), {"linear_bias": b, "alpha": positive(classes), "reduction": "none", "chunk_size": 2})
        yield Sample((h, w, soft), {"z_loss": 1e-2, "softcap": 5.0, "logit_scale": 0.7, "reduction": "none"})
    yield Sample((normal(4), normal(7, 4), indices(7)), {})
    yield Sample((normal(2, 3, 4), normal(4, 7).t(), indices(7, 2, 3)), {"normalizer": 3.0})
    if large:
        h, w, t = normal(300, 20), normal(9000, 20), indices(9000, 300)
        for reduction in ("mean", "none"):
            yield Sample((h, 0.3 * w, t), {"linear_bias": normal(9000), "reduction": reduction})


# ---- Registration: chunks.py serves every device, and the kernels of cross_entropy each chunk -----

_TENSORS = 7

_op = register(
    "linear_cross_entropy",
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, Tensor? alpha, "
    f"Tensor? sample_weight, {Options.schema()}, int chunk_size, ScalarType dtype, bool[3] gradients",
    "Tensor scale, Tensor grad_input, Tensor grad_weight, Tensor grad_bias",
    function=linear_cross_entropy,
    reference=as_object(reference, Options, _TENSORS),
    reference_backward=as_object(backward, Options, 1 + _TENSORS),
    kernel=as_object(forward, Options, _TENSORS),
    fake=as_object(fake, Options, _TENSORS),
    sample_inputs=sample_inputs,
    around="cross_entropy",
)
