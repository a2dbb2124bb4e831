"""Put the adapters of a batch into slots: into a pool's slots, or into new ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..adapters.parameters import Place
from ..config import DTYPES, SteerConfig, plain
from ..kernels import MAX_RANK
from ..model.decoder import Decoder, execution_device
from ..model.site import SteeringSite
from ..positions import read_positions, shown
from .pool import AdapterPool
from .slots import Held, LoadedSlots, Slots, adapters_at

_MOST_SLOTS = 2**31 - 1  # a token's slot is an int32


@contextlib.contextmanager
def hold_loaded(
    sites: Mapping[Place, SteeringSite], configs: Mapping[str, SteerConfig], names: Sequence[str]
) -> Iterator[Held]:
    """Copy adapters that the model has loaded into new slots."""
    loaded = LoadedSlots(adapters_at(sites, names), {name: configs[name].activation for name in names})
    scales = {name: configs[name].scale for name in names}
    positions = {name: read_positions(configs[name].positions) for name in names}
    yield Held(loaded.numbers, loaded.slots, scales, positions)


@contextlib.contextmanager
def hold_adapters(
    pool: AdapterPool | None, sites: Mapping[Place, SteeringSite], configs: Mapping[str, SteerConfig], names: list[str]
) -> Iterator[Held]:
    """Put the adapters of a batch into the pool's slots, or into new ones without a pool.

    Args:
        pool: the model's pool, or None.
        sites: the model's sites, by place.
        configs: the configs of the adapters that the model has loaded. Other names belong to the pool.
        names: the batch's adapters, each once.
    """
    own = [name for name in names if name in configs]
    with contextlib.ExitStack() as stack:
        if pool is None:
            yield stack.enter_context(hold_loaded(sites, configs, own))
            return
        others = [name for name in names if name not in configs]
        at = adapters_at(sites, own)
        loaded = {
            name: (configs[name], {place: dict(named[name]) for place, named in at.items() if name in named})
            for name in own
        }
        yield stack.enter_context(pool.hold(others, own=loaded))


def make_slots(
    decoder: Decoder, places: Iterable[Place], count: int, rank: int, dtype: torch.dtype
) -> dict[Place, Slots]:
    """Make a pool's empty slots for each of these places, on the layer's device."""
    return {
        place: Slots(
            count,
            rank,
            decoder.hidden,
            dtype=dtype,
            device=execution_device(decoder.layers[place.layer]),
            down_bias=rank > 0,
            up_bias=True,
        )
        for place in places
    }


def checked_size(slots: Any, rank: Any, dtype: Any) -> tuple[int, int, torch.dtype]:
    """Check the size of a pool's slots. Return their number and rank, and the dtype of this name."""
    slots, rank = plain(slots), plain(rank)
    for name, value, least in (("slots", slots, 1), ("rank", rank, 0)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} is {shown(value)}; expected an integer")
        if value < least:
            raise ValueError(f"{name} is {value}; expected at least {least}")
    if slots > _MOST_SLOTS:
        raise ValueError(f"slots has {slots.bit_length()} bits; expected at most {_MOST_SLOTS}")
    if rank > MAX_RANK:
        raise ValueError(f"rank is {rank}; expected at most {MAX_RANK}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype is {shown(dtype)}; expected one of {', '.join(DTYPES)}")
    return slots, rank, DTYPES[dtype]
