"""The adapters of a model that are kept orthogonal to its LoRA: those that ask for it, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from ..adapters.parameters import ByPlace, Place
from ..config import SteerConfig
from ..model.decoder import Decoder, execution_device
from ..model.site import SteeringSite
from .layers import lora_layers
from .orthogonality import Orthogonality, check_carries_lora, check_lora
from .writers import Writer, trace_writers


class Constraints:
    """Which adapters are constrained, and what that takes as they come, are used, train, and go."""

    def __init__(self, model: nn.Module, decoder: Decoder) -> None:
        """
        Args:
            model: that may carry a LoRA.
            decoder: of the model.
        """
        self._model, self._decoder = model, decoder
        self._kept: dict[str, Orthogonality] = {}
        self.tracing = False  # whether a pass runs that only shows which modules write into the stream

    def check(self, config: SteerConfig) -> None:
        """Refuse a config that the model's LoRA does not allow; one that asks for no constraint is fine.

        Raises:
            ValueError: see `check_carries_lora` and `check_lora`.
        """
        if config.orthogonal_to is None:
            return
        layers = {index: self._decoder.layers[index] for index in self._decoder.layout.indices(config)}
        check_carries_lora(self._model, layers)
        devices = {index: execution_device(layer) for index, layer in layers.items()}
        check_lora(config, self._trace(list(layers)), devices)

    def add(self, name: str, config: SteerConfig, sites: Mapping[Place, SteeringSite]) -> None:
        """Keep an adapter orthogonal if its config asks for that. `sites`: those that it is attached to, by place."""
        if config.orthogonal_to is not None:
            self._kept[name] = Orthogonality(name, config, self._model, sites, self._trace)

    def use(self, name: str | None) -> None:
        """Release what is kept for adapters that are not in use."""
        for other, orthogonality in self._kept.items():
            if other != name:
                orthogonality.release()

    def remove(self, name: str) -> None:
        if name in self._kept:
            self._kept[name].close()
            del self._kept[name]

    def close(self) -> None:
        for name in list(self._kept):
            self.remove(name)

    def remember(self) -> Callable[[], None]:
        """A function that brings back the constrained adapters as they are now, and no other."""
        kept = dict(self._kept)

        def give_back() -> None:
            for name in self._kept.keys() - kept.keys():
                self._kept[name].close()
            self._kept = kept

        return give_back

    def values(self, name: str) -> ByPlace:
        """Values that satisfy the constraint, to be written in place of an adapter's parameters; none without one."""
        return self._kept[name].constrained() if name in self._kept and lora_layers(self._model) else {}

    def before_training(self, name: str, training: bool) -> None:
        """Before a forward pass with gradients. `training`: whether the decoder is in training mode."""
        orthogonality = self._kept.get(name)
        # Without no_grad a prompt looks like training; an adapter may answer it without the LoRA it was trained beside.
        if orthogonality is not None and orthogonality.trains and (training or lora_layers(self._model)):
            orthogonality.before_forward()

    def _trace(self, indices: Sequence[int]) -> dict[int, list[Writer]]:
        """All modules that write into the stream of these layers."""
        self.tracing = True
        try:
            layers = {index: self._decoder.layers[index] for index in indices}
            return trace_writers(self._decoder.module, layers, self._decoder.hidden)
        finally:
            self.tracing = False
