"""PEFT's batches with an adapter for each row (`adapter_names`): one op a layer, whatever the number of adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.parameters import Place
from ..config import SteerConfig
from ..kernels.grouped import Routing
from ..model.decoder import check_rows
from ..model.residual import unusual_input
from ..model.site import Site
from .slots import LoadedSlots, adapters_at


def load_again(
    loaded: LoadedSlots | None, sites: Mapping[Place, Site], configs: Mapping[str, SteerConfig]
) -> LoadedSlots:
    """Return the adapters in slots, with their present values.

    Values are copied each time, because not every change of a parameter can be detected.

    Args:
        loaded: the slots of the batch before, reused if they fit.
        sites: the model's sites, by place.
        configs: the configs of the batch's adapters, by name.
    """
    tensors = adapters_at(sites, configs)
    activations = {name: config.activation for name, config in configs.items()}
    if loaded is None or not loaded.fits(tensors, activations):
        return LoadedSlots(tensors, activations)
    loaded.fill(tensors)
    return loaded


class _RefusesGradient(torch.autograd.Function):
    """Raises an error in backward, on the hidden state of a batch with an adapter for each row."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, trained: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError("adapter_names is for inference; expected torch.no_grad(), or set_adapter to train")


class MixedRows:
    """A running PEFT batch with an adapter for each row. One op a layer steers all rows."""

    def __init__(
        self,
        rows: Sequence[str],
        configs: Mapping[str, SteerConfig],
        loaded: LoadedSlots,
        sites: Mapping[Place, Site],
        decoder: nn.Module,
    ) -> None:
        """Args:
        rows: each row's adapter. A name that is not in `configs` means no adapter.
        configs: the configs of the batch's adapters, by name.
        loaded: these adapters in slots.
        sites: the model's sites, by place.
        decoder: the module that runs the layers.

        Raises:
            ValueError: the layers' hidden states are not (rows, ..., d).
        """
        if not (unusual_input(type(decoder)) or "(rows").startswith("(rows"):
            check_rows(decoder, "adapter_names is given", "set_adapter")
        slots = [loaded.numbers.get(name, -1) for name in rows]
        strengths = [configs[name].scale if name in configs else 0.0 for name in rows]
        self._ids = torch.tensor(slots, dtype=torch.int32)
        self._gain = torch.tensor(strengths, dtype=torch.float32)
        self._slots = loaded.slots
        adapters = (adapter for site in sites.values() for name in configs if (adapter := site.adapter(name)))
        parameters = (p for adapter in adapters for factor in (adapter.down, adapter.up) for p in factor.parameters())
        self._trained = next((p for p in parameters if p.requires_grad), None)
        self._routings: dict[Any, Routing] = {}

    def steer(self, place: Place, residual: Tensor, branch: Tensor | None) -> Tensor:
        """Return residual + branch of a place, (rows, ..., d), each row steered by its adapter."""
        slots, routing = self._slots.get(place), self._routing(residual)
        if slots is None:
            return residual if branch is None else residual + branch
        out = slots.routed(residual, branch, routing)
        if torch.is_grad_enabled():
            for tensor in (residual, branch, self._trained):
                if tensor is not None and tensor.requires_grad:
                    return _RefusesGradient.apply(out, tensor)
        return out

    def in_graph(self, place: Place, residual: Tensor, branch: Tensor | None) -> Tensor:
        """Do the same as `steer`, in a form that torch.compile can trace."""
        slots, (ids, gain) = self._slots.get(place), self._of_tokens(residual)
        if slots is None:
            return residual if branch is None else residual + branch
        return slots(residual, branch, ids, gain)

    def _routing(self, hidden: Tensor) -> Routing:
        """Return the tokens' routing. It is shared by all layers, and by all passes with equally many tokens."""
        key = (hidden.device, hidden.shape[:-1])
        if key not in self._routings:
            self._routings[key] = Routing(*self._of_tokens(hidden))
        return self._routings[key]

    def _of_tokens(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return each token's slot and strength."""
        count, places = len(self._ids), hidden.shape[:-1]
        if places[0] != count:
            raise ValueError(f"adapter_names has {count} names; expected {places[0]}, one for each row of the batch")
        ids, gain = (t.to(hidden.device).view(-1, *[1] * (len(places) - 1)) for t in (self._ids, self._gain))
        return ids.expand(places).contiguous(), gain.expand(places).contiguous()
