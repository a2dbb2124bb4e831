"""Tests of the op on each backend: outputs and gradients against the truth in float64, and its other guarantees."""

import itertools
import math
import os
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from fused_steer.kernels import ACTIVATIONS, triton_backend
from fused_steer.kernels.contract import READS, Needs, Operands
from fused_steer.kernels.launch import noted, recorded
from fused_steer.kernels.schedule import (
    RESIDENT_RANK,
    TARGETS,
    describe_device,
    forward_schedule,
    forward_splits,
)
from fused_steer.kernels.torch_backend import backward, forward
from fused_steer.kernels.triton_backend import resident_layout
from ops import Inputs, definition, make_draws, make_inputs, pack_reference, relative_error
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from fused_steer import post_block

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def fused(inputs: Inputs, activation: str = "silu") -> Tensor:
    return post_block(
        inputs.residual,
        inputs.branch,
        inputs.down,
        inputs.up,
        down_bias=inputs.down_bias,
        up_bias=inputs.up_bias,
        activation=activation,
        scale=inputs.scale,
        gain=inputs.gain,
        basis=inputs.basis,
        reads=inputs.reads,
    )


def run(function, inputs: Inputs, activation: str, grad: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Compute the output and all gradients of `function`."""
    leaves = inputs.leaves(dtype)
    differentiable = replace(leaves, basis=None).tensors()
    out = function(leaves, activation)
    gradients = torch.autograd.grad(out, list(differentiable.values()), grad.to(out.dtype))
    return {"out": out.detach(), **dict(zip(differentiable, gradients, strict=True))}


def assert_as_good_as_the_hook(cases: list[Inputs], activation: str = "silu", of_down: float = 1.0) -> None:
    """Assert that each result's error over all cases is at most twice the unfused op's in the same dtype, plus 1e-6.

    For W1's gradient the bound is `of_down` times as large.
    """
    ours, hooks, truths = [], [], []
    for seed, inputs in enumerate(cases):
        dtype = inputs.residual.dtype
        grad = torch.randn(inputs.residual.shape, generator=torch.Generator().manual_seed(seed + 99))
        grad = grad.to(inputs.residual.device, dtype)
        ours.append(run(fused, inputs, activation, grad))
        hooks.append(run(definition, inputs, activation, grad, dtype))
        truths.append(run(definition, inputs, activation, grad, F64))
    for name in ours[0]:
        value, hook, truth = (
            torch.cat([result[name].double().flatten() for result in results]) for results in (ours, hooks, truths)
        )
        error, bound = relative_error(value, truth), 2 * relative_error(hook, truth) + 1e-6
        bound *= of_down if name == "down" else 1.0
        assert error <= bound, f"{name}: error {error:.2e}, bound {bound:.2e}"


# Awkward shapes first: one token, odd counts, d not divisible by a block, ranks that are no power of 2.
SHAPES = [
    (1, 272, 8),
    (17, 400, 4),
    (1000, 64, 16),
    (3, 264, 1),
    (5, 1152, 12),
    (18, 1536, 64),
    (40, 144, 0),
    (33, 99, 256),
    (20, 16, 3),
    (40, 288, 128),
    WALKED_TILES := (130, 1280, 9),
]


#: All shapes in float32 and bfloat16. In float16 every other one, because the interpreter is slow.
CASES = [(*shape, dtype) for shape in SHAPES for dtype in (F32, BF16, F16) if dtype != F16 or shape in SHAPES[::2]]


@pytest.mark.parametrize(("tokens", "hidden", "rank", "dtype"), CASES, ids=str)
def test_post_block_is_as_exact_as_the_hook(device, tokens, hidden, rank, dtype):
    fewest = min(tokens, rank or tokens)  # dL/dg has one number per token, dL/db1 one per rank
    options = {"rank": rank, "dtype": dtype, "device": device, "scale": False}
    assert_as_good_as_the_hook(make_draws(-(-8 // fewest), tokens, hidden, **options))


#: What differs where W1 is applied to branch: the first pass of the forward in one kernel, the first kernel of the
#: forward in two, and W1's gradient, in one pass over the columns or in two.
BRANCH_SHAPES = [(1, 272, 8), (33, 99, 128), (130, 128, 9), (66, 64, 64)]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("tokens", "hidden", "rank"), BRANCH_SHAPES)
def test_post_block_reading_the_branch_is_as_exact_as_the_hook(device, tokens, hidden, rank, dtype):
    options = {"rank": rank, "dtype": dtype, "device": device, "scale": False, "reads": "branch"}
    assert_as_good_as_the_hook(make_draws(-(-8 // min(tokens, rank)), tokens, hidden, **options))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_post_block_the_shapes_reach_every_form_of_the_forward(dtype):
    cpu = describe_device(torch.device("cpu"))
    split = [forward_splits(*shape, dtype.itemsize, cpu) for shape in SHAPES if shape[2] > 8]
    assert None in split and any(found and found[0].splits > 1 and found[1].programs > 1 for found in split)
    rows = [resident_layout(*shape, dtype, cpu) for shape in SHAPES]
    assert [found is not None for found in rows] == [0 < rank <= 8 for _, _, rank in SHAPES]
    ragged = [found for found, (_, d, _) in zip(rows, SHAPES, strict=True) if found and d % found.block_d]
    assert any(found.ahead for found in ragged) and any(found.chunks > 1 for found in ragged)
    tokens, hidden, rank = WALKED_TILES
    schedule = forward_schedule(tokens, hidden, rank, dtype.itemsize, cpu)
    assert schedule.programs * schedule.height < tokens, "a program walks several tiles"
    assert schedule.height < schedule.block_n, "tiles of fewer rows than a block"


@pytest.mark.rows(2)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_post_block_two_rows_in_registers_are_as_exact_as_the_hook(device, dtype):
    """So many tokens that a program takes two rows, the last one alone. In the interpreter fewer tokens suffice."""
    tokens = 7 if device.type == "cpu" else 1025
    inputs = make_inputs(tokens, 16, rank=2, dtype=dtype, device=device, scale=False, basis=0)
    assert resident_layout(1025, 16, 2, dtype, describe_device(device)).block_n == 2
    truth, hook = (definition(inputs.map(lambda t, kind=kind: t.to(kind)), "silu") for kind in (F64, dtype))
    assert relative_error(fused(inputs), truth) <= 2 * relative_error(hook, truth) + 1e-6


@pytest.mark.parametrize("rank", range(1, RESIDENT_RANK + 1))
def test_post_block_rows_in_registers_keep_the_ranks_apart(device, rank):
    """Their sums are taken two, four or eight at once. Few rows read W2 as it lies, and more rows packed weights."""
    cpu = device.type == "cpu"
    for tokens in (3, 6 if cpu else 200):
        inputs = make_inputs(tokens, 72, rank=rank, dtype=F32, device=device, scale=False, basis=0)
        layout = resident_layout(tokens, 72, rank, F32, describe_device(device))
        assert layout.direct is (tokens == 3 and rank in (2, 4, 8))
        truth, hook = (definition(inputs.map(lambda t, kind=kind: t.to(kind)), "silu") for kind in (F64, F32))
        assert relative_error(fused(inputs), truth) <= 2 * relative_error(hook, truth) + 1e-6


@pytest.mark.parametrize("tokens", [64, 65, 1000])
def test_post_block_few_tokens_and_many(device, tokens):
    assert_as_good_as_the_hook([make_inputs(tokens, 96, rank=9, dtype=BF16, device=device, scale=False)])


@pytest.mark.parametrize("tokens", [64, 65])
def test_post_block_few_tokens_and_many_with_relu(device, tokens):
    """With relu the op is as exact as the hook, although relu's derivative jumps at 0.

    The fused op and the hook both round x and W1 to bf16, so that some activations change sign. The test has so many
    activations that the numbers of such errors hardly differ.
    """
    assert_as_good_as_the_hook(make_draws(4, tokens, 96, rank=60, dtype=BF16, device=device, scale=False), "relu")


@pytest.mark.parametrize("tokens", [5, 130])
def test_post_block_a_branch_of_zeros_is_moved_by_the_biases_alone(device, tokens):
    """Whatever the residual is: W1 does not see it."""
    inputs = make_inputs(tokens, 256, rank=2, device=device, basis=0, reads="branch")
    inputs = replace(inputs, branch=torch.zeros_like(inputs.branch))
    out = fused(inputs) - inputs.residual
    moved = fused(replace(inputs, residual=torch.zeros_like(inputs.residual)))
    assert relative_error(out, moved.double()) < 1e-5 and moved.abs().min() > 0


def operands_of(inputs: Inputs, packed: bool) -> Operands:
    """Return the operands that a backend gets: without a basis."""
    gpu = describe_device(inputs.residual.device).gpu
    weights = pack_reference(inputs.down, inputs.up, inputs.residual.dtype, gpu) if packed else None
    return Operands(
        inputs.down, inputs.up, inputs.down_bias, inputs.up_bias, inputs.gain, None, inputs.scale, "silu", weights,
        inputs.reads,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "hidden", "rank"), [(1, 576, 7), (17, 99, 12), (18, 256, 5), (70, 128, 16), (66, 64, 64), (40, 80, 33)]
)
def test_post_block_packed_weights_give_the_same_bits(device, tokens, hidden, rank, dtype):
    """At ranks 2, 4 and 8 few rows read W2 as it lies and do not round it, so these have other bits."""
    if os.environ["FUSED_STEER_BACKEND"] == "torch":
        pytest.skip("only the kernels use packed weights")
    if device.type == "cpu" and rank > 16:
        pytest.skip("NumPy sums long products in another order if an operand is transposed")
    inputs = make_inputs(tokens, hidden, rank=rank, dtype=dtype, device=device, basis=0)
    without = replace(inputs, branch=None, down_bias=None, up_bias=None, gain=None, scale=0.7)
    for case in (inputs, without, replace(inputs, reads="branch")):
        found = (triton_backend.forward(case.residual, case.branch, operands_of(case, p), True) for p in (False, True))
        for plain, packed in zip(*found, strict=True):
            assert not plain.isnan().any() and torch.equal(bits(plain), bits(packed))


def test_post_block_fp16_is_at_least_as_exact_as_the_hook(device):
    """fp16 is as exact as the hook. Products are in tf32, which has fp16's precision if operands are rounded."""
    inputs = make_inputs(64, 512, rank=8, dtype=F16, device=device, biases=False, gain=False, scale=False, basis=0)
    # The state is small and the shift large, so that the state does not hide errors of the shift.
    inputs = replace(inputs, residual=inputs.residual / 64, branch=inputs.branch / 64, up=inputs.up * 64)
    truth = definition(inputs.map(Tensor.double), "silu")
    hook = definition(inputs.map(Tensor.half), "silu")
    assert relative_error(fused(inputs), truth) <= relative_error(hook, truth)


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("tokens", [9, 70])
@pytest.mark.parametrize("rank", [4, 9])  # rows in registers, and tiles
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_post_block_zero_gain_leaves_every_bit_of_an_adapter_that_is_not_finite(device, dtype, rank, tokens, reads):
    inputs = make_inputs(tokens, 64, rank=rank, dtype=dtype, device=device, basis=0, reads=reads)
    inputs.gain[2:] = 0
    inputs.residual[3, :2], inputs.branch[3, :2] = -0.0, -0.0
    inputs.up[5], inputs.down[1, 3], inputs.up_bias[7] = float("nan"), float("inf"), -float("inf")
    out = fused(inputs)
    assert torch.equal(bits(out[2:]), bits((inputs.residual + inputs.branch)[2:]))
    assert out[:2].isnan().any(1).all()
    leaves = inputs.leaves()
    grad = torch.randn(out.shape).to(device, dtype)
    fused(leaves).backward(grad)
    assert torch.equal(bits(leaves.branch.grad[2:]), bits(grad[2:]))
    assert torch.equal(bits(leaves.residual.grad[2:]), bits(grad[2:]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_post_block_every_activation(device, activation, dtype):
    cases = make_draws(16, 7, 32, rank=5, dtype=dtype, device=device)  # dL/ds is a single number
    if activation == "relu":  # keep away from 0, where the derivative jumps and rounding would decide
        far = torch.tensor([9.0, -9.0, 9.0, -9.0, 9.0], device=device)
        cases = [replace(case, down_bias=far) for case in cases]
    assert_as_good_as_the_hook(cases, activation)


@pytest.mark.parametrize(
    ("option", "reads"), [("branch", "sum"), *itertools.product(["biases", "gain", "basis"], READS)]
)
@pytest.mark.parametrize("rank", [0, 6, 9])
def test_post_block_each_operand_may_be_absent(device, option, rank, reads):
    without = {option: 0 if option == "basis" else False}
    assert_as_good_as_the_hook(make_draws(4, 19, 80, rank=rank, device=device, scale=False, reads=reads, **without))


@pytest.mark.parametrize("reads", READS)
def test_post_block_batch_and_sequence_dimensions(device, reads):
    assert_as_good_as_the_hook(make_draws(4, 2, 3, 5, 32, rank=4, device=device, scale=False, reads=reads))


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("dtypes", [(F32, BF16), (BF16, F32), (BF16, F16)], ids=str)
def test_post_block_mixed_dtypes_promote_as_the_add_does(device, dtypes, reads):
    inputs = make_inputs(9, 32, rank=4, device=device, reads=reads)
    inputs = replace(inputs, residual=inputs.residual.to(dtypes[0]), branch=inputs.branch.to(dtypes[1]))
    leaves = inputs.leaves()
    out = fused(leaves)
    assert out.dtype == torch.promote_types(*dtypes) == F32
    assert relative_error(out, definition(inputs.map(Tensor.double), "silu")) < 1e-6
    out.sum().backward()
    assert (leaves.residual.grad.dtype, leaves.branch.grad.dtype) == dtypes
    truth = inputs.leaves(F64)
    definition(truth, "silu").sum().backward()
    assert relative_error(leaves.down.grad, truth.down.grad) < 1e-5


@pytest.mark.parametrize("basis", [0, 3])
def test_post_block_half_precision_parameters(device, basis):
    inputs = make_inputs(9, 32, rank=4, dtype=BF16, device=device, basis=basis)
    halves = {"down": BF16, "up": F16, "down_bias": F16, "up_bias": BF16}
    inputs = replace(inputs, **{name: getattr(inputs, name).to(dtype) for name, dtype in halves.items()})
    leaves = inputs.leaves()
    fused(leaves).sum().backward()
    assert {name: getattr(leaves, name).grad.dtype for name in halves} == halves
    assert_as_good_as_the_hook([inputs])


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("size", [1.0, 2.0, 4.0, 16.0])
def test_post_block_a_shift_as_large_as_the_state_and_larger(device, dtype, size):
    """Shifts up to four times the state stay within the bound; beyond, the error of dW1 grows with the shift.

    dW1 is computed from `out` and corrected for the shift in it, so a large shift has to cancel.
    """
    cases = []
    for seed in range(3):
        inputs = make_inputs(70, 64, rank=8, dtype=dtype, device=device, scale=False, seed=seed)
        state = inputs.residual.float() + inputs.branch.float()
        shift = fused(inputs.map(Tensor.float)) - state
        factor = size * state.norm() / shift.norm()
        cases.append(replace(inputs, up=inputs.up * factor, up_bias=inputs.up_bias * factor))
    assert_as_good_as_the_hook(cases, of_down=max(1.0, size / 4))


def test_post_block_the_sums_of_many_tiles(device):
    assert_as_good_as_the_hook([make_inputs(2100, 16, rank=8, dtype=BF16, device=device, scale=False, basis=0)])


def test_post_block_float64_on_the_torch_backend_passes_gradcheck(monkeypatch):
    monkeypatch.setenv("FUSED_STEER_BACKEND", "torch")
    inputs = make_inputs(5, 7, rank=3).leaves(F64)
    names, tensors = zip(*replace(inputs, basis=None).tensors().items(), strict=True)
    for activation, reads in itertools.product(ACTIVATIONS, READS):

        def call(*values, activation=activation, reads=reads):
            return fused(replace(inputs, **dict(zip(names, values, strict=True)), reads=reads), activation)

        assert torch.autograd.gradcheck(call, tensors)


# ------------------------------------------------------------------------------------------------------ bit for bit


def bits(t: Tensor) -> Tensor:
    return t.view({2: torch.int16, 4: torch.int32}[t.itemsize])


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("rank", [1, 8, 9])
def test_post_block_a_fresh_adapter_leaves_every_bit(device, dtype, rank, reads):
    inputs = make_inputs(21, 70, rank=rank, dtype=dtype, device=device, biases=False, gain=False, basis=0, reads=reads)
    inputs.residual[0, :2], inputs.branch[0, :2] = -0.0, -0.0
    inputs.residual[1, 0] = float("inf")
    inputs = replace(inputs, up=torch.zeros_like(inputs.up))
    rows = torch.arange(21, device=device) != 1  # the shift of an infinite state is NaN, as in the hook
    out = fused(inputs)
    assert torch.equal(bits(out[rows]), bits((inputs.residual + inputs.branch)[rows]))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_post_block_zero_gain_leaves_every_bit_whatever_the_adapter(device, dtype):
    inputs = make_inputs(12, 40, rank=4, dtype=dtype, device=device)
    inputs.gain[3:9] = 0
    inputs.residual[4, 0] = float("inf")
    inputs.residual[5, :2], inputs.branch[5, :2] = -0.0, -0.0
    inputs.up_bias[7] = float("inf")
    out = fused(inputs)
    assert torch.equal(bits(out[3:9]), bits((inputs.residual + inputs.branch)[3:9]))
    assert not torch.equal(out[:3], (inputs.residual + inputs.branch)[:3])


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("scale", [0, 0.0, "tensor"])
def test_post_block_zero_scale_leaves_every_bit(device, scale, reads):
    inputs = make_inputs(12, 40, rank=4, device=device, reads=reads)
    inputs = replace(inputs, scale=torch.zeros((), device=device) if scale == "tensor" else scale)
    assert torch.equal(bits(fused(inputs)), bits(inputs.residual + inputs.branch))


@pytest.mark.parametrize(
    ("rank", "name", "value"),
    [
        (4, "down", torch.inf),
        (4, "up", torch.nan),
        (4, "down_bias", torch.nan),
        (4, "up_bias", torch.inf),
        (0, "up_bias", torch.nan),
    ],
)
@pytest.mark.parametrize("zero", ["number", "tensor", "gain"])
def test_post_block_zero_strength_leaves_every_bit_whatever_the_weights(device, zero, rank, name, value):
    inputs = make_inputs(12, 40, rank=rank, device=device, basis=0, gain=False, scale=False)
    inputs.residual[5, :2], inputs.branch[5, :2] = -0.0, -0.0
    getattr(inputs, name).view(-1)[1] = value
    if zero == "gain":
        inputs = replace(inputs, gain=torch.zeros(12, device=device))
    else:
        inputs = replace(inputs, scale=torch.zeros((), device=device) if zero == "tensor" else 0.0)
    assert torch.equal(bits(fused(inputs)), bits(inputs.residual + inputs.branch))

    leaves = inputs.leaves()
    grad = torch.randn(12, 40).to(device)
    fused(leaves).backward(grad)
    assert torch.equal(leaves.residual.grad, grad) and torch.equal(leaves.branch.grad, grad)
    weights = [getattr(leaves, name) for name in ("down", "up", "down_bias", "up_bias")]
    assert all(weight.grad.count_nonzero() == 0 for weight in weights if weight is not None)


@pytest.mark.parametrize(
    ("branch", "reads"), [(True, "sum"), (True, "branch"), (False, "sum")], ids=["branch", "branch read", "no branch"]
)
@pytest.mark.parametrize("zero", ["number", "tensor", "gain"])
def test_post_block_zero_strength_leaves_every_bit_of_a_state_that_overflows(device, zero, branch, reads):
    options = {"basis": 0, "gain": False, "scale": False, "branch": branch, "reads": reads}
    inputs = make_inputs(12, 40, rank=4, device=device, **options)
    inputs.residual[3, :3] = torch.tensor([3e38, -3e38, torch.inf], device=device)
    inputs.residual[4, :2] = torch.tensor([torch.nan, -0.0], device=device)
    if branch:
        inputs.branch[3, :2], inputs.branch[4, 1] = inputs.residual[3, :2], -0.0
    if zero == "gain":
        inputs = replace(inputs, gain=torch.zeros(12, device=device))
    else:
        inputs = replace(inputs, scale=torch.zeros((), device=device) if zero == "tensor" else 0.0)
    expected = inputs.residual + inputs.branch if branch else inputs.residual
    assert torch.equal(bits(fused(inputs)), bits(expected))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_post_block_gradients_of_zero_strength_are_exactly_zero(device, dtype):
    """Tokens of gain 0 add nothing to a parameter's gradient, even if their pre-activations overflow."""
    inputs = make_inputs(12, 40, rank=4, dtype=dtype, device=device, scale=False)
    inputs.gain[3:9] = 0
    inputs.residual[3:9] = 0
    inputs.branch[3:9] = 0
    inputs.down[0] = 0
    inputs.down[0, 0] = 3e38
    inputs.residual[:, 0] = 0
    inputs.branch[:, 0] = 0
    grad = torch.randn(12, 40, device=device).to(dtype)
    expected = run(fused, inputs, "identity", grad)
    overflowing = inputs.map(Tensor.clone)
    overflowing.residual[3:9, 0] = 100  # a = 3e40
    found = run(fused, overflowing, "identity", grad)
    assert torch.equal(bits(found["residual"][3:9]), bits(grad[3:9]))
    for name in ("down", "up", "down_bias", "up_bias"):
        assert found[name].isfinite().all() and torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("rank", [5, 40])
def test_post_block_packed_weights_give_the_same_gradients(dtype, rank, reads):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = make_inputs(37, 96, rank=rank, dtype=dtype, device=device, scale=False, basis=0, reads=reads)
    # In the interpreter NumPy multiplies, and it may sum in another order if a matrix is transposed in memory. So the
    # sums of W2's products are exact here: small integers with 12 bits, or a single term.
    columns = torch.arange(96, device=device)
    up = torch.zeros_like(inputs.up)
    up[columns, columns % rank] = torch.randint(-4095, 4096, (96,), device=device) / 4096
    inputs = replace(inputs, up=up)
    out, a = triton_backend.forward(inputs.residual, inputs.branch, operands_of(inputs, False), True)
    grad = torch.randint(-3, 4, (37, 96), device=device).to(dtype)
    kept = inputs.branch if reads == "branch" else out
    plain, other = (
        vars(triton_backend.backward(grad, kept, a, operands_of(inputs, packed), Needs(*[True] * 6)))
        for packed in (False, True)
    )
    for name, value in plain.items():
        assert torch.equal(bits(value), bits(other[name])), name


@pytest.mark.parametrize(("basis", "reads"), [(0, "sum"), (3, "sum"), (3, "branch")])
@pytest.mark.parametrize("op", [False, True], ids=["eager", "op"])
def test_post_block_gradients_have_storages_of_their_own(device, basis, op, reads):
    inputs = make_inputs(50, 64, rank=4, device=device, basis=basis, reads=reads)
    torch.compiler.reset()
    function = torch.compile(fused, backend="aot_eager") if op else fused
    grad = torch.randn(50, 64, device=device)
    found = run(function, inputs, "silu", grad)
    if reads == "sum":  # branch's gradient is residual's
        names = ("residual", "down", "up", "down_bias", "up_bias", "gain", "scale")
    else:  # residual has the incoming gradient, as in a plain add
        names = ("branch", "down", "up", "down_bias", "up_bias", "gain", "scale")
        assert torch.equal(found["residual"], grad) and (op or found["residual"].data_ptr() == grad.data_ptr())
    storages = {name: found[name].untyped_storage() for name in names}
    assert len({storage.data_ptr() for storage in (*storages.values(), grad.untyped_storage())}) == len(names) + 1
    for name, storage in storages.items():
        assert storage.nbytes() == found[name].nbytes, name


@pytest.mark.parametrize("reads", READS)
def test_post_block_gradients_add_up_in_memory_of_their_own(device, reads):
    """The residual's gradient may be the incoming one itself: to add to it changes nothing else."""
    leaves = make_inputs(9, 32, rank=4, device=device, basis=0, reads=reads).leaves()
    grad = torch.randn(9, 32, device=device)
    before = grad.clone()
    out = fused(leaves)
    twice = out * 1.0
    for _ in range(2):
        twice.backward(grad, retain_graph=True)
    once = dict(zip(leaves.tensors(), torch.autograd.grad(twice, list(leaves.tensors().values()), grad), strict=True))
    assert torch.equal(grad, before)
    for name, value in leaves.tensors().items():
        assert torch.equal(value.grad, once[name] + once[name]), name
    assert leaves.residual.grad.data_ptr() != leaves.branch.grad.data_ptr()


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_post_block_two_runs_give_the_same_bits(device, dtype, reads):
    inputs = make_inputs(100, 64, rank=8, dtype=dtype, device=device, reads=reads)
    grad = torch.randn(100, 64).to(device, dtype)
    first, second = (run(fused, inputs, "silu", grad) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_post_block_inputs_are_not_written(device):
    inputs = make_inputs(12, 40, rank=4, device=device)
    before = inputs.map(Tensor.clone).tensors()
    for branch, reads in ((inputs.branch, "sum"), (inputs.branch, "branch"), (None, "sum")):
        case = replace(inputs, branch=branch, reads=reads)
        grad = torch.ones(12, 40, device=device)
        run(fused, case, "identity", grad)
        assert torch.equal(grad, torch.ones_like(grad))
    for name, value in inputs.tensors().items():
        assert torch.equal(value, before[name]), name


# ------------------------------------------------------------------------------------------------------------ layouts


def transposed(t: Tensor) -> Tensor:
    """Return the same (batch, sequence, d) values, laid out as (sequence, batch, d) in memory."""
    return t.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
        lambda t: t.repeat(1, 2, 1)[:, ::2],
        lambda t: torch.cat([t, t], -1)[..., 1 : t.shape[-1] + 1],
        transposed,
        lambda t: t[:1].expand_as(t),
        lambda t: t[:, :1].expand_as(t),
        lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
    ],
    ids=[
        "padded rows",
        "every other row",
        "unaligned",
        "transposed",
        "expanded batch",
        "expanded rows",
        "columns first",
    ],
)
@pytest.mark.parametrize("rank", [4, 9])
def test_post_block_strided_and_expanded_inputs(device, rank, change):
    draws = make_draws(4, 4, 6, 64, rank=rank, device=device, scale=False, basis=0)
    assert_as_good_as_the_hook([replace(inputs, residual=change(inputs.residual)) for inputs in draws])
    for reads in READS:
        assert_as_good_as_the_hook([replace(inputs, branch=change(inputs.branch), reads=reads) for inputs in draws])
    inputs = draws[0]
    for leaves in (inputs.leaves(), replace(inputs, branch=change(inputs.branch), reads="branch").leaves()):
        plain = torch.autograd.grad(fused(leaves), leaves.down, change(inputs.branch).contiguous())[0]
        strided = torch.autograd.grad(fused(leaves), leaves.down, change(inputs.branch))[0]
        assert relative_error(strided, plain.double()) < 1e-6


def test_post_block_strided_inputs_are_not_copied():
    from fused_steer.kernels.launch import row_layout

    t = torch.empty(4, 6, 64)
    for view in (t[:, :, :32], transposed(t), t[:1].expand_as(t), t[:, ::2], t[:, :1].expand_as(t)):
        other = torch.empty(view.shape)
        (a, b), _, _ = row_layout(view, other)
        assert a is view and b is other
    columns_first = torch.empty(64, 6).t()
    (a,), _, _ = row_layout(columns_first)
    assert a is not columns_first and a.is_contiguous()


OUTPUTS = {
    "branch": {"gain": False},
    "no branch": {"branch": False, "gain": False},
    "gain": {"basis": 0},
    "bf16": {"dtype": BF16},
    "vector": {"rank": 0},
    "branch read": {"reads": "branch"},
}


@pytest.mark.parametrize("options", OUTPUTS.values(), ids=OUTPUTS)
@pytest.mark.parametrize("shape", [(6, 32), (2, 3, 32)], ids=str)
def test_post_block_output_can_be_changed_in_place(device, options, shape):
    """The output may be changed in place if W1 is frozen, because only W1's gradient needs it."""
    leaves = make_inputs(*shape, **{"rank": 4, "device": device, **options}).leaves()
    assert not fused(leaves)._is_view()
    if leaves.down is not None and leaves.reads == "sum":
        leaves = replace(leaves, down=leaves.down.detach())
    wanted = [value for value in replace(leaves, basis=None).tensors().values() if value.requires_grad]
    grad = torch.randn(shape).to(device, leaves.residual.dtype)
    copied, changed = fused(leaves).clone(), fused(leaves)
    for out in (copied, changed):
        out[..., -1] *= 2
        out += 1
    assert torch.equal(changed, copied)
    for found, expected in zip(*(torch.autograd.grad(out, wanted, grad) for out in (changed, copied)), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("op", [False, True], ids=["eager", "op"])
@pytest.mark.parametrize("branch", [True, False], ids=["branch", "no branch"])
def test_post_block_output_changed_in_place_before_the_gradient_of_w1_is_refused(device, branch, op):
    leaves = make_inputs(6, 32, rank=4, device=device, branch=branch, basis=0).leaves()
    if op:
        operands = (leaves.down, leaves.up, leaves.down_bias, leaves.up_bias, leaves.gain, leaves.scale, None)
        out, _ = torch.ops.fused_steer.post_block(leaves.residual, leaves.branch, *operands, 1.0, "silu", "sum", True)
    else:
        out = fused(leaves)
    out += 1
    with pytest.raises(RuntimeError, match=r"output of post_block was changed in place.*expected .*clone\(\)") as error:
        out.sum().backward()
    assert "\n" not in str(error.value)
    weight = leaves.up.detach().clone().requires_grad_()
    out = fused(replace(leaves, up=weight))
    weight.detach().mul_(2)
    with pytest.raises(RuntimeError, match="is at version"):  # PyTorch's own message
        out.sum().backward()


def test_post_block_a_branch_changed_in_place_before_the_gradient_of_w1_is_refused(device):
    leaves = make_inputs(6, 32, rank=4, device=device, basis=0, reads="branch").leaves()
    branch = leaves.branch * 1
    out = fused(replace(leaves, branch=branch))
    branch.add_(1)
    with pytest.raises(RuntimeError, match="is at version"):  # PyTorch's own words
        out.sum().backward()
    with torch.no_grad():
        frozen = replace(leaves, down=leaves.down.detach())
    branch = leaves.branch * 1
    out = fused(replace(frozen, branch=branch))
    branch.add_(1)
    out.sum().backward()  # without dW1 there is no use for branch


@pytest.mark.parametrize(("rank", "reads"), [(0, "sum"), (4, "sum"), (4, "branch")])
def test_post_block_no_tokens(device, rank, reads):
    inputs = make_inputs(2, 0, 32, rank=rank, device=device, reads=reads).leaves()
    out = fused(inputs)
    assert out.shape == (2, 0, 32)
    out.sum().backward()
    for name, value in replace(inputs, basis=None).tensors().items():
        assert value.grad.shape == value.shape and not value.grad.any(), name


@pytest.mark.usefixtures("whole_gpu")
@pytest.mark.parametrize("inner", [None, 22], ids=["few tokens", "many, nested"])
@pytest.mark.parametrize(("rank", "reads"), [(0, "sum"), (4, "sum"), (4, "branch"), (9, "sum"), (9, "branch")])
@pytest.mark.parametrize("stride", [2**30, 2**31])
def test_post_block_addresses_past_two_to_the_31(device, monkeypatch, stride, rank, reads, inner):
    """The last row begins 2³¹ elements after the first. The memory between rows is never touched.

    A stride of 2³⁰ fits into 32 bits, so its product with a row's number would be computed in 32 bits and overflow.
    """
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    rows = 2**31 // stride + 1
    if os.environ["FUSED_STEER_BACKEND"] == "torch":
        stride = 2**20  # PyTorch's indexing needs no test
    shape = (rows, 32) if inner is None else (rows, inner * 3 // rows + 1, 32)
    strides = (stride, 1) if inner is None else (stride, 32, 1)

    def spread(t: Tensor) -> Tensor:
        storage = torch.empty((rows - 1) * stride + t[0].numel(), dtype=t.dtype, device=device)
        return storage.as_strided(shape, strides).copy_(t)

    options = {"gain": False, "scale": False, "basis": 0, "reads": reads}
    inputs = make_inputs(*shape, rank=rank, dtype=BF16, device=device, **options)
    grad = torch.randn(shape).to(device, BF16)
    expected = run(fused, inputs, "silu", grad)
    apart = run(fused, replace(inputs, residual=spread(inputs.residual)), "silu", grad)
    assert all(torch.equal(apart[name], expected[name]) for name in expected)
    apart = run(fused, replace(inputs, branch=spread(inputs.branch)), "silu", spread(grad))
    assert all(torch.equal(apart[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("whole_gpu")
@pytest.mark.gpu
def test_post_block_a_hidden_state_past_two_to_the_31():
    tokens, hidden = 2**19 + 7, 4096
    inputs = make_inputs(8, hidden, rank=4, dtype=BF16, device="cuda", gain=False, scale=False).leaves()
    residual = torch.zeros(tokens, hidden, dtype=BF16, device="cuda")
    residual[-8:] = inputs.residual.detach()
    residual.requires_grad_()
    out = fused(replace(inputs, residual=residual, branch=None))
    expected = fused(replace(inputs, branch=None))
    assert torch.equal(out[-8:], expected)
    (gradient,) = torch.autograd.grad(out, residual, torch.ones_like(out))
    (expected_gradient,) = torch.autograd.grad(expected, inputs.residual, torch.ones_like(expected))
    assert torch.equal(gradient[-8:], expected_gradient)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_post_block_a_device_that_is_not_the_current_one():
    with torch.cuda.device(0):
        assert_as_good_as_the_hook(make_draws(4, 9, 64, rank=4, dtype=BF16, device="cuda:1", scale=False))


def test_post_block_a_launch_makes_its_device_current(monkeypatch):
    from fused_steer.kernels import launch

    entered = []

    class Module:
        device = staticmethod(lambda device: entered.append(device) or launch.contextlib.nullcontext())

    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    for index in (0, 1):
        with launch.on_device(torch.device("cuda", index)):
            pass
    assert entered == [torch.device("cuda", 1)]


# ------------------------------------------------------------------------------- what is computed, and what is kept

ALL_NEEDS = ("residual", "branch", "down", "up", "down_bias", "up_bias", "gain", "scale")


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("name", ALL_NEEDS)
def test_post_block_each_gradient_alone(device, name, reads):
    inputs = make_inputs(19, 48, rank=6, device=device, reads=reads)
    grad = torch.randn(19, 48, device=device)
    everything = run(fused, inputs, "silu", grad)[name]
    alone = getattr(inputs, name).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(fused(replace(inputs, **{name: alone})), alone, grad)
    # A compiler may add numbers in another order in a kernel that computes less, at most in the last bits.
    truth = run(definition, inputs, "silu", grad, torch.float64)[name]
    assert gradient.shape == everything.shape and gradient.dtype == everything.dtype
    assert relative_error(gradient, truth) <= 2 * relative_error(everything, truth) + 1e-6


ROWS, COLUMNS, FINISH = (f"post_block_bwd_{name}_kernel" for name in ("rows", "columns", "finish"))


def launches(needs: Needs, rank: int = 8, reads: str = "sum") -> dict[str, dict]:
    """Return the constants and tensors of each kernel that a backward pass with these needs launches, by kernel."""

    def meta(*shape, dtype=F32):
        return torch.empty(shape, dtype=dtype, device="meta")

    state, a = meta(64, 128, dtype=BF16), meta(64, rank) if rank else None
    down, up, down_bias = (meta(rank, 128), meta(128, rank), meta(rank)) if rank else (None, None, None)
    with recorded(TARGETS["sm_90"]) as found:
        triton_backend.backward(state, state, a, Operands(down, up, down_bias, meta(128), reads=reads), needs)
    described = {}
    for launch in found:
        named = zip(launch.kernel.arg_names, launch.arguments, strict=False)
        given = {name: True for name, value in named if isinstance(value, Tensor)}
        described[launch.kernel.__name__] = launch.constants | given
    assert len(described) == len(found)
    return described


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("needs", [Needs(*needs) for needs in itertools.product([False, True], repeat=6)], ids=str)
def test_post_block_launches_of_each_combination_of_gradients(needs, reads):
    found = launches(needs, reads=reads)
    narrow = needs.x or needs.down or needs.up
    sums = needs.down or needs.up or needs.up_bias
    assert (ROWS in found) == (narrow or needs.down_bias or needs.row_dot)
    assert (COLUMNS in found) == (needs.x or sums)
    assert (FINISH in found) == (sums or needs.down_bias)
    rows, columns = found.get(ROWS, {}), found.get(COLUMNS, {})
    assert ("p_grad" in rows) == any((needs.x, needs.down, needs.down_bias, needs.row_dot)), (
        "G only where it is reduced"
    )
    assert ("p_grad" in columns) == (needs.x or needs.up or needs.up_bias)
    kept, absent = ("p_out", "p_branch") if reads == "sum" else ("p_branch", "p_out")
    assert (kept in columns) == needs.down and absent not in columns
    corrected = needs.down and reads == "sum"
    assert ("p_up" in found.get(FINISH, {})) == corrected, "W2 only where W1's gradient is corrected"
    assert ("p_dx" in columns) == needs.x
    assert ("p_slab" in columns) == sums


def test_post_block_launches_of_a_vector():
    none = Needs(*[False] * 6)
    assert launches(none._replace(x=True), rank=0) == {}, "a vector passes the gradient on"
    assert set(launches(none._replace(up_bias=True), rank=0)) == {COLUMNS, FINISH}
    assert set(launches(none._replace(row_dot=True), rank=0)) == {ROWS}
    for needs in (Needs(*[True] * 6)._replace(down=False, up=False, down_bias=False), none._replace(up_bias=True)):
        assert launches(needs, rank=0) == launches(needs, rank=0, reads="branch"), "the forms coincide"


def test_post_block_the_torch_backend_computes_only_what_is_needed():
    inputs = make_inputs(6, 16, rank=4, gain=False, basis=0)
    for name, reads in itertools.product(Needs._fields, READS):
        operands = Operands(inputs.down, inputs.up, reads=reads)
        out, a = forward(inputs.residual, inputs.branch, operands, True)
        needs = Needs(*[False] * 6)._replace(**{name: True})
        found = backward(out, out, a, operands._replace(up_bias=inputs.up_bias), needs)
        assert {key for key, value in vars(found).items() if value is not None} == {name}


def saved_bytes(function) -> int:
    """Count the bytes that autograd keeps for `function`, leaves excluded."""
    kept = {}

    def pack(t: Tensor) -> Tensor:
        if not t.is_leaf or not t.requires_grad:
            kept[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(kept.values())


def test_post_block_out_and_a_are_all_that_is_kept(device):
    inputs = make_inputs(50, 64, rank=4, dtype=BF16, device=device, gain=False, scale=False, basis=0).leaves()
    assert saved_bytes(lambda: fused(inputs)) == 50 * 64 * 2 + 50 * 4 * 4
    assert saved_bytes(lambda: fused(replace(inputs, reads="branch"))) == 50 * 4 * 4, "branch is the caller's own"
    frozen_down = replace(inputs, down=inputs.down.detach())
    weights = inputs.down.nbytes
    assert saved_bytes(lambda: fused(frozen_down)) == 50 * 4 * 4 + weights, "without dW1 there is no use for out"
    vector = replace(inputs, down=None, up=None, down_bias=None)
    assert saved_bytes(lambda: fused(vector)) == 0
    with torch.no_grad():
        assert saved_bytes(lambda: fused(inputs)) == 0


# ------------------------------------------------------------------------------------ op, compile, autocast, backward


@pytest.mark.parametrize(("rank", "reads"), [(0, "sum"), (4, "sum"), (4, "branch")])
def test_post_block_opcheck(device, rank, reads):
    inputs = make_inputs(6, 5, 16, rank=rank, device=device).leaves()
    operands = (inputs.residual, inputs.branch, inputs.down, inputs.up, inputs.down_bias, inputs.up_bias, inputs.gain)
    arguments = (*operands, inputs.scale, inputs.basis, 1.0, "silu", reads, True)
    torch.library.opcheck(torch.ops.fused_steer.post_block.default, arguments)
    out, a = (t.detach() for t in torch.ops.fused_steer.post_block(*arguments))
    detached = [None if t is None else t.detach() for t in operands[2:]]
    needs = [rank > 0, rank > 0, rank > 0, rank > 0, True, True, True]
    kept = inputs.branch.detach() if reads == "branch" else out
    saved = (kept, a if rank else None, *detached, inputs.scale.detach(), inputs.basis)
    arguments = (torch.randn_like(out), *saved, 1.0, "silu", reads, needs)
    torch.library.opcheck(torch.ops.fused_steer.post_block_backward.default, arguments)


@pytest.mark.parametrize("reads", READS)
def test_post_block_compiled_equals_eager(device, reads):
    inputs = make_inputs(6, 32, rank=4, device=device, reads=reads)
    grad = torch.randn(6, 32, device=device)
    torch.compiler.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    eager, traced = (run(function, inputs, "gelu", grad) for function in (fused, compiled))
    for name in eager:
        assert torch.equal(eager[name], traced[name]), name


def test_post_block_the_op_is_in_the_graph_under_compile_and_bypassed_in_eager(monkeypatch):
    monkeypatch.setenv("FUSED_STEER_BACKEND", "torch")
    inputs = make_inputs(6, 32, rank=4)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch.compile(fused, fullgraph=True, backend=backend)(inputs)
    assert "fused_steer.post_block" in str(graphs[0].graph)
    with torch.profiler.profile() as profile:
        fused(inputs)
    assert not any("fused_steer::" in event.key for event in profile.key_averages())


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_post_block_autocast_changes_nothing(device, dtype):
    inputs = make_inputs(9, 32, rank=4, dtype=dtype, device=device)
    grad = torch.randn(9, 32, device=device).to(dtype)
    plain = run(fused, inputs, "silu", grad)
    torch.compiler.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.autocast(device.type, dtype=BF16):
        for function in (fused, compiled):
            for name, value in run(function, inputs, "silu", grad).items():
                assert value.dtype == plain[name].dtype and torch.equal(value, plain[name]), name


# ------------------------------------------------------------------------------------------------------------- vmap

#: Operands with vmap's dimension: tokens alone take one launch for all elements, and any others one for each.
BATCHED = {
    "tokens": ("residual", "branch", "gain"),
    "residual": ("residual",),
    "w1": ("down",),
    "biases and scale": ("down_bias", "up_bias", "scale"),
    "all": ("residual", "branch", "down", "up", "down_bias", "up_bias", "gain", "scale"),
}


def batched_inputs(device, names: tuple[str, ...], **options) -> tuple[Inputs, dict[str, int | None]]:
    """Return operands in which `names` have a dimension of three elements, the last one, and where it is."""
    draws = [make_inputs(5, 16, rank=4, device=device, seed=seed, **options) for seed in range(3)]
    values = {name: torch.stack([draw.tensors()[name] for draw in draws], -1) for name in names}
    return replace(draws[0], **values), {name: -1 if name in names else None for name in draws[0].tensors()}


def assert_near(value: Tensor, expected: Tensor, name: str = "out") -> None:
    """Compare within float32's rounding: with another number of rows a library may sum in another order."""
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5, msg=lambda found: f"{name}: {found}")


def mapped(function, inputs: Inputs, dims: dict[str, int | None]) -> Tensor | tuple[Tensor, ...]:
    """Call a function of operands under `torch.func.vmap`."""
    tensors = inputs.tensors()
    return torch.func.vmap(
        lambda values: function(replace(inputs, **values)), ({name: dims[name] for name in tensors},)
    )(tensors)


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("names", BATCHED.values(), ids=BATCHED)
def test_post_block_vmap_is_a_loop(device, names, reads):
    inputs, dims = batched_inputs(device, names, basis=0, reads=reads)
    elements = [
        replace(inputs, **{name: value.select(-1, i) for name, value in inputs.tensors().items() if name in names})
        for i in range(3)
    ]
    assert_near(mapped(fused, inputs, dims), torch.stack([fused(element) for element in elements]))
    # The gradients of each element alone, as of each sample of a batch.
    of = [name for name in inputs.tensors() if name != "basis"]

    def slopes(given: Inputs) -> tuple[Tensor, ...]:
        def loss(values: dict[str, Tensor]) -> Tensor:
            return fused(replace(given, **values)).sin().sum()

        found = torch.func.grad(loss)({name: given.tensors()[name] for name in of})
        return tuple(found[name] for name in of)

    for name, value, *rest in zip(of, mapped(slopes, inputs, dims), *map(slopes, elements), strict=True):
        assert_near(value, torch.stack(rest), name)


@pytest.mark.parametrize("names", BATCHED.values(), ids=BATCHED)
def test_post_block_gradients_of_a_vmap_from_outside(device, names):
    """Autograd differentiates the whole vmap, as for an ensemble of adapters. Inside nothing requires a gradient."""
    inputs, dims = batched_inputs(device, names, basis=0)

    def slopes(run) -> list[Tensor]:
        given = {name: value.clone().requires_grad_() for name, value in inputs.tensors().items() if name != "basis"}
        leaves = list(given.values())
        first = torch.autograd.grad(run(replace(inputs, **given)).sin().sum(), leaves, create_graph=True)
        again = torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)
        return [*first, *again]

    def looped(given: Inputs) -> Tensor:
        parts = [{n: v.select(-1, i) for n, v in given.tensors().items() if n in names} for i in range(3)]
        return torch.stack([fused(replace(given, **part)) for part in parts])

    for value, expected in zip(slopes(lambda given: mapped(fused, given, dims)), slopes(looped), strict=True):
        assert_near(value, expected)


TOKENS_ALONE = {"adapter": {"rank": 4}, "vector": {"rank": 0}, "no branch": {"rank": 4, "branch": False}}


def of_tokens(run, inputs: Inputs) -> tuple[Tensor, ...]:
    """Return the gradients of the residual and of the gain."""
    operands = inputs.residual, inputs.gain
    return torch.func.grad(lambda x, g: run(replace(inputs, residual=x, gain=g)).sin().sum(), argnums=(0, 1))(*operands)


@pytest.mark.parametrize("options", TOKENS_ALONE.values(), ids=TOKENS_ALONE)
@pytest.mark.parametrize("tokens", [5, 0])
def test_post_block_vmap_of_tokens_alone_is_a_loop(device, options, tokens):
    draws = [make_inputs(tokens, 16, device=device, basis=0, seed=seed, **options) for seed in range(3)]
    batched = replace(draws[0], residual=torch.stack([draw.residual for draw in draws]))
    dims = dict.fromkeys(batched.tensors()) | {"residual": 0}
    elements = [replace(draws[0], residual=draw.residual) for draw in draws]
    assert_near(mapped(fused, batched, dims), torch.stack([fused(element) for element in elements]))
    found = mapped(lambda given: of_tokens(fused, given), batched, dims)
    for name, value, *rest in zip(("residual", "gain"), found, *(of_tokens(fused, e) for e in elements), strict=True):
        assert_near(value, torch.stack(rest), name)


def test_post_block_vmap_of_tokens_takes_the_launches_of_one_call(monkeypatch):
    monkeypatch.setenv("FUSED_STEER_BACKEND", "triton")
    inputs, dims = batched_inputs("cpu", BATCHED["tokens"], basis=0)
    with noted() as notes:
        mapped(lambda given: of_tokens(fused, given), inputs, dims)
    with noted() as once:
        of_tokens(fused, make_inputs(5, 16, rank=4, basis=0))
    assert len(notes.launches) == len(once.launches) > 1


@pytest.fixture
def fresh_dynamo():
    """Forget after a test which code is not compiled. PyTorch marks what calls such code, for the whole process."""
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("scale", [0.7, torch.tensor(0.7)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", ["residual", "down"])
def test_post_block_compiled_transforms_have_their_gradients(device, name, scale):
    """In a graph a tensor does not show that a transform differentiates it, so the op is not compiled there."""
    inputs = replace(make_inputs(5, 16, rank=4, biases=False, gain=False, basis=0, device=device), scale=scale)

    def slope(value: Tensor) -> Tensor:
        return torch.func.grad(lambda v: fused(replace(inputs, **{name: v})).sin().sum())(value)

    value = inputs.tensors()[name]
    values = torch.stack([value, 2 * value])
    assert_near(torch.compile(slope)(value), slope(value))
    assert_near(torch.compile(torch.func.vmap(slope))(values), torch.stack([slope(v) for v in values]))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="post_block inside a transform of torch.func is not compiled"):
        torch.compile(slope, fullgraph=True)(value)


def test_post_block_vmap_inside_other_transforms(device):
    inputs, dims = batched_inputs(device, BATCHED["tokens"], basis=2)
    elements = [
        replace(inputs, **{name: value.select(-1, i) for name, value in inputs.tensors().items() if dims[name]})
        for i in range(3)
    ]

    def of_all(run):
        return torch.func.grad(lambda up: run(replace(inputs, up=up)).sin().sum())(inputs.up)

    looped = of_all(lambda given: torch.stack([fused(replace(element, up=given.up)) for element in elements]))
    assert_near(of_all(lambda given: mapped(fused, given, dims)), looped)
    # vmap in vmap: every operand of the outer one is another adapter.
    ups = torch.stack([inputs.up, 2 * inputs.up])
    nested = torch.func.vmap(lambda up: mapped(fused, replace(inputs, up=up), dims))(ups)
    assert_near(nested, torch.stack([mapped(fused, replace(inputs, up=up), dims) for up in ups]))

    def curvature(given):
        return torch.func.grad(
            lambda x: torch.func.grad(lambda y: fused(replace(given, residual=y)).sin().sum())(x).sum()
        )(given.residual)

    assert_near(mapped(curvature, inputs, dims), torch.stack([curvature(element) for element in elements]))


# -------------------------------------------------------------------------------------------------------- bad input

GOOD = make_inputs(6, 16, rank=4)
BAD = {
    "residual shape": (
        dict(residual=torch.tensor(1.0)),
        ValueError,
        r"residual has shape \(\); expected \(\.\.\., d\)",
    ),
    "residual dtype": (
        dict(residual=torch.ones(6, 16, dtype=torch.int64)),
        TypeError,
        "residual has dtype torch.int64",
    ),
    "branch shape": (dict(branch=torch.ones(5, 16)), ValueError, r"branch has shape \(5, 16\); expected \(6, 16\)"),
    "branch dtype": (dict(branch=torch.ones(6, 16, dtype=torch.bool)), TypeError, "branch has dtype torch.bool"),
    "branch device": (dict(branch=torch.ones(6, 16, device="meta")), ValueError, "branch is on meta; expected cpu"),
    "down shape": (dict(down=torch.ones(4, 15)), ValueError, r"down has shape \(4, 15\); expected \(r, 16\)"),
    "up shape": (dict(up=torch.ones(4, 16)), ValueError, r"up has shape \(4, 16\); expected \(16, 4\)"),
    "down alone": (dict(up=None), ValueError, "up is None but down is given; expected both"),
    "up alone": (dict(down=None), ValueError, "down is None but up is given; expected both"),
    "nothing": (
        dict(down=None, up=None, down_bias=None, up_bias=None),
        ValueError,
        "down, up and up_bias are all None; expected",
    ),
    "rank": (
        dict(down=torch.ones(257, 16), up=torch.ones(16, 257)),
        ValueError,
        "rank of down is 257; expected at most 256",
    ),
    "down_bias shape": (dict(down_bias=torch.ones(5)), ValueError, r"down_bias has shape \(5,\); expected \(4,\)"),
    "up_bias shape": (dict(up_bias=torch.ones(4)), ValueError, r"up_bias has shape \(4,\); expected \(16,\)"),
    "down_bias alone": (dict(down=None, up=None), ValueError, "down_bias is given without down; expected both"),
    "basis alone": (dict(down=None, up=None, down_bias=None), ValueError, "basis is given without up; expected both"),
    "gain shape": (dict(gain=torch.ones(6, 1)), ValueError, r"gain has shape \(6, 1\); expected \(6,\)"),
    "gain dtype": (
        dict(gain=torch.ones(6, dtype=torch.bool)),
        TypeError,
        "gain has dtype torch.bool; expected float32",
    ),
    "basis shape": (dict(basis=torch.ones(15, 2)), ValueError, r"basis has shape \(15, 2\); expected \(16, k\)"),
    "scale shape": (dict(scale=torch.ones(2)), ValueError, r"scale has shape \(2,\); expected \(\)"),
    "residual type": (dict(residual=None), TypeError, "residual is a NoneType; expected a tensor"),
    "branch type": (dict(branch=[1.0]), TypeError, "branch is a list; expected a tensor"),
    "down type": (dict(down="W1"), TypeError, "down is a str; expected a tensor"),
    "gain type": (dict(gain=0.5), TypeError, "gain is a float; expected a tensor"),
    "basis type": (dict(basis=np.ones((16, 2))), TypeError, "basis is a ndarray; expected a tensor"),
    "branch sparse": (
        dict(branch=torch.ones(6, 16).to_sparse()),
        TypeError,
        "branch is of layout torch.sparse_coo; expected a dense tensor",
    ),
    "residual of texts": (
        dict(residual=torch.nested.nested_tensor([torch.ones(2, 16), torch.ones(4, 16)], layout=torch.jagged)),
        TypeError,
        "residual is a nested tensor; expected a dense tensor",
    ),
    "scale NaN": (dict(scale=math.nan), ValueError, "scale is nan; expected at most 3.402823e"),
    "scale beyond float32": (dict(scale=-1e39), ValueError, "scale is -1e\\+39; expected at most 3.402823e"),
    "scale of 401 digits": (dict(scale=10**400), ValueError, "scale is too large; expected at most 3.402823e"),
    "scale type": (dict(scale="1"), TypeError, "scale is a str; expected a float or a 0-dim tensor"),
    "reads": (dict(reads="residual"), ValueError, "reads is 'residual'; expected one of sum, branch"),
    "reads type": (dict(reads=torch.ones(3, 3)), ValueError, "reads is a Tensor; expected one of sum, branch"),
    "no branch to read": (
        dict(reads="branch", branch=None),
        ValueError,
        "reads is 'branch' but branch is None; expected a branch, or reads='sum'",
    ),
    "no branch to read, a vector": (
        dict(reads="branch", branch=None, down=None, up=None, down_bias=None, basis=None),
        ValueError,
        "reads is 'branch' but branch is None",
    ),
}


@pytest.mark.parametrize(("changes", "kind", "message"), BAD.values(), ids=BAD)
def test_post_block_bad_input_is_one_clear_line(changes, kind, message):
    with pytest.raises(kind, match=message) as error:
        fused(replace(GOOD, **changes))
    assert "\n" not in str(error.value)


def test_post_block_negative_views_have_their_sign(device):
    """PyTorch leaves the memory of a conjugate's imaginary part as it is. A kernel reads memory."""
    inputs = replace(make_inputs(6, 32, rank=4, scale=False, device=device), basis=None)
    grad = torch.randn(6, 32, device=device)
    for name in inputs.tensors():
        given = (replace(inputs, **{name: turn(getattr(inputs, name))}) for turn in (torch._neg_view, torch.neg))
        assert_near(*map(fused, given))
    for given in (inputs, replace(inputs, down=None, up=None, down_bias=None)):
        found, expected = (run(fused, given, "silu", turn(grad)) for turn in (torch._neg_view, torch.neg))
        for name, value in expected.items():
            assert_near(found[name], value)


@pytest.mark.parametrize("wrapped", [("residual", "branch"), ("down", "up"), ("gain",)], ids="+".join)
def test_post_block_of_tensors_that_hold_others(device, wrapped):
    """A subclass such as DTensor has no memory of its own. PyTorch's operations compute with what it holds."""
    inputs = make_inputs(6, 32, rank=4, device=device)
    leaves = inputs.leaves()
    named = replace(leaves, basis=None).tensors()
    expected = fused(leaves)
    gradients = torch.autograd.grad(expected.sin().sum(), list(named.values()))
    held = {name: TwoTensor(*(named[name].detach().clone() for _ in range(2))) for name in wrapped}
    given = replace(leaves, **{name: value.requires_grad_() for name, value in held.items()})
    found = fused(given)
    assert type(found) is TwoTensor
    assert_near(found.a, expected)
    wanted = list(replace(given, basis=None).tensors().values())
    for one, other in zip(torch.autograd.grad(found.sin().sum(), wanted), gradients, strict=True):
        assert_near(getattr(one, "a", one), other)


@pytest.mark.parametrize("half", [np.float32(0.5), np.float16(0.5), Fraction(1, 2)], ids=repr)
def test_post_block_numbers_of_any_type_are_strengths(half):
    assert torch.equal(fused(replace(GOOD, scale=half)), fused(replace(GOOD, scale=0.5)))


def test_post_block_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation is 'swish'; expected one of identity, silu"):
        fused(GOOD, "swish")


def test_post_block_the_triton_backend_refuses_float64(monkeypatch):
    monkeypatch.setattr(sys.modules["fused_steer.kernels.post_block"], "select_backend", lambda _: "triton")
    with pytest.raises(TypeError, match="the triton backend got a float64 tensor; expected float32"):
        fused(GOOD.map(Tensor.double))


def test_post_block_rank_zero_factors_are_a_vector(device):
    inputs = make_inputs(6, 16, rank=0, device=device)
    empty = replace(inputs, down=torch.empty(0, 16, device=device), up=torch.empty(16, 0, device=device))
    assert torch.equal(fused(empty), fused(inputs))
    with pytest.raises(ValueError, match="rank 0 and up_bias is None; expected"):
        fused(replace(empty, up_bias=None))
