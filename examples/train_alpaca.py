"""Trains steering of rank 8 on Alpaca's instructions: loss on the responses only, 3 epochs, batches of 16.

python examples/train_alpaca.py --model meta-llama/Llama-3.1-8B --out alpaca
python examples/generate_alpaca_eval.py --model meta-llama/Llama-3.1-8B --adapter alpaca --out answers.json
"""

from pathlib import Path

import torch
import typer
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from fused_steer import SteerConfig, patch_model
from fused_steer.recipes.rows import rows_of
from fused_steer.trl import SteeringSFTTrainer

# Stanford Alpaca's prompts, for instructions with and without an input.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def read(data: str) -> list[dict[str, str]]:
    """Read rows with "instruction", "output" and optional "input" from a JSON or JSONL file or a hub data set."""
    try:
        rows = rows_of(data)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("instruction"), str) or not isinstance(row.get("output"), str):
            held = ", ".join(row)
            raise typer.BadParameter(f"row {number} of {data} has {held}; expected instruction and output, both texts")
    return rows


def example(row: dict[str, str]) -> dict[str, str]:
    template = WITH_INPUT if (row.get("input") or "").strip() else WITHOUT_INPUT
    return {"prompt": template.format(**row), "completion": row["output"]}


def main(
    model: str = "meta-llama/Llama-3.1-8B",
    data: str = "yahma/alpaca-cleaned",
    out: Path = Path("alpaca"),
    rank: int = 8,
    rate: float = 2e-3,
    epochs: float = 3,
    batch: int = 4,
    accumulate: int = 4,
    length: int = 512,
    resume: bool = False,
) -> None:
    if out == Path() or out.is_file():  # Path("") is the current directory
        raise typer.BadParameter(f"out is '{out}'; expected the name of a folder")
    dataset, gpu = Dataset.from_list([example(row) for row in read(data)]), torch.cuda.is_available()
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16 if gpu else torch.float32)
    arguments = SFTConfig(
        output_dir=str(out / "run"),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        learning_rate=rate,
        lr_scheduler_type="constant",  # as the paper trains steering: no warm-up, decay or schedule
        max_length=length,
        bf16=gpu,  # TRL's default is True, but TRL refuses that on a CPU
        report_to="none",
    )
    steered, tokenizer = patch_model(base, SteerConfig(rank=rank)), AutoTokenizer.from_pretrained(model)
    trainer = SteeringSFTTrainer(steered, arguments, train_dataset=dataset, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(out))


if __name__ == "__main__":
    typer.run(main)
