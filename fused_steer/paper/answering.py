"""Turns a task's examples into tokens, to train on or to test, and answers its prompts by greedy generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from ..tools.prompts import templated
from .data import Example
from .tasks import Task

_ANSWER = "42"  # stands in for an answer, to find what the chat template puts after it
_SYSTEM = "You are a helpful assistant."  # the system message, as in the released code
#: The label of a token without a loss.
IGNORED = -100


def chat_of(prompt: str) -> list[dict[str, str]]:
    """Return a task's prompt as messages for a chat template."""
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": prompt}]


@dataclass(frozen=True)
class Text:
    """Turns examples into one model's tokens.

    Attributes:
        tokenizer: the model's tokenizer, with a token to pad with.
        chat: whether prompts are in its chat template, with a system message.
        end: whether the end-of-sequence token ends each completion.
    """

    tokenizer: Any
    chat: bool
    end: bool = False

    def prompt(self, example: Example) -> str:
        """Return the text before the answer."""
        if not self.chat:
            return example.prompt
        return self._rendered(example.prompt)

    def completion(self, example: Example) -> str:
        """Return the text after the prompt: the answer and, in a chat template, the end of the assistant's turn.

        Raises:
            ValueError: the template does not continue the prompt with the answer.
        """
        if not self.chat:
            return example.completion
        prompt, whole = self.prompt(example), self._rendered(example.prompt, example.completion)
        if not whole.startswith(prompt):
            raise ValueError(
                f"the chat template ends a prompt in {prompt[-40:]!r}, but a chat with an answer in {whole[-40:]!r}; "
                "expected the chat to begin with the prompt"
            )
        return whole[len(prompt) :]

    def stops(self) -> set[int]:
        """Return the tokens that end a completion: in a chat template the end of a turn, with `end` of the sequence."""
        found = {self.tokenizer.eos_token_id} if self.end else set()
        if self.chat:
            _, _, end = self._rendered(_ANSWER, _ANSWER).rpartition(_ANSWER)
            found |= set(self.tokenizer(end, add_special_tokens=False)["input_ids"][:1]) & self._special()
        return found

    def _rendered(self, prompt: str, answer: str | None = None) -> str:
        messages = chat_of(prompt)
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        return templated(self.tokenizer, messages, tokenize=False, add_generation_prompt=answer is None)

    def _special(self) -> set[int]:
        added = self.tokenizer.added_tokens_decoder.items()
        return {*self.tokenizer.all_special_ids, *(token for token, entry in added if entry.special)}

    def ids(self, text: str) -> list[int]:
        """Return the text's tokens."""
        return self.tokenizer(text, add_special_tokens=not self.chat)["input_ids"]

    def features(self, example: Example, longest: int | None) -> tuple[dict[str, list[int]] | None, bool]:
        """Tokenize an example with labels on its completion, and cut it after `longest` tokens; None: nowhere.

        Returns:
            The features, None if no token of the completion is left; and whether tokens were cut off.
        """
        prompt = self.prompt(example)
        ids = self.ids(prompt + self.completion(example))
        if self.end:
            ids = [*ids, self.tokenizer.eos_token_id]
        start, is_cut = len(self.ids(prompt)), longest is not None and len(ids) > longest
        ids = ids[:longest]
        if start >= len(ids):
            return None, is_cut
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * start + ids[start:]}, is_cut

    def batch(self, examples: Sequence[Example]) -> Any:
        """Tokenize prompts into a batch, padded on the left."""
        prompts = [self.prompt(example) for example in examples]
        return self.tokenizer(
            prompts, padding=True, padding_side="left", add_special_tokens=not self.chat, return_tensors="pt"
        )


def reachable(text: Text, task: Task, examples: Sequence[Example]) -> tuple[float, float]:
    """Return the share of completions that fit into `task.new_tokens` tokens, and the share that is read as correct.

    The completions are the examples' own, without the end of a turn. One that does not fit is cut before it is read. A
    model that writes the completions word for word scores the second share.
    """
    fit, right = 0, 0
    for example in examples:
        prompt = text.prompt(example)
        before, answer, _ = text.completion(example).rpartition(example.completion)
        ids = text.ids(prompt + before + answer)[len(text.ids(prompt)) :]
        fit += len(ids) <= task.new_tokens
        said = text.tokenizer.decode(ids[: task.new_tokens], skip_special_tokens=True)
        right += task.is_exact(said, example.answer)
    return fit / len(examples), right / len(examples)


@torch.no_grad()
def answers(model: Any, text: Text, task: Task, examples: Sequence[Example], batch_size: int, label: str) -> list[str]:
    """Return a model's text after each prompt, by greedy generation of at most `task.new_tokens` tokens.

    An answer ends at the end tokens of the model's generation config, and at those of `Text.stops`.

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
    own = model.generation_config.eos_token_id
    stops = sorted(text.stops() | set(own if isinstance(own, list) else [own]) - {None})
    said: list[str] = []
    for at in tqdm(range(0, len(examples), batch_size), desc=label, unit="batch", leave=False):
        inputs = text.batch(examples[at : at + batch_size]).to(device)
        tokens = model.generate(
            **inputs,
            max_new_tokens=task.new_tokens,
            do_sample=False,
            pad_token_id=text.tokenizer.pad_token_id,
            eos_token_id=stops or None,
        )
        said += text.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said
