"""Device functions for rows of hidden states: their addresses, sums, strengths, and RMSNorm."""

# Tuples grow.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import operand


@triton.jit
def row_offsets(rows, inner, stride_outer, stride_inner, NESTED: tl.constexpr):
    # 64-bit, as N·d exceeds 2^31 with long sequences. NESTED: (batch, sequence, d) with leading strides that do not
    # collapse.
    rows = rows.to(tl.int64)
    if NESTED:
        return (rows // inner) * stride_outer + (rows % inner) * stride_inner
    else:
        return rows * stride_inner


@triton.jit
def row_strength(p_gain, p_scale, scale, rows, m_rows, HAS_GAIN: tl.constexpr, SCALE_ON_DEVICE: tl.constexpr):
    """Return each row's strength times gain, s · g, in a tile. [BLOCK_N]"""
    s = tl.load(p_scale).to(tl.float32) if SCALE_ON_DEVICE else scale
    strength = tl.zeros(rows.shape, tl.float32) + s
    if HAS_GAIN:
        strength *= tl.load(p_gain + rows, mask=m_rows, other=0.0).to(tl.float32)
    return strength


@triton.jit
def scaled(values, strength):
    # Zero strength gives exactly zero, even if the values overflowed.
    return tl.where(strength == 0, 0.0, values * strength)


@triton.jit
def load_states(p_residual, p_branch, residual_rows, branch_rows, columns, mask, HAS_BRANCH: tl.constexpr):
    """Load residual and branch, or residual twice. The shape is that of row offsets and columns broadcast."""
    residual = tl.load(p_residual + residual_rows + columns, mask=mask, other=0.0)
    if HAS_BRANCH:
        return residual, tl.load(p_branch + branch_rows + columns, mask=mask, other=0.0)
    else:
        return residual, residual


@triton.jit
def added(states, HAS_BRANCH: tl.constexpr):
    """Return residual + branch in fp32."""
    if HAS_BRANCH:
        return states[0].to(tl.float32) + states[1].to(tl.float32)
    else:
        return states[0].to(tl.float32)


@triton.jit
def rounded(x, p_out):
    """Round an fp32 block to the dtype that `p_out` points to, and return it in fp32."""
    dtype: tl.constexpr = p_out.dtype.element_ty
    if dtype == tl.bfloat16:
        return operand(x, "bf16").to(tl.float32)  # in the interpreter bf16 is only bits
    elif dtype == tl.float16:
        return x.to(tl.float16).to(tl.float32)
    else:
        return x


@triton.jit
def _two_sums(a, b):
    return tl.split(tl.sum(tl.join(a, b), 1))


@triton.jit
def _four_sums(a, b, c, d):
    first, second = tl.split(tl.sum(tl.join(tl.join(a, b), tl.join(c, d)), 1))
    return tl.split(first) + tl.split(second)


@triton.jit
def _eight_sums(a, b, c, d, e, f, g, h):
    first, second = tl.join(tl.join(a, b), tl.join(c, d)), tl.join(tl.join(e, f), tl.join(g, h))
    of_first, of_second = tl.split(tl.sum(tl.join(first, second), 1))
    ab, cd = tl.split(of_first)
    ef, gh = tl.split(of_second)
    return tl.split(ab) + tl.split(cd) + tl.split(ef) + tl.split(gh)


@triton.jit
def row_sums(blocks, COUNT: tl.constexpr):
    """Sum each of COUNT blocks, at most 8, over columns. A tuple of COUNT [BLOCK_N] from a tuple of [BLOCK_N, BLOCK_D].

    Every sum over the threads of a program is a walk through shared memory between two barriers. Two, four or eight
    blocks take one such walk together.
    """
    sums = ()
    if COUNT == 8:
        sums = _eight_sums(blocks[0], blocks[1], blocks[2], blocks[3], blocks[4], blocks[5], blocks[6], blocks[7])
    else:
        if COUNT >= 4:
            sums = _four_sums(blocks[0], blocks[1], blocks[2], blocks[3])
        if COUNT % 4 >= 2:
            sums = sums + _two_sums(blocks[COUNT // 4 * 4], blocks[COUNT // 4 * 4 + 1])
        if COUNT % 2 == 1:
            sums = sums + (tl.sum(blocks[COUNT - 1], 1),)
    return sums


@triton.jit
def inverse_rms(squares, m_rows, D, eps):
    """Return 1 / rms of rows by their sums of squares. Rows that are not there must not divide by zero."""
    return 1.0 / tl.sqrt(tl.where(m_rows, squares / D + eps, 1.0))


@triton.jit
def norm_factor(p_weight, columns, m_columns, PLUS_ONE: tl.constexpr):
    """Load the factor of the norm in fp32, of the shape of `columns`."""
    weight = tl.load(p_weight + columns, mask=m_columns, other=0.0).to(tl.float32)
    return weight + 1.0 if PLUS_ONE else weight


@triton.jit
def normalised(x, inverse, weight, p_normed, HAS_WEIGHT: tl.constexpr, ROUNDS_FIRST: tl.constexpr):
    """Return x · inverse ⊙ weight in fp32. The three shapes broadcast."""
    unit = x * inverse
    if HAS_WEIGHT:
        if ROUNDS_FIRST:
            unit = rounded(unit, p_normed)
        unit *= weight
    return unit
