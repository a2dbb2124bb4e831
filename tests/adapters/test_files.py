"""Tests of saved adapters: the files' content, loading bit for bit, whole saves, and refusals."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from models import HIDDEN, LAYERS, build, logits, randomize, refused, steering_parameters
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fused_steer
from fused_steer import SteerConfig, load_joint, patch_model, save_joint
from fused_steer.adapters.files import read_adapter
from fused_steer.adapters.saving import check_output
from fused_steer.adapters.weights import tensors_digest
from fused_steer.importers.pyreft_export import export_pyreft
from fused_steer.importers.vectors import export_vector

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
RANK = 4
NAME = "somewhere/tiny-llama"

CONFIGS = {
    "lowrank": SteerConfig(rank=RANK),
    "vector": SteerConfig(form="vector"),
    "biases": SteerConfig(rank=RANK, down_bias=True, up_bias=True, activation="gelu_tanh", scale=-0.3),
    "bf16": SteerConfig(rank=RANK, dtype="bfloat16"),
    "some layers": SteerConfig(rank=RANK, layers=[0, 2], init_scale=1e-3),
    "loreft": SteerConfig(form="loreft", rank=RANK),
}


def named(name: str = NAME, **overrides: Any) -> nn.Module:
    model = build(**overrides)
    model.config._name_or_path = name
    return model


def patched(config: SteerConfig = CONFIGS["lowrank"], seed: int = 1, **overrides: Any) -> nn.Module:
    """Build a model with a random adapter."""
    model = patch_model(named(**overrides), config)
    randomize(model, seed=seed)
    return model


def files(directory: Path) -> dict[str, bytes]:
    """Read all files below the directory, hidden ones included: path -> content."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def saved(tmp_path) -> Path:
    patched().steering.save(tmp_path / "adapter")
    return tmp_path / "adapter"


# ---------------------------------------------------------------------------------------------------------------------
# The files' content


def test_files_two_files_in_the_documented_layout(saved):
    assert sorted(files(saved)) == [CONFIG, WEIGHTS]
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, WEIGHTS]
    with safe_open(saved / WEIGHTS, "pt") as weights:
        shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}
    assert shapes == {
        f"base_model.model.model.layers.{i}.post_block.{factor}.weight": shape
        for i in range(LAYERS)
        for factor, shape in (("steer_down", (RANK, HIDDEN)), ("steer_up", (HIDDEN, RANK)))
    }


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_files_config_records_all_that_changes_the_function(config, tmp_path):
    patched(config).steering.save(tmp_path)
    recorded = json.loads((tmp_path / CONFIG).read_text())
    assert recorded == {
        "peft_type": "POST_BLOCK",
        "base_model_name_or_path": NAME,
        "hidden_size": HIDDEN,
        "num_layers": LAYERS,
        "form": config.form,
        "rank": config.rank,
        "activation": config.activation,
        "layers": None if config.layers is None else list(config.layers),
        "scale": config.scale,
        "down_bias": config.down_bias,
        "up_bias": config.up_bias,
        "init_scale": config.init_scale,
        "dtype": config.dtype,
        "fused_steer_version": fused_steer.__version__,
        "tensors_sha256": tensors_digest(read_adapter(tmp_path).tensors),
        "weights_sha256": hashlib.sha256((tmp_path / WEIGHTS).read_bytes()).hexdigest(),
        "config_sha256": recorded["config_sha256"],
    }


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_files_round_trip(config, tmp_path, monkeypatch):
    def no_pickle(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a pickle was read or written")

    model = patched(config)
    with monkeypatch.context() as patch:
        for module, name in ((torch, "load"), (torch, "save"), (pickle, "load"), (pickle, "loads")):
            patch.setattr(module, name, no_pickle)
        for name in ("dump", "dumps", "Pickler", "Unpickler"):
            patch.setattr(pickle, name, no_pickle)
        model.steering.save(tmp_path)
        loaded = patch_model(named(), str(tmp_path))
    assert loaded.steering.config() == config
    expected, actual = steering_parameters(model), steering_parameters(loaded)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].requires_grad and actual[name].dtype == expected[name].dtype
        assert torch.equal(actual[name], expected[name])
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(named()))


def test_files_path_objects_and_new_parents(tmp_path):
    model = patched()
    model.steering.save(tmp_path / "new" / "parents")
    assert torch.equal(logits(patch_model(named(), tmp_path / "new" / "parents")), logits(model))


def test_files_present_strength_is_saved(tmp_path):
    model = patched()
    model.steering.scale = 0.125
    model.steering.save(tmp_path)
    loaded = patch_model(named(), str(tmp_path))
    assert loaded.steering.scale == 0.125
    assert torch.equal(logits(loaded), logits(model))


def test_files_present_dtype_is_saved(tmp_path):
    model = patched().to(torch.bfloat16)
    model.steering.save(tmp_path)
    loaded = patch_model(named().to(torch.bfloat16), str(tmp_path))
    assert loaded.steering.config().dtype == "bfloat16"
    assert torch.equal(logits(loaded), logits(model))


def test_files_load_beside_an_adapter_of_other_layers(tmp_path):
    other = patched(SteerConfig(rank=2, layers=[0, 2], activation="relu"), seed=2)
    other.steering.save(tmp_path)
    model = patched(SteerConfig(rank=RANK, layers=[1]))
    alone = logits(model)
    model.steering.load(tmp_path, name="other")
    assert torch.equal(logits(model), alone)
    model.steering.use("other")
    assert torch.equal(logits(model), logits(other))
    model.steering.save(tmp_path / "again")
    assert files(tmp_path / "again") == {name: (tmp_path / name).read_bytes() for name in (CONFIG, WEIGHTS)}


@pytest.mark.parametrize("theirs", [NAME, "/elsewhere/tiny-llama/", "tiny-llama", ""])
def test_files_base_is_known_by_the_last_part_of_its_name(saved, theirs):
    patch_model(named(theirs), saved)


# ---------------------------------------------------------------------------------------------------------------------
# Whole or not at all


def fail_at_replace(n: int) -> Callable[[pytest.MonkeyPatch], None]:
    def prepare(patch: pytest.MonkeyPatch) -> None:
        real, calls = os.replace, []

        def replace(*args: Any) -> None:
            calls.append(args)
            if len(calls) == n:
                raise PermissionError("no replacing")
            real(*args)

        patch.setattr(os, "replace", replace)

    return prepare


def fail_at_fsync(patch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, "no syncing")

    patch.setattr(os, "fsync", fsync)


def fill_the_disk(patch: pytest.MonkeyPatch) -> None:
    real = open

    def full(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = real(path, mode, *args, **kwargs)
        if "w" in mode:

            def write(content: bytes) -> None:
                file.raw.write(content[: len(content) // 2])
                raise OSError(errno.ENOSPC, "no space left on device")

            file.write = write
        return file

    patch.setattr("builtins.open", full)


@pytest.mark.parametrize(
    "prepare",
    [fail_at_replace(1), fail_at_replace(2), fail_at_fsync, fill_the_disk],
    ids=["first replace", "second replace", "fsync", "disk full"],
)
@pytest.mark.parametrize("earlier", [True, False])
def test_files_failed_save_leaves_what_was_there(prepare, earlier, saved, tmp_path):
    directory = saved if earlier else tmp_path / "new"
    directory.mkdir(exist_ok=True)
    before = files(directory)
    other = patched(CONFIGS["biases"], seed=2)
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        with pytest.raises(OSError, match="no (replacing|syncing|space)") as caught:
            other.steering.save(directory)
    assert caught.value.errno is None or str(directory) in str(caught.value)
    assert files(directory) == before
    assert sorted(path.name for path in directory.iterdir()) == sorted(before)
    if earlier:
        assert torch.equal(logits(patch_model(named(), directory)), logits(patched()))
    other.steering.save(directory)
    assert torch.equal(logits(patch_model(named(), directory)), logits(other))


def test_files_save_where_files_cannot_be_linked(saved, monkeypatch):
    def link(*args: Any) -> None:
        raise OSError(errno.ENOTSUP, "no linking")

    monkeypatch.setattr(os, "link", link)
    model = patched(seed=2)
    model.steering.save(saved)
    assert torch.equal(logits(patch_model(named(), saved)), logits(model))


def test_files_save_refuses_a_file(saved):
    model = patched()
    with refused(NotADirectoryError, str(saved / CONFIG), "expected a directory", model=model):
        model.steering.save(saved / CONFIG)
    with refused(NotADirectoryError, f"{saved / CONFIG} is a file; expected a directory", model=model):
        model.steering.save(saved / CONFIG / "below")


@pytest.mark.parametrize("below", ["", "below"])
def test_files_save_refuses_a_link_to_nothing(below, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    model = patched()
    with refused(NotADirectoryError, f"link is a link to {tmp_path / 'gone'}, which is not there", model=model):
        model.steering.save(tmp_path / "link" / below)
    with refused(ValueError, f"out is '{tmp_path / 'link'}' but", "which is not there; expected a directory"):
        check_output(tmp_path / "link")


#: What is no path, and a part of the error.
NO_PATHS: dict[str, tuple[Any, type[Exception], str]] = {
    "empty": ("", ValueError, "is ''; expected"),
    "bytes": (b"x", TypeError, "is a bytes; expected"),
    "number": (3, TypeError, "is a int; expected"),
    "NUL": ("a\0b", ValueError, "is 'a\\x00b'; expected"),
    "two lines": ("a\nb", ValueError, "is 'a\\nb'; expected"),
    "long name": ("x" * 300, ValueError, "of 300 characters, too long for a path"),
    "long path": ("x/" * 3000, ValueError, "of 6000 characters, too long for a path"),
    "no text": ("\ud800", ValueError, "is '\\ud800', which is no text"),
}


@pytest.mark.parametrize("case", NO_PATHS)
def test_files_what_is_no_path_is_refused(case, saved, monkeypatch):
    monkeypatch.chdir(saved)  # which an empty path must not mean
    given, error, part = NO_PATHS[case]
    before, model, bare = files(saved), patched(seed=2), named()
    both = patch_model(get_peft_model(named(), LoraConfig(target_modules=["q_proj"])))
    calls: list[Callable[[Any], Any]] = [
        model.steering.save,
        lambda path: save_joint(both, path),
        model.save_pretrained,
        model.steering.restore,
        lambda path: model.steering.load(path, "other"),
        lambda path: load_joint(bare, path),
        lambda path: export_pyreft(saved, path),
        lambda path: export_vector(saved, path),
        *([lambda path: patch_model(bare, path)] if error is ValueError else []),  # others are no config
    ]
    for call in calls:
        with refused(error, part, model=model):
            call(given)
    assert not hasattr(bare, "steering")
    assert files(saved) == before


def test_files_an_empty_path_object_is_no_directory_to_save_in(saved, monkeypatch, tmp_path):
    monkeypatch.chdir(saved)
    before, model = files(saved), patched(seed=2)
    for save in (model.steering.save, model.save_pretrained):
        with refused(ValueError, "directory is Path('.'), as Path('') is; expected a directory to save", model=model):
            save(Path(""))
    assert files(saved) == before
    model.steering.save(".")
    assert torch.equal(logits(patch_model(named(), Path("."))), logits(model))


def test_files_a_failed_save_leaves_no_folders(tmp_path, monkeypatch):
    model = patched()
    (tmp_path / "there").mkdir()
    for prepare in (fail_at_fsync, fail_at_replace(2)):
        with pytest.MonkeyPatch.context() as patch:
            prepare(patch)
            with pytest.raises(OSError, match="no (replacing|syncing)"):
                model.steering.save(tmp_path / "there" / "new" / "deep")
        assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


# ---------------------------------------------------------------------------------------------------------------------
# Refusals, which leave the model as it was


def remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def cut(n: int) -> Callable[[Path], None]:
    """Cut the weights file to its first n bytes; for n < 0, cut off the last -n bytes."""
    return lambda directory: (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:n])


def flip(position: int) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        content = bytearray((directory / WEIGHTS).read_bytes())
        content[position] ^= 1
        (directory / WEIGHTS).write_bytes(content)

    return damage


def write_config(text: str | bytes) -> Callable[[Path], None]:
    content = text if isinstance(text, bytes) else text.encode()
    return lambda directory: (directory / CONFIG).write_bytes(content)


def edit_config(directory: Path, **changes: Any) -> None:
    """Change fields of the config and remove its digest; None removes a field."""
    fields = json.loads((directory / CONFIG).read_text()) | {"config_sha256": None} | changes
    (directory / CONFIG).write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))


def edited(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: edit_config(directory, **changes)


def unguarded(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    """Return the damage, done to files without digests, so that no digest can detect it."""

    def apply(directory: Path) -> None:
        damage(directory)
        edit_config(directory, weights_sha256=None, tensors_sha256=None)

    return apply


def retensored(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS)

    return unguarded(damage)


def repeated(name: str, field: bytes) -> Callable[[Path], None]:
    """Return a damage that writes a field of a JSON object a second time. Digests of parsed fields do not see it."""

    def damage(directory: Path) -> None:
        if name == WEIGHTS:
            save_file(load_file(directory / WEIGHTS), directory / WEIGHTS, metadata={"format": "pt"})
            edit_config(directory, weights_sha256=None, tensors_sha256=None)
        content = (directory / name).read_bytes()
        size = int.from_bytes(content[:8], "little") + len(field) + 1
        assert content.count(field) == 1
        content = content.replace(field, field + b"," + field)
        (directory / name).write_bytes(size.to_bytes(8, "little") + content[8:] if name == WEIGHTS else content)

    return damage


def spoiled(name: str, value: float) -> Callable[[Path], None]:
    """Return a damage that sets one number of the tensor `name` to `value`."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[3] = value

    return retensored(change)


def weights_of_another_save(directory: Path) -> None:
    patched(seed=2).steering.save(directory / "other")
    os.replace(directory / "other" / WEIGHTS, directory / WEIGHTS)


SITE = "model.layers.1.post_block"
UP, DOWN = f"base_model.model.{SITE}.steer_up.weight", f"base_model.model.{SITE}.steer_down.weight"

#: name -> the damage to the files, the error, and parts of its message besides the directory.
DAMAGES: dict[str, tuple[Callable[[Path], Any], type[Exception], tuple[str, ...]]] = {
    "no config": (remove(CONFIG), FileNotFoundError, (CONFIG, "expected a saved steering adapter")),
    "no weights": (remove(WEIGHTS), FileNotFoundError, (WEIGHTS, "expected a saved steering adapter")),
    "truncated": (cut(-1), ValueError, (WEIGHTS, "sha256")),
    "truncated, no hash": (unguarded(cut(-1)), ValueError, (WEIGHTS,)),
    "truncated in the header": (unguarded(cut(20)), ValueError, (WEIGHTS, "header")),
    "empty": (unguarded(cut(0)), ValueError, (WEIGHTS, "header")),
    "corrupt header": (unguarded(flip(8)), ValueError, (WEIGHTS, "header")),
    "huge header": (unguarded(flip(6)), ValueError, (WEIGHTS, "header")),
    "flipped bit": (flip(-1), ValueError, (WEIGHTS, "expected sha256")),
    "weights of another save, and a flipped bit": (
        lambda directory: (weights_of_another_save(directory), flip(-1)(directory)),
        ValueError,
        (WEIGHTS, "expected sha256"),
    ),
    "config edited": (
        lambda directory: edit_config(directory, scale=9.0, config_sha256="0" * 64),
        ValueError,
        (CONFIG, "its fields were changed after saving", "expected config_sha256 0000"),
    ),
    "config not JSON": (
        write_config("rank: 8\n"),
        ValueError,
        (CONFIG, "it is no JSON (Expecting value", "expected a JSON object"),
    ),
    "config not text": (
        write_config(b"\xff\xfe"),
        ValueError,
        (CONFIG, "it is no JSON ('utf-8'", "expected a JSON object"),
    ),
    "config cut": (write_config('{"peft_type": "POST_BLOCK",\n'), ValueError, (CONFIG, "expected a JSON object")),
    "config a list": (write_config("[]"), ValueError, (CONFIG, "list", "expected a JSON object")),
    "config of LoRA": (edited(peft_type="LORA"), ValueError, (CONFIG, "'LORA'", "expected 'POST_BLOCK'")),
    "config of nothing": (edited(peft_type=None), ValueError, (CONFIG, "None", "expected 'POST_BLOCK'")),
    "unknown key": (edited(rnk=8), ValueError, (CONFIG, "'rnk'", "expected form, rank", fused_steer.__version__)),
    "bad field": (edited(rank=0), ValueError, (CONFIG, "rank is 0", "expected 1 to 256")),
    "no hidden size": (edited(hidden_size=None), ValueError, (CONFIG, "hidden_size", "expected a positive integer")),
    "hidden size a text": (edited(hidden_size="32"), ValueError, (CONFIG, "'32'", "expected a positive integer")),
    "no layer count": (edited(num_layers=None), ValueError, (CONFIG, "num_layers", "expected a positive integer")),
    "other hidden size": (edited(hidden_size=64), ValueError, ("hidden size 64", f"expected {HIDDEN}")),
    "other layer count": (edited(num_layers=5), ValueError, ("number of layers 5", f"expected {LAYERS}")),
    "layer out of range": (edited(layers=[LAYERS]), ValueError, (CONFIG, f"layers has {LAYERS}", f"below {LAYERS}")),
    "other base": (edited(base_model_name_or_path="a/b"), ValueError, ("'a/b'", f"expected '{NAME}'", "check_base")),
    "other rank": (edited(rank=2), ValueError, (SITE.replace("1", "0"), "(4, 32)", "(2, 32)")),
    "bias missing": (edited(up_bias=True), ValueError, ("post_block.steer_up.bias", "expected one of shape (32,)")),
    "wrong shape": (
        retensored(lambda tensors: tensors.update({UP: torch.zeros(HIDDEN, RANK + 1)})),
        ValueError,
        (f"{SITE}.steer_up.weight", f"({HIDDEN}, {RANK + 1})", f"expected torch.float32 ({HIDDEN}, {RANK})"),
    ),
    "wrong dtype": (
        retensored(lambda tensors: tensors.update({DOWN: tensors[DOWN].half()})),
        ValueError,
        (f"{SITE}.steer_down.weight", "torch.float16", "expected torch.float32"),
    ),
    "tensor missing": (
        retensored(lambda tensors: tensors.pop(UP)),
        ValueError,
        (f"{SITE}.steer_up.weight", f"expected one of shape ({HIDDEN}, {RANK})"),
    ),
    "tensor too many": (
        retensored(lambda tensors: tensors.update({UP.replace("1", "7"): torch.zeros(HIDDEN, RANK)})),
        ValueError,
        ("model.layers.7.post_block.steer_up.weight", "expected"),
    ),
    "NaN": (spoiled(DOWN, torch.nan), ValueError, (WEIGHTS, f"{SITE}.steer_down.weight", "NaN", "expected finite")),
    "infinity": (spoiled(UP, -torch.inf), ValueError, (WEIGHTS, f"{SITE}.steer_up.weight", "expected finite ones")),
    "overflow by strength": (
        lambda directory: (spoiled(UP, -3e37)(directory), edit_config(directory, scale=-12)),
        ValueError,
        (WEIGHTS, f"{SITE}.steer_up.weight has values up to 3e+37, and scale is -12", "expected a product", "float32"),
    ),
    "strength beyond float32": (
        edited(scale=1e39),
        ValueError,
        (CONFIG, "scale is 1e+39", "expected at most 3.4", "float32"),
    ),
    "strength of 401 digits": (
        edited(scale=10**400),
        ValueError,
        (CONFIG, "scale is an integer of 1329 bits", "expected"),
    ),
    "base a list": (
        edited(base_model_name_or_path=["x"]),
        ValueError,
        (CONFIG, "base_model_name_or_path is ['x']", "expected a name"),
    ),
    "base an empty list": (edited(base_model_name_or_path=[]), ValueError, (CONFIG, "is []", "expected a name")),
    "modules an empty object": (edited(modules_to_save={}), ValueError, (CONFIG, "is {}", "expected a list of names")),
    "dtype a list": (edited(dtype=[]), ValueError, (CONFIG, "dtype is []", "expected one of float32")),
    "digest of nothing": (edited(tensors_sha256="0"), ValueError, (CONFIG, "tensors_sha256 is '0'", "64 hexadecimal")),
    "field twice": (
        repeated(CONFIG, b'"scale": 1.0'),
        ValueError,
        (CONFIG, "'scale' twice", "expected each name once"),
    ),
    "tensor twice": (repeated(WEIGHTS, b'"__metadata__":{"format":"pt"}'), ValueError, (WEIGHTS, "header", "expected")),
    "layer 00": (
        retensored(lambda tensors: tensors.update({UP.replace(".1.", ".01."): tensors[UP].clone()})),
        ValueError,
        (WEIGHTS, "'model.layers.01.", "expected names such as"),
    ),
    "config nested deeply": (write_config("[" * 100_000), ValueError, (CONFIG, "nested too deeply", "expected")),
    "tensor without prefix": (
        retensored(lambda tensors: tensors.update({"up": torch.zeros(1)})),
        ValueError,
        (WEIGHTS, "'up'", "expected names that begin with 'base_model.model.'"),
    ),
}


@pytest.mark.parametrize(("damage", "error", "parts"), DAMAGES.values(), ids=DAMAGES)
def test_files_refuses_damaged_files(damage, error, parts, saved):
    damage(saved)
    model = named()
    with refused(error, str(saved), *parts, model=model):
        patch_model(model, saved)
    patch_model(model, SteerConfig(layers=[0]))
    with refused(error, str(saved), *parts, model=model):
        model.steering.load(saved, name="other")
    assert model.steering.names == ["default"]


@pytest.mark.parametrize("damage", ["NaN", "infinity", "overflow by strength", "strength beyond float32"])
def test_files_restore_and_peft_refuse_values_that_would_spread(damage, saved):
    import fused_steer.peft  # noqa: F401

    damage, error, parts = DAMAGES[damage]
    damage(saved)
    model = patched()
    before = {name: p.detach().clone() for name, p in steering_parameters(model).items()}
    with refused(error, str(saved), *parts, model=model):
        model.steering.restore(saved)
    assert all(torch.equal(p, before[name]) for name, p in steering_parameters(model).items())
    assert model.steering.scale == 1.0
    bare = build()
    with refused(error, *(part for part in parts if part != CONFIG), model=bare):
        PeftModel.from_pretrained(bare, str(saved))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_files_save_refuses_values_that_would_spread(value, saved):
    import fused_steer.peft  # noqa: F401

    before = files(saved)
    model = patched()
    model.steering.scale = -2.0  # 3e38 is finite, -2 times it is not
    with torch.no_grad():
        model.model.layers[1].post_block.steer_up["default"].weight[5, 2] = value
    parts = (f"{SITE}.steer_up.weight", "expected")
    with refused(ValueError, "adapter 'default' cannot be saved", *parts, model=model):
        model.steering.save(saved)
    wrapped = get_peft_model(build(), fused_steer.peft.PostBlockConfig(r=RANK, scale=-2.0))
    with torch.no_grad():
        wrapped.base_model.model.model.layers[1].post_block.steer_up["default"].weight[5, 2] = value
    with refused(ValueError, f"{SITE}.steer_up.weight", "expected", model=wrapped):
        wrapped.save_pretrained(str(saved))
    assert {name: files(saved)[name] for name in before} == before


@pytest.mark.parametrize("value", [1e39, -1e39, 10**400])
def test_files_strengths_beyond_float32_are_refused(value):
    model = patched()
    for call in (
        lambda: SteerConfig(scale=value),
        lambda: SteerConfig(init_scale=value),
        lambda: setattr(model.steering, "scale", value),
        lambda: model.steering.batch(["default"], scale=[value]).__enter__(),
    ):
        with refused(ValueError, "scale is", "expected", "float32", model=model):
            call()
    assert model.steering.scale == 1.0
    model.steering.scale = -torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"hidden_size": 64}, (f"hidden size {HIDDEN}", "expected 64")),
        ({"num_hidden_layers": 2}, (f"number of layers {LAYERS}", "expected 2")),
        ({"name": "somewhere/tiny-mistral"}, (f"'{NAME}'", "expected 'somewhere/tiny-mistral'", "check_base=False")),
    ],
    ids=["hidden size", "layer count", "name"],
)
def test_files_refuses_adapters_of_other_models(overrides, parts, saved):
    model = named(**overrides)
    with refused(ValueError, str(saved), *parts, model=model):
        patch_model(model, saved)


def test_files_check_base_accepts_another_name(saved):
    model = patch_model(named("somewhere/else"), saved, check_base=False)
    assert torch.equal(logits(model), logits(patched()))
    model.steering.load(saved, name="other", check_base=False)


def test_files_refuses_paths_that_are_no_directories(saved, tmp_path):
    model = named()
    with refused(FileNotFoundError, str(tmp_path / "none"), f"expected one that holds {CONFIG}", model=model):
        patch_model(model, tmp_path / "none")
    with refused(NotADirectoryError, str(saved / CONFIG), "expected the directory", model=model):
        patch_model(model, saved / CONFIG)


def test_files_hub_id_without_network(monkeypatch):
    def offline(*args: Any, **kwargs: Any) -> str:
        raise OSError("no network\n\nin two paragraphs")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    model = named()
    with refused(FileNotFoundError, "someone/adapter", "OSError: no network", model=model):
        patch_model(model, "someone/adapter")


def test_files_hub_id(monkeypatch, saved):
    def download(*args: Any, **kwargs: Any) -> str:
        assert args == ("someone/adapter",) and kwargs.keys() == {"allow_patterns"}
        assert {CONFIG, WEIGHTS} < set(kwargs["allow_patterns"])  # and those of a checkpoint: no file of a model
        assert all(pattern.endswith((CONFIG, WEIGHTS, "joint.json")) for pattern in kwargs["allow_patterns"])
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert torch.equal(logits(patch_model(named(), "someone/adapter")), logits(patched()))
