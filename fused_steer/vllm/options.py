"""The options of a steering server, which vLLM passes on to each of its processes.

vllm serve BASE … --additional-config '{"steering": {"dtype": "bfloat16", "dose": {"limit": 0.5, "action": "clamp"}}}'
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from vllm.config.lora import LoRAConfig

from ..config import checked_number
from ..kernels import MAX_RANK

#: The key of the options in `--additional-config`.
KEY = "steering"
REFUSE, CLAMP, WARN = "refuse", "clamp", "warn"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Slots of a server without --enable-lora.
SLOTS = 8
_STANDS_IN = "_for_steering_alone"


@dataclass(frozen=True)
class Dose:
    """The bound of the relative dose |scale| · ‖shift‖ / ‖h‖ of each steered token in each layer.

    h is the hidden state that the layer returns, before the shift.

    Attributes:
        limit: the highest dose.
        action: "refuse": refuse a request that could exceed the limit, by the norms of its adapter; "clamp": lower the
            strength of a token in a layer so that its dose is the limit; "warn": log the adapters that exceed it.
        norm: the least ‖h‖ that "refuse" takes into account. Without it, adapters with biases or vectors are refused,
            because their dose has no bound.
    """

    limit: float
    action: str = REFUSE
    norm: float | None = None


@dataclass(frozen=True)
class Options:
    """The options of a server, as `--additional-config` gives them.

    Attributes:
        adapters: a directory with adapters, one in each subdirectory, that requests can name. The slots take its
            adapters' ranks, dtype, layers and biases, as far as the other options do not say otherwise.
        slots: the number of adapters on the device. With --enable-lora it is --max-loras.
        rank: the highest rank; 0 for steering vectors only.
        dtype: the dtype of the slots; adapters are rounded to it.
        layers: the layers that adapters may steer. The others get no steering point.
        dose: the bound of the relative dose.
        fuse_norm: steer, add and normalise by one kernel where the norm behind a layer is known. The hidden states do
            not have the bits of vLLM's own norm then.
    """

    adapters: str | None = None
    slots: int | None = None
    rank: int | None = None
    dtype: str | None = None
    layers: tuple[int, ...] | None = None
    dose: Dose | None = None
    fuse_norm: bool = False


def server_options(config: Any) -> Options | None:
    """Return the options in vLLM's config, or None if it has none.

    Raises:
        ValueError, TypeError: a key or value is unknown.
    """
    additional = getattr(config, "additional_config", None)
    if not isinstance(additional, Mapping) or KEY not in additional:
        return None
    options = read_server_options(additional[KEY])
    if lora_of(config) is not None and options.slots is not None:
        raise ValueError(f"{KEY}.slots is {options.slots} with --enable-lora; expected --max-loras instead")
    return options


def lora_of(config: Any) -> Any:
    """Return the config of `--enable-lora`, or None without it.

    Args:
        config: vLLM's config.
    """
    lora = getattr(config, "lora_config", None)
    return None if getattr(lora, _STANDS_IN, False) else lora


def stand_in(config: Any) -> Any:
    """Return the config of LoRA that vLLM's runners follow for steering without `--enable-lora`.

    None if the server has no steering options.
    """
    options = server_options(config)
    if options is None:
        return None
    slots = SLOTS if options.slots is None else options.slots
    made = LoRAConfig(max_lora_rank=8, max_loras=slots, max_cpu_loras=slots)
    object.__setattr__(made, _STANDS_IN, True)
    return made


def read_server_options(given: Any) -> Options:
    """Check the value of "steering" in `--additional-config`.

    Raises:
        ValueError, TypeError: a key or value is unknown.
    """
    values = _known(KEY, given, Options)
    adapters = values.get("adapters")
    if adapters is not None and not isinstance(adapters, str):
        raise TypeError(f"{KEY}.adapters is {adapters!r}; expected the path of a directory")
    dtype = values.get("dtype")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"{KEY}.dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    layers = values.get("layers")
    if layers is not None:
        if not isinstance(layers, (list, tuple)) or not layers:
            raise TypeError(f"{KEY}.layers is {layers!r}; expected a list of layers")
        layers = tuple(sorted({_whole("layers", layer, 0, None) for layer in layers}))
    dose, fuse_norm = values.get("dose"), values.get("fuse_norm")
    if not isinstance(fuse_norm, bool | None):
        raise TypeError(f"{KEY}.fuse_norm is {fuse_norm!r}; expected true or false")
    return Options(
        adapters,
        None if values.get("slots") is None else _whole("slots", values["slots"], 1, None),
        None if values.get("rank") is None else _whole("rank", values["rank"], 0, MAX_RANK),
        dtype,
        layers,
        None if dose is None else _read_dose(dose),
        bool(fuse_norm),
    )


def _read_dose(given: Any) -> Dose:
    values = _known(f"{KEY}.dose", given, Dose)
    if "limit" not in values:
        raise ValueError(f"{KEY}.dose has no limit; expected a positive number")
    norm = values.get("norm")
    action = values.get("action", REFUSE)
    if action not in (REFUSE, CLAMP, WARN):
        raise ValueError(f"{KEY}.dose.action is {action!r}; expected {REFUSE}, {CLAMP} or {WARN}")
    return Dose(_positive("limit", values["limit"]), action, None if norm is None else _positive("norm", norm))


def _known(what: str, given: Any, of: Any) -> Mapping[str, Any]:
    names = [field.name for field in fields(of)]
    if not isinstance(given, Mapping):
        raise TypeError(f"{what} is {given!r:.80}; expected an object with {', '.join(names)}")
    if unknown := [str(name) for name in given if name not in names]:
        raise ValueError(f"{what} has {', '.join(unknown)}; expected {', '.join(names)} alone")
    return given


def _whole(name: str, value: Any, least: int, most: int | None) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least or most is not None and value > most:
        expected = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{KEY}.{name} has {value!r}; expected a whole number of {expected}")
    return value


def _positive(name: str, value: Any) -> float:
    number = checked_number(f"{KEY}.dose.{name}", value)
    if not 0 < number < math.inf:
        raise ValueError(f"{KEY}.dose.{name} is {value!r}; expected a positive number")
    return number
