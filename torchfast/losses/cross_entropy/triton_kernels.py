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

import triton
import triton.language as tl

from torchfast.losses.cross_entropy.triton_formula import (
    load_u,
    load_z,
    merge,
    merge_lanes,
    p_and_rest,
    pair,
    psi_of,
    row_target,
)
from torchfast.losses.triton_kernels import in_vectors, log1p, number, offsets_of, rows_of

# ---- Forward ----------------------------------------------------------------------------------


@triton.jit
def _step(
    start,
    shift,
    tensors,
    place,
    x_strides,
    y_strides,
    wa_stride,
    options,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    CLASSES_MINOR: tl.constexpr,
    ACC: tl.constexpr,
):
    """A block of classes in two halves: (m, rest) of each pair. Where sum u log p needs no p, also the sums of u
    and u (z - shift), of which it is made; the first half's maximum becomes the shift, about m, which keeps the digits.
    An index target's u are in units of `uniform`: one rounding at the end instead of one in each term. Without class
    weights they are 1, and their sum is known."""
    FAST: tl.constexpr = tensors[0].dtype.element_ty.primitive_bitwidth == 16
    logits, target, wa = tensors
    outer, i, read, classes_end = place
    LINEAR: tl.constexpr = options.DENSE and options.FOCAL == 0
    WEIGHTED: tl.constexpr = options.PROB or wa is not None
    unit = number(options.uniform, ACC) if options.PROB else tl.full([], 1.0, ACC)
    c = start + tl.arange(0, BLOCK // 2)
    for half in tl.static_range(2):
        c_half = c + half * (BLOCK // 2)
        mask = read[:, None] & (c_half < classes_end)[None, :]
        offsets = offsets_of(outer, i, c_half, x_strides, VEC, CLASSES_MINOR)
        z = load_z(logits, offsets, mask, options, ACC)
        u, uz = z, z
        if LINEAR:
            if FIRST and half == 0:
                shift = tl.max(z, axis=1)
                shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
            if WEIGHTED:
                y_offsets = offsets_of(outer, i, c_half, y_strides, VEC, CLASSES_MINOR) if options.PROB else 0
                u = load_u(target, y_offsets, wa, wa_stride, c_half, classes_end, mask, unit, options, ACC)
                uz = tl.where(u == 0, 0.0, u * (z - shift[:, None]))
            else:
                uz = tl.where(mask, z - shift[:, None], 0.0)
        if half == 0:
            z_first, u_sums, uz_sums = z, u, uz
        else:
            m, rest = pair(z_first, z, FAST)
            u_sums += u
            uz_sums += uz
    return m, rest, u_sums, uz_sums, shift


#: What a launch of the forward does: the whole, or one of the stages over split rows.
WHOLE, SCAN, SUM, FINISH = (tl.constexpr(stage) for stage in range(4))


@triton.jit(
    do_not_specialize=["rows", "inner", "classes", "splits"], do_not_specialize_on_alignment=["weight", "partials"]
)
def forward_kernel(
    logits,
    target,
    weight,
    wa,  # weight * alpha
    sample_weight,
    loss,  # one a row; with REDUCE, by program, sums of losses and then of weights
    residuals,
    partials,  # of split rows: [plane, split, row]
    rows,
    inner,
    classes,
    splits,
    x_strides,  # over the outer dimension, rows and classes
    y_strides,
    wa_stride,
    choices,  # the options: Triton's launcher has an argument of that name
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
    LINEAR: tl.constexpr = choices.DENSE and choices.FOCAL == 0  # sum u log p needs no p: one pass is enough
    WEIGHTED: tl.constexpr = choices.PROB or wa is not None
    program = tl.program_id(0)
    block, first, end = program, 0, classes
    split = 0
    if STAGE == SCAN or STAGE == SUM:
        block, split = program // splits, program % splits
        per_split = tl.cdiv(tl.cdiv(classes, BLOCK), splits) * BLOCK
        first = split * per_split
        end = tl.minimum(first + per_split, classes)
    outer, i, row, in_range = rows_of(block, inner, M, VEC, CLASSES_MINOR)
    t, known, bad, s, live = row_target(target, sample_weight, row, in_range, classes, choices, ACC)
    # Rows that do not count are read only where leaving them out would break the vectors along the rows.
    read = live if CLASSES_MINOR else in_range
    classes_end = in_vectors(classes, VEC, CLASSES_MINOR)

    if STAGE == WHOLE or STAGE == SCAN:
        tensors, place = (logits, target, wa), (outer, i, read, classes_end)
        m, rest, u_sums, uz_sums, shift = _step(
            first,
            tl.zeros([M], ACC),
            tensors,
            place,
            x_strides,
            y_strides,
            wa_stride,
            choices,
            True,
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
                    x_strides,
                    y_strides,
                    wa_stride,
                    choices,
                    False,
                    BLOCK,
                    VEC,
                    CLASSES_MINOR,
                    ACC,
                )
                m, rest = merge(m, rest, m_b, rest_b, FAST)
                if LINEAR:
                    uz_sums += uz
                    if WEIGHTED:
                        u_sums += u
        m, rest = merge_lanes(m, rest, FAST)
        if LINEAR:
            uz_sum = tl.sum(uz_sums, axis=1)
            if WEIGHTED:
                u_sum = tl.sum(u_sums, axis=1)
            else:
                u_sum = tl.zeros([M], ACC) + (end - first).to(ACC)
    else:
        k = tl.arange(0, SPLITS)
        at = partials + k[None, :].to(tl.int64) * rows + row[:, None]
        there = in_range[:, None] & (k < splits)[None, :]
        plane = splits.to(tl.int64) * rows
        m = tl.load(at, mask=there, other=-float("inf"))
        m, rest = merge_lanes(m, tl.load(at + plane, mask=there, other=-1.0), FAST)
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
        # As in torch, there is no softmax without a maximum.
        rest = tl.where(tl.abs(m) == float("inf"), float("nan"), rest)
        log_rest, inverse = log1p(rest), 1 / (1 + rest)
        row_loss = tl.zeros([M], ACC)
        sum_u_psi = tl.zeros([M], ACC)
        if LINEAR:
            if not choices.PROB:
                uniform = number(choices.uniform, ACC)
                u_sum, uz_sum = u_sum * uniform, uz_sum * uniform
            row_loss = tl.where(u_sum == 0, 0.0, u_sum * ((m - shift) + log_rest)) - uz_sum
            sum_u_psi = -u_sum
        if choices.DENSE and choices.FOCAL > 0:
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
                    offsets = offsets_of(outer, i, c, x_strides, VEC, CLASSES_MINOR)
                    z = load_z(logits, offsets, mask, choices, ACC)
                    y_offsets = offsets_of(outer, i, c, y_strides, VEC, CLASSES_MINOR) if choices.PROB else 0
                    u = load_u(
                        target,
                        y_offsets,
                        wa,
                        wa_stride,
                        c,
                        classes_end,
                        mask,
                        number(choices.uniform, ACC),
                        choices,
                        ACC,
                    )
                    d = z - m[:, None]
                    p, rest_p = p_and_rest(d, rest[:, None], inverse[:, None], FAST)
                    modulation, psi = psi_of(log_rest[:, None] - d, p, rest_p, choices, FAST)
                    losses += tl.where(u == 0, 0.0, u * modulation * (log_rest[:, None] - d))
                    u_psis += tl.where(u == 0, 0.0, u * psi)
                row_loss, sum_u_psi = tl.sum(losses, axis=1), tl.sum(u_psis, axis=1)
        if STAGE == SUM:
            plane = splits.to(tl.int64) * rows
            tl.store(here + 2 * plane, row_loss, mask=in_range)
            tl.store(here + 3 * plane, sum_u_psi, mask=in_range)
        else:
            if not choices.PROB:
                u = tl.zeros([M], ACC) + number(choices.keep, ACC)
                if wa is not None:
                    u = u * tl.load(wa + t * wa_stride, mask=live, other=0.0).to(ACC)
                x_outer, x_row, x_class = x_strides
                at_own = outer * x_outer + i * x_row + t.to(tl.int64) * x_class
                z = load_z(logits, at_own, live, choices, ACC)
                d = z - m
                p, rest_p = p_and_rest(d, rest, inverse, FAST)
                modulation, psi = psi_of(log_rest - d, p, rest_p, choices, FAST)
                row_loss += tl.where(u == 0, 0.0, u * modulation * (log_rest - d))
                sum_u_psi += tl.where(u == 0, 0.0, u * psi)
            if choices.Z:
                row_loss += number(choices.z_loss, ACC) * (m + log_rest) * (m + log_rest)
            row_loss = tl.where(bad, float("nan"), tl.where(live, row_loss * s, 0.0))
            rows_wide = in_vectors(rows.to(tl.int64), VEC, not CLASSES_MINOR)
            tl.store(residuals + row, tl.where(live, m, 0.0), mask=in_range)
            tl.store(residuals + rows_wide + row, tl.where(live, rest, 0.0), mask=in_range)
            tl.store(residuals + 2 * rows_wide + row, tl.where(live, sum_u_psi, 0.0), mask=in_range)
            if REDUCE:
                w_t = tl.where(known, s, 0.0)
                if weight is not None and not choices.PROB:
                    w_t = w_t * tl.load(weight + t, mask=known, other=0.0).to(ACC)
                tl.store(loss + program, tl.sum(row_loss, axis=0))
                tl.store(loss + tl.num_programs(0) + program, tl.sum(w_t, axis=0))
            else:
                tl.store(loss + row, row_loss, mask=in_range)
                tl.store(residuals + 3 * rows_wide, 1.0, mask=program == 0)  # the divisor


# ---- Backward ---------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "inner", "classes", "steps"])
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
    x_strides,  # over the outer dimension, rows and classes
    y_strides,
    g_strides,
    wa_stride,
    choices,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    CLASSES_MINOR: tl.constexpr,
):
    ACC: tl.constexpr = residuals.dtype.element_ty
    FAST: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth == 16
    spans = tl.cdiv(tl.cdiv(classes, BLOCK), steps)
    first = tl.program_id(0) % spans * steps * BLOCK
    outer, i, row, in_range = rows_of(tl.program_id(0) // spans, inner, M, VEC, CLASSES_MINOR)
    t, _, _, s, live = row_target(target, sample_weight, row, in_range, classes, choices, ACC)

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
    log_rest = log1p(rest) if choices.Z or (choices.FOCAL > 0 and choices.DENSE) else rest
    if not choices.PROB:
        own = tl.zeros([M], ACC) + number(choices.keep, ACC)
        if choices.DENSE and wa is not None:
            own = own * tl.load(wa + t * wa_stride, mask=counts, other=0.0).to(ACC)

    for start in range(first, tl.minimum(first + steps * BLOCK, classes), BLOCK):
        c = start + tl.arange(0, BLOCK)
        in_classes = c < classes_end
        mask = (counts if CLASSES_MINOR else in_range)[:, None] & in_classes[None, :]
        offsets = offsets_of(outer, i, c, x_strides, VEC, CLASSES_MINOR)
        z = load_z(logits, offsets, mask, choices, ACC)
        d = z - m
        p, rest_p = p_and_rest(d, rest, inverse, FAST)
        if choices.DENSE:
            y_offsets = offsets_of(outer, i, c, y_strides, VEC, CLASSES_MINOR) if choices.PROB else 0
            u = load_u(
                target, y_offsets, wa, wa_stride, c, classes_end, mask, number(choices.uniform, ACC), choices, ACC
            )
            if not choices.PROB:
                u += tl.where(c[None, :] == t[:, None], own[:, None], 0.0)
            if choices.FOCAL > 0:
                modulation, psi = psi_of(log_rest - d, p, rest_p, choices, FAST)
                u_psi = tl.where(u == 0, 0.0, u * psi)
            else:
                u_psi = -u
        else:
            u_psi = tl.where(c[None, :] == t[:, None], sum_u_psi, 0.0)
        others = u_psi - sum_u_psi
        if choices.Z:
            others += 2 * number(choices.z_loss, ACC) * (m + log_rest)
        grad = u_psi * rest_p + p * others  # it keeps its digits where p rounds to 1
        if choices.SCALED:
            grad = grad * number(choices.logit_scale, ACC)
        if choices.CAPPED:
            cap = number(choices.softcap, ACC)
            grad = grad * (1 - (z / cap) * (z / cap))
        grad = tl.where(counts[:, None], grad * upstream[:, None], 0.0)
        offsets = offsets_of(outer, i, c, g_strides, VEC, CLASSES_MINOR)
        tl.store(gradient + offsets, grad.to(gradient.dtype.element_ty), mask=in_range[:, None] & in_classes[None, :])
