"""Types shared by the op and its backends: operands, packed weights, the gradients that are needed, the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: The dtypes of the op's tensors. The Triton backend refuses float64.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

FLOAT32_MAX = torch.finfo(torch.float32).max

#: What W1 may be applied to: residual + branch, or branch alone.
READS = ("sum", "branch")


def shown(value: Any) -> str:
    """Return a value for an error message, in one line."""
    plain = value is None or isinstance(value, (str, int, float))
    return f"{value!r:.80}" if plain else f"a {type(value).__name__}"


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """
    Raises:
        ValueError: `value`, of whatever type, is not one of `choices`.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {shown(value)}; expected one of {', '.join(choices)}")


def check_flag(name: str, value: Any) -> None:
    """
    Raises:
        TypeError: `value` is not True or False.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {shown(value)}; expected True or False")


def check_reads(reads: str, branch: Tensor | None) -> None:
    """
    Raises:
        ValueError: `reads` is not one of `READS`, or there is no branch to read.
    """
    check_choice("reads", reads, READS)
    if reads == "branch" and branch is None:
        raise ValueError("reads is 'branch' but branch is None; expected a branch, or reads='sum'")


def check_dense(name: str, tensor: Any) -> None:
    """
    Raises:
        TypeError: it is no tensor, or one that is sparse, nested, or in a layout of oneDNN.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor")
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "a nested tensor" if tensor.is_nested else f"of layout {tensor.layout}"
        raise TypeError(f"{name} is {kind}; expected a dense tensor")


class Packed(NamedTuple):
    """W1 and W2' of an adapter, in the form in which the kernels multiply them.

    The dtype is `numerics.operand_dtype` and the rounding that of `numerics.operand`, so a kernel gives the same bits
    with them as with the parameters.

    Attributes:
        down, up: (R, d), contiguous, with R = `schedule.padded_rank(r)`. `up` is W2' transposed. Rows from r on are
            zero.
    """

    down: Tensor
    up: Tensor


class Operands(NamedTuple):
    """The adapter of one call of `post_block`, its strength and φ. See `post_block`.

    A backend gets `up` already projected (W2') and no basis. The Triton backend reads `packed` in place of `down` and
    `up`. The result has the same bits.

    `reads` names the tensor that W1 is applied to: "sum" (residual + branch) or "branch".
    """

    down: Tensor | None = None
    up: Tensor | None = None
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    gain: Tensor | None = None
    basis: Tensor | None = None
    scale: float | Tensor = 1.0
    activation: str = "silu"
    packed: Packed | None = None
    reads: str = "sum"

    @property
    def rank(self) -> int:
        """The rank r, 0 for a steering vector."""
        return 0 if self.down is None else self.down.shape[0]


class Needs(NamedTuple):
    """The gradients that a backward pass has to compute. `row_dot` is needed for those of `scale` and `gain`.

    `x` is the tensor that W1 is applied to: the sum, or branch.
    """

    x: bool
    down: bool
    up: bool
    down_bias: bool
    up_bias: bool
    row_dot: bool


@dataclass
class Gradients:
    """The gradients of a backward pass. One that is not needed is None.

    Attributes:
        x: (..., d), in the dtype of the incoming gradient. It is the gradient of both residual and
            branch; if W1 is applied to branch, of branch alone.
        down, up: (r, d) and (d, r), of W1 and the projected W2'.
        down_bias, up_bias: (r,) and (d,).
        row_dot: Σ_d G·u, (N,), in the accumulation dtype. The others have that dtype or their parameter's.
    """

    x: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    row_dot: Tensor | None = None


@dataclass
class GroupedCall:
    """One checked call of `post_block_grouped`, with hidden states as (N, d) of any row stride.

    Attributes:
        activation: a name, or each slot's index in `ACTIVATIONS`.
        ids, gain: (N,).
        out: (N, d), written by the call.
        reads: the tensor that W1 is applied to, "sum" or "branch".
    """

    residual: Tensor
    branch: Tensor | None
    downs: Tensor | None
    ups: Tensor | None
    down_biases: Tensor | None
    up_biases: Tensor | None
    activation: str | Tensor
    ids: Tensor
    gain: Tensor | None
    out: Tensor
    into_branch: bool
    reads: str = "sum"

    @property
    def rank(self) -> int:
        """The rank r, 0 for steering vectors."""
        return 0 if self.downs is None else self.downs.shape[1]

    @property
    def slots(self) -> int:
        """A, the number of slots."""
        sized = self.downs if self.downs is not None else self.up_biases
        assert sized is not None
        return sized.shape[0]
