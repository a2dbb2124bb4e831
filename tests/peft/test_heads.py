"""Tests of heads beside steering by PEFT: they train, are saved and loaded, and each adapter has its own head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build, classifier, refused, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import set_additional_trainable_modules
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import fused_steer.peft
from fused_steer import SteerConfig, patch_model
from fused_steer.peft import PostBlockConfig

#: name -> the model's class, PEFT's task type, the head's name, and the labels of a batch.
TASKS: dict[str, tuple[Any, str | None, str, dict[str, Tensor]]] = {
    "classifier": (AutoModelForSequenceClassification, "SEQ_CLS", "score", {"labels": torch.tensor([0, 2])}),
    "no task": (AutoModelForSequenceClassification, None, "score", {"labels": torch.tensor([0, 2])}),
    "tokens": (AutoModelForTokenClassification, "TOKEN_CLS", "score", {"labels": tokens() % 3}),
    "questions": (
        AutoModelForQuestionAnswering,
        "QUESTION_ANS",
        "qa_outputs",
        {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
    ),
}
each_task = pytest.mark.parametrize(("cls", "task", "head", "labels"), TASKS.values(), ids=TASKS)


def outputs(model: nn.Module, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(), **options)[0]


def train(model: nn.Module, labels: dict[str, Tensor], steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        model(input_ids=tokens(), **labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def trained_classifier(**fields: Any) -> PeftModel:
    model = get_peft_model(classifier(), PostBlockConfig(r=4, **fields))
    train(model, {"labels": torch.tensor([0, 2])})
    return model


@each_task
def test_heads_a_fresh_head_trains_and_is_saved(cls, task, head, labels, tmp_path):
    model = get_peft_model(classifier(cls=cls), PostBlockConfig(r=4, task_type=task))
    flags = {name for name, p in model.named_parameters() if p.requires_grad}
    heads = {name for name in flags if f".{head}.modules_to_save.default." in name}
    assert heads and all(name in heads or ".post_block." in name for name in flags)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, labels)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == flags
    model.save_pretrained(str(tmp_path))
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert f"base_model.model.{head}.weight" in file.keys()  # noqa: SIM118  (no mapping)
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        loaded = PeftModel.from_pretrained(classifier(cls=cls, seed=5), str(tmp_path), **options).eval()
        decoder = {n: t for n, t in classifier(cls=cls).state_dict().items() if head not in n}
        loaded.get_base_model().load_state_dict(decoder, strict=False)
        assert torch.equal(outputs(loaded), outputs(model))
        got = {name for name, p in loaded.named_parameters() if p.requires_grad}
        assert got == (flags if options.get("is_trainable") else set())
    base, expected = model.unload(), classifier(cls=cls)
    assert [type(module) for module in base.modules()] == [type(module) for module in expected.modules()]
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in expected.state_dict().items())


def test_heads_a_head_of_a_checkpoint_is_frozen_unless_a_task_is_named(tmp_path):
    classifier().save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    model = get_peft_model(loaded, PostBlockConfig(r=4))
    assert all(".post_block." in name for name, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(str(tmp_path / "adapter"))
    patched = patch_model(AutoModelForSequenceClassification.from_pretrained(tmp_path), tmp_path / "adapter")
    assert torch.equal(outputs(patched), outputs(model))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    model = get_peft_model(loaded, PostBlockConfig(task_type="SEQ_CLS"))
    assert any(".score." in name for name, p in model.named_parameters() if p.requires_grad)


def test_heads_modules_to_save():
    model = get_peft_model(classifier(), PostBlockConfig(r=4, modules_to_save=["embed_tokens"]))
    beside = [name for name, p in model.named_parameters() if p.requires_grad and ".post_block." not in name]
    assert [name.split(".")[-4] for name in beside] == ["embed_tokens"]
    none = get_peft_model(classifier(), PostBlockConfig(r=4, modules_to_save=[]))
    assert all(".post_block." in name for name, p in none.named_parameters() if p.requires_grad)
    model = classifier()
    with refused(ValueError, "'scores'", "expected", model=model):
        get_peft_model(model, PostBlockConfig(r=4, modules_to_save=["scores"]))
    with refused(TypeError, "'score'", "expected a list"):
        PostBlockConfig(modules_to_save="score")


def test_heads_each_adapter_has_its_own_head():
    model = trained_classifier()
    model.add_adapter("second", PostBlockConfig(r=2, activation="tanh"))
    model.set_adapter("second")
    train(model, {"labels": torch.tensor([1, 1])})
    alone = {"second": outputs(model)}
    model.set_adapter("default")
    alone["default"] = outputs(model)
    with model.disable_adapter():
        alone["__base__"] = outputs(model)
    assert torch.equal(alone["__base__"], outputs(classifier()))
    for rows in (["second", "default"], ["default", "__base__"]):
        mixed = outputs(model, adapter_names=rows)
        for index, name in enumerate(rows):
            assert torch.allclose(mixed[index], alone[name][index])
            assert not torch.allclose(mixed[index], alone[rows[1 - index]][index])
    assert torch.equal(outputs(model), alone["default"])
    with refused(ValueError, "'default'", "head", "expected", model=model):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", combination_type="cat")
    model.delete_adapter("second")
    assert torch.equal(outputs(model), alone["default"])


def test_heads_a_trained_head_is_not_lost_by_other_readers(tmp_path):
    trained_classifier().save_pretrained(str(tmp_path))
    model = classifier()
    with refused(ValueError, "score.weight", "PeftModel.from_pretrained", "expected", model=model):
        patch_model(model, tmp_path, freeze_head=True)
    with refused(ValueError, "score.weight", "expected"):
        PeftModel.from_pretrained(build(), str(tmp_path))


def flip(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.score.weight"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def other_shape(folder: Path) -> None:
    file = folder / "adapter_config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({n: v for n, v in fields.items() if not n.endswith("sha256")}))
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.score.weight"] = torch.zeros(2, 32)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "parts"), [(flip, ("sha256",)), (other_shape, ("(2, 32)", "(3, 32)"))], ids=["flipped", "shape"]
)
def test_heads_that_are_not_what_was_saved(change, parts, tmp_path):
    trained_classifier().save_pretrained(str(tmp_path))
    change(tmp_path)
    with refused(ValueError, *parts, "expected"):
        PeftModel.from_pretrained(classifier(), str(tmp_path))


def test_heads_a_failure_leaves_no_head_behind(monkeypatch):
    def full(model: nn.Module, *_: Any, place: Any = set_additional_trainable_modules, **arguments: Any) -> None:
        place(model=model, **arguments)
        raise MemoryError("no room")

    monkeypatch.setattr("peft.tuners.tuners_utils.set_additional_trainable_modules", full)
    model = classifier()
    with refused(MemoryError, "no room", model=model):
        get_peft_model(model, PostBlockConfig(r=4))


def test_heads_taking_steering_out_of_a_model_leaves_the_head_of_its_lora():
    base = classifier()
    lora = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"), adapter_name="lora")
    steered = fused_steer.peft.PostBlockModel(base, PostBlockConfig(r=4, modules_to_save=["score"]), "steer")
    assert set(base.score.modules_to_save) == {"lora", "steer"}
    steered.peft_config = {"steer": steered.peft_config["steer"]}
    fused_steer.peft.unload(base)
    assert set(base.score.modules_to_save) == {"lora"}
    assert not fused_steer.peft.is_steered(base) and lora.get_base_model() is base


def test_heads_patch_model_reads_what_a_frozen_head_left(tmp_path):
    patched = patch_model(classifier(), SteerConfig(rank=4), freeze_head=True)
    patched.steering.save(tmp_path)
    loaded = PeftModel.from_pretrained(classifier(), str(tmp_path), is_trainable=True)
    assert all(".post_block." in name for name, p in loaded.named_parameters() if p.requires_grad)
    assert torch.equal(outputs(loaded), outputs(patched))
