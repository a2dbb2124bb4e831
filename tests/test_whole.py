"""Tests of save_pretrained on a patched model: it saves the whole model with its adapters, and both load again."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build, logits, randomize, refused, skip_without_add_adapter, snapshot, steering_parameters
from peft import LoraConfig, get_peft_model
from torch import nn
from trainers import CONFIG, trainer
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer

import fused_steer.peft
from fused_steer import SteerConfig, patch_model

FILES = ("adapter_config.json", "adapter_model.safetensors")


def steered(**overrides: Any) -> nn.Module:
    model = patch_model(build(**overrides), CONFIG)
    randomize(model)
    model.steering.scale = 0.5
    return model


def adapters(directory: Path) -> list[str]:
    """Return the paths of the adapters in a directory."""
    return sorted(str(path.parent.relative_to(directory)) for path in directory.rglob(FILES[0]))


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}], ids=["", "tied"])
def test_whole_it_comes_back_steered(tmp_path, overrides):
    model = steered(**overrides)
    model.save_pretrained(tmp_path)
    assert adapters(tmp_path) == ["."]
    again = patch_model(build(**overrides), tmp_path)
    assert torch.equal(logits(again), logits(model)) and again.steering.config() == model.steering.config()

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    with refused(ValueError, "steered by PEFT already", "expected", "unload", model=loaded):
        patch_model(loaded, tmp_path)
    base = fused_steer.peft.unload(loaded)
    assert torch.equal(logits(base), logits(build(**overrides)))
    assert torch.equal(logits(patch_model(base, tmp_path)), logits(model))


@pytest.mark.parametrize("place", [".", "fused_steer/default"])
def test_whole_the_base_model_beside_an_adapter_may_have_another_name(tmp_path, place):
    build().save_pretrained(tmp_path / "base")
    model = patch_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), CONFIG)
    randomize(model)
    whole, elsewhere = tmp_path / "whole", tmp_path / "elsewhere"
    model.save_pretrained(whole)
    for folder in (whole / place, elsewhere):
        model.steering.save(folder)
    base = fused_steer.peft.unload(AutoModelForCausalLM.from_pretrained(whole))
    with refused(ValueError, "is for the base model", "base'; expected", "whole'", "check_base=False", model=base):
        patch_model(base, elsewhere)
    assert torch.equal(logits(patch_model(base, whole / place)), logits(model))


def test_whole_at_another_site_it_lies_where_patch_model_finds_it(tmp_path):
    model = patch_model(build(), SteerConfig(rank=4, site="post_mlp"))
    randomize(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(build()))
    assert torch.equal(logits(patch_model(again, tmp_path)), logits(model))


@pytest.mark.parametrize("in_use", [True, False], ids=["other site", "none in use"])
def test_whole_an_earlier_saves_adapter_is_not_taken_for_this_ones(tmp_path, in_use):
    earlier = steered()
    earlier.save_pretrained(tmp_path)
    model = patch_model(build(), SteerConfig(rank=4, site="post_mlp" if in_use else "post_block"))
    randomize(model, seed=2)
    wanted = logits(model)
    model.steering.use("default" if in_use else None)
    model.save_pretrained(tmp_path)
    assert adapters(tmp_path) == ["fused_steer/default"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(build()))
    assert torch.equal(logits(patch_model(again, tmp_path)), wanted)


def test_whole_in_shards_it_lies_where_a_trainer_does_not_take_it_for_all_there_is(tmp_path):
    model = steered()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1 and adapters(tmp_path) == ["fused_steer/default"]
    for base in (build(), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(logits(patch_model(base, tmp_path)), logits(model))
    best = trainer(patch_model(build(), CONFIG), tmp_path / "out", Trainer)
    best.state.best_model_checkpoint = str(tmp_path)
    best._load_best_model()
    best.model.steering.scale = 0.5
    assert torch.equal(logits(best.model), logits(model))


def test_whole_of_several_adapters_the_one_in_use_is_at_the_top(tmp_path):
    model = steered()
    model.steering.add("second", SteerConfig(rank=2))
    randomize(model, "second", seed=2)
    model.steering.use("second")
    model.save_pretrained(tmp_path / "a")
    assert adapters(tmp_path / "a") == [".", "fused_steer/default", "fused_steer/second"]
    assert torch.equal(logits(patch_model(build(), tmp_path / "a")), logits(model))
    model.steering.use(None)
    model.save_pretrained(tmp_path / "b")
    assert adapters(tmp_path / "b") == ["fused_steer/default", "fused_steer/second"]
    bare = build()
    with refused(ValueError, "holds adapters default, second", "expected one of them", model=bare):
        patch_model(bare, tmp_path / "b")
    model.steering.use("default")
    assert torch.equal(logits(patch_model(bare, tmp_path / "b" / "fused_steer" / "default")), logits(model))


def test_whole_a_state_dict_of_the_callers_is_what_is_written(tmp_path):
    model = steered()
    averaged = {name: value.clone() for name, value in model.state_dict().items()}
    for name in averaged:
        if ".post_block." in name:
            averaged[name] *= 2
    keys = list(averaged)
    model.save_pretrained(tmp_path / "a", state_dict=dict(averaged))
    assert adapters(tmp_path / "a") == ["."]
    expected = steering_parameters(model)
    for name, parameter in steering_parameters(patch_model(build(), tmp_path / "a")).items():
        assert torch.equal(parameter, 2 * expected[name])

    model.save_pretrained(tmp_path / "b", state_dict={key: averaged[key] for key in keys if ".post_block." not in key})
    model.save_pretrained(tmp_path / "c", is_main_process=False)
    assert adapters(tmp_path) == ["a"] and (tmp_path / "b" / "model.safetensors").is_file()
    partly = {key: averaged[key] for key in keys if not key.endswith("2.post_block.steer_up.default.bias")}
    with refused(ValueError, "state_dict has no model.layers.2.post_block.steer_up.default.bias", "expected"):
        model.save_pretrained(tmp_path / "d", state_dict=partly)
    assert not (tmp_path / "d").exists()


def test_whole_what_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    model = steered()
    model.save_pretrained(tmp_path / "a")
    before = contents(tmp_path)
    other = steered()
    with torch.no_grad():
        steering_parameters(other)["model.layers.0.post_block.steer_up.bias"][3] = torch.nan
    with refused(ValueError, "adapter 'default' cannot be saved", "NaN", model=other):
        other.save_pretrained(tmp_path / "a")
    get_peft_model(build(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    lora = contents(tmp_path / "lora")
    with refused(ValueError, "holds an adapter of LORA", "expected another directory", model=model):
        model.save_pretrained(tmp_path / "lora")
    assert contents(tmp_path / "lora") == lora
    assert {name: data for name, data in contents(tmp_path).items() if name.startswith("a/")} == before

    def replace(*_: Any) -> None:
        raise PermissionError("no replacing")

    randomize(model, seed=2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(PermissionError, match="no replacing"):
            model.save_pretrained(tmp_path / "a")
    after = contents(tmp_path)
    assert all(after[f"a/{name}"] == before[f"a/{name}"] for name in FILES)
    assert {name for name in after if name.startswith("a/")} == before.keys()


def test_whole_unpatched_it_is_transformers_own_again(tmp_path):
    model = build()
    model.save_pretrained = own = lambda *args, **kwargs: PreTrainedModel.save_pretrained(model, *args, **kwargs)
    for given in (model, build()):
        before = snapshot(given)
        patch_model(given, CONFIG).save_pretrained(tmp_path)
        given.steering.unpatch()
        assert snapshot(given) == before
    assert model.save_pretrained is own
    given.save_pretrained(tmp_path / "base")
    assert adapters(tmp_path) == ["."]


def test_whole_copies_save_their_own(tmp_path):
    model = steered()
    for name, copied in (("copy", copy.deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
        randomize(copied, seed=3)
        assert copied.save_pretrained.steering is copied.steering
        copied.save_pretrained(tmp_path / name)
        assert torch.equal(logits(patch_model(build(), tmp_path / name)), logits(copied))
        assert not torch.equal(logits(copied), logits(model))


def test_whole_beside_a_lora_of_transformers(tmp_path):
    skip_without_add_adapter()
    added = build()
    added.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model = patch_model(added, CONFIG)
    randomize(model)
    model.save_pretrained(tmp_path / "added")  # transformers writes only the LoRA, not the base
    assert adapters(tmp_path / "added") == [".", "fused_steer/default"]
    again = build()
    again.load_adapter(str(tmp_path / "added"))
    again = patch_model(again.eval(), tmp_path / "added" / "fused_steer" / "default")
    assert torch.equal(logits(again), logits(model))


def test_whole_beside_a_lora_of_peft(tmp_path):
    wrapped = patch_model(get_peft_model(build(), LoraConfig(r=2, target_modules=["q_proj"])), CONFIG)
    wrapped.save_pretrained(tmp_path / "wrapped")  # PEFT writes only the LoRA
    assert adapters(tmp_path / "wrapped") == ["."]
    assert wrapped.steering.unpatch() is wrapped
    assert "save_pretrained" not in {**vars(wrapped), **vars(wrapped.get_base_model())}


def test_whole_the_adapter_goes_to_the_hub_too(tmp_path, monkeypatch):
    def push(model: nn.Module, repo_id: str, **options: Any) -> None:
        pushed.append((repo_id, options))
        model.save_pretrained(tmp_path / "pushed", max_shard_size="1GB")  # into a separate folder, as transformers does

    pushed: list[Any] = []
    monkeypatch.setattr(PreTrainedModel, "push_to_hub", push)
    model = steered()
    model.save_pretrained(tmp_path / "whole", push_to_hub=True, token="t", private=True)
    assert pushed == [("whole", {"token": "t", "private": True})]
    assert adapters(tmp_path) == ["pushed", "whole"]
