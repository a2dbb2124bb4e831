"""The op's definition in plain PyTorch with autograd, and random inputs for it.

`definition` in float64 is the truth. In the model's dtype it is the unfused PyTorch hook, and the fused op's error is
measured against its error.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from fused_steer.kernels.contract import Packed
from fused_steer.kernels.numerics import dot_precision, operand_dtype
from fused_steer.kernels.schedule import padded_rank
from torch import Tensor

PHI = {
    "identity": lambda a: a,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"),
    "relu": F.relu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class Inputs:
    """The operands of one call. All but `basis` may require gradients."""

    residual: Tensor
    branch: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    gain: Tensor | None = None
    scale: Tensor | float = 1.0
    basis: Tensor | None = None
    reads: str = "sum"

    def tensors(self) -> dict[str, Tensor]:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def map(self, function) -> "Inputs":
        return replace(self, **{name: function(value) for name, value in self.tensors().items()})

    def leaves(self, dtype: torch.dtype | None = None) -> "Inputs":
        """Copy the operands as leaves that require gradients, with the same strides; cast them to `dtype` if given."""

        def leaf(t: Tensor) -> Tensor:
            copy = t.detach().to(dtype) if dtype else t.detach().as_strided(t.size(), t.stride(), t.storage_offset())
            return copy.requires_grad_()

        basis = None if self.basis is None else self.basis.to(dtype or self.basis.dtype)
        return replace(replace(self, basis=None).map(leaf), basis=basis)


def make_inputs(
    *shape: int,
    rank: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    branch: bool = True,
    biases: bool = True,
    gain: bool = True,
    scale: bool = True,
    basis: int = 3,
    reads: str = "sum",
    seed: int = 0,
) -> Inputs:
    """Draw random operands for a hidden state of `shape`, (..., d). The shift is about as large as the state."""
    generator = torch.Generator().manual_seed(seed)
    hidden = shape[-1]

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    inputs = Inputs(
        residual=normal(*shape).to(dtype),
        branch=normal(*shape).to(dtype) if branch else None,
        down=normal(rank, hidden) / hidden**0.5 if rank else None,
        up=normal(hidden, rank) / rank**0.5 if rank else None,
        down_bias=normal(rank) if rank and biases else None,
        up_bias=normal(hidden) if biases or not rank else None,
        gain=torch.rand(shape[:-1], generator=generator) + 0.25 if gain else None,
        scale=torch.tensor(0.7) if scale else 0.7,
        basis=torch.linalg.qr(normal(hidden, basis))[0] if basis and rank else None,
        reads=reads,
    )
    return inputs.map(lambda t: t.to(device))


#: Arguments of `make_inputs` for calls that differ in their operands.
CALLS = {
    "all": {"rank": 3},
    "plain": {"rank": 3, "biases": False, "gain": False, "scale": False, "basis": 0},
    "without a branch": {"rank": 3, "branch": False},
    "reads branch": {"rank": 3, "reads": "branch"},
    "vector": {"rank": 0},
}


def make_draws(count: int, *shape: int, **options: Any) -> list[Inputs]:
    """Draw the operands of several calls, to pool their errors: a small gradient may nearly cancel in a single call."""
    return [make_inputs(*shape, **options, seed=seed) for seed in range(count)]


def definition(inputs: Inputs, activation: str) -> Tensor:
    """Compute the op by its formula, in the dtype of its operands."""
    x = inputs.residual if inputs.branch is None else inputs.residual + inputs.branch
    u: Tensor | float = 0.0
    if inputs.down is not None:
        up = inputs.up
        if inputs.basis is not None:
            up = up - inputs.basis @ (inputs.basis.T @ up)
        a = (inputs.branch if inputs.reads == "branch" else x) @ inputs.down.T
        if inputs.down_bias is not None:
            a = a + inputs.down_bias
        u = PHI[activation](a) @ up.T
    if inputs.up_bias is not None:
        u = u + inputs.up_bias
    strength = inputs.scale if inputs.gain is None else inputs.scale * inputs.gain.unsqueeze(-1)
    return x + strength * u


def round_tf32(x: Tensor) -> Tensor:
    """Round float32 to tf32, a fraction of 10 bits: to nearest, ties away from zero, as `cvt.rna.tf32` does."""
    bits = x.contiguous().view(torch.int32)
    return torch.where(x.isnan(), x, (bits.add(0x1000) & ~0x1FFF).view(torch.float32))


def pack_reference(down: Tensor, up: Tensor, dtype: torch.dtype, gpu: str) -> Packed:
    """Return down (r, d) and up (d, r) in the precision in which the kernels multiply a hidden state of `dtype`."""
    rank, hidden = down.shape

    def pack(weight: Tensor) -> Tensor:
        rows = torch.zeros(padded_rank(rank), hidden, device=weight.device)
        rows[:rank] = weight.float()
        if dot_precision(dtype, gpu, rank) == "tf32":
            rows = round_tf32(rows)
        return rows.to(operand_dtype(dtype, gpu, rank))

    return Packed(pack(down), pack(up.t()))


def relative_error(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()
