"""A patched model: its decoder layers with their sites, its frozen base, and undoing both."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from ..adapters.parameters import SITE, Place, is_of_site
from ..config import SITES, SteerConfig
from .decoder import Decoder, find_decoder
from .decoder_hooks import DecoderHooks
from .frozen import Frozen
from .layer import PatchedLayer, give_sites, unpatch_layers
from .norms import Norms
from .scopes import Scopes
from .site import SteeringSite
from .watch import LayerReport, Report
from .weak import Weak


class PatchedModel:
    """The steered layers of one model, and its frozen base."""

    def __init__(
        self,
        model: nn.Module,
        kept: Callable[[nn.Module], Collection[nn.Parameter]],
        fuse_norm: bool = False,
    ) -> None:
        """Find the decoder. The model is not changed.

        Args:
            model: a model with decoder layers.
            kept: see `Frozen`.
            fuse_norm: whether to fuse the norms that follow steered layers.

        Raises:
            TypeError, ValueError: see `find_decoder`.
        """
        self.decoder = find_decoder(model)
        self.layers: dict[int, PatchedLayer] = {}  # in the order of the layers
        self._disabling: set[object] = set()  # the open `disable` contexts, which may end in any order
        self.scopes = Scopes()
        self._norms = Norms(self.decoder, self.layers) if fuse_norm else None
        self._hooks: Weak[DecoderHooks] | None = None
        self._frozen = Frozen(model, kept)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_disabling": set()}  # a copy is in no `disable`

    @property
    def disabled(self) -> bool:
        """Whether a `disable` context is open."""
        return bool(self._disabling)

    @property
    def sites(self) -> dict[Place, SteeringSite]:
        """The sites by place, without those that are being removed."""
        return {
            Place(index, name): site for index, patched in self.layers.items() for name, site in patched.sites.items()
        }

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters of the sites, as `sites` has them."""
        return (p for layer in self.layers.values() for site in layer.sites.values() for p in site.parameters())

    def absent(self) -> set[int]:
        """Return the steered layers that are no longer in the model, such as those of other stages of a pipeline."""
        if not self.decoder.alive:
            return set()
        there = set(self.decoder.module.modules())
        return {index for index, patched in self.layers.items() if patched.layer not in there}

    def check(self, places: Iterable[Place]) -> None:
        """Refuse places that the model has not.

        Raises:
            ValueError: see `PatchedLayer.reach`.
        """
        for patched, names in self._lacking(places).items():
            patched.reach(names)

    def patch(self, places: Iterable[Place]) -> None:
        """Add a site to those of these places that have none; all or none."""
        wanted = self._lacking(places)
        self.layers |= {patched.index: patched for patched in wanted}  # before they have sites, which `changing` takes
        give_sites(wanted)
        for index in sorted(self.layers):
            self.layers[index] = self.layers.pop(index)
        self._enable()
        if self._norms is not None:
            self._norms.link()

    def _lacking(self, places: Iterable[Place]) -> dict[PatchedLayer, list[str]]:
        """The sites that are to come, by layer."""
        there, layout, decoder = self.sites, self.decoder.layout, self.decoder
        wanted: dict[int, list[str]] = {}
        for place in places:
            if place not in there:
                wanted.setdefault(place.layer, []).append(place.site)
        return {
            self.layers.get(index)
            or PatchedLayer(decoder.layers[index], index, layout.layer_path(index), type(decoder.module)): names
            for index, names in wanted.items()
        }

    def freeze(self, before_training: Callable[[bool], None]) -> None:
        """Freeze the base, and hook the decoder's passes.

        Args:
            before_training: see `DecoderHooks`.
        """
        self._frozen.freeze()
        graph = self._norms.graph if self._norms else None
        hooks = DecoderHooks(self.decoder, self.layers, self.scopes, before_training, graph)
        self._hooks = Weak(hooks)  # the decoder keeps them
        hooks.attach()

    def undo(self) -> None:
        """Remove all sites, and restore which parameters train. After an exception it can be called again.

        Raises:
            RuntimeError: another library has since changed a layer's class. Nothing is undone.
        """
        for patched in self.layers.values():
            patched.check_removable()
        with self.changing("the model is unpatched"):
            for site in self.sites.values():
                site.enabled = False  # so that a partly unpatched model computes like its base
        if self._norms is not None:
            self._norms.unlink()
        unpatch_layers(self.layers.values())
        self._frozen.thaw()
        hooks = None if self._hooks is None else self._hooks()
        if hooks is not None:
            hooks.remove()
        self.layers.clear()

    @contextlib.contextmanager
    def changing(self, what: str) -> Iterator[None]:
        """Let sites change inside this context. No other thread may run the model. An exception undoes all changes.

        Raises:
            RuntimeError: see `Scopes.change`.
        """
        with self.scopes.change(what):
            earlier = {index: set(patched.sites) for index, patched in self.layers.items()}
            memories = {site: site.remember() for site in self.sites.values()}
            try:
                yield
            except BaseException:
                if self._norms is not None:
                    self._norms.unlink(without=set(memories))
                for index, patched in list(self.layers.items()):
                    patched.take(set(SITES) - earlier.get(index, set()))
                    if index not in earlier:
                        del self.layers[index]
                for give_back in memories.values():
                    give_back()
                raise

    @contextlib.contextmanager
    def disable(self, what: str, undo: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Disable all sites inside this context.

        Args:
            what: the caller's name for error messages.
            undo: called at the end, perhaps twice: see `Scopes.open`.

        Raises:
            RuntimeError: see `Scopes.open`.
        """
        this = object()

        def end() -> None:
            self._disabling.discard(this)
            self._enable()
            undo()

        with self.scopes.open(what, end):
            self._disabling.add(this)
            self._enable()
            yield

    def _enable(self) -> None:
        for site in self.sites_left().values():
            site.enabled = not self.disabled

    def sites_left(self) -> dict[Place, SteeringSite]:
        """The sites, or none if the model was deleted in a scope that is still open. Ending the scope is no error."""
        return self.sites if self.decoder.alive else {}

    def report(self) -> Report:
        """Return how each layer is steered, at each of its sites."""
        report = Report()
        for (index, name), site in self.sites.items():
            patched = self.layers[index]
            reach, layer = patched.reached[name], patched.base.__name__
            norm = ("", 0) if self._norms is None else (self._norms.state(index, site), self._norms.taken(site))
            report.append(
                LayerReport(index, patched.path, layer, reach.kind, site.backend, site.calls, reach.reason, name, *norm)
            )
        return report

    def reset_calls(self) -> None:
        """Set the report's call counts to 0."""
        for site in self.sites.values():
            site.calls, site.backend = 0, None
        if self._norms is not None:
            self._norms.reset()


def describe(
    configs: Mapping[str, SteerConfig],
    active: str | None,
    count: Callable[[str], int],
    decoder: Decoder,
    model: nn.Module,
) -> str:
    """Return a line for each adapter of a model: its form, its layers, and its share of the model's parameters.

    Args:
        configs: the adapters, by name.
        active: the name of the active adapter.
        count: returns an adapter's number of parameters.
    """
    own = sum(p.numel() for path, p in model.named_parameters() if not is_of_site(path))
    lines = []
    for name, config in configs.items():
        by_form = {"vector": "vector", "loreft": f"LoReFT of rank {config.rank}"}
        form = by_form.get(config.form, f"rank {config.rank}, {config.activation}")
        layers = len(decoder.layout.indices(config))
        share = f", {count(name) / own:.2%} of the model's" if own else ""
        used = " (in use)" if name == active else ""
        at = "" if config.site == SITE else f" at {', '.join(config.sites)}"
        lines.append(
            f"  {name}{used}: {form}, scale {config.scale:g}, {layers} of {len(decoder.layers)} layers{at}, "
            f"{count(name):,} parameters{share}"
        )
    return "\n".join([f"Steering of a {type(model).__name__}:", *(lines or ["  no adapters"])])
