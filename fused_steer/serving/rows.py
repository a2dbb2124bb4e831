"""Steer one layer while each row of a batch has its own adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling

from ..kernels.grouped import Routing
from .slots import Slots


class Place(Protocol):
    """The position of a forward pass in a batch, as `Batch` gives it to its layers.

    Attributes:
        ids: (rows, tokens) int32, each token's slot, or None if the position is unknown.
        gain: (rows, tokens) float32, each token's strength, or None.
    """

    ids: Tensor | None
    gain: Tensor | None

    def check_place(self) -> None:
        """Raise RuntimeError if the position of the pass is unknown."""

    def routing(self, device: torch.device) -> Routing:
        """Return the pass's tokens, sorted by slot, on a layer's device."""


class Rows(nn.Module):
    """Steers one layer while each row of the running batch has its own adapter. For inference only."""

    def __init__(self, batch: Place, slots: Slots | None) -> None:
        """Args:
        batch: the running batch.
        slots: the batch's adapters at this layer, or None if no adapter of the batch steers it.
        """
        super().__init__()
        self.batch = batch
        self.slots = slots

    def forward(self, residual: Tensor, branch: Tensor | None) -> Tensor:
        """Return residual + branch, (rows, tokens, d), each row steered by its own adapter.

        Raises:
            RuntimeError: a gradient is required, or a compiled model runs outside of `generate`.
        """
        batch: Any = self.batch
        batch.check_place()
        slots: Any = self._modules["slots"]
        if slots is None:
            return residual if branch is None else residual + branch
        if is_grad_enabled() and (residual.requires_grad or branch is not None and branch.requires_grad):
            raise RuntimeError("steering.batch is for inference; expected torch.no_grad() around the model")
        if is_compiling():
            return slots(residual, branch, batch.ids.to(residual.device), batch.gain.to(residual.device))
        return slots.routed(residual, branch, batch.routing(residual.device))

    def plan(self, device: torch.device) -> tuple[Slots, Callable[[], tuple[Tensor, ...]]] | None:
        """Return the slots with their launch plans, and a function that returns a plan's arguments.

        The arguments are those after residual and branch.

        Returns None if no adapter of the batch steers this layer.
        """
        batch, slots = self.batch, self.slots
        if slots is None:
            return None

        ids: Any = ()
        weights: Any = None
        found: tuple[Tensor, ...] = ()

        def operands() -> tuple[Tensor, ...]:
            # All steps with the same ids share these arguments.
            nonlocal ids, weights, found
            if batch.ids is not ids or slots.weights is not weights:
                found = slots.operands(batch.routing(device))
                ids, weights = batch.ids, slots.weights
            return found

        return slots, operands
