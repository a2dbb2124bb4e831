"""The candidates of `python -m bench.sweep --backward`: layouts of the backward's three launches.

The time of a launch depends little on the layouts of the others. So a candidate replaces the layout of one launch, and
the whole backward is timed with it. The form "chosen" replaces none, and its row has the time of each launch. "packed"
replaces none either, and is given the weights as the forward packs them: it tells whether to keep them would pay.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from . import draw_weights

RANKS = (8, 64, 1)
REHEARSED_RANKS = (4, 64)
SIZES = ((4096, 1152), (4096, 2048), (4096, 4096), (16384, 4096), (4096, 2560), (16384, 2048), (512, 2048), (8, 4096))
REHEARSED_SIZES = ((256, 512), (80, 136))
FORMS = ("chosen", "packed", "rows", "columns", "finish")

_NUMBERS = 128  # of a tile, in float32, for each thread: more of them leave registers


@dataclass(frozen=True)
class Candidate:
    """A layout of one launch of the backward.

    Attributes:
        form: the launch that has this layout: "rows", "columns" or "finish"; or "chosen" or "packed", see above.
        rows, columns: of a block. "finish" has no rows.
        warps, stages: see `kernels/schedule.py`.
        parts: of the rows in "columns": programs on a multiprocessor, together with the blocks of columns.
    """

    form: str
    rows: int = 0
    columns: int = 0
    warps: int = 0
    stages: int = 0
    parts: int = 0


def packs(tokens: int) -> bool:
    """Return whether a call with this many rows is given packed weights, as in the forward: no."""
    return False


def compiled(candidate: Candidate, tokens: int) -> tuple[Candidate, int]:
    """Return a candidate with the same machine code, and the rows of a call that compiles it."""
    if candidate.form in ("chosen", "packed"):
        return candidate, tokens
    return replace(candidate, parts=min(candidate.parts, 1)), 128


def candidates(tokens: int, hidden: int, rank: int, device: Any) -> list[Candidate]:
    """Return the candidates for a size in bf16."""
    block_r = importlib.import_module("fused_steer.kernels.schedule").padded_rank(rank)
    shared = device.shared
    found = [Candidate("chosen"), Candidate("packed")]
    for rows in (16, 32, 64):
        for columns in (64, 128, 256, 512):
            for warps in (4, 8):
                held = rows * (columns + block_r) // (32 * warps)
                if columns > hidden or not 4 <= held <= _NUMBERS or block_r * columns > 16384:
                    continue
                for stages in (2, 3, 4):
                    if (stages - 1) * columns * (2 * rows + 4 * block_r) <= shared:
                        found.append(Candidate("rows", rows, columns, warps, stages))
    for rows in (16, 32, 64):
        for columns in (32, 64, 128, 256):
            for warps in (2, 4, 8):
                held = (2 * block_r * columns + rows * columns) // (32 * warps)
                if columns > hidden or not 16 <= held <= _NUMBERS:
                    continue
                for stages in (2, 3, 4):
                    loaded = 2 * (stages - 1) * rows * (2 * columns + 3 * block_r)
                    if loaded + 2 * (rows + block_r) * columns <= shared:
                        found += [Candidate("columns", rows, columns, warps, stages, parts) for parts in (1, 2, 3, 4)]
    found += [Candidate("finish", 0, columns, warps, 3) for columns in (16, 32, 64, 128) for warps in (1, 2, 4)]
    return found


def chosen(candidate: Candidate, tokens: int, hidden: int) -> AbstractContextManager[Any]:
    """Make the launcher choose the candidate."""
    op = importlib.import_module("fused_steer.kernels.triton_backend")
    schedule = importlib.import_module("fused_steer.kernels.schedule")
    c, name = candidate, f"{candidate.form}_schedule"
    if c.form in ("chosen", "packed"):
        return nullcontext()
    of_op = getattr(schedule, name)

    def layout(*given: Any) -> Any:
        blocks = schedule.ceil_div(hidden, c.columns)
        if c.form == "finish":
            found = of_op(*given)
            # No columns are there if only the gradient of b1 is needed.
            return replace(found, block_d=c.columns, programs=schedule.ceil_div(given[0], c.columns), num_warps=c.warps)
        found = replace(of_op(*given), block_n=c.rows, block_d=c.columns, num_warps=c.warps, num_stages=c.stages)
        tiles = schedule.ceil_div(tokens, c.rows)
        if c.form == "rows":
            return replace(found, programs=tiles, height=c.rows)
        device = given[4]
        parts = max(1, min(tiles, c.parts * device.multiprocessors // (blocks + 1)))
        return replace(found, programs=blocks, splits=parts, part=schedule.ceil_div(tiles, parts) * c.rows)

    return mock.patch.object(op, name, layout)


class Problem:
    """The operands of a backward in bf16 with SiLU, and its results in float64.

    Attributes:
        sets: the gradient of `out`, `out` and a of each call.
    """

    def __init__(self, tokens: int, hidden: int, rank: int, device: torch.device, sets: int, packs: bool) -> None:
        contract = importlib.import_module("fused_steer.kernels.contract")
        packing = importlib.import_module("fused_steer.kernels.packing")
        op = importlib.import_module("fused_steer.kernels.triton_backend")
        draw, down, up = draw_weights(hidden, rank, device)
        self._needs = contract.Needs(True, True, True, False, False, False)
        self._operands = contract.Operands(down, up)
        self._packed = packing.pack_adapter(down, up, torch.bfloat16)
        self.sets: list[tuple[Tensor, Tensor, Tensor]] = []
        for number in range(sets):
            x, grad = draw(tokens, hidden, dtype=torch.bfloat16), draw(tokens, hidden, dtype=torch.bfloat16)
            self.sets.append((grad, *op.forward(x, None, self._operands, True)))
            if number == 0:
                self._truth = _in_float64(x, grad, down, up)

    @staticmethod
    def bytes_each(tokens: int, hidden: int) -> int:
        """Return the bytes of hidden states that a call moves at least."""
        return 3 * tokens * hidden * 2

    def error(self, found: Sequence[Tensor]) -> float:
        """Return the largest relative error of the three gradients from float64."""
        pairs = zip(found, self._truth, strict=True)
        return max(float((one.double() - right).norm() / right.norm()) for one, right in pairs)

    def call_of(self, candidate: Candidate) -> Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]]:
        """Return a backward with the candidate's layout: of its operands, the gradients of x, W1 and W2."""
        op = importlib.import_module("fused_steer.kernels.triton_backend")
        packed = self._packed if candidate.form == "packed" else None
        operands = self._operands._replace(packed=packed)

        def call(grad: Tensor, out: Tensor, a: Tensor) -> Sequence[Tensor]:
            with chosen(candidate, *grad.shape):
                found = op.backward(grad, out, a, operands, self._needs)
            return found.x, found.down, found.up

        return call


def _in_float64(x: Tensor, grad: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of x, W1 and W2 for x + φ(x W1ᵀ) W2ᵀ with SiLU."""
    x, grad, down, up = (t.double() for t in (x, grad, down, up))
    a = x @ down.t()
    gate = torch.sigmoid(a)
    da = (grad @ up) * (gate + a * gate * (1 - gate))
    return grad + da @ down, da.t() @ x, grad.t() @ (a * gate)
