"""Tests of the heads of classifiers and reward models: which heads are fresh, and how patch_model treats them."""

from __future__ import annotations

import copy

import pytest
import torch
from models import build, classifier, logits, refused, snapshot, tokens
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForQuestionAnswering, AutoModelForSequenceClassification

from fused_steer import SteerConfig, lora_parameters, patch_model
from fused_steer.model.heads import fresh_heads


class Reward(nn.Module):
    """A user-defined model: a reward head on a language model's decoder."""

    def __init__(self) -> None:
        super().__init__()
        inner = build()
        self.config, self.backbone, self.drop, self.value = inner.config, inner.model, nn.Dropout(), nn.Linear(32, 1)


@pytest.mark.parametrize(
    ("model", "heads"),
    [
        (lambda: classifier(), ["score"]),
        (lambda: classifier("gpt2"), ["score"]),
        (lambda: classifier(cls=AutoModelForQuestionAnswering), ["qa_outputs"]),
        (Reward, ["value"]),
        (build, []),
        (lambda: build().model, []),
        (lambda: torch.compile(classifier(), backend="eager"), ["score"]),
    ],
    ids=["classifier", "gpt2", "question answerer", "own class", "language model", "decoder", "compiled"],
)
def test_heads_fresh_heads_are_found(model, heads):
    assert list(fresh_heads(model())) == heads


def test_heads_fresh_heads_are_those_that_no_checkpoint_had(tmp_path):
    build().save_pretrained(tmp_path / "base")
    fresh = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert list(fresh_heads(fresh)) == ["score"]
    fresh.save_pretrained(tmp_path / "trained")
    for options in ({}, {"dtype": torch.bfloat16}):
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "trained", **options)
        assert fresh_heads(loaded) == {} == fresh_heads(loaded.float())
        patch_model(loaded)
        assert not loaded.score.weight.requires_grad
    assert fresh_heads(AutoModel.from_pretrained(tmp_path / "base")) == {}


@pytest.mark.parametrize("marked", [True, False], ids=["of a checkpoint", "of a config"])
def test_heads_patch_model_refuses_a_fresh_head(marked, tmp_path):
    model = classifier()
    if marked:
        build().save_pretrained(tmp_path)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    why = "was not loaded from a checkpoint" if marked else "may be random"
    parts = ("ForSequenceClassification.score", why, "PostBlockConfig", "freeze_head", "expected")
    with refused(ValueError, *parts, model=model):
        patch_model(model)
    before = snapshot(model)
    patch_model(model, SteerConfig(rank=4), freeze_head=True).steering.unpatch()
    assert snapshot(model) == before


def test_heads_in_a_copy_of_a_model_may_be_fresh(tmp_path):
    """A copied parameter has lost transformers' mark, of a head that was loaded as of one that was not."""
    classifier().save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    copied = copy.deepcopy(loaded)
    with refused(ValueError, "score may be random (a copy", "expected", model=copied):
        patch_model(copied)
    assert torch.equal(logits(patch_model(copied, freeze_head=True)), logits(loaded))
    assert torch.equal(logits(copy.deepcopy(patch_model(loaded))), logits(loaded))


def test_heads_a_head_that_peft_trains_beside_lora_goes_on_training():
    wrapped = get_peft_model(classifier(), LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    before = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    head = wrapped.get_base_model().score.modules_to_save["default"].weight
    patch_model(wrapped, SteerConfig(rank=4))
    assert head.requires_grad and any(p is head for p in lora_parameters(wrapped))
    wrapped(input_ids=tokens(), labels=torch.tensor([0, 1])).loss.backward()
    assert head.grad.abs().max() > 0
    wrapped.steering.unpatch()
    assert {name for name, p in wrapped.named_parameters() if p.requires_grad} == before
    assert logits(wrapped).shape == (2, 3)
