"""Biases that a merged model needs and its class gives only by an option of its config, such as Llama's `mlp_bias`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .layers import is_transposed
from .merged import Merged


def text_config(config: Any) -> Any:
    """Return the config of the decoder, of one of a model with images, or None."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def give_biases(model: nn.Module, merged: Merged) -> None:
    """Find the options of the config that give a bias to linear layers without one, and what else gets one by them.

    A checkpoint with a bias that the config's class has not would be read without it.

    Raises:
        ValueError: there is no such option.
    """
    paths = {module: path for path, module in model.named_modules()}
    wanted = {f"{paths[module]}.bias" for module in merged.biases if module._parameters.get("bias") is None}
    if not wanted or merged.config is None:
        return
    there = _built_with(model, {})
    gained: dict[str, set[str]] = {}
    for option, value in vars(merged.config).items():
        if value is False and "bias" in option:
            found = _built_with(model, {option: True}) - there
            if found & wanted and all(name.endswith(".bias") for name in found):
                gained[option] = found
    new = set().union(*gained.values())
    if not wanted <= new or _built_with(model, dict.fromkeys(gained, True)) - there != new:
        first = sorted(wanted - new or wanted)[0]
        raise ValueError(
            f"the merged model needs {first}, and no option of {type(merged.config).__name__} gives "
            f"{type(model).__name__} that; expected an adapter without b1 and b2 (no vector, no LoReFT), or a model "
            "with biases"
        )
    for name in new - wanted:
        module = model.get_submodule(name.removesuffix(".bias"))
        weight: Tensor = module.weight  # type: ignore[assignment]
        merged.biases[module] = weight.new_zeros(weight.shape[-1 if is_transposed(module) else 0])
    merged.options = tuple(gained)


def _built_with(model: nn.Module, options: Mapping[str, Any]) -> set[str]:
    """Return the names of the parameters of a model of this class and config, with some options changed."""
    config: Any = copy.deepcopy(model.config)
    for name, value in options.items():
        setattr(text_config(config), name, value)
    built_as: Any = type(model)
    try:
        type(config).from_dict(config.to_dict())  # what reads the checkpoint checks more than what sets an option
        with torch.device("meta"):
            built = built_as(config)
    except Exception:  # an option that does not go with the others
        return set()
    return {name for name, _ in built.named_parameters(remove_duplicate=False)}
