"""LoReFT's rotation is orthonormal whatever matrix it is made from, and its gradient is right."""

import pytest
import torch
from fused_steer.kernels.rotation import is_orthonormal, orthonormal, rotate, rotate_all
from models import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

SIZES = [(7, 3), (64, 1), (64, 64), (1000, 16)]


def matrix(d: int, r: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(d, r, generator=torch.Generator().manual_seed(d + r), dtype=torch.float64).to(dtype)


def defect(q: torch.Tensor) -> float:
    q = q.double()
    return float((q.t() @ q - torch.eye(q.shape[1])).abs().max())


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rotation_is_the_qr_factor_of_positive_diagonal(size):
    p = matrix(*size, dtype=torch.float64)
    q, u = torch.linalg.qr(p)
    expected = q * u.diagonal().sign()
    found = orthonormal(p)
    assert_close(found, expected)
    assert defect(orthonormal(p.float())) <= torch.finfo(torch.float32).eps


@pytest.mark.parametrize("factor", [1e-6, 0.99, 3.0, 1e6])
def test_rotation_scaling_changes_nothing(factor):
    """Weight decay multiplies the matrix; in pyreft it turns R into 0."""
    p = matrix(64, 8, torch.float64)
    assert_close(orthonormal(p * factor), orthonormal(p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rotation_an_orthonormal_matrix_stays_to_the_bit(dtype):
    p = orthonormal(matrix(64, 8)).to(dtype) if dtype != torch.float64 else orthonormal(matrix(64, 8, dtype))
    assert is_orthonormal(p)
    assert torch.equal(orthonormal(p), p.double() if dtype == torch.float64 else p.float())
    householder = torch.linalg.qr(matrix(64, 8))[0]  # as others orthogonalise
    assert torch.equal(orthonormal(householder), householder)
    assert not is_orthonormal(householder * 1.001)


def test_rotation_of_all_layers_under_autocast_to_another_narrow_dtype():
    pairs = [(matrix(4, 64, torch.float16), matrix(64, 4, torch.float16)) for _ in range(2)]
    expected = rotate_all(pairs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = rotate_all(pairs)
    for (down, up), (expected_down, expected_up) in zip(found, expected, strict=True):
        assert torch.equal(down, expected_down) and torch.equal(up, expected_up)


@pytest.mark.parametrize("size", SIZES[:3], ids=str)
def test_rotation_gradient(size):
    d, r = size
    source, p = matrix(r, d, torch.float64).requires_grad_(), matrix(d, r, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(rotate, (source, p), fast_mode=True)
    p = orthonormal(p.detach()).requires_grad_()  # used as it is; the gradient is that of the factor all the same
    grads = torch.randn(d, r, dtype=torch.float64)
    (found,) = torch.autograd.grad(rotate(source, p)[1], p, grads)
    q, u = torch.linalg.qr(p)
    (expected,) = torch.autograd.grad(q * u.diagonal().sign(), p, grads)
    assert_close(found, expected)


def test_rotation_the_gradient_leaves_scaling_alone():
    p = matrix(64, 8).requires_grad_()
    down, up = rotate(matrix(8, 64), p)
    (down * matrix(8, 64) + (up * matrix(64, 8)).t()).sum().backward()
    along = (p.grad.double() * p.detach().double()).sum() / (p.grad.double().norm() * p.detach().double().norm())
    assert abs(along) <= torch.finfo(torch.float32).eps


def test_rotation_of_dependent_columns_is_nan_and_not_a_wrong_one():
    p = matrix(64, 4)
    p[:, 3] = 0
    assert orthonormal(p).isnan().any() and not is_orthonormal(orthonormal(p))


def test_rotation_of_all_layers_at_once():
    pairs = [(matrix(8, 64) + i, matrix(64, 8) * (i + 1)) for i in range(3)]
    pairs[1] = (pairs[1][0], orthonormal(pairs[1][1]))
    for (source, p), (down, up) in zip(pairs, rotate_all(pairs), strict=True):
        assert_close(down, rotate(source, p)[0])
        assert_close(up, rotate(source, p)[1])
    assert torch.equal(rotate_all(pairs)[1][1], pairs[1][1])


def weighted(made: list[tuple[torch.Tensor, torch.Tensor]], used: list[tuple[bool, bool]]) -> torch.Tensor:
    """A loss of the W1 and W2 that are used, with other weights for each."""
    tensors = [t for pair, uses in zip(made, used, strict=True) for t, use in zip(pair, uses, strict=True) if use]
    return sum((t * torch.full_like(t, 1.0).cumsum(1).add(number).cos()).sum() for number, t in enumerate(tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("used", [[(True, True)] * 3, [(True, False), (False, False), (False, True)]], ids=str)
def test_rotation_gradients_of_all_layers_at_once(dtype, used):
    """They are those of each layer by itself, also where a layer's W1 or W2 is not used; then there is none."""
    pairs = [
        ((matrix(8, 64, dtype) + i).requires_grad_(), (matrix(64, 8, dtype) * (i + 1)).requires_grad_())
        for i in range(3)
    ]
    pairs[0][0].requires_grad_(False)
    leaves = [tensor for pair in pairs for tensor in pair if tensor.requires_grad]
    expected = torch.autograd.grad(weighted([rotate(*pair) for pair in pairs], used), leaves, allow_unused=True)
    for graph in (False, True):
        made = weighted(rotate_all(pairs), used)
        found = torch.autograd.grad(made, leaves, allow_unused=True, create_graph=graph)
        for one, other in zip(found, expected, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert one.dtype == other.dtype == dtype and (graph or one.is_contiguous())
                if other.any():
                    assert_close(one, other)
                else:
                    assert not one.any()  # W's, where W1 is not used


class Counted(TorchDispatchMode):
    """Counts operations, views among them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = ("detach", "unbind", "transpose", "aten.t.", "view", "alias", "expand", "unsqueeze")
        self.count += not any(view in str(func) for view in views)
        return func(*args, **(kwargs or {}))


def test_rotation_of_all_layers_takes_as_many_operations_as_of_two():
    counts = []
    for layers in (2, 7):
        pairs = [(matrix(8, 64).requires_grad_(), matrix(64, 8).requires_grad_()) for _ in range(layers)]
        with Counted() as counted:
            made = [tensor for pair in rotate_all(pairs) for tensor in pair]
        grads = [torch.ones_like(tensor) for tensor in made]
        with counted:
            torch.autograd.backward(made, grads)
        counts.append(counted.count)
    assert counts[0] == counts[1] < 40


def test_rotation_compiled_in_one_graph():
    p, source, weights = matrix(64, 8).requires_grad_(), matrix(8, 64).requires_grad_(), matrix(64, 8).cos()

    def loss(source: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        down, up = rotate(source, p)
        return (down * up.detach().t()).sum() + (up * weights).sum()

    expected = torch.autograd.grad(loss(source, p), (source, p))
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(source, p), (source, p))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
