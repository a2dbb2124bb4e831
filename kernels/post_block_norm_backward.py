"""The backward of post_block and the RMSNorm behind it, for low ranks: two kernels that hold whole rows in registers.

With the gradients of `out` and `normed`, and D = ∂L/∂normed ⊙ w:

    G   = ∂L/∂out + inv · (D − out · inv² · mean(D ⊙ out))     as in norm.py
    da  = s · g · φ'(a) ⊙ (G W2')        dx = G + da W1          as in post_block.py
    dW2' = Gᵀ h                          h = s · g · φ(a)
    dW1 = daᵀ out − (daᵀ h) W2'ᵀ − (daᵀ (s · g)) b2ᵀ

*In one pass*, `post_block_norm_bwd_held_kernel`: G never leaves the registers, and 4 units of N·d move through device
memory. Both gradients and `out` are read, dx is written. The sums over rows for dW1 and dW2' are 2 r d numbers. A
program of eight warps holds them in its registers up to r · d = 16384. It walks over its share of the rows, and writes
the sums once at the end, to a slab of its own. Programs fill the registers of every multiprocessor once. So the next
tile of rows is loaded before this one is used, because few other programs hide the wait for memory. Two launches
follow: one adds the slabs in a fixed order, and post_block's last kernel makes the gradients of them.

*In two passes*, `post_block_norm_bwd_rows_kernel`: 7 units. It computes da and h while it has G, and writes G.
post_block's kernel for columns reads G and `out`, and writes dx. Up to rank 8 the sums over d for G W2' take less time
than to read G again.

Which of them a call takes, or neither, `schedule.norm_backward_schedule` decides. The launchers come after the kernels.
"""

# Tuples grow in loops that Triton unrolls.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import apply, derivative
from .contract import Gradients, Needs, Operands
from .launch import contiguous, device_of, empty, launch, row_layout
from .norm import add_partial_sums
from .norm_torch import Norm
from .numerics import dot_precision, operand, operand_dtype, store, widened
from .packing import pack_adapter
from .rows import norm_factor, row_offsets, row_strength, row_sums, scaled
from .schedule import norm_backward_schedule, padded_rank
from .triton_backend import backward, finish, numbers_of_slab

# ----------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _loaded(
    p_grad, p_grad_normed, p_out, tile, N, D, inner, grad_outer, grad_inner, normed_outer, normed_inner,
    HAS_GRAD: tl.constexpr, NESTED: tl.constexpr, EVEN_D: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Load a tile of both gradients and of `out`, not through L1, where the weights stay.

    A tuple with ∂L/∂normed, `out` and perhaps ∂L/∂out of each chunk in turn.
    """
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_rows = (rows < N)[:, None]
    grad_rows = row_offsets(rows, inner, grad_outer, grad_inner, NESTED)[:, None]
    normed_rows = row_offsets(rows, inner, normed_outer, normed_inner, NESTED)[:, None]
    out_rows = rows[:, None].to(tl.int64) * D
    found = ()
    for chunk in tl.static_range(CHUNKS):
        columns = (chunk * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
        mask = m_rows & ((columns < D) | EVEN_D)
        above = tl.load(p_grad_normed + normed_rows + columns, mask=mask, other=0.0, cache_modifier=".cg")
        out = tl.load(p_out + out_rows + columns, mask=mask, other=0.0, cache_modifier=".cg")
        if HAS_GRAD:
            grad = tl.load(p_grad + grad_rows + columns, mask=mask, other=0.0, cache_modifier=".cg")
            found = found + (above, out, grad)
        else:
            found = found + (above, out)
    return found


@triton.jit
def _of_norm(
    states, inverse, p_weight, D,
    HAS_GRAD: tl.constexpr, HAS_WEIGHT: tl.constexpr, PLUS_ONE: tl.constexpr, EVEN_D: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return G of a tile of `_loaded` in fp32, a tuple of CHUNKS [BLOCK_N, BLOCK_D]."""
    EACH: tl.constexpr = 3 if HAS_GRAD else 2
    products = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    aboves, grads = (), ()
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        above = widened(states[chunk * EACH])
        if HAS_WEIGHT:
            above *= norm_factor(p_weight, columns, (columns < D) | EVEN_D, PLUS_ONE)[None, :]
        products += above * widened(states[chunk * EACH + 1])
        aboves = aboves + (above,)
    along = tl.sum(products, 1) / D * inverse * inverse * inverse
    for chunk in tl.static_range(CHUNKS):
        grad = aboves[chunk] * inverse[:, None] - widened(states[chunk * EACH + 1]) * along[:, None]
        if HAS_GRAD:
            grad += widened(states[chunk * EACH + 2])
        grads = grads + (grad,)
    return grads


@triton.jit
def _times_up(
    grads, p_up, D,
    RANK: tl.constexpr, EVEN_D: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return G W2', a tuple of RANK [BLOCK_N]. W2' is packed."""
    products = ()
    for rank in tl.static_range(RANK):
        product = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            columns = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
            w2 = tl.load(p_up + rank * D + columns, mask=(columns < D) | EVEN_D, other=0.0)
            product += grads[chunk] * widened(w2)[None, :]
        products = products + (product,)
    return row_sums(products, RANK)


@triton.jit
def _among(values, places, COUNT: tl.constexpr):
    """Return for each of `places` the scalar with this number, 0 where there is none."""
    found = tl.zeros(places.shape, tl.float32)
    for number in tl.static_range(COUNT):
        found = tl.where(places == number, values[number], found)
    return found


@triton.jit(do_not_specialize=["N", "inner"])
def post_block_norm_bwd_held_kernel(
    p_grad, p_grad_normed, p_out, p_a, p_inverse, p_down, p_up, p_gain, p_scale, p_weight,
    p_dx, p_slab, p_da_sums,
    scale, N, D, slab_size, inner, grad_outer, grad_inner, normed_outer, normed_inner,
    RANK: tl.constexpr, ACTIVATION: tl.constexpr, DOT: tl.constexpr,
    HAS_GRAD: tl.constexpr, HAS_UP_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr, SCALE_ON_DEVICE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, PLUS_ONE: tl.constexpr, NESTED: tl.constexpr, EVEN_D: tl.constexpr,
    NEED_X: tl.constexpr, NEED_DOWN: tl.constexpr, NEED_UP: tl.constexpr, NEED_UP_BIAS: tl.constexpr,
    NEED_DA_SUM: tl.constexpr,
    PADDED_R: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute dx, and each program's sums over its rows. Grid (programs,). Programs loop over tiles of BLOCK_N rows.

    Weights are packed, (PADDED_R, d). CHUNKS blocks of BLOCK_D columns cover d. A program's sums go to its slab, as
    `post_block_bwd_columns_kernel` describes it, with PADDED_R for BLOCK_R, and those of da to p_da_sums
    (programs, PADDED_R).
    """
    EACH: tl.constexpr = 3 if HAS_GRAD else 2
    local = tl.arange(0, BLOCK_N)
    within = tl.arange(0, BLOCK_D)
    # Pairs of ranks (i, j), numbered i · PADDED_R + j, for daᵀ h.
    pairs = tl.arange(0, PADDED_R * PADDED_R)
    first, second = pairs // PADDED_R, pairs % PADDED_R
    cross = tl.zeros([PADDED_R * PADDED_R], tl.float32)
    along_bias = tl.zeros([PADDED_R * PADDED_R], tl.float32)
    da_sums = tl.zeros([PADDED_R * PADDED_R], tl.float32)
    d_downs, d_ups, d_up_biases = (), (), ()
    for _ in tl.static_range(CHUNKS):
        for _rank in tl.static_range(RANK):
            if NEED_DOWN:
                d_downs = d_downs + (tl.zeros([BLOCK_D], tl.float32),)
            if NEED_UP:
                d_ups = d_ups + (tl.zeros([BLOCK_D], tl.float32),)
        if NEED_UP_BIAS:
            d_up_biases = d_up_biases + (tl.zeros([BLOCK_D], tl.float32),)

    tiles = tl.cdiv(N, BLOCK_N)
    states = _loaded(
        p_grad, p_grad_normed, p_out, tl.program_id(0), N, D, inner, grad_outer, grad_inner, normed_outer, normed_inner,
        HAS_GRAD, NESTED, EVEN_D, CHUNKS, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        rows = tile * BLOCK_N + local
        m_rows = rows < N
        inverse = tl.load(p_inverse + rows, mask=m_rows, other=0.0)
        strength = row_strength(p_gain, p_scale, scale, rows, m_rows, HAS_GAIN, SCALE_ON_DEVICE)
        preactivations = ()
        for rank in tl.static_range(RANK):
            a = tl.load(p_a + rows.to(tl.int64) * RANK + rank, mask=m_rows, other=0.0)
            preactivations = preactivations + (a,)

        grads = _of_norm(states, inverse, p_weight, D, HAS_GRAD, HAS_WEIGHT, PLUS_ONE, EVEN_D, CHUNKS, BLOCK_N, BLOCK_D)
        # Here, where the gradients of this tile have been used, their registers are free.
        following = _loaded(
            p_grad, p_grad_normed, p_out, tile + tl.num_programs(0), N, D, inner, grad_outer, grad_inner,
            normed_outer, normed_inner, HAS_GRAD, NESTED, EVEN_D, CHUNKS, BLOCK_N, BLOCK_D,
        )  # fmt: skip

        # Of each row and rank a number, which all threads have.
        gz = _times_up(grads, p_up, D, RANK, EVEN_D, CHUNKS, BLOCK_N, BLOCK_D)
        das, hs = (), ()
        for rank in tl.static_range(RANK):
            das = das + (scaled(gz[rank] * derivative(preactivations[rank], ACTIVATION), strength),)
            h = operand(scaled(apply(preactivations[rank], ACTIVATION), strength), DOT)
            hs = hs + (h.to(tl.float32),)

        for chunk in tl.static_range(CHUNKS):
            columns = chunk * BLOCK_D + within
            m_columns = (columns < D) | EVEN_D
            out = widened(states[chunk * EACH + 1])
            if NEED_X:
                shift = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            for rank in tl.static_range(RANK):
                if NEED_DOWN:
                    d_down = d_downs[chunk * RANK + rank] + tl.sum(das[rank][:, None] * out, 0)
                    d_downs = d_downs[: chunk * RANK + rank] + (d_down,) + d_downs[chunk * RANK + rank + 1 :]
                if NEED_UP:
                    d_up = d_ups[chunk * RANK + rank] + tl.sum(hs[rank][:, None] * grads[chunk], 0)
                    d_ups = d_ups[: chunk * RANK + rank] + (d_up,) + d_ups[chunk * RANK + rank + 1 :]
                if NEED_X:
                    w1 = tl.load(p_down + rank * D + columns, mask=m_columns, other=0.0)
                    shift += das[rank][:, None] * widened(w1)[None, :]
            if NEED_UP_BIAS:
                d_up_bias = d_up_biases[chunk] + tl.sum(scaled(grads[chunk], strength[:, None]), 0)
                d_up_biases = d_up_biases[:chunk] + (d_up_bias,) + d_up_biases[chunk + 1 :]
            if NEED_X:
                # Zero strength keeps G, whatever W1 holds.
                dx = tl.where((strength == 0)[:, None], grads[chunk], grads[chunk] + shift)
                mask = m_rows[:, None] & m_columns[None, :]
                store(p_dx + rows[:, None].to(tl.int64) * D + columns[None, :], dx, mask)
        if NEED_DOWN or NEED_DA_SUM:
            for row in tl.static_range(BLOCK_N):
                da_of_row, h_of_row = (), ()
                for rank in tl.static_range(RANK):
                    da_of_row = da_of_row + (tl.sum(tl.where(local == row, das[rank], 0.0), 0),)
                    h_of_row = h_of_row + (tl.sum(tl.where(local == row, hs[rank], 0.0), 0),)
                da = _among(da_of_row, first, RANK)
                da_sums += da
                if NEED_DOWN:
                    cross += da * _among(h_of_row, second, RANK)
                    if HAS_UP_BIAS:
                        along_bias += da * tl.sum(tl.where(local == row, strength, 0.0), 0)
        states = following

    if NEED_DOWN or NEED_UP or NEED_UP_BIAS:
        slab = p_slab + tl.program_id(0).to(tl.int64) * slab_size
        for chunk in tl.static_range(CHUNKS):
            columns = chunk * BLOCK_D + within
            m_columns = (columns < D) | EVEN_D
            for rank in tl.static_range(RANK):
                if NEED_DOWN:
                    tl.store(slab + rank * D + columns, d_downs[chunk * RANK + rank], mask=m_columns)
                if NEED_UP:
                    tl.store(slab + (RANK + rank) * D + columns, d_ups[chunk * RANK + rank], mask=m_columns)
            if NEED_UP_BIAS:
                behind = 2 * RANK * D + PADDED_R * PADDED_R + PADDED_R
                tl.store(slab + behind + columns, d_up_biases[chunk], mask=m_columns)
        if NEED_DOWN:
            tl.store(slab + 2 * RANK * D + pairs, cross)
            if HAS_UP_BIAS:
                tl.store(slab + 2 * RANK * D + PADDED_R * PADDED_R + first, along_bias, mask=second == 0)
    if NEED_DA_SUM:
        tl.store(p_da_sums + tl.program_id(0) * PADDED_R + first, da_sums, mask=second == 0)


@triton.jit(do_not_specialize=["N", "inner"])
def post_block_norm_bwd_rows_kernel(
    p_grad, p_grad_normed, p_kept, p_a, p_inverse, p_up, p_gain, p_scale, p_weight, p_dx, p_narrow, p_da_sums,
    scale, N, D, inner, grad_outer, grad_inner, normed_outer, normed_inner,
    RANK: tl.constexpr, ACTIVATION: tl.constexpr, DOT: tl.constexpr,
    HAS_GRAD: tl.constexpr, HAS_GAIN: tl.constexpr, SCALE_ON_DEVICE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, PLUS_ONE: tl.constexpr, NESTED: tl.constexpr, EVEN_D: tl.constexpr,
    NEED_DA_SUM: tl.constexpr, PADDED_R: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write G to p_dx, and da and h to p_narrow, as `post_block_bwd_rows_kernel` does. Grid (tiles of BLOCK_N rows,).

    W2' is packed, (PADDED_R, d). The sums of da over a tile go to p_da_sums (tiles, PADDED_R).
    """
    tile = tl.program_id(0)
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_rows = rows < N
    within = tl.arange(0, BLOCK_D)
    states = _loaded(
        p_grad, p_grad_normed, p_kept, tile, N, D, inner, grad_outer, grad_inner, normed_outer, normed_inner,
        HAS_GRAD, NESTED, EVEN_D, CHUNKS, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    inverse = tl.load(p_inverse + rows, mask=m_rows, other=0.0)
    grads = _of_norm(states, inverse, p_weight, D, HAS_GRAD, HAS_WEIGHT, PLUS_ONE, EVEN_D, CHUNKS, BLOCK_N, BLOCK_D)
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * BLOCK_D + within
        mask = m_rows[:, None] & ((columns < D) | EVEN_D)[None, :]
        store(p_dx + rows[:, None].to(tl.int64) * D + columns[None, :], grads[chunk], mask)
    gz = _times_up(grads, p_up, D, RANK, EVEN_D, CHUNKS, BLOCK_N, BLOCK_D)

    # One number for each row and rank: the sums, a number for each thread, meet a here.
    ranks = tl.arange(0, PADDED_R)
    at_rank = tl.zeros([BLOCK_N, PADDED_R], tl.float32)
    for rank in tl.static_range(RANK):
        at_rank = tl.where((ranks == rank)[None, :], gz[rank][:, None], at_rank)
    m_ranks = m_rows[:, None] & (ranks < RANK)[None, :]
    a = tl.load(p_a + rows[:, None].to(tl.int64) * RANK + ranks[None, :], mask=m_ranks, other=0.0)
    strength = row_strength(p_gain, p_scale, scale, rows, m_rows, HAS_GAIN, SCALE_ON_DEVICE)[:, None]
    da = scaled(at_rank * derivative(a, ACTIVATION), strength)
    h = operand(scaled(apply(a, ACTIVATION), strength), DOT)
    p_rows = p_narrow + rows[:, None].to(tl.int64) * PADDED_R + ranks[None, :]
    store(p_rows, operand(da, DOT), m_rows[:, None])
    store(p_rows + tl.cast(N, tl.int64) * PADDED_R, h, m_rows[:, None])
    if NEED_DA_SUM:
        da_sum = tl.sum(tl.where(m_rows[:, None], da, 0.0), 0)
        tl.store(p_da_sums + tile.to(tl.int64) * PADDED_R + ranks, da_sum)


# --------------------------------------------------------------------------------------------------------- launchers


def triton_backward_norm(
    grad: Tensor | None,
    grad_normed: Tensor,
    out: Tensor,
    kept: Tensor | None,
    a: Tensor,
    inverse: Tensor,
    operands: Operands,
    norm: Norm,
    needs: Needs,
    whole: bool = False,
) -> tuple[Tensor | None, Gradients] | None:
    """Return G and the gradients of the steering, or None if neither kernel applies and pays. G may be None.

    Args:
        grad, grad_normed: of `out` and `normed`, (..., d). out, a (N, r), inverse (N,): what the forward kept.
        kept: as in `triton_backend.backward`.
        operands: with W2' for W2.
        needs: without `row_dot`.
        whole: whether G is needed.
    """
    hidden, rank = out.shape[-1], operands.rank
    tokens, device = out.numel() // hidden, device_of(out)
    sums = (needs.down, needs.up, needs.up_bias)
    one_pass = not whole and operands.reads == "sum"
    schedule = norm_backward_schedule(tokens, hidden, rank, out.dtype.itemsize, device, sums, one_pass)
    if schedule is None or needs.row_dot or not out.is_contiguous():
        return None
    (grad, grad_normed), inner, strides = row_layout(grad, grad_normed)
    down, up, gain, weight = contiguous(operands.down, operands.up, operands.gain, norm.weight)
    assert down is not None and up is not None
    packed = pack_adapter(down, up, out.dtype) if operands.packed is None else operands.packed
    operands = operands._replace(gain=gain, packed=packed)
    scale = operands.scale
    p_scale, scale = (scale, 0.0) if isinstance(scale, Tensor) else (None, scale)
    policy, block_r = dot_precision(out.dtype, device.gpu, rank), padded_rank(rank)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return empty(*shape, dtype=dtype, device=out.device)

    da_sums = new(schedule.programs, block_r) if needs.down_bias else None
    constants: dict[str, Any] = {
        "device": out.device, "RANK": rank, "DOT": policy, "ACTIVATION": operands.activation, "PADDED_R": block_r,
        "HAS_GRAD": grad is not None, "HAS_GAIN": gain is not None, "SCALE_ON_DEVICE": p_scale is not None,
        "HAS_WEIGHT": weight is not None, "PLUS_ONE": norm.plus_one, "NESTED": inner > 0,
        "EVEN_D": hidden % schedule.block_d == 0, "NEED_DA_SUM": needs.down_bias,
    }  # fmt: skip
    states, of_states = (grad, grad_normed, out, a, inverse), [stride for both in strides for stride in both]
    if not schedule.held:
        total = new(*out.shape, dtype=out.dtype)
        narrow = new(2, tokens, block_r, dtype=operand_dtype(out.dtype, device.gpu, rank))
        launch(
            post_block_norm_bwd_rows_kernel, (schedule.programs,),
            *states, packed.up, gain, p_scale, weight, total, narrow, da_sums,
            scale, tokens, hidden, inner, *of_states, schedule=schedule, **constants,
        )  # fmt: skip
        return total, backward(total, kept, a, operands, needs, (narrow, da_sums))
    result = Gradients(x=new(*out.shape, dtype=out.dtype) if needs.x else None)
    size = numbers_of_slab(hidden, rank)
    slab = new(schedule.programs, size) if any(sums) else None
    launch(
        post_block_norm_bwd_held_kernel, (schedule.programs,),
        *states, *packed, gain, p_scale, weight, result.x, slab, da_sums,
        scale, tokens, hidden, size, inner, *of_states, schedule=schedule, **constants,
        HAS_UP_BIAS=operands.up_bias is not None, NEED_X=needs.x, NEED_DOWN=needs.down, NEED_UP=needs.up,
        NEED_UP_BIAS=needs.up_bias,
    )  # fmt: skip
    if slab is not None and schedule.programs > 1:
        slab = add_partial_sums(slab, new(1, size))
    if slab is not None or da_sums is not None:
        finish(result, operands, rank, needs, out.dtype, slab, da_sums)
    return None, result
