"""Tests of the pages in docs/: their Python runs, block after block, on tiny models."""

import importlib
import re
import runpy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import typer
from models import build, classifier, randomize, tokens
from pages import DOCS, run_page
from text import tokenizer
from transformers import TrainingArguments

import fused_steer
from fused_steer import SteerConfig, patch_model
from fused_steer.cli import app

PAGES = ["merging.md", "migrating.md", "modes.md", "peft.md", "positions.md", "vectors.md"]
# test_trainer.py and test_trl.py run trainer.md and trl.md


@pytest.mark.parametrize("page", PAGES)
def test_docs_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {
        "AutoModelForCausalLM": SimpleNamespace(from_pretrained=lambda name: build()),
        "AutoModelForSequenceClassification": SimpleNamespace(from_pretrained=lambda name, **_: classifier()),
        "ids": tokens(),
        "model": build(),
        "tokenizer": tokenizer(),
        "torch": torch,
    }
    run_page(page, names)


def test_docs_the_code_of_the_page_on_serving_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        patch_model(build(), SteerConfig(rank=4)).steering.save(tmp_path / "adapters" / name)
    ids = tokens(batch=3)
    names = {"model": build(), "ids": ids, "mask": torch.ones_like(ids)}
    run_page("serving.md", names)
    assert names["output"].shape == (3, ids.shape[1] + 4)
    assert "2 adapters, 2 in 2 slots of rank 8" in capsys.readouterr().out


def test_docs_the_code_of_the_page_on_the_playground_runs(capsys):
    model = patch_model(build(), SteerConfig(rank=4), adapter_name="pirate")
    randomize(model, "pirate")
    run_page("playground.md", {"model": model, "tokenizer": tokenizer()})
    assert [line.split(" ")[0] for line in capsys.readouterr().out.splitlines()] == ["base", "weak", "strong"]


def test_docs_the_code_of_the_page_on_theory_runs(capsys):
    ids = tokens(batch=4)
    names = {"base": build(), "tuned": build(seed=1), "ids": ids, "mask": torch.ones_like(ids)}
    run_page("theory.md", names)
    assert f"{names['found'].share:.1%} of the oracle" in capsys.readouterr().out


_PAGES = [*DOCS.glob("*.md"), DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"]
_COMMAND = re.compile(r"`pytest (?:-[sm] ?\w* )*((?:(?:tests|bench)/[\w/]+\.py ?)+)(?:-k (?:\"([^\"]+)\"|([\w-]+)))?`")


def commands() -> list[tuple[str, str, str]]:
    """Return each `pytest FILE ...` on the pages as (page, files, expression after -k)."""
    found = []
    for page in _PAGES:
        for files, quoted, word in _COMMAND.findall(" ".join(page.read_text(encoding="utf-8").split())):
            found.append((page.name, files, quoted or word))
    return found


def test_docs_tests_that_pages_name_are_there():
    """Every test command on a page works: the files exist, and -k selects a test in them."""
    assert len(commands()) > 60
    for page, files, expression in commands():
        code = "\n".join((DOCS.parent / file).read_text(encoding="utf-8") for file in files.split())
        tests = re.findall(r"^def (test_\w+)", code, re.MULTILINE)
        for word in expression.split(" or ") if expression else []:
            if "-" in word:  # a case's name
                continue
            assert any(word in test for test in tests), f"{page} names a test of {files} that is not there: {word}"


def test_docs_commands_and_their_options_are_there():
    """Each `fused-steer VERB --option` on a page is one that the command has."""
    options = {
        f"fused-steer {verb}": _options(command) for verb, command in typer.main.get_command(app).commands.items()
    }
    seen = set()
    for page in _PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        code = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        code += re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        for command, rest in re.findall(r"^(fused-steer [a-z]\S*)([^\n#|&]*)", "\n".join(code), re.MULTILINE):
            assert command in options, f"{page.name} names {command}"
            wrong = set(re.findall(r"(?<![\w-])--[a-z-]+", rest)) - options[command]
            assert not wrong, f"{page.name} gives {command} the options {wrong}"
            seen.add(command)
    assert len(seen) > 12


def _options(command) -> set[str]:
    found = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}
    return found.union(*(_options(one) for one in getattr(command, "commands", {}).values()))


def test_docs_every_guarantee_has_a_command():
    lines = [line for line in (DOCS / "guarantees.md").read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    promises = [line for line in lines if not line.startswith("| guarantee |")]
    assert len(promises) > 30
    for line in promises:
        assert re.search(r"\| `(pytest|fused-steer) [^`]+` \|$", line), line


def test_docs_the_code_of_the_first_pages_runs(tmp_path, monkeypatch):
    """The code of the first pages runs. Their block on SmolLM2 equals README's, which tests/test_readme.py runs."""
    monkeypatch.chdir(tmp_path)
    run_page("index.md", {"model": build()})
    patch_model(build(), SteerConfig(rank=8)).steering.save("pirate")
    names = {"model": build(), "patch_model": patch_model, "SteerConfig": SteerConfig}
    run_page("getting-started.md", names)
    assert not hasattr(names["model"], "steering")
    names = {"TrainingArguments": partial(TrainingArguments, use_cpu=True), "SteerConfig": SteerConfig}
    run_page("choosing.md", names)
    run_page("sites.md", {"model": build()})
    assert names["config"].layers == tuple(range(8, 16))
    assert names["arguments"].lr_scheduler_type == "constant" and names["arguments"].warmup_steps == 0


def test_docs_messages_of_troubleshooting_are_those_of_the_code():
    """Each message in docs/troubleshooting.md occurs in the sources. Its … stand for any text."""
    root = DOCS.parent
    sources = [
        file.read_text(encoding="utf-8")
        for folder in ("fused_steer", "kernels")
        for file in (root / folder).rglob("*.py")
    ]
    code = re.sub(r"\"\s*\n\s*f?\"", "", "\n".join(sources))  # join messages that are split over lines
    cells = re.findall(r"^\| (.*?) \|", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    messages = [message for cell in cells for message in re.findall(r"`([^`]*[ …][^`]*)`", cell)]
    assert len(messages) > 20
    for message in messages:
        for part in message.split("…"):
            assert part.strip() in code, f"no message has {part.strip()!r}"


def test_docs_every_public_name_is_in_the_reference():
    listed = re.findall(r"^::: (\S+)\.(\w+)$", (DOCS / "reference.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(fused_steer.__all__) - {"__version__"} <= {name for _, name in listed}
    for module, name in listed:
        if module != "fused_steer.trl" or importlib.util.find_spec("trl"):
            home = re.sub(r"^kernels\b", "fused_steer.kernels", module)
            assert getattr(importlib.import_module(home), name).__doc__, f"{module}.{name}"


def test_docs_a_link_out_of_docs_leads_to_the_repository(caplog):
    hook = runpy.run_path(str(DOCS / "site.py"))["on_page_markdown"]
    page = SimpleNamespace(file=SimpleNamespace(src_uri="trainer.md"))
    config = SimpleNamespace(repo_url="https://example.org/here")
    text = hook("[a](../examples/train_trainer.py) [b](peft.md#files)", page=page, config=config)
    assert text == "[a](https://example.org/here/blob/main/examples/train_trainer.py) [b](peft.md#files)"
    assert not caplog.records
    hook("[a](../examples/none.py)", page=page, config=config)
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # an error with --strict


def test_docs_no_page_names_a_page_that_is_not_there():
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"\]\(((?!https?:)[^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} names {target}"
