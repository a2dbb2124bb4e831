"""Tests of steering as a PEFT method: one set of checks over a matrix of models and configs, as in PEFT's own tests."""

from __future__ import annotations

import copy
import gc
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_steer.kernels.launch import noted
from hardware import HAS_GPU
from models import (
    assert_close,
    build,
    build_frozen,
    generate,
    gradients,
    input_gradient,
    logits,
    randomize,
    refused,
    skip_without_add_adapter,
    snapshot,
    tokens,
)
from peft import (
    LoraConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    PeftModelForCausalLM,
    get_peft_model,
    inject_adapter_in_model,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import fused_steer.peft
import fused_steer.peft.site as site_module
import fused_steer.serving.slots as slots_module
from fused_steer import SteerConfig, patch_model
from fused_steer.model.site import Site, SteeringSite
from fused_steer.peft import PeftSite, PostBlockConfig
from fused_steer.tools import coverage

#: name -> model family, and fields of the adapter's config.
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
    """Build a model with one random adapter, in eval mode."""
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
def test_peft_a_fresh_adapter_changes_nothing_and_alone_trains(family, fields):
    base = build_frozen(family)
    before = logits(base)
    model = get_peft_model(base, PostBlockConfig(**fields))
    assert torch.equal(logits(model.eval()), before)
    assert trained(model) == set(of_adapter(model, "default"))


@everywhere
def test_peft_it_computes_what_patch_model_does(family, fields, tmp_path):
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
def test_peft_files_go_either_way(family, fields, tmp_path):
    model = adapted(family, **fields)
    expected = logits(model)
    model.save_pretrained(str(tmp_path / "peft"))
    patched = patch_model(build(family), tmp_path / "peft")
    patched.steering.save(tmp_path / "ours")
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "peft")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    ours, theirs = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "peft"))
    assert ours.keys() <= theirs.keys()
    different = {key for key in theirs if theirs[key] != ours.get(key, theirs[key])}
    assert different == {"config_sha256", "weights_sha256"}  # ours carries the config
    for folder in ("peft", "ours"):
        loaded = PeftModel.from_pretrained(build(family), str(tmp_path / folder))
        assert torch.equal(logits(loaded), expected)
        assert trained(loaded) == set()
        assert loaded.peft_config["default"].steer_config() == model.peft_config["default"].steer_config()
        again = PeftModel.from_pretrained(build(family), str(tmp_path / folder), is_trainable=True)
        assert trained(again) == set(of_adapter(again, "default"))
        assert PeftConfig.from_pretrained(str(tmp_path / folder)).steer_config() == patched.steering.config()


@everywhere
def test_peft_disabled_it_is_the_base_model(family, fields):
    model = adapted(family, **fields)
    steered, flags = logits(model), trained(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(build_frozen(family)))
    assert torch.equal(logits(model), steered) and trained(model) == flags
    with pytest.raises(KeyError, match="stop"), model.disable_adapter():
        raise KeyError("stop")
    assert torch.equal(logits(model), steered)


@everywhere
def test_peft_several_adapters(family, fields, tmp_path):
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
def test_peft_each_row_by_its_own_adapter(family, fields):
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


def of_three(family: str = "llama") -> PeftModel:
    """Build a model with three adapters of different ranks, activations, scales and layers."""
    model = adapted(family, "first", r=4, activation="silu", scale=0.5)
    for seed, (name, fields) in enumerate(
        {
            "second": {"r": 2, "activation": "tanh", "layers": [1], "down_bias": True},
            "third": {"form": "vector", "scale": -2.0},
        }.items(),
        2,
    ):
        model.add_adapter(name, PostBlockConfig(**fields))
        fill(model, name, seed)
    return model


def of_rows(model: PeftModel, rows: list[str]) -> Tensor:
    """Compute the logits of one prompt, repeated in a row for each adapter name."""
    with torch.no_grad():
        return model(input_ids=tokens()[:1].expand(len(rows), -1), adapter_names=rows).logits


def assert_rows_answer_as_alone(model: PeftModel, rows: list[str]) -> None:
    actual, prompt = of_rows(model, rows), tokens()[:1]
    with torch.no_grad(), model.disable_adapter():
        unsteered = model(prompt.expand(len(rows), -1)).logits, model(prompt).logits.expand(len(rows), -1, -1)
        base = unsteered[1]
    for name, row in zip(rows, actual, strict=True):
        if name == "__base__":
            alone = base
        else:
            model.set_adapter(name)
            with torch.no_grad():
                alone = model(prompt).logits
            assert not torch.equal(alone, base)
        assert_close(row, alone[0], unsteered=unsteered)


@pytest.mark.parametrize("length", [7, 150], ids=["few tokens", "many tokens"])
@pytest.mark.parametrize("rows", [["first"], ["first", "second"], ["third", "first", "__base__", "second"]], ids=len)
def test_peft_rows_cost_two_launches_a_layer_whatever_their_adapters(rows, length, monkeypatch):
    monkeypatch.setenv("FUSED_STEER_BACKEND", "triton")
    model = of_three().to("cuda" if HAS_GPU else "cpu")
    hidden = torch.randn(len(rows), length, 32, device=model.device)
    with torch.no_grad(), model.base_model._enable_peft_forward_hooks(adapter_names=rows):
        for layer in model.get_base_model().model.layers:
            with noted() as notes:
                layer.post_block(hidden, hidden)
            kind = "token" if len(rows) * length <= 256 else "tile"
            names = [launch.kernel.__name__ for launch in notes.launches]
            assert names == [f"post_block_grouped_{kind}_{part}_kernel" for part in ("down", "up")]


def test_peft_rows_are_one_op_a_layer(monkeypatch):
    ran: list[str] = []
    for module, name in ((slots_module, "post_block_routed"), (site_module, "post_block")):
        op = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, op=op, name=name, **k: ran.append(name) or op(*a, **k))
    model = of_three()
    del ran[:]
    of_rows(model, ["third", "first", "__base__", "second"])
    assert ran == ["post_block_routed"] * 3
    del ran[:]
    of_rows(model, ["second", "__base__"])  # "second" steers one of three layers
    assert ran == ["post_block_routed"]
    del ran[:]
    of_rows(model, ["__base__", "__base__"])
    assert ran == []


def test_peft_rows_without_adapter_keep_their_bits():
    model = of_three()
    x, branch = torch.randn(2, 3, 5, 32)
    x[0, 0, 0] = branch[0, 0, 0] = -0.0
    with torch.no_grad(), model.base_model._enable_peft_forward_hooks(adapter_names=["__base__", "first", "third"]):
        for layer in model.get_base_model().model.layers:
            out = layer.post_block(x, branch)
            assert torch.equal(out[0], (x + branch)[0]) and out[0, 0, 0].signbit().all()
            assert not torch.equal(out[1], (x + branch)[1])


def replace(model: nn.Module, name: str) -> None:
    """Replace every parameter of the adapter by a new object with other values."""
    for path, parameter in of_adapter(model, name).items():
        place, _, kind = path.rpartition(".")
        setattr(model.get_submodule(place), kind, nn.Parameter(0.5 * torch.randn_like(parameter)))


def step_unseen(model: nn.Module, name: str) -> None:
    """Take an optimizer's step that does not raise the tensors' versions."""
    parameters = list(of_adapter(model, name).values())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    torch.optim.SGD(parameters, lr=0.3, fused=True).step()


@pytest.mark.parametrize(
    "change",
    [lambda model, name: fill(model, name, seed=9), replace, step_unseen],
    ids=["in place", "other parameters", "fused optimizer"],
)
def test_peft_rows_show_weights_that_changed_between_two_passes(change):
    model, rows = of_three(), ["first", "__base__", "third"]
    before = of_rows(model, rows)
    change(model, "first")
    after = of_rows(model, rows)
    assert not torch.equal(after[0], before[0]) and torch.equal(after[1:], before[1:])
    assert_rows_answer_as_alone(model, rows)


def test_peft_rows_after_adapters_came_and_went():
    model = of_three()
    rows = ["first", "second", "third"]
    assert_rows_answer_as_alone(model, rows)
    model.delete_adapter("second")
    model.add_adapter("second", PostBlockConfig(r=6, activation="gelu", layers=[0, 2], up_bias=True))
    fill(model, "second", 5)
    assert_rows_answer_as_alone(model, rows)
    assert_rows_answer_as_alone(copy.deepcopy(model), rows)
    assert_rows_answer_as_alone(model.double().float(), ["third", "second", "__base__", "second"])


def test_peft_rows_in_compiled_graphs():
    model = of_three()
    compiled = torch.compile(model.get_base_model(), backend="eager", fullgraph=True)
    for rows in (["first", "second"], ["__base__", "third"]):
        with torch.no_grad():
            expected = model(input_ids=tokens(), adapter_names=rows).logits
            with model.base_model._enable_peft_forward_hooks(adapter_names=rows):
                assert torch.equal(compiled(input_ids=tokens()).logits, expected)
    with torch.no_grad():
        assert torch.equal(compiled(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


def test_peft_rows_have_no_gradient_and_say_so():
    model = of_three()
    model.set_adapter("first")
    with pytest.raises(RuntimeError, match="adapter_names is for inference; expected torch.no_grad()"):
        model(input_ids=tokens(), labels=tokens(), adapter_names=["first", "second"]).loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_peft_site_has_no_more_than_it_uses():
    site = adapted().get_base_model().model.layers[0].post_block
    theirs = vars(SteeringSite()) | SteeringSite()._buffers | SteeringSite()._modules
    foreign = theirs.keys() - vars(Site()).keys() - Site()._modules.keys()
    assert foreign >= {"active", "scale", "strength", "basis", "rows", "_planned"}
    assert not [name for name in foreign if hasattr(site, name)]


def test_peft_site_has_no_weight_also_when_its_layer_is_deleted():
    model = adapted()
    site = model.get_base_model().model.layers[0].post_block
    assert not hasattr(site, "weight") and not hasattr(site, "bias")
    del model
    gc.collect()
    assert not hasattr(site, "weight") and not hasattr(site, "bias")


def test_peft_unload_of_a_wrapped_model_is_refused():
    model = adapted()
    with refused(ValueError, "model is a PeftModel", "model.unload()", model=model):
        fused_steer.peft.unload(model)
    assert fused_steer.peft.is_steered(model)


@everywhere
def test_peft_unload_gives_the_model_back(family, fields):
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
def test_peft_merging_is_refused(family, fields):
    model = adapted(family, **fields)
    before = logits(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with refused(ValueError, "cannot be merged into weights", "expected"):
            merge()
    assert torch.equal(logits(model), before)


@everywhere
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_peft_training_moves_the_adapter_alone(family, fields, checkpointing):
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
def test_peft_checkpointing_changes_no_gradient(family, fields):
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


def test_peft_copies_and_state_dicts():
    model = adapted(r=4)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    other = get_peft_model(build(), PostBlockConfig(r=4)).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    twin.unload()
    assert isinstance(model.get_base_model().model.layers[0].post_block, PeftSite)


def test_peft_as_transformers_own_adapter_and_beside_lora():
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


def test_peft_several_active_adapters_are_added_up():
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
def test_peft_weighted_sums(first, second, kind, tmp_path):
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


@pytest.mark.parametrize("dtypes", [("bfloat16", "float16"), ("float16", "bfloat16")], ids="-".join)
def test_peft_weighted_sum_of_two_half_dtypes_keeps_the_values_of_both(dtypes):
    first, second = ({"r": 3, "activation": "identity", "dtype": dtype} for dtype in dtypes)
    model = with_two(first, second)
    model.add_weighted_adapter(["a", "b"], [0.7, -1.5], "sum")
    for layer in model.get_base_model().model.layers[:2]:
        a, b, both = (layer.post_block.adapter(name).down.weight for name in ("a", "b", "sum"))
        assert torch.equal(both, torch.cat([a.float(), b.float()]))


@pytest.mark.parametrize(
    ("first", "second", "arguments", "parts"),
    [
        (SILU, SILU, (["a", "b"], [1, 1], "c"), ("silu", "'cat'")),
        (SILU, {"r": 2, "activation": "tanh"}, (["a", "b"], [1, 1], "c", "cat"), ("silu, tanh",)),
        (VECTOR, VECTOR, (["a", "z"], [1, 1], "c"), ("'z'",)),
        (VECTOR, VECTOR, (["a", "b"], [1], "c"), ("2 adapters", "1 weights")),
        (VECTOR, VECTOR, (["a", "b"], [1, "x"], "c"), ("the weight of 'b' is 'x'", "expected a number")),
        (VECTOR, VECTOR, (["a", "b"], [1, math.nan], "c"), ("the weight of 'b' is nan", "expected a finite number")),
        (IDENTITY, IDENTITY, (["a", "b"], [1, 3e38], "c"), ("values that are NaN or infinite",)),
        (VECTOR, VECTOR, ("a", [1], "c"), ("adapters is 'a'", "expected a list")),
        (VECTOR, VECTOR, ([["a"]], [1], "c"), ("no adapter ['a']",)),
        (VECTOR, VECTOR, (["a", "b"], [1, 1], "b"), ("'b' already",)),
        (VECTOR, VECTOR, (["a", "b"], [1, 1], "c", "ties"), ("'ties'",)),
        (
            {"r": 200, "activation": "identity"},
            {"r": 57, "activation": "identity"},
            (["a", "b"], [1, 1], "c"),
            ("257",),
        ),
    ],
    ids=["nonlinear", "activations", "unknown", "weights", "text", "nan", "overflow", "name", "list", "taken", "kind"]
    + ["rank"],
)
def test_peft_sums_that_are_not_defined(first, second, arguments, parts):
    model = with_two(first, second)
    with refused((ValueError, TypeError), *parts, "expected", model=model):
        model.add_weighted_adapter(*arguments)
    assert set(model.peft_config) == {"a", "b"} and model.active_adapters == ["a"]


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
        ({"site": "post_mlp"}, ValueError, ("site is 'post_mlp'", "'post_block'", "patch_model")),
        ({"dtype": []}, ValueError, ("dtype is []",)),
        ({"modules_to_save": [None]}, TypeError, ("modules_to_save is [None]", "a list of names")),
        ({"modules_to_save": {}}, TypeError, ("modules_to_save is {}", "a list of names")),
        ({"modules_to_save": 5}, TypeError, ("modules_to_save is 5", "a list of names")),
    ],
    ids=["unknown", "newer", "both ranks", "rank", "activation", "vector", "site", "dtype", "module", "modules", "5"],
)
def test_peft_configs_that_say_nothing_sensible(fields, error, parts):
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
def test_peft_configs_that_do_not_fit_the_model(fields, parts):
    model = build()
    with refused(ValueError, *parts, "expected", model=model):
        get_peft_model(model, PostBlockConfig(**fields))
    other = adapted()
    with refused(ValueError, *parts, "expected", model=other):
        other.add_adapter("more", PostBlockConfig(**fields))
    assert list(other.peft_config) == ["default"]


def test_peft_models_that_cannot_be_reached():
    patched = patch_model(build())
    with refused(ValueError, "layer 0", "steered at post_block already", "expected", model=patched):
        get_peft_model(patched, PostBlockConfig())
    linear = nn.Sequential(nn.Linear(2, 2))
    with refused(ValueError, "Sequential", "expected", model=linear):
        get_peft_model(linear, PostBlockConfig())
    with pytest.raises(ValueError, match="POST_BLOCK"):
        PeftMixedModel(build(), PostBlockConfig())


def test_peft_a_failure_half_way_leaves_the_model(monkeypatch):
    def full(self: PeftSite, *args: Any) -> None:
        if self.patched.index == 1:
            raise MemoryError("no room")

    monkeypatch.setattr(PeftSite, "add", full)
    model = build()
    with refused(MemoryError, "no room", model=model):
        get_peft_model(model, PostBlockConfig())


def edit(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"config_sha256": None} | fields))


@pytest.mark.parametrize(
    ("fields", "error", "parts"),
    [
        ({"gain": 2.0}, ValueError, ("'gain'",)),
        ({"gain": 2.0, "fused_steer_version": "7.1"}, ValueError, ("'gain'", "fused-steer 7.1")),
        ({"down_bias": True}, ValueError, ("steer_down.bias",)),
        ({"rank": 3}, ValueError, ("(4, 32)", "(3, 32)")),
        ({"layers": [0, 1]}, ValueError, ("layers.2.post_block",)),
        ({"dtype": "bfloat16"}, ValueError, ("torch.float32", "torch.bfloat16")),
        ({"hidden_size": 48}, ValueError, ("(4, 32)", "(4, 48)")),
    ],
    ids=["unknown key", "newer version", "missing tensor", "shape", "further tensor", "dtype", "hidden size"],
)
def test_peft_files_that_do_not_fit(fields, error, parts, tmp_path):
    adapted(r=4).save_pretrained(str(tmp_path))
    edit(tmp_path, **fields)
    with refused(error, *parts, "expected"):
        PeftModel.from_pretrained(build(), str(tmp_path))


def flip(file: Path, position: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


@pytest.mark.parametrize("by", ["peft", "ours"])
def test_peft_flipped_bits_are_found_in_both_files(by, tmp_path):
    """PEFT's loader and ours both find flipped bits in either file, whichever library wrote it."""
    model = adapted(r=4)
    model.save_pretrained(str(tmp_path / "peft"))
    patch_model(build(), tmp_path / "peft").steering.save(tmp_path / "ours")
    config, weights = (tmp_path / by / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    scale = config.read_text().index('"scale": 1.0') + len('"scale": ')
    length = weights.stat().st_size
    for file, position in ((config, scale), (weights, 20), (weights, length - 1), (weights, length // 2)):
        content = file.read_bytes()
        flip(file, position, bit=2)
        for load in (
            lambda: PeftModel.from_pretrained(build(), str(tmp_path / by)),
            lambda: patch_model(build(), tmp_path / by),
        ):
            with refused(ValueError, str(file), "expected"):
                load()
        file.write_bytes(content)
    assert torch.equal(logits(PeftModel.from_pretrained(build(), str(tmp_path / by))), logits(model))


def test_peft_config_alone_has_a_digest_that_every_way_in_checks(tmp_path):
    adapted(r=4).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"scale": 1.0', '"scale": 1.5'))
    for load in (PeftConfig.from_pretrained, PostBlockConfig.from_pretrained):
        with refused(ValueError, "fields were changed after saving", "expected config_sha256"):
            load(str(tmp_path))
    (tmp_path / "adapter_model.safetensors").unlink()
    with refused(ValueError, "fields were changed after saving", "expected config_sha256"):
        PostBlockConfig.from_pretrained(str(tmp_path))
    edit(tmp_path)
    assert PostBlockConfig.from_pretrained(str(tmp_path)).scale == 1.5


def test_peft_digests_are_of_one_save(tmp_path):
    """A config object that is saved again, without tensors or with others, does not keep old digests."""
    model = adapted(r=4)
    model.save_pretrained(str(tmp_path / "first"))
    model.peft_config["default"].save_pretrained(str(tmp_path / "config"))
    assert "tensors_sha256" not in json.loads((tmp_path / "config" / "adapter_config.json").read_text())
    loaded = PeftModel.from_pretrained(build(), str(tmp_path / "first"))
    fill(loaded, seed=5)
    loaded.save_pretrained(str(tmp_path / "first"))
    again = patch_model(build(), tmp_path / "first")
    assert torch.equal(logits(again), logits(loaded)) and not torch.equal(logits(again), logits(model))


def test_peft_weights_of_another_save_are_loaded_by_the_config_that_they_carry(tmp_path):
    for number, scale in enumerate((1.0, 3.0)):
        patched = patch_model(build(), SteerConfig(rank=4, scale=scale))
        randomize(patched, seed=number)
        patched.steering.save(tmp_path / str(number))
    shutil.copy(tmp_path / "1" / "adapter_model.safetensors", tmp_path / "0")
    with pytest.warns(UserWarning, match="is of another save"):
        loaded = PeftModel.from_pretrained(build(), str(tmp_path / "0"))
    assert loaded.peft_config["default"].scale == 3.0
    assert torch.equal(logits(loaded), logits(patched))


@pytest.mark.parametrize(
    ("value", "options", "parts"),
    [
        (1.0, {"safe_serialization": False}, ("safe_serialization is False", "'default'", "expected True")),
        (math.inf, {}, ("steer_up.weight", "NaN or infinite", "expected finite")),
    ],
    ids=["pickle", "infinite"],
)
def test_peft_saves_that_are_refused_write_nothing(value, options, parts, tmp_path):
    model = adapted(r=4)
    with torch.no_grad():
        model.get_base_model().model.layers[0].post_block.steer_up["default"].weight[0, 0] = value
    with refused(ValueError, *parts, model=model):
        model.save_pretrained(str(tmp_path / "new"), **options)
    assert not any(tmp_path.iterdir())
    lora = get_peft_model(build(), LoraConfig(r=2, target_modules=["q_proj"]))
    lora.save_pretrained(str(tmp_path), safe_serialization=False)  # PEFT's own methods are as they were
    assert (tmp_path / "adapter_model.bin").exists()


def test_peft_saves_of_what_fsdp_has_sharded_are_refused_and_write_nothing(tmp_path, monkeypatch):
    model = adapted(r=4)
    model.get_base_model().model.layers[1].post_block._is_fsdp_managed_module = True  # as FSDP marks what it shards
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    parts = ("layer 1 is sharded by FSDP", "adapter 'default', where state_dict does not give its values")
    with refused(ValueError, *parts, model=model):
        model.save_pretrained(str(tmp_path / "new"))
    assert not any(tmp_path.iterdir())
    model.save_pretrained(str(tmp_path), state_dict=model.state_dict())
    assert torch.equal(logits(PeftModel.from_pretrained(build(), str(tmp_path))), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_peft_files_record_the_dtype_that_the_tensors_have(dtype, tmp_path):
    model = adapted(r=4).to(dtype)
    model.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    loaded = PeftModel.from_pretrained(build(), str(tmp_path))
    patched = patch_model(build(), tmp_path)
    for other in (loaded, patched):
        actual, expected = (
            {name.rpartition("model.layers")[2]: p for name, p in of_adapter(one, "default").items()}
            for one in (other, model)
        )
        assert actual.keys() == expected.keys()
        assert all(p.dtype == dtype and torch.equal(p, expected[name]) for name, p in actual.items())


def test_peft_a_checkpoint_of_another_method(tmp_path):
    get_peft_model(build(), LoraConfig(r=2, target_modules=["down_proj"])).save_pretrained(str(tmp_path))
    model = adapted()
    before = logits(model)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.load_adapter(str(tmp_path), adapter_name="lora")
    assert torch.equal(logits(model), before)
    with refused(ValueError, "'LORA'", "expected 'POST_BLOCK'"):
        patch_model(build(), tmp_path)


def test_peft_an_adapter_that_was_trained_orthogonal_runs_and_does_not_train(tmp_path):
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
def test_peft_rows_that_do_not_fit(rows, parts):
    model = adapted()
    before = logits(model)
    with refused(ValueError, *parts, "expected"), torch.no_grad():
        model(input_ids=tokens(), adapter_names=rows)
    assert torch.equal(logits(model), before)
    with refused(ValueError, "training mode", "expected"):
        model.train()(input_ids=tokens(), adapter_names=["default", "default"])


@pytest.mark.parametrize(
    ("kind", "shape"), [("xlnet", "(tokens, rows, d)"), ("gemma3n_text", "(streams, rows, tokens, d)")]
)
def test_peft_rows_of_layers_that_have_rows_elsewhere(kind, shape):
    """With four rows of four tokens each, or four streams, each name steered a token or a stream of all rows."""
    model = get_peft_model(coverage.build(kind), PostBlockConfig(r=4)).eval()
    with refused(ValueError, shape, "adapter_names is given; expected set_adapter"), torch.no_grad():
        model(input_ids=tokens(batch=4, length=4), adapter_names=["default"] * 3 + ["__base__"])


def test_peft_adapters_load_into_empty_parameters(tmp_path):
    model = adapted(r=4, down_bias=True)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(build(), str(tmp_path), low_cpu_mem_usage=True)
    loaded.load_adapter(str(tmp_path), adapter_name="other", low_cpu_mem_usage=True)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")  # no parameter is memory-mapped from the file
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    for name in ("default", "other"):
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded), logits(model))
    empty = build()
    inject_adapter_in_model(PostBlockConfig(r=4), empty, low_cpu_mem_usage=True)
    assert {p.device.type for name, p in empty.named_parameters() if ".post_block." in name} == {"meta"}
    assert not hasattr(empty.model.layers[0].post_block, "weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_peft_without_autocast_adapters_are_of_their_layers_dtype(dtype, tmp_path):
    adapted(r=4).save_pretrained(str(tmp_path / "float32"))
    model = get_peft_model(build().to(dtype), PostBlockConfig(r=4), autocast_adapter_dtype=False)
    model.add_adapter("added", PostBlockConfig(form="vector"), autocast_adapter_dtype=False)
    model.load_adapter(str(tmp_path / "float32"), adapter_name="loaded", autocast_adapter_dtype=False)
    for name in ("default", "added", "loaded"):
        assert {p.dtype for p in of_adapter(model, name).values()} == {dtype}
    model.save_pretrained(str(tmp_path))
    model.load_adapter(str(tmp_path / "loaded"), adapter_name="again", autocast_adapter_dtype=False)
    for first, second in zip(of_adapter(model, "loaded").values(), of_adapter(model, "again").values(), strict=True):
        assert torch.equal(first, second)
    model.add_adapter("usual", PostBlockConfig(r=4))
    assert {p.dtype for p in of_adapter(model, "usual").values()} == {torch.float32}


def test_peft_the_task_is_the_users():
    assert PostBlockConfig(r=4).task_type is None
    assert type(get_peft_model(build(), PostBlockConfig(r=4))) is PeftModel
    assert type(get_peft_model(build(), PostBlockConfig(r=4, task_type="CAUSAL_LM"))) is PeftModelForCausalLM


def test_peft_auto_classes_load_it(tmp_path):
    skip_without_add_adapter()
    model = adapted(r=4)
    build().save_pretrained(tmp_path / "base")
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded.eval()), logits(model))
