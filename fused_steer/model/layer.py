"""Patch a decoder layer so that its sites steer it, and undo the patch.

The class of the layer instance is replaced by a subclass with a rewritten forward. It passes the operands of a residual
add to the site (see residual.py). If a site's tensor is changed before it is added, or is not added at all, the forward
calls the site with that tensor alone, next to the module (see sublayers.py). If the forward cannot be rewritten, a
forward hook steers. That gives the same numbers, and the report says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MethodType
from typing import Any, NamedTuple, TypeGuard

from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.nn.modules.module import _global_backward_hooks as any_backward_hook
from torch.nn.modules.module import _global_backward_pre_hooks as any_backward_pre_hook
from torch.nn.modules.module import _global_forward_hooks as any_forward_hook
from torch.nn.modules.module import _global_forward_pre_hooks as any_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from ..adapters.parameters import SITE
from ..config import SITES
from ..kernels.plan import no_plan
from .residual import Edit, Reader, ResidualNotFound, Source, bypass_of_hooks, cached, final_adds, rewrite
from .site import Site, SteeringSite
from .sublayers import Found, Parts, find, find_in, parts_of
from .watch import call_watched, thread
from .weak import Weak, Weakly

#: The attribute of a patched layer's class that keeps the rewritten forward if `forward` is replaced.
_FORWARD = "forward_of_patch"
#: The name under which it keeps how its sites are reached.
_REACHED = "reached_by_patch"

# ------------------------------------------------------------------------------------- what rewritten forwards call


def _in_add(name: str) -> Callable[..., Tensor]:
    def call_site(layer: nn.Module, residual: Tensor, branch: Tensor, entering: Any) -> Tensor:
        """`layer.<site>(residual, branch, entering)`, past nn.Module's `__call__` where nobody hooked the site."""
        site: Any = layer._modules[name]
        if is_dynamo_compiling():
            return site(residual, branch, entering=entering)
        noted = site.__dict__  # past nn.Module's attributes, which take long to look up
        if noted["_forward_hooks"] or noted["_forward_pre_hooks"]:
            return site(residual, branch, entering=entering)
        if noted["_backward_hooks"] or noted["_backward_pre_hooks"]:
            return site(residual, branch, entering=entering)
        if any_forward_hook or any_forward_pre_hook or any_backward_hook or any_backward_pre_hook:
            return site(residual, branch, entering=entering)
        planned = noted.get("_planned")  # PEFT's site plans none
        if planned is not None and not thread.calls:
            # What `steer` comes to where a plan is for this call (never for tensors without values, as torch.export
            # has), without its function calls.
            op, parameters = planned
            run = op.last_trained if is_grad_enabled() else op.last
            out = None if run is no_plan else run(residual, branch, parameters())
            if out is not None:
                noted["calls"] += 1
                noted["backend"] = "triton"
                return out
        if is_compiling():
            return site(residual, branch, entering=entering)
        return site.steer(residual, branch, entering)

    return call_site


def _beside(name: str, copied: bool = False) -> Callable[..., Any]:
    def steer_value(layer: nn.Module, value: Any, entering: Any) -> Any:
        """The tensor, alone or first in a tuple or list, steered."""
        return _steer_first(layer._modules[name], value, layer, entering, copied)

    return steer_value


def _steer_first(site: Any, value: Any, source: nn.Module, entering: Any = None, copied: bool = False) -> Any:
    """A tensor, alone or first in a tuple or list, steered.

    copied: what it becomes may be written to in place, which no tensor may that autograd has saved.
    """
    if isinstance(value, Tensor):
        out = site(value, entering=entering)
        return out.clone() if copied and out is not value and is_grad_enabled() else out
    if type(value) in (tuple, list) and value and isinstance(value[0], Tensor):
        return type(value)((_steer_first(site, value[0], source, entering, copied), *value[1:]))
    raise TypeError(
        f"{type(source).__name__} has a {type(value).__name__} to steer at {site.name}; "
        "expected a tensor, alone or first in a tuple or list"
    )


#: The methods of a patched layer's class that its forward calls, for each site: in the place of an add; with a tensor
#: alone; with one that may be written to.
_METHODS: dict[str, Callable[..., Any]] = {}
for _name in SITES:
    _METHODS |= {
        f"call_{_name}": _in_add(_name),
        f"steer_{_name}": _beside(_name),
        f"steer_copied_{_name}": _beside(_name, copied=True),
    }

# ------------------------------------------------------------------------------------------------------- the classes


class Form(NamedTuple):
    """What a patched layer's class is made by: the sites that its forward calls, those that hooks call, and what the
    parts of the layer are; the last is needed for other sites than post_block alone."""

    rewritten: tuple[str, ...] = ()
    hooked: tuple[str, ...] = ()
    parts: Parts = ()

    @property
    def sites(self) -> tuple[str, ...]:
        return _in_order(self.rewritten, self.hooked)


@functools.cache  # read for every layer in every pass
def _in_order(rewritten: tuple[str, ...], hooked: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in SITES if name in rewritten or name in hooked)


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
    form: Form | None = getattr(type(layer), _REACHED, None)
    sites = _sites_of(layer, form.rewritten) if form is not None else []
    if is_compiling() or not sites:  # none: somebody kept this function beyond the patch
        return run(*args, **kwargs)
    return call_watched(layer, sites, f"layer {sites[0].patched.index}", run, *args, **kwargs)


def _sites_of(layer: nn.Module, names: Iterable[str]) -> list[Any]:
    return [layer._modules[name] for name in names if name in layer._modules]


def own_class(layer: nn.Module) -> type[nn.Module]:
    """The class of a layer, patched or not, with the forward that was written for it."""
    return next(cls for cls in type(layer).__mro__ if _REACHED not in vars(cls))


def _rebuild(base: type[nn.Module], form: tuple[Any, ...]) -> nn.Module:
    cls = steered_class(base, Form(*form))
    return cls.__new__(cls)


def _site_property(name: str) -> property:
    def site(self: nn.Module) -> Any:
        # Bypasses nn.Module's __getattr__, which takes longer than a launch.
        try:
            return self._modules[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}") from None

    return property(site)


@cached
def steered_class(base: type[nn.Module], form: Form) -> type[nn.Module]:
    """Return the subclass of a layer class for patched layers of this form.

    It keeps the class's name, because FSDP's wrap policies and `_no_split_modules` use it.

    Raises:
        ResidualNotFound: the forward cannot be rewritten so.
    """

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        # A class made at run time cannot be found by name, so copies and worker processes make it again.
        # `__getstate__` leaves out the compiled call, which runs the layer that was copied.
        return _rebuild, (base, tuple(form)), self.__getstate__()

    namespace: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": __reduce_ex__,
    }

    def __setattr__(self: nn.Module, name: str, value: Any) -> None:
        base.__setattr__(self, name, _watched(self, value) if name == "forward" else value)

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return base.__call__(self, *args, **kwargs)
        sites = _sites_of(self, form.hooked)
        return call_watched(self, sites, f"layer {sites[0].patched.index}", base.__call__, self, *args, **kwargs)

    # Where the forward calls sites, what is put in its place is watched. A layer with hooks is watched in each call.
    if form.rewritten:
        edits = functools.partial(_edits, form=form)
        namespace |= {"forward": rewrite(base, edits), "__setattr__": __setattr__}
    if form.hooked:
        namespace["__call__"] = __call__
    namespace |= {name: _site_property(name) for name in form.sites}
    namespace |= _METHODS
    metaclass: Any = type(base)
    cls = metaclass(base.__name__, (base,), namespace)
    setattr(cls, _FORWARD, cls.forward)  # transformers wraps the forward of a new layer class
    setattr(cls, _REACHED, form)
    return cls


def _edits(source: Source, form: Form) -> list[Edit]:
    """Where the forward calls its sites, in the order in which those of one node are made."""
    edits: list[Edit] = []
    for name in form.rewritten:
        if name == SITE:
            shared = {edit.node for edit in edits}
            adds = [add.node for add in final_adds(Reader(source))]
            edits += [Edit(node, f"steer_{name}" if node in shared else f"call_{name}") for node in adds]
            continue
        found = find(name, source, form.parts)
        kind = "call" if found.where == "add" else "steer_copied" if found.written else "steer"
        edits += [Edit(node, f"{kind}_{name}", found.where, operand) for node, operand in found.at]
    return edits


# --------------------------------------------------------------------------------------------------------- the hooks


def _steer_output(module: nn.Module, args: Any, output: Any, *, site: Site) -> Any:
    """A forward hook that steers a module's output: a tensor, or the first element of a tuple or list."""
    return _steer_first(site, output, module)


def _steer_input(module: nn.Module, args: Any, kwargs: Any, *, site: Site) -> Any:
    """A forward pre-hook that steers a module's first argument: a tensor, or the first element of a tuple or list."""
    if args:
        return (_steer_first(site, args[0], module), *args[1:]), kwargs
    name, value = next(iter(kwargs.items()))
    return args, {**kwargs, name: _steer_first(site, value, module)}


def _own_forward_kept(layer: nn.Module) -> bool:
    """Return whether the instance's forward comes from accelerate's hooks and wraps the class's own forward."""
    kept = vars(layer).get("_old_forward")
    return hasattr(layer, "_hf_hook") and isinstance(kept, MethodType) and kept.__func__ is type(layer).forward


def _change_class(layer: nn.Module, old: Iterable[type[nn.Module]], new: type[nn.Module]) -> None:
    """Give a layer another class. The forwards of old classes that accelerate keeps on the instance change too.

    It can be called again.
    """
    forwards = [cls.forward for cls in old]
    layer.__class__ = new
    for name in ("forward", "_old_forward"):
        kept = vars(layer).get(name)
        if isinstance(kept, MethodType) and any(kept.__func__ is forward for forward in forwards):
            setattr(layer, name, MethodType(new.forward, layer))


class Reach(NamedTuple):
    """How a site is reached. kind: "fused", into an add; "inline", by a launch of its own in the layer's forward; or
    "hook". reason: why it is not fused. module: the path of the one that a hook is on, "" for the layer."""

    kind: str
    reason: str = ""
    module: str = ""


class PatchedLayer:
    """One decoder layer with its steering sites, and the state needed to undo the patch.

    The layer's sites refer to this, so this refers to the layer weakly.
    """

    layer = Weakly[nn.Module]()

    def __init__(self, layer: nn.Module, index: int, path: str, runner: type[nn.Module]) -> None:
        """Take `layer` as it is, of a decoder of the class `runner`. `give` patches it."""
        self.layer, self.index, self.path, self._runner = layer, index, path, runner
        self.base = type(layer)
        self.form = Form()
        self.reached: dict[str, Reach] = {}
        self._hooks: dict[str, tuple[Weak[nn.Module], RemovableHandle]] = {}

    @property
    def sites(self) -> dict[str, Any]:
        """The sites that are in the layer, in the order of its computation, of the class that `make_site` returns."""
        modules = self.layer._modules
        return {name: modules[name] for name in self.form.sites if modules.get(name) is not None}

    # ------------------------------------------------------------------------------------------------------------- in

    def reach(self, names: Iterable[str]) -> dict[str, Reach]:
        """How these sites can be reached. The layer is not changed.

        Raises:
            ValueError: the layer has no such site, something else of that name, or would need a hook that its decoder
                does not run.
        """
        found = {}
        for name in names:
            if isinstance(getattr(self.layer, name, None), Site):
                raise ValueError(
                    f"layer {self.index} ({self.base.__name__}) is steered at {name} already; expected one that is "
                    "not (unpatch the model that steers it first, or add the adapter there)"
                )
            if hasattr(self.layer, name):
                raise ValueError(f"layer {self.index} ({self.base.__name__}) has a {name!r} of its own; expected none")
            found[name] = self._reach(name)
        return found

    def _reach(self, name: str) -> Reach:
        try:
            parts = () if name == SITE else parts_of(self.layer, self.base)
            where = None if name == SITE else find_in(self.base, name, parts)
        except ResidualNotFound as reason:
            raise ValueError(
                f"layer {self.index} ({self.base.__name__}) cannot be steered at {name}: {reason}"
            ) from reason
        try:
            if "forward" in vars(self.layer) and not self._has_class_forward():
                raise ResidualNotFound("its forward was replaced on the instance")
            steered_class(self.base, Form((name,), (), parts))
        except ResidualNotFound as reason:
            if where is not None:
                return Reach("hook", str(reason), self._module(name, where))
            if (place := bypass_of_hooks(self._runner)) is not None:
                raise ValueError(
                    f"layer {self.index} ({self.base.__name__}) can be steered only by a hook, because {reason}, and "
                    f"{self._runner.__name__}.forward calls a forward past the hooks ({place}); expected a layer's call"
                ) from reason
            return Reach("hook", str(reason))
        if where is None or where.where == "add":
            return Reach("fused")
        return Reach("inline", where.reason)

    def _module(self, name: str, found: Found) -> str:
        """The module on which a hook steers."""
        if len(found.modules) != 1:
            raise ValueError(
                f"layer {self.index} ({self.base.__name__}) has several modules at the site {name}, "
                f"{', '.join(found.modules)}, and a forward that was replaced; expected its own"
            )
        return found.modules[0]

    def _has_class_forward(self) -> bool:
        """Whether a forward on the instance is that of its class, or of accelerate's hooks around that."""
        forward = vars(self.layer)["forward"]
        return _own_forward_kept(self.layer) or _is_watched(forward) and _is_class_forward(forward)

    def give(self, reached: Mapping[str, Reach], make_site: Callable[[str], Site] = SteeringSite) -> None:
        """Give the layer sites, as `reach` found them. On an error it is left as it was."""
        try:
            self._change({**self.reached, **reached})
            for name, reach in reached.items():
                site = make_site(name).train(self.layer.training)
                site.patched = self
                site.reads = "branch" if reach.kind == "fused" and name != SITE else "sum"
                self.layer.add_module(name, site)
                if reach.kind == "hook":
                    self._hook(name, site, self.layer.get_submodule(reach.module))
        except BaseException:
            self.take(reached)
            raise

    def _hook(self, name: str, site: Site, module: nn.Module) -> None:
        # First of the hooks, so that those which record hidden states record the steered one.
        if name == "pre_mlp":
            steer = functools.partial(_steer_input, site=site)
            handle = module.register_forward_pre_hook(steer, prepend=True, with_kwargs=True)
        else:
            handle = module.register_forward_hook(functools.partial(_steer_output, site=site), prepend=True)
        self._hooks[name] = Weak(module), handle

    def _change(self, reached: Mapping[str, Reach]) -> None:
        """Give the layer the class for these sites."""
        rewritten = tuple(name for name in SITES if name in reached and reached[name].kind != "hook")
        hooked = tuple(name for name in SITES if name in reached and reached[name].kind == "hook")
        parts = parts_of(self.layer, self.base) if set(rewritten) - {SITE} else ()
        form = Form(rewritten, hooked, parts)
        old, new = (self.base if not one.sites else steered_class(self.base, one) for one in (self.form, form))
        # Also from the class that the layer has now: an exception may have cut off an earlier change.
        _change_class(self.layer, (self.base, old, type(self.layer)), new)
        self.form, self.reached = form, dict(reached)

    # ---------------------------------------------------------------------------------------------------- as it stands

    def watch(self) -> None:
        """Watch a replaced forward that bypassed the layer's `__setattr__`: one on its class, or in its `__dict__`.

        Raises:
            RuntimeError: another module stands in the place of one on which a hook steers.
        """
        layer: Any = self.__dict__["_weak_layer"]()  # past the attribute, which takes two calls more
        cls = type(layer)
        if not self._hooks and "forward" not in layer.__dict__ and cls.forward is getattr(cls, _FORWARD, None):
            return  # as nearly always: asked of every layer in every pass
        for name, (module, _) in self._hooks.items():
            if self.layer.get_submodule(self.reached[name].module) is not module():
                raise RuntimeError(
                    f"layer {self.index} has another {self.reached[name].module} than the {type(module()).__name__} on "
                    f"which a hook steers at {name}; expected the model to be unpatched before it is replaced"
                )
        if not self.form.rewritten or type(self.layer) is self.base:  # by hooks alone, or being taken out
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

    # ------------------------------------------------------------------------------------------------------------ out

    def check_removable(self) -> None:
        """Raise RuntimeError if another library has since changed the layer's class."""
        if type(self.layer) not in (self.base, steered_class(self.base, self.form)):
            raise RuntimeError(
                f"layer {self.index} is now a {type(self.layer).__qualname__} that another library made; expected it "
                "as patch_model left it (undo the other first)"
            )

    def take(self, names: Iterable[str]) -> None:
        """Remove sites. After an exception it can be called again."""
        names = set(names)
        for name in names & self._hooks.keys():
            self._hooks[name][1].remove()
            del self._hooks[name]
        left = {name: reach for name, reach in self.reached.items() if name not in names}
        if not left:
            self._give_forward_back()
        self._change(left)
        for name in names:
            site = self.layer._modules.get(name)
            if isinstance(site, Site) and site.patched is self:  # not the site of another patch
                del self.layer._modules[name]

    def remove(self) -> None:
        """Remove all sites and restore the layer. After an exception it can be called again."""
        self.take(SITES)

    def _give_forward_back(self) -> None:
        own = vars(self.layer)
        watched = own.get("forward")
        if _is_watched(watched):
            put = watched.args[1]
            if put is None:
                del own["forward"]
            else:
                own["forward"] = put  # another library's forward stays


def give_sites(wanted: Mapping[PatchedLayer, Sequence[str]], make_site: Callable[[str], Site] = SteeringSite) -> None:
    """Give layers sites that they have not; all of them or none.

    Raises:
        ValueError: a layer has no such site, or something else of that name.
    """
    reached = {patched: patched.reach(names) for patched, names in wanted.items()}
    given: list[PatchedLayer] = []
    try:
        for patched, sites in reached.items():
            given.append(patched)
            patched.give(sites, make_site)
    except BaseException:
        for patched in given:
            patched.take(reached[patched])
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
