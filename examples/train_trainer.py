"""Trains steering with transformers' Trainer. Checkpoints hold only the adapter; the best one is kept.

python examples/train_trainer.py --model HuggingFaceTB/SmolLM2-135M --out steering
"""

from pathlib import Path
from typing import Any

import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

from fused_steer import SteerConfig, SteeringTrainer, patch_model
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
    out: Path = Path("steering"),
    rank: int = 8,
    steps: int = typer.Option(200, min=1),
    batch: int = 8,
    rate: float = 1e-3,
    resume: bool = False,
    push: str = "",
) -> None:
    if out == Path() or out.is_file():  # Path("") is the current directory
        raise typer.BadParameter(f"out is '{out}'; expected the name of a folder")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = [encode(tokenizer, row) for row in read(data)]
    if len(rows) < 4:
        raise typer.BadParameter(f"{data} has {len(rows)} rows; expected at least 4, as each fourth is for evaluation")
    steered = patch_model(AutoModelForCausalLM.from_pretrained(model), SteerConfig(rank=rank))
    arguments = TrainingArguments(
        output_dir=str(out / "run"),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=rate,
        weight_decay=0.0,
        eval_strategy="steps",
        eval_steps=max(steps // 4, 1),
        save_steps=max(steps // 4, 1),
        load_best_model_at_end=True,
        report_to="none",
    )
    trainer = SteeringTrainer(
        steered,
        arguments,
        train_dataset=rows[::2] + rows[1::4],
        eval_dataset=rows[3::4],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train(resume_from_checkpoint=resume)
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(out))
    if trainer.is_world_process_zero():
        print(f"loss of what was not trained on: {loss:.3f}")
    if push and trainer.is_world_process_zero():
        print(steered.steering.push_to_hub(push))


if __name__ == "__main__":
    typer.run(main)
