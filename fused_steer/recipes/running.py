"""`train`: a recipe's run, by TRL's and transformers' trainers with the checkpoints of `SteeringTrainer`."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..adapters.files import refuse_foreign
from ..adapters.hub import CARD_NAME, model_card
from ..adapters.kinds import JOINT_NAME, LORA_TYPE, method_in
from ..adapters.saving import check_output, made_folder, write_whole
from ..diagnostics import diagnose
from ..diagnostics.diagnosis import Diagnosis
from ..diagnostics.figures import check_matplotlib
from ..joint import lora_parameters, refuse_adapter_beside, save_joint, steering_parameters
from ..model.decoder import find_decoder, meta_model, refuse_adapter
from ..patch import patch_model
from ..tools.loading import load_causal, load_tokenizer
from ..tools.prompts import encode, refuse_long_texts, room_of, templated
from .figures import draw_losses, draw_shifts
from .recipe import Recipe, Training
from .rows import Row, read_rows, text_of, tokens_without_end

JSON_NAME, LOSSES_NAME, SHIFTS_NAME = "training.json", "losses.png", "shifts.png"
#: The file of a checkpoint that transformers' Trainer writes last.
_STATE_NAME = "trainer_state.json"
#: The rows that the shifts are measured on.
_MEASURED = 32


@dataclass(frozen=True)
class Trained:
    """The result of `train`.

    Attributes:
        recipe: the recipe.
        rows: the number of rows trained on and evaluated on.
        trained, total: the numbers of trained parameters and of all.
        loss_before, loss_after: the mean loss of the evaluated rows; None without such rows.
        history: the Trainer's log.
        diagnosis: the shifts of each layer; None with a LoRA alone.
        files: the written files.
    """

    recipe: Recipe
    rows: tuple[int, int]
    trained: int
    total: int
    loss_before: float | None
    loss_after: float | None
    history: list[dict[str, Any]]
    diagnosis: Diagnosis | None
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Plan:
    """A checked recipe: its rows, and the arguments of the trainer."""

    recipe: Recipe
    kind: str
    train: list[Row]
    held_out: list[Row]
    arguments: Any


def check(recipe: Recipe) -> Plan:
    """Check everything of a recipe that needs no weights.

    Raises:
        ValueError, TypeError, FileNotFoundError: data without the columns, layers that the model lacks, arguments that
            TRL has not.
        ImportError: TRL, datasets, PEFT or matplotlib is missing.
    """
    check_matplotlib()
    _check_installed()
    kind, rows, held_out = read_rows(recipe.data)
    config = recipe.steer_config()
    if recipe.model is not None:
        refuse_adapter(recipe.model)
    if recipe.model is not None and config is not None:
        layout = find_decoder(meta_model(recipe.model)).layout
        layout.indices(config)
    return Plan(recipe, kind, rows, held_out, _arguments(recipe, kind, bool(held_out)))


def train(recipe: Recipe, *, resume: bool = False, say: Callable[[str], None] = lambda line: None) -> Trained:
    """Train by a recipe. Write the adapter, a model card, pictures and figures to `recipe.out`, checkpoints below it.

    Under `accelerate launch` or torchrun each process calls this; the first one writes.

    Args:
        recipe: the recipe.
        resume: continue from the last checkpoint in `recipe.out`/run.
        say: is given lines about the run, by the first process.

    Raises:
        ValueError, TypeError, FileNotFoundError, ImportError: see `check` and `check_out`; or the checkpoint is of more
            steps than the recipe has.
        RuntimeError: the loss is not finite.
    """
    plan = check(recipe)
    last = check_out(recipe, resume)
    with made_folder(Path(recipe.out, "run")):  # by the trainer, before it is known whether the rows can be trained on
        trainer, tokenizer = _trainer(plan)
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        _check_room(trainer, room_of(model))
    first = trainer.is_world_process_zero()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    if first:
        say(f"model     {recipe.model or 'SmolLM2-135M-Instruct'}, {model.dtype} on {trainer.args.device}")
        say(f"method    {_told(recipe)}; {trained:,} of {total:,} parameters train ({trained / total:.3%})")
        say(f"data      {len(plan.train)} rows ({plan.kind}) to train on, {len(plan.held_out)} to evaluate on")
        if not getattr(trainer.args, "packing", False) and len(trainer.train_dataset) < len(plan.train):
            cut = len(plan.train) - len(trainer.train_dataset)
            say(f"cut       {cut} rows are left out: their completion begins beyond {trainer.args.max_length} tokens")
    before = trainer.evaluate()["eval_loss"] if plan.held_out else None
    if last is not None and _steps_done(last) == recipe.training.max_steps:  # the Trainer would do a step more
        trainer._load_from_checkpoint(last)
        trainer.state = type(trainer.state).load_from_json(str(Path(last, _STATE_NAME)))
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
            trainer._load_best_model()
    else:
        trainer.add_callback(_refusing_more_steps())
        trainer.train(resume_from_checkpoint=last)
    after = trainer.evaluate()["eval_loss"] if plan.held_out else None
    for loss in (after, *(row["loss"] for row in trainer.state.log_history if "loss" in row)):
        if loss is not None and not math.isfinite(loss):
            raise RuntimeError(f"the loss is {loss}; expected a finite one (try a smaller training.learning_rate)")
    _save(recipe, model, first)
    diagnosis = None
    history = [dict(row) for row in trainer.state.log_history]
    found = Trained(recipe, (len(plan.train), len(plan.held_out)), trained, total, before, after, history, None, ())
    if not first:
        return found
    if recipe.method.kind != "lora":
        texts = [text_of(row) for row in (plan.held_out or plan.train)[:_MEASURED]]
        diagnosis = diagnose(model, encode(tokenizer, texts, recipe.data.longest, recipe.training.batch_size))
    found = dataclasses.replace(found, diagnosis=diagnosis)
    return dataclasses.replace(found, files=_write(found, model))


def check_out(recipe: Recipe, resume: bool) -> str | None:
    """Check that `recipe.out` can take what the run writes. Return the checkpoint to resume from, or None.

    A new run beside an earlier one's checkpoints would mix them up: the Trainer resumes from the one of most steps.

    Raises:
        FileNotFoundError: there is no checkpoint to resume from, or the last one is not whole.
        ValueError: without `resume` there are checkpoints of an earlier run; or `out` holds an adapter of another kind,
            or cannot be written.
    """
    from transformers.trainer_utils import get_last_checkpoint

    out, run = Path(recipe.out), Path(recipe.out, "run")
    check_output(out)
    last = get_last_checkpoint(str(run)) if run.is_dir() else None
    if resume:
        if last is None:
            raise FileNotFoundError(f"{run} has no checkpoint; expected one to resume from")
        if not Path(last, _STATE_NAME).is_file():
            raise FileNotFoundError(
                f"{last} has no {_STATE_NAME}, as a save that was killed leaves it; expected a whole checkpoint "
                "(remove that folder to resume from the one before)"
            )
    if not resume and last is not None:
        raise ValueError(f"{last} is of an earlier run; expected --resume to continue it, another out, or no {run}")
    kind = recipe.method.kind
    if kind == "steering":
        refuse_foreign(out)
    elif kind == "lora":
        held = "a LoRA and steering together" if (out / JOINT_NAME).is_file() else method_in(out)
        if held not in (None, LORA_TYPE):
            raise ValueError(f"{out} holds {held}; expected another out for a LoRA, to leave it alone")
    else:
        refuse_adapter_beside(out)
    return last


def _steps_done(checkpoint: str) -> int:
    return int(checkpoint.rpartition("-")[2])


def _refusing_more_steps() -> Any:
    """Return a callback that refuses a checkpoint of more steps than the run has, which the Trainer counts."""
    from transformers import TrainerCallback

    class Refusing(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step > state.max_steps:
                raise ValueError(
                    f"the last checkpoint is of step {state.global_step}; expected at most {state.max_steps}, the "
                    "steps of the recipe"
                )

    return Refusing()


def _check_installed() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("trl", "datasets", "peft") if find_spec(name) is None]
    if missing:
        raise ImportError(f"training by a recipe needs {' and '.join(missing)}; `pip install 'fused-steer[trl]'`")


def _told(recipe: Recipe) -> str:
    config, lora = recipe.steer_config(), recipe.method.lora
    parts = []
    if config is not None:
        parts.append(
            "vectors" if config.form == "vector" else f"{config.form} of rank {config.rank}, {config.activation}"
        )
    if recipe.method.kind != "steering":
        parts.append(f"LoRA of rank {lora.rank}")
    schedule, warmup = recipe.schedule
    warm = f", warm-up {warmup:g}" if warmup else ""
    return f"{recipe.method.kind} ({' and '.join(parts)}), learning rate {recipe.rates[0]:g}, {schedule}{warm}"


#: The recipe's keys for fields of TRL's arguments, which would say otherwise than the recipe.
_KEYS = {
    "output_dir": "out",
    "learning_rate": "training.learning_rate",
    "lr_scheduler_type": "training.schedule",
    "warmup_steps": "training.warmup",
    "warmup_ratio": "training.warmup",
    "num_train_epochs": "training.epochs",
    "per_device_train_batch_size": "training.batch_size",
    "per_device_eval_batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.accumulate",
    "max_length": "data.max_length",
    **{
        name: f"training.{name}"
        for name in (
            *("max_steps", "weight_decay", "max_grad_norm", "seed", "eval_steps", "save_steps", "logging_steps"),
            *("report_to", "gradient_checkpointing", "beta"),
        )
    },
}


#: Fields of TRL's arguments that only an optimizer of the Trainer's own reads.
_OF_OPTIMIZERS = ("optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon")


def _arguments(recipe: Recipe, kind: str, evaluates: bool) -> Any:
    """Return TRL's arguments for the recipe."""
    from trl import DPOConfig, SFTConfig

    t, gpu = recipe.training, torch.accelerator.is_available()
    schedule, warmup = recipe.schedule
    fields: dict[str, Any] = {
        "output_dir": str(Path(recipe.out, "run")),
        "learning_rate": recipe.rates[0],
        "lr_scheduler_type": schedule,
        "warmup_steps": warmup,  # a share of the steps, below 1
        "num_train_epochs": t.epochs,
        "max_steps": -1 if t.max_steps is None else t.max_steps,
        "per_device_train_batch_size": t.batch_size,
        "per_device_eval_batch_size": t.batch_size,
        "gradient_accumulation_steps": t.accumulate,
        "weight_decay": t.weight_decay,
        "max_grad_norm": t.max_grad_norm,
        "seed": t.seed,
        "eval_strategy": "no" if not evaluates else "epoch" if t.eval_steps is None else "steps",
        "eval_steps": t.eval_steps,
        "save_strategy": "epoch" if t.save_steps is None else "steps",
        "save_steps": 500 if t.save_steps is None else t.save_steps,
        "logging_steps": t.logging_steps,
        "report_to": t.report_to,
        "gradient_checkpointing": t.gradient_checkpointing,
        "max_length": recipe.data.longest,
        "bf16": gpu,  # TRL's default is True, but TRL refuses that on a CPU
        **({"beta": t.beta} if kind == "preference" else {}),
        **({} if recipe.data.ends else {"completion_only_loss": True}),  # TRL's default only for rows of texts
    }
    if t.eval_steps is not None and not evaluates:
        raise ValueError(f"training.eval_steps is {t.eval_steps}, and no rows are held out; expected some, or no steps")
    if kind != "preference" and t.beta != Training.beta:
        raise ValueError(f"training.beta is {t.beta} with rows of kind {kind}; expected rows of kind preference")
    for name in t.arguments:
        if name in _KEYS:
            raise ValueError(f"training.arguments has {name}; expected the recipe's own key, {_KEYS[name]}")
    ignored = [name for name in t.arguments if name in _OF_OPTIMIZERS] if "joint" in recipe.method.kind else []
    if ignored:
        raise ValueError(
            f"training.arguments has {ignored[0]} with kind {recipe.method.kind!r}, which trains by torch's AdamW "
            "with a learning rate for each part; expected it not given"
        )
    cls = DPOConfig if kind == "preference" else SFTConfig
    known = [one.name for one in dataclasses.fields(cls)]
    for name in t.arguments:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1, 0.5)
            raise ValueError(
                f"the recipe has an unknown key training.arguments.{name}; expected "
                f"{nearest[0] if nearest else f'a field of {cls.__name__}'}"
            )
    return cls(**fields | t.arguments)


def _trainer(plan: Plan) -> tuple[Any, Any]:
    """Load and prepare the model. Return its trainer and its tokenizer.

    Raises:
        ValueError: the chat template fails on a row; or see `_load`.
    """
    from datasets import Dataset

    recipe = plan.recipe
    model, tokenizer = _load(recipe, chats=any(isinstance(value, list) for value in plan.train[0].values()))

    def dataset(rows: list[Row]) -> Any:
        if recipe.data.ends:
            return Dataset.from_list(rows)  # TRL tokenizes it
        return Dataset.from_list(tokens_without_end(tokenizer, rows, plan.arguments.max_length, recipe.data.source))

    torch.manual_seed(recipe.training.seed)
    config, method = recipe.steer_config(), recipe.method
    options: dict[str, Any] = {}
    if method.kind != "steering":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=method.lora.rank,
            lora_alpha=method.lora.alpha,  # type: ignore[arg-type] # PEFT accepts any number
            lora_dropout=method.lora.dropout,
            target_modules=method.lora.target_modules,
            task_type="CAUSAL_LM",
        )
        if method.kind == "lora":
            options["peft_config"] = lora  # of a wrapped model TRL would make a copy of the LoRA the reference
        else:
            model = get_peft_model(model, lora)
    if config is not None:
        model = patch_model(model, config)
    options |= {
        "args": plan.arguments,
        "train_dataset": dataset(plan.train),
        "eval_dataset": dataset(plan.held_out) if plan.held_out else None,
        "processing_class": tokenizer,
    }
    if "joint" in method.kind:
        groups = [
            {"params": part, "lr": rate}
            for part, rate in zip((steering_parameters(model), lora_parameters(model)), recipe.rates, strict=True)
        ]
        options["optimizers"] = (torch.optim.AdamW(groups, weight_decay=recipe.training.weight_decay), None)
    try:
        return _trainer_class(method.kind, plan.kind)(model, **options), tokenizer
    except Exception:  # a chat template may raise any
        for messages in map(text_of, (*plan.train, *plan.held_out)):
            if isinstance(messages, list):
                templated(tokenizer, messages, tokenize=False)
        raise


def _trainer_class(method: str, kind: str) -> Any:
    from trl import DPOTrainer, SFTTrainer

    from ..trl import SteeringDPOTrainer, SteeringSFTTrainer

    if method == "lora":
        return DPOTrainer if kind == "preference" else SFTTrainer
    return SteeringDPOTrainer if kind == "preference" else SteeringSFTTrainer


def _load(recipe: Recipe, chats: bool) -> tuple[Any, Any]:
    """Return the model and its tokenizer.

    Raises:
        ValueError: the rows are chats, and the tokenizer has no chat template.
    """
    if recipe.model is None:
        from ..tools.demo import load_smollm2

        return load_smollm2()
    gpu = torch.accelerator.is_available()
    tokenizer = load_tokenizer(recipe.model)
    if chats and not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"the tokenizer of {recipe.model} has no chat template; expected one, as the rows are chats")
    dtype = torch.bfloat16 if gpu else torch.float32
    return refuse_long_texts(load_causal(recipe.model, dtype)), tokenizer


def _check_room(trainer: Any, most: int | None) -> None:
    """Check that each row of texts fits the model's table of positions; preferences are checked in their first pass.

    Args:
        trainer: with the rows that TRL has left, in tokens.
        most: the positions of the model, or None.

    Raises:
        ValueError: a row does not fit, or no row to train or to evaluate on is left.
    """
    for name, rows in (("train", trainer.train_dataset), ("evaluate", trainer.eval_dataset)):
        if rows is not None and not len(rows):
            raise ValueError(
                f"no row to {name} on has a completion within {trainer.args.max_length} tokens; expected one "
                "(data.max_length)"
            )
        if most is None or rows is None or "input_ids" not in rows.column_names:
            continue
        longest = min(max(map(len, rows["input_ids"])), trainer.args.max_length or math.inf)
        if longest > most:
            raise ValueError(
                f"a row has {longest} tokens; expected at most {most}, the positions of the model (data.max_length)"
            )


def _save(recipe: Recipe, model: Any, first: bool) -> None:
    """Save what was trained: the adapter, the LoRA, or both as `save_joint` does."""
    kind = recipe.method.kind
    if kind == "steering":
        model.steering.save(recipe.out)
    elif kind == "lora":
        if first:
            model.save_pretrained(recipe.out)
    else:
        save_joint(model, recipe.out)


def _write(found: Trained, model: Any) -> tuple[Path, ...]:
    """Write the model card, the pictures and the figures."""
    out = Path(found.recipe.out)
    files = []
    with contextlib.suppress(ValueError):  # nothing was logged: fewer steps than logging_steps
        draw_losses(found.history, out / LOSSES_NAME)
        files.append(out / LOSSES_NAME)
    if found.diagnosis is not None:
        files += draw_shifts(found.diagnosis, out, SHIFTS_NAME)
    fields = {
        "fused_steer_version": __version__,
        "recipe": found.recipe.to_dict(),
        "rows": list(found.rows),
        "trained_parameters": found.trained,
        "parameters": found.total,
        "eval_loss_before": found.loss_before,
        "eval_loss_after": found.loss_after,
        "shifts": None if found.diagnosis is None else found.diagnosis.to_json()["layers"],
        "history": found.history,
    }
    write_whole(out / JSON_NAME, json.dumps(fields, indent=2) + "\n")
    files.append(out / JSON_NAME)
    if found.recipe.method.kind == "steering":
        write_whole(out / CARD_NAME, _card(found, model))
        files.append(out / CARD_NAME)
    return tuple(files)


def _card(found: Trained, model: Any) -> str:
    """Return the adapter's model card, with the recipe and the evaluation."""
    import yaml

    file = model.steering.files(None)[model.steering.active]
    recipe = yaml.safe_dump(found.recipe.to_dict(), sort_keys=False, allow_unicode=True)
    card = model_card(file, Path(found.recipe.out).name)
    text = f"{card}\n## Training\n\nTrained on {found.rows[0]} rows of `{found.recipe.data.source}`, by this recipe of "
    text += f"`fused-steer train`:\n\n```yaml\n{recipe}```\n"
    if found.loss_before is not None and found.loss_after is not None:
        text += (
            f"\n## Evaluation\n\nMean loss of {found.rows[1]} rows that were not trained on: {found.loss_before:.4f} "
            f"before training, {found.loss_after:.4f} after it.\n"
        )
    return text
