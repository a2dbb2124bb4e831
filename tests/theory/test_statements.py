"""The theorem and the propositions: both sides equal in float64, and not where a condition is broken."""

import pytest
import torch
from fused_steer.kernels.post_block import project
from torch.nn.functional import silu

from fused_steer.theory.regression import Moments, best_affine
from fused_steer.theory.statements import (
    MATRICES,
    as_post_block,
    beyond_the_mlp,
    block,
    equivalent_shift,
    interference,
    mlp_shift,
    random_block,
    weight_update,
)

D, INNER, HEADS, TOKENS = 16, 24, 4, 10


def setting(seed=0):
    """A block, updates of all its matrices, and a stream."""
    generator = torch.Generator().manual_seed(seed)
    weights = random_block(D, INNER, generator)
    updates = {name: 0.3 * random_block(D, INNER, generator)[name] for name in MATRICES}
    return weights, updates, 3 * torch.randn(TOKENS, D, generator=generator, dtype=torch.float64)


def error(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("names", [*((name,) for name in MATRICES), MATRICES])
def test_theorem_both_sides_are_equal(names):
    for seed in range(3):
        weights, updates, x = setting(seed)
        some = {name: updates[name] for name in names}
        shift = equivalent_shift(weights, some, x, HEADS)
        assert error(shift.post_block, weight_update(weights, some, x, HEADS)) < 1e-10


def test_theorem_the_shift_replaces_small_updates_to_first_order():
    """Halving the updates quarters the difference between the updated block and the steered one."""
    weights, updates, x = setting()
    shift = equivalent_shift(weights, updates, x, HEADS).post_block
    differences = []
    for size in (1e-3, 5e-4):
        updated = {name: value + size * updates.get(name, 0) for name, value in weights.items()}
        steered = block(weights, x, HEADS, {"post_block": size * shift})
        differences.append(float((block(updated, x, HEADS) - steered).norm()))
    assert differences[0] / differences[1] == pytest.approx(4, rel=0.02)


def test_theorem_sites_and_what_they_miss():
    weights, updates, x = setting()
    whole = weight_update(weights, updates, x, HEADS)
    shift = equivalent_shift(weights, updates, x, HEADS)
    attention = {name: updates[name] for name in "qkvo"}
    mlp = {name: updates[name] for name in ("gate", "up", "down")}

    def derivative(site, value):
        """Of the block's output, along a shift at a site."""
        return torch.func.jvp(lambda s: block(weights, x, HEADS, {site: s}), (torch.zeros_like(x),), (value,))[1]

    assert error(derivative("post_block", shift.post_block), whole) < 1e-10
    assert error(derivative("post_attention", shift.attention), weight_update(weights, attention, x, HEADS)) < 1e-10
    assert error(derivative("post_mlp", shift.mlp), weight_update(weights, mlp, x, HEADS)) < 1e-10
    # The skip connection stays as it was: the attention's own shift is missed, and it is no small part.
    missed = whole - derivative("post_mlp", shift.post_mlp)
    assert error(missed, shift.attention) < 1e-10 and shift.attention.norm() > 0.1 * whole.norm()


def test_theorem_before_the_mlp_only_its_columns_are_reached():
    weights, updates, x = setting()
    generator = torch.Generator().manual_seed(9)
    low = torch.randn(D, 5, generator=generator, dtype=torch.float64)
    weights = {**weights, "down": low @ low.T @ weights["down"]}  # of rank 5
    n = torch.randn(TOKENS, D, generator=generator, dtype=torch.float64)
    g, u = n @ weights["gate"].T, n @ weights["up"].T
    wanted = (silu(g) * u) @ updates["down"].T  # ΔW_d m
    beyond = beyond_the_mlp(weights, wanted)
    assert beyond.norm() > 0.1 * wanted.norm()
    for row in range(TOKENS):  # the best shift of this token's input, found by least squares
        a = torch.stack(
            [mlp_shift(weights, n[row : row + 1], e[None])[0] for e in torch.eye(D, dtype=torch.float64)], 1
        )
        best = a @ torch.linalg.lstsq(a, wanted[row, :, None], driver="gelsd").solution[:, 0]
        assert error(best, wanted[row] - beyond[row]) < 1e-6
    # With W_g and W_u, a shift of the input that gives W_g Δn = ΔW_g n and W_u Δn = ΔW_u n would do: same change.
    step = torch.randn(D, D, generator=generator, dtype=torch.float64)
    same = {"gate": weights["gate"] @ step, "up": weights["up"] @ step}
    inner = equivalent_shift(weights, same, x, HEADS)
    o = block({**weights, "down": torch.zeros_like(weights["down"])}, x, HEADS)
    read = weights["norm2"] * o * (o.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    assert error(mlp_shift(weights, read, read @ step.T), inner.mlp) < 1e-10


def drawer():
    """Draws random tensors of a shape."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def fitted_share(x, d, rank):
    moments = Moments()
    moments.add(x, d)
    rest = d - best_affine(moments, rank, 1e-9, True)(x)
    return 1 - float(rest.square().sum() / d.square().sum())


def test_proposition_a_silent_mlp_leaves_post_mlp_a_fixed_vector():
    """W_d = 0: an adapter that reads the MLP's output is a constant; one after the block still reads the stream."""
    generator = torch.Generator().manual_seed(0)
    weights = random_block(D, INNER, generator) | {"down": torch.zeros(D, INNER, dtype=torch.float64)}
    x = torch.randn(60, D, generator=generator, dtype=torch.float64)
    out = block(weights, x, HEADS)
    y = torch.zeros_like(out)  # the MLP's output
    down, up = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((2, D), (D, 2)))
    d = out @ down.T @ up.T
    constant = float(d.mean(0).square().sum() * len(d) / d.square().sum())
    with pytest.raises(ValueError, match="span less than"):
        fitted_share(y, d, 2)  # nothing to read at all
    assert constant < 0.5  # the best that a fixed vector does
    assert fitted_share(out, d, 2) > 1 - 1e-6


def test_proposition_post_block_does_what_post_mlp_does():
    normal = drawer()
    skip, branch = normal(D, 9), normal(D, 6)
    o, y = normal(50, 9) @ skip.T, normal(50, 6) @ branch.T
    down, up = normal(3, D), normal(D, 3)
    ours = as_post_block(down, up, skip, branch)
    assert error((o + y) @ ours[0].T @ ours[1].T, y @ down.T @ up.T) < 1e-10
    assert torch.linalg.matrix_rank(ours[1] @ ours[0]) <= 3
    # Where the spans meet, no post-block adapter of any rank does it.
    y = y + normal(50, 2) @ skip[:, :2].T
    assert fitted_share(o + y, y @ down.T @ up.T, D) < 0.999
    with pytest.raises(ValueError, match="meet; expected them to have 0 alone in common"):
        as_post_block(down, up, skip, torch.cat([branch, skip[:, :2]], 1))


def test_proposition_orthogonal_steering_and_lora_do_not_interfere():
    normal = drawer()
    x, m = normal(40, D), normal(40, INNER)
    a, b = normal(3, INNER), normal(D, 3)  # LoRA on the MLP's output projection
    down, up = normal(4, D), normal(D, 4)
    lora = m @ a.T @ b.T
    free = x @ down.T @ up.T
    kept = x @ down.T @ project(up, torch.linalg.qr(b).Q).T
    for shift, apart in ((free, False), (kept, True)):
        inside, products = interference(shift, lora, b)
        assert (float(inside.norm()) < 1e-10 * float(shift.norm())) == apart
        assert (float(products.abs().max()) < 1e-10 * float(shift.norm() * lora.norm())) == apart
        joint = shift + lora
        lengths = shift.square().sum(1) + lora.square().sum(1)
        assert torch.allclose(joint.square().sum(1), lengths, rtol=1e-10) == apart
        assert torch.allclose(interference(joint, lora, b)[0], lora, rtol=1e-9, atol=1e-9) == apart
