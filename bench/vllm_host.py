"""`python -m bench.vllm_host`: host time of a vLLM step on a CPU, idle against vanilla and many strengths against one.

Engines run in turn, each in a process: vLLM without the plug-in, twice, and steering without `--enable-lora`. A step
decodes a token of each request of a tiny model, so that nearly all of its time is the host's. The figures are the CPU
time of the process, which other processes on the machine disturb less than the clock, and the number of calls of
Python and C functions, which they do not disturb. Two processes of the same engine differ by some percent as long as
they live. So the engines are started several times. The ratio of the two without the plug-in is the noise that is left.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

#: Engine -> whether it has the plug-in.
ENGINES = {"vanilla": False, "vanilla again": False, "steering": True}
#: Contender -> (its engine, the steering options of the request in a row).
CONTENDERS: dict[str, tuple[str, Any]] = {
    "vanilla": ("vanilla", lambda row, rows: None),
    "vanilla again": ("vanilla again", lambda row, rows: None),
    "idle": ("steering", lambda row, rows: None),
    "one strength": ("steering", lambda row, rows: {"adapter": "one", "scale": 0.5}),
    "a strength a request": ("steering", lambda row, rows: {"adapter": "one", "scale": (row + 1) / rows}),
}
#: The contenders that are compared.
RATIOS = (("vanilla again", "vanilla"), ("idle", "vanilla"), ("a strength a request", "one strength"))


def _serve(folder: Path, with_steering: bool, compiled: bool) -> None:
    """Start an engine in this process; answer lines (contender, rows, tokens, counted) by figures of a step.

    The figure is the CPU seconds, or the calls if `counted` is true.
    """
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ["VLLM_PLUGINS"] = "fused_steer" if with_steering else ""
    from vllm import LLM, SamplingParams

    steering = {"additional_config": {"steering": {"adapters": str(folder / "adapters")}}} if with_steering else {}
    engine = LLM(
        str(folder / "model"),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=256,
        enforce_eager=not compiled,
        enable_prefix_caching=False,
        disable_log_stats=True,
        kv_cache_memory_bytes=256 << 20,
        **steering,
    )
    print("ready", flush=True)
    for line in sys.stdin:
        name, rows, tokens, counted = json.loads(line)
        options = [CONTENDERS[name][1](row, rows) for row in range(rows)]
        parameters = [
            SamplingParams(
                temperature=0,
                max_tokens=tokens,
                ignore_eos=True,
                detokenize=False,
                extra_args=given and {"steering": given},
            )
            for given in options
        ]
        for row, each in enumerate(parameters):
            engine.llm_engine.add_request(str(row), {"prompt_token_ids": [5 + row % 50] * 4}, each)
        engine.llm_engine.step()  # the prompts
        calls, steps = 0, 0

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        begin = time.process_time()
        sys.setprofile(count if counted else None)
        while engine.llm_engine.has_unfinished_requests():
            engine.llm_engine.step()
            steps += 1
        sys.setprofile(None)
        print(json.dumps((calls if counted else time.process_time() - begin) / steps), flush=True)


class _Engine:
    def __init__(self, folder: Path, with_steering: bool, compiled: bool) -> None:
        command = [sys.executable, "-m", "bench.vllm_host", "--serve", str(folder)]
        command += ["--steering"] * with_steering + ["--compiled"] * compiled
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        while self._line() != "ready":
            pass

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("vLLM's process is gone; expected an answer (its own output says why)")
        return line.strip()

    def ask(self, name: str, rows: int, tokens: int, counted: bool = False) -> float:
        assert self._process.stdin is not None
        print(json.dumps([name, rows, tokens, counted]), file=self._process.stdin, flush=True)
        return float(self._line())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def save_model(folder: Path) -> None:
    """Save a tiny Llama in model/ and an adapter of every layer in adapters/one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fused_steer import SteerConfig, patch_model

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, vocab_size=256, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    patch_model(model, SteerConfig(rank=8))
    for name, parameter in model.named_parameters():
        if "steer_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.steering.save(folder / "adapters" / "one")


app = typer.Typer(add_completion=False)


@app.command()
def main(
    starts: Annotated[int, typer.Option(help="How many times the engines are started.")] = 5,
    rounds: Annotated[int, typer.Option(help="Rounds of a start; in each, every contender takes its turn.")] = 16,
    rows: Annotated[int, typer.Option(help="Requests of a batch.")] = 256,
    tokens: Annotated[int, typer.Option(help="Decoded tokens of each request in a round.")] = 16,
    compiled: Annotated[bool, typer.Option(help="Let vLLM compile the model.")] = False,
    steering: Annotated[bool, typer.Option(hidden=True)] = False,
    serve: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print the CPU time and the calls of a step of each contender, and the ratios."""
    if serve is not None:
        _serve(serve, steering, compiled)
        return
    times: dict[str, list[list[float]]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_model(folder)
        for _ in range(starts):
            found, calls = _measure(folder, rounds, rows, tokens, compiled)
            for name, samples in found.items():
                times[name].append(samples)
    for name, of_starts in times.items():
        samples = [seconds for samples in of_starts for seconds in samples]
        print(
            f"{name:22} {min(samples) * 1e3:.3f} ms least, {statistics.median(samples) * 1e3:.3f} ms median, a step;"
            f" {calls[name]:.0f} calls"
        )
    for first, second in RATIOS:
        pairs = zip(times[first], times[second], strict=True)
        ratios = [statistics.median(a / b for a, b in zip(*samples, strict=True)) for samples in pairs]
        print(
            f"{first} / {second}: {statistics.median(ratios):.3f} (median of {starts} starts, of medians of "
            f"{rounds} rounds; {min(ratios):.3f} to {max(ratios):.3f}), {calls[first] / calls[second]:.4f} (calls)"
        )


def _measure(
    folder: Path, rounds: int, rows: int, tokens: int, compiled: bool
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Start the engines; return the CPU seconds of a step in each round, and the calls of a step, by contender."""
    engines: dict[str, _Engine] = {}
    try:
        for name, plugged in ENGINES.items():
            engines[name] = _Engine(folder, plugged, compiled)
        times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for number in range(rounds + 1):
            in_turn = list(CONTENDERS.items())
            for name, (engine, _) in in_turn[:: 1 if number % 2 else -1]:  # who goes first may be slower
                seconds = engines[engine].ask(name, rows, tokens)
                if number:  # the first round warms up
                    times[name].append(seconds)
        calls = {name: engines[engine].ask(name, rows, tokens, True) for name, (engine, _) in CONTENDERS.items()}
    finally:
        for started in engines.values():
            started.close()
    return times, calls


if __name__ == "__main__":
    app()
