"""Tests of post_block with the RMSNorm behind it, and of RMSNorm alone, on each backend."""

import itertools
import os
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from fused_steer.kernels import ACTIVATIONS
from fused_steer.kernels.aot import SHARED_MEMORY, Case, record_norm_passes
from fused_steer.kernels.contract import READS
from fused_steer.kernels.launch import noted
from fused_steer.kernels.norm import MAX_WIDTH, rms_norm
from fused_steer.kernels.post_block_norm import post_block_norm
from fused_steer.kernels.predict import memory_bytes
from fused_steer.kernels.schedule import RESIDENT_RANK, TARGETS, describe_device, forward_splits
from fused_steer.kernels.triton_backend import resident_layout
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
    norm_definition,
    run,
    unfused,
    units,
)
from ops import Inputs, definition, make_draws, make_inputs, relative_error
from torch import Tensor

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


SHAPES = [
    (1, 272, 8),
    (17, 320, 4),
    (300, 64, 16),
    (3, 264, 1),
    (18, 384, 64),
    (40, 144, 0),
    (33, 99, 256),
    (70, 288, 128),
    (34, 256, 5),
    (70, 99, 12),
    (66, 64, 64),
    (66, 192, 33),
]


#: All shapes in float32 and bfloat16. In float16 every other one, because the interpreter is slow.
CASES = [(*shape, dtype) for shape in SHAPES for dtype in (F32, BF16, F16) if dtype != F16 or shape in SHAPES[::2]]


@pytest.mark.parametrize(("tokens", "hidden", "rank", "dtype"), CASES, ids=str)
def test_post_block_norm_is_as_exact_as_hook_and_norm(device, tokens, hidden, rank, dtype):
    fewest = min(tokens, rank or tokens)
    options = {"rank": rank, "dtype": dtype, "device": device, "scale": False}
    assert_as_good_as_unfused(make_draws(-(-8 // fewest), tokens, hidden, **options))


def test_post_block_norm_the_shapes_reach_every_form_of_the_forward():
    cpu = describe_device(torch.device("cpu"))
    whole = [forward_splits(*shape, 2, cpu) is None for shape in SHAPES if shape[2] > 8]
    assert any(whole) and not all(whole)
    for dtype in (F32, BF16):
        found = [resident_layout(*shape, dtype, cpu, norm=True) for shape in SHAPES]
        assert [layout is not None for layout in found] == [0 < rank <= 8 for _, _, rank in SHAPES]
        ragged = [
            d % layout.block_d for layout, (_, d, _) in zip(found, SHAPES, strict=True) if layout and layout.ahead
        ]
        assert any(ragged)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("rank", [0, 6, 9])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_post_block_norm_every_kind_of_norm(device, kind, rank, dtype):
    tokens = 70 if rank > RESIDENT_RANK else 17  # tiles, or rows in registers
    assert_as_good_as_unfused(make_draws(2, tokens, 128, rank=rank, dtype=dtype, device=device, scale=False), kind)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_post_block_norm_every_activation(device, activation):
    cases = make_draws(8, 17, 32, rank=5, dtype=BF16, device=device)
    if activation == "relu":  # keep away from 0, where the derivative jumps and rounding would decide
        far = torch.tensor([9.0, -9.0, 9.0, -9.0, 9.0], device=device)
        cases = [replace(case, down_bias=far) for case in cases]
    assert_as_good_as_unfused(cases, GEMMA, activation)


@pytest.mark.parametrize(
    ("option", "reads"), [("branch", "sum"), *itertools.product(["biases", "gain", "basis", "scale"], READS)]
)
@pytest.mark.parametrize(("tokens", "rank"), [(9, 0), (9, 6), (70, 9)])
def test_post_block_norm_each_operand_may_be_absent(device, option, tokens, rank, reads):
    options = {"scale": False, option: 0 if option == "basis" else option == "scale"}
    draws = 2 if tokens == 70 else 8
    assert_as_good_as_unfused(make_draws(draws, tokens, 80, rank=rank, device=device, reads=reads, **options))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_post_block_norm_rows_that_nearly_cancel(device, dtype):
    """Both outputs and every gradient are as exact as those of hook and norm.

    The gradient of W1 has only 16 numbers here, because x has four dimensions, and the rows nearest to zero decide
    them. Two draws are too few to compare it.
    """
    cases = [cancelling(24, dtype, device, seed) for seed in range(8)]
    out = definition(cases[0].map(Tensor.double), "identity")
    assert out.norm() < 0.05 * (cases[0].residual + cases[0].branch).norm(), "the shift cancels the state"
    assert_as_good_as_unfused(cases, BARE, "identity")


@pytest.mark.parametrize("tokens", [40, 70])
def test_post_block_norm_backward_adds_no_error_on_rows_that_nearly_cancel(device, tokens):
    """In float32 all error of the gradients is the rounding of `out` in the forward: the backward adds below 1e-6.

    So dW1 = daᵀ out − (daᵀ h) W2'ᵀ loses nothing, although `out` is a hundredth of the second term.
    """
    found, exact = [], []
    for seed in range(280 // tokens):
        inputs = cancelling(tokens, F32, device, seed)
        ours = run(fused, inputs, BARE, "identity", seed)
        rounded = ours["out"].double()

        def at_rounded(leaves, weight, kind, activation, rounded=rounded):
            out = definition(leaves, activation)
            out = out + (rounded - out).detach()  # the rounded numbers, with the gradients of the exact ones
            return out, norm_definition(out, weight, kind)

        found.append(ours)
        exact.append(run(at_rounded, inputs, BARE, "identity", seed, F64))
    for name in ("residual", "branch", "down", "up"):
        value, truth = (
            torch.cat([result[name].double().flatten() for result in results]) for results in (found, exact)
        )
        assert relative_error(value, truth) <= 1e-6, name


def test_post_block_norm_is_the_norm_of_the_rounded_output(device):
    """Where `out` nearly cancels, its rounding is large beside it. The norm is that of the numbers in memory."""
    for tokens, rank in ((8, 4), (70, 9)):  # rows in registers, and tiles
        inputs = make_inputs(tokens, 128, rank=rank, dtype=BF16, device=device)
        out, normed = fused(inputs, None, Kind(weight=False))
        assert relative_error(normed, norm_definition(out.double(), None, Kind())) < 2**-8


@pytest.mark.parametrize(("tokens", "rank"), [(9, 4), (70, 9)])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_post_block_norm_zero_gain_leaves_every_bit_of_out(device, dtype, tokens, rank):
    inputs = make_inputs(tokens, 64, rank=rank, dtype=dtype, device=device, basis=0)
    inputs.gain[2:] = 0
    inputs.residual[3, :2], inputs.branch[3, :2] = -0.0, -0.0
    inputs.up[5], inputs.down[1, 3], inputs.up_bias[7] = float("nan"), float("inf"), -float("inf")
    out, normed = fused(inputs, None, Kind(weight=False))
    view = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(out[2:].view(view), (inputs.residual + inputs.branch)[2:].view(view))
    assert normed[2:].isfinite().all() and not normed[:2].isfinite().all()


@pytest.mark.parametrize("tokens", [21, 70])
@pytest.mark.parametrize("rank", [0, 8, 9])
def test_post_block_norm_a_zero_shift_leaves_every_bit_of_out(device, tokens, rank):
    inputs = make_inputs(tokens, 96, rank=rank, dtype=BF16, device=device, biases=False, gain=False, basis=0)
    inputs.residual[0, :2], inputs.branch[0, :2] = -0.0, -0.0
    inputs = inputs.map(lambda t: torch.zeros_like(t) if t is inputs.up or t is inputs.up_bias else t)
    out, _ = fused(inputs, draw_weight(inputs, LLAMA), LLAMA)
    assert torch.equal(out.view(torch.int16), (inputs.residual + inputs.branch).view(torch.int16))


@pytest.mark.parametrize(("tokens", "rank"), [(9, 4), (70, 9)])
def test_post_block_norm_two_runs_give_the_same_bits(device, tokens, rank):
    inputs = make_inputs(tokens, 96, rank=rank, dtype=BF16, device=device)
    first, second = (run(fused, inputs, LLAMA, "silu", 0) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("tokens", "rank"), [(9, 4), (70, 9)])
def test_post_block_norm_strided_and_expanded_inputs(device, tokens, rank):
    strided, nested = [], []
    for inputs in make_draws(4, 2, tokens, 32, rank=rank, device=device, scale=False):
        spread = torch.randn(tokens, 2, 64, device=device)[..., ::2].transpose(0, 1)
        branch = torch.randn(tokens, 32, device=device).expand(2, tokens, 32)
        strided.append(replace(inputs, residual=spread, branch=branch))
        nested.append(replace(inputs, residual=torch.randn(tokens, 2, 32, device=device).transpose(0, 1)))
    for cases in (strided, nested):
        assert_as_good_as_unfused(cases)


@pytest.mark.parametrize(("tokens", "rank"), [(9, 4), (70, 9)])
@pytest.mark.parametrize("use", ["out", "normed"])
def test_post_block_norm_either_output_may_be_unused(device, use, tokens, rank):
    inputs = make_inputs(tokens, 64, rank=rank, device=device, scale=False)

    def one(function):
        def call(*arguments):
            return (function(*arguments)[0 if use == "out" else 1],)

        return call

    weight = draw_weight(inputs, LLAMA)
    found = []
    for function, dtype in ((fused, F32), (unfused, F64)):
        leaves = inputs.leaves(dtype)
        (output,) = one(function)(leaves, weight.to(dtype), LLAMA)
        output.square().sum().backward()
        found.append({name: value.grad for name, value in replace(leaves, basis=None).tensors().items()})
    assert all(relative_error(found[0][name], found[1][name]) < 1e-5 for name in found[1])


@pytest.mark.parametrize(
    "name", ["residual", "branch", "down", "up", "down_bias", "up_bias", "gain", "scale", "norm_weight"]
)
@pytest.mark.parametrize("reads", READS)
def test_post_block_norm_each_gradient_alone(device, name, reads):
    inputs = make_inputs(70, 64, rank=4, device=device, reads=reads)
    full = run(fused, inputs, LLAMA, "silu", 0)
    weight = draw_weight(inputs, LLAMA, 0)
    tensors = inputs.tensors() | {"norm_weight": weight}
    leaf = tensors[name].clone().requires_grad_()
    case = inputs if name == "norm_weight" else replace(inputs, **{name: leaf})
    outputs = fused(case, leaf if name == "norm_weight" else weight, LLAMA)
    generator = torch.Generator().manual_seed(99)
    grads = [torch.randn(inputs.residual.shape, generator=generator).to(device) for _ in outputs]
    (gradient,) = torch.autograd.grad(outputs, leaf, grads)
    assert relative_error(gradient, full[name].double()) < 1e-5


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("tokens", [9, 70])
def test_post_block_norm_packed_weights_give_the_same_bits_of_out(device, tokens, reads, dtype, monkeypatch):
    if os.environ["FUSED_STEER_BACKEND"] == "torch":
        pytest.skip("only the kernels use packed weights")
    inputs = make_inputs(tokens, 256, rank=12, dtype=dtype, device=device, basis=0, gain=False, reads=reads).leaves()
    steer, norm = (import_module(f"fused_steer.kernels.{name}") for name in ("triton_backend", "post_block_norm"))
    found, packed, pack = [], [], steer.pack_adapter
    monkeypatch.setattr(steer, "pack_adapter", lambda *weights: packed.append(pack(*weights)) or packed[-1])
    for many in (steer.MANY_TOKENS, 1):
        monkeypatch.setattr(norm, "_forward_plans", {})
        monkeypatch.setattr(steer, "MANY_TOKENS", many)
        out, normed = post_block_norm(
            inputs.residual,
            inputs.branch,
            inputs.down,
            inputs.up,
            norm_weight=None,
            eps=1e-6,
            reads=reads,
        )
        weights = (inputs.residual, inputs.down, inputs.up)
        found.append((out, normed, *torch.autograd.grad((out, normed), weights, (normed.detach(), out.detach()))))
        assert len(packed) == (many == 1)
    (out, *rest), (other_out, *others) = found
    assert torch.equal(out, other_out)
    # Columns are in other blocks, so that the squares are summed in another order.
    assert all(
        relative_error(one, other.double()) < 2 * torch.finfo(dtype).eps
        for one, other in zip(rest, others, strict=True)
    )


def test_post_block_norm_no_tokens(device):
    inputs = make_inputs(2, 0, 32, rank=4, device=device).leaves()
    weight = torch.ones(32, device=device, requires_grad=True)
    out, normed = fused(inputs, weight, LLAMA)
    assert out.shape == normed.shape == (2, 0, 32)
    (out + normed).sum().backward()
    assert not weight.grad.any() and not inputs.down.grad.any()


def test_post_block_norm_float64_on_the_torch_backend_passes_gradcheck(monkeypatch):
    monkeypatch.setenv("FUSED_STEER_BACKEND", "torch")
    inputs = make_inputs(5, 7, rank=3).leaves(F64)
    names, tensors = zip(*replace(inputs, basis=None).tensors().items(), strict=True)
    weight = torch.randn(7, dtype=F64, requires_grad=True)
    for kind in (LLAMA, GEMMA):

        def call(*values, kind=kind):
            return fused(replace(inputs, **dict(zip(names, values[1:], strict=True))), values[0], kind)

        assert torch.autograd.gradcheck(call, (weight, *tensors))


@pytest.mark.parametrize("tokens", [9, 70])
def test_post_block_norm_out_a_and_the_inverse_are_all_that_is_kept(device, tokens):
    inputs = make_inputs(tokens, 64, rank=4, dtype=BF16, device=device, gain=False, scale=False, basis=0).leaves()
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if not t.is_leaf or not t.requires_grad:
            kept[t.data_ptr()] = t.nbytes
        return t

    weight = torch.ones(64, dtype=BF16, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fused(inputs, weight, LLAMA)
    assert sum(kept.values()) == tokens * (64 * 2 + 4 * 4 + 4)


# ------------------------------------------------------------------------------------------------ units and launches


COLUMNS, FINISH = "post_block_bwd_columns_kernel", "post_block_bwd_finish_kernel"
#: By rank: the launches of a backward of many tokens, each with its units.
BACKWARD = {
    0: {"rms_norm_bwd_kernel": 4, COLUMNS: 1, FINISH: 0},
    1: {"post_block_norm_bwd_held_kernel": 4, "add_partial_sums_kernel": 0, FINISH: 0},
    8: {"post_block_norm_bwd_rows_kernel": 4, COLUMNS: 3, FINISH: 0},
    64: {"rms_norm_bwd_kernel": 4, "post_block_bwd_rows_kernel": 1, COLUMNS: 3, FINISH: 0},
}


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("rank", BACKWARD)
def test_post_block_norm_units_and_launches_of_many_tokens(rank, target):
    """Forward 4 units in one launch. Backward 4 at rank 1, 7 up to rank 8, and 8 above."""
    passes = record_norm_passes(Case(8192, 4096, rank, packed=True), target)
    assert (len(passes["forward"]), units(passes["forward"])) == (1, 4)
    assert {launch.kernel.__name__: units([launch]) for launch in passes["backward"]} == BACKWARD[rank]
    assert (len(passes["norm_forward"]), units(passes["norm_forward"])) == (1, 2)
    assert (len(passes["norm_backward"]), units(passes["norm_backward"])) == (1, 3)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("tokens", "hidden", "rank", "least", "most"), [
    (1024, 4096, 8, 5, 5.5), (2048, 2048, 8, 5, 5.5), (2048, 4096, 8, 6, 6.5), (4096, 2048, 8, 5, 5.5),
    (8192, 2048, 8, 7, 7.2), (16384, 4096, 8, 7, 7.2), (8192, 2048, 2, 4, 4.4), (16384, 4096, 4, 4, 4.2),
    (16384, 4096, 16, 8, 8.2),
])  # fmt: skip
def test_post_block_norm_backward_units_of_device_memory(tokens, hidden, rank, least, most, target):
    """Where the gradient of `out` is written, it is read again from L2 if it fits there: 5 to 6 units, else 7 or 8."""
    backward = record_norm_passes(Case(tokens, hidden, rank, packed=True), target)["backward"]
    moved = sum(memory_bytes(backward, target)) / (tokens * hidden * 2)
    assert least <= moved <= most


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_post_block_norm_one_pass_cannot_hold_the_sums_of_the_weights_gradients_of_higher_ranks(target):
    """In one pass a program owns whole rows, and with them sums over all of d for W1 and W2, in float32.

    At rank 16 and d = 4096 the sums of one program exceed its shared memory and its registers together, and at rank 8
    those of all multiprocessors take more of L2 than the tiles of 16 rows leave.
    """
    device, registers = TARGETS[target], 65536 * 4
    assert 2 * 16 * 4096 * 4 > SHARED_MEMORY[target] + registers
    sums, tile = (device.multiprocessors * size for size in (2 * 8 * 4096 * 4, 4 * 16 * 4096 * 2))
    assert sums + tile > device.l2


def test_post_block_norm_units_and_launches_of_few_tokens_and_high_ranks():
    """They take post_block's two launches and the norm's."""
    for case in (Case(8, 4096, 16), Case(8192, 4096, 128, packed=True)):
        forward = record_norm_passes(case, "sm_90")["forward"]
        assert [launch.kernel.__name__ for launch in forward] == [
            "post_block_fwd_down_kernel", "post_block_fwd_up_kernel", "rms_norm_fwd_kernel",
        ]  # fmt: skip
        assert units(forward) == 7


def test_post_block_norm_the_weight_gradient_is_computed_only_if_asked_for():
    wanted = record_norm_passes(Case(8192, 4096, 8), "sm_90", weight_gradient=True)["norm_backward"]
    assert [launch.kernel.__name__ for launch in wanted] == ["rms_norm_bwd_kernel", "add_partial_sums_kernel"]
    assert units(wanted) == 3


@pytest.mark.parametrize("kind", [Kind(weight=False), LLAMA], ids=["bare", "weight"])
@pytest.mark.parametrize("strengths", [(1.0, torch.tensor(0.5)), (torch.tensor(0.5), 1.0)], ids=["number", "tensor"])
def test_post_block_norm_a_strength_of_one_and_a_tensor_share_no_plan(device, strengths, kind):
    """The plan of the first kind of strength must not serve the second: True equals 1.0 in a key."""
    inputs = make_inputs(5, 32, rank=3, device=device, basis=0, biases=False, gain=False)
    for strength in strengths:
        given = replace(inputs, scale=strength).map(lambda t: t.to(device))
        assert_as_good_as_unfused([given], kind)


@pytest.mark.parametrize("tokens", [9, 70])
def test_post_block_norm_repeated_calls_are_planned(device, tokens, monkeypatch):
    """A repeated call starts forward and backward by plans, which give the same bits."""
    if os.environ["FUSED_STEER_BACKEND"] == "torch":
        pytest.skip("only kernels are planned")
    inputs = make_inputs(tokens, 48, rank=3, dtype=BF16, device=device, basis=0, gain=False, scale=False)
    first = run(fused, inputs, LLAMA, "silu", 0)

    def refuse(*args, **kwargs):
        raise AssertionError("a launcher was called")

    for module in ("triton_backend", "post_block_norm", "norm"):  # the package has functions of these names
        monkeypatch.setattr(import_module(f"fused_steer.kernels.{module}"), "launch", refuse)
    second = run(fused, inputs, LLAMA, "silu", 0)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = make_inputs(tokens, 40, rank=3, dtype=BF16, device=device, basis=0, gain=False, scale=False)
    with pytest.raises(AssertionError, match="a launcher was called"):
        run(fused, other, LLAMA, "silu", 0)


# --------------------------------------------------------------------------------------------------------- norm alone


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(1, 576), (2, 17, 99), (300, 16), (3, 1088), (200, 40)], ids=str)
def test_rms_norm_is_as_exact_as_the_models_norm(device, shape, kind, dtype):
    ours, theirs, truths = [], [], []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(shape, generator=generator).to(device, dtype)
        grad = torch.randn(shape, generator=generator).to(device, dtype)
        weight = draw_weight(Inputs(x), kind, seed)
        for results, wide in ((ours, None), (theirs, dtype), (truths, F64)):
            leaves = [t.detach().to(wide or t.dtype).requires_grad_() for t in (x, weight) if t is not None]
            given = leaves[0], leaves[1] if kind.weight else None
            normed = rms_norm(*given, **kind.options()) if wide is None else norm_definition(*given, kind)
            results.append([normed.detach(), *torch.autograd.grad(normed, leaves, grad.to(normed.dtype))])
    for name in range(len(ours[0])):
        value, other, truth = (
            torch.cat([found[name].double().flatten() for found in results]) for results in (ours, theirs, truths)
        )
        assert relative_error(value, truth) <= 2 * relative_error(other, truth) + 1e-6


def test_rms_norm_strided_rows_are_not_copied():
    x = torch.randn(4, 6, 64)[:, ::2, 16:48]
    with noted() as notes:
        rms_norm(x, torch.ones(32), eps=1e-6)
    if notes.launches:  # the torch backend launches nothing
        assert notes.launches[0].arguments[0].data_ptr() == x.data_ptr()


@pytest.mark.usefixtures("whole_gpu")
@pytest.mark.parametrize("stride", [2**30, 2**31])
def test_rms_norm_addresses_past_two_to_the_31(device, monkeypatch, stride):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    if os.environ["FUSED_STEER_BACKEND"] == "torch":
        pytest.skip("PyTorch's indexing needs no test")
    rows = 2**31 // stride + 1
    x = torch.randn(rows, 32, device=device).to(BF16)
    spread = torch.empty((rows - 1) * stride + 32, dtype=BF16, device=device).as_strided((rows, 32), (stride, 1))
    spread.copy_(x)
    found = []
    for each in (x, spread):
        each = each.detach().requires_grad_()
        normed = rms_norm(each, torch.ones(32, device=device), eps=1e-6)
        found.append((normed, *torch.autograd.grad(normed, each, spread.detach())))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"eps": -1.0}, ValueError, "eps is -1.0; expected a number of at least 0"),
        ({"eps": float("nan")}, ValueError, "eps is nan; expected a number of at least 0"),
        ({"norm_weight": torch.ones(31)}, ValueError, "norm_weight has shape (31,); expected (32,)"),
        ({"norm_weight": torch.ones(32, dtype=torch.int32)}, TypeError, "norm_weight has dtype torch.int32; expected"),
        ({"norm_weight": torch.ones(32, device="meta")}, ValueError, "norm_weight is on meta; expected cpu"),
        ({"norm_weight": None, "plus_one": True}, ValueError, "plus_one is True but norm_weight is None; expected"),
        ({"branch": torch.ones(4, 31)}, ValueError, "branch has shape (4, 31); expected (4, 32)"),
        ({"down": None}, ValueError, "down is None but up is given"),
    ],
)
def test_post_block_norm_bad_input_is_one_clear_line(changes, kind, message):
    good = {"residual": torch.ones(4, 32), "branch": torch.ones(4, 32), "down": torch.ones(2, 32)}
    good |= {"up": torch.ones(32, 2), "norm_weight": torch.ones(32), "eps": 1e-6}
    post_block_norm(**good)
    with pytest.raises(kind) as error:
        post_block_norm(**good | changes)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_post_block_norm_a_width_beyond_registers_is_refused():
    with pytest.raises(ValueError, match=f"expected .* 0 < d <= {MAX_WIDTH}"):
        rms_norm(torch.ones(1, MAX_WIDTH + 1), None, eps=1e-6)


def test_post_block_norm_compiled_inside_a_transform_is_refused():
    inputs = make_inputs(4, 32, rank=2, basis=0)

    def call(residual: Tensor) -> Tensor:
        return fused(replace(inputs, residual=residual), None, Kind(weight=False))[1].sum()
