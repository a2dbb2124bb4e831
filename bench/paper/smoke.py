"""A tiny random model and made-up rows for each task, to try all methods on all tasks without a download."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from fused_steer.paper.tasks import TASKS

ROWS = {"train": 16, "validation": 4, "test": 4}


def rows(task: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Make up rows in the task's form."""
    rng = random.Random(f"{task} {seed}")

    def one() -> dict[str, Any]:
        a, b = rng.randrange(2, 900), rng.randrange(2, 900)
        letters = list("ABCDE")
        correct = rng.randrange(len(letters))
        if task == "boolq":
            return {"question": f"is {a} more than {b}", "passage": f"It is {a}, not {b}.", "answer": a > b}
        if task == "winogrande":
            sentence = f"The {a} did not fit into the {b} because the _ is too large."
            return {"sentence": sentence, "option1": str(a), "option2": str(b), "answer": str(rng.choice((1, 2)))}
        if task == "listops":
            return {"Source": f"[MAX {a % 10} {b % 10} ]", "Target": max(a % 10, b % 10)}
        if task == "gsm8k":
            return {"question": f"What is {a} and {b}?", "answer": f"{a} + {b} = <<{a}+{b}={a + b}>>.\n#### {a + b}"}
        if task == "arc":
            choices = {"label": letters[:4], "text": [str(a + shift) for shift in range(4)]}
            return {"question": f"Which is {a}?", "choices": choices, "answerKey": "A"}
        options = [f"{letter}){a + shift - correct}" for shift, letter in enumerate(letters)]
        return {
            "question": f"Which is {a}?",
            "options": options,
            "rationale": f"It is {a}.",
            "correct": letters[correct],
        }

    return [one() for _ in range(count)]


def write_data(folder: Path) -> None:
    """Write made-up files of every task, in the form that `--data` takes."""
    for task in TASKS:
        (folder / task).mkdir(parents=True, exist_ok=True)
        for number, (split, count) in enumerate(ROWS.items()):
            lines = "".join(json.dumps(row) + "\n" for row in rows(task, count, number))
            (folder / task / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def write_model(folder: Path) -> None:
    """Write a Llama of two layers with random weights, and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<eos>": 0} | {byte: i for i, byte in enumerate(alphabet, 1)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet) + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
