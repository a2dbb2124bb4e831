"""Answers a task's prompts by greedy generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from .data import Example
from .tasks import Task

_SYSTEM = "You are a helpful assistant."  # the system message, as in the released code


@dataclass(frozen=True)
class Text:
    """Turns examples into one model's tokens.

    Attributes:
        tokenizer: the model's tokenizer, with a token to pad with.
        chat: whether prompts are in its chat template, with a system message.
    """

    tokenizer: Any
    chat: bool

    def prompt(self, example: Example) -> str:
        """Return the text before the answer."""
        if not self.chat:
            return example.prompt
        messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": example.prompt}]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def ids(self, text: str) -> list[int]:
        """Return the text's tokens."""
        return self.tokenizer(text, add_special_tokens=not self.chat)["input_ids"]

    def batch(self, examples: Sequence[Example]) -> Any:
        """Tokenize prompts into a batch, padded on the left."""
        prompts = [self.prompt(example) for example in examples]
        return self.tokenizer(
            prompts, padding=True, padding_side="left", add_special_tokens=not self.chat, return_tensors="pt"
        )


def reachable(text: Text, task: Task, examples: Sequence[Example]) -> tuple[float, float]:
    """Return the share of completions that fit into `task.new_tokens` tokens, and the share that is read as correct.

    The completions are the examples' own. One that does not fit is cut before it is read. A model that writes the
    completions word for word scores the second share.
    """
    fit, right = 0, 0
    for example in examples:
        prompt = text.prompt(example)
        ids = text.ids(prompt + example.completion)[len(text.ids(prompt)) :]
        fit += len(ids) <= task.new_tokens
        said = text.tokenizer.decode(ids[: task.new_tokens], skip_special_tokens=True)
        right += task.is_exact(said, example.answer)
    return fit / len(examples), right / len(examples)


@torch.no_grad()
def answers(model: Any, text: Text, task: Task, examples: Sequence[Example], batch_size: int, label: str) -> list[str]:
    """Return a model's text after each prompt, by greedy generation of at most `task.new_tokens` tokens.

    Args:
        model: a causal language model, which is put into eval mode.
        text: makes its tokens.
        task: the task.
        examples: the task's examples.
        batch_size: prompts at a time.
        label: of the progress bar.
    """
    model.eval()
    device = next(model.parameters()).device
    said: list[str] = []
    for at in tqdm(range(0, len(examples), batch_size), desc=label, unit="batch", leave=False):
        inputs = text.batch(examples[at : at + batch_size]).to(device)
        tokens = model.generate(
            **inputs, max_new_tokens=task.new_tokens, do_sample=False, pad_token_id=text.tokenizer.pad_token_id
        )
        said += text.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said
