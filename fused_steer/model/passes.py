"""LoReFT's rotations for one forward pass of a decoder in one thread, made for all layers at once.

They are made before the pass and dropped after it, also after an exception. Each thread has its own. A site uses its
W1 and W2 only if they were made of the W and P that it now has, at the same addresses, on the same stream. Otherwise it
makes its own: its parameters were moved, replaced or gathered since.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.rotation import rotate_all
from .watch import thread


class Rotations:
    """W1 and W2 of the sites with LoReFT, made for one pass."""

    def __init__(self, weights: Mapping[nn.Module, tuple[Tensor, Tensor]]) -> None:
        """
        Args:
            weights: W and P of each site.
        """
        self._made: dict[int, tuple[tuple[Tensor, Tensor], tuple[int, int], tuple[Tensor, Tensor]]] = {}
        self._graded = torch.is_grad_enabled()
        self._streams: dict[torch.device, Any] = {}
        kinds: dict[Any, list[tuple[int, tuple[Tensor, Tensor]]]] = {}
        for site, pair in weights.items():
            if _has_its_values(*pair):
                kinds.setdefault(tuple((t.shape, t.dtype, t.device) for t in pair), []).append((id(site), pair))
        for sites in kinds.values():
            found = rotate_all([pair for _, pair in sites])
            self._streams[found[0][0].device] = _stream(found[0][0].device)
            for (number, pair), made in zip(sites, found, strict=True):
                self._made[number] = (pair, (pair[0].data_ptr(), pair[1].data_ptr()), made)

    def of(self, site: nn.Module, source: Tensor | None, matrix: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Return W1 and W2 of a site if they were made of this W and P, else None."""
        found = self._made.get(id(site))
        if found is None or (torch.is_grad_enabled() and not self._graded):
            return None
        pair, addresses, made = found
        if source is not pair[0] or matrix is not pair[1]:  # a gradient belongs to the tensor itself
            return None
        source, matrix = pair
        if (source.data_ptr(), matrix.data_ptr()) != addresses or source.device != made[0].device:
            return None
        return made if self._streams[source.device] == _stream(source.device) else None


def _stream(device: torch.device) -> Any:
    return torch.accelerator.current_stream(device) if device.type != "cpu" else None


class Passes:
    """Begins and ends the passes of one model, in each thread."""

    def begin(self, weights: Mapping[nn.Module, tuple[Tensor, Tensor]]) -> None:
        """Begin a pass in this thread. `end` has to be called after it in any case.

        Args:
            weights: W and P of each site with an active LoReFT.
        """
        rotations = Rotations(weights) if weights else None
        if rotations is None and not thread.rotations:
            return  # as nearly always: no pass of this thread has any
        self.end()  # ends a pass that Ctrl-C interrupted, as PyTorch calls no hook for it
        if not thread.begun:
            thread.rotations.clear()  # of an interrupted pass of a model that was deleted
        thread.begun[self] = len(thread.rotations)
        thread.rotations.append(rotations)

    def end(self) -> None:
        """End this model's pass in this thread, if `begin` was reached."""
        before = thread.begun.pop(self, None) if thread.rotations else None
        if before is not None:
            del thread.rotations[before:]


def _has_its_values(source: Tensor, matrix: Tensor) -> bool:
    """Return whether W and P are whole in memory now, neither sharded nor gathered only for their layer's call."""
    if source.dim() != 2 or matrix.shape != source.shape[::-1] or source.device != matrix.device:
        return False
    return all(
        type(t) in (Tensor, nn.Parameter)
        and t.is_contiguous()
        and t.numel() > 0
        and t.device.type != "meta"
        and t.untyped_storage().nbytes() >= (t.storage_offset() + t.numel()) * t.itemsize
        for t in (source, matrix)
    )
