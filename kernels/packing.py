"""Pack the adapter weights of all layers by one launch, in the form that the kernels multiply.

A tile of rows reads all of W1 and W2. In float32 they cost as much L2 traffic as the tile itself at rank 8, and eight
times as much at rank 64. Packed weights (`contract.Packed`) have the operands' dtype, are padded to the rank's extent
in registers, and hold W2 transposed.

A pack is valid for one forward pass only, because a change of the weights cannot be detected. Fused optimizers do not
raise versions, and FSDP2 gathers other values into the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import Packed
from .launch import device_of, empty, launch
from .numerics import dot_precision, operand, operand_dtype, store
from .schedule import Blocks, ceil_div, padded_rank

#: From this many tokens a kernel that converts the parameters for each tile takes longer than a launch to pack them.
MANY_TOKENS = 4096
_BLOCK_D = 128
_ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _pack(
    p_down, p_up, p_downs, p_ups, columns, D, RANK: tl.constexpr, DOT: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """Pack a block of columns of W1 (r, d) and W2 (d, r). `columns`: [BLOCK_D]"""
    ranks = tl.arange(0, BLOCK_R)
    m_columns = columns < D
    mask = (ranks < RANK)[:, None] & m_columns[None, :]
    # [BLOCK_R, BLOCK_D]
    w1 = tl.load(p_down + ranks[:, None] * D + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    # [BLOCK_D, BLOCK_R]
    p_w2 = p_up + columns[:, None] * RANK + ranks[None, :]
    w2 = tl.load(p_w2, mask=m_columns[:, None] & (ranks < RANK)[None, :], other=0.0).to(tl.float32)
    if DOT == "tf32":
        w1, w2 = operand(w1, DOT), operand(w2, DOT)
    store(p_downs + ranks[:, None] * D + columns[None, :], w1, m_columns[None, :])
    store(p_ups + ranks[:, None] * D + columns[None, :], tl.trans(w2), m_columns[None, :])


@triton.jit
def pack_weights_kernel(
    p_table, p_packed, D,
    RANK: tl.constexpr, DOT: tl.constexpr, DOWN: tl.constexpr, UP: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Pack W1 (r, d) and W2 (d, r) of each layer. The table holds their addresses. Grid (layers, column blocks).

    DOWN, UP: the dtypes of W1 and W2. p_packed: (layers, 2, BLOCK_R, d).
    """
    layer = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    p_down = tl.load(p_table + 2 * layer).to(tl.pointer_type(DOWN))
    p_up = tl.load(p_table + 2 * layer + 1).to(tl.pointer_type(UP))
    p_downs = p_packed + layer.to(tl.int64) * 2 * BLOCK_R * D
    _pack(p_down, p_up, p_downs, p_downs + BLOCK_R * D, columns, D, RANK, DOT, BLOCK_R)


@triton.jit
def pack_adapter_kernel(
    p_down, p_up, p_downs, p_ups, D,
    RANK: tl.constexpr, DOT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Pack W1 (r, d) and W2 (d, r) of one layer, (BLOCK_R, d) each. Grid (column blocks,)."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    _pack(p_down, p_up, p_downs, p_ups, columns, D, RANK, DOT, BLOCK_R)


def pack_adapter(down: Tensor, up: Tensor, dtype: torch.dtype) -> Packed:
    """Pack W1 (r, d) and W2 (d, r), both contiguous, for a hidden state of `dtype`."""
    rank, hidden = down.shape
    device, block_r = device_of(down), padded_rank(rank)
    kept = operand_dtype(dtype, device.gpu, rank)
    packed = Packed(*(empty(block_r, hidden, dtype=kept, device=down.device) for _ in range(2)))
    launch(
        pack_adapter_kernel, (ceil_div(hidden, _BLOCK_D),), down, up, *packed, hidden,
        RANK=rank, DOT=dot_precision(dtype, device.gpu, rank), device=down.device,
        schedule=Blocks({"BLOCK_D": _BLOCK_D, "BLOCK_R": block_r}, 4, 1),
    )  # fmt: skip
    return packed


def address_table(weights: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the addresses of W1 and W2 of each layer, (layers, 2) int64, on their device. Waits for the device."""
    addresses = [[down.data_ptr(), up.data_ptr()] for down, up in weights]
    return torch.tensor(addresses, dtype=torch.int64, device=weights[0][0].device)


def pack_weights(table: Tensor, down: Tensor, up: Tensor, dtype: torch.dtype) -> list[Packed]:
    """Pack the weights of all layers in one launch.

    Args:
        table: the layers' addresses: see `address_table`.
        down, up: W1 (r, d) and W2 (d, r) of one layer. All layers' are contiguous and have these shapes and dtypes.
        dtype: the dtype of the hidden state.

    Returns:
        One `Packed` for each layer. They are views of one buffer.
    """
    rank, hidden = down.shape
    device = device_of(down)
    block_r = padded_rank(rank)
    kept = operand_dtype(dtype, device.gpu, rank)
    packed = torch.empty(len(table), 2, block_r, hidden, dtype=kept, device=down.device)
    launch(
        pack_weights_kernel, (len(table), ceil_div(hidden, _BLOCK_D)), table, packed, hidden,
        RANK=rank, DOT=dot_precision(dtype, device.gpu, rank), DOWN=_ELEMENTS[down.dtype], UP=_ELEMENTS[up.dtype],
        device=down.device, schedule=Blocks({"BLOCK_D": _BLOCK_D, "BLOCK_R": block_r}, 4, 1),
    )  # fmt: skip
    parts = packed.view(-1, block_r, hidden).unbind(0)
    return [Packed(*parts[i : i + 2]) for i in range(0, len(parts), 2)]
