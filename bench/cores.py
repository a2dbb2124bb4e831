"""A candidate for the forward that `bench.sweep` times: whole rows in registers, multiplied on tensor cores.

    out = x + s · φ(x W1ᵀ) W2ᵀ      x = residual + branch, bf16, packed weights

`kernels/resident.py` holds whole rows too, and multiplies on the ordinary cores, 4 r operations for a number.
Tensor cores need 16 rows at a time, in another layout of the same numbers. Each warp has a slice of the columns: the
slices are the batch of a product of three dimensions, and the sums of all warps are added. So the hidden state moves
once, at any rank, and the weights are read once for 16 rows instead of one or two.

The op does not use this kernel, because no GPU has run it. It covers what the sweep times: one scale, no biases.
"""

# Tuples grow in loops that Triton unrolls.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from fused_steer.kernels.activations import apply
from fused_steer.kernels.launch import Launch, on_device
from fused_steer.kernels.numerics import COMPILER_OPTIONS, dot, held, operand, packed_operand, store, widened
from fused_steer.kernels.schedule import Blocks, ceil_div
from torch import Tensor


@triton.jit
def _columns(chunk, WARPS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the columns of a chunk, for each warp its slice. [WARPS, 1, COLUMNS]"""
    return (chunk * WARPS + tl.arange(0, WARPS)[:, None, None]) * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]


@triton.jit
def _states(
    p_residual, p_branch, tile, chunk, N, D, BLOCK_N: tl.constexpr, WARPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Load a chunk of residual and of branch, not through L1, where weights stay. [WARPS, BLOCK_N, COLUMNS] each."""
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < N)[None, :, None]
    offsets = rows.to(tl.int64)[None, :, None] * D + _columns(chunk, WARPS, COLUMNS)
    return (
        tl.load(p_residual + offsets, mask=mask, other=0.0, cache_modifier=".cg"),
        tl.load(p_branch + offsets, mask=mask, other=0.0, cache_modifier=".cg"),
    )


@triton.jit
def _weights(
    p, chunk, D, RANK: tl.constexpr, BLOCK_R: tl.constexpr, WARPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Load a chunk of packed weights, without the rows that only pad the rank. [WARPS, BLOCK_R, COLUMNS]"""
    ranks = tl.arange(0, BLOCK_R)[None, :, None]
    return tl.load(p + ranks * D + _columns(chunk, WARPS, COLUMNS), mask=ranks < RANK, other=0.0)


@triton.jit
def _first_states(
    p_residual, p_branch, tile, N, D,
    BLOCK_N: tl.constexpr, WARPS: tl.constexpr, COLUMNS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Load the first AHEAD chunks of a tile. A tuple of residual and branch in turns."""
    states = ()
    for chunk in tl.static_range(AHEAD):
        states = states + _states(p_residual, p_branch, tile, chunk, N, D, BLOCK_N, WARPS, COLUMNS)
    return states


@triton.jit
def _forward_tile(
    p_residual, p_branch, p_down, p_up, p_out, scale, tile, loaded, N, D,
    RANK: tl.constexpr, ACTIVATION: tl.constexpr, DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    WARPS: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr, AHEAD: tl.constexpr, LOOPS: tl.constexpr,
):  # fmt: skip
    """Compute a tile of `out`. `loaded`: its first chunks. If LOOPS, return the first chunks of the next tile."""
    products = tl.zeros([WARPS, BLOCK_N, BLOCK_R], tl.float32)
    sums, ups = (), ()
    for chunk in tl.static_range(CHUNKS):
        if chunk + AHEAD < CHUNKS:
            loaded = loaded + _states(p_residual, p_branch, tile, chunk + AHEAD, N, D, BLOCK_N, WARPS, COLUMNS)
        w1 = _weights(p_down, chunk, D, RANK, BLOCK_R, WARPS, COLUMNS)
        # Held: else Triton would move residual and branch to the product's layout one by one, and back.
        x = held(operand(loaded[2 * chunk].to(tl.float32) + loaded[2 * chunk + 1].to(tl.float32), DOT))
        sums = sums + (x,)
        products = dot(x, tl.permute(packed_operand(held(w1), DOT), (0, 2, 1)), products, DOT)
    for chunk in tl.static_range(AHEAD):
        ups = ups + (_weights(p_up, chunk, D, RANK, BLOCK_R, WARPS, COLUMNS),)
    if LOOPS:
        following = tile + tl.num_programs(0)
        loaded = _first_states(p_residual, p_branch, following, N, D, BLOCK_N, WARPS, COLUMNS, AHEAD)
    h = operand(apply(tl.sum(products, 0), ACTIVATION) * -scale, DOT)
    h = tl.broadcast_to(h[None, :, :], [WARPS, BLOCK_N, BLOCK_R])
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    for chunk in tl.static_range(CHUNKS):
        if chunk + AHEAD < CHUNKS:
            ups = ups + (_weights(p_up, chunk + AHEAD, D, RANK, BLOCK_R, WARPS, COLUMNS),)
        # minus: the shift with the other sign, so that a zero shift keeps x bit for bit. See post_block.
        minus = tl.zeros([WARPS, BLOCK_N, COLUMNS], tl.float32)
        minus = dot(h, packed_operand(held(ups[chunk]), DOT), minus, DOT)
        pointers = p_out + rows.to(tl.int64)[None, :, None] * D + _columns(chunk, WARPS, COLUMNS)
        store(pointers, widened(sums[chunk]) - minus, (rows < N)[None, :, None])
    return loaded


@triton.jit
def forward_cores_kernel(
    p_residual, p_branch, p_down, p_up, p_out, scale, N, D,
    RANK: tl.constexpr, ACTIVATION: tl.constexpr, DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    WARPS: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr, AHEAD: tl.constexpr, LOOPS: tl.constexpr,
):  # fmt: skip
    """Compute `out`. A tile has BLOCK_N rows. Grid (tiles,). If LOOPS, fewer programs loop over the tiles.

    A chunk has WARPS slices of COLUMNS columns, and CHUNKS chunks cover d. W1 and W2 are packed, (BLOCK_R, d). AHEAD
    chunks are loaded before the first product. If LOOPS, the next tile's are loaded before this tile is written.
    """
    tile = tl.program_id(0)
    states = _first_states(p_residual, p_branch, tile, N, D, BLOCK_N, WARPS, COLUMNS, AHEAD)
    if LOOPS:
        for each in tl.range(tile, tl.cdiv(N, BLOCK_N), tl.num_programs(0), num_stages=1):
            states = _forward_tile(
                p_residual, p_branch, p_down, p_up, p_out, scale, each, states, N, D,
                RANK, ACTIVATION, DOT, BLOCK_N, BLOCK_R, WARPS, COLUMNS, CHUNKS, AHEAD, LOOPS,
            )  # fmt: skip
    else:
        _forward_tile(
            p_residual, p_branch, p_down, p_up, p_out, scale, tile, states, N, D,
            RANK, ACTIVATION, DOT, BLOCK_N, BLOCK_R, WARPS, COLUMNS, CHUNKS, AHEAD, LOOPS,
        )  # fmt: skip


ROWS = 16  # of a program: the height of a tensor core's product


@dataclass(frozen=True)
class Slices:
    """How a program divides d: `warps` slices of `columns` columns are a chunk.

    Attributes:
        ahead: the number of chunks that are loaded before the first product.
        registers: the most registers of a thread, so that more programs fit; 0: the compiler's choice.
        programs: programs that loop over the tiles; 0: one for each tile.
    """

    columns: int
    warps: int
    ahead: int
    registers: int = 0
    programs: int = 0

    def fit(self, hidden: int) -> bool:
        return hidden % (self.columns * self.warps) == 0


def prepare(
    residual: Tensor, branch: Tensor, down: Tensor, up: Tensor, rank: int, slices: Slices, scale: float = 1.0
) -> tuple[Tensor, Launch]:
    """Allocate `out` and return the launch that fills it. See `forward_cores`."""
    tokens, hidden = residual.shape
    out = torch.empty_like(residual)
    constants: dict[str, Any] = {
        "RANK": rank, "ACTIVATION": "silu", "DOT": "bf16", "BLOCK_N": ROWS, "BLOCK_R": down.shape[0],
        "WARPS": slices.warps, "COLUMNS": slices.columns, "CHUNKS": hidden // (slices.columns * slices.warps),
        "AHEAD": slices.ahead, "LOOPS": slices.programs > 0,
    }  # fmt: skip
    arguments = (residual, branch, down, up, out, scale, tokens, hidden)
    tiles = ceil_div(tokens, ROWS)
    grid, schedule = (min(tiles, slices.programs) if slices.programs else tiles,), Blocks({}, slices.warps, 1)
    return out, Launch(forward_cores_kernel, grid, arguments, constants, schedule)


def options(slices: Slices) -> dict[str, Any]:
    """Return the compiler's options."""
    found = {"num_warps": slices.warps, "num_stages": 1, **COMPILER_OPTIONS}
    return found | ({"maxnreg": slices.registers} if slices.registers else {})


def forward_cores(
    residual: Tensor, branch: Tensor, down: Tensor, up: Tensor, rank: int, slices: Slices, scale: float = 1.0
) -> Tensor:
    """Return x + s · silu(x W1ᵀ) W2ᵀ, x = residual + branch. (N, d) bf16

    Args:
        residual: (N, d) bf16, contiguous. d is a multiple of a chunk.
        branch: As `residual`.
        down: W1 packed, (R, d) bf16, R at least 16 (`packing.pack_adapter`).
        up: W2 packed, (R, d) bf16.
        rank: r, at most R.
        slices: The layout.
        scale: s.
    """
    out, started = prepare(residual, branch, down, up, rank, slices, scale)
    with on_device(residual.device):
        started.kernel[started.grid](*started.arguments, **started.constants, **options(slices))
    return out
