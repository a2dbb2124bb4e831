"""Finds the decoder layers of a loaded vLLM model, and gives them their steering points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger

from ..adapters.parameters import SITE, Layout
from .batch import Batch
from .layers import SteeringPoint, Unreachable, returned_state, scales_in_float16, scatters_tokens, steered_class
from .norms import link_norms
from .options import KEY, server_options
from .room import Room
from .sources import layout_of

logger = init_logger(f"vllm.{__name__}")


@dataclass(frozen=True)
class Reached:
    """The steering points of a model.

    Attributes:
        layout: what adapters must fit.
        batch: the buffers of its batches.
        room: that of the slots.
        points: the points, by layer.
        reason: why there are none, or "".
        unfused: with `steering.fuse_norm`, why a layer's output is not fused with the norm behind it, by layer.
    """

    layout: Layout
    batch: Batch
    room: Room
    points: Mapping[int, SteeringPoint] = field(default_factory=dict)
    reason: str = ""
    unfused: Mapping[int, str] = field(default_factory=dict)


def find_layers(model: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    """Return the path and the list of the model's decoder layers. Layers of other pipeline stages are missing in it.

    Raises:
        Unreachable: there is no such list, or more than one.
    """
    get_language: Any = getattr(model, "get_language_model", None)
    language = model if get_language is None else get_language()
    found: list[tuple[str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == count
            and not any(path.startswith(f"{outer}.") for outer, _ in found)
            and all(any(layer.children()) or _is_missing(layer) for layer in module)
            and any(module is inside for inside in language.modules())
        ):
            found.append((path, module))
    if len(found) != 1:
        lists = ", ".join(path for path, _ in found) or "none"
        raise Unreachable(f"{type(model).__name__} has no one list of {count} decoder layers; found {lists}")
    return found[0]


def _is_missing(layer: nn.Module) -> bool:
    return type(layer).__name__ == "PPMissingLayer"


def reach(model: nn.Module, config: Any, room: Room, device: Any) -> Reached:
    """Add a steering point to the decoder layers of a loaded model, or to none with a reason.

    Args:
        config: vLLM's config.
        room: that of the slots, which says the layers.
        device: that of the batches.
    """
    layout, scheduler = layout_of(config.model_config), config.scheduler_config
    captured = config.compilation_config.max_cudagraph_capture_size or 0
    batch = Batch(max(scheduler.max_num_batched_tokens, captured) + 7, device)
    try:
        _refuse_other_tokens(config.parallel_config)
        path, layers = find_layers(model, layout.num_layers)
        here = {index: layer for index, layer in enumerate(layers) if not _is_missing(layer)}
        classes: dict[int, Any] = {index: type(layer) for index, layer in here.items()}
        states = {index: returned_state(cls) for index, cls in classes.items()}
        for cls in set(classes.values()):
            if scatters_tokens(cls) and _has_parts_of_tokens(config.parallel_config):
                raise Unreachable(
                    f"{cls.__name__} leaves each rank a part of the tokens, as vLLM has tensor, data and expert "
                    "parallel ranks; expected two kinds of them at most"
                )
        for layer in here.values():
            if hasattr(layer, SITE):
                raise Unreachable(f"{type(layer).__name__} has a {SITE!r} of its own")
            if config.model_config.dtype == torch.float16 and scales_in_float16(type(layer)):
                raise Unreachable(f"{type(layer).__name__} computes otherwise in float16; expected bfloat16 or float32")
    except Unreachable as reason:
        logger.warning("Steering adapters will be refused: %s", reason)
        return Reached(layout, batch, room, reason=str(reason))
    points = {}
    for index, layer in here.items():
        if room.layers is not None and index not in room.layers:
            continue
        points[index] = SteeringPoint(layer, index, f"{path}.{index}", layout.hidden, states[index], batch, room)
    unfused: dict[int, str] = {}
    options = server_options(config)
    if options is not None and options.fuse_norm:
        looped = model.get_submodule(path.rpartition(".")[0])
        unfused = link_norms(looped, here, points, layout.num_layers, config)
        fused = len(points) - len(unfused)
        logger.info("Steering is fused with the norms behind %d of %d layers (%s.fuse_norm)", fused, len(points), KEY)
        for cause in sorted(set(unfused.values())):
            numbers = ", ".join(str(index) for index, other in unfused.items() if other == cause)
            logger.warning("Not fused with the norm: layers %s, because %s (%s.fuse_norm)", numbers, cause, KEY)
    for index, point in points.items():
        here[index].add_module(SITE, point)
        if point.link is None:
            here[index].__class__ = steered_class(classes[index])
    return Reached(layout, batch, room, points, unfused=unfused)


def _has_parts_of_tokens(parallel: Any) -> bool:
    """Return whether vLLM shards the tokens between MoE layers that can do so. Over pipeline stages none does."""
    return getattr(parallel, "use_sequence_parallel_moe", False) and parallel.pipeline_parallel_size == 1


def _refuse_other_tokens(parallel: Any) -> None:
    """Raise if a layer gets a part of the batch's tokens or gets them in another order.

    Raises:
        Unreachable: it does.
    """
    if getattr(parallel, "use_ubatching", False):
        raise Unreachable("batches are split in two (--enable-dbo, --ubatch-size); expected whole ones")
    if (size := getattr(parallel, "prefill_context_parallel_size", 1)) > 1:
        raise Unreachable(f"--prefill-context-parallel-size is {size}; expected 1, as a layer then gets all tokens")
