"""The format of an adapter: paths taken apart and put together, tensors by layer, and which model it fits."""

from __future__ import annotations

import pytest
import torch
from models import build, logits, randomize, refused, tokens
from peft import PeftModel

from fused_steer import SteerConfig, patch_model
from fused_steer.adapters.parameters import (
    NAMES,
    Adapter,
    Layout,
    by_layer,
    in_model,
    of_adapter,
    out_of_model,
    split_path,
)

LAYOUT = Layout("model.layers", 3, 8, "org/base")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layers_path", ["", "layers", "model.layers", "base_model.model.transformer.h"])
def test_split_path_undoes_path(layers_path, name):
    path = Layout(layers_path, 12, 8).path(11, name)
    assert split_path(path) == (layers_path, 11, name)
    assert out_of_model(in_model(path, "polite"), "polite") == path
    assert out_of_model(in_model(path, "polite"), "terse") is None


@pytest.mark.parametrize(
    "path",
    ["", "post_block.steer_up.weight", "layers.x.post_block.steer_up.weight", "layers.0.mlp.weight"]
    + ["layers.0.post_block.steer_up.default.weight", "layers.0.post_block.steer_left.weight"],
)
def test_split_path_refuses_what_is_no_path(path):
    with refused(ValueError, repr(path), "expected names such as layers.0.post_block.steer_up.weight"):
        split_path(path)


def test_by_layer_is_in_order_and_of_one_list():
    tensors = {LAYOUT.path(i, name): (i, name) for i in (10, 2) for name in NAMES}
    layers_path, layers = by_layer(tensors)
    assert layers_path == "model.layers" and list(layers) == [2, 10]
    assert LAYOUT.paths(layers) == tensors
    assert by_layer({}) == ("", {})
    with refused(ValueError, "model.layers.10", "tower.layers.0", "expected those of one list of layers"):
        by_layer({**tensors, "tower.layers.0.post_block.steer_up.weight": None})


CONFIGS = [SteerConfig(rank=2), SteerConfig(form="vector", layers=[1]), SteerConfig(down_bias=True, up_bias=True)]


@pytest.mark.parametrize("config", CONFIGS, ids=["lowrank", "vector", "biases"])
def test_shapes_are_those_of_a_fresh_adapter(config):
    shapes = LAYOUT.shapes(config)
    assert list(shapes) == ([0, 1, 2] if config.layers is None else list(config.layers))
    fresh = Adapter.fresh(config, 8, torch.device("cpu")).named_tensors()
    assert all(named == {name: tuple(t.shape) for name, t in fresh.items()} for named in shapes.values())
    LAYOUT.check_tensors(config, {i: fresh for i in shapes})
    again = Adapter.of_tensors(fresh).named_tensors()
    assert again.keys() == fresh.keys() and all(torch.equal(again[name], fresh[name]) for name in fresh)


def test_check_tensors_names_the_first_that_is_wrong():
    config = SteerConfig(rank=2, layers=[0, 2])
    fresh = Adapter.fresh(config, 8, torch.device("cpu")).named_tensors()
    whole = {0: fresh, 2: fresh}
    for tensors, parts in (
        ({0: fresh}, ("no tensor model.layers.2.post_block.steer_down.weight", "of shape (2, 8)")),
        (whole | {1: fresh}, ("a tensor model.layers.1.post_block.steer_down.weight", "none but those of its config")),
        (whole | {2: fresh | {"steer_up.weight": torch.zeros(8, 3)}}, ("layers.2", "(8, 3)", "torch.float32 (8, 2)")),
        (whole | {0: {n: t.half() for n, t in fresh.items()}}, ("layers.0", "torch.float16", "torch.float32 (2, 8)")),
    ):
        with refused(ValueError, *parts, "expected"):
            LAYOUT.check_tensors(config, tensors)


def test_layers_of_a_config_and_back():
    assert LAYOUT.indices(SteerConfig()) == [0, 1, 2] and LAYOUT.config_layers([2, 0, 1]) is None
    assert LAYOUT.indices(SteerConfig(layers=[2, 0])) == [0, 2] == LAYOUT.config_layers([2, 0])
    with refused(ValueError, "layers has 3", "expected indices below 3"):
        LAYOUT.indices(SteerConfig(layers=[0, 3]))
    with refused(ValueError, "a layer 3", "expected indices below 3"):
        LAYOUT.config_layers([0, 3])


def test_check_fits_compares_sizes_and_the_last_part_of_the_name():
    fitting = (Layout("", 3, 8), Layout("", 3, 8, "base"), Layout("h", 3, 8, "/models/base/"))
    for other in fitting:
        LAYOUT.check_fits("it", other, True)
    LAYOUT.check_fits("it", Layout("", 3, 8, "another"), False)
    for other, parts in (
        (Layout("", 3, 9), ("hidden size 9", "expected 8")),
        (Layout("", 2, 8), ("number of layers 2", "expected 3")),
        (Layout("", 3, 8, "another"), ("base model 'another'", "expected 'org/base'", "check_base=False")),
    ):
        with refused(ValueError, "it is for", *parts):
            LAYOUT.check_fits("it", other, True)


def test_of_adapter_takes_one_adapter_of_a_model():
    model = patch_model(build(), SteerConfig(rank=2, layers=[1]))
    model.steering.add("other", SteerConfig(form="vector", layers=[0]))
    assert list(of_adapter(model.named_parameters(), "other")) == ["model.layers.0.post_block.steer_up.bias"]
    assert of_adapter(model.state_dict().items(), "third") == {}
    found = of_adapter(model.named_parameters(), "default")
    assert {name: p for name, p in model.named_parameters() if ".default." in name} == {
        in_model(path, "default"): p for path, p in found.items()
    }


@pytest.mark.parametrize("by_peft", [False, True], ids=["patch_model", "peft"])
def test_files_are_matched_by_layer(by_peft, tmp_path):
    """A file that was made with the decoder alone, whose layers lie under another path than the language model's."""
    import fused_steer.peft  # noqa: F401

    decoder = patch_model(build().model, SteerConfig(rank=2, layers=[0, 2]))
    randomize(decoder)
    decoder.steering.save(tmp_path)
    steered = PeftModel.from_pretrained(build(), str(tmp_path)) if by_peft else patch_model(build(), tmp_path)
    with torch.no_grad():
        expected = steered.get_output_embeddings()(decoder.eval()(tokens()).last_hidden_state)
    assert torch.equal(logits(steered.eval()), expected)
    assert not torch.equal(expected, logits(build().eval()))
