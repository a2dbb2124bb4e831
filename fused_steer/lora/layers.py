"""The LoRA modules and parameters that PEFT put into a model."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor, nn

from ..model.scopes import Scopes

if TYPE_CHECKING:

    class LoraLayer(nn.Module):
        """What is used here of PEFT's class of that name, which need not be installed."""

        active_adapters: list[str]
        adapter_layer_names: tuple[str, ...]
        base_layer: nn.Module
        disable_adapters: bool
        lora_A: dict[str, Any]  # a module by adapter; in AdaLoRA the parameter itself
        lora_B: dict[str, Any]
        lora_E: dict[str, Tensor]  # AdaLoRA's singular values
        lora_variant: dict[str, Any]
        scaling: dict[str, float]

        def enable_adapters(self, enabled: bool) -> None: ...


def is_lora(module: nn.Module) -> TypeGuard[LoraLayer]:
    """Whether PEFT put a LoRA here."""
    peft = sys.modules.get("peft.tuners.lora")  # a model that carries a LoRA has imported it
    return peft is not None and isinstance(module, peft.LoraLayer)


def columns_of(lora: LoraLayer) -> list[Tensor]:
    """B (d, k) and, where there is one, the bias (d, 1) of each active adapter of a LoRA layer."""
    found = []
    for name in lora.active_adapters:
        if name in lora.lora_B:
            b = lora.lora_B[name]
            found.append(b if isinstance(b, Tensor) else b.weight)
            if getattr(b, "bias", None) is not None:
                found.append(b.bias.unsqueeze(1))
    return found


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The modules of `model` that carry a LoRA, by path."""
    return {path: module for path, module in model.named_modules() if is_lora(module)}


def saved_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that PEFT trains and saves beside its adapters (`modules_to_save`), such as a classifier's head."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    return [] if peft is None else [m for m in model.modules() if isinstance(m, peft.AuxiliaryTrainingWrapper)]


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all of PEFT's adapters in `model`, of any method, active or not, and of the heads beside them
    (`modules_to_save`)."""
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


#: What a model with LoRA and steering computes by: both, or one of the two.
MODES = ("both", "lora", "steering")


@contextlib.contextmanager
def computing_by(
    mode: str,
    model: nn.Module,
    scopes: Scopes,
    disable_steering: Callable[[str], contextlib.AbstractContextManager[None]],
) -> Iterator[None]:
    """Inside, a steered model with LoRA computes by `mode`. Afterwards, also after an exception, all is as it was.

    Args:
        scopes: of the model.
        disable_steering: a context without steering; it is told what disables it.

    Raises:
        ValueError: an unknown mode, or the model carries no LoRA.
        RuntimeError: see `Scopes.open`.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; expected one of {', '.join(map(repr, MODES))}")
    layers = list(lora_layers(model).values())
    if not layers:
        raise ValueError(f"mode is {mode!r} but {type(model).__name__} carries no LoRA; expected one from PEFT")
    name = f"steering.mode({mode!r})"
    undo = contextlib.ExitStack()
    with disable_steering(name) if mode == "lora" else scopes.open(name, undo.close):
        if mode == "steering":
            enabled = [layer for layer in layers if not layer.disable_adapters]
            # PEFT switches requires_grad along with a layer.
            for parameter in (parameter for layer in enabled for parameter in layer.parameters()):
                undo.callback(parameter.requires_grad_, parameter.requires_grad)
            for layer in enabled:
                undo.callback(layer.enable_adapters, True)
                layer.enable_adapters(False)
        yield
