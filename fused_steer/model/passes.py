"""Packed weights and LoReFT's rotations for one forward pass of a decoder in one thread.

A pack is made before the pass and dropped after it, also after an exception. Each thread has its own. A layer uses it
only if its weights are still at the packed addresses, on the same stream. Weights that were moved, replaced or gathered
since are read directly. Passes over a few tokens have no pack: see `kernels.packing`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import select_backend
from ..kernels.contract import Packed
from ..kernels.packing import address_table, pack_weights
from ..kernels.rotation import rotate_all
from .watch import thread


class Pack:
    """The packed weights of one pass, by site."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype  # the hidden state's dtype, None if nothing is packed
        self._layers: dict[int, tuple[int, int, Packed]] = {}
        self._rotated: dict[int, tuple[tuple[Tensor, Tensor], tuple[int, int], tuple[Tensor, Tensor]]] = {}
        self._graded = torch.is_grad_enabled()
        self._streams: dict[torch.device, Any] = {}

    def add(self, device: torch.device, sites: list[int], table: Tensor, weights: list[tuple[Tensor, Tensor]]) -> None:
        assert self.dtype is not None
        packed = pack_weights(table, *weights[0], self.dtype)
        self._streams[device] = _stream(device)
        for site, (down, up), one in zip(sites, weights, packed, strict=True):
            self._layers[site] = (down.data_ptr(), up.data_ptr(), one)

    def rotate(self, weights: Mapping[nn.Module, tuple[Tensor, Tensor]]) -> None:
        """Turn W and P of sites with LoReFT into W1 and W2."""
        kinds: dict[Any, list[tuple[int, tuple[Tensor, Tensor]]]] = {}
        for site, pair in weights.items():
            if _has_its_values(*pair):
                kinds.setdefault(tuple((t.shape, t.dtype, t.device) for t in pair), []).append((id(site), pair))
        for sites in kinds.values():
            found = rotate_all([pair for _, pair in sites])
            self._streams[found[0][0].device] = _stream(found[0][0].device)
            for (number, pair), made in zip(sites, found, strict=True):
                self._rotated[number] = (pair, (pair[0].data_ptr(), pair[1].data_ptr()), made)

    def rotation_of(self, site: nn.Module, source: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return W1 and W2 of a site with LoReFT if they were made of this W and P, else None."""
        found = self._rotated.get(id(site))
        if found is None or (torch.is_grad_enabled() and not self._graded):
            return None
        pair, addresses, made = found
        if source is not pair[0] or matrix is not pair[1]:  # a gradient belongs to the tensor itself
            return None
        if (source.data_ptr(), matrix.data_ptr()) != addresses or source.device != made[0].device:
            return None
        return made if self._streams[source.device] == _stream(source.device) else None

    def of(self, site: nn.Module, residual: Tensor, down: Tensor, up: Tensor) -> Packed | None:
        """Return the packed weights of a site if they match these weights and this hidden state, else None."""
        found = self._layers.get(id(site))
        if found is None or residual.dtype != self.dtype:
            return None
        at_down, at_up, packed = found
        if down.data_ptr() != at_down or up.data_ptr() != at_up or down.device != packed.down.device:
            return None
        return packed if self._streams[down.device] == _stream(down.device) else None


def _stream(device: torch.device) -> Any:
    return torch.accelerator.current_stream(device) if device.type != "cpu" else None


class Packing:
    """Makes the packs of a model's passes, and keeps the address tables for them."""

    def __init__(self) -> None:
        self._tables: dict[torch.device, tuple[list[int], Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_tables": {}}  # addresses are valid in this process only

    def begin(
        self,
        dtype: torch.dtype | None,
        weights: Mapping[nn.Module, tuple[Tensor, Tensor]],
        rotations: Mapping[nn.Module, tuple[Tensor, Tensor]] = MappingProxyType({}),
    ) -> None:
        """Begin a pass in this thread. `end` has to be called after it in any case.

        Args:
            dtype: the hidden state's dtype. If it is None (unknown), nothing is packed.
            weights: W1 and W2 of each site with an active low-rank adapter, if packing them pays.
            rotations: W and P of each site with an active LoReFT.
        """
        pack = None
        if dtype is not None and weights:
            with torch.no_grad():
                pack = self._make(dtype, weights)
        if rotations:
            pack = pack or Pack(None)
            pack.rotate(rotations)
        self.end()  # ends a pass that Ctrl-C interrupted, as PyTorch calls no hook for it
        thread.begun[self] = len(thread.packs)
        thread.packs.append(pack)
        thread.settle()

    def end(self) -> None:
        """End this model's pass in this thread, if `begin` was reached."""
        before = thread.begun.pop(self, None)
        if before is not None:
            del thread.packs[before:]
        thread.settle()

    def _make(self, dtype: torch.dtype, weights: Mapping[nn.Module, tuple[Tensor, Tensor]]) -> Pack | None:
        by_device: dict[torch.device, list[tuple[int, Tensor, Tensor]]] = {}
        first = next(iter(weights.values()))
        kind = [(t.shape, t.dtype) for t in first]
        for site, (down, up) in weights.items():
            if _has_its_values(down, up) and [(t.shape, t.dtype) for t in (down, up)] == kind:
                by_device.setdefault(down.device, []).append((id(site), down, up))
        pack = Pack(dtype)
        for device, layers in by_device.items():
            if select_backend(device) != "triton":
                continue
            pairs = [(down, up) for _, down, up in layers]
            addresses = [t.data_ptr() for pair in pairs for t in pair]
            kept = self._tables.get(device)
            if kept is None or kept[0] != addresses:
                if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                    continue  # a captured graph cannot upload a table, so the layers read their parameters
                kept = self._tables[device] = (addresses, address_table(pairs))
            pack.add(device, [site for site, _, _ in layers], kept[1], pairs)
        return pack if pack._layers else None


def _has_its_values(down: Tensor, up: Tensor) -> bool:
    """Return whether W1 and W2 are whole in memory now, neither sharded nor gathered only for their layer's call."""
    if down.dim() != 2 or up.shape != down.shape[::-1] or down.device != up.device:
        return False
    return all(
        type(t) in (Tensor, nn.Parameter)
        and t.is_contiguous()
        and t.numel() > 0
        and t.device.type != "meta"
        and t.untyped_storage().nbytes() >= (t.storage_offset() + t.numel()) * t.itemsize
        for t in (down, up)
    )


def tokens_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Return the number of tokens in a decoder's input, or 0 if it is unknown."""
    embeddings = kwargs.get("inputs_embeds")
    if isinstance(embeddings, Tensor):
        return embeddings.shape[:-1].numel()
    ids = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(ids, Tensor):
        return 0
    return ids.shape[:-1].numel() if ids.is_floating_point() else ids.numel()
