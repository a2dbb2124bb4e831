"""Post-block steering and the RMSNorm that follows it, by one kernel.

    out    = x + s · g ⊙ (φ(x W1ᵀ + b1) W2'ᵀ + b2)      x = residual + branch, as in post_block.py
    normed = out · inv ⊙ w                              inv = 1 / sqrt(mean(out²) + eps), as in norm.py

Forward, in units of N·d through device memory: 4, which are two reads and two writes. A tile of rows is read twice, and
its `out` is read once more from L2, where the same program has just put it. Σ out² is summed while `out` is written,
from the numbers as they are rounded in memory. It could be had without the third pass, as a quadratic form in sums of
the first one: |x|² + 2 h·(W2ᵀx) + hᵀ(W2ᵀW2)h. L2 would then send 4 units to the multiprocessors instead of 5. Device
memory is the limit in both. But where the shift nearly cancels the state, the form is a small difference of large
numbers, and it knows nothing of the rounding of `out`.

Few tokens, and ranks with weights too large for registers, take post_block's two kernels and the norm's. Rank 0 takes
the norm's kernel alone.

Backward, with the gradients of `out` and `normed`: for low ranks and many tokens one kernel reads both and `out`, and
writes the gradient of x (4 units; see post_block_norm_backward.py). Else the norm's kernel adds both to one gradient of
`out` (4 units: read both and `out`; write one), and post_block's backward follows. Kept are `out`, a and inv.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import flops, norm_torch, torch_backend, triton_backend
from .backend import check_backend, no_autocast, select_backend
from .contract import Needs, Operands
from .derivatives import is_batched, is_transformed
from .launch import contiguous, device_of, empty, launch, row_layout
from .norm import check_norm, norm_backward, norm_constants, rms_norm
from .norm import triton_forward as triton_norm
from .norm_torch import Norm
from .numerics import dot_precision, store
from .plan import OpPlan, run_planned
from .post_block import (
    OPERANDS,
    backward,
    check_operands,
    first_order,
    in_their_dtypes,
    inputs_of,
    of_op,
    post_block,
    saved_tensors,
    with_projected_up,
)
from .post_block_norm_backward import triton_backward_norm
from .registered import is_described, is_watched, is_wrapped, register
from .resident import post_block_fwd_resident_kernel
from .rows import inverse_rms, norm_factor, normalised, rounded
from .schedule import ForwardSchedule, forward_schedule, forward_splits
from .triton_backend import first_pass, packed_weights, resident_layout, write_block

# ------------------------------------------------------------------------------------------------------------ kernel


@triton.jit(do_not_specialize=["N", "height", "inner"])
def post_block_norm_fwd_kernel(
    p_residual, p_branch, p_down, p_up, p_down_bias, p_up_bias, p_gain, p_scale, p_weight,
    p_out, p_normed, p_a, p_inverse,
    scale, eps, N, D, height, inner, residual_outer, residual_inner, branch_outer, branch_inner,
    RANK: tl.constexpr, ACTIVATION: tl.constexpr, DOT: tl.constexpr,
    HAS_BRANCH: tl.constexpr, HAS_DOWN_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr,
    SCALE_ON_DEVICE: tl.constexpr, KEEP_A: tl.constexpr, NESTED: tl.constexpr, EVEN_D: tl.constexpr,
    PACKED: tl.constexpr, READS_BRANCH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, PLUS_ONE: tl.constexpr, ROUNDS_FIRST: tl.constexpr, KEEP_INVERSE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D2: tl.constexpr, BLOCK_D3: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUPS: tl.constexpr, STAGES: tl.constexpr, STAGES2: tl.constexpr,
):  # fmt: skip
    """Compute `out` and `normed` for many tokens. Grid (programs,). Programs loop over tiles of `height` rows."""
    ranks = tl.arange(0, BLOCK_R)
    local = tl.arange(0, BLOCK_N)
    for tile in range(tl.program_id(0), tl.cdiv(N, height), tl.num_programs(0)):
        rows, m_rows, residual_rows, branch_rows, strength, h = first_pass(
            p_residual, p_branch, p_down, p_down_bias, p_gain, p_scale, p_a, tile, local, ranks,
            scale, N, D, height, inner, residual_outer, residual_inner, branch_outer, branch_inner,
            RANK, ACTIVATION, DOT, HAS_BRANCH, HAS_DOWN_BIAS, HAS_GAIN, SCALE_ON_DEVICE, KEEP_A, NESTED, EVEN_D, PACKED,
            READS_BRANCH, BLOCK_N, BLOCK_D, BLOCK_R, GROUPS, STAGES,
        )  # fmt: skip

        # Summed over blocks before it is summed over columns, which takes shuffles between threads. [BLOCK_N, BLOCK_D2]
        squares = tl.zeros([BLOCK_N, BLOCK_D2], tl.float32)
        offsets = rows[:, None].to(tl.int64) * D
        blocks = tl.cdiv(D, BLOCK_D2)
        for block in tl.range(0, blocks, num_stages=STAGES2):
            columns = (blocks - 1 - block) * BLOCK_D2 + tl.arange(0, BLOCK_D2)
            out = write_block(
                p_residual, p_branch, p_up, p_up_bias, p_out, residual_rows, branch_rows, rows, m_rows, h, strength,
                ranks, columns, D, RANK, DOT, HAS_BRANCH, HAS_UP_BIAS, EVEN_D, PACKED,
            )  # fmt: skip
            out = rounded(out, p_out)
            squares += out * out
        inverse = inverse_rms(tl.sum(squares, 1), m_rows, D, eps)
        if KEEP_INVERSE:
            tl.store(p_inverse + rows, inverse, mask=m_rows)

        # A thread may read what another one wrote. The blocks are wide, so that many loads are in flight: they are not
        # asynchronous, because an asynchronous copy is not ordered behind the program's own writes.
        tl.debug_barrier()
        for first in tl.range(0, D, BLOCK_D3, num_stages=1):
            columns = first + tl.arange(0, BLOCK_D3)
            m_columns = (columns < D) | EVEN_D
            mask = m_rows[:, None] & m_columns[None, :]
            out = tl.load(p_out + offsets + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            weight = 1.0
            if HAS_WEIGHT:
                weight = norm_factor(p_weight, columns, m_columns, PLUS_ONE)[None, :]
            out = normalised(out, inverse[:, None], weight, p_normed, HAS_WEIGHT, ROUNDS_FIRST)
            store(p_normed + offsets + columns[None, :], out, mask)


# ---------------------------------------------------------------------------------------------------------- launcher


def _third_block(schedule: ForwardSchedule, hidden: int) -> int:
    """Return the columns of a block of the third pass: at most 32 numbers for each lane, and a divisor of d."""
    columns = schedule.block_d2
    most = 32 * 32 * schedule.num_warps // schedule.block_n  # AMD's 64 lanes have registers for half as many numbers
    while columns < most and hidden % (2 * columns) == 0:
        columns *= 2
    return columns


def triton_forward_norm(
    residual: Tensor, branch: Tensor | None, operands: Operands, norm: Norm, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Run the forward. Return `out`, `normed`, and if kept a (N, r) and 1 / rms (N,)."""
    down, up, down_bias, up_bias, gain, _, scale, activation, packed, reads = operands
    dtype = residual.dtype if branch is None else torch.promote_types(residual.dtype, branch.dtype)
    hidden = residual.shape[-1]
    tokens = residual.numel() // hidden
    rank, device = operands.rank, device_of(residual)
    if rank == 0 and up_bias is not None:
        out, normed, inverse = triton_norm(residual, branch, norm, keep, (up_bias, gain, scale))
        return out, normed, None, inverse
    resident = resident_layout(tokens, hidden, rank, dtype, device, norm=True, packed=packed is not None)
    if tokens == 0 or (resident is None and forward_splits(tokens, hidden, rank, dtype.itemsize, device) is not None):
        out, a = triton_backend.forward(residual, branch, operands, keep)
        _, normed, inverse = triton_norm(out, None, norm, keep)
        return out, normed, a, inverse
    out, normed = (empty(*residual.shape, dtype=dtype, device=residual.device) for _ in range(2))
    a = empty(tokens, rank, dtype=torch.float32, device=residual.device) if keep else None
    inverse = empty(tokens, dtype=torch.float32, device=residual.device) if keep else None
    (residual, branch), inner, (of_residual, of_branch) = row_layout(residual, branch)
    down_bias, up_bias, gain, weight = contiguous(down_bias, up_bias, gain, norm.weight)
    packed = packed_weights(operands, tokens, dtype, resident)
    down, up = contiguous(down, up) if packed is None else packed
    p_scale, scale = (scale, 0.0) if isinstance(scale, Tensor) else (None, scale)
    constants: dict[str, Any] = {
        "device": residual.device, "RANK": rank, "ACTIVATION": activation,
        "DOT": dot_precision(dtype, device.gpu, rank), "HAS_BRANCH": branch is not None,
        "HAS_DOWN_BIAS": down_bias is not None, "HAS_UP_BIAS": up_bias is not None, "HAS_GAIN": gain is not None,
        "SCALE_ON_DEVICE": p_scale is not None, "KEEP_A": keep, "NESTED": inner > 0, "PACKED": packed is not None,
        "READS_BRANCH": reads == "branch", "KEEP_INVERSE": keep, **norm_constants(norm),
    }  # fmt: skip
    tensors = (residual, branch, down, up, down_bias, up_bias, gain, p_scale, weight, out, normed, a, inverse)
    strides = (inner, *of_residual, *of_branch)
    if resident is not None:
        launch(
            post_block_fwd_resident_kernel, (resident.programs,), *tensors, scale, norm.eps, tokens, hidden, *strides,
            schedule=resident, **constants, NORM=True, EVEN_D=hidden % resident.block_d == 0,
        )  # fmt: skip
        return out, normed, a, inverse
    # Three tensors of a tile have to stay in L2, where post_block's forward has two.
    room = replace(device, l2=2 * device.l2 // 3)
    schedule = forward_schedule(
        tokens, hidden, rank, dtype.itemsize, room, packed is not None, dtype == torch.float16, norm=True
    )  # fmt: skip
    launch(
        post_block_norm_fwd_kernel, (schedule.programs,), *tensors,
        scale, norm.eps, tokens, hidden, schedule.height, *strides, schedule=schedule, **constants,
        EVEN_D=hidden % schedule.block_d == 0 and hidden % schedule.block_d2 == 0,
        BLOCK_D3=_third_block(schedule, hidden),
    )  # fmt: skip
    return out, normed, a, inverse


# --------------------------------------------------------------------------------- forward and backward, any backend

#: out, normed, a, 1 / rms
_Result = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None"]


class Saved(NamedTuple):
    """The tensors that the forward keeps. `branch` is kept only if W1 was applied to it."""

    out: Tensor
    branch: Tensor | None
    a: Tensor | None
    inverse: Tensor


def forward_norm(
    residual: Tensor, branch: Tensor | None, operands: Operands, norm: Norm, keep: bool, inside: bool = False
) -> _Result:
    """Run the forward on the backend of the residual's device. See `triton_forward_norm`.

    inside: as in `post_block.forward`.
    """
    if not inside and is_watched():
        out, normed, a, inverse = _op(residual, branch, *inputs_of(operands), *norm, keep)
        return out, normed, a if keep and operands.rank else None, inverse if keep else None
    with no_autocast(residual.device):
        backend = select_backend(residual.device)
        check_backend(backend, residual, branch, *operands, norm.weight)
        projected = with_projected_up(operands)
        if backend == "triton":
            return triton_forward_norm(residual, branch, projected, norm, keep)
        out, a = torch_backend.forward(residual, branch, projected, keep)
        normed, inverse = norm_torch.forward(out, norm)
        return out, normed, a, inverse if keep else None


def backward_norm(
    grad: Tensor | None,
    grad_normed: Tensor | None,
    saved: Saved,
    operands: Operands,
    norm: Norm,
    needs: Sequence[bool],
    grad_a: Tensor | None = None,
    again: bool = False,
    inside: bool = False,
) -> list[Tensor]:
    """Return the gradients that `needs` selects, each in the dtype of its own tensor.

    They are, in order: that of `out` with the norm's share, those of `post_block.backward`, and the norm weight's. At
    least one of the gradients of `out`, `normed` and `a` is given. For the other arguments see `post_block.backward`.
    """
    if not inside and is_watched() and not again:
        return list(_backward_op(grad, grad_normed, *saved, *inputs_of(operands), *norm, list(needs)))
    of_out, *of_steering, of_weight = needs
    if not (of_weight or again) and any(of_steering):
        by_rows = _backward_by_rows(grad, grad_normed, saved, operands, norm, of_out, of_steering)
        if by_rows is not None:
            return by_rows
    whole, d_weight = grad, None
    if grad is None and grad_normed is None:
        whole = torch.zeros_like(saved.out)
    if grad_normed is not None:
        both = (of_out or any(of_steering), of_weight)
        with no_autocast(saved.out.device):
            if again:
                inverse = norm_torch.inverse_rms(saved.out, norm)
                whole, d_weight = norm_torch.backward(grad, grad_normed, saved.out, inverse, norm, both)
            else:
                whole, d_weight = norm_backward(grad, grad_normed, saved.out, saved.inverse, norm, both)
    elif of_weight and norm.weight is not None:
        d_weight = torch.zeros_like(norm.weight)
    found: list[Tensor] = []
    if any(of_steering):
        assert whole is not None
        kept = None if not needs[2] else saved.out if operands.reads == "sum" else saved.branch
        found = backward(whole, kept, saved.a, operands, of_steering, grad_a, again, inside=True)
    return [t for t in (whole if of_out else None, *found, d_weight) if t is not None]


def _backward_by_rows(
    grad: Tensor | None,
    grad_normed: Tensor | None,
    saved: Saved,
    operands: Operands,
    norm: Norm,
    of_out: bool,
    needs: Sequence[bool],
) -> list[Tensor] | None:
    """Return the gradients of `backward_norm` by kernels with rows in registers, or None if these do not pay."""
    x, down, up, down_bias, up_bias, need_gain, need_scale = needs
    if (
        grad_normed is None
        or saved.a is None
        or need_gain
        or need_scale
        or select_backend(saved.out.device) != "triton"
    ):
        return None
    kept = saved.out if operands.reads == "sum" else saved.branch
    with no_autocast(saved.out.device):
        found = triton_backward_norm(
            grad, grad_normed, saved.out, kept, saved.a, saved.inverse, with_projected_up(operands), norm,
            Needs(x, down, up, down_bias, up_bias, False), of_out,
        )  # fmt: skip
        if found is None:
            return None
        whole, gradients = found
        return [*((whole,) if of_out and whole is not None else ()), *in_their_dtypes(gradients, saved.out, operands)]


_forward_plans: dict[Any, OpPlan] = {}
_backward_plans: dict[Any, OpPlan] = {}


def _run_forward(
    residual: Tensor, branch: Tensor | None, operands: Operands, norm: Norm, keep: bool, inside: bool = False
) -> _Result:
    """Run the forward, by a plan if one applies."""

    def call() -> _Result:
        return forward_norm(residual, branch, operands, norm, keep, inside)

    if not inside and is_watched():
        return call()
    if operands.basis is not None or select_backend(residual.device) == "torch":
        return call()
    tensors, kind = _split((residual, branch, *operands[:7], norm.weight))
    key = (residual.shape, residual.dtype, kind, operands.activation, operands.reads, *norm[1:], keep)
    found = iter(run_planned(_forward_plans, key, tensors, lambda: [t for t in call() if t is not None]))
    out, normed = next(found), next(found)
    return out, normed, next(found) if keep and operands.rank else None, next(found) if keep else None


def _run_backward(
    grad: Tensor | None,
    grad_normed: Tensor | None,
    saved: Saved,
    operands: Operands,
    norm: Norm,
    needs: Sequence[bool],
    inside: bool = False,
) -> list[Tensor]:
    """Run the backward, by a plan if one applies. A call without the gradient of `normed` is not planned."""

    def call() -> list[Tensor]:
        return backward_norm(grad, grad_normed, saved, operands, norm, needs, inside=inside)

    if not inside and is_watched():
        return call()
    if grad_normed is None or operands.basis is not None or select_backend(grad_normed.device) == "torch":
        return call()
    tensors, kind = _split((grad, grad_normed, *saved, *operands[:7], norm.weight))
    key = (saved.out.shape, saved.out.dtype, kind, operands.activation, operands.reads, *norm[1:], *needs)
    return list(run_planned(_backward_plans, key, tensors, call))


def _split(values: Sequence[Any]) -> tuple[list[Tensor], tuple[Any, ...]]:
    """Return the tensors among operands, and what else tells two calls apart: the numbers, and which are tensors."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    # No number equals Tensor. True equals 1.0, so a strength of 1.0 would have the key of a strength in a tensor.
    return tensors, tuple(Tensor if isinstance(value, Tensor) else value for value in values)


# ------------------------------------------------------------------------------------------------------ registered ops


def _op_forward(*inputs: Any) -> tuple[Tensor, ...]:
    residual, branch, *operands = inputs[:12]
    found = _run_forward(residual, branch, of_op(*operands), Norm(*inputs[12:16]), inputs[16], inside=True)
    kind = torch_backend.accumulation_dtype(found[0].dtype)
    return tuple(empty(0, dtype=kind, device=residual.device) if t is None else t for t in found)


def _op_forward_fake(*inputs: Any) -> tuple[Tensor, ...]:
    residual, branch, down = inputs[:3]
    dtype = residual.dtype if branch is None else torch.promote_types(residual.dtype, branch.dtype)
    kind, keep = torch_backend.accumulation_dtype(dtype), inputs[16]
    out = residual.new_empty(residual.shape, dtype=dtype)
    tokens = residual.numel() // residual.shape[-1]
    a = residual.new_empty((tokens, down.shape[0]) if keep and down is not None else (0,), dtype=kind)
    return out, torch.empty_like(out), a, residual.new_empty((tokens,) if keep else (0,), dtype=kind)


def _op_backward(*inputs: Any) -> list[Tensor]:
    grad, grad_normed, *saved = inputs[:6]
    found = _run_backward(
        grad, grad_normed, Saved(*saved), of_op(*inputs[6:16]), Norm(*inputs[16:20]), inputs[20], inside=True
    )  # fmt: skip
    return [t.clone() if t is grad else t for t in found]  # no result of an op shares its arguments' memory


def _op_backward_fake(*inputs: Any) -> list[Tensor]:
    out, weights, weight = inputs[2], inputs[6:12], inputs[16]
    likes = (out, out, *weights, weight)
    return [like.new_empty(like.shape) for like, need in zip(likes, inputs[20], strict=True) if need]


def _differentiable_backward_op(*inputs: Any) -> list[Tensor]:
    of = tuple(t for t in inputs if isinstance(t, Tensor) and t.requires_grad)
    return list(first_order(of, tuple(_backward_op(*inputs))))  # type: ignore[arg-type]


_NORM = "Tensor? norm_weight, float eps, bool plus_one, bool rounds_first"

# ---------------------------------------------------------------------------------------------------------- autograd


class _PostBlockNorm(torch.autograd.Function):
    """The autograd function of the op, eager and in a graph.

    Inputs: residual, branch, down, up, down_bias, up_bias, gain, the scale as a tensor, the norm's weight; basis,
    scale, activation, reads; eps, plus_one, rounds_first; whether the call is in a graph.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        residual, branch, down, up, down_bias, up_bias, gain, scale_tensor, weight, basis = inputs[:10]
        scale, activation, reads, *kind, in_graph = inputs[10:]
        if in_graph:
            operands = (*inputs[2:8], basis, scale, activation, reads)
            out, normed, a, inverse = _op(residual, branch, *operands, weight, *kind, True)
        else:
            strength = scale if scale_tensor is None else scale_tensor
            adapter = Operands(down, up, down_bias, up_bias, gain, basis, strength, activation, reads=reads)
            out, normed, a, inverse = _run_forward(residual, branch, adapter, Norm(weight, *kind), True)
        ctx.in_graph = in_graph
        of_residual, of_branch, *of_weights, d_weight = ctx.needs_input_grad[:9]
        low_rank, of_sum = down is not None, reads == "sum"
        of_x = of_branch or (of_residual and of_sum)
        ctx.needs = [of_residual and not of_sum or (of_x and not low_rank), of_x and low_rank, *of_weights, d_weight]
        ctx.dtypes = (residual.dtype if of_residual else None, branch.dtype if of_branch else None)
        ctx.constants = (scale, activation, reads, *kind)
        reduces = low_rank and any(ctx.needs[1:-1])
        ctx.save_for_backward(
            out, branch if of_weights[0] and not of_sum else None, a if reduces else None, inverse,
            *(inputs[2:8] if any(ctx.needs[1:-1]) else (None,) * 6), basis if any(ctx.needs[1:-1]) else None, weight,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        if in_graph:
            ctx.mark_non_differentiable(a, inverse)
            return out, normed, a, inverse
        # A second derivative takes the way by `a`: see `post_block`.
        return (out, normed) if a is None else (out, normed, a)

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_normed: Tensor | None, grad_a: Tensor | None = None, *_: None
    ) -> tuple[Tensor | None, ...]:
        if grad is None and grad_normed is None and grad_a is None:
            return (None,) * 17
        return *_differentiate(ctx, grad, grad_normed, grad_a), *(None,) * 8


def _differentiate(
    ctx: Any, grad: Tensor | None, grad_normed: Tensor | None, grad_a: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the nine inputs that may require one.

    Outside of a graph they can be differentiated again if autograd asks for it.
    """
    scale, activation, reads, *kind = ctx.constants
    out, branch, a, inverse, *weights, basis, weight = saved_tensors(ctx, reads)
    if ctx.in_graph:
        operands = (*weights, basis, scale, activation, reads)
        run = torch.ops.fused_steer.post_block_norm_backward
        found = iter(run(grad, grad_normed, out, branch, a, inverse, *operands, weight, *kind, ctx.needs))
    else:
        down, up, down_bias, up_bias, gain, scale_tensor = weights
        strength = scale if scale_tensor is None else scale_tensor
        adapter = Operands(down, up, down_bias, up_bias, gain, basis, strength, activation, reads=reads)
        saved, norm = Saved(out, branch, a, inverse), Norm(weight, *kind)
        if torch.is_grad_enabled() or grad_a is not None or is_batched(grad, grad_normed):
            found = iter(backward_norm(grad, grad_normed, saved, adapter, norm, ctx.needs, grad_a, again=True))
        else:
            found = iter(_run_backward(grad, grad_normed, saved, adapter, norm, ctx.needs))
    whole, dx, *others = [next(found) if need else None for need in ctx.needs]
    both = (whole if dx is None or reads == "branch" else dx, whole if dx is None else dx)
    states = (None if dtype is None or d is None else d.to(dtype) for d, dtype in zip(both, ctx.dtypes, strict=True))
    return (*states, *others)


def _in_graph(*inputs: Any) -> tuple[Tensor, ...]:
    """Differentiate the registered op."""
    residual, branch, *operands = inputs[:12]
    weights, (basis, scale, activation, reads) = operands[:6], operands[6:]
    weight, *kind = inputs[12:16]
    return _PostBlockNorm.apply(residual, branch, *weights, weight, basis, scale, activation, reads, *kind, True)


_op = register(
    f"post_block_norm(Tensor residual, Tensor? branch, {OPERANDS}, {_NORM}, bool keep) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _op_forward, _op_forward_fake, _in_graph, flops.of_forward,
)  # fmt: skip
_backward_op = register(
    "post_block_norm_backward(Tensor? grad, Tensor? grad_normed, Tensor kept, Tensor? branch, Tensor? a, "
    f"Tensor inverse, {OPERANDS}, {_NORM}, bool[] needs) -> Tensor[]",
    _op_backward, _op_backward_fake, _differentiable_backward_op, flops.of_backward_norm,
)  # fmt: skip


# -------------------------------------------------------------------------------------------------------- user's call


def post_block_norm(
    residual: Tensor,
    branch: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    *,
    norm_weight: Tensor | None,
    eps: float,
    plus_one: bool = False,
    rounds_first: bool = True,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "silu",
    scale: float | Tensor = 1.0,
    gain: Tensor | None = None,
    basis: Tensor | None = None,
    reads: str = "sum",
) -> tuple[Tensor, Tensor]:
    """Steer as `post_block` does, and normalise the result as `rms_norm` does, in one pass over the hidden state.

    If the shift is exactly zero, `out` is `residual + branch` bit for bit. The norm sums over d in another order than
    PyTorch, so `normed` does not have the bits of a model's own norm.

    Gradients with create_graph=True, and calls inside transforms of torch.func, in forward mode, or on tensor
    subclasses such as DTensor are computed by PyTorch operations instead of kernels.

    Args:
        residual, branch, down, up, down_bias, up_bias, activation, scale, gain, basis, reads: see `post_block`. d is at
            most 32768.
        norm_weight, eps, plus_one, rounds_first: see `rms_norm`.

    Returns:
        `out` and `normed`, (..., d) each, contiguous, in the dtype of `residual + branch`.

    Raises:
        ValueError: a shape, device, rank, activation, `reads` or eps is not supported.
        TypeError: a dtype is not supported, or the scale is neither a number nor a tensor.
        RuntimeError: the backend of FUSED_STEER_BACKEND cannot run here, or a graph of torch.compile has the call
            inside a transform of torch.func or differentiates its gradient.
    """
    operands = Operands(down, up, down_bias, up_bias, gain, basis, scale, activation, reads=reads)
    return steer_and_normalise(residual, branch, operands, Norm(norm_weight, eps, plus_one, rounds_first))


def may_plan(residual: Tensor, branch: Tensor | None, operands: Operands, norm: Norm) -> tuple[str, bool]:
    """Return the backend of an eager call, and whether a kernel runs it, after its operands were checked."""
    backend = select_backend(residual.device)
    if is_described(residual) or is_watched() or backend != "triton" or is_transformed():
        return backend, False
    if is_wrapped(residual, branch, *operands, norm.weight):
        return backend, False
    check_operands(residual, branch, operands)
    check_norm(residual, norm)
    return backend, operands.down is None or operands.rank > 0


def steer_and_normalise(
    residual: Tensor, branch: Tensor | None, operands: Operands, norm: Norm
) -> tuple[Tensor, Tensor]:
    """Compute `post_block_norm` of records."""
    check_operands(residual, branch, operands)
    check_norm(residual, norm)
    in_graph = torch.compiler.is_compiling() or is_described(residual)
    if is_transformed() or (not in_graph and is_wrapped(residual, branch, *operands, norm.weight)):
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "post_block_norm was compiled inside a transform of torch.func; expected post_block and a norm"
            )
        down, up, down_bias, up_bias, gain, basis, scale, activation, _, reads = operands
        out = post_block(
            residual, branch, down, up, down_bias=down_bias, up_bias=up_bias, activation=activation, scale=scale,
            gain=gain, basis=basis, reads=reads,
        )  # fmt: skip
        return out, rms_norm(out, norm.weight, eps=norm.eps, plus_one=norm.plus_one, rounds_first=norm.rounds_first)
    if operands.down is not None and operands.down.shape[0] == 0:
        if operands.up_bias is None:
            raise ValueError("down and up have rank 0 and up_bias is None; expected a rank of at least 1, or up_bias")
        operands = operands._replace(down=None, up=None, down_bias=None, basis=None)
    if operands.down is None:
        operands = operands._replace(reads="sum")
    scale = operands.scale
    number, scale_tensor = (1.0, scale) if isinstance(scale, Tensor) else (float(scale), None)
    states, weights = (residual, branch), (*operands[:5], scale_tensor)
    rest = (operands.basis, number, operands.activation, operands.reads)
    wanted = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (*states, *weights, norm.weight)
    )
    if in_graph:
        return torch.ops.fused_steer.post_block_norm(*states, *weights, *rest, *norm, wanted)[:2]
    if wanted:
        return _PostBlockNorm.apply(*states, *weights, norm.weight, *rest, *norm[1:], False)[:2]
    return _run_forward(residual, branch, operands, norm, False)[:2]
