"""The steering points of vLLM's decoder layers, and the module that steers a layer's output.

A vLLM layer returns (hidden, residual) before the add, with x = hidden + residual, or it returns x. The plug-in reads
which from the layer's forward. In a pair the shift is added to hidden, in place.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import re
import textwrap
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.linear import LinearBase

from ..adapters.parameters import NAMES, SITE
from ..kernels import ACTIVATIONS
from ..kernels.norm_torch import Norm
from ..kernels.registered import register
from ..model.residual import ResidualNotFound, names_in_final_adds
from ..serving.slots import Slots
from .batch import Batch
from .room import Room

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


def scales_in_float16(cls: type[nn.Module]) -> bool:
    """Return whether the layer treats float16 specially. DeepSeek's scales its stream down."""
    return "float16" in re.sub(r"bfloat16", "", inspect.getsource(inspect.unwrap(cls.forward)))


def scatters_tokens(cls: type[nn.Module]) -> bool:
    """Return whether the layer can leave each tensor-parallel rank a part of the tokens, as DeepSeek's does."""
    return "reduce_scatter" in inspect.getsource(inspect.unwrap(cls.forward))


# -------------------------------------------------------------------------------------------------------- in the layer


class SteeringPoint(LinearBase):
    """The module that a decoder layer's output passes through. Without slots it changes nothing.

    It is a LinearBase without weights, because vLLM looks for LoRA's places among those.

    Attributes:
        slots: the adapters' slots at this layer, or None.
        number: 0-dimensional, the number of this point in the process. A compiled graph reads it, so that one graph is
            for all layers.
        link: the norm that adds this point's steering, or None. Then the layer does not pass its output through here.
    """

    slots: Slots | None
    link: Any

    def __init__(
        self, layer: nn.Module, index: int, path: str, hidden: int, state: str, batch: Batch, room: Room
    ) -> None:
        super().__init__(hidden, hidden, prefix=f"{path}.{SITE}", disable_tp=True)
        self.quant_method = None  # there are no weights to process when a model is reloaded
        self.index, self.hidden, self.state, self.batch, self.room = index, hidden, state, batch, room
        self.device = next((p.device for p in layer.parameters()), torch.device("cpu"))
        self.slots, self.link = None, None
        number = next(_numbers)
        self.number = torch.tensor(number)
        _points[number] = self

    def make_slots(self, count: int) -> None:
        """Make empty slots for `count` adapters."""
        room = self.room
        self.slots = Slots(
            count,
            room.rank,
            self.hidden,
            dtype=room.dtype,
            device=self.device,
            down_bias=room.down_bias,
            up_bias=room.up_bias,
        )

    def put(self, slot: int, tensors: Mapping[str, Tensor], activation: str) -> None:
        """Write an adapter into a slot: see `Slots.put`."""
        assert self.slots is not None
        self.slots.put(slot, tensors, activation)
        self._forget(slot)

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        assert self.slots is not None
        self.slots.clear(slot)
        self._forget(slot)

    def _forget(self, slot: int) -> None:
        if self.batch.meter is not None:
            self.batch.meter.forget(slot)

    def forward(self, output: Any) -> Any:
        slots = self.slots
        if slots is None or not is_compiling() and self.batch.idle:
            return output
        hidden, *rest = (output,) if isinstance(output, Tensor) else output
        residual = rest[0] if self.state == UNADDED else None
        if is_compiling():
            # A compiled graph is for all batches: the op looks whether this one is idle.
            torch.ops.fused_steer.steer_in_vllm(hidden, residual, self.number)
            return output
        steered = self.steer(slots, hidden, residual)
        return output if residual is not None else steered if isinstance(output, Tensor) else (steered, *rest)

    def steer(self, slots: Slots, hidden: Tensor, residual: Tensor | None) -> Tensor:
        """Steer a batch's tokens. With a residual `hidden` gets the shift, without one a new tensor.

        Args:
            hidden, residual: (..., d); the layer's output is hidden + residual.
        """
        rows = hidden.view(-1, self.hidden)
        residual_rows = None if residual is None else residual.view(-1, self.hidden)
        ids, gains = self._tokens(slots, rows, residual_rows)
        if residual_rows is None:
            return slots(rows, None, ids, gains).view(hidden.shape)
        slots(residual_rows, rows, ids, gains, into_branch=True)
        return hidden

    def steer_and_normalise(self, hidden: Tensor, residual: Tensor, norm: Norm) -> None:
        """Steer a batch's tokens, add and normalise. `hidden` gets the normalised sum, `residual` the sum.

        Args:
            hidden, residual: (..., d); the layer's output is hidden + residual.
        """
        assert self.slots is not None
        rows, residual_rows = hidden.view(-1, self.hidden), residual.view(-1, self.hidden)
        self.slots.normalised(residual_rows, rows, *self._tokens(self.slots, rows, residual_rows), norm)

    def _tokens(self, slots: Slots, rows: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the slots and the gains of a batch's tokens."""
        batch = self.batch
        ids, gains = batch.ids[: len(rows)], batch.gains[: len(rows)]
        if batch.meter is not None:
            gains = batch.meter.gains(slots, rows, residual, ids, gains)
        return ids, gains


_numbers = itertools.count()
_points: weakref.WeakValueDictionary[int, SteeringPoint] = weakref.WeakValueDictionary()


def point_of(number: Tensor) -> SteeringPoint:
    """Return the point of a number that a compiled graph read."""
    return _points[int(number)]


def steer_in_place(hidden: Tensor, residual: Tensor | None, number: Tensor) -> None:
    """Steer in place in a compiled graph: nothing is launched for an idle batch."""
    point = point_of(number)
    if point.batch.idle or point.slots is None:
        return
    steered = point.steer(point.slots, hidden, residual)
    if residual is None:
        hidden.copy_(steered)


register(
    "steer_in_vllm(Tensor(a!) hidden, Tensor? residual, Tensor number) -> ()",
    steer_in_place,
    lambda *inputs: None,
    None,
)


class SteeringWithLoRA(BaseLayerWithLoRA):
    """A steering point among vLLM's LoRA layers: vLLM's manager writes adapters into its slots."""

    def __init__(self, base_layer: SteeringPoint) -> None:
        super().__init__()
        self.base_layer = base_layer

    @classmethod
    def can_replace_layer(cls, source_layer: nn.Module, *args: Any, **kwargs: Any) -> bool:
        return isinstance(source_layer, SteeringPoint)

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        self.base_layer.make_slots(max_loras)

    @property
    def lora_a_stacked(self) -> tuple[Tensor, ...]:
        """vLLM reads the sizes of its empty warm-up adapters here."""
        return (torch.empty(1, 1, self.base_layer.hidden, device="meta"),)

    @property
    def lora_b_stacked(self) -> tuple[Tensor, ...]:
        return (torch.empty(1, self.base_layer.hidden, 1, device="meta"),)

    def reset_lora(self, index: int) -> None:
        self.base_layer.clear(index)

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Write an adapter into a slot: the list packed by `layer_weights`, or nothing of an empty adapter."""
        if isinstance(lora_a, Tensor):
            self.base_layer.clear(index)
            return
        *tensors, code = lora_a
        named = {name: tensor for name, tensor in zip(NAMES, tensors, strict=True) if tensor.numel()}
        self.base_layer.put(index, named, ACTIVATIONS[int(code)])

    def forward(self, output: Any) -> Any:
        return self.base_layer(output)


@functools.cache
def steered_class(base: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of a layer class that passes the layer's output through its steering point."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, SITE)(base.forward(self, *args, **kwargs))

    namespace = {"__module__": base.__module__, "__qualname__": base.__qualname__, "forward": forward}
    metaclass: Any = type(base)
    return metaclass(base.__name__, (base,), namespace)
