"""Choose the layout of each launch: block sizes, programs and warps, from shape and device.

The forward has two forms.

*One kernel*: a program owns a tile of rows and all of d. It reads the tile to reduce a = x W1ᵀ, then reads it again
from L2 to write x + δ. Programs loop over the tiles. `forward_schedule` chooses the rows of a tile: few enough that the
tiles in flight fit in L2, enough that reading the weights for each tile is not the limit, and so that waves are full.

*Two kernels*, if there are too few tiles to fill the device, as in decoding, or if a high rank's weights do not fit in
registers. The first reduces, the second writes, and both split d between programs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

MAX_RANK = 256
MAX_SPLITS = 32  # of the reduction over d; each writing program adds up all partial sums
FEW_TOKENS = 64  # up to this many, d is always split


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class Device:
    """The properties of a device that schedules depend on.

    Attributes:
        gpu: Triton's name of the vendor, or "cuda7" for NVIDIA GPUs before sm_80, which have no tf32.
        multiprocessors: their number.
        l2: the size of L2 in bytes.
        shared: the largest shared memory of a program in bytes. The default is that of the smaller CUDA cards.
    """

    gpu: str
    multiprocessors: int
    l2: int
    shared: int = 99 << 10


#: The targets that every kernel is compiled for ahead of time, by common name.
TARGETS: dict[str, Device] = {
    "sm_80": Device("cuda", 108, 40 << 20, 163 << 10),  # A100
    "sm_90": Device("cuda", 132, 50 << 20, 227 << 10),  # H100
    "sm_100": Device("cuda", 148, 126 << 20, 227 << 10),  # B200
    "gfx942": Device("hip", 304, 256 << 20, 64 << 10),  # MI300X; its memory-side Infinity Cache serves as L2 here
}

#: Smaller cards that kernels are also compiled for, without a promise of speed. `aot.CANNOT` lists what they lack.
SMALLER_TARGETS: dict[str, Device] = {
    "sm_75": Device("cuda7", 40, 4 << 20, 64 << 10),  # T4
    "sm_86": Device("cuda", 82, 6 << 20),  # RTX 3090
    "sm_89": Device("cuda", 128, 72 << 20),  # RTX 4090
}

#: The interpreter's device. It is small, so that tests at small sizes also loop over tiles and split columns.
_INTERPRETED_DEVICE = Device("cuda", 4, 1 << 20)


#: How many times faster L2 is than device memory. It only ranks layouts. By `predict.CLOCKS` and datasheets it is 1.3
#: (H200), 1.8 (H100) and 2.5 (A100 with 80 GB).
_L2_SPEED = 1.65


@functools.cache
def describe_device(device: torch.device) -> Device:
    """Return the description of a PyTorch device."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = "hip" if torch.version.hip else "cuda" if properties.major >= 8 else "cuda7"
        # ROCm reports the L2 of one die, 4 MiB; see TARGETS.
        known = TARGETS["gfx942"]
        l2, shared = known.l2, known.shared
        if gpu != "hip":
            # PyTorch has this property; its type stubs lack it.
            l2, shared = properties.L2_cache_size, properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
        return Device(gpu, properties.multi_processor_count, l2, shared)
    if device.type == "xpu":
        xpu = torch.xpu.get_device_properties(device)
        return Device("xpu", xpu.gpu_subslice_count, getattr(xpu, "L2_cache_size", 0) or 64 << 20)
    return _INTERPRETED_DEVICE


class Layout(Protocol):
    """The properties of a layout that a launch needs: block sizes by name, warps and stages."""

    @property
    def constants(self) -> dict[str, int]: ...
    @property
    def num_warps(self) -> int: ...
    @property
    def num_stages(self) -> int: ...


@dataclass(frozen=True)
class Blocks:
    """A `Layout` with fixed block sizes."""

    constants: dict[str, int]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Schedule:
    """The layout of a launch: the size of a tile, and the number of programs, parts, warps and stages.

    Attributes:
        block_n, block_d, block_r: the tile's rows, columns and ranks.
        programs: the number of programs along the tiles.
        splits: the number of parts of the other axis: columns in the forward, rows in `columns`, ranks in `finish`.
        part: the most elements of such a part.
        groups: see `_groups`.
        height: rows of a tile in the backward's rows kernel, at most `block_n`.
    """

    block_n: int
    block_d: int
    block_r: int
    programs: int
    splits: int
    part: int
    num_warps: int
    num_stages: int
    groups: int = 1
    height: int = 0

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's block sizes by name."""
        return {"BLOCK_N": self.block_n, "BLOCK_D": self.block_d, "BLOCK_R": self.block_r}


@dataclass(frozen=True)
class VectorSchedule(Schedule):
    """The layout of the forward at rank 0. Its kernel has no BLOCK_R."""

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's block sizes by name."""
        return {"BLOCK_N": self.block_n, "BLOCK_D": self.block_d}


@dataclass(frozen=True)
class ResidentSchedule:
    """The layout of the forward that holds whole rows in registers.

    Attributes:
        block_n: rows of a program. `programs` are as many as the rows need.
        block_d, chunks: `chunks` blocks of `block_d` columns cover a row. A thread holds 16 bytes of each block, or if
            `direct` four numbers.
        ahead: whether the weights are loaded before they are used.
        direct: whether W2 (d, r) is read as it lies, instead of packed rows.
        held: whether all loads are in flight before the first sum.
    """

    block_n: int
    block_d: int
    chunks: int
    programs: int
    num_warps: int
    ahead: bool
    direct: bool = False
    held: bool = False
    num_stages: int = 1

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's block sizes by name."""
        sizes = {"BLOCK_N": self.block_n, "BLOCK_D": self.block_d, "CHUNKS": self.chunks}
        return sizes | {"AHEAD": self.ahead, "DIRECT": self.direct, "HELD": self.held}


@dataclass(frozen=True)
class ForwardSchedule:
    """The layout of the forward in one kernel.

    Attributes:
        height: rows of a tile, at most `block_n`. `programs` loop over the tiles.
        block_d, groups, num_stages: columns, their groups and stages when reducing.
        block_d2, num_stages2: columns and stages when writing.
    """

    block_n: int
    height: int
    block_d: int
    block_d2: int
    block_r: int
    groups: int
    programs: int
    num_warps: int
    num_stages: int
    num_stages2: int

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's block sizes by name."""
        return {
            "BLOCK_N": self.block_n, "BLOCK_D": self.block_d, "BLOCK_D2": self.block_d2, "BLOCK_R": self.block_r,
            "GROUPS": self.groups, "STAGES": self.num_stages, "STAGES2": self.num_stages2,
        }  # fmt: skip


def padded_rank(rank: int) -> int:
    """Return the rank's extent in registers: a power of two of at least 16, as `tl.dot` requires. 0 stays 0."""
    return max(16, next_power_of_2(rank)) if rank else 0


_Tile = tuple[int, int, int, int]  # rows, columns, warps, stages
_RANKS = (0, 16, 32, 64, 128, 256)


def _wide(rows: int, columns: int, warps: int, itemsize: int, gpu: str) -> bool:
    """Return whether a tile has 16 bytes for each thread. With fewer, accesses are narrower than 128 bits."""
    lanes = 64 if gpu == "hip" else 32
    return rows * columns * itemsize >= 16 * lanes * warps


#: Rows, columns when reducing, columns when writing, warps, stages of both loops, programs on a multiprocessor, the
#: time of the tile's instructions in units of N·d through device memory, and replacements for a kernel that reads and
#: converts the parameters, which takes registers and shared memory: columns when writing, warps and the most stages.
#: The rest is unchanged then, so that sums equal those of packed weights. The times rank the candidates of a rank. They
#: were measured on an H100, where a plain add takes 3.
_ForwardTile = tuple[int, int, int, int, int, int, int, float, "tuple[int, int, int] | None"]

# fmt: off
#: Candidate tiles of the forward in one kernel, by vendor, bytes of an element, and padded rank.
_FORWARD_TILES: dict[tuple[str, int], dict[int, tuple[_ForwardTile, ...]]] = {
    ("cuda", 2): {
        16: ((16, 256, 128, 4, 3, 3, 2, 4.6, (256, 8, 3)), (16, 256, 256, 4, 3, 3, 2, 4.5, None)),
        32: ((32, 128, 128, 8, 3, 3, 1, 6.0, (128, 8, 3)), (16, 256, 256, 4, 3, 3, 2, 4.8, (128, 4, 3))),
        64: (
            (32, 128, 128, 8, 3, 3, 1, 9.0, (64, 8, 2)), (64, 64, 64, 4, 4, 4, 2, 5.5, None),
            (16, 128, 128, 4, 3, 3, 2, 6.1, None),
        ),
    },
    ("cuda", 4): {
        16: ((16, 64, 64, 8, 3, 3, 2, 2.5, None),), 32: ((16, 64, 64, 8, 3, 3, 2, 2.5, None),),
        64: ((16, 64, 64, 8, 3, 3, 1, 2.5, None),),
    },
    ("hip", 2): {
        16: ((16, 128, 128, 4, 2, 2, 2, 2.5, None),), 32: ((16, 128, 128, 4, 2, 2, 2, 2.5, None),),
        64: ((16, 128, 128, 4, 2, 2, 2, 2.5, None),),
    },
    ("hip", 4): {
        16: ((16, 128, 128, 4, 2, 2, 2, 2.5, None),), 32: ((16, 128, 128, 4, 2, 2, 2, 2.5, None),),
        64: ((16, 128, 128, 4, 2, 2, 2, 2.5, None),),
    },
}
#: Tiles of the forward in two kernels, for few tokens, by vendor, kernel and bytes of an element.
_SPLIT_TILES: dict[tuple[str, str, int], dict[int, _Tile]] = {
    ("cuda", "down", 2): {
        16: (16, 128, 4, 3), 32: (16, 128, 4, 3), 64: (16, 256, 8, 2), 128: (16, 128, 8, 2), 256: (16, 64, 4, 2),
    },
    ("cuda", "down", 4): {
        16: (16, 64, 4, 3), 32: (16, 64, 4, 3), 64: (16, 64, 8, 2), 128: (16, 64, 8, 2), 256: (16, 32, 8, 2),
    },
    ("cuda", "up", 2): {
        16: (16, 64, 4, 2), 32: (16, 64, 4, 2), 64: (16, 128, 8, 2), 128: (16, 128, 8, 2), 256: (16, 64, 4, 2),
    },
    ("cuda", "up", 4): {
        16: (16, 64, 4, 2), 32: (16, 64, 4, 2), 64: (16, 64, 8, 2), 128: (16, 64, 8, 2), 256: (16, 32, 8, 2),
    },
    ("hip", "down", 2): {
        16: (16, 128, 4, 2), 32: (16, 128, 4, 2), 64: (16, 128, 4, 2), 128: (16, 128, 4, 1), 256: (32, 64, 4, 1),
    },
    ("hip", "down", 4): {
        16: (16, 128, 4, 2), 32: (16, 128, 4, 2), 64: (16, 128, 4, 2), 128: (16, 64, 4, 2), 256: (16, 16, 8, 2),
    },
    ("hip", "up", 2): {
        16: (16, 128, 4, 2), 32: (16, 128, 4, 2), 64: (16, 128, 4, 2), 128: (16, 128, 4, 1), 256: (16, 64, 2, 1),
    },
    ("hip", "up", 4): {
        16: (16, 128, 4, 2), 32: (16, 128, 4, 2), 64: (16, 128, 4, 2), 128: (16, 64, 4, 2), 256: (16, 16, 8, 2),
    },
}
#: The same for many tokens, if the rank is too high for one kernel.
_WIDE_TILES: dict[tuple[str, str, int], dict[int, _Tile]] = {
    ("cuda", "down", 2): {128: (64, 64, 8, 3), 256: (64, 32, 8, 2)},
    ("cuda", "up", 2): {128: (64, 64, 8, 3), 256: (32, 64, 8, 2)},
}
#: For a d that no power of two from 64 up divides. Masks and scalar accesses take registers.
_RAGGED_FORWARD: dict[str, dict[int, _Tile]] = {
    "cuda": {16: (16, 32, 8, 2), 32: (16, 32, 8, 2), 64: (16, 32, 8, 2), 128: (16, 32, 8, 2), 256: (16, 16, 8, 1)},
    "hip": {16: (16, 32, 4, 1), 32: (16, 32, 8, 2), 64: (16, 16, 4, 2), 128: (16, 16, 8, 2), 256: (16, 16, 8, 2)},
}
#: A steering vector's tile by vendor, and one for a ragged d.
_VECTOR_TILES: dict[str, _Tile] = {"cuda": (16, 256, 8, 1), "hip": (16, 256, 4, 1)}
_RAGGED_VECTOR_TILE: _Tile = (16, 32, 4, 1)
# fmt: on


def _groups(rows: int, columns: int, block_r: int, warps: int, itemsize: int, device: Device) -> int:
    """Return the number of groups in which the forward sums a block's columns.

    It is one for each warp if rows and ranks are too few to give each warp its own work, else 1. A group has at least
    16 columns, as `tl.dot` requires.
    """
    if device.gpu != "cuda" or itemsize > 2 or rows * block_r > 32 * 64:
        return 1
    return max(1, min(warps, columns // 16))


def _forward_shared(
    rows: int, columns: int, columns2: int, stages: int, stages2: int, block_r: int, itemsize: int, of_weight: int
) -> int:
    """Return the bytes of shared memory of the forward in one kernel. of_weight: the bytes of a weight.

    The stages but one are prefetched: residual, branch and weights. The second pass also prefetches b2 and stages its
    output.
    """
    column = 2 * rows * itemsize + block_r * of_weight
    writing = (stages2 - 1) * (column + 4) + rows * itemsize
    return max((stages - 1) * column * columns, writing * columns2)


def _fitting(columns: int, of_column: int, others: int, device: Device) -> int:
    """Return the columns of a tile, halved until its operands fit in the shared memory of GPUs before sm_80.

    These copy nothing asynchronously. A product's operands are held twice in two bytes, as loaded and as multiplied, or
    once in four.

    Args:
        of_column, others: the elements of the operands for each column, and those for all columns together.
    """
    while device.gpu == "cuda7" and columns > 16 and 4 * (columns * of_column + others) > device.shared:
        columns //= 2
    return columns


def _vendor(device: Device) -> str:
    return "hip" if device.gpu == "hip" else "cuda"


def _narrowed(tile: _Tile, ragged: _Tile, hidden: int, itemsize: int, gpu: str, empty: float = 0.0) -> _Tile:
    """Return `tile` with its columns halved until they divide d, or `ragged` if they do not.

    If the narrower tile is not `_wide`, its rows double. On AMD, where they would take too many registers, its warps
    halve.

    Args:
        empty: columns of the last block that may lie beyond d, as a share of d. Then the others need not divide it.
    """
    rows, columns, warps, stages = tile
    narrow = columns
    while narrow > 64 and -hidden % narrow > empty * hidden:
        narrow //= 2
    if hidden % min(narrow, 64):
        rows, columns, warps, stages = ragged
        return rows, max(16, min(columns, next_power_of_2(hidden))), warps, stages
    if narrow < columns and not _wide(rows, narrow, warps, itemsize, gpu):
        if gpu == "hip":
            warps //= 2
        else:
            rows *= 2
    return rows, narrow, warps, stages


@functools.lru_cache(maxsize=4096)
def vector_schedule(tokens: int, hidden: int, itemsize: int, device: Device) -> VectorSchedule:
    """Return the layout of the forward at rank 0. It is elementwise, with one block for each program."""
    block_n, block_d, warps, stages = _narrowed(
        _VECTOR_TILES[_vendor(device)], _RAGGED_VECTOR_TILE, hidden, itemsize, device.gpu
    )  # fmt: skip
    blocks = ceil_div(hidden, block_d)
    return VectorSchedule(block_n, block_d, 0, ceil_div(tokens, block_n), blocks, block_d, warps, stages)


def _parts(tiles: int, blocks: int, slots: int, most: int) -> int:
    """Return the number of blocks in a part that gives programs on `slots` places the shortest time."""

    def walked(part: int) -> int:
        # A program's start and end take the time of about two blocks.
        return ceil_div(tiles * ceil_div(blocks, part), slots) * (part + 2)

    return min({ceil_div(blocks, splits) for splits in range(1, min(blocks, most) + 1)}, key=lambda p: (walked(p), -p))


@functools.lru_cache(maxsize=4096)
def forward_splits(
    tokens: int, hidden: int, rank: int, itemsize: int, device: Device
) -> tuple[Schedule, Schedule] | None:
    """Return the layouts of the forward's reducing and writing kernels, or None if one kernel does both."""
    block_r, vendor = padded_rank(rank), _vendor(device)
    few = tokens <= FEW_TOKENS or 2 * ceil_div(tokens, 16) <= device.multiprocessors
    if not few and block_r in _FORWARD_TILES[vendor, itemsize]:
        return None
    found = []
    for kernel, most in (("down", MAX_SPLITS), ("up", hidden)):
        key = (vendor, kernel, itemsize)
        tiles_of = _SPLIT_TILES if few else _WIDE_TILES
        tile = tiles_of.get(key, _SPLIT_TILES[key])[block_r]
        block_n, block_d, warps, stages = _narrowed(
            tile, _RAGGED_FORWARD[vendor][block_r], hidden, itemsize, device.gpu
        )  # fmt: skip
        block_d = _fitting(block_d, block_n + block_r, block_n * block_r, device)
        # The stages but one are prefetched: residual, branch, and the weights, unpacked in float32. The second kernel
        # also holds h, in float32 for fp16, and stages its output.
        of_h = 4 if kernel == "up" else itemsize
        while device.gpu == "cuda" and (
            (stages - 1) * block_d * (2 * block_n * itemsize + 4 * block_r)
            + block_n * (block_r * of_h + block_d * itemsize)
            > device.shared
        ):
            if stages > 2:
                stages -= 1
            else:
                block_d //= 2
        tiles, blocks = ceil_div(tokens, block_n), ceil_div(hidden, block_d)
        part = _parts(tiles, blocks, device.multiprocessors * max(1, 8 // warps), most) * block_d
        groups = 1 if hidden % block_d else _groups(block_n, block_d, block_r, warps, itemsize, device)
        found.append(Schedule(block_n, block_d, block_r, tiles, ceil_div(hidden, part), part, warps, stages, groups))
    return found[0], found[1]


@functools.lru_cache(maxsize=4096)
def forward_schedule(
    tokens: int,
    hidden: int,
    rank: int,
    itemsize: int,
    device: Device,
    packed: bool = True,
    widened: bool = False,
    norm: bool = False,
) -> ForwardSchedule:
    """Return the layout of the forward in one kernel, the fastest by a count of its traffic and arithmetic.

    The count, in units of N·d, is the largest of three numbers, divided by the share of the device that the waves fill.
    Device memory: three, and two more for the part of the second read that misses L2. L2: the tile's four reads, and
    the weights for each tile. Arithmetic: all rows, padding included. With the norm there is one tensor more to write,
    and one to read again. Of equal counts the one with more programs on a multiprocessor is taken, because they hide
    each other's waits: on an H100 two took up to a fifth less time than one. Two whose tiles would exceed L2 took as
    long as one, and are not taken, except for tiles of 16 rows above rank 16, where they took up to a tenth less.

    Args:
        tokens, hidden: N and d.
        itemsize: bytes of an element.
        packed: whether weights are packed.
        widened: whether operands are widened to fp32's size.
        norm: whether the kernel computes the norm, too.
    """
    block_r, vendor = padded_rank(rank), _vendor(device)
    best = None
    first, *others = _FORWARD_TILES[vendor, itemsize][block_r]
    # The first tile fits every d and dtype. The others have enough registers only for whole blocks and narrow operands.
    # Of tiles with equal counts, they are faster.
    fitting = [
        tile
        for tile in others
        if hidden % tile[1] == 0
        and not widened
        and _forward_shared(*tile[:3], *tile[4:6], block_r, itemsize, itemsize) <= device.shared
    ]
    for rows, columns, columns2, warps, stages, stages2, resident, instructions, converting in (*fitting, first):
        ragged = _RAGGED_FORWARD[vendor][block_r]
        # At d = 1152, blocks of 256 with the last one half empty took less time than blocks of 128.
        empty = 1 / 8 if device.gpu == "cuda" else 0.0
        block_n, block_d, warps, stages = _narrowed(
            (rows, columns, warps, stages), ragged, hidden, itemsize, device.gpu, empty
        )
        groups = 1 if hidden % block_d else _groups(block_n, block_d, block_r, warps, itemsize, device)
        # Widened operands take as many registers as converted ones, which is too many at rank 64.
        if hidden % block_d:
            stages2 = stages
        elif (
            (not packed or widened and block_r == 64)
            and converting is not None
            and _wide(block_n, block_d, converting[1], itemsize, device.gpu)
        ):
            columns2, warps, stages = converting
            while _forward_shared(block_n, block_d, columns2, stages, stages, block_r, itemsize, 4) > device.shared:
                stages -= 1
            stages2 = stages
        block_d2 = min(columns2, block_d)
        for share in range(resident, 0, -1):
            slots = device.multiprocessors * share
            least = ceil_div(tokens, slots * block_n)
            for waves in range(least, 2 * least + 1):
                height = min(block_n, ceil_div(tokens, waves * slots))
                tiles = ceil_div(tokens, height)
                again = 3 if norm else 2  # tensors
                in_flight = again * min(tokens, slots * height) * hidden * itemsize
                memory = again + 1 + again * max(0.0, 1 - device.l2 / in_flight)
                through_l2 = (2 + again + 2 * tiles * rank / tokens) / _L2_SPEED
                issue = instructions * tiles * block_n / tokens
                time = max(memory, through_l2, issue) * ceil_div(tiles, slots) * slots / tiles
                count = time, issue, memory if block_r == 16 or block_n == 64 else 0
                if best is None or count < best[0]:
                    programs = min(tiles, slots)
                    best = (
                        count,
                        ForwardSchedule(
                            block_n, height, block_d, block_d2, block_r, groups, programs, warps, stages, stages2
                        ),
                    )
    assert best is not None
    return best[1]


RESIDENT_RANK = 8  # the highest rank of the forward that holds rows in registers
_RESIDENT_WIDTH = 8192
_RESIDENT_COLUMNS = 56  # of a thread, in two rows: more do not fit in its registers


@functools.lru_cache(maxsize=4096)
def _direct_schedule(tokens: int, hidden: int, rank: int, device: Device) -> ResidentSchedule | None:
    """Return the layout that reads W2 as it lies, or None if it would not pay.

    Where each row has a multiprocessor of its own, reading float32 takes less time than a launch that packs. A thread
    reads the weights of its columns, 16 bytes for a column and four ranks. 128 numbers can be in flight, and 256 take
    two turns.
    """
    if rank not in (2, 4, 8) or tokens > device.multiprocessors:
        return None
    warps, vector = 1, 4
    while warps < 8 and ceil_div(hidden, 32 * vector * warps) * vector > min(16, 64 // rank):
        warps *= 2
    block_d = 32 * vector * warps
    chunks = ceil_div(hidden, block_d)
    weights = 2 * rank * chunks * vector
    if weights > 256:
        return None
    return ResidentSchedule(1, block_d, chunks, tokens, warps, ahead=True, direct=True, held=weights <= 128)


def resident_schedule(
    tokens: int,
    hidden: int,
    rank: int,
    itemsize: int,
    of_weight: int,
    device: Device,
    norm: bool = False,
    packed: bool = False,
) -> ResidentSchedule | None:
    """Return the layout of the forward that holds whole rows in registers, or None if another form is faster.

    Its limit is the time of the sums: at ranks over 4, tensor cores are faster, except for few rows, where the launch
    counts, for very many, where the weights stay in L1, and where the norm would read `out` again. The numbers were
    measured on an H100.

    Args:
        itemsize, of_weight: bytes of an element of the hidden state and of the packed weights.
        packed: whether the weights are packed already.
    """
    if device.gpu != "cuda" or not 0 < rank <= RESIDENT_RANK or hidden > _RESIDENT_WIDTH:
        return None
    if not packed and (direct := _direct_schedule(tokens, hidden, rank, device)) is not None:
        return direct
    if rank > 4 and not norm and 2048 <= tokens <= 8192:
        return None
    vector, few = 16 // itemsize, tokens <= 1024
    most = 16 if few else 24 if rank <= 4 or norm else 40  # columns of a thread
    warps = 1
    while warps < 8 and (columns := ceil_div(hidden, 32 * vector * warps) * vector) > most:
        wider = 64 * vector * warps
        if not few and columns <= _RESIDENT_COLUMNS and ceil_div(hidden, wider) * wider > 1.15 * hidden:
            break  # many columns of the last block would be beyond d
        warps *= 2
    block_d = 32 * vector * warps
    chunks = ceil_div(hidden, block_d)
    # Both weights of all ranks take at most 128 registers.
    ahead = few and 2 * rank * chunks * vector * of_weight <= 4 * 128
    alone = tokens <= device.multiprocessors
    block_n = 1 if few and (alone or rank <= 4) else 2  # at higher ranks two rows share the time to read the weights
    held = ahead and alone  # later programs would wait for so many registers
    return ResidentSchedule(block_n, block_d, chunks, ceil_div(tokens, block_n), warps, ahead, held=held)


@dataclass(frozen=True)
class RowsBackward:
    """The layout of a backward with the norm that holds whole rows in registers.

    Attributes:
        held: whether the sums over rows are in registers, too, and there is one pass. Then `programs` loop over the
            tiles and fill the registers of every multiprocessor. Else there is a program for each tile.
        block_n: rows of a tile.
        block_d, chunks: `chunks` blocks of `block_d` columns cover a row. A thread holds 16 bytes of each block.
    """

    held: bool
    block_n: int
    block_d: int
    chunks: int
    programs: int
    num_warps: int
    num_stages: int = 1

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's block sizes by name."""
        return {"BLOCK_N": self.block_n, "BLOCK_D": self.block_d, "CHUNKS": self.chunks}


#: By the rows of a tile: numbers in float32 of a thread, which are its sums, and the rows of this tile and the next.
#: Beside them 255 registers have room for the products, addresses, and numbers of each row and rank.
_HELD_NUMBERS = {1: 176, 2: 144}
_HELD_SUMS = {1: 128, 2: 64}  # of them
_HELD_RANK = 4  # higher ranks have too many instructions and too few registers: modelled
#: The fewest tokens of the backward with rows in registers. It needs packed weights.
_MANY_ROWS = 4096


def _rows_in_registers(hidden: int, vector: int) -> Iterator[tuple[int, int, int]]:
    """Yield warps, columns of a block and blocks of a row, from most warps to one, with few columns beyond d.

    vector: columns of a block for each thread.
    """
    for warps in (8, 4, 2, 1):
        block_d = 32 * vector * warps
        chunks = ceil_div(hidden, block_d)
        if chunks * block_d <= 1.25 * hidden or warps == 1:
            yield warps, block_d, chunks


def _held_backward(
    tokens: int, hidden: int, rank: int, itemsize: int, device: Device, needs: tuple[bool, bool, bool]
) -> RowsBackward | None:
    """Return the layout of the backward in one pass, or None if it does not fit or pay.

    It pays if it moves fewer bytes through device memory than the norm's backward and post_block's in turn. These move
    8 N·d, or 5 to 6 where the gradient between them stays in half of L2. The slabs are counted as if they were written
    to device memory and read from it. Counted and modelled, not measured: no GPU has run it.
    """
    if rank > _HELD_RANK:
        return None
    down, up, up_bias = needs
    numbers = rank * (down + up) + up_bias
    vector, found = 16 // itemsize, []
    for warps, block_d, chunks in _rows_in_registers(hidden, vector):
        columns = chunks * vector
        for block_n in (1, 2):
            # A tile and the next one in the hidden state's dtype, and the gradient in float32.
            held = columns * (numbers + block_n * (itemsize + 1))
            if columns * numbers <= _HELD_SUMS[block_n] and held <= _HELD_NUMBERS[block_n]:
                found.append((warps, block_n, block_d, chunks))
    if not found:
        return None
    warps, block_n, block_d, chunks = found[-1]  # small programs do not wait for each other
    programs = min(ceil_div(tokens, block_n), device.multiprocessors * 8 // warps)
    unit = tokens * hidden * itemsize
    slabs = 2 * programs * numbers * hidden * 4
    if 4 * unit + slabs >= (8 if 2 * unit > device.l2 else 5.5) * unit:
        return None
    return RowsBackward(True, block_n, block_d, chunks, programs, warps)


@functools.lru_cache(maxsize=4096)
def norm_backward_schedule(
    tokens: int,
    hidden: int,
    rank: int,
    itemsize: int,
    device: Device,
    needs: tuple[bool, bool, bool],
    one_pass: bool = True,
) -> RowsBackward | None:
    """Return the layout of the norm's and the steering's backward with rows in registers, or None if it does not pay.

    Args:
        itemsize: bytes of an element of the hidden state.
        needs: whether the gradients of W1, W2 and b2 are needed.
        one_pass: whether the form in one pass may be chosen. It writes no gradient of `out`.
    """
    if device.gpu != "cuda" or not 0 < rank <= RESIDENT_RANK or hidden > _RESIDENT_WIDTH or tokens < _MANY_ROWS:
        return None
    held = _held_backward(tokens, hidden, rank, itemsize, device, needs) if one_pass else None
    if held is not None:
        return held
    warps, block_d, chunks = next(_rows_in_registers(hidden, 16 // itemsize))
    block_n = 2 if chunks * (16 // itemsize) <= 16 else 1
    return RowsBackward(False, block_n, block_d, chunks, ceil_div(tokens, block_n), warps)


CROSS_RANK = 64  # the side of a tile of daᵀ h, which one program sums in registers

# fmt: off
#: The backward's tiles by vendor, kernel and operand form, one for each padded rank of `_RANKS`. The forms are "bf16",
#: "tf32" (for fp16) and "fp32" (three parts of tf32, or plain fp32).
_BACKWARD_TILES: dict[tuple[str, str, str], tuple[_Tile, ...]] = {
    ("cuda", "rows", "bf16"): (
        (16, 256, 4, 2), (32, 256, 4, 3), (32, 256, 4, 3), (64, 128, 8, 4), (64, 64, 8, 3), (32, 64, 8, 3),
    ),
    ("cuda", "rows", "tf32"): (
        (16, 256, 4, 2), (32, 256, 4, 3), (32, 128, 4, 3), (32, 128, 4, 3), (32, 128, 8, 2), (16, 64, 8, 2),
    ),
    ("cuda", "rows", "fp32"): (
        (16, 256, 4, 2), (32, 128, 8, 3), (32, 64, 4, 3), (32, 128, 8, 3), (32, 64, 8, 3), (16, 64, 8, 3),
    ),
    ("cuda", "columns", "bf16"): (
        (32, 128, 4, 3), (32, 64, 4, 3), (32, 128, 8, 3), (32, 128, 8, 3), (32, 64, 8, 3), (32, 64, 8, 2),
    ),
    ("cuda", "columns", "tf32"): (
        (32, 128, 4, 3), (32, 128, 4, 3), (32, 64, 4, 3), (32, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2),
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
#: Other tiles of the columns kernel on CUDA for operands in bf16, by padded rank, where they fill the waves better.
_OTHER_COLUMNS_TILES: dict[int, _Tile] = {64: (32, 64, 4, 3)}
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
        (16, 64, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 4, 1),
    ),
}
# fmt: on


def _backward_tile(kernel: str, hidden: int, block_r: int, policy: str, device: Device) -> _Tile:
    """Return the tile of `kernel` for operands of `policy`, a name of `dot_precision`. See `_narrowed`."""
    vendor, rank = _vendor(device), _RANKS.index(block_r)
    form = policy if (vendor, kernel, policy) in _BACKWARD_TILES else "fp32"
    ragged = _RAGGED_BACKWARD_TILES[vendor, kernel][rank]
    itemsize = 4 if form == "fp32" else 2
    return _narrowed(_BACKWARD_TILES[vendor, kernel, form][rank], ragged, hidden, itemsize, device.gpu)


@functools.lru_cache(maxsize=4096)
def rows_schedule(tokens: int, hidden: int, rank: int, policy: str, device: Device) -> Schedule:
    """Return the layout of the backward's rows kernel, which reduces over d.

    A program reads its `block_n` rows once, and all of W2'. `policy` is the operand form, a name of `dot_precision`.
    """
    block_r = padded_rank(rank)
    block_n, block_d, warps, stages = _backward_tile("rows", hidden, block_r, policy, device)
    block_d = _fitting(block_d, block_n + block_r, 0, device)
    # The rows of a tile make the waves whole. A multiprocessor may hold only two programs of eight warps.
    waves = ceil_div(tokens, device.multiprocessors * block_n)
    waves += waves % 2 if waves > 1 else 0
    height = max(min(16, block_n), ceil_div(tokens, waves * device.multiprocessors))
    itemsize = 2 if policy == "bf16" else 4
    while block_n >= 2 * max(16, height) and _wide(block_n // 2, block_d, warps, itemsize, device.gpu):
        block_n //= 2
    tiles = ceil_div(tokens, height)
    if device.gpu == "cuda" and block_n == 16 and tiles <= device.multiprocessors:
        stages = max(stages, 4)  # nothing else hides the waits of a program that is alone
    # The stages but one are prefetched: G, `out`, and W2, which takes most shared memory unpacked, in float32.
    while (
        device.gpu == "cuda"
        and stages > 2
        and (stages - 1) * block_d * (2 * block_n * itemsize + 4 * block_r) > device.shared
    ):
        stages -= 1
    return Schedule(block_n, block_d, block_r, tiles, 1, hidden, warps, stages, height=height)


@functools.lru_cache(maxsize=4096)
def columns_schedule(
    tokens: int, hidden: int, rank: int, policy: str, device: Device, corrected: bool = True
) -> Schedule:
    """Return the layout of the backward's columns kernel, which reduces over tokens.

    A program owns `block_d` columns of a part of the rows (every `splits`-th tile). It keeps its weights and sums in
    registers, and writes the sums to a slab. The parts are chosen so that all programs, with `corrected` those of
    daᵀ h included, fill the multiprocessors in whole waves.
    """
    block_r = padded_rank(rank)
    tiles_of = [_backward_tile("columns", hidden, block_r, policy, device)]
    other = _OTHER_COLUMNS_TILES.get(block_r)
    if policy == "bf16" and _vendor(device) == "cuda" and other is not None:
        rows, width, _, stages = other
        # The stages but one are prefetched: G, `out`, and da and h in three layouts. W1 and dx are there once.
        shared = 2 * ((stages - 1) * rows * (2 * width + 3 * block_r) + (rows + block_r) * width)
        if hidden % width == 0 and shared <= device.shared:
            tiles_of.append(other)
    found = []
    for block_n, columns, warps, stages in tiles_of:
        block_d = _fitting(columns, block_r, block_n * block_r, device)
        if policy == "tf32" and 4 * (block_r * (block_d + 2 * block_n) + block_n * block_d) > device.shared:
            block_n //= 2  # W1, da, h and dx have four bytes each
        blocks, tiles = ceil_div(hidden, block_d), ceil_div(tokens, block_n)
        a_part = blocks + (ceil_div(block_r, CROSS_RANK) ** 2 if rank and corrected else 0)
        at_once = 8 // warps * device.multiprocessors  # a multiprocessor's registers hold eight warps
        # A multiprocessor may have room for a third program of four warps, so a second wave would not be whole.
        waves = 2 if warps > 4 else 1
        for parts in range(1, max(1, min(tiles, waves * at_once // a_part)) + 1):
            # In tiles: the loop of one program, its start, its slab and the adding of the slab.
            time = ceil_div(a_part * parts, at_once) * (ceil_div(tiles, parts) + 3)
            empty = -(a_part * parts) % at_once / at_once
            part = ceil_div(tiles, parts) * block_n
            found.append((time, empty, Schedule(block_n, block_d, block_r, blocks, parts, part, warps, stages)))
    return min(found, key=lambda choice: choice[:2])[2]


def column_passes(schedule: Schedule, hidden: int) -> tuple[tuple[bool, bool], ...]:
    """Return (dx and dW2', dW1) for each launch of the columns kernel: one launch if both fit in registers."""
    most = 32 if hidden % schedule.block_d else 64  # masks cost registers
    return ((True, True),) if schedule.block_r <= most else ((True, False), (False, True))


@functools.lru_cache(maxsize=4096)
def finish_schedule(hidden: int, rank: int) -> Schedule:
    """Return the layout of the backward's last kernel, which adds the slabs.

    `programs` are blocks of columns, `splits` tiles of `block_r` ranks. `block_n` sums of da are added at a time.
    """
    block_d = 64 if rank > 16 else 32
    return Schedule(64, block_d, 16, ceil_div(hidden, block_d), max(1, ceil_div(rank, 16)), 16, 4, 3)
