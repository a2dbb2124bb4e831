"""Check that a patched layer which ran was also steered, for each call and thread.

A forward rewritten by `patch_model` always calls its sites and needs no check. Another forward set on the layer
(accelerate's offloading, a wrapper, a replacement) is watched: its sites must have run before it returns. So is each
call of a layer that a hook steers. Calls in other threads do not count.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..adapters.parameters import SITE
from .weak import Weakly


@dataclass(frozen=True)
class LayerReport:
    """How one layer is steered at one site.

    Attributes:
        index, path, layer: the layer's index, its path in the model, and its class.
        kind: "fused" into a residual add; "inline", by a launch of its own in the layer's forward; or "hook".
        backend: the backend of the last eager call, or None.
        calls: eager calls since the last reset. A compiled graph does not count its calls.
        reason: why the site is not fused.
        site: the site's name.
        norm: with `fuse_norm`, "fused" if the norm behind the layer is computed beside its output, else the reason why
            it is not. "" without it, and at a site that does not end the layer.
        norm_calls: calls of the norm that took such a result over, since the last reset.
    """

    index: int
    path: str
    layer: str
    kind: str
    backend: str | None
    calls: int
    reason: str
    site: str = SITE
    norm: str = ""
    norm_calls: int = 0


class Report(list[LayerReport]):
    """A LayerReport for each site of each steered layer. It prints as a table."""

    def __str__(self) -> str:
        head = f"{'layer':>5}  {'class':<28} {'site':<14} {'kind':<6} {'backend':<8} {'calls':>7}"
        rows = [
            f"{r.index:>5}  {r.layer:<28} {r.site:<14} {r.kind:<6} {r.backend or '-':<8} {r.calls:>7}"
            + (f"  ({r.reason})" if r.reason else "")
            + (f"  norm: {r.norm}" if r.norm else "")
            for r in self
        ]
        return "\n".join([head, *rows])


class _Thread(threading.local):
    """The watched calls and the passes of this thread, innermost last."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.rotations: list[Any] = []  # of each pass its `passes.Rotations`, or None without LoReFT
        #: The length of `rotations` when a model's pass began, by the model's `passes.Passes`.
        self.begun: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        #: The latest result that a site computed for the norm behind it: see `norms.Link`.
        self.handed: Any = None


class _Call:
    __slots__ = ("idle",)

    def __init__(self, sites: Iterable[nn.Module]) -> None:
        self.idle = set(sites)  # those that have not run yet


thread = _Thread()


def note_run(site: nn.Module) -> None:
    """Mark the watched calls of this site's layer in this thread as steered."""
    for call in thread.calls:
        call.idle.discard(site)


def call_watched(
    layer: nn.Module, sites: Sequence[Any], name: str, run: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Return `run(*args, **kwargs)`, and check that the layer's sites ran meanwhile.

    Args:
        layer, sites: the patched layer that `run` calls, and the sites that the call has to run.
        name: the layer's name in the error message.
        run: the function to call.

    Raises:
        RuntimeError: a site did not run in this thread.
    """
    call = _Call(sites)
    thread.calls.append(call)
    try:
        output = run(*args, **kwargs)
    finally:
        thread.calls.remove(call)
    if call.idle and not _is_compiled(layer, run):
        idle = sorted(site.name for site in sites if site in call.idle)
        at = "" if idle == [SITE] else f" at {', '.join(idle)}"
        raise RuntimeError(
            f"{name} ({type(layer).__name__}) is patched but did not steer{at}; expected its forward as patch_model "
            "left it, or one that calls it (was it replaced since?)"
        )
    return output


def _is_compiled(layer: nn.Module, function: Any) -> bool:
    """Return whether torch.compile may run the layer or function. A compiled graph steers without calling the site."""
    if getattr(layer, "_compiled_call_impl", None) is not None:
        return True
    while function is not None:
        if hasattr(function, "_torchdynamo_orig_callable"):
            return True
        function = next((f for f in (getattr(function, n, None) for n in _INNER) if f is not None), None)
    return False


#: The attributes in which functools.wraps, functools.partial and bound methods keep the inner function.
_INNER = ("__wrapped__", "func", "__func__")


class LayerList:
    """Detects that another module has replaced a steered layer in the model. It keeps the layers alive."""

    _decoder = Weakly[nn.Module]()

    def __init__(self, decoder: nn.Module, name: str) -> None:
        """
        Args:
            decoder: the module that runs the layers.
            name: the name of its list of layers.
        """
        self._decoder, self._name = decoder, name
        self._originals: tuple[Any, ...] = tuple(decoder.get_submodule(name).children())
        self._seen = self._originals

    def check(self, patched: Mapping[int, Any]) -> None:
        """Check the present list of layers. It is cheap unless the list changed since the last check.

        A layer may be wrapped, moved or dropped (early exit, pruning), but not replaced.

        Args:
            patched: the `PatchedLayer`s by index.

        Raises:
            RuntimeError: a module that does not hold the steered layer has replaced it.
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
