"""patch_model: model in, steered model out; and how a layer is reached and let go again.

A layer's class is replaced, for that one instance, by a subclass whose forward hands the last residual add to the
layer's steering site (see residual.py). Where no such add is found, a forward hook steers the finished hidden state:
the same numbers, one pass more, and the report says so.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.nn.modules.module import _global_backward_hooks as any_backward_hook
from torch.nn.modules.module import _global_backward_pre_hooks as any_backward_pre_hook
from torch.nn.modules.module import _global_forward_hooks as any_forward_hook
from torch.nn.modules.module import _global_forward_pre_hooks as any_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from ._requirements import CORE, warn_untried
from .residual import ResidualNotFound, rewrite_forward
from .sites import SteeringSite
from .watch import call_watched, thread

#: The site's name in its layer, and so part of every parameter's path.
SITE = "post_block"


@dataclass(frozen=True)
class Decoder:
    """A model's stack of decoder layers: where it is, and what an adapter has to fit."""

    module: nn.Module  # whose forward runs the layers
    path: str  # of the list of layers, from the model
    layers: nn.ModuleList
    hidden: int


def find_decoder(model: nn.Module) -> Decoder:
    """The decoder layers of `model`, found by structure: the outermost list of `num_hidden_layers` modules.

    The modules have parts of their own, and no config of another class than the model's stands above them.

    Raises:
        TypeError: `model` is no module.
        ValueError: the model has no config, no such list, more than one, or also an encoder.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module with decoder layers")
    name = type(model).__name__
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder model; expected a decoder-only one")
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    hidden, count = (getattr(config, key, None) for key in ("hidden_size", "num_hidden_layers"))
    if not isinstance(hidden, int) or not isinstance(count, int):
        raise ValueError(f"{name} has no config with hidden_size and num_hidden_layers; expected a decoder model's")
    found: list[tuple[str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{outer}.") for outer, _ in found):
            found.append((path, module))
    # Other towers (of images, of sound) have lists of layers too, below a config of their own.
    own = {id(layers) for path, layers in found if _config_above(model, path) in (type(model.config), type(config))}
    # Layers have parts: a list of norms or projections, one for each layer, is none of layers.
    fitting = [
        (path, layers)
        for path, layers in found
        if len(layers) == count and id(layers) in own and all(any(layer.children()) for layer in layers)
    ]
    if len(fitting) > 1 and hasattr(model, "get_decoder"):
        inside = {id(module) for module in model.get_decoder().modules()}
        fitting = [(path, layers) for path, layers in fitting if id(layers) in inside]
    if len(fitting) != 1:
        lists = [
            f"{path} of {len(layers)}"
            + ("" if id(layers) in own else f" under a {_config_above(model, path).__name__}")
            for path, layers in found
        ]
        raise ValueError(
            f"{name} has no decoder layers that can be told apart; expected one list of {count} modules, "
            f"found {', '.join(lists) or 'none'}"
        )
    path, layers = fitting[0]
    return Decoder(model.get_submodule(path.rpartition(".")[0]), path, layers, hidden)


def execution_device(module: nn.Module) -> torch.device:
    """Where a module runs, and a layer's steering parameters belong: what accelerate offloads is on meta in between."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    if device.type != "meta":
        return device
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):  # several of them in a row are one
            if getattr(one, "execution_device", None) is not None:
                return torch.device(one.execution_device)
    return device


def inside_peft(model: nn.Module) -> nn.Module:
    """The model that PEFT wrapped, whose paths do not depend on the wrapping; `model` itself where it did not."""
    peft = sys.modules.get("peft")  # a model that it wrapped has imported it
    return model.get_base_model() if peft is not None and isinstance(model, peft.PeftModel) else model


def _config_above(model: nn.Module, path: str) -> type:
    """The class of the config that the innermost module above `path` has: of the tower to which `path` belongs."""
    while path:
        path = path.rpartition(".")[0]
        config = getattr(model.get_submodule(path), "config", None)
        if config is not None:
            return type(config)
    return type(model.config)


#: The name under which a rewritten forward calls the layer's site.
_CALL = "call_post_block"
#: The name under which a patched layer's class keeps the rewritten forward, whatever becomes of `forward`.
_FORWARD = "forward_of_patch"


def _call_site(layer: nn.Module, left: Tensor, right: Tensor, entering: Any) -> Tensor:
    """`layer.post_block(left, right, entering)`, past nn.Module's `__call__` where nobody hooked the site."""
    site: Any = layer._modules[SITE]
    if is_dynamo_compiling():
        return site(left, right, entering=entering)
    noted = site.__dict__  # past nn.Module's attributes, which take long to look up
    if noted["_forward_hooks"] or noted["_forward_pre_hooks"]:
        return site(left, right, entering=entering)
    if noted["_backward_hooks"] or noted["_backward_pre_hooks"]:
        return site(left, right, entering=entering)
    if any_forward_hook or any_forward_pre_hook or any_backward_hook or any_backward_pre_hook:
        return site(left, right, entering=entering)
    planned = noted["_planned"]
    if planned is not None and thread.quiet:
        # What `steer` comes to where a plan is for this call (never for tensors without values, as torch.export has),
        # without its function calls.
        op, parameters = planned
        out = (op.last_trained if is_grad_enabled() else op.last)(left, right, parameters())
        if out is not None:
            noted["calls"] += 1
            noted["backend"] = "triton"
            return out
    if is_compiling():
        return site(left, right, entering=entering)
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


def patch_model(
    model: nn.Module,
    config: Any = None,
    *,
    adapter_name: str = "default",
    check_base: bool = True,
) -> Any:
    """Steer `model` after its decoder blocks, in place (arXiv 2603.00425, §3). Its own parameters are frozen; adapters
    that PEFT added, such as LoRA, are left as they are: those that train go on training beside the steering (§5.2).

    Afterwards `model.steering` (a `Steering`) names, switches, saves and loads adapters, and takes all of it back.

    Args:
        model: a decoder-only language model, such as one from transformers, or one that PEFT has wrapped or adapted.
        config: a SteerConfig for a fresh adapter, which changes nothing until it is trained; None is SteerConfig();
            or a saved adapter: its directory, or its id on the hub.
        adapter_name: what the adapter is called.
        check_base: refuse a saved adapter whose base model has another name. Its sizes must fit in any case.

    Returns:
        The same object.

    Raises:
        ValueError: the model is patched already, has no decoder layers, or the config or adapter does not fit it.
        TypeError: `model` or `config` is of a wrong type.
        FileNotFoundError: there is no such adapter.
    """
    from .config import SteerConfig
    from .steering import Steering

    if isinstance(getattr(model, "steering", None), Steering):
        raise ValueError("the model is patched already; expected an unpatched one (model.steering.add adds an adapter)")
    if hasattr(model, "steering"):
        raise ValueError(f"{type(model).__name__} has an attribute 'steering' of its own; expected none")
    peft = sys.modules.get("fused_steer.peft")
    if peft is not None and isinstance(model, nn.Module) and peft.is_steered(model):
        raise ValueError(
            "the model is steered by PEFT already, as from_pretrained does with the adapter beside a model; expected "
            "one that is not (fused_steer.peft.unload(model) takes it out)"
        )
    warn_untried(*CORE)
    steering = Steering(model)
    if config is None:
        config = SteerConfig()
    if isinstance(config, SteerConfig):
        steering.add(adapter_name, config)
    elif isinstance(config, (str, os.PathLike)):
        steering.load(config, name=adapter_name, check_base=check_base)
    else:
        raise TypeError(
            f"config is a {type(config).__name__}; expected a SteerConfig, or the path or hub id of an adapter"
        )
    steering.attach()
    steering.use(adapter_name)
    return model
