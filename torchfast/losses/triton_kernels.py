"""What the Triton kernels of all losses share: functions that Triton does not have on every backend, where a
program works, and the sum over programs."""

import triton
import triton.language as tl


@triton.jit
def number(parts, ACC: tl.constexpr):
    """Puts an option together from what ``parts_of`` made of it."""
    x = tl.full([], parts[0], ACC)
    if x.dtype == tl.float64:
        x = x + (tl.full([], parts[1], ACC) + tl.full([], parts[2], ACC))
    return x


@triton.jit
def exp(x, FAST: tl.constexpr):
    """exp(x) for x <= 0; results below the normal numbers are 0.

    GPUs have exp2 in one instruction, of which tl.exp makes exp(x) = exp2(x log2 e): the product's rounding costs |x|
    roundings of the result. Enough for half-precision logits (FAST), where instructions are scarce; else x is reduced
    by multiples of ln 2 in two parts (Cody and Waite 1980).
    """
    if x.dtype == tl.float64:
        return tl.exp(x)
    if FAST:
        return tl.exp2(x * 1.4426950408889634)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < -87.0, 0.0, tl.exp2(r * 1.4426950408889634) * power)


@triton.jit
def log1p(x):
    """log(1 + x) with the digits of a small x (Goldberg 1991, theorem 4)."""
    u = 1 + x
    d = u - 1
    return tl.where(d == 0, x, tl.log(u) * (x / tl.where(d == 0, 1.0, d)))


@triton.jit
def in_vectors(n, VEC: tl.constexpr, MINOR: tl.constexpr):
    """Returns n; if it is a multiple of VEC, the compiler now knows it."""
    return n // VEC * VEC if MINOR and VEC > 1 else n


@triton.jit
def rows_of(block, inner, M: tl.constexpr, VEC: tl.constexpr, CLASSES_MINOR: tl.constexpr):
    """Returns of the program's rows: index of the outer dimension, index within the inner one, row, in range."""
    blocks = tl.cdiv(inner, M)
    outer = (block // blocks).to(tl.int64)
    i = (block % blocks).to(tl.int64) * M + tl.arange(0, M)
    inner = in_vectors(inner, VEC, not CLASSES_MINOR)
    return outer, i, outer * inner + i, i < inner


@triton.jit
def offsets_of(outer, i, c, strides, VEC: tl.constexpr, CLASSES_MINOR: tl.constexpr):
    so, sr, sc = strides
    so = in_vectors(so, VEC, True)
    sr = in_vectors(sr, VEC, CLASSES_MINOR)
    sc = in_vectors(sc, VEC, not CLASSES_MINOR)
    return outer * so + (i * sr)[:, None] + (c.to(tl.int64) * sc)[None, :]


@triton.jit(
    do_not_specialize=["n", "divisor_at", "mean", "empty_zero"], do_not_specialize_on_alignment=["out", "residuals"]
)
def sum_kernel(
    sums,
    out,
    residuals,
    n,
    divisor_at,
    mean,
    empty_zero,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds up the programs' losses and weights in a fixed tree; the last level divides them."""
    program = tl.program_id(0)
    losses = tl.zeros([BLOCK], sums.dtype.element_ty)
    weights = tl.zeros([BLOCK], sums.dtype.element_ty)
    for k in range(0, 8):
        at = program.to(tl.int64) * (8 * BLOCK) + k * BLOCK + tl.arange(0, BLOCK)
        losses += tl.load(sums + at, mask=at < n, other=0.0)
        weights += tl.load(sums + n + at, mask=at < n, other=0.0)
    loss, weight = tl.sum(losses, axis=0), tl.sum(weights, axis=0)
    if LAST:
        divisor = tl.where(mean != 0, weight, 1.0)
        tl.store(residuals + divisor_at, divisor)
        tl.store(out, tl.where((divisor == 0) & (empty_zero != 0), 0.0, loss / divisor))
    else:
        tl.store(out + program, loss)
        tl.store(out + tl.num_programs(0) + program, weight)
