"""Trains steering with TRL's GRPOTrainer: the model answers, and a function rewards the answers.

python examples/train_trl_grpo.py --model HuggingFaceTB/SmolLM2-135M-Instruct --out grpo
"""

from pathlib import Path
from typing import Any

import torch
import typer
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from fused_steer import SteerConfig, patch_model
from fused_steer.recipes.recipe import Data
from fused_steer.recipes.rows import read_rows
from fused_steer.trl import SteeringGRPOTrainer


def read(data: Path | None) -> list[dict[str, str]]:
    """Read a JSON object with "prompt" and "answer" from each line; without a file, make sums."""
    if data is None:
        return [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]
    try:
        _, rows, _ = read_rows(Data(train=str(data), kind="completion", columns={"completion": "answer"}, held_out=0))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    return [{"prompt": row["prompt"], "answer": row["completion"]} for row in rows]


def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Reward the answer with 1, and digits with up to 0.1, so that there is something to learn from the first step."""
    shares = [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]
    right = [text.strip() == expected for text, expected in zip(completions, answer, strict=True)]
    return [float(r) + 0.1 * share for r, share in zip(right, shares, strict=True)]


def main(
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
    data: Path | None = None,
    out: Path = Path("grpo"),
    rank: int = 8,
    steps: int = typer.Option(200, min=1),
    generations: int = typer.Option(8, min=2),
    length: int = 8,
    rate: float = 1e-3,
    beta: float = 0.0,
) -> None:
    if out == Path() or out.is_file():  # Path("") is the current directory
        raise typer.BadParameter(f"out is '{out}'; expected the name of a folder")
    steered = patch_model(AutoModelForCausalLM.from_pretrained(model), SteerConfig(rank=rank))
    arguments = GRPOConfig(
        output_dir=str(out / "run"),
        max_steps=steps,
        per_device_train_batch_size=generations,
        num_generations=generations,
        max_completion_length=length,
        learning_rate=rate,
        beta=beta,
        bf16=torch.cuda.is_available(),  # TRL's default is True, but TRL refuses that on a CPU
        report_to="none",
    )
    trainer = SteeringGRPOTrainer(
        steered,
        reward,
        arguments,
        train_dataset=Dataset.from_list(read(data)),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.train()
    trainer.save_model(str(out))


if __name__ == "__main__":
    typer.run(main)
