"""Tests of --no-check-base: each command that takes a model and an adapter takes a copy of the model under any name."""

from __future__ import annotations

import importlib.util
import json

import pytest
from command import assert_refused, invoke, plain_output  # noqa: F401 - an autouse fixture
from models import build, randomize
from peft import LoraConfig, get_peft_model
from text import save_tiny

from fused_steer import SteerConfig, patch_model
from fused_steer.joint import load_joint, save_joint


@pytest.fixture
def place(tmp_path):
    """Make a folder with a model, an adapter and a joint save made for a model of another name, and prompts."""
    save_tiny(tmp_path / "copy")
    model = build()
    model.name_or_path = "original"
    model.config._name_or_path = "original"
    model = patch_model(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])), SteerConfig(rank=2))
    randomize(model)
    save_joint(model, tmp_path / "joint")
    model.steering.save(tmp_path / "polite")
    (tmp_path / "p.txt").write_text("a cat sat\n" * 8)
    (tmp_path / "boolq").mkdir()
    row = {"question": "is it", "passage": "it is", "answer": True}
    for split in ("train", "validation", "test"):
        (tmp_path / "boolq" / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * 4)
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        "chat polite --model copy --new-tokens 2",
        "playground copy --adapter polite",
        "eval paper:boolq --model copy --adapter polite --data . --no-base --limit 1",
        "eval paper:boolq --model copy --adapter joint --data . --no-base --limit 1",
        "fit copy polite --prompts p.txt --rank 1 --out out",
        "fit copy joint --prompts p.txt --rank 1 --out out",
        "diagnose copy --adapter polite --prompts p.txt --out out",
        "diagnose copy --joint joint --prompts p.txt --out out",
    ],
)
def test_check_base_of_each_command(words, place, monkeypatch):
    if words.startswith("diagnose") and importlib.util.find_spec("matplotlib") is None:
        pytest.skip("needs matplotlib")
    shown = []
    monkeypatch.setattr("fused_steer.playground.command.check_gradio", lambda: None)
    monkeypatch.setattr("fused_steer.playground.command.build_page", lambda model, *_: shown.append(model))
    monkeypatch.setattr("fused_steer.playground.command.launch", lambda *_: None)
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", False)  # its bars are no part of the message
    monkeypatch.chdir(place)
    refused = invoke(*words.split(), "--device", "cpu")
    assert "is for the base model 'original'; expected" in refused.stderr and "--no-check-base" in refused.stderr
    assert refused.exit_code == 1
    found = invoke(*words.split(), "--device", "cpu", "--no-check-base")
    assert found.exit_code == 0, found.output
    assert len(shown) == words.startswith("playground")


def test_check_base_of_a_joint_save(place):
    model = build()
    model.config._name_or_path = "copy"
    with pytest.raises(ValueError, match="check_base=False"):
        load_joint(model, place / "joint")
    assert load_joint(model, place / "joint", check_base=False).steering.names == ["default"]
