"""Types shared by the op and its backends: operands, packed weights, the gradients that are needed, the gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

#: What W1 may be applied to: residual + branch, or branch alone.
READS = ("sum", "branch")


def check_reads(reads: str, branch: Tensor | None) -> None:
    """
    Raises:
        ValueError: `reads` is not one of `READS`, or there is no branch to read.
    """
    if reads not in READS:
        raise ValueError(f"reads is {reads!r}; expected one of {', '.join(READS)}")
    if reads == "branch" and branch is None:
        raise ValueError("reads is 'branch' but branch is None; expected a branch, or reads='sum'")


class Packed(NamedTuple):
    """W1 and W2' in the form in which the kernels multiply them.

    down, up: (R, d), contiguous, R = `schedule.padded_rank(r)`; `up` is W2' transposed. Rows from r on are zero. In
    `numerics.operand_dtype`, rounded as `numerics.operand` rounds: a kernel gives the same bits with them as with the
    parameters.
    """

    down: Tensor
    up: Tensor


class Operands(NamedTuple):
    """What steers a hidden state in one call of `post_block`: the adapter, its strength, φ. See `post_block`.

    up: W2; a backend gets W2', already projected, and no basis. packed, of `down` and `up`, is read in their place by
    the Triton backend; the result has the same bits. reads: "sum" or "branch", what W1 is applied to.
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
        """r; 0 for a steering vector."""
        return 0 if self.down is None else self.down.shape[0]


class Needs(NamedTuple):
    """Which gradients a backward pass has to compute. `row_dot` serves those of `scale` and `gain`.

    x: that of what W1 is applied to: the sum, or branch alone.
    """

    x: bool
    down: bool
    up: bool
    down_bias: bool
    up_bias: bool
    row_dot: bool


@dataclass
class Gradients:
    """What a backward pass computed; None where `Needs` did not ask.

    x: (..., d) in the dtype of the incoming gradient. It is the gradient of both residual and branch; where W1 is
    applied to branch it is branch's, and residual has the incoming one. down: (r, d); up: (d, r), of the projected up
    matrix; down_bias: (r,); up_bias: (d,); row_dot: (N,), Σ_d G·u. row_dot is in the accumulating dtype; the others
    are in that or in the dtype of their parameter.
    """

    x: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    row_dot: Tensor | None = None


@dataclass
class GroupedCall:
    """One call of `post_block_grouped`, checked: hidden states as (N, d) of any row stride. See `post_block_grouped`.

    activation: by name, or of each slot by its place in `ACTIVATIONS`; ids: (N,); gain: (N,); out: (N, d), written.
    reads: "sum" or "branch", what W1 is applied to.
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
        """r; 0 for steering vectors."""
        return 0 if self.downs is None else self.downs.shape[1]

    @property
    def slots(self) -> int:
        """A, the number of slots."""
        sized = self.downs if self.downs is not None else self.up_biases
        assert sized is not None
        return sized.shape[0]
