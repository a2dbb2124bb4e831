"""Tests of `fused-steer merge`: the checkpoint that it writes, and what it refuses before it loads a model."""

from __future__ import annotations

import json
import re

import pytest
import torch
from command import assert_refused, invoke, plain_output  # noqa: F401 - an autouse fixture
from models import build, logits, randomize
from peft import LoraConfig, get_peft_model
from text import save_tiny
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fused_steer import SteerConfig, patch_model
from fused_steer.joint import save_joint

LINEAR = {"rank": 4, "activation": "identity", "site": "post_mlp"}


def save(model, folder, **fields):
    """Steer a model by a random adapter, save that, and return the model."""
    model = patch_model(model, SteerConfig(scale=0.3, **fields))
    randomize(model)
    model.steering.save(folder)
    return model


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "base")
    return lambda: AutoModelForCausalLM.from_pretrained("base").eval()


@pytest.mark.parametrize("fields", [LINEAR, {"form": "vector"}])
def test_merge_writes_a_plain_checkpoint(base, fields):
    model = save(base(), "adapter", **fields)
    model.steering.scale = 0.5
    done = invoke("merge", "base", "adapter", "--out", "merged", "--scale", 0.5)
    assert done.exit_code == 0, done.output
    assert "rounding" in done.stdout and ("mlp_bias = True" in done.stdout) == ("form" in fields)
    merged = AutoModelForCausalLM.from_pretrained("merged").eval()
    shift = (logits(model) - logits(base())).norm()
    assert (logits(merged) - logits(model)).norm() < 1e-4 * shift
    assert (
        AutoTokenizer.from_pretrained("merged")("a cat").input_ids
        == AutoTokenizer.from_pretrained("base")("a cat").input_ids
    )


def test_merge_takes_a_lora_that_was_trained_beside_the_steering(base, tmp_path):
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["down_proj", "q_proj"]))
    model = patch_model(model, SteerConfig(**LINEAR))
    randomize(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    save_joint(model, tmp_path / "joint")
    want = logits(model)
    assert invoke("merge", "base", "joint", "--out", "merged").exit_code == 0
    merged = AutoModelForCausalLM.from_pretrained("merged").eval()
    assert (logits(merged) - want).norm() < 1e-4 * (want - logits(base())).norm()


def share(done):
    """The percentage of the shift that rounding changes, as printed."""
    return float(re.search(r"by ([\d.]+)% at most", done.stdout)[1])


def test_merge_says_what_rounding_changes(base):
    base().bfloat16().save_pretrained("base")
    save(base().float(), "adapter", **LINEAR)
    rounded = invoke("merge", "base", "adapter", "--out", "half", "--scale", 0.001)
    assert rounded.exit_code == 0 and "bfloat16" in rounded.stdout and share(rounded) > 10
    exact = invoke("merge", "base", "adapter", "--out", "whole", "--scale", 0.001, "--dtype", "float32")
    assert exact.exit_code == 0 and share(exact) < 0.1
    assert AutoModelForCausalLM.from_pretrained("whole").dtype == torch.float32


def test_merge_refuses_before_it_loads_the_model(base, tmp_path, monkeypatch):
    save(build(), "silu", rank=4, site="post_mlp")
    save(build(), "linear", **LINEAR)
    get_peft_model(build(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained("lora")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")

    def fail(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    for words, parts in {
        "silu --out out": ["adapter 'silu' has activation 'silu'"],
        "lora --out out": ["lora is a LoRA; expected steering"],
        "linear --out full": ["'full', which holds a; expected a new or empty directory"],
        "linear --out full/a/b": ["full/a is a file"],
        "linear --out out --dtype int8": ["dtype is 'int8'; expected one of auto"],
        "nowhere --out out": ["nowhere"],
    }.items():
        assert_refused(invoke("merge", "base", *words.split()), *parts)
    assert not (tmp_path / "out").exists()


def test_merge_that_fails_leaves_no_folder(base, tmp_path, monkeypatch):
    save(base(), "linear", **LINEAR)

    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", False)  # its bars are no part of the message
    assert_refused(invoke("merge", "base", "linear", "--out", "deep/out"), "no space left")
    assert not (tmp_path / "deep").exists()


def test_merge_writes_into_an_empty_directory_behind_a_link(base, tmp_path):
    save(base(), "linear", **LINEAR)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to("elsewhere")
    assert invoke("merge", "base", "linear", "--out", "out").exit_code == 0
    names = {file.name for file in (tmp_path / "elsewhere").iterdir()}
    assert names == {file.name for file in (tmp_path / "base").iterdir()} and (tmp_path / "out").is_symlink()


def test_merge_refuses_a_base_without_all_weights_and_code(base, tmp_path, monkeypatch):
    """transformers would draw a classifier's missing head at random, and ask whether to execute the code."""
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", False)  # its bars are no part of the message
    save(base(), "linear", **LINEAR)
    AutoModelForSequenceClassification.from_pretrained("base").save_pretrained("classifier")
    (tmp_path / "code").mkdir()
    code = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "code" / "config.json").write_text(json.dumps(code))
    for name, part in {
        "classifier": "classifier has no lm_head.weight; expected all weights of a LlamaForCausalLM",
        "code": "code has a model with code of its own, which is not executed",
    }.items():
        assert_refused(invoke("merge", name, "linear", "--out", "out", "--no-check-base"), part)
    assert not (tmp_path / "out").exists()


def test_merge_saves_a_tokenizer_of_old_files(base, tmp_path):
    save(base(), "linear", **LINEAR)
    for file in (tmp_path / "base").glob("token*"):
        file.unlink()
    config = json.loads((tmp_path / "base" / "config.json").read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
    vocabulary = {"a": 0, "b": 1, "<|endoftext|>": 2}
    old = {"vocab.json": json.dumps(vocabulary), "merges.txt": "#version: 0.2", "config.json": json.dumps(config)}
    for name, text in old.items():
        (tmp_path / "base" / name).write_text(text)
    done = invoke("merge", "base", "linear", "--out", "out")
    assert done.exit_code == 0 and "saved" in done.stdout, done.output
    assert (tmp_path / "out" / "tokenizer.json").is_file()
