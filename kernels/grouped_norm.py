"""Post-block steering with its own adapter for each token, and the RMSNorm that follows it, by one kernel.

    out    = x + g ⊙ (φ[i](a) W2[i]ᵀ + b2[i])            x = residual + branch, as in grouped.py
    normed = out · inv ⊙ w                               inv = 1 / sqrt(mean(out²) + eps), as in norm.py

For serving, forward only. A server's decoder layer leaves its last add to the norm that follows, which adds and
normalises by one kernel. This op takes that kernel's place: one launch, and 4 units of N·d through device memory (read
two, write two). So steering adds neither a launch nor a pass. A token without an adapter is added and normalised.

A program holds its rows' a and Σ out² on chip. It reads its rows twice (the second time from a cache), and its `out`
once more from L2, where it has just put it. There are two schedules, as in grouped.py. *Few*: a program has one token.
*Many*: a program has a tile of 16 tokens and computes its products for each adapter in the tile with tensor cores.
Neither splits d between programs, because the norm needs whole rows.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import norm_torch
from .backend import select_backend
from .contract import GroupedCall, check_flag
from .flops import of_inference
from .grouped import (
    OPERANDS,
    Routing,
    Weights,
    activate,
    as_rows,
    check_grouped,
    joined,
    kind_of_call,
    note_written,
    refusal,
    separated,
    sum_dtype,
    tile_schedule,
    tile_shift,
    tile_x,
    token_schedule,
    token_shift,
)
from .grouped_torch import grouped_forward
from .launch import device_of, empty, is_recording, launch
from .norm import check_norm, norm_constants
from .norm_torch import Norm
from .numerics import dot, dot_precision, operand, store
from .plan import OpPlan, run_planned
from .registered import is_described, register
from .rows import norm_factor, normalised, rounded
from .schedule import ceil_div, next_power_of_2, padded_rank

TOKENS_A_MULTIPROCESSOR = 8  # up to this many for each, a token has its own program

# ----------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def post_block_grouped_token_norm_kernel(
    p_residual, p_branch, p_downs, p_ups, p_ids, p_down_biases, p_up_biases, p_codes, p_gain, p_weight,
    p_out, p_normed,
    eps, SLOTS, D, residual_stride, branch_stride, out_stride, normed_stride,
    RANK: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_DOWN_BIAS: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr, READS_BRANCH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, PLUS_ONE: tl.constexpr, ROUNDS_FIRST: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Compute `out` and `normed` of one token. Grid (N,)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(p_ids + token).to(tl.int64)
    lost = slot >= SLOTS
    steered = (slot >= 0) & (slot < SLOTS)
    if HAS_GAIN:
        gain = tl.load(p_gain + token).to(tl.float32)
        steered = steered & (gain != 0)
    p_x = p_residual + token * residual_stride
    p_add = p_branch + token * branch_stride if HAS_BRANCH else p_x
    ranks = tl.arange(0, BLOCK_R)
    h = tl.zeros([BLOCK_R], tl.float32)
    if RANK > 0:
        if steered:
            for start in range(0, D, BLOCK_D):
                columns = start + tl.arange(0, BLOCK_D)
                m_columns = columns < D
                x = tl.load(p_add + columns, mask=m_columns, other=0.0).to(tl.float32)
                if HAS_BRANCH and not READS_BRANCH:
                    x += tl.load(p_x + columns, mask=m_columns, other=0.0).to(tl.float32)
                # [BLOCK_R, BLOCK_D]
                pointers = p_downs + (slot * RANK + ranks[:, None]) * D + columns[None, :]
                w1 = tl.load(pointers, mask=(ranks[:, None] < RANK) & m_columns[None, :], other=0.0).to(tl.float32)
                h += tl.sum(w1 * x[None, :], 1)
            if HAS_DOWN_BIAS:
                h += tl.load(p_down_biases + slot * RANK + ranks, mask=ranks < RANK, other=0.0).to(tl.float32)
            code = tl.load(p_codes + slot) if ACTIVATION == "" else 0
            h = activate(h, code, ACTIVATION)

    squares = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        m_columns = columns < D
        x = tl.load(p_x + columns, mask=m_columns, other=0.0).to(tl.float32)
        if HAS_BRANCH:
            x += tl.load(p_add + columns, mask=m_columns, other=0.0).to(tl.float32)
        u = tl.zeros([BLOCK_D], tl.float32)
        if steered:
            u += token_shift(p_ups, p_up_biases, slot, h, ranks, columns, m_columns, D, RANK, HAS_UP_BIAS)
            if HAS_GAIN:
                u *= gain
        # −0 + 0 would be +0, so a zero shift keeps x bit for bit. An out-of-range slot id reads nothing. The token's
        # output is NaN, so that the error shows.
        out = tl.where(u == 0, x, x + u)
        out = tl.where(lost, float("nan"), out)
        store(p_out + token * out_stride + columns, out, m_columns)
        out = rounded(out, p_out)
        squares += out * out
    inverse = 1.0 / tl.sqrt(tl.sum(squares, 0) / D + eps)

    # A thread may read what another one wrote.
    tl.debug_barrier()
    for start in tl.range(0, D, BLOCK_D, num_stages=1):
        columns = start + tl.arange(0, BLOCK_D)
        m_columns = columns < D
        out = tl.load(p_out + token * out_stride + columns, mask=m_columns, other=0.0).to(tl.float32)
        weight = 1.0
        if HAS_WEIGHT:
            weight = norm_factor(p_weight, columns, m_columns, PLUS_ONE)
        out = normalised(out, inverse, weight, p_normed, HAS_WEIGHT, ROUNDS_FIRST)
        store(p_normed + token * normed_stride + columns, out, m_columns)


@triton.jit(do_not_specialize=["N"])
def post_block_grouped_tile_norm_kernel(
    p_residual, p_branch, p_downs, p_ups, p_ids, p_down_biases, p_up_biases, p_codes, p_gain, p_weight,
    p_out, p_normed,
    eps, SLOTS, N, D, residual_stride, branch_stride, out_stride, normed_stride,
    RANK: tl.constexpr, ACTIVATION: tl.constexpr, DOT: tl.constexpr, HAS_BRANCH: tl.constexpr,
    HAS_DOWN_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr, READS_BRANCH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, PLUS_ONE: tl.constexpr, ROUNDS_FIRST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D3: tl.constexpr,
):  # fmt: skip
    """Compute `out` and `normed` of a tile of tokens, from the highest slot in it down to "none". Grid (tiles,)."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_rows = rows < N
    slots = tl.load(p_ids + rows, mask=m_rows, other=-1).to(tl.int32)
    if HAS_GAIN:
        gain = tl.load(p_gain + rows, mask=m_rows, other=0.0).to(tl.float32)
        slots = tl.where((gain == 0) & (slots < SLOTS), -1, slots)
    slots = tl.maximum(slots, -1)
    wide_rows = rows.to(tl.int64)
    residual_rows = wide_rows * residual_stride
    branch_rows = wide_rows * branch_stride
    out_rows = (wide_rows * out_stride)[:, None]
    normed_rows = (wide_rows * normed_stride)[:, None]
    ranks = tl.arange(0, BLOCK_R)
    m_ranks = ranks < RANK

    squares = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    todo = slots
    slot = tl.max(todo, 0)
    while slot >= -1:
        own = (slots == slot) & m_rows
        wide = slot.to(tl.int64)
        there = (slot >= 0) & (slot < SLOTS)
        # `there` for each column. triton 3.9 interprets a mask of a scalar and a block as int32, and refuses it.
        of_columns = tl.zeros([BLOCK_D], tl.int32) + slot
        there_columns = (of_columns >= 0) & (of_columns < SLOTS)
        h = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        if RANK > 0:
            if there:
                for start in range(0, D, BLOCK_D):
                    columns = start + tl.arange(0, BLOCK_D)
                    m_columns = columns < D
                    mask = own[:, None] & m_columns[None, :]
                    if READS_BRANCH:
                        x = tile_x(p_branch, p_branch, branch_rows, branch_rows, columns, mask, False)
                    else:
                        x = tile_x(p_residual, p_branch, residual_rows, branch_rows, columns, mask, HAS_BRANCH)
                    # [BLOCK_R, BLOCK_D]
                    pointers = p_downs + (wide * RANK + ranks[:, None]) * D + columns[None, :]
                    w1 = tl.load(pointers, mask=m_ranks[:, None] & m_columns[None, :], other=0.0)
                    h = dot(operand(x, DOT), tl.trans(operand(w1, DOT)), h, DOT)
                if HAS_DOWN_BIAS:
                    b1 = tl.load(p_down_biases + wide * RANK + ranks, mask=m_ranks, other=0.0)
                    h += b1.to(tl.float32)[None, :]
                code = tl.load(p_codes + wide) if ACTIVATION == "" else 0
                h = activate(h, code, ACTIVATION)
        a = operand(h, DOT)
        for start in range(0, D, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            m_columns = columns < D
            mask = own[:, None] & m_columns[None, :]
            u = tile_shift(
                p_ups, p_up_biases, wide, a, ranks, columns, m_columns & there_columns, D, RANK, DOT, HAS_UP_BIAS
            )  # fmt: skip
            if HAS_GAIN:
                u *= gain[:, None]
            u = tl.where(there, u, 0.0)  # also for a token without gain, whatever its a
            x = tile_x(p_residual, p_branch, residual_rows, branch_rows, columns, mask, HAS_BRANCH)
            out = tl.where(u == 0, x, x + u)
            out = tl.where(slot >= SLOTS, float("nan"), out)
            store(p_out + out_rows + columns[None, :], out, mask)
            out = rounded(out, p_out)
            squares += tl.where(mask, out * out, 0.0)
        todo = tl.where(slots == slot, -2, todo)
        slot = tl.max(todo, 0)
    # Rows that are not there must not divide by zero.
    inverse = 1.0 / tl.sqrt(tl.where(m_rows, tl.sum(squares, 1) / D + eps, 1.0))

    # A thread may read what another one wrote. The loads are not asynchronous, because an asynchronous copy is not
    # ordered behind the program's own writes.
    tl.debug_barrier()
    for start in tl.range(0, D, BLOCK_D3, num_stages=1):
        columns = start + tl.arange(0, BLOCK_D3)
        m_columns = columns < D
        mask = m_rows[:, None] & m_columns[None, :]
        out = tl.load(p_out + out_rows + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        weight = 1.0
        if HAS_WEIGHT:
            weight = norm_factor(p_weight, columns, m_columns, PLUS_ONE)[None, :]
        out = normalised(out, inverse[:, None], weight, p_normed, HAS_WEIGHT, ROUNDS_FIRST)
        store(p_normed + normed_rows + columns[None, :], out, mask)


# ---------------------------------------------------------------------------------------------------------- launcher


def triton_grouped_norm(call: GroupedCall, norm: Norm, normed: Tensor) -> None:
    """Write `call.out` and `normed`, (N, d) of any row stride, by one launch. They may lie in residual and branch."""
    tokens, hidden = call.residual.shape
    device, rank, dtype = device_of(call.residual), call.rank, sum_dtype(call.residual, call.branch)
    few = tokens <= TOKENS_A_MULTIPROCESSOR * device.multiprocessors
    size: tuple[int, ...] = () if few else (tokens,)  # the tile kernel takes one more argument
    named = isinstance(call.activation, str)
    weight = None if norm.weight is None else norm.weight.contiguous()
    if few:
        schedule = token_schedule(max(2, next_power_of_2(rank)), hidden)
        kernel, grid = post_block_grouped_token_norm_kernel, (tokens,)
        flags: dict[str, Any] = {}
    else:
        schedule = tile_schedule(padded_rank(rank), hidden, dtype.itemsize)
        kernel = post_block_grouped_tile_norm_kernel
        grid = (ceil_div(tokens, schedule.constants["BLOCK_N"]),)
        flags = {
            "DOT": dot_precision(dtype, device.gpu, rank),
            "BLOCK_D3": min(256, next_power_of_2(hidden)),
        }  # fmt: skip
    launch(
        kernel, grid, call.residual, call.branch, call.downs, call.ups, call.ids, call.down_biases, call.up_biases,
        None if named else call.activation, call.gain, weight, call.out, normed,
        norm.eps, call.slots, *size, hidden, call.residual.stride(0),
        0 if call.branch is None else call.branch.stride(0), call.out.stride(0), normed.stride(0),
        **flags, RANK=rank, ACTIVATION=call.activation if named else "", HAS_BRANCH=call.branch is not None,
        HAS_DOWN_BIAS=call.down_biases is not None, HAS_UP_BIAS=call.up_biases is not None,
        HAS_GAIN=call.gain is not None, READS_BRANCH=call.reads == "branch", **norm_constants(norm),
        device=call.residual.device, schedule=schedule,
    )  # fmt: skip


def _run(
    residual: Tensor, branch: Tensor | None, weights: Weights, routing: Routing, norm: Norm, reads: str, in_place: bool
) -> tuple[Tensor, Tensor]:
    """Return `out` and `normed`, in place of the residual and the branch or in new tensors."""
    of_residual = as_rows("residual", residual, in_place)
    of_branch = None if branch is None else as_rows("branch", branch, in_place)
    if in_place:
        assert branch is not None and of_branch is not None
        out, normed, of_out, of_normed = residual, branch, of_residual, of_branch
    else:
        dtype = sum_dtype(residual, branch)
        out, normed = (empty(*residual.shape, dtype=dtype, device=residual.device) for _ in range(2))
        of_out, of_normed = out.view(of_residual.shape), normed.view(of_residual.shape)
    if not residual.numel():
        return out, normed
    downs, ups, down_biases, up_biases = (None if t is None else t.contiguous() for t in weights[:4])
    call = GroupedCall(
        of_residual, of_branch, downs, ups, down_biases, up_biases, weights[4], routing.ids, routing.gain, of_out,
        False, reads,
    )  # fmt: skip
    if is_recording() or select_backend(residual.device) == "triton":
        triton_grouped_norm(call, norm, of_normed)
        return out, normed
    if in_place:
        call.out = torch.empty_like(of_out, memory_format=torch.contiguous_format)  # the torch backend reads both twice
    grouped_forward(call, routing.plan())
    if in_place:
        of_out.copy_(call.out)
    of_normed.copy_(norm_torch.forward(call.out, norm)[0])
    return out, normed


# ------------------------------------------------------------------------------------------------------ registered ops

_plans: dict[Any, OpPlan] = {}


def _planned(
    residual: Tensor, branch: Tensor | None, operands: tuple[Any, ...], norm: Norm, in_place: bool
) -> tuple[Tensor, ...]:
    def call() -> tuple[Tensor, ...]:
        weights, routing, reads = separated(operands)
        found = _run(residual, branch, weights, routing, norm, reads, in_place)
        return () if in_place else found

    key = (in_place, *kind_of_call(residual, branch, operands), norm.weight is None, *norm[1:])
    return tuple(run_planned(_plans, key, (residual, branch, *operands, norm.weight), call))


def _out_of_place(residual: Tensor, branch: Tensor | None, *inputs: Any) -> tuple[Tensor, Tensor]:
    out, normed = _planned(residual, branch, inputs[:-4], Norm(*inputs[-4:]), False)
    return out, normed


def _in_place(residual: Tensor, branch: Tensor, *inputs: Any) -> None:
    _planned(residual, branch, inputs[:-4], Norm(*inputs[-4:]), True)
    note_written(residual)
    note_written(branch)


def _fake(residual: Tensor, branch: Tensor | None, *inputs: Any) -> tuple[Tensor, Tensor]:
    out = residual.new_empty(residual.shape, dtype=sum_dtype(residual, branch))
    return out, torch.empty_like(out)


_NORM = "Tensor? norm_weight, float eps, bool plus_one, bool rounds_first"

register(
    f"post_block_grouped_norm(Tensor residual, Tensor? branch, {OPERANDS}, {_NORM}) -> (Tensor, Tensor)",
    _out_of_place, _fake, refusal("post_block_grouped_norm"), of_inference,
)  # fmt: skip
register(
    f"post_block_grouped_norm_(Tensor(a!) residual, Tensor(b!) branch, {OPERANDS}, {_NORM}) -> ()",
    _in_place, lambda *inputs: None, refusal("post_block_grouped_norm"), of_inference,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------- caller's part


def post_block_grouped_norm(
    residual: Tensor,
    branch: Tensor | None,
    downs: Tensor | None,
    ups: Tensor | None,
    adapter_ids: Tensor,
    *,
    norm_weight: Tensor | None,
    eps: float,
    plus_one: bool = False,
    rounds_first: bool = True,
    down_biases: Tensor | None = None,
    up_biases: Tensor | None = None,
    activation: str | Tensor = "silu",
    gain: Tensor | None = None,
    reads: str = "sum",
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """Steer each token as `post_block_grouped` does, and normalise the result as `rms_norm` does, by one launch.

    Forward only. A token without an adapter or with a zero gain has `residual + branch` bit for bit as its `out`.

    Args:
        residual: (..., d), float32, bfloat16 or float16, d at most 32768.
        branch: (..., d), which is added to the residual, or None.
        downs: W1 of every slot, (A, r, d), or None, with `ups`, for vectors.
        ups: W2 of every slot, (A, d, r).
        adapter_ids: (...), int32 or int64, each token's slot. A negative one means no adapter.
        norm_weight: w (d,), or None for no weight.
        eps: added to the mean square.
        plus_one: multiply by 1 + w, as Gemma does.
        rounds_first: round out / rms to its dtype before it is multiplied by w, as Llama does.
        down_biases: b1 (A, r).
        up_biases: b2 (A, d).
        activation: φ of all slots by name, or (A,) int32, each slot's index in `ACTIVATIONS`.
        gain: g (...), each token's gain times strength. None means 1.
        reads: the tensor that W1 is applied to, "sum" (residual + branch) or "branch".
        in_place: write `out` into residual and `normed` into branch, which have one dtype, as a server's fused add and
            norm does.

    Returns:
        `out` and `normed`, (..., d) each, in the dtype of `residual + branch`: contiguous, or residual and branch.

    Raises:
        ValueError: a shape, device, rank, activation, stride, `reads` or eps is not supported; or `in_place` without a
            branch, or with residual and branch in one memory.
        TypeError: a dtype is not supported, or `in_place` with two dtypes.
        RuntimeError: a gradient is required.
    """
    weights = (downs, ups, down_biases, up_biases, activation)
    norm = Norm(norm_weight, eps, plus_one, rounds_first)
    check_grouped("post_block_grouped_norm", residual, branch, weights, adapter_ids, gain, reads)
    check_norm(residual, norm)
    check_flag("in_place", in_place)
    if torch.is_grad_enabled() and norm_weight is not None and norm_weight.requires_grad:
        refusal("post_block_grouped_norm")()
    if in_place:
        _check_in_place(residual, branch)
    operands = (*joined(weights, adapter_ids, gain, reads), *norm)
    run = torch.ops.fused_steer
    if torch.compiler.is_compiling() or not is_recording():
        if branch is not None and in_place:
            run.post_block_grouped_norm_(residual, branch, *operands)
            return residual, branch
        return run.post_block_grouped_norm(residual, branch, *operands)
    with torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext():
        return _run(residual, branch, weights, Routing(adapter_ids, gain), norm, reads, in_place)


def _check_in_place(residual: Tensor, branch: Tensor | None) -> None:
    if branch is None:
        raise ValueError("in_place is True without a branch; expected one to write the normalised state into")
    if branch.dtype != residual.dtype:
        raise TypeError(f"in_place with residual {residual.dtype} and branch {branch.dtype}; expected one dtype")
    rows = [as_rows(name, tensor, in_place=True) for name, tensor in (("residual", residual), ("branch", branch))]
    if torch.compiler.is_compiling() or is_described(residual):
        return
    if residual.numel() and _share_memory(*rows):
        raise ValueError("in_place with residual and branch in one memory; expected two tensors")


def _share_memory(one: Tensor, other: Tensor) -> bool:
    """Return whether rows (N, d) of two tensors of one dtype share memory. Rows may lie between the other's rows."""
    first, second = sorted((one, other), key=Tensor.data_ptr)
    ahead = second.data_ptr() - first.data_ptr()
    (tokens, hidden), size = first.shape, first.element_size()
    if ahead >= ((tokens - 1) * first.stride(0) + hidden) * size:
        return False
    apart, width = first.stride(0) * size, hidden * size
    if first.stride(0) != second.stride(0) or not apart:
        return True
    return ahead % apart < width or ahead % apart > apart - width
