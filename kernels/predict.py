"""Predicts how long a pass takes on a GPU that is not there, and says which limit decides: a model, uncalibrated.

Nothing here is measured. Times may be 40 % off; ratios between two kernels on one GPU are better. A launch takes the
longest of three times, and a pass the sum of its launches' times and of their starts:

* **memory**: every tensor of the launch once through device memory, at `MEMORY_SHARE` of the datasheet's bandwidth. A
  second read within the launch is free for as much of the tiles in flight as fits in L2, and a read of what an earlier
  launch of the pass touched as long as everything touched since fits in half of L2.
* **L2**: the bytes that L2 sends to the multiprocessors: each tensor as many times as the programs read it between
  them. Writes go the other way and are not counted.
* **issue**: cycles of the compiled programs. One multiprocessor runs as many programs as fit; every warp goes through
  its real instructions in order and waits as ptxas's stall counts and scoreboards say; a scheduler issues one
  instruction a cycle; pipes, shared memory's and L2's ports take one warp after the other; barriers join the warps of
  a program; a load takes the latency of device memory, or of L2 where the data was just there. Loops run a few trips,
  then go on at their steady pace. Bank conflicts, caches of instructions, L1 hits and DRAM pages are left out.
* **host**: `LAUNCH_SECONDS` for each launch, between the end of one kernel and the start of the next in a captured
  graph. A call outside of a graph costs more time of the host than that.

What one program of a kernel does, how often its loops run and how often each tensor is read, is described by `work`,
for each kernel by its name. A kernel that nobody described is an error.
"""

from __future__ import annotations

import collections
import functools
import heapq
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .aot import ALL_TARGETS, GPUS, compile_launch, disassemble, hidden_states, resident_programs
from .launch import Launch
from .sass import Instruction, LoopCode, Walk, find_loops, parse
from .schedule import ceil_div

#: The share of the datasheet's bandwidth that a plain copy reaches. BabelStream reports 88 to 92 % on A100 and H100.
MEMORY_SHARE = 0.9
#: Seconds from the end of a kernel to the start of the next in a captured CUDA graph: assumed.
LAUNCH_SECONDS = 0.8e-6
#: The share of L2 that what one launch leaves there may take for the next to find it.
_KEPT_IN_L2 = 0.5
#: Bytes of hidden states that a launch finds in any GPU's L2 if the one before has read them: half of A100's.
_FOUND_IN_L2 = 20 << 20
_SCHEDULERS = 4
_LANES = 32

# -------------------------------------------------------------------------------------------------- work of a launch


@dataclass(frozen=True)
class Loop:
    """A loop of a program: its number of trips (the most that any program makes), the bytes of hidden states and of
    other arrays that a trip loads from memory, whether the launch, or the one before, has just read the same (`again`),
    and the loops in it."""

    trips: int
    states: int = 0
    others: int = 0
    again: bool = False
    inner: tuple[Loop, ...] = ()

    @property
    def shape(self) -> str:
        return f"[{''.join(loop.shape for loop in self.inner)}]"

    @property
    def series(self) -> int:
        """Trips that follow one another, of this loop if it is the innermost one, else of those in it."""
        return self.trips * (sum(loop.series for loop in self.inner) if self.inner else 1)


@dataclass(frozen=True)
class LaunchWork:
    """What the programs of a launch do between them.

    loops: those of a program, in the order of the code. share: the mean work of a program, as a share of the work of
    the one that has the most. reads: how many times the programs read each tensor between them, by the argument's name;
    1 for those that are not named. writes: the tensors that are written and not read. again: whether what the code
    outside of loops reads is in L2. in_flight: bytes that programs read, leave to L2 and read once more, all programs
    that run at a time together. aside: programs among them that do something short instead of the loops.
    """

    programs: int
    loops: tuple[Loop, ...]
    share: float
    reads: Mapping[str, float]
    writes: frozenset[str]
    again: bool = False
    in_flight: int = 0
    aside: int = 0

    @property
    def series(self) -> int:
        """The longest walk: trips of innermost loops that one program makes, one after the other; 1 without a loop."""
        return sum(loop.series for loop in self.loops) if self.loops else 1


class _Arguments:
    """Arguments and constants of a launch by name."""

    def __init__(self, launch: Launch):
        self._values = {**dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)), **launch.constants}
        self._kernel = launch.kernel.__name__

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            raise ValueError(f"{self._kernel} has no argument {name}; expected one, as kernels/predict.py describes it")
        return self._values[name]

    def tensor(self, name: str) -> torch.Tensor | None:
        value = self._values.get(name)
        return value if isinstance(value, torch.Tensor) else None

    def row_bytes(self, *names: str) -> int:
        """Bytes of one row of each of these tensors that is there, together."""
        found = (self.tensor(name) for name in names)
        return sum(t.shape[-1] * t.element_size() for t in found if t is not None)

    def tile_bytes(self, rows: int, columns: int, *names: str) -> int:
        """Bytes of a tile of each of these tensors that is there, together."""
        found = (self.tensor(name) for name in names)
        return sum(rows * columns * t.element_size() for t in found if t is not None)


def _weights_read(at: _Arguments) -> float:
    """The share of a packed weight that a tile reads: rows beyond the rank are left out where they are half of all."""
    half_empty = at["PACKED"] and 2 * at["RANK"] <= at["BLOCK_R"]
    return at["RANK"] / at["BLOCK_R"] if half_empty else 1.0


def _forward_whole(launch: Launch) -> LaunchWork:
    """A program reduces its tiles of rows over all of d, then reads them once more and writes. Where W1 is applied to
    branch, residual is read when writing only."""
    at = _Arguments(launch)
    rows, height, ranks = at["BLOCK_N"], at["height"], at["BLOCK_R"]
    (programs,) = launch.grid
    tiles = ceil_div(at["N"], height)
    each = ceil_div(tiles, programs)
    both = ("p_residual", "p_branch")
    twice = ("p_branch",) if at["READS_BRANCH"] else both
    passes = []
    for columns, weights, states, again in (
        (at["BLOCK_D"], "p_down", twice, False),
        (at["BLOCK_D2"], "p_up", both, twice == both),
    ):
        read, others = at.tile_bytes(rows, columns, *states), at.tile_bytes(ranks, columns, weights)
        passes.append(Loop(ceil_div(at["D"], columns), read, others, again))
    weights_read = tiles * _weights_read(at)
    return LaunchWork(
        programs,
        (Loop(each, inner=tuple(passes)),),
        tiles / (programs * each),
        {**dict.fromkeys(twice, 2), "p_down": weights_read, "p_up": weights_read, "p_up_bias": tiles},
        frozenset({"p_out", "p_a"}),
        in_flight=programs * height * at.row_bytes(*twice),
    )


def _forward_half(
    launch: Launch, weights: str, reads: Mapping[str, float], writes: set[str], again: bool
) -> LaunchWork:
    """Half of a forward whose d is split between programs: one loop over a part of it, or one block at once."""
    at = _Arguments(launch)
    rows, columns, ranks = at["BLOCK_N"], at["BLOCK_D"], at["BLOCK_R"]
    tiles, splits = launch.grid
    blocks, each = ceil_div(at["D"], columns), ceil_div(min(at["part"], at["D"]), columns)
    states = at.tile_bytes(rows, columns, "p_residual", "p_branch")
    loop = Loop(each, states, at.tile_bytes(ranks, columns, weights), again)
    return LaunchWork(
        tiles * splits,
        () if at["AT_ONCE"] else (loop,),
        blocks / (splits * each),
        {weights: tiles * _weights_read(at), **reads},
        frozenset(writes),
        again,
    )


def _forward_down(launch: Launch) -> LaunchWork:
    return _forward_half(launch, "p_down", {}, {"p_partial"}, again=False)


def _forward_up(launch: Launch) -> LaunchWork:
    tiles, splits = launch.grid
    states = sum(tensor.nbytes for name, tensor in hidden_states(launch).items() if name != "p_out")
    reads = {"p_partial": splits, "p_up_bias": tiles}
    return _forward_half(launch, "p_up", reads, {"p_out", "p_a"}, again=states <= _FOUND_IN_L2)


def _forward_vector(launch: Launch) -> LaunchWork:
    tiles, blocks = launch.grid
    return LaunchWork(tiles * blocks, (), 1.0, {"p_up_bias": tiles, "p_gain": blocks}, frozenset({"p_out"}))


def _backward_rows(launch: Launch) -> LaunchWork:
    at = _Arguments(launch)
    rows, columns, ranks = at["BLOCK_N"], at["BLOCK_D"], at["BLOCK_R"]
    (tiles,) = launch.grid
    states, up = at.tile_bytes(rows, columns, "p_grad"), at.tile_bytes(ranks, columns, "p_up")
    loops = (Loop(ceil_div(at["D"], columns), states, up),) if at.tensor("p_grad") is not None else ()
    return LaunchWork(
        tiles,
        loops,
        1.0,
        {"p_up": tiles * _weights_read(at), "p_up_bias": tiles},
        frozenset({"p_narrow", "p_da_sums", "p_row_dot"}),
    )


def _backward_columns(launch: Launch) -> LaunchWork:
    at = _Arguments(launch)
    rows, columns, ranks = at["BLOCK_N"], at["BLOCK_D"], at["BLOCK_R"]
    programs, parts = launch.grid
    tiles = ceil_div(at["N"], rows)
    each = ceil_div(tiles, parts)
    narrow = 2 * at.tile_bytes(rows, ranks, "p_narrow")
    loops = [Loop(each, at.tile_bytes(rows, columns, "p_grad", "p_out", "p_branch"), narrow)]
    if at["NEED_DOWN"] and not at["READS_BRANCH"]:  # other programs, which sum da^T h over a part's rows
        loops.append(Loop(0, others=narrow))
    return LaunchWork(
        programs * parts,
        tuple(loops),
        tiles / (parts * each),
        {"p_narrow": programs, "p_down": parts * _weights_read(at), "p_gain": programs},
        frozenset({"p_dx", "p_slab"}),
        aside=(programs - ceil_div(at["D"], columns)) * parts,
    )


def _backward_finish(launch: Launch) -> LaunchWork:
    at = _Arguments(launch)
    programs, rank_tiles = launch.grid
    parts, padded, fp32 = at["parts"], at["PADDED_R"], 4
    blocks = ceil_div(at["D"], at["BLOCK_D"])
    loops = []
    if at["NEED_DOWN"] or at["NEED_UP"]:
        weights = at["NEED_DOWN"] + at["NEED_UP"]
        loops.append(Loop(parts, others=weights * at["BLOCK_R"] * at["BLOCK_D"] * fp32, again=True))
    corrected = at["NEED_DOWN"] and not at["READS_BRANCH"]
    if corrected:
        share = padded if padded <= 64 and at["EVEN_D"] else 16
        loops += [Loop(parts, others=at["BLOCK_R"] * share * fp32, again=True)] * (padded // share)
        loops += [Loop(parts, again=True)] * at["HAS_UP_BIAS"]
    loops += [Loop(parts, again=True)] * at["NEED_UP_BIAS"]
    loops += [Loop(0)] * at["NEED_DOWN_BIAS"]  # other programs
    slab_read = 2 * at["RANK"] * at["D"] + padded * padded * blocks * corrected
    outputs = frozenset({"p_d_down", "p_d_up", "p_d_down_bias", "p_d_up_bias"})
    return LaunchWork(
        programs * rank_tiles,
        tuple(loops),
        1.0,
        {"p_slab": slab_read / at["slab_size"], "p_up": rank_tiles, "p_up_bias": rank_tiles},
        outputs,
        again=True,
    )


#: What the programs of each kernel do, by the kernel's name.
_WORK: dict[str, Callable[[Launch], LaunchWork]] = {
    "post_block_fwd_kernel": _forward_whole,
    "post_block_fwd_down_kernel": _forward_down,
    "post_block_fwd_up_kernel": _forward_up,
    "post_block_fwd_vector_kernel": _forward_vector,
    "post_block_bwd_rows_kernel": _backward_rows,
    "post_block_bwd_columns_kernel": _backward_columns,
    "post_block_bwd_finish_kernel": _backward_finish,
}


def work(launch: Launch) -> LaunchWork:
    """What the programs of `launch` do between them.

    Raises:
        ValueError: a kernel that is not described here, or arguments other than the described ones.
    """
    name = launch.kernel.__name__
    if name not in _WORK:
        raise ValueError(f"kernel is {name}; expected one that kernels/predict.py describes: {', '.join(_WORK)}")
    return _WORK[name](launch)


def _tensors(launch: Launch) -> dict[str, torch.Tensor]:
    named = zip(launch.kernel.arg_names, launch.arguments, strict=False)
    return {name: value for name, value in named if isinstance(value, torch.Tensor)}


def l2_bytes(launch: Launch) -> float:
    """Bytes that L2 sends to the multiprocessors."""
    done = work(launch)
    read = (item for item in _tensors(launch).items() if item[0] not in done.writes)
    return sum(tensor.nbytes * done.reads.get(name, 1) for name, tensor in read)


def memory_bytes(launches: Sequence[Launch], target: str) -> list[float]:
    """Bytes that each of the launches of a pass reads from device memory or writes to it, in order."""
    l2 = ALL_TARGETS[target].l2
    found, touched = [], 0.0
    seen: dict[int, float] = {}  # a tensor: bytes touched until it was last touched
    for launch in launches:
        done = work(launch)
        total = 0.0
        tensors = _tensors(launch)
        for tensor in tensors.values():
            kept = id(tensor) in seen and touched - seen[id(tensor)] + tensor.nbytes <= _KEPT_IN_L2 * l2
            total += 0 if kept else tensor.nbytes
        if done.in_flight > l2:  # walked back, a tile finds what was read last
            lost = 1 - l2 / done.in_flight
            total += lost * sum(t.nbytes for name, t in hidden_states(launch).items() if done.reads.get(name, 1) > 1)
        touched += sum(tensor.nbytes for tensor in tensors.values())
        seen |= {id(tensor): touched for tensor in tensors.values()}
        found.append(total)
    return found


def wave_fill(programs: int, resident: int, multiprocessors: int) -> float:
    """How full the waves of a grid are: its programs, over those that the waves which it takes could have held.
    `resident`: the most programs that a multiprocessor holds at a time; fewer, if there are fewer, are a wave too."""
    most = multiprocessors * min(resident, ceil_div(programs, multiprocessors))
    return programs / (ceil_div(programs, most) * most)


# ------------------------------------------------------------------------------------------- one multiprocessor's clock


@dataclass(frozen=True)
class Clock:
    """How fast a multiprocessor is. `hertz`: the boost clock. Latencies in cycles, from the issue of a load to its
    result: `shared_latency` and `matrix_latency` (LDSM) of shared memory, `l2_latency`, `memory_latency` (under load),
    `product_latency` of a tensor core's product. `fp32`, `integer`, `special`: cycles for which an instruction of one
    warp occupies its pipe. `product`: the same of a 16 x 8 x 16 product in bf16. `barrier`: cycles that a barrier
    costs. `l2_bandwidth`: bytes a second from L2 to all multiprocessors.

    The latencies, widths and L2 bandwidths are those of published microbenchmarks (Citadel's of Volta and Turing and
    their successors for A100 and H100; Chips and Cheese for L2), taken down from memory.
    """

    hertz: float
    shared_latency: int
    matrix_latency: int
    l2_latency: int
    memory_latency: int
    product_latency: int
    fp32: int
    integer: int
    special: int
    product: int
    barrier: int
    l2_bandwidth: float


CLOCKS = {
    "sm_80": Clock(1.41e9, 24, 30, 270, 650, 33, 2, 2, 8, 8, 25, 4.5e12),
    "sm_90": Clock(1.755e9, 29, 33, 275, 850, 33, 1, 2, 8, 6, 28, 5.5e12),
}
_SHARED_PORT = 128  # bytes a cycle between a multiprocessor's pipes and its shared memory or L1
_L2_PORT = 64  # bytes a cycle from L2 to one multiprocessor
_SPECIAL_LATENCY = 20
_OTHER_LATENCY = 12  # results that set a scoreboard and are none of the above
_OPERANDS_READ = 14  # cycles until a memory instruction has read its operands
_WARPGROUP_TAIL = 28  # cycles of a warp group's product beyond those of its columns

_MEMORY = frozenset(
    {"LDS", "LDSM", "STS", "STSM", "LDG", "STG", "LDGSTS", "ATOMS", "ATOMG", "RED", "SHFL", "LDL", "STL"}
)
_FP32 = frozenset({"FFMA", "FMUL", "FADD", "IMAD", "HFMA2", "HADD2", "HMUL2"})
_FREE = frozenset(
    {"BRA", "BAR", "NOP", "DEPBAR", "LDGDEPBAR", "EXIT", "CALL", "RET", "BSYNC", "BSSY", "WARPSYNC", "WARPGROUP"}
    | {"YIELD", "LDC", "S2R", "CS2R", "MEMBAR", "ERRBAR", "CCTL", "BREAK", "BMOV"}
)


def _occupies(instruction: Instruction, clock: Clock) -> tuple[str | None, int]:
    """The pipe of a scheduler that an instruction occupies, and for how many cycles."""
    name = instruction.name
    if name == "HMMA":
        # Half the depth, half the time; tf32 has half the speed of bf16.
        depth = re.search(r"HMMA\.168(\d+)", instruction.opcode)
        full = depth is None or int(depth.group(1)) >= (8 if "TF32" in instruction.opcode else 16)
        return "tensor", clock.product if full else clock.product // 2
    if name == "HGMMA":
        columns = re.search(r"\.64x(\d+)x", instruction.opcode)
        return "tensor", int(columns.group(1)) // 2 if columns else clock.product
    if name == "MUFU":
        return "special", clock.special
    if name in _MEMORY:
        return "memory", 2
    if name in _FP32:
        return "fp32", clock.fp32
    if name in _FREE or name.startswith("U") or name.startswith("R2UR"):
        return None, 0
    return "integer", clock.integer


def issue_cycles(code: Sequence[Instruction], clock: Clock) -> int:
    """The least cycles for which one warp's instructions occupy a scheduler: their number, or those of the busiest
    pipe. Waiting is not counted."""
    busy: collections.Counter[str | None] = collections.Counter({None: len(code)})
    for instruction in code:
        pipe, cycles = _occupies(instruction, clock)
        if pipe is not None:
            busy[pipe] += cycles
    return max(busy.values())


@dataclass
class _Warp:
    program: int
    scheduler: int
    path: Sequence[tuple[int, bool, int]]  # instruction, whether its loads hit L2, the trip that it begins or -1
    step: int = 0
    ready: float = 0.0
    boards: list[float] = field(default_factory=lambda: [0.0] * 6)
    groups: list[float] = field(default_factory=list)  # when each group of asynchronous copies is there
    copying: float = 0.0  # when the copies since the last group are there
    products: float = 0.0  # when the warp group's products are there


class _Multiprocessor:
    """Runs warps, one event at a time: each instruction is issued at the earliest time that everything allows."""

    def __init__(self, code: Sequence[Instruction], clock: Clock, warps_per_program: int):
        self.code, self.clock, self.warps_per_program = code, clock, warps_per_program
        self.pipes: dict[tuple[int, str], float] = collections.defaultdict(float)
        self.issued = [-1.0] * _SCHEDULERS
        self.shared_port = self.l2_port = 0.0
        self.arrived: dict[int, list[_Warp]] = collections.defaultdict(list)
        self._occupied = [_occupies(instruction, clock) for instruction in code]
        self._allowed = [_allowed(instruction) for instruction in code]

    def earliest(self, warp: _Warp) -> float:
        index = warp.path[warp.step][0]
        instruction = self.code[index]
        when = max(warp.ready, self.issued[warp.scheduler] + 1)
        for board in instruction.waits:
            when = max(when, warp.boards[board])
        pipe, _ = self._occupied[index]
        if pipe is not None:
            when = max(when, self.pipes[warp.scheduler, pipe])
        allowed = self._allowed[index]
        if allowed is not None:
            if instruction.name == "WARPGROUP":
                when = max(when, warp.products) if allowed == 0 else when
            else:
                due = warp.groups[: len(warp.groups) - allowed] if allowed else warp.groups
                when = max([when, *due])
        return when

    def issue(self, warp: _Warp, now: float) -> list[_Warp]:
        """Issue the warp's next instruction. Returns the warps that can go on: none, it, or those of a barrier."""
        index, hits_l2, _ = warp.path[warp.step]
        instruction, clock = self.code[index], self.clock
        pipe, cycles = self._occupied[index]
        if pipe is not None:
            self.pipes[warp.scheduler, pipe] = now + cycles
        self.issued[warp.scheduler] = now
        latency = self._latency(warp, instruction, pipe, cycles, now, hits_l2)
        if instruction.sets is not None:
            warp.boards[instruction.sets] = max(warp.boards[instruction.sets], now + latency)
        if instruction.frees is not None:
            freed = now + min(latency, _OPERANDS_READ)
            warp.boards[instruction.frees] = max(warp.boards[instruction.frees], freed)
        warp.ready = now + max(1, instruction.stall)
        warp.step += 1
        if instruction.name != "BAR":
            return [warp]
        waiting = self.arrived[warp.program]
        waiting.append(warp)
        if len(waiting) < self.warps_per_program:
            return []
        del self.arrived[warp.program]
        for other in waiting:
            other.ready = max(other.ready, now + clock.barrier)
        return waiting

    def _latency(
        self, warp: _Warp, instruction: Instruction, pipe: str | None, cycles: int, now: float, hits_l2: bool
    ) -> float:
        clock, name = self.clock, instruction.name
        if name == "LDGDEPBAR":
            warp.groups = [*warp.groups[-31:], warp.copying]
            warp.copying = 0.0
        if pipe == "tensor":
            if name == "HGMMA":
                warp.products = max(warp.products, now + cycles + _WARPGROUP_TAIL)
            return clock.product_latency
        if pipe == "special":
            return _SPECIAL_LATENCY
        if pipe != "memory" or instruction.predicate in ("@!PT", "@!UPT"):
            return _OTHER_LATENCY
        size = instruction.access_bytes * _LANES
        if name == "LDSM":
            matrices = re.search(r"88\.(\d)", instruction.opcode)
            size = 128 * (int(matrices.group(1)) if matrices else 1)
        start = max(now, self.shared_port)
        self.shared_port = start + max(1, size // _SHARED_PORT)
        if name in ("LDG", "LDGSTS"):
            start = max(start, self.l2_port)
            self.l2_port = start + size / _L2_PORT
            done = self.l2_port + (clock.l2_latency if hits_l2 else clock.memory_latency)
            if name == "LDGSTS":
                warp.copying = max(warp.copying, done)
            return done - now
        if name == "STG":
            return start - now + _SPECIAL_LATENCY
        return self.shared_port - now + (clock.matrix_latency if name == "LDSM" else clock.shared_latency)


def _allowed(instruction: Instruction) -> int | None:
    """How many groups may be on their way still when a wait for groups is over, or None for other instructions."""
    waits = instruction.name == "DEPBAR" or instruction.opcode.startswith("WARPGROUP.DEPBAR")
    found = re.search(r"(?:SB0|gsb0), (0x[0-9a-f]+)", instruction.operands) if waits else None
    return int(found.group(1), 16) if found else None


#: Trips of a loop that are timed; those beyond go on at the pace of the last two thirds of them.
_TIMED_TRIPS = 9
_TIMED_OUTER_TRIPS = 3


@dataclass(frozen=True)
class MatchedLoop:
    """A loop of the code, what `work` says of it, and the loops in it."""

    code: LoopCode
    described: Loop
    inner: tuple[MatchedLoop, ...]

    @property
    def trips(self) -> int:
        return self.described.trips


@dataclass(frozen=True)
class Program:
    """A compiled program: its instructions, its loops, and its warps."""

    code: tuple[Instruction, ...]
    loops: tuple[MatchedLoop, ...]
    num_warps: int

    @property
    def innermost(self) -> Iterator[tuple[MatchedLoop, int]]:
        """Innermost loops, each with the number of times that those around it, if there are any, run it."""

        def visit(loops: Sequence[MatchedLoop], times: int) -> Iterator[tuple[MatchedLoop, int]]:
            for loop in loops:
                if loop.inner:
                    yield from visit(loop.inner, times * loop.trips)
                else:
                    yield loop, times

        yield from visit(self.loops, 1)

    def body(self, loop: MatchedLoop) -> tuple[Instruction, ...]:
        return self.code[loop.code.first : loop.code.last + 1]

    def loaded(self, loop: MatchedLoop) -> int:
        """Bytes that a program's accesses of 128 bits read in a trip."""
        loads = [i for i in self.body(loop) if i.name in ("LDG", "LDGSTS") and i.access_bytes == 16]
        return sum(i.access_bytes for i in loads) * _LANES * self.num_warps


def _match(
    code: Sequence[Instruction], found: Sequence[LoopCode], described: Sequence[Loop]
) -> tuple[MatchedLoop, ...]:
    """The loops of the code with their descriptions, in order.

    ptxas unrolls short loops: where the code has more loops than are described, one whose body has several times the
    loads of the next is that loop unrolled, and the next takes the trips that are left over.

    Raises:
        ValueError: the loops do not match.
    """

    def loads(loop: LoopCode) -> int:
        return sum(instruction.name in ("LDG", "LDGSTS") for instruction in code[loop.first : loop.last + 1])

    found, matched = list(found), []
    for index, loop in enumerate(described):
        if not found:
            raise ValueError("a loop is missing")
        first = found.pop(0)
        if len(found) > len(described) - index - 1 and not first.inner and not found[0].inner and not loop.inner:
            factor, rest = divmod(loads(first), max(1, loads(found[0])))
            if factor > 1 and not rest:
                unrolled = replace(
                    loop, trips=loop.trips // factor, states=loop.states * factor, others=loop.others * factor
                )
                matched.append(MatchedLoop(first, unrolled, ()))
                first, loop = found.pop(0), replace(loop, trips=loop.trips % factor)
        matched.append(MatchedLoop(first, loop, _match(code, first.inner, loop.inner)))
    if found:
        raise ValueError("a loop is not described")
    return tuple(matched)


_parse = functools.lru_cache(maxsize=256)(parse)


def read_program(listing: str, name: str, loops: tuple[Loop, ...], num_warps: int) -> Program:
    """The program in a listing of SASS, its loops matched with their description.

    Raises:
        ValueError: the code has other loops than the description, or one loads twice what is described or more.
    """
    code = _parse(listing)
    found = find_loops(code)
    try:
        program = Program(code, _match(code, found, loops), num_warps)
    except ValueError as error:
        have, want = ("".join(loop.shape for loop in some) or "none" for some in (found, loops))
        raise ValueError(f"the loops of {name} are {have}; expected {want}, as predict.py describes it") from error
    for loop, _ in program.innermost:
        expected = loop.described.states + loop.described.others
        loaded = program.loaded(loop)
        if expected and loaded >= 2 * expected:
            raise ValueError(
                f"a trip of a loop of {name} loads {loaded} bytes; expected {expected}, as predict.py describes it"
            )
    return program


def program_cycles(program: Program, programs: int, clock: Clock, again: bool = False) -> float:
    """Cycles from the start of `programs` programs on one multiprocessor until the last of them is done."""
    timed: dict[LoopCode, int] = {}
    matched: dict[LoopCode, MatchedLoop] = {}

    def limit(loops: Sequence[MatchedLoop]) -> None:
        for loop in loops:
            matched[loop.code] = loop
            timed[loop.code] = min(loop.trips, _TIMED_OUTER_TRIPS if loop.inner else _TIMED_TRIPS)
            limit(loop.inner)

    limit(program.loops)
    path: list[tuple[int, bool, int]] = []
    begins: list[LoopCode] = []  # the loop of each trip
    first_of = {loop.first: loop for loop in timed}
    for index, loop in Walk(program.code, timed):
        hits = matched[loop].described.again if loop is not None and not loop.inner else again
        trip = -1
        if loop is not None and index in first_of:
            trip = len(begins)
            begins.append(first_of[index])
        path.append((index, hits, trip))
    machine = _Multiprocessor(program.code, clock, program.num_warps)
    warps = [
        _Warp(number, (number * program.num_warps + warp) % _SCHEDULERS, path)
        for number in range(programs)
        for warp in range(program.num_warps)
    ]
    marks = [[0.0] * len(begins) for _ in warps]
    queue = [(0.0, order, order) for order in range(len(warps))]
    heapq.heapify(queue)
    order, end = len(warps), 0.0
    numbers = {id(warp): number for number, warp in enumerate(warps)}
    while queue:
        when, _, number = heapq.heappop(queue)
        warp = warps[number]
        earliest = machine.earliest(warp)
        order += 1
        if earliest > when:
            heapq.heappush(queue, (earliest, order, number))
            continue
        trip = warp.path[warp.step][2]
        if trip >= 0:
            marks[number][trip] = when
        end = max(end, when)
        for other in machine.issue(warp, when):
            if other.step < len(other.path):
                heapq.heappush(queue, (other.ready, order, numbers[id(other)]))
    return end + _rest(program, begins, marks, timed)


def _rest(
    program: Program, begins: Sequence[LoopCode], marks: Sequence[Sequence[float]], timed: Mapping[LoopCode, int]
) -> float:
    """Cycles of the trips that were not timed, at the pace of those that were."""

    def pace(loop: LoopCode) -> float:
        """Mean cycles of a trip, the first third of each run of the loop left out."""
        starts = [trip for trip, begun in enumerate(begins) if begun == loop]
        spans = []
        for run in range(0, len(starts), timed[loop]):
            trips = starts[run : run + timed[loop]]
            first, last = trips[len(trips) // 3], trips[-1]
            if last > first:
                count = len(trips) - 1 - len(trips) // 3
                spans += [(mark[last] - mark[first]) / count for mark in marks]
        return sum(spans) / len(spans) if spans else 0.0

    def beyond(loops: Sequence[MatchedLoop]) -> float:
        """What one run of these loops takes beyond what was timed."""
        total = 0.0
        for loop in loops:
            within = beyond(loop.inner)
            total += timed[loop.code] * within
            if loop.trips > timed[loop.code]:
                total += (loop.trips - timed[loop.code]) * (pace(loop.code) + within)
        return total

    return beyond(program.loops)


# ------------------------------------------------------------------------------------------------------- predictions

#: The limits of a launch, in the order in which they are shown.
LIMITS = ("memory", "l2", "issue", "host")


@dataclass(frozen=True)
class Times:
    """Seconds that each limit alone would take; of a launch, or of a pass."""

    memory: float
    l2: float
    issue: float
    host: float

    @property
    def kernel(self) -> float:
        """Seconds of a launch that has started."""
        return max(self.memory, self.l2, self.issue)


@dataclass(frozen=True)
class LaunchPrediction:
    """A launch on a GPU. `busy`: seconds that the instructions of its innermost loops take at least, with all
    multiprocessors at work and nothing waited for. `fill`: how full its waves are, unequal programs counted."""

    kernel: str
    times: Times
    busy: float
    fill: float

    @property
    def binds(self) -> str:
        """The limit of the launch once it has started."""
        return max(LIMITS[:3], key=lambda name: getattr(self.times, name))


@dataclass(frozen=True)
class PassPrediction:
    """A pass on a GPU: its launches, its floor (each of its hidden states once through device memory), and what
    follows. All in seconds."""

    gpu: str
    launches: tuple[LaunchPrediction, ...]
    floor: float

    @property
    def times(self) -> Times:
        """Each limit's seconds, all launches together."""
        found = [launch.times for launch in self.launches]
        return Times(*(sum(getattr(times, name) for times in found) for name in LIMITS))

    @property
    def seconds(self) -> float:
        return sum(launch.times.kernel for launch in self.launches) + self.times.host

    @property
    def floors(self) -> float:
        """How many times its floor the pass takes, starts of kernels left out: the floor has none either."""
        return sum(launch.times.kernel for launch in self.launches) / self.floor

    @property
    def binds(self) -> str:
        """The limit that takes the longest: for how long each launch is bound by one, and the host."""
        bound: dict[str, float] = dict.fromkeys(LIMITS, 0.0)
        for launch in self.launches:
            bound[launch.binds] += launch.times.kernel
            bound["host"] += launch.times.host
        return max(LIMITS, key=lambda name: bound[name])


@functools.lru_cache(maxsize=1024)
def _cycles(
    listing: str, name: str, loops: tuple[Loop, ...], warps: int, programs: int, target: str, again: bool
) -> float:
    return program_cycles(read_program(listing, name, loops, warps), programs, CLOCKS[target], again)


def compiled_program(launch: Launch, target: str) -> Program:
    """The program of a launch as it is compiled for `target`.

    Raises:
        ValueError: `work` does not describe it, or describes other loops.
        RuntimeError: as `compile_launch`.
    """
    done = work(launch)
    return read_program(disassemble(launch, target), launch.kernel.__name__, done.loops, launch.schedule.num_warps)


def busy_seconds(launch: Launch, target: str) -> float:
    """Seconds for which the instructions of a launch's innermost loops, or all of them where it has none, occupy the
    schedulers of all multiprocessors."""
    done, program = work(launch), compiled_program(launch, target)
    clock = CLOCKS[target]
    if program.loops:
        cycles = sum(issue_cycles(program.body(loop), clock) * loop.trips * times for loop, times in program.innermost)
    else:
        cycles = issue_cycles(program.code, clock)
    slots = ALL_TARGETS[target].multiprocessors * _SCHEDULERS
    return cycles * program.num_warps * (done.programs - done.aside) * done.share / slots / clock.hertz


def async_loads(launch: Launch, target: str) -> list[tuple[int, int]]:
    """Accesses of 128 bits that read memory, in each innermost loop of a launch: asynchronous copies to shared memory,
    and loads that a warp waits for."""
    program = compiled_program(launch, target)
    found = []
    for loop, _ in program.innermost:
        wide = [i.name for i in program.body(loop) if i.access_bytes == 16]
        found.append((wide.count("LDGSTS"), wide.count("LDG")))
    return found


def fill(launch: Launch, target: str) -> float:
    """How full a launch's waves are, times the mean work of a program as a share of the longest's."""
    done = work(launch)
    resident = resident_programs(compile_launch(launch, target))
    return wave_fill(done.programs, resident, ALL_TARGETS[target].multiprocessors) * done.share


def _issue_seconds(launch: Launch, target: str) -> float:
    """Seconds of all waves of a launch's programs, by the cycle model."""
    done, clock, multiprocessors = work(launch), CLOCKS[target], ALL_TARGETS[target].multiprocessors
    resident = min(resident_programs(compile_launch(launch, target)), ceil_div(done.programs, multiprocessors))
    waves, rest = divmod(done.programs, resident * multiprocessors)
    listing, name, warps = disassemble(launch, target), launch.kernel.__name__, launch.schedule.num_warps
    cycles = waves * _cycles(listing, name, done.loops, warps, resident, target, done.again) if waves else 0.0
    if rest:
        last = ceil_div(rest, multiprocessors)
        cycles += _cycles(listing, name, done.loops, warps, last, target, done.again)
    return cycles / clock.hertz


def predict(launches: Sequence[Launch], gpu: str) -> PassPrediction:
    """What the launches of a pass take on `gpu`, one of `GPUS`.

    Raises:
        ValueError: an unknown GPU, or a kernel that `work` does not describe.
        RuntimeError: as `compile_launch`.
    """
    if gpu not in GPUS:
        raise ValueError(f"gpu is {gpu!r}; expected one of {', '.join(GPUS)}")
    target, datasheet = GPUS[gpu]
    bandwidth = MEMORY_SHARE * datasheet
    found = []
    for launch, moved in zip(launches, memory_bytes(launches, target), strict=True):
        times = Times(
            moved / bandwidth,
            l2_bytes(launch) / CLOCKS[target].l2_bandwidth,
            _issue_seconds(launch, target),
            LAUNCH_SECONDS,
        )
        found.append(
            LaunchPrediction(launch.kernel.__name__, times, busy_seconds(launch, target), fill(launch, target))
        )
    states = {id(t): t.nbytes for launch in launches for t in hidden_states(launch).values()}
    return PassPrediction(gpu, tuple(found), sum(states.values()) / bandwidth)
