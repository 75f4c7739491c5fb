r"""Softmax cross entropy of a linear layer's output, which is never held as a whole.

With hidden states h, a classifier W and its bias b: z = W h + b, and of every row z the loss of
:mod:`torchfast.losses.cross_entropy`. Its gradient g = dloss/dz gives the others::

    dloss/dh = g W        dloss/dW = sum over rows of g^T h        dloss/db = sum over rows of g

A chunk of rows at a time: its logits by one matrix product, the fused kernels of ``cross_entropy`` over them, which
write g where z was, two products with g, and the next chunk into the same memory. For a sum or a mean all this
happens in the forward, where z is at hand, for an upstream gradient of 1; the backward multiplies. Where every row has
an upstream gradient of its own (``reduction="none"``) it walks the chunks again.

So do Liger-Kernel, Apple's cut cross entropy and torch's ``F.linear_cross_entropy``, for fewer losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from torchfast._common import (
    REDUCTIONS,
    accumulate_dtype,
    check,
    check_device,
    check_logits,
    mean,
    normalized,
)
from torchfast._register import _define, registry
from torchfast.losses.cross_entropy.functional import check_tensors
from torchfast.losses.cross_entropy.modules import CrossEntropyLoss
from torchfast.losses.cross_entropy.options import Options

__all__ = ["LinearCrossEntropyLoss", "linear_cross_entropy"]

_HALF = (torch.bfloat16, torch.float16)
_row_losses = registry["cross_entropy"]
_write_gradient = torch.ops.torchfast.cross_entropy_backward_.default


class _Arguments(NamedTuple):
    """Of the dispatcher op, with all dimensions but the last of the tensors merged into rows."""

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
    """Of the matrix products, and so of the logits."""

    @property
    def wide(self) -> torch.dtype:
        """Of the loss and of sums over rows."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def widens(self) -> bool:
        """Whether the device multiplies half precision into fp32."""
        return self.dtype != self.wide and self.input.device.type == "cuda" and torch.version.hip is None

    def options(self, reduction: int) -> tuple[Any, ...]:
        """Of the op cross_entropy, with logits that its backward may overwrite."""
        return (
            self.ignore_index,
            reduction,
            self.label_smoothing,
            self.gamma,
            self.z_loss,
            self.softcap,
            self.logit_scale,
            self.empty_zero,
            True,
        )


# ---- Reference: the two steps ----------------------------------------------------------------


def _two_steps(a: _Arguments) -> Tensor:
    """What all the rest must equal, differentiable in every way and by every tensor. Holds the logits."""
    bias = None if a.linear_bias is None else a.linear_bias.to(a.dtype)
    logits = nn.functional.linear(a.input.to(a.dtype), a.linear_weight.to(a.dtype), bias)
    *options, _ = a.options(a.reduction)
    return _row_losses(logits, a.target, a.weight, a.alpha, a.sample_weight, *options, False)


# ---- Kernel: the chunks ----------------------------------------------------------------------


def _rows_of_chunk(rows: int, classes: int, device: torch.device) -> int:
    """By default: 80 MB of fp32 logits, and enough rows that reading and adding to (V, D) matrices, once a chunk, costs
    little beside the products: on the CPU 128 rows are 2% slower than 512; a GPU needs more. Chunks of equal size."""
    cpu = device.type == "cpu"
    at_most = max(128, 20 * 2**20 // classes) if cpu else max(1024, 2**27 // classes)
    chunks = max(1, -(-rows // at_most))
    return max(1, -(-rows // chunks))


def _counting(a: _Arguments) -> Tensor | None:
    """Which rows count; None: all. The others may hold anything, also in their hidden states."""
    counting = None if a.target.is_floating_point() else a.target.long() != a.ignore_index
    if a.sample_weight is not None:
        counting = a.sample_weight != 0 if counting is None else counting & (a.sample_weight != 0)
    return counting


def _divisor(a: _Arguments) -> Tensor:
    """Of a mean: the sum of sample_weight * weight[target] over the rows that count."""
    each = a.input.new_ones(a.target.shape[0], dtype=a.wide)
    if not a.target.is_floating_point():
        target = a.target.long()
        valid = (target != a.ignore_index) & (target >= 0) & (target < a.linear_weight.shape[0])
        if a.weight is not None:
            each = a.weight.to(a.wide)[torch.where(valid, target, 0)]
        each = torch.where(valid, each, 0.0)
    return (each if a.sample_weight is None else each * a.sample_weight.to(a.wide)).sum()


def _add_product(total: Tensor, x: Tensor, y: Tensor, widens: bool) -> None:
    """total += x y. Half-precision products are added up, and arrive, in the dtype of the total."""
    if x.dtype == total.dtype:
        total.addmm_(x, y)
        return
    if not widens:
        y = y.to(total.dtype)
    for start in range(0, len(total), 8192):  # so that no product is of the size of the total
        part = slice(start, start + 8192)
        if widens:
            total[part] += torch.mm(x[part], y, out_dtype=total.dtype)
        else:
            total[part].addmm_(x[part].to(total.dtype), y)


def _walk(a: _Arguments, upstream: Tensor | None, needs: tuple[bool, ...]) -> tuple[Tensor, ...]:
    """The row losses and, for an upstream gradient of each row, the gradients that are needed."""
    w = a.linear_weight.to(a.dtype)
    if 1 not in w.stride():  # every product would copy it
        w = w.contiguous()
    b = None if a.linear_bias is None else a.linear_bias.to(a.dtype)
    rows, classes, device = a.input.shape[0], w.shape[0], w.device
    counting, index = _counting(a), None
    if counting is not None and device.type == "cpu":  # others would have to wait for their device
        index, counting = counting.nonzero().squeeze(1), None
        index, rows = (None, rows) if len(index) == rows else (index, len(index))
    loss = a.input.new_zeros(a.input.shape[0], dtype=a.wide)
    gradients = _new_gradients(torch.zeros, a, needs if upstream is not None else (False, False, False))
    grad_input, grad_weight, grad_bias = gradients
    step = a.chunk_size or _rows_of_chunk(rows, classes, device)
    buffer = w.new_empty(min(step, rows), classes)
    for start in range(0, rows, step):
        chunk = slice(start, min(start + step, rows)) if index is None else index[start : start + step]
        h = a.input[chunk].to(a.dtype)
        if counting is not None:
            h = torch.where(counting[chunk].unsqueeze(1), h, 0.0)
        logits = buffer[: len(h)]
        if b is None:
            torch.mm(h, w.t(), out=logits)
        else:
            torch.addmm(b, h, w.t(), out=logits)
        sample_weight = None if a.sample_weight is None else a.sample_weight[chunk]
        call = (logits, a.target[chunk], a.weight, a.alpha, sample_weight, *a.options(REDUCTIONS["none"]))
        loss[chunk], residuals = _row_losses.forward(*call)
        if upstream is None:
            continue
        _write_gradient(upstream[chunk], *call, residuals)
        if needs[0]:
            grad_input[chunk] = torch.mm(logits, w, out_dtype=a.wide) if a.widens else torch.mm(logits, w)
        if needs[1]:
            _add_product(grad_weight, logits.t(), h, a.widens)
        if needs[2]:
            grad_bias += logits.sum(0, dtype=a.wide)
    return loss, *gradients


def _new_gradients(new: Callable[..., Tensor], a: _Arguments, needs: tuple[bool, ...]) -> list[Tensor]:
    """Of weight and bias, sums over all rows, in the dtype of sums; of the input in that of what a product gives."""
    shapes = a.input.shape, a.linear_weight.shape, a.linear_weight.shape[:1]
    dtypes = a.wide if a.widens else a.dtype, a.wide, a.wide
    each = zip(shapes, dtypes, needs, strict=True)
    return [new(shape if need else (0,), dtype=dtype, device=a.input.device) for shape, dtype, need in each]


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    """The loss, the inverse of its divisor, and the gradients that are needed: those of the loss; in fp16, which
    cannot hold p / rows, those of the sum."""
    a, needs = _Arguments(*arguments[:-3]), arguments[-3:]
    is_mean = a.reduction == REDUCTIONS["mean"]
    with torch.autocast(a.input.device.type, enabled=False):
        divisor = _divisor(a) if is_mean else a.input.new_ones((), dtype=a.wide)
        inverse = torch.where(divisor == 0, 0.0, 1 / divisor)
        unit = torch.ones_like(inverse) if a.dtype == torch.float16 else inverse
        loss, *gradients = _walk(a, unit.expand(a.input.shape[0]) if any(needs) else None, needs)
        if a.reduction != REDUCTIONS["none"]:
            loss = loss.sum()
        return mean(loss, divisor, a.empty_zero) if is_mean else loss, inverse, *gradients


def _backward(upstream: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The gradients that are needed, for an upstream gradient of each row."""
    with torch.autocast(upstream.device.type, enabled=False):
        return _walk(_Arguments(*arguments[:-3]), upstream, arguments[-3:])[1:]


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    a = _Arguments(*arguments[:-3])
    loss = a.input.new_empty(() if a.reduction else a.input.shape[:1], dtype=a.wide)
    return loss, a.input.new_empty((), dtype=a.wide), *_new_gradients(torch.empty, a, arguments[-3:])


def _fake_backward(upstream: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(_new_gradients(torch.empty, _Arguments(*arguments[:-3]), arguments[-3:]))


# ---- Registration: the kernel above serves every device, the fused rows are cross_entropy's ---

_INPUTS = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, Tensor? alpha, "
    "Tensor? sample_weight, int ignore_index, int reduction, float label_smoothing, float gamma, float z_loss, "
    "float softcap, float logit_scale, bool empty_zero, int chunk_size, ScalarType dtype, "
    "bool need_input, bool need_weight, bool need_bias"
)
_GRADIENTS = "Tensor grad_input, Tensor grad_weight, Tensor grad_bias"
_op = _define("linear_cross_entropy", f"({_INPUTS}) -> (Tensor loss, Tensor inverse, {_GRADIENTS})", _forward, _fake)
_backward_op = _define(
    "linear_cross_entropy_backward", f"(Tensor upstream, {_INPUTS}) -> ({_GRADIENTS})", _backward, _fake_backward
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7], *output[1:])
    ctx.options, ctx.computed = inputs[7:-3], inputs[-3:]
    # A hook, as of checkpointing or offloading, may keep what it hands out.
    ctx.hooked = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _gradients(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    others = (None,) * (4 + len(ctx.options) + 3)
    if grad is None:
        return None, None, None, *others
    needs = ctx.needs_input_grad[:3]
    *tensors, inverse, grad_input, grad_weight, grad_bias = ctx.saved_tensors
    a = _Arguments(*tensors, *ctx.options)
    transformed = torch._C._are_functorch_transforms_active()  # is_grads_batched=True
    if torch.is_grad_enabled() or (transformed and grad.dim()):
        return *_gradients_of_two_steps(a, grad, needs), *others
    consume = False
    if all(have or not need for have, need in zip(ctx.computed, needs, strict=True)):
        found = [grad_input, grad_weight, grad_bias]
        factor = grad * inverse if a.dtype == torch.float16 else grad
        # A graph that is kept needs them again, and so may one that is traced; another gives up their memory.
        kept = torch._C._autograd._get_current_graph_task_keep_graph() or type(grad) is not Tensor
        consume = not (kept or ctx.hooked or transformed)
        found = [
            t if not need else t.mul_(factor) if consume else t * factor for t, need in zip(found, needs, strict=True)
        ]
    else:
        found = _backward_op((grad * inverse).expand(a.input.shape[0]), *a, *needs)
    each = zip(tensors[:3], found, needs, strict=True)
    return *(gradient.to(tensor.dtype) if need else None for tensor, gradient, need in each), *others


def _gradients_of_two_steps(a: _Arguments, grad: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None]:
    """That can be differentiated again if autograd is to (create_graph=True)."""
    create_graph = torch.is_grad_enabled()
    tensors = (a.input, a.linear_weight, a.linear_bias)
    with torch.enable_grad():
        # Views: where one of the tensors is another, or was made from it, each has its own derivative.
        own = [t.view_as(t) if t is not None and need else t for t, need in zip(tensors, needs, strict=True)]
        loss = _two_steps(_Arguments(*own, *a[3:]))  # type: ignore[arg-type, call-arg]
    wanted = [t for t, need in zip(own, needs, strict=True) if t is not None and need]
    found = iter(torch.autograd.grad(loss, wanted, grad, create_graph=create_graph))
    return [next(found) if need else None for need in needs]


torch.library.register_autograd("torchfast::linear_cross_entropy", _gradients, setup_context=_setup_context)


# ---- The public function ---------------------------------------------------------------------


def _cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU's products of matrices of that dtype are no slower than of fp32 copies."""
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
    # With "none" the gradients depend on the upstream gradient of each row: the backward computes them.
    ahead = reduction != "none" and torch.is_grad_enabled()
    arguments = _Arguments(  # type: ignore[call-arg]
        input.reshape(rows, input.shape[-1]),
        linear_weight,
        linear_bias,
        target.reshape(rows, classes) if target.is_floating_point() else target.reshape(rows),
        weight,
        alpha,
        None if sample_weight is None else sample_weight.reshape(rows),
        *options.flat[:-1],
        chunk_size or 0,
        dtype,
    )
    needs = [ahead and t is not None and t.requires_grad for t in (input, linear_weight, linear_bias)]
    two_steps = _needs_two_steps(target, weight, alpha, sample_weight)
    loss = _two_steps(arguments) if two_steps else _op(*arguments, *needs)[0]
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
    # There is no autocast of meta tensors: to ask for it raises.
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


def _needs_two_steps(*others: Tensor | None) -> bool:
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(other is not None and other.requires_grad for other in others)


# ---- The module ------------------------------------------------------------------------------


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
