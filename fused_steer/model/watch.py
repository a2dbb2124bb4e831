"""Sees to it that a patched layer that ran was steered: in that layer, in that thread, for that call.

A layer whose forward is the one that `patch_model` gave it calls its sites; nothing has to be looked at. Where another
forward is put on the layer (accelerate's offloading, a wrapper, a replacement), that forward is watched: each site must
have run before it returns. So is each call of a layer that a hook steers. Calls in other threads have no say.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..adapters.parameters import SITE


@dataclass(frozen=True)
class LayerReport:
    """How one layer is steered at one site.

    kind: "fused" into an add; "inline", by a launch of its own in the layer's forward; or "hook"; reason: why it is not
    fused; backend: of the last eager call, None before one; calls: eager ones since reset (a compiled graph does not
    count its own).
    """

    index: int
    path: str
    layer: str
    kind: str
    backend: str | None
    calls: int
    reason: str
    site: str = SITE


class Report(list[LayerReport]):
    """A LayerReport for each site of each steered layer; prints as a table."""

    def __str__(self) -> str:
        head = f"{'layer':>5}  {'class':<28} {'site':<14} {'kind':<6} {'backend':<8} {'calls':>7}"
        rows = [
            f"{r.index:>5}  {r.layer:<28} {r.site:<14} {r.kind:<6} {r.backend or '-':<8} {r.calls:>7}"
            + (f"  ({r.reason})" if r.reason else "")
            for r in self
        ]
        return "\n".join([head, *rows])


class _Thread(threading.local):
    """What runs in this thread, innermost last: calls of layers that are watched, and packed weights of passes.

    quiet: whether there is neither, so that a site needs to look at none.
    """

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.packs: list[Any] = []  # `passes.Pack`; None for a pass without one
        #: How many packs there were when a model's pass began, by its `passes.Packing`.
        self.begun: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.quiet = True

    def settle(self) -> None:
        self.quiet = not self.calls and (not self.packs or self.packs[-1] is None)


class _Call:
    __slots__ = ("idle",)

    def __init__(self, sites: Iterable[nn.Module]) -> None:
        self.idle = set(sites)  # those that have not run yet


thread = _Thread()


def note_run(site: nn.Module) -> None:
    """Say that `site` runs, for the watched calls of its layer in this thread. Needless where there are none."""
    for call in thread.calls:
        call.idle.discard(site)


def call_watched(
    layer: nn.Module, sites: Sequence[Any], name: str, run: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """What `run(*args, **kwargs)` returns.

    Args:
        layer, sites: the patched layer that `run` is a call of, and those of its sites that the call has to run.
        name: the layer's, in the error.

    Raises:
        RuntimeError: a site did not run meanwhile in this thread.
    """
    call = _Call(sites)
    thread.calls.append(call)
    thread.quiet = False
    try:
        output = run(*args, **kwargs)
    finally:
        thread.calls.remove(call)
        thread.settle()
    if call.idle and not _is_compiled(layer, run):
        idle = sorted(site.name for site in sites if site in call.idle)
        at = "" if idle == [SITE] else f" at {', '.join(idle)}"
        raise RuntimeError(
            f"{name} ({type(layer).__name__}) is patched but did not steer{at}; expected its forward as patch_model "
            "left it, or one that calls it (was it replaced since?)"
        )
    return output


def _is_compiled(layer: nn.Module, function: Any) -> bool:
    """Whether torch.compile may run the layer, or a function: a compiled graph steers without calling the site."""
    if getattr(layer, "_compiled_call_impl", None) is not None:
        return True
    while function is not None:
        if hasattr(function, "_torchdynamo_orig_callable"):
            return True
        function = next((f for f in (getattr(function, n, None) for n in _INNER) if f is not None), None)
    return False


#: Where a wrapper keeps the function that it wraps: functools.wraps, functools.partial, a bound method.
_INNER = ("__wrapped__", "func", "__func__")


class LayerList:
    """Sees a steered layer that another module has taken the place of in the model."""

    def __init__(self, decoder: nn.Module, name: str) -> None:
        """
        Args:
            decoder: the module that runs the layers.
            name: of its list of layers.
        """
        self._decoder, self._name = decoder, name
        self._originals: tuple[Any, ...] = tuple(decoder.get_submodule(name).children())
        self._seen = self._originals

    def check(self, patched: Mapping[int, Any]) -> None:
        """Check the list as it is now. Cheap, unless it changed since the last time.

        A layer may be wrapped, moved or dropped (early exit, pruning); it may not be replaced.

        Args:
            patched: the `PatchedLayer`s by index.

        Raises:
            RuntimeError: in the place of a steered layer stands a module that does not hold it.
        """
        layers = self._decoder._modules.get(self._name)
        here: tuple[Any, ...] = () if layers is None else tuple(layers._modules.values())
        if here == self._seen:  # modules compare by identity
            return
        known = set(self._originals)
        for index, module in enumerate(here):
            layer = patched[index].layer if index in patched else None
            if layer is not None and module not in known and all(part is not layer for part in module.modules()):
                raise RuntimeError(
                    f"layer {index} is now a {type(module).__name__} in the place of the steered "
                    f"{type(layer).__name__}, and was not patched; expected the layer that patch_model steered, or a "
                    "module that holds it"
                )
        self._seen = here
