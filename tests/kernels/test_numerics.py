"""Tests of the rounding of matrix products' operands, and of the products' precision."""

import pytest
import torch
import triton
import triton.language as tl
from fused_steer.kernels.numerics import dot, dot_precision, operand, operand_dtype, packed_operand
from fused_steer.kernels.schedule import padded_rank
from ops import pack_reference, relative_error, round_tf32

BLOCK = 32


@triton.jit
def operand_kernel(p_x, p_out, DOT: tl.constexpr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(p_out + offsets, operand(tl.load(p_x + offsets), DOT).to(tl.float32))


@triton.jit
def packed_kernel(p_x, p_out, DOT: tl.constexpr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(p_out + offsets, packed_operand(tl.load(p_x + offsets), DOT).to(tl.float32))


@triton.jit
def product_kernel(p_left, p_right, p_out, DOT: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    left, right = operand(tl.load(p_left + offsets), DOT), operand(tl.load(p_right + offsets), DOT)
    tl.store(p_out + offsets, dot(left, right, tl.zeros([BLOCK, BLOCK], tl.float32), DOT))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request) -> torch.device:
    """Return the device on which kernels run: the GPU, or the CPU in the interpreter."""
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels are compiled here, not interpreted")
    return torch.device(request.param)


def some_floats(place: torch.device) -> torch.Tensor:
    """Draw numbers of every magnitude, with halfway cases, zeros, infinities and several NaN bit patterns."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, generator=generator) * 10.0 ** torch.randint(-30, 30, (1024,), generator=generator)
    x[:4] = torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11, -1 - 2.0**-11, 1 + 2.0**-11 - 2.0**-20])
    x[4:9] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])
    x[9:11] = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    return x.to(place)


def through(kernel, x: torch.Tensor, policy: str) -> torch.Tensor:
    out = torch.full_like(x, float("nan"), dtype=torch.float32)
    kernel[(1,)](x, out, DOT=policy, SIZE=x.numel())
    return out


def test_numerics_operand_tf32_is_the_nearest_number_of_11_bits(place):
    x = some_floats(place)
    found = through(operand_kernel, x, "tf32")
    fraction, exponent = torch.frexp(x.double())
    nearest = torch.ldexp(torch.copysign((fraction.abs() * 2**11 + 0.5).floor(), fraction) / 2**11, exponent)
    finite = x.isfinite()
    # The low bits are arbitrary on a GPU, because the product ignores them.
    shown = (found.view(torch.int32) & ~0x1FFF).view(torch.float32)
    assert torch.equal(shown.double()[finite], nearest[finite])
    assert torch.equal(found.isnan(), x.isnan()) and torch.equal(shown[x.isinf()], x[x.isinf()])
    assert torch.equal(shown[finite], round_tf32(x)[finite]), "the tests' own rounding agrees"


def test_numerics_operand_bf16_is_rounded_as_pytorch_rounds(place):
    x = some_floats(place)
    assert torch.equal(through(operand_kernel, x, "bf16").nan_to_num(7.0), x.bfloat16().float().nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_numerics_packed_weights_are_the_operands_that_a_kernel_would_make(place, dtype):
    policy = dot_precision(dtype, "cuda", 5)
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(place)
    packed = pack_reference(weight, weight.t(), dtype, "cuda")
    for found in packed:
        assert found.shape == (padded_rank(5), 64) and found.is_contiguous() and not found[5:].any()
        assert found.dtype == operand_dtype(dtype, "cuda", 5)
        expected = through(operand_kernel, torch.nn.functional.pad(weight, (0, 0, 0, 11)).flatten(), policy)
        assert torch.equal(through(packed_kernel, found.flatten(), policy), expected)


def errors(place: torch.device, policy: str) -> tuple[float, float]:
    """Multiply positive matrices by `policy`; return the relative error and the mean signed relative error."""
    generator = torch.Generator().manual_seed(2)
    left, right = (torch.rand(BLOCK, BLOCK, generator=generator).to(place) + 0.5 for _ in range(2))
    out = torch.full_like(left, float("nan"))
    product_kernel[(1,)](left, right, out, DOT=policy, BLOCK=BLOCK)
    truth = left.double() @ right.double()
    return relative_error(out, truth), ((out.double() - truth) / truth).mean().item()


def test_numerics_products_lose_what_their_operands_lose_and_no_more(place):
    # Each of the 32 products has operands with a relative error of at most 2^-11. Truncation would be biased.
    error, bias = errors(place, "tf32")
    assert 0 < error < 2.0**-11 and abs(bias) < 2.0**-14
    exact, _ = errors(place, "ieee")
    split, bias = errors(place, "tf32x3")
    assert split < 2 * exact + 2.0**-23 and abs(bias) < 2.0**-23
