"""`python -m bench.vllm --out DIR`: tokens per second of vLLM, unsteered and steered, with one or many adapters.

Two engines run in separate processes: vLLM without the plug-in, and vLLM with it, for steering only
(`lora_target_modules=["post_block"]`). They answer the same prompts in turn. vLLM must be installed beside fused-steer;
docs/serving.md has the command. The model has a real model's sizes and random weights, so no network is needed. A
second run with other batches or another geometry adds to the results file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fused_steer.tools.engines import Ask, Engine

from . import timing
from .contenders import adapter_weights, set_adapter
from .geometries import GEOMETRIES, ServeCase
from .levels import build_base
from .results import Results, Row, describe_machine, file_name, start

NEW_TOKENS = 32
#: Contender -> (engine, function from a row's number to its adapter's number; None: no adapter).
VLLM_CONTENDERS: dict[str, tuple[str, Any]] = {
    "unsteered": ("plain", lambda row, adapters: None),
    "no-adapter": ("steered", lambda row, adapters: None),
    "one-adapter": ("steered", lambda row, adapters: 0),
    "fused": ("steered", lambda row, adapters: row % adapters),
    "fused-again": ("steered", lambda row, adapters: row % adapters),
}


def save_all(case: ServeCase, folder: Path, count: int) -> None:
    """Save the model in model/ and `count` adapters in 0/, 1/, …"""
    from fused_steer import SteerConfig, patch_model

    model = build_base(case.model, torch.device("cpu"))
    model.save_pretrained(folder / "model")
    # A strong scale, so that every row's tokens differ from the unsteered ones. It does not change the time.
    patch_model(model, SteerConfig(rank=case.rank, scale=20.0))
    for number in range(count):
        set_adapter(model, "default", adapter_weights(model, case.rank, seed=number))
        model.steering.save(folder / str(number))


@contextmanager
def engines(case: ServeCase, folder: Path, most_rows: int, most_adapters: int) -> Iterator[dict[str, Engine]]:
    """Start the engines "plain" and "steered", and end them afterwards."""
    options = {
        "model": str(folder / "model"),
        "skip_tokenizer_init": True,
        "dtype": case.dtype,
        "max_model_len": case.length + NEW_TOKENS,
        "max_num_seqs": most_rows,
        "enable_prefix_caching": False,  # every round has the same prompts
        "gpu_memory_utilization": 0.4,
        "disable_log_stats": True,
        # On a CPU vLLM compiles nothing once LoRA is enabled, so neither engine may compile there.
        "enforce_eager": not torch.cuda.is_available(),
    }
    steering = {
        "enable_lora": True,
        "lora_target_modules": ["post_block"],
        "max_loras": most_adapters,
        "max_cpu_loras": most_adapters,
        "max_lora_rank": max(8, case.rank),
    }
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    made = {}
    try:
        made["plain"] = Engine(options, {**environment, "VLLM_PLUGINS": ""})
        made["plain"].wait()  # one after the other: each measures the free memory when it starts
        made["steered"] = Engine(options | steering, {**environment, "VLLM_PLUGINS": "fused_steer"})
        made["steered"].wait()
        yield made
    finally:
        for engine in made.values():
            engine.close()


def make_prompts(case: ServeCase) -> list[list[int]]:
    vocabulary = GEOMETRIES[case.geometry][1]["vocab_size"]
    generator = torch.Generator().manual_seed(4)
    return torch.randint(3, min(vocabulary, 8000), (case.batch, case.length), generator=generator).tolist()


def measure_vllm(case: ServeCase, made: dict[str, Engine], folder: Path, rounds: int) -> list[Row]:
    """Measure the seconds per token of all rows, prefill included, for each contender in turn.

    A contender with wrong tokens gets a row that says so.
    """
    prompts = make_prompts(case)
    rows = {name: Row("vllm", "generate", name, asdict(case)) for name in VLLM_CONTENDERS}

    def answer(name: str) -> tuple[list[list[int]], float]:
        engine, adapter = VLLM_CONTENDERS[name]
        numbers = [adapter(row, case.adapters) for row in range(case.batch)]
        names = [None if number is None else str(number) for number in numbers]
        asked = [Ask(prompt, name, name and str(folder / name)) for prompt, name in zip(prompts, names, strict=True)]
        return made[engine].answer(asked, NEW_TOKENS)

    tokens = {name: [answer(name), answer(name)][1][0] for name in VLLM_CONTENDERS}  # twice: they warm up, too
    for name, problem in wrong(case, tokens).items():
        rows[name].status = problem
    timed = [name for name, row in rows.items() if row.status == "ok"]
    for number in range(rounds):
        for name in timing.in_turn(timed, number):
            rows[name].samples.append(answer(name)[1] / NEW_TOKENS)
    return list(rows.values())


def wrong(case: ServeCase, tokens: dict[str, list[list[int]]]) -> dict[str, str]:
    """Return the contenders with wrong tokens: name -> the problem.

    Adapters must change the tokens; with a random model a few rows may stay the same by chance. In float32, requests
    without adapter must get the tokens of vLLM without the plug-in. Rows of the first adapter must get the same tokens
    as when all rows use it.
    """
    exact = case.dtype == "float32"
    found = {}
    if exact and tokens["no-adapter"] != tokens["unsteered"]:
        found["no-adapter"] = "wrong: not the tokens of vLLM without the plug-in; expected the same"
    for name in ("one-adapter", "fused", "fused-again"):
        same = [row for row in range(case.batch) if tokens[name][row] == tokens["unsteered"][row]]
        others = range(0, case.batch, case.adapters)
        if 10 * len(same) > case.batch:
            found[name] = f"wrong: {len(same)} rows have the unsteered tokens; expected at most a tenth of {case.batch}"
        elif exact and any(tokens[name][row] != tokens["one-adapter"][row] for row in others):
            found[name] = "wrong: a row of the first adapter has other tokens than in one-adapter; expected the same"
    return found


def measure(
    case: ServeCase, batches: Sequence[tuple[int, int]], results: Results, save: Any, rounds: int
) -> Iterator[str]:
    """Measure each batch of (rows, adapters), saving after each; yield a line for each."""
    most_rows, most_adapters = (max(values) for values in zip(*batches, strict=True))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_all(case, folder, most_adapters)
        with engines(case, folder, most_rows, most_adapters) as made:
            for batch, adapters in batches:
                here = replace(case, batch=batch, adapters=adapters)
                rows = measure_vllm(here, made, folder, rounds)
                for row in rows:
                    results.put(row)
                save()
                yield _line(here, rows)


def _line(case: ServeCase, rows: list[Row]) -> str:
    base = rows[0].median
    parts = []
    for row in rows:
        if row.median is None:
            parts.append(f"{row.contender} {row.status}")
        else:
            ratio = "" if base is None else f" ({row.median / base:.3f}x)"
            parts.append(f"{row.contender} {case.batch / row.median:.0f} tokens/s{ratio}")
    return f"{case.batch} rows, {case.adapters} adapters: {'; '.join(parts)}"


def _pairs(text: str) -> list[tuple[int, int]]:
    try:
        pairs = [(int(rows), int(adapters)) for rows, adapters in (part.split(":") for part in text.split(","))]
    except ValueError:
        raise ValueError(f"batches is {text!r}; expected rows:adapters, as 8:1,256:256") from None
    for rows, adapters in pairs:
        if not 1 <= adapters <= rows:
            raise ValueError(f"batches has {rows}:{adapters}; expected 1 to {rows} adapters")
    return pairs


def main(
    out: Annotated[Path, typer.Option(help="Directory for the results file.")],
    geometry: Annotated[str, typer.Option(help="The model's sizes, by the name of a real model.")] = "",
    layers: Annotated[int, typer.Option(help="Number of layers; 0 is all.")] = 0,
    batches: Annotated[str, typer.Option(help="rows:adapters of each batch.")] = "256:256,256:16,256:1,64:64,8:8,1:1",
    length: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 64,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16. Default: bfloat16 on a GPU, float32 on a CPU.")
    ] = "",
    rounds: Annotated[int, typer.Option(help="Samples of each contender.")] = 10,
) -> None:
    """Measure vLLM, unsteered and steered, in turn."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    try:
        pairs = _pairs(batches)
        case = ServeCase(
            geometry or ("Llama-3.2-1B" if on_gpu else "small"), layers, 1, length, 1,
            dtype=dtype or ("bfloat16" if on_gpu else "float32"),
        )  # fmt: skip
        if rounds < 1:
            raise ValueError(f"rounds is {rounds}; expected at least 1")
        if out.exists() and not out.is_dir():
            raise ValueError(f"out is {str(out)!r}, a file; expected a directory")
        machine = describe_machine(device, "bench.vllm")
        if machine["versions"]["vllm"] is None:
            raise ValueError("vLLM is not installed; expected it beside fused-steer (docs/serving.md has the command)")
        file = out / file_name(machine["device"] + " vllm")
        results = start(file, machine)
        for line in measure(case, pairs, results, lambda: results.save(file), rounds):
            typer.echo(line)
    except (ValueError, RuntimeError, OSError) as error:
        typer.echo(f"bench.vllm: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"results: {file}")


if __name__ == "__main__":
    typer.run(main)
