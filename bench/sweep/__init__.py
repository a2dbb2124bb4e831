"""`python -m bench.sweep --out DIR`: time every candidate layout of the op on this GPU, and print the best ones.

`kernels/schedule.py` chooses a layout by rules and tables that were read off such a run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def draw_weights(hidden: int, rank: int, device: torch.device) -> tuple[Callable[..., Tensor], Tensor, Tensor]:
    """Return a function that draws more random tensors of a shape and dtype, W1 (r, d) and W2 (d, r), in float32."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    return draw, draw(rank, hidden) / hidden**0.5, draw(hidden, rank) / rank**0.5
