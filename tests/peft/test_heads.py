"""Tests of heads beside steering by PEFT: they train, are saved and loaded, and each adapter has its own head."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build, classifier, refused, skip_without_add_adapter, tokens
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


def test_heads_an_adapter_without_a_head_leaves_a_fresh_one_random_with_a_warning(tmp_path):
    patch_model(classifier(), SteerConfig(rank=4), freeze_head=True).steering.save(tmp_path / "adapter")
    says = (
        r"ForSequenceClassification.score was not loaded from a checkpoint, and adapter 'default' has none: .*expected"
    )
    with pytest.warns(UserWarning, match=says):
        PeftModel.from_pretrained(classifier(), str(tmp_path / "adapter"))
    skip_without_add_adapter()
    with pytest.warns(UserWarning, match=says):
        classifier().load_adapter(str(tmp_path / "adapter"))
    classifier().save_pretrained(tmp_path / "base")
    trained_classifier().save_pretrained(str(tmp_path / "head"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was not loaded from a checkpoint")
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        PeftModel.from_pretrained(loaded, str(tmp_path / "adapter"))
        PeftModel.from_pretrained(classifier(), str(tmp_path / "head"))
        PeftModel.from_pretrained(build(), str(tmp_path / "adapter"))
        trained_classifier()


@pytest.mark.parametrize("low_cpu", [False, True])
@pytest.mark.parametrize("by", ["patch_model", "peft"])
@each_task
def test_heads_an_adapter_without_a_head_joins_one_with_a_head(cls, task, head, labels, by, low_cpu, tmp_path):
    """It uses the model's own head. PEFT lets each adapter of a task have a head, and looks for it in the file."""
    if by == "peft":
        get_peft_model(build(), PostBlockConfig(r=2)).save_pretrained(str(tmp_path))
    else:
        patch_model(build(), SteerConfig(rank=2)).steering.save(tmp_path)
    model = get_peft_model(classifier(cls=cls), PostBlockConfig(r=4, task_type=task))
    base = outputs(classifier(cls=cls))
    train(model, labels)
    trained = outputs(model)
    model.load_adapter(str(tmp_path), adapter_name="headless", low_cpu_mem_usage=low_cpu)
    assert torch.equal(outputs(model), trained)
    model.set_adapter("headless")
    assert torch.equal(outputs(model), base)  # a fresh adapter before the model's own head
    assert not any(p.is_meta for p in model.parameters())
    model.set_adapter("default")
    assert torch.equal(outputs(model), trained)


@pytest.mark.parametrize("task", ["SEQ_CLS", "QUESTION_ANS"])
def test_heads_a_file_that_claims_a_task_without_its_head_is_refused(task, tmp_path):
    cls, _, head, _ = next(one for one in TASKS.values() if one[1] == task)
    patch_model(build(), SteerConfig(rank=2)).steering.save(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text()) | {"task_type": task}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    model = classifier(cls=cls)
    with refused(ValueError, f"has no {head}.weight; expected the head of adapter 'default'", model=model):
        PeftModel.from_pretrained(model, str(tmp_path))


def test_heads_in_a_copy_of_a_model_train_and_are_saved(tmp_path):
    """No mark says that they were loaded."""
    classifier().save_pretrained(tmp_path / "base")
    copied = copy.deepcopy(AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"))
    model = get_peft_model(copied, PostBlockConfig(r=4))
    train(model, {"labels": torch.tensor([0, 2])})
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert not torch.equal(outputs(loaded), outputs(model))
    loaded = PeftModel.from_pretrained(loaded, str(tmp_path / "adapter"))
    assert torch.equal(outputs(loaded), outputs(model))


# -------------------------------------------------------------------------------------- embeddings, and compiled models


def resized(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = build()
    model.resize_token_embeddings(80)
    return model


def test_heads_embeddings_that_peft_saves_beside_are_loaded(tmp_path):
    model = get_peft_model(resized(), PostBlockConfig(r=4)).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if ".post_block." in path or "embed_tokens" in path or "lm_head" in path:
                parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(str(tmp_path / "with"), save_embedding_layers=True)
    model.save_pretrained(str(tmp_path / "without"), save_embedding_layers=False)
    names = [
        {name for name in load_file(tmp_path / kind / "adapter_model.safetensors") if ".post_block." not in name}
        for kind in ("with", "without")
    ]
    assert names == [{"base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"}, set()]
    loaded = PeftModel.from_pretrained(resized(1), str(tmp_path / "with"))
    assert torch.equal(outputs(loaded), outputs(model))
    bare = resized()
    assert torch.equal(
        outputs(PeftModel.from_pretrained(resized(), str(tmp_path / "without"))),
        outputs(patch_model(bare, tmp_path / "without")),
    )
    for wrong in (build(), build(hidden_size=64)):
        with refused(ValueError, "expected", model=wrong):
            PeftModel.from_pretrained(wrong, str(tmp_path / "with"))
    other = resized()
    with refused(ValueError, "weights of the model beside the steering", "PeftModel", "expected", model=other):
        patch_model(other, tmp_path / "with")
    skip_without_add_adapter()
    with refused(ValueError, "PeftModel.from_pretrained also loads embeddings", "expected", model=other):
        other.load_adapter(str(tmp_path / "with"))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "model.layers.1.post_block.steer_up"])
def test_heads_a_flipped_bit_in_embeddings_is_found(name, tmp_path):
    get_peft_model(resized(), PostBlockConfig(r=4)).save_pretrained(str(tmp_path), save_embedding_layers=True)
    file = tmp_path / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    start = next(entry["data_offsets"][0] for key, entry in header.items() if name in key)
    content[8 + size + start] ^= 1
    file.write_bytes(content)
    model = resized()
    with refused(ValueError, str(file), "expected sha256", model=model):
        PeftModel.from_pretrained(model, str(tmp_path))


def test_heads_weights_of_an_earlier_save_are_not_taken_for_those_of_a_pickle(tmp_path):
    """PEFT leaves the earlier file where it writes a pickle beside it, which nobody reads. Here PEFT's own does it."""
    first = trained_classifier()
    first.save_pretrained(str(tmp_path))
    save = PeftModel.save_pretrained.__wrapped__
    save(trained_classifier(activation="tanh"), str(tmp_path), safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    with refused(ValueError, "expected sha256"):
        PeftModel.from_pretrained(classifier(), str(tmp_path))


def test_heads_embeddings_train_by_name_alone(tmp_path):
    with refused(TypeError, "'trainable_token_indices'", "expected"):
        PostBlockConfig(r=4, trainable_token_indices=[1, 2])
    for overrides in ({}, {"tie_word_embeddings": True}):
        names = ["embed_tokens"] if overrides else ["embed_tokens", "lm_head"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, of tied weights
            model = get_peft_model(build(**overrides), PostBlockConfig(r=4, modules_to_save=names)).eval()
            with torch.no_grad():
                for parameter in filter(lambda p: p.requires_grad, model.parameters()):
                    parameter.copy_(torch.randn_like(parameter))
            model.save_pretrained(str(tmp_path))
            loaded = PeftModel.from_pretrained(build(**overrides), str(tmp_path))
        assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize("part", ["model", "head"])
def test_heads_of_compiled_models_train_and_are_saved_and_load_into_plain_ones(part, tmp_path):
    def compiled() -> Any:
        model = classifier()
        if part == "model":
            return torch.compile(model, backend="eager")
        model.score = torch.compile(model.score, backend="eager")
        return model

    model = get_peft_model(compiled(), PostBlockConfig(r=4))
    train(model, {"labels": torch.tensor([0, 2])})
    model.save_pretrained(str(tmp_path))
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.score.weight" in names and not any("_orig_mod" in name for name in names)
    loaded = PeftModel.from_pretrained(classifier(), str(tmp_path))
    assert torch.equal(outputs(loaded), outputs(model))
    other = compiled()
    with refused(ValueError, "score", "is compiled", "expected the plain model", model=other):
        PeftModel.from_pretrained(other, str(tmp_path))
