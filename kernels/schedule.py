"""How a launch is laid out: block sizes, programs and warps, chosen from shape and device. The one place for it.

Forward has two schedules. *Many tokens*: a program owns a tile of rows and all of d; it reads the tile to reduce
a = x W1ᵀ, then reads it again (from L2) to write x + δ. It walks several tiles, and no more tiles are in flight than
L2 holds. Where it does not hold one for each multiprocessor (large d), several programs share a tile: each of them
reduces the whole of a, and writes its own part of the columns. *Few tokens* (decode): there are too few tiles to fill
the device, and a tile's columns are split in the same way. One launch either way, no synchronisation between programs,
and the same kernel: a program that has a tile to itself is a split of one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

import torch

MAX_RANK = 256
MAX_SPLITS = 32  # each split of a tile's columns reduces the whole of a again, from L2


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class Device:
    """What a schedule has to know of a device. `gpu` is Triton's name of the vendor; `l2` is in bytes."""

    gpu: str
    multiprocessors: int
    l2: int


#: The targets that every kernel is compiled for ahead of time, by their common name.
TARGETS: dict[str, Device] = {
    "sm_80": Device("cuda", 108, 40 << 20),  # A100
    "sm_90": Device("cuda", 132, 50 << 20),  # H100
    "sm_100": Device("cuda", 148, 126 << 20),  # B200
    "gfx942": Device("hip", 304, 256 << 20),  # MI300X; its memory-side Infinity Cache plays L2's part here
}

#: For the interpreter: small, so that tiles are walked and columns are split at test sizes too.
_INTERPRETED_DEVICE = Device("cuda", 4, 1 << 20)


@functools.cache
def describe_device(device: torch.device) -> Device:
    """The description of a PyTorch device."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = "hip" if torch.version.hip else "cuda"
        # ROCm reports one die's L2, of 4 MiB; see TARGETS.
        l2 = TARGETS["gfx942"].l2 if gpu == "hip" else properties.L2_cache_size
        return Device(gpu, properties.multi_processor_count, l2)
    if device.type == "xpu":
        properties = torch.xpu.get_device_properties(device)
        return Device("xpu", properties.gpu_subslice_count, getattr(properties, "L2_cache_size", 0) or 64 << 20)
    return _INTERPRETED_DEVICE


class Layout(Protocol):
    """What a launch has to know of its layout: the kernel's block sizes by name, warps, stages."""

    @property
    def constants(self) -> dict[str, int]: ...
    @property
    def num_warps(self) -> int: ...
    @property
    def num_stages(self) -> int: ...


@dataclass(frozen=True)
class Schedule:
    """A launch's layout. `programs` walk the tiles of `block_n` rows; `splits` divide the other axis (columns in
    `forward`, rows in `columns`, ranks in `finish`) into parts of at most `part` elements."""

    block_n: int
    block_d: int
    block_r: int
    programs: int
    splits: int
    part: int
    num_warps: int
    num_stages: int

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's block sizes by name."""
        return {"BLOCK_N": self.block_n, "BLOCK_D": self.block_d, "BLOCK_R": self.block_r}


def padded_rank(rank: int) -> int:
    """The rank's extent in registers: a power of two and at least 16, which is what `tl.dot` takes; 0 stays 0."""
    return max(16, next_power_of_2(rank)) if rank else 0


_Tile = tuple[int, int, int, int]  # rows, columns, warps, stages
_RANKS = (0, 16, 32, 64, 128, 256)

# fmt: off
#: The tiles by vendor, kernel and bytes of an element, one for each padded rank of `_RANKS`: with these every target of
#: the vendor compiles without spilling a register, and each thread has 16 bytes of a bf16 tile (see `_wide`).
_TILES: dict[tuple[str, str, int], tuple[_Tile, ...]] = {
    ("cuda", "forward", 2): (
        (16, 256, 4, 1), (16, 128, 4, 4), (16, 256, 8, 3), (32, 64, 8, 2), (32, 64, 8, 2), (32, 64, 8, 2),
    ),
    ("cuda", "forward", 4): (
        (16, 256, 4, 1), (16, 64, 8, 3), (16, 128, 8, 3), (16, 128, 8, 3), (16, 64, 8, 3), (16, 32, 8, 2),
    ),
    ("hip", "forward", 2): (
        (16, 256, 4, 1), (16, 128, 4, 2), (16, 128, 4, 2), (16, 128, 4, 2), (16, 128, 4, 1), (32, 64, 4, 1),
    ),
    ("hip", "forward", 4): (
        (16, 256, 4, 1), (16, 128, 4, 2), (16, 128, 4, 2), (16, 128, 4, 2), (16, 64, 4, 2), (16, 16, 8, 2),
    ),
}
#: The same for a d that no power of two from 64 up divides: masks, and scalar accesses where rows are not aligned,
#: cost registers.
_RAGGED_TILES: dict[tuple[str, str], tuple[_Tile, ...]] = {
    ("cuda", "forward"): (
        (16, 32, 4, 1), (16, 32, 8, 2), (16, 32, 8, 2), (16, 32, 8, 2), (16, 32, 8, 2), (16, 16, 8, 1),
    ),
    ("hip", "forward"): (
        (16, 32, 4, 1), (16, 32, 4, 2), (16, 32, 8, 2), (16, 16, 4, 2), (16, 16, 8, 2), (16, 16, 8, 2),
    ),
}
# fmt: on


def _wide(rows: int, columns: int, warps: int, itemsize: int, gpu: str) -> bool:
    """Whether a tile has 16 bytes for each thread: with fewer, its accesses are narrower than 128 bits."""
    lanes = 64 if gpu == "hip" else 32
    return rows * columns * itemsize >= 16 * lanes * warps


def _tile(kernel: str, hidden: int, block_r: int, itemsize: int, gpu: str) -> _Tile:
    """The tile of `kernel`: the table's, its columns halved until they divide d; see `_TILES` and `_wide`."""
    vendor = "hip" if gpu == "hip" else "cuda"
    rows, columns, warps, stages = _TILES[vendor, kernel, itemsize][_RANKS.index(block_r)]
    narrow = columns
    while narrow > 64 and hidden % narrow:
        narrow //= 2
    if narrow < columns and not _wide(rows, narrow, warps, itemsize, gpu):
        rows *= 2
    if hidden % narrow:
        rows, columns, warps, stages = _RAGGED_TILES[vendor, kernel][_RANKS.index(block_r)]
        narrow = max(16, min(columns, next_power_of_2(hidden)))
    return rows, narrow, warps, stages


@functools.lru_cache(maxsize=4096)
def forward_schedule(tokens: int, hidden: int, rank: int, itemsize: int, device: Device) -> Schedule:
    """Layout of the forward kernel for N = `tokens`, d = `hidden`, elements of `itemsize` bytes."""
    block_r = padded_rank(rank)
    block_n, block_d, warps, stages = _tile("forward", hidden, block_r, itemsize, device.gpu)
    tiles = ceil_div(tokens, block_n)
    blocks = ceil_div(hidden, block_d)
    if rank == 0:  # elementwise: nothing is reduced, every block is a program's
        programs, splits = tiles, blocks
    else:
        in_flight = block_n * hidden * itemsize * 2  # residual and branch, read twice
        resident = max(1, min(4, int(0.75 * device.l2) // (in_flight * device.multiprocessors)))
        # The programs that share a tile share its bytes in L2: the fewest with which the tiles of all fit.
        fitting = device.l2 * 9 // 10 // in_flight
        sharing = device.multiprocessors // (fitting + 1) + 1
        programs = min(tiles, max(1, resident * device.multiprocessors // sharing))
        splits = min(blocks, MAX_SPLITS, max(sharing, device.multiprocessors // tiles)) if tiles else 1
    part = ceil_div(blocks, splits) * block_d
    return Schedule(block_n, block_d, block_r, programs, ceil_div(hidden, part), part, warps, stages)


CROSS_RANK = 64  # the side of a tile of daᵀ h, which one program sums in registers

_Tile = tuple[int, int, int, int, int]  # rows, columns, warps, stages, programs that a multiprocessor is to hold

# fmt: off
#: The backward's tiles by vendor, kernel and form of the operands, one for each padded rank of `_RANKS`: "bf16", "tf32"
#: (of fp16), and "fp32" (three parts of tf32, or plain fp32).
_BACKWARD_TILES: dict[tuple[str, str, str], tuple[_Tile, ...]] = {
    ("cuda", "rows", "bf16"): (
        (16, 256, 4, 2), (32, 256, 4, 3), (32, 256, 4, 3), (64, 128, 8, 3), (64, 64, 8, 3), (32, 64, 8, 3),
    ),
    ("cuda", "rows", "tf32"): (
        (16, 256, 4, 2), (32, 256, 4, 3), (32, 128, 4, 3), (32, 128, 4, 3), (32, 128, 8, 2), (32, 64, 8, 2),
    ),
    ("cuda", "rows", "fp32"): (
        (16, 256, 4, 2), (32, 128, 8, 3), (32, 64, 4, 3), (32, 128, 8, 3), (32, 64, 8, 3), (16, 64, 8, 3),
    ),
    ("cuda", "columns", "bf16"): (
        (32, 128, 4, 3), (32, 128, 4, 3), (32, 128, 8, 3), (32, 128, 8, 3), (32, 64, 8, 3), (32, 64, 8, 2),
    ),
    ("cuda", "columns", "tf32"): (
        (32, 128, 4, 3), (32, 128, 4, 3), (32, 64, 4, 3), (32, 64, 8, 3), (32, 64, 8, 2), (32, 32, 8, 2),
    ),
    ("cuda", "columns", "fp32"): (
        (32, 128, 4, 3), (32, 128, 8, 2), (32, 64, 8, 2), (16, 64, 8, 2), (16, 32, 8, 2), (16, 16, 8, 1),
    ),
    ("hip", "rows", "bf16"): (
        (16, 256, 4, 2), (32, 128, 4, 2), (32, 128, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 1),
    ),
    ("hip", "rows", "fp32"): (
        (16, 256, 4, 2), (32, 128, 4, 2), (32, 128, 4, 2), (32, 128, 4, 2), (32, 64, 4, 2), (16, 32, 8, 2),
    ),
    ("hip", "columns", "bf16"): (
        (32, 128, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2), (16, 64, 2, 1), (16, 64, 2, 1), (16, 64, 2, 1),
    ),
    ("hip", "columns", "fp32"): (
        (32, 128, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2), (16, 64, 4, 2), (16, 64, 4, 2), (16, 16, 4, 1),
    ),
}
#: The same for a d that no power of two from 64 up divides.
_RAGGED_BACKWARD_TILES: dict[tuple[str, str], tuple[_Tile, ...]] = {
    ("cuda", "rows"): (
        (16, 64, 4, 2), (16, 64, 4, 2), (16, 64, 4, 2), (16, 32, 8, 2), (16, 32, 8, 2), (16, 16, 8, 2),
    ),
    ("cuda", "columns"): (
        (16, 64, 4, 2), (16, 64, 8, 2), (16, 64, 8, 2), (16, 32, 8, 2), (16, 16, 8, 2), (16, 16, 8, 1),
    ),
    ("hip", "rows"): (
        (16, 64, 4, 2), (16, 64, 4, 2), (16, 64, 4, 2), (16, 64, 4, 2), (16, 32, 4, 2), (16, 32, 8, 2),
    ),
    ("hip", "columns"): (
        (16, 64, 4, 2), (16, 16, 4, 2), (16, 32, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 4, 1),
    ),
}
# fmt: on


def _backward_tile(kernel: str, hidden: int, block_r: int, policy: str, gpu: str) -> _Tile:
    """The tile of `kernel`: the table's, its columns halved until they divide d; see `_BACKWARD_TILES` and `_wide`."""
    vendor = "hip" if gpu == "hip" else "cuda"
    form = policy if (vendor, kernel, policy) in _BACKWARD_TILES else "fp32"
    rows, columns, warps, stages = _BACKWARD_TILES[vendor, kernel, form][_RANKS.index(block_r)]
    narrow = columns
    while narrow > 64 and hidden % narrow:
        narrow //= 2
    if narrow < columns and not _wide(rows, narrow, warps, 4 if form == "fp32" else 2, gpu):
        rows *= 2
    if hidden % narrow:
        rows, columns, warps, stages = _RAGGED_BACKWARD_TILES[vendor, kernel][_RANKS.index(block_r)]
        narrow = max(16, min(columns, next_power_of_2(hidden)))
    return rows, narrow, warps, stages


@functools.lru_cache(maxsize=4096)
def rows_schedule(tokens: int, hidden: int, rank: int, policy: str, device: Device) -> Schedule:
    """Layout of the backward's first kernel, which reduces over d: a program reads its `block_n` rows once, and all of
    W2'. `policy`: the form of the operands, as `dot_precision` names it."""
    block_r = padded_rank(rank)
    block_n, block_d, warps, stages = _backward_tile("rows", hidden, block_r, policy, device.gpu)
    # Few tokens make shorter tiles, of 16 rows at least, as long as two thirds of the multiprocessors would be idle.
    itemsize = 2 if policy == "bf16" else 4
    while (
        block_n > 16
        and 3 * ceil_div(tokens, block_n) <= device.multiprocessors
        and _wide(block_n // 2, block_d, warps, itemsize, device.gpu)
    ):
        block_n //= 2
    return Schedule(block_n, block_d, block_r, ceil_div(tokens, block_n), 1, hidden, warps, stages)


@functools.lru_cache(maxsize=4096)
def columns_schedule(tokens: int, hidden: int, rank: int, policy: str, device: Device) -> Schedule:
    """Layout of the backward's second kernel, which reduces over tokens: a program owns `block_d` columns of a part of
    the rows (every `splits`-th tile), keeps its weights and its sums in registers, and writes the sums to a slab.
    The parts are chosen so that the programs, those of daᵀ h among them, fill the multiprocessors in whole waves."""
    block_r = padded_rank(rank)
    block_n, block_d, warps, stages = _backward_tile("columns", hidden, block_r, policy, device.gpu)
    blocks, tiles = ceil_div(hidden, block_d), ceil_div(tokens, block_n)
    a_part = blocks + (ceil_div(block_r, CROSS_RANK) ** 2 if rank else 0)
    at_once = 8 // warps * device.multiprocessors  # what the registers of a multiprocessor hold: eight warps

    def time(parts: int) -> int:
        # In tiles: what one program walks, and what its start, its slab and the adding of it cost.
        return ceil_div(a_part * parts, at_once) * (ceil_div(tiles, parts) + 4)

    parts = min(range(1, max(1, min(tiles, 2 * at_once // a_part)) + 1), key=time)
    return Schedule(block_n, block_d, block_r, blocks, parts, ceil_div(tiles, parts) * block_n, warps, stages)


def column_passes(schedule: Schedule, hidden: int) -> tuple[tuple[bool, bool], ...]:
    """(dx and dW2', dW1) of each launch of the columns kernel: one, as long as both gradients fit in registers."""
    most = 32 if hidden % schedule.block_d else 64  # masks cost registers
    return ((True, True),) if schedule.block_r <= most else ((True, False), (False, True))


@functools.lru_cache(maxsize=4096)
def finish_schedule(hidden: int, rank: int) -> Schedule:
    """Layout of the backward's last kernel, which adds the slabs: `programs` blocks of columns, `splits` tiles of
    `block_r` ranks. `block_n`: the sums of da that are added at a time."""
    block_d = 64 if rank > 16 else 32
    return Schedule(64, block_d, 16, ceil_div(hidden, block_d), max(1, ceil_div(rank, 16)), 16, 4, 3)
