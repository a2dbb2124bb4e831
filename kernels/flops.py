"""Count the floating-point operations of the registered ops, for PyTorch's FlopCounterMode.

As in PyTorch only matrix products count, two operations for each pair of numbers. So a steered model counts as many as
the model with plain hooks. Each function takes the op's arguments, with shapes in place of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

_Shape = Sequence[int]


def _products(number: int, state: _Shape, down: _Shape | None) -> int:
    """Count products of a hidden state (..., d) and a weight (r, d) or (d, r)."""
    return 0 if down is None else 2 * number * prod(state) * down[-2]


def _projections(number: int, up: _Shape | None, basis: _Shape | None) -> int:
    """Count projections of W2 (d, r) by V = basis (d, k)."""
    return 0 if up is None or basis is None else 4 * number * prod(up) * basis[1]


def of_forward(residual: _Shape, branch: Any, down: _Shape | None, up: _Shape | None, *rest: Any, **_: Any) -> int:
    """Count a forward pass, with or without the norm that follows. It has no other products."""
    return _products(2, residual, down) + _projections(1, up, rest[4])


def of_inference(residual: _Shape, branch: Any, down: _Shape | None, *_: Any, **__: Any) -> int:
    """Count a forward pass without a basis, of one adapter or of one for each token."""
    return _products(2, residual, down)


def of_backward(grad: _Shape, kept: Any, a: Any, down: _Shape | None, up: Any, *rest: Any, **_: Any) -> int:
    """Count a backward pass. The last argument selects gradients in the order of `post_block.backward`."""
    of_x, of_down, of_up, of_down_bias, _, of_gain, of_scale = rest[-1]
    of_activation = any((of_x, of_down, of_down_bias, of_gain, of_scale))
    number = of_activation + of_x + of_down + of_up
    return _products(number, grad, down) + _projections(1 + of_up, up, rest[4])


def of_backward_norm(grad: Any, grad_normed: Any, out: _Shape, *rest: Any, **_: Any) -> int:
    """Count a backward pass with the norm that follows. Its last argument has first and last the norm's gradients."""
    branch, a, inverse, down, up, *others, needs = rest
    return of_backward(out, None, None, down, up, *others, needs[1:-1]) if any(needs[1:-1]) else 0
