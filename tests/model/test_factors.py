"""Factors whose weight is computed in each pass: parametrizations, pruning, spectral norms. Compared with hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import assert_close, build, logits, randomize, refused, steering_parameters, tokens
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm

import fused_steer.peft
from fused_steer import SteerConfig, patch_model

CONFIG = SteerConfig(rank=4)


class Part(nn.Module):
    """W1 or W2 of a hook, with its bias."""

    def __init__(self, factor: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(factor.weight.detach().clone())
        self.bias = None if factor.bias is None else nn.Parameter(factor.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def seeded(change: Callable[[nn.Module], Any]) -> Callable[[nn.Module], None]:
    def changed(factor: nn.Module) -> None:
        torch.manual_seed(1)  # of the spectral norms' first vectors
        change(factor)

    return changed


CHANGES = {
    "weight_norm": seeded(parametrizations.weight_norm),
    "spectral_norm": seeded(parametrizations.spectral_norm),
    "spectral_norm by a hook": seeded(spectral_norm),
    "pruned": seeded(lambda factor: prune.l1_unstructured(factor, "weight", 0.5)),
}
WAYS = ("patch_model", "PEFT")


def pair(way: str) -> tuple[nn.Module, nn.Module, list[nn.Module], list[nn.Module]]:
    """Return a steered model, the same with hooks, and the factors W1 and W2 of both, in the same order."""
    if way == "PEFT":
        config = fused_steer.peft.PostBlockConfig(rank=4, up_bias=True)
        steered = get_peft_model(build(), config)
        layers = steered.base_model.model.model.layers
    else:
        steered = patch_model(build(), CONFIG)
        layers = steered.model.layers
    randomize(steered)
    hooked = build().requires_grad_(False)
    factors: list[nn.Module] = []
    parts: list[nn.Module] = []
    for layer, other in zip(layers, hooked.model.layers, strict=True):
        both = [layer.post_block.steer_down["default"], layer.post_block.steer_up["default"]]
        other.down, other.up = (Part(factor) for factor in both)
        other.register_forward_hook(lambda layer, args, out: out + layer.up(F.silu(layer.down(out))))
        factors += both
        parts += [other.down, other.up]
    return steered.train(), hooked.train(), factors, parts


def step(model: nn.Module, seed: int) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    model(tokens(seed), labels=tokens(seed)).loss.backward()
    torch.optim.SGD(trained, lr=0.5).step()
    model.zero_grad()


def values(factors: list[nn.Module]) -> list[Tensor]:
    return [p.detach() for factor in factors for _, p in sorted(factor.named_parameters())]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("when", ["before the first pass", "after a pass"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_factors_that_are_computed_train_as_a_hooks(change, when, way):
    steered, hooked, factors, parts = pair(way)
    if when == "after a pass":
        step(steered, 7), step(hooked, 7)
    for factor in (*factors, *parts):
        change(factor)
    before = [value.clone() for value in values(factors)]
    for seed in range(3):
        step(steered, seed), step(hooked, seed)
    for ours, theirs, earlier in zip(values(factors), values(parts), before, strict=True):
        assert_close(ours, theirs)
        assert not torch.equal(ours, earlier)
    assert_close(logits(steered.eval()), logits(hooked.eval()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_factors_that_are_computed_under_checkpointing(reentrant):
    steered, hooked, factors, parts = pair("patch_model")
    for factor in (*factors, *parts):
        parametrizations.weight_norm(factor)
    for model in (steered, hooked):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    for seed in range(2):
        steered.train()  # drops the plans
        step(steered, seed), step(hooked, seed)
    for ours, theirs in zip(values(factors), values(parts), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_factors_that_are_computed_are_saved_and_served_by_their_values(change, tmp_path):
    steered, _, factors, _ = pair("patch_model")
    for factor in factors:
        change(factor)
    step(steered, 0)
    # Right after the optimizer's step, in training mode: what pruning computed before is out of date.
    before = [buffer.clone() for factor in factors for buffer in factor.buffers()]
    steered.steering.save(tmp_path / "adapter")
    steered.save_pretrained(tmp_path / "whole")
    assert all(map(torch.equal, before, (buffer for factor in factors for buffer in factor.buffers())))
    assert all(module.training for factor in factors for module in factor.modules())
    expected = logits(steered.eval())
    for folder in ("adapter", "whole"):
        assert_close(logits(patch_model(build(), tmp_path / folder, check_base=False)), expected)
    with steered.steering.batch(["default", None]), torch.no_grad():
        rows = steered(tokens()).logits
    assert_close(rows[0], expected[0])
    assert torch.equal(logits(copy.deepcopy(steered)), expected)
    with refused(ValueError, "steer_down.weight of adapter 'default' at layer 0 is computed from other parameters"):
        steered.steering.restore(tmp_path / "adapter")
    assert torch.equal(logits(steered), expected)


@pytest.mark.parametrize("config", [CONFIG, SteerConfig(form="loreft", rank=4)], ids=["lowrank", "loreft"])
def test_factors_that_are_computed_are_computed_once_in_a_pass(config):
    class Counted(nn.Module):
        calls = 0

        def forward(self, weight: Tensor) -> Tensor:
            Counted.calls += 1
            return 2 * weight

    model = patch_model(build(), config).train()
    for layer in model.model.layers:
        parametrize.register_parametrization(layer.post_block.steer_down["default"], "weight", Counted())
    for seed in range(2):
        Counted.calls = 0
        step(model, seed)
        assert Counted.calls == len(model.model.layers)


def test_factors_of_loreft_that_are_computed_train():
    model = patch_model(build(), SteerConfig(form="loreft", rank=4)).train()
    for layer in model.model.layers:
        prune.random_unstructured(layer.post_block.steer_down["default"], "weight", 0.25)
    before = {name: p.detach().clone() for name, p in steering_parameters(model).items()}
    for seed in range(3):
        step(model, seed)
    moved = [name for name, p in steering_parameters(model).items() if not torch.equal(p, before[name])]
    assert len(moved) == len(before) > 0


def test_factors_that_are_replaced_steer():
    model = patch_model(build(), CONFIG)
    randomize(model)
    logits(model)
    other = patch_model(build(), CONFIG)
    randomize(other, seed=5)
    for layer, source in zip(model.model.layers, other.model.layers, strict=True):
        layer.post_block.steer_up["default"] = source.post_block.steer_up["default"]
        layer.post_block.steer_down["default"] = source.post_block.steer_down["default"]
    assert torch.equal(logits(model), logits(other))
