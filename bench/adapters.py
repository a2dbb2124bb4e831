"""`python -m bench.adapters`: the cost of 1 to 256 adapters in a batch of transformers, as ratios to one adapter.

All batches have the same rows and the same model; only the number of different adapters changes. They run in turn,
round after round, and a ratio is taken within each round. Opening a batch, which copies adapters into slots, is not
timed. On a CPU this measures the PyTorch backend and says nothing about the kernels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from .contenders import adapter_weights, set_adapter
from .geometries import ServeCase
from .levels import build_base, make_tokens
from .results import describe_machine, write_json
from .timing import in_turn, synchronize

NEW_TOKENS = 16
COUNTS = (1, 4, 16, 64, 256)
CALLS = ("generate", "generate_batch")


def names_of(rows: int, adapters: int) -> list[str | None]:
    """Return each row's adapter; the adapters take turns. With 0 adapters no row has one."""
    return [str(row % adapters) if adapters else None for row in range(rows)]


def build(case: ServeCase, device: torch.device) -> Any:
    """Build a model that has loaded `case.adapters` adapters, named "0", "1", …"""
    from fused_steer import SteerConfig, patch_model

    model = build_base(case.model, device).eval()
    model.generation_config.eos_token_id = None  # all rows end together
    # A strong scale, so that every row's tokens differ from the unsteered ones. It does not change the time.
    config = SteerConfig(rank=case.rank, scale=20.0)
    for number in range(case.adapters):
        if number:
            model.steering.add(str(number), config)
        else:
            patch_model(model, config, adapter_name="0")
        set_adapter(model, str(number), adapter_weights(model, case.rank, seed=number))
    return model


def answer(model: Any, tokens: Tensor, call: str) -> list[list[int]]:
    """Generate NEW_TOKENS tokens for each row, in the running batch."""
    if call == "generate":
        mask = torch.ones_like(tokens)
        out = model.generate(tokens, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
        return out[:, tokens.shape[1] :].tolist()
    from transformers import ContinuousBatchingConfig, GenerationConfig

    rows, length = tokens.shape
    page = 32
    config = ContinuousBatchingConfig(
        page_size=page,
        num_blocks=2 * rows * (1 + (length + NEW_TOKENS) // page),
        max_batch_tokens=max(rows, 1024),
        use_cuda_graph=False,
        allow_block_sharing=False,
    )
    generation = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1)
    found = model.generate_batch(tokens.tolist(), generation_config=generation, continuous_batching_config=config)
    return [one.generated_tokens for one in found.values()]


def check(tokens: dict[int, list[list[int]]], exact: bool) -> None:
    """Check the answers of all batches, by their number of adapters.

    Args:
        exact: whether a row must have the same tokens in each batch with its adapter. In low precision a batch with
            other adapters may round otherwise, and a near tie be decided otherwise.

    Raises:
        ValueError: rows of the same adapter have other tokens in another batch, or adapters change too few rows.
    """
    unsteered, most = tokens[0], max(tokens)
    for count, found in tokens.items():
        if not count:
            continue
        if exact and found[:count] != tokens[most][:count]:
            raise ValueError(f"wrong: a row has other tokens among {count} adapters than among {most}")
        same = sum(mine == base for mine, base in zip(found, unsteered, strict=True))
        if 10 * same > len(found):
            raise ValueError(f"wrong: {same} of {len(found)} rows have the unsteered tokens among {count} adapters")


def measure(
    case: ServeCase, counts: Sequence[int], call: str, rounds: int, device: torch.device
) -> dict[int, list[float]]:
    """Return seconds per token of all rows: the number of adapters -> a sample for each round. 0: no adapter.

    Raises:
        ValueError: see `check`.
    """
    model, every = build(case, device), (0, *counts)
    prompts = make_tokens(case.model, model, device)
    samples: dict[int, list[float]] = {count: [] for count in every}
    tokens = {}
    for number in range(-1, rounds):  # the first round warms up
        for count in in_turn(every, max(number, 0)):
            with torch.no_grad(), model.steering.batch(names_of(case.batch, count)):
                synchronize(device)
                begin = time.perf_counter()
                found = answer(model, prompts, call)
                synchronize(device)
                seconds = time.perf_counter() - begin
            if number < 0:
                tokens[count] = found
            else:
                samples[count].append(seconds / NEW_TOKENS)
        if number < 0:
            check(tokens, exact=case.dtype == "float32")
    return samples


def ratios(samples: dict[int, list[float]]) -> dict[int, float]:
    """Return the median, over the rounds, of each batch's time over that of one adapter in the same round."""
    return {
        count: statistics.median(mine / one for mine, one in zip(found, samples[1], strict=True))
        for count, found in samples.items()
    }


def _counts(text: str, rows: int) -> list[int]:
    try:
        counts = sorted({1, *map(int, text.split(","))})
    except ValueError:
        raise ValueError(f"counts is {text!r}; expected numbers of adapters, as 1,16,256") from None
    if counts[0] < 1 or counts[-1] > rows:
        raise ValueError(f"counts is {text!r}; expected 1 to {rows}, the rows of the batch")
    return counts


def main(
    out: Annotated[Path | None, typer.Option(help="JSON file for the samples.")] = None,
    geometry: Annotated[str, typer.Option(help="The model's sizes, by the name of a real model.")] = "small",
    layers: Annotated[int, typer.Option(help="Number of layers; 0 is all.")] = 0,
    rows: Annotated[int, typer.Option(help="Rows of the batch.")] = 256,
    length: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 8,
    counts: Annotated[str, typer.Option(help="Numbers of adapters.")] = ",".join(map(str, COUNTS)),
    call: Annotated[str, typer.Option(help="generate, or generate_batch: continuous batching.")] = "generate",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16. Default: bfloat16 on a GPU, float32 on a CPU.")
    ] = "",
    rounds: Annotated[int, typer.Option(help="Samples of each number of adapters.")] = 10,
) -> None:
    """Measure a batch's time with 1 to 256 adapters in it, in turn."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if rounds < 1:
            raise ValueError(f"rounds is {rounds}; expected at least 1")
        if call not in CALLS:
            raise ValueError(f"call is {call!r}; expected {' or '.join(CALLS)}")
        numbers = _counts(counts, rows)
        case = ServeCase(
            geometry,
            layers,
            rows,
            length,
            numbers[-1],
            dtype=dtype or ("bfloat16" if device.type == "cuda" else "float32"),
        )
        samples = measure(case, numbers, call, rounds, device)
    except (ValueError, RuntimeError, OSError) as error:
        typer.echo(f"bench.adapters: {error}", err=True)
        raise typer.Exit(1) from None
    machine = describe_machine(device, "bench.adapters")
    for count, ratio in ratios(samples).items():
        what = f"{count} adapters" if count > 1 else "1 adapter" if count else "no adapter"
        typer.echo(
            f"{what:>12}: {1e3 * statistics.median(samples[count]):9.3f} ms a token of {rows} rows, {ratio:.3f}x"
        )
    if out is not None:
        write_json({"machine": machine, "call": call, "case": asdict(case), "samples": samples}, out)
        typer.echo(f"samples: {out}")


if __name__ == "__main__":
    typer.run(main)
