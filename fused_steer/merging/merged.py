"""The weights of a merged model: computed in float64, rounded, and written all or none."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .affine import in_float64
from .layers import ShiftedLayer, is_transposed, shifted_values, values_of

#: From this share of the merged shift on, what rounding to the weights' dtype changes is warned of.
_ROUNDING = 0.1


@dataclass
class Merged:
    """The weights of a merged model, not yet in it.

    Attributes:
        weights: W in the model's dtype, by linear layer.
        biases: b, for the linear layers that have or get one.
        options: the config's options that give linear layers a bias, which become True.
        rounding: the share of the weights' shift that rounding to their dtype changes; the largest of all layers.
    """

    config: Any
    weights: dict[Any, Tensor] = field(default_factory=dict)
    biases: dict[Any, Tensor] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    rounding: float = 0.0

    @contextlib.contextmanager
    def written(self) -> Iterator[None]:
        """Write the weights into the model, which is unpatched inside. An exception there takes them out again."""
        undo: list[Callable[[], None]] = []
        new: list[Any] = []
        try:
            for option in self.options:
                undo.append(_setting(self.config, option, getattr(self.config, option)))
                setattr(self.config, option, True)
            for module, weight in self.weights.items():
                undo.append(_setting(module.weight, "data", module.weight.data))
                module.weight.data = weight
            for module, bias in self.biases.items():
                there = module._parameters.get("bias")
                if there is None:
                    undo.append(_setting(module, "bias", None))
                    module.bias = nn.Parameter(bias)
                    new.append(module)
                else:
                    undo.append(_setting(there, "data", there.data))
                    there.data = bias
            yield
            for module in new:  # the others train, or not, as before `patch_model`
                module.bias.requires_grad_(module.weight.requires_grad)
        except BaseException:
            for step in reversed(undo):
                step()
            raise


def _setting(target: Any, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(target, name, value)


@torch.no_grad()
def add_values(found: ShiftedLayer, merged: Merged) -> None:
    """Add the layer's new values to `merged`, in the dtypes of its weights."""
    for path, (weight, bias) in shifted_values(found, found.layer).items():
        module = found.layer.get_submodule(path)
        old, old_bias = values_of(module)
        held: Any = module.weight
        held_bias: Any = module._parameters.get("bias")
        rounded, rounded_bias = weight.to(held), bias.to(held if held_bias is None else held_bias)
        if not (rounded.isfinite().all() and rounded_bias.isfinite().all()):
            raise ValueError(
                f"layer {found.index}: {path} would have weights beyond {held.dtype}; expected a smaller strength, or "
                "a model in float32"
            )
        moved = weight - old, bias - old_bias
        lost = in_float64(rounded) - weight, in_float64(rounded_bias) - bias
        if _size(moved):
            merged.rounding = max(merged.rounding, _size(lost) / _size(moved))
        if moved[0].any():
            merged.weights[module] = (rounded.T if is_transposed(module) else rounded).contiguous()
        if moved[1].any():
            merged.biases[module] = rounded_bias


def _size(values: tuple[Tensor, Tensor]) -> float:
    return float(sum(t.square().sum() for t in values)) ** 0.5


def warn_of_rounding(merged: Merged) -> None:
    """Warn if rounding to the weights' dtype changes much of the shift."""
    if merged.rounding > _ROUNDING:
        warnings.warn(
            f"rounding the merged weights to their dtype changes the adapter's shift of them by {merged.rounding:.0%}; "
            "expected a model in float32 to be merged into, or the adapter to be kept",
            stacklevel=5,
        )
