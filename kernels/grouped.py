"""Post-block steering with its own adapter for each token of a batch. For serving, forward only.

    x   = residual + branch                              (N, d)
    a   = x W1[i]ᵀ + b1[i]                               (N, r)   i = adapter_ids (N,): the token's slot; below 0, none
    out = x + g ⊙ (φ[i](a) W2[i]ᵀ + b2[i])               (N, d)   W1 = downs (A, r, d), W2 = ups (A, d, r)

With reads = "branch" W1 is applied to branch instead of x.

With `into_branch` the op writes branch + g ⊙ (…) into branch's memory and does not add the residual, for a runtime that
passes both to a fused add and norm. A token without an adapter gets `residual + branch` bit for bit, and its branch is
not touched.

There are two launches: one reduces over d, one writes. There are two schedules, chosen by the number of tokens, because
the ids are on the device. *Few* (decode): a program has one token and a part of d. *Many* (prefill): a program has a
tile of tokens and a part of d. For each adapter in the tile it computes the tile's products with tensor cores, and
keeps the adapter's rows. So a long run of one adapter costs as much as one adapter. Adapter weights are not copied, the
CPU never waits for the GPU, and no allocation grows with A. The file goes from the kernels to the public functions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import ACTIVATIONS, apply
from .backend import select_backend
from .contract import GroupedCall, check_choice, check_dense, check_flag, check_reads
from .derivatives import is_transformed
from .flops import of_inference
from .grouped_torch import TokenPlan, grouped_forward, plan_tokens
from .launch import device_of, empty, is_recording, launch
from .numerics import dot, dot_precision, operand, store
from .plan import OpPlan, run_planned
from .registered import is_described, is_watched, is_wrapped, register
from .schedule import MAX_RANK, Blocks, Device, ceil_div, next_power_of_2, padded_rank

FEW_TOKENS = 256  # up to this many, each token has its own program, as in decoding

# ----------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def activate(a, code, ACTIVATION: tl.constexpr):
    """Return φ(a) by name, or, if ACTIVATION is "", by its index in ACTIVATIONS. Another index gives NaN."""
    if ACTIVATION != "":
        return apply(a, ACTIVATION)
    out = tl.where(code == 0, a, float("nan"))
    out = tl.where(code == 1, apply(a, "silu"), out)
    out = tl.where(code == 2, apply(a, "gelu"), out)
    out = tl.where(code == 3, apply(a, "gelu_tanh"), out)
    out = tl.where(code == 4, apply(a, "relu"), out)
    return tl.where(code == 5, apply(a, "tanh"), out)


@triton.jit
def post_block_grouped_token_down_kernel(
    p_residual, p_branch, p_downs, p_ids, p_partial,
    SLOTS, D, part, residual_stride, branch_stride,
    RANK: tl.constexpr, HAS_BRANCH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Compute partial sums of x W1ᵀ for one token, over one split of d. Grid (N, splits)."""
    token = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    slot = tl.load(p_ids + token).to(tl.int64)
    if (slot >= 0) & (slot < SLOTS):
        ranks = tl.arange(0, BLOCK_R)
        a = tl.zeros([BLOCK_R], tl.float32)
        first = split * part
        for start in range(first, tl.minimum(first + part, D), BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            m_columns = columns < D
            x = tl.load(p_residual + token * residual_stride + columns, mask=m_columns, other=0.0).to(tl.float32)
            if HAS_BRANCH:
                x += tl.load(p_branch + token * branch_stride + columns, mask=m_columns, other=0.0).to(tl.float32)
            # [BLOCK_R, BLOCK_D]
            pointers = p_downs + (slot * RANK + ranks[:, None]) * D + columns[None, :]
            w1 = tl.load(pointers, mask=(ranks[:, None] < RANK) & m_columns[None, :], other=0.0).to(tl.float32)
            a += tl.sum(w1 * x[None, :], 1)
        tl.store(p_partial + (token * tl.num_programs(1) + split) * BLOCK_R + ranks, a)


@triton.jit
def token_shift(
    p_ups, p_up_biases, slot, h, ranks, columns, m_columns, D, RANK: tl.constexpr, HAS_UP_BIAS: tl.constexpr
):
    """Return a token's h W2ᵀ + b2 in a block of columns. [BLOCK_D]"""
    u = tl.zeros(columns.shape, tl.float32)
    if RANK > 0:
        # [BLOCK_D, BLOCK_R]
        pointers = p_ups + (slot * D + columns[:, None]) * RANK + ranks[None, :]
        mask = m_columns[:, None] & (ranks[None, :] < RANK)
        u += tl.sum(tl.load(pointers, mask=mask, other=0.0).to(tl.float32) * h[None, :], 1)
    if HAS_UP_BIAS:
        u += tl.load(p_up_biases + slot * D + columns, mask=m_columns, other=0.0).to(tl.float32)
    return u


@triton.jit
def post_block_grouped_token_up_kernel(
    p_residual, p_branch, p_ups, p_ids, p_partial, p_down_biases, p_up_biases, p_codes, p_gain, p_out,
    SLOTS, D, part, parts, residual_stride, branch_stride, out_stride,
    RANK: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_DOWN_BIAS: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr, INTO_BRANCH: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write one split of a token's columns. Grid (N, splits)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(p_ids + token).to(tl.int64)
    lost = slot >= SLOTS
    steered = (slot >= 0) & (slot < SLOTS)
    if HAS_GAIN:
        gain = tl.load(p_gain + token).to(tl.float32)
        steered = steered & (gain != 0)
    ranks = tl.arange(0, BLOCK_R)
    h = tl.zeros([BLOCK_R], tl.float32)
    if RANK > 0:
        if steered:
            for number in range(0, parts):
                h += tl.load(p_partial + (token * parts + number) * BLOCK_R + ranks)
            if HAS_DOWN_BIAS:
                h += tl.load(p_down_biases + slot * RANK + ranks, mask=ranks < RANK, other=0.0).to(tl.float32)
            code = tl.load(p_codes + slot) if ACTIVATION == "" else 0
            h = activate(h, code, ACTIVATION)
    if steered or lost or not INTO_BRANCH:
        first = tl.program_id(1) * part
        for start in range(first, tl.minimum(first + part, D), BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            m_columns = columns < D
            if INTO_BRANCH:
                x = tl.load(p_branch + token * branch_stride + columns, mask=m_columns, other=0.0).to(tl.float32)
            else:
                x = tl.load(p_residual + token * residual_stride + columns, mask=m_columns, other=0.0).to(tl.float32)
                if HAS_BRANCH:
                    x += tl.load(p_branch + token * branch_stride + columns, mask=m_columns, other=0.0).to(tl.float32)
            u = tl.zeros([BLOCK_D], tl.float32)
            if steered:
                u += token_shift(p_ups, p_up_biases, slot, h, ranks, columns, m_columns, D, RANK, HAS_UP_BIAS)
                if HAS_GAIN:
                    u *= gain
            # −0 + 0 would be +0, so a zero shift keeps x bit for bit. An out-of-range slot id reads nothing. The
            # token's output is NaN, so that the error shows.
            out = tl.where(u == 0, x, x + u)
            store(p_out + token * out_stride + columns, tl.where(lost, float("nan"), out), m_columns)


@triton.jit
def tile_x(p_residual, p_branch, residual_rows, branch_rows, columns, mask, HAS_BRANCH: tl.constexpr):
    """Return residual + branch. [BLOCK_N, BLOCK_D]"""
    x = tl.load(p_residual + residual_rows[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        x += tl.load(p_branch + branch_rows[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["N"])
def post_block_grouped_tile_down_kernel(
    p_residual, p_branch, p_downs, p_ids, p_partial,
    SLOTS, N, D, part, residual_stride, branch_stride,
    RANK: tl.constexpr, DOT: tl.constexpr, HAS_BRANCH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Compute partial sums of x W1ᵀ for a tile of tokens, over one split of d. Grid (tiles, splits)."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_rows = rows < N
    slots = tl.load(p_ids + rows, mask=m_rows, other=-1).to(tl.int32)
    residual_rows = rows.to(tl.int64) * residual_stride
    branch_rows = rows.to(tl.int64) * branch_stride
    first = tl.program_id(1) * part
    last = tl.minimum(first + part, D)
    ranks = tl.arange(0, BLOCK_R)
    a = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    todo = tl.where(slots < SLOTS, slots, -1)
    slot = tl.max(todo, 0)
    while slot >= 0:
        wide = slot.to(tl.int64)
        of_slot = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        for start in range(first, last, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            m_columns = columns < D
            mask = m_rows[:, None] & m_columns[None, :]
            x = tile_x(p_residual, p_branch, residual_rows, branch_rows, columns, mask, HAS_BRANCH)
            # [BLOCK_R, BLOCK_D]
            pointers = p_downs + (wide * RANK + ranks[:, None]) * D + columns[None, :]
            w1 = tl.load(pointers, mask=(ranks[:, None] < RANK) & m_columns[None, :], other=0.0)
            of_slot = dot(operand(x, DOT), tl.trans(operand(w1, DOT)), of_slot, DOT)
        a = tl.where((slots == slot)[:, None], of_slot, a)
        todo = tl.where(slots == slot, -1, todo)
        slot = tl.max(todo, 0)
    p_rows = p_partial + (rows[:, None].to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * BLOCK_R
    tl.store(p_rows + ranks[None, :], a, mask=m_rows[:, None])


@triton.jit
def tile_shift(
    p_ups, p_up_biases, slot, h, ranks, columns, m_columns, D,
    RANK: tl.constexpr, DOT: tl.constexpr, HAS_UP_BIAS: tl.constexpr,
):  # fmt: skip
    """Return h W2ᵀ + b2 by one slot's weights, for a tile of tokens and a block of columns. [BLOCK_N, BLOCK_D]"""
    u = tl.zeros([h.shape[0], columns.shape[0]], tl.float32)
    if RANK > 0:
        # [BLOCK_D, BLOCK_R]
        pointers = p_ups + (slot * D + columns[:, None]) * RANK + ranks[None, :]
        w2 = tl.load(pointers, mask=m_columns[:, None] & (ranks < RANK)[None, :], other=0.0)
        u = dot(h, tl.trans(operand(w2, DOT)), u, DOT)
    if HAS_UP_BIAS:
        u += tl.load(p_up_biases + slot * D + columns, mask=m_columns, other=0.0).to(tl.float32)[None, :]
    return u


@triton.jit(do_not_specialize=["N"])
def post_block_grouped_tile_up_kernel(
    p_residual, p_branch, p_ups, p_ids, p_partial, p_down_biases, p_up_biases, p_codes, p_gain, p_out,
    SLOTS, N, D, part, parts, residual_stride, branch_stride, out_stride,
    RANK: tl.constexpr, ACTIVATION: tl.constexpr, DOT: tl.constexpr, HAS_BRANCH: tl.constexpr,
    HAS_DOWN_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr, INTO_BRANCH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write one split of the columns of a tile of tokens. Grid (tiles, splits)."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_rows = rows < N
    slots = tl.load(p_ids + rows, mask=m_rows, other=-1).to(tl.int32)
    if HAS_GAIN:
        gain = tl.load(p_gain + rows, mask=m_rows, other=0.0).to(tl.float32)
        slots = tl.where((gain == 0) & (slots < SLOTS), -1, slots)
    slots = tl.maximum(slots, -1)
    residual_rows = rows.to(tl.int64) * residual_stride
    branch_rows = rows.to(tl.int64) * branch_stride
    out_rows = rows.to(tl.int64) * out_stride
    first = tl.program_id(1) * part
    last = tl.minimum(first + part, D)

    ranks = tl.arange(0, BLOCK_R)
    h = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    if RANK > 0:
        m_ranks = ranks < RANK
        there_rows = (slots >= 0) & (slots < SLOTS)
        for number in range(0, parts):
            p_rows = p_partial + (rows[:, None].to(tl.int64) * parts + number) * BLOCK_R + ranks[None, :]
            h += tl.load(p_rows, mask=m_rows[:, None], other=0.0)
        if HAS_DOWN_BIAS:
            p_rows = p_down_biases + slots[:, None].to(tl.int64) * RANK + ranks[None, :]
            h += tl.load(p_rows, mask=there_rows[:, None] & m_ranks[None, :], other=0.0).to(tl.float32)
        codes = tl.load(p_codes + slots, mask=there_rows, other=0)[:, None] if ACTIVATION == "" else 0
        h = activate(h, codes, ACTIVATION)
    h = operand(h, DOT)

    # From the highest slot down to "none", write the rows of each slot.
    todo = slots
    slot = tl.max(todo, 0)
    while slot >= (0 if INTO_BRANCH else -1):
        own = (slots == slot) & m_rows
        wide = slot.to(tl.int64)
        there = (slot >= 0) & (slot < SLOTS)
        # `there` for each column. triton 3.9 interprets a mask of a scalar and a block as int32, and refuses it.
        of_columns = tl.zeros([BLOCK_D], tl.int32) + slot
        there_columns = (of_columns >= 0) & (of_columns < SLOTS)
        for start in range(first, last, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            m_columns = columns < D
            mask = own[:, None] & m_columns[None, :]
            u = tile_shift(
                p_ups, p_up_biases, wide, h, ranks, columns, m_columns & there_columns, D, RANK, DOT, HAS_UP_BIAS
            )  # fmt: skip
            if HAS_GAIN:
                u *= gain[:, None]
            u = tl.where(there, u, 0.0)  # also for a token without gain, whatever its a
            if INTO_BRANCH:
                x = tl.load(p_branch + branch_rows[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            else:
                x = tile_x(p_residual, p_branch, residual_rows, branch_rows, columns, mask, HAS_BRANCH)
            out = tl.where(u == 0, x, x + u)
            store(p_out + out_rows[:, None] + columns[None, :], tl.where(slot >= SLOTS, float("nan"), out), mask)
        todo = tl.where(slots == slot, -2, todo)
        slot = tl.max(todo, 0)


# ---------------------------------------------------------------------------------------------------------- launchers


class Routing:
    """The slot and gain of each token of a pass. All layers share it.

    Attributes:
        places: the leading dimensions of the hidden states.
        ids: (N,) int32 or int64, contiguous.
        gain: (N,), or None.
    """

    def __init__(self, adapter_ids: Tensor, gain: Tensor | None = None) -> None:
        self.places = adapter_ids.shape
        self.ids = _flat(adapter_ids)
        self.gain = None if gain is None else _flat(gain)
        self.operands = (self.ids,) if self.gain is None else (self.ids, self.gain)
        self._plan: TokenPlan | None = None

    def plan(self) -> TokenPlan:
        """Return the token plan of the torch backend. It reads the tensors on the host."""
        if self._plan is None:
            self._plan = plan_tokens(self.ids, self.gain)
        return self._plan


def _flat(tensor: Tensor) -> Tensor:
    return tensor.contiguous() if tensor.dim() == 1 else tensor.reshape(-1).contiguous()


def token_schedule(block_r: int, hidden: int) -> Blocks:
    columns = max(16, min(next_power_of_2(hidden), 4096 // max(block_r, 2), 1024))
    return Blocks({"BLOCK_D": columns, "BLOCK_R": block_r}, 4, 2)


def _splits(tokens: int, hidden: int, block_d: int, device: Device) -> tuple[int, int]:
    """Return the number of parts of d, so that each multiprocessor runs a few programs, and the size of a part."""
    blocks = ceil_div(hidden, block_d)
    splits = max(1, min(blocks, ceil_div(4 * device.multiprocessors, tokens)))
    part = ceil_div(blocks, splits) * block_d
    return ceil_div(hidden, part), part


def tile_schedule(block_r: int, hidden: int, itemsize: int) -> Blocks:
    columns = {0: 256, 16: 128, 32: 128, 64: 64, 128: 64, 256: 32}[block_r]
    columns = max(16, min(columns if itemsize == 2 else columns // 2, next_power_of_2(hidden)))
    return Blocks({"BLOCK_N": 16, "BLOCK_D": columns, "BLOCK_R": max(block_r, 1)}, 4, 2 if block_r < 128 else 1)


def triton_grouped(call: GroupedCall) -> None:
    """Launch two kernels, or one without W1. The second may write into the branch, which the first still reads."""
    tokens, hidden = call.residual.shape
    device, place = device_of(call.residual), call.residual.device
    rank, few, dtype = call.rank, tokens <= FEW_TOKENS, sum_dtype(call.residual, call.branch)
    named = isinstance(call.activation, str)
    branch_stride = 0 if call.branch is None else call.branch.stride(0)
    # What W1 is applied to is x of the first kernel: a residual and a branch, or one of them alone.
    read: tuple[Tensor | None, Tensor | None] = (call.residual, call.branch)
    of_read = (call.residual.stride(0), branch_stride)
    if call.reads == "branch":
        read, of_read = (call.branch, None), (branch_stride, 0)
    if few:
        schedule = token_schedule(max(2, next_power_of_2(rank)), hidden)
        down, up = post_block_grouped_token_down_kernel, post_block_grouped_token_up_kernel
        rows = tokens
    else:
        schedule = tile_schedule(padded_rank(rank), hidden, dtype.itemsize)
        down, up = post_block_grouped_tile_down_kernel, post_block_grouped_tile_up_kernel
        rows = ceil_div(tokens, schedule.constants["BLOCK_N"])
    # The tile kernels take two more arguments.
    size: tuple[int, ...] = () if few else (tokens,)
    flags: dict[str, Any] = {} if few else {"DOT": dot_precision(dtype, device.gpu, rank)}
    flags["RANK"] = rank
    splits, part = _splits(rows, hidden, schedule.constants["BLOCK_D"], device)
    partial = None
    if rank:
        partial = empty(tokens, splits, schedule.constants["BLOCK_R"], dtype=torch.float32, device=place)
        launch(
            down, (rows, splits), *read, call.downs, call.ids, partial,
            call.slots, *size, hidden, part, *of_read,
            **flags, HAS_BRANCH=read[1] is not None, device=place, schedule=schedule,
        )  # fmt: skip
    launch(
        up, (rows, splits), call.residual, call.branch, call.ups, call.ids, partial,
        call.down_biases, call.up_biases, None if named else call.activation, call.gain, call.out,
        call.slots, *size, hidden, part, splits, call.residual.stride(0), branch_stride, call.out.stride(0),
        **flags, HAS_BRANCH=call.branch is not None, ACTIVATION=call.activation if named else "",
        HAS_DOWN_BIAS=call.down_biases is not None,
        HAS_UP_BIAS=call.up_biases is not None, HAS_GAIN=call.gain is not None, INTO_BRANCH=call.into_branch,
        device=place, schedule=schedule,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- one call, and compiled

#: downs, ups, down_biases, up_biases, and φ by name or by each slot's index in ACTIVATIONS.
Weights = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, str | Tensor]


def _run(
    residual: Tensor,
    branch: Tensor | None,
    weights: Weights,
    routing: Routing,
    out: Tensor,
    into_branch: bool,
    backend: str | None,
    reads: str,
) -> None:
    """Run a call on a backend. residual, branch and out are (N, d)."""
    if not out.numel():
        return
    downs, ups, down_biases, up_biases = (None if t is None else t.contiguous() for t in weights[:4])
    call = GroupedCall(
        residual, branch, downs, ups, down_biases, up_biases, weights[4], routing.ids, routing.gain, out, into_branch,
        reads,
    )  # fmt: skip
    if (backend or ("triton" if is_recording() else select_backend(residual.device))) == "triton":
        triton_grouped(call)
    else:
        grouped_forward(call, routing.plan())


def sum_dtype(residual: Tensor, branch: Tensor | None) -> torch.dtype:
    if branch is None or branch.dtype == residual.dtype:
        return residual.dtype
    return torch.promote_types(residual.dtype, branch.dtype)


def _out_of_place(
    residual: Tensor, branch: Tensor | None, weights: Weights, routing: Routing, backend: str | None, reads: str
) -> Tensor:
    out = empty(*residual.shape, dtype=sum_dtype(residual, branch), device=residual.device)
    rows = out if out.dim() == 2 else out.view(-1, out.shape[-1])
    branch = None if branch is None else as_rows("branch", branch)
    _run(as_rows("residual", residual), branch, weights, routing, rows, False, backend, reads)
    return out


def _into_branch(residual: Tensor, branch: Tensor, weights: Weights, routing: Routing, reads: str) -> None:
    rows = as_rows("branch", branch, in_place=True)
    _run(as_rows("residual", residual), rows, weights, routing, rows, True, None, reads)


def note_written(tensor: Tensor) -> None:
    """Tell autograd that a kernel wrote to a tensor, so that a backward pass which saved it raises an error."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


_Operands = tuple[
    Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, str, str
]


def joined(weights: Weights, ids: Tensor, gain: Tensor | None, reads: str) -> _Operands:
    """Return `weights` and routing as operands of the registered ops."""
    downs, ups, down_biases, up_biases, activation = weights
    named, codes = (activation, None) if isinstance(activation, str) else ("", activation)
    return downs, ups, ids, down_biases, up_biases, codes, gain, named, reads


def separated(operands: _Operands) -> tuple[Weights, Routing, str]:
    """Return weights, routing and `reads` from operands of the registered ops."""
    downs, ups, ids, down_biases, up_biases, codes, gain, activation, reads = operands
    return (downs, ups, down_biases, up_biases, activation if codes is None else codes), Routing(ids, gain), reads


_plans: dict[Any, OpPlan] = {}


def kind_of_call(residual: Tensor, branch: Tensor | None, operands: _Operands) -> tuple[Any, ...]:
    """Return the key of a call's plan."""
    downs, _, ids, down_biases, up_biases, codes, gain, activation, reads = operands
    sized = up_biases if downs is None else downs
    return (
        residual.shape, residual.dtype, branch is None, downs is None, None if sized is None else sized.shape,
        ids.dtype, down_biases is None, up_biases is None, codes is None, gain is None, activation, reads,
    )  # fmt: skip


def _registered_out_of_place(residual: Tensor, branch: Tensor | None, *operands: Any) -> Tensor:
    def call() -> tuple[Tensor, ...]:
        weights, routing, reads = separated(operands)
        return (_out_of_place(residual, branch, weights, routing, None, reads),)

    (out,) = run_planned(
        _plans, (False, *kind_of_call(residual, branch, operands)), (residual, branch, *operands), call
    )  # fmt: skip
    return out


def _registered_into_branch(residual: Tensor, branch: Tensor, *operands: Any) -> None:
    def call() -> tuple[Tensor, ...]:
        _into_branch(residual, branch, *separated(operands))
        return ()

    run_planned(_plans, (True, *kind_of_call(residual, branch, operands)), (residual, branch, *operands), call)
    note_written(branch)


def _fake(residual: Tensor, branch: Tensor | None, *operands: Any) -> Tensor:
    return residual.new_empty(residual.shape, dtype=sum_dtype(residual, branch))


OPERANDS = (
    "Tensor? downs, Tensor? ups, Tensor adapter_ids, Tensor? down_biases, Tensor? up_biases, Tensor? codes, "
    "Tensor? gain, str activation, str reads"
)


def refusal(op: str) -> Callable[..., None]:
    """Return a function that refuses a gradient of an op."""

    def refuse(*_: Any) -> None:
        raise RuntimeError(f"{op} has no gradient; expected torch.no_grad(), or post_block to train")

    return refuse


register(
    f"post_block_grouped(Tensor residual, Tensor? branch, {OPERANDS}) -> Tensor",
    _registered_out_of_place, _fake, refusal("post_block_grouped"), of_inference,
)  # fmt: skip
register(
    f"post_block_grouped_(Tensor residual, Tensor(a!) branch, {OPERANDS}) -> ()",
    _registered_into_branch, lambda *operands: None, refusal("post_block_grouped"), of_inference,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------- caller's part

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check(name: str, tensor: Tensor, shape: Sequence[int], device: torch.device) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}")
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected float32, bfloat16 or float16")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; expected {device}, the device of residual")


def as_rows(name: str, tensor: Tensor, in_place: bool = False) -> Tensor:
    """Return (..., d) as (N, d) with contiguous rows. It is a copy only if the strides allow no view.

    Raises:
        ValueError: `in_place`, and the strides allow no view, or rows share memory, as those of an expanded tensor.
    """
    hidden = tensor.shape[-1]
    rows = None
    if tensor.stride(-1) == 1 or hidden == 1:
        if tensor.dim() == 2:
            rows = tensor
        else:
            with contextlib.suppress(RuntimeError):
                rows = tensor.view(-1, hidden)
    if rows is not None and not (in_place and rows.stride(0) < hidden and rows.shape[0] > 1):
        return rows
    if in_place:
        raise ValueError(f"{name} has strides {tensor.stride()}; expected rows that can be written in place")
    return tensor.reshape(-1, hidden).contiguous()


def check_grouped(
    op: str,
    residual: Tensor,
    branch: Tensor | None,
    weights: Weights,
    adapter_ids: Tensor,
    gain: Tensor | None,
    reads: str,
) -> None:
    """Check the arguments of a grouped op, which `op` names.

    Raises:
        ValueError, TypeError, RuntimeError: see `post_block_grouped`.
    """
    downs, ups, down_biases, up_biases, activation = weights
    names = ("residual", "branch", "downs", "ups", "down_biases", "up_biases", "adapter_ids", "gain")
    for name, tensor in zip(names, (residual, branch, *weights[:4], adapter_ids, gain), strict=True):
        if tensor is not None or name in ("residual", "adapter_ids"):
            check_dense(name, tensor)
        if tensor is not None and is_wrapped(tensor) and not is_described(tensor):
            if not torch.compiler.is_compiling():
                raise TypeError(f"{name} is a {type(tensor).__name__}; expected a plain tensor")
    shape, device = residual.shape, residual.device
    if residual.dim() < 1 or shape[-1] == 0:
        raise ValueError(f"residual has shape {tuple(shape)}; expected (..., d) with d > 0")
    hidden, places = shape[-1], shape[:-1]
    _check("residual", residual, shape, device)
    if branch is not None:
        _check("branch", branch, shape, device)
    if (downs is None) != (ups is None):
        missing, given = ("downs", "ups") if downs is None else ("ups", "downs")
        raise ValueError(f"{missing} is None but {given} is given; expected both, or neither for steering vectors")
    sized = downs if downs is not None else up_biases
    if sized is None:
        raise ValueError("downs, ups and up_biases are all None; expected downs and ups, or up_biases")
    rank = 0
    if downs is not None:
        if downs.dim() != 3 or not 1 <= downs.shape[1] <= MAX_RANK:
            raise ValueError(f"downs has shape {tuple(downs.shape)}; expected (A, r, {hidden}) with r 1 to {MAX_RANK}")
        rank = downs.shape[1]
    elif down_biases is not None:
        raise ValueError("down_biases is given without downs; expected both or neither")
    elif sized.dim() != 2:
        raise ValueError(f"up_biases has shape {tuple(sized.shape)}; expected (A, {hidden})")
    slots = sized.shape[0]
    if downs is not None and ups is not None:
        _check("downs", downs, (slots, rank, hidden), device)
        _check("ups", ups, (slots, hidden, rank), device)
    if down_biases is not None:
        _check("down_biases", down_biases, (slots, rank), device)
    if up_biases is not None:
        _check("up_biases", up_biases, (slots, hidden), device)
    if gain is not None:
        _check("gain", gain, places, device)
    if adapter_ids.shape != places or adapter_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"adapter_ids is {adapter_ids.dtype} {tuple(adapter_ids.shape)}; expected int32 or int64 of {tuple(places)}"
        )
    for name, routed in (("adapter_ids", adapter_ids), ("activation", activation)):
        if isinstance(routed, Tensor) and routed.device != device:
            raise ValueError(f"{name} is on {routed.device}; expected {device}, the device of residual")
    if isinstance(activation, Tensor):
        if activation.shape != (slots,) or activation.dtype != torch.int32:
            raise ValueError(
                f"activation is {activation.dtype} {tuple(activation.shape)}; expected a name, or int32 ({slots},)"
            )
    else:
        check_choice("activation", activation, ACTIVATIONS)
    check_reads(reads, branch)
    if torch.is_grad_enabled():
        tensors = (residual, branch, downs, ups, down_biases, up_biases, gain)
        if any(t is not None and t.requires_grad for t in tensors):
            refusal(op)()


def post_block_routed(
    residual: Tensor,
    branch: Tensor | None,
    weights: Weights,
    routing: Routing,
    backend: str | None = None,
    reads: str = "sum",
) -> Tensor:
    """Run `post_block_grouped` without its checks, outside of compiled graphs, with a routing that layers share.

    Args:
        residual, branch, weights: arguments of `post_block_grouped`. weights: downs, ups, down_biases, up_biases and
            the activation.
        routing: the tokens' slots and gains.
        backend: the backend of the residual's device. None calls `select_backend`.
        reads: as in `post_block_grouped`.
    """
    if not is_recording() and (is_described(residual) or is_watched()):
        with torch.no_grad():
            operands = joined(weights, routing.ids, routing.gain, reads)
            return torch.ops.fused_steer.post_block_grouped(residual, branch, *operands)
    if is_transformed():
        raise RuntimeError(
            "post_block_grouped was called inside a transform of torch.func or forward-mode differentiation; expected "
            "post_block"
        )
    if torch.is_grad_enabled():
        with torch.no_grad():
            return _out_of_place(residual, branch, weights, routing, backend, reads)
    return _out_of_place(residual, branch, weights, routing, backend, reads)


def post_block_grouped(
    residual: Tensor,
    branch: Tensor | None,
    downs: Tensor | None,
    ups: Tensor | None,
    adapter_ids: Tensor,
    *,
    down_biases: Tensor | None = None,
    up_biases: Tensor | None = None,
    activation: str | Tensor = "silu",
    gain: Tensor | None = None,
    into_branch: bool = False,
    reads: str = "sum",
) -> Tensor:
    """Post-block steering with an adapter for each token: x + g ⊙ (φ(x W1[i]ᵀ + b1[i]) W2[i]ᵀ + b2[i]).

    x = residual + branch, i = adapter_ids. With reads="branch" W1 is applied to branch instead. Forward only. An
    adapter of lower rank is padded with zeros. On a GPU the host does not wait, and no allocation grows with A · N, so
    that a CUDA graph can capture the op.

    Args:
        residual: (..., d), float32, bfloat16 or float16.
        branch: (..., d), the sublayer's output, which is added to the residual. None steers a finished hidden state.
        downs: W1 of every slot, (A, r, d), r at most 256, of any of these dtypes. None, with `ups`, for vectors.
        ups: W2 of every slot, (A, d, r).
        adapter_ids: (...), int32 or int64. A negative id means no adapter. An id of A or more is an error: ValueError
            on the torch backend, NaN in the token's output on a GPU, because the host does not wait.
        down_biases: b1 (A, r).
        up_biases: b2 (A, d). Without W1 and W2 the slots are steering vectors.
        activation: φ of all slots by name, or (A,) int32, each slot's index in `ACTIVATIONS`. For a token, any other
            index of its slot is an error like such an id.
        gain: g (...), each token's gain times strength. None means 1. A token with 0 is not changed.
        into_branch: write branch + shift into `branch`, and do not add the residual.
        reads: the tensor that W1 is applied to, "sum" (residual + branch) or "branch", which must be given.

    Returns:
        (..., d), contiguous, in the dtype of `residual + branch`; with `into_branch`, `branch` itself.

    Raises:
        ValueError: a shape, device, rank, activation, stride or `reads` is not supported.
        TypeError: a dtype is not supported.
        RuntimeError: a gradient is required.
    """
    weights = (downs, ups, down_biases, up_biases, activation)
    check_grouped("post_block_grouped", residual, branch, weights, adapter_ids, gain, reads)
    check_flag("into_branch", into_branch)
    in_graph = torch.compiler.is_compiling() or (not is_recording() and (is_described(residual) or is_watched()))
    if into_branch and branch is None:
        raise ValueError("into_branch is True without a branch; expected one to write into")
    if in_graph:
        operands = joined(weights, adapter_ids, gain, reads)
        if into_branch and branch is not None:
            torch.ops.fused_steer.post_block_grouped_(residual, branch, *operands)
            return branch
        return torch.ops.fused_steer.post_block_grouped(residual, branch, *operands)
    if into_branch and branch is not None:
        with torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext():
            _into_branch(residual, branch, weights, Routing(adapter_ids, gain), reads)
            if not is_recording():
                note_written(branch)
        return branch
    return post_block_routed(residual, branch, weights, Routing(adapter_ids, gain), None, reads)
