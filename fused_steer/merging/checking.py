"""Check a merged layer against one that hooks steer, in float64."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.parameters import SITE
from ..model.site import SteeringSite
from .affine import Affine, in_float64
from .layers import ShiftedLayer, is_transposed, shifted_values

#: The largest error of a merged layer in float64, as a share of the shift.
_TOLERANCE = 1e-4


def check_in_float64(found: ShiftedLayer) -> None:
    """Refuse a layer that computes something else merged than steered, in float64 on the inputs of the pass."""
    there = f"layer {found.index} ({type(found.layer).__name__})"
    try:
        error = _error_in_float64(found)
    except Exception as reason:
        told = " ".join(str(reason).split())[:200]
        raise ValueError(
            f"{there} failed in float64 ({type(reason).__name__}: {told}); expected a pass that shows whether the "
            "adapter can be merged there"
        ) from reason
    if not error <= _TOLERANCE:
        linears = ", ".join(path for paths in found.linears.values() for path in paths)
        raise ValueError(
            f"{there} computes something else with the adapter merged at {', '.join(found.shifts)} (error {error:.1g} "
            f"of the shift), because not only {linears} makes or reads what is steered; expected the adapter to be kept"
        )


@torch.no_grad()
def _error_in_float64(found: ShiftedLayer) -> float:
    """Return how far a copy of the layer, merged, is from one steered by hooks, as a share of the shift."""
    layer = copy.deepcopy(found.layer)._apply(_exactly).eval()
    for module in layer.modules():
        if isinstance(module, SteeringSite):
            module.use(None, "identity", 1.0)
        config: Any = getattr(module, "config", None)  # a copy, as the layer: fused kernels have no float64
        if getattr(config, "_attn_implementation", "eager") not in ("eager", "sdpa"):
            config._attn_implementation = "sdpa"
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"
    args, kwargs = _doubled(found.call)
    factor = 1.0
    # Of a small shift the layer's own rounding would hide an error. So the shift is scaled to the size of h.
    ratios: list[float] = []
    with _steered_by_hooks(found, layer, 1.0, ratios):
        layer(*args, **kwargs)
    ratios = [ratio for ratio in ratios if 0 < ratio < math.inf]  # a sublayer of zeros, as of a new block, has none
    if ratios:
        factor = 1.0 / max(ratios)
    base = _hidden(layer(*args, **kwargs))
    with _steered_by_hooks(found, layer, factor, []):
        steered = _hidden(layer(*args, **kwargs))
    for path, (weight, bias) in shifted_values(found, layer, factor).items():
        module = layer.get_submodule(path)
        module.weight = nn.Parameter(weight.T if is_transposed(module) else weight)
        module.bias = nn.Parameter(bias)
    error, shift = (_hidden(layer(*args, **kwargs)) - steered).norm(), (steered - base).norm()
    return float(error / shift) if error else 0.0  # both are 0 where zeros hide the shift


@contextlib.contextmanager
def _steered_by_hooks(found: ShiftedLayer, layer: nn.Module, factor: float, ratios: list[float]) -> Iterator[None]:
    """Steer a layer by PyTorch's hooks, the shifts times `factor`. Their sizes over that of h go to `ratios`."""
    handles = []

    def shifted(value: Any, shift: Affine) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)((shifted(value[0], shift), *value[1:]))
        moved = shift.of_states(value)
        ratios.append(float(moved.norm() / value.norm()))
        return value + moved

    def before(shift: Affine) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if args:
                return (shifted(args[0], shift), *args[1:]), kwargs
            name, value = next(iter(kwargs.items()))
            return args, {**kwargs, name: shifted(value, shift)}

        return hook

    for site, shift in found.shifts.items():
        shift = shift.times(factor)
        module = layer if site == SITE else layer.get_submodule(found.modules[site])
        if site == "pre_mlp":
            handles.append(module.register_forward_pre_hook(before(shift), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(lambda _, args, output, s=shift: shifted(output, s)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _exactly(tensor: Tensor) -> Tensor:
    exact = in_float64(tensor)
    return exact if tensor.is_floating_point() else tensor.to(exact.device)


def _doubled(value: Any) -> Any:
    """Return a copy with the floating tensors of tuples, lists and dicts in float64."""
    if isinstance(value, Tensor):
        return _exactly(value)
    if type(value) in (tuple, list):
        return type(value)(map(_doubled, value))
    return {k: _doubled(v) for k, v in value.items()} if type(value) is dict else value


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output
