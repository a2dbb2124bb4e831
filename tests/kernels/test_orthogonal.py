"""Tests of the orthogonal projection, which removes the LoRA's column space from W2 for all layers at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fused_steer.kernels.aot import SHARED_MEMORY, record_projection
from fused_steer.kernels.orthogonal import column_space, project_gradient, project_out
from fused_steer.kernels.schedule import TARGETS
from torch import Tensor

LAYERS = 3


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def conditioned(hidden: int, k: int, condition: float) -> Tensor:
    """Draw B of every layer with singular values from 1 to 1/condition, mixed into all columns."""
    left = torch.linalg.qr(normal(LAYERS, hidden, k).double())[0]
    right = torch.linalg.qr(normal(LAYERS, k, k, seed=1).double())[0]
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), k, dtype=torch.float64)
    return ((left * values) @ right).float()


def truth(up: Tensor, writers: Tensor) -> Tensor:
    """Compute the projection by an SVD in float64."""
    wide = writers.double().cpu()
    u, s, _ = torch.linalg.svd(wide, full_matrices=False)
    v = u * (s > 3e-7 * s[:, :1]).unsqueeze(1)
    up = up.double().cpu()
    return up - v @ (v.transpose(1, 2) @ up)


def overlap(up: Tensor, writers: Tensor) -> float:
    """Compute the worst layer's ‖BᵀW2'‖ / (‖B‖ ‖W2'‖)."""
    up, writers = up.double().cpu(), writers.double().cpu()
    product = (writers.transpose(1, 2) @ up).flatten(1).norm(dim=1)
    return float((product / (writers.flatten(1).norm(dim=1) * up.flatten(1).norm(dim=1))).max())


@pytest.mark.parametrize(
    ("hidden", "k", "rank"), [(64, 8, 8), (100, 5, 3), (17, 1, 1), (33, 16, 4), (130, 3, 40), (96, 40, 2)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_orthogonal_nothing_is_left_along_the_writers(device, hidden, k, rank, dtype):
    up, writers = normal(LAYERS, hidden, rank, seed=2).to(device), normal(LAYERS, hidden, k, dtype=dtype).to(device)
    projected = project_out(up, writers)
    assert projected.dtype == torch.float32 and projected.is_contiguous()
    assert overlap(projected, writers) <= 1e-6
    torch.testing.assert_close(projected.cpu().double(), truth(up, writers), rtol=0, atol=3e-6)
    assert (projected - up).norm() > 0.05 * up.norm()


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_orthogonal_ill_conditioned_writers(device, condition):
    up, writers = normal(LAYERS, 96, 8, seed=2).to(device), conditioned(96, 8, condition).to(device)
    projected = project_out(up, writers)
    bound = 1e-5 * writers.norm() * up.norm()
    assert (writers.double().transpose(1, 2) @ projected.double()).norm() <= bound
    # Every direction is removed. Of the weakest one the float64 Gram matrix leaves eps · condition².
    atol = 1e-6 + torch.finfo(torch.float64).eps * condition**2
    torch.testing.assert_close(projected.cpu().double(), truth(up, writers), rtol=0, atol=4 * atol)


def test_orthogonal_columns_of_very_different_length_are_all_directions(device):
    scale = torch.tensor([1.0, 1e-3, 1e-6])
    up, writers = normal(LAYERS, 64, 4, seed=2).to(device), (normal(LAYERS, 64, 3) * scale).to(device)
    torch.testing.assert_close(project_out(up, writers), project_out(up, writers / scale.to(device)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_orthogonal_no_writer_no_projection(device, dtype):
    """B = 0, LoRA's initial state, leaves W2 unchanged bit for bit, −0 included. Each layer counts separately."""
    up = normal(LAYERS, 64, 4, seed=2).to(dtype)
    up[:, 0] = -0.0
    writers = normal(LAYERS, 64, 8)
    writers[1] = 0
    projected = project_out(up.to(device), writers.to(device)).cpu()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(projected[1].view(bits), up[1].view(bits))
    assert not torch.equal(projected[0], up[0])
    assert torch.equal(project_out(up.to(device), torch.zeros_like(writers).to(device)).cpu().view(bits), up.view(bits))


def test_orthogonal_rank_deficient_writers_have_the_space_of_their_independent_columns(device):
    independent = normal(LAYERS, 64, 3)
    mixed = torch.cat([independent, independent @ normal(LAYERS, 3, 4, seed=5), independent[:, :, :1]], 2)
    up = normal(LAYERS, 64, 4, seed=2).to(device)
    expected = project_out(up, independent.to(device))
    # Rounding errors of linear combinations must not count as a direction.
    torch.testing.assert_close(project_out(up, mixed.to(device)), expected, rtol=0, atol=1e-5)
    assert column_space(mixed.to(device)).norm(dim=1).round().sum(1).tolist() == [3.0] * LAYERS


def test_orthogonal_nearly_nothing_beside_something_is_no_direction(device):
    writers = normal(LAYERS, 64, 4)
    writers[:, :, 2] = 1e-12 * normal(LAYERS, 64, seed=9)
    up = normal(LAYERS, 64, 4, seed=2).to(device)
    without = writers.clone()
    without[:, :, 2] = 0
    torch.testing.assert_close(
        project_out(up, writers.to(device)), project_out(up, without.to(device)), rtol=0, atol=1e-6
    )


def test_orthogonal_the_gradient_is_projected_as_float64_autograd_says(device):
    up, writers, grad = (normal(LAYERS, 48, n, seed=n).to(device) for n in (4, 6, 4))
    up.requires_grad_()
    (actual,) = torch.autograd.grad(project_out(up, writers), up, grad)
    wide = up.detach().double().cpu().requires_grad_()
    (expected,) = torch.autograd.grad(truth(wide, writers), wide, grad.double().cpu())
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=0, atol=3e-6)
    assert overlap(actual, writers) <= 1e-6


def test_orthogonal_writers_get_no_gradient(device):
    up, writers = normal(1, 32, 2).to(device).requires_grad_(), normal(1, 32, 3).to(device).requires_grad_()
    assert torch.autograd.grad(project_out(up, writers).sum(), writers, allow_unused=True) == (None,)


def test_orthogonal_the_gradient_has_a_gradient(device):
    """The projection is linear, so that of the gradient is the projection too."""
    up, writers = normal(1, 32, 2).to(device).requires_grad_(), normal(1, 32, 3).to(device)
    out = project_out(up, writers)
    grad = normal(1, 32, 2, seed=1).to(device).requires_grad_()
    (first,) = torch.autograd.grad(out, up, grad, create_graph=True)
    above = normal(1, 32, 2, seed=2).to(device)
    (found,) = torch.autograd.grad(first, grad, above)
    assert torch.equal(found, project_out(above, writers))


def test_orthogonal_a_writer_that_is_not_finite_is_not_taken_for_none(device):
    up, writers = normal(2, 32, 2).to(device), normal(2, 32, 3).to(device)
    writers[0, 3, 1] = float("inf")
    projected = project_out(up, writers)
    assert projected[0].isnan().all() and projected[1].isfinite().all()


def test_orthogonal_same_inputs_same_bits_and_strided_input(device):
    up, writers = normal(LAYERS, 4, 64, seed=2).to(device).transpose(1, 2), normal(64, LAYERS, 6).to(device)
    writers = writers.transpose(0, 1)
    projected = project_out(up, writers)
    assert torch.equal(projected, project_out(up, writers))
    assert torch.equal(projected, project_out(up.contiguous(), writers.contiguous()))


def test_orthogonal_a_few_layers_at_a_time_are_all_layers(monkeypatch):
    monkeypatch.setenv("FUSED_STEER_BACKEND", "torch")
    up, writers = normal(5, 64, 4, seed=2), normal(5, 64, 6)
    whole = project_out(up, writers)
    monkeypatch.setattr("fused_steer.kernels.orthogonal._FEW_ELEMENTS", 2 * 64 * 10)  # two, two, one
    torch.testing.assert_close(project_out(up, writers), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("k", "condition"), [(8, 1.0), (8, 1e6), (40, 1e3)])
def test_orthogonal_the_basis_is_orthonormal_and_projects_alike(device, k, condition):
    writers, up = conditioned(96, k, condition).to(device), normal(LAYERS, 96, 4, seed=2).to(device)
    v = column_space(writers)
    assert v.shape == writers.shape and v.dtype == torch.float32
    eye = torch.eye(k).expand(LAYERS, k, k)
    torch.testing.assert_close((v.transpose(1, 2) @ v).cpu(), eye, rtol=0, atol=2e-6)
    atol = 1e-6 + torch.finfo(torch.float64).eps * condition**2
    torch.testing.assert_close(up - v @ (v.transpose(1, 2) @ up), project_out(up, writers), rtol=0, atol=4 * atol)
    assert not column_space(torch.zeros(2, 16, 3, device=device)).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_orthogonal_the_basis_of_narrow_writers_is_in_float32(device, dtype):
    writers = normal(LAYERS, 64, 5, dtype=dtype).to(device)
    v = column_space(writers)
    assert v.dtype == torch.float32
    torch.testing.assert_close(v, column_space(writers.float()), rtol=0, atol=0)


def test_orthogonal_in_float64(monkeypatch):
    monkeypatch.setenv("FUSED_STEER_BACKEND", "torch")
    up, writers = normal(LAYERS, 48, 4, seed=2, dtype=torch.float64), normal(LAYERS, 48, 6, dtype=torch.float64)
    v = torch.linalg.qr(writers).Q
    right = up - v @ (v.mT @ up)
    torch.testing.assert_close(project_out(up, writers), right, rtol=0, atol=1e-13)
    basis = column_space(writers)
    torch.testing.assert_close(basis @ basis.mT, v @ v.mT, rtol=0, atol=1e-13)
    up.requires_grad_()
    (gradient,) = torch.autograd.grad(project_gradient(up[0], basis[0]).square().sum() / 2, up)
    torch.testing.assert_close(gradient[0], right[0], rtol=0, atol=1e-13)
    # W2 of a float64 model is float32.
    narrow = project_out(up.detach().float(), writers)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(48, 4), (48,)], ids=["W2", "b2"])
def test_orthogonal_a_gradient_is_projected_where_the_value_satisfies_the_constraint(device, shape):
    """The gradient equals float64 autograd's through W2 -> (I − V Vᵀ) W2, at a W2 that satisfies the constraint."""
    writers, grad = normal(1, 48, 6).to(device), normal(*shape, seed=3).to(device)
    columns = normal(1, 48, 4, seed=2).to(device) if len(shape) == 2 else normal(1, 48, 1, seed=2).to(device)
    up = project_out(columns, writers)[0].view(shape).requires_grad_()
    out = project_gradient(up, column_space(writers)[0])
    assert torch.equal(out, up)
    (actual,) = torch.autograd.grad(out, up, grad)
    wide = up.detach().double().cpu().requires_grad_()
    (expected,) = torch.autograd.grad(truth(wide.view(1, 48, -1), writers).view(shape), wide, grad.double().cpu())
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=0, atol=3e-6)
    assert (actual - grad).norm() > 0.05 * grad.norm()


@pytest.mark.parametrize(
    ("up", "writers", "error", "message"),
    [
        ((64, 4), (64, 2), ValueError, r"up has shape \(64, 4\); expected \(layers, d, r\)"),
        ((0, 64, 4), (0, 64, 2), ValueError, r"up has shape \(0, 64, 4\); expected .*at least one layer"),
        ((2, 64, 4), (2, 32, 2), ValueError, r"writers has shape \(2, 32, 2\); expected \(2, 64, k\)"),
        ((2, 64, 4), (2, 64, 65), ValueError, "writers has 65 columns; expected 1 to 64"),
        ((2, 8, 4), (2, 8, 8), ValueError, "writers has 8 columns; expected 1 to 64, and fewer than d = 8"),
        ((2, 64, 257), (2, 64, 2), ValueError, "up has rank 257; expected 1 to 256"),
    ],
)
def test_orthogonal_shapes_that_do_not_fit_are_refused(up, writers, error, message):
    with pytest.raises(error, match=message) as caught:
        project_out(torch.zeros(up), torch.zeros(writers))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(64, 2), (0, 64, 2)])
def test_orthogonal_column_space_names_its_own_argument(shape):
    with pytest.raises(ValueError, match=r"writers has shape .*; expected \(layers, d, k\), at least one layer"):
        column_space(torch.zeros(shape))


def test_orthogonal_dtypes_and_devices_that_do_not_fit_are_refused(monkeypatch):
    up, writers = torch.zeros(1, 8, 2), torch.zeros(1, 8, 2)
    with pytest.raises(TypeError, match="writers has dtype torch.int64; expected float32, bfloat16, float16 or"):
        project_out(up, writers.long())
    monkeypatch.setenv("FUSED_STEER_BACKEND", "triton")
    for call in (lambda: project_out(up, writers.double()), lambda: column_space(writers.double())):
        with pytest.raises(TypeError, match="the triton backend got a float64 tensor; expected float32, bfloat16"):
            call()
    with pytest.raises(ValueError, match="writers is on meta; expected cpu, the device of up"):
        project_out(up, writers.to("meta"))


def test_orthogonal_every_target_compiles_it_without_spilling():
    cases = [
        [target, "bfloat16", 4096, rank, 0, {"layers": 32, "writers": k}]
        for target in TARGETS
        for k, rank in ((8, 8), (64, 8), (64, 256), (8, 0), (64, 0))
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    worker = [sys.executable, str(Path(__file__).parents[1] / "aot_worker.py"), str(os.cpu_count())]
    done = subprocess.run(worker, input=json.dumps(cases), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == sum(3 if case[3] else 6 for case in cases)
    bad = [
        row
        for row in rows
        if row["spills"] or row["local"] or row["local_accesses"] or row["shared"] > SHARED_MEMORY[row["target"]]
    ]
    assert not bad, "\n".join(map(str, bad))


def test_orthogonal_a_handful_of_launches_whatever_the_number_of_layers():
    for layers in (1, 32, 80):
        launches = record_projection(layers, 4096, 8, 8, torch.bfloat16, "sm_90")
        assert [launch.kernel.__name__ for launch in launches] == [
            f"orthogonal_{name}_kernel" for name in ("gram", "solve", "apply")
        ]
        basis = record_projection(layers, 4096, 0, 8, torch.bfloat16, "sm_90")
        assert len(basis) == 6
        assert all(launch.grid[0] == layers for launch in launches + basis)
    with pytest.raises(ValueError, match="target is 'sm_70'; expected one of sm_80"):
        record_projection(1, 64, 8, 8, torch.float32, "sm_70")
