"""Tests of an adapter's format: parsing and building paths, tensors by layer, and the check that it fits a model."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from models import build, logits, randomize, refused, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open

from fused_steer import SteerConfig, load_joint, patch_model, save_joint
from fused_steer.adapters.factors import Adapter
from fused_steer.adapters.parameters import (
    NAMES,
    Layout,
    Place,
    base_name,
    by_place,
    check_name,
    in_model,
    of_adapter,
    out_of_model,
    same_base,
    specs_of,
    split_path,
    unwrapped,
)
from fused_steer.config import SITES

LAYOUT = Layout("model.layers", 3, 8, "org/base")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("layers_path", ["", "layers", "model.layers", "base_model.model.transformer.h"])
def test_parameters_split_path_undoes_path(layers_path, site, name):
    path = Layout(layers_path, 12, 8).path(Place(11, site), name)
    assert path == ".".join(part for part in (layers_path, "11", site, name) if part)
    assert split_path(path) == (layers_path, Place(11, site), name)
    assert out_of_model(in_model(path, "polite"), "polite") == path
    assert out_of_model(in_model(path, "polite"), "terse") is None


@pytest.mark.parametrize(
    "path",
    ["", "post_block.steer_up.weight", "layers.x.post_block.steer_up.weight", "layers.0.mlp.weight"]
    + ["layers.0.steer_up.weight", "layers.0.in_block.steer_up.weight", "layers.0.post_block.steer_up.default.weight"]
    + ["layers.0.post_block.steer_left.weight"],
)
def test_parameters_split_path_refuses_what_is_no_path(path):
    with refused(ValueError, repr(path), "expected names such as layers.0.post_block.steer_up.weight"):
        split_path(path)


def test_parameters_by_place_is_in_order_and_of_one_list():
    places = [Place(10), Place(2, "pre_mlp"), Place(2)]
    tensors = {LAYOUT.path(place, name): (place, name) for place in places for name in NAMES}
    layers_path, found = by_place(tensors)
    assert layers_path == "model.layers" and list(found) == [Place(2), Place(2, "pre_mlp"), Place(10)]
    assert LAYOUT.paths(found) == tensors
    assert by_place({}) == ("", {})
    with refused(ValueError, "model.layers.10", "tower.layers.0", "expected tensors of one list of layers"):
        by_place({**tensors, "tower.layers.0.post_block.steer_up.weight": None})


CONFIGS = [
    SteerConfig(rank=2),
    SteerConfig(form="vector", layers=[1]),
    SteerConfig(down_bias=True, up_bias=True),
    SteerConfig(rank=2, site=["post_mlp", "pre_mlp"]),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["lowrank", "vector", "biases", "sites"])
def test_parameters_shapes_are_those_of_a_fresh_adapter(config):
    shapes = LAYOUT.shapes(config)
    layers = [0, 1, 2] if config.layers is None else list(config.layers)
    assert list(shapes) == [Place(i, site) for i in layers for site in config.sites]
    fresh = Adapter.fresh(config, 8, torch.device("cpu")).named_tensors()
    assert all(named == {name: tuple(t.shape) for name, t in fresh.items()} for named in shapes.values())
    LAYOUT.check_tensors(config, specs_of({i: fresh for i in shapes}))
    again = Adapter.of_tensors(fresh).named_tensors()
    assert again.keys() == fresh.keys() and all(torch.equal(again[name], fresh[name]) for name in fresh)


def test_parameters_check_tensors_names_the_first_that_is_wrong():
    config = SteerConfig(rank=2, layers=[0, 2])
    fresh = Adapter.fresh(config, 8, torch.device("cpu")).named_tensors()
    a, b, c = map(Place, range(3))
    whole = {a: fresh, c: fresh}
    for tensors, parts in (
        ({a: fresh}, ("no tensor model.layers.2.post_block.steer_down.weight", "of shape (2, 8)")),
        (
            whole | {b: fresh},
            ("a tensor model.layers.1.post_block.steer_down.weight", "only the tensors of its config"),
        ),
        (whole | {Place(0, "post_mlp"): fresh}, ("a tensor model.layers.0.post_mlp", "only the tensors of its config")),
        (
            whole | {c: fresh | {"steer_up.weight": torch.zeros(8, 3)}},
            ("layers.2", "(8, 3)", "torch.float32 (8, 2)"),
        ),
        (
            whole | {a: {n: t.half() for n, t in fresh.items()}},
            ("layers.0", "torch.float16", "torch.float32 (2, 8)"),
        ),
    ):
        with refused(ValueError, *parts, "expected"):
            LAYOUT.check_tensors(config, specs_of(tensors))


def test_parameters_layers_of_a_config_and_back():
    assert list(LAYOUT.indices(SteerConfig())) == [0, 1, 2] and LAYOUT.config_layers([2, 0, 1]) is None
    assert LAYOUT.indices(SteerConfig(layers=[2, 0])) == [0, 2] == LAYOUT.config_layers([2, 0])
    with refused(ValueError, "layers has 3", "expected indices below 3"):
        LAYOUT.indices(SteerConfig(layers=[0, 3]))
    with refused(ValueError, "a layer 3", "expected indices below 3"):
        LAYOUT.config_layers([0, 3])


def test_parameters_check_fits_compares_sizes_and_the_last_part_of_the_name():
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


CACHED = "/root/.cache/huggingface/hub/models--org--base"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("org/base", "org/base", True),
        ("org/base", "other/base", False),
        ("org/base", f"{CACHED}/snapshots/{'0f' * 20}", True),
        ("org/base", f"{CACHED}/snapshots/{'0f' * 20}/", True),
        ("other/base", f"{CACHED}/snapshots/{'0f' * 20}", False),
        ("org/base", f"{CACHED.replace('base', 'more-base')}/snapshots/{'0f' * 20}", False),
        (f"C:\\hub\\models--org--base\\snapshots\\{'0f' * 20}", "org/base", True),
        ("org/base", f"/somewhere/{'0f' * 20}", True),
        ("org/base", "0f" * 20, True),
        ("org/base", "/models/base/", True),
        ("org/base", "base", True),
        ("org/base", "./base", True),
        ("org/base", "/models/another", False),
        ("org/base", "", True),
    ],
)
def test_parameters_base_models_are_compared_by_hub_id(one, other, same):
    assert same_base(one, other) is same_base(other, one) is same


def test_parameters_base_name_of_a_path_in_the_cache_is_the_id():
    assert base_name(f"{CACHED}/snapshots/{'0f' * 20}") == "org/base" == base_name("org/base")
    model = build()
    model.config._name_or_path = f"{CACHED}/snapshots/{'0f' * 20}"
    assert adapter_fields(patch_model(model))["base_model_name_or_path"] == "org/base"


def adapter_fields(model: torch.nn.Module) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        model.steering.save(folder)
        return json.loads(Path(folder, "adapter_config.json").read_text())


@pytest.mark.parametrize("name", ["default", "a-b_C9", "0", "lora", "steer", "x" * 200])
def test_parameters_names_of_adapters(name):
    check_name(name)


def test_parameters_names_that_no_folder_can_have_are_refused():
    with refused(ValueError, "adapter name has 201 characters", "expected at most 200"):
        check_name("x" * 201)


@pytest.mark.parametrize(
    "name",
    ["", "a.b", "a b", "../a", "/a", "a\\b", "ä", "a\n", "a\0", None, 7, "..", "keys", "training", "to"]
    + ["post_block", "steer_down", "steer_up", "weight", "bias"],
)
def test_parameters_names_that_no_adapter_may_have_are_refused_on_every_way_in(name, tmp_path):
    import fused_steer.peft

    with refused(ValueError, "adapter name is", repr(name), "expected"):
        check_name(name)
    saved = build()
    patch_model(saved, SteerConfig(rank=2)).steering.save(tmp_path)
    pool = saved.steering.make_pool(slots=1, rank=2)
    for call in (
        lambda: saved.steering.add(name),
        lambda: saved.steering.load(tmp_path, name),
        lambda: pool.register(name, tmp_path),
    ):
        with refused(ValueError, "adapter name is", "expected", model=saved):
            call()
    bare = build()
    with refused(ValueError, "adapter name is", "expected", model=bare):
        patch_model(bare, SteerConfig(rank=2), adapter_name=name)
    if isinstance(name, str):
        with refused(ValueError, "adapter name is", "expected", model=bare):
            get_peft_model(bare, fused_steer.peft.PostBlockConfig(r=2), adapter_name=name)


@pytest.mark.parametrize(("there", "new"), [("polite", "Polite"), ("A-b_C", "a-B_c")])
def test_parameters_names_that_differ_in_case_alone_are_refused_on_every_way_in(there, new, tmp_path):
    """A folder each is made of them, and on some file systems that is one."""
    import fused_steer.peft

    parts = (repr(there), repr(new), "only in letter case", "expected a new name")
    for name in (there, new):
        patch_model(build(), SteerConfig(rank=2)).steering.save(tmp_path / "both" / name)
    files = tmp_path / "both" / there
    model = patch_model(build(), SteerConfig(rank=2), adapter_name=there)
    for call in (lambda: model.steering.add(new), lambda: model.steering.load(files, new)):
        with refused(ValueError, *parts, model=model):
            call()
    pool = model.steering.make_pool(slots=1, rank=2)
    with refused(ValueError, *parts, "in the model", model=model):
        pool.register(new, files)
    model.steering.remove(there)
    with refused(ValueError, "only in letter case", "to be registered"):
        pool.register_directory(tmp_path / "both")
    assert pool.names == []
    pool.register(there, files)
    for call in (lambda: model.steering.add(new), lambda: pool.register(new, files)):
        with refused(ValueError, *parts, "in the pool", model=model):
            call()
    pool.remove(there)
    pool.register(new, files)

    wrapped = get_peft_model(build(), fused_steer.peft.PostBlockConfig(r=2), adapter_name=there)
    for call in (
        lambda: wrapped.add_adapter(new, fused_steer.peft.PostBlockConfig(r=2)),
        lambda: wrapped.load_adapter(str(files), new),
    ):
        with refused(ValueError, *parts, model=wrapped):
            call()
    joint = build()
    for name in (there, new):
        lora = LoraConfig(r=2, target_modules=["q_proj"])
        joint = joint if hasattr(joint, "peft_config") else get_peft_model(joint, lora, adapter_name=there)
        if name not in joint.peft_config:
            joint.add_adapter(name, lora)
    joint.base_model.set_adapter([there, new])
    patch_model(joint, SteerConfig(rank=2))
    with refused(ValueError, *parts, model=joint):
        save_joint(joint, tmp_path / "joint")
    assert not (tmp_path / "joint").exists()
    (tmp_path / "joint").mkdir()
    record = {"steering": "0", f"lora/{there}": "0", f"lora/{new}": "0"}
    (tmp_path / "joint" / "joint.json").write_text(json.dumps(record))
    bare = build()
    with refused(ValueError, "joint.json", *parts, model=bare):
        load_joint(bare, tmp_path / "joint")


@pytest.mark.parametrize(
    "path",
    ["_orig_mod.model.layers.0", "module.model.layers.0", "_fsdp_wrapped_module.model.layers.0"]
    + ["base_model.model.module._orig_mod.model.layers.0", "model.layers.0._checkpoint_wrapped_module"],
)
def test_parameters_unwrapped_is_the_path_in_the_model(path):
    assert unwrapped(path) == "model.layers.0"


@pytest.mark.parametrize("by_peft", [False, True], ids=["patch_model", "peft"])
@pytest.mark.parametrize("wrapped_by", ["_orig_mod", "module"])
def test_parameters_files_of_wrapped_models_have_the_paths_of_plain_ones(by_peft, wrapped_by, tmp_path):
    import fused_steer.peft

    def wrap(model: torch.nn.Module) -> torch.nn.Module:
        if wrapped_by == "_orig_mod":
            return torch.compile(model, backend="eager")
        holder = torch.nn.Module()
        holder.module, holder.config = model, model.config
        return holder

    def paths(folder: Path) -> set[str]:
        with safe_open(folder / "adapter_model.safetensors", "pt") as opened:
            return set(opened.keys())

    patch_model(build(), SteerConfig(rank=2)).steering.save(tmp_path / "plain")
    wrapped = wrap(build())
    if by_peft and wrapped_by == "module":
        pytest.skip("PEFT needs a model with its own forward")
    if by_peft:
        model = get_peft_model(wrapped, fused_steer.peft.PostBlockConfig(r=2))
        model.save_pretrained(str(tmp_path / "wrapped"))
    else:
        patch_model(wrapped, SteerConfig(rank=2)).steering.save(tmp_path / "wrapped")
    assert paths(tmp_path / "wrapped") == paths(tmp_path / "plain")
    for folder in ("plain", "wrapped"):
        if by_peft:
            PeftModel.from_pretrained(wrap(build()), str(tmp_path / folder))
            PeftModel.from_pretrained(build(), str(tmp_path / folder))
        else:
            patch_model(wrap(build()), tmp_path / folder)
            patch_model(build(), tmp_path / folder)


def test_parameters_of_adapter_takes_one_adapter_of_a_model():
    model = patch_model(build(), SteerConfig(rank=2, layers=[1]))
    model.steering.add("other", SteerConfig(form="vector", layers=[0]))
    assert list(of_adapter(model.named_parameters(), "other")) == ["model.layers.0.post_block.steer_up.bias"]
    assert of_adapter(model.state_dict().items(), "third") == {}
    found = of_adapter(model.named_parameters(), "default")
    assert {name: p for name, p in model.named_parameters() if ".default." in name} == {
        in_model(path, "default"): p for path, p in found.items()
    }


@pytest.mark.parametrize("by_peft", [False, True], ids=["patch_model", "peft"])
def test_parameters_files_are_matched_by_layer(by_peft, tmp_path):
    """A file made with the bare decoder, which has other layer paths than the language model, loads by layer."""
    import fused_steer.peft  # noqa: F401

    decoder = patch_model(build().model, SteerConfig(rank=2, layers=[0, 2]))
    randomize(decoder)
    decoder.steering.save(tmp_path)
    steered = PeftModel.from_pretrained(build(), str(tmp_path)) if by_peft else patch_model(build(), tmp_path)
    with torch.no_grad():
        expected = steered.get_output_embeddings()(decoder.eval()(tokens()).last_hidden_state)
    assert torch.equal(logits(steered.eval()), expected)
    assert not torch.equal(expected, logits(build().eval()))
