"""Tests of the grouped op with the RMSNorm that follows: each token's adapter, and the norm, by one launch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compiling import run_compiling
from fused_steer.kernels import grouped_norm
from fused_steer.kernels.aot import SHARED_MEMORY, hidden_states, record_grouped
from fused_steer.kernels.contract import READS
from fused_steer.kernels.grouped_norm import post_block_grouped_norm
from grouped_batches import Batch, make
from ops import relative_error
from torch import Tensor

FEW, MANY = 7, 41  # one program per token; one program per tile of tokens
KINDS = {
    "Llama": {"plus_one": False, "rounds_first": True},
    "Gemma": {"plus_one": True, "rounds_first": False},
    "OLMo": {"plus_one": False, "rounds_first": False},
}


@pytest.fixture(autouse=True)
def both_schedules_at_test_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    set_few(monkeypatch, 8)
    monkeypatch.setattr(grouped_norm, "_plans", {})  # a plan of another test may have another schedule


def set_few(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Give each token its own program up to so many tokens."""
    device_of = grouped_norm.device_of
    monkeypatch.setattr(grouped_norm, "TOKENS_A_MULTIPROCESSOR", tokens)
    monkeypatch.setattr(grouped_norm, "device_of", lambda tensor: replace(device_of(tensor), multiprocessors=1))


def weight_for(batch: Batch, dtype: torch.dtype | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(batch.residual.shape[-1], generator=generator) / 4 + 0.75
    return weight.to(batch.residual.device, dtype or batch.residual.dtype)


def call(batch: Batch, weight: Tensor | None, eps: float = 1e-5, in_place: bool = False, **kind: bool):
    return post_block_grouped_norm(
        batch.residual, batch.branch, batch.downs, batch.ups, batch.ids, norm_weight=weight, eps=eps,
        down_biases=batch.down_biases, up_biases=batch.up_biases, activation=batch.activation, gain=batch.gain,
        reads=batch.reads, in_place=in_place, **kind,
    )  # fmt: skip


def normalised(x: Tensor, weight: Tensor | None, dtype: torch.dtype, eps: float = 1e-5, plus_one=False) -> Tensor:
    """Compute the norm by its formula."""
    wide = x.to(dtype)
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return unit if weight is None else unit * (weight.cpu().to(dtype) + plus_one)


def assert_right(batch: Batch, weight: Tensor | None, found: tuple[Tensor, Tensor], plus_one: bool = False) -> None:
    """Assert that each error from float64 is at most twice that of the formula in the batch's dtype, plus 1e-6."""
    truth, plain = (batch.definition(dtype) for dtype in (torch.float64, batch.residual.dtype))
    dtype = batch.residual.dtype
    both = [(truth, plain)]
    of_norm = normalised(truth, weight, torch.float64, plus_one=plus_one)
    both.append((of_norm, normalised(plain, weight, torch.float32, plus_one=plus_one).to(dtype)))
    for result, (exact, rounded) in zip(found, both, strict=True):
        assert result.dtype == dtype and result.shape == batch.residual.shape
        assert relative_error(result.cpu(), exact) <= 2 * relative_error(rounded, exact) + 1e-6


@pytest.mark.parametrize(
    ("dtype", "kind", "in_place"),
    [
        (torch.float32, "Llama", False),
        (torch.bfloat16, "Llama", True),
        (torch.bfloat16, "Gemma", False),
        (torch.float16, "OLMo", True),
        (torch.float16, "Gemma", False),
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [1, FEW, MANY])
def test_grouped_norm_equals_the_formula(device, tokens, dtype, kind, in_place):
    batch = make(tokens, 100, dtype=dtype, device=device)
    weight, before = weight_for(batch), replace(batch, residual=batch.residual.clone(), branch=batch.branch.clone())
    found = call(batch, weight, in_place=in_place, **KINDS[kind])
    assert_right(before, weight, found, KINDS[kind]["plus_one"])
    assert (found[0] is batch.residual and found[1] is batch.branch) == in_place
    if not in_place:
        assert torch.equal(batch.residual, before.residual) and torch.equal(batch.branch, before.branch)


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize(
    "options",
    [
        {"branch": False},
        {"biases": False},
        {"gain": False},
        {"runs": True},
        {"biases": False, "gain": False, "reads": "branch"},
        {"rank": 0},
        {"rank": 0, "reads": "branch", "gain": False},
        {"rank": 1},
        {"rank": 12, "hidden": 64},
        {"rank": 64, "hidden": 64},
        {"activation": "gelu_tanh"},
        {"activation": "codes"},
    ],
    ids=str,
)
def test_grouped_norm_forms(device, options, tokens):
    if options.get("activation") == "codes":
        options = options | {"slots": 6, "activation": torch.arange(6, dtype=torch.int32, device=device)}
    batch = make(tokens, device=device, **options)
    weight = weight_for(batch)
    assert_right(batch, weight, call(batch, weight))


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_grouped_norm_without_a_weight_or_with_one_of_another_dtype(device, tokens):
    batch = make(tokens, dtype=torch.bfloat16, device=device)
    assert_right(batch, None, call(batch, None))
    weight = weight_for(batch, torch.float32)
    assert_right(batch, weight, call(batch, weight, rounds_first=False))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)], ids=str)
def test_grouped_norm_is_as_exact_as_the_dtype_of_the_sum(device, dtypes):
    batch = make(MANY, device=device)
    batch = replace(batch, residual=batch.residual.to(dtypes[0]), branch=batch.branch.to(dtypes[1]))
    out, normed = call(batch, None)
    truth = batch.definition(torch.float64)
    assert out.dtype == normed.dtype == torch.float32
    assert relative_error(out.cpu(), truth) <= 1e-6
    assert relative_error(normed.cpu(), normalised(truth, None, torch.float64)) <= 1e-6


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_grouped_norm_is_the_grouped_op_and_the_norm(device, tokens, reads):
    """`out` is that of the op without the norm, and `normed` is the norm of `out` as it is in memory."""
    for dtype in (torch.float32, torch.bfloat16):
        batch = make(tokens, dtype=dtype, device=device, reads=reads)
        weight = weight_for(batch)
        out, normed = call(batch, weight)
        assert relative_error(out, batch.call().double()) <= 2 * torch.finfo(dtype).eps
        expected = normalised(out.cpu(), weight, torch.float64)
        assert relative_error(normed.cpu(), expected) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in place"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_grouped_norm_tokens_without_adapter_or_gain_keep_every_bit(device, tokens, dtype, in_place):
    batch = make(tokens, dtype=dtype, device=device)
    for weights in (batch.downs, batch.ups, batch.down_biases, batch.up_biases):
        weights.fill_(torch.inf)  # so that any use of an adapter shows
    gain = batch.gain.clone()
    gain[::2] = 0
    batch = replace(batch, gain=gain)
    untouched = (batch.ids < 0) | (gain == 0)
    assert 1 < untouched.sum() < tokens
    expected = (batch.residual + batch.branch)[untouched]
    weight = weight_for(batch)
    alone = replace(batch, ids=torch.full_like(batch.ids, -1))
    without = call(replace(alone, residual=alone.residual.clone(), branch=alone.branch.clone()), weight)
    out, normed = call(batch, weight, in_place=in_place)
    assert torch.equal(out[untouched], expected)
    assert torch.equal(normed[untouched], without[1][untouched])
    assert not out[~untouched].isfinite().any()


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_grouped_norm_zero_shift_keeps_a_negative_zero(device, tokens):
    batch = make(tokens, dtype=torch.bfloat16, device=device)
    batch = replace(batch, ids=batch.ids.clamp(min=0))
    for weights in (batch.ups, batch.up_biases):
        weights.zero_()
        weights[:, ::2] *= -1
    batch.residual[:, :5], batch.branch[:, :5] = -0.0, -0.0
    out, _ = call(batch, weight_for(batch))
    assert torch.equal(out.view(torch.int16), (batch.residual + batch.branch).view(torch.int16))


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_grouped_norm_normalises_out_as_it_is_rounded_in_memory(device, tokens):
    """In bfloat16 256 + 1 is 256. Divided by its root mean square it is 1; divided by that of 257 it would be less."""
    batch = make(tokens, dtype=torch.bfloat16, device=device)
    batch = replace(batch, ids=torch.full_like(batch.ids, -1))
    batch.residual[:, :], batch.branch[:, :] = 256, 1
    out, normed = call(batch, None)
    assert (out == 256).all() and (normed == 1).all()


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_grouped_norm_a_row_that_nearly_cancels_is_right(device, tokens):
    """The shift takes all but a thousandth of the state away, so that Σ out² is small beside |x|²."""
    batch = make(tokens, 64, 0, gain=False, device=device)
    batch = replace(batch, ids=batch.ids.clamp(min=0))
    small = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(2)).to(device) / 1000
    batch.residual.copy_(small - batch.up_biases[batch.ids.long()] - batch.branch)
    weight = weight_for(batch)
    assert_right(batch, weight, call(batch, weight))


def test_grouped_norm_a_slot_that_is_not_there(device):
    """On the torch backend it is an error. A kernel makes the token's output NaN and touches no other token."""
    for tokens in (FEW, MANY):
        batch = make(tokens, device=device)
        batch.ids[2] = 5
        weight = weight_for(batch)
        if grouped_norm.select_backend(batch.residual.device) == "torch":
            with pytest.raises(ValueError, match="adapter_ids has 5; expected below 5"):
                call(batch, weight)
            continue
        good = replace(batch, ids=torch.where(batch.ids == 5, -1, batch.ids))
        for found, expected in zip(call(batch, weight), call(good, weight), strict=True):
            rest = torch.arange(tokens, device=device) != 2
            assert found[2].isnan().all() and torch.equal(found[rest], expected[rest])


def test_grouped_norm_shapes_strides_and_no_tokens(device):
    flat = make(24, device=device)
    weight = weight_for(flat)
    expected = call(flat, weight)
    wide = torch.zeros(24, 200, device=device)
    wide[:, :96] = flat.residual
    shaped = replace(
        flat, residual=flat.residual.view(4, 6, 96), branch=flat.branch.view(4, 6, 96), ids=flat.ids.view(4, 6).long(),
        gain=flat.gain.view(4, 6),
    )  # fmt: skip
    for other in (shaped, replace(flat, residual=wide[:, :96])):
        for found, exact in zip(call(other, weight), expected, strict=True):
            assert found.shape == other.residual.shape and found.is_contiguous()
            assert torch.equal(found.view(24, 96), exact)
    strided = replace(flat, residual=wide[:, :96], branch=flat.branch.clone())
    for found, exact in zip(call(strided, weight, in_place=True), expected, strict=True):
        assert torch.equal(found, exact)
    assert torch.equal(wide[:, :96], expected[0]) and (wide[:, 96:] == 0).all()
    none = make(0, device=device)
    assert [t.shape for t in call(none, weight, in_place=True)] == [(0, 96)] * 2


@pytest.mark.usefixtures("whole_gpu")
@pytest.mark.parametrize("few", [3, 0], ids=["a token a program", "tiles"])
def test_grouped_norm_addresses_past_two_to_the_31(device, monkeypatch, few):
    """Three rows lie 2³⁰ elements apart. The memory between them is never touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    set_few(monkeypatch, few)
    stride = 2**20 if grouped_norm.select_backend(device) == "torch" else 2**30

    def spread(t: Tensor) -> Tensor:
        storage = torch.empty(2 * stride + t.shape[1], dtype=t.dtype, device=device)
        return storage.as_strided(t.shape, (stride, 1)).copy_(t)

    batch = make(3, 32, dtype=torch.bfloat16, device=device)
    batch = replace(batch, ids=torch.tensor([0, 3, 3], dtype=torch.int32, device=device))
    weight = weight_for(batch)
    expected = call(batch, weight)
    apart = replace(batch, residual=spread(batch.residual), branch=spread(batch.branch))
    for found, exact in zip(call(apart, weight, in_place=True), expected, strict=True):
        assert torch.equal(found, exact)


def test_grouped_norm_is_one_launch_of_four_units():
    for tokens, kind in ((8, "token"), (8192, "tile")):
        (launch,) = record_grouped(tokens, 4096, 8, 4, torch.bfloat16, "sm_80", norm=True)
        assert launch.kernel.__name__ == f"post_block_grouped_{kind}_norm_kernel"
        assert sorted(hidden_states(launch)) == ["p_branch", "p_normed", "p_out", "p_residual"]


def test_grouped_norm_every_target_compiles_it_without_spilling():
    cases = [
        [target, dtype, 4096, rank, tokens, {"slots": 8, "everything": everything, "norm": True}]
        for target in ("sm_80", "sm_90")
        for dtype in ("bfloat16", "float16")
        for rank, everything in ((0, True), (8, True), (8, False), (64, True), (256, False))
        for tokens in (8, 8192)
    ]
    rows = run_compiling("aot_worker.py", cases)
    assert len(rows) == len(cases)
    for row in rows:
        assert not row["spills"] and not row["local"] and not row["local_accesses"], row
        assert row["shared"] <= SHARED_MEMORY[row["target"]], row


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"eps": -1.0}, ValueError, "eps is -1.0; expected a number of at least 0"),
        ({"eps": torch.ones(2, 2)}, ValueError, "eps is a Tensor; expected a number of at least 0"),
        ({"eps": 10**400}, ValueError, "eps is 10000.*; expected a number of at least 0, in float32"),
        ({"rounds_first": torch.ones(2)}, TypeError, "rounds_first is a Tensor; expected True or False"),
        ({"plus_one": "no"}, TypeError, "plus_one is 'no'; expected True or False"),
        ({"in_place": 1}, TypeError, "in_place is 1; expected True or False"),
        ({"norm_weight": [1.0] * 96}, TypeError, "norm_weight is a list; expected a tensor"),
        ({"norm_weight": torch.ones(5)}, ValueError, r"norm_weight has shape \(5,\); expected \(96,\)"),
        ({"norm_weight": None, "plus_one": True}, ValueError, "plus_one is True but norm_weight is None"),
        ({"branch": None, "in_place": True}, ValueError, "in_place is True without a branch"),
        ({"branch": torch.ones(7, 96).half(), "in_place": True}, TypeError, "in_place with residual torch.float32"),
        ({"residual": torch.ones(96, 7).t(), "in_place": True}, ValueError, r"residual has strides \(1, 7\)"),
        ({"reads": "both"}, ValueError, "reads is 'both'; expected one of sum, branch"),
        ({"adapter_ids": torch.zeros(6, dtype=torch.int32)}, ValueError, r"adapter_ids is torch.int32 \(6,\)"),
        ({"residual": torch.ones(7, 96).double()}, TypeError, "residual has dtype torch.float64"),
        ({"residual": torch.ones(7, 96).requires_grad_()}, RuntimeError, "post_block_grouped_norm has no gradient"),
        ({"norm_weight": torch.ones(96).requires_grad_()}, RuntimeError, "post_block_grouped_norm has no gradient"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_grouped_norm_refuses_in_one_line(change, error, message):
    batch = make(FEW)
    given = {
        "residual": batch.residual, "branch": batch.branch, "downs": batch.downs, "ups": batch.ups,
        "adapter_ids": batch.ids, "norm_weight": torch.ones(96), "eps": 1e-5,
    } | change  # fmt: skip
    before = [given[name].clone() for name in ("residual", "branch") if given[name] is not None]
    with pytest.raises(error, match=message) as refused:
        post_block_grouped_norm(**given)
    assert "\n" not in str(refused.value)
    after = [given[name] for name in ("residual", "branch") if given[name] is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_grouped_norm_refuses_one_memory_for_both(device):
    batch = make(FEW, device=device)
    with pytest.raises(ValueError, match="in_place with residual and branch in one memory"):
        call(replace(batch, branch=batch.residual), weight_for(batch), in_place=True)
    rows, hidden = batch.residual.shape
    memory = torch.randn((rows + 1) * 2 * hidden, dtype=batch.residual.dtype, device=device)

    def part(start: int, stride: int) -> Tensor:
        return memory[start:].as_strided((rows, hidden), (stride, 1))

    for start, stride in ((hidden, hidden), (hidden - 1, 2 * hidden), (hidden + 1, 2 * hidden)):
        for two in ((part(0, stride), part(start, stride)), (part(start, stride), part(0, stride))):
            overlapping = replace(batch, residual=two[0], branch=two[1])
            with pytest.raises(ValueError, match="in_place with residual and branch in one memory"):
                call(overlapping, weight_for(batch), in_place=True)
    halves = replace(batch, residual=part(0, 2 * hidden), branch=part(hidden, 2 * hidden))
    expected = call(halves, weight_for(batch))
    for found, exact in zip(call(halves, weight_for(batch), in_place=True), expected, strict=True):
        assert torch.equal(found, exact)


@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in place"])
def test_grouped_norm_in_a_compiled_graph(in_place):
    batch = make(FEW)
    weight = weight_for(batch)
    expected = call(batch, weight)

    def run(residual: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        return call(replace(batch, residual=residual * 1, branch=branch * 1), weight, in_place=in_place)

    for found, exact in zip(torch.compile(run, fullgraph=True)(batch.residual, batch.branch), expected, strict=True):
        assert torch.equal(found, exact)


def test_grouped_norm_goes_by_a_plan(device, monkeypatch):
    """Later calls of a kind start the recorded launch with their own tensors."""
    monkeypatch.setattr(grouped_norm, "_plans", {})
    batches = [make(FEW, device=device, seed=seed) for seed in range(3)]
    weight = weight_for(batches[0])
    expected = [call(batch, weight) for batch in batches[:1]]
    if grouped_norm.select_backend(batches[0].residual.device) == "torch":
        assert not grouped_norm._plans
        return
    (plan,) = grouped_norm._plans.values()
    monkeypatch.setattr(grouped_norm, "triton_grouped_norm", None)  # a call without a plan fails
    expected.append(call(batches[1], weight))
    assert_right(batches[0], weight, expected[0])
    assert_right(batches[1], weight, expected[1])
    assert list(grouped_norm._plans.values()) == [plan]
