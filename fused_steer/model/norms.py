"""Fuses the RMSNorm that reads a steered layer's output into the steering: `patch_model(..., fuse_norm=True)`.

Which norm that is, and of what kind, `following.py` finds.

A linked site computes the norm beside its own output, and hands both over in its thread. The norm takes what was
handed over only if its input is that very tensor, unchanged. For any other input it computes by the fused norm kernel.
Thus a wrong guess about the structure, a dropped layer or an early exit costs time and changes no number. Where the
steering is disabled, the norm is the model's own.
"""

from __future__ import annotations

import copy
import functools
import sys
import weakref
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..adapters.parameters import without_wrappers
from ..kernels.derivatives import is_transformed
from ..kernels.norm import rms_norm
from ..kernels.norm_torch import Norm
from ..kernels.registered import is_described
from .decoder import Decoder
from .following import Kind, NotFused, following_norm, measure
from .layer import PatchedLayer
from .residual import cached
from .site import SteeringSite
from .watch import thread
from .weak import Weakly, what_is_left

#: The attribute of a norm that keeps its `Link`.
_LINK = "link_of_patch"

# -------------------------------------------------------------------------------------------------------------- links


class Graph:
    """The state of a compilation of the whole decoder, which torch.compile traces like any Python object.

    Attributes:
        open: whether the decoder is being traced. A layer that is compiled alone hands nothing over.
        handed: the link, `out` and `normed` of the latest site.
    """

    def __init__(self) -> None:
        self.open = False
        self.handed: tuple[Link, Tensor, Tensor] | None = None

    def begin(self) -> None:
        self.open, self.handed = True, None

    def end(self) -> None:
        self.open, self.handed = False, None


@torch._dynamo.allow_in_graph
def _taken(
    x: Tensor, out: Tensor, normed: Tensor, weight: Tensor | None, eps: float, plus_one: bool, rounds_first: bool
) -> Tensor:
    """Return `normed` if x is `out`, unchanged, else the norm of x.

    It is decided when the graph is traced: an `out` that was changed in place has another version.
    """
    if x is out and x._version == 0:
        return normed.view_as(normed)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        factor = weight.to(wide.dtype) + 1 if plus_one else weight.to(wide.dtype)
        unit = (unit.to(x.dtype).to(wide.dtype) if rounds_first else unit) * factor
    return unit.to(x.dtype)


class Link:
    """One norm and the sites that compute it.

    Attributes:
        sites: the sites before the norm.
        hooks: the hooks of the modules that make, pass on and read the hidden state between a site and the norm.
        taken: how many results it took over since the last reset.
        reason: why the last call of a site did not compute the norm, or "".
    """

    _decoder = Weakly[nn.Module]()

    def __init__(self, norm: nn.Module, kind: Kind, decoder: nn.Module) -> None:
        self.norm, self.kind, self._decoder = norm, kind, decoder
        self.base = type(norm)
        self.sites: list[SteeringSite] = []
        self.hooks: list[Mapping[int, Any]] = [norm._forward_pre_hooks, norm._forward_hooks]
        self.taken = 0
        self.reason = ""
        self.graph = Graph()
        self._owner, _, self._leaf = (kind.weight or "").rpartition(".")
        # What its forward may read beside the weight: its eps, whatever the name. None is nn.RMSNorm's default.
        numbers = (float, type(None))
        self._numbers = tuple(one for one in vars(norm).items() if one[0][0] != "_" and type(one[1]) in numbers)
        self._latest = kind.norm(None)  # the norm of the last call, made again only for another weight

    def __deepcopy__(self, memo: dict[int, Any]) -> Link | None:
        """Return the link of a copied model. The copy of a norm or a layer alone has none, and is not fused."""
        if id(what_is_left(self, "_decoder")) not in memo:
            return None
        copied = memo[id(self)] = Link.__new__(Link)
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def attach(self) -> None:
        self.norm.__dict__[_LINK] = self
        self.norm.__class__ = fused_class(self.base)

    def detach(self) -> None:
        """Make the norm what it was. It can be called again."""
        if type(self.norm) is fused_class(self.base):
            self.norm.__class__ = self.base
        self.norm.__dict__.pop(_LINK, None)

    @property
    def steers(self) -> bool:
        """Whether steering is on before the norm. Where it is off, the norm is the model's own."""
        return any(site.enabled and (site.active is not None or site.rows is not None) for site in self.sites)

    def weight_of(self, norm: nn.Module) -> Tensor | None:
        """Return the weight of the norm, or None if its kind has none."""
        if not self._leaf:
            return None
        owner = norm.get_submodule(self._owner) if self._owner else norm
        # Past nn.Module's attributes, because every layer asks for it twice in a pass.
        named = owner.__dict__["_parameters"]
        if self._leaf in named:
            return named[self._leaf]
        # FSDP1 puts a tensor in the parameter's place for a pass. A parametrized or pruned weight is computed.
        return getattr(owner, self._leaf)

    def _has_other_numbers(self, norm: nn.Module) -> bool:
        own = norm.__dict__
        for name, value in self._numbers:
            if own.get(name) != value:
                return True
        return False

    def norm_for(self, x: Tensor, norm: nn.Module) -> Norm | None:
        """Return the norm to be computed for x, or None with `reason` set."""
        if self._has_other_numbers(norm):
            self.reason = f"the eps of its {self.base.__name__} was changed since"
            return None
        weight = self.weight_of(norm)
        if weight is not None:
            if not _has_values(weight) or weight.device != x.device:
                self.reason = f"the norm's weight is not whole on {x.device} when the layer ends (offloaded or sharded)"
                return None
            if weight.dtype != x.dtype and self.kind.rounds_first or weight.dtype == torch.float64 != x.dtype:
                self.reason = f"the norm's weight is {weight.dtype}, and the hidden state {x.dtype}"
                return None
        if self._latest.weight is not weight:
            self._latest = self.kind.norm(weight)
        return self._latest

    def norm_of_site(self, residual: Tensor, branch: Tensor | None) -> Norm | None:
        """Return the norm that a site is to compute, or None with `reason` set."""
        if "forward" in self.norm.__dict__ or type(self.norm) is not fused_class(self.base):
            self.reason = f"the {self.base.__name__} was replaced since"
        elif torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            self.reason = "saved tensors are hooked, as gradient checkpointing does"
        elif torch.is_inference_mode_enabled():
            self.reason = "changes in place of inference tensors cannot be seen; torch.no_grad() fuses"
        elif is_described(residual) or is_transformed():
            self.reason = "the call is recorded or transformed"
        elif branch is not None and branch.dtype != residual.dtype:
            self.reason = "residual and branch have two dtypes"
        elif any(self.hooks) and torch.is_grad_enabled() and any(map(_some_may_keep, self.hooks)):
            self.reason = "a hook on the layer or the norm may keep the hidden state, whose gradient has to be whole"
        else:
            norm = self.norm_for(residual, self.norm)
            if norm is not None:
                self.reason = ""
            return norm
        return None

    def norm_in_graph(self, residual: Tensor, branch: Tensor | None) -> Norm | None:
        """Return the norm that a site computes in a graph of the whole decoder, or None."""
        if not self.graph.open or "forward" in self.norm.__dict__ or is_transformed():
            return None
        if self._has_other_numbers(self.norm):
            return None
        if branch is not None and branch.dtype != residual.dtype:
            return None
        weight = self.weight_of(self.norm)
        if weight is not None:
            if type(weight) not in (Tensor, nn.Parameter):  # sharded (DTensor), until its own layer runs
                return None
            if weight.device != residual.device or weight.dtype != residual.dtype and self.kind.rounds_first:
                return None
        return self.kind.norm(weight)

    def hand_over_in_graph(self, out: Tensor, normed: Tensor) -> None:
        self.graph.handed = (self, out, normed)

    def run_in_graph(self, norm: nn.Module, x: Tensor) -> Tensor:
        handed, self.graph.handed = self.graph.handed, None
        if handed is None or handed[0] is not self:
            return self.base.forward(norm, x)
        weight = self.weight_of(norm)
        return _taken(x, handed[1], handed[2], weight, self.kind.eps, self.kind.plus_one, self.kind.rounds_first)

    def hand_over(self, out: Tensor, normed: Tensor, weight: Tensor | None) -> None:
        """Keep `normed` in this thread for the norm's next call. Only the latest is kept."""
        thread.handed = (self, weakref.ref(out), out._version, normed, weight)

    def take(self, norm: nn.Module, x: Tensor) -> Tensor | None:
        """Return what was handed over for x, or None."""
        handed, thread.handed = thread.handed, None
        if handed is None:
            return None
        link, of, version, normed, weight = handed
        if link is not self or of() is not x or x._version != version or self.weight_of(norm) is not weight:
            return None
        graded = x.requires_grad or (weight is not None and weight.requires_grad)
        if normed.requires_grad != (graded and torch.is_grad_enabled()):
            return None  # gradients were turned on or off since, or a checkpoint gave x its gradient
        if graded and (x.retains_grad or x._backward_hooks is not None):
            return None  # autograd passes the gradient of `normed` by x to the site, and these are to see it
        self.taken += 1
        return normed

    def run(self, norm: nn.Module, x: Tensor) -> Tensor:
        found = self.take(norm, x)
        if found is not None:
            return found
        own = not self.steers or not x.shape[-1:] or is_described(x) or is_transformed()
        kind = None if own else self.norm_for(x, norm)  # vmap's tensors have no memory that it could look at
        if kind is None:
            return self.base.forward(norm, x)
        return rms_norm(x, kind.weight, eps=kind.eps, plus_one=kind.plus_one, rounds_first=kind.rounds_first)


#: The module whose hook returns a pass's hidden states, and the variable with what the pass is to return.
_CAPTURING = "transformers.utils.output_capturing"


def _some_may_keep(hooks: Mapping[int, Any]) -> bool:
    """Return whether a hook may keep a hidden state in order to ask for its gradient."""
    return any(map(_may_keep, list(hooks.values())))


def _may_keep(hook: Any) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    of = getattr(hook, "__module__", None) or ""
    if of == _CAPTURING:  # transformers leaves it on the layer for good
        asked = getattr(sys.modules[of], "_active_collector", None)
        return asked is None or any("hidden_states" in name for name in asked.get() or ())
    return of.partition(".")[0] not in ("torch", "accelerate", "fused_steer")


def _has_values(weight: Tensor) -> bool:
    whole = weight.untyped_storage().nbytes() if type(weight) in (Tensor, nn.Parameter) and not weight.is_meta else 0
    return whole >= (weight.storage_offset() + weight.numel()) * weight.itemsize > 0


@cached
def fused_class(base: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of a norm's class for linked norms. It keeps the class's name."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        link = self.__dict__.get(_LINK)
        if link is None or len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            return base.forward(self, *args, **kwargs)
        return link.run_in_graph(self, args[0]) if is_compiling() else link.run(self, args[0])

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        return _rebuild, (base,), self.__getstate__()  # a class made at run time cannot be found by name

    def __setstate__(self: nn.Module, state: dict[str, Any]) -> None:
        base.__setstate__(self, state)
        if self.__dict__.get(_LINK) is None:  # a copy without the model: no patch would ever detach it
            self.__dict__.pop(_LINK, None)
            self.__class__ = base

    namespace = {
        "__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__,
        "forward": forward, "__reduce_ex__": __reduce_ex__, "__setstate__": __setstate__,
    }  # fmt: skip
    metaclass: Any = type(base)
    return metaclass(base.__name__, (base,), namespace)


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = fused_class(base)
    return cls.__new__(cls)


class Norms:
    """The linked norms of one model."""

    def __init__(self, decoder: Decoder, patched: Mapping[int, PatchedLayer]) -> None:
        self._decoder, self._patched = decoder, patched
        self._links: dict[int, Link] = {}  # by the norm's id
        self._reasons: dict[int, str] = {}  # by layer, why its norm is not linked
        self.graph = Graph()

    def link(self) -> None:
        """Link the norms behind the sites that the layers have now. It can be called again."""
        for index, patched in self._patched.items():
            site = _last_site(patched)
            if site is None or site.link is not None:
                continue
            try:
                if site.name not in ("post_mlp", "post_block"):
                    raise NotFused(f"the layer does not end at its site {site.name}")
                norm = following_norm(self._decoder, self._patched, index)
                link = self._links.get(id(norm))
                if link is None:
                    if isinstance(vars(norm).get(_LINK), Link):
                        raise NotFused("another patch has fused its norm")
                    link = Link(norm, measure(norm, self._decoder.hidden), self._decoder.module)
                    link.graph = self.graph
                    self._links[id(norm)] = link
                    link.attach()
                link.hooks.append(patched.layer._forward_hooks)
                if index + 1 < len(self._decoder.layers):
                    link.hooks.append(self._decoder.layers[index + 1]._forward_pre_hooks)
                link.sites.append(site)
                site.link = link
                self._reasons.pop(index, None)
            except NotFused as reason:
                self._reasons[index] = str(reason)

    def unlink(self, without: Collection[SteeringSite] = ()) -> None:
        """Make all norms what they were, but those behind the sites `without`. It can be called again."""
        for number, link in list(self._links.items()):
            for site in [site for site in link.sites if site not in without]:
                site.link = None
                link.sites.remove(site)
            if not link.sites:
                link.detach()
                del self._links[number]

    def state(self, index: int, site: Any) -> str:
        """Return how the norm behind a site is computed: "fused", "" if the site is not the last, or the reason."""
        if site is not _last_site(self._patched[index]):
            return ""
        if site.link is None:
            return self._reasons.get(index, "")
        return site.link.reason or self._replaced(index, site.link) or "fused"

    def _replaced(self, index: int, link: Link) -> str:
        """Return why a linked norm does not read its layer's output any more, or "" if it does."""
        try:
            norm = following_norm(self._decoder, self._patched, index)
        except NotFused as reason:
            return str(reason)
        if any(module is link.norm and not without_wrappers(path) for path, module in norm.named_modules()):
            return ""
        return f"another {type(norm).__name__} has taken the place of its {link.base.__name__} since"

    def taken(self, site: Any) -> int:
        return 0 if site.link is None else site.link.taken

    def reset(self) -> None:
        for link in self._links.values():
            link.taken, link.reason = 0, ""


def _last_site(patched: PatchedLayer) -> Any:
    """Return the last site of a layer, or None."""
    return next(reversed(list(patched.sites.values())), None)
