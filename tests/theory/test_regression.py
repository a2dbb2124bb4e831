"""The closed form: no other map of its rank is better, it recovers a map that is there, and batches do not matter."""

import pytest
import torch

from fused_steer.theory.regression import Moments, Shift, best_affine

D, N = 12, 200


def draw(seed=0, tokens=N, rank=D, noise=0.3):
    """Tokens with a large mean and uneven variances, and shifts that depend on them by a map of `rank`, with noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    x = normal(tokens, D) @ normal(D, D) + 20 * normal(D)
    truth = Shift(normal(rank, D), normal(D, rank), normal(D))
    return x, truth(x) + noise * normal(tokens, D), truth


def moments_of(x, d, size=None):
    moments = Moments()
    for start in range(0, len(x), size or len(x)):
        moments.add(x[start : start + (size or len(x))], d[start : start + (size or len(x))])
    return moments


def objective(affine, x, d, ridge):
    """What the module's docstring says is minimised, times the tokens, written out."""
    centred = x - x.mean(0) if affine.bias is not None else x
    weight = ridge * centred.square().sum() / D
    return (d - affine(x)).square().sum() + weight * (affine.up @ affine.down).square().sum()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 0.05])
@pytest.mark.parametrize("rank", [1, 3, D])
def test_best_affine_no_perturbation_is_better(rank, ridge, bias):
    for seed in range(3):
        x, d, _ = draw(seed)
        best = best_affine(moments_of(x, d), rank, ridge, bias)
        least = objective(best, x, d, ridge)
        generator = torch.Generator().manual_seed(seed)
        for size in (1e-3, 1e-1):
            for _ in range(20):
                moved = [
                    t + size * t.norm() / t.numel() ** 0.5 * torch.randn(t.shape, dtype=t.dtype, generator=generator)
                    for t in (best.down, best.up, *([best.bias] if bias else []))
                ]
                assert objective(Shift(moved[0], moved[1], moved[2] if bias else None), x, d, ridge) > least


@pytest.mark.parametrize("bias", [True, False])
def test_best_affine_training_gets_no_lower(bias):
    *_, truth = draw()
    x = torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))  # as Adam likes it
    d = truth(x) + 1
    best = best_affine(moments_of(x, d), 2, 0.0, bias)
    torch.manual_seed(0)
    down, up, b = (torch.randn(*s, dtype=torch.float64).requires_grad_() for s in ((2, D), (D, 2), (D,)))
    optimizer = torch.optim.Adam([down, up, b], 0.03)
    for _ in range(1000):
        loss = (d - Shift(down, up, b if bias else None)(x)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    least = objective(best, x, d, 0.0)
    assert least <= loss < 1.05 * least  # trained to near the optimum, not beyond


def test_best_affine_recovers_a_map_of_its_rank():
    x, d, truth = draw(rank=3, noise=0.0)
    best = best_affine(moments_of(x, d), 3, 0.0, True)
    assert torch.allclose(best.up @ best.down, truth.up @ truth.down, rtol=1e-8, atol=1e-10)
    assert torch.allclose(best.bias, truth.bias, rtol=1e-8, atol=1e-8)
    assert torch.allclose(best.up.T @ best.up, torch.eye(3, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_moments_of_batches_are_those_of_one(size):
    x, d, _ = draw()
    whole, parts = moments_of(x, d), moments_of(x, d, size)
    assert parts.tokens == whole.tokens
    for name in ("mean_x", "mean_d", "xx", "xd"):
        assert torch.allclose(getattr(parts, name), getattr(whole, name), rtol=1e-11, atol=1e-9), name
    one, other = best_affine(whole, 3, 0.01, True), best_affine(parts, 3, 0.01, True)
    assert torch.allclose(one.up @ one.down, other.up @ other.down, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("rank", "tokens", "ridge", "message"),
    [
        (-1, N, 0.0, "rank is -1; expected 0 to 12"),
        (D + 1, N, 0.0, "rank is 13; expected 0 to 12"),
        (4, 5, 0.1, "5 tokens to fit on; expected more than 5 for rank 4"),
        (2, 6, 0.0, "span less than the 12 dimensions"),
    ],
)
def test_best_affine_refusals(rank, tokens, ridge, message):
    x, d, _ = draw(tokens=tokens)
    with pytest.raises(ValueError, match=message):
        best_affine(moments_of(x, d), rank, ridge, True)
