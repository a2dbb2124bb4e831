"""Adapters in vLLM's workers: from a request's copy into the slots of each layer."""

from __future__ import annotations

from typing import Any

from vllm.lora import lora_model
from vllm.lora.request import LoRARequest

from ..adapters.parameters import SITE
from .layers import Reached, SteeringWithLoRA
from .sources import Source, in_float32, layer_weights, read_fitting


def load(manager: Any, request: LoRARequest, source: Source, load_lora: Any) -> Any:
    """Read a request's adapter into the form in which vLLM's manager keeps adapters.

    Args:
        manager: vLLM's manager of adapters in a worker.
        load_lora: vLLM's own function that loads a LoRA.

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
            f"{request.lora_name!r} steers, and --lora-target-modules leaves steering out in the layers "
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
    """The strength that an adapter was saved with; None if it does not steer, or is not loaded.

    Args:
        models: vLLM's manager of the adapters of a model.
        number: vLLM's number of the adapter; 0: none.
    """
    adapter = models._registered_adapters.get(number) if number else None
    return getattr(adapter, "steering_strength", None)
