"""Tests that imported adapters of the paper's released code compute what its hooks do, and of refusals."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import assert_refused, invoke, plain_output  # noqa: F401 - an autouse fixture
from foreign import LAYOUT, LLAMA, PHI, RANK, SCALE, Hostile, files, shown
from models import HIDDEN, LAYERS, assert_close, build, difference, logits, refused, steering_parameters
from safetensors.torch import save_file
from torch import Tensor, nn

from fused_steer import SteerConfig, patch_model
from fused_steer.adapters.files import write_adapter
from fused_steer.adapters.parameters import Layout
from fused_steer.importers.steerling import import_steerling

LOWRANK = {"activation": "silu", "scale": SCALE, **LLAMA}
VECTOR = {"scale": SCALE, **LLAMA}


class Released(nn.Module):
    """The released code's model: hooks on a frozen base that return h + scale · up(φ(down(h))) or h + scale · vector.

    Its state dict has the released code's names. Values are rounded to `dtype`; sums are in float32, as in the op.
    """

    def __init__(
        self,
        form: str,
        *,
        family: str = "llama",
        layers=range(LAYERS),
        phi="silu",
        dtype=torch.float32,
        targets=("block",),
    ):
        super().__init__()
        self.base_model = build(family).requires_grad_(False)
        self.phi = PHI[phi]
        decoder = self.base_model.get_submodule("transformer.h" if family == "gpt2" else "model.layers")
        torch.manual_seed(1)
        keys = {f"layer{i}_{target}": (i, target) for i in layers for target in targets}
        if form == "vector":
            self.deltas = nn.ParameterDict({key: 0.3 * torch.randn(HIDDEN) for key in keys})
            shifts = {key: lambda h, key=key: self.deltas[key].float() for key in keys}
            self.deltas.to(dtype)
        else:
            self.adapters = nn.ModuleDict()
            for key in keys:
                linear = {"down": nn.Linear(HIDDEN, RANK, bias=False), "up": nn.Linear(RANK, HIDDEN, bias=False)}
                self.adapters[key] = nn.ModuleDict(linear).to(dtype)
            shifts = {key: lambda h, key=key: self._low_rank(self.adapters[key], h) for key in keys}
        for key, (i, target) in keys.items():
            module = decoder[i].get_submodule({"block": "", "attn": "post_attention_layernorm", "mlp": "mlp"}[target])
            module.register_forward_hook(lambda module, args, out, shift=shifts[key]: out + SCALE * shift(out))

    def _low_rank(self, parts: nn.ModuleDict, h: Tensor) -> Tensor:
        return self.phi(h @ parts["down"].weight.float().t()) @ parts["up"].weight.float().t()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def own(self) -> dict[str, Tensor]:
        """Return the steering's part of the state dict."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("base_model.")}

    def bare(self) -> dict[str, Tensor]:
        return (self.adapters if hasattr(self, "adapters") else self.deltas).state_dict()


def imported(file: Path, out: Path, **options: Any) -> nn.Module:
    """Import `file` and patch a fresh Llama with the adapter."""
    write_adapter(out, import_steerling(file, **options).adapter)
    return patch_model(build(), out)


def assert_same_function(model: nn.Module, released: Released) -> None:
    assert_close(logits(model), logits(released))
    with model.steering.disabled():
        assert difference(logits(model), logits(released))[""] > 0.01  # the steering has an effect


# ------------------------------------------------------------------------------------------------------------- numbers

#: name -> the file's name, a function from the model to its content, and a function that writes it.
FILES: dict[str, tuple[str, Callable[[Released], dict[str, Tensor]], Callable[..., Any]]] = {
    "alone": ("adapter_steerer.pt", Released.bare, torch.save),
    "alone, whole names": ("adapters.pt", Released.own, torch.save),
    "alone, safetensors": ("adapters.safetensors", Released.bare, save_file),
    "before zip files": (
        "old.pth",
        Released.bare,
        lambda state, file: torch.save(state, file, _use_new_zipfile_serialization=False),
    ),
    "checkpoint": ("pytorch_model.bin", nn.Module.state_dict, torch.save),
    "checkpoint, safetensors": ("model.safetensors", nn.Module.state_dict, save_file),
}


@pytest.mark.parametrize("form", ["lowrank", "vector"])
@pytest.mark.parametrize("kind", FILES)
def test_steerling_every_kind_of_file(kind, form, tmp_path):
    name, state, save = FILES[kind]
    released = Released(form)
    save(state(released), tmp_path / name)
    options = LOWRANK if form == "lowrank" else VECTOR
    model = imported(tmp_path / name, tmp_path / "out", **options)
    assert_same_function(model, released)
    assert model.steering.config() == SteerConfig(form, rank=RANK if form == "lowrank" else None, scale=SCALE)
    ignored = len(released.base_model.state_dict()) if kind.startswith("checkpoint") else 0
    found = import_steerling(tmp_path / name, **options)
    assert (found.ignored, found.lora) == (ignored, 0)


@pytest.mark.parametrize("phi", PHI)
def test_steerling_every_activation(phi, tmp_path):
    released = Released("lowrank", phi=phi)
    torch.save(released.bare(), tmp_path / "a.pt")
    model = imported(tmp_path / "a.pt", tmp_path / "out", **LOWRANK | {"activation": phi})
    assert_same_function(model, released)


@pytest.mark.parametrize("form", ["lowrank", "vector"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steerling_dtype_and_values_are_kept(dtype, form, tmp_path):
    released = Released(form, dtype=dtype)
    torch.save(released.bare(), tmp_path / "a.pt")
    model = imported(tmp_path / "a.pt", tmp_path / "out", **(LOWRANK if form == "lowrank" else VECTOR))
    assert_same_function(model, released)
    assert model.steering.config().dtype == str(dtype).removeprefix("torch.")
    names = {"down.weight": "steer_down.weight", "up.weight": "steer_up.weight", "": "steer_up.bias"}
    ours, theirs = steering_parameters(model), released.bare()
    assert len(ours) == len(theirs)
    for key, tensor in theirs.items():
        block, _, part = key.partition(".")
        index = block.removeprefix("layer").removesuffix("_block")
        assert torch.equal(ours[f"model.layers.{index}.post_block.{names[part]}"], tensor)


@pytest.mark.parametrize("layers", [[0, 2], [0, 1]], ids=["gap", "no gap"])
@pytest.mark.parametrize("form", ["lowrank", "vector"])
def test_steerling_some_layers(form, layers, tmp_path):
    """An import keeps the file's layers: layers 0 and 1 are not taken for all layers of a model."""
    released = Released(form, layers=layers)
    torch.save(released.bare(), tmp_path / "a.pt")
    model = imported(tmp_path / "a.pt", tmp_path / "out", **(LOWRANK if form == "lowrank" else VECTOR))
    assert_same_function(model, released)
    assert model.steering.config().layers == tuple(layers)


@pytest.mark.parametrize("targets", [("mlp",), ("attn",), ("attn", "mlp"), ("block", "attn", "mlp")], ids=str)
@pytest.mark.parametrize("form", ["lowrank", "vector"])
def test_steerling_submodules(form, targets, tmp_path):
    released = Released(form, targets=targets, layers=[0, 2])
    torch.save(released.bare(), tmp_path / "a.pt")
    build().config.save_pretrained(tmp_path / "base")
    options = {"base": str(tmp_path / "base"), "activation": "silu" if form == "lowrank" else None}
    found = import_steerling(tmp_path / "a.pt", scale=SCALE, **options).adapter
    sites = {"attn": "pre_mlp", "mlp": "post_mlp", "block": "post_block"}
    assert set(found.config.sites) == {sites[target] for target in targets}
    write_adapter(tmp_path / "out", found)
    assert_same_function(patch_model(build(), tmp_path / "out", check_base=False), released)


@pytest.mark.parametrize(
    ("family", "target", "parts"),
    [
        ("gemma3", "attn", ("pre_mlp", "post_attention_layernorm", "layer 0 of", "pre_feedforward_layernorm there")),
        ("gpt2", "attn", ("pre_mlp", "ln_2 there", "expected a model that has post_attention_layernorm")),
    ],
)
def test_steerling_submodules_of_a_model_that_has_others(family, target, parts, tmp_path):
    torch.save({f"layer{i}_{target}": torch.ones(HIDDEN) for i in range(LAYERS)}, tmp_path / "a.pt")
    build(family).config.save_pretrained(tmp_path / "base")
    with refused(ValueError, *parts):
        import_steerling(tmp_path / "a.pt", scale=1.0, base=str(tmp_path / "base"))


def test_steerling_tensors_that_share_memory(tmp_path):
    released = Released("vector")
    flat = torch.cat(list(released.bare().values()))
    tied = {f"layer{i}_block": flat[:HIDDEN] for i in range(LAYERS)}
    torch.save(tied, tmp_path / "a.pt")
    released.deltas.load_state_dict(tied)
    assert_same_function(imported(tmp_path / "a.pt", tmp_path / "out", **VECTOR), released)


# ------------------------------------------------------------------------------------------------------ the base model


@pytest.fixture
def gpt2(tmp_path) -> Path:
    """Make a directory with only the config of a GPT-2."""
    build("gpt2").config.save_pretrained(tmp_path / "tiny-gpt2")
    return tmp_path / "tiny-gpt2"


def test_steerling_the_base_models_config_tells_its_layers(gpt2, tmp_path):
    released = Released("lowrank", family="gpt2", layers=[0, 1])
    torch.save(released.bare(), tmp_path / "a.pt")
    found = import_steerling(tmp_path / "a.pt", activation="silu", scale=SCALE, base=str(gpt2)).adapter
    assert (found.layout, found.config.layers) == (Layout("transformer.h", LAYERS, HIDDEN, str(gpt2)), (0, 1))
    write_adapter(tmp_path / "out", found)
    model = build("gpt2")
    model.config._name_or_path = "elsewhere/tiny-gpt2"
    assert_same_function(patch_model(model, tmp_path / "out"), released)


def test_steerling_a_base_model_beside_both_is_only_a_name(tmp_path):
    torch.save(Released("vector").bare(), tmp_path / "a.pt")
    found = import_steerling(tmp_path / "a.pt", base="no/such-model", **VECTOR).adapter
    assert found.layout.base == "no/such-model"


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, ("num_layers and layers_path not given", "--num-layers", "--layers-path", "--base-model")),
        ({"num_layers": 3}, ("layers_path not given", "--layers-path", "does not record")),
        ({"layers_path": "model.layers"}, ("num_layers not given", "--num-layers")),
        ({"base": "{tmp}/none"}, ("{tmp}/none", "does not tell its layers", "expected")),
        ({"base": "{base}", "num_layers": 4}, ("num_layers is 4", "expected 3")),
        ({"base": "{base}", "layers_path": "model.layers"}, ("layers_path is model.layers", "expected transformer.h")),
        ({"num_layers": 0, "layers_path": "h"}, ("num_layers is 0", "expected at least 1")),
        ({"num_layers": 3, "layers_path": "model.layers."}, ("'model.layers.'", "expected a module's path")),
    ],
)
def test_steerling_what_the_file_does_not_record_is_never_guessed(options, parts, gpt2, tmp_path):
    torch.save(Released("vector").bare(), tmp_path / "a.pt")
    places = {"tmp": tmp_path, "base": gpt2}
    options, parts = (
        {name: value.format(**places) if isinstance(value, str) else value for name, value in options.items()},
        [part.format(**places) for part in parts],
    )
    with refused(ValueError, *parts):
        import_steerling(tmp_path / "a.pt", scale=1.0, **options)


def test_steerling_a_base_model_of_another_hidden_size(tmp_path):
    build(hidden_size=64).config.save_pretrained(tmp_path / "wide")
    torch.save(Released("vector").bare(), tmp_path / "a.pt")
    with refused(ValueError, "hidden size is 32", "expected 64", "wide"):
        import_steerling(tmp_path / "a.pt", scale=1.0, base=str(tmp_path / "wide"))


# ------------------------------------------------------------------------------------------------------------ refusals

DOWN, UP, DELTA = "adapters.layer1_block.down.weight", "adapters.layer1_block.up.weight", "deltas.layer1_block"


def changed(form: str, **changes: Any) -> Callable[[], dict[str, Any]]:
    """Return a maker of a good state dict with entries changed (by a function of the old value), added or removed."""

    def state() -> dict[str, Any]:
        entries: dict[str, Any] = Released(form).own()
        for key, change in changes.items():
            value = change(entries[key]) if callable(change) else change
            entries[key] = value
            if value is None:
                del entries[key]
        return entries

    return state


def all_changed(form: str, change: Callable[[Tensor], Tensor]) -> Callable[[], dict[str, Any]]:
    return lambda: {key: change(value) for key, value in Released(form).own().items()}


def with_nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[3] = float("nan")
    return tensor


WIDE = {"down": (257, HIDDEN), "up": (HIDDEN, 257)}

#: name -> a function that makes the file's content, and parts of the refusal.
MISFITS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "empty": (dict, ("no adapter", "expected keys such as")),
    "base only": (lambda: {"base_model.lm_head.weight": torch.ones(2)}, ("no adapter", "only 1 base_model.*")),
    "a list": (lambda: [torch.ones(HIDDEN)], ("holds a list", "expected a state dict")),
    "a tensor": (lambda: torch.ones(HIDDEN), ("holds a Tensor", "expected a state dict")),
    "a key that is no name": (lambda: {3: torch.ones(HIDDEN)}, ("key 3", "expected names")),
    "nested": (lambda: {"state_dict": Released("vector").own()}, ("unknown key 'state_dict'", "expected names such")),
    "unknown key": (changed("lowrank", **{"adapters.step": torch.ones(1)}), ("unknown key 'adapters.step'",)),
    "bias": (
        changed("lowrank", **{"adapters.layer1_block.up.bias": torch.ones(HIDDEN)}),
        ("unknown key 'adapters.layer1_block.up.bias'",),
    ),
    "leading zero": (changed("vector", **{"deltas.layer01_block": torch.ones(HIDDEN)}), ("unknown key",)),
    "attention": (
        changed("lowrank", **{"adapters.layer0_attn.down.weight": torch.ones(RANK, HIDDEN)}),
        ("pre_mlp of layer 0 has no up.weight", "expected one beside its down.weight"),
    ),
    "mlp": (lambda: {"layer0_mlp": torch.ones(HIDDEN)}, ("steers at attn or mlp", "expected the base model")),
    "twice": (changed("vector", layer1_block=torch.ones(HIDDEN)), ("'layer1_block' with and without", "once")),
    "number": (changed("lowrank", **{UP: 3.0}), (f"{UP} is a float", "expected a tensor")),
    "sparse": (changed("lowrank", **{UP: torch.Tensor.to_sparse}), (UP, "sparse", "expected a dense one")),
    "without values": (changed("lowrank", **{UP: lambda t: t.to("meta")}), (UP, "on meta", "with values")),
    "float64": (all_changed("lowrank", torch.Tensor.double), ("torch.float64", "expected one of float32, bfloat16")),
    "integers": (all_changed("vector", torch.Tensor.int), ("torch.int32", "expected one of float32")),
    "matrix of three dimensions": (changed("lowrank", **{UP: lambda t: t[None]}), (UP, "(1, 32, 4)", "two dimensions")),
    "vector of two dimensions": (changed("vector", **{DELTA: lambda t: t[None]}), (DELTA, "(1, 32)", "one dimension")),
    "rank 0": (changed("lowrank", **{DOWN: lambda t: t[:0]}), (DOWN, "(0, 32)", "not of size 0")),
    "no width": (all_changed("vector", lambda t: t[:0]), ("shape (0,)", "not of size 0")),
    "no up": (changed("lowrank", **{UP: None}), ("layer 1 has no up.weight", "expected one beside its down.weight")),
    "no down": (changed("lowrank", **{DOWN: None}), ("layer 1 has no down.weight", "beside its up.weight")),
    "up not transposed": (changed("lowrank", **{UP: torch.Tensor.t}), ("layer 1", "(4, 32); expected (32, 4)")),
    "mixed forms": (changed("lowrank", **{DELTA: torch.ones(HIDDEN)}), ("vector (layer 1)", "matrices (layer 0)")),
    "mixed in different layers": (
        changed("vector", **{DELTA: None, DOWN: torch.ones(RANK, HIDDEN), UP: torch.ones(HIDDEN, RANK)}),
        ("vector (layer 0)", "matrices (layer 1)", "expected one form"),
    ),
    "other rank": (
        changed("lowrank", **{DOWN: lambda t: t[:3], UP: lambda t: t[:, :3]}),
        ("layer 1 has rank 3; expected 4, as layer 0 has",),
    ),
    "other hidden size": (
        changed("lowrank", **{DOWN: lambda t: t[:, :30], UP: lambda t: t[:30]}),
        ("layer 1 has hidden size 30; expected 32, as layer 0 has",),
    ),
    "other vector": (changed("vector", **{DELTA: lambda t: t[:30]}), ("layer 1 has hidden size 30; expected 32",)),
    "other dtype": (
        changed("vector", **{DELTA: torch.Tensor.half}),
        ("layer 1 has dtype torch.float16; expected",),
    ),
    "two dtypes in a layer": (changed("lowrank", **{UP: torch.Tensor.half}), ("layer 1", "up.weight of torch.float16")),
    "rank too high": (
        lambda: {
            "layer0_block.down.weight": torch.ones(257, HIDDEN),
            "layer0_block.up.weight": torch.ones(HIDDEN, 257),
        },
        ("rank is 257", "expected 1 to 256"),
    ),
    "NaN": (changed("lowrank", **{UP: with_nan}), (UP, "NaN or infinite", "expected finite")),
    "infinity": (changed("vector", **{DELTA: lambda t: t / 0}), (DELTA, "NaN or infinite")),
    "layer out of range": (
        lambda: {f"layer{LAYERS}_block": torch.ones(HIDDEN)},
        (f"layer {LAYERS}", f"expected indices below {LAYERS}"),
    ),
}


@pytest.mark.parametrize("earlier", [False, True], ids=["new directory", "earlier adapter"])
def test_steerling_refusals_write_nothing(earlier, tmp_path):
    """The command refuses every bad file with one line that names it and exit code 1, and changes nothing."""
    out = tmp_path / "out"
    if earlier:
        patch_model(build(), SteerConfig(rank=2)).steering.save(out)
    before = files(tmp_path)
    for name, (make, parts) in MISFITS.items():
        file, state = tmp_path / f"{name}.pt", make()
        torch.save(state, file)
        activation = ["--activation", "silu"] if any("down" in str(key) for key in state) else []
        result = command(file, "--scale", 1, *activation, *LAYOUT, "--out", out)
        assert_refused(result, file, *parts)
        assert result.stdout == ""
        file.unlink()
        assert files(tmp_path) == before and out.exists() == earlier, name


def write_hostile(file: Path) -> None:
    torch.save({DELTA: torch.ones(HIDDEN), "x": Hostile(file.parent / "made")}, file)


#: name -> a function that writes the file, and parts of the refusal.
UNREADABLE: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "hostile.pt": (write_hostile, ("it asks for", "mkdir", "weights_only=True")),
    "hostile_old.pt": (
        lambda file: file.write_bytes(pickle.dumps(Hostile(file.parent / "made"), 2)),
        ("expected only tensors", "weights_only=True"),
    ),
    "hostile_new.pt": (  # torch warns about it too
        lambda file: file.write_bytes(pickle.dumps(Hostile(file.parent / "made"), 4)),
        ("expected only tensors", "weights_only=True"),
    ),
    "module.pt": (lambda file: torch.save(nn.Linear(2, 2), file), ("it asks for torch.nn", "expected only tensors")),
    "text.pt": (lambda file: file.write_text("hello world"), ("expected only tensors",)),
    "nothing.bin": (lambda file: file.touch(), ("EOFError", "expected only tensors")),
    "nothing.safetensors": (lambda file: file.touch(), ("header", "expected a safetensors file")),
    "pickle.safetensors": (write_hostile, ("header", "expected a safetensors file")),
    "cut.pt": (
        lambda file: (torch.save({DELTA: torch.ones(9999)}, file), file.write_bytes(file.read_bytes()[:9999])),
        ("expected only tensors",),
    ),
    "cut.safetensors": (
        lambda file: (save_file({DELTA: torch.ones(999)}, file), file.write_bytes(file.read_bytes()[:-1])),
        ("expected a safetensors file",),
    ),
    "directory.pt": (Path.mkdir, ("no file",)),
    "missing.pt": (lambda file: None, ("no file", "expected a state dict")),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_steerling_unreadable_files_are_not_executed(name, tmp_path, recwarn):
    write, parts = UNREADABLE[name]
    file = tmp_path / name
    write(file)
    result = command(file, "--scale", 1, *LAYOUT, "--out", tmp_path / "out")
    assert_refused(result, file, *parts)
    assert not recwarn.list  # a warning would be a second line
    assert "False" not in result.stderr  # torch's advice to pass weights_only=False is not shown
    assert not (tmp_path / "made").exists() and not (tmp_path / "out").exists()


def test_steerling_the_hostile_file_is_one(tmp_path):
    write_hostile(tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "made").is_dir()


# ---------------------------------------------------------------------------------------------------------- the command


def command(*arguments: Any) -> Any:
    return invoke("import", "steerling", *arguments)


@pytest.fixture
def adapters(tmp_path) -> tuple[Path, Released]:
    released = Released("lowrank", layers=[0, 2])
    torch.save(released.bare(), tmp_path / "adapter_steerer.pt")
    return tmp_path / "adapter_steerer.pt", released


def test_steerling_command_shows_what_was_imported_and_how_to_use_it(adapters, tmp_path):
    file, released = adapters
    out = tmp_path / "out"
    result = command(file, "--activation", "silu", "--scale", SCALE, "--base-model", "a/b", *LAYOUT, "--out", out)
    table = shown(result)
    expected = {
        "file": str(file),
        "form": "lowrank",
        "rank": str(RANK),
        "activation": "silu",
        "scale": str(SCALE),
        "hidden_size": str(HIDDEN),
        "layers": f"0, 2 (the model has {LAYERS}, from 0)",
        "dtype": "float32",
        "base_model": "a/b",
        "ignored": "0 base_model.* entries",
        "written to": str(out),
    }
    assert {name: table.get(name) for name in expected} == expected
    assert table["tokens"].startswith("all") and "--intervene-last" in table["tokens"]
    assert "LoRA" not in result.stdout
    names = {"model": build()}
    exec("\n".join(result.stdout.splitlines()[-2:]), names)
    assert_same_function(names["model"], released)


def test_steerling_command_imports_vectors_and_says_what_it_leaves_out(tmp_path):
    released = Released("vector")
    state = released.state_dict()
    base = len(state) - LAYERS
    for part in "AB":
        state[f"base_model.base_model.model.model.layers.0.mlp.up_proj.lora_{part}.default.weight"] = torch.ones(2, 2)
    torch.save(state, tmp_path / "pytorch_model.bin")
    result = command(tmp_path / "pytorch_model.bin", "--scale", SCALE, *LAYOUT, "--out", tmp_path / "out")
    table = shown(result)
    assert (table["form"], table["rank"], table["layers"]) == ("vector", "0", f"all {LAYERS}")
    assert table["ignored"] == f"{base + 2} base_model.* entries"
    assert "2 of the ignored entries are LoRA weights, which are not imported" in result.stdout
    assert_same_function(patch_model(build(), tmp_path / "out"), released)


def test_steerling_command_replaces_an_earlier_adapter(adapters, tmp_path):
    file, released = adapters
    out = tmp_path / "out"
    patch_model(build(), SteerConfig(rank=2)).steering.save(out)
    names = sorted(files(out))
    shown(command(file, "--activation", "silu", "--scale", SCALE, *LAYOUT, "--out", out))
    assert sorted(files(out)) == names
    assert_same_function(patch_model(build(), out), released)


def test_steerling_command_leaves_a_lora_adapter_alone(adapters, tmp_path):
    """The import leaves a LoRA adapter alone, which the released code saves in the same folder under the same names."""
    from peft import LoraConfig, get_peft_model

    file, _ = adapters
    get_peft_model(build(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    before = files(tmp_path)
    result = command(file, "--activation", "silu", "--scale", 1, *LAYOUT, "--out", tmp_path)
    assert_refused(result, tmp_path, "LORA", "expected another directory")
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--activation", "silu"], ("scale is not given", "--scale", "does not record it")),
        (["--scale", "1"], ("activation is not given", "--activation", "silu", "does not record it")),
        (["--scale", "nan", "--activation", "silu"], ("scale is nan", "expected a finite number")),
        (["--scale", "1", "--activation", "none"], ("activation is 'none'", "expected one of identity, silu")),
    ],
    ids=["no scale", "no activation", "NaN", "unknown activation"],
)
def test_steerling_command_needs_what_the_file_does_not_record(adapters, arguments, parts, tmp_path):
    assert_refused(command(adapters[0], *arguments, *LAYOUT, "--out", tmp_path / "out"), *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_steerling_command_refuses_an_activation_for_vectors(activation, tmp_path):
    torch.save(Released("vector").bare(), tmp_path / "a.pt")
    result = command(tmp_path / "a.pt", "--activation", activation, "--scale", 1, *LAYOUT, "--out", tmp_path / "out")
    assert_refused(result, "a.pt", f"activation is '{activation}'", "holds vectors", "expected none given")
    assert not (tmp_path / "out").exists()


def test_steerling_command_refuses_to_write_into_a_file(adapters):
    file, _ = adapters
    before = file.read_bytes()
    result = command(file, "--activation", "silu", "--scale", 1, *LAYOUT, "--out", file)
    assert_refused(result, file, "expected a directory")
    assert file.read_bytes() == before


def test_steerling_command_without_its_options_is_a_usage_error(adapters):
    assert command(adapters[0], "--scale", 1).exit_code == 2
    assert command("--out", "out").exit_code == 2
    result = invoke("import", "--help")
    assert "steerling" in result.stdout
