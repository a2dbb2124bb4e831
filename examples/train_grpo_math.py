"""Trains steering to reason with GRPO: rewards for correct answers and format, a penalty for long answers.

python examples/train_grpo_math.py --model Qwen/Qwen3-0.6B --out sums                       # generated arithmetic
python examples/train_grpo_math.py --model Qwen/Qwen3-0.6B --data openai/gsm8k --out gsm8k  # or a file like it
"""

import re
from pathlib import Path
from typing import Any

import torch
import typer
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig
from trl.rewards import get_soft_overlong_punishment

from fused_steer import SteerConfig, patch_model
from fused_steer.recipes.rows import rows_of
from fused_steer.trl import SteeringGRPOTrainer

ASK = "{question}\nReason in <think></think>, then give the number in <answer></answer>.\n"


def read(data: str, size: int) -> list[dict[str, str]]:
    """Read questions and their numbers: generated sums, or GSM8K's rows from a JSONL file or the hub."""
    if not data:
        from reasoning_gym import create_dataset  # in the extra `rl`

        return [
            {"question": row["question"], "answer": row["answer"]} for row in create_dataset("chain_sum", size=size)
        ]
    try:
        rows = rows_of(data, None if Path(data).is_file() else "main")
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    for number, row in enumerate(rows, 1):
        if "question" not in row or "####" not in str(row.get("answer")):
            raise typer.BadParameter(f"row {number} of {data} lacks question or '#### number' in answer; expected both")
    return [{"question": row["question"], "answer": row["answer"].split("####")[1].strip()} for row in rows]


def accuracy(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Reward 1 if the number in the last <answer> is exactly correct."""
    said = [re.findall(r"<answer>\s*([-+\d.,]+)\s*</answer>", text)[-1:] for text in completions]
    return [float([n.replace(",", "") for n in x] == [y.replace(",", "")]) for x, y in zip(said, answer, strict=True)]


def form(completions: list[str], **_: Any) -> list[float]:
    """Reward a quarter for each of the four tags that occurs exactly once."""
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    return [sum(text.count(tag) == 1 for tag in tags) / 4 for text in completions]


def main(
    model: str = "Qwen/Qwen3-0.6B",
    data: str = "",
    out: Path = Path("reasoning"),
    rank: int = 8,
    rate: float = 1e-3,
    steps: int = typer.Option(500, min=1),
    generations: int = typer.Option(8, min=2),
    length: int = 256,
    size: int = 2000,
) -> None:
    if out == Path() or out.is_file():  # Path("") is the current directory
        raise typer.BadParameter(f"out is '{out}'; expected the name of a folder")
    rows = [{"prompt": ASK.format(**row), "answer": row["answer"]} for row in read(data, size)]
    arguments = GRPOConfig(
        output_dir=str(out / "run"),
        max_steps=steps,
        per_device_train_batch_size=generations,
        num_generations=generations,
        max_completion_length=length,
        learning_rate=rate,
        lr_scheduler_type="constant",
        bf16=torch.cuda.is_available(),  # TRL's default is True, but TRL refuses that on a CPU
        report_to="none",
    )
    steered = patch_model(AutoModelForCausalLM.from_pretrained(model), SteerConfig(rank=rank))
    rewards = [accuracy, form, get_soft_overlong_punishment(length, length // 2)]
    text = {"train_dataset": Dataset.from_list(rows), "processing_class": AutoTokenizer.from_pretrained(model)}
    trainer = SteeringGRPOTrainer(steered, rewards, arguments, **text)
    trainer.train()
    trainer.save_model(str(out))


if __name__ == "__main__":
    typer.run(main)
