"""Tests of `sweep`: perplexity and margin at each strength, against hooks and the definitions."""

from __future__ import annotations

import math

import pytest
import torch
from models import HIDDEN, LAYERS, build, build_frozen, logits, randomize, refused, snapshot, tokens
from text import tokenizer
from torch import Tensor

from fused_steer import patch_model
from fused_steer.tools.prompts import encode
from fused_steer.vectors import continuations, sweep

SIDES = ["what a good day", "i am glad", "yes"], ["what a bad day?", "no!"]


def batches(texts: list[str]) -> list[dict[str, Tensor]]:
    return encode(tokenizer(), texts, 64, 2)


def vectors() -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {i: torch.randn(HIDDEN, generator=generator) for i in (0, LAYERS - 1)}


def losses(texts: list[str], shifts: dict[int, Tensor], dtype: torch.dtype) -> list[list[float]]:
    """Return −log p of each token after the first, of each text alone, by hooks that add the shifts."""
    model = build_frozen().to(dtype)
    for i, shift in shifts.items():
        model.model.layers[i].register_forward_hook(lambda _, args, h, shift=shift: h + shift.to(h.dtype))
    found = []
    for text in texts:
        ids = tokenizer()(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            each = model(ids).logits[0, :-1].log_softmax(-1)
        found.append([-float(each[i, token]) for i, token in enumerate(ids[0, 1:])])
    return found


def expected(dose: float, group: dict[int, Tensor], dtype: torch.dtype) -> tuple[float, float]:
    shifts = {i: dose * vector for i, vector in group.items()}
    positive, negative = (losses(side, shifts, dtype) for side in SIDES)
    everything = [loss for text in (*positive, *negative) for loss in text]
    means = [sum(-sum(text) / len(text) for text in side) / len(side) for side in (positive, negative)]
    return math.exp(sum(everything) / len(everything)), means[0] - means[1]


@pytest.mark.parametrize("each_layer", [False, True])
def test_sweep_is_by_definition(each_layer):
    model, texts = build(), batches([*SIDES[0], *SIDES[1]])
    found = sweep(model, vectors(), *map(batches, SIDES), texts, [0, -1.5, 2], each_layer=each_layer)
    groups = [{i: v} for i, v in vectors().items()] if each_layer else [vectors()]
    assert [(row.layers, row.dose) for row in found] == [(tuple(g), d) for g in groups for d in (0, -1.5, 2)]
    errors, bounds = [], []
    for row, (group, dose) in zip(found, [(g, d) for g in groups for d in (0, -1.5, 2)], strict=True):
        truth, hooked = (expected(dose, group, dtype) for dtype in (torch.float64, torch.float32))
        for actual, plain, exact in zip((row.perplexity, row.margin), hooked, truth, strict=True):
            errors.append(abs(actual - exact) / abs(exact))
            bounds.append(abs(plain - exact) / abs(exact))
    assert max(errors) <= 2 * max(bounds) + 1e-6  # pooled over the draws
    assert len({row.perplexity for row in found}) == len(found) - each_layer  # at 0 both layers give the base


def test_sweep_leaves_a_model_as_it_was():
    model = build().train()
    before = snapshot(model)
    sweep(model, vectors(), *map(batches, SIDES), batches(SIDES[0]), [1.0])
    assert snapshot(model) == before and model.training and not hasattr(model, "steering")


def test_sweep_of_a_steered_model_replaces_its_adapter_meanwhile():
    model = patch_model(build())
    randomize(model)
    steered, before = logits(model), snapshot(model)
    found = sweep(model, vectors(), *map(batches, SIDES), batches(SIDES[0]), [0.0, 1.0])
    assert found == sweep(build(), vectors(), *map(batches, SIDES), batches(SIDES[0]), [0.0, 1.0])
    assert snapshot(model)["parameters"] == before["parameters"]
    assert model.steering.names == ["default"] and model.steering.active == "default"
    assert torch.equal(logits(model), steered)


def test_sweep_continuations_are_those_of_each_dose_alone():
    model, doses = build(), [0.0, 1.0, 3.0]
    said = continuations(model, tokenizer(), vectors(), "i am", doses, 6)
    assert not hasattr(model, "steering") and len(set(said)) > 1
    for dose, text in zip(doses, said, strict=True):
        other = patch_model(build())
        other.steering.add_vector("v", vectors(), scale=dose)
        other.steering.use("v")
        ids = tokenizer()("i am", return_tensors="pt")["input_ids"]
        alone = other.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert text == tokenizer().decode(alone[0, ids.shape[1] :], skip_special_tokens=True)


def test_sweep_refusals():
    model = build()
    good = batches(SIDES[0])
    for error, parts, given, doses in (
        (ValueError, (f"has shape (4,); expected ({HIDDEN},)",), {0: torch.ones(4)}, [1.0]),
        (ValueError, ("a dose is nan",), vectors(), [float("nan")]),
        (ValueError, (f"layers has {LAYERS}",), {LAYERS: torch.ones(HIDDEN)}, [1.0]),
    ):
        with refused(error, *parts, model=model):
            sweep(model, given, good, good, good, doses)
    for error, part, arguments in (
        (ValueError, "vectors is empty; expected", ({}, good, good, good, [1.0])),
        (TypeError, "vectors is a list; expected", ([torch.ones(HIDDEN)], good, good, good, [1.0])),
        (ValueError, "negative is empty; expected batches", (vectors(), good, [], good, [1.0])),
        (TypeError, "texts has a str; expected batches", (vectors(), good, good, ["good"], [1.0])),
        (TypeError, "doses is 1.0; expected a list of numbers", (vectors(), good, good, good, 1.0)),
        (TypeError, "doses is '12'; expected a list of numbers", (vectors(), good, good, good, "12")),
    ):
        with refused(error, part, model=model):
            sweep(model, *arguments)
    with refused(TypeError, "each_layer is 'no'; expected True or False", model=model):
        sweep(model, vectors(), good, good, good, [1.0], each_layer="no")
    with refused(TypeError, "model is a int; expected a torch.nn.Module"):
        sweep(3, vectors(), good, good, good, [1.0])
    short = [{"input_ids": tokens(batch=2, length=1), "attention_mask": torch.ones(2, 1)}]
    with refused(ValueError, "no text has a second token", model=model):
        sweep(model, vectors(), good, short, good, [1.0])


def test_sweep_where_a_vector_does_not_steer_is_refused():
    model, good = patch_model(build()), batches(SIDES[0])
    steering = model.steering
    for scope, part in (
        (steering.disabled(), "while steering is disabled"),
        (steering.batch([None]), "steering.batch"),
    ):
        with scope:
            with refused(RuntimeError, part, "expected it outside", model=model):
                sweep(model, vectors(), good, good, good, [1.0])
            with refused(RuntimeError, part, "expected it outside", model=model):
                continuations(model, tokenizer(), vectors(), "what", [1.0], 2)
