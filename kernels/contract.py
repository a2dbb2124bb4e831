"""What a backend of the op takes and gives: the two records that pass between the op and its backends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


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
    the projected up matrix; down_bias: (r,); up_bias: (d,); row_dot: (N,), Σ_d G·u. All but x in the accumulating
    dtype.
    """

    x: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    row_dot: Tensor | None = None
