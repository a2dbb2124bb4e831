"""What steers one place while each row of a batch has its own adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling

from ..kernels.grouped import Routing
from .slots import Slots


class Pass(Protocol):
    """Where a pass is in a batch: what `Batch` tells its layers.

    ids: (rows, tokens) int32, each token's slot; gain: (rows, tokens) float32. None: nothing said where it is.
    """

    ids: Tensor | None
    gain: Tensor | None

    def check_place(self) -> None:
        """Raises RuntimeError where nothing said where the pass is."""

    def routing(self, device: torch.device) -> Routing:
        """The tokens of the pass, sorted by slot, on a layer's device."""


class Rows(nn.Module):
    """Steers one place by rows while a batch runs. For inference."""

    def __init__(self, batch: Pass, slots: Slots | None, reads: str) -> None:
        """
        Args:
            reads: what steers there, "sum" or "branch".
            slots: that hold the batch's adapters of this place; None: no adapter of the batch steers it.
        """
        super().__init__()
        self.batch = batch
        self.slots = slots
        self.reads = reads

    def forward(self, residual: Tensor, branch: Tensor | None) -> Tensor:
        """residual + branch, each row steered by its own adapter. (rows, tokens, d)

        Raises:
            RuntimeError: a gradient is asked for, or a compiled model runs outside of `generate`.
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
        """The slots with their launch plans, and a function that returns what a plan takes behind residual and branch.

        None: no adapter of the batch steers this layer.
        """
        batch, slots = self.batch, self.slots
        if slots is None:
            return None

        ids: Any = ()
        weights: Any = None
        found: tuple[Tensor, ...] = ()

        def operands() -> tuple[Tensor, ...]:
            # The same in all steps that have the same ids.
            nonlocal ids, weights, found
            if batch.ids is not ids or slots.weights is not weights:
                found = slots.operands(batch.routing(device))
                ids, weights = batch.ids, slots.weights
            return found

        return slots, operands
