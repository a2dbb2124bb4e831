"""LoReFT's rotation: R of orthonormal rows, made from a matrix that any optimizer may change as it likes.

LoReFT (arXiv 2404.03592) is h + Rᵀ(W h + b − R h), R (r, d) with R Rᵀ = I. As the op has it: W1 = W − R, W2 = Rᵀ,
φ the identity, b1 = b. What trains in R's place is a matrix P (d, r), and

    P = Rᵀ U      U (r, r) upper triangular with a positive diagonal (the QR decomposition, which is unique so)

Weight decay multiplies P by a number, and so U alone: R stays what it was. A P of orthonormal columns (to rounding) is
Rᵀ bit for bit, so that an R that was read from a file is the R that computes.

Backward, Q = Rᵀ, G = ∂L/∂Q (from W2, and with the sign turned from W1), sym taking a matrix's lower triangle to both:

    dP = (G − Q sym(Gᵀ Q)) U⁻ᵀ
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backend import no_autocast
from .derivatives import is_transformed


def is_orthonormal(matrix: Tensor) -> bool:
    """Return whether the columns are orthonormal to rounding. `orthonormal` leaves such a matrix as it is."""
    wide = matrix.to(_wide(matrix.device))
    return bool(_defect(wide.mT @ wide) <= _rounding(matrix))


def _rounding(matrix: Tensor) -> float:
    """Return how far QᵀQ may be from I.

    Rounding each entry of Q once moves QᵀQ by eps at most. A float32 decomposition, such as torch's, moves it by the
    rounding of sums over d numbers.
    """
    computed = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    return max(2 * torch.finfo(matrix.dtype).eps, math.sqrt(matrix.shape[-2]) * torch.finfo(computed).eps)


def _defect(gram: Tensor) -> Tensor:
    return (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs().amax((-2, -1), keepdim=True)


def orthonormal(matrix: Tensor) -> Tensor:
    """Return Rᵀ (d, r), the orthonormal factor of P (d, r) of full rank, in float32, or in float64 if P is."""
    return _factor(matrix)[0]


def _wide(device: torch.device) -> torch.dtype:
    """Return the dtype in which PᵀP is formed and factored. Its condition number is the square of P's."""
    return torch.float32 if device.type == "mps" else torch.float64


def _decomposed(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Rᵀ (..., d, r), Uᵀ (..., r, r) and PᵀP of P (..., d, r), in the wide dtype, by differentiable operations.

    It never waits for the device. A P of lower rank gives NaN.
    """
    wide = matrix.to(_wide(matrix.device))
    gram = wide.mT @ wide
    lower, failed = torch.linalg.cholesky_ex(gram)
    lower = torch.where(failed[..., None, None] == 0, lower, torch.nan)
    return torch.linalg.solve_triangular(lower.mT, wide, upper=True, left=False), lower, gram


def _factor(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return Rᵀ (..., d, r), and Uᵀ (..., r, r) in the wide dtype, of P (..., d, r). See `_decomposed`."""
    made, lower, gram = _decomposed(matrix)
    return _rounded(matrix, made, gram), lower


def _rounded(matrix: Tensor, made: Tensor, gram: Tensor) -> Tensor:
    """Return Rᵀ in its dtype: P itself if its columns are orthonormal, else `made`, what was computed from it."""
    result = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    return torch.where(_defect(gram) <= _rounding(matrix), matrix.to(result), made.to(result))


class _Rotation(torch.autograd.Function):
    """W1 = W − R and W2 = Rᵀ of W and P."""

    @staticmethod
    def forward(source: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        up, lower = _factor(matrix)
        return source.to(up.dtype) - up.t(), up, lower

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        source, matrix = inputs
        _, up, lower = output
        ctx.mark_non_differentiable(lower)
        ctx.save_for_backward(up, lower, matrix)
        ctx.dtypes = source.dtype, matrix.dtype

    @staticmethod
    def backward(ctx: Any, grad_down: Tensor, grad_up: Tensor, _: Any) -> tuple[Tensor | None, Tensor | None]:
        up, lower, matrix = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradients may be differentiated again
            up, lower, _ = _decomposed(matrix)
        of_source, of_matrix = ctx.dtypes
        found = _of_matrix(up, lower, grad_down, grad_up).to(of_matrix) if ctx.needs_input_grad[1] else None
        return grad_down.to(of_source) if ctx.needs_input_grad[0] else None, found


def _of_matrix(up: Tensor, lower: Tensor, grad_down: Tensor, grad_up: Tensor) -> Tensor:
    """Return dP (..., d, r) in the wide dtype, of the gradients of W1 and W2."""
    q, grad = up.to(lower.dtype), grad_up.to(lower.dtype) - grad_down.mT.to(lower.dtype)
    across = (grad.mT @ q).tril()
    across = across + across.tril(-1).mT
    return torch.linalg.solve_triangular(lower, grad - q @ across, upper=False, left=False)


def rotate(source: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return W1 = W − R (r, d) and W2 = Rᵀ (d, r) of LoReFT's W (r, d) and P (d, r).

    In float32, whatever the dtype of W and P; in float64 where P is.
    """
    if is_transformed():
        made, _, gram = _decomposed(matrix)
        up = _rounded(matrix, made, gram)
        made = made.to(up.dtype)
        up = up.detach() + (made - made.detach())  # the value of R, and the derivatives of the decomposition
        return source.to(up.dtype) - up.mT, up
    down, up, _ = _Rotation.apply(source, matrix)
    return down, up


class _Rotations(torch.autograd.Function):
    """W1 and W2 of all layers, of their W and P. Both passes take the same launches for any number of layers."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> tuple[Tensor, ...]:
        count = len(parameters) // 2
        sources, matrices = torch.stack(parameters[:count]), torch.stack(parameters[count:])
        up, lower = _factor(matrices)
        ctx.save_for_backward(up, lower, *parameters[count:])
        ctx.dtypes = sources.dtype, matrices.dtype
        ctx.set_materialize_grads(False)
        return *(sources.to(up.dtype) - up.mT).unbind(), *up.unbind()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        up, lower, *matrices = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradients may be differentiated again
            up, lower, _ = _decomposed(torch.stack(matrices))
        of_source, of_matrix = ctx.dtypes
        count = len(grads) // 2
        # A layer that did not run has no gradient, as if it had been rotated by itself.
        ran = [at for at in range(count) if grads[at] is not None or grads[count + at] is not None]
        found: list[Tensor | None] = [None] * (2 * count)
        if not ran:
            return tuple(found)
        if len(ran) < count:
            up, lower = up[ran], lower[ran]
        downs, ups = ([grads[first + at] for at in ran] for first in (0, count))
        of_down = torch.stack([up.new_zeros(up.shape[:0:-1]) if grad is None else grad for grad in downs])
        of_up = torch.stack([up.new_zeros(up.shape[1:]) if grad is None else grad for grad in ups])
        of_p = _of_matrix(up, lower, of_down, of_up).to(of_matrix).contiguous().unbind()
        of_w = of_down.to(of_source).unbind()
        for number, at in enumerate(ran):
            found[at] = of_w[number] if ctx.needs_input_grad[at] else None
            found[count + at] = of_p[number] if ctx.needs_input_grad[count + at] else None
        return tuple(found)


def rotate_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Return what `rotate` gives for each pair, by the same few launches for any number of pairs.

    Not for the transforms of torch.func, nor for forward-mode differentiation.

    Args:
        pairs: W (r, d) and P (d, r), all of one shape, dtype and device.
    """
    sources, matrices = zip(*pairs, strict=True)
    with no_autocast(sources[0].device):  # it refuses to stack tensors of another narrow dtype than its own
        made = _Rotations.apply(*sources, *matrices)
    return list(zip(made[: len(pairs)], made[len(pairs) :], strict=True))
