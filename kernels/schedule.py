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

#: Smaller cards that kernels are compiled for too, without a promise of speed: `aot.CANNOT` says what they lack.
SMALLER_TARGETS: dict[str, Device] = {
    "sm_75": Device("cuda", 40, 4 << 20),  # T4
    "sm_86": Device("cuda", 82, 6 << 20),  # RTX 3090
    "sm_89": Device("cuda", 128, 72 << 20),  # RTX 4090
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
    `forward`, rows in `columns`) into parts of `part` elements each."""

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
    ("cuda", "rows", 2): (
        (16, 256, 4, 2), (32, 256, 4, 3), (32, 256, 4, 3), (32, 128, 4, 3), (32, 128, 4, 3), (32, 64, 8, 3),
    ),
    ("cuda", "rows", 4): (
        (16, 256, 4, 2), (32, 128, 8, 3), (32, 64, 4, 3), (32, 128, 8, 3), (32, 64, 8, 3), (16, 64, 8, 3),
    ),
    ("cuda", "columns", 2): (
        (32, 128, 4, 2), (32, 128, 8, 2), (16, 64, 4, 2), (32, 32, 4, 2), (32, 64, 8, 2), (32, 64, 8, 2),
    ),
    ("cuda", "columns", 4): (
        (32, 128, 4, 2), (32, 128, 8, 2), (16, 64, 4, 2), (16, 32, 4, 2), (16, 16, 8, 2), (16, 16, 8, 1),
    ),
    ("hip", "forward", 2): (
        (16, 256, 4, 1), (16, 128, 4, 2), (16, 128, 4, 2), (16, 128, 4, 2), (16, 128, 4, 1), (32, 64, 4, 1),
    ),
    ("hip", "forward", 4): (
        (16, 256, 4, 1), (16, 128, 4, 2), (16, 128, 4, 2), (16, 128, 4, 2), (16, 64, 4, 2), (16, 16, 8, 2),
    ),
    ("hip", "rows", 2): (
        (16, 256, 4, 2), (32, 128, 4, 2), (32, 128, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 1),
    ),
    ("hip", "rows", 4): (
        (16, 256, 4, 2), (32, 128, 4, 2), (32, 128, 4, 2), (32, 128, 4, 2), (32, 64, 4, 2), (16, 32, 8, 2),
    ),
    ("hip", "columns", 2): (
        (32, 128, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2), (16, 64, 2, 1), (16, 64, 2, 1), (16, 64, 2, 1),
    ),
    ("hip", "columns", 4): (
        (32, 128, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2), (16, 64, 4, 2), (16, 64, 4, 2), (16, 16, 4, 1),
    ),
}
#: The same for a d that no power of two from 64 up divides: masks, and scalar accesses where rows are not aligned,
#: cost registers.
_RAGGED_TILES: dict[tuple[str, str], tuple[_Tile, ...]] = {
    ("cuda", "forward"): (
        (16, 32, 4, 1), (16, 32, 8, 2), (16, 32, 8, 2), (16, 32, 8, 2), (16, 32, 8, 2), (16, 16, 8, 1),
    ),
    ("cuda", "rows"): (
        (16, 64, 4, 2), (16, 64, 4, 2), (16, 64, 4, 2), (16, 32, 8, 2), (16, 32, 8, 2), (16, 16, 8, 2),
    ),
    ("cuda", "columns"): (
        (16, 64, 4, 2), (16, 64, 8, 2), (16, 64, 8, 2), (16, 32, 8, 2), (16, 16, 8, 2), (16, 16, 8, 1),
    ),
    ("hip", "forward"): (
        (16, 32, 4, 1), (16, 32, 4, 2), (16, 32, 8, 2), (16, 16, 4, 2), (16, 16, 8, 2), (16, 16, 8, 2),
    ),
    ("hip", "rows"): (
        (16, 64, 4, 2), (16, 64, 4, 2), (16, 64, 4, 2), (16, 64, 4, 2), (16, 32, 4, 2), (16, 32, 8, 2),
    ),
    ("hip", "columns"): (
        (16, 64, 4, 2), (16, 16, 4, 2), (16, 32, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 4, 1),
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


@functools.lru_cache(maxsize=4096)
def rows_schedule(tokens: int, hidden: int, rank: int, itemsize: int, device: Device) -> Schedule:
    """Layout of the backward's first kernel, which reduces over d: a program reads its `block_n` rows once."""
    block_r = padded_rank(rank)
    block_n, block_d, warps, stages = _tile("rows", hidden, block_r, itemsize, device.gpu)
    if ceil_div(tokens, block_n) < device.multiprocessors and _wide(16, block_d, warps, itemsize, device.gpu):
        block_n = 16
    return Schedule(block_n, block_d, block_r, ceil_div(tokens, block_n), 1, hidden, warps, stages)


@functools.lru_cache(maxsize=4096)
def columns_schedule(tokens: int, hidden: int, rank: int, itemsize: int, device: Device) -> Schedule:
    """Layout of the backward's second kernel, which reduces over tokens: a program owns `block_d` columns of a part of
    the rows, keeps its weights and its gradients in registers, and writes its partial sums to a slab of its own.
    `itemsize` is that of the wider of an element and its form as an operand of a product, where that is in fp32."""
    block_r = padded_rank(rank)
    block_n, block_d, warps, stages = _tile("columns", hidden, block_r, itemsize, device.gpu)
    blocks = ceil_div(hidden, block_d)
    tiles = ceil_div(tokens, block_n)
    splits = max(1, min(tiles, ceil_div(2 * device.multiprocessors, blocks)))
    part = max(1, ceil_div(tiles, splits)) * block_n
    return Schedule(block_n, block_d, block_r, blocks, max(1, ceil_div(tokens, part)), part, warps, stages)


def column_passes(rank: int, schedule: Schedule, hidden: int) -> tuple[tuple[bool, bool], ...]:
    """(dx and dW2', dW1) of each launch of the columns kernel: one, as long as both gradients fit in registers."""
    most = 32 if hidden % schedule.block_d else 64  # masks cost registers
    return ((True, True),) if padded_rank(rank) <= most else ((True, False), (False, True))
