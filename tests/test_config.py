"""Tests of SteerConfig: its defaults, its refusals, and the initial values of an adapter."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from models import HIDDEN, LAYERS, build, refused, steering_parameters

from fused_steer import SteerConfig, patch_model

FIELDS = [field.name for field in dataclasses.fields(SteerConfig)]


def test_config_a_wrong_array_is_told_in_one_line():
    for field in ("rank", "activation", "layers", "site", "scale", "down_bias", "dtype", "positions", "orthogonal_to"):
        with pytest.raises((TypeError, ValueError), match=f"^{field} (is|has) .*; expected .*$") as caught:
            SteerConfig(**{field: torch.ones(2, 2)})
        assert "\n" not in str(caught.value)


def test_config_defaults():
    assert SteerConfig().to_dict() == {
        "form": "lowrank",
        "rank": 8,
        "activation": "silu",
        "layers": None,
        "scale": 1.0,
        "down_bias": False,
        "up_bias": False,
        "init_scale": 1.0,
        "dtype": "float32",
    }


def test_config_vector_has_a_bias_and_nothing_else():
    vector = SteerConfig(form="vector")
    assert (vector.rank, vector.activation, vector.down_bias, vector.up_bias) == (0, "identity", False, True)
    assert SteerConfig(form="vector", rank=0, activation="identity", up_bias=True) == vector


def test_config_numbers_and_layers_are_normalised():
    config = SteerConfig(layers=[2, 0], scale=2, init_scale=0)
    assert config.layers == (0, 2)
    assert type(config.scale) is type(config.init_scale) is float


@pytest.mark.parametrize("half", [Fraction(1, 2), np.float16(0.5), np.longdouble(0.5), torch.tensor(0.5)], ids=repr)
def test_config_numbers_of_any_type_are_strengths(half):
    assert SteerConfig(scale=half) == SteerConfig(scale=0.5)


def test_config_sites_are_plain_and_in_the_order_of_a_block():
    assert SteerConfig(site=["post_mlp"]).site == "post_mlp" and SteerConfig(site=["post_mlp"]).sites == ("post_mlp",)
    several = SteerConfig(site=["post_block", "pre_mlp", "post_attention"])
    assert several.site == several.sites == ("post_attention", "pre_mlp", "post_block")
    assert several.to_dict()["site"] == list(several.site)


def test_config_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SteerConfig().rank = 4


@pytest.mark.parametrize("rank", [1, 256])
def test_config_extreme_ranks(rank):
    assert SteerConfig(rank=rank).rank == rank


@pytest.mark.parametrize(
    "config",
    [
        SteerConfig(),
        SteerConfig(form="vector", layers=[1, 2], scale=-0.25),
        SteerConfig(rank=3, activation="gelu", down_bias=True, up_bias=True, init_scale=1e-3, dtype="bfloat16"),
        SteerConfig(orthogonal_to="lora", orthogonal_modules="all"),
        SteerConfig(site="post_mlp"),
        SteerConfig(site=["post_block", "pre_mlp"]),
        SteerConfig(form="loreft", rank=3, positions="first_7+last_7"),
    ],
    ids=["default", "vector", "lowrank", "orthogonal", "site", "sites", "loreft"],
)
def test_config_round_trip(config):
    assert SteerConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("fields", "error", "came"),
    [
        ({"form": "lora"}, ValueError, "'lora'"),
        ({"activation": "swish"}, ValueError, "'swish'"),
        ({"dtype": "float64"}, ValueError, "'float64'"),
        ({"rank": 0}, ValueError, "0"),
        ({"rank": -1}, ValueError, "-1"),
        ({"rank": 257}, ValueError, "257"),
        ({"rank": True}, TypeError, "True"),
        ({"rank": 2.5}, TypeError, "2.5"),
        ({"rank": "8"}, TypeError, "'8'"),
        ({"rank": 4, "form": "vector"}, ValueError, "4"),
        ({"activation": "silu", "form": "vector"}, ValueError, "'silu'"),
        ({"up_bias": False, "form": "vector"}, ValueError, "False"),
        ({"down_bias": True, "form": "vector"}, ValueError, "True"),
        ({"down_bias": 1}, TypeError, "1"),
        ({"up_bias": "no"}, TypeError, "'no'"),
        ({"layers": []}, ValueError, "empty"),
        ({"layers": [-1]}, ValueError, "-1"),
        ({"layers": [1, 1]}, ValueError, "[1, 1]"),
        ({"layers": "12"}, TypeError, "'12'"),
        ({"layers": [1.0]}, TypeError, "[1.0]"),
        ({"layers": [True]}, TypeError, "[True]"),
        ({"layers": 1}, TypeError, "1"),
        ({"scale": math.nan}, ValueError, "nan"),
        ({"scale": math.inf}, ValueError, "inf"),
        ({"scale": "x"}, TypeError, "'x'"),
        ({"scale": True}, TypeError, "True"),
        ({"orthogonal_to": "dora"}, ValueError, "'dora'"),
        ({"orthogonal_modules": "attention", "orthogonal_to": "lora"}, ValueError, "'attention'"),
        ({"orthogonal_modules": "all"}, ValueError, "orthogonal_to='lora'"),
        ({"site": "post_moe"}, ValueError, "'post_moe'"),
        ({"site": ["pre_mlp", "pre_mlp"]}, ValueError, "pre_mlp"),
        ({"site": []}, ValueError, "empty"),
        ({"dtype": []}, ValueError, "[]"),
        ({"site": None}, TypeError, "None"),
        ({"site": ["pre_mlp", 1]}, TypeError, "1"),
        ({"orthogonal_to": "lora", "site": ["pre_mlp", "post_mlp"]}, ValueError, "pre_mlp"),
        ({"init_scale": math.inf}, ValueError, "inf"),
        ({"positions": "middle"}, ValueError, "'middle'"),
        ({"positions": "first_0"}, ValueError, "'first_0'"),
        ({"positions": "all+"}, ValueError, "'all+'"),
        ({"positions": None}, ValueError, "None"),
        ({"init_scale": None}, TypeError, "None"),
        *(
            ({name: np.zeros(2)}, ValueError, "array([0., 0.])")
            for name in ("form", "activation", "dtype", "positions")
        ),
        *(({name: np.zeros(2)}, ValueError, "[0., 0.]") for name in ("orthogonal_to", "orthogonal_modules")),
        ({"activation": np.zeros(2), "form": "vector"}, ValueError, "array([0., 0.])"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_config_refusals(fields: dict[str, Any], error, came):
    (name, *_) = fields
    with refused(error, name, came, "expected"):
        SteerConfig(**fields)


@pytest.mark.parametrize(
    "make", [lambda fields: SteerConfig(**fields), SteerConfig.from_dict], ids=["init", "from_dict"]
)
def test_config_unknown_field_is_answered_with_the_known_ones(make):
    for name in ("rnk", "writers", "side", "every"):
        with refused(TypeError, repr(name), *FIELDS):
            make({name: 4})


@pytest.mark.parametrize("form", ["lowrank", "vector"])
def test_config_fields_are_plain_once_made(form):
    config = SteerConfig(form=form, layers=[0])
    kinds = {name: type(getattr(config, name)) for name in FIELDS if name != "orthogonal_to"}
    assert kinds == {
        "form": str,
        "rank": int,
        "activation": str,
        "layers": tuple,
        "site": str,
        "scale": float,
        "down_bias": bool,
        "up_bias": bool,
        "init_scale": float,
        "dtype": str,
        "orthogonal_modules": str,
        "positions": str,
    }
    assert dataclasses.replace(config, scale=2) == SteerConfig(form=form, layers=[0], scale=2.0)


@pytest.mark.parametrize("init_scale", [1.0, 1e-3])
def test_config_initial_values(init_scale):
    """W1 is initialised as LoRA's A: kaiming-uniform with a = √5, i.e. uniform within ± 1/√d. The rest is 0."""
    config = SteerConfig(rank=256, down_bias=True, up_bias=True, init_scale=init_scale)
    parameters = steering_parameters(patch_model(build(), config))
    assert len(parameters) == 4 * LAYERS
    bound = init_scale / math.sqrt(HIDDEN)
    for name, parameter in parameters.items():
        if name.endswith("steer_down.weight"):
            # For 8192 uniform values each margin is many standard errors wide. A normal distribution would fail.
            assert 0.99 * bound < parameter.abs().max() <= bound
            assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
            assert abs(parameter.mean().item()) < 0.05 * bound
        else:
            assert torch.count_nonzero(parameter) == 0


def test_config_layers_are_initialised_apart():
    first, second, *_ = (p for name, p in steering_parameters(patch_model(build())).items() if "down" in name)
    assert not torch.equal(first, second)
