"""Loads an adapter in a vLLM worker, from files into the slots of each layer."""

from __future__ import annotations

from typing import Any

from vllm.lora import lora_model
from vllm.lora.request import LoRARequest

from ..adapters.parameters import SITE
from .layers import Reached, SteeringWithLoRA
from .sources import Source, in_float32, layer_weights, read_fitting


def load(manager: Any, request: LoRARequest, source: Source, load_lora: Any) -> Any:
    """Load a request's adapter in the form that vLLM's manager keeps.

    Args:
        manager: vLLM's manager of a worker's adapters.
        load_lora: vLLM's loader of a LoRA.

    Raises:
        ValueError: the adapter is broken or does not fit, or the model cannot be steered.
    """
    models = manager._adapter_manager
    reached: Reached = models.steering
    if reached.reason:
        raise ValueError(
            f"{request.lora_name!r} is a steering adapter, and this model cannot be steered: {reached.reason}"
        )
    points = {m.base_layer.index: path for path, m in models.modules.items() if isinstance(m, SteeringWithLoRA)}
    file = read_fitting(source, reached.layout, manager.lora_config.max_lora_rank)
    if left_out := sorted(set(file.tensors) & reached.here - set(points)):
        raise ValueError(
            f"{request.lora_name!r} steers, and --lora-target-modules lacks steering in the layers "
            f"{', '.join(map(str, left_out))}; expected {SITE!r} among them"
        )
    if source.lora is None:
        loaded = lora_model.LoRAModel(request.lora_int_id, max(file.config.rank, 1), {})
    else:
        part = LoRARequest(request.lora_name, request.lora_int_id, str(source.lora), load_inplace=request.load_inplace)
        loaded = load_lora(manager, part)
    for index, tensors in in_float32(file).items():
        if index in points:  # the other layers belong to another pipeline stage
            loaded.loras[points[index]] = layer_weights(points[index], loaded.rank, tensors, file.config.activation)
    loaded.steering_strength = file.config.scale
    return loaded


def strength_of(models: Any, number: int) -> float | None:
    """Return the strength that an adapter was saved with, or None if it does not steer or is not loaded.

    Args:
        models: vLLM's manager of the adapters of a model.
        number: vLLM's number of the adapter; 0: none.
    """
    adapter = models._registered_adapters.get(number) if number else None
    return getattr(adapter, "steering_strength", None)
