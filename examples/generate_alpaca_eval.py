"""Answers AlpacaEval's 805 instructions with a steered model, in the file format that its judge reads.

python examples/generate_alpaca_eval.py --model meta-llama/Llama-3.1-8B --adapter alpaca --out answers.json
alpaca_eval --model_outputs answers.json
"""

import json
from pathlib import Path

import torch
import typer
from huggingface_hub import hf_hub_download
from tqdm import tqdm
from train_alpaca import example
from transformers import AutoModelForCausalLM, AutoTokenizer

from fused_steer import patch_model
from fused_steer.recipes.rows import rows_of


def read(data: Path | None) -> list[dict[str, str]]:
    """Read a JSON list of objects with "instruction"; without a file, AlpacaEval's list from the hub."""
    try:
        path = data or hf_hub_download("tatsu-lab/alpaca_eval", "alpaca_eval.json", repo_type="dataset")
        rows = rows_of(str(path))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("instruction"), str):
            raise typer.BadParameter(f"row {number} of {path} has no text as instruction; expected one")
    return rows


def main(
    model: str = "meta-llama/Llama-3.1-8B",
    adapter: str = typer.Option("alpaca", help="A directory or hub id; '' for the base model."),
    data: Path | None = None,
    out: Path = Path("answers.json"),
    name: str = typer.Option("", help="The model's name for the judge. Default: the adapter's name."),
    batch: int = 16,
    tokens: int = 512,
) -> None:
    if not out.absolute().parent.is_dir() or out.is_dir():  # told before hours of answers, not after
        raise typer.BadParameter(f"out is '{out}'; expected a file in a directory that exists")
    rows = read(data)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device)
    steered = (patch_model(loaded, adapter) if adapter else loaded).eval()
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    answers = []
    for start in tqdm(range(0, len(rows), batch)):
        prompts = [example({"output": "", **row})["prompt"] for row in rows[start : start + batch]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(device)
        said = steered.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        answers += tokenizer.batch_decode(said[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    generator = name or Path(adapter or model).name
    found = [
        {"instruction": row["instruction"], "output": answer.strip(), "generator": generator}
        | {key: row[key] for key in ("input", "dataset") if key in row}
        for row, answer in zip(rows, answers, strict=True)
    ]
    out.write_text(json.dumps(found, indent=2, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
