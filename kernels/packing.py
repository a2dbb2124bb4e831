"""Pack an adapter's W1 and W2 by one launch, in the form that the forward's kernels multiply.

A tile of rows reads all of W1 and W2. In float32 they cost as much L2 traffic as the tile itself at rank 8, and eight
times as much at rank 64. Packed weights (`contract.Packed`) have the operands' dtype, are padded to the rank's extent
in registers, and hold W2 transposed.

The op packs in each call in which that pays (`triton_backend.packed_weights`), and forgets the result: PyTorch has no
reliable sign that a weight has changed. Fused optimizers raise no version, FSDP2 gathers other values into the same
memory, and `.data` bypasses everything.
"""

from __future__ import annotations

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
_BLOCK = 4096  # elements of a block, which a program holds in registers


@triton.jit
def pack_adapter_kernel(
    p_down, p_up, p_downs, p_ups, D,
    RANK: tl.constexpr, DOT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Pack W1 (r, d) and W2 (d, r), (BLOCK_R, d) each. Grid (column blocks,)."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
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


def pack_adapter(down: Tensor, up: Tensor, dtype: torch.dtype) -> Packed:
    """Pack W1 (r, d) and W2 (d, r), both contiguous, for a hidden state of `dtype`."""
    rank, hidden = down.shape
    device, block_r = device_of(down), padded_rank(rank)
    kept = operand_dtype(dtype, device.gpu, rank)
    packed = Packed(*(empty(block_r, hidden, dtype=kept, device=down.device) for _ in range(2)))
    block_d = max(16, min(128, _BLOCK // block_r))
    launch(
        pack_adapter_kernel, (ceil_div(hidden, block_d),), down, up, *packed, hidden,
        RANK=rank, DOT=dot_precision(dtype, device.gpu, rank), device=down.device,
        schedule=Blocks({"BLOCK_D": block_d, "BLOCK_R": block_r}, 4, 1),
    )  # fmt: skip
    return packed
