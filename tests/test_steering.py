"""Tests of model.steering: named adapters, the scale, switching off, and the report."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from models import (
    HIDDEN,
    LAYERS,
    Hooked,
    assert_as_exact_as_hooks,
    assert_no_worse,
    build,
    build_frozen,
    logits,
    randomize,
    refused,
    steering_parameters,
    tokens,
)
from torch import Tensor, nn

from fused_steer import SteerConfig, patch_model

#: Adapters that differ in every field of the config, and φ of each.
ADAPTERS = {
    "default": (SteerConfig(rank=4, down_bias=True, up_bias=True), F.silu),
    "polite": (SteerConfig(rank=2, activation="tanh", layers=[1], scale=-0.5), torch.tanh),
    "vec-1": (SteerConfig(form="vector", layers=[0, 2]), None),
    "terse_2": (SteerConfig(rank=8, activation="gelu", layers=[2], down_bias=True, scale=2.0), F.gelu),
}


def patched(*names: str) -> nn.Module:
    """Build a model with these random adapters and use the first."""
    first, *others = names
    model = patch_model(build(), ADAPTERS[first][0], adapter_name=first)
    for name in others:
        model.steering.add(name, ADAPTERS[name][0])
    for seed, name in enumerate(names):
        randomize(model, name, seed)
    return model


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def of_adapter(model: nn.Module, adapter: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if f".{adapter}." in name}


def logits_of_all(model: nn.Module) -> dict[str, Tensor]:
    result = {}
    for name in model.steering.names:
        model.steering.use(name)
        result[name] = logits(model)
    return result


def bare_logits() -> Tensor:
    return logits(build_frozen())


# ---------------------------------------------------------------------------------------------------------------------
# Adapters


def test_steering_each_adapter_steers_and_trains_alone():
    model = patched(*ADAPTERS)
    assert model.steering.names == list(ADAPTERS)
    assert model.steering.active == "default"
    for name in [*ADAPTERS, *reversed(ADAPTERS)]:
        config, activation = ADAPTERS[name]
        parameters = steering_parameters(model, name)
        assert len({path.partition(".post_block.")[0] for path in parameters}) == len(config.layers or range(LAYERS))
        model.steering.use(name)
        assert model.steering.active == name
        assert model.steering.config() == model.steering.config(name) == config
        assert trained(model) == of_adapter(model, name)
        assert set(model.steering.parameters()) == set(parameters.values())
        hooked = Hooked(build(), parameters, scale=config.scale, activation=activation)
        assert_as_exact_as_hooks(model, parameters, hooked)
    model.steering.use(None)
    assert model.steering.active is None
    assert trained(model) == set() and list(model.steering.parameters()) == []
    assert torch.equal(logits(model), bare_logits())


def test_steering_switching_gives_the_bits_of_each_alone():
    alone = {}
    for seed, name in enumerate(ADAPTERS):
        model = patch_model(build(), ADAPTERS[name][0], adapter_name=name)
        randomize(model, name, seed)
        alone[name] = logits(model)
    together = logits_of_all(patched(*ADAPTERS))
    assert together.keys() == alone.keys()
    for name in alone:
        assert torch.equal(together[name], alone[name])
        assert not torch.equal(alone[name], bare_logits())
    assert len({tuple(values.flatten().tolist()) for values in alone.values()}) == len(ADAPTERS)


def test_steering_added_adapter_is_not_in_use():
    model = patched("default")
    before = logits(model)
    model.steering.add("polite", ADAPTERS["polite"][0])
    assert model.steering.active == "default"
    assert trained(model) == of_adapter(model, "default")
    assert torch.equal(logits(model), before)
    model.steering.use("polite")
    assert torch.equal(logits(model), bare_logits())  # a fresh adapter changes nothing
    model.steering.add("another")
    assert model.steering.config("another") == SteerConfig()


def test_steering_remove():
    model = patched("default", "polite", "vec-1")
    model.steering.use("vec-1")
    before = logits(model)
    model.steering.remove("polite")
    assert model.steering.names == ["default", "vec-1"]
    assert not of_adapter(model, "polite")
    assert torch.equal(logits(model), before)
    model.steering.remove("vec-1")
    assert model.steering.active is None
    assert torch.equal(logits(model), bare_logits())
    model.steering.add("vec-1", SteerConfig())
    assert model.steering.names == ["default", "vec-1"]


def test_steering_load_under_a_name(tmp_path):
    model = patched("default", "polite")
    expected = logits_of_all(model)
    model.steering.save(tmp_path, "polite")
    model.steering.use("default")
    model.steering.load(tmp_path, name="loaded")
    assert model.steering.names == ["default", "polite", "loaded"]
    assert model.steering.active == "default"
    assert trained(model) == of_adapter(model, "default")
    assert torch.equal(logits(model), expected["default"])
    model.steering.use("loaded")
    assert model.steering.config() == ADAPTERS["polite"][0]
    assert torch.equal(logits(model), expected["polite"])


def test_steering_unpatch_takes_steering_away():
    model = patched(*ADAPTERS)
    steering = model.steering
    assert steering.unpatch() is model
    assert not hasattr(model, "steering")
    assert not any("post_block" in name for name in model.state_dict())
    assert steering.names == [] and list(steering.report()) == []
    assert torch.equal(logits(model), logits(build()))


# ---------------------------------------------------------------------------------------------------------------------
# Strength, and off


def test_steering_scale():
    model = patched("default")
    assert model.steering.scale == 1.0
    for scale in (0.5, -2, 3.0):
        model.steering.scale = scale
        assert model.steering.scale == model.steering.config().scale == scale
        hooked = Hooked(build(), steering_parameters(model), scale=scale)
        assert_no_worse(*map(logits, (model, hooked.model, hooked.double().model)))
    model.steering.scale = 0
    assert torch.equal(logits(model), bare_logits())


@pytest.mark.parametrize("name", ["positions", "active", "scales", "mode"])
def test_steering_refuses_to_set_what_is_no_setting(name):
    """`steering.positions = "generated"` was kept as an attribute that nothing read."""
    model = patched("default")
    with refused(AttributeError, f"steering.{name} is set; expected steering.scale", model=model):
        setattr(model.steering, name, "generated")


def test_steering_scale_is_of_the_adapter_in_use():
    model = patched("default", "polite")
    model.steering.scale = 0.25
    model.steering.use("polite")
    assert model.steering.scale == ADAPTERS["polite"][0].scale
    model.steering.use("default")
    assert model.steering.scale == 0.25
    assert model.steering.config("polite").scale == ADAPTERS["polite"][0].scale


def test_steering_disabled_is_the_base_model_and_ends():
    model = patched("default")
    steered, bare = logits(model), bare_logits()
    assert not torch.equal(steered, bare)
    with model.steering.disabled():
        assert torch.equal(logits(model), bare)
        with model.steering.disabled():
            assert torch.equal(logits(model), bare)
        assert torch.equal(logits(model), bare)
    assert torch.equal(logits(model), steered)


def test_steering_disabled_is_the_base_model_whatever_is_done_inside():
    model = patched("polite")
    with model.steering.disabled():
        model.steering.scale = 3.0
        model.steering.add("vec-1", ADAPTERS["vec-1"][0])  # for layers without adapter so far
        model.steering.use("vec-1")
        randomize(model, "vec-1")
        assert torch.equal(logits(model), bare_logits())
    hooked = Hooked(build(), steering_parameters(model, "vec-1"))
    assert_no_worse(*map(logits, (model, hooked.model, hooked.double().model)))


@pytest.mark.parametrize("inner", ["disabled", "batch"])
def test_steering_disabled_contexts_end_in_any_order(inner):
    model = patched("default")
    steered, bare, attributes = logits(model), bare_logits(), set(vars(model))
    first = model.steering.disabled()
    second = model.steering.disabled() if inner == "disabled" else model.steering.batch([None] * len(steered))
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(logits(model), bare)
    assert torch.equal(model.generate(tokens(), max_new_tokens=1), build().generate(tokens(), max_new_tokens=1))
    second.__exit__(None, None, None)
    assert torch.equal(logits(model), steered)
    assert set(vars(model)) == attributes


def test_steering_disabled_ends_with_an_exception():
    model = patched("default")
    steered = logits(model)
    with pytest.raises(ZeroDivisionError), model.steering.disabled(), model.steering.disabled():
        raise ZeroDivisionError
    assert torch.equal(logits(model), steered)


# ---------------------------------------------------------------------------------------------------------------------
# Report


def test_steering_report(monkeypatch):
    monkeypatch.setenv("FUSED_STEER_BACKEND", "torch")
    model = patched("vec-1", "polite")
    assert [row.index for row in model.steering.report()] == [0, 1, 2]
    model.steering.remove("polite")
    model.steering.reset_calls()
    rows = model.steering.report()
    assert {(row.layer, row.kind, row.reason) for row in rows} == {("LlamaDecoderLayer", "fused", "")}
    assert {(row.backend, row.calls) for row in rows} == {(None, 0)}
    for calls in (1, 2):
        logits(model)
        assert {(row.backend, row.calls) for row in model.steering.report()} == {("torch", calls)}
    model.steering.reset_calls()
    assert {(row.backend, row.calls) for row in model.steering.report()} == {(None, 0)}


def test_steering_prints_a_line_for_each_adapter_and_its_share_of_the_model():
    model = build()
    own = sum(parameter.numel() for parameter in model.parameters())
    patch_model(model, SteerConfig(rank=4, scale=0.5), adapter_name="polite")
    model.steering.add("short", SteerConfig(form="vector", layers=[1]))
    sizes = {name: sum(p.numel() for p in steering_parameters(model, name).values()) for name in ("polite", "short")}
    assert {name: model.steering.count_parameters(name) for name in sizes} == sizes
    assert model.steering.count_parameters() == sizes["polite"]
    lines = str(model.steering).splitlines()
    assert lines[0] == "Steering of a LlamaForCausalLM:"
    assert lines[1] == (
        f"  polite (in use): rank 4, silu, scale 0.5, 3 of 3 layers, {sizes['polite']:,} parameters, "
        f"{sizes['polite'] / own:.2%} of the model's"
    )
    assert lines[2].startswith("  short: vector, scale 1, 1 of 3 layers, 32 parameters, ") and len(lines) == 3
    model.steering.remove("polite"), model.steering.remove("short")
    assert str(model.steering).endswith("no adapters")


def test_steering_report_prints_a_line_for_each_layer():
    model = patched("default")
    logits(model)
    report = model.steering.report()
    head, *lines = str(report).splitlines()
    assert "class" in head and "backend" in head
    assert [line.split() for line in lines] == [
        [str(i), "LlamaDecoderLayer", "post_block", "fused", row.backend, "1"] for i, row in enumerate(report)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("call", ["use", "remove", "config"])
def test_steering_refuses_unknown_adapters(call):
    model = patched("default", "polite")
    with refused(KeyError, "'rude'", "['default', 'polite']", model=model):
        getattr(model.steering, call)("rude")
    with refused(KeyError, "['rude']", model=model):
        getattr(model.steering, call)(["rude"])
    if call == "remove":
        with refused(KeyError, "no adapter None; expected one of ['default', 'polite']", model=model):
            model.steering.remove(None)
    assert model.steering.active == "default"


def test_steering_refuses_to_save_unknown_adapters(tmp_path):
    model = patched("default")
    with refused(KeyError, "'rude'", "['default']", model=model):
        model.steering.save(tmp_path / "out", "rude")
    assert not (tmp_path / "out").exists()


def test_steering_refuses_when_none_is_in_use(tmp_path):
    model = patched("default")
    model.steering.use(None)
    for call in (
        lambda: model.steering.scale,
        lambda: setattr(model.steering, "scale", 1.0),
        lambda: model.steering.save(tmp_path / "out"),
    ):
        with refused(KeyError, "no adapter is in use", "['default']"):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a.b", "train", "training", "_modules", "", "a b", "a\n", None, 3])
def test_steering_refuses_bad_names(name, tmp_path):
    model = patched("default")
    model.steering.save(tmp_path)
    for call in (model.steering.add, lambda name: model.steering.load(tmp_path, name=name)):
        with refused(ValueError, f"adapter name is {name!r}", "expected", model=model):
            call(name)
    model.steering.unpatch()
    with refused(ValueError, f"adapter name is {name!r}", "expected", model=model):
        patch_model(model, adapter_name=name)


def test_steering_refuses_a_taken_name(tmp_path):
    model = patched("default")
    model.steering.save(tmp_path)
    for call in (model.steering.add, lambda name: model.steering.load(tmp_path, name=name)):
        with refused(ValueError, "'default' already", "expected a new name", model=model):
            call("default")


def test_steering_refuses_a_config_of_another_type():
    model = patched("default")
    with refused(TypeError, "config is a dict", "expected a SteerConfig", model=model):
        model.steering.add("another", {"rank": 4})


def test_steering_refuses_changes_after_unpatch(tmp_path):
    model = patched("default")
    steering = model.steering
    steering.save(tmp_path)
    steering.unpatch()
    for call in (
        lambda: steering.add("another"),
        lambda: steering.load(tmp_path, "another"),
        lambda: steering.add_vector("another", {0: torch.ones(HIDDEN)}),
        lambda: steering.make_pool(slots=1, rank=2),
    ):
        with refused(RuntimeError, "after steering.unpatch(); expected patch_model", model=model):
            call()
    assert steering.names == []
    assert steering.unpatch() is model  # a second time, nothing happens
    assert torch.equal(logits(patch_model(model, tmp_path)), logits(patch_model(build(), tmp_path)))


@pytest.mark.parametrize(
    ("scale", "error"), [(math.nan, ValueError), (-math.inf, ValueError), ("x", TypeError), (True, TypeError)]
)
def test_steering_refuses_a_bad_scale(scale, error):
    model = patched("default")
    before = logits(model)
    with refused(error, f"scale is {scale!r}", "expected"):
        model.steering.scale = scale
    assert model.steering.scale == 1.0
    assert torch.equal(logits(model), before)
