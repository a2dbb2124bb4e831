"""AdapterPool: serves thousands of adapters from files, with a few at a time in slots on the device.

It is one file because one lock guards all of a pool's state.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..adapters.files import CONFIG_NAME, read_adapter
from ..adapters.parameters import SITE, ByPlace, Place, by_lower, check_name, check_range, refuse_clash, steered
from ..adapters.saving import checked_path
from ..config import SteerConfig
from ..model.decoder import Decoder
from ..model.scopes import renewed_after_fork
from ..positions import read_positions
from .requests import checked_timeout, distinct_names, with_prefix
from .slots import Held, Slots


@dataclass(frozen=True)
class PoolStatistics:
    """Counts of a pool's work since it was made.

    Attributes:
        hits: requests for an adapter that was in a slot already.
        loads: adapters loaded into a slot.
        evictions: adapters removed from a slot to make room for another.
        failures: loads that failed.
        loaded_bytes: bytes of the tensors read from files.
    """

    hits: int = 0
    loads: int = 0
    evictions: int = 0
    failures: int = 0
    loaded_bytes: int = 0


class AdapterPool:
    """Adapters that a model can serve in batches, registered by name and loaded on first use.

    `model.steering.make_pool` makes a pool, and `model.steering.batch` takes its names. Any thread may call any method.
    One bad adapter raises for its own request; others are unaffected. A loaded adapter does not change when its file
    changes; `reload` reads the new file.

    On an accelerator a slot is written on the loading thread's current stream. If the model runs on another stream, the
    caller has to synchronise the two.
    """

    def __init__(
        self,
        slots: Mapping[Place, Slots],
        decoder: Decoder,
        own_names: Callable[[], Iterable[str]],
        check_base: bool,
    ) -> None:
        """Internal: use `Steering.make_pool`.

        Args:
            slots: the slots of each place.
            decoder: the model's decoder.
            own_names: returns the names of the model's adapters.
            check_base: refuse an adapter of another base model.
        """
        self.slots, one = slots, next(iter(slots.values()))
        self.count, self.rank = one.count, one.rank
        self._decoder, self._own_names, self._check_base = decoder, own_names, check_base
        self._changed = threading.Condition(threading.RLock())  # guards all fields below
        self._sources: dict[str, str] = {}
        self._by_lower: dict[str, str] = {}  # the registered names, by their lower-case form
        self._versions: Counter[str] = Counter()  # number of reloads and removals of an adapter
        self._configs: dict[str, SteerConfig] = {}  # configs of the loaded adapters
        self._slot_of: OrderedDict[str, int] = OrderedDict()  # slots of the loaded adapters, least recently used first
        # A hold or reading lives as long as its call, so that an exception leaves none behind.
        self._holds: weakref.WeakSet[_Hold] = weakref.WeakSet()
        self._waiting: list[weakref.ref[_Hold]] = []  # in order of arrival
        self._reading: weakref.WeakValueDictionary[str, Future[_Read]] = weakref.WeakValueDictionary()
        self._statistics = PoolStatistics()
        renewed_after_fork.add(self)

    def after_fork(self) -> None:
        """Drop the holds of other threads. In a forked process only the forking thread goes on."""
        self._changed = threading.Condition(threading.RLock())
        me = threading.get_ident()
        self._holds = weakref.WeakSet(hold for hold in self._holds if hold.thread == me)
        self._waiting.clear()
        self._reading.clear()

    def __reduce__(self) -> Any:
        return type(None), ()  # a copied model has no pool, as the slots belong to this one

    # ----------------------------------------------------------------------------------------------- names and counts

    @property
    def names(self) -> list[str]:
        """All registered names, in order of registration."""
        with self._changed:
            return list(self._sources)

    @property
    def loaded(self) -> list[str]:
        """The names of adapters in slots, least recently used first."""
        with self._changed:
            return list(self._slot_of)

    @property
    def statistics(self) -> PoolStatistics:
        with self._changed:
            return self._statistics

    @property
    def nbytes(self) -> int:
        """The bytes of all slots, on all devices."""
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

    # -------------------------------------------------------------------------------------------------- registration

    def register(self, name: str, source: str | os.PathLike[str]) -> None:
        """Register an adapter saved in a directory or on the hub. It is not opened until it is used.

        Raises:
            TypeError, ValueError: the name is invalid or taken, or the source is no path or an empty one.
        """
        check_name(name)
        checked_path(source, "source", "an adapter's directory, or its id on the hub")
        with self._changed:
            self._add({name: os.fspath(source)})

    def register_directory(self, directory: str | os.PathLike[str]) -> list[str]:
        """Register each subdirectory that has an adapter_config.json, under its own name; all or none.

        Returns:
            The names, sorted. Those that begin with a dot are left out: what is still being copied may have one.

        Raises:
            FileNotFoundError, NotADirectoryError: there is no such directory.
            TypeError, ValueError: the directory is no path or an empty one, or a name is invalid or taken.
        """
        root = checked_path(directory, "directory", "one that holds adapters' directories")
        if not root.exists():
            raise FileNotFoundError(f"no directory {root}; expected one that holds adapters' directories")
        if not root.is_dir():
            raise NotADirectoryError(f"{root} is a file; expected a directory that holds adapters' directories")
        with os.scandir(root) as entries:
            found = sorted(e.name for e in entries if e.name[0] != "." and (root / e.name / CONFIG_NAME).is_file())
        with self._changed:
            self._add({name: str(root / name) for name in found})
        return found

    def _add(self, sources: Mapping[str, str]) -> None:
        """Register adapters, all or none. An invalid or taken name raises ValueError."""
        own, new = by_lower(self._own_names()), dict[str, str]()
        for name in sources:
            check_name(name)
            if name in self._sources:
                raise ValueError(
                    f"adapter {name!r} is registered already, for {self._sources[name]}; expected a new name"
                )
            refuse_clash(name, self._by_lower, " in the pool")
            refuse_clash(name, new, " to be registered")
            refuse_clash(name, own, " in the model")
            new[name.lower()] = name
        self._sources |= sources
        self._by_lower |= new

    def refuse_clash(self, name: str) -> None:
        """Raise ValueError for a new name of an adapter of the model that the pool has already."""
        with self._changed:
            refuse_clash(name, self._by_lower, " in the pool")

    def remove(self, name: str) -> None:
        """Remove an adapter from the pool.

        Raises:
            KeyError: there is no such adapter.
            ValueError: it is in use by a running batch.
        """
        with self._changed:
            self._check_idle(name, "removed")
            self._forget(name)
            del self._sources[name], self._by_lower[name.lower()]
            self._changed.notify_all()

    def reload(self, name: str) -> None:
        """Read an adapter from its file again on its next use.

        Raises:
            KeyError, ValueError: see `remove`.
        """
        with self._changed:
            self._check_idle(name, "reloaded")
            self._forget(name)
            self._changed.notify_all()

    def _check_idle(self, name: str, done: str) -> None:
        self._known(name)
        if self._is_held(name):
            raise ValueError(f"adapter {name!r} is in use by a running batch; expected it to be {done} afterwards")

    def _forget(self, name: str) -> None:
        self._versions[name] += 1  # makes a reading in progress out of date
        self._slot_of.pop(name, None)  # first, because an exception may interrupt: each adapter in a slot has a config
        self._configs.pop(name, None)

    def _is_held(self, name: str) -> bool:
        return any(name in hold.names for hold in self._holds)

    def _known(self, name: str) -> None:
        if not isinstance(name, str) or name not in self._sources:
            raise KeyError(f"no adapter {name!r:.200} in the pool; expected one of its {len(self._sources)}")

    # ------------------------------------------------------------------------------------------- loading and holding

    def load(self, name: str, *, timeout: float = 0.0) -> int:
        """Load an adapter into a slot and return the slot's number. It may be evicted once no batch uses it.

        Args:
            name: the adapter.
            timeout: seconds to wait for a slot if running batches use them all. Time to read the files does not count.

        Raises:
            KeyError: there is no such adapter.
            FileNotFoundError, ValueError, OSError: the adapter is missing, is broken or does not fit, or cannot be
                read. The message names it. Other adapters are unaffected.
            TimeoutError: all slots are in use.
        """
        with self.hold([name], timeout=timeout) as held:
            return held.numbers[name]

    @contextlib.contextmanager
    def hold(
        self,
        names: Sequence[str],
        *,
        timeout: float = 0.0,
        own: Mapping[str, tuple[SteerConfig, ByPlace]] | None = None,
    ) -> Iterator[Held]:
        """Hold adapters in slots, all or none, inside this context.

        All slots are taken at once, in order of arrival, so that holders never wait for each other.

        Args:
            names: names of the pool.
            timeout: see `load`.
            own: further adapters by name, with config and with W1, b1, W2 and b2 by layer. They get slots inside the
                context.

        Raises:
            TypeError, ValueError: `names` is no list, or the timeout no number.
            ValueError: there are more names than slots, or an adapter of `own` does not fit the slots.
            KeyError, TimeoutError, FileNotFoundError, ValueError, OSError: see `load`.
        """
        distinct, own, timeout = distinct_names(names), dict(own or {}), checked_timeout(timeout)
        if len(distinct) + len(own) > self.count:
            raise ValueError(
                f"{len(distinct) + len(own)} adapters are needed at once; expected at most {self.count}, the slots"
            )
        for name, (config, tensors) in own.items():
            self._check_room(f"adapter {name!r}", config, tensors)
        deadline = time.monotonic() + timeout
        hold = _Hold()
        futures: dict[str, Future[_Read]] = {}  # kept until the slots are taken, so that other callers can share them
        while True:
            # Files are read and checked before a slot is taken, and without the lock, so that other callers can go on.
            for name in self._unread(distinct, futures):
                futures[name] = self._read_once(name)
            held = self._take(hold, distinct, own, futures, deadline)
            if held is not None:
                break
        try:
            yield held
        finally:
            with self._changed:
                self._holds.discard(hold)
                self._changed.notify_all()

    def _unread(self, names: Sequence[str], futures: Mapping[str, Future[_Read]]) -> list[str]:
        """Return the adapters that are neither in slots nor read in their present version."""
        with self._changed:
            for name in names:
                self._known(name)
            return [
                name
                for name in names
                if name not in self._slot_of
                and (name not in futures or futures[name].result().version != self._versions[name])
            ]

    def _read_once(self, name: str) -> Future[_Read]:
        """Return an adapter, read by this thread or by another thread that already began."""
        while True:
            with self._changed:
                self._known(name)
                source, version = self._sources[name], self._versions[name]
                future = self._reading.get(name)
                begun = future is None
                if begun:
                    future = self._reading[name] = Future()
            assert future is not None
            if begun:
                break
            with contextlib.suppress(_Abandoned):
                if future.result().version == version:
                    return future
            with self._changed:
                if self._reading.get(name) is future:
                    del self._reading[name]
        try:
            future.set_result(_Read(version, *self._read(source)))
            return future
        except BaseException as error:
            named = with_prefix(error, f"adapter {name!r} cannot be served") if isinstance(error, Exception) else None
            if not future.done():
                future.set_exception(named or _Abandoned())
            with self._changed:
                self._reading.pop(name, None)
                self._count(failures=1)
            raise (named or error) from (error if named else error.__cause__)

    def _take(
        self,
        hold: _Hold,
        names: Sequence[str],
        own: Mapping[str, tuple[SteerConfig, ByPlace]],
        futures: Mapping[str, Future[_Read]],
        deadline: float,
    ) -> Held | None:
        """Wait for room and take all slots. Return None if an adapter was evicted meanwhile and has to be read.

        Raises:
            KeyError: an adapter was removed meanwhile.
            TimeoutError: there was no room in time.
        """
        with self._changed:
            me = weakref.ref(hold)
            self._waiting.append(me)
            try:
                while True:
                    if self._unread(names, futures):
                        return None
                    if self._may_take(hold, names, own):
                        return self._fill(hold, names, own, futures)
                    remaining = deadline - time.monotonic()
                    if remaining <= 0:
                        what = ", ".join(map(repr, [*names, *own]))
                        raise TimeoutError(
                            f"adapter {what} finds no slot: all {self.count} are in use by running batches; expected "
                            "one to end, more slots, or a timeout to wait for it"
                        )
                    self._changed.wait(min(remaining, _LOOK_AGAIN))
            finally:
                self._waiting.remove(me)
                self._changed.notify_all()

    def _may_take(self, hold: _Hold, names: Sequence[str], own: Collection[str]) -> bool:
        """Return whether there is room, and no earlier caller waits for it."""
        missing = [name for name in names if name not in self._slot_of]
        idle = [name for name in self._slot_of if name not in names and not self._is_held(name)]
        if len(missing) + len(own) > len(self._free()) + len(idle):
            return False
        self._waiting = [one for one in self._waiting if one() is not None]
        takes_none = not missing and not own and all(map(self._is_held, names))
        return takes_none or self._waiting[0]() is hold

    def _free(self) -> list[int]:
        """Return the empty slots."""
        used = {*self._slot_of.values(), *(slot for hold in self._holds for slot in hold.own)}
        return [slot for slot in range(self.count) if slot not in used]

    def _fill(
        self,
        hold: _Hold,
        names: Sequence[str],
        own: Mapping[str, tuple[SteerConfig, ByPlace]],
        futures: Mapping[str, Future[_Read]],
    ) -> Held:
        numbers, scales = {}, {}
        hold.names = frozenset(names)
        self._holds.add(hold)
        added: list[str] = []
        try:
            for name in names:
                if name in self._slot_of:
                    self._slot_of.move_to_end(name)
                    self._count(hits=1)
                else:
                    read, slot = futures[name].result(), self._free_one()
                    self._write(slot, read.config, read.tensors)
                    added.append(name)
                    self._configs[name], self._slot_of[name] = read.config, slot
                    self._count(loads=1, loaded_bytes=read.nbytes)
                numbers[name], scales[name] = self._slot_of[name], self._configs[name].scale
            for name, (config, tensors) in own.items():
                slot = self._free_one()
                hold.own.append(slot)
                self._write(slot, config, tensors)
                numbers[name], scales[name] = slot, config.scale
            positions = {name: read_positions(self._configs[name].positions) for name in names}
            positions |= {name: read_positions(config.positions) for name, (config, _) in own.items()}
            return Held(numbers, self.slots, scales, positions)
        except BaseException:
            self._holds.discard(hold)
            for name in added:
                self._slot_of.pop(name, None)
                self._configs.pop(name, None)
            raise

    def _free_one(self) -> int:
        """Return an empty slot, or evict the least recently used adapter that is not held."""
        free = self._free()
        if free:
            return free[0]
        victim = next(name for name in self._slot_of if not self._is_held(name))
        self._count(evictions=1)
        slot, _ = self._slot_of.pop(victim), self._configs.pop(victim, None)
        return slot

    def _check_room(self, what: Any, config: SteerConfig, tensors: ByPlace) -> None:
        """Raise ValueError if an adapter does not fit the slots."""
        if config.rank > self.rank:
            raise ValueError(
                f"{what} is of rank {config.rank}; expected at most {self.rank}, the rank of the pool's slots"
            )
        outside = sorted(set(tensors) - self.slots.keys())
        if outside:
            layers = list(dict.fromkeys(place.layer for place in self.slots))
            sites = list(dict.fromkeys(place.site for place in self.slots))
            at = "" if sites == [SITE] else f" at {', '.join(sites)}"
            raise ValueError(f"{what} steers {outside[0]}; expected those of the pool, {layers}{at}")
        check_range(what, tensors, next(iter(self.slots.values())).dtype)

    def _read(self, source: str) -> tuple[SteerConfig, ByPlace, int]:
        """Read and check an adapter. Return its config, W1, b1, W2 and b2 by place, and the bytes of its tensors."""
        file = read_adapter(source, self._decoder.layout, check_base=self._check_base)
        tensors = {i: steered(file.config.form, named) for i, named in file.tensors.items()}
        self._check_room(source, file.config, tensors)
        nbytes = sum(t.nbytes for named in file.tensors.values() for t in named.values())
        return file.config, tensors, nbytes

    def _write(self, slot: int, config: SteerConfig, tensors: Mapping[Place, Mapping[str, Tensor]]) -> None:
        for place, slots in self.slots.items():
            if place in tensors:
                slots.put(slot, tensors[place], config.activation)
            else:
                slots.clear(slot)

    def _count(self, **more: int) -> None:
        done = self._statistics
        self._statistics = replace(done, **{name: getattr(done, name) + number for name, number in more.items()})


class _Hold:
    """The adapters that one caller holds: names of the pool, and slots of the caller's own adapters."""

    def __init__(self) -> None:
        self.names: frozenset[str] = frozenset()
        self.own: list[int] = []
        self.thread = threading.get_ident()


@dataclass(frozen=True)
class _Read:
    """An adapter as it was read: its version, config, tensors and their bytes."""

    version: int
    config: SteerConfig
    tensors: ByPlace
    nbytes: int


class _Abandoned(Exception):
    """The thread that was reading an adapter was interrupted."""


#: Seconds between checks while waiting. A hold that ended with an exception may not have notified the others.
_LOOK_AGAIN = 0.25
