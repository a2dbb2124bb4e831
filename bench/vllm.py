"""`python -m bench.vllm --out DIR`: tokens a second of vLLM, steered and not, with 1 to many adapters in a batch.

Two engines side by side, each in a process of its own: vLLM as it is, without the plug-in; and with it, for steering
alone (`lora_target_modules=["post_block"]`). They answer the same prompts in turn. Wants vLLM beside fused-steer:
docs/serving.md has the command that installs both. No network: the model has a real one's sizes and random weights. A
second run with other batches or another geometry adds to the results file.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from . import timing
from .contenders import adapter_weights, set_adapter
from .geometries import GEOMETRIES, ServeCase
from .levels import build_base
from .results import Results, Row, describe_machine, file_name, start

NEW_TOKENS = 32
#: Contender -> (engine, which of `adapters` row number `row` has; None: no adapter).
VLLM_CONTENDERS: dict[str, tuple[str, Any]] = {
    "unsteered": ("plain", lambda row, adapters: None),
    "no-adapter": ("steered", lambda row, adapters: None),
    "one-adapter": ("steered", lambda row, adapters: 0),
    "fused": ("steered", lambda row, adapters: row % adapters),
    "fused-again": ("steered", lambda row, adapters: row % adapters),
}


# ----------------------------------------------------------------------------------------------- in an engine's process


def _serve(pipe: Connection, options: dict[str, Any], environment: dict[str, str]) -> None:
    """Answer (prompts, adapters) with (tokens, seconds) until None comes. The first message says that it is ready."""
    os.environ.update(environment)
    try:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        engine = LLM(**options)
    except Exception as error:  # whatever it is, the other process has to hear of it
        pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return
    pipe.send("")
    parameters = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    while (asked := pipe.recv()) is not None:
        prompts, adapters = asked
        requests = [path and LoRARequest(Path(path).name, int(Path(path).name) + 1, path) for path in adapters]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        begin = time.perf_counter()
        # An engine without LoRA takes no list of None.
        outputs = engine.generate(inputs, parameters, lora_request=requests if any(requests) else None, use_tqdm=False)
        seconds = time.perf_counter() - begin
        pipe.send(([list(output.outputs[0].token_ids) for output in outputs], seconds))
    engine.llm_engine.engine_core.shutdown()


# ------------------------------------------------------------------------------------------------------ in the main one


class Engine:
    """An engine in a process of its own."""

    def __init__(self, options: dict[str, Any], environment: dict[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, options, environment))
        self._process.start()
        theirs.close()

    def wait(self) -> None:
        """Until it is ready.

        Raises:
            RuntimeError: it could not be started.
        """
        if problem := self._receive():
            raise RuntimeError(f"vLLM did not start: {problem}")

    def answer(self, prompts: list[list[int]], adapters: list[str | None]) -> tuple[list[list[int]], float]:
        """Greedy continuations of one batch, and the seconds that they took."""
        self._pipe.send((prompts, adapters))
        return self._receive()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError("vLLM's process is gone; expected an answer (its own output says why)") from None

    def close(self) -> None:
        if self._process.is_alive():
            try:
                self._pipe.send(None)
            except OSError:
                pass
            self._process.join(60)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def save_all(case: ServeCase, folder: Path, count: int) -> None:
    """The model in model/, and adapters in 0/, 1/, …"""
    from fused_steer import SteerConfig, patch_model

    model = build_base(case.model, torch.device("cpu"))
    model.save_pretrained(folder / "model")
    # So strong that no row goes on with the unsteered tokens; it costs what any strength does.
    patch_model(model, SteerConfig(rank=case.rank, scale=20.0))
    for number in range(count):
        set_adapter(model, "default", adapter_weights(model, case.rank, seed=number))
        model.steering.save(folder / str(number))


@contextmanager
def engines(case: ServeCase, folder: Path, most_rows: int, most_adapters: int) -> Iterator[dict[str, Engine]]:
    """Both, ready; ended afterwards."""
    options = {
        "model": str(folder / "model"),
        "skip_tokenizer_init": True,
        "dtype": case.dtype,
        "max_model_len": case.length + NEW_TOKENS,
        "max_num_seqs": most_rows,
        "enable_prefix_caching": False,  # the same prompts come again and again
        "gpu_memory_utilization": 0.4,
        "disable_log_stats": True,
        # On a CPU vLLM compiles nothing once LoRA is enabled: then neither engine is to.
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
        made["plain"].wait()  # one after the other: each measures the memory that there is
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
    """Seconds a token of every row, prefill included, of each contender in turn; one that answers otherwise than it
    must has a row that says so."""
    prompts = make_prompts(case)
    rows = {name: Row("vllm", "generate", name, asdict(case)) for name in VLLM_CONTENDERS}

    def answer(name: str) -> tuple[list[list[int]], float]:
        engine, adapter = VLLM_CONTENDERS[name]
        numbers = [adapter(row, case.adapters) for row in range(case.batch)]
        return made[engine].answer(prompts, [None if n is None else str(folder / str(n)) for n in numbers])

    tokens = {name: [answer(name), answer(name)][1][0] for name in VLLM_CONTENDERS}  # twice: they warm up, too
    for name, problem in wrong(case, tokens).items():
        rows[name].status = problem
    timed = [name for name, row in rows.items() if row.status == "ok"]
    for number in range(rounds):
        for name in timing.in_turn(timed, number):
            rows[name].samples.append(answer(name)[1] / NEW_TOKENS)
    return list(rows.values())


def wrong(case: ServeCase, tokens: dict[str, list[list[int]]]) -> dict[str, str]:
    """Contender -> what is wrong with its tokens. Adapters have to change them; by chance a random model may go on as
    without, in a few rows. In float32, requests without adapter are answered as by vLLM without the plug-in, and the
    rows of the first adapter as where all rows have it."""
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
            found[name] = "wrong: a row of the first adapter has other tokens than by it alone; expected the same"
    return found


def measure(
    case: ServeCase, batches: Sequence[tuple[int, int]], results: Results, save: Any, rounds: int
) -> Iterator[str]:
    """Measure (rows, adapters) after (rows, adapters), saving after each; a line for each that is done."""
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
    geometry: Annotated[str, typer.Option(help="Whose sizes the model has.")] = "",
    layers: Annotated[int, typer.Option(help="How many of its layers; 0 is all.")] = 0,
    batches: Annotated[str, typer.Option(help="rows:adapters of each batch.")] = "256:256,256:16,256:1,64:64,8:8,1:1",
    length: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; by default what suits the device.")] = "",
    rounds: Annotated[int, typer.Option(help="Samples of each.")] = 10,
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
