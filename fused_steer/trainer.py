"""Save and restore steering adapters in the checkpoints of transformers' Trainer.

`SteeringTrainer` saves adapters without the frozen base: one folder with two small files that `patch_model` reads.
`SteeringCallback` is for a Trainer that cannot be subclassed, with a model wrapped by PEFT. There the Trainer itself
writes only PEFT's adapters, and the callback adds the steering. A callback cannot keep the base out of an unwrapped
model's checkpoints, because the Trainer has written it before callbacks run, and needs it to resume.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modelcard import extract_hyperparameters_from_trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ._version import __version__
from .adapters.card import CARD_NAME, CARD_TAGS, LIBRARY, Training, card_config, card_training, card_usage
from .adapters.files import refuse_foreign
from .adapters.kinds import CHECKPOINT_FOLDER, JOINT_NAME, method_in
from .joint import steering_of, steering_parameters
from .model.decoder import inside_peft
from .whole import running_trainer


class SteeringCallback(TrainerCallback):
    """Saves the active steering adapter with every checkpoint, and restores it when training resumes.

    Use: `Trainer(model, ..., callbacks=[SteeringCallback()])`. With `load_best_model_at_end` the best checkpoint's
    steering is loaded at the end, like its LoRA.

    Args:
        resume_from: the checkpoint to resume from, if it is not in the arguments' `output_dir`.
    """

    keeps_steering = True  # without this mark, a checkpoint that lacks the steering causes a warning

    def __init__(self, resume_from: str | os.PathLike[str] | None = None) -> None:
        self.resume_from = resume_from

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the steering of a resumed run.

        Raises:
            ValueError: the model is not steered, the checkpoint is another than the Trainer resumes from, or the
                reference model of a trainer of TRL would be steered.
            FileNotFoundError: the checkpoint lacks the steering.
        """
        steering = steering_of(kwargs["model"])
        if any(parameter.requires_grad for parameter in steering.parameters()):
            trainer, _ = running_trainer()
            if trainer is not None:
                _check_reference(trainer, kwargs["model"])
        if state.global_step:
            checkpoint = Path(self.resume_from or _checkpoint(args, state))
            _check_resumed(checkpoint, state)
            steering.restore(_folder(checkpoint, steering.active))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        steering = steering_of(kwargs["model"])
        steering.save(_folder(_checkpoint(args, state), steering.active))  # in every process: it may be sharded

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            steering = steering_of(kwargs["model"])
            steering.restore(_folder(state.best_model_checkpoint, steering.active))


def _folder(checkpoint: str | os.PathLike[str], name: str | None) -> Path:
    return Path(checkpoint, CHECKPOINT_FOLDER, str(name))


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir), f"checkpoint-{state.global_step}")


def _check_resumed(checkpoint: Path, state: TrainerState) -> None:
    """Check that the Trainer resumes from this checkpoint, as far as its log tells. No callback is told the path."""
    file = checkpoint / TRAINER_STATE_NAME
    if not file.is_file():
        return
    saved = TrainerState.load_from_json(str(file))
    here, resumed = ((one.global_step, json.dumps(one.log_history)) for one in (saved, state))
    if here != resumed:
        raise ValueError(
            f"{checkpoint} is not the checkpoint that the Trainer resumes from (another step or log); expected "
            "SteeringCallback(resume_from=...) with that one"
        )


def _check_reference(trainer: Any, model: nn.Module) -> None:
    """Check that a trainer of TRL with a reference model has one of its own, if the steering trains.

    Without one, TRL takes a model with a LoRA, with the LoRA off or as it was. The steering stays on and trains. At a
    beta of 0 GRPO has no reference.
    """
    none, beta = getattr(trainer, "ref_model", trainer) is None, getattr(trainer, "beta", None)
    if none and beta != 0 and inside_peft(model) is not model:
        raise ValueError(
            f"{type(trainer).__name__} has no ref_model, so its reference would be this model with the steering that "
            "trains; expected ref_model=fused_steer.trl.Reference(model), which is the base"
        )


def training_of(trainer: Trainer) -> Training:
    """Return how a Trainer has trained: hyper-parameters, data, evaluations and versions, for a model card.

    Any Trainer of transformers or TRL will do:
    `model.steering.push_to_hub("me/polite", training=training_of(trainer))`.
    """
    hyperparameters = extract_hyperparameters_from_trainer(trainer)
    hyperparameters |= {"weight_decay": trainer.args.weight_decay, "max_grad_norm": trainer.args.max_grad_norm}
    hyperparameters["steps_done"] = trainer.state.global_step
    sets = {"training": trainer.train_dataset}
    evaluated = trainer.eval_dataset
    sets |= (
        {f"evaluation ({name})": one for name, one in evaluated.items()}
        if isinstance(evaluated, dict)
        else {"evaluation": evaluated}
    )
    timings = ("_runtime", "_per_second")
    evaluations = [
        {name: value for name, value in entry.items() if not name.endswith(timings)}
        for entry in trainer.state.log_history
        if any(name.startswith("eval_") for name in entry)
    ]
    parameters = steering_parameters(trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False))
    return Training(
        hyperparameters=hyperparameters,
        data={use: _told(one) for use, one in sets.items() if one is not None},
        evaluation=evaluations,
        trained=sum(parameter.numel() for parameter in parameters),
        versions={"fused-steer": __version__, "transformers": transformers.__version__, "torch": torch.__version__},
    )


def _told(dataset: Any) -> str:
    """Describe a data set: its rows, its name and split if it has them, and its columns."""
    name, split = (getattr(dataset, field, None) for field in ("builder_name", "split"))
    rows = f"{len(dataset):,} rows" if hasattr(dataset, "__len__") else "a stream of rows"
    parts = [f"{rows} of {name}" if name else rows]
    if split:
        parts.append(f"split {split}")
    if columns := getattr(dataset, "column_names", None):
        parts.append(f"columns {', '.join(columns)}")
    return ", ".join(parts)


class SteeringTrainer(Trainer):
    """A Trainer for patched models. Its checkpoints and `save_model` hold the active steering adapter, not the base.

    A checkpoint is an adapter: `patch_model(model, "out/checkpoint-500")`. Resuming and `load_best_model_at_end`
    restore the steering from it. If PEFT has wrapped the model, PEFT's adapters are saved as usual, with the steering
    in `fused_steer/<adapter>/` beside them.

    Other Trainers can be combined with it, this class first: `class Mine(SteeringTrainer, SFTTrainer)`.
    """

    keeps_steering = True

    # Three private methods of Trainer decide which weights a checkpoint holds; there is no public way. They are the
    # same in transformers 5.17 to 5.24. A test fails if one is no longer called.

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does, after checking that checkpoints can hold all trained parameters.

        Raises:
            ValueError: the model is not steered, its steering does not train, other parameters train that a checkpoint
                would not hold, FSDP or DeepSpeed has sharded the parameters, `output_dir` or a checkpoint in it holds
                another kind of adapter, which the save of that step would meet, or the reference model of a trainer of
                TRL would be steered.
        """
        steering_parameters(self._patched())
        self._check_whole()
        _check_reference(self, self._patched())
        output_dir = Path(str(self.args.output_dir))
        for folder in (output_dir, *sorted(output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))):
            self._refuse_another_kind(folder)
        return super().train(*args, **kwargs)

    def _patched(self) -> nn.Module:
        """Return the patched model, without the wrappers of other libraries."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _wrapped_by_peft(self) -> bool:
        return inside_peft(self._patched()) is not self._patched()

    def _check_whole(self) -> None:
        """Check that the adapter holds everything that training changes."""
        model = self._patched()
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            how = "FSDP" if self.is_fsdp_enabled else "DeepSpeed"
            raise ValueError(
                f"{type(self).__name__} runs under {how}; expected one process or DDP (or a plain Trainer)"
            )
        if self._wrapped_by_peft():
            return  # PEFT saves the other trained parameters
        steered = {id(parameter) for parameter in steering_of(model).parameters()}
        others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in steered]
        if others:
            raise ValueError(
                f"{others[0]} trains ({len(others)} parameters that are not the steering's); expected only the "
                "steering in use, which is all that a checkpoint holds (or LoRA by get_peft_model)"
            )

    def _refuse_another_kind(self, folder: Path) -> None:
        """Check that a folder holds no adapter of another kind. PEFT would write over it, and `save` refuses it."""
        model: Any = self._patched()
        if inside_peft(model) is model:
            return refuse_foreign(folder)
        held = "a LoRA and steering together" if (folder / JOINT_NAME).is_file() else method_in(folder)
        if held not in (None, *(config.peft_type for config in model.peft_config.values())):
            raise ValueError(f"{folder} holds an adapter of {held}; expected another directory, to leave it alone")

    def _adapter_in(self, checkpoint: str | os.PathLike[str]) -> str:
        if self._wrapped_by_peft():
            return str(_folder(checkpoint, steering_of(self._patched()).active))
        return os.fspath(checkpoint)  # of ".", a Path would be refused as the empty path

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self._check_whole()
        target = output_dir if output_dir is not None else str(self.args.output_dir)
        self._refuse_another_kind(Path(target))
        if self._wrapped_by_peft():
            super()._save(target, state_dict)
        elif self.args.should_save:
            tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(target)
            os.makedirs(target, exist_ok=True)
            torch.save(self.args, os.path.join(target, TRAINING_ARGS_NAME))
        if self.args.should_save:
            steering_of(self._patched()).save(self._adapter_in(target))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._wrapped_by_peft():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        steering_of(self._patched()).restore(self._adapter_in(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self._wrapped_by_peft():
            super()._load_best_model()
        steering_of(self._patched()).restore(self._adapter_in(str(self.state.best_model_checkpoint)))

    # -------------------------------------------------------------------------------------------------------- the hub

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        beside = Path(checkpoint_folder, CHECKPOINT_FOLDER)
        if beside.is_dir():  # the Trainer copies only files that it knows
            shutil.copytree(beside, Path(str(self.args.output_dir), CHECKPOINT_FOLDER), dirs_exist_ok=True)
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write Trainer's model card, with sections on the adapter, how to load it, its data and its evaluation."""
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero() or self._wrapped_by_peft():
            return
        from huggingface_hub import ModelCard

        path = Path(str(self.args.output_dir), CARD_NAME)
        card = ModelCard.load(path)
        card.data.library_name = LIBRARY
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *CARD_TAGS]))
        base = card.data.base_model
        repo_id, config = self.hub_model_id or path.parent.absolute().name, steering_of(self._patched()).config()
        usage = card_usage(repo_id, base if isinstance(base, str) else None, config)
        training = card_training(training_of(self), hyperparameters="hyperparameters" not in card.text)
        own = f"## The adapter\n\n{usage}\n{card_config(config)}\n{training}"
        card.text = f"{card.text.rstrip()}\n\n{own}"
        card.save(path)
