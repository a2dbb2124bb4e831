"""Tests that imported adapters of pyreft and control vectors compute what the originals do, and of refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import assert_refused, invoke, plain_output  # noqa: F401 - an autouse fixture
from foreign import (
    LAYOUT,
    LLAMA,
    PHI,
    RANK,
    SCALE,
    Hostile,
    Intervention,
    Shift,
    file_name,
    files,
    hooked,
    shown,
    write_gguf,
)
from models import HIDDEN, LAYERS, assert_close, build, difference, logits, refused
from safetensors.torch import save_file
from torch import Tensor, nn

from fused_steer import SteerConfig, patch_model
from fused_steer.adapters.files import AdapterFile, write_adapter
from fused_steer.adapters.parameters import Place
from fused_steer.importers.pyreft import import_pyreft
from fused_steer.importers.vectors import import_vector


def assert_same_function(found: AdapterFile, shifts: dict[int, Shift], out: Path) -> SteerConfig:
    write_adapter(out, found)
    model = patch_model(build(), out)
    expected = logits(hooked(shifts))
    assert_close(logits(model), expected)
    with model.steering.disabled():
        assert difference(logits(model), expected)[""] > 0.01  # the shifts have an effect
    return model.steering.config()


# -------------------------------------------------------------------------------------------------------------- pyreft


LINEAR = ("Loreft", "Noreft")  # we import these only without an activation
ENTRY = [0, "block_output", "pos", 1, RANK, *[None] * 9]


def save_pyreft(directory: Path, interventions: dict[int, Intervention], **config: Any) -> dict[int, Shift]:
    """Save interventions in the format of pyvene's `save`; return the shifts that they represent."""
    torch.manual_seed(2)
    directory.mkdir()
    fields = {
        "representations": [[i, *ENTRY[1:]] for i in interventions],
        "intervention_types": [f"<class 'pyreft.interventions.{x.name}Intervention'>" for x in interventions.values()],
        "intervention_dimensions": [HIDDEN] * len(interventions),
        "intervention_constant_sources": [True] * len(interventions),
        "mode": "parallel",
        "sorted_keys": [file_name(i).removesuffix(".bin").removeprefix("intkey_") for i in interventions],
        "transformers_version": "4.45.1",
    }
    (directory / "config.json").write_text(json.dumps(fields | config), encoding="utf-8")
    for i, intervention in interventions.items():
        torch.save(intervention.saved(), directory / file_name(i))
    return {i: intervention.shift for i, intervention in interventions.items()}


def of_class(name: str, layers: Any = range(LAYERS), **options: Any) -> dict[int, Intervention]:
    torch.manual_seed(1)
    return {i: Intervention(name, **options) for i in layers}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Loreft", {}),
        ("Noreft", {"bias": True}),
        ("Noreft", {"bias": False}),
        ("Consreft", {}),
        ("Lobireft", {}),
        ("Nodireft", {"phi": "silu", "bias": True}),
        ("Nodireft", {"phi": "silu", "bias": False}),
        *(("Direft", {"phi": phi}) for phi in PHI),
    ],
    ids=str,
)
def test_pyreft_and_vectors_every_class_of_pyreft(name, options, tmp_path):
    shifts = save_pyreft(tmp_path / "reft", of_class(name, **options))
    phi = None if name in ("Consreft", "Lobireft") else options.get("phi", "identity")
    found = import_pyreft(tmp_path / "reft", positions="all", activation=phi, **LLAMA)
    expected = SteerConfig("loreft" if name == "Loreft" else "lowrank", RANK, phi or "identity", down_bias=True)
    assert assert_same_function(found, shifts, tmp_path / "out") == (
        SteerConfig("vector") if name == "Lobireft" else expected
    )


@pytest.mark.parametrize("name", [*LINEAR, "Nodireft"])
def test_pyreft_and_vectors_bfloat16_is_exact_in_float32(name, tmp_path):
    """bfloat16, pyreft's default dtype, is imported exactly, except that a difference is rounded once."""
    interventions = of_class(name, dtype=torch.bfloat16)
    shifts = save_pyreft(tmp_path / "reft", interventions)
    found = import_pyreft(tmp_path / "reft", positions="all", activation="identity", **LLAMA)
    assert assert_same_function(found, shifts, tmp_path / "out").dtype == "float32"
    up = found.tensors[Place(1)]["steer_up.weight"]
    theirs = interventions[1]
    assert torch.equal(up, theirs.rotate_layer.columns if name == "Loreft" else theirs.proj_layer.weight.t().float())


def test_pyreft_and_vectors_the_rotation_is_that_of_torch(tmp_path):
    """The rotation, computed from the file's parametrisation, equals torch's bit for bit."""
    interventions = of_class("Direft")
    save_pyreft(tmp_path / "reft", interventions)
    found = import_pyreft(tmp_path / "reft", positions="all", activation="silu", **LLAMA)
    for i, intervention in interventions.items():
        r_t = intervention.rotate_layer.columns
        assert_close(r_t.t() @ r_t, torch.eye(RANK))
        assert torch.equal(found.tensors[Place(i)]["steer_up.weight"], r_t)


@pytest.mark.parametrize("as_dicts", [False, True])
def test_pyreft_and_vectors_some_layers_in_any_order(as_dicts, tmp_path):
    interventions = of_class("Loreft", layers=[2, 0])
    # Link keys tie interventions and group keys order them. All values are in the files, so both can be ignored.
    entries = [{"layer": i, "low_rank_dimension": RANK, "group_key": 0, "intervention_link_key": 0} for i in [2, 0]]
    shifts = save_pyreft(tmp_path / "reft", interventions, **({"representations": entries} if as_dicts else {}))
    build("gpt2").config.save_pretrained(tmp_path / "gpt2")
    found = import_pyreft(tmp_path / "reft", positions="all", activation="identity", **LLAMA)
    assert assert_same_function(found, shifts, tmp_path / "out").layers == (0, 2)
    found = import_pyreft(tmp_path / "reft", positions="all", activation="identity", base=str(tmp_path / "gpt2"))
    write_adapter(tmp_path / "out", found)
    assert_close(logits(patch_model(build("gpt2"), tmp_path / "out", check_base=False)), logits(hooked(shifts, "gpt2")))


def test_pyreft_and_vectors_an_empty_file_of_the_base_is_passed_by(tmp_path):
    """An empty file of the base model is ignored. pyvene writes one if no parameter of the base was trained."""
    shifts = save_pyreft(tmp_path / "reft", of_class("Lobireft"))
    torch.save({}, tmp_path / "reft" / "pytorch_model.bin")
    assert_same_function(import_pyreft(tmp_path / "reft", positions="all", **LLAMA), shifts, tmp_path / "out")


def entry(**changes: Any) -> list[Any]:
    """Return the config's entry of layer 0 with some fields changed."""
    names = {
        **{"layer": 0, "component": 1, "unit": 2, "max_number_of_units": 3, "low_rank_dimension": 4},
        **{"subspace_partition": 7, "moe_key": 10, "source_representation": 11, "latent_dim": 13},
    }
    values = list(ENTRY)
    for name, value in changes.items():
        values[names[name]] = value
    return values


LORE = "<class 'pyreft.interventions.LoreftIntervention'>"
ONE = {"intervention_types": [LORE]}
PYREFT_ARGUMENTS = ("--positions", "all", "--activation", "identity", *LAYOUT)

#: name -> a change to config.json, and parts of the refusal.
CONFIGS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "a list": ([1], ("holds a list", "expected a JSON object")),
    "no representations": ({"representations": []}, ("not as many", "expected a pair")),
    "fewer types": (ONE, ("not as many",)),
    "types not listed": ({"intervention_types": LORE}, ("not as many",)),
    "serial": ({"mode": "serial"}, ("mode is 'serial'", "expected 'parallel'")),
    "own class": (
        ONE | {"representations": [ENTRY], "intervention_types": ["<class '__main__.LoreftIntervention'>"]},
        ("<class '__main__.LoreftIntervention'>", "expected pyreft's LoreftIntervention"),
    ),
    "pyvene's class": (
        {"representations": [ENTRY], "intervention_types": ["<class 'pyvene.models.interventions.ZeroIntervention'>"]},
        ("ZeroIntervention", "expected pyreft's"),
    ),
    "two classes": (
        {"intervention_types": [LORE, LORE, LORE.replace("Lo", "Di")]},
        ("DireftIntervention, LoreftIntervention", "expected one class"),
    ),
    "twice": (
        {"representations": [ENTRY, entry(layer=1), ENTRY]},
        ("layer 0 has several interventions", "expected one a layer"),
    ),
    "component": (
        ONE | {"representations": [entry(component="mlp_output")]},
        ("layer 0 has component 'mlp_output'", "expected 'block_output'"),
    ),
    "path": (
        ONE | {"representations": [entry(component="model.layers[0].output")]},
        ("component 'model.layers[0].output'", "expected 'block_output'"),
    ),
    "escaping": (
        ONE | {"representations": [entry(layer="../../x")]},
        ("layer is '../../x'", "expected an integer from 0"),
    ),
    "negative": (ONE | {"representations": [entry(layer=-1)]}, ("layer is -1", "expected an integer from 0")),
    "unit": (ONE | {"representations": [entry(unit="h")]}, ("unit 'h'", "expected 'pos'")),
    "units": (ONE | {"representations": [entry(max_number_of_units=2)]}, ("max_number_of_units 2", "expected 1")),
    "subspaces": (
        ONE | {"representations": [entry(subspace_partition=[[0, 2], [2, 4]])]},
        ("has a subspace_partition", "expected none"),
    ),
    "experts": (ONE | {"representations": [entry(moe_key=1)]}, ("has a moe_key", "expected none")),
    "unknown field": (
        ONE | {"representations": [{"layer": 0, "where": 1}]},
        ("a representation is {'layer': 0, 'where': 1}", "expected pyvene's layer, component"),
    ),
    "too many fields": (ONE | {"representations": [[*ENTRY, 1]]}, ("a representation is [0,", "expected pyvene's")),
    "other rank": (
        {"representations": [ENTRY, entry(layer=1), entry(layer=2, low_rank_dimension=3)]},
        (file_name(2), "its rank is 4", "expected 3, the low_rank_dimension"),
    ),
    "unknown file": (
        ONE | {"representations": [ENTRY]},
        (f"has a file {file_name(1)}", "does not list"),
    ),
    "missing file": (
        {"representations": [ENTRY, entry(layer=1), entry(layer=7)]},
        (f"no file {{reft}}/{file_name(7)}", "expected one for each"),
    ),
}


def with_entry(**changes: Any) -> Callable[[Path], None]:
    """Return a damage that changes tensors of layer 1, by a new value or a function of the old; None removes one."""

    def change(directory: Path) -> None:
        state = torch.load(directory / file_name(1), weights_only=True)
        for key, new in changes.items():
            state[key] = new(state[key]) if callable(new) else new
            if new is None:
                del state[key]
        torch.save(state, directory / file_name(1))

    return change


#: name -> a change to a LoReFT's directory, and parts of the refusal.
WEIGHTS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no rotation": (with_entry(rotate_layer=None), ("it has weight, bias; expected weight, bias, rotate_layer",)),
    "more": (with_entry(more=torch.ones(2)), ("it has weight, bias, rotate_layer, more; expected",)),
    "rotation the other way": (with_entry(rotate_layer=torch.Tensor.t), ("rotate_layer has shape (4, 32)", "(32, 4)")),
    "rank of one layer": (
        with_entry(weight=lambda t: t[:3], bias=lambda t: t[:3], rotate_layer=lambda t: t[:, :3]),
        ("weight has shape (3, 32); expected (4, 32)",),
    ),
    "width of one layer": (
        with_entry(weight=lambda t: t[:, :30], rotate_layer=lambda t: t[:30]),
        ("weight has shape (4, 30); expected (4, 32)",),
    ),
    "number": (with_entry(bias=3.0), ("bias is a float", "expected a tensor")),
    "float64": (with_entry(bias=torch.Tensor.double), ("bias is torch.float64", "expected one of float32")),
    "infinite": (with_entry(bias=lambda t: t / 0), ("bias has values that are NaN or infinite",)),
    "no state dict": (lambda d: torch.save([1], d / file_name(1)), (file_name(1), "holds a list")),
    "hostile": (
        lambda d: torch.save({"weight": Hostile(d / "made")}, d / file_name(1)),
        (file_name(1), "it asks for", "mkdir", "weights_only=True"),
    ),
    "base": (
        lambda d: torch.save({"lm_head.weight": torch.ones(2)}, d / "pytorch_model.bin"),
        ("weights of the base model (pytorch_model.bin)", "expected the base frozen"),
    ),
    "no config": (lambda d: (d / "config.json").unlink(), ("no file", "config.json", "reft_model.save")),
    "no JSON": (
        lambda d: (d / "config.json").write_text("{"),
        ("config.json", "cannot be read", "expected a JSON object"),
    ),
}


def test_pyreft_and_vectors_pyreft_refusals_write_nothing(tmp_path):
    """The command refuses every bad file with one line and exit code 1, and writes nothing."""
    cases = {f"config {name}": case for name, case in CONFIGS.items()} | WEIGHTS
    for name, (change, parts) in cases.items():
        reft = tmp_path / name
        save_pyreft(reft, of_class("Loreft"), **(change if isinstance(change, dict) else {}))
        if isinstance(change, list):
            (reft / "config.json").write_text(json.dumps(change), encoding="utf-8")
        if callable(change):
            change(reft)
        before = files(tmp_path)
        result = invoke("import", "pyreft", reft, *PYREFT_ARGUMENTS, "--out", tmp_path / "out")
        assert_refused(result, *(part.replace("{reft}", str(reft)) for part in (name, *parts)))
        assert result.stdout == "" and files(tmp_path) == before and not (tmp_path / "out").exists(), name
        assert not (reft / "made").exists()


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("Direft", {"positions": None}, ("positions is not given", "(--positions)", "do not record it")),
        ("Direft", {"positions": "f7+x7"}, ("positions has 'first_7+x7'", "expected 'all'")),
        ("Direft", {"activation": None}, ("activation is not given", "expected identity or silu", "--activation")),
        ("Loreft", {"activation": None}, ("activation is not given", "expected identity (")),
        ("Loreft", {}, ("activation is 'silu'", "not of the form W2 φ(W1 h + b1)", "expected identity")),
        ("Noreft", {}, ("activation is 'silu'", "expected identity")),
        ("Consreft", {"activation": "identity"}, ("ConsreftIntervention has none", "expected none given")),
        ("Direft", {"activation": "mish"}, ("activation is 'mish'", "expected one of")),
        ("Direft", {"num_layers": None}, ("num_layers not given", "--num-layers")),
        ("Direft", {"num_layers": 2}, ("it has a layer 2", "expected indices below 2")),
    ],
)
def test_pyreft_and_vectors_what_pyreft_does_not_record_is_asked_for(name, options, parts, tmp_path):
    save_pyreft(tmp_path / "reft", of_class(name))
    with refused(ValueError, *parts):
        import_pyreft(tmp_path / "reft", **{"positions": "all", "activation": "silu", **LLAMA} | options)


def test_pyreft_and_vectors_positions_in_pyrefts_words(tmp_path):
    save_pyreft(tmp_path / "reft", of_class("Loreft"))
    found = import_pyreft(tmp_path / "reft", positions="f7+l1", activation="identity", **LLAMA)
    assert found.config == SteerConfig("loreft", RANK, positions="first_7+last_prompt")


def test_pyreft_and_vectors_a_rotation_of_another_dtype(tmp_path):
    save_pyreft(tmp_path / "reft", {0: of_class("Lobireft")[0].to(torch.bfloat16)})
    with refused(ValueError, "original is torch.bfloat16", "expected torch.float32"):
        import_pyreft(tmp_path / "reft", positions="all", **LLAMA)


def test_pyreft_and_vectors_a_rotation_as_wide_as_the_model(tmp_path):
    """A rotation as wide as the model, which torch parametrises differently, is imported too."""
    square, source = torch.eye(HIDDEN), torch.ones(HIDDEN)
    names = ("parametrizations.weight.original", "parametrizations.weight.0.base")
    save_pyreft(tmp_path / "reft", of_class("Lobireft", layers=[0]))
    entries = {"learned_source": source, **{f"rotate_layer.{name}": square for name in names}}
    torch.save(entries, tmp_path / "reft" / file_name(0))
    representations = [entry(low_rank_dimension=HIDDEN)]
    config = json.loads((tmp_path / "reft" / "config.json").read_text()) | {"representations": representations}
    (tmp_path / "reft" / "config.json").write_text(json.dumps(config))
    with refused(ValueError, file_name(0), "its rank is 32", "expected less than its hidden size, 32"):
        import_pyreft(tmp_path / "reft", positions="all", **LLAMA)


def test_pyreft_and_vectors_pyreft_command(tmp_path):
    shifts = save_pyreft(tmp_path / "reft", of_class("Loreft", layers=[0, 2]))
    result = invoke("import", "pyreft", tmp_path / "reft", *PYREFT_ARGUMENTS, "--out", tmp_path / "out")
    table = shown(result)
    expected = {
        "form": "loreft",
        "rank": str(RANK),
        "activation": "identity",
        "scale": "1.0",
        "layers": "0, 2 (the model has 3, from 0)",
    }
    assert {name: table.get(name) for name in expected} == expected
    names = {"model": build()}
    exec("\n".join(result.stdout.splitlines()[-2:]), names)
    assert_close(logits(names["model"]), logits(hooked(shifts)))


# ------------------------------------------------------------------------------------------------------------- vectors


def directions(layers: Any = range(LAYERS), dtype: torch.dtype = torch.float32) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {i: torch.randn(HIDDEN, generator=generator).to(dtype) for i in layers}


def additions(vectors: dict[int, Tensor]) -> dict[int, Shift]:
    """Return the shifts that repeng's ControlModule, steering-vectors' hook and llama.cpp's l_out add at each layer."""
    return {i: lambda h, v=v: SCALE * v.float() for i, v in vectors.items()}


def named(prefix: str) -> Callable[[dict[int, Tensor]], dict[str, Tensor]]:
    return lambda vectors: {f"{prefix}{i}": v for i, v in vectors.items()}


#: name of the file -> a function from vectors to its content, and a function that writes it.
KINDS: dict[str, tuple[Callable[[dict[int, Tensor]], Any], Callable[..., Any]]] = {
    "repeng.gguf": (named("direction."), write_gguf),
    "by_place.safetensors": (named("layers."), save_file),
    "by_name.pt": (named("layer."), torch.save),
    "by_number.pt": (named(""), torch.save),
    "by_integer.pt": (dict, torch.save),
}


@pytest.mark.parametrize("layers", [[2, 1, 0], [2, 1]], ids=["all", "some"])
@pytest.mark.parametrize("name", KINDS)
def test_pyreft_and_vectors_vectors_by_layer(name, layers, tmp_path):
    """Vectors are imported by layer, in any order and without layer 0, as repeng trains them."""
    state, save = KINDS[name]
    vectors = directions(layers)
    save(state(vectors), tmp_path / name)
    config = assert_same_function(
        import_vector(tmp_path / name, scale=SCALE, **LLAMA), additions(vectors), tmp_path / "out"
    )
    assert config == SteerConfig("vector", scale=SCALE, layers=None if len(layers) == LAYERS else [1, 2])


@pytest.mark.parametrize("number", [int, np.int64])
@pytest.mark.parametrize("name", ["repeng.gguf", "by_integer.pt"])
def test_pyreft_and_vectors_layers_of_the_file_to_take(name, number, tmp_path):
    """`layers` selects layers of the file, like layer_ids of repeng's ControlModel."""
    state, save = KINDS[name]
    vectors = directions()
    save(state(vectors), tmp_path / name)
    layers = [2, 0] if number is int else np.array([2, 0])
    options = LLAMA | {"num_layers": number(LAYERS)}
    found = import_vector(tmp_path / name, scale=SCALE, layers=layers, **options)
    del vectors[1]
    assert assert_same_function(found, additions(vectors), tmp_path / "out").layers == (0, 2)


@pytest.mark.parametrize("kind", ["bare", "in a dict", "safetensors"])
@pytest.mark.parametrize("layers", [None, [2, 0], [1]], ids=str)
def test_pyreft_and_vectors_rows_of_a_tensor(kind, layers, tmp_path):
    vectors = directions(layers or range(LAYERS))
    rows = torch.stack(list(vectors.values()))
    rows = rows[0] if layers == [1] else rows  # (d,)
    file = tmp_path / ("v.safetensors" if kind == "safetensors" else "v.pt")
    (save_file if kind == "safetensors" else torch.save)(rows if kind == "bare" else {"steering": rows}, file)
    found = import_vector(file, scale=SCALE, layers=layers, **LLAMA)
    assert_same_function(found, additions(vectors), tmp_path / "out")


def test_pyreft_and_vectors_one_vector_for_several_layers(tmp_path):
    """One vector can serve several layers, although safetensors does not write a shared tensor twice."""
    vectors = dict.fromkeys(range(LAYERS), directions()[0])
    torch.save(vectors, tmp_path / "v.pt")
    assert_same_function(import_vector(tmp_path / "v.pt", scale=SCALE, **LLAMA), additions(vectors), tmp_path / "out")


@pytest.mark.parametrize("name", ["repeng.gguf", "by_name.pt"])
def test_pyreft_and_vectors_half_precision_is_kept(name, tmp_path):
    state, save = KINDS[name]
    vectors = directions(dtype=torch.float16)
    save(state(vectors), tmp_path / name)
    found = import_vector(tmp_path / name, scale=SCALE, **LLAMA)
    assert assert_same_function(found, additions(vectors), tmp_path / "out").dtype == "float16"
    assert all(torch.equal(found.tensors[Place(i)]["steer_up.bias"], v) for i, v in vectors.items())


def test_pyreft_and_vectors_the_base_models_config_must_fit(tmp_path):
    build(hidden_size=64).config.save_pretrained(tmp_path / "wide")
    torch.save(directions(), tmp_path / "v.pt")
    with refused(ValueError, "v.pt", "hidden size is 32", "expected 64", "wide"):
        import_vector(tmp_path / "v.pt", scale=1.0, base=str(tmp_path / "wide"))


def cut(tensors: dict[str, Any], file: Path) -> None:
    write_gguf(tensors, file)
    file.write_bytes(file.read_bytes()[:-40])


ROWS = torch.ones(LAYERS + 1, HIDDEN)

#: name of the file -> its content, a function that writes it, and parts of the refusal.
MISFITS: dict[str, tuple[Any, Callable[..., Any], tuple[str, ...]]] = {
    "hidden_states.pt": (ROWS, torch.save, ("shape (4, 32), and layers is not given", "--layers", "3 rows")),
    "one.pt": (ROWS[0], torch.save, ("shape (32,), and layers is not given", "expected the layer of each row")),
    "cube.pt": (torch.ones(LAYERS, 1, HIDDEN), torch.save, ("shape (3, 1, 32)", "expected two dimensions")),
    "scalar.pt": (torch.tensor(1.0), torch.save, ("shape ()", "expected two dimensions")),
    "empty.pt": ({}, torch.save, ("it holds nothing", "expected vectors")),
    "list.pt": ([ROWS], torch.save, ("it holds a list", "expected vectors")),
    "matrix.pt": ({"layer.1": ROWS}, torch.save, ("layer.1 has shape (4, 32)", "expected one dimension")),
    "unknown.pt": ({"0": ROWS[0], "mean": ROWS[0]}, torch.save, ("unknown key 'mean'", "expected names such as")),
    "negative.pt": ({-1: ROWS[0], 0: ROWS[0]}, torch.save, ("unknown key -1",)),
    "truth.pt": ({True: ROWS[0], 0: ROWS[0]}, torch.save, ("unknown key True",)),
    "twice.pt": ({"1": ROWS[0], "layer.1": ROWS[0]}, torch.save, ("layer 1 twice", "'layer.1'", "expected it once")),
    "number.pt": ({1: 3.0, 2: ROWS[0]}, torch.save, ("1 is a float", "expected a tensor")),
    "float64.pt": ({1: ROWS[0].double()}, torch.save, ("1 is torch.float64", "expected one of float32")),
    "nan.pt": ({1: ROWS[0] / 0}, torch.save, ("1 has values that are NaN or infinite",)),
    "widths.pt": (
        {0: ROWS[0], 2: ROWS[0, :30]},
        torch.save,
        ("layer 2 has hidden size 30; expected 32, as layer 0 has",),
    ),
    "dtypes.pt": ({0: ROWS[0], 1: ROWS[0].half()}, torch.save, ("layer 1 has dtype torch.float16; expected",)),
    "range.pt": ({3: ROWS[0]}, torch.save, ("it has a layer 3", "expected indices below 3")),
    "object.pt": (nn.Linear(2, 2), torch.save, ("it asks for torch.nn", "expected only tensors")),
    "lora.gguf": (
        {"direction.1": ROWS[0]},
        lambda tensors, file: write_gguf(tensors, file, "llama"),
        ("its architecture is 'llama'", "expected 'controlvector'"),
    ),
    "more.gguf": ({"direction.1": ROWS[0], "mean": ROWS[0]}, write_gguf, ("a tensor 'mean'", "direction.<layer>")),
    "name.gguf": ({"direction.last": ROWS[0], "direction.1": ROWS[0]}, write_gguf, ("unknown key 'direction.last'",)),
    "double.gguf": ({"direction.1": np.ones(HIDDEN)}, write_gguf, ("direction.1 is F64", "expected F32 or F16")),
    "matrix.gguf": ({"direction.1": ROWS}, write_gguf, ("direction.1 has shape (4, 32)", "expected one dimension")),
    "cut.gguf": ({"direction.1": ROWS[0]}, cut, ("cannot be read", "expected a GGUF file")),
    "text.gguf": ("hello world", lambda text, file: file.write_text(text), ("magic", "expected a GGUF file")),
    "nothing.gguf": ("", lambda text, file: file.write_text(text), ("cannot be read", "expected a GGUF file")),
    "text.safetensors": ("hello", lambda text, file: file.write_text(text), ("header", "a safetensors file")),
    "missing.gguf": (None, lambda nothing, file: None, ("no file", "expected a control vector")),
}


def test_pyreft_and_vectors_vector_refusals_write_nothing(tmp_path, recwarn):
    """The command refuses every bad file with one line that names it and exit code 1, and writes nothing."""
    for name, (content, save, parts) in MISFITS.items():
        file = tmp_path / name
        save(content, file)
        before = files(tmp_path)
        result = invoke("import", "vector", file, "--scale", 1, *LAYOUT, "--out", tmp_path / "out")
        assert_refused(result, file, *parts)
        assert result.stdout == "" and files(tmp_path) == before and not (tmp_path / "out").exists(), name
    assert not recwarn.list  # a warning would be a second line


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((*LAYOUT,), ("scale is not given", "--scale")),
        (("--scale", 1), ("num_layers and layers_path not given",)),
        (("--scale", "nan", *LAYOUT), ("scale is nan", "expected a finite number")),
        (("--scale", 1, "--layers", "0-2", *LAYOUT), ("layers is '0-2'", "expected indices such as 7,8,9")),
        (("--scale", 1, "--layers", "1,1", *LAYOUT), ("layers names a layer twice",)),
        (("--scale", 1, "--layers=-1", *LAYOUT), ("layers has -1", "expected indices from 0")),
        (("--scale", 1, "--layers", "0,1", *LAYOUT), ("layers has 0", "expected those in the file: 1, 2")),
    ],
)
def test_pyreft_and_vectors_vector_arguments(arguments, parts, tmp_path):
    torch.save(directions([2, 1]), tmp_path / "v.pt")
    assert_refused(invoke("import", "vector", tmp_path / "v.pt", *arguments, "--out", tmp_path / "out"), *parts)
    assert not (tmp_path / "out").exists()


def test_pyreft_and_vectors_rows_must_be_as_many_as_layers(tmp_path):
    torch.save(ROWS, tmp_path / "v.pt")
    with refused(ValueError, "v.pt", "shape (4, 32)", "expected 2 rows, as many as layers"):
        import_vector(tmp_path / "v.pt", scale=1.0, layers=[0, 1], **LLAMA)


def test_pyreft_and_vectors_vector_command(tmp_path):
    vectors = directions([1, 2])
    write_gguf(named("direction.")(vectors), tmp_path / "v.gguf")
    out = tmp_path / "out"
    result = invoke(
        *("import", "vector", tmp_path / "v.gguf", "--scale", SCALE, "--layers", "2", *LAYOUT, "--out", out)
    )
    table = shown(result)
    expected = {
        "form": "vector",
        "rank": "0",
        "scale": str(SCALE),
        "layers": "2 (the model has 3, from 0)",
        "dtype": "float32",
    }
    assert {name: table.get(name) for name in expected} == expected
    names = {"model": build()}
    exec("\n".join(result.stdout.splitlines()[-2:]), names)
    assert_close(logits(names["model"]), logits(hooked(additions({2: vectors[2]}))))
