"""Tests of what commands load: a base without all weights, or with code of its own, is refused in one line."""

from __future__ import annotations

import json

import pytest
from command import assert_refused, invoke, plain_output  # noqa: F401 - an autouse fixture
from models import build, classifier, randomize
from text import save_tiny

from fused_steer import SteerConfig, patch_model

COMMANDS = {
    "chat": "chat adapter --model base --no-check-base",
    "diagnose": "diagnose base --adapter adapter --prompts p.txt --out out --no-check-base",
    "extract": "extract --model base --positive p.txt --negative p.txt --out out",
    "fit": "fit base base --prompts p.txt --rank 1 --out out",
    "merge": "merge base adapter --out out --no-check-base",
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", False)  # its bars are no part of the message
    save_tiny(tmp_path / "base")
    model = patch_model(build(), SteerConfig(form="vector"))
    randomize(model)
    model.steering.save("adapter")
    (tmp_path / "p.txt").write_text("a cat sat\n" * 8)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_loading_a_base_without_its_head_is_refused(command, place):
    """transformers would draw the head at random, with a warning at most."""
    classifier().save_pretrained(place / "base")
    assert_refused(invoke(*COMMANDS[command].split()), "base has no lm_head.weight; expected all weights of a Llama")
    assert not (place / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_loading_a_base_with_code_of_its_own_is_refused(command, place):
    """transformers would ask at the terminal whether to run it."""
    file = place / "base" / "config.json"
    fields = json.loads(file.read_text()) | {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    }
    file.write_text(json.dumps(fields))
    assert_refused(invoke(*COMMANDS[command].split()), "base")
    assert not (place / "out").exists()
