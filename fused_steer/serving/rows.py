"""Steer one place while each row of a batch has its own adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling

from ..adapters.parameters import Place
from ..kernels.grouped import Routing
from ..model.site import SteeringSite
from .slots import Slots


class Pass(Protocol):
    """Where a pass is in a batch: what `Batch` tells its layers.

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
    """Steers one place while each row of the running batch has its own adapter. For inference only."""

    def __init__(self, batch: Pass, slots: Slots | None, reads: str) -> None:
        """Args:
        batch: the running batch.
        slots: the batch's adapters at this place, or None if no adapter of the batch steers it.
        reads: what steers there, "sum" or "branch".
        """
        super().__init__()
        self.batch = batch
        self.slots = slots
        self.reads = reads

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
            ids, gain = batch.ids.to(residual.device), batch.gain.to(residual.device)
            return slots(residual, branch, ids, gain, self.reads)
        return slots.routed(residual, branch, batch.routing(residual.device), self.reads)

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


def steer_by_rows(sites: Mapping[Place, SteeringSite], batch: Pass, slots: Mapping[Place, Slots]) -> None:
    """Let sites steer by the rows of a running batch. It is called again for sites that are added while it runs."""
    for place, site in sites.items():
        if site.rows is None:
            site.rows = Rows(batch, slots.get(place), site.reads)
