"""Keeps track of a model's adapters that are constrained to be orthogonal to its LoRA."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from ..adapters.parameters import ByPlace, Place
from ..config import SteerConfig
from ..model.decoder import Decoder, execution_device
from ..model.site import SteeringSite
from ..model.weak import Weakly, WeakMethod
from .layers import lora_layers
from .orthogonality import Orthogonality, check_carries_lora, check_lora
from .writers import Writer, trace_writers


class Constraints:
    """The orthogonality constraints of a model's adapters, by adapter name."""

    _model = Weakly[nn.Module](lambda self: self._decoder.module)

    def __init__(self, model: nn.Module, decoder: Decoder) -> None:
        """Args:
        model: the model, with or without a LoRA.
        decoder: its decoder.
        """
        self._model, self._decoder = model, decoder
        self._kept: dict[str, Orthogonality] = {}
        self._used: str | None = None  # the adapter that the bases in the sites are of
        self.tracing = False  # whether `trace_writers` is running a forward pass

    def check(self, config: SteerConfig) -> None:
        """Check that the model's LoRA allows the config's constraint. A config without a constraint passes.

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
        """Keep an adapter orthogonal if its config says so. `sites` are the adapter's sites, by place."""
        if config.orthogonal_to is not None:
            methods = (WeakMethod(self, method) for method in ("_carries_lora", "_trace"))
            self._kept[name] = Orthogonality(name, config, sites, *methods)

    def use(self, name: str | None) -> None:
        """Release the bases of the adapter in use before. If that is `name`, they stay: adapters share their sites."""
        if name != self._used:
            self._used = name
            for orthogonality in self._kept.values():
                orthogonality.release()

    def remove(self, name: str) -> None:
        if name in self._kept:
            self._kept[name].close()
            del self._kept[name]

    def close(self) -> None:
        for name in list(self._kept):
            self.remove(name)

    def remember(self) -> Callable[[], None]:
        """Return a function that restores the present set of constrained adapters, and the one in use."""
        kept, used = dict(self._kept), self._used

        def give_back() -> None:
            for name in self._kept.keys() - kept.keys():
                self._kept[name].close()
            self._kept, self._used = kept, used

        return give_back

    def values(self, name: str) -> ByPlace:
        """Return values that satisfy the constraint, to replace an adapter's parameters. Empty without a constraint."""
        return self._kept[name].constrained() if name in self._kept and self._carries_lora() else {}

    def before_training(self, name: str, training: bool) -> None:
        """Enforce the constraint before a forward pass with gradients. `training` is the decoder's training mode."""
        orthogonality = self._kept.get(name)
        # A prompt run without no_grad looks like training, and may run without the LoRA of the adapter's training.
        if orthogonality is not None and orthogonality.trains and (training or self._carries_lora()):
            orthogonality.before_forward()

    def _carries_lora(self) -> bool:
        return bool(lora_layers(self._model))

    def _trace(self, indices: Sequence[int]) -> dict[int, list[Writer]]:
        """Return all modules that write into the residual stream in these layers."""
        self.tracing = True
        try:
            layers = {index: self._decoder.layers[index] for index in indices}
            return trace_writers(self._decoder.model, layers, self._decoder.hidden)
        finally:
            self.tracing = False
