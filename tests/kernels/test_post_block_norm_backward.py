"""Tests of the backward of post_block_norm that holds whole rows in registers, in one pass and in two."""

import os
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from fused_steer.kernels import ACTIVATIONS
from fused_steer.kernels.aot import Case, record_norm_passes
from fused_steer.kernels.schedule import TARGETS, RowsBackward, ceil_div, norm_backward_schedule
from norm_ops import (
    BARE,
    GEMMA,
    KINDS,
    LLAMA,
    Kind,
    assert_as_good_as_unfused,
    cancelling,
    draw_weight,
    fused,
    run,
    units,
)
from ops import make_draws, make_inputs, relative_error

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
_FORM = import_module("fused_steer.kernels.post_block_norm_backward")
_OP = import_module("fused_steer.kernels.post_block_norm")


@pytest.fixture(params=[True, False], ids=["one-pass", "two-passes"])
def form(request, device, monkeypatch):
    """Let small calls take this form, in several blocks of columns. Yields the calls that took it."""
    if os.environ["FUSED_STEER_BACKEND"] == "torch":
        pytest.skip("only the kernels have forms")
    used = []

    def schedule(tokens, hidden, rank, itemsize, of, needs, one_pass=True):
        chosen = request.param and one_pass
        block_n = 2 if chosen else 1
        tiles = ceil_div(tokens, block_n)
        used.append(chosen)
        return RowsBackward(chosen, block_n, 128, ceil_div(hidden, 128), min(3, tiles) if chosen else tiles, 1)

    monkeypatch.setattr(_FORM, "norm_backward_schedule", schedule)
    for plans in ("_forward_plans", "_backward_plans"):
        monkeypatch.setattr(_OP, plans, {})
    yield used
    assert used, "no call took the form"


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(("tokens", "hidden", "rank", "dtype"), [
    (9, 272, 8, BF16), (17, 64, 3, F16), (1, 99, 4, BF16), (12, 264, 1, F32), (7, 128, 5, F32),
], ids=str)  # fmt: skip
def test_backward_by_rows_is_as_exact_as_hook_and_norm(device, tokens, hidden, rank, dtype):
    options = {"rank": rank, "dtype": dtype, "device": device, "scale": False, "gain": False}
    # Many draws, because the gradient of b1 has only `rank` numbers.
    assert_as_good_as_unfused(make_draws(max(4, ceil_div(24, tokens)), tokens, hidden, **options), frozen=True)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_backward_by_rows_every_kind_of_norm(device, kind):
    options = {"rank": 3, "dtype": BF16, "device": device, "scale": False, "gain": False}
    assert_as_good_as_unfused(make_draws(6, 9, 80, **options), kind, frozen=True)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_by_rows_every_activation(device, activation):
    cases = make_draws(4, 9, 32, rank=5, dtype=F32, device=device, gain=False, scale=False)
    assert_as_good_as_unfused(cases, GEMMA, activation, frozen=True)


@pytest.mark.parametrize("option", ["branch", "biases", "basis"])
def test_backward_by_rows_each_operand_may_be_absent(device, option, form):
    options = {"scale": False, "gain": False, option: 0 if option == "basis" else False}
    assert_as_good_as_unfused(make_draws(8, 9, 80, rank=4, device=device, **options), frozen=True)


def test_backward_by_rows_w1_on_the_branch_takes_two_passes(device, form):
    options = {"rank": 4, "device": device, "scale": False, "gain": False, "reads": "branch"}
    assert_as_good_as_unfused(make_draws(4, 9, 80, **options), frozen=True)
    assert not any(form)


@pytest.mark.usefixtures("form")
def test_backward_by_rows_strided_and_expanded_inputs(device):
    cases = []
    for inputs in make_draws(3, 2, 9, 32, rank=4, device=device, scale=False, gain=False):
        cases.append(replace(inputs, residual=torch.randn(9, 2, 32, device=device).transpose(0, 1)))
    assert_as_good_as_unfused(cases, frozen=True)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_backward_by_rows_rows_that_nearly_cancel(device, dtype):
    assert_as_good_as_unfused([cancelling(24, dtype, device, seed) for seed in range(8)], BARE, "identity", frozen=True)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("name", ["residual", "branch", "down", "up", "down_bias", "up_bias"])
def test_backward_by_rows_each_gradient_alone(device, name):
    inputs = make_inputs(9, 80, rank=4, device=device, gain=False, scale=False)
    full = run(fused, inputs, LLAMA, "silu", 0, frozen=True)
    leaf = inputs.tensors()[name].clone().requires_grad_()
    outputs = fused(replace(inputs, **{name: leaf}), draw_weight(inputs, LLAMA), LLAMA)
    generator = torch.Generator().manual_seed(99)
    grads = [torch.randn(inputs.residual.shape, generator=generator).to(device) for _ in outputs]
    (gradient,) = torch.autograd.grad(outputs, leaf, grads)
    assert relative_error(gradient, full[name].double()) < 1e-5


@pytest.mark.usefixtures("form")
def test_backward_by_rows_only_the_normalised_output_is_used(device):
    inputs = make_inputs(9, 80, rank=4, device=device, gain=False, scale=False)
    found = []
    for out in (None, torch.zeros_like(inputs.residual)):
        leaves = inputs.leaves()
        outputs = fused(leaves, draw_weight(inputs, LLAMA), LLAMA)
        grads = [outputs[1].detach()] if out is None else [out, outputs[1].detach()]
        names, values = zip(*replace(leaves, basis=None).tensors().items(), strict=True)
        found.append(dict(zip(names, torch.autograd.grad(outputs[-len(grads) :], values, grads), strict=True)))
    assert all(relative_error(found[0][name], found[1][name].double()) < 1e-6 for name in found[0])


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("scale", [2.0, torch.tensor(2.0)], ids=["number", "tensor"])
def test_backward_by_rows_a_gain_and_a_scale_without_gradients(device, scale):
    inputs = make_inputs(9, 80, rank=4, device=device, basis=0)
    scale = scale.to(device) if isinstance(scale, torch.Tensor) else scale
    found = []
    for whole in (inputs.gain, None):  # the strength once in the gain, and once in W2 and b2 of each row alone
        gradients = {name: 0 for name in ("residual", "down", "up", "up_bias")}
        rows = [slice(None)] if whole is not None else [slice(row, row + 1) for row in range(9)]
        for part in rows:
            strength = 1.0 if whole is not None else float(inputs.gain[part])
            case = replace(
                inputs, residual=inputs.residual[part].clone(), branch=inputs.branch[part].clone(), scale=scale,
                gain=inputs.gain if whole is not None else None, up=inputs.up * strength,
                up_bias=inputs.up_bias * strength,
            )  # fmt: skip
            leaves = {name: getattr(case, name).requires_grad_() for name in gradients}
            outputs = fused(replace(case, **leaves), draw_weight(inputs, LLAMA), LLAMA)
            for name, value in zip(
                leaves, torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(o) for o in outputs]),
                strict=True,
            ):  # fmt: skip
                if name == "residual":
                    value = torch.cat([torch.zeros_like(inputs.residual[: part.start or 0]), value])
                    value = torch.nn.functional.pad(value, (0, 0, 0, 9 - len(value)))
                gradients[name] = gradients[name] + value * (strength if name in ("up", "up_bias") else 1)
        found.append(gradients)
    for name, value in found[0].items():
        assert relative_error(value, found[1][name].double()) < 1e-5, name


@pytest.mark.usefixtures("form")
def test_backward_by_rows_zero_strength_hides_weights_that_are_not_finite(device):
    inputs = make_inputs(5, 64, rank=3, device=device, basis=0, scale=False)
    inputs.gain[2:] = 0
    inputs.up[5], inputs.down[1, 3], inputs.up_bias[7] = float("nan"), float("inf"), -float("inf")
    residual = inputs.residual.clone().requires_grad_()
    out, normed = fused(replace(inputs, residual=residual), None, Kind(weight=False))
    (gradient,) = torch.autograd.grad((out, normed), residual, (torch.ones_like(out), torch.ones_like(out)))
    assert gradient[2:].isfinite().all() and not gradient[:2].isfinite().all()


@pytest.mark.usefixtures("form")
def test_backward_by_rows_repeated_calls_are_planned_and_give_the_same_bits(device, monkeypatch):
    inputs = make_inputs(9, 48, rank=3, dtype=BF16, device=device, basis=0, gain=False, scale=False)
    first = run(fused, inputs, LLAMA, "silu", 0, frozen=True)

    def refuse(*args, **kwargs):
        raise AssertionError("a launcher was called")

    for module in ("triton_backend", "post_block_norm", "norm", "post_block_norm_backward"):
        monkeypatch.setattr(import_module(f"fused_steer.kernels.{module}"), "launch", refuse)
    second = run(fused, inputs, LLAMA, "silu", 0, frozen=True)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.parametrize(("hidden", "rank", "dtype"), [
    (2048, 2, BF16), (4096, 4, BF16), (8192, 1, BF16), (4096, 8, BF16), (2560, 2, F16), (2048, 4, F32),
], ids=str)  # fmt: skip
def test_backward_by_rows_the_layouts_of_a_gpu(hidden, rank, dtype, monkeypatch):
    monkeypatch.setattr(_OP, "_backward_plans", {})
    options = {"rank": rank, "dtype": dtype, "device": "cuda", "scale": False, "gain": False}
    assert_as_good_as_unfused(make_draws(1, 4099, hidden, **options), frozen=True)


# ---------------------------------------------------------------------------------------------------- choice of a form

BOTH = (True, True, False)  # the gradients of W1 and W2


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_backward_by_rows_the_choice(target):
    device = TARGETS[target]

    def held(tokens, hidden, rank, itemsize=2, needs=BOTH):
        found = norm_backward_schedule(tokens, hidden, rank, itemsize, device, needs)
        return None if found is None else found.held

    assert all(held(16384, hidden, 1) for hidden in (1024, 2048, 2560, 4096, 8192))
    assert all(held(16384, hidden, 4) for hidden in (1024, 2048, 4096)) and held(16384, 4096, 2, itemsize=4)
    assert held(16384, 8192, 2, needs=(True, False, False))
    # Too high a rank, too many sums, or too many columns beyond d in a block: in two passes.
    assert held(16384, 2048, 5) is held(16384, 8192, 2) is held(16384, 2560, 4) is False
    # Ranks over 8, few tokens, very wide rows: as without the norm.
    assert held(16384, 4096, 16) is held(2048, 4096, 4) is held(16384, 16384, 1) is None
    assert norm_backward_schedule(16384, 4096, 4, 2, TARGETS["gfx942"], BOTH) is None


def test_backward_by_rows_a_gradient_of_a_strength_or_of_the_norm_takes_the_general_form():
    case = Case(16384, 4096, 4, packed=True)
    assert units(record_norm_passes(case, "sm_90", weight_gradient=True)["backward"]) == 8
    assert units(record_norm_passes(replace(case, gain=True), "sm_90")["backward"]) == 8
    assert units(record_norm_passes(case, "sm_90")["backward"]) == 4
