"""Tests of slots, which hold one layer's adapters side by side: each token is steered as by its adapter alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused_steer.kernels import post_block
from fused_steer.kernels.grouped import Routing
from models import assert_close, refused
from torch import Tensor

from fused_steer.serving.slots import Slots

HIDDEN, RANK = 24, 6
NAMES = ("steer_down.weight", "steer_up.weight", "steer_down.bias", "steer_up.bias")


def adapter(rank: int, *, down_bias: bool = False, up_bias: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Draw an adapter's tensors by their names below the site; rank 0 is a vector."""
    shapes = ((rank, HIDDEN), (HIDDEN, rank), (rank,), (HIDDEN,))
    there = (rank > 0, rank > 0, down_bias, up_bias or not rank)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) / 4
        for name, shape, given in zip(NAMES, shapes, there, strict=True)
        if given
    }


def alone(x: Tensor, branch: Tensor | None, tensors: dict[str, Tensor], activation: str, gain: Tensor | None) -> Tensor:
    down, up, down_bias, up_bias = (tensors.get(name) for name in NAMES)
    biases = {"down_bias": down_bias, "up_bias": up_bias}
    return post_block(x, branch, down, up, **biases, activation=activation, gain=gain)


def state(slots: Slots) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in slots.named_buffers()}


ADAPTERS = (
    (adapter(RANK, down_bias=True, up_bias=True, seed=1), "silu"),
    (adapter(2, seed=2), "tanh"),
    (adapter(0, seed=3), "identity"),
    (adapter(4, down_bias=True, seed=4), "gelu"),
)


@pytest.mark.parametrize("with_branch", [True, False], ids=["branch", "finished"])
@pytest.mark.parametrize("with_gain", [True, False], ids=["gain", "full"])
def test_slots_each_token_is_steered_as_by_its_adapter_alone(device, with_branch, with_gain):
    slots = Slots(5, RANK, HIDDEN, device=device, down_bias=True, up_bias=True)
    for slot in range(5):  # nothing of the earlier adapter remains
        slots.put(slot, {name: 9 + 0 * t for name, t in ADAPTERS[0][0].items()}, "gelu")
    for slot, (tensors, activation) in enumerate(ADAPTERS):
        slots.put(slot, tensors, activation)
    slots.clear(4)
    x, branch = torch.randn(2, 3, 8, HIDDEN, device=device)
    branch = branch if with_branch else None
    ids = torch.tensor([[0, 1, 2, 3, 4, -1, 0, 1], [-1, 2, 2, 3, 3, 0, 4, -1], [1] * 8], dtype=torch.int32).to(device)
    gain = 0.5 + torch.rand(3, 8, device=device) if with_gain else None
    out = slots(x, branch, ids, gain)
    untouched = (ids == -1) | (ids == 4)
    assert torch.equal(out[untouched], (x if branch is None else x + branch)[untouched])
    for slot, (tensors, activation) in enumerate(ADAPTERS):
        moved = {name: tensor.to(device) for name, tensor in tensors.items()}
        own = ids == slot
        assert_close(out[own], alone(x, branch, moved, activation, gain)[own])
    if branch is not None:
        shift = out - (x + branch)
        into = branch.clone()
        assert slots(x, into, ids, gain, into_branch=True) is into
        assert_close(into, branch + shift)
    routing = Routing(ids, gain)  # computed once, for all layers
    for _ in range(2):
        assert torch.equal(slots.routed(x, branch, routing), out)
    slots.to(torch.bfloat16).to(torch.float32)  # replaces the tensors by rounded ones
    assert torch.equal(slots.routed(x, branch, routing), slots(x, branch, ids, gain))
    assert not torch.equal(slots.routed(x, branch, routing), out)


@pytest.mark.parametrize(
    ("change", "error", "parts"),
    [
        ({"residual": torch.zeros(2, 3, HIDDEN - 1)}, ValueError, ["(2, 3, 23)", "expected (2, 3, 24)"]),
        ({"branch": torch.zeros(3, 2, HIDDEN)}, ValueError, ["(3, 2, 24)", "expected (2, 3, 24)"]),
        ({"residual": torch.zeros(2, 3, HIDDEN).double()}, TypeError, ["torch.float64", "expected float32"]),
        ({"residual": torch.zeros(2, 3, HIDDEN, device="meta")}, ValueError, ["on meta", "expected cpu"]),
        ({"routing": Routing(torch.full((2, 3), 7))}, ValueError, ["adapter_ids has 7", "expected below 2"]),
    ],
)
def test_slots_routed_tokens_that_do_not_fit(change, error, parts, monkeypatch):
    monkeypatch.setenv("FUSED_STEER_BACKEND", "torch")
    call = {
        "residual": torch.zeros(2, 3, HIDDEN),
        "branch": torch.zeros(2, 3, HIDDEN),
        "routing": Routing(torch.zeros(2, 3, dtype=torch.int32)),
    }
    slots = Slots(2, RANK, HIDDEN)
    slots.routed(**call)
    with refused(error, *parts):
        slots.routed(**{**call, **change})


def test_slots_vectors_alone_need_no_matrices():
    slots = Slots(2, 0, HIDDEN, up_bias=True)
    vector = adapter(0)
    slots.put(1, vector, "identity")
    assert slots.downs is None and slots.ups is None
    x = torch.randn(3, HIDDEN)
    assert_close(slots(x, None, torch.tensor([1, -1, 0])), x + torch.stack([vector[NAMES[3]], *torch.zeros(2, HIDDEN)]))


def test_slots_values_take_the_dtype_of_the_slots_and_no_state_dict_holds_them():
    slots = Slots(3, 4, HIDDEN, dtype=torch.bfloat16, down_bias=True)
    slots.put(2, adapter(4), "relu")
    assert slots.downs is not None and torch.equal(slots.downs[2], adapter(4)[NAMES[0]].bfloat16())
    assert slots.nbytes == 3 * (2 * (4 * HIDDEN + HIDDEN * 4 + 4) + 4)
    assert not slots.state_dict() and not list(slots.parameters())


def test_slots_made_in_inference_mode_are_written_outside_it():
    with torch.inference_mode():
        slots = Slots(1, 4, HIDDEN)
        tensors = {name: tensor.clone() for name, tensor in adapter(4).items()}
    slots.put(0, tensors, "silu")
    slots.clear(0)


def _with(**changed: Any) -> dict[str, Tensor]:
    tensors = adapter(4)
    for name, value in changed.items():
        tensors[name.replace("__", ".")] = value
    return {name: value for name, value in tensors.items() if value is not None}


@pytest.mark.parametrize(
    ("slot", "tensors", "activation", "parts"),
    [
        (3, _with(), "silu", ["slot is 3", "0 to 2"]),
        (-1, _with(), "silu", ["slot is -1", "0 to 2"]),
        (0, _with(), "swish", ["activation is 'swish'", "expected one of identity, silu"]),
        (0, adapter(5), "silu", ["rank 5", "at most 4"]),
        (0, _with(steer_up__weight=torch.ones(HIDDEN + 1, 4)), "silu", ["steer_up.weight", f"({HIDDEN}, 4)"]),
        (0, _with(steer_down__weight=torch.ones(4, HIDDEN - 1)), "silu", ["steer_down.weight", f"(4, {HIDDEN})"]),
        (0, _with(steer_up__weight=torch.ones(HIDDEN, 3)), "silu", ["steer_up.weight", f"({HIDDEN}, 4)"]),
        (0, _with(steer_down__bias=torch.ones(4)), "silu", ["steer_down.bias", "no room"]),
        (0, adapter(4, up_bias=True), "silu", ["steer_up.bias", "no room"]),
        (0, _with(steer_up__weight=None), "silu", ["expected both or neither"]),
        (0, _with(gate=torch.ones(4)), "silu", ["'gate'", "expected names among steer_down.weight"]),
        (0, {}, "silu", ["tensors has []"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_slots_what_has_no_room_is_refused_before_anything_is_written(slot, tensors, activation, parts):
    slots = Slots(3, 4, HIDDEN)
    slots.put(0, adapter(3, seed=8), "tanh")
    before = state(slots)
    with refused(ValueError, *parts):
        slots.put(slot, tensors, activation)
    assert all(torch.equal(buffer, before[name]) for name, buffer in slots.named_buffers())


@pytest.mark.parametrize(
    ("arguments", "options", "error", "part"),
    [
        ((0, 4, HIDDEN), {}, ValueError, "count is 0"),
        ((1, 257, HIDDEN), {}, ValueError, "rank is 257"),
        ((1, 0, HIDDEN), {}, ValueError, "rank 0"),
        ((1, 0, HIDDEN), {"up_bias": True, "down_bias": True}, ValueError, "rank 0"),
        ((1, 4, HIDDEN), {"dtype": torch.float64}, TypeError, "dtype is torch.float64"),
    ],
)
def test_slots_that_cannot_be_are_refused(arguments, options, error, part):
    with refused(error, part, "expected"):
        Slots(*arguments, **options)
