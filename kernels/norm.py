"""RMSNorm alone, by one kernel forward and one backward. `post_block_norm` is RMSNorm behind steering.

    inv    = 1 / sqrt(mean(x²) + eps)           (N,)    kept for backward, beside x
    normed = x · inv ⊙ w                        (N, d)  w = weight, 1 + weight, or 1

and backward, with D = ∂L/∂normed ⊙ w and G = ∂L/∂x from elsewhere (0 if there is none):

    dx = G + inv · (D − x · inv² · mean(D ⊙ x))         dw = Σ ∂L/∂normed ⊙ x · inv

A program holds whole rows in registers, so that each tensor moves once: forward 2 units (read x; write normed),
backward 3, or 4 with G. The forward kernel also adds a branch and a steering vector before it normalises: that is
`post_block_norm` at rank 0, in 4 units (read two; write out and normed).

Launchers come after the kernels, then autograd and `rms_norm`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import norm_torch
from .backend import no_autocast, select_backend
from .contract import DTYPES, FLOAT32_MAX, check_dense, check_flag, shown
from .derivatives import is_batched, is_transformed
from .launch import contiguous, device_of, empty, launch, row_layout
from .norm_torch import Norm
from .numerics import store
from .plan import OpPlan, run_planned
from .registered import is_watched, is_wrapped
from .rows import (
    added,
    inverse_rms,
    load_states,
    norm_factor,
    normalised,
    rounded,
    row_offsets,
    row_strength,
    scaled,
)
from .schedule import Device, ceil_div, next_power_of_2

#: The most columns of a row that a program can hold in registers.
MAX_WIDTH = 32768

# ----------------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["N", "inner"])
def rms_norm_fwd_kernel(
    p_residual, p_branch, p_up_bias, p_gain, p_scale, p_weight, p_out, p_normed, p_inverse,
    scale, eps, N, D, inner, residual_outer, residual_inner, branch_outer, branch_inner,
    HAS_BRANCH: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_GAIN: tl.constexpr, SCALE_ON_DEVICE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, PLUS_ONE: tl.constexpr, ROUNDS_FIRST: tl.constexpr,
    WRITE_OUT: tl.constexpr, KEEP_INVERSE: tl.constexpr, NESTED: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Normalise rows, after a branch and a steering vector were added. Grid (tiles of BLOCK_N rows,).

    `out` is normalised as it is rounded in memory. If nothing is added, it is not written.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_rows = rows < N
    columns = tl.arange(0, BLOCK_D)
    m_columns = (columns < D) | EVEN_D
    mask = m_rows[:, None] & m_columns[None, :]
    residual_rows = row_offsets(rows, inner, residual_outer, residual_inner, NESTED)
    branch_rows = row_offsets(rows, inner, branch_outer, branch_inner, NESTED)
    states = load_states(
        p_residual, p_branch, residual_rows[:, None], branch_rows[:, None], columns[None, :], mask, HAS_BRANCH
    )  # fmt: skip
    x = added(states, HAS_BRANCH)
    if HAS_SHIFT:
        b2 = tl.load(p_up_bias + columns, mask=m_columns, other=0.0).to(tl.float32)
        strength = row_strength(p_gain, p_scale, scale, rows, m_rows, HAS_GAIN, SCALE_ON_DEVICE)
        delta = scaled(b2[None, :], strength[:, None])
        x = tl.where(delta == 0, x, x + delta)  # −0 + 0 would be +0
    offsets = rows[:, None].to(tl.int64) * D + columns[None, :]
    if WRITE_OUT:
        store(p_out + offsets, x, mask)
        x = rounded(x, p_out)
    inverse = inverse_rms(tl.sum(x * x, 1), m_rows, D, eps)
    if KEEP_INVERSE:
        tl.store(p_inverse + rows, inverse, mask=m_rows)
    weight = 1.0
    if HAS_WEIGHT:
        weight = norm_factor(p_weight, columns, m_columns, PLUS_ONE)[None, :]
    store(p_normed + offsets, normalised(x, inverse[:, None], weight, p_normed, HAS_WEIGHT, ROUNDS_FIRST), mask)


@triton.jit(do_not_specialize=["N", "inner"])
def rms_norm_bwd_kernel(
    p_grad, p_grad_normed, p_kept, p_weight, p_inverse, p_dx, p_sums,
    N, D, inner, grad_outer, grad_inner, normed_outer, normed_inner, kept_outer, kept_inner,
    HAS_GRAD: tl.constexpr, HAS_WEIGHT: tl.constexpr, PLUS_ONE: tl.constexpr, NEED_X: tl.constexpr,
    NEED_WEIGHT: tl.constexpr, NESTED: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute dx, and each program's sums over rows for dw, p_sums (programs, D). Programs loop over tiles of rows."""
    columns = tl.arange(0, BLOCK_D)
    m_columns = (columns < D) | EVEN_D
    if HAS_WEIGHT and NEED_X:
        weight = norm_factor(p_weight, columns, m_columns, PLUS_ONE)[None, :]
    if NEED_WEIGHT:
        sums = tl.zeros([BLOCK_D], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        m_rows = rows < N
        mask = m_rows[:, None] & m_columns[None, :]
        p_above = p_grad_normed + row_offsets(rows, inner, normed_outer, normed_inner, NESTED)[:, None]
        above = tl.load(p_above + columns[None, :], mask=mask, other=0.0)
        p_x = p_kept + row_offsets(rows, inner, kept_outer, kept_inner, NESTED)[:, None]
        x = tl.load(p_x + columns[None, :], mask=mask, other=0.0)
        if HAS_GRAD and NEED_X:
            p_g = p_grad + row_offsets(rows, inner, grad_outer, grad_inner, NESTED)[:, None]
            grad = tl.load(p_g + columns[None, :], mask=mask, other=0.0)
        inverse = tl.load(p_inverse + rows, mask=m_rows, other=0.0)[:, None]
        unit = x.to(tl.float32) * inverse
        above = above.to(tl.float32)
        if NEED_WEIGHT:
            sums += tl.sum(above * unit, 0)
        if NEED_X:
            if HAS_WEIGHT:
                above *= weight
            along = tl.sum(above * unit, 1)[:, None] / D
            dx = (above - unit * along) * inverse
            if HAS_GRAD:
                dx += grad.to(tl.float32)
            store(p_dx + rows[:, None].to(tl.int64) * D + columns[None, :], dx, mask)
    if NEED_WEIGHT:
        tl.store(p_sums + tl.program_id(0).to(tl.int64) * D + columns, sums, mask=m_columns)


@triton.jit(do_not_specialize=["programs"])
def add_partial_sums_kernel(
    p_sums, p_total, programs, D, EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add the programs' sums (programs, D) in a fixed order, rounded to p_total's dtype. Grid (column blocks,)."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_columns = (columns < D) | EVEN_D
    sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in tl.range(0, programs, BLOCK_N, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_N)
        mask = (rows < programs)[:, None] & m_columns[None, :]
        sums += tl.load(p_sums + rows[:, None].to(tl.int64) * D + columns[None, :], mask=mask, other=0.0)
    store(p_total + columns, tl.sum(sums, 0), m_columns)


# --------------------------------------------------------------------------------------------------------- launchers


@dataclass(frozen=True)
class RowsSchedule:
    """The layout of a kernel with whole rows in registers."""

    block_n: int
    block_d: int
    programs: int
    num_warps: int
    num_stages: int = 1

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's block sizes by name."""
        return {"BLOCK_N": self.block_n, "BLOCK_D": self.block_d}


@lru_cache(maxsize=4096)
def row_schedule(tokens: int, hidden: int, device: Device, looped: bool = False) -> RowsSchedule:
    """Return the layout for whole rows: 16 or 32 numbers of a row for each lane, and at least four warps.

    looped: whether programs loop over tiles, as they do to sum over rows. Then two fill a multiprocessor.
    """
    block_d = next_power_of_2(hidden)
    block_n = max(1, min(2048 // block_d, next_power_of_2(ceil_div(tokens, device.multiprocessors))))
    lanes = 64 if device.gpu == "hip" else 32
    warps = max(4, min(1024 // lanes, block_n * block_d // (16 * lanes)))
    tiles = ceil_div(tokens, block_n)
    at_once = device.multiprocessors * max(1, min(8, 2048 // (lanes * warps)))
    return RowsSchedule(block_n, block_d, min(tiles, at_once) if looped else tiles, warps)


@dataclass(frozen=True)
class _Finish:
    block_n: int = 32
    block_d: int = 32
    num_warps: int = 4
    num_stages: int = 2

    @property
    def constants(self) -> dict[str, int]:
        return {"BLOCK_N": self.block_n, "BLOCK_D": self.block_d, "STAGES": self.num_stages}


def norm_constants(norm: Norm) -> dict[str, Any]:
    """Return the norm's kind as the kernels' constants."""
    return {
        "HAS_WEIGHT": norm.weight is not None, "PLUS_ONE": norm.plus_one, "ROUNDS_FIRST": norm.rounds_first,
    }  # fmt: skip


def add_partial_sums(sums: Tensor, total: Tensor) -> Tensor:
    """Add the rows of `sums` (programs, n), float32, in a fixed order, into `total` (n numbers). Return `total`."""
    programs, numbers = sums.shape
    finish = _Finish()
    launch(
        add_partial_sums_kernel, (ceil_div(numbers, finish.block_d),), sums, total, programs, numbers,
        device=sums.device, schedule=finish, EVEN_D=numbers % finish.block_d == 0,
    )  # fmt: skip
    return total


def triton_forward(
    residual: Tensor,
    branch: Tensor | None,
    norm: Norm,
    keep: bool,
    shift: tuple[Tensor, Tensor | None, float | Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Add, shift and normalise in one launch.

    Args:
        keep: whether to keep 1 / rms for a backward pass.
        shift: a steering vector b2 (d,), the gain (N,) or None, and the scale; or None.

    Returns:
        `out` (`residual` if nothing is added), the normalised `out`, and 1 / rms (N,) or None.
    """
    dtype = residual.dtype if branch is None else torch.promote_types(residual.dtype, branch.dtype)
    hidden = residual.shape[-1]
    tokens = residual.numel() // hidden
    written = branch is not None or shift is not None
    out = empty(*residual.shape, dtype=dtype, device=residual.device) if written else residual
    normed = empty(*residual.shape, dtype=dtype, device=residual.device)
    inverse = empty(tokens, dtype=torch.float32, device=residual.device) if keep else None
    if tokens == 0:
        return out, normed, inverse
    (residual, branch), inner, (of_residual, of_branch) = row_layout(residual, branch)
    up_bias, gain, scale = (None, None, 1.0) if shift is None else shift
    up_bias, gain, weight = contiguous(up_bias, gain, norm.weight)
    p_scale, scale = (scale, 0.0) if isinstance(scale, Tensor) else (None, scale)
    schedule = row_schedule(tokens, hidden, device_of(residual))
    launch(
        rms_norm_fwd_kernel, (schedule.programs,),
        residual, branch, up_bias, gain, p_scale, weight, out if written else None, normed, inverse,
        scale, norm.eps, tokens, hidden, inner, *of_residual, *of_branch,
        device=residual.device, schedule=schedule, HAS_BRANCH=branch is not None, HAS_SHIFT=shift is not None,
        HAS_GAIN=gain is not None, SCALE_ON_DEVICE=p_scale is not None, **norm_constants(norm),
        WRITE_OUT=written, KEEP_INVERSE=keep, NESTED=inner > 0, EVEN_D=hidden == schedule.block_d,
    )  # fmt: skip
    return out, normed, inverse


def triton_backward(
    grad: Tensor | None, grad_normed: Tensor, x: Tensor, inverse: Tensor, norm: Norm, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Run the backward in one launch, or two for the weight's gradient. See `norm_torch.backward`."""
    need_x, need_weight = needs[0], needs[1] and norm.weight is not None
    hidden = x.shape[-1]
    tokens = x.numel() // hidden
    dx = empty(*x.shape, dtype=x.dtype, device=x.device) if need_x else None
    d_weight = None
    if need_weight and norm.weight is not None:
        d_weight = empty(hidden, dtype=norm.weight.dtype, device=x.device)
    if tokens == 0:
        return dx, None if d_weight is None else d_weight.zero_()
    (grad, grad_normed, x), inner, strides = row_layout(grad, grad_normed, x)
    (weight,) = contiguous(norm.weight)
    schedule = row_schedule(tokens, hidden, device_of(x), looped=need_weight)
    sums = empty(schedule.programs, hidden, dtype=torch.float32, device=x.device) if need_weight else None
    launch(
        rms_norm_bwd_kernel, (schedule.programs,),
        grad if need_x else None, grad_normed, x, weight if need_x else None, inverse, dx, sums,
        tokens, hidden, inner, *(stride for both in strides for stride in both),
        device=x.device, schedule=schedule, HAS_GRAD=grad is not None, HAS_WEIGHT=weight is not None,
        PLUS_ONE=norm.plus_one, NEED_X=need_x, NEED_WEIGHT=need_weight, NESTED=inner > 0,
        EVEN_D=hidden == schedule.block_d,
    )  # fmt: skip
    if sums is not None and d_weight is not None:
        add_partial_sums(sums, d_weight)
    return dx, d_weight


def norm_backward(
    grad: Tensor | None, grad_normed: Tensor, x: Tensor, inverse: Tensor, norm: Norm, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Run the backward on the backend of x's device. See `norm_torch.backward`."""
    run = triton_backward if select_backend(x.device) == "triton" else norm_torch.backward
    return run(grad, grad_normed, x, inverse, norm, needs)


# ---------------------------------------------------------------------------------------------------------- autograd

_forward_plans: dict[Any, OpPlan] = {}
_backward_plans: dict[Any, OpPlan] = {}


def _run_forward(x: Tensor, norm: Norm, keep: bool) -> tuple[Tensor, ...]:
    """Return the normalised x, and 1 / rms if it is kept."""
    with no_autocast(x.device):
        if select_backend(x.device) == "torch":
            return norm_torch.forward(x, norm)[: 1 + keep]
        key = (x.shape, x.dtype, norm.weight is None, *norm[1:], keep)

        def call() -> tuple[Tensor, ...]:
            return tuple(t for t in triton_forward(x, None, norm, keep)[1:] if t is not None)

        if norm.weight is None:  # a plan needs two tensors
            return call()
        return tuple(run_planned(_forward_plans, key, (x, norm.weight), call))


def _run_backward(
    grad_normed: Tensor, x: Tensor, inverse: Tensor, norm: Norm, needs: tuple[bool, bool]
) -> tuple[Tensor, ...]:
    """Return the gradients that are needed."""
    inputs = (grad_normed, x, inverse, norm.weight)

    def call() -> tuple[Tensor, ...]:
        return tuple(t for t in norm_backward(None, grad_normed, x, inverse, norm, needs) if t is not None)

    with no_autocast(x.device):
        if select_backend(x.device) == "torch":
            return call()
        key = (x.shape, x.dtype, norm.weight is None, *norm[1:], *needs)
        return tuple(run_planned(_backward_plans, key, inputs, call))


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, *kind: Any) -> Tensor:
        normed, inverse = _run_forward(x, Norm(weight, *kind), True)
        ctx.save_for_backward(x, weight, inverse)
        ctx.kind = kind
        ctx.set_materialize_grads(False)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = tuple(ctx.needs_input_grad[:2])
        if grad is None or not any(needs):
            return None, None, None, None, None
        x, weight, inverse = ctx.saved_tensors
        norm = Norm(weight, *ctx.kind)
        if torch.is_grad_enabled() or is_batched(grad):  # no kernel computes several, or differentiates them again
            with no_autocast(x.device):
                found = norm_torch.backward(None, grad, x, norm_torch.inverse_rms(x, norm), norm, needs)
            return *found, None, None, None
        computed = iter(_run_backward(grad, x, inverse, norm, needs))
        return *(next(computed) if need else None for need in needs), None, None, None


# -------------------------------------------------------------------------------------------------------- user's call


def check_norm(x: Tensor, norm: Norm) -> None:
    """Check an RMSNorm of x. Raise a one-line error with the value and the expected one.

    Raises:
        ValueError, TypeError: see `rms_norm`.
    """
    check_dense("the normalised tensor", x)
    if x.dim() < 1 or not 0 < x.shape[-1] <= MAX_WIDTH:
        raise ValueError(
            f"the normalised tensor has shape {tuple(x.shape)}; expected (..., d) with 0 < d <= {MAX_WIDTH}"
        )
    weight, eps, plus_one, rounds_first = norm
    if isinstance(eps, bool) or not isinstance(eps, (float, int)) or not 0 <= eps <= FLOAT32_MAX:
        raise ValueError(f"eps is {shown(eps)}; expected a number of at least 0, in float32")
    check_flag("plus_one", plus_one)
    check_flag("rounds_first", rounds_first)
    tensors = [("the normalised tensor", x)]
    if weight is not None:
        tensors.append(("norm_weight", weight))
        check_dense("norm_weight", weight)
        if weight.shape != x.shape[-1:]:
            raise ValueError(f"norm_weight has shape {tuple(weight.shape)}; expected ({x.shape[-1]},)")
        if weight.device != x.device:
            raise ValueError(f"norm_weight is on {weight.device}; expected {x.device}, the device of the hidden state")
    elif plus_one:
        raise ValueError("plus_one is True but norm_weight is None; expected a weight")
    for name, tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected float32, bfloat16, float16 or float64")
        if tensor.dtype == torch.float64 and select_backend(x.device) == "triton":
            raise TypeError("the triton backend got a float64 tensor; expected float32, bfloat16 or float16")


def rms_norm(
    x: Tensor, weight: Tensor | None, *, eps: float, plus_one: bool = False, rounds_first: bool = True
) -> Tensor:
    """RMSNorm, x / sqrt(mean(x²) + eps) ⊙ w, in one pass over the hidden state. All arithmetic is float32.

    Gradients with create_graph=True, and calls inside transforms of torch.func, in forward mode, under a mode of
    PyTorch's dispatcher, or on tensor subclasses such as DTensor are computed by PyTorch operations instead of kernels.

    Args:
        x: (..., d), d at most 32768, float32, bfloat16, float16, or, on the torch backend, float64. Any strides.
        weight: w (d,), of any of these dtypes, or None for no weight.
        eps: added to the mean square.
        plus_one: multiply by 1 + w, as Gemma does.
        rounds_first: round x / rms to x's dtype before it is multiplied by w, as Llama does.

    Returns:
        (..., d), contiguous, in the dtype of x.

    Raises:
        ValueError: a shape, a device or eps is not supported.
        TypeError: a dtype is not supported.
        RuntimeError: the backend of FUSED_STEER_BACKEND cannot run here.
    """
    norm = Norm(weight, eps, plus_one, rounds_first)
    check_norm(x, norm)
    if is_transformed() or is_watched() or is_wrapped(x, weight):
        with no_autocast(x.device):
            return norm_torch.definition(x, norm)
    if torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad)):
        return _RmsNorm.apply(x, *norm)
    return _run_forward(x, norm, False)[0]
