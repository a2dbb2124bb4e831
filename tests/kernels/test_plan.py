"""Tests of launch plans: a planned call gives the ordinary call's bits, and a plan is used only for calls that it fits.

Numbers come from Triton's interpreter, where plans take tensors in place of addresses. Addresses, streams, devices and
launch hooks exist only in real launches; plan_worker.py tests them over the stub driver in a subprocess.
"""

from __future__ import annotations

import copy
import importlib
import io
import itertools
import json
import os
import pickle
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from fused_steer.kernels import inductor, planned, post_block
from fused_steer.kernels import plan as plans
from fused_steer.kernels.grouped import Routing, post_block_grouped
from fused_steer.kernels.launch import recorded
from fused_steer.kernels.norm_torch import Norm
from fused_steer.kernels.planned import PlannedPostBlock
from fused_steer.kernels.planned_norm import PlannedPostBlockNorm
from fused_steer.kernels.post_block import start_inference
from fused_steer.kernels.post_block_norm import post_block_norm
from fused_steer.kernels.schedule import RESIDENT_RANK, TARGETS
from hardware import HAS_GPU
from packaging.version import Version
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint
from triton.runtime.interpreter import GridExecutor

from fused_steer import SteerConfig, patch_model
from fused_steer.adapters.factors import Adapter
from fused_steer.model.site import SteeringSite
from fused_steer.serving.slots import Slots

D, R, SCALE = 32, 4, 0.7
BF16, F32 = torch.bfloat16, torch.float32
PARTS = ("steer_down.weight", "steer_up.weight", "steer_down.bias", "steer_up.bias")


@pytest.fixture(params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Return the device on which kernels run. The torch backend has no plans."""
    if request.param == "cpu" and HAS_GPU:
        pytest.skip("kernels are compiled here, not interpreted")
    monkeypatch.setenv("FUSED_STEER_BACKEND", "triton")
    return torch.device(request.param)


class Made(list):
    """A list with an entry per ordinary call: the plan that it made, or None."""

    def none(self, call: Callable[[], Any]) -> Any:
        """Return the result of a call, and assert that it used a plan."""
        before = len(self)
        result = call()
        assert len(self) == before, "a plan was made although one existed"
        return result

    def new(self, call: Callable[[], Any]) -> Any:
        """Return the result of a call, and assert that no earlier plan fitted it."""
        before = len(self)
        result = call()
        assert len(self) > before and None not in self[before:], "no plan was made"
        return result


@pytest.fixture(autouse=True)
def no_shared_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test start the plans that all callers share, made by the tests before it."""
    for module in ("planned", "planned_norm"):
        for plans_of_all in ("_inference", "_trained"):
            monkeypatch.setattr(f"fused_steer.kernels.{module}.{plans_of_all}", {})
    monkeypatch.setattr("fused_steer.serving.slots._shared", {})


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    found, make = Made(), plans.Plan.make.__func__

    def counted(cls: Any, *arguments: Any) -> Any:
        results, plan = make(cls, *arguments)
        found.append(plan)
        return results, plan

    monkeypatch.setattr(plans.Plan, "make", classmethod(counted))
    return found


@pytest.fixture
def one_kernel_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lock Triton's interpreter. It changes the whole process while it runs a kernel, so threads need a lock."""
    run, lock = GridExecutor.__call__, threading.Lock()

    def locked(*arguments: Any, **constants: Any) -> Any:
        with lock:
            return run(*arguments, **constants)

    monkeypatch.setattr(GridExecutor, "__call__", locked)


def normal(*shape: int, device: torch.device, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def states(tokens: int, device: torch.device, dtype: torch.dtype = F32, seed: int = 1) -> tuple[Tensor, Tensor]:
    return tuple(normal(2, tokens, D, device=device, dtype=dtype, seed=seed + place) for place in (0, 1))


def tensors(down_bias: bool = False, up_bias: bool = False, rank: int = R, seed: int = 5) -> dict[str, Tensor]:
    shapes = ((rank, D), (D, rank), (rank,), (D,))
    there = (rank > 0, rank > 0, down_bias, up_bias)
    return {
        name: normal(*shape, device="cpu", seed=seed + place) / 4
        for place, (name, shape, given) in enumerate(zip(PARTS, shapes, there, strict=True))
        if given
    }


def make_site(device: torch.device, name: str = "default", **options: Any) -> SteeringSite:
    site = SteeringSite()
    site.attach(name, Adapter.of_tensors(tensors(**options)))
    site.use(name, "silu", SCALE)
    return site.to(device)


def parts(site: SteeringSite) -> list[Tensor | None]:
    down, up = site.steer_down[site.active], site.steer_up[site.active]
    return [down.weight, up.weight, down.bias, up.bias]


def ordinary(site: SteeringSite, residual: Tensor, branch: Tensor | None) -> Tensor:
    """Compute the site's output without a plan."""
    w1, w2, b1, b2 = parts(site)
    options = {"down_bias": b1, "up_bias": b2, "activation": site.activation, "scale": site.scale}
    return post_block(residual, branch, w1, w2, **options)


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype and found.stride() == expected.stride() and torch.equal(found, expected)


def assert_steers(site: SteeringSite, *operands: Tensor | None) -> None:
    assert_same(site(*operands), ordinary(site, *operands))


# ---------------------------------------------------------------------------------------------------------------------
# Inference


ADAPTERS = {
    "plain": {},
    "down bias": {"down_bias": True},
    "biases": {"down_bias": True, "up_bias": True},
    "vector": {"rank": 0, "up_bias": True},
    "named": {"name": "another"},
}


@pytest.mark.parametrize("finished", [False, True], ids=["branch", "finished"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@torch.no_grad()
def test_plan_second_call_goes_by_the_plan_of_the_first(device, made, adapter, finished):
    site = make_site(device, **ADAPTERS[adapter])
    for seed in (1, 2):
        residual, branch = states(5, device, seed=seed)
        operands = (residual, None if finished else branch)
        (made.new if seed == 1 else made.none)(lambda operands=operands: assert_steers(site, *operands))
    assert site.backend == "triton" and site.calls == 2
    found = [made.none(lambda: site(*operands)) for _ in range(2)]
    assert found[0].data_ptr() != found[1].data_ptr()  # each call has its own result


class OfTokens:
    """The gain of each token in place of `serving.gains.Gains`: other tokens are steered in each pass."""

    def __init__(self) -> None:
        self.passes = 0

    def gain(self, shape: torch.Size, device: torch.device) -> Tensor:
        return (torch.arange(shape[:2].numel(), device=device).view(shape[:2]) + self.passes) % 3 / 2

    def of(self, residual: Tensor, entering: Tensor | None) -> Tensor:
        self.passes += 1
        return self.gain(residual.shape, residual.device)


@pytest.mark.parametrize("graded", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_plan_takes_the_gain_of_each_token(device, made, adapter, graded):
    """The gain of each pass is read, by the forward and by its backward, with and without gradients."""
    site = make_site(device, **ADAPTERS[adapter])
    site.use(site.active, "silu", SCALE, OfTokens())
    grad = normal(2, 5, D, device=device, seed=9)
    with torch.set_grad_enabled(graded):
        for seed in (1, 2):
            found, expected = ([x.requires_grad_(graded) for x in states(5, device, seed=seed)] for _ in range(2))

            def call(found=found) -> Tensor:
                out = site(*found)
                if graded:
                    out.backward(grad)
                return out

            out = (made.new if seed == 1 else made.none)(call)
            taken = [None if p.grad is None else p.grad.clone() for p in site.parameters()]
            site.zero_grad()
            w1, w2, b1, b2 = parts(site)
            other = post_block(
                *expected, w1, w2, down_bias=b1, up_bias=b2, activation="silu", scale=SCALE,
                gain=site.gains.gain(out.shape, device),
            )  # fmt: skip
            assert_same(out, other)
            if graded:
                other.backward(grad)
                assert all(torch.equal(x.grad, y.grad) for x, y in zip(found, expected, strict=True))
                assert all(torch.equal(p.grad, g) for p, g in zip(site.parameters(), taken, strict=True))
                site.zero_grad()


@torch.no_grad()
def test_plan_several_shapes_are_planned_at_once_and_the_oldest_leaves(device, made):
    op = PlannedPostBlock("silu", SCALE, (torch.empty(0), torch.empty(0), None, None))
    w1, w2 = (t.to(device) for t in tensors().values())

    def call(tokens: int) -> None:
        residual, branch = states(tokens, device)
        expected = post_block(residual, branch, w1, w2, activation="silu", scale=SCALE)
        assert_same(op.infer(residual, branch, w1, w2), expected)

    for tokens in (1, 5, 3):
        made.new(lambda tokens=tokens: call(tokens))
    for tokens in (3, 1, 5, 1):
        made.none(lambda tokens=tokens: call(tokens))
    for number in range(29):  # at most 32 plans are kept
        plans.keep(op._inference, number, plans.no_plan)
    made.none(lambda: call(5))
    plans.keep(op._inference, 29, plans.no_plan)
    made.none(lambda: call(5))
    assert (2, states(1, device)[0].shape) not in op._inference
    made.none(lambda: call(1))  # all callers share this one
    planned._inference.clear()
    op._inference.clear()
    made.new(lambda: call(1))


@pytest.mark.parametrize("training", [False, True])
def test_plan_callers_of_a_kind_start_the_same_plan(device, made, training):
    def results(run: Callable[..., Tensor], operands: list[Tensor]) -> tuple[Tensor, ...]:
        out = run(*operands)
        return (out, *torch.autograd.grad(out, operands, torch.ones_like(out))) if training else (out,)

    def call(seed: int, activation: str = "silu", scale: float = SCALE, reads: str = "sum", tokens: int = 5) -> None:
        weights = [t.to(device) for t in tensors(seed=seed).values()]
        operands = [t.requires_grad_(training) for t in (*states(tokens, device, seed=seed), *weights)]
        op = PlannedPostBlock(activation, scale, (*weights, None, None), reads)
        ours = results(op.train if training else op.infer, operands)
        options = {"activation": activation, "scale": scale, "reads": reads}
        theirs = results(lambda *operands: post_block(*operands, **options), operands)
        for our, their in zip(ours, theirs, strict=True):
            assert_same(our, their)

    made.new(lambda: call(1))
    made.none(lambda: call(2))
    for other in ({"activation": "relu"}, {"scale": 0.5}, {"reads": "branch"}, {"tokens": 6}):
        made.new(lambda other=other: call(3, **other))
        made.none(lambda other=other: call(4, **other))


def inference_states(residual: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        return residual.clone(), branch.clone()


#: Other operands of the same shape.
OTHERS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]] = {
    "another shape": lambda x, b: (x[:, :2], b[:, :2]),
    "as rows": lambda x, b: (x.flatten(0, 1), b.flatten(0, 1)),
    "bfloat16": lambda x, b: (x.to(BF16), b.to(BF16)),
    "two dtypes": lambda x, b: (x.to(BF16), b),
    "transposed": lambda x, b: (x.transpose(0, 1).contiguous().transpose(0, 1), b),
    "expanded": lambda x, b: (x, b[:, :1].expand_as(x)),
    "every second column": lambda x, b: (x.repeat_interleave(2, -1)[..., ::2], b),
    "a part of a larger one": lambda x, b: (torch.cat([b, x], 1)[:, x.shape[1] :], b),
    "requires grad": lambda x, b: (x.clone().requires_grad_(), b),
    "inference tensors": inference_states,
    "no branch": lambda x, b: (x, None),
    "the same tensor": lambda x, b: (x, x),
    "the same memory": lambda x, b: (x, x.view_as(x)),
    "a parameter": lambda x, b: (nn.Parameter(x), b),
    "no tokens": lambda x, b: (x[:, :0], b[:, :0]),
}


@pytest.mark.parametrize("other", OTHERS)
@torch.no_grad()
def test_plan_other_operands_are_steered_as_ever_and_leave_the_plan(device, made, other):
    site, operands = make_site(device, up_bias=True), states(5, device)
    assert_steers(site, *operands)
    for _ in range(2):
        assert_steers(site, *OTHERS[other](*operands))
    assert_steers(site, *operands)
    made.none(lambda: assert_steers(site, *operands))


@torch.no_grad()
def test_plan_what_kernels_refuse_is_refused_beside_a_plan(device, made):
    site, (residual, branch) = make_site(device), states(5, device)
    assert_steers(site, residual, branch)
    with pytest.raises(TypeError, match="the triton backend got a float64 tensor; expected float32"):
        site(residual.double(), branch.double())
    with pytest.raises(ValueError, match=r"branch has shape \(2, 1, 32\); expected \(2, 5, 32\)"):
        site(residual, branch[:, :1])
    with pytest.raises(ValueError, match=r"down has shape \(4, 32\); expected \(r, 16\)"):
        site(residual[..., :16], branch[..., :16])
    made.none(lambda: assert_steers(site, residual, branch))


@torch.no_grad()
def test_plan_is_for_so_many_operands(device):
    site, operands = make_site(device), states(5, device)
    expected = site(*operands)
    weights = parts(site)[:2]
    run = site._planned[0].last
    assert run(*operands, (*weights, operands[0])) is None and run(*operands, weights[:1]) is None
    assert run(*operands, ()) is None
    assert_same(run(*operands, weights), expected)


@torch.no_grad()
def test_plan_subclass_of_tensor_goes_past_the_plan(device, made):
    class Marked(Tensor):
        pass

    site, (residual, branch) = make_site(device), states(5, device)
    expected = site(residual, branch)
    found = site(residual.as_subclass(Marked), branch)
    assert torch.equal(found.as_subclass(Tensor), expected) and made[-1] is None


# ---------------------------------------------------------------------------------------------------------------------
# A site that changes


def replace_parameter(site: SteeringSite) -> None:
    site.steer_up["default"].weight = nn.Parameter(parts(site)[1] * 2)


def swap_data(site: SteeringSite) -> None:
    """Replace a parameter's data; the new memory may later reuse the old address."""
    for parameter in parts(site)[:2]:
        values = parameter.detach().cpu() * 3
        parameter.data = torch.empty(0, device=parameter.device)
        parameter.data = values.to(parameter.device)


def load(site: SteeringSite) -> None:
    site.load_state_dict({name: value * 2 for name, value in site.state_dict().items()})


def load_assigned(site: SteeringSite) -> None:
    site.load_state_dict({name: value * 2 for name, value in site.state_dict().items()}, assign=True)


def another(site: SteeringSite) -> None:
    site.attach("other", Adapter.of_tensors(tensors(up_bias=True, seed=40)))
    site.to(parts(site)[0].device)
    site.use("other", "tanh", 1.0)


def attach_again(site: SteeringSite) -> None:
    device = parts(site)[0].device
    site.detach("default")
    site.attach("default", Adapter.of_tensors(tensors(down_bias=True, seed=50)))
    site.to(device)
    site.use("default", "silu", SCALE)


CHANGES: dict[str, Callable[[SteeringSite], Any]] = {
    "scale": lambda site: site.use("default", "silu", 0.3),
    "activation": lambda site: site.use("default", "tanh", SCALE),
    "an attribute alone": lambda site: setattr(site, "scale", 0.2),
    "values in place": lambda site: parts(site)[0].mul_(2),
    "replaced parameter": replace_parameter,
    "swapped data": swap_data,
    "load_state_dict": load,
    "load_state_dict, assigned": load_assigned,
    "another dtype": lambda site: site.to(BF16),
    "another adapter": another,
    "attached again": attach_again,
    "frozen": lambda site: site.requires_grad_(False),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_plan_a_change_of_the_site_shows_in_the_next_call(device, made, change):
    site, operands = make_site(device), states(5, device)
    before = site(*operands)
    made.none(lambda: site(*operands))
    CHANGES[change](site)
    found = site(*operands)
    assert_same(found, ordinary(site, *operands))
    assert torch.equal(found, before) == (change == "frozen")
    made.none(lambda: assert_steers(site, *operands))


@torch.no_grad()
def test_plan_a_site_that_is_off_adds_and_is_on_again(device, made):
    site, operands = make_site(device), states(5, device)
    steered, plain = site(*operands), operands[0] + operands[1]
    for off, on in (
        (lambda: setattr(site, "enabled", False), lambda: setattr(site, "enabled", True)),
        (lambda: site.use(None, "identity", 1.0), lambda: site.use("default", "silu", SCALE)),
    ):
        off()
        assert torch.equal(site(*operands), plain)
        on()
        assert_same(site(*operands), steered)
        made.none(lambda: assert_steers(site, *operands))


@pytest.mark.parametrize("through", ["deepcopy", "pickle", "torch.save"])
@torch.no_grad()
def test_plan_a_copy_steers_by_its_own_weights(device, made, through):
    model = patched(device)
    residual, branch = rows(device)
    expected = model(residual, branch)
    if through == "deepcopy":
        twin = copy.deepcopy(model)
    elif through == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert_same(made.none(lambda: twin(residual, branch)), expected)
    for parameter in twin.parameters():
        parameter.mul_(2)
    assert not torch.equal(made.none(lambda: twin(residual, branch)), expected)
    assert_same(made.none(lambda: model(residual, branch)), expected)


# ---------------------------------------------------------------------------------------------------------------------
# The world around


class Block(nn.Module):
    """A decoder layer that only does the last residual add."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Identity()

    def forward(self, residual: Tensor, branch: Tensor) -> Tensor:
        hidden_states = residual + branch
        return hidden_states


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=D, num_hidden_layers=2)
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, inputs_embeds: Tensor, branch: Tensor) -> Tensor:
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds, branch)
        return inputs_embeds


def patched(device: torch.device) -> nn.Module:
    model = Chain()
    patch_model(model, SteerConfig(rank=R))
    for seed, parameter in enumerate(model.parameters()):
        parameter.data = normal(*parameter.shape, device="cpu", seed=seed) / 4
    return model.to(device)


def rows(device: torch.device) -> tuple[Tensor, Tensor]:
    return tuple(t[:, :1] for t in states(3, device))


@torch.no_grad()
def test_plan_backend_asked_for_between_calls(device, made, monkeypatch):
    model = patched(device)
    operands = rows(device)
    expected = model(*operands)
    made.none(lambda: model(*operands))
    monkeypatch.setenv("FUSED_STEER_BACKEND", "torch")
    by_torch = made.none(lambda: model(*operands))
    assert [layer.post_block.backend for layer in model.layers] == ["torch"] * 2
    torch.testing.assert_close(by_torch, expected)
    monkeypatch.setenv("FUSED_STEER_BACKEND", "cutlass")
    with pytest.raises(RuntimeError, match="FUSED_STEER_BACKEND is 'cutlass'; expected one of triton, torch"):
        model(*operands)
    monkeypatch.setenv("FUSED_STEER_BACKEND", "triton")
    assert_same(made.none(lambda: model(*operands)), expected)
    assert [layer.post_block.backend for layer in model.layers] == ["triton"] * 2


@torch.no_grad()
def test_plan_recorded_launches_are_not_made(device, made):
    site, operands = make_site(device), states(5, device)
    expected = site(*operands)
    with recorded(TARGETS["sm_90"]) as launches:
        for _ in range(2):
            site(*operands)
    assert len(launches) >= 2 and {id(launch.arguments[0]) for launch in launches} >= {id(operands[0])}
    assert_same(made.none(lambda: site(*operands)), expected)


@torch.no_grad()
def test_plan_a_hook_on_the_site_sees_each_call(device, made):
    model = patched(device)
    operands = rows(device)
    expected = model(*operands)
    seen = []
    handle = model.layers[1].post_block.register_forward_hook(lambda module, given, out: seen.append(out))
    for _ in range(2):
        assert_same(made.none(lambda: model(*operands)), expected)
        assert_same(seen[-1], expected)
    handle.remove()
    made.none(lambda: model(*operands))
    assert len(seen) == 2
    everywhere = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        made.none(lambda: model(*operands))
    finally:
        everywhere.remove()
    assert {layer.post_block for layer in model.layers} <= set(seen[2:])


@torch.no_grad()
def test_plan_threads_plan_at_once(device, one_kernel_at_a_time):
    site = make_site(device)
    cases = {tokens: states(tokens, device) for tokens in (2, 3, 4)}
    expected = {tokens: ordinary(site, *operands) for tokens, operands in cases.items()}
    wrong: list[Any] = []

    def work(order: list[int]) -> None:
        try:
            with torch.no_grad():
                for tokens in order * 3:
                    if not torch.equal(site(*cases[tokens]), expected[tokens]):
                        wrong.append(tokens)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(order,)) for order in ([2, 3, 4], [4, 3, 2])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---------------------------------------------------------------------------------------------------------------------
# Training


def leaves(operands: tuple[Tensor, ...], wants: str = "xb") -> tuple[Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_(name in wants) for name, t in zip("xb", operands, strict=False))


def differentiate(
    steer: Callable[..., Tensor], site: SteeringSite, operands: tuple[Tensor, ...], grad: Tensor
) -> list[Tensor | None]:
    wanted = [t for t in (*operands, *parts(site)) if t is not None and t.requires_grad]
    return [*torch.autograd.grad(steer(*operands), wanted, grad, allow_unused=True)]


def assert_trains(site: SteeringSite, operands: tuple[Tensor, ...], grad: Tensor) -> None:
    found = differentiate(site, site, operands, grad)
    expected = differentiate(lambda *given: ordinary(site, *given, *[None] * (2 - len(given))), site, operands, grad)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("wants", ["xb", "x", "b", ""], ids=["both", "residual", "branch", "neither"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_plan_second_step_goes_by_the_plans_of_the_first(device, made, adapter, wants):
    site = make_site(device, **ADAPTERS[adapter])
    for seed in (1, 2):
        operands, grad = leaves(states(5, device, seed=seed), wants), normal(2, 5, D, device=device, seed=seed + 7)
        (made.new if seed == 1 else made.none)(lambda a=operands, g=grad: assert_trains(site, a, g))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_plan_a_finished_state_trains_by_plans(device, made, dtype):
    site, grad = make_site(device, up_bias=True), normal(2, 5, D, device=device, dtype=dtype)
    operands = leaves(states(5, device, dtype))[:1]
    made.new(lambda: assert_trains(site, operands, grad))
    made.none(lambda: assert_trains(site, operands, grad))


@pytest.mark.parametrize("frozen", [(0,), (1,), (2, 3), (0, 1, 2), (0, 1, 2, 3)], ids=str)
def test_plan_frozen_parts_get_no_gradient(device, made, frozen):
    site, operands = make_site(device, down_bias=True, up_bias=True), leaves(states(5, device))
    grad = normal(2, 5, D, device=device)
    assert_trains(site, operands, grad)  # a plan with all parameters training
    for place in frozen:
        parts(site)[place].requires_grad_(False)
    made.new(lambda: assert_trains(site, operands, grad))
    made.none(lambda: assert_trains(site, operands, grad))
    for part in parts(site):
        part.requires_grad_()
    assert_trains(site, operands, grad)


@pytest.mark.usefixtures("unplanned")
@pytest.mark.parametrize("norm", [False, True])
def test_plan_gradients_of_several_layouts_take_turns(device, made, norm):
    """Layers share their plans. A gradient with other strides gets its own plan, and the first plan stays."""
    weights = [t.to(device).requires_grad_() for t in tensors().values()]
    kind, adapter = Norm(torch.ones(D, device=device), 1e-5), (*weights, None, None)
    options = {"activation": "silu", "scale": SCALE}
    of_norm = {"norm_weight": kind.weight, "eps": kind.eps, **options}

    def by_plans(*operands: Tensor) -> Tensor:
        if norm:
            return PlannedPostBlockNorm("silu", SCALE, adapter).train(*operands, tuple(weights), kind)[1]
        return PlannedPostBlock("silu", SCALE, adapter).train(*operands, *weights)

    def ordinary(*operands: Tensor) -> Tensor:
        if norm:
            return post_block_norm(*operands, *weights, **of_norm)[1]
        return post_block(*operands, *weights, **options)

    def call(padded: bool) -> None:
        operands = [t.requires_grad_() for t in states(5, device)]
        grad = normal(2, 5, 2 * D, device=device)[..., :D] if padded else normal(2, 5, D, device=device)
        ours, theirs = (
            torch.autograd.grad(run(*operands), [*operands, *weights], grad) for run in (by_plans, ordinary)
        )
        for our, their in zip(ours, theirs, strict=True):
            assert_same(our, their)

    made.new(lambda: call(False))
    made.new(lambda: call(True))
    for padded in (False, True, True, False):
        made.none(lambda padded=padded: call(padded))


def test_plan_another_thread_takes_the_last_plans_place_between_its_check_and_its_start(device):
    """Two threads whose gradients have other strides share the plans of a kind."""
    site, operands, grad = make_site(device), leaves(states(5, device)), normal(2, 5, D, device=device)
    found = []
    for layout in (GRADIENTS["transposed"](grad), grad):
        for _ in range(2):
            assert_trains(site, operands, layout)
        (training,) = planned._trained.values()
        found.append(training.last)
    of_other_strides, last = found
    assert last is not of_other_strides

    def admit(given: tuple[Tensor, ...]) -> Any:
        training.last = of_other_strides
        return last.admit(given)

    training.last = SimpleNamespace(admit=admit, go=last.go)
    assert_trains(site, operands, grad)


#: Pairs of states whose training calls have no plan: with gradients of two dtypes, or a copy between the launches.
UNPLANNED: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "two dtypes": lambda x, b: (x, b.to(BF16)),
    "a copy": lambda x, b: (x.transpose(1, 2).contiguous().transpose(1, 2), b),
    "one tensor": lambda x, b: (x, x),
    "no token": lambda x, b: (x[:, :0], b[:, :0]),
}


@pytest.mark.usefixtures("unplanned")
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", UNPLANNED)
def test_plan_a_call_that_has_none_launches_nothing_twice(device, kind, norm, monkeypatch):
    """Under autocast each layer of a float32 model is such a call."""
    weights = [t.to(device).requires_grad_() for t in tensors(down_bias=True).values()]
    rms, launched = Norm(torch.ones(D, device=device), 1e-5), []
    for module in ("triton_backend", "post_block_norm", "post_block_norm_backward", "norm"):
        of = importlib.import_module(f"fused_steer.kernels.{module}")
        run = of.launch
        monkeypatch.setattr(of, "launch", lambda *given, run=run, **rest: (launched.append(1), run(*given, **rest))[1])
    there = (*weights, None)

    def by_plans(*operands: Tensor) -> Tensor:
        if norm:
            return PlannedPostBlockNorm("silu", SCALE, there).train(*operands, tuple(weights), rms)[1]
        return PlannedPostBlock("silu", SCALE, there).train(*operands, *weights)

    def ordinary(*operands: Tensor) -> Tensor:
        options = {"activation": "silu", "scale": SCALE, "down_bias": weights[2]}
        if norm:
            return post_block_norm(*operands, *weights[:2], norm_weight=rms.weight, eps=rms.eps, **options)[1]
        return post_block(*operands, *weights[:2], **options)

    found = []
    for run in (ordinary, by_plans, by_plans):
        launched.clear()
        operands = [t.detach().requires_grad_() for t in UNPLANNED[kind](*states(5, device))]
        if kind == "one tensor":
            operands[1] = operands[0]
        out = run(*operands)
        grads = torch.autograd.grad(out, [*operands, *weights], torch.ones_like(out))
        found.append(((out, *grads), len(launched)))
    for results, count in found[1:]:
        assert count == found[0][1]
        for one, other in zip(results, found[0][0], strict=True):
            assert_same(one, other)


#: Kinds of gradients that autograd may pass.
GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda g: g[:1, :1].expand_as(g),
    "a number": lambda g: g.new_ones(()).expand_as(g),
    "transposed": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_plan_gradients_of_any_strides(device, made, kind):
    site, operands, grad = make_site(device), leaves(states(5, device)), normal(2, 5, D, device=device)
    for _ in range(2):
        assert_trains(site, operands, grad)
        assert_trains(site, operands, GRADIENTS[kind](grad))


class Reading:
    """The op with W1 applied to branch, as a site calls it."""

    def __init__(self, device: torch.device, **options: Any) -> None:
        given = tensors(**options)
        weights = [given.get(name) for name in PARTS]
        self.weights = [None if t is None else t.to(device).requires_grad_() for t in weights]
        self.op = PlannedPostBlock("silu", SCALE, tuple(self.weights), "branch")

    def __call__(self, residual: Tensor, branch: Tensor) -> Tensor:
        weights = tuple(t for t in self.weights if t is not None)
        last = self.op.last_trained if torch.is_grad_enabled() else self.op.last
        out = last(residual, branch, weights)
        if out is not None:
            return out
        return (self.op.train if torch.is_grad_enabled() else self.op.infer)(residual, branch, *weights)

    def ordinary(self, residual: Tensor, branch: Tensor) -> Tensor:
        w1, w2, b1, b2 = self.weights
        options = {"down_bias": b1, "up_bias": b2, "activation": "silu", "scale": SCALE, "reads": "branch"}
        return post_block(residual, branch, w1, w2, **options)

    def assert_trains(self, operands: tuple[Tensor, ...], grad: Tensor) -> None:
        wanted = [t for t in (*operands, *self.weights) if t is not None and t.requires_grad]
        found, expected = (torch.autograd.grad(steer(*operands), wanted, grad) for steer in (self, self.ordinary))
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if name != "named"])
@torch.no_grad()
def test_plan_that_reads_the_branch(device, made, adapter):
    steer = Reading(device, **ADAPTERS[adapter])
    for seed in (1, 2):
        operands = states(5, device, seed=seed)
        found = (made.new if seed == 1 else made.none)(lambda operands=operands: steer(*operands))
        assert_same(found, steer.ordinary(*operands))
    with pytest.raises(ValueError, match="reads is 'branch' but branch is None"):
        steer.op.infer(operands[0], None, *(t for t in steer.weights if t is not None))


@pytest.mark.parametrize("wants", ["xb", "x", "b", ""], ids=["both", "residual", "branch", "neither"])
@pytest.mark.parametrize("adapter", ["biases", "vector"])
def test_plan_that_reads_the_branch_trains(device, made, adapter, wants):
    steer = Reading(device, **ADAPTERS[adapter])
    for seed in (1, 2, 3):
        operands, grad = leaves(states(5, device, seed=seed), wants), normal(2, 5, D, device=device, seed=seed + 7)
        (made.new if seed == 1 else made.none)(lambda a=operands, g=grad: steer.assert_trains(a, g))


@pytest.mark.parametrize("frozen", [(0,), (0, 1, 2), (0, 1, 2, 3)], ids=str)
def test_plan_that_reads_the_branch_with_frozen_parts(device, made, frozen):
    steer, operands = Reading(device, down_bias=True, up_bias=True), leaves(states(5, device))
    for place in frozen:
        steer.weights[place].requires_grad_(False)
    grad = normal(2, 5, D, device=device)
    made.new(lambda: steer.assert_trains(operands, grad))
    made.none(lambda: steer.assert_trains(operands, grad))


@pytest.mark.parametrize("kind", GRADIENTS)
def test_plan_that_reads_the_branch_of_any_strides(device, made, kind):
    steer, grad = Reading(device), normal(2, 5, D, device=device)
    residual, branch = leaves(states(5, device))
    for operands in ((residual, branch), (residual, GRADIENTS[kind](branch.detach()).requires_grad_())):
        for given in (grad, GRADIENTS[kind](grad)) * 2:
            steer.assert_trains(operands, given)


def test_plan_that_reads_the_branch_hands_the_gradient_on(device, made):
    """The residual's gradient is the incoming one: no copy, and nothing is added into it."""
    steer, (residual, branch) = Reading(device), leaves(states(5, device))
    grad = normal(2, 5, D, device=device)
    before = grad.clone()
    for turn in range(3):
        (found,) = torch.autograd.grad(steer(residual, branch), residual, grad)
        assert found.data_ptr() == grad.data_ptr(), turn
        steer(residual, branch).backward(grad)
        assert torch.equal(grad, before) and torch.equal(residual.grad, grad * (turn + 1))
    out = steer(residual, branch)
    out += 1  # the output is not kept
    out.backward(grad)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_plan_that_reads_the_branch_in_a_checkpoint(device, made, reentrant):
    steer, operands = Reading(device, up_bias=True), leaves(states(5, device))
    grad = normal(2, 5, D, device=device)
    wanted = [t for t in (*operands, *steer.weights) if t is not None]
    expected = torch.autograd.grad(steer.ordinary(*operands), wanted, grad)
    for _ in range(2):
        for tensor in wanted:
            tensor.grad = None
        checkpoint(steer, *operands, use_reentrant=reentrant).backward(grad)
        for tensor, value in zip(wanted, expected, strict=True):
            assert torch.equal(tensor.grad, value)


def test_plan_repeats_the_launch_that_packs_the_weights(device, made, monkeypatch):
    site, operands = make_site(device, rank=RESIDENT_RANK + 4), states(5, device)
    op = importlib.import_module("fused_steer.kernels.triton_backend")
    packed, pack = [], op.pack_adapter
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(op, "MANY_TOKENS", 1)
        patch.setattr(op, "pack_adapter", lambda *weights: packed.append(pack(*weights)) or packed[-1])
        made.new(lambda: site(*operands))
        for part in parts(site)[:2]:
            part.mul_(-2)
        out = made.none(lambda: site(*operands))
        assert len(packed) == 1
    with torch.no_grad():
        assert_same(out, ordinary(site, *operands))  # reads the parameters


def test_plan_no_gradient_at_all_is_none(device, made):
    site, operands = make_site(device), leaves(states(5, device))

    class Undefined(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    for _ in range(2):
        Undefined.apply(site(*operands)).sum().backward()
        assert all(t.grad is None for t in (*operands, *parts(site)) if t is not None)


def test_plan_gradients_add_up_in_memory_of_their_own(device, made):
    site, operands = make_site(device, down_bias=True, up_bias=True), leaves(states(5, device))
    grad = normal(2, 5, D, device=device)
    wanted = [*operands, *parts(site)]
    expected = differentiate(lambda *given: ordinary(site, *given), site, operands, grad)
    for step in (1, 2):
        site(*operands).backward(grad)
        for tensor, once in zip(wanted, expected, strict=True):
            assert torch.equal(tensor.grad, once if step == 1 else once + once)
    for part in parts(site):
        assert part.grad.untyped_storage().nbytes() == part.nbytes


def test_plan_a_graph_that_is_kept_is_walked_twice(device, made):
    site, operands = make_site(device), leaves(states(5, device))
    grad = torch.ones(2, 5, D, device=device)
    assert_trains(site, operands, grad)
    wanted = [*operands, *parts(site)[:2]]
    out = made.none(lambda: site(*operands))
    first, second = (made.none(lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_plan_a_weight_changed_before_backward_is_an_error(device, made):
    site, operands = make_site(device), leaves(states(5, device))
    for _ in range(2):
        out = site(*operands)
        with torch.no_grad():
            parts(site)[1].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_plan_of_tensors_that_hold_others(device, made):
    """A subclass such as DTensor has no memory of its own."""
    site, steer, (residual, branch) = make_site(device), Normed(device), states(5, device)
    for graded in (False, True):
        with torch.set_grad_enabled(graded):
            for _ in range(2):
                wrapped = TwoTensor(residual, residual.clone()), TwoTensor(branch, branch.clone())
                torch.testing.assert_close(site(*wrapped).a, site(residual, branch))
                for one, other in zip(steer(*wrapped), steer(residual, branch), strict=True):
                    torch.testing.assert_close(one.a, other)
    weights = [torch.stack([t]) for t in parts(site)[:2]]
    with pytest.raises(TypeError, match="residual is a TwoTensor; expected a plain tensor") as error:
        post_block_grouped(wrapped[0], branch, *weights, torch.zeros(2, 5, dtype=torch.int32, device=device))
    assert "\n" not in str(error.value)


def assert_same_second_derivatives(
    steers: Sequence[Callable[..., tuple[Tensor, ...]]], wanted: Sequence[Tensor], operands: tuple[Tensor, ...]
) -> None:
    """Assert that both functions have the same gradients of a gradient's square, with respect to all that is wanted."""
    found = []
    for steer in steers:
        loss = sum(result.sin().sum() for result in steer(*operands))
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), wanted))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wants", ["xb", "x", "b", ""], ids=["both", "residual", "branch", "neither"])
@pytest.mark.parametrize("adapter", ["biases", "vector"])
def test_plan_has_second_derivatives(device, made, adapter, wants):
    """Those of `post_block` itself, also between calls that train by the plans."""
    site, operands = make_site(device, **ADAPTERS[adapter]), leaves(states(5, device), wants)
    steer = Reading(device, **ADAPTERS[adapter])
    for _ in range(3):
        wanted = [t for t in (*operands, *parts(site)) if t is not None and t.requires_grad]
        assert_same_second_derivatives(
            (lambda *given: (site(*given),), lambda *given: (ordinary(site, *given),)), wanted, operands
        )
        assert_trains(site, operands, torch.ones(2, 5, D, device=device))
        wanted = [t for t in (*operands, *steer.weights) if t is not None and t.requires_grad]
        assert_same_second_derivatives(
            (lambda *given: (steer(*given),), lambda *given: (steer.ordinary(*given),)), wanted, operands
        )
        steer.assert_trains(operands, torch.ones(2, 5, D, device=device))


@pytest.mark.parametrize("make", [plans._guard, plans._python_guard])
def test_plan_guards_refuse_what_memory_does_not_show(make):
    """PyTorch's guard in C++, and the one in Python where PyTorch has none."""
    given = normal(5, D, device=torch.device("cpu"))
    guard = make([given, given])
    assert guard(given, given.clone())
    seen = [guard(given, other) for other in (torch._neg_view(given), given.t().contiguous().t(), given.double())]
    torch.func.vmap(lambda row: seen.append(guard(given, row)) or row)(torch.stack([given, given]))
    assert seen == [False] * 4


@pytest.mark.parametrize("graded", [False, True])
def test_plan_is_not_used_in_forward_mode(device, made, graded):
    """A kernel would start on the memory of the tensors, in which a tangent does not show."""
    site, reading, steer = make_site(device), Reading(device), Normed(device)
    pairs = (
        (lambda *given: (site(*given),), lambda *given: (ordinary(site, *given),)),
        (lambda *given: (reading(*given),), lambda *given: (reading.ordinary(*given),)),
        (steer, steer.ordinary),
    )
    residual, branch = states(5, device)
    with torch.set_grad_enabled(graded):
        for planned, formula in pairs:
            for _ in range(2):
                planned(residual, branch)
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(residual, residual.cos())
                for one, other in zip(planned(dual, branch), formula(dual, branch), strict=True):
                    found, expected = (forward_ad.unpack_dual(t).tangent for t in (one, other))
                    assert expected.any()
                    torch.testing.assert_close(found, expected)


def test_plan_of_several_gradients_at_once(device, made):
    """Those of `post_block` itself, one by one, also between calls that train by the plans."""
    site, steer = make_site(device, down_bias=True, up_bias=True), Normed(device)
    for network, weights in ((site, parts(site)), (steer, steer.parts)):
        operands = leaves(states(5, device))
        for _ in range(2):
            results = network(*operands)
            results = (results,) if isinstance(results, Tensor) else results
            wanted = [*operands, *weights]
            grads = [normal(3, *result.shape, device=device, seed=8) for result in results]
            found = torch.autograd.grad(results, wanted, grads, retain_graph=True, is_grads_batched=True)
            for index in range(3):
                expected = torch.autograd.grad(results, wanted, [g[index] for g in grads], retain_graph=True)
                for one, other in zip(found, expected, strict=True):
                    torch.testing.assert_close(one[index], other, rtol=1e-4, atol=1e-4)


class _WithoutGradient(torch.autograd.Function):
    """Adds up its arguments. The backward pass returns None in place of their gradients."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        return sum(t.sum() for t in given)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def test_plan_of_a_call_that_gets_no_gradient(device, made):
    for steer in (make_site(device), Normed(device)):
        operands = leaves(states(5, device))
        for _ in range(2):
            found = steer(*operands)
            _WithoutGradient.apply(*((found, found) if isinstance(found, Tensor) else found)).backward()
            assert all(t.grad is None for t in operands)


@pytest.mark.parametrize("inside", [True, False], ids=["made inside", "made outside"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_plan_checkpoint(device, made, reentrant, inside):
    site, operands = make_site(device, up_bias=True), leaves(states(5, device))
    grad = normal(2, 5, D, device=device)
    if not inside:
        assert_trains(site, operands, grad)
    wanted = [t for t in (*operands, *parts(site)) if t is not None]
    expected = differentiate(lambda *given: ordinary(site, *given), site, operands, grad)
    for _ in range(2):
        for tensor in wanted:
            tensor.grad = None
        checkpoint(site, *operands, use_reentrant=reentrant).backward(grad)
        for tensor, value in zip(wanted, expected, strict=True):
            assert torch.equal(tensor.grad, value)
    made.none(lambda: checkpoint(site, *operands, use_reentrant=reentrant).backward(grad))


def test_plan_inference_and_training_take_turns(device, made):
    site, grad = make_site(device), normal(2, 5, D, device=device)
    for turn in range(2):
        operands = leaves(states(5, device))
        (made.none if turn else made.new)(lambda a=operands: assert_trains(site, a, grad))
        with torch.no_grad():
            (made.none if turn else made.new)(lambda a=operands: assert_steers(site, *(t.detach() for t in a)))


def test_plan_transforms_of_torch_func_go_past_a_plan(device, made):
    site, (residual, branch) = make_site(device), states(5, device)
    operands = leaves((residual, branch))
    site(*operands)
    with torch.no_grad():
        expected = site(residual, branch)
    (of_residual,) = torch.autograd.grad(ordinary(site, operands[0], branch).sum(), operands[0])
    of_transform = torch.func.grad(lambda x: site(x, branch).sum())
    # Autograd may differentiate this with respect to the parameters, so no kernel computes it.
    torch.testing.assert_close(of_transform(residual), of_residual)
    site.requires_grad_(False)
    assert_same(of_transform(residual), of_residual)
    site.requires_grad_(True)
    with torch.no_grad():
        assert_same(torch.func.vmap(site)(residual, branch), expected)

    def beside(factor: Tensor) -> Tensor:
        """Transform another tensor than the site's input."""
        return factor * site(*operands).detach().sum()

    assert_same(torch.func.grad(beside)(torch.ones((), device=device)), expected.sum())


def test_plan_threads_train_at_once(device, one_kernel_at_a_time):
    site, grad = make_site(device), normal(2, 3, D, device=device)
    cases = [leaves(states(3, device, seed=seed)) for seed in (1, 9)]
    expected = [differentiate(lambda *given: ordinary(site, *given), site, case, grad) for case in cases]
    found: list[Any] = [None, None]

    def work(place: int) -> None:
        for _ in range(3):
            found[place] = differentiate(site, site, cases[place], grad)

    threads = [threading.Thread(target=work, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, right in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, right, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# With the norm behind the layer


class Normed:
    """`post_block_norm` by plans, as a site with a fused norm calls it."""

    def __init__(
        self, device: torch.device, reads: str = "sum", weight: bool = True, gain: bool = False, **options: Any
    ) -> None:
        given = tensors(**options)
        self.reads = reads
        self.gain = normal(2, 5, device=device, seed=4) if gain else None
        self.weights = [None if name not in given else given[name].to(device).requires_grad_() for name in PARTS]
        scales = 1 + normal(D, device=device, seed=3) / 4 if weight else None
        self.norm = Norm(None if scales is None else scales.requires_grad_(), 1e-6, False, True)
        self.op = PlannedPostBlockNorm("silu", SCALE, [*self.weights, self.gain], reads)

    @property
    def parts(self) -> list[Tensor]:
        return [t for t in (*self.weights, self.norm.weight) if t is not None]

    def __call__(self, residual: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        run = self.op.train if torch.is_grad_enabled() else self.op.infer
        given = tuple(t for t in (*self.weights, self.gain) if t is not None)
        return run(residual, branch, given, self.norm)

    def ordinary(self, residual: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        down, up, down_bias, up_bias = self.weights
        return post_block_norm(
            residual, branch, down, up, down_bias=down_bias, up_bias=up_bias, norm_weight=self.norm.weight,
            eps=self.norm.eps, activation="silu", scale=SCALE, reads=self.reads, gain=self.gain,
        )  # fmt: skip

    def assert_infers(self, operands: tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            for one, other in zip(self(*operands), self.ordinary(*operands), strict=True):
                assert_same(one, other)

    def assert_trains(self, operands: tuple[Tensor, ...], grads: tuple[Tensor | None, Tensor | None]) -> None:
        wanted = [t for t in (*operands, *self.parts) if t.requires_grad]
        found = []
        for call in (self, self.ordinary):
            used = [(output, grad) for output, grad in zip(call(*operands), grads, strict=True) if grad is not None]
            outputs, given = zip(*used, strict=True)
            found.append(torch.autograd.grad(outputs, wanted, given, allow_unused=True))
        for one, other in zip(*found, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert_same(one, other)


@pytest.fixture
def unplanned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `post_block_norm` itself make no plans, so that `made` counts those of `PlannedPostBlockNorm` alone."""

    def run(kept: Any, key: Any, inputs: Any, call: Callable[[], Any]) -> Any:
        return call()

    monkeypatch.setattr("fused_steer.kernels.post_block_norm.run_planned", run)


def both_grads(device: torch.device, tokens: int = 5, seed: int = 7) -> tuple[Tensor, Tensor]:
    return tuple(normal(2, tokens, D, device=device, seed=seed + place) for place in (0, 1))


@pytest.mark.parametrize("finished", [False, True], ids=["branch", "finished"])
@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if "name" not in ADAPTERS[name]])
def test_plan_with_a_norm_the_second_call_goes_by_the_plan_of_the_first(device, made, unplanned, adapter, finished):
    steer = Normed(device, **ADAPTERS[adapter])
    for seed in (1, 2):
        operands, grads = states(5, device, seed=seed)[: 1 if finished else 2], both_grads(device, seed=seed)
        check = made.new if seed == 1 else made.none
        check(lambda a=operands: steer.assert_infers(a))
        check(lambda a=operands, g=grads: steer.assert_trains(leaves(a), g))
    assert steer.op.backend == "triton"


@pytest.mark.parametrize("wants", ["xb", "x", "b", ""], ids=["both", "residual", "branch", "neither"])
@pytest.mark.parametrize("reads", ["sum", "branch"])
@pytest.mark.parametrize("adapter", ["biases", "vector"])
def test_plan_with_a_norm_gradients_of_each_state(device, made, unplanned, adapter, reads, wants):
    steer = Normed(device, reads, **ADAPTERS[adapter])
    for seed in (1, 2):
        operands, grads = leaves(states(5, device, seed=seed), wants), both_grads(device, seed=seed)
        (made.new if seed == 1 else made.none)(lambda a=operands, g=grads: steer.assert_trains(a, g))


@pytest.mark.parametrize("adapter", ["biases", "vector"])
def test_plan_with_a_norm_and_a_gain(device, made, unplanned, adapter):
    steer = Normed(device, gain=True, **ADAPTERS[adapter])
    operands, grads = states(5, device), both_grads(device)
    for check in (made.new, made.none):
        check(lambda: steer.assert_infers(operands))
        check(lambda: steer.assert_trains(leaves(operands), grads))


@pytest.mark.parametrize("reads", ["sum", "branch"])
@pytest.mark.parametrize("frozen", [(0,), (4,), (1, 4), (2, 3), (0, 1, 2, 3), (0, 1, 2, 3, 4)], ids=str)
def test_plan_with_a_norm_frozen_parts_get_no_gradient(device, made, unplanned, reads, frozen):
    steer, operands = Normed(device, reads, down_bias=True, up_bias=True), leaves(states(5, device))
    steer.assert_trains(operands, both_grads(device))  # a plan with all parameters training
    for place in frozen:
        steer.parts[place].requires_grad_(False)
    made.new(lambda: steer.assert_trains(operands, both_grads(device)))
    made.none(lambda: steer.assert_trains(operands, both_grads(device)))
    for part in steer.parts:
        part.requires_grad_()
    steer.assert_trains(operands, both_grads(device))


@pytest.mark.parametrize("use", ["out", "normed"])
def test_plan_with_a_norm_either_output_alone(device, made, unplanned, use):
    steer, operands = Normed(device), leaves(states(5, device))
    out, normed = both_grads(device)
    for grads in ((out, normed), (out, None) if use == "out" else (None, normed), (out, normed)) * 2:
        steer.assert_trains(operands, grads)
    last = len(made)
    if use == "normed":
        steer.assert_trains(operands, (None, normed))
        assert len(made) == last


@pytest.mark.parametrize("kind", GRADIENTS)
def test_plan_with_a_norm_of_any_strides(device, unplanned, kind):
    steer, (residual, branch) = Normed(device, "branch"), leaves(states(5, device))
    out, normed = both_grads(device)
    for operands in ((residual, branch), (residual, GRADIENTS[kind](branch.detach()).requires_grad_())):
        for given in ((out, normed), (GRADIENTS[kind](out), normed), (out, GRADIENTS[kind](normed))) * 2:
            steer.assert_trains(operands, given)


#: Changes after which no earlier plan fits.
UNFIT: dict[str, Callable[[Normed, tuple[Tensor, ...]], tuple[Tensor, ...]]] = {
    "another shape": lambda steer, given: tuple(t[:, :3] for t in given),
    "another dtype": lambda steer, given: tuple(t.to(BF16) for t in given),
    "another norm": lambda steer, given: setattr(steer, "norm", steer.norm._replace(plus_one=True)) or given,
    "another eps": lambda steer, given: setattr(steer, "norm", steer.norm._replace(eps=0.5)) or given,
    "no weight of the norm": lambda steer, given: setattr(steer, "norm", steer.norm._replace(weight=None)) or given,
}


@pytest.mark.parametrize("change", UNFIT)
def test_plan_with_a_norm_no_plan_for_another_call(device, made, unplanned, change):
    steer, operands = Normed(device), states(5, device)
    steer.assert_infers(operands)
    changed = UNFIT[change](steer, operands)

    def ordinary(residual: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        kind = dict(zip(("norm_weight", "eps", "plus_one", "rounds_first"), steer.norm, strict=True))
        return post_block_norm(residual, branch, *steer.weights[:2], activation="silu", scale=SCALE, **kind)

    with torch.no_grad():
        found = made.new(lambda: steer(*changed))
        for one, other in zip(found, ordinary(*changed), strict=True):
            assert_same(one, other)


def test_plan_with_a_norm_backend_asked_for_between_calls(device, made, unplanned, monkeypatch):
    steer, operands = Normed(device), states(5, device)
    steer.assert_infers(operands)
    monkeypatch.setenv("FUSED_STEER_BACKEND", "torch")
    steer.assert_infers(operands)
    assert steer.op.backend == "torch"
    monkeypatch.setenv("FUSED_STEER_BACKEND", "nonsense")
    with pytest.raises(RuntimeError, match="FUSED_STEER_BACKEND is 'nonsense'"), torch.no_grad():
        steer(*operands)
    monkeypatch.setenv("FUSED_STEER_BACKEND", "triton")
    made.none(lambda: steer.assert_infers(operands))


def test_plan_with_a_norm_recorded_launches_are_not_made(device, made, unplanned):
    steer, operands = Normed(device), states(5, device)
    steer.assert_infers(operands)
    with recorded(TARGETS["sm_90"]) as launches, torch.no_grad():
        steer(*operands)
    assert launches


def test_plan_with_a_norm_what_kernels_refuse_is_refused_beside_a_plan(device, made):
    steer, (residual, branch) = Normed(device), states(5, device)
    with torch.no_grad():
        steer(residual, branch)
        with pytest.raises(ValueError, match="branch has shape"):
            steer(residual, branch[:, :3])
        with pytest.raises(TypeError, match="float64"):
            steer(residual.double(), branch.double())


def test_plan_with_a_norm_transforms_of_torch_func_go_past_a_plan(device, made):
    steer, operands = Normed(device), leaves(states(5, device))
    residual, branch = (t.detach() for t in operands)
    outputs = steer(*operands)
    (expected,) = torch.autograd.grad(outputs[1].sin().sum(), operands[0])
    found = torch.func.grad(lambda x: steer(x, branch)[1].sin().sum())(residual)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for found, expected in zip(torch.func.vmap(steer)(residual, branch), outputs, strict=True):
        torch.testing.assert_close(found, expected.detach())


def test_plan_with_a_norm_a_graph_that_is_kept_is_walked_twice(device, made):
    steer, operands = Normed(device), leaves(states(5, device))
    for _ in range(2):
        outputs = steer(*operands)
        first, second = (
            torch.autograd.grad(outputs, operands, both_grads(device), retain_graph=keep) for keep in (True, False)
        )
        for one, other in zip(first, second, strict=True):
            assert torch.equal(one, other) and one.data_ptr() != other.data_ptr()


@pytest.mark.parametrize("reads", ["sum", "branch"])
@pytest.mark.parametrize("adapter", ["biases", "vector"])
def test_plan_with_a_norm_has_second_derivatives(device, made, adapter, reads):
    steer, operands = Normed(device, reads=reads, **ADAPTERS[adapter]), leaves(states(5, device))
    for _ in range(3):
        assert_same_second_derivatives((steer, steer.ordinary), [*operands, *steer.parts], operands)
        steer.assert_trains(operands, both_grads(device))


def test_plan_with_a_norm_changes_in_place_are_refused(device, made):
    steer, operands = Normed(device), leaves(states(5, device))
    for _ in range(2):
        out, normed = steer(*operands)
        with torch.no_grad():
            out += 1
        with pytest.raises(RuntimeError, match="the output of post_block was changed in place"):
            normed.sum().backward()


def test_plan_with_a_norm_threads_train_at_once(device, one_kernel_at_a_time):
    steer, wrong = Normed(device), []

    def work(tokens: int) -> None:
        try:
            operands, grads = leaves(states(tokens, device, seed=tokens)), both_grads(device, tokens)
            for _ in range(4):
                steer.assert_trains(operands, grads)
        except BaseException as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(tokens,)) for tokens in (2, 3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---------------------------------------------------------------------------------------------------------------------
# One adapter per row


def batched(device: torch.device) -> tuple[nn.Module, Any]:
    model = patched(device)
    model.steering.add("other", SteerConfig(rank=2, up_bias=True))
    for name, parameter in model.named_parameters():
        if ".other." in name:
            parameter.data = normal(*parameter.shape, device=device, seed=len(name)) / 4
    return model, model.steering.batch(["default", "other", None])


@torch.no_grad()
def test_plan_rows_go_by_plans_across_layers_and_passes(device, made):
    model, batch = batched(device)
    residual, branch = (normal(3, 1, D, device=device, seed=seed) for seed in (1, 2))
    alone = []
    for row, name in enumerate(("default", "other", None)):
        model.steering.use(name or "default")
        with model.steering.disabled() if name is None else torch.no_grad():
            alone.append(model(residual[row : row + 1], branch[row : row + 1]))
    model.steering.use("default")
    with batch:
        first = made.new(lambda: model(residual, branch))
        assert_same(made.none(lambda: model(residual, branch)), first)
        torch.testing.assert_close(first, torch.cat(alone))
        assert torch.equal(first[2], alone[2][0])
        many = tuple(normal(3, 4, D, device=device, seed=seed) for seed in (3, 4))
        several = made.new(lambda: model(*many))
        assert_same(made.none(lambda: model(residual, branch)), first)
        assert_same(made.none(lambda: model(*many)), several)
    assert not torch.equal(model(residual, branch), first)  # all rows use the active adapter


@torch.no_grad()
def test_plan_slots_that_hold_something_else_or_move(device, made):
    slots = Slots(2, R, D, device=device)
    routing = Routing(torch.tensor([0, 1, -1], dtype=torch.int32, device=device))
    residual, branch = (normal(3, D, device=device, seed=seed) for seed in (1, 2))

    def check(routing: Routing = routing) -> Tensor:
        found = slots.routed(residual, branch, routing)
        assert_same(found, slots(residual, branch, routing.ids, routing.gain))
        return found

    seen = [made.new(check)]
    for seed in (3, 4):  # the same memory, other values
        for slot in (0, 1):
            slots.put(slot, tensors(seed=seed + 10 * slot), "silu")
        seen.append(made.none(check))
    slots.clear(0)
    seen.append(made.none(check))
    slots.codes.fill_(0)
    seen.append(made.none(check))
    seen.append(made.none(lambda: check(Routing(torch.tensor([1, -1, 1], dtype=torch.int32, device=device)))))
    seen.append(made.new(lambda: check(Routing(routing.ids, torch.full((3,), 0.5, device=device)))))
    assert all(not torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False))
    slots.to(BF16)
    made.new(check)
    twin = copy.deepcopy(slots)
    assert twin._plans == {}
    made.none(check)
    assert_same(made.none(lambda: twin.routed(residual, branch, routing)), check())


@torch.no_grad()
def test_plan_slots_of_other_layers_start_the_same_plan(device, made):
    """Another layer's slots of the same kind make no plan of their own; those of another kind do."""
    layers = [Slots(2, R, D, device=device) for _ in range(2)]
    layers.append(Slots(2, R, D, device=device, up_bias=True))
    routing = Routing(torch.tensor([0, 1, -1], dtype=torch.int32, device=device))
    residual, branch = (normal(3, D, device=device, seed=seed) for seed in (1, 2))
    for number, (slots, expect) in enumerate(zip(layers, (made.new, made.none, made.new), strict=True)):
        slots.put(0, tensors(seed=number), "silu")
        out = expect(lambda slots=slots: slots.routed(residual, branch, routing))
        assert_same(out, slots(residual, branch, routing.ids))
        assert slots.last is not plans.no_plan
    assert layers[0].last is layers[1].last is not layers[2].last
    other = Slots(2, R, D, device=device)  # the same but for what it reads
    out = made.new(lambda: other.routed(residual, branch, routing, "branch"))
    assert_same(out, other(residual, branch, routing.ids, reads="branch"))


# ---------------------------------------------------------------------------------------------------------------------
# Ops of compiled graphs


def op_inputs(site: SteeringSite, residual: Tensor, branch: Tensor | None, **changed: Any) -> list[Any]:
    w1, w2, b1, b2 = parts(site)
    named = {
        "residual": residual, "branch": branch, "down": w1, "up": w2, "down_bias": b1, "up_bias": b2, "gain": None,
        "scale_tensor": torch.tensor(SCALE, device=residual.device), "basis": None, "scale": 1.0, "activation": "silu",
        "reads": "sum", "keep_a": False,
    }  # fmt: skip
    return list((named | changed).values())


def run_op(inputs: list[Any]) -> Tensor:
    return torch.ops.fused_steer.post_block(*inputs)[0]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the plans of earlier ops."""

    of_op = importlib.import_module("fused_steer.kernels.post_block")
    for name in ("_forward_plans", "_backward_plans", "_inference_plans", "_last_inference"):
        monkeypatch.setattr(of_op, name, {})


@torch.no_grad()
def test_plan_op_goes_by_the_plan_of_another_layer(device, made, fresh):
    first, second = (make_site(device, up_bias=True, seed=seed) for seed in (5, 50))
    operands = states(5, device)
    for number, site in enumerate((first, second)):
        found = (made.none if number else made.new)(lambda site=site: run_op(op_inputs(site, *operands)))
        assert_same(found, ordinary(site, *operands))
    for strength in (0.1, -2.0):  # an input of the graph
        scale = torch.tensor(strength, device=device)
        found = made.none(lambda scale=scale: run_op(op_inputs(first, *operands, scale_tensor=scale)))
        first.scale = scale
        assert_same(found, ordinary(first, *operands))


@pytest.mark.parametrize("other", OTHERS)
@torch.no_grad()
def test_plan_op_of_other_operands(device, made, fresh, other):
    site, operands = make_site(device, up_bias=True), states(5, device)
    site.scale = torch.tensor(SCALE, device=device)
    for given in (operands, OTHERS[other](*operands), OTHERS[other](*operands), operands):
        assert_same(run_op(op_inputs(site, *given)), ordinary(site, *given))


@torch.no_grad()
def test_plan_op_of_other_constants_has_a_plan_of_its_own(device, made, fresh):
    site, operands = make_site(device), states(5, device)
    gain = torch.rand(2, 5, device=device)
    inputs = op_inputs(site, *operands)
    seen = [made.new(lambda: run_op(inputs))]
    changes = ({"activation": "tanh"}, {"scale_tensor": None, "scale": 0.2}, {"gain": gain}, {"reads": "branch"})
    for changed in changes:
        given = op_inputs(site, *operands, **changed)
        seen.append(made.new(lambda given=given: run_op(given)))
        assert_same(made.none(lambda given=given: run_op(given)), seen[-1])
    assert all(not torch.equal(one, other) for one, other in zip(seen, seen[1:], strict=False))
    assert_same(made.none(lambda: run_op(inputs)), seen[0])
    out, a = torch.ops.fused_steer.post_block(*op_inputs(site, *operands, keep_a=True))
    assert_same(out, seen[0])
    assert a.shape == (10, R) and torch.ops.fused_steer.post_block(*inputs)[1].shape == (0,)


@torch.no_grad()
def test_plan_op_is_seen_by_a_dispatch_mode_and_by_fake_tensors(device, made, fresh):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen: list[str] = []
    inputs = op_inputs(make_site(device), *states(5, device))
    expected = run_op(inputs)
    with Seen():
        found = run_op(inputs)
    assert_same(found, expected)
    assert seen == ["fused_steer.post_block.default"]
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(value) if isinstance(value, Tensor) else value for value in inputs]
        assert run_op(fake).shape == expected.shape
    assert_same(run_op(inputs), expected)


@torch.no_grad()
def test_plan_op_asks_for_the_backend(device, made, fresh, monkeypatch):
    inputs = op_inputs(make_site(device), *states(5, device))
    expected = run_op(inputs)
    monkeypatch.setenv("FUSED_STEER_BACKEND", "cutlass")
    with pytest.raises(RuntimeError, match="FUSED_STEER_BACKEND is 'cutlass'; expected one of triton, torch"):
        run_op(inputs)
    monkeypatch.setenv("FUSED_STEER_BACKEND", "triton")
    assert_same(made.none(lambda: run_op(inputs)), expected)


def run_inference(site: SteeringSite, residual: Tensor, branch: Tensor, *reads: str) -> Tensor:
    w1, w2 = parts(site)[:2]
    scale = torch.tensor(site.scale, device=residual.device)
    return torch.ops.fused_steer.post_block_inference(residual, branch, w1, w2, scale, site.activation, *reads)


@torch.no_grad()
def test_plan_inference_op_goes_by_the_plan_of_another_layer(device, made, fresh):
    sites = [make_site(device, seed=seed) for seed in (5, 50)]
    operands = states(5, device)
    for number, site in enumerate(sites):
        found = (made.none if number else made.new)(lambda site=site: run_inference(site, *operands))
        site.scale = torch.tensor(SCALE, device=device)
        assert_same(found, ordinary(site, *operands))
        site.scale = SCALE
    sites[1].activation = "tanh"
    for site in (sites[1], sites[0]) * 2:
        found = run_inference(site, *operands)
        assert_same(found, torch.ops.fused_steer.post_block(*op_inputs(site, *operands, activation=site.activation))[0])
    sites[0].requires_grad_(False)  # needs another plan; both are kept
    made.new(lambda: run_inference(sites[0], *operands))
    sites[1].activation = "silu"
    for site in (sites[1], sites[0]) * 2:
        made.none(lambda site=site: run_inference(site, *operands))
    inputs = op_inputs(sites[0], *operands, reads="branch")
    for turn in range(2):
        found = (made.none if turn else made.new)(lambda: run_inference(sites[0], *operands, "branch"))
        assert_same(found, torch.ops.fused_steer.post_block(*inputs)[0])
        made.none(lambda: run_inference(sites[0], *operands))


@pytest.mark.parametrize("other", [name for name in OTHERS if name != "no branch"])
@torch.no_grad()
def test_plan_inference_op_of_other_operands(device, made, fresh, other):
    site, operands = make_site(device), states(5, device)
    for given in (operands, OTHERS[other](*operands), OTHERS[other](*operands), operands):
        assert_same(run_inference(site, *given), run_op(op_inputs(site, *given)))


def test_plan_a_graph_calls_the_inference_op_where_no_gradient_is_asked_for(device, fresh):
    called: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        called.extend(str(node.target) for node in graph.graph.nodes if "fused_steer" in str(node.target))
        return graph

    def compiled(site: SteeringSite, operands: tuple[Tensor, Tensor]) -> str:
        torch.compiler.reset()
        called.clear()
        out = torch.compile(site, fullgraph=True, backend=backend)(*operands)
        site.scale = site.strength
        assert_same(out.detach(), ordinary(site, *operands).detach())
        return called[0].removesuffix(".default")

    operands = states(5, device)
    with torch.no_grad():
        assert compiled(make_site(device), operands) == "fused_steer.post_block_inference"
        assert compiled(make_site(device, up_bias=True), operands) == "fused_steer.post_block"
    assert compiled(make_site(device), operands) == "fused_steer.post_block"
    assert compiled(make_site(device).requires_grad_(False), operands) == "fused_steer.post_block_inference"
    # W1 reads the branch
    residual, branch = operands
    w1, w2 = (t.detach() for t in parts(make_site(device))[:2])
    scale = torch.tensor(SCALE, device=device)

    def reading(residual: Tensor, branch: Tensor) -> Tensor:
        return post_block(residual, branch, w1, w2, scale=scale, reads="branch")

    called.clear()
    found = torch.compile(reading, fullgraph=True, backend=backend)(residual, branch)
    assert [name.removesuffix(".default") for name in called] == ["fused_steer.post_block_inference"]
    assert_same(found, reading(residual, branch))


def test_plan_inference_op_is_an_op(device):
    site = make_site(device).requires_grad_(False)
    w1, w2 = parts(site)[:2]
    arguments = (*states(5, device), w1, w2, torch.tensor(SCALE, device=device), "silu", "branch")
    # No test of autograd, because this op has no gradient.
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fused_steer.post_block_inference.default, arguments, test_utils=tests)


@pytest.mark.parametrize("other", [name for name in OTHERS if name != "no branch"])
@torch.no_grad()
def test_plan_start_of_generated_code_writes_what_the_op_returns(device, made, fresh, other):
    site, operands = make_site(device), states(5, device)
    start, scale = start_inference(site.activation), torch.tensor(SCALE, device=device)
    for number, given in enumerate((operands, OTHERS[other](*operands), operands, operands)):
        expected = run_op(op_inputs(site, *given))
        out = torch.full_like(expected, torch.nan)
        call = (*given, *parts(site)[:2], scale, out)
        if number == 3:
            made.none(lambda call=call: start(*call))
        else:
            start(*call)
        assert_same(out, expected)
    for out in (
        torch.full((2, 5, 2 * D), torch.nan, device=device)[..., ::2],
        torch.full((2, 5, D), torch.nan, dtype=BF16, device=device),
    ):
        start(*operands, *parts(site)[:2], scale, out)  # no plan writes this
        assert torch.equal(out, run_op(op_inputs(site, *operands)).to(out.dtype))


class Layers(nn.Module):
    """Sites one after the other, as in a model."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.sites = nn.ModuleList(make_site(device, seed=seed) for seed in (5, 50, 500))

    def forward(self, residual: Tensor, branch: Tensor) -> Tensor:
        for site in self.sites:
            residual = site(residual, branch)
        return residual

    def ordinary(self, residual: Tensor, branch: Tensor) -> Tensor:
        for site in self.sites:
            residual = ordinary(site, residual, branch)
        return residual


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Any, Tensor, list[str]]]:
    """Compiles a model by Inductor and calls it: the compiled model, its result, the lines of the generated code."""
    from torch._inductor.utils import run_and_get_code

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # no code of another run

    def run(model: nn.Module, *operands: Tensor, **options: Any) -> tuple[Any, Tensor, list[str]]:
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, **options)
        out, code = run_and_get_code(compiled, *operands)
        return compiled, out, [line.strip() for source in code for line in source.splitlines()]

    return run


def calls_of(lines: list[str]) -> tuple[int, int]:
    """Layers that generated code starts itself, and those that it calls through the dispatcher."""
    started = sum(line.startswith("start_post_block_inference_silu_sum(") for line in lines)
    return started, sum("= torch.ops.fused_steer.post_block_inference.default(" in line for line in lines)


@torch.no_grad()
def test_plan_generated_code_starts_the_layers_itself(device, fresh, generated):
    model, operands = Layers(device), states(5, device)
    compiled, out, lines = generated(model, *operands)
    assert calls_of(lines) == (3, 0)
    assert not [line for line in lines if line.startswith("assert_size_stride(buf")], "sizes of our results are known"
    assert [line for line in lines if line.endswith("# reuse")], "a result's memory serves a later layer"
    assert_same(out, model.ordinary(*operands))
    for change in (-2.0, 0.0, SCALE):
        for site in model.sites:
            site.set_scale(change)
        assert_same(compiled(*operands), model.ordinary(*operands))
    for site in model.sites:
        site.steer_up["default"].weight.data = normal(D, R, device=device, seed=9)
    others = states(5, device, seed=70)
    assert_same(compiled(*others), model.ordinary(*others))
    assert_same(compiled(others[0].mT.contiguous().mT, others[1]), model.ordinary(*others))


class OfBranch(nn.Module):
    """A call that reads the branch, and another use of W1."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        w1, w2 = parts(make_site(device))[:2]
        self.w1, self.w2 = (nn.Parameter(w.detach().clone(), requires_grad=False) for w in (w1, w2))
        self.scale = nn.Buffer(torch.tensor(SCALE, device=device))

    def forward(self, residual: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        return post_block(residual, branch, self.w1, self.w2, scale=self.scale, reads="branch"), self.w1 + 1


@torch.no_grad()
def test_plan_generated_code_that_reads_the_branch(device, fresh, generated):
    model = OfBranch(device)
    for seed in (3, 70):
        operands = states(5, device, seed=seed)
        expected = model(*operands)[0]
        if seed == 3:
            compiled, (out, _), lines = generated(model, *operands)
        else:
            out, _ = compiled(*operands)
        assert_same(out, expected)
    residual, branch = operands
    other = post_block(residual, branch, model.w1, model.w2, scale=model.scale)
    assert not torch.equal(out, other), "not the sum"
    assert sum(line.startswith("start_post_block_inference_silu_branch(") for line in lines) == 1


@torch.no_grad()
def test_plan_generated_code_leaves_the_weights_to_the_plan(device, fresh, generated):
    """Generated code checks residual and branch, and W1 before another kernel uses it. The plan checks the weights."""
    operands = states(5, device)
    weight = f"({R}, {D}), ({D}, 1)"
    for model, checks in ((Layers(device), 0), (OfBranch(device), 1)):
        _, _, lines = generated(model, *operands)
        found = [line for line in lines if line.startswith("assert_size_stride(")]
        if any(line.startswith("assert_size_stride_grouped(") for line in lines):  # torch 2.14: one call checks many
            continue
        if Version(torch.__version__).release < (2, 13):  # checks each input when the code is entered
            continue
        assert sum(weight in line for line in found) == checks
        assert len(found) == 2 + checks
    start, scale = start_inference("silu"), torch.tensor(SCALE, device=device)
    w1, w2 = parts(make_site(device))[:2]
    for _ in range(2):  # without and with a plan
        out = torch.full_like(operands[0], torch.nan)
        with pytest.raises(ValueError, match=rf"down has shape \({R}, {D - 1}\); expected \(r, {D}\)"):
            start(*operands, w1[:, 1:], w2, scale, out)
        with pytest.raises(ValueError, match=rf"up has shape \({D}, {R - 1}\); expected \({D}, {R}\)"):
            start(*operands, w1, w2[:, 1:], scale, out)
        assert out.isnan().all(), "nothing was written"
        start(*operands, w1, w2, scale, out)


@torch.no_grad()
def test_plan_generated_code_of_every_number_of_tokens(device, fresh, generated):
    model = Layers(device)
    compiled, _, lines = generated(model, *states(5, device), dynamic=True)
    assert calls_of(lines) == (3, 0)
    for tokens in (5, 8, 3, 40, 8, 5):
        operands = states(tokens, device)
        assert_same(compiled(*operands), model.ordinary(*operands))


@torch.no_grad()
def test_plan_generated_code_refuses_an_unknown_backend(device, fresh, generated, monkeypatch):
    model, operands = Layers(device), states(5, device)
    compiled, out, _ = generated(model, *operands)
    monkeypatch.setenv("FUSED_STEER_BACKEND", "cutlass")
    with pytest.raises(RuntimeError, match="FUSED_STEER_BACKEND is 'cutlass'; expected one of triton, torch"):
        compiled(*operands)
    monkeypatch.setenv("FUSED_STEER_BACKEND", "torch")
    by_torch = compiled(*operands)
    assert_same(by_torch, model.ordinary(*operands))
    monkeypatch.setenv("FUSED_STEER_BACKEND", "triton")
    assert_same(compiled(*operands), out)


@torch.no_grad()
def test_plan_generated_code_of_the_torch_backend_calls_the_op(device, fresh, generated, monkeypatch):
    monkeypatch.setenv("FUSED_STEER_BACKEND", "torch")
    model, operands = Layers(device), states(5, device)
    _, out, lines = generated(model, *operands)
    assert calls_of(lines) == (0, 3)
    assert_same(out, model.ordinary(*operands))


@torch.no_grad()
def test_plan_generated_code_of_an_unknown_inductor_calls_the_op_and_says_so(device, fresh, generated, monkeypatch):
    from torch._inductor import ir, lowering

    with monkeypatch.context() as changed:
        changed.delattr(ir, "FixedLayout")
        assert "FixedLayout" in inductor.missing.__wrapped__()
    op = torch.ops.fused_steer.post_block_inference.default
    monkeypatch.setattr(inductor, "_lowered", set())
    monkeypatch.setattr(inductor, "missing", lambda: "it has no FixedLayout")
    monkeypatch.delitem(lowering.lowerings, op, raising=False)
    model, operands = Layers(device), states(5, device)
    with pytest.warns(UserWarning, match="is none that fused-steer knows .it has no FixedLayout.; compiled layers go"):
        _, out, lines = generated(model, *operands)
    assert calls_of(lines) == (0, 3)
    assert_same(out, model.ordinary(*operands))


@torch.no_grad()
def test_plan_generated_code_from_inductors_cache(device, fresh, tmp_path, monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, operands = Layers(device), states(5, device)
    hits = []
    for _ in range(2):
        torch.compiler.reset()
        before = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
        assert_same(torch.compile(model, fullgraph=True)(*operands), model.ordinary(*operands))
        hits.append(counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"] - before)
    assert hits[0] == 0 and hits[1] > 0


def test_plan_what_a_call_leaves_behind_is_one_allocation(monkeypatch):
    monkeypatch.setattr(plans, "INTERPRETED", False)
    allocated: list[Tensor] = []

    def empty(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        allocated.append(torch.empty_strided(size, stride, dtype=dtype))
        return allocated[-1]

    made = [torch.empty(3, 5), torch.empty(7, dtype=torch.bfloat16), torch.empty(4, 9), torch.empty(100)]
    names: dict[str, Any] = {"empty": empty, "pointer": Tensor.data_ptr}
    exec("\n".join(plans._allocations(made, [2], names)), names)
    result, scratch = allocated
    assert result.shape == (4, 9) and result.data_ptr() == names["q2"] and names["m2"] is result
    spans = [(names[f"q{i}"], names[f"q{i}"] + made[i].nbytes) for i in (0, 1, 3)]
    assert spans[0][0] == scratch.data_ptr() and spans[-1][1] == scratch.data_ptr() + scratch.nbytes
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans)), "the parts overlap"
    assert all((span[0] - scratch.data_ptr()) % 128 == 0 for span in spans)


def test_plan_compiled_site_trains_by_plans(device, made, fresh):
    site, grad = make_site(device, up_bias=True), normal(2, 5, D, device=device)
    torch.compiler.reset()
    compiled = torch.compile(site, fullgraph=True, backend="aot_eager")
    operands = leaves(states(5, device))
    expected = differentiate(lambda *given: ordinary(site, *given), site, operands, grad)
    for turn in range(3):  # the first runs inside the compiler's own state, so the second makes a new plan
        found = (made.none if turn == 2 else made.new)(lambda: differentiate(compiled, site, operands, grad))
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)


@torch.no_grad()
def test_plan_grouped_op_goes_by_a_plan(device, made, monkeypatch):
    from fused_steer.kernels import grouped

    monkeypatch.setattr(grouped, "_plans", {})
    downs, ups = normal(2, R, D, device=device), normal(2, D, R, device=device)
    ids = torch.tensor([0, 1, -1], dtype=torch.int32, device=device)
    residual, branch = (normal(3, D, device=device, seed=seed) for seed in (1, 2))
    expected = grouped.post_block_grouped(residual, branch, downs, ups, ids)
    operands = (downs, ups, ids, None, None, None, None, "silu", "sum")
    of_branch = (*operands[:-1], "branch")
    op = torch.ops.fused_steer.post_block_grouped
    for turn in range(2):
        found = (made.none if turn else made.new)(lambda: op(residual, branch, *operands))
        assert_same(found, expected)
    expected_of_branch = grouped.post_block_grouped(residual, branch, downs, ups, ids, reads="branch")
    for turn in range(2):
        found = (made.none if turn else made.new)(lambda: op(residual, branch, *of_branch))
        assert_same(found, expected_of_branch)
    in_place = torch.ops.fused_steer.post_block_grouped_
    expected_into = grouped.post_block_grouped(residual, branch.clone(), downs, ups, ids, into_branch=True)
    for turn in range(2):
        into = branch.clone()
        version = into._version
        (made.none if turn else made.new)(lambda into=into: in_place(residual, into, *operands))
        assert_same(into, expected_into)
        assert into._version == version + 1  # autograd knows that its saved tensor changed


def test_plan_grouped_op_refuses_a_gradient():
    downs, ups, x = torch.randn(2, R, D, requires_grad=True), torch.randn(2, D, R), torch.randn(3, D)
    operands = (downs, ups, torch.tensor([0, 1, -1]), None, None, None, None, "silu", "sum")
    with pytest.raises(RuntimeError, match="no gradient; expected torch.no_grad"):
        torch.ops.fused_steer.post_block_grouped(x, x.clone(), *operands)


# ---------------------------------------------------------------------------------------------------------------------
# Launches, over the stub driver


@pytest.fixture(scope="module")
def worked() -> dict[str, Any]:
    """Run plan_worker.py; return its findings."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64") or shutil.which("gcc") is None:
        pytest.skip("the stub driver needs gcc, Linux and x86-64")
    done = subprocess.run(
        [sys.executable, "-m", "bench.stub", "tests/plan_worker.py"],
        cwd=Path(__file__).parents[2], env=dict(os.environ), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_plan_fp_fusion_is_not_the_environments(worked):
    unset, off = worked["fp_fusion_of_the_environment"]["found"]
    assert unset == off and len(unset[0]) >= 1 and all(unset[0])


@pytest.fixture
def direct(worked) -> None:
    """Skip tests of host time where a plan starts kernels by Triton's launcher, which adds calls."""
    assert worked["launcher"]["direct"] == (not triton.__version__.startswith("3.6."))
    if not worked["launcher"]["direct"]:
        pytest.skip("Triton 3.6 has another launcher")


@pytest.mark.usefixtures("direct")
def test_plan_a_layer_costs_few_python_calls(worked):
    """The host's time of a planned call is that of these calls: 12 and 31, a few more with other torch."""
    assert 0 < worked["python_calls"]["inference"] <= 14
    assert 0 < worked["python_calls"]["training"] <= 34


@pytest.mark.usefixtures("direct")
def test_plan_a_layer_with_a_fused_norm_costs_few_python_calls(worked):
    """36 and 52. The same layer with its norm unfused: 18 and 35, and PyTorch's own norm."""
    fused, unfused = (worked["python_calls_with_norms"][name] for name in ("fused", "unfused"))
    assert unfused["inference"] < fused["inference"] <= 40
    assert unfused["training"] < fused["training"] <= 58


def test_plan_with_a_norm_planned_launches_are_those_of_the_first_call(worked):
    """Three layers share a plan forward. There are two backward: the last layer's `out` has no gradient of its own."""
    inference, training = (worked["same_launches_with_norms"][name] for name in ("inference", "training"))
    assert inference["made"] == [[True], [], []] and training["made"] == [[True] * 3, [], []]
    for found in (inference, training):
        assert found["same"] and found["ordinary"] and found["norms"] == ["fused"] * 3
    backward = ["rms_norm_bwd_kernel"] + [f"post_block_bwd_{name}_kernel" for name in ("rows", "columns", "finish")]
    assert training["kernels"] == inference["kernels"] + backward * 3
    assert inference["kernels"] == ["post_block_fwd_resident_kernel"] * 3


def test_plan_planned_launches_are_those_of_the_first_call(worked):
    inference, training, rows = (
        worked[name] for name in ("same_launches", "same_launches_in_training", "rows_of_their_own")
    )
    assert inference["made"] == [[True], [], []] and training["made"] == [[True, True], []]
    assert rows["made"] == [[True], []], "the second layer's slots start the plan of the first's"
    assert inference["same"] and training["same"] and rows["same"]
    assert inference["count"] >= 1 and training["count"] >= 3 and rows["count"] >= 2


def test_plan_planned_launches_have_the_arguments_of_the_ordinary_ones(worked):
    inference, training = (worked["same_arguments"][name] for name in ("inference", "training"))
    assert inference["same"] and training["same"]
    assert inference["count"] >= 1 and training["count"] >= 4
    assert inference["read"] >= 4 and training["read"] > inference["read"], "residual, branch, W1, W2"


def test_plan_compiled_launches_are_the_eager_ones(worked):
    compiled = worked["compiled"]
    assert compiled["same"] and compiled["count"] >= 2
    # PyTorch may watch a graph's first call by a dispatch mode, under which no plan is used.
    assert compiled["made"][2:] == [[], []] and sum(compiled["made"][:2], []) == [True, True]


def test_plan_generated_code_launches_by_plans(worked):
    found = worked["generated_code"]
    assert (found["started"], found["made"], found["count"]) == (2, [], 2), "two layers, a launch each"
    assert found["streams"] == [[48], [0]] and found["first"], "the stream and the addresses of the moment"
    assert found["elsewhere"] and found["around"] == ["begin", "end"] * 2, "the device is made current for each layer"
    assert found["hooked"] and found["seen"] == found["count"], "a profiler's hooks see each launch"


def test_plan_addresses_are_read_in_each_call(worked):
    assert worked["addresses_of_the_moment"]["found"] == [True, True, True]
    freed = worked["a_freed_tensors_address"]
    assert freed["moved"] and freed["read"] and not freed["stale"] and freed["made"] == 0


def test_plan_misaligned_operands_have_no_plan(worked):
    misaligned = worked["misaligned"]
    assert misaligned["address"] == 2 and misaligned["aside"] == [False] and misaligned["again"] == []
    assert misaligned["count"] >= 1


def test_plan_streams_are_asked_for_in_each_call(worked):
    assert worked["stream_of_the_moment"]["found"] == [[0], [0], [48], [64], [0]]


def test_plan_the_operands_device_is_made_current_around_a_launch(worked):
    elsewhere = worked["another_device_is_current"]
    assert elsewhere["quiet"] == [] and elsewhere["planned"] == elsewhere["trained"] == []
    assert elsewhere["count"] >= 1 and elsewhere["seen"] == [[0, 0]] and elsewhere["after"] == 1
    assert elsewhere["around"] == 2 and elsewhere["entered"] == ["cpu"]  # forward and backward


def test_plan_hooks_of_launches_see_each(worked):
    *chains, replaced = worked["hooks_of_launches"]
    for chain in chains:
        count = chain["plain"]
        assert count >= 1 and chain["hooked"] == [[count, count]] * 2
        assert chain["after"] == count and chain["seen"] == 0 and chain["made"] == []
    assert replaced["launched"] == replaced["seen"] >= 1


def test_plan_backend_is_asked_for_in_each_call(worked):
    between = worked["backend_between_calls"]
    assert between["torch"] == 0 and between["backend"] == "torch"
    assert between["refused"] == "FUSED_STEER_BACKEND is 'nonsense'; expected one of triton, torch"
    assert between["again"] == [] and between["count"] >= 1


def test_plan_threads_share_plans(worked):
    assert worked["threads"]["wrong"] == []
