"""`fused-steer bench`: times the op and a small model on this machine, against plain PyTorch, in a short run.

It times the wall clock between synchronisations, over many calls in turn. `python -m bench` in the checkout has the
careful benchmarks, with cold caches, counted launches and rivals.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._version import __version__
from ..config import SteerConfig
from ..kernels import post_block, select_backend
from ..patch import patch_model


@dataclass(frozen=True)
class Size:
    """What is timed.

    Attributes:
        tokens: of the op, N, and of the model's batch.
        hidden, rank: of the op, d and r.
        layers, width: of the model: a random Llama.
        rounds: how often each contender is timed, in turn.
        calls: calls of the op a time.
    """

    tokens: int
    hidden: int
    rank: int
    layers: int
    width: int
    rounds: int
    calls: int


#: On a GPU, and on a CPU.
GPU = Size(4096, 4096, 8, 16, 2048, 20, 20)
CPU = Size(256, 1024, 8, 4, 256, 10, 3)


@dataclass(frozen=True)
class Row:
    """A contender's time in milliseconds: the median of the rounds, and the quartiles."""

    what: str
    contender: str
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timings:
    """The result of `measure`: the machine and a row for each contender of each subject."""

    machine: dict[str, str]
    size: Size
    rows: tuple[Row, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON data."""
        return asdict(self)

    def block(self) -> str:
        """Return the result as a Markdown block to paste."""
        first: dict[str, float] = {}
        lines = [f"- {name}: {value}" for name, value in self.machine.items()]
        lines += ["", "| | contender | ms (median) | quartiles | of the first |", "| --- | --- | --: | --: | --: |"]
        for row in self.rows:
            base = first.setdefault(row.what, row.median)
            ends = f"{row.low:.3f} – {row.high:.3f}"
            lines.append(f"| {row.what} | {row.contender} | {row.median:.3f} | {ends} | {row.median / base:.3f} |")
        return "\n".join(lines)


def measure(device: torch.device, size: Size | None = None) -> Timings:
    """Time the op and a model on a device.

    The op: `residual + branch` alone, with steering by plain PyTorch, and by `post_block`, without gradients. The
    model: a training step and a pass over a prompt, of the frozen base (the pass only), with a forward hook of plain
    PyTorch at each layer, and patched.

    Args:
        device: where to run.
        size: GPU's or CPU's if None.
    """
    chosen = size or (CPU if device.type == "cpu" else GPU)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    rows = [*_op(device, dtype, chosen), *_model(device, dtype, chosen)]
    return Timings(_machine(device, dtype, chosen), chosen, tuple(rows))


def _machine(device: torch.device, dtype: torch.dtype, size: Size) -> dict[str, str]:
    named = platform.processor() or platform.machine()
    if device.type == "cuda":
        named = torch.cuda.get_device_name(device)
    return {
        "machine": f"{named}, {torch.get_num_threads()} threads" if device.type == "cpu" else named,
        "versions": f"fused-steer {__version__}, torch {torch.__version__}",
        "backend": select_backend(device),
        "op": f"N = {size.tokens}, d = {size.hidden}, r = {size.rank}, {str(dtype).removeprefix('torch.')}",
        "model": f"a random Llama of {size.layers} layers, d = {size.width}, {size.tokens} tokens",
    }


def _op(device: torch.device, dtype: torch.dtype, size: Size) -> list[Row]:
    torch.manual_seed(0)
    residual, branch = (torch.randn(size.tokens, size.hidden, device=device, dtype=dtype) for _ in range(2))
    down = torch.randn(size.rank, size.hidden, device=device) / size.hidden**0.5
    up = torch.randn(size.hidden, size.rank, device=device) / size.rank**0.5
    weights = down.to(dtype), up.to(dtype)

    def plain() -> Tensor:
        hidden = residual + branch
        return hidden + F.linear(F.silu(F.linear(hidden, weights[0])), weights[1])

    contenders = {
        "the residual add alone": lambda: residual + branch,
        "steered by plain PyTorch": plain,
        "steered by post_block": lambda: post_block(residual, branch, down, up),
    }
    with torch.no_grad():
        return _timed("the op", contenders, device, size.rounds, size.calls)


def _model(device: torch.device, dtype: torch.dtype, size: Size) -> list[Row]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=max(1, size.width // 64),
        num_key_value_heads=max(1, size.width // 128),
    )

    def build() -> Any:
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(device, dtype).requires_grad_(False)

    base, hooked, patched = build(), build(), patch_model(build(), SteerConfig(rank=size.rank))
    for layer in hooked.model.layers:
        layer.steering = _Hook(size.width, size.rank).to(device)
        layer.register_forward_hook(layer.steering.shift)
    ids = torch.randint(8192, (max(1, size.tokens // 512), min(512, size.tokens)), device=device)

    def prompt(model: Any) -> Callable[[], Any]:
        def call() -> Any:
            with torch.no_grad():
                return model(ids, use_cache=False).logits

        return call

    def step(model: Any) -> Callable[[], Any]:
        def call() -> Any:
            model.zero_grad()
            model(ids, labels=ids, use_cache=False).loss.backward()

        return call

    names = {"hooks of plain PyTorch": hooked, "fused-steer": patched}
    passes = {"the base": prompt(base), **{name: prompt(model) for name, model in names.items()}}
    steps = {name: step(model) for name, model in names.items()}
    return [
        *_timed("a prompt", passes, device, size.rounds, 1),
        *_timed("a training step", steps, device, size.rounds, 1),
    ]


class _Hook(nn.Module):
    """Steering as people write it: a forward hook with plain PyTorch."""

    def __init__(self, hidden: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, hidden) / hidden**0.5)
        self.up = nn.Parameter(torch.zeros(hidden, rank))

    def shift(self, layer: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        a = F.silu(F.linear(hidden, self.down.to(hidden.dtype)))
        steered = hidden + F.linear(a, self.up.to(hidden.dtype))
        return (steered, *output[1:]) if isinstance(output, tuple) else steered


def _timed(
    what: str, contenders: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int, calls: int
) -> list[Row]:
    """Return a row for each contender. They take turns, after two rounds that are not timed."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 2):
        for name, call in contenders.items():
            _wait(device)
            start = time.perf_counter()
            for _ in range(calls):
                call()
            _wait(device)
            if turn >= 2:
                samples[name].append(1e3 * (time.perf_counter() - start) / calls)
    return [Row(what, name, *_quartiles(found)) for name, found in samples.items()]


def _quartiles(found: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else (found[0],) * 3
    return middle, low, high


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
