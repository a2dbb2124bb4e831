"""Find the LoRA modules and parameters that PEFT put into a model, and switch between LoRA and steering."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor, nn

from ..positions import shown

if TYPE_CHECKING:

    class LoraLayer(nn.Module):
        """The attributes of PEFT's LoraLayer that are used here. PEFT need not be installed."""

        active_adapters: list[str]
        adapter_layer_names: tuple[str, ...]
        base_layer: nn.Module
        disable_adapters: bool
        lora_A: dict[str, Any]  # a module for each adapter; AdaLoRA has a parameter instead
        lora_B: dict[str, Any]
        lora_E: dict[str, Tensor]  # AdaLoRA's singular values
        lora_variant: dict[str, Any]
        scaling: dict[str, float]

        def enable_adapters(self, enabled: bool) -> None: ...


def is_lora(module: nn.Module) -> TypeGuard[LoraLayer]:
    """Return whether a module carries a LoRA from PEFT."""
    peft = sys.modules.get("peft.tuners.lora")  # a model with a LoRA has imported peft.tuners.lora
    return peft is not None and isinstance(module, peft.LoraLayer)


def columns_of(lora: LoraLayer) -> list[Tensor]:
    """Return LoRA's B (d, k) of each active adapter in a LoRA layer, and its bias (d, 1) if it has one."""
    found = []
    for name in lora.active_adapters:
        if name in lora.lora_B:
            b = lora.lora_B[name]
            found.append(b if isinstance(b, Tensor) else b.weight)
            if getattr(b, "bias", None) is not None:
                found.append(b.bias.unsqueeze(1))
    return found


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return the modules of `model` that carry a LoRA, by path."""
    return {path: module for path, module in model.named_modules() if is_lora(module)}


def saved_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that PEFT trains beside its adapters (`modules_to_save`), such as a classifier's head."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    return [] if peft is None else [m for m in model.modules() if isinstance(m, peft.AuxiliaryTrainingWrapper)]


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of all PEFT adapters in `model`, active or not, and of their `modules_to_save`."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    if peft is None:
        return []
    tuners = [module for module in model.modules() if isinstance(module, peft.BaseTunerLayer)] + saved_modules(model)
    parts = (getattr(tuner, name, None) for tuner in tuners for name in tuner.adapter_layer_names)
    found: dict[int, nn.Parameter] = {}
    for part in parts:
        parameters = part.parameters() if isinstance(part, nn.Module) else ()
        found.update((id(parameter), parameter) for parameter in parameters)
    return list(found.values())


#: The modes of a model with LoRA and steering: both compute, or one of them.
MODES = ("both", "lora", "steering")


@contextlib.contextmanager
def computing_by(
    mode: str,
    model: nn.Module,
    open_scope: Callable[[str, contextlib.ExitStack], contextlib.AbstractContextManager[None]],
    disable_steering: Callable[[str], contextlib.AbstractContextManager[None]],
) -> Iterator[None]:
    """Let LoRA, steering or both compute, according to `mode`. The model is restored on exit, also after an exception.

    Args:
        open_scope: opens a scope of this name, and closes the stack at its end.
        disable_steering: returns a context without steering. Its argument names the caller for error messages.

    Raises:
        ValueError: an unknown mode, or the model carries no LoRA.
        RuntimeError: see `Scopes.open`.
    """
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(f"mode is {shown(mode)}; expected one of {', '.join(map(repr, MODES))}")
    layers = list(lora_layers(model).values())
    if not layers:
        raise ValueError(f"mode is {mode!r} but {type(model).__name__} carries no LoRA; expected one from PEFT")
    name = f"steering.mode({mode!r})"
    undo = contextlib.ExitStack()
    with disable_steering(name) if mode == "lora" else open_scope(name, undo):
        if mode == "steering":
            enabled = [layer for layer in layers if not layer.disable_adapters]
            # PEFT changes requires_grad when it disables a layer.
            for parameter in (parameter for layer in enabled for parameter in layer.parameters()):
                undo.callback(parameter.requires_grad_, parameter.requires_grad)
            for layer in enabled:
                undo.callback(layer.enable_adapters, True)
                layer.enable_adapters(False)
        yield
