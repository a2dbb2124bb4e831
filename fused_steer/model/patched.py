"""A patched model: its decoder layers with their sites, its frozen base, and the way back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator

from torch import nn

from .decoder import find_decoder
from .decoder_hooks import DecoderHooks
from .layer import PatchedLayer, SteeringSite, patch_layers, unpatch_layers
from .watch import LayerReport, Report


class PatchedModel:
    """The steered layers of one model, and what is done to the rest of it."""

    def __init__(
        self, model: nn.Module, kept: Collection[nn.Parameter], before_training: Callable[[bool], None]
    ) -> None:
        """Find the decoder; the model is not touched.

        Args:
            model: with decoder layers.
            kept: parameters that are not frozen.
            before_training: see `DecoderHooks`.

        Raises:
            TypeError, ValueError: see `find_decoder`.
        """
        self.decoder = find_decoder(model)
        self.layers: dict[int, PatchedLayer] = {}  # in order
        self.disabled = 0  # how many `disable` are open
        self._hooks = DecoderHooks(self.decoder, self.layers, before_training)
        others = {id(parameter) for parameter in kept}
        # By place: offloading puts another object there.
        self._requires_grad = [
            (module, name, p.requires_grad)
            for module in model.modules()
            for name, p in module.named_parameters(recurse=False)
            if id(p) not in others
        ]

    @property
    def sites(self) -> dict[int, SteeringSite]:
        """By layer."""
        return {index: patched.site for index, patched in self.layers.items()}

    def patch(self, indices: Iterable[int]) -> None:
        """Give those of these layers a site that have none; all of them or none."""
        layers = {index: self.decoder.layers[index] for index in indices if index not in self.layers}
        self.layers |= patch_layers(layers, self.decoder.layout)
        for index in sorted(self.layers):
            self.layers[index] = self.layers.pop(index)
        self._enable()

    def freeze(self) -> None:
        """Freeze the base, and watch the decoder's passes."""
        for module, name, _ in self._requires_grad:
            module.get_parameter(name).requires_grad_(False)
        self._hooks.attach()

    def undo(self) -> None:
        """Take all sites out, and let train what trained before.

        Raises:
            RuntimeError: another library has since changed a layer's class; nothing is undone then.
        """
        unpatch_layers(self.layers.values())
        self.layers.clear()
        for module, name, required in self._requires_grad:
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(required)
        self._hooks.remove()

    @contextlib.contextmanager
    def disable(self) -> Iterator[None]:
        """Inside, no site steers."""
        self.disabled += 1
        self._enable()
        try:
            yield
        finally:
            self.disabled -= 1
            self._enable()

    def _enable(self) -> None:
        for patched in self.layers.values():
            patched.site.enabled = self.disabled == 0

    def report(self) -> Report:
        """How each layer is steered."""
        return Report(
            LayerReport(index, p.path, p.base.__name__, p.kind, p.site.backend, p.site.calls, p.reason)
            for index, p in self.layers.items()
        )

    def reset_calls(self) -> None:
        """Set the report's counts to 0."""
        for patched in self.layers.values():
            patched.site.calls, patched.site.backend = 0, None
