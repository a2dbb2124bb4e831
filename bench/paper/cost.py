"""What a run costs on an A100, estimated from counted operations and bytes; docs/paper.md has the formula.

Nothing here was measured: the peak rates are NVIDIA's, and the shares of them that are reached are assumed.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..geometries import GEOMETRIES
from .data import Limits, load
from .tasks import TASKS
from .training import Text

PEAK, BANDWIDTH = 312e12, 2.039e12  # A100 80GB SXM: dense bfloat16 operations, and bytes, a second
USED, STREAMED = 0.4, 0.6  # shares that are assumed to be reached
BYTES = 2  # of a weight, in bfloat16


@dataclass(frozen=True)
class Size:
    """weights: entries of matrices that each token is multiplied by, the head included."""

    weights: int
    layers: int
    hidden: int

    @classmethod
    def of(cls, config: Any) -> Size:
        """Counted on a model without memory."""
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
    """Mean tokens of an example's prompt and of its prompt with completion."""

    prompt: float
    whole: float

    @classmethod
    def count(cls, text: Any, examples: Sequence[Any]) -> Tokens:
        prompts = [len(text.ids(text.prompt(example))) for example in examples]
        wholes = [len(text.ids(text.prompt(example) + example.completion)) for example in examples]
        return cls(statistics.fmean(prompts), statistics.fmean(wholes))


def forward(size: Size, tokens: float, length: float) -> float:
    """Operations of so many tokens in sequences of this length: 2 a weight, and causal attention's two products."""
    return tokens * (2 * size.weights + 2 * size.layers * size.hidden * length)


def training(size: Size, tokens: Tokens, examples: int, full: bool) -> float:
    """Seconds: forward once, and backward by activations once; full fine-tuning also by weights."""
    count = examples * tokens.whole
    attention = forward(size, count, tokens.whole) - forward(size, count, 0)
    passes = 3 if full else 2
    return (passes * forward(size, count, 0) + 3 * attention) / (PEAK * USED)


def testing(size: Size, tokens: Tokens, examples: int, new_tokens: int, batch: int) -> float:
    """Seconds: the prompts' operations, and for each generated token of a batch all weights read once."""
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
    """Minutes of one run of each task, as a table in Markdown."""
    from transformers import AutoConfig, AutoTokenizer

    from fused_steer.tools.demo import load_smollm2

    if geometry in GEOMETRIES:
        kind, fields = GEOMETRIES[geometry]
        config = AutoConfig.for_model(kind, **fields)
    else:
        config, tokenizer = AutoConfig.from_pretrained(geometry), tokenizer or geometry
    text = Text(AutoTokenizer.from_pretrained(tokenizer) if tokenizer else load_smollm2()[1], end=False, chat=False)
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
