"""The nonlinear fit: it finds adapters of its form, is a local minimum of what it says, and contains the linear one."""

import pytest
import torch
from torch import nn

from fused_steer.theory.nonlinear import best_nonlinear
from fused_steer.theory.regression import Moments, Shift, best_affine

D = 10
PHI = {"identity": nn.Identity(), "silu": nn.SiLU(), "gelu": nn.GELU(), "relu": nn.ReLU(), "tanh": nn.Tanh()}


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def inputs(count=400):
    return normal(count, D) @ (normal(D, D) * torch.logspace(1, -1, D, dtype=torch.float64)) + 3 * normal(D)


def drawn(x, rank, activation, bias=True):
    """Shifts of an adapter whose φ bends over the tokens."""
    down = normal(rank, D)
    down = 1.5 * down / (x @ down.T).std(0)[:, None]
    bias = normal(rank) - down @ x.mean(0) if bias else torch.zeros(rank, dtype=torch.float64)
    return PHI[activation](x @ down.T + bias) @ normal(rank, D)


def missed(shift, x, d):
    return float((d - shift(x)).square().sum() / (d - d.mean(0)).square().sum())


@pytest.mark.parametrize("activation", ["silu", "relu", "tanh"])
def test_nonlinear_finds_an_adapter_of_its_form(activation):
    x = inputs()
    d = drawn(x, 2, activation) + normal(D)
    moments = Moments()
    moments.add(x, d)
    linear = missed(best_affine(moments, 2, 1e-12, True), x, d)
    assert linear > 0.05
    # One of ReLU has kinks, and with them further minima.
    assert missed(best_nonlinear(x, d, 2, 1e-12, activation), x, d) < (0.5 * linear if activation == "relu" else 1e-3)
    assert moments.out_of_reach(2, True) < 1e-9 * float(d.square().sum())


def objective(shift, x, d, ridge):
    """As the docstring of nonlinear.py states it, with φ′ by differences."""
    z = x @ shift.down.T + shift.down_bias
    phi, step = PHI[shift.activation], 1e-6
    slopes = (phi(z + step) - phi(z - step)) / (2 * step)
    jacobians = shift.up @ (slopes[:, :, None] * shift.down)
    noise = ridge * torch.cov(x.T, correction=0).trace() / D * jacobians.square().sum((1, 2)).mean()
    return float((d - shift(x)).square().sum(1).mean() + noise)


@pytest.mark.parametrize("ridge", [1e-6, 0.03])
def test_nonlinear_no_small_change_is_better(ridge):
    x = inputs()
    d = drawn(x, 3, "tanh") + 0.3 * normal(400, D)
    best = best_nonlinear(x, d, 2, ridge, "silu", steps=1000)
    least = objective(best, x, d, ridge)
    values = (best.down, best.up, best.bias, best.down_bias)
    for _ in range(20):
        moved = [value + 1e-3 * value.abs().mean() * torch.randn_like(value) for value in values]
        assert objective(Shift(*moved, "silu"), x, d, ridge) > least * (1 - 1e-9)


def test_nonlinear_of_the_identity_is_the_regression():
    x, d = inputs(), normal(400, D)
    moments = Moments()
    moments.add(x, d)
    for ridge in (1e-6, 0.1):
        found, truth = best_nonlinear(x, d, 2, ridge, "identity"), best_affine(moments, 2, ridge, True)
        torch.testing.assert_close(found(x), truth(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", list(PHI))
def test_nonlinear_is_no_worse_than_linear(activation):
    """Shifts that are linear, or of noise."""
    x = inputs()
    for d in (x @ normal(D, D) / 10, normal(400, D), torch.zeros(400, D, dtype=torch.float64)):
        moments = Moments()
        moments.add(x, d)
        rest, least = ((d - best_nonlinear(x, d, 3, 1e-9, activation)(x)).square().sum(), moments.out_of_reach(3, True))
        assert rest <= 1.001 * (d - best_affine(moments, 3, 1e-9, True)(x)).square().sum() + 1e-9
        assert rest >= least - 1e-9


def test_nonlinear_without_biases():
    x = inputs()
    d = drawn(x, 2, "silu", bias=False)
    found = best_nonlinear(x, d, 2, 1e-12, "silu", down_bias=False, up_bias=False)
    assert found.bias is None and found.down_bias is None and missed(found, x, d) < 1e-3
