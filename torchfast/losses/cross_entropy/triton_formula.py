"""The pieces of the formula, for both kernels. What is uppercase in ``options`` is known when they are compiled."""

import triton
import triton.language as tl

from torchfast.losses.triton_kernels import exp, number


@triton.jit
def _tanh(x, FAST: tl.constexpr):
    """Uses expm1(-2|x|), which has the digits of a small x (Kahan): it is (u - 1) y / log(u) with u = exp(y)."""
    y = -2 * tl.abs(x)
    u = exp(y, FAST)
    easy = (u == 1) | (u == 0)
    expm1 = tl.where(u == 1, y, tl.where(u == 0, -1.0, (u - 1) * (y / tl.log(tl.where(easy, 0.5, u)))))
    magnitude = -expm1 / (2 + expm1)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def load_z(logits, offsets, mask, options, ACC: tl.constexpr):
    FAST: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth == 16
    z = tl.load(logits + offsets, mask=mask, other=-float("inf")).to(ACC)
    if options.SCALED:
        z = z * number(options.logit_scale, ACC)
    if options.CAPPED:
        cap = number(options.softcap, ACC)
        z = cap * _tanh(z / cap, FAST)
    if options.SCALED or options.CAPPED:
        z = tl.where(mask, z, -float("inf"))
    return z


@triton.jit
def load_u(target, offsets, wa, wa_stride, c, classes, mask, uniform, options, ACC: tl.constexpr):
    """Gives u of a block of classes; an index target's own class is left to the caller."""
    if options.PROB:
        u = number(options.keep, ACC) * tl.load(target + offsets, mask=mask, other=0.0).to(ACC) + uniform
    else:
        u = tl.zeros(mask.shape, ACC) + uniform
    if wa is not None:
        u = u * tl.load(wa + (c * wa_stride)[None, :], mask=(c < classes)[None, :], other=0.0).to(ACC)
    return tl.where(mask, u, 0.0)


@triton.jit
def p_and_rest(d, rest, inverse, FAST: tl.constexpr):
    """p and 1 - p, from d = z - m and inverse = 1 / (1 + rest)."""
    p = exp(d, FAST) * inverse
    return p, tl.where(d == 0, rest * inverse, 1 - p)  # only the largest class, d = 0, can have p > 1/2


@triton.jit
def psi_of(minus_log_p, p, rest_p, options, FAST: tl.constexpr):
    """(1 - p)^gamma, and psi. FOCAL: 0 is gamma 0, 2 is gamma 2, 1 any other."""
    p_log = tl.where(p == 0, 0.0, p * minus_log_p)
    if options.FOCAL == 0:
        modulation = tl.full(p.shape, 1.0, p.dtype)
        psi = -modulation
    elif options.FOCAL == 2:  # this needs no power and no division, and rounds once for a small p
        modulation = tl.where(p > 0.5, rest_p * rest_p, 1 + p * (p - 2))
        psi = -(modulation + 2 * p_log * rest_p)
    else:
        gamma = number(options.gamma, p.dtype)
        modulation = tl.where(rest_p == 0, 0.0, exp(gamma * tl.log(rest_p), FAST))
        psi = -modulation * (1 + gamma * tl.where(rest_p == 0, p, p_log / rest_p))
    return modulation, psi


@triton.jit
def pair(a, b, FAST: tl.constexpr):
    """(m, rest) of two logits."""
    return tl.maximum(a, b), tl.where(a == b, 1.0, exp(-tl.abs(a - b), FAST))


@triton.jit
def merge(m, rest, m_b, rest_b, FAST: tl.constexpr):
    """(m, rest) of two sets of logits."""
    larger = m_b > m
    e = tl.where(m == m_b, 1.0, exp(-tl.abs(m - m_b), FAST))
    rest = tl.where(larger, rest_b, rest) + (tl.where(larger, rest, rest_b) + 1) * e
    return tl.maximum(m, m_b), rest


@triton.jit
def merge_lanes(m, rest, FAST: tl.constexpr):
    """(m, rest) of each row from those of its lanes; rest = -1 is a lane that saw nothing."""
    top = tl.max(m, axis=1)
    tops = m == top[:, None]
    below = tl.where(tops, rest, (rest + 1) * exp(m - top[:, None], FAST))
    return top, tl.sum(below, axis=1) + (tl.sum(tops.to(rest.dtype), axis=1) - 1)


@triton.jit
def row_target(target, sample_weight, row, in_range, classes, options, ACC: tl.constexpr):
    """Returns class, has one, is out of range, sample weight, counts. No address is made of a bad class."""
    if options.PROB:
        t = tl.zeros(row.shape, tl.int32)
        known = in_range
        bad = in_range & (t != 0)
    else:
        t = tl.load(target + row, mask=in_range, other=0).to(tl.int64)
        given = in_range & (t != options.ignore_index)
        bad = given & ((t < 0) | (t >= classes))
        known = given & (bad == 0)
        t = tl.where(known, t, 0).to(classes.dtype)
    if sample_weight is not None:
        s = tl.load(sample_weight + row, mask=in_range, other=0.0).to(ACC)
    else:
        s = tl.full(row.shape, 1.0, ACC)
    return t, known, bad, s, known & (s != 0)
