"""The steering points of vLLM's decoder layers, and the module that steers a layer's output.

A vLLM layer returns (hidden, residual) before the add, with x = hidden + residual, or it returns x. The plug-in reads
which from the layer's forward. In a pair the shift is added to hidden, in place.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.linear import LinearBase

from ..adapters.parameters import DOWN, NAMES, SITE, UP, Layout
from ..kernels import ACTIVATIONS, MAX_RANK
from ..model.residual import ResidualNotFound, names_in_final_adds
from ..serving.slots import Slots
from .sources import layout_of

FINISHED, UNADDED = "finished", "unadded"


class Unreachable(ValueError):
    """A model or layer without a residual stream that steering is known to reach."""


@functools.cache
def returned_state(cls: type[nn.Module]) -> str:
    """Return whether a decoder layer of this class returns its output before or after the residual add.

    UNADDED means (hidden, residual) with x = hidden + residual. FINISHED means x itself, or a tuple that begins with
    it. The state is read from the class's forward. A layer that has a `residual` and returns (hidden, residual) is
    UNADDED, unless hidden already contains the residual, as in Cohere's.

    Raises:
        Unreachable: neither form is recognised.
    """
    forward = inspect.unwrap(cls.forward)
    try:
        lines, first = inspect.getsourcelines(forward)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        raise Unreachable(f"{cls.__name__} has no source to read") from None
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    try:
        sums = names_in_final_adds(cls)
    except ResidualNotFound:
        sums = []
    pairs = [value.elts[1] for value in returned if isinstance(value, ast.Tuple) and len(value.elts) == 2]
    names = {second.id if isinstance(second, ast.Name) else None for second in pairs}
    if not pairs and sums:
        return FINISHED
    if len(pairs) != len(returned) or len(names) != 1:
        raise Unreachable(f"{cls.__name__} returns what is not known to be a hidden state, or a pair with its residual")
    (residual,) = names
    if sums and (residual is None or all(residual in added for added in sums)):
        return FINISHED
    if sums or residual is None or residual not in inspect.signature(forward).parameters:
        raise Unreachable(f"{cls.__name__} returns a pair that is not known to be (hidden, residual), un-added")
    return UNADDED


def _scales_in_float16(cls: type[nn.Module]) -> bool:
    """Return whether the layer treats float16 specially. DeepSeek's scales its stream down."""
    return "float16" in re.sub(r"bfloat16", "", inspect.getsource(inspect.unwrap(cls.forward)))


# -------------------------------------------------------------------------------------------------------- in the layer


class SteeringPoint(LinearBase):
    """The module that a decoder layer's output passes through. Without adapters it changes nothing.

    It is a LinearBase without weights, because vLLM looks for LoRA's places among those.
    """

    def __init__(self, layer: nn.Module, index: int, path: str, hidden: int, state: str) -> None:
        super().__init__(hidden, hidden, prefix=f"{path}.{SITE}", disable_tp=True)
        self.quant_method = None  # there are no weights to process when a model is reloaded
        self.index, self.hidden, self.state = index, hidden, state
        self.device = next((p.device for p in layer.parameters()), torch.device("cpu"))

    def forward(self, output: Any) -> Any:
        return output


class SteeringWithLoRA(BaseLayerWithLoRA):
    """Steers the layer's output by the adapter of each token's request."""

    def __init__(self, base_layer: SteeringPoint) -> None:
        super().__init__()
        self.base_layer = base_layer

    @classmethod
    def can_replace_layer(cls, source_layer: nn.Module, *args: Any, **kwargs: Any) -> bool:
        return isinstance(source_layer, SteeringPoint)

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        rank = min(lora_config.max_lora_rank, MAX_RANK)
        point = self.base_layer
        self.slots = Slots(
            max_loras, rank, point.hidden, dtype=torch.float32, device=point.device, down_bias=True, up_bias=True
        )

    @property
    def lora_a_stacked(self) -> tuple[Tensor | None, ...]:
        """vLLM reads the sizes of its empty warm-up adapters here."""
        return (self.slots.downs,)

    @property
    def lora_b_stacked(self) -> tuple[Tensor | None, ...]:
        return (self.slots.ups,)

    def reset_lora(self, index: int) -> None:
        self.slots.clear(index)

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Write an adapter into a slot.

        lora_a: the list packed by `_weights`, or W1 of an empty adapter with its W2 as lora_b.
        """
        if isinstance(lora_a, Tensor):
            self.slots.put(index, {DOWN: lora_a, UP: lora_b}, "identity")
            return
        *tensors, code = lora_a
        named = {name: tensor for name, tensor in zip(NAMES, tensors, strict=True) if tensor.numel()}
        self.slots.put(index, named, ACTIVATIONS[int(code)])

    def set_mapping(self, punica_wrapper: Any) -> None:
        super().set_mapping(punica_wrapper)
        # Before the first batch is mapped, it holds arbitrary numbers.
        punica_wrapper._token_lora_indices.fill_(-1)
        self.gains = gains_of(punica_wrapper)

    def forward(self, output: Any) -> Any:
        # A compiled graph is for all batches.
        if not is_compiling() and self.punica_wrapper.steering_idle:
            return output
        if isinstance(output, Tensor):
            return self._steer(output)
        hidden, *rest = output
        if self.base_layer.state == UNADDED:
            self._call(rest[0], hidden, into_branch=True)
            return output
        return (self._steer(hidden), *rest)

    def _steer(self, hidden: Tensor) -> Tensor:
        return self._call(hidden, None).view(hidden.shape)

    def _call(self, residual: Tensor, branch: Tensor | None, into_branch: bool = False) -> Tensor:
        width = self.base_layer.hidden
        tokens = residual.numel() // width
        # vLLM's public property has a Python int as its length, which a compiled graph would keep.
        ids, gains = self.punica_wrapper._token_lora_indices[:tokens], self.gains[:tokens]
        rows = None if branch is None else branch.view(-1, width)
        return self.slots(residual.view(-1, width), rows, ids, gains, into_branch=into_branch)


def gains_of(punica_wrapper: Any) -> Tensor:
    """Return the buffer of gains, one for each token of a batch: (maximal tokens,) float32, beside vLLM's LoRA ids.

    Its address never changes, because CUDA graphs read it. From then on `punica_wrapper.steering_idle` says whether the
    batch has no adapter.
    """
    gains: Tensor | None = getattr(punica_wrapper, "steering_gains", None)
    if gains is None:
        ids = punica_wrapper._token_lora_indices
        gains = punica_wrapper.steering_gains = torch.ones(len(ids), dtype=torch.float32, device=ids.device)
        update = punica_wrapper.update_metadata

        def update_metadata(mapping: Any, *args: Any, **kwargs: Any) -> Any:
            punica_wrapper.steering_idle = not any(mapping.index_mapping)
            return update(mapping, *args, **kwargs)

        punica_wrapper.steering_idle, punica_wrapper.update_metadata = True, update_metadata
    return gains


@functools.cache
def steered_class(base: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of a layer class that passes the layer's output through its steering point."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, SITE)(base.forward(self, *args, **kwargs))

    namespace = {"__module__": base.__module__, "__qualname__": base.__qualname__, "forward": forward}
    metaclass: Any = type(base)
    return metaclass(base.__name__, (base,), namespace)


# -------------------------------------------------------------------------------------------------------- in the model


@dataclass(frozen=True)
class Reached:
    """The layout that adapters must fit, the layers with a steering point, and the reason if there are none."""

    layout: Layout
    here: frozenset[int] = frozenset()
    reason: str = ""


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


def reach(model: nn.Module, config: Any) -> Reached:
    """Add a steering point to each decoder layer of a loaded model, or to none with a reason.

    config: vLLM's config of the model.
    """
    layout = layout_of(config)
    try:
        path, layers = find_layers(model, layout.num_layers)
        here = {index: layer for index, layer in enumerate(layers) if not _is_missing(layer)}
        classes: dict[int, Any] = {index: type(layer) for index, layer in here.items()}
        states = {index: returned_state(cls) for index, cls in classes.items()}
        for layer in here.values():
            if hasattr(layer, SITE):
                raise Unreachable(f"{type(layer).__name__} has a {SITE!r} of its own")
            if config.dtype == torch.float16 and _scales_in_float16(type(layer)):
                raise Unreachable(f"{type(layer).__name__} computes otherwise in float16; expected bfloat16 or float32")
    except Unreachable as reason:
        return Reached(layout, reason=str(reason))
    for index, layer in here.items():
        point = SteeringPoint(layer, index, f"{path}.{index}", layout.hidden, states[index])
        layer.add_module(SITE, point)
        layer.__class__ = steered_class(classes[index])
    return Reached(layout, frozenset(here))
