"""Triton kernels of the softmax loss family, for GPUs. Formula and names are those of the package.

A program owns a tile of M rows x BLOCK classes. The axis of the tile with stride 1 (classes of (N, C)
and channels_last, positions of (N, C, H, W)) is accessed in vectors of 16 bytes where alignment and
length allow (VEC elements).

- Forward reads the logits once. Two halves of a block are paired, element by element, and each pair is
  merged into its lane's (m, rest): the maximum so far, and sum exp(z - m) without the largest term. One
  exponential an element, no reduction and no barrier until the row ends. Few long rows are split over
  programs, whose partial results a last launch adds up in a fixed order.
- Only a focal loss whose target is dense (smoothed, or probabilities) needs p before it can sum: it
  reads each row again, from cache.
- Backward is elementwise, given three numbers a row. It reads the logits once and writes the gradient once.
- Options that are off cost nothing: they are compile-time constants, and absent tensors are None.

Nothing is added up atomically. Tiles are chosen, and the kernels launched, in triton_launch.py.

Tried: merging element by element without pairs takes 18 instructions an element instead of 12. Peeling
ragged rows (C = 50257) to their aligned part needs every load three times in the code; masked 2-byte
loads of neighbouring lanes still coalesce into full sectors.
"""

# Without `from __future__ import annotations`: that turns "fp64" into "'fp64'", a type that Triton does not know and
# passes over, so that float64 losses would take their options in fp32.
import triton
import triton.language as tl

from torchfast.losses.triton_kernels import exp, in_vectors, log1p, offsets_of, rows_of


@triton.jit
def _tanh(x, FAST: tl.constexpr):
    """By expm1(-2|x|), which has the digits of a small x (Kahan): (u - 1) log(u) / y with u = exp(y)."""
    y = -2 * tl.abs(x)
    u = exp(y, FAST)
    easy = (u == 1) | (u == 0)
    expm1 = tl.where(u == 1, y, tl.where(u == 0, -1.0, (u - 1) * (y / tl.log(tl.where(easy, 0.5, u)))))
    magnitude = -expm1 / (2 + expm1)
    return tl.where(x < 0, -magnitude, magnitude)


# ---- Pieces of the formula --------------------------------------------------------------------


@triton.jit
def _load_z(logits, offsets, mask, scale, cap, SCALED: tl.constexpr, CAPPED: tl.constexpr, ACC: tl.constexpr):
    FAST: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth == 16
    z = tl.load(logits + offsets, mask=mask, other=-float("inf")).to(ACC)
    if SCALED:
        z = z * scale
    if CAPPED:
        z = cap * _tanh(z / cap, FAST)
    if SCALED or CAPPED:
        z = tl.where(mask, z, -float("inf"))
    return z


@triton.jit
def _load_u(target, offsets, wa, wa_stride, c, classes, mask, keep, uniform, PROB: tl.constexpr, ACC: tl.constexpr):
    """u of a block of classes; an index target's own class is left to the caller."""
    if PROB:
        u = keep * tl.load(target + offsets, mask=mask, other=0.0).to(ACC) + uniform
    else:
        u = tl.zeros(mask.shape, ACC) + uniform
    if wa is not None:
        u = u * tl.load(wa + (c * wa_stride)[None, :], mask=(c < classes)[None, :], other=0.0).to(ACC)
    return tl.where(mask, u, 0.0)


@triton.jit
def _p_and_rest(d, rest, inverse, FAST: tl.constexpr):
    """p and 1 - p, from d = z - m and inverse = 1 / (1 + rest)."""
    p = exp(d, FAST) * inverse
    return p, tl.where(d == 0, rest * inverse, 1 - p)  # only the largest, d = 0, can have p > 1/2


@triton.jit
def _psi(minus_log_p, p, rest_p, gamma, FOCAL: tl.constexpr, FAST: tl.constexpr):
    """(1 - p)^gamma, and psi. FOCAL: 0 is gamma 0, 2 is gamma 2, 1 any other."""
    p_log = tl.where(p == 0, 0.0, p * minus_log_p)
    if FOCAL == 0:
        modulation = tl.full(p.shape, 1.0, p.dtype)
        psi = -modulation
    elif FOCAL == 2:  # no power, no division, and for a small p one rounding
        modulation = tl.where(p > 0.5, rest_p * rest_p, 1 + p * (p - 2))
        psi = -(modulation + 2 * p_log * rest_p)
    else:
        modulation = tl.where(rest_p == 0, 0.0, exp(gamma * tl.log(rest_p), FAST))
        psi = -modulation * (1 + gamma * tl.where(rest_p == 0, p, p_log / rest_p))
    return modulation, psi


@triton.jit
def _pair(a, b, FAST: tl.constexpr):
    """(m, rest) of two logits."""
    return tl.maximum(a, b), tl.where(a == b, 1.0, exp(-tl.abs(a - b), FAST))


@triton.jit
def _merge(m, rest, m_b, rest_b, FAST: tl.constexpr):
    """(m, rest) of two sets of logits."""
    larger = m_b > m
    e = tl.where(m == m_b, 1.0, exp(-tl.abs(m - m_b), FAST))
    rest = tl.where(larger, rest_b, rest) + (tl.where(larger, rest, rest_b) + 1) * e
    return tl.maximum(m, m_b), rest


@triton.jit
def _merge_lanes(m, rest, FAST: tl.constexpr):
    """(m, rest) of each row from those of its lanes; rest = -1 is a lane that saw nothing."""
    top = tl.max(m, axis=1)
    tops = m == top[:, None]
    below = tl.where(tops, rest, (rest + 1) * exp(m - top[:, None], FAST))
    return top, tl.sum(below, axis=1) + (tl.sum(tops.to(rest.dtype), axis=1) - 1)


@triton.jit
def _row_target(target, sample_weight, row, in_range, ignore_index, classes, PROB: tl.constexpr, ACC: tl.constexpr):
    """Class, has one, it is out of range, sample weight, counts. No address is made of a bad class."""
    if PROB:
        t = tl.zeros(row.shape, tl.int32)
        known = in_range
        bad = in_range & (t != 0)
    else:
        t = tl.load(target + row, mask=in_range, other=0).to(tl.int64)
        given = in_range & (t != ignore_index)
        bad = given & ((t < 0) | (t >= classes))
        known = given & (bad == 0)
        t = tl.where(known, t, 0).to(classes.dtype)
    if sample_weight is not None:
        s = tl.load(sample_weight + row, mask=in_range, other=0.0).to(ACC)
    else:
        s = tl.full(row.shape, 1.0, ACC)
    return t, known, bad, s, known & (s != 0)


# ---- Forward ----------------------------------------------------------------------------------


@triton.jit
def _step(
    start,
    shift,
    tensors,
    place,
    strides,
    numbers,
    FIRST: tl.constexpr,
    PROB: tl.constexpr,
    LINEAR: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    CLASSES_MINOR: tl.constexpr,
    ACC: tl.constexpr,
):
    """A block of classes in two halves: (m, rest) of each pair. With LINEAR also the sums of u and u (z - shift), of
    which sum u log p is made; the first half's maximum becomes the shift, about m, which keeps the digits. An index
    target's u are in units of `uniform`: one rounding at the end instead of one in each term."""
    FAST: tl.constexpr = tensors[0].dtype.element_ty.primitive_bitwidth == 16
    logits, target, wa = tensors
    outer, i, read, classes_end = place
    x_outer, x_row, x_class, y_outer, y_row, y_class, wa_stride = strides
    keep, uniform, cap, scale = numbers
    unit = uniform if PROB else tl.full([], 1.0, ACC)
    c = start + tl.arange(0, BLOCK // 2)
    for half in tl.static_range(2):
        c_half = c + half * (BLOCK // 2)
        mask = read[:, None] & (c_half < classes_end)[None, :]
        offsets = offsets_of(outer, i, c_half, x_outer, x_row, x_class, VEC, CLASSES_MINOR)
        z = _load_z(logits, offsets, mask, scale, cap, SCALED, CAPPED, ACC)
        if LINEAR:
            if FIRST and half == 0:
                shift = tl.max(z, axis=1)
                shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
            y_offsets = offsets_of(outer, i, c_half, y_outer, y_row, y_class, VEC, CLASSES_MINOR) if PROB else 0
            u = _load_u(target, y_offsets, wa, wa_stride, c_half, classes_end, mask, keep, unit, PROB, ACC)
            uz = tl.where(u == 0, 0.0, u * (z - shift[:, None]))
        else:
            u, uz = z, z
        if half == 0:
            z_first, u_sums, uz_sums = z, u, uz
        else:
            m, rest = _pair(z_first, z, FAST)
            u_sums += u
            uz_sums += uz
    return m, rest, u_sums, uz_sums, shift


#: What a launch of the forward does: the whole, or one of the stages over split rows.
WHOLE, SCAN, SUM, FINISH = (tl.constexpr(stage) for stage in range(4))


@triton.jit(do_not_specialize=["rows", "inner", "classes", "splits", "ignore_index"])
def forward_kernel(
    logits,
    target,
    weight,
    wa,  # weight * alpha
    sample_weight,
    loss,  # by row, or with REDUCE by program: sums of losses, then of weights
    residuals,
    partials,  # of split rows: [plane, split, row]
    rows,
    inner,
    classes,
    splits,
    x_outer,
    x_row,
    x_class,
    y_outer,
    y_row,
    y_class,
    wa_stride,
    ignore_index,
    keep: "fp64",
    uniform: "fp64",
    gamma: "fp64",
    z_loss: "fp64",
    cap: "fp64",
    scale: "fp64",
    PROB: tl.constexpr,
    DENSE: tl.constexpr,
    FOCAL: tl.constexpr,
    Z: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    REDUCE: tl.constexpr,
    STAGE: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    CLASSES_MINOR: tl.constexpr,
):
    ACC: tl.constexpr = loss.dtype.element_ty
    FAST: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth == 16
    keep, uniform, gamma = tl.full([], keep, ACC), tl.full([], uniform, ACC), tl.full([], gamma, ACC)
    z_loss, cap, scale = tl.full([], z_loss, ACC), tl.full([], cap, ACC), tl.full([], scale, ACC)
    LINEAR: tl.constexpr = DENSE and FOCAL == 0  # sum u log p needs no p: one pass is enough
    program = tl.program_id(0)
    block, first, end = program, 0, classes
    split = 0
    if STAGE == SCAN or STAGE == SUM:
        block, split = program // splits, program % splits
        per_split = tl.cdiv(tl.cdiv(classes, BLOCK), splits) * BLOCK
        first = split * per_split
        end = tl.minimum(first + per_split, classes)
    outer, i, row, in_range = rows_of(block, inner, M, VEC, CLASSES_MINOR)
    t, known, bad, s, live = _row_target(target, sample_weight, row, in_range, ignore_index, classes, PROB, ACC)
    # Rows that do not count are not read, unless that would break the vectors along the rows.
    read = live if CLASSES_MINOR else in_range
    classes_end = in_vectors(classes, VEC, CLASSES_MINOR)

    if STAGE == WHOLE or STAGE == SCAN:
        tensors, place = (logits, target, wa), (outer, i, read, classes_end)
        strides = (x_outer, x_row, x_class, y_outer, y_row, y_class, wa_stride)
        numbers = (keep, uniform, cap, scale)
        m, rest, u_sums, uz_sums, shift = _step(
            first,
            tl.zeros([M], ACC),
            tensors,
            place,
            strides,
            numbers,
            True,
            PROB,
            LINEAR,
            SCALED,
            CAPPED,
            BLOCK,
            VEC,
            CLASSES_MINOR,
            ACC,
        )
        if not ONE_BLOCK:
            for start in range(first + BLOCK, end, BLOCK):
                m_b, rest_b, u, uz, _ = _step(
                    start,
                    shift,
                    tensors,
                    place,
                    strides,
                    numbers,
                    False,
                    PROB,
                    LINEAR,
                    SCALED,
                    CAPPED,
                    BLOCK,
                    VEC,
                    CLASSES_MINOR,
                    ACC,
                )
                m, rest = _merge(m, rest, m_b, rest_b, FAST)
                if LINEAR:
                    u_sums += u
                    uz_sums += uz
        m, rest = _merge_lanes(m, rest, FAST)
        if LINEAR:
            u_sum, uz_sum = tl.sum(u_sums, axis=1), tl.sum(uz_sums, axis=1)
    else:
        k = tl.arange(0, SPLITS)
        at = partials + k[None, :].to(tl.int64) * rows + row[:, None]
        there = in_range[:, None] & (k < splits)[None, :]
        plane = splits.to(tl.int64) * rows
        m = tl.load(at, mask=there, other=-float("inf"))
        m, rest = _merge_lanes(m, tl.load(at + plane, mask=there, other=-1.0), FAST)
        if LINEAR:
            shifts = tl.load(at + 4 * plane, mask=there, other=-float("inf"))
            shift = tl.max(shifts, axis=1)
            u_sums = tl.load(at + 2 * plane, mask=there, other=0.0)
            moved = tl.where(u_sums == 0, 0.0, u_sums * (shifts - shift[:, None]))
            u_sum = tl.sum(u_sums, axis=1)
            uz_sum = tl.sum(tl.load(at + 3 * plane, mask=there, other=0.0) + moved, axis=1)

    here = partials + split.to(tl.int64) * rows + row if STAGE == SCAN or STAGE == SUM else partials
    if STAGE == SCAN:
        plane = splits.to(tl.int64) * rows
        tl.store(here, m, mask=in_range)
        tl.store(here + plane, rest, mask=in_range)
        if LINEAR:
            tl.store(here + 2 * plane, u_sum, mask=in_range)
            tl.store(here + 3 * plane, uz_sum, mask=in_range)
            tl.store(here + 4 * plane, shift, mask=in_range)
    else:
        rest = tl.where(tl.abs(m) == float("inf"), float("nan"), rest)  # as torch: no softmax without a maximum
        log_rest, inverse = log1p(rest), 1 / (1 + rest)
        row_loss = tl.zeros([M], ACC)
        sum_u_psi = tl.zeros([M], ACC)
        if LINEAR:
            if not PROB:
                u_sum, uz_sum = u_sum * uniform, uz_sum * uniform
            row_loss = tl.where(u_sum == 0, 0.0, u_sum * ((m - shift) + log_rest)) - uz_sum
            sum_u_psi = -u_sum
        if DENSE and FOCAL > 0:
            if STAGE == FINISH:
                plane = splits.to(tl.int64) * rows
                row_loss = tl.sum(tl.load(at + 2 * plane, mask=there, other=0.0), axis=1)
                sum_u_psi = tl.sum(tl.load(at + 3 * plane, mask=there, other=0.0), axis=1)
            else:
                HALF: tl.constexpr = BLOCK // 2
                losses = tl.zeros([M, HALF], ACC)
                u_psis = tl.zeros([M, HALF], ACC)
                for start in range(first, end, HALF):
                    c = start + tl.arange(0, HALF)
                    mask = read[:, None] & (c < classes_end)[None, :]
                    offsets = offsets_of(outer, i, c, x_outer, x_row, x_class, VEC, CLASSES_MINOR)
                    z = _load_z(logits, offsets, mask, scale, cap, SCALED, CAPPED, ACC)
                    y_offsets = offsets_of(outer, i, c, y_outer, y_row, y_class, VEC, CLASSES_MINOR) if PROB else 0
                    u = _load_u(target, y_offsets, wa, wa_stride, c, classes_end, mask, keep, uniform, PROB, ACC)
                    d = z - m[:, None]
                    p, rest_p = _p_and_rest(d, rest[:, None], inverse[:, None], FAST)
                    modulation, psi = _psi(log_rest[:, None] - d, p, rest_p, gamma, FOCAL, FAST)
                    losses += tl.where(u == 0, 0.0, u * modulation * (log_rest[:, None] - d))
                    u_psis += tl.where(u == 0, 0.0, u * psi)
                row_loss, sum_u_psi = tl.sum(losses, axis=1), tl.sum(u_psis, axis=1)
        if STAGE == SUM:
            plane = splits.to(tl.int64) * rows
            tl.store(here + 2 * plane, row_loss, mask=in_range)
            tl.store(here + 3 * plane, sum_u_psi, mask=in_range)
        else:
            if not PROB:
                u = tl.zeros([M], ACC) + keep
                if wa is not None:
                    u = u * tl.load(wa + t * wa_stride, mask=live, other=0.0).to(ACC)
                z = _load_z(
                    logits,
                    outer * x_outer + i * x_row + t.to(tl.int64) * x_class,
                    live,
                    scale,
                    cap,
                    SCALED,
                    CAPPED,
                    ACC,
                )
                d = z - m
                p, rest_p = _p_and_rest(d, rest, inverse, FAST)
                modulation, psi = _psi(log_rest - d, p, rest_p, gamma, FOCAL, FAST)
                row_loss += tl.where(u == 0, 0.0, u * modulation * (log_rest - d))
                sum_u_psi += tl.where(u == 0, 0.0, u * psi)
            if Z:
                row_loss += z_loss * (m + log_rest) * (m + log_rest)
            row_loss = tl.where(bad, float("nan"), tl.where(live, row_loss * s, 0.0))
            rows_wide = in_vectors(rows.to(tl.int64), VEC, not CLASSES_MINOR)
            tl.store(residuals + row, tl.where(live, m, 0.0), mask=in_range)
            tl.store(residuals + rows_wide + row, tl.where(live, rest, 0.0), mask=in_range)
            tl.store(residuals + 2 * rows_wide + row, tl.where(live, sum_u_psi, 0.0), mask=in_range)
            if REDUCE:
                w_t = tl.where(known, s, 0.0)
                if weight is not None and not PROB:
                    w_t = w_t * tl.load(weight + t, mask=known, other=0.0).to(ACC)
                tl.store(loss + program, tl.sum(row_loss, axis=0))
                tl.store(loss + tl.num_programs(0) + program, tl.sum(w_t, axis=0))
            else:
                tl.store(loss + row, row_loss, mask=in_range)
                tl.store(residuals + 3 * rows_wide, 1.0, mask=program == 0)  # the divisor


# ---- Backward ---------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "inner", "classes", "steps", "ignore_index"])
def backward_kernel(
    grad_loss,
    logits,
    target,
    wa,
    sample_weight,
    residuals,
    gradient,
    rows,
    inner,
    classes,
    steps,  # blocks of classes of a program
    grad_stride,
    x_outer,
    x_row,
    x_class,
    y_outer,
    y_row,
    y_class,
    g_outer,
    g_row,
    g_class,
    wa_stride,
    ignore_index,
    keep: "fp64",
    uniform: "fp64",
    gamma: "fp64",
    z_loss: "fp64",
    cap: "fp64",
    scale: "fp64",
    PROB: tl.constexpr,
    DENSE: tl.constexpr,
    FOCAL: tl.constexpr,
    Z: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    CLASSES_MINOR: tl.constexpr,
):
    ACC: tl.constexpr = residuals.dtype.element_ty
    FAST: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth == 16
    keep, uniform, gamma = tl.full([], keep, ACC), tl.full([], uniform, ACC), tl.full([], gamma, ACC)
    z_loss, cap, scale = tl.full([], z_loss, ACC), tl.full([], cap, ACC), tl.full([], scale, ACC)
    spans = tl.cdiv(tl.cdiv(classes, BLOCK), steps)
    first = tl.program_id(0) % spans * steps * BLOCK
    outer, i, row, in_range = rows_of(tl.program_id(0) // spans, inner, M, VEC, CLASSES_MINOR)
    t, _, _, s, live = _row_target(target, sample_weight, row, in_range, ignore_index, classes, PROB, ACC)

    classes_end = in_vectors(classes, VEC, CLASSES_MINOR)
    rows_wide = in_vectors(rows.to(tl.int64), VEC, not CLASSES_MINOR)
    divisor = tl.load(residuals + 3 * rows_wide)
    upstream = tl.load(grad_loss + row * grad_stride, mask=in_range, other=0.0).to(ACC) * s
    upstream = tl.where(divisor == 0, 0.0, upstream / tl.where(divisor == 0, 1.0, divisor))
    counts = live & (upstream != 0)
    m = tl.load(residuals + row, mask=in_range, other=0.0)[:, None]
    rest = tl.load(residuals + rows_wide + row, mask=in_range, other=0.0)[:, None]
    sum_u_psi = tl.load(residuals + 2 * rows_wide + row, mask=in_range, other=0.0)[:, None]
    inverse = 1 / (1 + rest)
    log_rest = log1p(rest) if Z or (FOCAL > 0 and DENSE) else rest
    if not PROB:
        own = tl.zeros([M], ACC) + keep
        if DENSE and wa is not None:
            own = own * tl.load(wa + t * wa_stride, mask=counts, other=0.0).to(ACC)

    for start in range(first, tl.minimum(first + steps * BLOCK, classes), BLOCK):
        c = start + tl.arange(0, BLOCK)
        in_classes = c < classes_end
        mask = (counts if CLASSES_MINOR else in_range)[:, None] & in_classes[None, :]
        offsets = offsets_of(outer, i, c, x_outer, x_row, x_class, VEC, CLASSES_MINOR)
        z = _load_z(logits, offsets, mask, scale, cap, SCALED, CAPPED, ACC)
        d = z - m
        p, rest_p = _p_and_rest(d, rest, inverse, FAST)
        if DENSE:
            y_offsets = offsets_of(outer, i, c, y_outer, y_row, y_class, VEC, CLASSES_MINOR) if PROB else 0
            u = _load_u(target, y_offsets, wa, wa_stride, c, classes_end, mask, keep, uniform, PROB, ACC)
            if not PROB:
                u += tl.where(c[None, :] == t[:, None], own[:, None], 0.0)
            if FOCAL > 0:
                modulation, psi = _psi(log_rest - d, p, rest_p, gamma, FOCAL, FAST)
                u_psi = tl.where(u == 0, 0.0, u * psi)
            else:
                u_psi = -u
        else:
            u_psi = tl.where(c[None, :] == t[:, None], sum_u_psi, 0.0)
        others = u_psi - sum_u_psi
        if Z:
            others += 2 * z_loss * (m + log_rest)
        grad = u_psi * rest_p + p * others  # keeps its digits where p rounds to 1
        if SCALED:
            grad = grad * scale
        if CAPPED:
            grad = grad * (1 - (z / cap) * (z / cap))
        grad = tl.where(counts[:, None], grad * upstream[:, None], 0.0)
        offsets = offsets_of(outer, i, c, g_outer, g_row, g_class, VEC, CLASSES_MINOR)
        tl.store(gradient + offsets, grad.to(gradient.dtype.element_ty), mask=in_range[:, None] & in_classes[None, :])
