"""Trains steering with TRL's DPOTrainer. The reference is the same model with its steering off, not a second model.

python examples/train_trl_dpo.py --model HuggingFaceTB/SmolLM2-135M-Instruct --out dpo
"""

from pathlib import Path

import torch
import typer
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

from fused_steer import SteerConfig, patch_model
from fused_steer.recipes.recipe import Data
from fused_steer.recipes.rows import read_rows
from fused_steer.trl import SteeringDPOTrainer


def read(data: Path | None) -> list[dict[str, str]]:
    """Read a JSON object with "prompt", "chosen" and "rejected" from each line; without a file, prefer terse sums."""
    if data is None:
        pairs = [(a, b) for a in range(10) for b in range(10)]
        return [{"prompt": f"{a}+{b}=", "chosen": f"{a + b}", "rejected": f"{a + b}, i think!"} for a, b in pairs]
    try:
        _, rows, _ = read_rows(Data(train=str(data), kind="preference", held_out=0))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    return rows


def main(
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
    data: Path | None = None,
    out: Path = Path("dpo"),
    rank: int = 8,
    steps: int = typer.Option(200, min=1),
    batch: int = 8,
    rate: float = 1e-3,
    beta: float = 0.1,
    resume: bool = False,
) -> None:
    if out == Path() or out.is_file():  # Path("") is the current directory
        raise typer.BadParameter(f"out is '{out}'; expected the name of a folder")
    steered = patch_model(AutoModelForCausalLM.from_pretrained(model), SteerConfig(rank=rank))
    arguments = DPOConfig(
        output_dir=str(out / "run"),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=rate,
        beta=beta,
        bf16=torch.cuda.is_available(),  # TRL's default is True, but TRL refuses that on a CPU
        report_to="none",
    )
    trainer = SteeringDPOTrainer(
        steered,
        args=arguments,
        train_dataset=Dataset.from_list(read(data)),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(out))


if __name__ == "__main__":
    typer.run(main)
