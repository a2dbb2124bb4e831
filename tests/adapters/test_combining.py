"""Tests of adapters made from vectors in memory, and of adapters that add up others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import HIDDEN, LAYERS, assert_no_worse, build, build_frozen, difference, logits, randomize, refused
from torch import Tensor, nn

from fused_steer import SteerConfig, patch_model
from fused_steer.adapters.combining import combine_adapters
from fused_steer.adapters.files import read_adapter
from fused_steer.adapters.parameters import steered

#: Adapters that are linear in h, of every form, at different layers.
LINEAR = {
    "low": SteerConfig(rank=3, activation="identity", down_bias=True, up_bias=True, layers=[0, 1], scale=-0.7),
    "plain": SteerConfig(rank=2, activation="identity"),
    "vector": SteerConfig(form="vector", layers=[1, 2], scale=2.0),
    "rotated": SteerConfig(form="loreft", rank=4, layers=[2]),
}


def patched(**configs: SteerConfig) -> nn.Module:
    names = list(configs)
    model = patch_model(build(), configs[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.steering.add(name, configs[name])
    for seed, name in enumerate(names):
        randomize(model, name, seed)
    return model


def hooked(model: nn.Module, weights: dict[str, float], dtype: torch.dtype) -> Tensor:
    """Return the logits of a base model with a hook for each adapter, which adds weight · scale · shift."""
    files = {name: model.steering.files(None)[name] for name in weights}
    base = build_frozen().to(dtype)

    def shift(name: str, layer: int, h: Tensor) -> Tensor | float:
        file, factor = files[name], weights[name] * files[name].config.scale
        for place, tensors in file.tensors.items():
            if place.layer == layer:
                t = {key: tensor.to(dtype) for key, tensor in steered(file.config.form, tensors).items()}
                total = torch.zeros_like(h)
                if "steer_up.weight" in t:
                    a = h @ t["steer_down.weight"].t() + t.get("steer_down.bias", 0.0)
                    a = torch.nn.functional.gelu(a) if file.config.activation == "gelu" else a
                    total = a @ t["steer_up.weight"].t()
                return factor * (total + t.get("steer_up.bias", 0.0))
        return 0.0

    for i, layer in enumerate(base.model.layers):
        layer.register_forward_hook(lambda _, args, h, i=i: h + sum(shift(name, i, h) for name in weights))
    return logits(base)


#: Adapters of one nonlinear activation, at different layers.
CURVED = {
    "curved": SteerConfig(rank=2, activation="gelu", down_bias=True, scale=0.5),
    "bent": SteerConfig(rank=3, activation="gelu", up_bias=True, layers=[0, 2]),
}


@pytest.mark.parametrize(
    "names",
    [["low", "plain"], ["vector"], ["vector", "rotated"], list(LINEAR), ["vector", "curved", "bent"]],
    ids="+".join,
)
def test_combining_equals_the_sum_of_the_shifts(names):
    model = patched(**{name: {**LINEAR, **CURVED}[name] for name in names})
    weights = dict(zip(names, (0.7, -1.3, 0.4, 2.0), strict=False))
    alone = {name: logits(model) for name in names if model.steering.use(name) is None}
    model.steering.combine(weights, "sum")
    model.steering.use("sum")
    assert_no_worse(logits(model), *(hooked(model, weights, dtype) for dtype in (torch.float32, torch.float64)))
    assert all(difference(logits(model), other)[""] > 0.01 for other in alone.values())
    for name in names:  # the parts are as they were
        model.steering.use(name)
        assert torch.equal(logits(model), alone[name])


def test_combining_stacks_the_ranks_and_fills_up_the_other_layers():
    model = patched(**LINEAR)
    model.steering.combine(dict.fromkeys(LINEAR, 1.0))
    config = model.steering.config("combined")
    assert (config.form, config.rank, config.activation, config.layers) == ("lowrank", 6, "identity", None)
    assert config.scale == 1 and config.down_bias and config.up_bias
    vectors = patched(a=SteerConfig(form="vector", layers=[0]), b=SteerConfig(form="vector", layers=[2]))
    vectors.steering.combine({"a": 1.0, "b": -1.0}, "c")
    assert vectors.steering.config("c") == SteerConfig(form="vector", layers=[0, 2])


def test_combining_keeps_sites_apart():
    configs = {"mlp": SteerConfig(form="vector", site="post_mlp"), "block": SteerConfig(form="vector", layers=[1])}
    model = patched(**configs)
    model.steering.combine({"mlp": 2.0, "block": 3.0})
    files = model.steering.files(None)
    for place, tensors in files["combined"].tensors.items():
        one = files["mlp" if place.site == "post_mlp" else "block"].tensors.get(place)
        factor = 2.0 if place.site == "post_mlp" else 3.0
        expected = torch.zeros(HIDDEN) if one is None else factor * one["steer_up.bias"]
        assert torch.equal(tensors["steer_up.bias"], expected)
    assert len(files["combined"].tensors) == 2 * LAYERS


def test_combining_is_an_adapter_like_any_other(tmp_path):
    model = patched(**LINEAR)
    model.steering.combine({"low": 0.5, "vector": 1.0})
    model.steering.use("combined")
    assert sum(p.requires_grad for p in model.parameters()) == len(list(model.steering.parameters())) > 0
    model.steering.save(tmp_path)
    assert torch.equal(logits(patch_model(build(), tmp_path)), logits(model))
    assert read_adapter(tmp_path).config == model.steering.config("combined")


def test_combining_refusals():
    curved = {"curved": SteerConfig(rank=2), "last": SteerConfig(form="vector", positions="last_prompt")}
    model = patched(**LINEAR, **curved, wide=SteerConfig(rank=255, activation="identity"))
    steering = model.steering
    for error, parts, weights in (
        (ValueError, ("'curved' has activation 'silu'", "'identity', as adapter 'low'"), {"low": 1.0, "curved": 0.1}),
        (ValueError, ("'last' has positions 'last_prompt'; expected 'all'",), {"low": 1.0, "last": 1.0}),
        (ValueError, ("rank is 257; expected 1 to 256",), {"wide": 1.0, "plain": 1.0}),
        (ValueError, ("weights is empty",), {}),
        (ValueError, ("the weight of 'low' is nan",), {"low": float("nan")}),
        (TypeError, ("the weight of 'low' is 'much'",), {"low": "much"}),
        (KeyError, ("no adapter 'none'",), {"none": 1.0}),
        (KeyError, ("no adapter None",), {None: 1.0}),
        (TypeError, ("weights is a list", "expected a weight for each adapter"), ["low"]),
        (TypeError, ("weights is a NoneType",), None),
    ):
        with refused(error, *parts, model=model):
            steering.combine(weights)
    with refused(ValueError, "there is an adapter 'low' already", model=model):
        steering.combine({"low": 1.0}, "low")
    assert "combined" not in steering.names
    with refused(ValueError, "expected at least one adapter"):
        combine_adapters({})


@pytest.mark.parametrize("kind", [torch.clone, lambda v: v.numpy().copy(), torch.Tensor.double], ids=["32", "np", "64"])
def test_combining_add_vector_shifts_the_layers_output(kind):
    torch.manual_seed(0)
    vectors = {2: torch.randn(HIDDEN), 0: torch.randn(HIDDEN)}
    given = {layer: kind(vector) for layer, vector in vectors.items()}
    model = patch_model(build(), SteerConfig(rank=2))
    model.steering.add_vector("north", given, scale=1.5)
    given[2][:] = 0  # a copy is kept
    assert model.steering.config("north") == SteerConfig(form="vector", layers=[0, 2], scale=1.5)
    assert model.steering.active == "default"
    model.steering.use("north")

    def plain(dtype: torch.dtype) -> Tensor:
        base = build_frozen().to(dtype)
        for i, vector in vectors.items():
            base.model.layers[i].register_forward_hook(lambda _, args, h, v=vector: h + 1.5 * v.to(h.dtype))
        return logits(base)

    assert_no_worse(logits(model), plain(torch.float32), plain(torch.float64))


def test_combining_add_vector_at_every_layer_of_a_site():
    model = patch_model(build())
    model.steering.add_vector("v", dict.fromkeys(range(LAYERS), np.ones(HIDDEN)), site="post_mlp", positions="last_1")
    assert model.steering.config("v") == SteerConfig(form="vector", site="post_mlp", positions="last_1")


def test_combining_add_vector_takes_indices_of_any_integer_type():
    model = patch_model(build())
    model.steering.add_vector("v", {torch.tensor(1): torch.ones(HIDDEN), np.int64(0): torch.zeros(HIDDEN)})
    assert model.steering.config("v").layers == (0, 1)
    assert [bool(site.adapter("v").up.bias.all()) for site in sites_of(model)] == [False, True]


def sites_of(model: torch.nn.Module) -> list:
    return [layer.post_block for layer in model.model.layers if "v" in layer.post_block.steer_up]


def test_combining_add_vector_refusals():
    model = patch_model(build())
    good = torch.ones(HIDDEN)
    for error, parts, vectors in (
        (ValueError, (f"the vector of layer 1 has shape (4,); expected ({HIDDEN},)",), {0: good, 1: torch.ones(4)}),
        (ValueError, ("NaN or infinite",), {0: good * float("inf")}),
        (ValueError, (f"layers has {LAYERS}",), {LAYERS: good}),
        (ValueError, ("layers is empty",), {}),
        (TypeError, ("layers is ['a']",), {"a": good}),
        (TypeError, ("vectors is a list",), [good]),
        (TypeError, ("the vector of layer 0 is a NoneType; expected a tensor or array",), {0: None}),
        (TypeError, ("the vector of layer 1 is a list",), {0: good, 1: [1, "x"]}),
        (TypeError, ("the vector of layer 0 is a tensor of torch.complex64", "real numbers"), {0: good + 1j}),
        (TypeError, ("the vector of layer 0 is a tensor of torch.float32",), {0: good.to("meta")}),
    ):
        with refused(error, *parts, model=model):
            model.steering.add_vector("v", vectors)
    with refused(ValueError, "there is an adapter 'default' already", model=model):
        model.steering.add_vector("default", {0: good})
