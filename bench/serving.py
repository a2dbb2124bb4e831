"""Benchmark of batches served by transformers: unsteered, with one adapter, and with one adapter per row.

`python -m bench.serving --out DIR` measures this and the grouped op on a CPU in float32. There it compares PyTorch
implementations and says nothing about the kernels. On a GPU, `python -m bench.gpu` measures both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from .contenders import adapter_weights, copy_of, decoder_layers, set_adapter, steer_fused
from .geometries import GroupedCase, ServeCase
from .grouped import GROUPED_CONTENDERS, measure_grouped
from .levels import Prepared, build_base, decode_call, forgotten, make_tokens, prefill_call, release, take_samples
from .results import Row, describe_machine, file_name, start
from .timing import Timed

SERVE_RUNS = ("generate", "decode-graph")
NEW_TOKENS = 32


def _rows(case: ServeCase) -> list[int]:
    """Return each row's adapter number; the adapters take turns."""
    return [row % case.adapters for row in range(case.batch)]


def by_one_adapter(case: ServeCase, model: Any) -> Any:
    return steer_fused(model, case.rank)


def by_rows(case: ServeCase, model: Any, dtype: str = "float32") -> Any:
    """Steer each row with its own adapter, kept in `dtype`. The batch stays open as long as the model lives."""
    from fused_steer import SteerConfig, patch_model

    for number in range(case.adapters):
        config, name = SteerConfig(rank=case.rank, dtype=dtype), str(number)
        if number:
            model.steering.add(name, config)
        else:
            patch_model(model, config, adapter_name=name)
        set_adapter(model, name, adapter_weights(model, case.rank, seed=number))
    model.batch = model.steering.batch([str(number) for number in _rows(case)])
    model.batch.__enter__()
    return model


class _GatheredShift(nn.Module):
    """Adds W2 φ(W1 h) with each row's own adapter, from weights copied for each token."""

    def __init__(self, downs: Tensor, ups: Tensor, rows: list[int], like: Tensor) -> None:
        super().__init__()
        self.register_buffer("downs", downs.to(like.device, like.dtype))
        self.register_buffer("ups", ups.to(like.device, like.dtype))
        self.register_buffer("rows", torch.tensor(rows, device=like.device))

    def forward(self, h: Tensor) -> Tensor:
        batch, length, hidden = h.shape
        slots = self.rows.repeat_interleave(length)
        a = torch.bmm(self.downs[slots], h.reshape(-1, hidden, 1))
        return h + torch.bmm(self.ups[slots], F.silu(a)).view(batch, length, hidden)


def by_gather(case: ServeCase, model: Any) -> Any:
    """Steer each row with its own adapter by forward hooks on the decoder layers: a gather and two batched products."""
    weights = [adapter_weights(model, case.rank, seed=number) for number in range(case.adapters)]
    for index, layer in enumerate(decoder_layers(model)):
        downs, ups = (torch.stack([of_layers[index][part] for of_layers in weights]) for part in (0, 1))
        layer.shift = _GatheredShift(downs, ups, _rows(case), next(layer.parameters()))

        def steer(module: Any, _: Any, output: Any) -> Any:
            return (module.shift(output[0]), *output[1:]) if isinstance(output, tuple) else module.shift(output)

        layer.register_forward_hook(steer)
    return model


SERVE_CONTENDERS: dict[str, Callable[[ServeCase, Any], Any]] = {
    "unsteered": lambda case, model: model,
    "fused": by_rows,
    "fused-again": by_rows,
    "fused-bf16": lambda case, model: by_rows(case, model, "bfloat16"),  # half the bytes of adapter weights
    "one-adapter": by_one_adapter,
    "gather-bmm": by_gather,
}


def generate_call(case: ServeCase, model: Any, device: torch.device) -> Prepared:
    """Prepare a call of `generate` with NEW_TOKENS new tokens per row."""
    tokens = make_tokens(case.model, model.eval(), device)
    model.generation_config.eos_token_id = None  # all rows end together

    def generate() -> Tensor:
        return model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, do_sample=False
        )

    return Prepared(model, generate)


def check(case: ServeCase, names: Sequence[str], device: torch.device) -> dict[str, str]:
    """Return the contenders that compute wrong logits: name -> the problem.

    On a model of two layers in float32, the logits must equal those of gather-bmm. These must differ from the unsteered
    logits in every row.
    """
    rows = min(case.batch, 8)
    small = replace(
        case, layers=2, batch=rows, length=17, adapters=min(case.adapters, rows), dtype="float32"
    )  # a model cut to two layers also has a small vocabulary
    base = build_base(small.model, device)

    def logits(name: str) -> Tensor:
        return prefill_call(small.model, SERVE_CONTENDERS[name](small, copy_of(base)), device).call()

    truth, unsteered = logits("gather-bmm"), logits("unsteered")
    wrong = {}
    if not ((truth - unsteered).flatten(1).norm(dim=1) > 1e-3 * unsteered.norm()).all():
        wrong["gather-bmm"] = "wrong: it does not move the logits of every row; expected it to steer"
    for name in names:
        if not name.startswith("fused") or name.endswith("-again"):
            continue
        try:
            error = float((logits(name) - truth).norm() / truth.norm())
        except Exception as failure:  # the run goes on
            wrong[name] = forgotten(failure)
        else:
            most = 1e-2 if name == "fused-bf16" else 1e-4
            if not error <= most:
                wrong[name] = f"wrong: it differs from gather-bmm by {error:.2e}; expected at most {most:g}"
    return {name: wrong[name.removesuffix("-again")] for name in names if name.removesuffix("-again") in wrong}


_CALLS: dict[str, Callable[[ServeCase, Any, torch.device], Prepared]] = {
    "generate": generate_call,
    "decode-graph": lambda case, model, device: decode_call(case.model, model, device),
}


def _get_ready(
    case: ServeCase, what: str, name: str, base: Any, device: torch.device
) -> tuple[Timed, Callable[[], Any] | None]:
    prepared = _CALLS[what](case, SERVE_CONTENDERS[name](case, copy_of(base)), device)
    timed = Timed(name, [prepared.call])
    timed.prepare(device, graph=what == "decode-graph")
    return timed, prepared.reset


def measure_serving(
    case: ServeCase, what: str, device: torch.device, names: Sequence[str], rounds: int = 10
) -> list[Row]:
    """Measure the seconds per token of all rows for all contenders, interleaved.

    generate: a whole call divided by NEW_TOKENS, prefill and host included. decode-graph: one step on a static cache,
    replayed from a CUDA graph. A contender that cannot run, or computes a wrong result, gets a row that says so.
    """
    rows = {name: Row("serve", what, name, asdict(case)) for name in names}
    ready: list[Timed] = []
    resets = []
    try:
        for name, problem in check(case, names, device).items():
            rows[name].status = problem
        base = build_base(case.model, device)
    except torch.OutOfMemoryError as error:
        for row in rows.values():
            row.status = forgotten(error)
        return list(rows.values())
    for name in names:
        if rows[name].status != "ok":
            continue
        try:
            timed, reset_one = _get_ready(case, what, name, base, device)
        except Exception as error:  # a rival may fail in any way, and the run goes on
            rows[name].status = forgotten(error)
        else:
            ready.append(timed)
            resets += [] if reset_one is None else [reset_one]
        if rows[name].status != "ok":
            release(device)  # after the error, which held the contender

    def reset() -> None:
        for each in resets:
            each()

    take_samples(ready, rows, device, rounds, before=reset)
    for row in rows.values():
        row.samples = [sample / (NEW_TOKENS if what == "generate" else 1) for sample in row.samples]
    return list(rows.values())


# ------------------------------------------------------------------------------------------------------------- on a CPU


def cpu_cases() -> list[GroupedCase | ServeCase]:
    """Return the cases for a CPU: decoding with 1 to 256 adapters, prefill with 1 and 8, and two whole models."""
    grouped = [
        GroupedCase(tokens, hidden, adapters, dtype="float32")
        for hidden in (1152, 2048, 4096)
        for tokens in (1, 8, 64, 256)
        for adapters in sorted({1, 16, 64, tokens})
        if adapters <= tokens
    ]
    grouped += [GroupedCase(512, hidden, n, prefill=True, dtype="float32") for hidden in (2048, 4096) for n in (1, 8)]
    sizes = (("SmolLM2-135M", 1, 1), ("SmolLM2-135M", 8, 8), ("SmolLM2-135M", 32, 32), ("small", 256, 256))
    return [*grouped, *(ServeCase(name, 0, batch, 32, n, dtype="float32") for name, batch, n in sizes)]


def main(
    out: Annotated[Path, typer.Option(help="Directory for the results file.")],
    rounds: Annotated[int, typer.Option(help="Samples of each contender.")] = 20,
) -> None:
    """Measure the grouped op and `generate` on this machine's CPU."""
    device = torch.device("cpu")
    try:
        if torch.cuda.is_available():
            raise ValueError("there is a GPU; expected none (`python -m bench.gpu` measures there)")
        if rounds < 1:
            raise ValueError(f"rounds is {rounds}; expected at least 1")
        if out.exists() and not out.is_dir():
            raise ValueError(f"out is {str(out)!r}, a file; expected a directory")
        machine = describe_machine(device, "bench.serving")
        file = out / file_name(machine["device"] + " serving")
        results = start(file, machine)
    except (ValueError, OSError) as error:
        typer.echo(f"bench.serving: {error}", err=True)
        raise typer.Exit(1) from None
    for case in cpu_cases():
        if isinstance(case, GroupedCase):
            rows = measure_grouped(case, device, list(GROUPED_CONTENDERS), 10 * rounds)
        else:
            names = [name for name in SERVE_CONTENDERS if name != "fused-bf16"]  # a CPU converts bf16 at every step
            rows = measure_serving(case, "generate", device, names, rounds)
        for row in rows:
            results.put(row)
        results.save(file)
        typer.echo(ratios(case, rows))
    typer.echo(f"results: {file}")


def ratios(case: GroupedCase | ServeCase, rows: Sequence[Row]) -> str:
    """Return a line with each contender's median time, and its multiple of the fused contender's."""
    timed = {row.contender: row for row in rows if row.what != "bytes"}
    base = timed["fused"].median
    parts = [
        f"{name} {row.status}" if row.median is None else f"{name} {1e6 * row.median:.0f} us"
        + (f" ({row.median / base:.2f}x)" if base else "")
        for name, row in timed.items()
    ]  # fmt: skip
    return f"{case}: {', '.join(parts)}"


if __name__ == "__main__":
    typer.run(main)
