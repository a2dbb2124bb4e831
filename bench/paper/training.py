"""Training with transformers' Trainer, and testing by greedy generation."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from fused_steer.paper.answering import IGNORED, Text, answers, reachable
from fused_steer.paper.data import Example
from fused_steer.paper.tasks import Task

from .methods import Method, Stage
from .settings import Settings


class _PenalisedTrainer(Trainer):
    """A Trainer that adds a stage's penalty to the loss and records every step's loss."""

    def __init__(self, stage: Stage, **options: Any) -> None:
        super().__init__(**options)
        self.stage = stage
        self.losses: list[torch.Tensor] = []
        self._parts: list[torch.Tensor] = []  # of the step's loss, one for each batch

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch, **kwargs)
        # A loss that is not divided by the tokens of all the step's batches is divided by their number afterwards.
        scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        batches = 1 if scaled else self.current_gradient_accumulation_steps
        self._parts.append(loss.detach() / batches)
        if self.accelerator.sync_gradients:  # the step's last batch
            self.losses.append(sum(self._parts[1:], self._parts[0]))
            self._parts.clear()
            if self.stage.penalty is not None:
                loss = loss + batches * self.stage.penalty()
        return (loss, outputs) if return_outputs else loss


def train(
    model: Any,
    stage: Stage,
    method: Method,
    features: list[Any],
    tokenizer: Any,
    settings: Settings,
    epochs: int,
    seed: int,
) -> dict[str, Any]:
    """Train one stage; return each step's loss, and the seconds.

    Raises:
        RuntimeError: the loss is no longer finite.
    """
    schedule = method.schedule if settings.schedule is None else settings.schedule
    warmup = method.warmup if settings.warmup is None else settings.warmup
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.accumulation,
            num_train_epochs=epochs,
            learning_rate=stage.rate,
            lr_scheduler_type="constant_with_warmup" if schedule == "constant" and warmup else schedule,
            warmup_steps=warmup,
            seed=seed,
            use_cpu=next(model.parameters()).device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            remove_unused_columns=False,
        )
        optimizer = torch.optim.AdamW(stage.parameters, lr=stage.rate, weight_decay=0.0)
        trainer = _PenalisedTrainer(
            stage,
            model=model,
            args=arguments,
            train_dataset=features,
            data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
            optimizers=(optimizer, None),
            callbacks=list(stage.callbacks),
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    losses = torch.stack(trainer.losses).tolist()
    bad = next((step for step, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)
    if bad is not None:
        raise RuntimeError(f"the loss of step {bad} is {losses[bad - 1]}; expected it finite")
    if stage.after is not None:
        stage.after()
    return {"losses": losses, "seconds": seconds}


def test(model: Any, text: Text, task: Task, examples: Sequence[Example], batch: int, label: str) -> dict[str, Any]:
    """Test the model by greedy generation and exact match. Unreadable answers are wrong; the first few are recorded."""
    start = time.perf_counter()
    said = answers(model, text, task, examples, batch, label)
    seconds = time.perf_counter() - start
    right = [task.is_exact(answer, example.answer) for answer, example in zip(said, examples, strict=True)]
    released = [
        task.is_exact(answer, example.answer, as_released=True) for answer, example in zip(said, examples, strict=True)
    ]
    unreadable = [answer for answer in said if task.read(answer) is None]
    fit, reached = reachable(text, task, examples)
    return {
        "exact": "".join(str(int(exact)) for exact in right),
        "accuracy": sum(right) / len(right),
        "accuracy_as_released": sum(released) / len(released),
        "unreadable": len(unreadable),
        "unreadable_shown": unreadable[:5],
        "completions_fit": fit,
        "reachable": reached,
        "seconds": seconds,
    }
