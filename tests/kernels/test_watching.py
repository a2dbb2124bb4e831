"""Tests of the ops under modes of PyTorch's dispatcher, which see ops and not kernels: counters, logs, checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from fused_steer.kernels import post_block
from fused_steer.kernels.contract import Operands
from fused_steer.kernels.grouped import post_block_grouped
from fused_steer.kernels.grouped_norm import post_block_grouped_norm
from fused_steer.kernels.norm import rms_norm
from fused_steer.kernels.norm_torch import Norm
from fused_steer.kernels.packing import pack_adapter
from fused_steer.kernels.plan import Plan
from fused_steer.kernels.planned import PlannedPostBlock
from fused_steer.kernels.planned_norm import PlannedPostBlockNorm
from fused_steer.kernels.post_block_norm import post_block_norm
from ops import CALLS, Inputs, definition, make_inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

TOKENS, D, SLOTS = 5, 24, 3
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


class Log(TorchDispatchMode):
    """Notes the ops of this package that the dispatcher calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "fused_steer":
            self.seen.append(op._schema.name.removeprefix("fused_steer::"))
        return op(*args, **(kwargs or {}))


def steer(x: Inputs) -> tuple[Tensor, ...]:
    return (
        post_block(
            x.residual, x.branch, x.down, x.up, down_bias=x.down_bias, up_bias=x.up_bias, scale=x.scale, gain=x.gain,
            basis=x.basis, reads=x.reads,
        ),
    )  # fmt: skip


def steer_and_norm(x: Inputs) -> tuple[Tensor, ...]:
    return post_block_norm(
        x.residual, x.branch, x.down, x.up, norm_weight=None, eps=1e-5, down_bias=x.down_bias, up_bias=x.up_bias,
        scale=x.scale, gain=x.gain, basis=x.basis, reads=x.reads,
    )  # fmt: skip


def results(run: Callable[[Inputs], Sequence[Tensor]], inputs: Inputs) -> list[Tensor]:
    """Return the outputs and all gradients."""
    leaves = inputs.leaves()
    outputs = run(leaves)
    of = list(replace(leaves, basis=None).tensors().values())
    gradients = torch.autograd.grad(outputs, of, [output.detach().cos() for output in outputs])
    return [output.detach() for output in outputs] + list(gradients)


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


class Within(Log):
    looks_inside = True


@each_call
@pytest.mark.parametrize("run", [steer, steer_and_norm])
def test_watching_by_a_mode_that_looks_inside_changes_nothing(device, run, call):
    inputs = make_inputs(TOKENS, D, **call, device=device)
    expected = results(run, inputs)
    with Within() as log:
        assert_same(results(run, inputs), expected)
    assert log.seen == []
    with Within() as log, Log() as outer:
        assert_same(results(run, inputs), expected)
    assert log.seen == outer.seen and len(outer.seen) == 2


@each_call
@pytest.mark.parametrize(("name", "run"), [("post_block", steer), ("post_block_norm", steer_and_norm)])
def test_watching_sees_one_op_forward_and_one_backward_with_the_same_bits(device, name, run, call):
    inputs = make_inputs(TOKENS, D, **call, device=device)
    expected = results(run, inputs)
    with Log() as log, torch.no_grad():
        assert_same(run(inputs), expected[: len(run(inputs))])
    assert log.seen == [name] * 2
    with Log() as log:
        assert_same(results(run, inputs), expected)
    assert log.seen == [name, f"{name}_backward"]
    with Log() as log, Log() as inner:
        assert_same(results(run, inputs), expected)
    assert log.seen == inner.seen == [name, f"{name}_backward"]


def test_watching_of_a_part_of_a_step(device):
    """The mode is entered between forward and backward, or left there."""
    inputs = make_inputs(TOKENS, D, **CALLS["plain"], device=device).leaves()
    expected = results(steer, inputs)[1:]
    of = list(inputs.tensors().values())
    (out,) = steer(inputs)
    with Log() as log:
        assert_same(torch.autograd.grad(out, of, out.detach().cos()), expected)
    assert log.seen == ["post_block_backward"]
    with Log() as log:
        (out,) = steer(inputs)
    assert_same(torch.autograd.grad(out, of, out.detach().cos()), expected)
    assert log.seen == ["post_block"]


def test_watching_second_derivatives_are_those_without(device):
    inputs = make_inputs(TOKENS, D, **CALLS["plain"], device=device).leaves()

    def second(run: Callable[[Inputs], Sequence[Tensor]]) -> tuple[Tensor, ...]:
        (out,) = run(inputs)
        (slope,) = torch.autograd.grad(out.sin().sum(), inputs.residual, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), (inputs.down, inputs.up))

    expected = second(lambda x: (definition(x, "silu"),))
    with Log():
        found = second(steer)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@each_call
@pytest.mark.parametrize("run", [steer, steer_and_norm])
def test_watching_counts_the_flops_of_the_definition(device, run, call):
    inputs = make_inputs(TOKENS, D, **call, device=device)

    def defined(x: Inputs) -> tuple[Tensor, ...]:
        return (definition(x, "silu"),)

    for each in (inputs, replace(inputs, gain=None, scale=1.0)):
        again = 0 if each.basis is None or not call["rank"] else 4 * each.up.numel() * each.basis.shape[1]
        # The backward projects W2 again.
        assert flops(lambda each=each: results(run, each)) == flops(lambda each=each: results(defined, each)) + again
        with torch.no_grad():
            assert flops(lambda each=each: run(each)) == flops(lambda each=each: defined(each))


@pytest.mark.parametrize("wanted", ["residual", "down", "up", "down_bias", "up_bias", "gain", "scale"])
@pytest.mark.parametrize("run", [steer, steer_and_norm])
def test_watching_counts_the_flops_of_the_gradients_that_are_wanted(device, run, wanted):
    inputs = make_inputs(TOKENS, D, rank=3, basis=0, device=device)
    leaves = replace(inputs, **{wanted: getattr(inputs, wanted).detach().requires_grad_()})
    one = 2 * TOKENS * D * 3 * inputs.residual.numel() // (TOKENS * D)
    products = {"residual": 2, "down": 2, "up": 1, "down_bias": 1, "up_bias": 0, "gain": 1, "scale": 1}
    outputs = run(leaves)
    assert flops(lambda: torch.autograd.grad(outputs[0].sum(), getattr(leaves, wanted))) == products[wanted] * one


def grouped(device: torch.device) -> tuple[list[Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, D), (TOKENS, D), (SLOTS, 3, D), (SLOTS, D, 3))
    operands = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    ids = torch.tensor([0, 2, -1, 1, 2], device=device)
    return [*operands, ids], {"activation": "silu"}


@torch.no_grad()
@pytest.mark.parametrize("inside", [False, True], ids=["new", "in place"])
def test_watching_an_adapter_for_each_token(device, inside):
    def run(*, norm: bool) -> list[Tensor]:
        operands, options = grouped(device)
        if norm:
            return list(post_block_grouped_norm(*operands, norm_weight=None, eps=1e-5, in_place=inside, **options))
        return [post_block_grouped(*operands, into_branch=inside, **options)]

    for norm, name in ((False, "post_block_grouped"), (True, "post_block_grouped_norm")):
        expected = run(norm=norm)
        with Log() as log:
            assert_same(run(norm=norm), expected)
        assert log.seen == [name + "_" * inside]
        assert flops(lambda norm=norm: run(norm=norm)) == 2 * 2 * TOKENS * D * 3


def test_watching_a_norm_alone_sees_operations_of_pytorch(device):
    """It is no registered op."""

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)]

    x = make_inputs(TOKENS, D, **CALLS["plain"], device=device).residual
    weight = torch.linspace(-1, 1, D, device=device)
    expected = run(lambda x, weight: weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5))
    with Log() as log:
        found = run(lambda x, weight: rms_norm(x, weight, eps=1e-5))
    assert log.seen == []
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", [False, True], ids=["op", "norm"])
def test_watching_leaves_launch_plans(device, norm, monkeypatch):
    """A layer that has plans forward and backward is seen all the same, and goes by them again afterwards."""
    if os.environ["FUSED_STEER_BACKEND"] == "torch":
        pytest.skip("only kernels are planned")
    inputs = make_inputs(TOKENS, D, **CALLS["plain"], device=device).leaves()
    weights = (inputs.down, inputs.up)
    planned = (PlannedPostBlockNorm if norm else PlannedPostBlock)("silu", 1.0, (*weights, None, None))

    def step() -> list[Tensor]:
        if norm:
            outputs = planned.train(inputs.residual, inputs.branch, weights, Norm(None, 1e-5, False, True))
        else:
            outputs = (planned.train(inputs.residual, inputs.branch, *weights),)
        return [*outputs, *torch.autograd.grad(sum(out.sin().sum() for out in outputs), weights)]

    expected = step()
    assert_same(step(), expected)
    name = "post_block_norm" if norm else "post_block"
    made, make = [], Plan.make.__func__

    def counted(cls: Any, *arguments: Any) -> Any:
        made.append(arguments)
        return make(cls, *arguments)

    monkeypatch.setattr(Plan, "make", classmethod(counted))
    for _ in range(2):  # in the second step the op has plans of its own
        made.clear()
        with Log() as log:
            assert_same(step(), expected)
        assert log.seen == [name, f"{name}_backward"]
    assert not made[1:], "only the backward, which finds the op's plan, tried to make one"
    made.clear()
    assert_same(step(), expected)
    assert not made


def test_watching_leaves_packed_weights_to_the_kernels(device):
    """No op takes them."""
    if os.environ["FUSED_STEER_BACKEND"] == "torch":
        pytest.skip("only the kernels use packed weights")
    op = import_module("fused_steer.kernels.post_block")  # the package has a function of this name
    inputs = make_inputs(TOKENS, D, **CALLS["plain"], device=device)
    packed = pack_adapter(inputs.down, inputs.up, torch.float32)
    with Log() as log:
        op.forward(inputs.residual, inputs.branch, Operands(inputs.down, inputs.up, packed=packed), False)
    assert log.seen == []
