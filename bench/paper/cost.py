"""Estimates the time of a run on an A100 from counted operations and bytes; docs/paper.md has the formula.

Nothing here is measured. The peak rates are NVIDIA's; the utilisation is an assumption.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_steer.paper.answering import Text
from fused_steer.paper.data import Limits, load
from fused_steer.paper.tasks import TASKS

from ..geometries import GEOMETRIES

PEAK, BANDWIDTH = 312e12, 2.039e12  # A100 80GB SXM: dense bfloat16 operations per second, and bytes per second
USED, STREAMED = 0.4, 0.6  # assumed utilisation of each
BYTES = 2  # bytes of a weight in bfloat16


@dataclass(frozen=True)
class Size:
    """The size of a model. `weights` counts the matrix entries that each token is multiplied by, the head included."""

    weights: int
    layers: int
    hidden: int

    @classmethod
    def of(cls, config: Any) -> Size:
        """Count the size of a model, built without memory on the meta device."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        text = config.get_text_config()
        embedding = model.get_input_embeddings().weight
        body = sum(p.numel() for p in model.parameters() if p.dim() > 1 and p is not embedding)
        tied = model.get_output_embeddings().weight is embedding
        return cls(body + (embedding.numel() if tied else 0), text.num_hidden_layers, text.hidden_size)


@dataclass(frozen=True)
class Tokens:
    """The mean number of tokens of a prompt, and of a prompt with its completion (`whole`)."""

    prompt: float
    whole: float

    @classmethod
    def count(cls, text: Any, examples: Sequence[Any]) -> Tokens:
        prompts = [len(text.ids(text.prompt(example))) for example in examples]
        wholes = [len(text.ids(text.prompt(example) + text.completion(example))) for example in examples]
        return cls(statistics.fmean(prompts), statistics.fmean(wholes))


def forward(size: Size, tokens: float, length: float) -> float:
    """Count the operations of a forward pass over `tokens` tokens in sequences of `length`.

    They are 2 per weight, and the two products of causal attention.
    """
    return tokens * (2 * size.weights + 2 * size.layers * size.hidden * length)


def training(size: Size, tokens: Tokens, examples: int, full: bool) -> float:
    """Estimate the seconds of training.

    A step is one forward and one backward for the activations. Full fine-tuning adds a backward for the weights.
    """
    count = examples * tokens.whole
    attention = forward(size, count, tokens.whole) - forward(size, count, 0)
    passes = 3 if full else 2
    return (passes * forward(size, count, 0) + 3 * attention) / (PEAK * USED)


def testing(size: Size, tokens: Tokens, examples: int, new_tokens: int, batch: int) -> float:
    """Estimate the seconds of testing: the prompts' operations, and one read of all weights per generated token."""
    prompts = forward(size, examples * tokens.prompt, tokens.prompt) / (PEAK * USED)
    return prompts + examples / batch * new_tokens * size.weights * BYTES / (BANDWIDTH * STREAMED)


def table(
    geometry: str,
    tokenizer: str | None,
    tasks: Sequence[str],
    data: Path | None,
    lengths: tuple[int, int],
    batch: int,
    counted: int,
) -> str:
    """Return a Markdown table of the estimated minutes of one run of each task."""
    from transformers import AutoConfig, AutoTokenizer

    from fused_steer.tools.demo import find_smollm2, load_smollm2

    if geometry in GEOMETRIES:
        kind, fields = GEOMETRIES[geometry]
        config = AutoConfig.for_model(kind, **fields)
    else:
        config, tokenizer = AutoConfig.from_pretrained(geometry), tokenizer or geometry
    if tokenizer is None:
        try:
            find_smollm2()
        except FileNotFoundError as error:
            raise ValueError(f"no --tokenizer is given, and {error}; expected one of them") from None
    text = Text(AutoTokenizer.from_pretrained(tokenizer) if tokenizer else load_smollm2()[1], chat=False)
    size = Size.of(config)
    lines = [
        "| task | rows: train, evaluated | tokens: prompt, whole | adapters, min | full, min | testing, min |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in tasks:
        task = TASKS[name]
        splits = load(name, data, Limits(), lengths)
        tokens = Tokens.count(text, splits["train"][:counted])
        train, evaluated = len(splits["train"]), len(splits["validation"]) + len(splits["test"])
        cut = Tokens(tokens.prompt, min(tokens.whole, task.max_length))
        adapters, full = (training(size, cut, train * task.epochs, full) / 60 for full in (False, True))
        tested = testing(size, tokens, evaluated, task.new_tokens, batch) / 60
        lines.append(
            f"| {task.title} | {train:,}, {evaluated:,} | {tokens.prompt:.0f}, {tokens.whole:.0f} | {adapters:.1f} | "
            f"{full:.1f} | {tested:.1f} |"
        )
    return "\n".join(lines)
