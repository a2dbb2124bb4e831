"""The forward and backward kernels of `post_block` and their launchers: the `triton` backend.

The formulas, with the names used here, are in post_block.py. The forward for low ranks is in resident.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import apply, derivative
from .contract import Gradients, Needs, Operands, Packed
from .launch import contiguous, device_of, empty, launch, row_layout
from .numerics import dot, dot_precision, held, met, operand, operand_dtype, packed_operand, store
from .packing import MANY_TOKENS, pack_adapter
from .resident import NO_NORM, post_block_fwd_resident_kernel
from .rows import added, load_states, row_offsets, row_strength, scaled
from .schedule import (
    CROSS_RANK,
    Device,
    ResidentSchedule,
    ceil_div,
    column_passes,
    columns_schedule,
    finish_schedule,
    forward_schedule,
    forward_splits,
    next_power_of_2,
    padded_rank,
    resident_schedule,
    rows_schedule,
    vector_schedule,
)

# ----------------------------------------------------------------------------------------------------------- kernels
#
# The forward's loops set their stages. Only then does Triton prefetch into shared memory a block that is not an operand
# of a product, such as x in the second pass.


@triton.jit
def _down_tile(p_down, ranks, columns, m_columns, D, RANK: tl.constexpr):
    """Load a tile of W1 as fp32, zero beyond the rank. Its shape is that of `ranks` and `columns` broadcast."""
    return tl.load(p_down + ranks.to(tl.int64) * D + columns, mask=(ranks < RANK) & m_columns, other=0.0).to(tl.float32)


@triton.jit
def _up_tile(p_up, ranks, columns, m_columns, RANK: tl.constexpr):
    """Load a tile of W2' as fp32, zero beyond the rank. [BLOCK_D, BLOCK_R]"""
    pointers = p_up + columns[:, None].to(tl.int64) * RANK + ranks[None, :]
    return tl.load(pointers, mask=(ranks[None, :] < RANK) & m_columns[:, None], other=0.0).to(tl.float32)


@triton.jit
def _down_weights(
    p_down, ranks, columns, m_columns, D, RANK: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """Load a tile of W1 in the dtype in memory, zero beyond the rank. Its shape is `ranks` and `columns` broadcast."""
    if PACKED:
        return _packed_tile(p_down, ranks, columns, m_columns, D, RANK)
    else:
        return _down_tile(p_down, ranks, columns, m_columns, D, RANK)


@triton.jit
def _down_operand(w1, DOT: tl.constexpr, PACKED: tl.constexpr):
    if PACKED:
        return packed_operand(w1, DOT)
    else:
        return operand(w1, DOT)


@triton.jit
def _up_weights(p_up, ranks, columns, m_columns, D, RANK: tl.constexpr, PACKED: tl.constexpr):
    """Load a tile of W2', zero beyond the rank. [BLOCK_R, BLOCK_D] if packed, else [BLOCK_D, BLOCK_R]."""
    if PACKED:
        return _packed_tile(p_up, ranks[:, None], columns[None, :], m_columns[None, :], D, RANK)
    else:
        return _up_tile(p_up, ranks, columns, m_columns, RANK)


@triton.jit
def _up_operand(w2, DOT: tl.constexpr, PACKED: tl.constexpr):
    """Return a tile of W2' as an operand. [BLOCK_R, BLOCK_D]"""
    if PACKED:
        return packed_operand(w2, DOT)
    else:
        return tl.trans(operand(w2, DOT))


@triton.jit
def _finite(values):
    """Replace values that are not finite by 0, for a product with a factor that may be exactly 0.

    Where the factor is not 0, the output is not finite already, so nothing is hidden.
    """
    wide = values.to(tl.float32)
    return tl.where(wide - wide == 0, values, tl.zeros_like(values))


@triton.jit
def _packed_tile(p_packed, ranks, columns, m_columns, D, RANK: tl.constexpr):
    # Rows beyond the rank are zero in memory too. If they are half of the rows, they are masked to save their bytes.
    pointers = p_packed + ranks * D + columns
    if 2 * RANK <= ranks.numel:
        return tl.load(pointers, mask=(ranks < RANK) & m_columns, other=0.0)
    else:
        return tl.load(pointers, mask=m_columns, other=0.0)


@triton.jit
def _held(states, weights, HAS_BRANCH: tl.constexpr):
    """Hold the loaded blocks so that all loads are in flight before one is waited for: see `numerics.held`."""
    residual = held(states[0])
    if HAS_BRANCH:
        return (residual, held(states[1])), held(weights)
    else:
        return (residual, residual), held(weights)


@triton.jit
def _summed(
    states, w1, a, DOT: tl.constexpr, HAS_BRANCH: tl.constexpr, PACKED: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """Return a + x W1ᵀ over a block of columns."""
    x, w1 = operand(added(states, HAS_BRANCH), DOT), _down_operand(w1, DOT, PACKED)
    if GROUPS == 1:
        return dot(x, tl.trans(w1), a, DOT)
    else:
        return dot(x, tl.trans(w1, 0, 2, 1), a, DOT)


@triton.jit
def _reduced(
    p_residual, p_branch, p_down, residual_rows, branch_rows, m_rows, ranks, first, end, D,
    RANK: tl.constexpr, DOT: tl.constexpr, HAS_BRANCH: tl.constexpr, EVEN_D: tl.constexpr, PACKED: tl.constexpr,
    AT_ONCE: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Return x W1ᵀ over the columns from `first` to `end`. [BLOCK_N, BLOCK_R]

    GROUPS: the columns of a block are summed in this many groups, one for each warp. A product of few rows and ranks
    has no other work to share between warps, and without groups each warp would read all of x. AT_ONCE: there is only
    one block.
    """
    if GROUPS == 1:
        within = tl.arange(0, BLOCK_D)[None, :]
        residual_rows, branch_rows = residual_rows[:, None], branch_rows[:, None]
        m_rows, ranks = m_rows[:, None], ranks[:, None]
        a = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    else:
        share: tl.constexpr = BLOCK_D // GROUPS
        within = tl.arange(0, GROUPS)[:, None, None] * share + tl.arange(0, share)[None, None, :]
        residual_rows, branch_rows = residual_rows[None, :, None], branch_rows[None, :, None]
        m_rows, ranks = m_rows[None, :, None], ranks[None, :, None]
        a = tl.zeros([GROUPS, BLOCK_N, BLOCK_R], tl.float32)
    if AT_ONCE:
        columns = first + within
        m_columns = (columns < D) | EVEN_D
        states = load_states(
            p_residual, p_branch, residual_rows, branch_rows, columns, m_rows & m_columns, HAS_BRANCH
        )  # fmt: skip
        w1 = _down_weights(p_down, ranks, columns, m_columns, D, RANK, PACKED)
        tl.debug_barrier()
        states, w1 = _held(states, w1, HAS_BRANCH)
        a = _summed(states, w1, a, DOT, HAS_BRANCH, PACKED, GROUPS)
    else:
        for start in tl.range(first, end, BLOCK_D, num_stages=STAGES):
            columns = start + within
            m_columns = (columns < D) | EVEN_D
            states = load_states(
            p_residual, p_branch, residual_rows, branch_rows, columns, m_rows & m_columns, HAS_BRANCH
        )  # fmt: skip
            w1 = _down_weights(p_down, ranks, columns, m_columns, D, RANK, PACKED)
            a = _summed(states, w1, a, DOT, HAS_BRANCH, PACKED, GROUPS)
    if GROUPS > 1:
        a = tl.sum(a, 0)
    return a


@triton.jit
def _pre_activation(a, p_down_bias, p_a, rows, m_rows, ranks, store_a, RANK: tl.constexpr, HAS_DOWN_BIAS: tl.constexpr,
                    KEEP_A: tl.constexpr):  # fmt: skip
    """Return a = x W1ᵀ + b1, and store it for the backward if `store_a`. [BLOCK_N, BLOCK_R]"""
    m_ranks = ranks < RANK
    if HAS_DOWN_BIAS:
        a += tl.load(p_down_bias + ranks, mask=m_ranks, other=0.0).to(tl.float32)[None, :]
    if KEEP_A:
        if store_a:
            p_rows = p_a + rows[:, None].to(tl.int64) * RANK + ranks[None, :]
            tl.store(p_rows, a, mask=m_rows[:, None] & m_ranks[None, :])
    return a


@triton.jit
def _shifted(
    x, h, w2, p_up_bias, strength, columns, m_columns,
    DOT: tl.constexpr, HAS_UP_BIAS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Return x + h W2'ᵀ + s·g·b2, with the strength already in h. [BLOCK_N, BLOCK_D]"""
    # minus: −(h W2'ᵀ + s·g·b2). A zero shift is +0 here, because sums start from +0. x − (+0) is x bit for bit, even
    # for x = −0, which x + (+0) would change. This takes one instruction; comparing and selecting takes two.
    minus = tl.zeros(x.shape, tl.float32)
    if HAS_UP_BIAS:
        b2 = tl.load(p_up_bias + columns, mask=m_columns, other=0.0).to(tl.float32)
        minus -= b2[None, :] * strength[:, None]
    minus = dot(-h, _up_operand(w2, DOT, PACKED), minus, DOT)
    # Zero strength keeps x too, whatever W2' and b2 hold.
    return tl.where((strength == 0)[:, None], x, x - minus)


@triton.jit
def write_block(
    p_residual, p_branch, p_up, p_up_bias, p_out, residual_rows, branch_rows, rows, m_rows, h, strength, ranks, columns,
    D,
    RANK: tl.constexpr, DOT: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_UP_BIAS: tl.constexpr, EVEN_D: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Read a block of a tile's columns, and write it with the shift added. Return it in fp32, not rounded."""
    m_columns = (columns < D) | EVEN_D
    mask = m_rows[:, None] & m_columns[None, :]
    states = load_states(
        p_residual, p_branch, residual_rows[:, None], branch_rows[:, None], columns[None, :], mask, HAS_BRANCH
    )  # fmt: skip
    w2 = _up_weights(p_up, ranks, columns, m_columns, D, RANK, PACKED)
    out = _shifted(
        added(states, HAS_BRANCH), h, w2, p_up_bias, strength, columns, m_columns, DOT, HAS_UP_BIAS, PACKED
    )  # fmt: skip
    store(p_out + rows[:, None].to(tl.int64) * D + columns[None, :], out, mask)
    return out


@triton.jit
def first_pass(
    p_residual, p_branch, p_down, p_down_bias, p_gain, p_scale, p_a, tile, local, ranks,
    scale, N, D, height, inner, residual_outer, residual_inner, branch_outer, branch_inner,
    RANK: tl.constexpr, ACTIVATION: tl.constexpr, DOT: tl.constexpr,
    HAS_BRANCH: tl.constexpr, HAS_DOWN_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr,
    SCALE_ON_DEVICE: tl.constexpr, KEEP_A: tl.constexpr, NESTED: tl.constexpr, EVEN_D: tl.constexpr,
    PACKED: tl.constexpr, READS_BRANCH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, GROUPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Read a tile once: compute a, and store it if it is kept.

    Returns the tile's rows, their mask, the offsets of residual's and branch's rows, s · g, and the operand
    h = s · g φ(a).
    """
    rows = tile * height + local
    m_rows = (rows < N) & (local < height)
    residual_rows = row_offsets(rows, inner, residual_outer, residual_inner, NESTED)
    branch_rows = row_offsets(rows, inner, branch_outer, branch_inner, NESTED)
    if READS_BRANCH:
        a = _reduced(
            p_branch, p_branch, p_down, branch_rows, branch_rows, m_rows, ranks, 0, D, D,
            RANK, DOT, False, EVEN_D, PACKED, False, GROUPS, BLOCK_N, BLOCK_D, BLOCK_R, STAGES,
        )  # fmt: skip
    else:
        a = _reduced(
            p_residual, p_branch, p_down, residual_rows, branch_rows, m_rows, ranks, 0, D, D,
            RANK, DOT, HAS_BRANCH, EVEN_D, PACKED, False, GROUPS, BLOCK_N, BLOCK_D, BLOCK_R, STAGES,
        )  # fmt: skip
    a = _pre_activation(a, p_down_bias, p_a, rows, m_rows, ranks, True, RANK, HAS_DOWN_BIAS, KEEP_A)
    strength = row_strength(p_gain, p_scale, scale, rows, m_rows, HAS_GAIN, SCALE_ON_DEVICE)
    h = operand(scaled(apply(a, ACTIVATION), strength[:, None]), DOT)
    return rows, m_rows, residual_rows, branch_rows, strength, h


@triton.jit(do_not_specialize=["N", "height", "inner"])
def post_block_fwd_kernel(
    p_residual, p_branch, p_down, p_up, p_down_bias, p_up_bias, p_gain, p_scale, p_out, p_a,
    scale, N, D, height, inner, residual_outer, residual_inner, branch_outer, branch_inner,
    RANK: tl.constexpr, ACTIVATION: tl.constexpr, DOT: tl.constexpr,
    HAS_BRANCH: tl.constexpr, HAS_DOWN_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr,
    SCALE_ON_DEVICE: tl.constexpr, KEEP_A: tl.constexpr, NESTED: tl.constexpr, EVEN_D: tl.constexpr,
    PACKED: tl.constexpr, READS_BRANCH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D2: tl.constexpr, BLOCK_R: tl.constexpr, GROUPS: tl.constexpr,
    STAGES: tl.constexpr, STAGES2: tl.constexpr,
):  # fmt: skip
    """Compute the forward for many tokens. Grid (programs,). Programs loop over tiles of `height` ≤ BLOCK_N rows.

    A tile is read twice. If W1 is applied to branch, residual is read once.
    """
    ranks = tl.arange(0, BLOCK_R)
    local = tl.arange(0, BLOCK_N)
    for tile in range(tl.program_id(0), tl.cdiv(N, height), tl.num_programs(0)):
        rows, m_rows, residual_rows, branch_rows, strength, h = first_pass(
            p_residual, p_branch, p_down, p_down_bias, p_gain, p_scale, p_a, tile, local, ranks,
            scale, N, D, height, inner, residual_outer, residual_inner, branch_outer, branch_inner,
            RANK, ACTIVATION, DOT, HAS_BRANCH, HAS_DOWN_BIAS, HAS_GAIN, SCALE_ON_DEVICE, KEEP_A, NESTED, EVEN_D, PACKED,
            READS_BRANCH, BLOCK_N, BLOCK_D, BLOCK_R, GROUPS, STAGES,
        )  # fmt: skip

        # Backwards over the columns, because the columns read last are the likeliest to be in L2.
        blocks = tl.cdiv(D, BLOCK_D2)
        for block in tl.range(0, blocks, num_stages=STAGES2):
            columns = (blocks - 1 - block) * BLOCK_D2 + tl.arange(0, BLOCK_D2)
            write_block(
                p_residual, p_branch, p_up, p_up_bias, p_out, residual_rows, branch_rows, rows, m_rows, h, strength,
                ranks, columns, D, RANK, DOT, HAS_BRANCH, HAS_UP_BIAS, EVEN_D, PACKED,
            )  # fmt: skip


@triton.jit(do_not_specialize=["N", "inner"])
def post_block_fwd_down_kernel(
    p_residual, p_branch, p_down, p_partial,
    N, D, part, inner, residual_outer, residual_inner, branch_outer, branch_inner,
    RANK: tl.constexpr, DOT: tl.constexpr, HAS_BRANCH: tl.constexpr, NESTED: tl.constexpr, EVEN_D: tl.constexpr,
    PACKED: tl.constexpr, AT_ONCE: tl.constexpr, SUMS_R: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, GROUPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute partial sums of x W1ᵀ over one split of d, (N, splits, SUMS_R). Grid (tiles, splits).

    If W1 is applied to branch, p_residual is branch, and p_branch is None.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_rows = rows < N
    residual_rows = row_offsets(rows, inner, residual_outer, residual_inner, NESTED)
    branch_rows = row_offsets(rows, inner, branch_outer, branch_inner, NESTED)
    ranks = tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * part
    a = _reduced(
        p_residual, p_branch, p_down, residual_rows, branch_rows, m_rows, ranks, first, tl.minimum(first + part, D), D,
        RANK, DOT, HAS_BRANCH, EVEN_D, PACKED, AT_ONCE, GROUPS, BLOCK_N, BLOCK_D, BLOCK_R, STAGES,
    )  # fmt: skip
    places = rows.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    p_rows = p_partial + places[:, None] * SUMS_R + ranks[None, :]
    tl.store(p_rows, a, mask=m_rows[:, None] & (ranks < SUMS_R)[None, :])


@triton.jit(do_not_specialize=["N", "inner"])
def post_block_fwd_up_kernel(
    p_residual, p_branch, p_up, p_partial, p_down_bias, p_up_bias, p_gain, p_scale, p_out, p_a,
    scale, N, D, part, inner, residual_outer, residual_inner, branch_outer, branch_inner,
    RANK: tl.constexpr, ACTIVATION: tl.constexpr, DOT: tl.constexpr,
    HAS_BRANCH: tl.constexpr, HAS_DOWN_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr,
    SCALE_ON_DEVICE: tl.constexpr, KEEP_A: tl.constexpr, NESTED: tl.constexpr, EVEN_D: tl.constexpr,
    PACKED: tl.constexpr, SPLITS: tl.constexpr, SLOTS: tl.constexpr, AT_ONCE: tl.constexpr, SUMS_R: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Write `out` from the partial sums, added in the order of the splits. Grid (tiles, parts of the columns)."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_rows = rows < N
    residual_rows = row_offsets(rows, inner, residual_outer, residual_inner, NESTED)
    branch_rows = row_offsets(rows, inner, branch_outer, branch_inner, NESTED)
    ranks = tl.arange(0, BLOCK_R)
    # From the last column down, as in `post_block_fwd_kernel`.
    last = tl.cdiv(D, part) - 1 - tl.program_id(1)
    if AT_ONCE:
        columns = last * BLOCK_D + tl.arange(0, BLOCK_D)
        m_columns = (columns < D) | EVEN_D
        mask = m_rows[:, None] & m_columns[None, :]
        states = load_states(
            p_residual, p_branch, residual_rows[:, None], branch_rows[:, None], columns[None, :], mask, HAS_BRANCH
        )  # fmt: skip
        w2 = _up_weights(p_up, ranks, columns, m_columns, D, RANK, PACKED)
        splits = tl.arange(0, SLOTS)[:, None, None]
        sums = tl.arange(0, SUMS_R)[None, None, :]
        p_rows = p_partial + (rows.to(tl.int64) * (SPLITS * SUMS_R))[None, :, None] + sums
        m_parts = m_rows[None, :, None] if SPLITS == SLOTS else (splits < SPLITS) & m_rows[None, :, None]
        parts = tl.load(p_rows + splits * SUMS_R, mask=m_parts, other=0.0)
        zero = met()
        states, w2 = _held(states, w2, HAS_BRANCH)
        a = tl.sum(parts + zero, 0)
        if SUMS_R < BLOCK_R:  # zeros up to the extent that tl.dot requires
            a = tl.reshape(tl.permute(tl.join(a, tl.zeros_like(a)), (0, 2, 1)), [BLOCK_N, BLOCK_R])
    else:
        a = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        p_rows = p_partial + rows[:, None].to(tl.int64) * (SPLITS * SUMS_R) + ranks[None, :]
        m_parts = m_rows[:, None] & (ranks < SUMS_R)[None, :]
        if BLOCK_N * BLOCK_R > 2048:
            for split in range(SPLITS):
                a += tl.load(p_rows + split * SUMS_R, mask=m_parts, other=0.0)
        else:  # unrolled, so that all loads are in flight at once
            for split in tl.static_range(SPLITS):
                a += tl.load(p_rows + split * SUMS_R, mask=m_parts, other=0.0)
    a = _pre_activation(
        a, p_down_bias, p_a, rows, m_rows, ranks, tl.program_id(1) == 0, RANK, HAS_DOWN_BIAS, KEEP_A
    )  # fmt: skip
    strength = row_strength(p_gain, p_scale, scale, rows, m_rows, HAS_GAIN, SCALE_ON_DEVICE)
    h = operand(scaled(apply(a, ACTIVATION), strength[:, None]), DOT)
    if AT_ONCE:
        out = _shifted(
            added(states, HAS_BRANCH), h, w2, p_up_bias, strength, columns, m_columns, DOT, HAS_UP_BIAS, PACKED
        )  # fmt: skip
        store(p_out + rows[:, None].to(tl.int64) * D + columns[None, :], out, mask)
    else:
        blocks = tl.cdiv(tl.minimum(part, D - last * part), BLOCK_D)
        for block in tl.range(0, blocks, num_stages=STAGES):
            columns = last * part + (blocks - 1 - block) * BLOCK_D + tl.arange(0, BLOCK_D)
            write_block(
                p_residual, p_branch, p_up, p_up_bias, p_out, residual_rows, branch_rows, rows, m_rows, h, strength,
                ranks, columns, D, RANK, DOT, HAS_BRANCH, HAS_UP_BIAS, EVEN_D, PACKED,
            )  # fmt: skip


@triton.jit(do_not_specialize=["N", "inner"])
def post_block_fwd_vector_kernel(
    p_residual, p_branch, p_up_bias, p_gain, p_scale, p_out,
    scale, N, D, inner, residual_outer, residual_inner, branch_outer, branch_inner,
    HAS_BRANCH: tl.constexpr, HAS_GAIN: tl.constexpr, SCALE_ON_DEVICE: tl.constexpr, NESTED: tl.constexpr,
    EVEN_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write x + s·g·b2, for a steering vector. Grid (tiles, column blocks)."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_rows = rows < N
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_columns = (columns < D) | EVEN_D
    mask = m_rows[:, None] & m_columns[None, :]
    residual_rows = row_offsets(rows, inner, residual_outer, residual_inner, NESTED)
    branch_rows = row_offsets(rows, inner, branch_outer, branch_inner, NESTED)
    states = load_states(
        p_residual, p_branch, residual_rows[:, None], branch_rows[:, None], columns[None, :], mask, HAS_BRANCH
    )  # fmt: skip
    x = added(states, HAS_BRANCH)
    b2 = tl.load(p_up_bias + columns, mask=m_columns, other=0.0).to(tl.float32)
    strength = row_strength(p_gain, p_scale, scale, rows, m_rows, HAS_GAIN, SCALE_ON_DEVICE)
    delta = scaled(b2[None, :], strength[:, None])
    # −0 + 0 would be +0, so a zero shift keeps x bit for bit.
    store(
        p_out + rows[:, None].to(tl.int64) * D + columns[None, :], tl.where(delta == 0, x, x + delta), mask
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "height", "inner"])
def post_block_bwd_rows_kernel(
    p_grad, p_a, p_up, p_up_bias, p_gain, p_scale, p_narrow, p_da_sums, p_row_dot,
    scale, N, D, height, inner, grad_outer, grad_inner,
    RANK: tl.constexpr, ACTIVATION: tl.constexpr, DOT: tl.constexpr, PACKED: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr, SCALE_ON_DEVICE: tl.constexpr,
    NEED_DA: tl.constexpr, NEED_H: tl.constexpr, NEED_DA_SUM: tl.constexpr, NEED_ROW_DOT: tl.constexpr,
    NESTED: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute the backward's values for each token: da, h = s · g φ(a) and rowsum(G ⊙ u). Grid (tiles,).

    A tile has `height` rows.

    da and h are stored in p_narrow (2, N, BLOCK_R) as operands of the columns kernel's products. The sums of da over
    each tile are stored in p_da_sums (tiles, BLOCK_R). φ and φ' are computed only here, once for each token.
    """
    NEED_GZ: tl.constexpr = NEED_DA or NEED_DA_SUM or NEED_ROW_DOT
    local = tl.arange(0, BLOCK_N)
    rows = tl.program_id(0) * height + local
    m_rows = (rows < N) & (local < height)
    if NEED_ROW_DOT:
        row_dot = tl.zeros([BLOCK_N], tl.float32)
    if RANK > 0:
        ranks = tl.arange(0, BLOCK_R)
        gz = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    if NEED_GZ:
        grad_rows = row_offsets(rows, inner, grad_outer, grad_inner, NESTED)
        for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            columns = start + tl.arange(0, BLOCK_D)
            m_columns = (columns < D) | EVEN_D
            mask = m_rows[:, None] & m_columns[None, :]
            g = tl.load(p_grad + grad_rows[:, None] + columns[None, :], mask=mask, other=0.0)
            if RANK > 0:
                w2 = _up_operand(_up_weights(p_up, ranks, columns, m_columns, D, RANK, PACKED), DOT, PACKED)
                gz = dot(operand(g, DOT), tl.trans(w2), gz, DOT)
            if NEED_ROW_DOT and HAS_UP_BIAS:
                b2 = tl.load(p_up_bias + columns, mask=m_columns, other=0.0).to(tl.float32)
                row_dot += tl.sum(g.to(tl.float32) * b2[None, :], 1)
    if RANK > 0:
        p_a += rows[:, None].to(tl.int64) * RANK + ranks[None, :]
        a = tl.load(p_a, mask=m_rows[:, None] & (ranks < RANK)[None, :], other=0.0)
        strength = row_strength(p_gain, p_scale, scale, rows, m_rows, HAS_GAIN, SCALE_ON_DEVICE)[:, None]
        narrow = rows[:, None].to(tl.int64) * BLOCK_R + ranks[None, :]
        if NEED_DA or NEED_DA_SUM:
            da = scaled(gz * derivative(a, ACTIVATION), strength)
            if NEED_DA:
                store(p_narrow + narrow, operand(da, DOT), m_rows[:, None])
            if NEED_DA_SUM:
                da_sum = tl.sum(tl.where(m_rows[:, None], da, 0.0), 0)
                tl.store(p_da_sums + tl.program_id(0).to(tl.int64) * BLOCK_R + ranks, da_sum)
        if NEED_H or NEED_ROW_DOT:
            phi = apply(a, ACTIVATION)
            if NEED_H:
                h = operand(scaled(phi, strength), DOT)
                store(p_narrow + tl.cast(N, tl.int64) * BLOCK_R + narrow, h, m_rows[:, None])
            if NEED_ROW_DOT:
                row_dot += tl.sum(phi * gz, 1)
    if NEED_ROW_DOT:
        tl.store(p_row_dot + rows, row_dot, mask=m_rows)


@triton.jit
def _da_times_h(
    p_narrow, p_gain, p_scale, p_slab, scale, N, offset, tile,
    DOT: tl.constexpr, HAS_UP_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr, SCALE_ON_DEVICE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, CROSS_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sum one tile (CROSS_R, CROSS_R) of daᵀ h over a part of the rows, and behind it daᵀ (s · g) if there is a b2."""
    across: tl.constexpr = BLOCK_R // CROSS_R
    left = (tile // across) * CROSS_R + tl.arange(0, CROSS_R)
    right = (tile % across) * CROSS_R + tl.arange(0, CROSS_R)
    cross = tl.zeros([CROSS_R, CROSS_R], tl.float32)
    along_bias = tl.zeros([CROSS_R], tl.float32)
    for step in tl.range(tl.program_id(1), tl.cdiv(N, BLOCK_N), tl.num_programs(1), num_stages=STAGES):
        rows = step * BLOCK_N + tl.arange(0, BLOCK_N)
        m_rows = rows < N
        p_rows = p_narrow + rows[:, None].to(tl.int64) * BLOCK_R
        da = tl.load(p_rows + left[None, :], mask=m_rows[:, None], other=0.0)
        h = tl.load(p_rows + tl.cast(N, tl.int64) * BLOCK_R + right[None, :], mask=m_rows[:, None], other=0.0)
        cross = dot(tl.trans(packed_operand(da, DOT)), packed_operand(h, DOT), cross, DOT)
        if HAS_UP_BIAS:
            strength = row_strength(p_gain, p_scale, scale, rows, m_rows, HAS_GAIN, SCALE_ON_DEVICE)
            along_bias += tl.sum(scaled(da.to(tl.float32), strength[:, None]), 0)
    tl.store(p_slab + offset + left[:, None] * BLOCK_R + right[None, :], cross)
    if HAS_UP_BIAS:
        if tile % across == 0:
            tl.store(p_slab + offset + BLOCK_R * BLOCK_R + left, along_bias)


@triton.jit
def _columns(
    p_grad, p_out, p_branch, p_narrow, p_down, p_gain, p_scale, p_dx, p_slab,
    scale, N, D, offset, inner, grad_outer, grad_inner, branch_outer, branch_inner,
    RANK: tl.constexpr, DOT: tl.constexpr, PACKED: tl.constexpr, READS_BRANCH: tl.constexpr,
    HAS_GAIN: tl.constexpr, SCALE_ON_DEVICE: tl.constexpr,
    NEED_X: tl.constexpr, NEED_DOWN: tl.constexpr, NEED_UP: tl.constexpr, NEED_UP_BIAS: tl.constexpr,
    NESTED: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dx, and the sums of daᵀ out (or daᵀ branch), hᵀ G and s · g ⊙ G, for BLOCK_D columns of a part's rows."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_columns = (columns < D) | EVEN_D
    if RANK > 0:
        ranks = tl.arange(0, BLOCK_R)
        d_down = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        d_up = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        h_behind = tl.cast(N, tl.int64) * BLOCK_R
        if NEED_X:
            w1 = _down_weights(p_down, ranks[:, None], columns[None, :], m_columns[None, :], D, RANK, PACKED)
            w1 = _finite(_down_operand(w1, DOT, PACKED))
    if NEED_UP_BIAS:
        d_up_bias = tl.zeros([BLOCK_D], tl.float32)

    # Parts are interleaved and looped over from the last row to the first. So all programs are near the same rows at
    # the same time. They begin with the rows of G that the rows kernel read last, which L2 may still hold.
    tiles = tl.cdiv(N, BLOCK_N)
    within = tl.arange(0, BLOCK_N)
    for step in tl.range(tl.program_id(1), tiles, tl.num_programs(1), num_stages=STAGES):
        first = (tiles - 1 - step) * BLOCK_N
        rows = first + within
        m_rows = rows < N
        mask = m_rows[:, None] & m_columns[None, :]
        # Tile offsets have 64 bits, offsets inside a tile 32, because this kernel is short of registers.
        place = tl.cast(first, tl.int64)
        offsets = within[:, None] * D + columns[None, :]
        if NEED_X or NEED_UP or NEED_UP_BIAS:
            if NESTED:
                p_g = p_grad + row_offsets(rows, inner, grad_outer, grad_inner, NESTED)[:, None]
            else:
                p_g = p_grad + place * grad_inner + within[:, None].to(tl.int64) * grad_inner
            g = tl.load(p_g + columns[None, :], mask=mask, other=0.0)
        if NEED_X or NEED_DOWN or NEED_UP:
            p_da = p_narrow + place * BLOCK_R
            across = within[None, :] * BLOCK_R + ranks[:, None]
            if NEED_DOWN:
                if READS_BRANCH:
                    branch_rows = row_offsets(rows, inner, branch_outer, branch_inner, NESTED)
                    kept = tl.load(p_branch + branch_rows[:, None] + columns[None, :], mask=mask, other=0.0)
                else:
                    kept = tl.load(p_out + place * D + offsets, mask=mask, other=0.0)
                da_t = packed_operand(tl.load(p_da + across, mask=m_rows[None, :], other=0.0), DOT)
                d_down = dot(da_t, operand(kept, DOT), d_down, DOT)
            if NEED_UP:
                h_t = packed_operand(tl.load(p_da + h_behind + across, mask=m_rows[None, :], other=0.0), DOT)
                d_up = dot(h_t, operand(g, DOT), d_up, DOT)
            if NEED_X:
                # Loaded again without transposing, because a load with two layouts would not be asynchronous.
                da = tl.load(p_da + within[:, None] * BLOCK_R + ranks[None, :], mask=m_rows[:, None], other=0.0)
                da = packed_operand(da, DOT)
                store(p_dx + place * D + offsets, dot(da, w1, g.to(tl.float32), DOT), mask)
        if NEED_UP_BIAS:
            strength = row_strength(p_gain, p_scale, scale, rows, m_rows, HAS_GAIN, SCALE_ON_DEVICE)
            d_up_bias += tl.sum(scaled(g.to(tl.float32), strength[:, None]), 0)

    if NEED_DOWN or NEED_UP:
        sums = offset + ranks[:, None].to(tl.int64) * D + columns[None, :]
        mask = (ranks[:, None] < RANK) & m_columns[None, :]
        if NEED_DOWN:
            tl.store(p_slab + sums, d_down, mask=mask)
        if NEED_UP:
            tl.store(p_slab + RANK * D + sums, d_up, mask=mask)
    if NEED_UP_BIAS:
        behind = offset + 2 * RANK * D + BLOCK_R * BLOCK_R + BLOCK_R
        tl.store(p_slab + behind + columns, d_up_bias, mask=m_columns)


@triton.jit(do_not_specialize=["N", "inner"])
def post_block_bwd_columns_kernel(
    p_grad, p_out, p_branch, p_narrow, p_down, p_gain, p_scale, p_dx, p_slab,
    scale, N, D, slab_size, inner, grad_outer, grad_inner, branch_outer, branch_inner,
    RANK: tl.constexpr, DOT: tl.constexpr, PACKED: tl.constexpr, READS_BRANCH: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr, SCALE_ON_DEVICE: tl.constexpr,
    NEED_X: tl.constexpr, NEED_DOWN: tl.constexpr, NEED_UP: tl.constexpr, NEED_UP_BIAS: tl.constexpr,
    NESTED: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, CROSS_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dx and the backward's sums over tokens. Grid (column blocks + tiles of daᵀ h, parts of the rows).

    Each part writes its partial sums to its own slab in p_slab (parts, slab_size), fp32: daᵀ out (r, d), hᵀ G (r, d),
    daᵀ h (BLOCK_R, BLOCK_R), daᵀ (s · g) (BLOCK_R), Σ s · g ⊙ G (d). Sums that are not needed are not written. There
    are no atomics, so two runs give the same bits. If W1 is applied to branch, dW1 is the sum of
    daᵀ branch, and there are no tiles of daᵀ h.
    """
    offset = tl.program_id(1).to(tl.int64) * slab_size
    blocks = tl.cdiv(D, BLOCK_D)
    if tl.program_id(0) < blocks:
        _columns(
            p_grad, p_out, p_branch, p_narrow, p_down, p_gain, p_scale, p_dx, p_slab,
            scale, N, D, offset, inner, grad_outer, grad_inner, branch_outer, branch_inner,
            RANK, DOT, PACKED, READS_BRANCH, HAS_GAIN, SCALE_ON_DEVICE, NEED_X, NEED_DOWN, NEED_UP, NEED_UP_BIAS,
            NESTED, EVEN_D, BLOCK_N, BLOCK_D, BLOCK_R, STAGES,
        )  # fmt: skip
    else:
        if NEED_DOWN and not READS_BRANCH:
            _da_times_h(
                p_narrow, p_gain, p_scale, p_slab, scale, N, offset + 2 * RANK * D, tl.program_id(0) - blocks,
                DOT, HAS_UP_BIAS, HAS_GAIN, SCALE_ON_DEVICE, BLOCK_N, BLOCK_R, CROSS_R, STAGES,
            )  # fmt: skip


@triton.jit
def _finish_down_bias(
    p_da_sums, p_d_down_bias, ranks, tiles, RANK, PADDED_R, BLOCK_N: tl.constexpr, STAGES: tl.constexpr
):
    """Compute db1 = Σ da from the sums over tiles of rows. `ranks`: [BLOCK_R]"""
    sums = tl.zeros([BLOCK_N, ranks.shape[0]], tl.float32)
    for start in tl.range(0, tiles, BLOCK_N, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_N)
        p_rows = p_da_sums + rows[:, None].to(tl.int64) * PADDED_R + ranks[None, :]
        sums += tl.load(p_rows, mask=(rows < tiles)[:, None], other=0.0)
    store(p_d_down_bias + ranks, tl.sum(sums, 0), ranks < RANK)


@triton.jit
def _finish_weights(
    p_slab, p_up, p_up_bias, p_d_down, p_d_up, p_d_up_bias, columns, ranks, D, slab_size, parts,
    RANK: tl.constexpr, PADDED_R: tl.constexpr, DOT: tl.constexpr, CORRECTION: tl.constexpr, PACKED: tl.constexpr,
    READS_BRANCH: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr, NEED_DOWN: tl.constexpr, NEED_UP: tl.constexpr, NEED_UP_BIAS: tl.constexpr,
    EVEN_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute a tile of dW1 and dW2', and the columns of db2. `columns`: [BLOCK_D]. `ranks`: [BLOCK_R]."""
    m_columns = (columns < D) | EVEN_D
    at_cross = 2 * RANK * D
    at_along_bias = at_cross + PADDED_R * PADDED_R
    if NEED_DOWN or NEED_UP:
        mask = (ranks < RANK)[:, None] & m_columns[None, :]
        offsets = ranks[:, None].to(tl.int64) * D + columns[None, :]
        d_down = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        d_up = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        for part in tl.range(0, parts, num_stages=STAGES):
            if NEED_DOWN:
                d_down += tl.load(p_slab + part * slab_size + offsets, mask=mask, other=0.0)
            if NEED_UP:
                d_up += tl.load(p_slab + part * slab_size + RANK * D + offsets, mask=mask, other=0.0)
        if NEED_UP:
            p_d_up += columns[:, None].to(tl.int64) * RANK + ranks[None, :]
            store(p_d_up, tl.trans(d_up), m_columns[:, None] & (ranks < RANK)[None, :])
        if NEED_DOWN:
            if not READS_BRANCH:
                # out = x + h W2'ᵀ + (s · g) b2ᵀ, with h and W2' rounded as in the forward. As many ranks at once as
                # registers allow, because each loop over the parts waits for its loads.
                SHARE: tl.constexpr = PADDED_R if PADDED_R <= 64 and EVEN_D else 16
                for start in tl.static_range(0, PADDED_R, SHARE):
                    others = start + tl.arange(0, SHARE)
                    cross = tl.zeros([BLOCK_R, SHARE], tl.float32)
                    for part in tl.range(0, parts, num_stages=STAGES):
                        p_cross = p_slab + part * slab_size + at_cross
                        cross += tl.load(p_cross + ranks[:, None] * PADDED_R + others[None, :])
                    w2 = _up_operand(_up_weights(p_up, others, columns, m_columns, D, RANK, PACKED), DOT, PACKED)
                    w2 = _finite(w2)
                    w2 = operand(w2, CORRECTION)
                    d_down = dot(-cross, w2, d_down, CORRECTION)
                if HAS_UP_BIAS:
                    along_bias = tl.zeros([BLOCK_R], tl.float32)
                    for part in tl.range(0, parts):
                        along_bias += tl.load(p_slab + part * slab_size + at_along_bias + ranks)
                    b2 = _finite(tl.load(p_up_bias + columns, mask=m_columns, other=0.0).to(tl.float32))
                    d_down -= along_bias[:, None] * b2[None, :]
            store(p_d_down + offsets, d_down, mask)
    if NEED_UP_BIAS:
        if tl.program_id(1) == 0:
            d_up_bias = tl.zeros([BLOCK_D], tl.float32)
            for part in tl.range(0, parts):
                p_sums = p_slab + part * slab_size + at_along_bias + PADDED_R
                d_up_bias += tl.load(p_sums + columns, mask=m_columns, other=0.0)
            store(p_d_up_bias + columns, d_up_bias, m_columns)


@triton.jit(do_not_specialize=["parts", "tiles"])
def post_block_bwd_finish_kernel(
    p_slab, p_da_sums, p_up, p_up_bias, p_d_down, p_d_up, p_d_down_bias, p_d_up_bias,
    D, slab_size, parts, tiles,
    RANK: tl.constexpr, PADDED_R: tl.constexpr, DOT: tl.constexpr, CORRECTION: tl.constexpr, PACKED: tl.constexpr,
    READS_BRANCH: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr, NEED_DOWN: tl.constexpr, NEED_UP: tl.constexpr,
    NEED_DOWN_BIAS: tl.constexpr, NEED_UP_BIAS: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute the parameters' gradients, in their dtypes, from partial sums added in a fixed order.

    dW1 = daᵀ out − (daᵀ h) W2'ᵀ − (daᵀ (s · g)) b2ᵀ, dW2' = Gᵀ h, db1, db2. Grid (column blocks, tiles of BLOCK_R
    ranks). db1 has one more program for each tile of ranks, before the column blocks.
    """
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    block = tl.program_id(0)
    if NEED_DOWN_BIAS:
        block -= 1
    if block >= 0:
        _finish_weights(
            p_slab, p_up, p_up_bias, p_d_down, p_d_up, p_d_up_bias,
            block * BLOCK_D + tl.arange(0, BLOCK_D), ranks, D, slab_size, parts,
            RANK, PADDED_R, DOT, CORRECTION, PACKED, READS_BRANCH, HAS_UP_BIAS, NEED_DOWN, NEED_UP, NEED_UP_BIAS,
            EVEN_D, BLOCK_D, BLOCK_R, STAGES,
        )  # fmt: skip
    else:
        if NEED_DOWN_BIAS:
            _finish_down_bias(p_da_sums, p_d_down_bias, ranks, tiles, RANK, PADDED_R, BLOCK_N, STAGES)


# --------------------------------------------------------------------------------------------------------- launchers


def resident_layout(
    tokens: int, hidden: int, rank: int, dtype: torch.dtype, device: Device, norm: bool = False, packed: bool = False
) -> ResidentSchedule | None:
    """Return `resident_schedule` for a hidden state of `dtype`."""
    of_weight = operand_dtype(dtype, device.gpu, rank).itemsize
    return resident_schedule(tokens, hidden, rank, dtype.itemsize, of_weight, device, norm, packed)


def packed_weights(
    operands: Operands, tokens: int, dtype: torch.dtype, resident: ResidentSchedule | None
) -> Packed | None:
    """Return the packed weights: those of `operands`, or made now if that pays, or None.

    It pays for many tokens. The kernel for low ranks needs it, as it reads rows of W2'; at rank 1 W2' is a row, and for
    few tokens it may read W2' as it lies.
    """
    if operands.packed is not None or operands.rank == 0:
        return operands.packed
    if tokens < MANY_TOKENS and (resident is None or operands.rank == 1):
        return None
    if resident is not None and resident.direct:
        return None
    down, up = contiguous(operands.down, operands.up)
    assert down is not None and up is not None
    return pack_adapter(down, up, dtype)


def forward(residual: Tensor, branch: Tensor | None, operands: Operands, keep_a: bool) -> tuple[Tensor, Tensor | None]:
    """Run the forward. Return `out` and `a` (N, r), which is None unless kept.

    It is one launch, or two if d is split. Packing the weights is one more.
    """
    down, up, down_bias, up_bias, gain, _, scale, activation, packed, reads = operands
    dtype = residual.dtype if branch is None else torch.promote_types(residual.dtype, branch.dtype)
    hidden = residual.shape[-1]
    tokens = residual.numel() // hidden
    rank = operands.rank
    out = empty(*residual.shape, dtype=dtype, device=residual.device)
    a = empty(tokens, rank, dtype=torch.float32, device=residual.device) if keep_a and rank else None
    if tokens == 0:
        return out, a
    (residual, branch), inner, (of_residual, of_branch) = row_layout(residual, branch)
    strides = (inner, *of_residual, *of_branch)
    down_bias, up_bias, gain = contiguous(down_bias, up_bias, gain)
    device = device_of(residual)
    resident = resident_layout(tokens, hidden, rank, dtype, device, packed=packed is not None)
    packed = packed_weights(operands, tokens, dtype, resident)
    down, up = contiguous(down, up) if packed is None else packed
    p_scale, scale = (scale, 0.0) if isinstance(scale, Tensor) else (None, scale)
    states: dict[str, Any] = {"device": residual.device, "HAS_BRANCH": branch is not None, "NESTED": inner > 0}
    shift: dict[str, Any] = {"HAS_GAIN": gain is not None, "SCALE_ON_DEVICE": p_scale is not None}
    if rank == 0:
        vector = vector_schedule(tokens, hidden, dtype.itemsize, device)
        launch(
            post_block_fwd_vector_kernel, (vector.programs, vector.splits),
            residual, branch, up_bias, gain, p_scale, out, scale, tokens, hidden, *strides,
            schedule=vector, **states, **shift, EVEN_D=hidden % vector.block_d == 0,
        )  # fmt: skip
        return out, a
    states |= {"RANK": rank, "DOT": dot_precision(dtype, device.gpu, rank), "PACKED": packed is not None}
    shift |= {
        "ACTIVATION": activation, "HAS_DOWN_BIAS": down_bias is not None, "HAS_UP_BIAS": up_bias is not None,
        "KEEP_A": a is not None,
    }  # fmt: skip
    if resident is not None:
        launch(
            post_block_fwd_resident_kernel, (resident.programs,),
            residual, branch, down, up, down_bias, up_bias, gain, p_scale, None, out, None, a, None,
            scale, 0.0, tokens, hidden, *strides,
            schedule=resident, **states, **shift, READS_BRANCH=reads == "branch", **NO_NORM,
            EVEN_D=hidden % resident.block_d == 0,
        )  # fmt: skip
        return out, a
    schedules = forward_splits(tokens, hidden, rank, dtype.itemsize, device)
    if schedules is None:
        schedule = forward_schedule(
            tokens, hidden, rank, dtype.itemsize, device, packed is not None, dtype == torch.float16
        )  # fmt: skip
        launch(
            post_block_fwd_kernel, (schedule.programs,),
            residual, branch, down, up, down_bias, up_bias, gain, p_scale, out, a,
            scale, tokens, hidden, schedule.height, *strides,
            schedule=schedule, **states, **shift, READS_BRANCH=reads == "branch",
            EVEN_D=hidden % schedule.block_d == 0 and hidden % schedule.block_d2 == 0,
        )  # fmt: skip
        return out, a
    reducing, writing = schedules
    at_once = device.gpu == "cuda"  # `numerics.held` is written for CUDA
    slots = next_power_of_2(reducing.splits)
    sums_r = max(8, next_power_of_2(rank))  # without the padding ranks, if they are half of all
    held_sums = slots * writing.block_n * sums_r  # at most 64 for each thread, for lack of registers
    partial = empty(tokens, reducing.splits, sums_r, dtype=torch.float32, device=residual.device)
    read, of_read = (residual, branch), strides
    if reads == "branch":
        read, of_read = (branch, None), (inner, *of_branch, 0, 0)
    launch(
        post_block_fwd_down_kernel, (reducing.programs, reducing.splits),
        *read, down, partial, tokens, hidden, reducing.part, *of_read,
        schedule=reducing, **states | {"HAS_BRANCH": read[1] is not None}, EVEN_D=hidden % reducing.block_d == 0,
        GROUPS=reducing.groups, STAGES=reducing.num_stages, SUMS_R=sums_r,
        AT_ONCE=at_once and reducing.part == reducing.block_d,
    )  # fmt: skip
    launch(
        post_block_fwd_up_kernel, (writing.programs, writing.splits),
        residual, branch, up, partial, down_bias, up_bias, gain, p_scale, out, a,
        scale, tokens, hidden, writing.part, *strides,
        schedule=writing, **states, **shift, EVEN_D=hidden % writing.block_d == 0, SPLITS=reducing.splits,
        SLOTS=slots, SUMS_R=sums_r, STAGES=writing.num_stages,
        AT_ONCE=at_once and writing.part == writing.block_d and held_sums <= 64 * 32 * writing.num_warps,
    )  # fmt: skip
    return out, a


def numbers_of_slab(hidden: int, rank: int) -> int:
    """Return the size of a program's partial sums: see `post_block_bwd_columns_kernel`."""
    block_r = padded_rank(rank)
    return 2 * rank * hidden + block_r * block_r + block_r + hidden


def backward(
    grad: Tensor,
    kept: Tensor | None,
    a: Tensor | None,
    operands: Operands,
    needs: Needs,
    of_rows: tuple[Tensor, Tensor | None] | None = None,
) -> Gradients:
    """Run the backward in at most three launches, or four at ranks where the columns kernel takes two passes.

    The parameters' gradients have the parameters' dtypes, each in its own storage.

    Args:
        kept: `out`, or branch if W1 is applied to branch.
        of_rows: the results of the first launch, if another kernel has computed them: p_narrow and p_da_sums of
            `post_block_bwd_rows_kernel`. Then there is no `row_dot`.
    """
    down, up, down_bias, up_bias, gain, _, scale, activation, packed, reads = operands
    hidden = grad.shape[-1]
    tokens = grad.numel() // hidden
    rank = 0 if a is None else a.shape[1]
    if tokens == 0:
        return _empty_gradients(grad, hidden, rank, needs)
    result = Gradients(x=grad if needs.x and rank == 0 else None)
    reads_branch = reads == "branch" and rank > 0
    branch: Tensor | None = None
    branch_strides: tuple[int | None, int | None] = (None, None)
    if reads_branch and needs.down:
        (grad, branch), inner, (grad_strides, branch_strides) = row_layout(grad, kept)
    else:
        (grad,), inner, (grad_strides,) = row_layout(grad)
    up_bias, gain = contiguous(up_bias, gain)
    p_down, p_up = contiguous(down, up) if packed is None else packed
    device = device_of(grad)
    block_r = padded_rank(rank)
    p_scale, scale = (scale, 0.0) if isinstance(scale, Tensor) else (None, scale)
    policy = dot_precision(grad.dtype, device.gpu, rank)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return empty(*shape, dtype=dtype, device=grad.device)

    # Constants that the kernels share.
    constants: dict[str, Any] = {
        "device": grad.device,
        "RANK": rank, "DOT": policy, "PACKED": packed is not None, "HAS_UP_BIAS": up_bias is not None,
    }  # fmt: skip
    strength: dict[str, Any] = {"HAS_GAIN": gain is not None, "SCALE_ON_DEVICE": p_scale is not None}

    need_x = needs.x and rank > 0
    need_da, need_h = need_x or needs.down, needs.down or needs.up
    narrow, da_sums = of_rows or (None, None)
    if of_rows is None and (need_da or need_h):
        narrow = new(2, tokens, block_r, dtype=operand_dtype(grad.dtype, device.gpu, rank))
    if of_rows is None and (narrow is not None or needs.down_bias or needs.row_dot):
        schedule = rows_schedule(tokens, hidden, rank, policy, device)
        da_sums = new(schedule.programs, block_r) if needs.down_bias else None
        result.row_dot = new(tokens) if needs.row_dot else None
        reads_grad = need_da or needs.down_bias or needs.row_dot
        launch(
            post_block_bwd_rows_kernel, (schedule.programs,),
            grad if reads_grad else None, a, p_up if reads_grad else None, up_bias, gain, p_scale,
            narrow, da_sums, result.row_dot, scale, tokens, hidden, schedule.height, inner, *grad_strides,
            schedule=schedule, **constants, **strength, ACTIVATION=activation,
            NEED_DA=need_da, NEED_H=need_h, NEED_DA_SUM=needs.down_bias, NEED_ROW_DOT=needs.row_dot,
            NESTED=inner > 0, EVEN_D=hidden % schedule.block_d == 0, STAGES=schedule.num_stages,
        )  # fmt: skip

    sums = needs.down or needs.up or needs.up_bias
    slab, slab_size = None, numbers_of_slab(hidden, rank)
    if need_x or sums:
        schedule = columns_schedule(tokens, hidden, rank, policy, device, not reads_branch)
        parts = schedule.splits
        slab = new(parts, slab_size) if sums else None
        result.x = new(*grad.shape, dtype=grad.dtype) if need_x else result.x
        for rest, down_too in column_passes(schedule, hidden):
            pass_x, pass_up, pass_up_bias = need_x and rest, needs.up and rest, needs.up_bias and rest
            pass_down = needs.down and down_too
            if not (pass_x or pass_down or pass_up or pass_up_bias):
                continue
            cross = ceil_div(block_r, CROSS_RANK) ** 2 if pass_down and not reads_branch else 0
            launch(
                post_block_bwd_columns_kernel, (schedule.programs + cross, parts),
                grad if pass_x or pass_up or pass_up_bias else None,
                kept if pass_down and not reads_branch else None, branch if pass_down else None,
                narrow, p_down if pass_x else None, gain, p_scale, result.x if pass_x else None, slab,
                scale, tokens, hidden, slab_size, inner, *grad_strides, *branch_strides,
                schedule=schedule, **constants, **strength, READS_BRANCH=reads_branch,
                NEED_X=pass_x, NEED_DOWN=pass_down, NEED_UP=pass_up, NEED_UP_BIAS=pass_up_bias,
                NESTED=inner > 0, EVEN_D=hidden % schedule.block_d == 0,
                CROSS_R=min(block_r, CROSS_RANK), STAGES=schedule.num_stages,
            )  # fmt: skip

    if sums or needs.down_bias:
        finish(result, operands, rank, needs, grad.dtype, slab, da_sums)
    return result


def finish(
    result: Gradients,
    operands: Operands,
    rank: int,
    needs: Needs,
    dtype: torch.dtype,
    slab: Tensor | None,
    da_sums: Tensor | None,
) -> None:
    """Set the gradients of the parameters that are needed, in the parameters' dtypes, from partial sums.

    Args:
        dtype: that of the hidden state.
        slab: (parts, numbers), as `post_block_bwd_columns_kernel` describes it. None if only the gradient of b1 is
            needed.
        da_sums: (tiles, padded rank), the sums of da over tiles of rows, if the gradient of b1 is needed.
    """
    down, up, down_bias, up_bias, _, _, _, _, packed, reads = operands
    some = next(t for t in (slab, da_sums) if t is not None)
    sized = down if down is not None else up_bias
    assert sized is not None
    hidden, gpu = sized.shape[-1], device_of(some).gpu
    sums, block_r = slab is not None, padded_rank(rank)
    parts, slab_size = (0, 0) if slab is None else slab.shape
    reads_branch = reads == "branch" and rank > 0
    (up_bias,) = contiguous(up_bias)
    (p_up,) = contiguous(up) if packed is None else (packed.up,)

    def new(*shape: int, dtype: torch.dtype) -> Tensor:
        return empty(*shape, dtype=dtype, device=some.device)

    schedule = finish_schedule(hidden if sums else 0, rank)
    result.down = new(rank, hidden, dtype=down.dtype) if needs.down and down is not None else result.down
    result.up = new(hidden, rank, dtype=up.dtype) if needs.up and up is not None else result.up
    if needs.down_bias and down_bias is not None:
        result.down_bias = new(rank, dtype=down_bias.dtype)
    if needs.up_bias and up_bias is not None:
        result.up_bias = new(hidden, dtype=up_bias.dtype)
    launch(
        post_block_bwd_finish_kernel, (schedule.programs + needs.down_bias, schedule.splits),
        slab, da_sums, *((p_up, up_bias) if needs.down and not reads_branch else (None, None)),
        result.down if needs.down else None, result.up if needs.up else None,
        result.down_bias if needs.down_bias else None, result.up_bias if needs.up_bias else None,
        hidden, slab_size, parts, 0 if da_sums is None else da_sums.shape[0],
        device=some.device, schedule=schedule, RANK=rank, PADDED_R=block_r, DOT=dot_precision(dtype, gpu, rank),
        CORRECTION=dot_precision(torch.float32, gpu, 0), PACKED=packed is not None, READS_BRANCH=reads_branch,
        HAS_UP_BIAS=up_bias is not None, NEED_DOWN=needs.down, NEED_UP=needs.up, NEED_DOWN_BIAS=needs.down_bias,
        NEED_UP_BIAS=needs.up_bias, EVEN_D=hidden % schedule.block_d == 0, STAGES=schedule.num_stages,
    )  # fmt: skip


def _empty_gradients(grad: Tensor, hidden: int, rank: int, needs: Needs) -> Gradients:
    """Return the gradients of a call without tokens."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=grad.device)

    return Gradients(
        x=grad if needs.x else None,
        down=zeros(rank, hidden) if needs.down else None,
        up=zeros(hidden, rank) if needs.up else None,
        down_bias=zeros(rank) if needs.down_bias else None,
        up_bias=zeros(hidden) if needs.up_bias else None,
        row_dot=zeros(0) if needs.row_dot else None,
    )
