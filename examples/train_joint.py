"""Trains LoRA and steering together with transformers' Trainer, each with its own learning rate.

The steering is kept orthogonal to the LoRA.

python examples/train_joint.py --model HuggingFaceTB/SmolLM2-135M --out joint
"""

from pathlib import Path
from typing import Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

from fused_steer import (
    SteerConfig,
    SteeringTrainer,
    lora_parameters,
    patch_model,
    save_joint,
    steering_parameters,
)
from fused_steer.joint import refuse_adapter_beside
from fused_steer.recipes.recipe import Data
from fused_steer.recipes.rows import read_rows


def read(data: Path | None) -> list[dict[str, str]]:
    """Read a JSON object with "prompt" and "completion" from each line; without a file, make sums."""
    if data is None:
        return [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(10) for b in range(10)]
    try:
        _, rows, _ = read_rows(Data(train=str(data), kind="completion", held_out=0))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    return rows


def encode(tokenizer: Any, row: dict[str, str]) -> dict[str, list[int]]:
    """Tokenize a row. Only the completion has labels, so the loss covers only the completion."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    completion = tokenizer(row["completion"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}


def main(
    model: str = "HuggingFaceTB/SmolLM2-135M",
    data: Path | None = None,
    out: Path = Path("joint"),
    rank: int = 8,
    steps: int = typer.Option(200, min=1),
    batch: int = 8,
    rate: float = 1e-3,
    lora_rate: float = 2e-4,
    resume: bool = False,
) -> None:
    if out == Path() or out.is_file():  # Path("") is the current directory
        raise typer.BadParameter(f"out is '{out}'; expected the name of a folder")
    refuse_adapter_beside(out)  # as save_joint does, but before the training
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lora = LoraConfig(r=rank, target_modules="all-linear")
    both = get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora)
    both = patch_model(both, SteerConfig(rank=rank, orthogonal_to="lora"))
    groups = [
        {"params": steering_parameters(both), "lr": rate},
        {"params": lora_parameters(both), "lr": lora_rate},
    ]
    arguments = TrainingArguments(
        output_dir=str(out / "run"), max_steps=steps, per_device_train_batch_size=batch, report_to="none"
    )
    trainer = SteeringTrainer(
        both,
        arguments,
        train_dataset=[encode(tokenizer, row) for row in read(data)],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        optimizers=(torch.optim.AdamW(groups, weight_decay=0.0), None),
    )
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        save_joint(both, str(out))


if __name__ == "__main__":
    typer.run(main)
