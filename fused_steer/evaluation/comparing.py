"""`compare_adapters`: scores of several adapters of one model on the same documents, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .._hub_access import reaching_hub
from ..config import checked_bool
from ..joint import steering_of
from ..paper.data import Example
from .on_paper import outcomes

#: Bootstrap resamples of the documents.
_RESAMPLES = 10_000
#: The interval's ends: 95 % of the resamples lie between them.
_LEVELS = (0.025, 0.975)


@dataclass(frozen=True)
class Score:
    """A metric's mean over a task's documents.

    Attributes:
        task, metric, filter: as lm-evaluation-harness names them.
        adapter: the adapter's name, "base" for the base model.
        documents: their number.
        mean: of the metric.
        interval: the 95 % bootstrap interval of the mean.
        difference: the mean less that of the first adapter, on the same documents; None for the first.
        difference_interval: its 95 % bootstrap interval, over documents, pair by pair.
    """

    task: str
    metric: str
    filter: str
    adapter: str
    documents: int
    mean: float
    interval: tuple[float, float]
    difference: float | None
    difference_interval: tuple[float, float] | None

    def as_dict(self) -> dict[str, Any]:
        """Return the score as JSON data."""
        return asdict(self)


def compare_adapters(
    model: Any,
    tokenizer: Any,
    adapters: Sequence[str | None],
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    paper: Mapping[str, Sequence[Example]] | None = None,
    chat: bool = False,
    use: Callable[[str | None], Any] | None = None,
) -> list[Score]:
    """Evaluate a model by each of several adapters, on the same documents.

    Args:
        model: a patched model.
        tokenizer: its tokenizer.
        adapters: names of the model's adapters; None is the base model. The others are compared with the first.
        tasks: names of lm-evaluation-harness's tasks, or YAML files of tasks, which may name local data.
        limit: use only the first so many documents.
        shots: examples before each document. None: the task's own number.
        batch_size: documents at a time.
        seed: of the bootstrap.
        paper: documents of the paper's tasks, from `load_documents`, which are evaluated too.
        chat: whether prompts of the paper's tasks are in the chat template.
        use: lets the model compute by an adapter, such as `Variants.use`. None: `model.steering.use`.

    Raises:
        KeyError: the model has no such adapter.
        RuntimeError: steering is disabled, or a batch is running.
        ValueError: the model is not patched, or a task is unknown, or has no metric that is a number for each document.
    """
    checked_bool("chat", chat)
    steering = steering_of(model)
    steering.check_measurable("compare_adapters is called")
    if use is None:
        for name in adapters:
            if name is not None:
                steering.config(name)
    switch, active = steering.use if use is None else use, steering.active
    values = []
    try:
        for name in adapters:
            switch(name)
            found = _values(model, tokenizer, tasks, limit, shots, batch_size) if tasks else {}
            found |= outcomes(model, tokenizer, paper or {}, batch_size=batch_size, chat=chat)
            values.append(found)
    finally:
        switch(active if use is None else None)
    return scores(dict(zip(("base" if name is None else name for name in adapters), values, strict=True)), seed)


#: The metric of each document, by document; for each task, metric and filter.
Values = Mapping[tuple[str, str, str], Mapping[int, float]]


def scores(by_adapter: Mapping[str, Values], seed: int = 0) -> list[Score]:
    """Return the means, their intervals, and the paired differences from the first adapter.

    Raises:
        ValueError: the adapters were not evaluated on the same documents.
    """
    first = next(iter(by_adapter))
    found = []
    for key, reference in by_adapter[first].items():
        documents = sorted(reference)
        resampled = np.random.default_rng(seed).integers(len(documents), size=(_RESAMPLES, len(documents)))
        base = np.array([reference[i] for i in documents])
        for name, values in by_adapter.items():
            if sorted(values.get(key, {})) != documents:
                raise ValueError(f"{name} and {first} have other documents of {key[0]}; expected the same")
            own = np.array([values[key][i] for i in documents])
            difference = None if name == first else float((own - base).mean())
            found.append(
                Score(
                    *key[:2],
                    key[2],
                    name,
                    len(documents),
                    float(own.mean()),
                    _interval(own, resampled),
                    difference,
                    None if name == first else _interval(own - base, resampled),
                )
            )
    return found


def _interval(values: np.ndarray, resampled: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values[resampled].mean(1), _LEVELS)
    return float(low), float(high)


def _values(
    model: Any, tokenizer: Any, tasks: Sequence[str], limit: int | None, shots: int | None, batch_size: int
) -> dict[tuple[str, str, str], dict[int, float]]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    named = [task for task in tasks if not Path(task).is_file()]  # their data are on the hub
    with reaching_hub(", ".join(named) or None, "data of the harness's"):
        result: Any = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            log_samples=True,
            bootstrap_iters=0,
            task_manager=_manager(tasks),
        )
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for task, samples in result["samples"].items():
        for sample in samples:
            for metric in sample["metrics"]:
                value = sample[metric]
                if isinstance(value, (bool, int, float)):
                    key = (task, metric, sample["filter"])
                    found.setdefault(key, {})[sample["doc_id"]] = float(value)
        if not any(key[0] == task for key in found):
            raise ValueError(f"the task {task} has no metric that is a number for each document; expected one")
    return found


def _manager(tasks: Sequence[str]) -> Any:
    """Return the manager of tasks. The harness's own ones are looked through only if one is named."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=not all(Path(task).is_file() for task in tasks))


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse tasks that are unknown, before a model is loaded.

    Raises:
        FileNotFoundError: a file of a task is not there.
        ValueError: the harness has no such task.
    """
    for task in tasks:
        if Path(task).suffix in (".yaml", ".yml") and not Path(task).is_file():
            raise FileNotFoundError(f"no file {task}; expected a task of lm-evaluation-harness")
    named = [task for task in tasks if not Path(task).is_file()]
    if named:
        known = _manager(tasks)
        for task in named:
            if not known.match_tasks([task]):
                raise ValueError(f"the task is {task!r}; expected one of lm-evaluation-harness's, or a YAML file")
