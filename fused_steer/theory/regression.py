"""Reduced-rank ridge regression in closed form, from sums over tokens: the best linear adapter for given shifts.

Given tokens x and the shifts d that they should get, find W1 (r, d), W2 (d, r) and b2 that minimise

    mean ‖d − W2 W1 x − b2‖² + λ (tr(Cxx) / d) ‖W2 W1‖²,      Cxx the covariance of x.

With A = Cxx + λ tr(Cxx) / d · I, and V the r leading eigenvectors of Cdx A⁻¹ Cxd: W2 = V, W1 = Vᵀ Cdx A⁻¹ and
b2 = mean(d) − W2 W1 mean(x) (Izenman 1975, with the ridge as further rows of x). Without a bias the moments are taken
about 0 in place of the means.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.torch_backend import ACTIVATIONS


@dataclass(frozen=True)
class Shift:
    """What an adapter computes, x -> W2 φ(W1 x + b1) + b2, in float64: down (r, d), up (d, r), biases or None."""

    down: Tensor
    up: Tensor
    bias: Tensor | None
    down_bias: Tensor | None = None
    activation: str = "identity"

    def __call__(self, x: Tensor) -> Tensor:
        """x: (N, d)"""
        shift = torch.zeros_like(x)
        if self.down.numel():
            read = x @ self.down.T if self.down_bias is None else x @ self.down.T + self.down_bias
            shift = ACTIVATIONS[self.activation][0](read) @ self.up.T
        return shift if self.bias is None else shift + self.bias


class Moments:
    """Means and centred second moments of tokens x and their shifts d, in float64, a batch after the other."""

    def __init__(self) -> None:
        self.tokens = 0
        self.mean_x = self.mean_d = self.xx = self.xd = self.dd = torch.zeros(())

    def add(self, x: Tensor, d: Tensor) -> None:
        """x, d: (N, d) of any dtype.

        Centred by each batch's means, and merged (Chan, Golub, LeVeque 1979): raw sums would cancel where means are
        large.
        """
        count = len(x)
        if not count:
            return
        x, d = x.double(), d.double()
        mean_x, mean_d = x.mean(0), d.mean(0)
        x, d = x - mean_x, d - mean_d
        xx, xd, dd = x.T @ x, x.T @ d, d.T @ d
        if self.tokens:
            step_x, step_d = mean_x - self.mean_x, mean_d - self.mean_d
            weight = self.tokens * count / (self.tokens + count)
            self.xx += xx + weight * torch.outer(step_x, step_x)
            self.xd += xd + weight * torch.outer(step_x, step_d)
            self.dd += dd + weight * torch.outer(step_d, step_d)
            share = count / (self.tokens + count)
            self.mean_x = self.mean_x + share * step_x
            self.mean_d = self.mean_d + share * step_d
        else:
            self.mean_x, self.mean_d, self.xx, self.xd, self.dd = mean_x, mean_d, xx, xd, dd
        self.tokens += count

    def out_of_reach(self, rank: int, bias: bool) -> float:
        """The least Σ‖d − f(x)‖² of any f whose values lie in `rank` directions, with a bias added to them or not.

        It is what the leading directions of d leave: f may then be any function of a token, as of an oracle.
        """
        dd = self.dd if bias else self.dd + self.tokens * torch.outer(self.mean_d, self.mean_d)
        return float(torch.linalg.eigvalsh(dd)[: len(dd) - rank].clamp_min(0).sum())


def best_affine(moments: Moments, rank: int, ridge: float, bias: bool) -> Shift:
    """The affine map of this rank that is best for the moments, and no other fits better. Of rank 0 it is mean(d).

    Args:
        ridge: λ, a share of the mean variance of x.

    Raises:
        ValueError: the rank is beyond d, there are too few tokens for it, or x spans too little without a ridge.
    """
    hidden = len(moments.mean_x)
    least = 0 if bias else 1
    if not least <= rank <= hidden:
        raise ValueError(f"rank is {rank}; expected {least} to {hidden}, the hidden size")
    check_tokens(moments.tokens, rank)
    if not rank:
        return Shift(moments.xx[:0], moments.xx[:, :0], moments.mean_d)
    xx, xd = moments.xx, moments.xd
    if not bias:
        xx = xx + moments.tokens * torch.outer(moments.mean_x, moments.mean_x)
        xd = xd + moments.tokens * torch.outer(moments.mean_x, moments.mean_d)
    a = xx + ridge * xx.trace() / hidden * torch.eye(hidden, dtype=xx.dtype, device=xx.device)
    lower, failed = torch.linalg.cholesky_ex(a)
    if failed:
        raise ValueError(
            f"the {moments.tokens} tokens span less than the {hidden} dimensions of the hidden states, and ridge is "
            f"{ridge:g}; expected a larger ridge or more tokens"
        )
    half = torch.linalg.solve_triangular(lower, xd, upper=False)  # A⁻¹ᐟ² Cxd
    up = torch.linalg.eigh(half.T @ half).eigenvectors[:, -rank:].flip(1).contiguous()
    down = torch.linalg.solve_triangular(lower.T, half @ up, upper=True).T.contiguous()
    return Shift(down, up, moments.mean_d - up @ (down @ moments.mean_x) if bias else None)


def check_tokens(tokens: int, rank: int) -> None:
    """Refuse fewer tokens than a map of this rank and its bias pass through anyhow.

    Raises:
        ValueError: there are at most rank + 1.
    """
    if tokens <= rank + 1:
        raise ValueError(f"the prompts have {tokens} tokens to fit on; expected more than {rank + 1} for rank {rank}")
