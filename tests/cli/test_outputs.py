"""Tests of the commands' outputs: what cannot be written is refused before the work, and files are written whole."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from command import assert_refused, invoke, plain_output  # noqa: F401 - an autouse fixture
from models import build, randomize
from text import save_tiny

from fused_steer import SteerConfig, patch_model
from fused_steer.adapters import saving
from fused_steer.adapters.saving import write_whole
from fused_steer.recipes.figures import draw_losses

COMMANDS = {
    "fit": "fit base base --prompts p.txt --out",
    "extract": "extract pairs.jsonl --model base --out",
    "diagnose": "diagnose base --adapter polite --prompts p.txt --out",
    "demo": "demo --model base --out",
    "demo --record": "demo --model base --record",
    "train": "train recipe.yaml --set",
    "eval": "eval paper:boolq --model base --adapter polite --data . --out",
    "coverage": "coverage --only llama --out",
}

FILES = ("demo --record", "eval", "coverage")


@pytest.fixture
def place(tmp_path, monkeypatch):
    save_tiny(tmp_path / "base")
    model = patch_model(build(), SteerConfig(rank=2))
    randomize(model)
    model.steering.save(tmp_path / "polite")
    (tmp_path / "p.txt").write_text("a cat sat\n" * 8)
    (tmp_path / "pairs.jsonl").write_text('{"positive": "i am glad", "negative": "i am sad"}\n' * 4)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    recipe = "model: base\nout: x\ndata: {train: rows.jsonl, kind: completion}\nmethod: {}\ntraining: {max_steps: 1}\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    (tmp_path / "boolq").mkdir()
    row = {"question": "is it", "passage": "it is", "answer": True}
    for split in ("train", "validation", "test"):
        (tmp_path / "boolq" / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * 4)
    (tmp_path / "readonly").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def outcome(command: str, out: str):
    *words, last = COMMANDS[command].split()
    return invoke(*words, last, f"out={out}" if last == "--set" else out)


@pytest.mark.parametrize("command", COMMANDS)
def test_outputs_that_cannot_be_written_are_refused_before_the_work(command, place, monkeypatch):
    """An error of the system at the end, after the work, lost its results."""
    if command == "train":
        pytest.importorskip("trl")
    if command in ("diagnose", "extract", "demo", "demo --record"):
        pytest.importorskip("matplotlib")
    monkeypatch.setattr("fused_steer.tools.demo.load_model", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr("fused_steer.tools.coverage.check_all", lambda *_: pytest.fail("models were checked"))
    allowed = os.access

    def access(path, mode):  # root may write anywhere
        return not (mode & os.W_OK and "readonly" in str(path)) and allowed(path, mode)

    monkeypatch.setattr(saving.os, "access", access)
    for out in ("readonly/new",) if command in FILES else ("readonly", "readonly/new"):
        assert_refused(outcome(command, out), "readonly cannot be written; expected a path that can be")
    assert list((place / "readonly").iterdir()) == []


@pytest.mark.parametrize("command", ["fit", "extract"])
def test_outputs_in_a_folder_of_a_lora_are_refused_before_the_work(command, place, monkeypatch):
    pytest.importorskip("matplotlib")
    (place / "lora").mkdir()
    (place / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    monkeypatch.setattr("fused_steer.tools.demo.load_model", lambda *_: pytest.fail("a model was loaded"))
    assert_refused(outcome(command, "lora"), "lora holds an adapter of LORA; expected another directory")


def test_outputs_of_exports_below_a_file_name_it(place):
    for words in ("export pyreft polite --out p.txt/new", "export pyreft polite --out p.txt/new/er"):
        assert_refused(invoke(*words.split()), "p.txt is a file; expected a directory to save pyreft's files in")


def test_outputs_of_pictures_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    file = tmp_path / "losses.png"
    draw_losses([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], file)
    old = file.read_bytes()

    def full(opened):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        draw_losses([{"step": 1, "loss": 3.0}, {"step": 2, "loss": 9.0}], file)
    assert file.read_bytes() == old and os.listdir(tmp_path) == ["losses.png"]


def test_outputs_of_text_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "scores.json"
    write_whole(file, "old\n")
    (tmp_path / "link.json").symlink_to(file)

    def full(opened):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving.os, "fsync", full)
        for name in (file, tmp_path / "new.json", tmp_path / "link.json"):
            with pytest.raises(OSError, match="No space"):
                write_whole(name, "new\n")
    assert file.read_text() == "old\n" and sorted(os.listdir(tmp_path)) == ["link.json", "scores.json"]
    write_whole(tmp_path / "link.json", "new\n")
    assert file.read_text() == "new\n" and (tmp_path / "link.json").is_symlink()
    write_whole(Path(os.devnull), "new\n")
    assert not Path(os.devnull).is_file()
