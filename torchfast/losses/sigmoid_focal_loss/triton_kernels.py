"""Triton kernels of the sigmoid loss family, for GPUs. Formula and names are those of the package.

The tensors are walked as three dimensions (outer, row, column), in the order of the logits' memory; a program owns a
tile of M rows x BLOCK columns of one outer index. Whatever is the same for all columns (a row's class id, a mask a
row) is read once a row. Forward reads the logits and targets once, and writes the loss, or one sum a program;
backward reads them once and writes the gradient once. Nothing of the size of the logits is kept between them.

- A hard target (bool, integers, class ids) without smoothing and clip, and with one gamma, needs only one of the two
  parts: that of x = -z for a positive, x = z for a negative. Half of the arithmetic.
- Whole powers up to 4 are products; others are exp(-gamma softplus), for which the logarithm is there already.

Nothing is added up atomically. Tiles are chosen, and the kernels launched, in triton_launch.py.
"""

import triton
import triton.language as tl

from torchfast.losses.triton_kernels import exp, in_vectors, log1p, number, offsets_of, rows_of

#: Kinds of targets.
SOFT, BOOL, INTEGER, INDEX = (tl.constexpr(kind) for kind in range(4))


@triton.jit
def _load(tensor, strides, place, end, VEC: tl.constexpr, BY_ROW: tl.constexpr):
    """Loads a tile, or one column of a tensor that is the same for all columns."""
    outer, i, c, in_range = place
    if BY_ROW:
        so, sr, _ = strides
        return tl.load(tensor + (outer * so + i * sr)[:, None], mask=in_range[:, None], other=0)
    else:
        mask = in_range[:, None] & (c < end)[None, :]
        return tl.load(tensor + offsets_of(outer, i, c, strides, VEC, True), mask=mask, other=0)


@triton.jit
def _factors(
    tensors,
    strides,
    place,
    end,
    classes,
    options,
    KIND: tl.constexpr,
    CLASS_AXIS: tl.constexpr,
    VEC: tl.constexpr,
    BY_ROW: tl.constexpr,
    ACC: tl.constexpr,
):
    """Returns A, B, and if the target is a positive, the element counts, its integer target is out of range."""
    target, weight, pos_weight, mask = tensors
    keep, half = number(options.keep, ACC), number(options.half, ACC)
    outer, i, c, in_range = place
    there = in_range[:, None] & (c < end)[None, :]
    t = _load(target, strides[2], place, end, VEC, BY_ROW[0])
    bad = there
    if KIND == INDEX or KIND == INTEGER:
        if t.dtype.primitive_bitwidth < 32:
            t = t.to(tl.int32)  # in int32, -1 and any ignore_index differ from all values
        ignored = t == options.ignore_index
        if KIND == INDEX:
            out = (ignored == 0) & ((t < -1) | (t >= classes))
            t = tl.where(ignored | out, -1, t).to(tl.int32)
            if CLASS_AXIS == 2:
                hit = t == c[None, :]
            elif CLASS_AXIS == 1:
                hit = t == i.to(tl.int32)[:, None]
            elif CLASS_AXIS == 0:
                hit = t == outer.to(tl.int32)
            else:  # the only class
                hit = t == 0
        else:
            out = (ignored == 0) & (t != 0) & (t != 1)
            hit = t == 1
        bad = there & out
        counts = there & ((ignored | out) == 0)
    else:
        counts = there
        hit = t != 0
    if mask is not None:
        shown = _load(mask, strides[5], place, end, VEC, BY_ROW[3]) != 0
        counts = counts & shown
        bad = bad & shown
    if KIND == SOFT:
        y = t.to(ACC)
        a = keep * y + half
        b = keep * (1 - y) + half
    else:
        a = tl.where(hit, keep + half, half)
        b = tl.where(hit, half, keep + half)
    a = tl.broadcast_to(number(options.positive, ACC) * a, there.shape)
    b = tl.broadcast_to(number(options.negative, ACC) * b, there.shape)
    if pos_weight is not None:
        a = a * _load(pos_weight, strides[4], place, end, VEC, BY_ROW[2]).to(ACC)
    if weight is not None:
        w = _load(weight, strides[3], place, end, VEC, BY_ROW[1]).to(ACC)
        a = a * w
        b = b * w
    return a, b, hit, counts, bad


@triton.jit
def _log1p_unit(e):
    """log(1 + e) for e in [0, 1]: e times a polynomial fitted to log1p(e) / e, relative error 3e-8."""
    if e.dtype == tl.float64:
        return log1p(e)
    q = e * 0.005232686176896095 - 0.029505211859941483
    q = q * e + 0.07822591811418533
    q = q * e - 0.13663244247436523
    q = q * e + 0.19106006622314453
    q = q * e - 0.2484298199415207
    q = q * e + 0.3331909775733948
    q = q * e - 0.4999949336051941
    return e * (q * e + 0.9999999403953552)


@triton.jit
def _sigmoid(z, FAST: tl.constexpr):
    """p, 1 - p, -log p and -log(1 - p)."""
    e = exp(-tl.abs(z), FAST)
    inverse = 1 / (1 + e)
    small = e * inverse
    log = _log1p_unit(e)
    positive = z >= 0
    p, q = tl.where(positive, inverse, small), tl.where(positive, small, inverse)
    return p, q, log + tl.maximum(-z, 0.0), log + tl.maximum(z, 0.0)


@triton.jit
def _power(p, minus_log_p, gamma, POWER: tl.constexpr, FAST: tl.constexpr):
    """p^gamma. POWER is gamma if that is 0, 1, 2, 3 or 4, else 5."""
    if POWER == 0:
        return tl.full(p.shape, 1.0, p.dtype)
    elif POWER == 1:
        return p
    elif POWER == 2:
        return p * p
    elif POWER == 3:
        return p * p * p
    elif POWER == 4:
        return (p * p) * (p * p)
    else:
        return exp(-gamma * minus_log_p, FAST)


@triton.jit
def _part(p, q, minus_log_p, minus_log_q, gamma, POWER: tl.constexpr, FAST: tl.constexpr):
    """p^gamma (-log q), and its derivative with respect to the logit of p."""
    power = _power(p, minus_log_p, gamma, POWER, FAST)
    slope = p if POWER == 0 else p + gamma * tl.where(q == 0, 0.0, q * minus_log_q)  # 0 * inf would be NaN
    return power * minus_log_q, power * slope


@triton.jit
def _clipped_part(p, q, clip, gamma, POWER: tl.constexpr, FAST: tl.constexpr):
    """p_m^gamma (-log(1 - p_m)), and its derivative with respect to the logit of p."""
    off = p <= clip  # false for a NaN
    p_m = tl.where(off, 0.25, p - clip)
    large = p > 0.5
    rest = tl.where(large, q + clip, 1 - p_m)
    lost = 1 - rest  # log1p's correction (Goldberg 1991): only a small p_m needs it
    exact = large | (lost == 0)
    minus_log = -tl.log(rest) * tl.where(exact, 1.0, p_m / tl.where(exact, 1.0, lost))
    minus_log = tl.where((large == 0) & (lost == 0), p_m, minus_log)
    power = _power(p_m, -tl.log(p_m), gamma, POWER, FAST)
    slope = power / (q + clip)
    if POWER != 0:
        slope += gamma * power * (minus_log / p_m)
    return tl.where(off, 0.0, power * minus_log), tl.where(off, 0.0, p * q * slope)


@triton.jit
def _loss_and_slope(z, a, b, hit, options, FAST: tl.constexpr):
    """The loss, and its derivative with respect to z. A factor of 0 gives 0, whatever the logit."""
    gamma, gamma_neg = number(options.gamma, z.dtype), number(options.gamma_neg, z.dtype)
    if options.ONE_PART:
        p, q, minus_log_p, minus_log_q = _sigmoid(tl.where(hit, -z, z), FAST)
        loss, slope = _part(p, q, minus_log_p, minus_log_q, gamma, options.POWER, FAST)
        factor = tl.where(hit, a, b)
        return tl.where(factor == 0, 0.0, factor * loss), tl.where(
            factor == 0, 0.0, tl.where(hit, -1, 1) * factor * slope
        )
    p, q, minus_log_p, minus_log_q = _sigmoid(z, FAST)
    positive, positive_slope = _part(q, p, minus_log_q, minus_log_p, gamma, options.POWER, FAST)
    if options.CLIPPED:
        clip = number(options.clip, z.dtype)
        negative, negative_slope = _clipped_part(p, q, clip, gamma_neg, options.POWER_NEG, FAST)
    else:
        negative, negative_slope = _part(p, q, minus_log_p, minus_log_q, gamma_neg, options.POWER_NEG, FAST)
    loss = tl.where(a == 0, 0.0, a * positive) + tl.where(b == 0, 0.0, b * negative)
    slope = tl.where(b == 0, 0.0, b * negative_slope) - tl.where(a == 0, 0.0, a * positive_slope)
    return loss, slope


@triton.jit(do_not_specialize=["inner", "columns", "classes"], do_not_specialize_on_alignment=["divisor"])
def forward_kernel(
    logits,
    target,
    weight,
    pos_weight,
    mask,
    loss,  # one an element; with REDUCE, by program, sums of losses and then numbers of elements that count
    divisor,
    strides,
    inner,
    columns,
    classes,
    choices,  # the options: Triton's launcher has an argument of that name
    KIND: tl.constexpr,
    CLASS_AXIS: tl.constexpr,
    REDUCE: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    BY_ROW: tl.constexpr,
):
    ACC: tl.constexpr = loss.dtype.element_ty
    FAST: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth == 16
    program = tl.program_id(0)
    spans = tl.cdiv(columns, BLOCK)
    outer, i, _, in_range = rows_of(program // spans, inner, M, VEC, True)
    c = program % spans * BLOCK + tl.arange(0, BLOCK)
    end = in_vectors(columns, VEC, True)
    place = (outer, i, c, in_range)
    tensors = (target, weight, pos_weight, mask)
    a, b, hit, counts, bad = _factors(
        tensors, strides, place, end, classes, choices, KIND, CLASS_AXIS, VEC, BY_ROW, ACC
    )
    z = _load(logits, strides[0], place, end, VEC, False).to(ACC)
    value, _ = _loss_and_slope(z, a, b, hit, choices, FAST)
    value = tl.where(counts, value, 0.0)
    if KIND == INDEX or KIND == INTEGER:
        value = tl.where(bad, float("nan"), value)
    if REDUCE:
        tl.store(loss + program, tl.sum(tl.sum(value, axis=1), axis=0))
        number = tl.sum(tl.sum((counts | bad).to(ACC), axis=1), axis=0)
        tl.store(loss + tl.num_programs(0) + program, number)
    else:
        there = in_range[:, None] & (c < end)[None, :]
        tl.store(loss + offsets_of(outer, i, c, strides[1], VEC, True), value, mask=there)
        tl.store(divisor, 1.0, mask=program == 0)


@triton.jit(do_not_specialize=["inner", "columns", "classes"], do_not_specialize_on_alignment=["divisor"])
def backward_kernel(
    grad_loss,
    logits,
    target,
    weight,
    pos_weight,
    mask,
    divisor,
    gradient,
    strides,
    inner,
    columns,
    classes,
    choices,
    KIND: tl.constexpr,
    CLASS_AXIS: tl.constexpr,
    REDUCE: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    BY_ROW: tl.constexpr,
):
    ACC: tl.constexpr = divisor.dtype.element_ty
    FAST: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth == 16
    program = tl.program_id(0)
    spans = tl.cdiv(columns, BLOCK)
    outer, i, _, in_range = rows_of(program // spans, inner, M, VEC, True)
    c = program % spans * BLOCK + tl.arange(0, BLOCK)
    end = in_vectors(columns, VEC, True)
    place = (outer, i, c, in_range)
    tensors = (target, weight, pos_weight, mask)
    a, b, hit, counts, _ = _factors(tensors, strides, place, end, classes, choices, KIND, CLASS_AXIS, VEC, BY_ROW, ACC)
    z = _load(logits, strides[0], place, end, VEC, False).to(ACC)
    _, slope = _loss_and_slope(z, a, b, hit, choices, FAST)
    if REDUCE:
        n = tl.load(divisor)
        upstream = tl.load(grad_loss).to(ACC)
        upstream = tl.where(n == 0, 0.0, upstream / tl.where(n == 0, 1.0, n))
        upstream = tl.full([1, 1], 1.0, ACC) * upstream
    else:
        upstream = _load(grad_loss, strides[6], place, end, VEC, BY_ROW[4]).to(ACC)
    value = tl.where(counts & (upstream != 0), slope * upstream, 0.0)
    there = in_range[:, None] & (c < end)[None, :]
    at = gradient + offsets_of(outer, i, c, strides[1], VEC, True)
    tl.store(at, value.to(gradient.dtype.element_ty), mask=there)
