"""AdapterPool: thousands of adapters in files, a few of them at a time in slots on the device."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.files import CONFIG_NAME, read_adapter
from ..adapters.parameters import ByLayer, check_name
from ..config import DTYPES, SteerConfig
from ..kernels import MAX_RANK
from ..model.decoder import Decoder, execution_device
from ..model.layer import SteeringSite
from ..model.stored import adapter_tensors
from .batch import hold_loaded
from .slots import Held, Slots


@dataclass(frozen=True)
class PoolStatistics:
    """What a pool has done since it was made.

    hits: times that an adapter asked for was in a slot already; loads: into a slot; evictions: out of one, for another;
    failures: loads that failed; loaded_bytes: of the tensors read from files.
    """

    hits: int = 0
    loads: int = 0
    evictions: int = 0
    failures: int = 0
    loaded_bytes: int = 0


class AdapterPool:
    """The adapters that a model can serve in batches, registered by name and loaded when they are asked for.

    Made by `model.steering.make_pool`. Names of the pool are names for `model.steering.batch`. Any thread may call any
    method. An adapter that cannot be loaded raises where it was asked for, and changes nothing for the others. One
    that is loaded goes on as it is when its file changes; `reload` takes the new one.

    On an accelerator a slot is written on the stream that is current in the loading thread, after what was launched
    there before; a model that runs on another stream has to be waited for by the caller.
    """

    def __init__(
        self,
        slots: Mapping[int, Slots],
        decoder: Decoder,
        is_taken: Callable[[str], bool],
        check_base: bool,
    ) -> None:
        """Internal: `Steering.make_pool` makes one.

        slots: of each layer; decoder: the model's; is_taken: whether the model has an adapter of a name.
        """
        self.slots = slots
        self.count = next(iter(slots.values())).count
        self.rank = next(iter(slots.values())).rank
        self._decoder, self._is_taken, self._check_base = decoder, is_taken, check_base
        self._changed = threading.Condition(threading.RLock())  # over all that follows
        self._sources: dict[str, str] = {}
        self._configs: dict[str, SteerConfig] = {}  # of the loaded ones
        self._slot_of: OrderedDict[str, int] = OrderedDict()  # of the loaded ones, the least recently used first
        self._free = list(range(self.count))
        self._holders: Counter[str] = Counter()
        self._loading: set[str] = set()
        self._statistics = PoolStatistics()

    def __reduce__(self) -> Any:
        return type(None), ()  # a copied model has none: the slots are this one's

    # ---------------------------------------------------------------------------------------------------- what there is

    @property
    def names(self) -> list[str]:
        """All that are registered, in the order in which they were."""
        with self._changed:
            return list(self._sources)

    @property
    def loaded(self) -> list[str]:
        """Those that are in slots, the least recently used first."""
        with self._changed:
            return list(self._slot_of)

    @property
    def statistics(self) -> PoolStatistics:
        with self._changed:
            return self._statistics

    @property
    def nbytes(self) -> int:
        """Of all slots, on all devices."""
        return sum(slots.nbytes for slots in self.slots.values())

    def __contains__(self, name: object) -> bool:
        with self._changed:
            return name in self._sources

    def __len__(self) -> int:
        with self._changed:
            return len(self._sources)

    def __repr__(self) -> str:
        with self._changed:
            done = self._statistics
            return (
                f"AdapterPool({len(self._sources)} adapters, {len(self._slot_of)} in {self.count} slots of rank "
                f"{self.rank}, {self.nbytes / 2**20:.1f} MiB; {done.hits} hits, {done.loads} loads, "
                f"{done.evictions} evictions, {done.failures} failures)"
            )

    # --------------------------------------------------------------------------------------------------------- names

    def register(self, name: str, source: str | os.PathLike[str]) -> None:
        """Let `name` be the adapter saved in a directory, or on the hub. It is not opened before it is asked for.

        Raises:
            ValueError: the name cannot be one, or is taken.
        """
        with self._changed:
            self._check_new([name])
            self._sources[name] = os.fspath(source)

    def register_directory(self, directory: str | os.PathLike[str]) -> list[str]:
        """Register each subdirectory that has an adapter_config.json, by its own name; all or none.

        Returns:
            The names, sorted.

        Raises:
            FileNotFoundError, NotADirectoryError: there is no such directory.
            ValueError: one of the names cannot be one, or is taken.
        """
        root = Path(directory)
        if not root.exists():
            raise FileNotFoundError(f"no directory {root}; expected one that holds adapters' directories")
        if not root.is_dir():
            raise NotADirectoryError(f"{root} is a file; expected a directory that holds adapters' directories")
        with os.scandir(root) as entries:
            found = sorted(entry.name for entry in entries if (root / entry.name / CONFIG_NAME).is_file())
        with self._changed:
            self._check_new(found)
            self._sources.update({name: str(root / name) for name in found})
        return found

    def _check_new(self, names: Sequence[str]) -> None:
        for name in names:
            check_name(name)
            if name in self._sources:
                raise ValueError(
                    f"adapter {name!r} is registered already, for {self._sources[name]}; expected a new name"
                )
            if self._is_taken(name):
                raise ValueError(f"there is an adapter {name!r} in the model already; expected a new name")

    def remove(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            KeyError: there is no such adapter.
            ValueError: it is in use by a running batch.
        """
        with self._changed:
            self._check_idle(name, "removed")
            self._forget(name)
            del self._sources[name]
            self._changed.notify_all()

    def reload(self, name: str) -> None:
        """Take an adapter from its file again when it is next asked for.

        Raises:
            KeyError, ValueError: as `remove`.
        """
        with self._changed:
            self._check_idle(name, "reloaded")
            self._forget(name)
            self._changed.notify_all()

    def _check_idle(self, name: str, done: str) -> None:
        self._known(name)
        while name in self._loading:
            self._changed.wait()
        if self._holders[name]:
            raise ValueError(f"adapter {name!r} is in use by a running batch; expected it to be {done} afterwards")
        self._known(name)  # another thread may have removed it meanwhile

    def _forget(self, name: str) -> None:
        if name in self._slot_of:
            self._free.append(self._slot_of.pop(name))
            del self._configs[name]

    def _known(self, name: str) -> None:
        if name not in self._sources:
            raise KeyError(f"no adapter {name!r} in the pool; expected one of its {len(self._sources)}")

    # --------------------------------------------------------------------------------------------------------- in use

    def load(self, name: str, *, timeout: float = 0.0) -> int:
        """Have an adapter in a slot, and return the slot's number. It may be evicted again once it is not used.

        timeout: seconds to wait for a slot where running batches use them all.

        Raises:
            KeyError: there is no such adapter.
            FileNotFoundError, ValueError: it is not there, is broken or does not fit the model or the slots. The others
                are as they were.
            TimeoutError: all slots are in use.
        """
        with self.hold([name], timeout=timeout) as held:
            return held.numbers[name]

    @contextlib.contextmanager
    def hold(self, names: Sequence[str], *, timeout: float = 0.0) -> Iterator[Held]:
        """Have adapters in slots, all or none, and keep them there while inside.

        Raises:
            ValueError: there are more names than slots.
            KeyError, FileNotFoundError, ValueError, TimeoutError: as `load`; the message names the adapter.
        """
        distinct = list(dict.fromkeys(names))
        if len(distinct) > self.count:
            raise ValueError(
                f"{len(distinct)} adapters are asked for at once; expected at most {self.count}, the slots"
            )
        deadline = time.monotonic() + timeout
        with contextlib.ExitStack() as stack:
            numbers, scales = {}, {}
            with self._changed:  # those that are there first: they are not to make room for the others
                order = sorted(distinct, key=lambda name: name not in self._slot_of)
            for name in order:
                numbers[name], config = self._acquire(name, deadline)
                stack.callback(self._release, name)
                scales[name] = config.scale
            yield Held(numbers, self.slots, scales)

    def _acquire(self, name: str, deadline: float) -> tuple[int, SteerConfig]:
        with self._changed:
            while True:
                self._known(name)
                if name in self._slot_of:
                    self._slot_of.move_to_end(name)
                    self._holders[name] += 1
                    self._count(hits=1)
                    return self._slot_of[name], self._configs[name]
                if name not in self._loading:
                    break
                self._changed.wait()  # another thread is at it, and may fail
            self._loading.add(name)
            source = self._sources[name]
        slot = None
        try:
            # Read and checked before a slot is taken, and without the lock: others go on.
            config, tensors, nbytes = self._read(source)
            slot = self._take_slot(name, deadline)
            self._write(slot, config, tensors)
            with self._changed:
                self._slot_of[name], self._configs[name] = slot, config
                self._holders[name] += 1
                self._count(loads=1, loaded_bytes=nbytes)
            return slot, config
        except BaseException as error:
            with self._changed:
                if slot is not None:
                    self._free.append(slot)
                if not isinstance(error, TimeoutError):
                    self._count(failures=1)
            if type(error) in (ValueError, FileNotFoundError, NotADirectoryError):
                raise type(error)(f"adapter {name!r} cannot be served: {error}") from error
            raise
        finally:
            with self._changed:
                self._loading.discard(name)
                self._changed.notify_all()

    def _release(self, name: str) -> None:
        with self._changed:
            self._holders[name] -= 1
            if not self._holders[name]:
                del self._holders[name]
            self._changed.notify_all()

    def _take_slot(self, name: str, deadline: float) -> int:
        """A slot that is free, or that of the least recently used adapter which nobody holds."""
        with self._changed:
            while True:
                if self._free:
                    return self._free.pop()
                victim = next((other for other in self._slot_of if not self._holders[other]), None)
                if victim is not None:
                    del self._configs[victim]
                    self._count(evictions=1)
                    return self._slot_of.pop(victim)
                remaining = deadline - time.monotonic()
                if remaining <= 0 or not self._changed.wait(remaining):
                    raise TimeoutError(
                        f"adapter {name!r} finds no slot: all {self.count} are in use by running batches; expected "
                        "one to end, more slots, or a timeout to wait for it"
                    )

    def _read(self, source: str) -> tuple[SteerConfig, ByLayer, int]:
        """An adapter's config, its tensors by layer, and their bytes; all checked."""
        file = read_adapter(source, self._decoder.layout, check_base=self._check_base)
        rank, tensors = file.config.rank, file.tensors
        if rank > self.rank:
            raise ValueError(f"{source} is of rank {rank}; expected at most {self.rank}, the rank of the pool's slots")
        outside = sorted(tensors.keys() - self.slots.keys())
        if outside:
            raise ValueError(f"{source} steers layer {outside[0]}; expected those of the pool, {list(self.slots)}")
        return file.config, tensors, sum(t.nbytes for named in tensors.values() for t in named.values())

    def _write(self, slot: int, config: SteerConfig, tensors: Mapping[int, Mapping[str, Tensor]]) -> None:
        for index, slots in self.slots.items():
            if index in tensors:
                slots.put(slot, tensors[index], config.activation)
            else:
                slots.clear(slot)

    def _count(self, **more: int) -> None:
        done = self._statistics
        self._statistics = replace(done, **{name: getattr(done, name) + number for name, number in more.items()})

    # ------------------------------------------------------------------------------------- beside adapters of the model

    @contextlib.contextmanager
    def borrow(self, name: str, config: SteerConfig, tensors: Mapping[int, Mapping[str, Tensor]]) -> Iterator[int]:
        """A slot for an adapter that the model has loaded, while a batch runs; what is in it is forgotten then.

        Raises:
            ValueError: it does not fit the slots.
            TimeoutError: all are in use.
        """
        if config.rank > self.rank:
            raise ValueError(
                f"adapter {name!r} is of rank {config.rank}; expected at most {self.rank}, that of the pool's slots"
            )
        outside = sorted(tensors.keys() - self.slots.keys())
        if outside:
            raise ValueError(
                f"adapter {name!r} steers layer {outside[0]}; expected those of the pool, {list(self.slots)}"
            )
        slot = self._take_slot(name, 0.0)
        try:
            self._write(slot, config, tensors)
            yield slot
        finally:
            with self._changed:
                self._free.append(slot)
                self._changed.notify_all()


@contextlib.contextmanager
def hold_adapters(
    pool: AdapterPool | None, sites: Mapping[int, SteeringSite], configs: Mapping[str, SteerConfig], names: list[str]
) -> Iterator[Held]:
    """The adapters of a batch in slots: the pool's, or slots of their own where there is no pool.

    Args:
        sites: the model's, by layer.
        configs: of the adapters that the model has loaded; others are the pool's.
        names: each once.
    """
    own = [name for name in names if name in configs]
    with contextlib.ExitStack() as stack:
        if pool is None:
            yield stack.enter_context(hold_loaded(sites, configs, own))
            return
        held = stack.enter_context(pool.hold([name for name in names if name not in configs]))
        numbers, scales = dict(held.numbers), dict(held.scales)
        for name in own:
            tensors = adapter_tensors(sites, name)
            numbers[name] = stack.enter_context(pool.borrow(name, configs[name], tensors))
            scales[name] = configs[name].scale
        yield Held(numbers, held.slots, scales)


def make_slots(decoder: Decoder, indices: Sequence[int], count: int, rank: int, dtype: torch.dtype) -> dict[int, Slots]:
    """A pool's empty slots, for each of these layers on its device."""
    return {
        index: Slots(
            count,
            rank,
            decoder.hidden,
            dtype=dtype,
            device=execution_device(decoder.layers[index]),
            down_bias=rank > 0,
            up_bias=True,
        )
        for index in indices
    }


def checked_size(slots: Any, rank: Any, dtype: Any) -> torch.dtype:
    """The dtype by name; an error if a pool cannot have such slots."""
    for name, value, least in (("slots", slots, 1), ("rank", rank, 0)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}; expected an integer")
        if value < least:
            raise ValueError(f"{name} is {value}; expected at least {least}")
    if rank > MAX_RANK:
        raise ValueError(f"rank is {rank}; expected at most {MAX_RANK}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    return DTYPES[dtype]
