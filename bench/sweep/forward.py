"""The candidates of `python -m bench.sweep`: layouts of the forward.

With few rows a call packs the weights itself, if its layout wants them packed, as the op does. With many rows this
takes little of the time, and the weights are given packed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from . import draw_weights

RANKS = (1, 2, 4, 8, 16, 32, 64)
REHEARSED_RANKS = (4, 64)
SIZES = ((16384, 4096), (16384, 2048), (4096, 4096), (4096, 2560), (4096, 2048), (4096, 1152), (512, 2048), (8, 2048))
FORMS = ("chosen", "rows", "direct", "cores", "tiles")
FEW = 1024  # rows
REHEARSED_SIZES = ((2 * FEW, 512), (80, 512), (8, 256))


@dataclass(frozen=True)
class Candidate:
    """A layout of the forward.

    Attributes:
        form: "chosen", what the schedule chooses, "rows", whole rows in registers, "direct", the same with W2 as it
            lies, "cores", whole rows on tensor cores (`bench/cores.py`; the op does not use it), or "tiles".
        rows, columns, columns_out: of a block, and of a block when writing; only "tiles" has two widths.
        warps, stages: see `kernels/schedule.py`.
        ahead, held: see `schedule.ResidentSchedule`.
        programs: programs on a multiprocessor that loop over the tiles; 0: one program for each tile.
        chunks: see `cores.Slices.ahead`.
        registers: see `cores.Slices`.
    """

    form: str
    rows: int = 0
    columns: int = 0
    columns_out: int = 0
    warps: int = 0
    stages: int = 1
    ahead: bool = False
    held: bool = False
    programs: int = 0
    chunks: int = 0
    registers: int = 0


def packs(tokens: int) -> bool:
    """Return whether a call with this many rows is given packed weights."""
    return tokens > FEW


def compiled(candidate: Candidate, tokens: int) -> tuple[Candidate, int]:
    """Return a candidate with the same machine code, and the rows of a call that compiles it."""
    return candidate, tokens if candidate.form == "chosen" else 2 * candidate.rows


def candidates(tokens: int, hidden: int, rank: int, device: Any) -> list[Candidate]:
    """Return the candidates for a size in bf16."""
    found = [Candidate("chosen")]
    if rank <= 8:
        for warps in (1, 2, 4, 8):
            columns = 256 * warps  # 16 bytes for each lane
            blocks = -(-hidden // columns)
            for rows in (1, 2, 4):
                if rows * blocks * 8 <= 160 and blocks * columns <= 1.3 * max(hidden, 256):
                    found += [
                        Candidate("rows", rows, columns, columns, warps, ahead=ahead, held=held)
                        for ahead in ((False, True) if tokens <= FEW and rank * blocks * 8 <= 256 else (False,))
                        for held in ((False, True) if ahead else (False,))
                    ]
    if rank in (2, 4, 8) and tokens <= FEW:
        for warps in (1, 2, 4, 8, 16):
            for vector in (4, 8):
                columns = 32 * vector * warps
                blocks = -(-hidden // columns)
                # Twice as many weights as a thread's registers hold: half of them may wait.
                if 2 * rank * blocks * vector <= min(256, 4096 // warps) and blocks * columns < 2 * hidden:
                    held = (False, True) if 2 * rank * blocks * vector <= 128 else (False,)
                    found += [Candidate("direct", 1, columns, columns, warps, ahead=True, held=one) for one in held]
    if tokens > FEW and rank >= 4:
        from ..cores import ROWS

        found += [
            Candidate("cores", ROWS, slices.columns * slices.warps, slices.columns * slices.warps, slices.warps,
                      chunks=slices.ahead, registers=slices.registers, programs=slices.programs)
            for slices in _slices(hidden, rank)
        ]  # fmt: skip
    if tokens > 64:
        tiles = {
            16: ((16, 256, 256, 4, 3), (16, 512, 256, 4, 3), (16, 256, 128, 4, 3), (16, 512, 256, 8, 3),
                 (16, 128, 128, 4, 3), (32, 128, 128, 4, 3), (32, 256, 128, 4, 3), (32, 256, 256, 8, 3)),
            32: ((16, 256, 256, 4, 3), (16, 256, 128, 4, 3), (16, 128, 128, 4, 3), (32, 128, 128, 4, 3),
                 (32, 128, 128, 8, 3), (64, 64, 64, 4, 4)),
            64: ((64, 64, 64, 4, 4), (16, 128, 128, 4, 3), (32, 128, 128, 4, 3), (32, 128, 128, 8, 3),
                 (64, 64, 64, 8, 3), (128, 64, 64, 8, 3)),
        }[max(16, 1 << (rank - 1).bit_length())]  # fmt: skip
        found += [
            Candidate("tiles", *tile, programs=programs)
            for tile in tiles
            if tile[1] <= hidden
            for programs in (0, 1, 2)
        ]
    return found


def _slices(hidden: int, rank: int) -> list[Any]:
    """Return the layouts for tensor cores in which a thread's numbers, 64 to 160 of 16 rows, fit in its registers."""
    from ..cores import ROWS, Slices

    return [
        slices
        for warps in (4, 8, 16)
        for columns in (16, 32, 64)
        for ahead in (1, 2, 4)
        for registers in ((128,) if warps == 8 else (0,))  # two programs of 8 warps on a multiprocessor
        for programs in ((0, 1) if warps == 16 else (0,))
        if (slices := Slices(columns, warps, ahead, registers, programs)).fit(hidden)
        and ahead * columns <= 64
        and 64 <= ROWS * hidden // (32 * warps) <= 160
        and columns * max(16, rank) <= 1024
    ]


@contextmanager
def chosen(candidate: Candidate, tokens: int, hidden: int, rank: int, device: Any) -> Iterator[None]:
    """Make the launcher choose the candidate."""
    if candidate.form == "chosen":
        yield
        return
    op = importlib.import_module("fused_steer.kernels.triton_backend")
    schedule = importlib.import_module("fused_steer.kernels.schedule")
    c, tiles = candidate, schedule.ceil_div(tokens, candidate.rows)
    if c.form != "tiles":
        blocks = schedule.ceil_div(hidden, c.columns)
        resident = schedule.ResidentSchedule(
            c.rows, c.columns, blocks, tiles, c.warps, c.ahead, c.form == "direct", c.held
        )
        replaced: dict[str, Callable[..., Any]] = {"resident_schedule": lambda *_: resident}
    else:
        block_r = schedule.padded_rank(rank)
        groups = 1 if hidden % c.columns else schedule._groups(c.rows, c.columns, block_r, c.warps, 2, device)
        programs = min(tiles, c.programs * device.multiprocessors) if c.programs else tiles
        forward = schedule.ForwardSchedule(
            c.rows, c.rows, c.columns, c.columns_out, block_r, groups, programs, c.warps, c.stages, c.stages
        )
        replaced = dict.fromkeys(("resident_schedule", "forward_splits"), lambda *_: None)
        replaced["forward_schedule"] = lambda *_: forward
    with mock.patch.multiple(op, **replaced):
        yield


class Problem:
    """The operands of a forward in bf16 with SiLU, and the first rows of its result in float64.

    Attributes:
        sets: the residual and the branch of each call.
        packs: whether the weights are given packed.
    """

    def __init__(self, tokens: int, hidden: int, rank: int, device: torch.device, sets: int, packs: bool) -> None:
        contract = importlib.import_module("fused_steer.kernels.contract")
        packing = importlib.import_module("fused_steer.kernels.packing")
        draw, down, up = draw_weights(hidden, rank, device)
        packed = packing.pack_adapter(down, up, torch.bfloat16) if packs else None
        self.operands = contract.Operands(down, up, packed=packed)
        self.sets = [
            (draw(tokens, hidden, dtype=torch.bfloat16), draw(tokens, hidden, dtype=torch.bfloat16))
            for _ in range(sets)
        ]
        residual, branch = self.sets[0]
        x = residual[:64].double() + branch[:64].double()
        a = x @ down.bfloat16().double().t()
        self._truth = x + (a * torch.sigmoid(a)) @ up.bfloat16().double().t()

    @staticmethod
    def bytes_each(tokens: int, hidden: int) -> int:
        """Return the bytes of hidden states that a call moves."""
        return 3 * tokens * hidden * 2

    def error(self, out: Tensor) -> float:
        """Return the relative error of the first rows from float64."""
        return float((out[:64].double() - self._truth).norm() / self._truth.norm())

    def call_of(self, candidate: Candidate) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a forward with the candidate's layout: of residual and branch, `out`."""
        device = importlib.import_module("fused_steer.kernels.launch").device_of(self.operands.down)
        rank, hidden = self.operands.down.shape
        if candidate.form == "cores":
            from ..cores import Slices, forward_cores

            c, packed = candidate, self.operands.packed
            slices = Slices(c.columns // c.warps, c.warps, c.chunks, c.registers, c.programs * device.multiprocessors)
            return lambda residual, branch: forward_cores(residual, branch, *packed, rank, slices)
        op = importlib.import_module("fused_steer.kernels.triton_backend")

        def call(residual: Tensor, branch: Tensor) -> Tensor:
            with chosen(candidate, residual.shape[0], hidden, rank, device):
                found: Tensor = op.forward(residual, branch, self.operands, False)[0]
            return found

        return call
