"""Steering in the checkpoints of transformers' Trainer, where PEFT keeps the Trainer from writing whole models.

A model without PEFT needs none of this: its checkpoints hold all parameters. Of a model that PEFT has wrapped or
adapted the Trainer saves and resumes PEFT's adapters alone.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .joint import steering_of

#: Where a checkpoint has the steering adapter in use, in a folder of its name. One level deeper than where the Trainer
#: looks for further adapters of PEFT's.
CHECKPOINT_FOLDER = "fused_steer"


class SteeringCallback(TrainerCallback):
    """Saves the steering adapter in use with every checkpoint, and takes it back when training is resumed.

    `Trainer(model, ..., callbacks=[SteeringCallback()])`. With `load_best_model_at_end` the best checkpoint's steering
    is loaded at the end, as its LoRA is.

    Args:
        resume_from: the checkpoint that training is resumed from, where it is not in the arguments' `output_dir`.
    """

    def __init__(self, resume_from: str | os.PathLike[str] | None = None) -> None:
        self.resume_from = resume_from

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raises ValueError if the model is not steered, FileNotFoundError if the checkpoint lacks the steering."""
        steering = steering_of(kwargs["model"])
        if state.global_step:
            steering.restore(self._folder(self.resume_from or _checkpoint(args, state), steering.active))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        steering = steering_of(kwargs["model"])
        steering.save(self._folder(_checkpoint(args, state), steering.active))  # in each process, for it may be sharded

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            steering = steering_of(kwargs["model"])
            steering.restore(self._folder(state.best_model_checkpoint, steering.active))

    @staticmethod
    def _folder(checkpoint: str | os.PathLike[str], name: str | None) -> Path:
        return Path(checkpoint, CHECKPOINT_FOLDER, str(name))


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir), f"checkpoint-{state.global_step}")
