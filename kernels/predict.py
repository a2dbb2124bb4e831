"""Predict the time of a pass on a GPU that this machine need not have, and its limit. The model is not calibrated.

Nothing here is measured. Ratios between two kernels on one GPU are better than times. On an H100 the tiles' forward
took up to twice the predicted time. A launch takes the longest of the first three times. A pass takes the sum of its
launches' times and of their starts.

* **memory**: every tensor of the launch moves once through device memory, at `MEMORY_SHARE` of the datasheet's
  bandwidth. A second read in the launch is free for the tiles in flight that fit in L2. A read of a tensor from an
  earlier launch is free if everything touched since fits in half of L2.
* **L2**: the bytes that L2 sends to the multiprocessors: each tensor times the number of reads by all programs. Writes
  go the other way and are not counted. Reads that hit L1 are counted, so the forward that holds rows in registers is
  predicted too slow: its weights stay in L1.
* **issue**: cycles of the compiled programs. A multiprocessor runs as many programs as fit. Every warp executes its
  real instructions in order, and waits according to ptxas's stall counts and scoreboards. A scheduler issues one
  instruction a cycle. Pipes and the ports of shared memory and L2 serve one warp at a time. Barriers join the warps of
  a program. A load takes the latency of device memory, or of L2 for recently read data. Loops run a few trips, and
  then continue at their steady pace. Bank conflicts, instruction caches and DRAM pages are left out, and so are L1 hits
  outside of loops whose trips all read the same weights (`Loop.cached`).
* **host**: `LAUNCH_SECONDS` for each launch, between the end of one kernel and the start of the next in a captured
  graph. A call outside of a graph costs more host time.

`work` describes the programs of each kernel, by the kernel's name: the trips of their loops and their reads of each
tensor. A kernel without a description is an error.
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
#: Seconds from the end of a kernel to the start of the next in a captured CUDA graph. Assumed, not measured.
LAUNCH_SECONDS = 0.8e-6
#: The share of L2 in which the tensors of one launch are still found by the next.
_KEPT_IN_L2 = 0.5
#: Bytes of hidden states that a launch finds in the L2 of any GPU if the launch before read them: half of A100's L2.
_FOUND_IN_L2 = 20 << 20
_SCHEDULERS = 4
_LANES = 32

# -------------------------------------------------------------------------------------------------- work of a launch


@dataclass(frozen=True)
class Loop:
    """A loop of a program, as `work` describes it.

    Attributes:
        trips: the most trips that any program makes.
        states, others: bytes of hidden states and of other arrays that a trip loads from memory.
        again: whether this launch or the one before has just read them.
        inner: the inner loops.
        cached: whether every trip reads the same weights, so that loads through L1 hit it. Loads past L1 do not.
    """

    trips: int
    states: int = 0
    others: int = 0
    again: bool = False
    inner: tuple[Loop, ...] = ()
    cached: bool = False

    @property
    def shape(self) -> str:
        return f"[{''.join(loop.shape for loop in self.inner)}]"

    @property
    def series(self) -> int:
        """The trips that a program makes in sequence: of this loop if it has no inner ones, else of those."""
        return self.trips * (sum(loop.series for loop in self.inner) if self.inner else 1)


@dataclass(frozen=True)
class LaunchWork:
    """The work of all programs of a launch.

    Attributes:
        programs: their number.
        loops: a program's loops, in the order of the code.
        share: a program's mean work, as a share of the largest.
        reads: the number of reads of each tensor by all programs, by argument name. Others are read once.
        writes: the tensors that are written and not read.
        again: whether reads outside of loops hit L2.
        in_flight: bytes that all running programs together read, leave to L2 and read again.
        aside: programs among them with short other work instead of the loops.
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
        """The most trips of innermost loops that one program makes in sequence, 1 without a loop."""
        return sum(loop.series for loop in self.loops) if self.loops else 1


class _Arguments:
    """The arguments and constants of a launch, by name."""

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
        """Return the bytes of one row of all of these tensors that are present."""
        found = (self.tensor(name) for name in names)
        return sum(t.shape[-1] * t.element_size() for t in found if t is not None)

    def tile_bytes(self, rows: int, columns: int, *names: str) -> int:
        """Return the bytes of a tile of all of these tensors that are present."""
        found = (self.tensor(name) for name in names)
        return sum(rows * columns * t.element_size() for t in found if t is not None)


def _weights_read(at: _Arguments) -> float:
    """Return the share of a packed weight that a tile reads. Rows beyond the rank are skipped if half are."""
    half_empty = at["PACKED"] and 2 * at["RANK"] <= at["BLOCK_R"]
    return at["RANK"] / at["BLOCK_R"] if half_empty else 1.0


def _forward_whole(launch: Launch) -> LaunchWork:
    """Describe the forward in one kernel: a program reduces its tiles over d, then reads them again and writes.

    If W1 is applied to branch, residual is read only for writing.
    """
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
    """Describe one kernel of the split forward: a loop over a part of d, or one block."""
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


def _forward_resident(launch: Launch) -> LaunchWork:
    """Describe the forward that holds rows in registers: it reads each state once, and has no loops.

    Every program reads both weights. L1 holds them where they fit, so that L2 sends fewer bytes than counted here.
    """
    at = _Arguments(launch)
    (programs,) = launch.grid
    weights = programs * at["RANK"] / at["p_down"].shape[0]  # packed rows beyond the rank are not read
    return LaunchWork(
        programs,
        (),
        1.0,
        {"p_down": weights, "p_up": weights, "p_up_bias": programs, "p_weight": programs},
        frozenset({"p_out", "p_normed", "p_a", "p_inverse"}),
    )


def _pack_adapter(launch: Launch) -> LaunchWork:
    """Describe the packing of an adapter's weights. Each is read once."""
    (programs,) = launch.grid
    return LaunchWork(programs, (), 1.0, {}, frozenset({"p_downs", "p_ups"}))


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
    if at["NEED_DOWN"] and not at["READS_BRANCH"]:  # other programs sum da^T h over a part's rows
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
    loops += [Loop(0)] * at["NEED_DOWN_BIAS"]  # other programs run it
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


def _forward_norm(launch: Launch) -> LaunchWork:
    """Describe the forward with the norm: as without, and then `out` is read again from L2."""
    at = _Arguments(launch)
    rows, columns = at["BLOCK_N"], at["BLOCK_D3"]
    whole = _forward_whole(launch)
    (tiles,) = whole.loops
    third = Loop(ceil_div(at["D"], columns), at.tile_bytes(rows, columns, "p_out"), at.row_bytes("p_weight"), True)
    return replace(
        whole,
        loops=(replace(tiles, inner=(*tiles.inner, third)),),
        reads={**whole.reads, "p_weight": tiles.trips * whole.programs * whole.share},
        writes=frozenset({"p_normed", "p_a", "p_inverse"}),
        in_flight=whole.in_flight + whole.programs * at["height"] * at.row_bytes("p_out"),
    )


def _norm_forward(launch: Launch) -> LaunchWork:
    (tiles,) = launch.grid
    return LaunchWork(
        tiles, (), 1.0, {"p_weight": tiles, "p_up_bias": tiles}, frozenset({"p_out", "p_normed", "p_inverse"})
    )


def _norm_backward(launch: Launch) -> LaunchWork:
    at = _Arguments(launch)
    (programs,) = launch.grid
    tiles = ceil_div(at["N"], at["BLOCK_N"])
    each = ceil_div(tiles, programs)
    states = at.tile_bytes(at["BLOCK_N"], at["D"], "p_grad", "p_grad_normed", "p_kept")
    return LaunchWork(
        programs,
        (Loop(each, states),),
        tiles / (programs * each),
        {"p_weight": programs},
        frozenset({"p_dx", "p_sums"}),
    )


def _norm_backward_held(launch: Launch) -> LaunchWork:
    """Describe the backward in one pass. Every tile reads both weights, from L1 after a program's first tile."""
    at = _Arguments(launch)
    (programs,) = launch.grid
    tiles = ceil_div(at["N"], at["BLOCK_N"])
    each = ceil_div(tiles, programs)
    states = at.tile_bytes(at["BLOCK_N"], at["D"], "p_grad", "p_grad_normed", "p_out")
    weights = programs * at["RANK"] / at["PADDED_R"]
    others = at.tile_bytes(at["RANK"], at["D"], "p_down", "p_up") + at.row_bytes("p_weight")
    return LaunchWork(
        programs,
        (Loop(each, states, others, cached=True),),
        tiles / (programs * each),
        {"p_down": weights, "p_up": weights, "p_weight": programs},
        frozenset({"p_dx", "p_slab", "p_da_sums", "p_narrow"}),
    )


def _norm_backward_rows(launch: Launch) -> LaunchWork:
    at = _Arguments(launch)
    (tiles,) = launch.grid
    up = tiles * at["RANK"] / at["PADDED_R"]
    return LaunchWork(tiles, (), 1.0, {"p_up": up, "p_weight": tiles}, frozenset({"p_dx", "p_narrow", "p_da_sums"}))


def _add_partial_sums(launch: Launch) -> LaunchWork:
    at = _Arguments(launch)
    (blocks,) = launch.grid
    loop = Loop(ceil_div(at["programs"], at["BLOCK_N"]), others=at["BLOCK_N"] * at["BLOCK_D"] * 4, again=True)
    return LaunchWork(blocks, (loop,), 1.0, {}, frozenset({"p_total"}), again=True)


#: Functions that describe the work of each kernel, by the kernel's name.
_WORK: dict[str, Callable[[Launch], LaunchWork]] = {
    "pack_adapter_kernel": _pack_adapter,
    "post_block_fwd_resident_kernel": _forward_resident,
    "post_block_fwd_kernel": _forward_whole,
    "post_block_fwd_down_kernel": _forward_down,
    "post_block_fwd_up_kernel": _forward_up,
    "post_block_fwd_vector_kernel": _forward_vector,
    "post_block_bwd_rows_kernel": _backward_rows,
    "post_block_bwd_columns_kernel": _backward_columns,
    "post_block_bwd_finish_kernel": _backward_finish,
    "post_block_norm_fwd_kernel": _forward_norm,
    "rms_norm_fwd_kernel": _norm_forward,
    "rms_norm_bwd_kernel": _norm_backward,
    "post_block_norm_bwd_held_kernel": _norm_backward_held,
    "post_block_norm_bwd_rows_kernel": _norm_backward_rows,
    "add_partial_sums_kernel": _add_partial_sums,
}


def work(launch: Launch) -> LaunchWork:
    """Return the work of all programs of `launch`.

    Raises:
        ValueError: the kernel is not described here, or has other arguments.
    """
    name = launch.kernel.__name__
    if name not in _WORK:
        raise ValueError(f"kernel is {name}; expected one that kernels/predict.py describes: {', '.join(_WORK)}")
    return _WORK[name](launch)


def works(launches: Sequence[Launch]) -> list[LaunchWork]:
    """Return the work of a pass's launches, in order.

    A launch finds hidden states in L2 only if an earlier one has read all that it reads. If W1 is applied to branch,
    the first kernel for few tokens does not read residual, so the second one waits for device memory.
    """
    found, seen = [], set()
    for launch in launches:
        done = work(launch)
        states = hidden_states(launch)
        if done.again and any(id(t) not in seen for name, t in states.items() if name not in done.writes):
            done = replace(done, again=False, loops=tuple(replace(loop, again=False) for loop in done.loops))
        seen |= {id(t) for t in states.values()}
        found.append(done)
    return found


def _tensors(launch: Launch) -> dict[str, torch.Tensor]:
    named = zip(launch.kernel.arg_names, launch.arguments, strict=False)
    return {name: value for name, value in named if isinstance(value, torch.Tensor)}


def l2_bytes(launch: Launch) -> float:
    """Return the bytes that L2 sends to the multiprocessors."""
    done = work(launch)
    read = (item for item in _tensors(launch).items() if item[0] not in done.writes)
    return sum(tensor.nbytes * done.reads.get(name, 1) for name, tensor in read)


def memory_bytes(launches: Sequence[Launch], target: str) -> list[float]:
    """Return the bytes that each launch of a pass reads from or writes to device memory, in order."""
    l2 = ALL_TARGETS[target].l2
    found, touched = [], 0.0
    seen: dict[int, float] = {}  # for each tensor the bytes touched until its last use
    for launch in launches:
        done = work(launch)
        total = 0.0
        tensors = _tensors(launch)
        for tensor in tensors.values():
            kept = id(tensor) in seen and touched - seen[id(tensor)] + tensor.nbytes <= _KEPT_IN_L2 * l2
            total += 0 if kept else tensor.nbytes
        if done.in_flight > l2:  # reading backwards finds the data read last
            lost = 1 - l2 / done.in_flight
            total += lost * sum(t.nbytes for name, t in hidden_states(launch).items() if done.reads.get(name, 1) > 1)
        touched += sum(tensor.nbytes for tensor in tensors.values())
        seen |= {id(tensor): touched for tensor in tensors.values()}
        found.append(total)
    return found


def wave_fill(programs: int, resident: int, multiprocessors: int) -> float:
    """Return how full the waves of a grid are: its programs over the most that its waves could hold.

    `resident` is the most programs that a multiprocessor holds. A grid with fewer counts as one wave.
    """
    most = multiprocessors * min(resident, ceil_div(programs, multiprocessors))
    return programs / (ceil_div(programs, most) * most)


# ------------------------------------------------------------------------------------------- one multiprocessor's clock


@dataclass(frozen=True)
class Clock:
    """The speed of a multiprocessor: clock, latencies, pipe widths and L2 bandwidth.

    The latencies, widths and L2 bandwidths follow published microbenchmarks (Citadel's of Volta and Turing, their
    successors for A100 and H100; Chips and Cheese for L2). They were written down from memory.

    Attributes:
        hertz: the boost clock.
        shared_latency, matrix_latency: cycles from a load of shared memory (LDS, LDSM) to its result.
        l2_latency, memory_latency: the same for L2, and for device memory under load.
        product_latency: the same for a tensor core's product.
        fp32, integer, special: cycles that a warp's instruction occupies its pipe.
        product: the same for a 16 x 8 x 16 product in bf16.
        barrier: cycles of a barrier.
        l2_bandwidth: bytes a second from L2 to all multiprocessors.
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
_OTHER_LATENCY = 12  # for other results that set a scoreboard
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
    """Return the scheduler's pipe that an instruction occupies, and for how many cycles."""
    name = instruction.name
    if name == "HMMA":
        # Half the depth takes half the time. tf32 has half the speed of bf16.
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
    """Return the least cycles that one warp's instructions occupy a scheduler.

    These are the number of instructions or the busiest pipe's cycles, whichever is larger.

    Waiting is not counted.
    """
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
    path: Sequence[
        tuple[int, bool, bool, int]
    ]  # instruction, whether its loads hit L2, and L1, the number of the trip that begins here or -1
    step: int = 0
    ready: float = 0.0
    boards: list[float] = field(default_factory=lambda: [0.0] * 6)
    groups: list[float] = field(default_factory=list)  # when each group of asynchronous copies is complete
    copying: float = 0.0  # when the copies since the last group are complete
    products: float = 0.0  # when the warp group's products are complete


class _Multiprocessor:
    """Simulates warps on one multiprocessor. Each instruction is issued at the earliest possible time."""

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
        """Issue the warp's next instruction. Return the warps that can continue: none, this one, or a barrier's."""
        index, hits_l2, hits_l1, _ = warp.path[warp.step]
        instruction, clock = self.code[index], self.clock
        pipe, cycles = self._occupied[index]
        if pipe is not None:
            self.pipes[warp.scheduler, pipe] = now + cycles
        self.issued[warp.scheduler] = now
        latency = self._latency(warp, instruction, pipe, cycles, now, hits_l2, hits_l1)
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
        self,
        warp: _Warp,
        instruction: Instruction,
        pipe: str | None,
        cycles: int,
        now: float,
        hits_l2: bool,
        hits_l1: bool,
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
        past_l1 = name == "LDGSTS" or "STRONG" in instruction.opcode
        if name in ("LDG", "LDGSTS") and not (hits_l1 and not past_l1):
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
    """Return how many groups may still be pending after a wait for groups, or None for other instructions."""
    waits = instruction.name == "DEPBAR" or instruction.opcode.startswith("WARPGROUP.DEPBAR")
    found = re.search(r"(?:SB0|gsb0), (0x[0-9a-f]+)", instruction.operands) if waits else None
    return int(found.group(1), 16) if found else None


#: Trips of a loop that are simulated. The others continue at the pace of the last two thirds of these.
_TIMED_TRIPS = 9
_TIMED_OUTER_TRIPS = 3


@dataclass(frozen=True)
class MatchedLoop:
    """A loop of the code with its description from `work`, and its inner loops."""

    code: LoopCode
    described: Loop
    inner: tuple[MatchedLoop, ...]

    @property
    def trips(self) -> int:
        return self.described.trips


@dataclass(frozen=True)
class Program:
    """A compiled program: its instructions, its loops and its number of warps."""

    code: tuple[Instruction, ...]
    loops: tuple[MatchedLoop, ...]
    num_warps: int

    @property
    def innermost(self) -> Iterator[tuple[MatchedLoop, int]]:
        """Yield the innermost loops, each with the number of times that its outer loops run it."""

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
        """Return the bytes that a program's 128-bit accesses read in one trip."""
        loads = [i for i in self.body(loop) if i.name in ("LDG", "LDGSTS") and i.access_bytes == 16]
        return sum(i.access_bytes for i in loads) * _LANES * self.num_warps


def _match(
    code: Sequence[Instruction], found: Sequence[LoopCode], described: Sequence[Loop]
) -> tuple[MatchedLoop, ...]:
    """Match the loops of the code with their descriptions, in order.

    ptxas unrolls short loops. If the code has more loops than descriptions, a loop with several times the loads of the
    next one is taken for its unrolled form, and the next loop runs the remaining trips.

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
    """Return the program in a SASS listing, with its loops matched to their descriptions.

    Raises:
        ValueError: the code has other loops than described, or one loads at least twice the described bytes.
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
    """Return the cycles until `programs` programs that start together on one multiprocessor are all done."""
    timed: dict[LoopCode, int] = {}
    matched: dict[LoopCode, MatchedLoop] = {}

    def limit(loops: Sequence[MatchedLoop]) -> None:
        for loop in loops:
            matched[loop.code] = loop
            timed[loop.code] = min(loop.trips, _TIMED_OUTER_TRIPS if loop.inner else _TIMED_TRIPS)
            limit(loop.inner)

    limit(program.loops)
    path: list[tuple[int, bool, bool, int]] = []
    begins: list[LoopCode] = []  # the loop that each trip belongs to
    first_of = {loop.first: loop for loop in timed}
    for index, loop in Walk(program.code, timed):
        described = matched[loop].described if loop is not None and not loop.inner else None
        hits, cached = (again, False) if described is None else (described.again, described.cached)
        trip = -1
        if loop is not None and index in first_of:
            trip = len(begins)
            begins.append(first_of[index])
        path.append((index, hits, cached, trip))
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
        trip = warp.path[warp.step][3]
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
    """Return the cycles of the loop trips that were not simulated, at the pace of the simulated ones."""

    def pace(loop: LoopCode) -> float:
        """Return the mean cycles of a trip, without the first third of each run of the loop."""
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
        """Return the cycles of one run of these loops beyond the simulated trips."""
        total = 0.0
        for loop in loops:
            within = beyond(loop.inner)
            total += timed[loop.code] * within
            if loop.trips > timed[loop.code]:
                total += (loop.trips - timed[loop.code]) * (pace(loop.code) + within)
        return total

    return beyond(program.loops)


# ------------------------------------------------------------------------------------------------------- predictions

#: The limits of a launch, in display order.
LIMITS = ("memory", "l2", "issue", "host")


@dataclass(frozen=True)
class Times:
    """The seconds that each limit alone would take, of a launch or a pass."""

    memory: float
    l2: float
    issue: float
    host: float

    @property
    def kernel(self) -> float:
        """The seconds of a launch after its start: the largest of the memory, L2 and issue times."""
        return max(self.memory, self.l2, self.issue)


@dataclass(frozen=True)
class LaunchPrediction:
    """The predicted times of a launch on a GPU.

    Attributes:
        busy: the least seconds of its innermost loops' instructions, with all multiprocessors busy and no waiting.
        fill: how full its waves are, with unequal programs taken into account.
    """

    kernel: str
    times: Times
    busy: float
    fill: float

    @property
    def binds(self) -> str:
        """The name of the limit that decides the launch's time after its start: memory, l2 or issue."""
        return max(LIMITS[:3], key=lambda name: getattr(self.times, name))


@dataclass(frozen=True)
class PassPrediction:
    """The predicted times of a pass on a GPU, in seconds.

    Attributes:
        launches: its launches.
        floor: the time to move each of its hidden states once through device memory.
    """

    gpu: str
    launches: tuple[LaunchPrediction, ...]
    floor: float

    @property
    def times(self) -> Times:
        """Each limit's seconds, summed over the launches."""
        found = [launch.times for launch in self.launches]
        return Times(*(sum(getattr(times, name) for times in found) for name in LIMITS))

    @property
    def seconds(self) -> float:
        return sum(launch.times.kernel for launch in self.launches) + self.times.host

    @property
    def floors(self) -> float:
        """The ratio of the pass's time to its floor. Both are without the starts of kernels."""
        return sum(launch.times.kernel for launch in self.launches) / self.floor

    @property
    def binds(self) -> str:
        """The name of the limit that decides its launches' times for the longest time, the host included."""
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
    """Return the program of a launch, compiled for `target`.

    Raises:
        ValueError: `work` does not describe the kernel, or describes other loops.
        RuntimeError: see `compile_launch`.
    """
    done = work(launch)
    return read_program(disassemble(launch, target), launch.kernel.__name__, done.loops, launch.schedule.num_warps)


def busy_seconds(launch: Launch, target: str) -> float:
    """Return the seconds that the instructions of a launch's innermost loops occupy all schedulers.

    Without a loop, all instructions count.
    """
    done, program = work(launch), compiled_program(launch, target)
    clock = CLOCKS[target]
    if program.loops:
        cycles = sum(issue_cycles(program.body(loop), clock) * loop.trips * times for loop, times in program.innermost)
    else:
        cycles = issue_cycles(program.code, clock)
    slots = ALL_TARGETS[target].multiprocessors * _SCHEDULERS
    return cycles * program.num_warps * (done.programs - done.aside) * done.share / slots / clock.hertz


def async_loads(launch: Launch, target: str) -> list[tuple[int, int]]:
    """Count the 128-bit accesses that read memory in each innermost loop: (asynchronous copies, plain loads)."""
    program = compiled_program(launch, target)
    found = []
    for loop, _ in program.innermost:
        wide = [i.name for i in program.body(loop) if i.access_bytes == 16]
        found.append((wide.count("LDGSTS"), wide.count("LDG")))
    return found


def fill(launch: Launch, target: str) -> float:
    """Return how full a launch's waves are, times a program's mean work as a share of the largest."""
    done = work(launch)
    resident = resident_programs(compile_launch(launch, target))
    return wave_fill(done.programs, resident, ALL_TARGETS[target].multiprocessors) * done.share


def _issue_seconds(launch: Launch, done: LaunchWork, target: str) -> float:
    """Return the seconds of all waves of a launch's programs, by the cycle model."""
    clock, multiprocessors = CLOCKS[target], ALL_TARGETS[target].multiprocessors
    resident = min(resident_programs(compile_launch(launch, target)), ceil_div(done.programs, multiprocessors))
    waves, rest = divmod(done.programs, resident * multiprocessors)
    listing, name, warps = disassemble(launch, target), launch.kernel.__name__, launch.schedule.num_warps
    cycles = waves * _cycles(listing, name, done.loops, warps, resident, target, done.again) if waves else 0.0
    if rest:
        last = ceil_div(rest, multiprocessors)
        cycles += _cycles(listing, name, done.loops, warps, last, target, done.again)
    return cycles / clock.hertz


def predict(launches: Sequence[Launch], gpu: str) -> PassPrediction:
    """Predict the times of a pass's launches on `gpu`, one of `GPUS`.

    Raises:
        ValueError: an unknown GPU, or a kernel that `work` does not describe.
        RuntimeError: see `compile_launch`.
    """
    if gpu not in GPUS:
        raise ValueError(f"gpu is {gpu!r}; expected one of {', '.join(GPUS)}")
    target, datasheet = GPUS[gpu]
    bandwidth = MEMORY_SHARE * datasheet
    found = []
    for launch, done, moved in zip(launches, works(launches), memory_bytes(launches, target), strict=True):
        times = Times(
            moved / bandwidth,
            l2_bytes(launch) / CLOCKS[target].l2_bandwidth,
            _issue_seconds(launch, done, target),
            LAUNCH_SECONDS,
        )
        found.append(
            LaunchPrediction(launch.kernel.__name__, times, busy_seconds(launch, target), fill(launch, target))
        )
    states = {id(t): t.nbytes for launch in launches for t in hidden_states(launch).values()}
    return PassPrediction(gpu, tuple(found), sum(states.values()) / bandwidth)
