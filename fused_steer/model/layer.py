"""The module that steers a decoder layer, and the layer with it: how it is reached, and the way back.

A layer's class is replaced, for that one instance, by a subclass whose forward hands the last residual add to the
layer's steering site (see residual.py). Where no such add is found, a forward hook steers the finished hidden state:
the same numbers, one pass more, and the report says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling
from torch.nn.modules.module import _global_backward_hooks as any_backward_hook
from torch.nn.modules.module import _global_backward_pre_hooks as any_backward_pre_hook
from torch.nn.modules.module import _global_forward_hooks as any_forward_hook
from torch.nn.modules.module import _global_forward_pre_hooks as any_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from ..adapters.parameters import SITE, Adapter, Layout
from ..kernels import post_block, select_backend
from ..kernels.orthogonal import project_gradient
from ..kernels.planned import PlannedPostBlock
from .residual import ResidualNotFound, rewrite_forward
from .watch import call_watched, note_run, thread


class _LostGradient(torch.autograd.Function):
    """A block's branch that a gradient cannot pass: an error once the gradient is asked for, no silent 0."""

    @staticmethod
    def forward(ctx: Any, branch: Tensor, entering: Tensor) -> Tensor:
        return branch.view_as(branch)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError(
            "a steered block passes no gradient from its output to its input, as modules quantised for inference do "
            "not; expected a base that can be trained through"
        )


class SteeringSite(nn.Module):
    """Adds a block's output to the residual stream and steers the sum by the adapter in use.

    Parameters live under `steer_down.<adapter>` and `steer_up.<adapter>`, as PEFT's layers have theirs.
    """

    #: The op with its launch plans, and a function that returns the op's operands behind residual and branch as they
    #: are now: the adapter's parameters; in a batch, what `rows` says. Any assignment on the site drops it.
    _planned: tuple[Any, Callable[[], tuple[Tensor, ...]]] | None

    def __init__(self) -> None:
        super().__init__()
        self.steer_down = nn.ModuleDict()
        self.steer_up = nn.ModuleDict()
        self.active: str | None = None  # the adapter in use; None, or one that skips this layer: a plain add
        self.enabled = True
        self.activation = "identity"  # of the active adapter, as is scale
        self.scale = 1.0
        self.patched: PatchedLayer | None = None  # the layer that it sits in
        self.calls = 0  # eager ones since reset
        self.backend: str | None = None  # that of the last eager call
        self.strength: Tensor  # scale as an input of compiled graphs: as a number it would be a constant of each
        self.register_buffer("strength", None, persistent=False)
        self._set_strength(torch.device("cpu"))
        self.basis: Tensor | None  # V (d, k) float32, where W2 and b2 are kept orthogonal to it while they train
        self.register_buffer("basis", None, persistent=False)
        #: While each row of a batch has its own adapter: a module that steers by rows, with a `plan` for `_planned`.
        self.rows: Any
        self.register_module("rows", None)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__["_planned"] = None
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_planned": None}  # copies and pickles plan for themselves

    def _replicate_for_data_parallel(self) -> SteeringSite:
        replica = super()._replicate_for_data_parallel()
        replica.__dict__["_planned"] = None
        return replica

    def attach(self, name: str, adapter: Adapter) -> None:
        self.steer_down[name] = adapter.down.train(self.training)
        self.steer_up[name] = adapter.up.train(self.training)
        self.__dict__["_planned"] = None

    def detach(self, name: str) -> None:
        del self.steer_down[name], self.steer_up[name]
        self.__dict__["_planned"] = None

    def adapter(self, name: str) -> Adapter | None:
        """The adapter's parameters here; None if it skips this layer."""
        return Adapter(self.steer_down[name], self.steer_up[name]) if name in self.steer_down else None

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """W1 and W2 of the adapter that steers every token; None where there is none, or it is a vector."""
        if self.active is None or not self.enabled or self.rows is not None:
            return None
        down, up = self.steer_down[self.active].weight, self.steer_up[self.active].weight
        return None if down is None or up is None else (down, up)

    def use(self, name: str | None, activation: str, scale: float) -> None:
        """Let the adapter `name` steer and train, and no other. None, or one that skips this layer, is a plain add."""
        self.active = name if name in self.steer_down else None
        self.activation, self.scale = activation, scale
        for factors in (self.steer_down, self.steer_up):
            for other, factor in factors.items():
                factor.requires_grad_(other == self.active)
        self._set_strength(next((p.device for p in self.parameters()), self.strength.device))

    @torch.inference_mode(False)  # whose tensors no compiled graph that trains may keep
    def _set_strength(self, device: torch.device) -> None:
        self.strength = torch.full((), self.scale, dtype=torch.float32, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SteeringSite:
        super()._apply(fn, recurse)
        self._set_strength(self.strength.device)  # not rounded to another dtype
        return self

    def forward(self, residual: Tensor, branch: Tensor | None = None, entering: Tensor | None = None) -> Tensor:
        """residual + branch, steered. (..., d)

        Args:
            residual, branch: what the block adds up at its end. Without branch, `residual` is the finished sum.
            entering: what the block was given, its first argument; it tells whether a gradient has to pass the block.
        """
        return self._in_graph(residual, branch) if is_compiling() else self.steer(residual, branch, entering)

    def steer(self, residual: Tensor, branch: Tensor | None = None, entering: Tensor | None = None) -> Tensor:
        """`forward` outside of compiled graphs. A layer calls it directly where nobody hooked the site."""
        noted = self.__dict__  # past nn.Module's __setattr__, which takes longer than all the rest here
        planned = noted["_planned"]
        if planned is None:
            planned = self._plan(residual)
        noted["calls"] += 1
        graded = is_grad_enabled()
        if graded or not thread.quiet:
            branch = self._called(residual, branch, entering)
        if planned is not None:
            op, parameters = planned
            if isinstance(op, PlannedPostBlock):
                weights = parameters()
                pack = thread.packs[-1] if thread.packs else None
                packed = None if pack is None else pack.of(self, residual, *weights[:2])
                out = (op.train if graded else op.infer)(residual, branch, *weights, packed=packed)
            else:
                out = self.rows(residual, branch)
            noted["backend"] = op.backend
            return out
        noted["backend"] = select_backend(residual.device)
        return residual if branch is None else residual + branch

    def _in_graph(self, residual: Tensor, branch: Tensor | None) -> Tensor:
        """`forward` as torch.compile reads it."""
        if self.rows is not None and self.enabled:
            return self.rows(residual, branch)
        if self.active is None or not self.enabled:
            return residual if branch is None else residual + branch
        down, up = self.steer_down[self.active], self.steer_up[self.active]
        return post_block(
            residual,
            branch,
            down.weight,
            self._constrained(up.weight),
            down_bias=down.bias,
            up_bias=self._constrained(up.bias),
            activation=self.activation,
            # float64 is multiplied by what the config says, not by its rounded value.
            scale=self.scale if residual.dtype == torch.float64 else self.strength,
        )

    def _plan(self, residual: Tensor) -> tuple[Any, Callable[[], tuple[Tensor, ...]]] | None:
        """Make `_planned`; None where nothing steers."""
        if self.rows is not None and self.enabled:
            planned = self.__dict__["_planned"] = self.rows.plan(residual.device)
            return planned
        if self.active is None or not self.enabled:
            return None
        factors = self.steer_down[self.active], self.steer_up[self.active]
        (w1, b1), (w2, b2) = ((factor.weight, factor.bias) for factor in factors)
        for parameter in (w1, w2, b1, b2):
            if parameter is not None and parameter.is_meta and not residual.is_meta:
                raise ValueError(
                    f"adapter {self.active!r} is on meta, as what is offloaded; expected it on {residual.device} "
                    "(offload the model before it is patched)"
                )
        names = [
            (factor, name, factor is factors[1])
            for factor, name, parameter in zip(
                factors * 2, ("weight",) * 2 + ("bias",) * 2, (w1, w2, b1, b2), strict=True
            )
            if parameter is not None
        ]
        downs, ups, active = self.steer_down._modules, self.steer_up._modules, self.active

        def usual() -> tuple[Tensor, ...]:
            # Read in each call: a parameter that was replaced since shows.
            return downs[active]._parameters["weight"], ups[active]._parameters["weight"]

        def general() -> tuple[Tensor, ...]:
            found = ((getattr(factor, name), constrained) for factor, name, constrained in names)
            return tuple(self._constrained(value) if constrained else value for value, constrained in found)

        plain = all("weight" in factor._parameters for factor in factors)
        simple = plain and w1 is not None and b1 is None and b2 is None and self.basis is None
        steer = PlannedPostBlock(self.activation, self.scale, (w1, w2, b1, b2))
        planned = self.__dict__["_planned"] = (steer, usual if simple else general)
        return planned

    def _called(self, residual: Tensor, branch: Tensor | None, entering: Tensor | None) -> Tensor | None:
        """Say that the site runs. Returns the branch, so wrapped that backward raises where the block has lost the
        gradient of its input."""
        note_run(self)
        if branch is not None and is_grad_enabled() and not (residual.requires_grad and branch.requires_grad):
            # What trains outside the layer may enter by one of the two: only a gradient that the layer's input asks for
            # can be lost.
            if isinstance(entering, Tensor) and entering.requires_grad:
                return _LostGradient.apply(branch, entering)
        return branch

    def _constrained(self, parameter: Tensor | None) -> Tensor | None:
        """W2 or b2, which is orthogonal to the basis already: what has to be projected is its gradient."""
        if self.basis is None or parameter is None or not (torch.is_grad_enabled() and parameter.requires_grad):
            return parameter
        return project_gradient(parameter, self.basis)

    def extra_repr(self) -> str:
        return f"active={self.active!r}, activation={self.activation!r}, scale={self.scale}"


#: The name under which a rewritten forward calls the layer's site.
_CALL = "call_post_block"
#: The name under which a patched layer's class keeps the rewritten forward, whatever becomes of `forward`.
_FORWARD = "forward_of_patch"


def _call_site(layer: nn.Module, left: Tensor, right: Tensor, entering: Any) -> Tensor:
    """`layer.post_block(left, right, entering)`, past nn.Module's `__call__` where nobody hooked the site."""
    site: Any = layer._modules[SITE]
    if is_compiling():
        return site(left, right, entering=entering)
    if site._forward_hooks or site._forward_pre_hooks or site._backward_hooks or site._backward_pre_hooks:
        return site(left, right, entering=entering)
    if any_forward_hook or any_forward_pre_hook or any_backward_hook or any_backward_pre_hook:
        return site(left, right, entering=entering)
    noted = site.__dict__
    planned = noted["_planned"]
    if planned is not None and thread.quiet and not is_grad_enabled():
        # What `steer` comes to where a plan is for this call, without its function calls.
        op, parameters = planned
        out = op.last(left, right, *parameters())
        if out is not None:
            noted["calls"] += 1
            noted["backend"] = "triton"
            return out
    return site.steer(left, right, entering)


def _watched(layer: nn.Module, forward: Any) -> Any:
    """A forward that is put on a patched layer, such that each call of it that does not steer is an error."""
    if isinstance(forward, MethodType) and forward.__func__ is type(layer).forward or _is_watched(forward):
        return forward
    watched = functools.partial(_run_watched, layer, forward)
    return functools.update_wrapper(watched, forward) if callable(forward) else forward


def _is_watched(forward: Any) -> bool:
    return isinstance(forward, functools.partial) and forward.func is _run_watched


def _is_class_forward(watched: functools.partial[Any]) -> bool:
    """Whether it stands for the forward that the layer's class has at the time of the call."""
    return watched.args[1] is None


def _run_watched(layer: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    run = functools.partial(type(layer).forward, layer) if forward is None else forward
    site: Any = layer._modules.get(SITE)
    if is_compiling() or site is None:  # None: somebody kept this function beyond the patch
        return run(*args, **kwargs)
    return call_watched(layer, site, f"layer {site.patched.index}", run, *args, **kwargs)


def _rebuild(base: type[nn.Module], rewritten: bool) -> nn.Module:
    cls = steered_class(base, rewritten)
    return cls.__new__(cls)


@functools.cache
def steered_class(base: type[nn.Module], rewritten: bool) -> type[nn.Module]:
    """The subclass of a layer class that a patched layer gets; `rewritten` says whether its forward calls the site.

    It keeps the class's name, which FSDP's wrap policies and `_no_split_modules` go by.

    Raises:
        ResidualNotFound: the forward cannot be rewritten.
    """

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        # A class made at run time cannot be found by name: copies and worker processes make it anew.
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

    @property
    def post_block(self: nn.Module) -> nn.Module:
        # Past nn.Module's __getattr__, which takes longer than a launch.
        try:
            return self._modules[SITE]  # type: ignore[return-value]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {SITE!r}") from None

    namespace |= {SITE: post_block, _CALL: _call_site}
    # Where the forward calls the site, what is put in its place is watched. A hook's layer is watched in each call.
    namespace |= {"__setattr__": __setattr__} if rewritten else {"__call__": __call__}
    cls = type(base)(base.__name__, (base,), namespace)
    setattr(cls, _FORWARD, cls.forward)  # transformers wraps the forward of a new class of layers
    return cls


def _steer_output(layer: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook: steer the hidden state that a layer returns, by itself or first in a tuple or list."""
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
    """Whether a forward on the instance is that of accelerate's hooks, around the class's own, which they keep."""
    kept = vars(layer).get("_old_forward")
    return hasattr(layer, "_hf_hook") and isinstance(kept, MethodType) and kept.__func__ is type(layer).forward


def _change_class(layer: nn.Module, cls: type[nn.Module]) -> None:
    """Also for the forward that accelerate keeps on the instance, where there is one."""
    old = type(layer).forward
    layer.__class__ = cls
    for name in ("forward", "_old_forward"):
        kept = vars(layer).get(name)
        if isinstance(kept, MethodType) and kept.__func__ is old:
            setattr(layer, name, MethodType(cls.forward, layer))


class PatchedLayer:
    """One decoder layer with its steering site: how it was reached, and the way back."""

    def __init__(
        self, layer: nn.Module, index: int, path: str, make_site: Callable[[], SteeringSite] = SteeringSite
    ) -> None:
        """Patch `layer`. On an error it is left as it was."""
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
        _change_class(layer, cls)
        layer.add_module(SITE, site)
        site.patched = self
        if self.reason:
            # First of the hooks, so that those which record hidden states record the steered one.
            self._hook = layer.register_forward_hook(_steer_output, prepend=True)

    @property
    def kind(self) -> str:
        return "hook" if self.reason else "fused"

    @property
    def site(self) -> SteeringSite:
        return self.layer.get_submodule(SITE)  # type: ignore[return-value]

    def watch(self) -> None:
        """Have another forward watched that came past the layer's `__setattr__`: on its class, or in its `__dict__`."""
        if self.reason:
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
        if type(self.layer) is not steered_class(self.base, not self.reason):
            raise RuntimeError(
                f"layer {self.index} is now a {type(self.layer).__qualname__} that another library made; expected it "
                "as patch_model left it (undo the other first)"
            )

    def remove(self) -> None:
        """Take the site out again; the layer is what it was."""
        if self._hook is not None:
            self._hook.remove()
        delattr(self.layer, SITE)
        own = vars(self.layer)
        if _is_watched(own.get("forward")):
            put = own.pop("forward").args[1]
            if put is not None:
                own["forward"] = put  # what was put there is left there
        _change_class(self.layer, self.base)


def patch_layers(
    layers: Mapping[int, nn.Module], layout: Layout, make_site: Callable[[], SteeringSite] = SteeringSite
) -> dict[int, PatchedLayer]:
    """Give decoder layers, by index, a site each; all of them or none.

    Raises:
        ValueError: a layer has a site already.
    """
    patched: dict[int, PatchedLayer] = {}
    try:
        for index, layer in layers.items():
            patched[index] = PatchedLayer(layer, index, layout.path(index), make_site)
    except BaseException:
        for one in patched.values():
            one.remove()
        raise
    return patched


def unpatch_layers(patched: Iterable[PatchedLayer]) -> None:
    """Take the sites out of layers; of all of them or of none.

    Raises:
        RuntimeError: another library has since changed a layer's class.
    """
    patched = list(patched)
    for one in patched:
        one.check_removable()
    for one in patched:
        one.remove()
