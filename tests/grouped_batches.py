"""Batches in which each token may have a different adapter, and the formula of `post_block_grouped`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from fused_steer.kernels import ACTIVATIONS
from fused_steer.kernels.grouped import post_block_grouped
from ops import PHI
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    residual: Tensor
    branch: Tensor | None
    downs: Tensor | None
    ups: Tensor | None
    ids: Tensor
    down_biases: Tensor | None
    up_biases: Tensor | None
    gain: Tensor | None
    activation: Any = "silu"
    reads: str = "sum"

    def call(self, **options: Any) -> Tensor:
        return post_block_grouped(
            self.residual, self.branch, self.downs, self.ups, self.ids, down_biases=self.down_biases,
            up_biases=self.up_biases, activation=self.activation, gain=self.gain, reads=self.reads, **options,
        )  # fmt: skip

    def name(self, slot: int) -> str:
        return self.activation if isinstance(self.activation, str) else ACTIVATIONS[int(self.activation[slot])]

    def definition(self, dtype: torch.dtype) -> Tensor:
        """Compute the op token by token by its formula."""
        rows = self.residual.reshape(-1, self.residual.shape[-1])
        branch = None if self.branch is None else self.branch.reshape(rows.shape)
        gain = None if self.gain is None else self.gain.reshape(-1).cpu().to(dtype)
        out = []
        for token, slot in enumerate(self.ids.reshape(-1).tolist()):
            x = rows[token].cpu().to(dtype)
            read = x = x if branch is None else x + branch[token].cpu().to(dtype)
            if self.reads == "branch":
                read = branch[token].cpu().to(dtype)
            u = torch.zeros_like(x)
            if slot >= 0 and self.downs is not None:
                a = self.downs[slot].cpu().to(dtype) @ read
                a = a if self.down_biases is None else a + self.down_biases[slot].cpu().to(dtype)
                u = self.ups[slot].cpu().to(dtype) @ PHI[self.name(slot)](a)
            if slot >= 0 and self.up_biases is not None:
                u = u + self.up_biases[slot].cpu().to(dtype)
            out.append(x + (u if gain is None else gain[token] * u))
        return torch.stack(out).view(self.residual.shape)


def make(
    tokens: int,
    hidden: int = 96,
    rank: int = 4,
    slots: int = 5,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    branch: bool = True,
    biases: bool = True,
    gain: bool = True,
    activation: Any = "silu",
    runs: bool = False,
    reads: str = "sum",
    seed: int = 0,
) -> Batch:
    """Draw a batch. runs: adapters in long runs, as in prefill; otherwise each token draws an adapter, or none."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    ids = torch.randint(-1, slots, (tokens,), generator=generator, dtype=torch.int32)
    if runs:
        ids = ids.sort().values
    return Batch(
        normal(tokens, hidden).to(dtype),
        normal(tokens, hidden).to(dtype) if branch else None,
        normal(slots, rank, hidden) / hidden**0.5 if rank else None,
        normal(slots, hidden, rank) / rank**0.5 if rank else None,
        ids.to(device),
        normal(slots, rank) if rank and biases else None,
        normal(slots, hidden) if biases or not rank else None,
        (torch.rand(tokens, generator=generator) + 0.25).to(device) if gain else None,
        activation,
        reads,
    )
