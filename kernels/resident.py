"""The forward of post_block for low ranks by one kernel that holds whole rows in registers, with or without RMSNorm.

    out    = x + s · g ⊙ (φ(x W1ᵀ + b1) W2'ᵀ + b2)      x = residual + branch, as in post_block.py
    normed = out · inv ⊙ w                              as in norm.py

Each tensor moves once, between device memory and registers: 3 units of N·d, or 4 with the norm. The products are sums
on the ordinary cores: 4 r operations for a number. Up to rank 8 these take less time than the memory. A few rows take
one launch, too, where tiles would need two. If their weights fit in registers, W2 is read as it lies, (d, r), and there
is no launch that packs it.

The numbers are the same as those of post_block's kernels, except that x is not rounded before it is multiplied by W1,
and neither are weights that are read as they lie.
"""

# Tuples grow in loops that Triton unrolls.
# mypy: disable-error-code="assignment,var-annotated"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .activations import apply
from .numerics import held, met, operand, store, widened
from .rows import inverse_rms, norm_factor, normalised, rounded, row_offsets, row_strength, row_sums, scaled

#: The constants of a launch without the norm.
NO_NORM: dict[str, Any] = {
    "NORM": False,
    "HAS_WEIGHT": False,
    "PLUS_ONE": False,
    "ROUNDS_FIRST": False,
    "KEEP_INVERSE": False,
}


@triton.jit
def _factor(w, DOT: tl.constexpr, PACKED: tl.constexpr, DIRECT: tl.constexpr):
    """Return a row of weights as it enters the product, in fp32. [BLOCK_D]

    Packed weights are rounded already. Those that few rows read as they lie are not: to round one takes more time than
    to multiply it.
    """
    if PACKED or DIRECT:
        return widened(w)
    else:
        return operand(w.to(tl.float32), DOT).to(tl.float32)


@triton.jit
def _h(
    a, b1, p_a, rank, rows, m_rows, strength,
    RANK: tl.constexpr, ACTIVATION: tl.constexpr, HAS_DOWN_BIAS: tl.constexpr, KEEP_A: tl.constexpr,
):  # fmt: skip
    """Return s · g · φ(a + b1) of a rank, and store a + b1. [BLOCK_N]"""
    if HAS_DOWN_BIAS:
        a += b1
    if KEEP_A:
        tl.store(p_a + rows.to(tl.int64) * RANK + rank, a, mask=m_rows)
    return scaled(apply(a, ACTIVATION), strength)


@triton.jit
def _held_states(states, HAS_BRANCH: tl.constexpr, CHUNKS: tl.constexpr):
    """Hold the blocks of both states, or of the only one. See `held`."""
    found = ()
    for chunk in tl.static_range(CHUNKS):
        x = held(states[chunk][0])
        if HAS_BRANCH:
            found = found + ((x, held(states[chunk][1])),)
        else:
            found = found + ((x, x),)
    return found


@triton.jit
def _ranks_of_columns(p_up, columns, m_columns, FIRST: tl.constexpr, RANK: tl.constexpr):
    """Load the ranks from FIRST on of W2 (d, r), two or four, with at most 16 bytes for a column. A tuple of [BLOCK_D].

    A thread gets all of them, so that no number moves to another thread.
    """
    COUNT: tl.constexpr = min(RANK, 4)
    pointers = p_up + columns[:, None] * RANK + (FIRST + tl.arange(0, COUNT))[None, :]
    w2 = tl.load(pointers, mask=m_columns[:, None], other=0.0)
    if COUNT == 2:
        return tl.split(w2)
    else:
        even, odd = tl.split(tl.reshape(w2, [columns.shape[0], 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return (first, second, third, fourth)


@triton.jit(do_not_specialize=["N", "inner"])
def post_block_fwd_resident_kernel(
    p_residual, p_branch, p_down, p_up, p_down_bias, p_up_bias, p_gain, p_scale, p_weight,
    p_out, p_normed, p_a, p_inverse,
    scale, eps, N, D, inner, residual_outer, residual_inner, branch_outer, branch_inner,
    RANK: tl.constexpr, ACTIVATION: tl.constexpr, DOT: tl.constexpr,
    HAS_BRANCH: tl.constexpr, HAS_DOWN_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr,
    SCALE_ON_DEVICE: tl.constexpr, KEEP_A: tl.constexpr, NESTED: tl.constexpr, EVEN_D: tl.constexpr,
    PACKED: tl.constexpr, READS_BRANCH: tl.constexpr,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, PLUS_ONE: tl.constexpr, ROUNDS_FIRST: tl.constexpr,
    KEEP_INVERSE: tl.constexpr, AHEAD: tl.constexpr, DIRECT: tl.constexpr, HELD: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute `out`, and `normed` if NORM. Grid (tiles of BLOCK_N rows,). CHUNKS blocks of BLOCK_D columns cover d.

    W1 and W2' are (r, d): packed, or of rank 1. DIRECT: W2' is (d, r), of rank 2, 4 or 8, and BLOCK_N is 1. AHEAD: the
    weights are loaded before they are used. HELD: all loads are in flight before the first sum, so that a program that
    has a multiprocessor for itself waits for memory once.
    """
    tl.static_assert(not DIRECT or (BLOCK_N == 1 and not PACKED and (RANK == 2 or RANK == 4 or RANK == 8)))
    tl.static_assert(AHEAD or not (DIRECT or HELD))
    ALONE: tl.constexpr = HELD or DIRECT  # on its multiprocessor, so that registers are no matter
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_rows = rows < N
    within = tl.arange(0, BLOCK_D)
    residual_rows = row_offsets(rows, inner, residual_outer, residual_inner, NESTED)[:, None]
    branch_rows = row_offsets(rows, inner, branch_outer, branch_inner, NESTED)[:, None]
    states, masks = (), ()
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * BLOCK_D + within
        masks = masks + ((columns < D) | EVEN_D,)
        mask = m_rows[:, None] & masks[chunk][None, :]
        # Not through L1, where the weights stay.
        x = tl.load(p_residual + residual_rows + columns[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        if HAS_BRANCH:
            b = tl.load(p_branch + branch_rows + columns[None, :], mask=mask, other=0.0, cache_modifier=".cg")
            states = states + ((x, b),)
        else:
            states = states + ((x, x),)
    strength = row_strength(p_gain, p_scale, scale, rows, m_rows, HAS_GAIN, SCALE_ON_DEVICE)
    downs, ups, down_biases, up_biases, factors = (), (), (), (), ()
    zero = 0.0
    if AHEAD:
        for chunk in tl.static_range(CHUNKS):
            columns = chunk * BLOCK_D + within
            for rank in tl.static_range(RANK):
                downs = downs + (tl.load(p_down + rank * D + columns, mask=masks[chunk], other=0.0),)
        for chunk in tl.static_range(CHUNKS):
            columns = chunk * BLOCK_D + within
            if DIRECT:
                for first in tl.static_range(0, RANK, 4):
                    ups = ups + _ranks_of_columns(p_up, columns, masks[chunk], first, RANK)
            else:
                for rank in tl.static_range(RANK):
                    ups = ups + (tl.load(p_up + rank * D + columns, mask=masks[chunk], other=0.0),)
            if ALONE and HAS_UP_BIAS:
                up_biases = up_biases + (tl.load(p_up_bias + columns, mask=masks[chunk], other=0.0),)
            if ALONE and NORM and HAS_WEIGHT:
                factors = factors + (norm_factor(p_weight, columns, masks[chunk], PLUS_ONE),)
        if ALONE and HAS_DOWN_BIAS:
            for rank in tl.static_range(RANK):
                down_biases = down_biases + (tl.load(p_down_bias + rank),)
        if HELD:
            # Else ptxas would move loads down to their uses, or the sums of x up between the loads.
            zero = met()
            states = _held_states(states, HAS_BRANCH, CHUNKS)

    sums, read = (), ()
    for chunk in tl.static_range(CHUNKS):
        x = widened(states[chunk][0])
        if READS_BRANCH:
            read = read + (widened(states[chunk][1]),)
            sums = sums + (x + read[chunk],)
        else:
            if HAS_BRANCH:
                x += widened(states[chunk][1])
            read = read + (x,)
            sums = sums + (x,)
    products, hs = (), ()
    for rank in tl.static_range(RANK):
        product = tl.zeros([BLOCK_N, BLOCK_D], tl.float32) + zero
        for chunk in tl.static_range(CHUNKS):
            if AHEAD:
                w1 = downs[chunk * RANK + rank]
            else:
                w1 = tl.load(p_down + rank * D + chunk * BLOCK_D + within, mask=masks[chunk], other=0.0)
            product += read[chunk] * _factor(w1, DOT, PACKED, DIRECT)[None, :]
        if ALONE:
            products = products + (product,)
        else:
            b1 = tl.load(p_down_bias + rank).to(tl.float32) if HAS_DOWN_BIAS else 0.0
            h = _h(tl.sum(product, 1), b1, p_a, rank, rows, m_rows, strength, RANK, ACTIVATION, HAS_DOWN_BIAS, KEEP_A)
            hs = hs + (operand(h, DOT).to(tl.float32),)
    if ALONE:
        sums_of_ranks = row_sums(products, RANK)
        for rank in tl.static_range(RANK):
            b1 = down_biases[rank].to(tl.float32) if HAS_DOWN_BIAS else 0.0
            h = _h(sums_of_ranks[rank], b1, p_a, rank, rows, m_rows, strength, RANK, ACTIVATION, HAS_DOWN_BIAS, KEEP_A)
            hs = hs + (operand(h, DOT).to(tl.float32),)

    squares = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    outs = ()
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * BLOCK_D + within
        mask = m_rows[:, None] & masks[chunk][None, :]
        # minus: the shift with the other sign, so that a zero shift keeps x bit for bit. See post_block.
        minus = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        b2 = 0.0
        if HAS_UP_BIAS:
            if ALONE:
                b2 = up_biases[chunk]
            else:
                b2 = tl.load(p_up_bias + columns, mask=masks[chunk], other=0.0)
            b2 = b2.to(tl.float32)[None, :] * strength[:, None]
        if DIRECT:
            # By numbers of the only row, so that the threads that have W2 do all of it, and only the result moves.
            of_row = tl.zeros([BLOCK_D], tl.float32)
            for rank in tl.static_range(RANK):
                of_row -= tl.sum(hs[rank], 0) * _factor(ups[chunk * RANK + rank], DOT, PACKED, DIRECT)
            minus = of_row[None, :] - b2
        else:
            minus -= b2
            for rank in tl.static_range(RANK):
                if AHEAD:
                    w2 = ups[chunk * RANK + rank]
                else:
                    w2 = tl.load(p_up + rank * D + columns, mask=masks[chunk], other=0.0)
                minus -= hs[rank][:, None] * _factor(w2, DOT, PACKED, DIRECT)[None, :]
        out = tl.where((strength == 0)[:, None], sums[chunk], sums[chunk] - minus)
        store(p_out + rows[:, None].to(tl.int64) * D + columns[None, :], out, mask)
        if NORM:
            outs = outs + (rounded(out, p_out),)
            squares += outs[chunk] * outs[chunk]
    if NORM:
        inverse = inverse_rms(tl.sum(squares, 1), m_rows, D, eps)
        if KEEP_INVERSE:
            tl.store(p_inverse + rows, inverse, mask=m_rows)
        for chunk in tl.static_range(CHUNKS):
            columns = chunk * BLOCK_D + within
            weight = 1.0
            if HAS_WEIGHT:
                if ALONE:
                    weight = factors[chunk][None, :]
                else:
                    weight = norm_factor(p_weight, columns, masks[chunk], PLUS_ONE)[None, :]
            y = normalised(outs[chunk], inverse[:, None], weight, p_normed, HAS_WEIGHT, ROUNDS_FIRST)
            mask = m_rows[:, None] & masks[chunk][None, :]
            store(p_normed + rows[:, None].to(tl.int64) * D + columns[None, :], y, mask)
