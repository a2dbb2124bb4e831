"""Tests of calls that are traced instead of run: fake tensors, meta tensors, make_fx. torch.jit.trace is refused.

The tests of each op cover torch.compile and torch.export.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_steer.kernels import grouped, launch, post_block
from fused_steer.kernels.grouped import Routing, post_block_grouped, post_block_routed
from fused_steer.kernels.planned import PlannedPostBlock
from ops import make_inputs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

D, R = 32, 4
Operands = tuple[Tensor, Tensor, Tensor, Tensor]  # residual, branch, W1, W2


def draw(device: torch.device, tokens: int = 6) -> Operands:
    inputs = make_inputs(tokens, D, rank=R, biases=False, gain=False, scale=False, basis=0, device=device)
    return inputs.residual, inputs.branch, inputs.down, inputs.up


def reading(residual: Tensor, branch: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return post_block(residual, branch, down, up, reads="branch")


def planned(residual: Tensor, branch: Tensor, *weights: Tensor) -> Tensor:
    op = PlannedPostBlock("silu", 0.5, (*weights, None, None))
    return (op.train if torch.is_grad_enabled() else op.infer)(residual, branch, *weights)


def slots(residual: Tensor, down: Tensor, up: Tensor) -> Operands:
    """Make W1 and W2 of three slots, the tokens' slots, and their gains."""
    downs, ups = torch.stack([down, down * 2, -down]), torch.stack([up, -up, up])
    return downs, ups, (residual[:, 0] > 0).int() * 3 - 1, residual[:, 1].clone()


def by_tokens(residual: Tensor, branch: Tensor, down: Tensor, up: Tensor) -> Tensor:
    downs, ups, ids, gain = slots(residual, down, up)
    return post_block_grouped(residual, branch, downs, ups, ids, gain=gain)


def into_branch(residual: Tensor, branch: Tensor, down: Tensor, up: Tensor) -> Tensor:
    downs, ups, ids, _ = slots(residual, down, up)
    return post_block_grouped(residual, branch.clone(), downs, ups, ids, into_branch=True)


def routed(residual: Tensor, branch: Tensor, down: Tensor, up: Tensor) -> Tensor:
    downs, ups, ids, gain = slots(residual, down, up)
    return post_block_routed(residual, branch, (downs, ups, None, None, "relu"), Routing(ids, gain))


def inference(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    def call(*operands: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (function(*operands),)

    return call


def training(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Return a function that computes the output and the gradient of each operand."""

    def call(*operands: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in operands]
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)

    return call


CALLS = {f.__name__: inference(f) for f in (post_block, reading, planned, by_tokens, into_branch, routed)}
CALLS |= {f"{f.__name__}, training": training(f) for f in (post_block, reading, planned)}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@pytest.fixture
def forbid_runs(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function; after its call every launch and every pass of the torch backend is an error."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a call without values was run")

    def forbid() -> None:
        op = importlib.import_module("fused_steer.kernels.post_block")
        for way in ("_FORWARD", "_BACKWARD"):
            monkeypatch.setattr(op, way, dict.fromkeys(("triton", "torch"), refuse))
        for name in ("triton_grouped", "grouped_forward", "plan_tokens"):
            monkeypatch.setattr(grouped, name, refuse)
        monkeypatch.setattr(launch, "on_device", refuse)

    return forbid


def assert_like(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@each_call
def test_tracing_fake_tensors_run_nothing(device, call, forbid_runs):
    operands = draw(device)
    expected = call(*operands)
    forbid_runs()
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in operands]
        inside = call(*fake)
    for found in (inside, call(*fake)):  # inside and outside of the fake tensors' mode
        assert_like(found, expected)
        assert all(isinstance(t, FakeTensor) and t.device.type == device.type for t in found)


@each_call
def test_tracing_meta_tensors_run_nothing(device, call, forbid_runs):
    operands = draw(device)
    expected = call(*operands)
    forbid_runs()
    found = call(*(t.to("meta") for t in operands))
    assert_like(found, expected)
    assert all(t.is_meta for t in found)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@each_call
def test_tracing_make_fx_records_the_op(device, call, mode):
    graph = make_fx(call, tracing_mode=mode)(*draw(device))
    ops = [str(node.target) for node in graph.graph.nodes if "fused_steer" in str(node.target)]
    assert len(ops) == (2 if "backward" in str(ops) else 1), "one node for a pass"
    operands = [t * 1.5 for t in draw(device, 9 if mode == "symbolic" else 6)]
    for found, expected in zip(graph(*operands), call(*operands), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
def test_tracing_make_fx_passes_a_plan_by(device, trained):
    """make_fx traces with real tensors, for which plans exist. It cannot see a plan's launches, so no plan is used."""
    operands = draw(device)
    op = PlannedPostBlock("silu", 0.5, (*operands[2:], None, None))

    def call(*operands: Tensor) -> tuple[Tensor, ...]:
        residual, branch, *weights = operands
        last = op.last_trained if trained else op.last  # as a layer calls it
        out = last(residual, branch, tuple(weights))
        return out if out is not None else (op.train if trained else op.infer)(residual, branch, *weights)

    call = (training if trained else inference)(call)
    expected = call(*operands)
    graph = make_fx(call, tracing_mode="real")(*operands)
    assert any("fused_steer" in str(node.target) for node in graph.graph.nodes)
    for found, value in zip(graph(*operands), expected, strict=True):
        assert torch.equal(found, value)


@each_call
def test_tracing_jit_trace_is_refused(device, call):
    operands = draw(device)
    call(*operands)
    with pytest.raises(RuntimeError, match="torch.jit.trace cannot record .*; expected torch.export") as error:
        torch.jit.trace(call, operands, check_trace=False)
    assert "\n" not in str(error.value)
