"""Tests of the grouped op, in which each token may have a different adapter."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from compiling import run_compiling
from fused_steer.kernels import ACTIVATIONS, grouped
from fused_steer.kernels.aot import SHARED_MEMORY, record_grouped
from fused_steer.kernels.contract import READS
from fused_steer.kernels.schedule import TARGETS
from grouped_batches import Batch, make
from ops import relative_error
from torch import Tensor

FEW, MANY = 7, 41  # one program per token; one program per tile of tokens


@pytest.fixture(autouse=True)
def both_schedules_at_test_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "FEW_TOKENS", 8)


def assert_right(batch: Batch, out: Tensor) -> None:
    """Assert that the error from float64 is at most twice that of the formula in the batch's dtype, plus 1e-6."""
    truth = batch.definition(torch.float64)
    plain = batch.definition(batch.residual.dtype)
    assert out.dtype == batch.residual.dtype
    assert relative_error(out.cpu(), truth) <= 2 * relative_error(plain, truth) + 1e-6


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("tokens", [1, FEW, MANY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("hidden", [64, 100])
def test_grouped_equals_the_formula(device, tokens, dtype, hidden, reads):
    batch = make(tokens, hidden, dtype=dtype, device=device, reads=reads)
    assert_right(batch, batch.call())


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)], ids=str)
def test_grouped_is_as_exact_as_the_dtype_of_the_sum(device, dtypes):
    batch = make(MANY, device=device)
    batch = replace(batch, residual=batch.residual.to(dtypes[0]), branch=batch.branch.to(dtypes[1]))
    out = batch.call()
    assert out.dtype == torch.float32
    assert relative_error(out.cpu(), batch.definition(torch.float64)) <= 1e-6


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("rank", [0, 1, 8, 12, 64])
def test_grouped_ranks(device, rank, tokens):
    batch = make(tokens, 72, rank, device=device)
    assert_right(batch, batch.call())


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_grouped_activations(device, activation, tokens):
    batch = make(tokens, device=device, activation=activation)
    assert_right(batch, batch.call())


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_grouped_each_slot_its_own_activation(device, tokens):
    codes = torch.arange(len(ACTIVATIONS), dtype=torch.int32, device=device)
    batch = make(tokens, slots=len(codes), device=device, activation=codes)
    assert_right(batch, batch.call())
    silu = replace(batch, activation="silu").call()
    of_silu = batch.ids == ACTIVATIONS.index("silu")
    # Not to the bit: a compiler may fuse other operations in a kernel that knows the activation.
    torch.testing.assert_close(batch.call()[of_silu], silu[of_silu])
    assert not torch.equal(batch.call()[~of_silu], silu[~of_silu])


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize(
    "options",
    [
        {"branch": False},
        {"biases": False},
        {"gain": False},
        {"runs": True},
        {"biases": False, "gain": False},
        {"biases": False, "gain": False, "reads": "branch"},
        {"rank": 0, "reads": "branch"},
    ],
    ids=str,
)
def test_grouped_what_may_be_absent(device, options, tokens):
    batch = make(tokens, device=device, **options)
    assert_right(batch, batch.call())


#: Slot ids of 24 tokens over 40 slots. A backend may choose different products for each.
PATTERNS = {
    "one": [7] * 24,
    "in order": list(range(3, 27)),
    "in order by twos": [slot for slot in range(3, 15) for _ in range(2)],
    "each its own": [(slot * 7) % 40 for slot in range(24)],
    "pairs apart": [slot for slot in range(0, 36, 3) for _ in range(2)],
    "runs apart": [slot for slot in (30, 2, 17, 9) for _ in range(6)],
    "threes": [slot for slot in (5, 6, 30, 20, 21, 2, 12, 13) for _ in range(3)],
    "a few, mixed": [(5, 31, 12)[token % 3] for token in range(24)],
    "some without": [-1 if token % 5 == 0 else token % 11 for token in range(24)],
    "none": [-1] * 24,
}


@pytest.mark.parametrize("into_branch", [False, True], ids=["out of place", "into branch"])
@pytest.mark.parametrize("options", [{}, {"biases": False}, {"reads": "branch"}], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_grouped_however_the_tokens_lie(device, pattern, weights, options, into_branch):
    ids = torch.tensor(PATTERNS[pattern], dtype=torch.int32, device=device)
    batch = make(24, 64, slots=40, device=device, **options)
    batch = replace(batch, ids=ids, downs=batch.downs.to(weights), ups=batch.ups.to(weights))
    if into_branch:
        branch = batch.branch.clone()
        out = replace(batch, branch=branch).call(into_branch=True)
        assert out is branch
        out = batch.residual + out
    else:
        out = batch.call()
    assert_right(batch, out)
    without = ids < 0
    assert torch.equal(out[without], (batch.residual + batch.branch)[without])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_grouped_tokens_without_adapter_or_gain_keep_every_bit(device, tokens, dtype):
    batch = make(tokens, dtype=dtype, device=device)
    for weights in (batch.downs, batch.ups, batch.down_biases, batch.up_biases):
        weights.fill_(torch.inf)  # so that any use of an adapter shows
    gain = batch.gain.clone()
    gain[::2] = 0
    batch = replace(batch, gain=gain)
    out = batch.call()
    untouched = (batch.ids < 0) | (gain == 0)
    assert 1 < untouched.sum() < tokens
    assert torch.equal(out[untouched], (batch.residual + batch.branch)[untouched])
    branch = batch.branch.clone()
    residual = batch.residual.clone()
    assert batch.call(into_branch=True) is batch.branch
    assert torch.equal(batch.branch[untouched], branch[untouched])
    assert torch.equal(batch.residual, residual)
    assert not torch.equal(batch.branch[~untouched], branch[~untouched])


def bits(t: Tensor) -> Tensor:
    return t.view({2: torch.int16, 4: torch.int32}[t.itemsize])


@pytest.mark.parametrize("into_branch", [False, True], ids=["out of place", "into branch"])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [1, FEW, MANY])
def test_grouped_zero_shift_keeps_a_negative_zero(device, tokens, dtype, rank, into_branch):
    """A hidden state of −0 stays −0 with adapters of zeros, although −0 + 0 is +0."""
    batch = make(tokens, rank=rank, dtype=dtype, device=device)
    batch = replace(batch, ids=batch.ids.clamp(min=0))
    for weights in (batch.ups, batch.up_biases):
        if weights is not None:
            weights.zero_()
            weights[:, ::2] *= -1
    batch.residual[:, :5], batch.branch[:, :5] = -0.0, -0.0
    expected = batch.branch.clone() if into_branch else batch.residual + batch.branch
    assert torch.equal(bits(batch.call(into_branch=into_branch)), bits(expected))


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("reads", READS)
def test_grouped_into_the_branch_of_an_unadded_pair(device, tokens, dtype, reads):
    batch = make(tokens, dtype=dtype, device=device, reads=reads)
    truth = batch.definition(torch.float64) - batch.residual.double().cpu()
    plain = batch.definition(dtype).double() - batch.residual.double().cpu()
    moved = replace(batch, branch=batch.branch.clone()).call(into_branch=True)
    assert relative_error(moved.cpu(), truth) <= 2 * relative_error(plain, truth) + 1e-6


@pytest.mark.parametrize("into_branch", [False, True], ids=["out of place", "into branch"])
@pytest.mark.parametrize("gain", [False, True], ids=["no gain", "gain"])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("tokens", [1, FEW, MANY])
def test_grouped_what_is_read_stays_as_it_is(device, tokens, rank, gain, into_branch):
    batch = make(tokens, rank=rank, gain=gain, device=device)
    batch = replace(batch, ids=batch.ids.clamp(min=0))
    before = {name: value.clone() for name, value in vars(batch).items() if isinstance(value, Tensor)}
    batch.call(into_branch=into_branch)
    for name, value in before.items():
        assert torch.equal(getattr(batch, name), value) != (into_branch and name == "branch"), name


def test_grouped_a_changed_branch_is_not_used_in_a_backward_pass_that_saved_it(device):
    batch = make(FEW, device=device)
    branch = batch.branch.clone().requires_grad_() * 1
    squares = branch.square()
    with torch.no_grad():
        replace(batch, branch=branch).call(into_branch=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.sum().backward()


@pytest.mark.parametrize("strides", [(0, 1), (40, 1)])
def test_grouped_rows_in_one_memory_are_not_written(device, strides):
    batch = make(FEW, device=device)
    branch = torch.randn(batch.branch.numel(), device=device).as_strided(batch.branch.shape, strides)
    before = branch.clone()
    with pytest.raises(ValueError, match="branch has strides .*; expected rows that can be written in place"):
        replace(batch, branch=branch).call(into_branch=True)
    assert torch.equal(branch, before)


@pytest.mark.parametrize("code", [-1, len(ACTIVATIONS)])
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_grouped_an_activation_that_is_none(device, tokens, code):
    batch = make(tokens, device=device)
    codes = torch.ones(len(batch.downs), dtype=torch.int32, device=device)
    batch = replace(batch, ids=torch.where(batch.ids == 0, -1, batch.ids), activation=codes)  # no token has slot 0
    expected = batch.call()
    codes[0] = code
    assert torch.equal(batch.call(), expected)
    batch.ids[-1] = 0
    if device.type == "cpu" and os.environ["FUSED_STEER_BACKEND"] == "torch":
        with pytest.raises(ValueError, match=f"activation has {code}; expected the indices 0 to 5"):
            batch.call()
        return
    found = batch.call()
    assert found[-1].isnan().all() and torch.equal(found[:-1], expected[:-1])


@pytest.mark.parametrize("reads", READS)
def test_grouped_one_adapter_for_all_is_the_op_of_one_adapter(device, reads):
    from fused_steer.kernels import post_block

    for tokens in (7, MANY):
        batch = make(tokens, device=device, reads=reads)
        batch = replace(batch, ids=torch.full_like(batch.ids, 3))
        one = post_block(
            batch.residual, batch.branch, batch.downs[3], batch.ups[3], down_bias=batch.down_biases[3],
            up_bias=batch.up_biases[3], gain=batch.gain, reads=reads,
        )  # fmt: skip
        assert relative_error(batch.call(), one.double()) <= 1e-6


def test_grouped_a_lower_rank_is_zeros_in_the_slot(device):
    batch = make(MANY, rank=8, biases=False, device=device)
    batch.downs[2, 3:], batch.ups[2, :, 3:] = 0, 0
    of_slot = batch.ids == 2
    ids = torch.where(of_slot, 0, -1).to(torch.int32)
    low = replace(batch, downs=batch.downs[2:3, :3], ups=batch.ups[2:3, :, :3], ids=ids).call()
    assert relative_error(batch.call()[of_slot], low[of_slot].double()) <= 1e-6


def test_grouped_rows_do_not_depend_on_the_others(device):
    batch = make(12, device=device)
    out = batch.call()
    for token in range(12):
        row = slice(token, token + 1)
        alone = replace(
            batch, residual=batch.residual[row], branch=batch.branch[row], ids=batch.ids[row], gain=batch.gain[row]
        )
        assert relative_error(alone.call(), out[row].double()) <= 1e-6


@pytest.mark.usefixtures("whole_gpu")
@pytest.mark.parametrize("into_branch", [False, True], ids=["out of place", "into branch"])
@pytest.mark.parametrize("few", [3, 0], ids=["a token a program", "tiles"])
def test_grouped_addresses_past_two_to_the_31(device, monkeypatch, few, into_branch):
    """Three rows lie 2³⁰ elements apart. The memory between them is never touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(grouped, "FEW_TOKENS", few)
    stride = 2**20 if grouped.select_backend(device) == "torch" else 2**30

    def spread(t: Tensor) -> Tensor:
        storage = torch.empty(2 * stride + t.shape[1], dtype=t.dtype, device=device)
        return storage.as_strided(t.shape, (stride, 1)).copy_(t)

    batch = make(3, 32, dtype=torch.bfloat16, device=device)
    batch = replace(batch, ids=torch.tensor([0, 3, 3], dtype=torch.int32, device=device))
    expected = replace(batch, branch=batch.branch.clone()).call(into_branch=into_branch)
    apart = replace(batch, residual=spread(batch.residual), branch=batch.branch.clone())
    assert torch.equal(apart.call(into_branch=into_branch), expected)
    apart = replace(batch, branch=spread(batch.branch))
    assert torch.equal(apart.call(into_branch=into_branch), expected)


def test_grouped_leading_dimensions_strides_and_wide_ids(device):
    flat = make(24, device=device)
    shaped = replace(
        flat,
        residual=flat.residual.view(2, 12, -1),
        branch=torch.cat([flat.branch, flat.branch], 1)[:, : flat.branch.shape[1]].view(2, 12, -1),
        ids=flat.ids.view(2, 12).long(),
        gain=flat.gain.view(2, 12),
        ups=flat.ups.transpose(1, 2).contiguous().transpose(1, 2),
    )
    out = shaped.call()
    assert out.shape == (2, 12, 96) and out.is_contiguous()
    assert torch.equal(out.view(24, -1), flat.call())
    assert torch.equal(out, shaped.call())
    empty = replace(
        flat, residual=flat.residual[:0], branch=flat.branch[:0], ids=flat.ids[:0], gain=flat.gain[:0]
    )  # fmt: skip
    assert empty.call().shape == (0, 96)


@pytest.mark.parametrize("gain", [None, 0.0, 0.5], ids=["no gain", "gain 0", "gain"])
def test_grouped_ids_out_of_range_are_an_error_or_nan(device, gain):
    for tokens in (5, MANY):
        batch = make(tokens, device=device, gain=gain is not None)
        if gain is not None:
            batch.gain[2] = gain  # 0 does not hide the error
        ids = batch.ids.clone()
        ids[2] = 5
        wrong = replace(batch, ids=ids)
        if grouped.select_backend(batch.residual.device) == "torch":
            with pytest.raises(ValueError, match="adapter_ids has 5; expected below 5"):
                wrong.call()
        else:
            out, right = wrong.call(), batch.call()
            assert out[2].isnan().all()
            others = torch.arange(tokens, device=device) != 2
            assert torch.equal(out[others], right[others])  # the other tokens are unaffected


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("into_branch", [False, True])
def test_grouped_registered_and_compiled(device, into_branch, reads):
    batch = make(6, device=device, reads=reads, activation=torch.arange(5, dtype=torch.int32, device=device))
    biases = (batch.down_biases, batch.up_biases)
    operands = (batch.downs, batch.ups, batch.ids, *biases, batch.activation, batch.gain, "", reads)
    ops = torch.ops.fused_steer
    op = ops.post_block_grouped_ if into_branch else ops.post_block_grouped
    # No test of gradients: the op refuses operands that require a gradient.
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(op, (batch.residual, batch.branch, *operands), test_utils=checks)

    def layer(batch: Batch) -> Tensor:
        return replace(batch, branch=batch.branch * 2).call(into_branch=into_branch) + 1

    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(batch), layer(batch))


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"ids": torch.zeros(4, dtype=torch.int32)},
            ValueError,
            r"adapter_ids is torch.int32 \(4,\); expected .* \(6,\)",
        ),
        ({"ids": torch.zeros(6)}, ValueError, "adapter_ids is torch.float32"),
        ({"downs": torch.zeros(5, 4, 64)}, ValueError, r"downs has shape \(5, 4, 64\); expected \(5, 4, 96\)"),
        ({"downs": torch.zeros(5, 257, 96)}, ValueError, "r 1 to 256"),
        ({"ups": torch.zeros(4, 96, 4)}, ValueError, r"ups has shape \(4, 96, 4\); expected \(5, 96, 4\)"),
        ({"ups": None}, ValueError, "ups is None but downs is given"),
        ({"downs": None, "ups": None}, ValueError, "down_biases is given without downs"),
        ({"downs": None, "ups": None, "up_biases": None}, ValueError, "are all None"),
        ({"activation": "swish"}, ValueError, "activation is 'swish'"),
        ({"activation": torch.zeros(4, dtype=torch.int32)}, ValueError, r"activation is torch.int32 \(4,\)"),
        ({"reads": "residual"}, ValueError, "reads is 'residual'; expected one of sum, branch"),
        ({"reads": "branch", "branch": None}, ValueError, "reads is 'branch' but branch is None; expected a branch"),
        ({"gain": torch.zeros(5)}, ValueError, r"gain has shape \(5,\); expected \(6,\)"),
        ({"residual": torch.zeros(6, 96, dtype=torch.float64)}, TypeError, "residual has dtype torch.float64"),
        ({"up_biases": torch.zeros(5, 96, device="meta")}, ValueError, "up_biases is on meta; expected cpu"),
        (
            {"ids": torch.zeros(6, dtype=torch.int32, device="meta")},
            ValueError,
            "adapter_ids is on meta; expected cpu",
        ),
        ({"residual": torch.tensor(1.0)}, ValueError, r"residual has shape \(\); expected \(\.\.\., d\)"),
        ({"downs": torch.tensor(1.0)}, ValueError, r"downs has shape \(\); expected \(A, r, 96\)"),
        ({"residual": [1.0]}, TypeError, "residual is a list; expected a tensor"),
        ({"ids": None}, TypeError, "adapter_ids is a NoneType; expected a tensor"),
        ({"gain": 0.5}, TypeError, "gain is a float; expected a tensor"),
        ({"activation": [0] * 5}, ValueError, "activation is a list; expected one of identity"),
    ],
    ids=str,
)
def test_grouped_what_does_not_fit(change, error, message):
    with pytest.raises(error, match=message) as caught:
        replace(make(6), **change).call()
    assert "\n" not in str(caught.value)


def test_grouped_what_cannot_be_written_in_place_or_differentiated():
    batch = make(6)
    with pytest.raises(TypeError, match="into_branch is 1; expected True or False"):
        batch.call(into_branch=1)
    with pytest.raises(ValueError, match="into_branch is True without a branch"):
        replace(batch, branch=None).call(into_branch=True)
    with pytest.raises(ValueError, match=r"branch has strides \(1, 6\); expected rows that can be written in place"):
        replace(batch, branch=batch.branch.T.contiguous().T).call(into_branch=True)
    with pytest.raises(RuntimeError, match="has no gradient; expected torch.no_grad"):
        replace(batch, residual=batch.residual.requires_grad_()).call()
    with torch.no_grad():
        batch.call()


# ---------------------------------------------------------------------------------------------------------------------
# Ahead of time


def test_grouped_every_target_compiles_it_without_spilling():
    cases = [
        [target, "bfloat16", hidden, rank, tokens, {"slots": 64, "everything": everything}]
        for target in TARGETS
        for hidden, rank, everything in ((4096, 8, False), (4096, 8, True), (4096, 256, True), (576, 8, True))
        for tokens in (64, 4096)
    ]
    rows = run_compiling("aot_worker.py", cases)
    assert len(rows) == 2 * len(cases)
    bad = [
        row
        for row in rows
        if row["spills"] or row["local"] or row["local_accesses"] or row["shared"] > SHARED_MEMORY[row["target"]]
    ]
    assert not bad, "\n".join(map(str, bad))
    tiles = [row for row in rows if row["kernel"].startswith("post_block_grouped_tile")]
    assert len(tiles) == len(rows) / 2 and all(row["tensor_core"] for row in tiles)


def test_grouped_launches_and_memory_do_not_grow_with_the_slots(monkeypatch):
    monkeypatch.undo()
    for tokens, kind in ((64, "token"), (4096, "tile")):
        few, many = (record_grouped(tokens, 4096, 8, slots, torch.bfloat16, "sm_90") for slots in (1, 1000))
        assert [launch.kernel.__name__ for launch in few] == [
            f"post_block_grouped_{kind}_{way}_kernel" for way in ("down", "up")
        ]
        assert [launch.grid for launch in few] == [launch.grid for launch in many]
        partial = [launch.arguments[launch.kernel.arg_names.index("p_partial")].shape for launch in (few[0], many[0])]
        assert partial[0] == partial[1]


def test_grouped_inside_a_transform_of_torch_func_is_refused(device):
    states, downs, ups = torch.ones(2, 3, 16), torch.ones(2, 4, 16), torch.ones(2, 16, 4)
    ids = torch.tensor([0, 1, -1], dtype=torch.int32)

    def steer(x: torch.Tensor) -> torch.Tensor:
        return grouped.post_block_grouped(x, None, downs.to(device), ups.to(device), ids.to(device))

    with (
        torch.no_grad(),
        pytest.raises(
            RuntimeError, match="inside a transform of torch.func or forward-mode differentiation; expected post_block"
        ),
    ):
        torch.func.vmap(steer)(states.to(device))
