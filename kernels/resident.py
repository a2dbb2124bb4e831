"""The forward of post_block for low ranks by one kernel that holds whole rows in registers, with or without RMSNorm.

    out    = x + s · g ⊙ (φ(x W1ᵀ + b1) W2'ᵀ + b2)      x = residual + branch, as in post_block.py
    normed = out · inv ⊙ w                              as in norm.py

Each tensor moves once, between device memory and registers: 3 units of N·d, or 4 with the norm. The products are sums
on the ordinary cores: 4 r operations for a number. Up to rank 8 these take less time than the memory. A few rows take
one launch, too, where tiles would need two.

The numbers are the same as those of post_block's kernels, except that x is not rounded before it is multiplied by W1.
"""

# Tuples grow in loops that Triton unrolls.
# mypy: disable-error-code="assignment,var-annotated"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .activations import apply
from .numerics import operand, store, widened
from .rows import inverse_rms, norm_factor, normalised, rounded, row_offsets, row_strength, scaled

#: The constants of a launch without the norm.
NO_NORM: dict[str, Any] = {
    "NORM": False,
    "HAS_WEIGHT": False,
    "PLUS_ONE": False,
    "ROUNDS_FIRST": False,
    "KEEP_INVERSE": False,
}


@triton.jit
def _factor(w, DOT: tl.constexpr, PACKED: tl.constexpr):
    """Return a row of weights as it enters the product, in fp32. Packed weights are rounded already. [BLOCK_D]"""
    if PACKED:
        return widened(w)
    else:
        return operand(w.to(tl.float32), DOT).to(tl.float32)


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
    KEEP_INVERSE: tl.constexpr, AHEAD: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute `out`, and `normed` if NORM. Grid (tiles of BLOCK_N rows,). CHUNKS blocks of BLOCK_D columns cover d.

    W1 and W2' are (r, d): packed, or of rank 1. AHEAD: they are loaded before they are used, so that few rows wait for
    memory once.
    """
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
    downs, ups = (), ()
    if AHEAD:
        for rank in tl.static_range(RANK):
            for chunk in tl.static_range(CHUNKS):
                columns = chunk * BLOCK_D + within
                downs = downs + (tl.load(p_down + rank * D + columns, mask=masks[chunk], other=0.0),)
                ups = ups + (tl.load(p_up + rank * D + columns, mask=masks[chunk], other=0.0),)
    strength = row_strength(p_gain, p_scale, scale, rows, m_rows, HAS_GAIN, SCALE_ON_DEVICE)

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
    hs = ()
    for rank in tl.static_range(RANK):
        products = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            if AHEAD:
                w1 = downs[rank * CHUNKS + chunk]
            else:
                w1 = tl.load(p_down + rank * D + chunk * BLOCK_D + within, mask=masks[chunk], other=0.0)
            products += read[chunk] * _factor(w1, DOT, PACKED)[None, :]
        a = tl.sum(products, 1)
        if HAS_DOWN_BIAS:
            a += tl.load(p_down_bias + rank).to(tl.float32)
        if KEEP_A:
            tl.store(p_a + rows.to(tl.int64) * RANK + rank, a, mask=m_rows)
        hs = hs + (operand(scaled(apply(a, ACTIVATION), strength), DOT).to(tl.float32),)

    squares = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    outs = ()
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * BLOCK_D + within
        mask = m_rows[:, None] & masks[chunk][None, :]
        # minus: the shift with the other sign, so that a zero shift keeps x bit for bit. See post_block.
        minus = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        if HAS_UP_BIAS:
            b2 = tl.load(p_up_bias + columns, mask=masks[chunk], other=0.0).to(tl.float32)
            minus -= b2[None, :] * strength[:, None]
        for rank in tl.static_range(RANK):
            if AHEAD:
                w2 = ups[rank * CHUNKS + chunk]
            else:
                w2 = tl.load(p_up + rank * D + columns, mask=masks[chunk], other=0.0)
            minus -= hs[rank][:, None] * _factor(w2, DOT, PACKED)[None, :]
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
                weight = norm_factor(p_weight, columns, masks[chunk], PLUS_ONE)[None, :]
            y = normalised(outs[chunk], inverse[:, None], weight, p_normed, HAS_WEIGHT, ROUNDS_FIRST)
            mask = m_rows[:, None] & masks[chunk][None, :]
            store(p_normed + rows[:, None].to(tl.int64) * D + columns[None, :], y, mask)
