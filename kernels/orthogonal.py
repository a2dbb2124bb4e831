"""Joint-Orth: project steering adapters onto the complement of a LoRA's column space, for all layers at once.

    W2' = (I − V Vᵀ) W2        V: an orthonormal basis of the column space of B        (arXiv 2603.00425, §5.2)

for L layers, with W2 = up (d, r), B = writers (d, k), k <= 64. No singular value decomposition is needed. With G = BᵀB
and C = BᵀW2, both small and summed in float64, V = B T for a k × k matrix T, and W2' = W2 − B T Tᵀ C. T comes from
Gram–Schmidt with pivoting on the coefficients, since a residual column B c has the squared norm cᵀ G c. The same three
kernels compute V itself from the coefficients T.

Two thresholds separate directions from noise, with float32's eps. A column counts as zero if another is 1/eps times as
long. It counts as a combination of others if its residual is below √k · eps of its length. B = 0, LoRA's initial state,
has no directions, and then W2' is W2 bit for bit. The file goes from the kernels to the public functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import check_backend, no_autocast, select_backend
from .contract import DTYPES
from .derivatives import is_batched, is_transformed
from .launch import device_of, launch
from .numerics import store
from .schedule import ceil_div, next_power_of_2

MAX_WRITERS = 64  # the highest k, over all writers of a layer
_EPS = torch.finfo(torch.float32).eps
_ROUNDS = 2  # rounds of orthonormalisation; the second restores digits lost to an ill-conditioned Gram matrix
_FEW_ELEMENTS = 1 << 18  # the most elements that plain PyTorch holds in float64 at a time: 2 MiB

# ----------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def orthogonal_gram_kernel(
    p_writers, p_up, p_partial,
    D, part, K: tl.constexpr, R: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Compute partial sums of G = BᵀB and, if R > 0, C = BᵀW2 over some rows. Grid (layers, parts). No atomics."""
    layer = tl.program_id(0).to(tl.int64)
    ks = tl.arange(0, BLOCK_K)
    rs = tl.arange(0, BLOCK_R)
    gram = tl.zeros([BLOCK_K, BLOCK_K], tl.float64)
    along = tl.zeros([BLOCK_K, BLOCK_R], tl.float64)
    first = tl.program_id(1) * part
    for start in range(first, tl.minimum(first + part, D), BLOCK_D):
        rows = start + tl.arange(0, BLOCK_D)
        m_rows = rows[:, None] < D
        offsets = (layer * D + rows)[:, None]
        # [BLOCK_D, BLOCK_K], [BLOCK_D, BLOCK_R]
        b = tl.load(p_writers + offsets * K + ks[None, :], mask=m_rows & (ks[None, :] < K), other=0.0)
        if R > 0:
            u = tl.load(p_up + offsets * R + rs[None, :], mask=m_rows & (rs[None, :] < R), other=0.0)
        b = b.to(tl.float32).to(tl.float64)
        if R > 0:
            u = u.to(tl.float32).to(tl.float64)
        gram += tl.sum(b[:, :, None] * b[:, None, :], 0)
        if R > 0:
            along += tl.sum(b[:, :, None] * u[:, None, :], 0)
    p_partial += (layer * tl.num_programs(1) + tl.program_id(1)) * K * (K + R)
    m_ks = ks[:, None] < K
    tl.store(p_partial + ks[:, None] * K + ks[None, :], gram, mask=m_ks & (ks[None, :] < K))
    if R > 0:
        tl.store(p_partial + K * K + ks[:, None] * R + rs[None, :], along, mask=m_ks & (rs[None, :] < R))


@triton.jit
def orthogonal_solve_kernel(
    p_partial, p_solution, parts, eps,
    K: tl.constexpr, R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Compute S = T Tᵀ C (k, r), with W2' = W2 − B S, or if R = 0, T (k, k). Grid (layers, blocks of S's columns)."""
    layer = tl.program_id(0).to(tl.int64)
    COLUMNS: tl.constexpr = R if R > 0 else K
    ks = tl.arange(0, BLOCK_K)
    rs = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_gram = (ks[:, None] < K) & (ks[None, :] < K)
    m_solution = (ks[:, None] < K) & (rs[None, :] < COLUMNS)
    gram = tl.zeros([BLOCK_K, BLOCK_K], tl.float64)
    along = tl.zeros([BLOCK_K, BLOCK_R], tl.float64)
    for number in range(0, parts):
        p_part = p_partial + (layer * parts + number) * K * (K + R)
        gram += tl.load(p_part + ks[:, None] * K + ks[None, :], mask=m_gram, other=0.0)
        if R > 0:
            along += tl.load(p_part + K * K + ks[:, None] * R + rs[None, :], mask=m_solution, other=0.0)

    diagonal = ks[:, None] == ks[None, :]
    squares = tl.sum(tl.where(diagonal, gram, 0.0), 0)
    kept = squares > tl.max(squares, 0) * (eps * eps)
    unit = tl.where(kept, 1.0 / tl.sqrt(tl.where(kept, squares, 1.0)), 0.0)  # scales columns to length 1, or to 0
    rest = gram * unit[:, None] * unit[None, :]
    along *= unit[:, None]
    coefficients = tl.where(diagonal & kept[None, :], 1.0, 0.0).to(tl.float64)
    solution = tl.zeros([BLOCK_K, BLOCK_R], tl.float64)
    least = K * eps * eps
    for number in range(0, K):
        left = tl.max(tl.sum(tl.where(diagonal, rest, 0.0), 0), 0)
        if left > least:
            lengths = tl.sum(tl.where(diagonal, rest, 0.0), 0)
            pivot = tl.min(tl.where(lengths == left, ks, BLOCK_K), 0)
            # q: the coefficients of a direction of length 1. w: the component of every residual along it.
            q = tl.sum(tl.where(ks[None, :] == pivot, coefficients, 0.0), 1) / tl.sqrt(left)
            w = tl.sum(tl.where(ks[:, None] == pivot, rest, 0.0), 0) / tl.sqrt(left)
            if R > 0:
                solution += q[:, None] * tl.sum(q[:, None] * along, 0)[None, :]
            else:
                solution = tl.where((rs == number)[None, :], q[:, None], solution)
            spent = (ks == pivot)[None, :]
            coefficients = tl.where(spent, 0.0, coefficients - q[:, None] * w[None, :])
            rest = tl.where(spent | (ks == pivot)[:, None], 0.0, rest - w[:, None] * w[None, :])
    # A writer that is not finite must not count as zero.
    solution = solution * unit[:, None] + tl.sum(squares, 0) * 0.0
    tl.store(p_solution + (layer * K + ks[:, None]) * COLUMNS + rs[None, :], solution, mask=m_solution)


@triton.jit
def orthogonal_apply_kernel(
    p_writers, p_up, p_solution, p_out,
    D, K: tl.constexpr, R: tl.constexpr, HAS_UP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Compute W2' = W2 − B S, or without W2, B S. Grid (layers, blocks of d, blocks of r)."""
    layer = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    rs = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_rows = rows < D
    mask = m_rows[:, None] & (rs[None, :] < R)
    offsets = layer * D + rows
    taken = tl.zeros([BLOCK_D, BLOCK_R], tl.float64)
    for k in range(0, K):
        b = tl.load(p_writers + offsets * K + k, mask=m_rows, other=0.0).to(tl.float32).to(tl.float64)
        s = tl.load(p_solution + (layer * K + k) * R + rs, mask=rs < R, other=0.0)
        taken += b[:, None] * s[None, :]
    if HAS_UP:
        up = tl.load(p_up + offsets[:, None] * R + rs[None, :], mask=mask, other=0.0).to(tl.float32)
        # If nothing is subtracted, keep the input bit for bit.
        out = tl.where(taken == 0.0, up, (up.to(tl.float64) - taken).to(tl.float32))
    else:
        out = taken.to(tl.float32)
    store(p_out + offsets[:, None] * R + rs[None, :], out, mask)


# ---------------------------------------------------------------------------------------------------------- launchers


@dataclass(frozen=True)
class OrthogonalSchedule:
    """The layout of a launch, a `schedule.Layout`."""

    constants: dict[str, int]
    num_warps: int = 4
    num_stages: int = 1


def _triton_solve(writers: Tensor, up: Tensor | None) -> Tensor:
    """Return S (L, k, r), or without `up` T (L, k, k), in float64, by two launches."""
    layers, hidden, k = writers.shape
    rank = 0 if up is None else up.shape[2]
    columns = rank or k
    block_k, block_r = max(2, next_power_of_2(k)), max(2, next_power_of_2(rank))
    device = device_of(writers)
    # Several parts for each layer, so that a few layers fill the device too. Each part has at least a few tiles.
    rows = max(1, 4096 // (block_k * max(block_k, block_r)))
    parts = max(1, min(ceil_div(2 * device.multiprocessors, layers), ceil_div(hidden, 8 * rows)))
    part = ceil_div(ceil_div(hidden, parts), rows) * rows
    parts = ceil_div(hidden, part)
    partial = torch.empty(layers, parts, k * (k + rank), dtype=torch.float64, device=writers.device)
    solution = torch.empty(layers, k, columns, dtype=torch.float64, device=writers.device)
    launch(
        orthogonal_gram_kernel, (layers, parts), writers, up, partial, hidden, part, K=k, R=rank, device=writers.device,
        schedule=OrthogonalSchedule({"BLOCK_D": rows, "BLOCK_K": block_k, "BLOCK_R": block_r}, 8),
    )  # fmt: skip
    narrow = _narrow(columns)
    launch(
        orthogonal_solve_kernel, (layers, ceil_div(columns, narrow)), partial, solution, parts, _EPS, K=k, R=rank,
        device=writers.device,
        schedule=OrthogonalSchedule({"BLOCK_K": block_k, "BLOCK_R": narrow}, 8 if block_k > 16 else 4),
    )  # fmt: skip
    return solution


def _narrow(columns: int) -> int:
    return min(max(2, next_power_of_2(columns)), 32)


def _triton_apply(writers: Tensor, up: Tensor | None, solution: Tensor) -> Tensor:
    """Return W2 − B S in W2's dtype, or without `up` B S in float32, by one launch."""
    layers, hidden, k = writers.shape
    columns = solution.shape[2]
    dtype = torch.float32 if up is None else up.dtype
    out = torch.empty(layers, hidden, columns, dtype=dtype, device=writers.device)
    narrow = _narrow(columns)
    launch(
        orthogonal_apply_kernel, (layers, ceil_div(hidden, 64), ceil_div(columns, narrow)),
        writers, up, solution, out, hidden, K=k, R=columns, HAS_UP=up is not None, device=writers.device,
        schedule=OrthogonalSchedule({"BLOCK_D": 64, "BLOCK_R": narrow}),
    )  # fmt: skip
    return out


def triton_project(up: Tensor, writers: Tensor) -> Tensor:
    return _triton_apply(writers, up, _triton_solve(writers, up))


def triton_basis(writers: Tensor) -> Tensor:
    for _ in range(_ROUNDS):
        writers = _triton_apply(writers, None, _triton_solve(writers, None))
    return writers


# -------------------------------------------------------------------------------------------------------- plain torch


def _directions(gram: Tensor) -> Tensor:
    """Return T (L, k, k) in float64, so that the columns of B T are orthonormal or zero, from G = BᵀB (L, k, k)."""
    k = gram.shape[-1]
    squares = gram.diagonal(dim1=1, dim2=2)
    kept = squares > squares.amax(1, keepdim=True) * _EPS**2
    unit = torch.where(kept, squares.rsqrt(), 0.0)
    rest = gram * unit.unsqueeze(2) * unit.unsqueeze(1)
    coefficients = torch.diag_embed(kept.to(gram.dtype))
    found = []
    for _ in range(k):
        left, pivot = rest.diagonal(dim1=1, dim2=2).max(1, keepdim=True)
        length = torch.where(left > k * _EPS**2, left.rsqrt(), 0.0)  # 0: no direction is left
        index = pivot.unsqueeze(2)
        q = coefficients.gather(2, index.expand(-1, k, 1)).squeeze(2) * length
        w = rest.gather(1, index.expand(-1, 1, k)).squeeze(1) * length
        found.append(q * unit)
        spent = torch.zeros_like(kept).scatter_(1, pivot, True)
        coefficients = torch.baddbmm(coefficients, q.unsqueeze(2), w.unsqueeze(1), alpha=-1)
        coefficients.masked_fill_(spent.unsqueeze(1), 0.0)
        rest = torch.baddbmm(rest, w.unsqueeze(2), w.unsqueeze(1), alpha=-1)
        rest.masked_fill_(spent.unsqueeze(1) | spent.unsqueeze(2), 0.0)
    return torch.stack(found, 2)


def _torch_project(up: Tensor, writers: Tensor) -> Tensor:
    layers, hidden, rank = up.shape
    k = writers.shape[2]
    # A few layers at a time. Float64 copies of all layers would be new memory in every call.
    few = max(1, _FEW_ELEMENTS // (hidden * (k + rank)))
    parts = [slice(start, start + few) for start in range(0, layers, few)]
    small = []
    for part in parts:
        wide = writers[part].double()
        small.append(torch.bmm(wide.transpose(1, 2), torch.cat([wide, up[part].double()], 2)))
    gram, along = torch.cat(small).split([k, rank], 2)
    directions = _directions(gram)
    solution = directions @ (directions.transpose(1, 2) @ along)
    out = torch.empty_like(up)
    for part in parts:
        taken = torch.bmm(writers[part].double(), solution[part])
        out[part] = torch.where(taken == 0, up[part], (up[part].double() - taken).to(up.dtype))
    return out


def _torch_basis(writers: Tensor) -> Tensor:
    basis = writers.double()
    for _ in range(_ROUNDS):
        basis = torch.bmm(basis, _directions(torch.bmm(basis.transpose(1, 2), basis)))
    return basis.to(_basis_dtype(writers))


def _basis_dtype(writers: Tensor) -> torch.dtype:
    return torch.float64 if writers.dtype == torch.float64 else torch.float32


# --------------------------------------------------------------------------------------------- autograd, caller's part

_PROJECT = {"triton": triton_project, "torch": _torch_project}
_BASIS = {"triton": triton_basis, "torch": _torch_basis}


class _ProjectOut(torch.autograd.Function):
    """Projects W2, and its gradient by the same projection, which is its own adjoint. V is a constant."""

    @staticmethod
    def forward(ctx: Any, up: Tensor, writers: Tensor) -> Tensor:
        ctx.save_for_backward(writers)
        return _PROJECT[select_backend(up.device)](up, writers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (writers,) = ctx.saved_tensors
        if is_batched(grad):
            basis = _BASIS[select_backend(writers.device)](writers)
            return grad - (basis @ (basis.mT @ grad.to(basis.dtype))).to(grad.dtype), None
        return _ProjectOut.apply(grad.contiguous(), writers), None


def _check(up: Tensor, writers: Tensor) -> None:
    if up.dim() != 3 or not len(up):
        raise ValueError(f"up has shape {tuple(up.shape)}; expected (layers, d, r), at least one layer")
    layers, hidden, rank = up.shape
    if writers.dim() != 3 or writers.shape[:2] != up.shape[:2]:
        raise ValueError(f"writers has shape {tuple(writers.shape)}; expected ({layers}, {hidden}, k)")
    k = writers.shape[2]
    if not 1 <= k <= MAX_WRITERS or k >= hidden:
        raise ValueError(f"writers has {k} columns; expected 1 to {MAX_WRITERS}, and fewer than d = {hidden}")
    if not 1 <= rank <= 256:
        raise ValueError(f"up has rank {rank}; expected 1 to 256")
    if writers.device != up.device:
        raise ValueError(f"writers is on {writers.device}; expected {up.device}, the device of up")
    for name, tensor in (("up", up), ("writers", writers)):
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected float32, bfloat16, float16 or float64")
    check_backend(select_backend(up.device), up, writers)


def project_out(up: Tensor, writers: Tensor) -> Tensor:
    """Return W2' = (I − V Vᵀ) W2 for every layer, with V a basis of the writers' columns (arXiv 2603.00425, §5.2).

    Differentiable in `up`, with the gradient projected in the same way. The writers are constants. In float32,
    ‖BᵀW2'‖ is at most 1e-5 ‖B‖ ‖W2‖ (Frobenius) for every B. A narrower dtype adds the rounding of W2' itself.

    Args:
        up: W2 of every layer, (L, d, r), r at most 256; float32, bfloat16, float16, or, on the torch backend, float64.
        writers: B of every layer, (L, d, k), k at most 64, with several LoRAs side by side. A layer with fewer columns
            is padded with zeros. A NaN or infinity makes its layer's result NaN.

    Returns:
        (L, d, r), contiguous, in the dtype of `up`. Layers with B = 0 are unchanged bit for bit.

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: a dtype is not supported.
    """
    _check(up, writers)
    return _ProjectOut.apply(up.contiguous(), writers.detach().contiguous())


def column_space(writers: Tensor) -> Tensor:
    """Return V (L, d, k), an orthonormal basis of each layer's column space. Columns beyond its rank are zero.

    V is float32, or float64 if the writers are.

    Args:
        writers: B (L, d, k), as for `project_out`.

    Raises:
        ValueError, TypeError: see `project_out`.
    """
    if writers.dim() != 3 or not len(writers):
        raise ValueError(f"writers has shape {tuple(writers.shape)}; expected (layers, d, k), at least one layer")
    _check(writers[..., :1], writers)
    return _BASIS[select_backend(writers.device)](writers.detach().contiguous())


class _ProjectGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, basis: Tensor) -> Tensor:
        ctx.save_for_backward(basis)
        return matrix.view_as(matrix)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (basis,) = ctx.saved_tensors
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        columns = grad.to(wide).reshape(basis.shape[0], -1)
        basis = basis.to(columns.device, wide)  # a replica of DataParallel has the first device's
        with no_autocast(grad.device):
            projected = torch.addmm(columns, basis, basis.t() @ columns, alpha=-1)
        return projected.view(grad.shape).to(grad.dtype), None


def project_gradient(matrix: Tensor, basis: Tensor) -> Tensor:
    """Return `matrix` unchanged, and multiply its gradient by (I − V Vᵀ) in backward. For one layer.

    For a W2 that satisfies VᵀW2 = 0 already, W2' = (I − V Vᵀ) W2 is W2. Then this is the projection with its derivative
    (V is a constant of the step, arXiv 2603.00425, §5.2), at no cost forward and two small products backward.

    Inside a transform of torch.func, or in forward mode, W2 is what the caller gives, so it is projected itself.

    Args:
        matrix: W2 (d, r), or b2 (d,).
        basis: V (d, k), with orthonormal or zero columns, from `column_space`.
    """
    if is_transformed():
        return matrix - (basis @ (basis.t() @ matrix.to(basis.dtype))).to(matrix.dtype)
    return _ProjectGradient.apply(matrix, basis)
