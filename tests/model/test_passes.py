"""Tests of LoReFT's rotations for a pass: correct for that pass, and never used longer or for other parameters."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fused_steer.kernels.rotation import rotate
from models import assert_close, build, randomize, steering_parameters, tokens
from torch import Tensor, nn

from fused_steer import SteerConfig, patch_model
from fused_steer.model import passes
from fused_steer.model.site import SteeringSite
from fused_steer.model.watch import thread

CONFIG = SteerConfig(form="loreft", rank=4)
IDS = tokens()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Record the W1 and W2 that each layer gets, or None. Assert that no pass is open at the end."""
    answers: list[Any] = []
    of = passes.Rotations.of

    def noted(self: passes.Rotations, *operands: Any) -> Any:
        answers.append(of(self, *operands))
        return answers[-1]

    monkeypatch.setattr(passes.Rotations, "of", noted)
    yield answers
    assert thread.rotations == []


def steered(config: SteerConfig = CONFIG, seed: int = 1) -> nn.Module:
    model = patch_model(build(), config)
    randomize(model, seed=seed)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS.to(model.device)).logits


def logits_apart(model: nn.Module) -> Tensor:
    """Return the logits with each rotation made in its layer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes.Passes, "begin", lambda self, weights: None)
        return logits(model)


def matrix_of(model: nn.Module, layer: int) -> nn.Parameter:
    return steering_parameters(model)[f"model.layers.{layer}.post_block.steer_up.weight"]


def test_passes_every_layer_uses_its_rotation(seen, device, monkeypatch):
    model = steered().to(device)
    steer, steers = SteeringSite.steer, []
    monkeypatch.setattr(SteeringSite, "steer", lambda self, *states: steers.append(self) or steer(self, *states))
    expected = logits_apart(model)
    for number in (1, 2, 3):
        steers.clear()
        assert_close(logits(model), expected)
        assert len(seen) == 3 * number and None not in seen
    planned = os.environ["FUSED_STEER_BACKEND"] == "triton"
    assert len(steers) == (0 if planned else 3), "a layer with a plan calls it past the site's own function"
    assert len({down.data_ptr() for down, _ in seen[-3:]}) == 3


@pytest.mark.parametrize("case", ["disabled", "none in use", "low rank", "vector", "batch"])
def test_passes_that_no_loreft_steers_have_none(seen, case):
    config = {"vector": SteerConfig(form="vector"), "low rank": SteerConfig(rank=4)}.get(case, CONFIG)
    model = steered(config)
    if case == "disabled":
        with model.steering.disabled():
            logits(model)
    elif case == "batch":
        with model.steering.batch(["default"] * len(IDS)):
            logits(model)
    else:
        if case == "none in use":
            model.steering.use(None)
        logits(model)
    assert seen == []


@pytest.mark.parametrize("write", ["data", "numpy", "copy", "optimizer"])
def test_passes_a_write_between_passes_that_no_version_shows(seen, write):
    model = steered()
    first, matrix = logits(model), matrix_of(model, 1)
    change = torch.randn(matrix.shape)
    if write == "data":
        matrix.data.add_(change)
    elif write == "numpy":
        np.add(matrix.detach().numpy(), change.numpy(), out=matrix.detach().numpy())
    elif write == "copy":
        matrix.data.copy_(change)
    else:
        matrix.grad = change
        torch.optim.SGD([matrix], lr=1.0, fused=True).step()
    assert not torch.equal(logits(model), first)
    assert_close(logits(model), logits_apart(model))
    assert None not in seen


@pytest.mark.parametrize("change", ["data", "parameter", "load"])
def test_passes_a_matrix_that_moves_within_a_pass_is_read_where_it_is(seen, change):
    """If a hook of the first layer changes the last layer's matrix, the last layer uses the new one."""
    model = steered()
    site = model.model.layers[2].post_block
    other = torch.randn(32, 4)

    def move(*_: Any) -> None:
        if change == "data":
            site.steer_up["default"].weight.data = other.clone()
        elif change == "parameter":
            site.steer_up["default"].weight = nn.Parameter(other.clone(), requires_grad=False)
        else:
            site.load_state_dict({**site.state_dict(), "steer_up.default.weight": other.clone()}, assign=True)

    handle = model.model.layers[0].register_forward_hook(move)
    found = logits(model)
    handle.remove()
    assert None not in seen[:2] and seen[2:] and not any(seen[2:])
    assert_close(found, logits_apart(model))


def test_passes_a_pass_cut_short_leaves_nothing_behind(seen):
    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    model = steered()
    for layer in (model.model.layers[1], model.model):
        handle = layer.register_forward_pre_hook(stop)
        with pytest.raises(Stop):
            logits(model)
        handle.remove()
        assert thread.rotations == []
    matrix_of(model, 1).data.neg_()
    assert_close(logits(model), logits_apart(model))


def test_passes_the_rotations_of_an_interrupted_pass_end_with_the_next(seen):
    """After Ctrl-C in a layer PyTorch calls no hook at the end of the pass, so the next pass drops the rotations."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    model = steered()
    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(model)
    handle.remove()
    matrix_of(model, 1).data.neg_()
    found = logits(model)
    assert thread.rotations == []
    assert_close(found, logits_apart(model))


@pytest.mark.parametrize("deleted", [False, True])
def test_passes_an_interrupted_pass_of_another_model_does_not_matter_to_checkpointing(deleted):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    interrupted, model = steered(), steered()
    interrupted.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(interrupted)
    if deleted:
        del interrupted
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in steering_parameters(model).items()})
        model.zero_grad()
    assert_close(*found)
    thread.rotations.clear()


def test_passes_an_early_exit_and_layers_called_by_themselves(seen):
    model = steered()
    model.config.num_hidden_layers = 2
    logits(model)
    assert len(seen) == 2
    x = torch.randn(2, 9, 32)
    position = model.model.rotary_emb(x, torch.arange(9)[None])
    with torch.no_grad():
        model.model.layers[0](x, position_embeddings=position)
    assert len(seen) == 2, "outside of a pass a layer makes its own rotation"


def test_passes_threads_have_rotations_of_their_own(seen):
    """Two threads that run one model at a time."""
    weights = {nn.Module(): (torch.randn(4, 32), torch.randn(32, 4))}
    model, other = passes.Passes(), []
    model.begin(weights)
    mine = thread.rotations[-1]

    def run() -> None:
        other.append(list(thread.rotations))
        model.begin(weights)
        other.append(thread.rotations[-1])
        model.end()
        other.append(list(thread.rotations))

    one = threading.Thread(target=run)
    one.start()
    one.join()
    assert other[0] == other[2] == [] and other[1] not in (None, mine)
    assert thread.rotations == [mine]
    model.end()


def test_passes_copies_have_passes_of_their_own(seen):
    model = steered()
    logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        randomize(twin, seed=3)
        assert_close(logits(twin), logits_apart(twin))
        assert not torch.equal(logits(twin), logits(model))


def test_passes_parameters_or_a_stream_that_are_others_get_none(monkeypatch):
    source, matrix = torch.randn(4, 32), torch.randn(32, 4)
    site = nn.Module()
    with torch.no_grad():
        rotations = passes.Rotations({site: (source, matrix)})
        for found, expected in zip(rotations.of(site, source, matrix), rotate(source, matrix), strict=True):
            assert_close(found, expected)
        assert rotations.of(nn.Module(), source, matrix) is None
        assert rotations.of(site, source.clone(), matrix) is None
        assert rotations.of(site, source, matrix.detach()) is None
    assert rotations.of(site, source, matrix) is None, "made without gradients, asked for with them"
    monkeypatch.setattr(passes, "_stream", lambda device: "another")
    with torch.no_grad():
        assert rotations.of(site, source, matrix) is None


def test_passes_parameters_that_are_sharded_or_freed_are_not_rotated():
    whole = torch.randn(4, 32), torch.randn(32, 4)
    freed = torch.randn(4, 32)
    freed.untyped_storage().resize_(0)  # as FSDP leaves a layer's weights between its calls
    shard = nn.Parameter(torch.randn(64))
    others = [(freed, whole[1]), (shard, shard), (torch.empty(0), torch.empty(0)), (torch.randn(8, 32)[::2], whole[1])]
    others.append((whole[0].to("meta"), whole[1].to("meta")))
    sites = [nn.Module() for _ in range(len(others) + 1)]
    rotations = passes.Rotations(dict(zip(sites, [whole, *others], strict=True)))
    assert rotations.of(sites[0], *whole) is not None
    assert all(rotations.of(site, *pair) is None for site, pair in zip(sites[1:], others, strict=True))
