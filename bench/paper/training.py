"""Training with transformers' Trainer, and testing by greedy generation."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from .data import Example
from .methods import Method, Stage
from .settings import Settings
from .tasks import Task

IGNORED = -100
_SYSTEM = "You are a helpful assistant."  # the system message, as in the released code


@dataclass(frozen=True)
class Text:
    """Turns examples into one model's tokens."""

    tokenizer: Any
    end: bool
    chat: bool

    def prompt(self, example: Example) -> str:
        if not self.chat:
            return example.prompt
        messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": example.prompt}]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=not self.chat)["input_ids"]

    def features(self, example: Example, longest: int) -> dict[str, list[int]] | None:
        """Tokenize an example with labels on its completion; None if `longest` cuts off the whole completion."""
        prompt = self.prompt(example)
        ids = self.ids(prompt + example.completion)
        if self.end:
            ids = [*ids, self.tokenizer.eos_token_id]
        cut = len(self.ids(prompt))
        ids = ids[:longest]
        if cut >= len(ids):
            return None
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * cut + ids[cut:]}

    def batch(self, examples: Sequence[Example]) -> Any:
        """Tokenize prompts into a batch, padded on the left."""
        prompts = [self.prompt(example) for example in examples]
        return self.tokenizer(
            prompts, padding=True, padding_side="left", add_special_tokens=not self.chat, return_tensors="pt"
        )


class _PenalisedTrainer(Trainer):
    """A Trainer that adds a stage's penalty to the loss and records every step's loss."""

    def __init__(self, stage: Stage, **options: Any) -> None:
        super().__init__(**options)
        self.stage = stage
        self.losses: list[torch.Tensor] = []

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        self.losses.append(loss.detach())
        if self.stage.penalty is not None:
            loss = loss + self.stage.penalty()
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
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=settings.batch_size,
            num_train_epochs=epochs,
            learning_rate=stage.rate,
            lr_scheduler_type=method.schedule,
            warmup_steps=method.warmup,
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


@torch.no_grad()
def test(model: Any, text: Text, task: Task, examples: Sequence[Example], batch: int, label: str) -> dict[str, Any]:
    """Test the model by greedy generation and exact match. Unreadable answers are wrong; the first few are recorded."""
    model.eval()
    device = next(model.parameters()).device
    exact, as_released, unreadable, shown = "", 0, 0, []
    start = time.perf_counter()
    for at in tqdm(range(0, len(examples), batch), desc=label, unit="batch", leave=False):
        part = examples[at : at + batch]
        inputs = text.batch(part).to(device)
        tokens = model.generate(
            **inputs, max_new_tokens=task.new_tokens, do_sample=False, pad_token_id=text.tokenizer.pad_token_id
        )
        said = text.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for answer, example in zip(said, part, strict=True):
            exact += str(int(task.is_exact(answer, example.answer)))
            as_released += task.is_exact(answer, example.answer, as_released=True)
            if task.read(answer) is None:
                unreadable += 1
                shown += [answer] if len(shown) < 5 else []
    return {
        "exact": exact,
        "accuracy": exact.count("1") / len(exact),
        "accuracy_as_released": as_released / len(exact),
        "unreadable": unreadable,
        "unreadable_shown": shown,
        "seconds": time.perf_counter() - start,
    }
