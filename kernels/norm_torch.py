"""RMSNorm in plain PyTorch, forward and backward: the `torch` backend of `rms_norm` and of `post_block_norm`.

Arithmetic is float64 for float64 inputs, else float32. It saves what the Triton kernels save: the input and 1 / rms.
PyTorch can differentiate `backward` again and `definition` in every mode. No kernel computes these derivatives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .torch_backend import accumulation_dtype


class Norm(NamedTuple):
    """An RMSNorm: x / sqrt(mean(x²) + eps) ⊙ w.

    Attributes:
        weight: w (d,), or None for a norm without a weight.
        eps: added to the mean square.
        plus_one: whether the factor is 1 + w instead of w, as in Gemma.
        rounds_first: whether x / rms is rounded to the hidden state's dtype before it is multiplied by w (Llama), or
            the product alone is rounded (Gemma, OLMo 2, torch.nn.RMSNorm).
    """

    weight: Tensor | None
    eps: float
    plus_one: bool = False
    rounds_first: bool = True


def factor(norm: Norm, dtype: torch.dtype) -> Tensor | None:
    """Return the factor that the norm multiplies by, (d,) in `dtype`, or None if there is none."""
    if norm.weight is None:
        return None
    weight = norm.weight.to(dtype)
    return weight + 1 if norm.plus_one else weight


def inverse_rms(x: Tensor, norm: Norm) -> Tensor:
    """Return 1 / rms (N,)."""
    rows = x.to(accumulation_dtype(x.dtype)).reshape(-1, x.shape[-1])
    return torch.rsqrt(rows.square().mean(1) + norm.eps)


def definition(x: Tensor, norm: Norm) -> Tensor:
    """Return the normalised x by operations that PyTorch differentiates in every mode and order."""
    acc = accumulation_dtype(x.dtype)
    wide = x.to(acc)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    weight = factor(norm, acc)
    if weight is not None:
        normed = (normed.to(x.dtype).to(acc) if norm.rounds_first else normed) * weight
    return normed.to(x.dtype)


def forward(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Return the normalised x, in its dtype, contiguous, and 1 / rms (N,)."""
    acc = accumulation_dtype(x.dtype)
    rows = x.to(acc).reshape(-1, x.shape[-1])
    inverse = inverse_rms(x, norm)
    normed = rows * inverse.unsqueeze(1)
    weight = factor(norm, acc)
    if weight is not None:
        if norm.rounds_first:
            normed = normed.to(x.dtype).to(acc)
        normed = normed.mul_(weight)
    return normed.to(x.dtype).view(x.shape), inverse


def backward(
    grad: Tensor | None, grad_normed: Tensor, x: Tensor, inverse: Tensor, norm: Norm, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of x and of the weight, those that `needs` selects.

    Its own derivative takes 1 / rms as it is given, so for a second derivative `inverse` is computed from x.

    Args:
        grad: a gradient of x from elsewhere, which is added, or None.
        grad_normed: the gradient of the normalised x.
        x, inverse: saved by the forward.
    """
    acc = accumulation_dtype(x.dtype)
    hidden = x.shape[-1]
    rows, above = x.to(acc).reshape(-1, hidden), grad_normed.to(acc).reshape(-1, hidden)
    unit = rows * inverse.unsqueeze(1)
    d_weight = (above * unit).sum(0).to(norm.weight.dtype) if needs[1] and norm.weight is not None else None
    if not needs[0]:
        return None, d_weight
    weight = factor(norm, acc)
    scaled = above if weight is None else above * weight
    dx = scaled - unit * (scaled * unit).mean(1, keepdim=True)
    dx *= inverse.unsqueeze(1)
    if grad is not None:
        dx += grad.to(acc).reshape(-1, hidden)
    return dx.to(x.dtype).view(x.shape), d_weight
