"""`fused-steer eval`: evaluates a model and several adapters of it, and prints their scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters.saving import check_writable, write_whole
from ..model.decoder import find_decoder, meta_model
from ..tools.sources import check_parts, note_parts, parts_of, sources
from ..tools.variants import Variants
from .comparing import Score, check_tasks, compare_adapters
from .on_paper import ALL, PREFIX, load_documents, paper_tasks

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True)
class EvalOptions:
    """What `run` does. The command's options document each and hold the defaults.

    Raises:
        ValueError: a value out of range.
    """

    model: str | None
    adapters: list[str]
    tasks: list[str]
    base: bool
    limit: int | None
    shots: int | None
    batch_size: int
    seed: int
    out: Path | None
    device: str
    as_json: bool
    data: Path | None
    chat: bool
    check_base: bool = True

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name.replace('_', ' ')} is {value}; expected at least 1")
        for name in ("seed", "shots"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value}; expected 0 or more")
        if not self.base and not self.adapters:
            raise ValueError("neither --base nor an --adapter is given; expected one")
        if self.out is not None and not self.out.parent.is_dir():
            raise ValueError(f"out is {self.out}, and there is no directory {self.out.parent}; expected one")
        if self.out is not None and self.out.is_dir():
            raise ValueError(f"out is {self.out}, a directory; expected a file for the scores")
        if self.out is not None:
            check_writable(self.out)
        sources(self.adapters)
        if not self.tasks:
            raise ValueError("tasks is empty; expected names of tasks, or YAML files of tasks")
        paper = paper_tasks(self.tasks)
        if paper and self.shots:
            raise ValueError(f"shots is {self.shots}, and {PREFIX}{paper[0]} has no examples; expected it not given")
        for name, given in (("data", self.data is not None), ("chat", self.chat)):
            if given and not paper:
                raise ValueError(f"--{name} is given without a task of the paper; expected {ALL}, or {PREFIX}gsm8k")

    @property
    def harness_tasks(self) -> list[str]:
        """The tasks of lm-evaluation-harness."""
        return [task for task in self.tasks if task != ALL and not task.startswith(PREFIX)]


def scores_table(found: Sequence[Score]) -> Table:
    """A row for each adapter of each task's metric."""
    from rich.table import Table

    table = Table("task", "metric", "adapter", "documents", "mean", "95 %", f"less {found[0].adapter}", "95 % ")
    for column in table.columns:
        column.overflow = "fold"  # a narrow screen cuts no name
    for column in table.columns[3:]:
        column.justify = "right"
    for score in found:
        metric = score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
        row = [score.task, metric, score.adapter, str(score.documents), f"{score.mean:.3f}", _range(score.interval)]
        if score.difference is None or score.difference_interval is None:
            table.add_row(*row, "", "")
        else:
            table.add_row(*row, f"{score.difference:+.3f}", _range(score.difference_interval, "+"))
    table.caption = "95 %: bootstrap over documents; of the difference, pair by pair"
    return table


def _range(interval: tuple[float, float], sign: str = "") -> str:
    return " to ".join(f"{end:{sign}.3f}" for end in interval)


def run(options: EvalOptions, console: Console) -> None:
    """Load the model and its adapters, evaluate, and print the scores.

    Raises:
        ValueError, FileNotFoundError, KeyError: an adapter or a task is missing or does not fit.
        ImportError: lm-evaluation-harness is missing.
    """
    tasks = options.harness_tasks
    if tasks and find_spec("lm_eval") is None:
        raise ImportError("eval needs lm-evaluation-harness; `pip install 'fused-steer[eval]'`")
    from ..tools.demo import SMOLLM2, choose_device, load_model

    device = choose_device(options.device)
    if tasks:
        check_tasks(tasks)
    documents = load_documents(paper_tasks(options.tasks), options.data, options.limit)
    layout = None if options.model is None else find_decoder(meta_model(options.model)).layout
    adapters = {name: parts_of(source) for name, source in sources(options.adapters).items()}
    for parts in adapters.values():  # before the model is loaded
        check_parts(parts, layout, options.check_base)
    for source in sources(options.adapters).values():
        note_parts(source)
    model, tokenizer = load_model(options.model, device)
    if options.chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"--chat is given, and the tokenizer of {options.model} has no chat template; expected one")
    variants = Variants(model, adapters, options.check_base)
    names: list[str | None] = [*([None] if options.base else []), *adapters]
    found = compare_adapters(
        model,
        tokenizer,
        names,
        tasks,
        limit=options.limit,
        shots=options.shots,
        batch_size=options.batch_size,
        seed=options.seed,
        paper=documents,
        chat=options.chat,
        use=variants.use,
    )
    kinds = {name: parts.kind for name, parts in adapters.items()}
    fields = {"model": options.model or SMOLLM2, "adapters": kinds, "scores": [score.as_dict() for score in found]}
    if options.as_json:
        console.print(json.dumps(fields, indent=2), markup=False, highlight=False, soft_wrap=True)
    else:
        console.print(scores_table(found))
    if options.out is not None:  # last, so that a full disk loses no scores
        write_whole(options.out, json.dumps(fields, indent=2) + "\n")
