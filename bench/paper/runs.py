"""Selects the runs, does each, and saves its results file. A run with a results file is not repeated.

The learning rate is chosen by validation accuracy with the first seed. The other seeds run at that rate. The test split
decides nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer

from fused_steer._hub_access import reaching_hub
from fused_steer.paper.answering import Text
from fused_steer.paper.data import Example, Limits, is_generated, load
from fused_steer.paper.tasks import TASKS

from ..results import describe_machine, read_run, write_json
from .methods import METHODS
from .settings import Settings
from .training import test, train

SCHEMA = 2  # 1: `reft` edited the block's output
ADAPTER = "adapter"  # the folder of what a run trained, in the folder with the name of the results file
_DIAGNOSED = 32  # number of prompts for the pictures of a joint run


@dataclass(frozen=True, order=True)
class Key:
    """The identity of one run."""

    task: str
    method: str
    rate: float
    seed: int

    def __str__(self) -> str:
        return f"{self.task}, {self.method}, rate {self.rate:g}, seed {self.seed}"

    def file(self, folder: Path) -> Path:
        return folder / self.task / self.method / f"rate-{self.rate:g}-seed-{self.seed}.json"


def folder_of(out: Path, model: str) -> Path:
    """Return the folder of a model's results: `meta-llama/Llama-3.2-1B` -> `out/llama-3.2-1b`."""
    return out / re.sub(r"[^a-z0-9.]+", "-", Path(model).name.lower()).strip("-")


# ---------------------------------------------------------------------------------------------------------------- files


def read(file: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        ValueError: the file is no results file.
    """
    return read_run(file, "bench.paper", SCHEMA, {"key", "machine", "settings", "validation", "test"})


def found(folder: Path, key: Key, settings: Settings, save: bool = False) -> dict[str, Any] | None:
    """Return the results of a run, or None if it was not done.

    Raises:
        ValueError: the run was done with other settings, or its adapter is to be saved and was not.
    """
    file = key.file(folder)
    if not file.exists():
        return None
    content = read(file)
    ours, theirs = settings.to_json(), content["settings"]
    for name in ours:
        if theirs.get(name) != ours[name]:
            raise ValueError(
                f"{name} is {ours[name]!r} but {theirs.get(name)!r} in {file}; expected the same (or another --out)"
            )
    if save and METHODS[key.method].save is not None and not (file.with_suffix("") / ADAPTER).is_dir():
        raise ValueError(f"{file} has no saved adapter beside it; expected a run with --save (or another --out)")
    return content


# -------------------------------------------------------------------------------------------------------------- one run


def load_model(settings: Settings) -> tuple[Any, Text]:
    """Load the model, on the CPU, and its tokenizer.

    Raises:
        OSError: there is no such model.
        ValueError: the tokenizer has no end-of-sequence token, or no chat template that is asked for.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with reaching_hub(settings.model, "model"):
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {settings.model} has no end-of-sequence token; expected one to pad with")
    if settings.chat and not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {settings.model} has no chat template; expected one, or no --chat")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    with reaching_hub(settings.model, "model"):
        model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=getattr(torch, settings.dtype)).eval()
    return model, Text(tokenizer, settings.chat, settings.end)


@dataclass(frozen=True)
class Bench:
    """The model, settings and device that all runs share.

    Attributes:
        batch: the number of prompts per batch of generation.
        save: whether to save what each run trains.
    """

    model: Any
    text: Text
    settings: Settings
    device: torch.device
    batch: int
    save: bool = False

    def run(self, key: Key, data: Mapping[str, Sequence[Example]], folder: Path) -> dict[str, Any]:
        """Train a copy of the model and test it on the validation and the test split.

        folder: of the pictures, and of what was trained.
        """
        method, settings = METHODS[key.method], self.settings
        asked = {"new_tokens": settings.new_tokens, "max_length": settings.max_length}
        task = dataclasses.replace(TASKS[key.task], **{name: value for name, value in asked.items() if value})
        torch.manual_seed(key.seed)
        model, stages = method.attach(copy.deepcopy(self.model).to(self.device), settings, key.rate)
        train_on = data["train"] if stages else []
        rows = [self.text.features(example, task.max_length) for example in train_on]
        kept = [row for row, _ in rows if row is not None]
        if stages and not kept:
            raise ValueError(
                f"no training row of {key.task} has an answer within {task.max_length} tokens; expected one"
            )
        epochs = settings.epochs or task.epochs
        total = sum(p.numel() for p in self.model.parameters())
        done = [train(model, stage, method, kept, self.text.tokenizer, settings, epochs, key.seed) for stage in stages]
        if self.save and method.save is not None:
            folder.mkdir(parents=True, exist_ok=True)
            method.save(model, folder / ADAPTER)
        return {
            "trained": stages[-1].trained if stages else 0,
            "parameters": total,
            "training_rows": len(kept),
            "too_long": len(rows) - len(kept),
            "cut": sum(is_cut for row, is_cut in rows if row is not None),
            "stages": done,
            **{
                split: test(model, self.text, task, data[split], self.batch, f"{key.task}, {split}")
                for split in ("validation", "test")
            },
            "pictures": self._draw(key, model, data["validation"], folder),
        }

    def _draw(self, key: Key, model: Any, examples: Sequence[Example], folder: Path) -> list[str]:
        """Draw the pictures of a joint run with the first seed, after the paper's figures; return the files' names."""
        if "joint" not in key.method or key.seed or not hasattr(model, "steering"):
            return []
        from fused_steer.diagnostics import diagnose

        prompts = examples[:_DIAGNOSED]
        batches = [dict(self.text.batch(prompts[at : at + 8])) for at in range(0, len(prompts), 8)]
        return [file.name for file in diagnose(model, batches).save(folder)]


# ---------------------------------------------------------------------------------------------------------- all of them


def best(results: Sequence[Mapping[str, Any]]) -> float:
    """Return the rate with the best validation accuracy; on a tie, the smallest."""
    return min(results, key=lambda result: (-result["validation"]["accuracy"], result["key"]["rate"]))["key"]["rate"]


def search(
    task: str, method: str, rates: Sequence[float], seeds: int, do: Callable[[Key], Mapping[str, Any]]
) -> Iterator[Mapping[str, Any]]:
    """Run every rate with seed 0, then the other seeds at the best rate; yield the results. `do` does one run."""
    tried = []
    for rate in rates:
        tried.append(do(Key(task, method, rate, 0)))
        yield tried[-1]
    for seed in range(1, seeds if method != "untrained" else 1):
        yield do(Key(task, method, best(tried), seed))


def run_all(
    settings: Settings,
    out: Path,
    tasks: Sequence[str],
    rates: Mapping[str, Sequence[float]],
    seeds: int,
    device: torch.device,
    batch: int,
    save: bool = False,
) -> int:
    """Run every task with every method, with a results file for each run; return the number of new runs.

    Args:
        rates: the methods' names, with the rates to try.
        save: whether to save what each run trains, in `<results file without .json>/adapter`.

    Raises:
        ValueError, OSError, RuntimeError: a run failed; the results of earlier runs are saved.
    """
    folder, done = folder_of(out, settings.model), 0
    bench: Bench | None = None
    data: dict[str, dict[str, list[Example]]] = {}
    source, released = Path(settings.data) if settings.data else None, settings.splits == "released"

    def do(key: Key) -> Mapping[str, Any]:
        nonlocal bench, done
        before = found(folder, key, settings, save)
        if before is not None:
            return before
        if key.task not in data:
            limits = Limits(settings.train_limit, settings.evaluated_limit)
            data.clear()
            data[key.task] = load(key.task, source, limits, settings.listops_lengths, released=released)
        if bench is None:
            bench = Bench(*load_model(settings), settings, device, batch, save)
        typer.echo(str(key))
        file = key.file(folder)
        result = {
            "schema": SCHEMA,
            "key": vars(key),
            "settings": settings.to_json(),
            "generated": is_generated(key.task, source, released),
            "machine": describe_machine(device, "bench.paper"),
            **bench.run(key, data[key.task], file.with_suffix("")),
        }
        write_json(result, file)
        done += 1
        shown = ", ".join(f"{split} {100 * result[split]['accuracy']:.1f} %" for split in ("validation", "test"))
        typer.echo(f"{key}: {shown}, {result['test']['unreadable']} test answers could not be read")
        return result

    for task in tasks:
        for method, tried in rates.items():
            for _ in search(task, method, tried, seeds, do):
                pass
    return done
