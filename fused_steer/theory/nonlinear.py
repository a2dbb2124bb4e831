"""The best adapter with a nonlinear φ for given shifts, by descent: for each W1 and b1 the best W2 and b2 are known.

Minimised over tokens x and the shifts d that they should get, as in regression.py but with z = W1 x + b1:

    mean ‖d − W2 φ(z) − b2‖² + λ (tr(Cxx) / d) mean ‖W2 diag(φ′(z)) W1‖²

The ridge is, to first order, what noise of that variance on x would add to the error; where φ is the identity it is the
ridge of regression.py. For given W1 and b1 all is quadratic in W2 and b2, so that descent is over W1 and b1 alone
(variable projection, Golub and Pereyra 1973), by L-BFGS. It starts at the best linear adapter of the rank, which φ
contains nearly, as φ is nearly linear in small or in far inputs, and once more where φ bends. So it ends at a local
minimum, which is no worse than the linear adapter if φ can come close to that. ReLU without b1 cannot.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.torch_backend import ACTIVATIONS
from .regression import Moments, Shift, best_affine

#: Steps of L-BFGS from each start.
STEPS = 100
#: Standard deviations of z at the starts: where φ is nearly linear, and where it bends.
_SIZES = (1e-3, 0.3, 1.0)


def best_nonlinear(
    x: Tensor,
    d: Tensor,
    rank: int,
    ridge: float,
    activation: str,
    *,
    down_bias: bool = True,
    up_bias: bool = True,
    steps: int = STEPS,
) -> Shift:
    """The adapter of this rank and activation at the best minimum that was found.

    Args:
        x, d: (N, d) tokens and their shifts.
        ridge: λ, a share of the mean variance of x.
        down_bias, up_bias: whether it has b1 and b2.

    Raises:
        ValueError: see `best_affine`.
    """
    x, d = x.double(), d.double()
    moments = Moments()
    moments.add(x, d)
    linear = best_affine(moments, rank, ridge, up_bias)
    # Inputs of unit covariance: in the model's own, a few directions outweigh all others, and descent is slow.
    centre = x.mean(0) if down_bias else torch.zeros_like(x[0])
    shifted = x - centre
    second = shifted.T @ shifted / len(x)
    variance = ridge * second.trace() / len(second)
    added = torch.maximum(variance, 1e-12 * second.trace())
    root = torch.linalg.cholesky(second + added * torch.eye(len(second), dtype=x.dtype, device=x.device))
    inputs = torch.linalg.solve_triangular(root, shifted.T, upper=False).T
    wanted = d - d.mean(0) if up_bias else d
    problem = _Problem(inputs, wanted, root, variance, activation, up_bias)
    found: list[tuple[float, Tensor, Tensor]] = []
    for down, bias in _starts(linear.down @ root, inputs, activation, down_bias):
        found.append(problem.descend(down, bias, down_bias, steps))
    _, down, bias = min(found, key=lambda one: one[0])
    with torch.no_grad():
        _, up, mean = problem.best(down, bias)
    plain = torch.linalg.solve_triangular(root.T, down.T, upper=True).T  # of x in place of the inputs
    return Shift(
        plain,
        up,
        d.mean(0) - up @ mean if up_bias else None,
        bias - plain @ centre if down_bias else None,
        activation,
    )


def _starts(linear: Tensor, inputs: Tensor, activation: str, down_bias: bool) -> Sequence[tuple[Tensor, Tensor]]:
    """Values of W1 and b1 to start from: the linear adapter's W1 at several sizes."""
    sizes = (inputs @ linear.T).square().mean(0).sqrt()
    empty = sizes <= 1e-8 * sizes.max()  # more rows than the linear adapter has use for
    drawn = torch.randn(linear.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(linear.device)
    rows = torch.where(empty[:, None], drawn, linear)
    unit = rows / (inputs @ rows.T).square().mean(0).sqrt()[:, None]
    zero = unit.new_zeros(len(unit))
    if activation != "relu":
        return [(size * unit, zero) for size in _SIZES]
    if not down_bias:  # its size is of no matter
        return [(unit, zero), (-unit, zero)]
    z = inputs @ unit.T  # linear where no token is below 0, and bent at quarters of the tokens
    return [(unit, 1e-3 - z.amin(0)), *((unit, -z.quantile(share, dim=0)) for share in (0.25, 0.5, 0.75))]


class _Problem:
    """The objective, as a share of Σ‖d‖², by W1 and b1 of the inputs."""

    def __init__(
        self, inputs: Tensor, wanted: Tensor, root: Tensor, variance: Tensor, activation: str, centred: bool
    ) -> None:
        self.inputs, self.wanted, self.root, self.variance, self.centred = inputs, wanted, root, variance, centred
        self.phi = ACTIVATIONS[activation][0]
        self.whole = wanted.square().sum().clamp_min(torch.finfo(wanted.dtype).tiny)

    def best(self, down: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the objective with the best W2 for these, W2 (d, r), and the mean of φ (r,)."""
        with torch.enable_grad():  # φ′ is asked for without a gradient, too
            z = self.inputs @ down.T + bias
            z = z if z.requires_grad else z.requires_grad_()
            outputs = self.phi(z)
            (slopes,) = torch.autograd.grad(outputs.sum(), z, create_graph=True)
        mean = outputs.mean(0)
        outputs = outputs - mean if self.centred else outputs
        plain = torch.linalg.solve_triangular(self.root.T, down.T, upper=True)
        square = outputs.T @ outputs
        noise = self.variance * (plain.T @ plain) * (slopes.T @ slopes)
        square = square + noise + 1e-12 * square.trace() * torch.eye(len(square), dtype=z.dtype, device=z.device)
        lower = torch.linalg.cholesky(square)
        cross = self.wanted.T @ outputs
        half = torch.linalg.solve_triangular(lower, cross.T, upper=False)
        up = torch.linalg.solve_triangular(lower.T, half, upper=True).T
        return 1 - half.square().sum() / self.whole, up, mean

    def descend(self, down: Tensor, bias: Tensor, with_bias: bool, steps: int) -> tuple[float, Tensor, Tensor]:
        """Return the least objective that descent finds from here, and where."""
        places = [down.clone().requires_grad_(), bias.clone().requires_grad_(with_bias)]
        least = [float("inf")]
        best = [(down, bias)]
        optimizer = torch.optim.LBFGS(
            places if with_bias else places[:1],
            max_iter=steps,
            tolerance_grad=1e-9,
            tolerance_change=1e-12,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            try:
                value = self.best(*places)[0]
            except torch.linalg.LinAlgError:  # a step so far that outputs coincide
                return down.new_full((), 2.0)
            value.backward()
            if value.item() < least[0]:
                least[0], best[0] = value.item(), (places[0].detach().clone(), places[1].detach().clone())
            return value

        with torch.enable_grad():
            optimizer.step(closure)
        return least[0], *best[0]
