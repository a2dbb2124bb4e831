"""The shift of an adapter as an affine function of the hidden state, and linear layers that contain it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.site import SteeringSite


def in_float64(tensor: Tensor) -> Tensor:
    """Return the tensor in float64, on the CPU where the tensor's device has no such numbers."""
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)


@dataclass(frozen=True)
class Affine:
    """The shift of an adapter at one site: h -> A h + c, A = up down.

    Attributes:
        down: W1 (r, d) float64, or None without A.
        up: s W2 (d, r) float64.
        constant: c (d,) float64.
    """

    down: Tensor | None
    up: Tensor | None
    constant: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, site: SteeringSite) -> Affine:
        """Read the active adapter of a site."""
        assert site.active is not None
        down, up, down_bias, up_bias = (
            None if t is None else in_float64(t.detach()) * factor
            for t, factor in zip(site._weights(site.active), (1.0, site.scale, 1.0, site.scale), strict=True)
        )
        held = up if up is not None else up_bias
        assert held is not None
        constant = torch.zeros(held.shape[0], dtype=torch.float64, device=held.device)
        if up is not None and down_bias is not None:
            constant = constant + up @ down_bias
        return cls(down, up, constant if up_bias is None else constant + up_bias)

    @property
    def is_zero(self) -> bool:
        moves = self.up is not None and self.down is not None and bool(self.up.any()) and bool(self.down.any())
        return not moves and not self.constant.any()

    def times(self, factor: float) -> Affine:
        return Affine(self.down, None if self.up is None else self.up * factor, self.constant * factor)

    def of_states(self, h: Tensor) -> Tensor:
        """Return A h + c. (..., d)"""
        linear = 0.0 if self.up is None or self.down is None else (h @ self.down.T) @ self.up.T
        return linear + self.constant

    def of_output(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return W and b of a linear layer whose output is shifted. (d, m), (d,)"""
        if self.up is None or self.down is None:
            return weight, bias + self.constant
        return weight + self.up @ (self.down @ weight), bias + self.of_states(bias)

    def of_input(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return W and b of a linear layer whose input is shifted. (m, d), (m,)"""
        moved = weight if self.up is None or self.down is None else weight + (weight @ self.up) @ self.down
        return moved, bias + weight @ self.constant
