"""Types shared by the op and its backends: packed weights, the gradients that are needed, the gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Packed(NamedTuple):
    """W1 and W2' in the form in which the kernels multiply them.

    down, up: (R, d), contiguous, R = `schedule.padded_rank(r)`; `up` is W2' transposed. Rows from r on are zero. In
    `numerics.operand_dtype`, rounded as `numerics.operand` rounds: a kernel gives the same bits with them as with the
    parameters.
    """

    down: Tensor
    up: Tensor


class Needs(NamedTuple):
    """Which gradients a backward pass has to compute. `row_dot` serves those of `scale` and `gain`."""

    x: bool
    down: bool
    up: bool
    down_bias: bool
    up_bias: bool
    row_dot: bool


@dataclass
class Gradients:
    """What a backward pass computed; None where `Needs` did not ask.

    x: (..., d) in the dtype of the incoming gradient, that of residual and branch alike; down: (r, d); up: (d, r), of
    the projected up matrix; down_bias: (r,); up_bias: (d,); row_dot: (N,), Σ_d G·u. row_dot is in the accumulating
    dtype; the others are in that or in the dtype of their parameter.
    """

    x: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    row_dot: Tensor | None = None
