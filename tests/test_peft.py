"""Steering as a method of PEFT: a matrix of models and configs over one set of checks, as PEFT's own tests are."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    assert_close,
    build,
    build_frozen,
    generate,
    gradients,
    input_gradient,
    logits,
    refused,
    skip_without_add_adapter,
    snapshot,
    tokens,
)
from peft import LoraConfig, PeftConfig, PeftMixedModel, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fused_steer import SteerConfig, patch_model
from fused_steer.peft import PeftSite, PostBlockConfig

#: name -> model family, and what the adapter's config says.
MATRIX: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"r": 4, "activation": "silu"}),
    "gemma3, identity": ("gemma3", {"r": 8, "activation": "identity", "scale": 0.5}),
    "gpt2, biases": ("gpt2", {"r": 3, "activation": "gelu", "down_bias": True, "up_bias": True}),
    "qwen3, some layers": ("qwen3", {"r": 2, "activation": "tanh", "layers": [0, 2]}),
    "parallel blocks": ("gpt_neox-parallel", {"r": 4, "activation": "relu", "up_bias": True}),
    "vectors": ("mixtral", {"form": "vector", "scale": -2.0}),
}
everywhere = pytest.mark.parametrize(("family", "fields"), MATRIX.values(), ids=MATRIX)


def adapted(family: str = "llama", name: str = "default", **fields: Any) -> PeftModel:
    """A model with one adapter that does something, evaluating."""
    model = get_peft_model(build(family), PostBlockConfig(**(fields or {"r": 4})), adapter_name=name).eval()
    fill(model, name)
    assert not torch.equal(logits(model), logits(build(family)))
    return model


def of_adapter(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    found = {path: p for path, p in model.named_parameters() if ".post_block." in path and f".{name}." in path}
    assert found
    return found


def fill(model: nn.Module, name: str = "default", seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in of_adapter(model, name).values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# ---------------------------------------------------------------------------------------------------------------------
# The matrix


@everywhere
def test_a_fresh_adapter_changes_nothing_and_alone_trains(family, fields):
    base = build_frozen(family)
    before = logits(base)
    model = get_peft_model(base, PostBlockConfig(**fields))
    assert torch.equal(logits(model.eval()), before)
    assert trained(model) == set(of_adapter(model, "default"))


@everywhere
def test_it_computes_what_patch_model_does(family, fields, tmp_path):
    model = adapted(family, **fields)
    model.save_pretrained(str(tmp_path))
    patched = patch_model(build(family), tmp_path)
    assert torch.equal(logits(patched), logits(model))
    assert all(map(torch.equal, generate(model.get_base_model()), generate(patched)))
    ours, theirs = of_adapter(model, "default"), of_adapter(patched, "default")
    assert {name.removeprefix("base_model.model.") for name in ours} == set(theirs)
    actual, expected = gradients(model, ours), gradients(patched, theirs)
    for name, gradient in expected.items():
        assert torch.equal(actual[f"base_model.model.{name}"], gradient)


@everywhere
def test_files_go_either_way(family, fields, tmp_path):
    model = adapted(family, **fields)
    expected = logits(model)
    model.save_pretrained(str(tmp_path / "peft"))
    patched = patch_model(build(family), tmp_path / "peft")
    patched.steering.save(tmp_path / "ours")
    ours = tmp_path / "ours" / "adapter_model.safetensors"
    assert ours.read_bytes() == (tmp_path / "peft" / "adapter_model.safetensors").read_bytes()
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "peft")]
    assert {key: configs[1].get(key) for key in configs[0]} == {**configs[0], "weights_sha256": None}
    for folder in ("peft", "ours"):
        loaded = PeftModel.from_pretrained(build(family), str(tmp_path / folder))
        assert torch.equal(logits(loaded), expected)
        assert trained(loaded) == set()
        assert loaded.peft_config["default"].steer_config() == model.peft_config["default"].steer_config()
        again = PeftModel.from_pretrained(build(family), str(tmp_path / folder), is_trainable=True)
        assert trained(again) == set(of_adapter(again, "default"))
        assert PeftConfig.from_pretrained(str(tmp_path / folder)).steer_config() == patched.steering.config()


@everywhere
def test_disabled_it_is_the_base_model(family, fields):
    model = adapted(family, **fields)
    steered, flags = logits(model), trained(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(build_frozen(family)))
    assert torch.equal(logits(model), steered) and trained(model) == flags
    with pytest.raises(KeyError, match="stop"), model.disable_adapter():
        raise KeyError("stop")
    assert torch.equal(logits(model), steered)


@everywhere
def test_several_adapters(family, fields, tmp_path):
    model = adapted(family, **fields)
    first = logits(model)
    model.add_adapter("second", PostBlockConfig(r=2, activation="tanh", layers=[1]))
    assert model.active_adapters == ["default"] and torch.equal(logits(model), first)
    assert trained(model) == set(of_adapter(model, "default"))
    fill(model, "second", seed=2)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.equal(second, first) and trained(model) == set(of_adapter(model, "second"))
    model.save_pretrained(str(tmp_path), selected_adapters=["second"])
    alone = PeftModel.from_pretrained(build(family), str(tmp_path / "second"))
    assert torch.equal(logits(alone), second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("second")
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model), first)
    assert not any(".second." in name for name, _ in model.named_parameters())
    assert all(set(m.configs) == {"default"} for m in model.modules() if isinstance(m, PeftSite) and m.configs)
    model.load_adapter(str(tmp_path / "second"), adapter_name="third")
    model.set_adapter("third")
    assert torch.equal(logits(model), second)


@everywhere
def test_each_row_by_its_own_adapter(family, fields):
    model = adapted(family, **fields)
    model.add_adapter("second", PostBlockConfig(r=2, activation="tanh", layers=[1]))
    fill(model, "second", seed=2)
    alone = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        alone[name] = logits(model)
    with model.disable_adapter():
        alone["__base__"] = logits(model)
    base = build_frozen(family)
    with torch.no_grad():  # two rows are computed in two parts, one for each adapter
        unsteered = logits(base), torch.cat([base(row[None]).logits for row in tokens()])
    for rows in (["second", "default"], ["default", "__base__"], ["__base__", "second"]):
        with torch.no_grad():
            mixed = model(input_ids=tokens(), adapter_names=rows).logits
        for index, name in enumerate(rows):
            assert_close(mixed[index], alone[name][index], unsteered=unsteered)
        options = {"max_new_tokens": 4, "do_sample": False}
        together = model.generate(input_ids=tokens(), adapter_names=rows, **options)
        beams = model.generate(input_ids=tokens(), adapter_names=rows, num_beams=2, **options)
        for index, name in enumerate(rows):
            model.set_adapter("default" if name == "__base__" else name)
            with model.disable_adapter() if name == "__base__" else torch.no_grad():
                row = tokens()[index : index + 1]
                assert torch.equal(model.generate(input_ids=row, **options)[0], together[index])
                assert torch.equal(model.generate(input_ids=row, num_beams=2, **options)[0], beams[index])


@everywhere
def test_unload_gives_the_model_back(family, fields):
    base = build(family)
    before = snapshot(base)
    model = get_peft_model(base, PostBlockConfig(**fields))
    fill(model)
    restored = model.unload()
    assert restored is base
    now = snapshot(base)
    assert now["modules"].keys() == before["modules"].keys() and now["state"] == before["state"]
    assert all(now["modules"][path][0] is kind for path, (kind, *_) in before["modules"].items())
    assert torch.equal(logits(base.requires_grad_(False)), logits(build_frozen(family)))


@everywhere
def test_merging_is_refused(family, fields):
    model = adapted(family, **fields)
    before = logits(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with refused(ValueError, "cannot be merged into weights", "expected"):
            merge()
    assert torch.equal(logits(model), before)


@everywhere
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_training_moves_the_adapter_alone(family, fields, checkpointing):
    model = get_peft_model(build(family), PostBlockConfig(**fields)).train()
    fill(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(2):
        model(input_ids=tokens(step), labels=tokens(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(of_adapter(model, "default"))


@everywhere
def test_checkpointing_changes_no_gradient(family, fields):
    base, model = build_frozen(family).train(), get_peft_model(build(family), PostBlockConfig(**fields)).train()
    fill(model)
    ways = [], []
    for checkpointing in (False, True):
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ways[0].append(gradients(model, of_adapter(model, "default"), use_cache=False))
        ways[1].append(input_gradient(base, use_cache=False))
    assert_close(*ways[0], unsteered=ways[1])


def test_copies_and_state_dicts():
    model = adapted(r=4)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    other = get_peft_model(build(), PostBlockConfig(r=4)).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    twin.unload()
    assert isinstance(model.get_base_model().model.layers[0].post_block, PeftSite)


def test_as_transformers_own_adapter_and_beside_lora():
    skip_without_add_adapter()
    base = build()
    base.add_adapter(LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False), "lora")
    lora = logits(base.eval())
    base.add_adapter(PostBlockConfig(r=4), "steer")
    fill(base, "steer")
    base.set_adapter(["lora", "steer"])
    both = logits(base)
    base.set_adapter("lora")
    assert torch.equal(logits(base), lora)
    base.set_adapter("steer")
    steer = logits(base)
    alone = get_peft_model(build(), PostBlockConfig(r=4)).eval()
    fill(alone)
    assert torch.equal(steer, logits(alone))
    assert len({tuple(x.flatten().tolist()) for x in (both, lora, steer)}) == 3
    wrapped = get_peft_model(build(), LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False))
    tensors = {name.replace(".lora.", ".default."): value for name, value in base.state_dict().items()}
    wrapped.get_base_model().load_state_dict({n: v for n, v in tensors.items() if "lora_" in n}, strict=False)
    nested = get_peft_model(wrapped.get_base_model(), PostBlockConfig(r=4)).eval()
    fill(nested)
    assert torch.equal(logits(nested), both)


def test_several_active_adapters_are_added_up():
    model = adapted(r=4)
    model.add_adapter("second", PostBlockConfig(r=4, activation="tanh"))
    fill(model, "second", seed=2)
    layer = model.get_base_model().model.layers[0].post_block
    x = torch.randn(5, 32)
    shifts = []
    for name in ("default", "second"):
        model.set_adapter(name)
        shifts.append(layer(x) - x)
    model.base_model.set_adapter(["default", "second"])
    assert_close(layer(x), x + shifts[0] + shifts[1])
    assert_close(layer(0.5 * x, 0.5 * x), x + shifts[0] + shifts[1])


# ---------------------------------------------------------------------------------------------------------------------
# Weighted sums


def shift(model: PeftModel, name: str, x: Tensor, index: int = 1) -> Tensor:
    model.set_adapter(name)
    with torch.no_grad():
        return model.get_base_model().model.layers[index].post_block(x) - x


def with_two(first: dict[str, Any], second: dict[str, Any]) -> PeftModel:
    model = adapted(name="a", **first)
    model.add_adapter("b", PostBlockConfig(**second))
    fill(model, "b", seed=2)
    return model


IDENTITY = {"r": 3, "activation": "identity", "up_bias": True, "scale": 2.0}
VECTOR = {"form": "vector", "layers": [1, 2], "scale": 0.5}
SILU = {"r": 4, "activation": "silu", "down_bias": True}


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        (VECTOR, {"form": "vector"}, "linear"),
        (IDENTITY, {"r": 2, "activation": "identity"}, "linear"),
        (IDENTITY, VECTOR, "linear"),
        (SILU, {"r": 2, "activation": "silu"}, "cat"),
        (SILU, VECTOR, "cat"),
    ],
    ids=["vectors", "linear forms", "both", "side by side", "with a vector"],
)
def test_weighted_sums(first, second, kind, tmp_path):
    model = with_two(first, second)
    model.add_weighted_adapter(["a", "b"], [0.7, -1.5], "sum", combination_type=kind)
    assert model.active_adapters == ["a"]
    x = torch.randn(7, 32)
    for index in (0, 1):
        expected = 0.7 * shift(model, "a", x, index) - 1.5 * shift(model, "b", x, index)
        assert_close(shift(model, "sum", x, index), expected)
    model.set_adapter("sum")
    model.save_pretrained(str(tmp_path), selected_adapters=["sum"])
    assert torch.equal(logits(patch_model(build(), tmp_path / "sum")), logits(model))


@pytest.mark.parametrize(
    ("first", "second", "arguments", "parts"),
    [
        (SILU, SILU, (["a", "b"], [1, 1], "c"), ("silu", "'cat'")),
        (SILU, {"r": 2, "activation": "tanh"}, (["a", "b"], [1, 1], "c", "cat"), ("silu, tanh",)),
        (VECTOR, VECTOR, (["a", "z"], [1, 1], "c"), ("'z'",)),
        (VECTOR, VECTOR, (["a", "b"], [1], "c"), ("2 adapters", "1 weights")),
        (VECTOR, VECTOR, (["a", "b"], [1, 1], "b"), ("'b' already",)),
        (VECTOR, VECTOR, (["a", "b"], [1, 1], "c", "ties"), ("'ties'",)),
        (
            {"r": 200, "activation": "identity"},
            {"r": 57, "activation": "identity"},
            (["a", "b"], [1, 1], "c"),
            ("257",),
        ),
    ],
    ids=["nonlinear", "activations", "unknown", "weights", "taken", "kind", "rank"],
)
def test_sums_that_are_not_defined(first, second, arguments, parts):
    model = with_two(first, second)
    with refused(ValueError, *parts, "expected", model=model):
        model.add_weighted_adapter(*arguments)
    assert set(model.peft_config) == {"a", "b"}


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("fields", "error", "parts"),
    [
        ({"rnak": 4}, TypeError, ("'rnak'",)),
        ({"r": 4, "fused_steer_version": "9.0", "new": 1}, TypeError, ("'new'", "fused-steer 9.0")),
        ({"r": 4, "rank": 8}, ValueError, ("r is 4", "rank is 8")),
        ({"r": 0}, ValueError, ("rank is 0",)),
        ({"activation": "swish"}, ValueError, ("'swish'",)),
        ({"form": "vector", "r": 4}, ValueError, ("4", "'vector'")),
    ],
    ids=["unknown", "newer", "both ranks", "rank", "activation", "vector"],
)
def test_configs_that_say_nothing_sensible(fields, error, parts):
    with refused(error, *parts, "expected"):
        PostBlockConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"layers": [3]}, ("layers has 3", "below 3")),
        ({"hidden_size": 64}, ("hidden size 64", "expected 32")),
        ({"num_layers": 4}, ("number of layers 4", "expected 3")),
        ({"orthogonal_to": "lora"}, ("orthogonal_to", "patch_model")),
    ],
    ids=["layers", "hidden size", "number of layers", "orthogonal"],
)
def test_configs_that_do_not_fit_the_model(fields, parts):
    model = build()
    with refused(ValueError, *parts, "expected", model=model):
        get_peft_model(model, PostBlockConfig(**fields))
    other = adapted()
    with refused(ValueError, *parts, "expected", model=other):
        other.add_adapter("more", PostBlockConfig(**fields))
    assert list(other.peft_config) == ["default"]


def test_models_that_cannot_be_reached():
    patched = patch_model(build())
    with refused(ValueError, "layer 0", "'post_block' of its own", "expected", model=patched):
        get_peft_model(patched, PostBlockConfig())
    linear = nn.Sequential(nn.Linear(2, 2))
    with refused(ValueError, "Sequential", "expected", model=linear):
        get_peft_model(linear, PostBlockConfig())
    with pytest.raises(ValueError, match="POST_BLOCK"):
        PeftMixedModel(build(), PostBlockConfig())


def test_a_failure_half_way_leaves_the_model(monkeypatch):
    def full(self: PeftSite, *args: Any) -> None:
        if self.patched.index == 1:
            raise MemoryError("no room")

    monkeypatch.setattr(PeftSite, "add", full)
    model = build()
    with refused(MemoryError, "no room", model=model):
        get_peft_model(model, PostBlockConfig())


def edit(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "error", "parts"),
    [
        ({"gain": 2.0}, TypeError, ("'gain'",)),
        ({"gain": 2.0, "fused_steer_version": "7.1"}, TypeError, ("'gain'", "fused-steer 7.1")),
        ({"down_bias": True}, ValueError, ("steer_down.bias",)),
        ({"rank": 3}, ValueError, ("(4, 32)", "(3, 32)")),
        ({"layers": [0, 1]}, ValueError, ("layers.2.post_block",)),
        ({"dtype": "bfloat16"}, ValueError, ("torch.float32", "torch.bfloat16")),
        ({"hidden_size": 48}, ValueError, ("(4, 32)", "(4, 48)")),
    ],
    ids=["unknown key", "newer version", "missing tensor", "shape", "further tensor", "dtype", "hidden size"],
)
def test_files_that_do_not_fit(fields, error, parts, tmp_path):
    adapted(r=4).save_pretrained(str(tmp_path))
    edit(tmp_path, **fields)
    with refused(error, *parts, "expected"):
        PeftModel.from_pretrained(build(), str(tmp_path))


def test_a_checkpoint_of_another_method(tmp_path):
    get_peft_model(build(), LoraConfig(r=2, target_modules=["down_proj"])).save_pretrained(str(tmp_path))
    model = adapted()
    before = logits(model)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.load_adapter(str(tmp_path), adapter_name="lora")
    assert torch.equal(logits(model), before)
    with refused(ValueError, "'LORA'", "expected 'POST_BLOCK'"):
        patch_model(build(), tmp_path)


def test_an_adapter_that_was_trained_orthogonal_runs_and_does_not_train(tmp_path):
    wrapped = get_peft_model(build(), LoraConfig(r=2, target_modules=["down_proj"]))
    joint = patch_model(wrapped, SteerConfig(rank=4, orthogonal_to="lora"))
    joint.steering.save(tmp_path)
    loaded = PeftModel.from_pretrained(build(), str(tmp_path))
    loaded.save_pretrained(str(tmp_path / "again"))
    assert patch_model(build(), tmp_path / "again").steering.config() == joint.steering.config()
    with refused(ValueError, "orthogonal_to", "patch_model", "expected"):
        PeftModel.from_pretrained(build(), str(tmp_path), is_trainable=True)


@pytest.mark.parametrize(
    ("rows", "parts"), [(["default"], ("1 names", "expected 2")), (["default", "z"], ("'z'",))], ids=["length", "name"]
)
def test_rows_that_do_not_fit(rows, parts):
    model = adapted()
    before = logits(model)
    with refused(ValueError, *parts, "expected"), torch.no_grad():
        model(input_ids=tokens(), adapter_names=rows)
    assert torch.equal(logits(model), before)
    with refused(ValueError, "training mode", "expected"):
        model.train()(input_ids=tokens(), adapter_names=["default", "default"])


def test_auto_classes_load_it(tmp_path):
    skip_without_add_adapter()
    model = adapted(r=4)
    build().save_pretrained(tmp_path / "base")
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded.eval()), logits(model))
