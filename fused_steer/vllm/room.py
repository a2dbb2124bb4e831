"""The room that a server's slots have for adapters."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from ..adapters.files import AdapterFile
from ..adapters.parameters import DOWN_BIAS, UP_BIAS, check_range, steered
from ..kernels import MAX_RANK
from .options import DTYPES, KEY, Options


@dataclass(frozen=True)
class Room:
    """The shapes and the dtype of the slots at each layer.

    Attributes:
        rank: the highest rank; 0 for vectors only.
        dtype: that of the slots.
        rounds: whether adapters of a wider dtype are rounded to it. If not, they are refused.
        layers: the layers with slots; None: all of the model.
        down_bias, up_bias: whether there is room for b1 and for b2.
        limit: the name of the option that limits the rank.
    """

    rank: int
    dtype: torch.dtype = torch.float32
    rounds: bool = True
    layers: frozenset[int] | None = None
    down_bias: bool = True
    up_bias: bool = True
    limit: str = "--max-lora-rank"

    def check(self, what: str, file: AdapterFile) -> None:
        """Check that the slots have room for an adapter.

        Raises:
            ValueError: they have not.
        """
        check_range(what, {p: steered(file.config.form, named) for p, named in file.tensors.items()}, self.dtype)
        rank = _rank(file)
        if rank > self.rank:
            raise ValueError(f"{what} is of rank {rank}; expected at most {self.rank} ({self.limit})")
        if self.layers is not None and (beyond := sorted({place.layer for place in file.tensors} - self.layers)):
            layers, room = (", ".join(map(str, some)) for some in (beyond, sorted(self.layers)))
            raise ValueError(f"{what} steers in the layers {layers}; expected the layers {room} alone ({KEY}.layers)")
        for name, there in ((DOWN_BIAS, self.down_bias), (UP_BIAS, self.up_bias)):
            if not there and _has(file, name):
                raise ValueError(f"{what} has {name}; expected none, as the adapters that the slots were made for")
        if not self.rounds and (wide := _dtypes(file) - {self.dtype, *_narrower(self.dtype)}):
            names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in wide))
            expected = str(self.dtype).removeprefix("torch.")
            raise ValueError(f"{what} is in {names}; expected {expected}, the dtype of the slots ({KEY}.dtype)")


def make_room(options: Options | None, max_rank: int | None, files: Collection[AdapterFile]) -> Room:
    """Return the room of a server.

    Args:
        options: the server's.
        max_rank: `--max-lora-rank`; None without --enable-lora.
        files: the adapters in the directory that the options name.

    Raises:
        ValueError: the options leave a rank open.
    """
    room = Room(min(max_rank, MAX_RANK) if max_rank is not None else 0)
    if files:
        dtypes = {dtype for file in files for dtype in _dtypes(file)}
        room = Room(
            max(map(_rank, files)),
            dtypes.pop() if len(dtypes) == 1 else torch.float32,
            len(dtypes) > 1,
            frozenset(place.layer for file in files for place in file.tensors),
            any(_has(file, DOWN_BIAS) for file in files),
            any(_has(file, UP_BIAS) for file in files),
            f"{KEY}.rank",
        )
    elif max_rank is None and (options is None or options.rank is None):
        raise ValueError(f"{KEY} has no rank and no adapters; expected one of them without --enable-lora")
    if options is None:
        return room
    if options.rank is not None:
        room = replace(room, rank=options.rank, limit=f"{KEY}.rank")
    if options.dtype is not None:
        room = replace(room, dtype=DTYPES[options.dtype], rounds=True)
    if options.layers is not None:
        room = replace(room, layers=frozenset(options.layers))
    return room if room.rank else replace(room, down_bias=False, up_bias=True)


def _rank(file: AdapterFile) -> int:
    return 0 if file.config.form == "vector" else file.config.rank


def _has(file: AdapterFile, name: str) -> bool:
    return any(name in tensors for tensors in file.tensors.values())


def _dtypes(file: AdapterFile) -> set[torch.dtype]:
    if file.config.form == "loreft":
        return {torch.float32}  # its W1 and W2 are computed from the file's tensors
    return {tensor.dtype for tensors in file.tensors.values() for tensor in tensors.values()}


def _narrower(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    return (torch.bfloat16, torch.float16) if dtype == torch.float32 else ()
