"""Loads adapters in a vLLM worker, from files into the slots of each layer.

With `--enable-lora` vLLM's own manager owns the slots. Without it `Store` does.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from vllm.lora import lora_model
from vllm.lora.request import LoRARequest

from ..adapters.files import AdapterFile
from ..adapters.parameters import SITE
from .batch import Batch
from .dose import Meter
from .layers import SteeringPoint, SteeringWithLoRA
from .options import REFUSE, Options
from .reached import Reached
from .sources import Source, find_source, in_float32, layer_weights, read_fitting


@dataclass(frozen=True)
class Loaded:
    """A steering adapter in a slot: the slot, the strength that it was saved with, and its name."""

    slot: int
    scale: float
    name: str


class Steering:
    """The steering of one model in a worker, which both of vLLM's model runners follow.

    Attributes:
        batch: the buffers of its batches.
        alone: whether no LoRA can be served beside it. Then vLLM's mapping of tokens to LoRA adapters is left out.
        find: returns the adapter in a slot that a number stands for, or None.
    """

    def __init__(self, batch: Batch, alone: bool, find: Callable[[int], Loaded | None]) -> None:
        self.batch, self.alone, self.find = batch, alone, find

    def keep_with(self, points: Iterable[SteeringPoint]) -> None:
        """List the tensors of the batches among the buffers of the model.

        vLLM's sleep of level 2 gives the model's memory up, and restores the buffers alone.
        """
        for point in itertools.islice(points, 1):
            tensors = {"ids": self.batch.ids, "gains": self.batch.gains}
            if self.batch.meter is not None:
                tensors |= {"peaks": self.batch.meter.peaks, "above": self.batch.meter.above}
            for name, tensor in tensors.items():
                point.register_buffer(name, tensor, persistent=False)

    def measure(self, options: Options | None, slots: int, number_in: Callable[[int], int | None]) -> None:
        """Measure the doses of the batches' tokens if the server's options say so.

        Args:
            slots: their number.
            number_in: returns the number of the adapter in a slot, or None.
        """

        def name_in(slot: int) -> str | None:
            number = number_in(slot)
            loaded = None if number is None else self.find(number)
            return None if loaded is None else loaded.name

        dose = None if options is None else options.dose
        if dose is not None and dose.action != REFUSE:
            self.batch.meter = Meter(dose, slots, self.batch.ids.device, name_in)


def _refuse(name: str, reached: Reached) -> None:
    if reached.reason:
        raise ValueError(f"{name!r} is a steering adapter, and this model cannot be steered: {reached.reason}")


# ------------------------------------------------------------------------------------------------ with vLLM's own slots


def load(manager: Any, request: LoRARequest, source: Source, load_lora: Any) -> Any:
    """Load a request's adapter in the form that vLLM's manager keeps.

    Args:
        manager: vLLM's manager of a worker's adapters.
        load_lora: vLLM's loader of a LoRA.

    Raises:
        ValueError: the adapter is broken or does not fit, or the model cannot be steered.
    """
    models = manager._adapter_manager
    reached: Reached = models.reached
    _refuse(request.lora_name, reached)
    points = {m.base_layer.index: path for path, m in models.modules.items() if isinstance(m, SteeringWithLoRA)}
    file = read_fitting(source, reached.layout, reached.room)
    if left_out := sorted({place.layer for place in file.tensors} & set(reached.points) - set(points)):
        raise ValueError(
            f"{request.lora_name!r} steers, and --lora-target-modules lacks steering in the layers "
            f"{', '.join(map(str, left_out))}; expected {SITE!r} among them"
        )
    if source.lora is None:
        loaded = lora_model.LoRAModel(request.lora_int_id, max(file.config.rank, 1), {})
    else:
        part = LoRARequest(request.lora_name, request.lora_int_id, str(source.lora), load_inplace=request.load_inplace)
        loaded = load_lora(manager, part)
    for (index, _), tensors in in_float32(file).items():
        if index in points:  # the other layers belong to another pipeline stage
            loaded.loras[points[index]] = layer_weights(points[index], loaded.rank, tensors, file.config.activation)
    loaded.steering_scale, loaded.steering_name = file.config.scale, request.lora_name
    return loaded


def steering_of_manager(models: Any, options: Options | None) -> Steering:
    """Return the steering of a model with slots of vLLM's manager.

    Args:
        models: vLLM's manager of the adapters of a model.
    """

    def find(number: int) -> Loaded | None:
        adapter = models._registered_adapters.get(number)
        scale = getattr(adapter, "steering_scale", None)
        if scale is None or number not in models.lora_index_to_id:
            return None
        return Loaded(models.lora_index_to_id.index(number), scale, adapter.steering_name)

    alone = all(isinstance(module, SteeringWithLoRA) for module in models.modules.values())
    steering = Steering(models.reached.batch, alone, find)
    steering.measure(options, models.lora_slots, lambda slot: models.lora_index_to_id[slot])
    steering.keep_with(models.reached.points.values())
    return steering


# ------------------------------------------------------------------------------------------------ with slots of our own


class Store:
    """The adapters of a model without LoRA. vLLM's runners use it in place of their own manager of adapters."""

    def __init__(self, reached: Reached, slots: int) -> None:
        """
        Args:
            slots: the number of adapters on the device at a time.
        """
        self._reached, self._slots = reached, slots
        self._loaded: OrderedDict[int, Loaded] = OrderedDict()  # by number, the least recently used first
        self._paths: dict[int, LoRARequest] = {}
        self._pinned: set[int] = set()
        self._dummies: set[int] = set()
        for point in reached.points.values():
            point.make_slots(slots)

    def steering(self, options: Options | None) -> Steering:
        """Return the steering of the model."""
        steering = Steering(self._reached.batch, True, self._loaded.get)
        numbers = self._loaded
        steering.measure(options, self._slots, lambda slot: next((n for n in numbers if numbers[n].slot == slot), None))
        steering.keep_with(self._reached.points.values())
        return steering

    def set_active_adapters(self, requests: Iterable[LoRARequest], mapping: Any = None) -> None:
        """Load the adapters of a batch.

        Raises:
            RuntimeError: there are more than slots.
        """
        wanted = {request.lora_int_id: request for request in requests if request.lora_int_id not in self._dummies}
        if len(wanted) > self._slots:
            raise RuntimeError(f"a batch has {len(wanted)} adapters; expected at most {self._slots} (steering.slots)")
        for number, request in wanted.items():
            self._load(number, request, keep=set(wanted))

    def add_adapter(self, request: LoRARequest) -> bool:
        """Load an adapter. Return whether it was not loaded yet.

        Raises:
            ValueError: the adapter is broken or does not fit, or the model cannot be steered.
        """
        is_new = request.lora_int_id not in self._paths
        self._load(request.lora_int_id, request, keep=set())
        self._paths[request.lora_int_id] = request
        return is_new

    def remove_adapter(self, number: int) -> bool:
        """Empty an adapter's slot. Return whether it was loaded. A running request loads it again."""
        loaded = self._loaded.pop(number, None)
        self._pinned.discard(number)
        if loaded is not None:
            for point in self._reached.points.values():
                point.clear(loaded.slot)
        return self._paths.pop(number, None) is not None

    def remove_all_adapters(self) -> None:
        for number in list(self._paths | self._loaded):
            self.remove_adapter(number)
        self._dummies.clear()

    def pin_adapter(self, number: int) -> bool:
        """Keep an adapter in its slot, as long as a batch does not need all slots.

        Raises:
            ValueError: it is not loaded.
        """
        if number not in self._paths:
            raise ValueError(f"adapter {number} is not loaded; expected one of {sorted(self._paths)}")
        self._load(number, self._paths[number], keep=set())
        self._pinned.add(number)
        return True

    def list_adapters(self) -> set[int]:
        return set(self._paths)

    def _load(self, number: int, request: LoRARequest, keep: set[int]) -> None:
        if number in self._loaded:
            self._loaded.move_to_end(number)
            return
        file = self._read(request)
        if len(self._loaded) == self._slots:
            idle = [n for n in self._loaded if n not in keep]
            self._loaded.pop(next((n for n in idle if n not in self._pinned), idle[0]))
        slot = min(set(range(self._slots)) - {loaded.slot for loaded in self._loaded.values()})
        tensors = {place.layer: named for place, named in in_float32(file).items()}
        for index, point in self._reached.points.items():
            if index in tensors:
                point.put(slot, tensors[index], file.config.activation)
            else:
                point.clear(slot)
        self._loaded[number] = Loaded(slot, file.config.scale, request.lora_name)

    def _read(self, request: LoRARequest) -> AdapterFile:
        _refuse(request.lora_name, self._reached)
        source = find_source(request.lora_path)
        if source is None or source.lora is not None:
            raise ValueError(
                f"{request.lora_name!r} is not a steering adapter alone; expected one without --enable-lora"
            )
        return read_fitting(source, self._reached.layout, self._reached.room)

    # vLLM's runners ask a manager for more: adapters of warm-ups, and LoRA in the towers of other modalities.

    def supports_tower_connector_lora(self) -> bool:
        return False

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        return default_rank

    @contextlib.contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        yield

    def add_dummy_lora(self, request: LoRARequest, rank: int) -> bool:
        self._dummies.add(request.lora_int_id)
        return True
