"""Find the linear layers of a decoder layer that take the shift of each site, by one pass of eight tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.parameters import SITE
from ..model.patched import PatchedModel
from ..model.residual import ResidualNotFound
from ..model.sublayers import find_in, parts_of
from ..model.trial import in_eval, run_trial
from .affine import Affine, in_float64

#: The dtypes of weights that are merged into. Others are quantised.
_WEIGHTS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class ShiftedLayer:
    """What the pass showed of a layer: its call, and for each site the shift and the linear layers that take it."""

    index: int
    layer: nn.Module
    shifts: dict[str, Affine] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)  # path of the sublayer, by site
    linears: dict[str, list[str]] = field(default_factory=dict)  # paths in the layer, by site
    call: tuple[tuple[Any, ...], dict[str, Any]] | None = None


def shifted_layers(patched: PatchedModel, name: str) -> list[ShiftedLayer]:
    """Return the layers that the adapter shifts, with the sublayer of each site."""
    layers: dict[int, ShiftedLayer] = {}
    for (index, site_name), site in patched.sites.items():
        if site.active != name:
            continue
        shift = Affine.of(site)
        if shift.is_zero:
            continue
        one = patched.layers[index]
        found = layers.setdefault(index, ShiftedLayer(index, one.layer))
        found.shifts[site_name] = shift
        try:
            # What the MLP returns is added last. Whether as it is, `check_in_float64` tells.
            sublayer = "post_mlp" if site_name == SITE else site_name
            modules = find_in(one.base, sublayer, parts_of(one.layer, one.base)).modules
        except ResidualNotFound as reason:
            raise ValueError(f"layer {index} ({one.base.__name__}) cannot be merged into: {reason}") from reason
        if len(modules) != 1:
            raise ValueError(
                f"layer {index} ({one.base.__name__}) has {len(modules)} modules at {site_name}, {', '.join(modules)}; "
                "expected one to merge into"
            )
        found.modules[site_name] = modules[0]
    return list(layers.values())


def run_once(patched: PatchedModel, layers: Sequence[ShiftedLayer]) -> None:
    """Run the model on eight tokens, and keep the calls of the layers."""
    handles = [
        layer.layer.register_forward_pre_hook(_keeps_call(layer), with_kwargs=True, prepend=True) for layer in layers
    ]
    try:
        with torch.no_grad():
            run_trial(patched.decoder.model, range(1, 9), "where the adapter can be merged")
    finally:
        for handle in handles:
            handle.remove()
    for layer in layers:
        if layer.call is None:
            raise ValueError(
                f"layer {layer.index} ({type(layer.layer).__name__}) did not run; expected every steered layer to"
            )


def _keeps_call(found: ShiftedLayer) -> Callable[..., None]:
    def hook(layer: nn.Module, args: Any, kwargs: Any) -> None:
        found.call = args, kwargs

    return hook


def shared_modules(model: nn.Module) -> set[nn.Module]:
    """Return the modules that are at several places of a model, or whose weight is another's, too."""
    places: dict[int, list[nn.Module]] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if weight is not None:
            places.setdefault(id(weight), []).append(module)
    return {module for modules in places.values() if len(modules) > 1 for module in modules}


def find_linears(found: ShiftedLayer, shared: set[nn.Module]) -> None:
    """Find the linear layers that take the shift of each site, by the layer's call."""
    args, kwargs = found.call  # type: ignore[misc]
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    handles = []
    for path in dict.fromkeys(found.modules.values()):
        for name, module in found.layer.get_submodule(path).named_modules(prefix=path):
            handles.append(module.register_forward_hook(_keeps_tensors(seen, name), with_kwargs=True))
    try:
        with torch.no_grad(), in_eval(found.layer):
            found.layer(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for site, path in found.modules.items():
        which = int(site != "pre_mlp")
        given = seen.get(path, ([], []))[which]
        there = f"layer {found.index} ({type(found.layer).__name__}): {path}"
        if len(given) != 1:
            raise ValueError(f"{there} ran {len(given)} times in a pass; expected once, to be merged into")
        linears = [
            name
            for name, tensors in seen.items()
            if (name == path or name.startswith(f"{path}.")) and any(_same(t, given[0]) for t in tensors[which])
            if _is_linear(found.layer.get_submodule(name))
        ]
        if not linears or which and len(linears) > 1:
            what = "returns the output of" if which else "gives its input to"
            raise ValueError(
                f"{there} {what} {len(linears) or 'no'} plain linear layers; expected one that {site} fits"
            )
        for name in linears:
            module = found.layer.get_submodule(name)
            _check_linear(module, f"layer {found.index} ({type(found.layer).__name__}): {name}", module in shared)
        found.linears[site] = linears


def _keeps_tensors(seen: dict[str, tuple[list[Tensor], list[Tensor]]], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        inputs, outputs = seen.setdefault(name, ([], []))
        given = args[0] if args else next(iter(kwargs.values()), None)
        for value, kept in ((given, inputs), (output, outputs)):
            value = value[0] if isinstance(value, (tuple, list)) and value else value
            if isinstance(value, Tensor):
                kept.append(value)

    return hook


def _same(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and a.shape[-1:] == b.shape[-1:] and torch.equal(a.reshape(b.shape), b)


def _is_linear(module: nn.Module) -> bool:
    """Whether it computes x Wᵀ + b, or x W + b as transformers' Conv1D. Of a subclass, `check_in_float64` tells."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _check_linear(module: nn.Module, there: str, shared: bool) -> None:
    """Refuse a linear layer whose weight cannot be written."""
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.is_meta or weight.dtype not in _WEIGHTS:
        kind = "computed" if weight is None else f"a {type(weight).__name__} of {weight.dtype} on {weight.device}"
        raise ValueError(
            f"{there} has a weight that is {kind}; expected a whole one in float32, bfloat16 or float16 (not "
            "quantised, offloaded, parametrized or sharded), to be merged into"
        )
    if shared:
        raise ValueError(f"{there} has a weight that several modules share; expected one of its own, to be merged into")


def values_of(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Return W (out, in) and b (out,) in float64."""
    weight: Tensor = in_float64(module.weight.detach())  # type: ignore[operator]
    weight = weight.T if is_transposed(module) else weight
    bias = module._parameters.get("bias")
    return weight, weight.new_zeros(weight.shape[0]) if bias is None else in_float64(bias.detach())


def shifted_values(found: ShiftedLayer, layer: nn.Module, factor: float = 1.0) -> dict[str, tuple[Tensor, Tensor]]:
    """Return W (out, in) and b (out,) in float64 of the linear layers with the shifts merged, times `factor`."""
    values: dict[str, tuple[Tensor, Tensor]] = {}
    for site, paths in found.linears.items():  # in the order in which the layer computes
        for path in paths:
            weight, bias = values.get(path) or values_of(layer.get_submodule(path))
            shift = found.shifts[site].times(factor)
            values[path] = (shift.of_input if site == "pre_mlp" else shift.of_output)(weight, bias)
    return values
