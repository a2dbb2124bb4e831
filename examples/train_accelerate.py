"""Trains steering by a hand-written loop with Accelerate, in one process or many.

accelerate launch examples/train_accelerate.py --model HuggingFaceTB/SmolLM2-135M --out accelerated
"""

from pathlib import Path
from typing import Any

import torch
import typer
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from fused_steer import SteerConfig, patch_model, steering_parameters
from fused_steer.adapters.files import refuse_foreign
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
    out: Path = Path("accelerated"),
    rank: int = 8,
    epochs: int = typer.Option(4, min=1),
    batch: int = 8,
    rate: float = 1e-3,
) -> None:
    if out == Path() or out.is_file():  # Path("") is the current directory
        raise typer.BadParameter(f"out is '{out}'; expected the name of a folder")
    refuse_foreign(out)  # as save does, but before the training
    accelerator = Accelerator()
    set_seed(0)  # the same initial adapter in every process
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = [encode(tokenizer, row) for row in read(data)]
    loader = DataLoader(rows, batch_size=batch, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))
    steered = patch_model(AutoModelForCausalLM.from_pretrained(model), SteerConfig(rank=rank)).train()
    optimizer = torch.optim.AdamW(steering_parameters(steered), lr=rate, weight_decay=0.0)
    prepared, optimizer, loader = accelerator.prepare(steered, optimizer, loader)
    for epoch in range(epochs):
        total = torch.zeros((), device=accelerator.device)
        for inputs in loader:
            loss = prepared(**inputs).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach()
        mean = accelerator.reduce(total / len(loader), "mean")
        accelerator.print(f"epoch {epoch + 1}: loss {mean:.3f}, {accelerator.num_processes} processes")
    if accelerator.is_main_process:
        steered.steering.save(str(out))
    # The wrapper has to go before its process group: the other way round PyTorch may wait for Gloo's threads forever.
    prepared, optimizer, loader = accelerator.free_memory(prepared, optimizer, loader)
    accelerator.end_training()


if __name__ == "__main__":
    typer.run(main)
