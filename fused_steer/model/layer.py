"""Patch a decoder layer so that its site steers it, and undo the patch.

The class of the layer instance is replaced by a subclass. The subclass's forward passes the operands of the last
residual add to the layer's steering site (see residual.py). If no such add is found, a forward hook steers the finished
hidden state. That gives the same numbers with one more pass, and the report says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from types import MethodType
from typing import Any, TypeGuard, TypeVar

from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.nn.modules.module import _global_backward_hooks as any_backward_hook
from torch.nn.modules.module import _global_backward_pre_hooks as any_backward_pre_hook
from torch.nn.modules.module import _global_forward_hooks as any_forward_hook
from torch.nn.modules.module import _global_forward_pre_hooks as any_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from ..adapters.parameters import SITE, Layout
from ..kernels.plan import no_plan
from .residual import ResidualNotFound, rewrite_forward
from .site import Site, SteeringSite
from .watch import call_watched, thread

_F = TypeVar("_F", bound=Callable[..., Any])
_cached: Callable[[_F], _F] = functools.cache  # type: ignore[assignment]  # mypy does not treat a class as hashable

#: The attribute by which a rewritten forward calls the layer's site.
_CALL = "call_post_block"
#: The attribute of a patched layer's class that keeps the rewritten forward if `forward` is replaced.
_FORWARD = "forward_of_patch"


def _call_site(layer: nn.Module, left: Tensor, right: Tensor, entering: Any) -> Tensor:
    """Call `layer.post_block(left, right, entering)`, without nn.Module's `__call__` if the site has no hooks."""
    site: Any = layer._modules[SITE]
    if is_dynamo_compiling():
        return site(left, right, entering=entering)
    noted = site.__dict__  # nn.Module's attributes take long to look up
    if noted["_forward_hooks"] or noted["_forward_pre_hooks"]:
        return site(left, right, entering=entering)
    if noted["_backward_hooks"] or noted["_backward_pre_hooks"]:
        return site(left, right, entering=entering)
    if any_forward_hook or any_forward_pre_hook or any_backward_hook or any_backward_pre_hook:
        return site(left, right, entering=entering)
    planned = noted.get("_planned")  # PEFT's site has no plans
    if planned is not None and thread.quiet:
        # The same as `steer` for a planned call, without its function calls. Tensors without values, as in
        # torch.export, have no plan.
        op, parameters = planned
        run = op.last_trained if is_grad_enabled() else op.last
        out = None if run is no_plan else run(left, right, parameters())
        if out is not None:
            noted["calls"] += 1
            noted["backend"] = "triton"
            return out
    if is_compiling():
        return site(left, right, entering=entering)
    return site.steer(left, right, entering)


def _watched(layer: nn.Module, forward: Any) -> Any:
    """Wrap a forward that is set on a patched layer, so that a call that does not steer is an error."""
    if isinstance(forward, MethodType) and forward.__func__ is type(layer).forward or _is_watched(forward):
        return forward
    watched = functools.partial(_run_watched, layer, forward)
    return functools.update_wrapper(watched, forward) if callable(forward) else forward


def _is_watched(forward: Any) -> TypeGuard[functools.partial[Any]]:
    return isinstance(forward, functools.partial) and forward.func is _run_watched


def _is_class_forward(watched: functools.partial[Any]) -> bool:
    """Return whether the wrapper calls the forward that the layer's class has at the time of the call."""
    return watched.args[1] is None


def _run_watched(layer: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    run = functools.partial(type(layer).forward, layer) if forward is None else forward
    site: Any = layer._modules.get(SITE)
    if is_compiling() or site is None:  # None: this function outlived the patch
        return run(*args, **kwargs)
    return call_watched(layer, site, f"layer {site.patched.index}", run, *args, **kwargs)


def _rebuild(base: type[nn.Module], rewritten: bool) -> nn.Module:
    cls = steered_class(base, rewritten)
    return cls.__new__(cls)


@_cached
def steered_class(base: type[nn.Module], rewritten: bool) -> type[nn.Module]:
    """Return the subclass of a layer class for patched layers. With `rewritten`, its forward calls the site.

    It keeps the class's name, because FSDP's wrap policies and `_no_split_modules` use it.

    Raises:
        ResidualNotFound: the forward cannot be rewritten.
    """

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        # A class made at run time cannot be found by name, so copies and worker processes make it again.
        return _rebuild, (base, rewritten), self.__dict__

    namespace: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": __reduce_ex__,
    }
    if rewritten:
        namespace["forward"] = rewrite_forward(base, _CALL, with_input=True)

    def __setattr__(self: nn.Module, name: str, value: Any) -> None:
        base.__setattr__(self, name, _watched(self, value) if name == "forward" else value)

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return base.__call__(self, *args, **kwargs)
        site: Any = self.get_submodule(SITE)
        return call_watched(self, site, f"layer {site.patched.index}", base.__call__, self, *args, **kwargs)

    def post_block(self: nn.Module) -> Any:
        # Bypasses nn.Module's __getattr__, which takes longer than a launch.
        try:
            return self._modules[SITE]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {SITE!r}") from None

    namespace |= {SITE: property(post_block), _CALL: _call_site}
    # If the forward calls the site, only a replacement of the forward is watched. With a hook every call is watched.
    namespace |= {"__setattr__": __setattr__} if rewritten else {"__call__": __call__}
    metaclass: Any = type(base)
    cls = metaclass(base.__name__, (base,), namespace)
    setattr(cls, _FORWARD, cls.forward)  # transformers wraps the forward of a new layer class
    return cls


def _steer_output(layer: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook that steers a layer's output: a tensor, or the first element of a tuple or list."""
    site = layer.get_submodule(SITE)
    if isinstance(output, Tensor):
        return site(output)
    if type(output) in (tuple, list) and output and isinstance(output[0], Tensor):
        return type(output)((site(output[0]), *output[1:]))
    raise TypeError(
        f"{type(layer).__name__} returned a {type(output).__name__}; "
        "expected a tensor, alone or first in a tuple or list"
    )


def _own_forward_kept(layer: nn.Module) -> bool:
    """Return whether the instance's forward comes from accelerate's hooks and wraps the class's own forward."""
    kept = vars(layer).get("_old_forward")
    return hasattr(layer, "_hf_hook") and isinstance(kept, MethodType) and kept.__func__ is type(layer).forward


def _change_class(layer: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> None:
    """Change the class of a layer, also for a forward that accelerate keeps on the instance. May be repeated."""
    layer.__class__ = new
    for name in ("forward", "_old_forward"):
        kept = vars(layer).get(name)
        if isinstance(kept, MethodType) and kept.__func__ is old.forward:
            setattr(layer, name, MethodType(new.forward, layer))


class PatchedLayer:
    """One decoder layer with its steering site, and the state needed to undo the patch."""

    def __init__(self, layer: nn.Module, index: int, path: str, make_site: Callable[[], Site] = SteeringSite) -> None:
        """Patch `layer`. After an error it is as before."""
        if hasattr(layer, SITE):
            raise ValueError(f"layer {index} ({type(layer).__name__}) has a {SITE!r} of its own; expected none")
        self.layer, self.index, self.path = layer, index, path
        self.base = type(layer)
        self.reason = ""  # why the layer is steered by a hook
        self._hook: RemovableHandle | None = None
        try:
            if "forward" in vars(layer) and not _own_forward_kept(layer):
                raise ResidualNotFound("its forward was replaced on the instance")
            cls = steered_class(self.base, True)
        except ResidualNotFound as reason:
            self.reason = str(reason)
            cls = steered_class(self.base, False)
        site = make_site().train(layer.training)
        site.patched = self
        try:
            _change_class(layer, self.base, cls)
            layer.add_module(SITE, site)
            if self.reason:
                # The first hook, so that hooks which record hidden states record the steered one.
                self._hook = layer.register_forward_hook(_steer_output, prepend=True)
        except BaseException:
            self.remove()
            raise

    @property
    def kind(self) -> str:
        return "hook" if self.reason else "fused"

    @property
    def has_site(self) -> bool:
        return SITE in self.layer._modules

    @property
    def site(self) -> Any:
        """The site, of the class that `make_site` returns."""
        return self.layer.get_submodule(SITE)

    def watch(self) -> None:
        """Watch a replaced forward that bypassed the layer's `__setattr__`: one on its class, or in its `__dict__`."""
        if self.reason or type(self.layer) is self.base:  # steered by a hook, or being unpatched
            return
        own, forward = vars(self.layer), type(self.layer).forward
        replaced = forward is not getattr(type(self.layer), _FORWARD)
        if "forward" not in own:
            if replaced:
                own["forward"] = functools.partial(_run_watched, self.layer, None)
        elif not _is_watched(own["forward"]):
            self.layer.forward = own["forward"]
        elif _is_class_forward(own["forward"]) and not replaced:
            del own["forward"]

    def check_removable(self) -> None:
        """Raise RuntimeError if another library has since changed the layer's class."""
        if type(self.layer) not in (self.base, steered_class(self.base, not self.reason)):
            raise RuntimeError(
                f"layer {self.index} is now a {type(self.layer).__qualname__} that another library made; expected it "
                "as patch_model left it (undo the other first)"
            )

    def remove(self) -> None:
        """Remove the site and restore the layer. After an exception it can be called again."""
        if self._hook is not None:
            self._hook.remove()
        own = vars(self.layer)
        watched = own.get("forward")
        if _is_watched(watched):
            put = watched.args[1]
            if put is None:
                del own["forward"]
            else:
                own["forward"] = put  # another library's forward stays
        _change_class(self.layer, steered_class(self.base, not self.reason), self.base)
        self.layer._modules.pop(SITE, None)


def patch_layers(
    layers: Mapping[int, nn.Module], layout: Layout, make_site: Callable[[], Site] = SteeringSite
) -> dict[int, PatchedLayer]:
    """Add a site to each of these decoder layers, by index; all or none.

    Raises:
        ValueError: a layer has a site already.
    """
    patched: dict[int, PatchedLayer] = {}
    try:
        for index, layer in layers.items():
            patched[index] = PatchedLayer(layer, index, layout.path(index), make_site)
        return patched
    except BaseException:
        for one in patched.values():
            one.remove()
        raise


def unpatch_layers(patched: Iterable[PatchedLayer]) -> None:
    """Remove the sites from layers; all or none.

    Raises:
        RuntimeError: another library has since changed a layer's class.
    """
    patched = list(patched)
    for one in patched:
        one.check_removable()
    for one in patched:
        one.remove()
